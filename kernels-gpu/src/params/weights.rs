//! Where the adapters' weights are: in stacked tensors, or where a table in device memory says.

use super::MAX_SLICES;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use super::Tile;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::arch::thread::anew;
use crate::memory::Global;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::memory::Index;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::tile::select_slice;
#[cfg(not(target_arch = "nvptx64"))]
use bytemuck::{Pod, Zeroable};

/// One slice of one adapter, in a table of them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct AdapterEntry {
    /// Rank in use; 0 or below, as a signed number: none.
    pub rank: u32,
    /// The rank that `a` and `b` are allocated for.
    pub max_rank: u32,
    /// What each delta is multiplied by.
    pub scaling: f32,
    /// To 32 bytes, so that an entry is two 16-byte loads.
    pub reserved: u32,
    /// `[E or 1, max_rank, K]`.
    pub a: Global<u16>,
    /// `[E or 1, N, max_rank]`.
    pub b: Global<u16>,
}

/// The weights of a call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct WeightParams {
    /// 1: weights are where the table says. 0: they are stacked.
    pub has_table: u32,
    /// S.
    pub slices: u32,
    /// K.
    pub in_dim: u32,
    /// R: the rank that stacked weights are allocated for, and the largest of any adapter.
    pub max_rank: u32,
    /// Matrices of `a` in a slot: E or 1.
    pub a_experts: u32,
    /// Matrices of `b` in a slot: E or 1.
    pub b_experts: u32,
    /// S of `[L, E or 1, R, K]`, without a table.
    pub a: [Global<u16>; MAX_SLICES],
    /// S of `[L, E or 1, N, R]`, without a table.
    pub b: [Global<u16>; MAX_SLICES],
    /// N of each slice.
    pub out_dims: [u32; MAX_SLICES],
    /// First column of `out` of each slice.
    pub first_columns: [u32; MAX_SLICES],
    /// `[L, S]`, fewer than 2³¹ entries, if `has_table`.
    pub table: Global<AdapterEntry>,
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
/// One expert's matrix: of `a` of a slot's slice, `[max_rank, K]`, or of `b`, `[N, max_rank]`.
#[derive(Clone, Copy)]
pub struct Matrix {
    /// Its first element.
    pub start: Global<u16>,
    /// The rank that it is allocated for.
    pub max_rank: u32,
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
impl WeightParams {
    /// Whether weights are where the table says.
    #[inline(always)]
    pub fn has_table(&self) -> bool {
        anew(self.has_table) != 0
    }

    /// N of a slice.
    #[inline(always)]
    pub fn out_dim(&self, slice: u32) -> u32 {
        select_slice(self.out_dims, slice)
    }

    /// First column of `out` of a slice.
    #[inline(always)]
    pub fn first_column(&self, slice: u32) -> u32 {
        select_slice(self.first_columns, slice)
    }

    #[inline(always)]
    fn entry(&self, slot: u32, slice: u32) -> Global<AdapterEntry> {
        self.table.at(slot * self.slices + slice)
    }

    /// Rank in use, allocated rank and scaling of an entry.
    ///
    /// # Safety
    /// There must be a table that has the slot.
    #[inline(always)]
    #[track_caller]
    unsafe fn load_sizes(&self, slot: u32, slice: u32) -> [u32; 4] {
        // SAFETY: as the caller promises; entries are aligned to 16 bytes.
        unsafe { Global::<u32>::new(self.entry(slot, slice).address()).load16() }
    }

    /// The rank of a slice of a tile's slot: at most the tile's own, which the route knows, and the entry's.
    ///
    /// # Safety
    /// The table must have the slot of every tile with a rank.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn rank(&self, tile: &Tile, slice: u32) -> u32 {
        if !self.has_table() || tile.rank == 0 {
            return tile.rank;
        }
        // SAFETY: as the caller promises.
        let [rank, max_rank, ..] = unsafe { self.load_sizes(tile.slot, slice) };
        // A negative rank is a large unsigned number: it becomes 0, not the largest.
        if rank as i32 > 0 { rank.min(max_rank).min(tile.rank) } else { 0 }
    }

    /// The largest rank of a tile's slices.
    ///
    /// # Safety
    /// As for [`WeightParams::rank`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn largest_rank(&self, tile: &Tile) -> u32 {
        if !self.has_table() || tile.rank == 0 {
            return tile.rank;
        }
        let (mut largest, mut left) = (0, self.slices);
        while left > 0 {
            // Not to be unrolled: it is seldom come by.
            left = anew(left - 1);
            // SAFETY: as the caller promises.
            largest = unsafe { self.rank(tile, left) }.max(largest);
        }
        largest
    }

    /// What a slice's deltas are multiplied by, for a tile with a rank; `None` for 1. (So nobody waits for a
    /// pair's weight only to multiply it.)
    ///
    /// # Safety
    /// As for [`WeightParams::rank`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn scaling(&self, tile: &Tile, slice: u32) -> Option<f32> {
        if !self.has_table() || tile.rank == 0 {
            return None;
        }
        // SAFETY: as the caller promises.
        let [_, _, scaling, _] = unsafe { self.load_sizes(tile.slot, slice) };
        Some(f32::from_bits(scaling))
    }

    /// The tile's expert's matrix of stacked `a`.
    #[inline(always)]
    #[track_caller]
    pub fn stacked_a<I: Index>(&self, tile: &Tile, slice: u32) -> Matrix {
        self.stacked::<I>(tile, self.a_experts, select_slice(self.a, slice), self.in_dim)
    }

    /// The tile's expert's matrix of stacked `b`, of a slice of `out_dim` columns.
    #[inline(always)]
    #[track_caller]
    pub fn stacked_b<I: Index>(&self, tile: &Tile, slice: u32, out_dim: u32) -> Matrix {
        self.stacked::<I>(tile, self.b_experts, select_slice(self.b, slice), out_dim)
    }

    /// A matrix of `width` times the allocated rank in a stacked tensor, of which a slot has `experts`.
    #[inline(always)]
    #[track_caller]
    fn stacked<I: Index>(&self, tile: &Tile, experts: u32, tensor: Global<u16>, width: u32) -> Matrix {
        let expert = if experts == 1 { 0 } else { tile.expert };
        let number = I::from_u32(tile.slot).times(I::from_u32(experts)).plus(I::from_u32(expert));
        let elements = I::from_u32(width).times(I::from_u32(self.max_rank));
        Matrix { start: tensor.at(number.times(elements)), max_rank: self.max_rank }
    }

    /// The tile's expert's matrix of `a`, for a tile with a rank.
    ///
    /// # Safety
    /// As for [`WeightParams::rank`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn a<I: Index>(&self, tile: &Tile, slice: u32) -> Matrix {
        if !self.has_table() {
            return self.stacked_a::<I>(tile, slice);
        }
        // SAFETY: as the caller promises.
        unsafe { self.named::<I>(tile, slice, self.a_experts, self.in_dim, |[a, _]| a) }
    }

    /// The tile's expert's matrix of `b`, for a tile with a rank.
    ///
    /// # Safety
    /// As for [`WeightParams::rank`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn b<I: Index>(&self, tile: &Tile, slice: u32) -> Matrix {
        let out_dim = self.out_dim(slice);
        if !self.has_table() {
            return self.stacked_b::<I>(tile, slice, out_dim);
        }
        // SAFETY: as the caller promises.
        unsafe { self.named::<I>(tile, slice, self.b_experts, out_dim, |[_, b]| b) }
    }

    /// A matrix of `width` times the allocated rank that the table names, one of `experts` of a slot.
    ///
    /// # Safety
    /// As for [`WeightParams::rank`]; there must be a table.
    #[inline(always)]
    #[track_caller]
    unsafe fn named<I: Index>(
        &self,
        tile: &Tile,
        slice: u32,
        experts: u32,
        width: u32,
        of: impl Fn([Global<u16>; 2]) -> Global<u16>,
    ) -> Matrix {
        let addresses = Global::<u32>::new(self.entry(tile.slot, slice).address() + 16);
        // SAFETY: as the caller promises.
        let ([a_low, a_high, b_low, b_high], [_, max_rank, ..]) =
            unsafe { (addresses.load16(), self.load_sizes(tile.slot, slice)) };
        let address = |low, high| Global::new((high as u64) << 32 | low as u64);
        let start = of([address(a_low, a_high), address(b_low, b_high)]);
        let expert = I::from_u32(if experts == 1 { 0 } else { tile.expert });
        let elements = I::from_u32(width).times(I::from_u32(max_rank));
        Matrix { start: start.at(expert.times(elements)), max_rank }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever writes an entry knows where each number is: the table is part of the interface.
    #[test]
    fn an_entry_is_laid_out_as_it_is_documented() {
        let places = [
            core::mem::offset_of!(AdapterEntry, rank),
            core::mem::offset_of!(AdapterEntry, max_rank),
            core::mem::offset_of!(AdapterEntry, scaling),
            core::mem::offset_of!(AdapterEntry, a),
            core::mem::offset_of!(AdapterEntry, b),
            size_of::<AdapterEntry>(),
        ];
        assert_eq!(places, [0, 4, 8, 16, 24, 32]);
    }
}
