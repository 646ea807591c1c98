//! The steps of the warps that shrink.

use super::barriers::{h_empty, h_full};
use super::consumer::{CHAINS, Position, ROLE_THREADS, Sums, each_fragment, multiply};
use super::context::Context;
use super::work::{ShrinkPart, log2};
use crate::arch::shared::Shared;
use crate::arch::{barrier, thread, warp};
use crate::decode::config::Config;
use crate::decode::{CONSUMER_WARPS, GROUP, RUN, SUM_ROW, row_bytes};
use crate::tile::unroll;

/// The barrier at which they meet among themselves.
const MEETS: u32 = 1;

/// Adds the product of a stage: of `ranks` rows of a and `rows` of x, `length` elements of K. The warps take
/// turns with its runs.
///
/// # Safety
/// The stage must be full, with so many of each.
#[inline(always)]
pub(super) unsafe fn multiply_stage<C: Config>(
    sums: &mut Sums,
    me: &Position,
    stage: Shared,
    rows: u32,
    ranks: u32,
    length: u32,
) {
    let &Position { warp, quad, in_quad } = me;
    let row_bytes = row_bytes(length);
    let stage = stage.offset(16 * in_quad);
    // Ranks and pairs past the last are computed from it, and never read.
    let weights = [0, 8].map(|half| stage.offset((quad + half).min(ranks - 1) * row_bytes));
    let mut run = warp;
    while RUN * run < length {
        unroll::<CHAINS>(|i| {
            let run = run + i as u32 * CONSUMER_WARPS;
            let here = 2 * RUN * run;
            let exists = RUN * run + 8 * in_quad < length;
            // SAFETY: the stage holds these rows up to `length`.
            unsafe {
                let weights = weights.map(|weights| weights.offset(here).load16_if(exists));
                each_fragment::<C>(|f| {
                    if f == 0 || 8 * (f as u32) < rows {
                        let row = (8 * f as u32 + quad).min(rows - 1);
                        let x = stage.offset((GROUP + row) * row_bytes + here);
                        multiply::<C::Element>(&mut sums[i][f], weights, x.load16_if(exists));
                    }
                });
            }
        });
        run += CHAINS as u32 * CONSUMER_WARPS;
    }
}

/// Stores the warps' sums of a group of ranks side by side: [`send`] adds them up.
///
/// # Safety
/// All threads of the role must come here.
#[inline(always)]
pub(super) unsafe fn store_sums<C: Config>(context: &Context<'_>, me: &Position, sums: &Sums) {
    let &Position { warp, quad, in_quad } = me;
    // Nobody may still read those before.
    barrier::sync_some::<MEETS, ROLE_THREADS>();
    each_fragment::<C>(|f| {
        unroll::<4>(|i| {
            let row = warp * C::ROWS + 8 * f as u32 + 2 * in_quad + (i as u32 & 1);
            let place = context.sums.offset(row * SUM_ROW + 4 * (quad + 8 * (i as u32 >> 1)));
            let mut all = sums[0][f][i];
            unroll::<{ CHAINS - 1 }>(|chain| all += sums[chain + 1][f][i]);
            // SAFETY: there is room for every warp, pair and rank of the group.
            unsafe { place.store(all.to_bits()) };
        });
    });
    barrier::sync_some::<MEETS, ROLE_THREADS>();
}

/// Adds up the warps' sums of a group of ranks, and sends them to all blocks, as of work item `sent` of this
/// launch: four ranks of one pair to one block a thread. A block without others stores them.
///
/// # Safety
/// The sums must be stored, and all threads of the role come here.
#[inline(always)]
pub(super) unsafe fn send<C: Config>(
    context: &Context<'_>,
    part: &ShrinkPart,
    rows: u32,
    group: u32,
    sent: u32,
) {
    const FOURS: u32 = GROUP / 4;
    let (buffer, parity) = (sent & 1, sent >> 1 & 1);
    // Four ranks, and a block to send them to, a thread: the same of all its pairs.
    let shift = log2(context.blocks);
    let me = thread::index_anew() % ROLE_THREADS;
    let (four, block) = (me % FOURS, (me / FOURS) & (context.blocks - 1));
    let mut row = (me / FOURS) >> shift;
    let step = (ROLE_THREADS / FOURS) >> shift;
    let part_row = 4 * GROUP * part.sent_groups();
    let first_row = part.k_splits(context.block) * C::ROWS;
    let ranks_at = 4 * (group * GROUP + 4 * four);
    while row < rows {
        let mut sum = [0.0f32; 4];
        unroll::<{ CONSUMER_WARPS as usize }>(|w| {
            let place = context.sums.offset((w as u32 * C::ROWS + row) * SUM_ROW + 16 * four);
            // SAFETY: as the caller promises.
            let values = unsafe { place.load16() };
            unroll::<4>(|i| sum[i] += f32::from_bits(values[i]));
        });
        let place = context.receive_buffer::<C>(buffer).offset((first_row + row) * part_row + ranks_at);
        // SAFETY: the barrier is initialised: all blocks have read what was in the buffer. There is room for
        // every part; nobody reads there before the buffer is full. (Only who sends may wait here: for others
        // nobody waits, and the barrier may be two phases on when they come.)
        unsafe {
            h_empty(buffer).wait(parity ^ 1);
            if context.blocks == 1 {
                place.store16(sum.map(f32::to_bits));
            } else {
                place.in_block(block).store4_async(sum, h_full(buffer).in_block(block));
            }
        }
        row += step;
    }
}

/// Ends the shrink of work item `sent` of this launch. What goes to other blocks is counted by their
/// barriers; a block without others arrives at its own.
///
/// # Safety
/// All threads of the role must come here.
#[inline(always)]
pub(super) unsafe fn finish(context: &Context<'_>, sent: u32) {
    if context.blocks == 1 {
        // SAFETY: the barriers are initialised. Who had nothing to send waits as well: a phase of a full
        // buffer takes all warps, and must not get those of a later one.
        unsafe {
            h_empty(sent & 1).wait(sent >> 1 & 1 ^ 1);
            warp::sync();
            if thread::lane() == 0 {
                h_full(sent & 1).arrive();
            }
        }
    }
}

/// Waits until all blocks of the cluster have read the last parts of h that were sent to them, after `sent`
/// work items. They say so at this block's barriers, and nobody else waits for that: a block that ended
/// before would be arrived at when it is there no more, as the meeting of the cluster does not wait for what
/// is on its way.
///
/// # Safety
/// All threads of the role must come here, after the last work item.
#[inline(always)]
pub(super) unsafe fn drain(context: &Context<'_>, sent: u32) {
    if context.blocks == 1 {
        return;
    }
    unroll::<2>(|last| {
        let before = last as u32 + 1;
        if sent >= before {
            let item = sent - before;
            // SAFETY: the barriers are initialised, and no later phase can have begun.
            unsafe { h_empty(item & 1).wait(item >> 1 & 1) };
        }
    });
}
