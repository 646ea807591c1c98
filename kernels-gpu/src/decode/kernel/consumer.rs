//! What the warps of both consumer roles have in common.

use crate::arch::mma::Element;
use crate::arch::thread;
use crate::decode::CONSUMER_WARPS;
use crate::decode::config::{Config, MAX_FRAGMENTS};
use crate::tile::unroll;

/// Threads that shrink, or that expand.
pub(super) const ROLE_THREADS: u32 = 32 * CONSUMER_WARPS;
/// Runs of K, or groups of columns, that a warp multiplies at a time, with sums of their own: each is a chain
/// of loads and products that wait for one another.
pub(super) const CHAINS: usize = 2;

/// A warp's sums, of each chain and each fragment: mma's `d` of sixteen rows of weights and eight pairs.
pub(super) type Sums = [[[f32; 4]; MAX_FRAGMENTS]; CHAINS];
/// Before anything was added.
pub(super) const NO_SUMS: Sums = [[[0.0; 4]; MAX_FRAGMENTS]; CHAINS];

/// Number of this thread among those of its role.
#[inline(always)]
pub(super) fn role_thread() -> u32 {
    thread::index() % ROLE_THREADS
}

/// Where a thread stands among those of its role, and in an mma (PTX ISA 9.7.14.5).
#[derive(Clone, Copy)]
pub(super) struct Position {
    /// Warp of the role.
    pub warp: u32,
    /// The thread's quad in the warp, `groupID`: it has a row of weights, that eight below, and a pair.
    pub quad: u32,
    /// The thread's number in its quad, `threadID_in_group`.
    pub in_quad: u32,
}

impl Position {
    /// That of this thread, read anew: see [`thread::index_anew`].
    #[inline(always)]
    pub fn anew() -> Self {
        let me = thread::index_anew();
        Position { warp: me % ROLE_THREADS / 32, quad: me % 32 / 4, in_quad: me % 4 }
    }
}

/// Calls `body` with the number of each fragment of a tile, a constant once inlined: see [`unroll`].
#[inline(always)]
pub(super) fn each_fragment<C: Config>(mut body: impl FnMut(usize)) {
    unroll::<MAX_FRAGMENTS>(|fragment| {
        if fragment < C::FRAGMENTS {
            body(fragment);
        }
    });
}

/// Adds one run's product with `columns`, this thread's elements of the run of its pair.
#[inline(always)]
pub(super) fn multiply<E: Element>(sum: &mut [f32; 4], [low, high]: [[u32; 4]; 2], columns: [u32; 4]) {
    E::mma(sum, [low[0], high[0], low[1], high[1]], [columns[0], columns[1]]);
    E::mma(sum, [low[2], high[2], low[3], high[3]], [columns[2], columns[3]]);
}
