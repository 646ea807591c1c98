//! The producer's copies: every step's rows of x or `out` and of weights, 16 bytes a thread at a time.
//!
//! A thread copies one chunk of a row in 16, and of the rows 16 further on, and so on: its addresses differ
//! by strides, so that a copy is little more than its instruction. What is not there, past a tile's pairs, a
//! rank or the end of a row, is left out, or filled with zeros where it is multiplied.

use super::pipeline::{Pipeline, Stage};
use super::steps::{
    MAX_SWEEPS, MOST_PANELS, PRODUCT_K, each_sweep, expand_panels, panels_k, panels_n, rank_shift,
    shrink_panels,
};
use super::work_tile::{Slice, Slices, WorkTile};
use crate::arch::async_copy::{AHEAD, ALONE, AROUND, copy16, copy16_or_zeros, copy16_whole};
use crate::arch::shared::Shared;
use crate::arch::thread;
use crate::memory::{Global, Index};
use crate::params::{NO_PAIR, PrefillParams, Tile};
use crate::prefill::WARPGROUP;
use crate::prefill::config::Config;
use crate::tile::panel::{CHUNK, CHUNKS, weight_row};
use crate::tile::{TileShape, unroll};

/// Rows that the warpgroup copies at a time, a chunk a thread: a sweep.
const SWEEP: u32 = WARPGROUP / CHUNKS;
const SWEEP_BYTES: u32 = SWEEP * TileShape::ROW_BYTES;

/// Ranks that a row of `b` has past a tile's: with so many, L2 is not to fetch them.
const UNWANTED: u32 = 32;

const ELEMENT_BYTES: u32 = 2;

/// Rows of a tile's pairs in device memory, one a sweep.
type Rows = [Global<u16>; MAX_SWEEPS];

/// The address `times` times `stride` bytes on.
#[inline(always)]
fn forward(from: Global<u16>, times: u32, stride: u32) -> Global<u16> {
    Global::new(from.address() + times as u64 * stride as u64)
}

/// The same place in panel `panel` of panels of `rows` rows.
#[inline(always)]
fn panel_of(place: Shared, panel: u32, rows: u32) -> Shared {
    place.offset(panel * rows * TileShape::ROW_BYTES)
}

/// Which chunk of which rows a thread copies.
#[derive(Clone, Copy)]
struct OwnChunk {
    row: u32,
    chunk: u32,
}

impl OwnChunk {
    /// This thread's, where a row has `1 << log` chunks.
    #[inline(always)]
    fn of_this_thread(log: u32) -> Self {
        let me = thread::index_anew() % WARPGROUP;
        OwnChunk { row: me >> log, chunk: me & ((1 << log) - 1) }
    }

    /// Its first element of a row.
    #[inline(always)]
    fn element(self) -> u32 {
        self.chunk * CHUNK
    }

    /// Whether the row of sweep `sweep` is one of the tile's.
    #[inline(always)]
    fn is_in(self, tile: &Tile, sweep: usize) -> bool {
        self.row + sweep as u32 * SWEEP < tile.rows
    }
}

/// The tile's pairs whose rows this thread copies; pair 0 for those that are not there.
struct Pairs([u32; MAX_SWEEPS]);

impl Pairs {
    /// # Safety
    /// The tile must be one of `p`'s.
    #[inline(always)]
    unsafe fn of<C: Config>(p: &PrefillParams, tile: &Tile, own: OwnChunk) -> Self {
        let mut pairs = [0; MAX_SWEEPS];
        each_sweep::<C>(|i| {
            let row = own.row + i as u32 * SWEEP;
            if row < tile.rows {
                // SAFETY: `first` + `rows` pairs are in the list.
                pairs[i] = unsafe { p.pairs.at(tile.first + row).load() };
            }
        });
        Pairs(pairs)
    }

    /// Where this thread's chunks of their rows of x begin.
    #[inline(always)]
    fn x<C: Config>(&self, p: &PrefillParams, own: OwnChunk) -> Rows {
        let (mut rows, mut x) = ([Global::NULL; MAX_SWEEPS], self.0);
        // SAFETY: pairs are below P.
        unsafe { p.rows.pairs_to_x(&mut x) };
        each_sweep::<C>(|i| {
            let row = C::Index::from_u32(x[i]).times(C::Index::from_u64(p.x_stride));
            rows[i] = p.x.at(row.plus(C::Index::from_u32(own.element())));
        });
        rows
    }

    /// Where their rows of h begin, in the first slice.
    #[inline(always)]
    fn h<C: Config>(&self, p: &PrefillParams) -> Rows {
        let mut rows = [Global::NULL; MAX_SWEEPS];
        each_sweep::<C>(|i| {
            let row = C::Index::from_u32(self.0[i]).times(C::Index::from_u32(p.weights.max_rank));
            rows[i] = p.h.at(row);
        });
        rows
    }

    /// Where this thread's chunks of their rows of `out` begin.
    #[inline(always)]
    fn out<C: Config>(&self, p: &PrefillParams, tile: &Tile, own: OwnChunk) -> OutRows {
        let mut out = OutRows { rows: [Global::NULL; MAX_SWEEPS], exist: 0 };
        let mut rows = self.0;
        // SAFETY: pairs are below P.
        unsafe { p.rows.pairs_to_out(&mut rows, true) };
        each_sweep::<C>(|i| {
            let exists = rows[i] != NO_PAIR && own.is_in(tile, i);
            out.exist |= (exists as u32) << i;
            let row = C::Index::from_u32(if exists { rows[i] } else { 0 });
            let row = row.times(C::Index::from_u64(p.out_stride));
            out.rows[i] = p.out.at(row.plus(C::Index::from_u32(own.element())));
        });
        out
    }
}

/// Rows of `out`.
#[derive(Clone, Copy)]
struct OutRows {
    rows: Rows,
    /// Which of them there are: a bit a sweep.
    exist: u32,
}

/// Loads the rows of x and `a` of a work tile: all of K, or its split. Of `a` these are, of every slice of
/// the pass, the tile's ranks; zeros are in the place of the others.
///
/// # Safety
/// Every tensor of `p` must be as its field says; the whole producer must come here, the pipeline's barriers
/// be ready.
#[inline(always)]
pub(super) unsafe fn shrink<C: Config>(pipeline: &mut Pipeline<C>, p: &PrefillParams, work: &WorkTile) {
    let WorkTile { tile, pass, .. } = work;
    let own = OwnChunk::of_this_thread(CHUNKS.ilog2());
    // SAFETY: as the caller promises.
    let (begin, end_of_k) = unsafe { work.k(p) };
    // SAFETY: as the caller promises.
    let mut x = unsafe { Pairs::of::<C>(p, tile, own) }.x::<C>(p, own);
    each_sweep::<C>(|i| x[i] = x[i].at(begin));
    let in_dim = p.weights.in_dim;
    let shift = rank_shift(tile.rank);
    let stride = SWEEP * in_dim * ELEMENT_BYTES;
    // This thread's chunk of the first of its rows of a slice's `a`, and the slice's rank: of the first two
    // slices in registers, since most passes have no more.
    let a = |slice: u32| {
        let (mut row, mut rank) = (Global::NULL, 0);
        if slice < pass.end {
            // SAFETY: the tile is one of p's, and has ranks.
            let a = unsafe {
                rank = p.weights.rank(tile, slice);
                p.weights.a::<C::Index>(tile, slice)
            };
            row = a.start.at(own.row * in_dim + own.element());
        }
        (row, rank)
    };
    let kept = [a(pass.first), a(pass.first + 1)];

    let mut steps = |columns: u32| {
        let panels = shrink_panels::<C>(columns);
        let mut place = begin;
        while place < end_of_k {
            // SAFETY: as the caller promises.
            let stage = unsafe { pipeline.producer_acquire() };
            let is_inside = |panel: u32| own.element() + place + panels_k(panel) < in_dim;
            let target = stage.row_panel(0).chunk(own.row, own.chunk);
            each_sweep::<C>(|i| {
                let is_there = own.is_in(tile, i);
                let target = target.offset(i as u32 * SWEEP_BYTES);
                unroll::<MOST_PANELS>(|panel| {
                    let panel = panel as u32;
                    if panel < panels {
                        let target = panel_of(target, panel, C::SHAPE.rows);
                        let source = x[i].at(panels_k(panel));
                        // SAFETY: a chunk of a row of x, if it is there.
                        unsafe { copy16_or_zeros::<_, AROUND>(target, source, is_there && is_inside(panel)) };
                    }
                });
                x[i] = x[i].at(panels_k(panels));
            });

            let target = stage.a_panel(panels, columns, 0).chunk(own.row, own.chunk);
            let copy_row = |column: u32, row: Global<u16>, is_used: bool| {
                let target = target.offset(column * TileShape::ROW_BYTES);
                unroll::<MOST_PANELS>(|panel| {
                    let panel = panel as u32;
                    if panel < panels {
                        let (target, source) = (panel_of(target, panel, columns), row.at(panels_k(panel)));
                        // SAFETY: a chunk of a row of `a`, if it is there.
                        unsafe { copy16_or_zeros::<_, AHEAD>(target, source, is_used && is_inside(panel)) };
                    }
                });
            };
            let mut column = 0;
            while column < columns {
                let (row, ranks) = match column >> shift {
                    0 => kept[0],
                    1 => kept[1],
                    further => a(pass.first + further),
                };
                let mut row = row.at(place);
                let end = column + (1 << shift);
                let mut rank = own.row;
                while column < end {
                    copy_row(column, row, rank < ranks);
                    (column, rank) = (column + SWEEP, rank + SWEEP);
                    row = forward(row, 1, stride);
                }
            }
            // SAFETY: as the caller promises.
            unsafe { pipeline.producer_commit() };
            place += panels_k(panels);
        }
    };
    // All columns of h apart, so that most calls' loops are of constants.
    let (all, columns) = (C::SHAPE.width, pass.columns(tile.rank));
    if columns == all { steps(all) } else { steps(columns) }
}

/// Loads the rows of h of a pass, where an earlier call has computed it: one step, of 64 columns a panel.
///
/// # Safety
/// As for [`shrink`].
#[inline(always)]
pub(super) unsafe fn h<C: Config>(pipeline: &mut Pipeline<C>, p: &PrefillParams, work: &WorkTile) {
    let WorkTile { tile, pass, .. } = work;
    let own = OwnChunk::of_this_thread(CHUNKS.ilog2());
    let shift = rank_shift(tile.rank);
    // SAFETY: as the caller promises.
    let stage = unsafe { pipeline.producer_acquire() };
    // SAFETY: as the caller promises.
    let rows = unsafe { Pairs::of::<C>(p, tile, own) }.h::<C>(p);
    let slice_stride = C::Index::from_u32(p.pair_count).times(C::Index::from_u32(p.weights.max_rank));
    let mut panel = 0;
    while panel * TileShape::DEPTH < pass.columns(tile.rank) {
        let column = panel * TileShape::DEPTH + own.element();
        let slice = pass.first + (column >> shift);
        let rank = column & ((1 << shift) - 1);
        let mut left = 0;
        if slice < pass.end {
            // SAFETY: the tile is one of p's.
            left = unsafe { p.weights.rank(tile, slice) }.saturating_sub(rank).min(CHUNK);
        }
        let offset = C::Index::from_u32(slice.min(p.weights.slices - 1)).times(slice_stride);
        let offset = offset.plus(C::Index::from_u32(rank));
        let target = stage.row_panel(panel).chunk(own.row, own.chunk);
        each_sweep::<C>(|i| {
            let is_there = own.is_in(tile, i);
            let source = rows[i].at(offset);
            let target = target.offset(i as u32 * SWEEP_BYTES);
            // SAFETY: `left` ranks are left in the row, if it is there.
            unsafe { copy16::<_, AROUND>(target, source, if is_there { ELEMENT_BYTES * left } else { 0 }) };
        });
        panel += 1;
    }
    // SAFETY: as the caller promises.
    unsafe { pipeline.producer_commit() };
}

/// Loads, slice by slice, the rows of `out` and of `b` that a work tile expands, if it does.
///
/// # Safety
/// As for [`shrink`].
#[inline(always)]
pub(super) unsafe fn expand<C: Config>(pipeline: &mut Pipeline<C>, p: &PrefillParams, work: &WorkTile) {
    let tile = &work.tile;
    let own = OwnChunk::of_this_thread(CHUNKS.ilog2());
    // SAFETY: as the caller promises.
    let out = unsafe { Pairs::of::<C>(p, tile, own) }.out::<C>(p, tile, own);
    let Slices { next: mut slice, end } = work.slices_to_expand();
    while slice < end {
        // SAFETY: as the caller promises.
        unsafe { expand_slice(pipeline, p, work, out, slice) };
        slice += 1;
    }
}

/// Loads the old values of a slice's columns, in these rows of `out`, and as many ranks of `b` as are
/// multiplied.
///
/// # Safety
/// As for [`shrink`].
#[inline(always)]
unsafe fn expand_slice<C: Config>(
    pipeline: &mut Pipeline<C>,
    p: &PrefillParams,
    work: &WorkTile,
    mut out: OutRows,
    number: u32,
) {
    let own = OwnChunk::of_this_thread(CHUNKS.ilog2());
    // SAFETY: as the caller promises.
    let slice = unsafe { work.slice(p, number) };
    let first = p.weights.first_column(number) + slice.first;
    each_sweep::<C>(|i| out.rows[i] = out.rows[i].at(first));
    let panels = expand_panels::<C>(slice.rank);
    // SAFETY: as the caller promises.
    let b = unsafe { B::new::<C>(p, &work.tile, number, &slice) };
    let is_whole = slice.rank.is_multiple_of(CHUNK) && slice.rank + UNWANTED > b.max_rank;
    let mut column = slice.first;
    while column < slice.end {
        // SAFETY: as the caller promises.
        unsafe {
            pipeline.producer_wait(p.under_way);
            let stage = pipeline.producer_acquire();
            if p.accumulate != 0 {
                copy_old(&stage, own, &mut out, slice.end, column, panels);
            }
            let mut group = 0;
            while group * TileShape::DEPTH < slice.rank {
                let target = stage.b_panel(panels, group).chunk(0, 0);
                if is_whole {
                    b.copy::<true>(&slice, target, group, column, panels_n(panels));
                } else {
                    b.copy::<false>(&slice, target, group, column, panels_n(panels));
                }
                group += 1;
            }
            pipeline.producer_commit();
        }
        column += panels_n(panels);
    }
}

/// Copies a step's old values of `out`, from column `column` on, before column `end`, and moves `out` on by
/// the step.
///
/// # Safety
/// As for [`shrink`]; the stage must be empty.
#[inline(always)]
unsafe fn copy_old<C: Config>(
    stage: &Stage<C>,
    own: OwnChunk,
    out: &mut OutRows,
    end: u32,
    column: u32,
    panels: u32,
) {
    let target = stage.row_panel(0).chunk(own.row, own.chunk);
    each_sweep::<C>(|i| {
        let target = target.offset(i as u32 * SWEEP_BYTES);
        unroll::<MOST_PANELS>(|panel| {
            let panel = panel as u32;
            let is_inside = panel < panels && own.element() + column + panels_n(panel) < end;
            if out.exist >> i & 1 != 0 && is_inside {
                let target = panel_of(target, panel, C::SHAPE.rows);
                // SAFETY: columns come in eights, so the chunk is inside the row.
                unsafe { copy16_whole::<_, AROUND>(target, out.rows[i].at(panels_n(panel))) };
            }
        });
        out.rows[i] = out.rows[i].at(panels_n(panels));
    });
}

/// A slice's matrix `b`, from this thread's chunk of its first row on.
struct B {
    rows: Global<u16>,
    /// The rank that it is allocated for.
    max_rank: u32,
    own: OwnChunk,
    /// Rows that the warpgroup copies at a time: more than [`SWEEP`] where a row has few chunks.
    sweep: u32,
}

impl B {
    /// # Safety
    /// The tile must be one of `p`'s.
    #[inline(always)]
    unsafe fn new<C: Config>(p: &PrefillParams, tile: &Tile, number: u32, slice: &Slice) -> Self {
        let log = (rank_shift(slice.rank) - CHUNK.ilog2()).min(CHUNKS.ilog2());
        let own = OwnChunk::of_this_thread(log);
        let (mut rows, mut max_rank) = (Global::NULL, 0);
        if slice.rank > 0 {
            // SAFETY: as the caller promises.
            let b = unsafe { p.weights.b::<C::Index>(tile, number) };
            max_rank = b.max_rank;
            rows = b.start.at(own.row * max_rank + own.element());
        }
        B { rows, max_rank, own, sweep: WARPGROUP >> log }
    }

    /// Copies ranks 64·`group` .. of `columns` columns from `column` on, to the panels at `target`: those of
    /// the tile, and zeros to the end of the sixteen that hold the last one.
    ///
    /// `WHOLE`: rows are taken whole, or nearly, in whole chunks. Otherwise L2 is not to fetch what is
    /// around.
    ///
    /// # Safety
    /// As for [`shrink`].
    #[inline(always)]
    unsafe fn copy<const WHOLE: bool>(
        &self,
        slice: &Slice,
        target: Shared,
        group: u32,
        column: u32,
        columns: u32,
    ) {
        let first = group * TileShape::DEPTH + self.own.element();
        if first >= slice.rank.next_multiple_of(PRODUCT_K) {
            return;
        }
        let left = slice.rank.saturating_sub(first).min(CHUNK);
        let rows = self.rows.at(column as u64 * self.max_rank as u64 + (group * TileShape::DEPTH) as u64);
        // Two rows at a time: where they lie in a panel is the same for the two after them.
        let places = [0, self.sweep].map(|more| {
            let row = weight_row(self.own.row + more);
            row * TileShape::ROW_BYTES + ((self.own.chunk ^ (row % CHUNKS)) * 16)
        });
        let stride = self.sweep * self.max_rank * ELEMENT_BYTES;
        let (mut row, mut begins) = (rows, 0);
        while begins < columns {
            unroll::<2>(|i| {
                let i = i as u32;
                let target = target.offset(places[i as usize] + begins * TileShape::ROW_BYTES);
                let source = forward(row, i, stride);
                let is_inside = column + begins + i * self.sweep + self.own.row < slice.end;
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
