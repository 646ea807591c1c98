//! The kernel.

use super::rows::OutRows;
use super::{STAGES, panels};
use crate::arch::async_copy;
use crate::arch::mma::Element;
use crate::arch::shared::Shared;
use crate::arch::{barrier, grid, thread};
use crate::memory::{Global, Index};
use crate::params::{ExpandParams, Matrix, Tile, count};
use crate::tile::accumulator::{Accumulator, column_of};
use crate::tile::panel::{CHUNK, Panel, weight_row};
use crate::tile::{Assignment, GROUP, TileShape, select_slice, unroll};
use core::marker::PhantomData;

/// Which columns of which slice this block takes.
#[derive(Clone, Copy)]
struct Run {
    slice: u32,
    first: u32,
    end: u32,
}

impl Run {
    /// That of the block of this number among those that a part's columns are shared by.
    #[inline(always)]
    fn of(p: &ExpandParams, number: u32) -> Self {
        let [_, second, third, fourth] = p.first_blocks;
        let past = |first: u32| (number >= first) as u32;
        let slice = past(second) + past(third) + past(fourth);
        let first = (number - select_slice(p.first_blocks, slice)) * p.columns_per_block;
        Run { slice, first, end: p.weights.out_dim(slice).min(first + p.columns_per_block) }
    }
}

/// Loads the tile's h of one slice into its panels. With split-K, adds the parts first.
///
/// # Safety
/// The tile must be one of `p`'s, and the launch that writes h must have ended.
#[inline(always)]
unsafe fn load_h<E: Element, I: Index, const FAST: bool>(
    p: &ExpandParams,
    tile: &Tile,
    rows: u32,
    slice: u32,
) {
    let chunks = tile.rank.div_ceil(CHUNK);
    // Chunks up to the end of a 16-wide step, so that the product reads nothing unwritten.
    let chunks = chunks.next_multiple_of(2);
    // A power of two of threads takes a row, so that no thread divides.
    let width = chunks.next_power_of_two();
    let (shift, mask) = (width.trailing_zeros(), width - 1);
    let mut item = thread::index();
    while item < rows << shift {
        let (row, chunk) = (item >> shift, item & mask);
        item += TileShape::THREADS;
        if chunk >= chunks {
            continue;
        }
        let panel = Panel::at(Shared::base().offset(chunk / 8 * rows * TileShape::ROW_BYTES));
        let rank = chunk * CHUNK;
        let mut elements = tile.rank.saturating_sub(rank).min(CHUNK);
        let mut source = I::from_u32(0);
        if row < tile.rows {
            // SAFETY: `first` + `rows` pairs are in the list.
            let pair = unsafe { p.pairs.at(tile.first + row).load() };
            let h_row = I::from_u32(slice).times(I::from_u32(p.pair_count)).plus(I::from_u32(pair));
            source = h_row.times(I::from_u32(p.weights.max_rank)).plus(I::from_u32(rank));
        } else {
            elements = 0;
        }
        if FAST && p.splits > 1 {
            let mut sum = [0.0f32; 8];
            if elements > 0 {
                let rows = I::from_u32(p.weights.slices).times(I::from_u32(p.pair_count));
                let part = rows.times(I::from_u32(p.weights.max_rank));
                let mut split = 0;
                while split < p.splits {
                    let at = p.partial.at(source);
                    // SAFETY: `shrink` wrote whole chunks of every part.
                    let (low, high) = unsafe { (at.load16(), at.at(4u32).load16()) };
                    unroll::<4>(|i| {
                        sum[i] += f32::from_bits(low[i]);
                        sum[i + 4] += f32::from_bits(high[i]);
                    });
                    source = source.plus(part);
                    split += 1;
                }
            }
            let [a, b, c, d, e, f, g, h] = sum;
            // SAFETY: the chunk is inside the panel.
            unsafe {
                panel.chunk(row, chunk % 8).store16([
                    E::pack(a, b),
                    E::pack(c, d),
                    E::pack(e, f),
                    E::pack(g, h),
                ]);
            }
        } else {
            // SAFETY: `elements` ranks are left in the row.
            unsafe {
                panel.copy_chunk::<FAST, { async_copy::AROUND }>(row, chunk % 8, p.h.at(source), elements)
            };
        }
    }
}

/// b of a tile and a slice, [N, R], and where its panels go.
struct Weights<I> {
    b: Matrix,
    rank: u32,
    /// Column after the block's last.
    end: u32,
    tile_columns: u32,
    /// Where the stages begin, after h.
    stages: Shared,
    index: PhantomData<I>,
}

impl<I: Index> Weights<I> {
    /// # Safety
    /// The tile must be one of `p`'s, with the rank of the slice.
    #[inline(always)]
    unsafe fn new(p: &ExpandParams, tile: &Tile, run: Run, rows: u32, tile_columns: u32) -> Self {
        let mut b = Matrix { start: Global::NULL, max_rank: 0 };
        if tile.rank > 0 {
            // SAFETY: as the caller promises.
            b = unsafe { p.weights.b::<I>(tile, run.slice) };
        }
        let h = panels(p.weights.max_rank) * rows * TileShape::ROW_BYTES;
        let stages = Shared::base().offset(h);
        Weights { b, rank: tile.rank, end: run.end, tile_columns, stages, index: PhantomData }
    }

    /// A stage: one row a column.
    #[inline(always)]
    fn panel(&self, stage: u32) -> Panel {
        Panel::at(self.stages.offset(stage * self.tile_columns * TileShape::ROW_BYTES))
    }

    /// Starts the copies of a step: of panel `panel` of the ranks, of the columns from `column` on.
    ///
    /// # Safety
    /// Nobody may read the stage before the copies were waited for and a barrier passed.
    #[inline(always)]
    unsafe fn load<const FAST: bool>(&self, stage: u32, column: u32, panel: u32) {
        let first_rank = panel * TileShape::DEPTH;
        let chunks = (self.rank - first_rank).min(TileShape::DEPTH).div_ceil(CHUNK).next_multiple_of(2);
        // A power of two of threads takes a column, so that no thread divides.
        let width = chunks.next_power_of_two();
        let (shift, mask) = (width.trailing_zeros(), width - 1);
        let mut item = thread::index();
        while item < self.tile_columns << shift {
            let (row, chunk) = (item >> shift, item & mask);
            item += TileShape::THREADS;
            let rank = first_rank + chunk * CHUNK;
            let mut elements = self.rank.saturating_sub(rank).min(CHUNK);
            if column + row >= self.end {
                elements = 0;
            }
            let offset = I::from_u32(column + row).times(I::from_u32(self.b.max_rank));
            let source = self.b.start.at(offset.plus(I::from_u32(rank)));
            let (target, row) = (self.panel(stage), weight_row(row));
            // SAFETY: `elements` ranks are left in the row, none when the column is past the run.
            unsafe {
                target.copy_chunk::<FAST, { async_copy::AHEAD }>(row, chunk, source, elements);
            }
        }
    }
}

/// The kernel. `M` and `G`: fragments and groups a warp; `COLUMN_WARPS`: warps along the columns.
///
/// # Safety
/// As for the entry points: every tensor of `p` must be as its field says.
#[inline(always)]
pub unsafe fn expand<
    E: Element,
    I: Index,
    const M: usize,
    const G: usize,
    const COLUMN_WARPS: u32,
    const FAST: bool,
>(
    p: ExpandParams,
) {
    // Prologue: which columns of which part of which tile.
    let rows = 16 * M as u32 * (TileShape::THREADS / 32 / COLUMN_WARPS);
    let tile_columns = 32 * G as u32 * COLUMN_WARPS;
    let assignment = Assignment::of_this_block(p.column_blocks, p.tile_parts);
    let run = Run::of(&p, assignment.number);
    grid::launch_dependents();
    if p.route_is_old == 0 {
        grid::wait();
    }
    let accumulate = p.accumulate != 0;
    let count = p.counts.at(if accumulate { count::ACTIVE } else { count::ALL });
    // SAFETY: `counts` has `count::LEN` elements; the route is old, or the launch before this one has
    // ended.
    let mut tile = unsafe { assignment.load(p.tiles, count, rows) }.unwrap_or(Tile::EMPTY);
    // SAFETY: the tile is one of p's.
    tile.rank = unsafe { p.weights.rank(&tile, run.slice) };
    if tile.rows == 0 || accumulate && tile.rank == 0 {
        // Without any tile nobody would wait, this launch could end before the one before it, and the
        // next would then change what that one reads.
        if thread::block() == 0 {
            grid::wait();
        }
        return;
    }

    // The stages are filled before h is there: b does not depend on the launch before this one.
    // SAFETY: the tile is one of p's, with the rank of the slice.
    let weights = unsafe { Weights::<I>::new(&p, &tile, run, rows, tile_columns) };
    let depth = panels(tile.rank);
    let (mut next_column, mut next_panel, mut next_stage) = (run.first, 0, 0);
    let mut load_next = || {
        if next_column < run.end && depth > 0 {
            // SAFETY: all readers of the stage have passed a barrier.
            unsafe { weights.load::<FAST>(next_stage, next_column, next_panel) };
            next_panel += 1;
            if next_panel == depth {
                next_panel = 0;
                next_column += tile_columns;
            }
            next_stage = if next_stage + 1 == STAGES { 0 } else { next_stage + 1 };
        }
        async_copy::commit();
    };
    let mut filled = 0;
    while filled < STAGES - 1 {
        load_next();
        filled += 1;
    }
    if p.route_is_old != 0 {
        grid::wait();
    }
    // SAFETY: the launch before this one has ended.
    unsafe { load_h::<E, I, FAST>(&p, &tile, rows, run.slice) };
    async_copy::commit();
    async_copy::wait::<0>();
    let warp_row = thread::warp() / COLUMN_WARPS * 16 * M as u32;
    let warp_column = thread::warp() % COLUMN_WARPS * 32 * G as u32;
    // Rows of pairs that have no row of x.
    if p.rows.may_clear(p.accumulate) {
        // SAFETY: the tile is one of p's.
        let out = unsafe { OutRows::<M>::new::<I>(&p, &tile, warp_row, run.slice, false) };
        // Threads that have the same rows take turns with the columns.
        let own = thread::warp() % COLUMN_WARPS * 4 + thread::lane() % 4;
        out.clear(&p, (run.first + own, run.end), 4 * COLUMN_WARPS);
    }
    // SAFETY: the tile is one of p's.
    let out = unsafe { OutRows::<M>::new::<I>(&p, &tile, warp_row, run.slice, true) };

    // Main loop: one tile of columns after another, each with a product over all ranks and its own
    // epilogue.
    let mut stage = 0;
    let mut column = run.first;
    while column < run.end {
        let first = column + warp_column + column_of();
        let mut old = [[[[0u32; 4]; G]; 2]; M];
        if FAST && accumulate {
            // SAFETY: the columns are the slice's.
            old = unsafe { out.load_old::<G>(first, run.end) };
        }
        let groups = run.end.saturating_sub(column + warp_column).div_ceil(GROUP);
        let mut sum = Accumulator::<M, G>::zero();
        let mut panel = 0;
        while panel < depth {
            async_copy::wait::<{ STAGES - 2 }>();
            barrier::sync();
            load_next();
            let h = Panel::at(Shared::base().offset(panel * rows * TileShape::ROW_BYTES));
            let left = tile.rank - panel * TileShape::DEPTH;
            unroll::<{ (TileShape::DEPTH / 16) as usize }>(|k| {
                if (k as u32) * 16 < left {
                    let b = weights.panel(stage);
                    // SAFETY: h and b are filled up to the end of the step that holds the last rank.
                    unsafe { sum.multiply::<E>(h, warp_row, b, warp_column, groups, k as u32) };
                }
            });
            stage = if stage + 1 == STAGES { 0 } else { stage + 1 };
            panel += 1;
        }
        // SAFETY: the columns are the slice's.
        unsafe { out.add_and_store::<E, G, FAST>(&p, (first, run.end), &sum, &old) };
        column += tile_columns;
    }
}
