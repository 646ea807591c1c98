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
/// threads must come here; `scratch` has two words a warp.
#[inline(always)]
pub fn scan<const THREADS: u32>(scratch: Shared, values: [u32; 2]) -> ([u32; 2], [u32; 2]) {
    let sums = values.map(inclusive);
    let word = |number: u32| scratch.offset(4 * number);
    // SAFETY: two words a warp; the barriers separate their writers from their readers.
    unsafe {
        if thread::lane() == 31 {
            word(2 * thread::warp()).store(sums[0]);
            word(2 * thread::warp() + 1).store(sums[1]);
        }
        barrier::sync();
        let mut before = [0u32; 2];
        let mut total = [0u32; 2];
        let mut w = 0;
        while w < THREADS / 32 {
            let [a, b] = [word(2 * w).load(), word(2 * w + 1).load()];
            if w < thread::warp() {
                before = [before[0] + a, before[1] + b];
            }
            total = [total[0] + a, total[1] + b];
            w += 1;
        }
        barrier::sync();
        ([before[0] + sums[0] - values[0], before[1] + sums[1] - values[1]], total)
    }
}
