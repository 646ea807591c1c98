//! One launch of a plan.

use crate::error::{Error, Result};
use moe_lora_kernels::{ENTRIES, Entry, Kernel};
use std::fmt;

/// Most blocks of one launch: the grid's x dimension.
const MAX_BLOCKS: u64 = i32::MAX as u64;

/// One launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// The kernel.
    pub entry: &'static Entry,
    /// Blocks: a multiple of `cluster`.
    pub blocks: u32,
    /// Blocks of a cluster; 1: no clusters.
    pub cluster: u32,
    /// Whether all blocks must run at once.
    pub cooperative: bool,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// One launch of a [`Plan`](super::Plan), as the driver is asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedLaunch {
    /// Name of the kernel's entry point.
    pub kernel: &'static str,
    /// Blocks: a multiple of `cluster`.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Blocks of a cluster; 1: no clusters.
    pub cluster: u32,
    /// Whether all blocks must run at once.
    pub cooperative: bool,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// The entry point of a kernel.
pub(crate) fn entry(kernel: Kernel) -> &'static Entry {
    ENTRIES.iter().find(|entry| entry.kernel == kernel).expect("every variant is in the table")
}

impl Launch {
    /// Of `kernel`, in clusters of `cluster` blocks.
    ///
    /// # Errors
    /// [`Error::SizeTooLarge`] for more blocks than a grid has.
    pub fn new(kernel: Kernel, blocks: u64, cluster: u32, shared_bytes: u32) -> Result<Self> {
        if blocks > MAX_BLOCKS {
            let (what, limit) = ("blocks of a launch", MAX_BLOCKS as usize);
            return Err(Error::SizeTooLarge { what, limit, got: blocks as usize });
        }
        let cooperative = matches!(kernel, Kernel::RouteGrid | Kernel::RouteWide);
        Ok(Launch { entry: entry(kernel), blocks: blocks as u32, cluster, cooperative, shared_bytes })
    }
}

impl From<Launch> for PlannedLaunch {
    fn from(launch: Launch) -> Self {
        let Launch { entry, blocks, cluster, cooperative, shared_bytes } = launch;
        let (kernel, threads) = (entry.name, entry.threads);
        PlannedLaunch { kernel, blocks, threads, cluster, cooperative, shared_bytes }
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Launch { entry, blocks, cluster, cooperative, shared_bytes } = self;
        let Entry { name, threads, .. } = entry;
        write!(f, "{name:<20} {blocks} blocks of {threads} threads, {shared_bytes} bytes shared")?;
        if *cooperative {
            f.write_str(", all at once")?;
        }
        if *cluster > 1 { write!(f, ", clusters of {cluster}") } else { Ok(()) }
    }
}
