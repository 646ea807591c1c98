//! What a step takes: how many panels, by what its tile's rank leaves room for in a stage. Producer and consumers walk through the same steps.

use crate::prefill::{Shape, rank_room};
use crate::tile::TileShape;

/// Columns of `out` of a row of a panel.
pub(super) const PANEL_COLUMNS: u32 = 64;

/// Most panels, of each kind, of a step.
pub(super) const MOST_PANELS: usize = 4;

/// Elements of a product's k, and so ranks of a fragment of h.
pub(super) const K: u32 = 16;

/// Columns of h that a slice of this rank takes, as a power of two.
#[inline(always)]
pub(super) fn rank_shift(rank: u32) -> u32 {
    rank_room(rank).trailing_zeros()
}

/// Panels, of each kind, of a step whose weights have `weights` rows a panel: as many as a stage has room for.
const fn panels(shape: Shape, weights: u32) -> u32 {
    match shape.stage_rows() / (shape.rows + weights) {
        0..2 => 1,
        2..4 => 2,
        _ => MOST_PANELS as u32,
    }
}

/// Panels of x, and of `a`, of a step of products with so many columns.
#[inline(always)]
pub(super) fn shrink_panels(shape: Shape, columns: u32) -> u32 {
    // Of constants, one of which is chosen.
    match columns {
        0..=32 => panels(shape, 32),
        33..=64 => panels(shape, 64),
        65..=128 => panels(shape, 128),
        _ => panels(shape, 256),
    }
}

/// Panels of old values, and of `b` for every 64 ranks, of a step for a tile of this rank.
#[inline(always)]
pub(super) fn expand_panels(shape: Shape, rank: u32) -> u32 {
    match rank.min(shape.width) {
        0..=64 => panels(shape, 64),
        65..=128 => panels(shape, 128),
        _ => panels(shape, 256),
    }
}

/// Elements of K of a step of shrink with so many panels.
#[inline(always)]
pub(super) fn depth(panels: u32) -> u32 {
    panels * TileShape::DEPTH
}

/// Columns of `out` of a step of expand with so many panels.
#[inline(always)]
pub(super) fn width(panels: u32) -> u32 {
    panels * PANEL_COLUMNS
}
