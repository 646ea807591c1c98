//! The emulated machine: kernels on the CPU, with every access checked.
//!
//! Threads are coroutines. One runs at a time, until it meets others (a barrier, a warp-wide operation) or
//! ends. A seed decides which runs next. The blocks of a cluster run together. Clusters follow one another,
//! or blocks where there are no clusters, in an order that the seed decides too. All blocks of a cooperative
//! launch run together. Addresses of device memory are numbers of the emulator's own, so a wrong one is
//! reported and never followed.
//!
//! What is checked:
//!
//! - **Device memory.** An access lies inside one [`Buffer`] of the launch and is aligned. It writes only
//!   where the launch may, and reads only where somebody wrote.
//! - **Shared memory.** An access lies inside the block's allocation, is aligned, and reads only where
//!   somebody wrote. Another block must be sure to have started, and not to have ended.
//! - **`cp.async`.** Data lands when its group is waited for, or with the phase that waits for it. Any access
//!   before that is reported.
//! - **`cp.async.bulk`, `st.async`.** Data lands when the phase that counts it completes. Any access before
//!   that is reported, and so is the end of the block before it.
//! - **`wgmma`.** It is carried out when waited for; its registers were shown to it.
//! - **`fence.proxy.async`.** One lies between a store to shared memory and a bulk copy to the same place, or
//!   a `wgmma` that reads it.
//! - **mbarriers.** They are initialised once, before any use, and shown to other blocks and to copies. A
//!   phase gets no more arrivals and bytes than it takes. Who waits misses no phase.
//! - **Races.** Of two accesses, one of them a write, one comes before the other by a barrier of the block,
//!   of some of its threads or of the cluster, by `bar.warp.sync`, or by an mbarrier's phase. Atomics and
//!   relaxed accesses may race with one another.
//! - **Waiting.** A thread that looks for a word must find it: its writer runs at the same time, and writes
//!   it.
//! - **Overlap of launches.** Nothing is read that a launch which may still run writes, and nothing is
//!   written that it reads.
//! - **Barriers and warp-wide operations.** All threads that must come do, to the same line.
//! - **Offsets.** Products and sums of a 32-bit [`Index`](crate::memory::Index) do not wrap.
//!
//! What is not modelled:
//!
//! - Memory order within a warp: of the warp-wide operations only `bar.warp.sync` orders anything here.
//! - When a store becomes visible: here it is at once, so a missing order of data after a counter goes
//!   unseen.
//! - Timing.
//! - The proxies of device memory: a bulk copy reads what a thread of the same launch has stored there
//!   without asking for a fence.
//!
//! | file | what it holds |
//! |---|---|
//! | `machine`, `block`, `thread`, `shared` | what runs, and who may run next |
//! | `instruction`, `warp_wide`, `named`, `mbarrier`, `warpgroup` | what each instruction does |
//! | `warp` | what warp-wide operations compute |
//! | `access`, `shadow`, `accesses` | what each access is checked for, and what is kept of it |
//! | `order`, `meeting` | who knows what to have happened before |
//! | `memory`, `overlap` | device memory, and launches that share their time |
//! | `report` | what was wrong, and where |

mod access;
mod accesses;
mod block;
mod instruction;
mod machine;
mod mbarrier;
mod meeting;
mod memory;
mod named;
mod order;
mod overlap;
mod report;
mod shadow;
mod shared;
mod thread;
mod warp;
mod warp_wide;
mod warpgroup;

pub(crate) use instruction::{
    ask_for_bytes, block, cluster_blocks, cluster_rank, commit_copies, fence_copies, launch_dependents,
    load_global, load_relaxed, load_shared, map_shared, overflow, start_copy, store_global, store_relaxed,
    store_shared, sync_block, thread, trap, update_global, update_shared, wait_for_copies, wait_for_launch,
};
pub use machine::Launch;
pub(crate) use mbarrier::{
    arrive_after_copies, arrive_mbarrier, init_mbarrier, publish_mbarriers, start_bulk_copy, start_store,
    wait_mbarrier,
};
pub use memory::{Buffer, Memory};
pub(crate) use named::sync_some;
pub use report::{Fault, Report};
pub(crate) use shared::SHARED_BASE;
pub(crate) use warp_wide::{
    arrive_cluster, ballot, load_matrices, match_any, mma, shuffle, shuffle_up, sync_warp, wait_cluster,
};
pub(crate) use warpgroup::{
    Rows, commit_products, fence_warpgroup, multiply_warpgroup, set_registers, wait_for_products,
};

use crate::Entry;
use bytemuck::Pod;

/// How many blocks a launch has, and which of them run at once.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// As in [`Launch`].
    pub blocks: u32,
    /// As in [`Launch`].
    pub cluster: u32,
    /// As in [`Launch`].
    pub cooperative: bool,
}

/// Runs `body` once for every thread of the grid.
///
/// # Errors
/// The first fault found; memory is then as the kernel had left it.
///
/// # Panics
/// When a buffer is no part of `memory`, or threads and blocks are not whole warps and clusters.
pub fn run(
    launch: &Launch<'_>,
    memory: &mut Memory,
    buffers: &[Buffer],
    body: impl Fn() + 'static,
) -> Result<(), Box<Report>> {
    machine::run(launch, memory, buffers, std::rc::Rc::new(body))
}

/// Runs an entry point of the module on its parameter block, as on a device from sm_90 on: launches may
/// overlap.
///
/// Safe, although the entry point is not: what its caller must promise is what is checked here.
///
/// # Errors
/// As for [`run`].
///
/// # Panics
/// As for [`run`], and when `parameters` is not of the entry's type.
pub fn launch<P: Pod>(
    entry: &Entry,
    Grid { blocks, cluster, cooperative }: Grid,
    shared_bytes: u32,
    parameters: &P,
    memory: &mut Memory,
    buffers: &[Buffer],
    seed: u64,
) -> Result<(), Box<Report>> {
    let Entry { name: kernel, threads, .. } = *entry;
    let launch = Launch { kernel, blocks, cluster, cooperative, threads, shared_bytes, overlaps: true, seed };
    let body = crate::entry::emulated(entry.name).expect("every entry has an emulated form");
    let parameters = bytemuck::bytes_of(parameters).to_vec();
    run(&launch, memory, buffers, move || body(&parameters))
}
