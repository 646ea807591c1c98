//! What lies in the first bytes of shared memory: the barriers, by number, and how many tiles and work items
//! there are.

use super::pipeline::Pipeline;
use crate::arch::mbarrier::{self, Mbarrier};
use crate::arch::shared::Shared;
use crate::decode::{A_LOADER, B_LOADER, BARRIER_BYTES, CONSUMER_WARPS, LANES, MAX_STAGES, THREADS};
use crate::tile::unroll;

/// Warps that load shrink's stages, one a and one x.
const SHRINK_PRODUCERS: u32 = B_LOADER - A_LOADER;

/// The barrier of this number.
#[inline(always)]
pub(super) fn mbarrier(number: u32) -> Mbarrier {
    Mbarrier::at(Shared::base().offset(8 * number))
}

/// Receive buffer `buffer` is full: all parts of h have come.
#[inline(always)]
pub(super) fn h_full(buffer: u32) -> Mbarrier {
    mbarrier(4 * MAX_STAGES + buffer)
}

/// Receive buffer `buffer` is empty: all blocks of the cluster have read theirs.
#[inline(always)]
pub(super) fn h_empty(buffer: u32) -> Mbarrier {
    mbarrier(4 * MAX_STAGES + 2 + buffer)
}

/// The A loader has started the copies of all stages once, or has no more to start.
#[inline(always)]
pub(super) fn a_started() -> Mbarrier {
    mbarrier(4 * MAX_STAGES + 4)
}

/// The segments are ready: pairs, tiles and the number of work items can be read, and the scratch is free.
#[inline(always)]
pub(super) fn segments_ready() -> Mbarrier {
    mbarrier(4 * MAX_STAGES + 5)
}

/// Where the number of work items of the launch is.
#[inline(always)]
pub(super) fn item_count() -> Shared {
    Shared::base().offset(BARRIER_BYTES - 4)
}

/// Where the number of tiles of active pairs is, and then that of all.
#[inline(always)]
pub(super) fn tile_counts() -> Shared {
    Shared::base().offset(BARRIER_BYTES - 12)
}

/// Makes the barriers ready. One thread does: those of several would be served one by one, at a fence each.
///
/// # Safety
/// One thread must come here, before anybody uses them.
#[inline(always)]
pub(super) unsafe fn init(shrink: &Pipeline, expand: &Pipeline, blocks: u32) {
    // SAFETY: the first bytes of shared memory are the barriers'.
    unsafe {
        shrink.init(SHRINK_PRODUCERS);
        // The warp, and each lane with its copies.
        expand.init(1 + LANES);
        unroll::<2>(|buffer| {
            // One thread that expands; and the warps that shrink, unless they send what the barrier counts.
            h_full(buffer as u32).init(if blocks == 1 { 1 + CONSUMER_WARPS } else { 1 });
            h_empty(buffer as u32).init(blocks);
        });
        a_started().init(1);
        segments_ready().init(THREADS / LANES);
    }
    mbarrier::publish();
}
