//! The steps of the warps that expand.

use super::barriers::{h_empty, h_full};
use super::consumer::{CHAINS, NO_SUMS, Position, ROLE_THREADS, Sums, each_fragment, multiply, role_thread};
use super::context::{Context, h_row_bytes};
use super::work::{ExpandPart, ShrinkPart, WorkItem, log2};
use crate::arch::mma::Element;
use crate::arch::shared::Shared;
use crate::arch::{barrier, thread};
use crate::decode::config::{Config, MAX_FRAGMENTS};
use crate::decode::{B_STAGE, CONSUMER_WARPS, GROUP, RUN, old_row_bytes};
use crate::memory::Global;
use crate::params::NO_PAIR;
use crate::tile::unroll;

/// The barrier at which they meet among themselves.
const MEETS: u32 = 2;

/// h of a work item.
#[derive(Clone, Copy)]
pub(super) struct H {
    start: Shared,
    /// Bytes from one row to the next.
    row_bytes: u32,
}

/// Waits for all parts of h of work item `received` of this launch, and adds them up, in the order of the
/// splits of K.
///
/// # Safety
/// All blocks of the cluster must send their parts, and all threads of the role come here.
#[inline(always)]
pub(super) unsafe fn receive<C: Config>(
    context: &Context<'_>,
    sent: &ShrinkPart,
    rows: u32,
    received: u32,
) -> H {
    let (buffer, parity) = (received & 1, received >> 1 & 1);
    let rank = sent.rank;
    let row_bytes = h_row_bytes(context.p);
    let h = context.h::<C>(buffer);
    let part_row = 4 * GROUP * sent.sent_groups();
    let k_splits = sent.k_splits(context.blocks);
    // Four ranks of a pair a thread, the same of all its pairs; a power of two of threads takes a row, so
    // that no thread divides.
    let width = rank.next_multiple_of(RUN) / 4;
    let room = width.next_power_of_two();
    let (first_row, four) = (role_thread() >> log2(room), role_thread() & (room - 1));
    let step = ROLE_THREADS >> log2(room);
    // Ranks above the last are zero, whatever the part holds.
    let ranks = rank.saturating_sub(4 * four);
    let mut row = if four < width { first_row } else { rows };
    let mut place = context.receive_buffer::<C>(buffer).offset(first_row * part_row + 16 * four);
    let mut target = h.offset(first_row * row_bytes + 8 * four);
    // SAFETY: the barrier is initialised.
    unsafe {
        if role_thread() == 0 {
            let bytes = k_splits * sent.sent_groups() * GROUP * rows * 4;
            h_full(buffer).arrive_expecting(if context.blocks == 1 { 0 } else { bytes });
        }
        h_full(buffer).wait(parity);
    }
    while row < rows {
        let mut sum = [0.0f32; 4];
        let (mut part, end) = (place, place.offset(k_splits * C::ROWS * part_row));
        while part != end {
            // SAFETY: the part has come.
            let values = unsafe { part.load16_if(ranks > 0) };
            unroll::<4>(|i| sum[i] += f32::from_bits(values[i]));
            part = part.offset(C::ROWS * part_row);
        }
        unroll::<4>(|i| sum[i] = if (i as u32) < ranks { sum[i] } else { 0.0 });
        // SAFETY: there is room for every pair and every run of ranks.
        unsafe {
            target.store(C::Element::pack(sum[0], sum[1]));
            target.offset(4).store(C::Element::pack(sum[2], sum[3]));
        }
        row += step;
        place = place.offset(step * part_row);
        target = target.offset(step * row_bytes);
    }
    barrier::sync_some::<MEETS, ROLE_THREADS>();
    if role_thread() < context.blocks {
        // SAFETY: no block ends before all have met at the end.
        unsafe { h_empty(buffer).in_block(role_thread()).arrive() };
    }
    H { start: h, row_bytes }
}

/// The two pairs of each fragment whose sums this thread ends up with: where their slice begins in `out`,
/// null of pairs that do not exist, and their weights.
pub(super) struct OutRows {
    start: [[Global<u16>; 2]; MAX_FRAGMENTS],
    weight: [[f32; 2]; MAX_FRAGMENTS],
}

impl OutRows {
    /// Those of pairs that have a row of x, or of those that have none, as is `wanted`.
    ///
    /// # Safety
    /// The segments must be ready, and the tensors of the call be as their fields say.
    #[inline(always)]
    pub unsafe fn new<C: Config>(context: &Context<'_>, item: &WorkItem, wanted: bool) -> Self {
        let (p, tile) = (context.p, &item.tile);
        let in_quad = thread::lane() % 4;
        let mut pairs = [NO_PAIR; 2 * MAX_FRAGMENTS];
        each_fragment::<C>(|f| {
            unroll::<2>(|i| {
                let row = 8 * f as u32 + 2 * in_quad + i as u32;
                if row < tile.rows {
                    // SAFETY: the tile has so many pairs.
                    pairs[2 * f + i] = unsafe { context.pair(tile, row) };
                }
            });
        });
        let mut weight = [[1.0; 2]; MAX_FRAGMENTS];
        // An inactive pair's weight may be anything; its zeros stay zeros.
        if !p.topk_weights.is_null() && tile.rank > 0 {
            each_fragment::<C>(|f| {
                unroll::<2>(|i| {
                    let (pair, exists) = (pairs[2 * f + i], pairs[2 * f + i] != NO_PAIR);
                    // SAFETY: a pair is one of P.
                    weight[f][i] = unsafe { p.topk_weights.at(pair).load_or(1.0, exists) };
                });
            });
        }
        if C::GENERAL {
            // SAFETY: as above.
            unsafe { p.rows.pairs_to_out(&mut pairs, wanted) };
        }
        let mut start = [[Global::<u16>::NULL; 2]; MAX_FRAGMENTS];
        each_fragment::<C>(|f| {
            unroll::<2>(|i| {
                let row = pairs[2 * f + i];
                if row != NO_PAIR {
                    start[f][i] = context.out_row::<C>(item, row);
                }
            });
        });
        if C::GENERAL {
            // SAFETY: the tensors are as their fields say.
            if let Some(scaling) = unsafe { p.weights.scaling(tile, item.slice) } {
                weight.as_flattened_mut().iter_mut().for_each(|weight| *weight *= scaling);
            }
        }
        OutRows { start, weight }
    }

    /// Stores two columns of a pair, if they are wanted and the pair exists.
    #[inline(always)]
    fn store_if(&self, f: usize, i: usize, column: u32, values: u32, wanted: bool) {
        let place = Global::<u32>::new(self.start[f][i].at(column).address());
        // SAFETY: two columns are inside the row; sizes are multiples of 8.
        unsafe { place.store_if(values, wanted & self.has(f, i)) };
    }

    /// Whether the row is there.
    #[inline(always)]
    fn has(&self, f: usize, i: usize) -> bool {
        !self.start[f][i].is_null()
    }

    /// Stores zeros in the block's columns.
    #[inline(always)]
    pub fn clear<C: Config>(&self, part: &ExpandPart) {
        let Position { warp, quad, .. } = Position::anew();
        let mut column = part.first + GROUP * warp + 2 * quad;
        while column < part.end {
            each_fragment::<C>(|f| unroll::<2>(|i| self.store_if(f, i, column, 0, true)));
            column += GROUP * CONSUMER_WARPS;
        }
    }
}

/// The old values of two columns of a thread's pairs, in each chain.
type Old = [[[u32; 2]; MAX_FRAGMENTS]; CHAINS];

/// The columns of a stage that a warp takes at a time: a group in each chain.
#[derive(Clone, Copy)]
pub(super) struct Columns<'m> {
    me: &'m Position,
    /// First column of the first group.
    group: u32,
    /// Columns of the stage.
    count: u32,
}

impl<'m> Columns<'m> {
    /// Calls `body` with this warp's columns of a stage of `count`, one after another.
    #[inline(always)]
    pub fn each_group(me: &'m Position, count: u32, mut body: impl FnMut(Self)) {
        let mut group = GROUP * me.warp;
        while group < count {
            body(Columns { me, group, count });
            group += CHAINS as u32 * GROUP * CONSUMER_WARPS;
        }
    }

    /// This thread's first column of a chain.
    #[inline(always)]
    fn first(&self, chain: usize) -> u32 {
        self.group + chain as u32 * GROUP * CONSUMER_WARPS + 2 * self.me.quad
    }

    /// Whether the stage has it.
    #[inline(always)]
    fn exist(&self, chain: usize) -> bool {
        self.first(chain) < self.count
    }

    /// Loads the old values of these rows, if they are `wanted`. They come first: what is added to them takes
    /// longer.
    ///
    /// # Safety
    /// The stage must be full, and have the rows' old values, if they are wanted.
    #[inline(always)]
    pub unsafe fn load_old<C: Config>(&self, stage: Shared, out: &OutRows, wanted: bool) -> Old {
        let mut old = [[[0; 2]; MAX_FRAGMENTS]; CHAINS];
        unroll::<CHAINS>(|chain| {
            // Past the last column its neighbours' are loaded, and never stored: a row's own condition is
            // the same in every stage.
            let column = self.first(chain).min(self.count - 2);
            each_fragment::<C>(|f| {
                unroll::<2>(|i| {
                    let row = 8 * f as u32 + 2 * self.me.in_quad + i as u32;
                    let at = B_STAGE + row * old_row_bytes(self.count);
                    let wanted = wanted & out.has(f, i);
                    // SAFETY: as the caller promises.
                    old[chain][f][i] = unsafe { stage.offset(at).offset(2 * column).load_if(wanted) };
                });
            });
        });
        old
    }

    /// Multiplies the columns by h of `rows` pairs and `rank` ranks. A column of the stage has `column_rank`
    /// ranks.
    ///
    /// # Safety
    /// The stage must be full, and h be whole.
    #[inline(always)]
    pub unsafe fn multiply<C: Config>(
        &self,
        stage: Shared,
        h: &H,
        rows: u32,
        rank: u32,
        column_rank: u32,
    ) -> Sums {
        let &Position { quad, in_quad, .. } = self.me;
        let mut sums = NO_SUMS;
        let mut at = 0;
        while at < rank {
            // SAFETY: as the caller promises.
            let mut weights = unsafe { self.load_weights(stage, at, column_rank) };
            if !rank.is_multiple_of(8) {
                // Above the rank a column may hold anything, NaN too.
                let left = rank.saturating_sub(at + 8 * in_quad);
                weights.as_flattened_mut().iter_mut().for_each(|row| *row = keep_first(*row, left));
            }
            each_fragment::<C>(|f| {
                if f == 0 || 8 * (f as u32) < rows {
                    // Pairs past the last are computed from it, and never stored.
                    let row = (8 * f as u32 + quad).min(rows - 1);
                    // SAFETY: h holds all runs of these ranks.
                    let h = unsafe { h.start.offset(row * h.row_bytes + 2 * at + 16 * in_quad).load16() };
                    unroll::<CHAINS>(|i| multiply::<C::Element>(&mut sums[i][f], weights[i], h));
                }
            });
            at += RUN;
        }
        sums
    }

    /// This thread's ranks of its two columns in each chain, of the run from rank `at` on.
    ///
    /// # Safety
    /// As for [`Columns::multiply`].
    #[inline(always)]
    unsafe fn load_weights(&self, stage: Shared, at: u32, column_rank: u32) -> [[[u32; 4]; 2]; CHAINS] {
        let in_quad = self.me.in_quad;
        let mut weights = [[[0; 4]; 2]; CHAINS];
        unroll::<CHAINS>(|i| {
            let exists = self.exist(i) & (at + 8 * in_quad < column_rank);
            unroll::<2>(|row| {
                let column = self.first(i) + row as u32;
                let place = stage.offset(2 * (column * column_rank + at) + 16 * in_quad);
                // SAFETY: the stage holds these columns up to the rank.
                weights[i][row] = unsafe { place.load16_if(exists) };
            });
        });
        weights
    }

    /// Adds the old values to the weighted sums, and stores them as the columns from `at` on.
    #[inline(always)]
    pub fn add_and_store<C: Config>(&self, out: &OutRows, at: u32, sums: &Sums, old: &Old) {
        unroll::<CHAINS>(|chain| {
            each_fragment::<C>(|f| {
                unroll::<2>(|i| {
                    let [low, high] = C::Element::unpack(old[chain][f][i]);
                    let (sum, weight) = (sums[chain][f], out.weight[f][i]);
                    let values = C::Element::pack(sum[i] * weight + low, sum[i + 2] * weight + high);
                    out.store_if(f, i, at + self.first(chain), values, self.exist(chain));
                });
            });
        });
    }
}

/// The first `count` of eight elements, zeros after them.
#[inline(always)]
fn keep_first(elements: [u32; 4], count: u32) -> [u32; 4] {
    let mut kept = elements;
    unroll::<4>(|i| {
        let mask = match count.saturating_sub(2 * i as u32) {
            0 => 0,
            1 => 0xffff,
            _ => u32::MAX,
        };
        kept[i] &= mask;
    });
    kept
}
