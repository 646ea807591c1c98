//! What a block takes, in which order: tiles in turns, each in passes, each of these in steps. Producer and consumers walk
//! through the same.

use crate::arch::thread;
use crate::params::{PrefillParams, Tile};
use crate::prefill::{Shape, rank_room};
use crate::tile::TileShape;

/// Columns of `out` of a row of a panel.
pub(super) const PANEL_COLUMNS: u32 = 64;

/// Most panels, of each kind, of a step.
pub(super) const MOST_PANELS: usize = 4;

/// Elements of a product's k, and so ranks of a fragment of h.
pub(super) const K: u32 = 16;

/// Least columns of h of a product.
const MIN_COLUMNS: u32 = 32;

/// The tiles that a block takes, one after another.
#[derive(Clone, Copy)]
pub(super) struct Turns {
    next: u32,
    end: u32,
    /// Pairs that one turn takes.
    rows: u32,
}

impl Turns {
    /// # Safety
    /// The tensors of `p` must be as their fields say, and the route be written.
    #[inline(always)]
    pub unsafe fn of_this_block(p: &PrefillParams, rows: u32) -> Self {
        // SAFETY: it is one element.
        let end = unsafe { p.tile_count.load() } * p.tile_parts;
        Turns { next: thread::block(), end, rows }
    }

    /// The next tile, or part of one, that has pairs; none of no pairs when there are no more.
    ///
    /// # Safety
    /// As for [`Turns::of_this_block`].
    #[inline(always)]
    pub unsafe fn take(&mut self, p: &PrefillParams) -> Tile {
        let mut taken = Tile::EMPTY;
        while self.next < self.end && taken.rows == 0 {
            let tile = p.over_parts.quotient(self.next);
            let part = self.next - tile * p.tile_parts;
            // SAFETY: the tile is one of those counted.
            taken = unsafe { p.tiles.at(tile).load_tile() }.part(part, self.rows);
            self.next += p.blocks;
        }
        taken
    }
}

/// What a pass takes of a tile.
pub(super) struct Pass {
    /// The slice after its last.
    pub end: u32,
    /// Columns of h that its products have: all ranks of its slices, and to the next size of a product.
    pub columns: u32,
}

impl Pass {
    /// The pass that begins with slice `first`, with columns of h for `width`.
    #[inline(always)]
    pub fn of(p: &PrefillParams, rank: u32, first: u32, width: u32) -> Self {
        let shift = rank_shift(rank);
        let slices = (width >> shift).min(p.slices - first);
        Pass { end: first + slices, columns: (slices << shift).next_power_of_two().max(MIN_COLUMNS) }
    }
}

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
