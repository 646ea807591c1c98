//! What the warps of both computing roles have in common.

use crate::arch::mma::Element;
use crate::arch::thread;
use crate::decode::WORKERS;

/// Threads that shrink, or that expand.
pub(super) const ROLE_THREADS: u32 = 32 * WORKERS;
/// Runs of K, or groups of columns, that a warp multiplies at a time, with sums of their own: each is a chain of loads
/// and products that wait for one another.
pub(super) const CHAINS: usize = 2;

/// Number of this thread among those of its role.
#[inline(always)]
pub(super) fn worker() -> u32 {
    thread::index() % ROLE_THREADS
}

/// Adds one run's product with `columns`, this thread's elements of the run of its pair.
#[inline(always)]
pub(super) fn multiply<E: Element>(sum: &mut [f32; 4], [low, high]: [[u32; 4]; 2], columns: [u32; 4]) {
    E::mma(sum, [low[0], high[0], low[1], high[1]], [columns[0], columns[1]]);
    E::mma(sum, [low[2], high[2], low[3], high[3]], [columns[2], columns[3]]);
}
