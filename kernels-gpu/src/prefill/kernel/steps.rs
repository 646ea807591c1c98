//! Steps: what the producer loads into one stage, and the consumers multiply. How many panels a step has
//! depends on how many columns of h, or ranks, its weights have: as many as a stage has room for. Both roles
//! walk through the same steps.

pub(super) use crate::prefill::config::{MAX_FRAGMENTS, MAX_SWEEPS};
pub(super) use crate::prefill::{MOST_PANELS, PANEL_COLUMNS};

use crate::prefill::config::Config;
use crate::prefill::rank_room;
use crate::tile::{TileShape, unroll};

/// Elements of K, or ranks, of one product: a fragment of h has so many columns.
pub(super) const PRODUCT_K: u32 = 16;

/// Columns of h that a slice of this rank takes, as a power of two.
#[inline(always)]
pub(super) fn rank_shift(rank: u32) -> u32 {
    rank_room(rank).trailing_zeros()
}

/// Panels of x, and of `a`, of a step of shrink with so many columns of h.
#[inline(always)]
pub(super) fn shrink_panels<C: Config>(columns: u32) -> u32 {
    // A choice among constants.
    match columns {
        0..=32 => C::SHAPE.panels(32),
        33..=64 => C::SHAPE.panels(64),
        65..=128 => C::SHAPE.panels(128),
        _ => C::SHAPE.panels(256),
    }
}

/// Panels of old values of `out`, and of `b` for every 64 ranks, of a step of expand for a tile of this rank.
#[inline(always)]
pub(super) fn expand_panels<C: Config>(rank: u32) -> u32 {
    match rank.min(C::SHAPE.width) {
        0..=64 => C::SHAPE.panels(64),
        65..=128 => C::SHAPE.panels(128),
        _ => C::SHAPE.panels(256),
    }
}

/// Elements of K of so many panels.
#[inline(always)]
pub(super) fn panels_k(panels: u32) -> u32 {
    panels * TileShape::DEPTH
}

/// Columns of `out` of so many panels.
#[inline(always)]
pub(super) fn panels_n(panels: u32) -> u32 {
    panels * PANEL_COLUMNS
}

/// Calls `body` with the number of each of the tile's [sweeps](Config::SWEEPS), a constant once inlined: see
/// [`unroll`].
#[inline(always)]
pub(super) fn each_sweep<C: Config>(mut body: impl FnMut(usize)) {
    unroll::<MAX_SWEEPS>(|sweep| {
        if sweep < C::SWEEPS {
            body(sweep);
        }
    });
}

/// Calls `body` with the number of each [fragment](Config::FRAGMENTS) of h, a constant once inlined: see
/// [`unroll`].
#[inline(always)]
pub(super) fn each_fragment<C: Config>(mut body: impl FnMut(usize)) {
    unroll::<MAX_FRAGMENTS>(|fragment| {
        if fragment < C::FRAGMENTS {
            body(fragment);
        }
    });
}
