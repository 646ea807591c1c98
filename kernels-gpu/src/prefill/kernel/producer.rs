//! The warpgroup that copies: every step's rows of x or `out` and of weights, 16 bytes a thread at a time.
//!
//! A thread copies one chunk of a row in 16, and of the rows 16 further on, and so on: its addresses differ by strides, so
//! that a copy is little more than its instruction. What is not there, past a tile's pairs, a rank or the end of a row, is
//! left out, or filled with zeros where it is multiplied.

use super::ring::Ring;
use super::steps::{K, MOST_PANELS, depth, expand_panels, rank_shift, shrink_panels, width};
use super::turns::{Pass, Turn, Turns};
use crate::arch::async_copy::{AHEAD, ALONE, AROUND, copy16, copy16_or_zeros, copy16_whole};
use crate::arch::shared::Shared;
use crate::arch::thread;
use crate::memory::{Global, Index};
use crate::params::{PrefillParams, Tile, products};
use crate::prefill::WARPGROUP;
use crate::tile::panel::{CHUNK, CHUNKS, weight_row};
use crate::tile::{TileShape, select_slice, unroll};

/// Rows that the warpgroup copies at a time, a chunk a thread.
const SWEEP: u32 = WARPGROUP / CHUNKS;
const SWEEP_BYTES: u32 = SWEEP * TileShape::ROW_BYTES;

/// Ranks that a row of `b` has past a tile's: with so many, L2 is not to fetch them.
const UNWANTED: u32 = 32;

const ELEMENT_BYTES: u32 = 2;

/// The address `times` times `stride` bytes on.
#[inline(always)]
fn forward(from: Global<u16>, times: u32, stride: u32) -> Global<u16> {
    Global::new(from.address() + times as u64 * stride as u64)
}

/// Which chunk of which rows a thread copies.
#[derive(Clone, Copy)]
struct Share {
    row: u32,
    chunk: u32,
}

impl Share {
    /// This thread's, where a row has `1 << log` chunks.
    #[inline(always)]
    fn of_this_thread(log: u32) -> Self {
        let me = thread::index_anew() % WARPGROUP;
        Share { row: me >> log, chunk: me & ((1 << log) - 1) }
    }

    /// Its first element of a row.
    #[inline(always)]
    fn element(self) -> u32 {
        self.chunk * CHUNK
    }
}

/// The tile's pairs whose rows this thread copies; pair 0 for those that are not there.
struct Pairs<const SWEEPS: usize>([u32; SWEEPS]);

impl<const SWEEPS: usize> Pairs<SWEEPS> {
    /// # Safety
    /// The tile must be one of `p`'s.
    #[inline(always)]
    unsafe fn of(p: &PrefillParams, tile: &Tile, share: Share) -> Self {
        let mut pairs = [0; SWEEPS];
        unroll::<SWEEPS>(|i| {
            let row = share.row + i as u32 * SWEEP;
            if row < tile.rows {
                // SAFETY: `first` + `rows` pairs are in the list.
                pairs[i] = unsafe { p.pairs.at(tile.first + row).load() };
            }
        });
        Pairs(pairs)
    }

    /// Where this thread's chunks of their rows of x begin.
    #[inline(always)]
    fn x<I: Index>(&self, p: &PrefillParams, share: Share) -> [Global<u16>; SWEEPS] {
        let mut rows = [Global::NULL; SWEEPS];
        unroll::<SWEEPS>(|i| {
            let row = I::from_u32(p.x_row.quotient(self.0[i])).times(I::from_u64(p.x_stride));
            rows[i] = p.x.at(row.plus(I::from_u32(share.element())));
        });
        rows
    }

    /// Where their rows of h begin, in the first slice.
    #[inline(always)]
    fn h<I: Index>(&self, p: &PrefillParams) -> [Global<u16>; SWEEPS] {
        let mut rows = [Global::NULL; SWEEPS];
        unroll::<SWEEPS>(|i| rows[i] = p.h.at(I::from_u32(self.0[i]).times(I::from_u32(p.max_rank))));
        rows
    }

    /// Where this thread's chunks of their rows of `out` begin, in slice `slice`.
    #[inline(always)]
    fn out<I: Index>(&self, p: &PrefillParams, share: Share, slice: u32) -> [Global<u16>; SWEEPS] {
        let mut rows = [Global::NULL; SWEEPS];
        unroll::<SWEEPS>(|i| {
            let row = I::from_u32(self.0[i]).times(I::from_u64(p.out_stride));
            rows[i] = p.out.at(row.plus(I::from_u32(slice * p.out_dim + share.element())));
        });
        rows
    }
}

/// Copies what the block's tiles need, step by step.
///
/// # Safety
/// Every tensor of `p` must be as its field says; the whole warpgroup must come here, the ring's barriers be ready.
#[inline(always)]
pub(super) unsafe fn copy<I: Index, const BLOCKS: usize, const SWEEPS: usize>(
    p: &PrefillParams,
    mut turns: Turns,
) {
    let share = Share::of_this_thread(CHUNKS.ilog2());
    let mut ring = Ring::<BLOCKS, SWEEPS>::new(p.stages);
    // SAFETY: as the caller promises; tiles are p's.
    unsafe {
        let mut turn = turns.take::<true>(p);
        while turn.tile.rows > 0 {
            let Turn { tile, pass, .. } = turn;
            if turn.shrinks() {
                copy_shrink::<I, BLOCKS, SWEEPS>(&mut ring, p, &turn);
            } else if turn.takes_h(p) {
                copy_h::<I, BLOCKS, SWEEPS>(&mut ring, p, &tile, &pass);
            }
            turns.call(p);
            let mut out = Pairs::<SWEEPS>::of(p, &tile, share).out::<I>(p, share, pass.first);
            let mut slice = if turn.does & products::EXPAND != 0 { pass.first } else { pass.end };
            while slice < pass.end {
                copy_expand::<I, BLOCKS, SWEEPS>(&mut ring, p, &turn, out, slice);
                unroll::<SWEEPS>(|i| out[i] = out[i].at(p.out_dim));
                slice += 1;
            }
            turn = turns.take::<true>(p);
        }
    }
}

/// Copies the rows of x and `a` of a turn, all of K or its share.
///
/// # Safety
/// As for [`copy`].
#[inline(always)]
unsafe fn copy_shrink<I: Index, const BLOCKS: usize, const SWEEPS: usize>(
    ring: &mut Ring<BLOCKS, SWEEPS>,
    p: &PrefillParams,
    turn: &Turn,
) {
    let Turn { tile, pass, .. } = turn;
    let share = Share::of_this_thread(CHUNKS.ilog2());
    // SAFETY: as the caller promises.
    let (begin, end_of_k) = unsafe { turn.depth(p) };
    // SAFETY: as the caller promises.
    let mut x = unsafe { Pairs::<SWEEPS>::of(p, tile, share) }.x::<I>(p, share);
    unroll::<SWEEPS>(|i| x[i] = x[i].at(begin));
    let first = tile.matrix::<I>(p.a_experts).times(I::from_u32(p.max_rank)).times(I::from_u32(p.in_dim));
    let first = first.plus(I::from_u32(share.row * p.in_dim + share.element()));
    let shift = rank_shift(tile.rank);
    let stride = SWEEP * p.in_dim * ELEMENT_BYTES;

    let mut steps = |columns: u32| {
        let panels = shrink_panels(Ring::<BLOCKS, SWEEPS>::SHAPE, columns);
        let mut place = begin;
        while place < end_of_k {
            // SAFETY: as the caller promises.
            let stage = unsafe { ring.claim() };
            let is_inside = |panel: u32| share.element() + place + depth(panel) < p.in_dim;
            let target = Ring::<BLOCKS, SWEEPS>::row_panel(stage, 0).chunk(share.row, share.chunk);
            unroll::<SWEEPS>(|i| {
                let is_there = share.row + i as u32 * SWEEP < tile.rows;
                let target = target.offset(i as u32 * SWEEP_BYTES);
                unroll::<MOST_PANELS>(|panel| {
                    let panel = panel as u32;
                    if panel < panels {
                        let target = panel_of(target, panel, 16 * SWEEPS as u32);
                        let source = x[i].at(depth(panel));
                        // SAFETY: a chunk of a row of x, if it is there.
                        unsafe { copy16_or_zeros::<_, AROUND>(target, source, is_there && is_inside(panel)) };
                    }
                });
                x[i] = x[i].at(depth(panels));
            });

            let target =
                Ring::<BLOCKS, SWEEPS>::a_panel(stage, panels, columns, 0).chunk(share.row, share.chunk);
            let a_row = |column: u32, row: Global<u16>, is_used: bool| {
                let target = target.offset(column * TileShape::ROW_BYTES);
                unroll::<MOST_PANELS>(|panel| {
                    let panel = panel as u32;
                    if panel < panels {
                        let (target, source) = (panel_of(target, panel, columns), row.at(depth(panel)));
                        // SAFETY: a chunk of a row of `a`, if it is there.
                        unsafe { copy16_or_zeros::<_, AHEAD>(target, source, is_used && is_inside(panel)) };
                    }
                });
            };
            let mut column = 0;
            while column < columns {
                let slice = pass.first + (column >> shift);
                let ranks = if slice < pass.end { tile.rank } else { 0 };
                let mut row = select_slice(p.a, slice).at(first).at(place);
                let end = column + (1 << shift);
                let mut rank = share.row;
                while column < end {
                    a_row(column, row, rank < ranks);
                    (column, rank) = (column + SWEEP, rank + SWEEP);
                    row = forward(row, 1, stride);
                }
            }
            // SAFETY: as the caller promises.
            unsafe { ring.fill() };
            place += depth(panels);
        }
    };
    // The first, so that most calls' loops are of constants.
    let (all, columns) = (Ring::<BLOCKS, SWEEPS>::SHAPE.width, pass.columns(tile.rank));
    if columns == all { steps(all) } else { steps(columns) }
}

/// Copies the rows of h of a pass, in place of what it would be computed from: one step, of 64 columns a panel.
///
/// # Safety
/// As for [`copy`].
#[inline(always)]
unsafe fn copy_h<I: Index, const BLOCKS: usize, const SWEEPS: usize>(
    ring: &mut Ring<BLOCKS, SWEEPS>,
    p: &PrefillParams,
    tile: &Tile,
    pass: &Pass,
) {
    let share = Share::of_this_thread(CHUNKS.ilog2());
    let shift = rank_shift(tile.rank);
    // SAFETY: as the caller promises.
    let stage = unsafe { ring.claim() };
    // SAFETY: as the caller promises.
    let rows = unsafe { Pairs::<SWEEPS>::of(p, tile, share) }.h::<I>(p);
    let slice_stride = I::from_u32(p.pair_count).times(I::from_u32(p.max_rank));
    let mut panel = 0;
    while panel * TileShape::DEPTH < pass.columns(tile.rank) {
        let column = panel * TileShape::DEPTH + share.element();
        let slice = pass.first + (column >> shift);
        let rank = column & ((1 << shift) - 1);
        let left = if slice < pass.end { tile.rank.saturating_sub(rank).min(CHUNK) } else { 0 };
        let offset = I::from_u32(slice.min(p.slices - 1)).times(slice_stride).plus(I::from_u32(rank));
        let target = Ring::<BLOCKS, SWEEPS>::row_panel(stage, panel).chunk(share.row, share.chunk);
        unroll::<SWEEPS>(|i| {
            let is_there = share.row + i as u32 * SWEEP < tile.rows;
            let source = rows[i].at(offset);
            let target = target.offset(i as u32 * SWEEP_BYTES);
            // SAFETY: `left` ranks are left in the row, if it is there.
            unsafe { copy16::<_, AROUND>(target, source, if is_there { ELEMENT_BYTES * left } else { 0 }) };
        });
        panel += 1;
    }
    // SAFETY: as the caller promises.
    unsafe { ring.fill() };
}

/// The same place in panel `panel` of panels of `rows` rows.
#[inline(always)]
fn panel_of(place: Shared, panel: u32, rows: u32) -> Shared {
    place.offset(panel * rows * TileShape::ROW_BYTES)
}

/// Copies the rows of `out` from `out` on, and of `b` as many ranks as are multiplied, of a slice's columns.
///
/// # Safety
/// As for [`copy`].
#[inline(always)]
unsafe fn copy_expand<I: Index, const BLOCKS: usize, const SWEEPS: usize>(
    ring: &mut Ring<BLOCKS, SWEEPS>,
    p: &PrefillParams,
    turn: &Turn,
    mut out: [Global<u16>; SWEEPS],
    slice: u32,
) {
    let tile = &turn.tile;
    let share = Share::of_this_thread(CHUNKS.ilog2());
    let (mut column, end) = turn.columns(p);
    unroll::<SWEEPS>(|i| out[i] = out[i].at(column));
    let panels = expand_panels(Ring::<BLOCKS, SWEEPS>::SHAPE, tile.rank);
    let b = B::new::<I>(p, tile, slice);
    let is_whole = tile.rank.is_multiple_of(CHUNK) && tile.rank + UNWANTED > p.max_rank;
    while column < end {
        // SAFETY: as the caller promises.
        let stage = unsafe {
            ring.wait_for_landing(p.under_way);
            ring.claim()
        };
        if p.accumulate != 0 {
            let target = Ring::<BLOCKS, SWEEPS>::row_panel(stage, 0).chunk(share.row, share.chunk);
            unroll::<SWEEPS>(|i| {
                let target = target.offset(i as u32 * SWEEP_BYTES);
                unroll::<MOST_PANELS>(|panel| {
                    let panel = panel as u32;
                    let is_inside = panel < panels && share.element() + column + width(panel) < p.out_dim;
                    if share.row + (i as u32) * SWEEP < tile.rows && is_inside {
                        let target = panel_of(target, panel, 16 * SWEEPS as u32);
                        // SAFETY: columns come in eights, so the chunk is inside the row.
                        unsafe { copy16_whole::<_, AROUND>(target, out[i].at(width(panel))) };
                    }
                });
                out[i] = out[i].at(width(panels));
            });
        }
        let mut group = 0;
        while group * TileShape::DEPTH < tile.rank {
            let target = Ring::<BLOCKS, SWEEPS>::b_panel(stage, panels, group).chunk(0, 0);
            // SAFETY: as the caller promises.
            unsafe {
                if is_whole {
                    b.copy::<true>(p, tile, target, group, column, width(panels));
                } else {
                    b.copy::<false>(p, tile, target, group, column, width(panels));
                }
            }
            group += 1;
        }
        // SAFETY: as the caller promises.
        unsafe { ring.fill() };
        column += width(panels);
    }
}

/// A slice's matrix `b`, from this thread's chunk of its first row on.
struct B {
    rows: Global<u16>,
    share: Share,
    /// Rows that the warpgroup copies at a time: more than [`SWEEP`] where a row has few chunks.
    sweep: u32,
}

impl B {
    #[inline(always)]
    fn new<I: Index>(p: &PrefillParams, tile: &Tile, slice: u32) -> Self {
        let log = (rank_shift(tile.rank) - CHUNK.ilog2()).min(CHUNKS.ilog2());
        let share = Share::of_this_thread(log);
        let first =
            tile.matrix::<I>(p.b_experts).times(I::from_u32(p.out_dim)).times(I::from_u32(p.max_rank));
        let first = first.plus(I::from_u32(share.row * p.max_rank + share.element()));
        B { rows: select_slice(p.b, slice).at(first), share, sweep: WARPGROUP >> log }
    }

    /// Copies ranks 64·`group` .. of `columns` columns from `column` on, to the panels at `target`: those of the tile, and
    /// zeros to the end of the sixteen that hold the last one.
    ///
    /// `WHOLE`: rows are taken whole, or nearly, in whole chunks. Otherwise L2 is not to fetch what is around.
    ///
    /// # Safety
    /// As for [`copy`].
    #[inline(always)]
    unsafe fn copy<const WHOLE: bool>(
        &self,
        p: &PrefillParams,
        tile: &Tile,
        target: Shared,
        group: u32,
        column: u32,
        columns: u32,
    ) {
        let first = group * TileShape::DEPTH + self.share.element();
        if first >= tile.rank.next_multiple_of(K) {
            return;
        }
        let left = tile.rank.saturating_sub(first).min(CHUNK);
        let rows = self.rows.at(column as u64 * p.max_rank as u64 + (group * TileShape::DEPTH) as u64);
        // Two rows at a time: where they lie in a panel is the same for the two after them.
        let places = [0, self.sweep].map(|more| {
            let row = weight_row(self.share.row + more);
            row * TileShape::ROW_BYTES + ((self.share.chunk ^ (row % CHUNKS)) * 16)
        });
        let stride = self.sweep * p.max_rank * ELEMENT_BYTES;
        let (mut row, mut begins) = (rows, 0);
        while begins < columns {
            unroll::<2>(|i| {
                let i = i as u32;
                let target = target.offset(places[i as usize] + begins * TileShape::ROW_BYTES);
                let source = forward(row, i, stride);
                let is_inside = column + begins + i * self.sweep + self.share.row < p.out_dim;
                // SAFETY: `left` ranks are left in the row, if it is there.
                unsafe {
                    if WHOLE {
                        copy16_or_zeros::<_, AHEAD>(target, source, is_inside && left > 0);
                    } else {
                        copy16::<_, ALONE>(target, source, if is_inside { ELEMENT_BYTES * left } else { 0 });
                    }
                }
            });
            row = forward(row, 2, stride);
            begins += 2 * self.sweep;
        }
    }
}
