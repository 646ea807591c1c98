//! A work tile: a pass over the pairs of a tile of the route; where blocks share passes, a split of one.

use super::steps::rank_shift;
use crate::arch::thread::anew;
use crate::params::{PrefillParams, Tile, products};
use crate::prefill::{MIN_COLUMNS, Shape};

/// What a block does between two calls of the scheduler.
pub(super) struct WorkTile {
    /// The tile, with the largest rank of its slices; of no pairs when there is no more work.
    pub tile: Tile,
    /// Its slices.
    pub pass: Pass,
    /// The pass's number in the launch.
    pub pass_number: u32,
    /// What is computed: [`products`].
    pub products: u32,
    /// The number of its split of K, or of the columns.
    pub split: u32,
}

impl WorkTile {
    /// No work.
    pub const NONE: Self =
        WorkTile { tile: Tile::EMPTY, pass: Pass::NONE, pass_number: 0, products: 0, split: 0 };

    /// Work tile `number` of a launch with this many passes; of no pairs where a tile or its slices end
    /// before it.
    ///
    /// Passes over one tile are neighbours, so that blocks which take them at the same time find the tile's
    /// rows of x in L2. Where blocks share passes, all splits of K come before all splits of columns.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say, and the route be written; the number must be below the
    /// launch's.
    #[inline(always)]
    pub unsafe fn number(p: &PrefillParams, shape: Shape, number: u32) -> Self {
        let (mut products, mut splits, mut before) = (p.computed(), p.split_n.count, 0);
        if p.shares_passes() {
            // SAFETY: as the caller promises.
            let (passes, splits_of_k) = unsafe { (passes(p), SplitsOfK::new(p).count(p)) };
            products = products::EXPAND;
            if number < passes * splits_of_k {
                (products, splits) = (products::SHRINK, splits_of_k);
            } else {
                before = passes * splits_of_k;
            }
        }
        let pass_number = (number - before).checked_div(splits).unwrap_or(0);
        let split = number - before - pass_number * splits;
        let part = p.over_passes.quotient(pass_number);
        let tile_number = p.over_parts.quotient(part);
        // SAFETY: the tile is one of those counted.
        let tile = unsafe { p.tiles.at(tile_number).load_tile() };
        let mut tile = tile.part(part - tile_number * p.tile_parts, shape.rows);
        // SAFETY: the tile is one of p's.
        tile.rank = unsafe { p.weights.largest_rank(&tile) };
        let pass = Pass::of(p, tile.rank, pass_number - part * p.passes, shape.width);
        let mut work = WorkTile { tile, pass, pass_number, products, split };
        if work.pass.first >= p.weights.slices {
            work.tile.rows = 0;
        }
        work
    }

    /// Whether x and `a` are multiplied.
    #[inline(always)]
    pub fn shrinks(&self) -> bool {
        self.products & products::SHRINK != 0 && self.tile.rank > 0
    }

    /// Whether it computes a part of h for others, and nothing else.
    #[inline(always)]
    pub fn gives_h(&self, p: &PrefillParams) -> bool {
        p.shares_passes() && self.products & products::EXPAND == 0
    }

    /// Whether h comes from an earlier call.
    #[inline(always)]
    pub fn takes_h(&self, p: &PrefillParams) -> bool {
        p.computed() == products::EXPAND && self.tile.rank > 0
    }

    /// The slices whose columns are written: the pass's, or none.
    #[inline(always)]
    pub fn slices_to_expand(&self) -> Slices {
        let Pass { first, end } = self.pass;
        Slices { next: if self.products & products::EXPAND != 0 { first } else { end }, end }
    }

    /// Elements of K that are multiplied: the first, and the end.
    ///
    /// # Safety
    /// The route must be written.
    #[inline(always)]
    pub unsafe fn k(&self, p: &PrefillParams) -> (u32, u32) {
        if p.shares_passes() {
            // SAFETY: as the caller promises.
            let splits = unsafe { SplitsOfK::new(p) };
            range_of(self.split, p.split_k.each << splits.shift, p.weights.in_dim)
        } else {
            (0, p.weights.in_dim)
        }
    }

    /// What is written of a slice.
    ///
    /// # Safety
    /// The tile must be one of `p`'s.
    #[inline(always)]
    pub unsafe fn slice(&self, p: &PrefillParams, slice: u32) -> Slice {
        let (mut rank, mut scaling) = (self.tile.rank, None);
        if p.weights.has_table() && rank > 0 {
            // The slot is read again: where there is no table, it takes no register.
            let tile = p.over_parts.quotient(p.over_passes.quotient(self.pass_number));
            // SAFETY: as the caller promises.
            unsafe {
                let tile = Tile { rank, ..p.tiles.at(tile).load_tile() };
                (rank, scaling) = (p.weights.rank(&tile, slice), p.weights.scaling(&tile, slice));
            }
        }
        let out_dim = p.weights.out_dim(slice);
        let (first, mut end) = range_of(self.split, p.split_n.each, out_dim);
        if p.accumulate != 0 && rank == 0 {
            end = first;
        }
        Slice { rank, scaling, first, end }
    }
}

/// A slice, and its columns that a work tile writes.
#[derive(Clone, Copy)]
pub(super) struct Slice {
    /// Its rank.
    pub rank: u32,
    /// What its deltas are multiplied by; `None` for 1.
    pub scaling: Option<f32>,
    /// The first of the work tile's.
    pub first: u32,
    /// The one after their last: the slice's end, or a multiple of what a step takes.
    pub end: u32,
}

/// What split `split` has of `length` elements, `each` a split: the first, and the end.
#[inline(always)]
fn range_of(split: u32, each: u32, length: u32) -> (u32, u32) {
    let first = split * each;
    (first, length.min(first + each))
}

/// Slices that are yet to be written.
#[derive(Clone, Copy)]
pub(super) struct Slices {
    /// The next.
    pub next: u32,
    /// The one after the last.
    pub end: u32,
}

/// The slices of a pass.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    /// The first.
    pub first: u32,
    /// The one after the last.
    pub end: u32,
}

impl Pass {
    pub const NONE: Self = Pass { first: 0, end: 0 };

    /// Pass `number` over a tile of this rank, with `width` columns of h; of no slices where the passes
    /// before it have all.
    #[inline(always)]
    fn of(p: &PrefillParams, rank: u32, number: u32, width: u32) -> Self {
        let shift = rank_shift(rank);
        let first = number * (width >> shift);
        let slices = (width >> shift).min(p.weights.slices.saturating_sub(first));
        Pass { first, end: first + slices }
    }

    /// Columns of h that its products have for a tile of this rank: all ranks of its slices, and to the next
    /// size of a product.
    #[inline(always)]
    pub fn columns(&self, rank: u32) -> u32 {
        ((self.end - self.first) << rank_shift(rank)).next_power_of_two().max(MIN_COLUMNS)
    }
}

/// Passes of the launch.
///
/// # Safety
/// The route must be written.
#[inline(always)]
unsafe fn passes(p: &PrefillParams) -> u32 {
    // SAFETY: it is one element.
    unsafe { p.tile_count.load() * p.tile_parts * p.passes }
}

/// Work tiles of the launch.
///
/// # Safety
/// The route must be written.
#[inline(always)]
pub(super) unsafe fn count(p: &PrefillParams) -> u32 {
    // SAFETY: as the caller promises.
    unsafe { passes(p) * (SplitsOfK::new(p).count(p) + p.split_n.count) }
}

/// Splits of K of the launch's passes: as many as the planner wants, or so few that no block has more than
/// one.
///
/// A block adds up h once all splits of its pass have left their sums, and by then its producer has fetched
/// the next work tile. Were that another split of the same pass, the block would wait for itself.
#[derive(Clone, Copy)]
pub(super) struct SplitsOfK {
    /// So many of the planner's are taken as one, as a power of two.
    shift: u32,
}

impl SplitsOfK {
    /// Those of this launch. To be made where they are needed, so that they take no registers elsewhere.
    ///
    /// # Safety
    /// The route must be written.
    #[inline(always)]
    pub unsafe fn new(p: &PrefillParams) -> Self {
        // SAFETY: as the caller promises.
        let passes = unsafe { passes(p) };
        let mut these = SplitsOfK { shift: 0 };
        while passes * these.count(p) > p.blocks && these.count(p) > 1 {
            these.shift += 1;
        }
        these
    }

    /// Splits of a pass; 0 where blocks do not share passes.
    #[inline(always)]
    pub fn count(self, p: &PrefillParams) -> u32 {
        (anew(p.split_k.count) + (1 << self.shift) - 1) >> self.shift
    }
}
