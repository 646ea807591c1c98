//! Which rows of x and of `out` belong to a pair.

use super::Divider;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::arch::thread::anew;
use crate::memory::Global;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::tile::unroll;
#[cfg(not(target_arch = "nvptx64"))]
use bytemuck::{Pod, Zeroable};

/// Which rows of x and of `out` each pair has.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct PairRows {
    /// Which indices there are: bits of [`indexed`].
    pub indexed: u32,
    /// Rows of x.
    pub x_count: u32,
    /// Without an index: a pair over this is its row of x, k or 1.
    pub x_over: Divider,
    /// `[P]` rows of x, which nobody has checked.
    pub x_index: Global<u32>,
    /// `[P]` rows of `out`, likewise. Without an index a pair is its row.
    pub out_index: Global<u32>,
    /// Rows of `out`.
    pub out_count: u32,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
}

/// In place of a pair that is not there, and of a row.
pub const NO_PAIR: u32 = u32::MAX;

/// Which rows have an index.
pub mod indexed {
    /// Those of x.
    pub const X: u32 = 1;
    /// Those of `out`.
    pub const OUT: u32 = 2;
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
impl PairRows {
    /// Makes rows of x out of pairs, `u32::MAX` of none among them.
    ///
    /// Here and in [`PairRows::pairs_to_out`] all pairs are loaded before any is looked at, and one branch is
    /// for all: loads wait for one another otherwise.
    ///
    /// # Safety
    /// As for [`PairRows::x`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn pairs_to_x<const N: usize>(&self, pairs: &mut [u32; N]) {
        if self.are_indexed(indexed::X) {
            unroll::<N>(|i| {
                if pairs[i] != NO_PAIR {
                    // SAFETY: as the caller promises.
                    pairs[i] = unsafe { self.x(pairs[i]) };
                }
            });
        } else {
            unroll::<N>(|i| pairs[i] = self.x_over.quotient(pairs[i]));
        }
    }

    /// Makes rows of `out` out of pairs, `u32::MAX` of those that have none, or are not `wanted`: see
    /// [`PairRows::out`].
    ///
    /// # Safety
    /// As for [`PairRows::x`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn pairs_to_out<const N: usize>(&self, pairs: &mut [u32; N], wanted: bool) {
        if !wanted || anew(self.indexed) != 0 {
            unroll::<N>(|i| {
                if pairs[i] != NO_PAIR {
                    // SAFETY: as the caller promises.
                    pairs[i] = unsafe { self.out(pairs[i], wanted) }.unwrap_or(NO_PAIR);
                }
            });
        }
    }

    /// Whether these rows have an index.
    #[inline(always)]
    fn are_indexed(&self, which: u32) -> bool {
        anew(self.indexed) & which != 0
    }

    /// The row of x to be read for a pair. For one that has none it is the first: what comes of it is stored
    /// nowhere.
    ///
    /// # Safety
    /// The index must be as its field says, and the pair one of P.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn x(&self, pair: u32) -> u32 {
        if !self.are_indexed(indexed::X) {
            return self.x_over.quotient(pair);
        }
        // SAFETY: as the caller promises.
        let row = unsafe { self.x_index.at(pair).load() };
        if row < self.x_count { row } else { 0 }
    }

    /// Whether a pair has a row of x.
    ///
    /// # Safety
    /// As for [`PairRows::x`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn has_x(&self, pair: u32) -> bool {
        // SAFETY: as the caller promises.
        !self.are_indexed(indexed::X) || unsafe { self.x_index.at(pair).load() } < self.x_count
    }

    /// The row of `out` of a pair, if it has one, and a row of x exactly if that is `wanted`: rows with one
    /// get the pair's delta, and those without are an inactive pair's.
    ///
    /// # Safety
    /// As for [`PairRows::x`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn out(&self, pair: u32, wanted: bool) -> Option<u32> {
        if anew(self.indexed) == 0 {
            return wanted.then_some(pair);
        }
        let mut row = pair;
        if self.are_indexed(indexed::OUT) {
            // SAFETY: as the caller promises.
            row = unsafe { self.out_index.at(pair).load() };
        }
        // SAFETY: as the caller promises.
        (row < self.out_count && unsafe { self.has_x(pair) } == wanted).then_some(row)
    }

    /// Whether rows of `out` are to be cleared of pairs that have no row of x: of calls that overwrite.
    #[inline(always)]
    pub fn may_clear(&self, accumulate: u32) -> bool {
        self.are_indexed(indexed::X) && accumulate == 0
    }
}
