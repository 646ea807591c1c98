//! Prefix sums over a warp and over a block.

use crate::arch::shared::Shared;
use crate::arch::{barrier, thread, warp};
use crate::tile::unroll;

/// Sum over this thread and those before it in its warp. The whole warp must come here.
#[inline(always)]
pub fn inclusive(value: u32) -> u32 {
    let lane = thread::lane();
    let mut sum = value;
    let mut distance = 1;
    while distance < 32 {
        let below = warp::shuffle_up(sum, distance);
        sum += if lane >= distance { below } else { 0 };
        distance *= 2;
    }
    sum
}

/// Sums over the threads before this one, and over all, of `N` numbers at once. The whole block of `THREADS`
/// threads must come here; `scratch` has `N` words a warp, which may be used again after the next barrier.
#[inline(always)]
pub fn scan<const THREADS: u32, const N: usize>(scratch: Shared, values: [u32; N]) -> ([u32; N], [u32; N]) {
    const { assert!(THREADS / 32 <= 32) };
    let sums = values.map(inclusive);
    let word = |warp: u32, i: usize| scratch.offset(4 * (N as u32 * warp + i as u32));
    let (mut before, mut total) = ([0; N], [0; N]);
    // SAFETY: N words a warp; the barrier separates their writers from their readers.
    unsafe {
        if thread::lane() == 31 {
            unroll::<N>(|i| word(thread::warp(), i).store(sums[i]));
        }
        barrier::sync();
        // Each warp adds up all warps, a lane each.
        let mut warps = [0; N];
        if thread::lane() < THREADS / 32 {
            unroll::<N>(|i| warps[i] = word(thread::lane(), i).load());
        }
        let through = warps.map(inclusive);
        unroll::<N>(|i| {
            total[i] = warp::shuffle(through[i], 31);
            before[i] = warp::shuffle(through[i] - warps[i], thread::warp()) + sums[i] - values[i];
        });
    }
    (before, total)
}
