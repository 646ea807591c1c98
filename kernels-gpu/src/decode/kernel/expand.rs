//! The warps that expand.

use super::barriers::{landed, read};
use super::ring::Ring;
use super::units::{Columns, Context, Shares, Unit, log2};
use super::worker::{CHAINS, ROLE_THREADS, multiply, worker};
use crate::arch::mma::Element;
use crate::arch::shared::Shared;
use crate::arch::{barrier, thread};
use crate::decode::{B_STAGE, GROUP, RUN, WORKERS, old_row_bytes, row_bytes};
use crate::memory::{Global, Index};
use crate::tile::unroll;

/// The barrier at which they meet among themselves.
const MEETS: u32 = 2;

/// h of a unit: waits for all parts and adds them up, in the order of the shares of K. Returns h and the bytes
/// from one row to the next.
///
/// # Safety
/// All blocks of the cluster must send their parts, and all threads of the role come here.
#[inline(always)]
unsafe fn receive<E: Element, const ROWS: u32>(
    context: &Context<'_>,
    shares: &Shares,
    rows: u32,
    received: u32,
) -> (Shared, u32) {
    let (turn, parity) = (received & 1, received >> 1 & 1);
    let rank = shares.rank;
    let row_bytes = row_bytes(context.p.route.max_rank.next_multiple_of(RUN));
    let h = context.h.offset(turn * ROWS * row_bytes);
    let part_row = 4 * GROUP * shares.landing_groups();
    let k_shares = shares.k_shares(context.blocks);
    // Four ranks of a pair a thread, the same of all its pairs; a power of two of threads takes a row, so that no thread divides.
    let width = rank.next_multiple_of(RUN) / 4;
    let room = width.next_power_of_two();
    let (first_row, four) = (worker() >> log2(room), worker() & (room - 1));
    let step = ROLE_THREADS >> log2(room);
    // Ranks above the last are zero, whatever the part holds.
    let ranks = rank.saturating_sub(4 * four);
    let mut row = if four < width { first_row } else { rows };
    let mut place = context.landing::<ROWS>(turn).offset(first_row * part_row + 16 * four);
    let mut target = h.offset(first_row * row_bytes + 8 * four);
    // SAFETY: the barrier is initialised.
    unsafe {
        if worker() == 0 {
            let bytes = k_shares * shares.landing_groups() * GROUP * rows * 4;
            landed(turn).arrive_expecting(if context.blocks == 1 { 0 } else { bytes });
        }
        landed(turn).wait(parity);
    }
    while row < rows {
        let mut sum = [0.0f32; 4];
        let (mut part, end) = (place, place.offset(k_shares * ROWS * part_row));
        while part != end {
            // SAFETY: the part has landed.
            let values = unsafe { part.load16_if(ranks > 0) };
            unroll::<4>(|i| sum[i] += f32::from_bits(values[i]));
            part = part.offset(ROWS * part_row);
        }
        unroll::<4>(|i| sum[i] = if (i as u32) < ranks { sum[i] } else { 0.0 });
        // SAFETY: there is room for every pair and every run of ranks.
        unsafe {
            target.store(E::pack(sum[0], sum[1]));
            target.offset(4).store(E::pack(sum[2], sum[3]));
        }
        row += step;
        place = place.offset(step * part_row);
        target = target.offset(step * row_bytes);
    }
    barrier::sync_some::<MEETS, ROLE_THREADS>();
    if worker() < context.blocks {
        // SAFETY: no block ends before all have met at the end.
        unsafe { read(turn).in_block(worker()).arrive() };
    }
    (h, row_bytes)
}

/// Expands.
///
/// # Safety
/// As for [`decode`](super::decode); all threads of the role must come here.
#[inline(always)]
pub(super) unsafe fn expand<E: Element, I: Index, const FRAGMENTS: usize, const ROWS: u32>(
    context: &Context<'_>,
    mut ring: Ring,
) {
    let mut shares = Shares::NONE;
    let p = context.p;
    let accumulate = p.accumulate != 0;
    let c = thread::lane() % 4;
    let mut columns = Columns::new(context);
    // Units whose h was received.
    let mut received = 0;
    let unit = |unit: Unit| {
        let tile = unit.tile;
        // The two pairs of each fragment whose sums this thread ends up with.
        let mut out = [[Global::<u16>::NULL; 2]; FRAGMENTS];
        let mut weight = [[1.0; 2]; FRAGMENTS];
        unroll::<FRAGMENTS>(|f| {
            unroll::<2>(|i| {
                let row = 8 * f as u32 + 2 * c + i as u32;
                if row < tile.rows {
                    // SAFETY: the tile has so many pairs, and each is below P.
                    unsafe {
                        let pair = context.pair(&tile, row);
                        out[f][i] = context.out_row::<I>(&unit, pair);
                        // An inactive pair's weight may be anything; its zeros stay zeros.
                        if !p.topk_weights.is_null() && tile.rank > 0 {
                            weight[f][i] = p.topk_weights.at(pair).load();
                        }
                    }
                }
            });
        });
        // Stores two columns of a pair, if they are wanted and the pair exists.
        let store_if = |f: usize, i: usize, column: u32, values: u32, wanted: bool| {
            let place = Global::<u32>::new(out[f][i].at(column).address());
            // SAFETY: two columns are inside the row; sizes are multiples of 8.
            unsafe { place.store_if(values, wanted & !out[f][i].is_null()) };
        };
        if tile.rank == 0 {
            // Inactive pairs: untouched, or overwritten by zeros.
            let me = thread::index_anew() % ROLE_THREADS;
            let mut column = columns.first + GROUP * (me / 32) + 2 * (me % 32 / 4);
            while column < columns.end && !accumulate {
                unroll::<FRAGMENTS>(|f| unroll::<2>(|i| store_if(f, i, column, 0, true)));
                column += GROUP * WORKERS;
            }
            return;
        }
        shares.change(context, tile.rank);
        columns.change(tile.rank);
        // SAFETY: as the caller promises.
        let (h, h_row) = unsafe { receive::<E, ROWS>(context, &shares, tile.rows, received) };
        received += 1;
        columns.each_step(|at, count| {
            let me = thread::index_anew();
            let (warp, g, c) = (me % ROLE_THREADS / 32, me % 32 / 4, me % 4);
            // SAFETY: who fills the ring comes to the same stages.
            let stage = unsafe { ring.enter() };
            let mut group = GROUP * warp;
            while group < count {
                let column_of = |i: usize| group + i as u32 * GROUP * WORKERS + 2 * g;
                let exists = |i: usize| column_of(i) < count;
                // The old values first: what is added to them takes longer.
                let mut old = [[[0; 2]; FRAGMENTS]; CHAINS];
                unroll::<CHAINS>(|chain| {
                    unroll::<FRAGMENTS>(|f| {
                        unroll::<2>(|i| {
                            let row = 8 * f as u32 + 2 * c + i as u32;
                            let place =
                                stage.offset(B_STAGE + row * old_row_bytes(count) + 2 * column_of(chain));
                            let wanted = accumulate & (row < tile.rows) & exists(chain);
                            // SAFETY: the stage holds the old values of these columns.
                            old[chain][f][i] = unsafe { place.load_if(wanted) };
                        });
                    });
                });
                let mut sum = [[[0.0f32; 4]; FRAGMENTS]; CHAINS];
                let mut rank = 0;
                while rank < shares.rank {
                    let mut rows = [[[0; 4]; 2]; CHAINS];
                    unroll::<CHAINS>(|i| {
                        let exists = exists(i) & (rank + 8 * c < columns.rank);
                        unroll::<2>(|row| {
                            let column = column_of(i) + row as u32;
                            let place = stage.offset(2 * (column * columns.rank + rank) + 16 * c);
                            // SAFETY: the stage holds these columns up to the rank.
                            rows[i][row] = unsafe { place.load16_if(exists) };
                        });
                    });
                    if !shares.rank.is_multiple_of(8) {
                        // Above the rank a row may hold anything, NaN too.
                        let left = shares.rank.saturating_sub(rank + 8 * c);
                        rows.as_flattened_mut().iter_mut().for_each(|row| *row = keep_first(*row, left));
                    }
                    unroll::<FRAGMENTS>(|f| {
                        if f == 0 || 8 * (f as u32) < tile.rows {
                            // Pairs past the last are computed from it, and never stored.
                            let row = (8 * f as u32 + g).min(tile.rows - 1);
                            // SAFETY: h holds all runs of these ranks.
                            let h = unsafe { h.offset(row * h_row + 2 * rank + 16 * c).load16() };
                            unroll::<CHAINS>(|i| multiply::<E>(&mut sum[i][f], rows[i], h));
                        }
                    });
                    rank += RUN;
                }
                unroll::<CHAINS>(|chain| {
                    unroll::<FRAGMENTS>(|f| {
                        unroll::<2>(|i| {
                            let [low, high] = E::unpack(old[chain][f][i]);
                            let (sum, weight) = (sum[chain][f], weight[f][i]);
                            let values = E::pack(sum[i] * weight + low, sum[i + 2] * weight + high);
                            store_if(f, i, at + column_of(chain), values, exists(chain));
                        });
                    });
                });
                group += CHAINS as u32 * GROUP * WORKERS;
            }
            // SAFETY: as above.
            unsafe { ring.leave() };
        });
    };
    // SAFETY: as the caller promises.
    unsafe { context.each_unit(ROWS, unit) };
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
