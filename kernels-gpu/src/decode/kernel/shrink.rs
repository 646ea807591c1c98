//! The warps that shrink.

use super::barriers::{landed, read};
use super::ring::Ring;
use super::units::{Context, Shares, Unit, log2};
use super::worker::{CHAINS, ROLE_THREADS, multiply};
use crate::arch::mma::Element;
use crate::arch::{barrier, thread, warp};
use crate::decode::{CHUNK, GROUP, RUN, SUM_ROW, WORKERS, row_bytes};
use crate::tile::unroll;

/// The barrier at which they meet among themselves.
const MEETS: u32 = 1;

/// Shrinks, and sends this block's parts of h to all blocks of the cluster.
///
/// # Safety
/// As for [`decode`](super::decode); all threads of the role must come here.
#[inline(always)]
pub(super) unsafe fn shrink<E: Element, const FRAGMENTS: usize, const ROWS: u32>(
    context: &Context<'_>,
    mut ring: Ring,
) {
    let mut shares = Shares::NONE;
    // Units whose h was sent.
    let mut sent = 0;
    let unit = |Unit { tile, .. }: Unit| {
        if tile.rank == 0 {
            return;
        }
        shares.change(context, tile.rank);
        let mut group = shares.group(context);
        while group < shares.landing_groups() {
            let ranks = shares.rank.saturating_sub(GROUP * group).min(GROUP);
            let me = thread::index_anew();
            let (warp, g, c) = (me % ROLE_THREADS / 32, me % 32 / 4, me % 4);
            let mut sum = [[[0.0f32; 4]; FRAGMENTS]; CHAINS];
            let (mut at, end) = if ranks > 0 { shares.k } else { (0, 0) };
            while at < end {
                let length = CHUNK.min(end - at);
                let row_bytes = row_bytes(length);
                // SAFETY: who fills the ring comes to the same stages.
                let stage = unsafe { ring.enter() }.offset(16 * c);
                // Ranks and pairs past the last are computed from it, and never read.
                let weights = [0, 8].map(|half| stage.offset((g + half).min(ranks - 1) * row_bytes));
                let mut run = warp;
                while RUN * run < length {
                    unroll::<CHAINS>(|i| {
                        let run = run + i as u32 * WORKERS;
                        let here = 2 * RUN * run;
                        let exists = RUN * run + 8 * c < length;
                        // SAFETY: the stage holds these rows up to `length`.
                        unsafe {
                            let rows = weights.map(|weights| weights.offset(here).load16_if(exists));
                            unroll::<FRAGMENTS>(|f| {
                                if f == 0 || 8 * (f as u32) < tile.rows {
                                    let row = (8 * f as u32 + g).min(tile.rows - 1);
                                    let x = stage.offset((GROUP + row) * row_bytes + here);
                                    multiply::<E>(&mut sum[i][f], rows, x.load16_if(exists));
                                }
                            });
                        }
                    });
                    run += CHAINS as u32 * WORKERS;
                }
                // SAFETY: as above.
                unsafe { ring.leave() };
                at += CHUNK;
            }

            // The warps' sums meet. Nobody may still read those before.
            barrier::sync_some::<MEETS, ROLE_THREADS>();
            unroll::<FRAGMENTS>(|f| {
                unroll::<4>(|i| {
                    let row = warp * ROWS + 8 * f as u32 + 2 * c + (i as u32 & 1);
                    let place = context.sums.offset(row * SUM_ROW + 4 * (g + 8 * (i as u32 >> 1)));
                    let mut all = sum[0][f][i];
                    unroll::<{ CHAINS - 1 }>(|chain| all += sum[chain + 1][f][i]);
                    // SAFETY: there is room for every warp, pair and rank of the group.
                    unsafe { place.store(all.to_bits()) };
                });
            });
            barrier::sync_some::<MEETS, ROLE_THREADS>();
            // SAFETY: all sums are there.
            unsafe { send::<ROWS>(context, &shares, tile.rows, group, sent) };
            group += shares.group_shares;
        }
        if context.blocks == 1 {
            // SAFETY: the barriers are initialised. Who had nothing to send waits as well: a phase of what has landed
            // takes all warps, and must not get those of a later one.
            unsafe {
                read(sent & 1).wait(sent >> 1 & 1 ^ 1);
                warp::sync();
                if thread::lane() == 0 {
                    landed(sent & 1).arrive();
                }
            }
        }
        sent += 1;
    };
    // SAFETY: as the caller promises.
    unsafe { context.each_unit(ROWS, unit) };
}

/// Adds up the warps' sums of a group of ranks, and sends them to all blocks, as of unit `sent` of this launch: four ranks of
/// one pair to one block a thread. A block without others stores them.
///
/// # Safety
/// The sums must be written, and all threads of the role come here.
#[inline(always)]
unsafe fn send<const ROWS: u32>(context: &Context<'_>, shares: &Shares, rows: u32, group: u32, sent: u32) {
    const FOURS: u32 = GROUP / 4;
    let (turn, parity) = (sent & 1, sent >> 1 & 1);
    // Four ranks, and a block to send them to, a thread: the same of all its pairs.
    let shift = log2(context.blocks);
    let me = thread::index_anew() % ROLE_THREADS;
    let (four, block) = (me % FOURS, (me / FOURS) & (context.blocks - 1));
    let mut row = (me / FOURS) >> shift;
    let step = (ROLE_THREADS / FOURS) >> shift;
    let part_row = 4 * GROUP * shares.landing_groups();
    let first_row = shares.k_shares(context.block) * ROWS;
    let ranks_at = 4 * (group * GROUP + 4 * four);
    while row < rows {
        let mut sum = [0.0f32; 4];
        unroll::<{ WORKERS as usize }>(|w| {
            let place = context.sums.offset((w as u32 * ROWS + row) * SUM_ROW + 16 * four);
            // SAFETY: as the caller promises.
            let values = unsafe { place.load16() };
            unroll::<4>(|i| sum[i] += f32::from_bits(values[i]));
        });
        let place = context.landing::<ROWS>(turn).offset((first_row + row) * part_row + ranks_at);
        // SAFETY: the barrier is initialised: what was sent in this turn before was read by all. There is room
        // for every part; nobody reads there before the phase has ended. (Only who sends may wait here: for others
        // nobody waits, and the barrier may be two phases on when they come.)
        unsafe {
            read(turn).wait(parity ^ 1);
            if context.blocks == 1 {
                place.store16(sum.map(f32::to_bits));
            } else {
                place.in_block(block).store4_async(sum, landed(turn).in_block(block));
            }
        }
        row += step;
    }
}
