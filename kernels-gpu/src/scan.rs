//! Prefix sums over a warp and over a block.

use crate::arch::shared::Shared;
use crate::arch::{barrier, thread, warp};

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

/// Sums over the threads before this one, and over all, of two numbers at once. The whole block of `THREADS`
/// threads must come here; `scratch` has two words a warp, which may be used again after the next barrier.
#[inline(always)]
pub fn scan<const THREADS: u32>(scratch: Shared, values: [u32; 2]) -> ([u32; 2], [u32; 2]) {
    const { assert!(THREADS / 32 <= 32) };
    let sums = values.map(inclusive);
    let word = |number: u32| scratch.offset(4 * number);
    // SAFETY: two words a warp; the barrier separates their writers from their readers.
    unsafe {
        if thread::lane() == 31 {
            word(2 * thread::warp()).store(sums[0]);
            word(2 * thread::warp() + 1).store(sums[1]);
        }
        barrier::sync();
        // Each warp adds up all warps, a lane each.
        let mut warps = [0; 2];
        if thread::lane() < THREADS / 32 {
            warps = [word(2 * thread::lane()).load(), word(2 * thread::lane() + 1).load()];
        }
        let through = warps.map(inclusive);
        let total = through.map(|sum| warp::shuffle(sum, 31));
        let before = |i: usize| {
            warp::shuffle(through[i] - warps[i], thread::warp()) + sums[i] - values[i]
        };
        ([before(0), before(1)], total)
    }
}
