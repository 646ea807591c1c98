//! What a step takes: how many panels, by what its tile's rank leaves room for in a stage. Producer and consumers walk through the same steps.

pub(super) use crate::prefill::{MOST_PANELS, PANEL_COLUMNS};
use crate::prefill::{Shape, rank_room};
use crate::tile::TileShape;

/// Elements of a product's k, and so ranks of a fragment of h.
pub(super) const K: u32 = 16;

/// Columns of h that a slice of this rank takes, as a power of two.
#[inline(always)]
pub(super) fn rank_shift(rank: u32) -> u32 {
    rank_room(rank).trailing_zeros()
}

/// Panels of x, and of `a`, of a step of products with so many columns.
#[inline(always)]
pub(super) fn shrink_panels(shape: Shape, columns: u32) -> u32 {
    // Of constants, one of which is chosen.
    match columns {
        0..=32 => shape.panels(32),
        33..=64 => shape.panels(64),
        65..=128 => shape.panels(128),
        _ => shape.panels(256),
    }
}

/// Panels of old values, and of `b` for every 64 ranks, of a step for a tile of this rank.
#[inline(always)]
pub(super) fn expand_panels(shape: Shape, rank: u32) -> u32 {
    match rank.min(shape.width) {
        0..=64 => shape.panels(64),
        65..=128 => shape.panels(128),
        _ => shape.panels(256),
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
