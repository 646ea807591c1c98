//! Which rows of x and of `out` belong to a pair.

use super::Divider;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::arch::thread::anew;
use crate::memory::Global;
#[cfg(not(target_arch = "nvptx64"))]
use bytemuck::{Pod, Zeroable};

/// Which row of a tensor each pair has.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct RowParams {
    /// `[P]` rows, which nobody has checked, if `is_indexed`.
    pub index: Global<u32>,
    /// Without an index: the pair over this is its row.
    pub over: Divider,
    /// Rows of the tensor.
    pub count: u32,
    /// 1: there is an index.
    pub is_indexed: u32,
}

/// The rows of both.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct PairRows {
    /// Those of x: of a token, or of a pair, unless there is an index.
    pub x: RowParams,
    /// Those of `out`: of a pair, unless there is an index.
    pub out: RowParams,
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
impl RowParams {
    /// The row of a pair, if it has one.
    ///
    /// # Safety
    /// The index must be as its field says, and the pair one of P.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn of(&self, pair: u32) -> Option<u32> {
        if anew(self.is_indexed) == 0 {
            return Some(self.over.quotient(pair));
        }
        // SAFETY: as the caller promises.
        let row = unsafe { self.index.at(pair).load() };
        (row < self.count).then_some(row)
    }

    /// Whether a pair has a row.
    ///
    /// # Safety
    /// As for [`RowParams::of`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn has(&self, pair: u32) -> bool {
        // SAFETY: as the caller promises.
        anew(self.is_indexed) == 0 || unsafe { self.index.at(pair).load() } < self.count
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
impl PairRows {
    /// The row of x to be read for a pair. For one that has none it is the first: what comes of it is stored
    /// nowhere.
    ///
    /// # Safety
    /// As for [`RowParams::of`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn x(&self, pair: u32) -> u32 {
        // SAFETY: as the caller promises.
        unsafe { self.x.of(pair) }.unwrap_or(0)
    }

    /// The row of `out` of a pair, if it has one, and a row of x exactly if that is `wanted`: rows with one
    /// get the pair's delta, and those without are an inactive pair's.
    ///
    /// # Safety
    /// As for [`RowParams::of`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn out(&self, pair: u32, wanted: bool) -> Option<u32> {
        // SAFETY: as the caller promises.
        unsafe { self.out.of(pair).filter(|_| self.x.has(pair) == wanted) }
    }

    /// Whether rows of `out` are to be cleared of pairs that have no row of x: of calls that overwrite.
    #[inline(always)]
    pub fn may_clear(&self, accumulate: u32) -> bool {
        accumulate == 0 && anew(self.x.is_indexed) != 0
    }
}
