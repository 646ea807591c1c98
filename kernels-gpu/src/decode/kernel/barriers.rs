//! What lies in the first bytes of shared memory: the barriers, by number, and how many tiles and units there are.

use crate::arch::mbarrier::Mbarrier;
use crate::arch::shared::Shared;
use crate::decode::{BARRIER_BYTES, MAX_STAGES};

/// The barrier of this number.
#[inline(always)]
pub(super) fn mbarrier(number: u32) -> Mbarrier {
    Mbarrier::at(Shared::base().offset(8 * number))
}

/// Ends when all parts of h of a turn have landed.
#[inline(always)]
pub(super) fn landed(turn: u32) -> Mbarrier {
    mbarrier(4 * MAX_STAGES + turn)
}

/// Ends when all blocks of the cluster have read what had landed in a turn.
#[inline(always)]
pub(super) fn read(turn: u32) -> Mbarrier {
    mbarrier(4 * MAX_STAGES + 2 + turn)
}

/// Ends when the first stages of shrink were asked for.
#[inline(always)]
pub(super) fn begun() -> Mbarrier {
    mbarrier(4 * MAX_STAGES + 4)
}

/// Ends when all warps have done their part of the search: pairs, tiles and the number of units can be read, and the scratch is
/// free.
#[inline(always)]
pub(super) fn listed() -> Mbarrier {
    mbarrier(4 * MAX_STAGES + 5)
}

/// Where the number of units of the launch is.
#[inline(always)]
pub(super) fn unit_count() -> Shared {
    Shared::base().offset(BARRIER_BYTES - 4)
}

/// Where the number of tiles of active pairs is, and then that of all.
#[inline(always)]
pub(super) fn tile_counts() -> Shared {
    Shared::base().offset(BARRIER_BYTES - 12)
}
