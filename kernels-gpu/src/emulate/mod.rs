//! The emulated machine: kernels on the CPU, with every access checked.
//!
//! Threads are coroutines. One runs at a time, until it meets others (a barrier, a warp-wide operation) or
//! ends; which runs next is up to a seed. The blocks of a cluster run together, their threads in one order;
//! clusters, or blocks where there are none, follow one another, in an order that the seed decides too. Of a
//! cooperative launch all blocks run together.
//! Addresses of device memory are numbers of the emulator's own, so a wrong one is reported and never followed.
//!
//! | checked | how |
//! |---|---|
//! | device memory | inside one [`Buffer`] of the launch, aligned, written only where the launch may, read only where somebody wrote |
//! | shared memory | inside the block's allocation, aligned, read only where somebody wrote |
//! | another block's shared memory | also: of a block that is sure to have started, and not to have ended |
//! | `cp.async` | data lands when its group is waited for, or with the phase that waits for it; any access before that is reported |
//! | `wgmma` | carried out when waited for; its registers were shown to it |
//! | `cp.async.bulk`, `st.async` | data lands when the phase that counts it completes; any access before that is reported, and the end of the block before it |
//! | `fence.proxy.async` | lies between a store to shared memory and a bulk copy to the same place, or a `wgmma` that reads it |
//! | mbarriers | initialised, before any use and once; shown to other blocks and to copies; no more arrivals and bytes than a phase takes; no phase missed by who waits |
//! | races | two accesses, one of them writing, that nothing puts in order: a barrier of the block, of some of its threads, of the cluster, `bar.warp.sync`, an mbarrier's phase; atomics and relaxed accesses apart |
//! | waiting | a thread that looks for a word must find it: its writer runs at the same time, and writes it |
//! | overlap of launches | nothing that a launch which may still run writes is used, nothing that it reads is written |
//! | barriers, warp-wide operations | all threads that must come come, to the same line |
//! | offsets | products and sums of a 32-bit [`Index`](crate::memory::Index) do not wrap |
//!
//! Not modelled: memory order within a warp (of the warp-wide operations only `bar.warp.sync` orders anything
//! here), timing, and the proxies of device memory (a bulk copy reads what a thread of the same launch has stored
//! there without asking for a fence). Launches follow one another; that they may overlap shows in what is reported.

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
mod thread;
mod warp;
mod warp_wide;
mod warpgroup;

pub(crate) use instruction::{
    ask_for_bytes, block, cluster_blocks, cluster_rank, commit_copies, fence_copies, launch_dependents,
    load_global, load_relaxed, load_shared, map_shared, overflow, start_copy, store_global, store_relaxed,
    store_shared, sync_block, thread, trap, update_global, update_shared, wait_for_copies, wait_for_launch,
};
pub(crate) use mbarrier::{
    arrive_after_copies, arrive_mbarrier, init_mbarrier, publish_mbarriers, start_bulk_copy, start_store,
    wait_mbarrier,
};
pub use memory::{Buffer, Memory};
pub(crate) use named::sync_some;
pub use report::{Fault, Report};
pub(crate) use warp_wide::{
    arrive_cluster, ballot, load_matrices, match_any, mma, shuffle, shuffle_up, sync_warp, wait_cluster,
};
pub(crate) use warpgroup::{
    Rows, commit_products, fence_warpgroup, multiply_warpgroup, set_registers, wait_for_products,
};

use crate::Entry;
use bytemuck::Pod;

/// Where the block's dynamic shared memory starts: past zero, as on the device, so that a stray zero is
/// no address.
pub(crate) const SHARED_BASE: u32 = 1024;

/// A grid of blocks.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Name of the kernel, for reports.
    pub kernel: &'a str,
    /// Blocks: whole clusters.
    pub blocks: u32,
    /// Blocks of a cluster, at most 8; 1: no clusters.
    pub cluster: u32,
    /// Whether all blocks run at once (a cooperative launch). It has no clusters.
    pub cooperative: bool,
    /// Threads a block: whole warps, at most 1024.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Whether the launch may start before the one before it has ended (programmatic dependent launch).
    pub overlaps: bool,
    /// Decides the order of blocks and of threads.
    pub seed: u64,
}

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

/// Runs an entry point of the module on its parameter block, as on a device from sm_90 on: launches may overlap.
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
