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

/// What a block takes in one turn: a pass over the pairs of a tile.
pub(super) struct Turn {
    /// The tile; of no pairs when there are no more.
    pub tile: Tile,
    /// What is taken of its slices.
    pub pass: Pass,
}

/// The turns of a block, one after another.
#[derive(Clone, Copy)]
pub(super) struct Turns {
    next: u32,
    end: u32,
    shape: Shape,
}

impl Turns {
    /// # Safety
    /// The tensors of `p` must be as their fields say, and the route be written.
    #[inline(always)]
    pub unsafe fn of_this_block(p: &PrefillParams, shape: Shape) -> Self {
        // SAFETY: it is one element.
        let end = unsafe { p.tile_count.load() } * p.tile_parts * p.passes;
        Turns { next: thread::block(), end, shape }
    }

    /// The next pass over a tile, or part of one, that has pairs and slices left for it.
    ///
    /// The passes over a tile are neighbours, so that blocks which take them at the same time find the tile's rows of x in L2.
    ///
    /// # Safety
    /// As for [`Turns::of_this_block`].
    #[inline(always)]
    pub unsafe fn take(&mut self, p: &PrefillParams) -> Turn {
        let mut turn = Turn { tile: Tile::EMPTY, pass: Pass::NONE };
        while self.next < self.end && turn.tile.rows == 0 {
            let taken = p.over_passes.quotient(self.next);
            let tile = p.over_parts.quotient(taken);
            // SAFETY: the tile is one of those counted.
            turn.tile = unsafe { p.tiles.at(tile).load_tile() };
            turn.tile = turn.tile.part(taken - tile * p.tile_parts, self.shape.rows);
            turn.pass = Pass::of(p, turn.tile.rank, self.next - taken * p.passes, self.shape.width);
            if turn.pass.first >= p.slices {
                turn.tile.rows = 0;
            }
            self.next += p.blocks;
        }
        turn
    }
}

/// What a pass takes of a tile.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    /// Its first slice.
    pub first: u32,
    /// The slice after its last.
    pub end: u32,
    /// Columns of h that its products have: all ranks of its slices, and to the next size of a product.
    pub columns: u32,
}

impl Pass {
    const NONE: Self = Pass { first: 0, end: 0, columns: 0 };

    /// Pass `number`, with columns of h for `width`; with no slices where the passes before it take all.
    #[inline(always)]
    fn of(p: &PrefillParams, rank: u32, number: u32, width: u32) -> Self {
        let shift = rank_shift(rank);
        let first = number * (width >> shift);
        let slices = (width >> shift).min(p.slices.saturating_sub(first));
        let columns = (slices << shift).next_power_of_two().max(MIN_COLUMNS);
        Pass { first, end: first + slices, columns }
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
