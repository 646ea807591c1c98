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
/// threads must come here; `scratch` has `N` words a warp.
#[inline(always)]
pub fn scan<const THREADS: u32, const N: usize>(scratch: Shared, values: [u32; N]) -> ([u32; N], [u32; N]) {
    let sums = values.map(inclusive);
    let word = |warp: u32, number: usize| scratch.offset(4 * (N as u32 * warp + number as u32));
    if thread::lane() == 31 {
        // SAFETY: `N` words a warp; the barriers separate their writers from their readers.
        unroll::<N>(|n| unsafe { word(thread::warp(), n).store(sums[n]) });
    }
    barrier::sync();
    // Every warp adds up the warps before it, a thread a warp.
    const { assert!(THREADS / 32 <= 32) };
    let mut before = [0u32; N];
    let mut total = [0u32; N];
    unroll::<N>(|n| {
        let mut of_warp = 0;
        if thread::lane() < THREADS / 32 {
            // SAFETY: as above.
            of_warp = unsafe { word(thread::lane(), n).load() };
        }
        let up_to = inclusive(of_warp);
        total[n] = warp::shuffle(up_to, 31);
        before[n] = warp::shuffle(up_to - of_warp, thread::warp()) + sums[n] - values[n];
    });
    barrier::sync();
    (before, total)
}
