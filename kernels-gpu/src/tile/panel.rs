//! A panel: rows of 64 elements (128 bytes) in shared memory, swizzled.
//!
//! A row is eight 16-byte chunks; chunk c of row r lies at place c ^ (r % 8). Eight threads that read or
//! write the same chunk of eight rows in succession, as `ldmatrix` does, thus meet eight different
//! groups of banks.
//!
//! Rows of a *weight* panel are stored in another order than they have in memory, such that the eight
//! values of a row of D that a thread ends up with are eight columns side by side: 16 bytes of `h` or
//! `out`. Within 32 columns, column 8c + 2t + i (c: the thread's number in its quad, t: the n8 tile, i:
//! 0 or 1) is row 8t + 2c + i of the panel, since D gives thread c columns 2c + i of tile t.

use super::TileShape;
use crate::arch::async_copy;
use crate::arch::global::Scalar;
use crate::arch::shared::Shared;
use crate::arch::thread;
use crate::memory::Global;

/// Elements of a chunk: 16 bytes.
pub const CHUNK: u32 = 8;
/// Chunks of a row.
pub const CHUNKS: u32 = TileShape::DEPTH / CHUNK;

/// Rows of 64 elements in shared memory.
#[derive(Clone, Copy)]
pub struct Panel(Shared);

/// Row of the panel where a weight row (a column of the product) is stored.
#[inline(always)]
pub fn weight_row(column: u32) -> u32 {
    let (group, c, t, i) = (column & !31, column >> 3 & 3, column >> 1 & 3, column & 1);
    group | t << 3 | c << 1 | i
}

impl Panel {
    /// A panel that starts at a multiple of 128 bytes.
    #[inline(always)]
    pub fn at(start: Shared) -> Self {
        Panel(start)
    }

    /// Where a chunk of a row lies.
    #[inline(always)]
    pub fn chunk(self, row: u32, chunk: u32) -> Shared {
        self.0.offset(row * TileShape::ROW_BYTES + ((chunk ^ (row & 7)) << 4))
    }

    /// Copies one chunk: `elements` (0 ..= 8) from `source`, then zeros.
    ///
    /// `FAST`: asynchronously, in one piece; `source` is 16-byte aligned. Otherwise: element by element,
    /// through registers. `FETCH`: see [`async_copy::copy16`].
    ///
    /// # Safety
    /// The chunk must be inside the panel, and read by nobody before the copy's group was waited for and
    /// a barrier passed; `source` must be valid for reads of `elements` elements, and aligned.
    #[inline(always)]
    pub unsafe fn copy_chunk<const FAST: bool, const FETCH: u32>(
        self,
        row: u32,
        chunk: u32,
        source: Global<u16>,
        elements: u32,
    ) {
        let target = self.chunk(row, chunk);
        // SAFETY: as the caller promises; elements past `elements` are not read.
        unsafe {
            if FAST {
                async_copy::copy16::<_, FETCH>(target, source, elements * 2);
            } else {
                let element = |i: u32| {
                    if i < elements { u16::load(source.at(i).address()) as u32 } else { 0 }
                };
                let pair = |i: u32| element(i) | element(i + 1) << 16;
                target.store16([pair(0), pair(2), pair(4), pair(6)]);
            }
        }
    }

    /// A's fragment (see [`crate::arch::mma`]): rows `row` .. `row` + 16, elements 16·`step` .. + 16.
    ///
    /// # Safety
    /// The rows must be inside the panel and written; the whole warp must come here.
    #[inline(always)]
    pub unsafe fn rows_fragment(self, row: u32, step: u32) -> [u32; 4] {
        let lane = thread::lane();
        // SAFETY: as the caller promises.
        unsafe { self.chunk(row + lane % 16, 2 * step + lane / 16).load_matrices() }
    }

    /// B's fragments of two n8 tiles: panel rows `row` .. `row` + 16, elements 16·`step` .. + 16.
    ///
    /// # Safety
    /// As for [`Panel::rows_fragment`].
    #[inline(always)]
    pub unsafe fn columns_fragments(self, row: u32, step: u32) -> [[u32; 2]; 2] {
        let lane = thread::lane();
        let row = row + (lane / 16) * 8 + lane % 8;
        // SAFETY: as the caller promises.
        let [a, b, c, d] = unsafe { self.chunk(row, 2 * step + lane / 8 % 2).load_matrices() };
        [[a, b], [c, d]]
    }
}
