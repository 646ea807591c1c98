//! The rows of `out` of a tile's pairs.

use crate::arch::mma::Element;
use crate::memory::{Global, Index};
use crate::params::{ExpandParams, NO_PAIR, Tile};
use crate::tile::accumulator::{Accumulator, row_of};
use crate::tile::unroll;

/// The old values of a warp's columns, eight a thread.
pub type Old<const M: usize, const G: usize> = [[[[u32; 4]; G]; 2]; M];

/// This thread's rows of the tile: where each begins in `out` at the slice's column 0, and its weight.
/// A row past the tile's end is null.
pub struct OutRows<const M: usize> {
    start: [[Global<u16>; 2]; M],
    weight: [[f32; 2]; M],
}

impl<const M: usize> OutRows<M> {
    /// Those of pairs that have a row of x, or of those that have none, as is `wanted`.
    ///
    /// # Safety
    /// The tile must be one of `p`'s.
    #[inline(always)]
    pub unsafe fn new<I: Index>(
        p: &ExpandParams,
        tile: &Tile,
        warp_row: u32,
        slice: u32,
        wanted: bool,
    ) -> Self {
        let mut rows = OutRows { start: [[Global::NULL; 2]; M], weight: [[1.0; 2]; M] };
        let mut pairs = [[NO_PAIR; 2]; M];
        unroll::<M>(|m| {
            unroll::<2>(|half| {
                let row = warp_row + row_of(m, half);
                if row < tile.rows {
                    // SAFETY: `first` + `rows` pairs are in the list, and each is below P.
                    pairs[m][half] = unsafe { p.pairs.at(tile.first + row).load() };
                }
            });
        });
        // An inactive pair's weight may be anything; its zeros stay zeros.
        if !p.topk_weights.is_null() && tile.rank > 0 {
            unroll::<M>(|m| {
                unroll::<2>(|half| {
                    let (pair, exists) = (pairs[m][half], pairs[m][half] != NO_PAIR);
                    // SAFETY: as above.
                    rows.weight[m][half] = unsafe { p.topk_weights.at(pair).load_or(1.0, exists) };
                });
            });
        }
        unroll::<M>(|m| {
            // SAFETY: as above.
            unsafe { p.rows.pairs_to_out(&mut pairs[m], wanted) };
            unroll::<2>(|half| {
                let row = pairs[m][half];
                if row != NO_PAIR {
                    let offset = I::from_u32(row).times(I::from_u64(p.out_stride));
                    let column = I::from_u32(p.weights.first_column(slice));
                    rows.start[m][half] = p.out.at(offset.plus(column));
                }
            });
        });
        // SAFETY: as the caller promises.
        if let Some(scaling) = unsafe { p.weights.scaling(tile, slice) } {
            rows.weight.as_flattened_mut().iter_mut().for_each(|weight| *weight *= scaling);
        }
        rows
    }

    /// Stores zeros in every `step`-th column from `first` on, up to `end`.
    #[inline(always)]
    pub fn clear(&self, p: &ExpandParams, (first, end): (u32, u32), step: u32) {
        let mut column = first;
        while column < end {
            unroll::<M>(|m| {
                unroll::<2>(|half| {
                    let start = self.start[m][half];
                    // SAFETY: the column is inside the row.
                    unsafe { start.at(column * p.column_stride).store_if(0, !start.is_null()) };
                });
            });
            column += step;
        }
    }

    /// Loads the old values of a warp's columns, of which `first` is this thread's first, up to `end`.
    ///
    /// # Safety
    /// The columns must be the slice's, in eights.
    #[inline(always)]
    pub unsafe fn load_old<const G: usize>(&self, first: u32, end: u32) -> Old<M, G> {
        let mut old = [[[[0u32; 4]; G]; 2]; M];
        unroll::<M>(|m| {
            unroll::<2>(|half| {
                unroll::<G>(|g| {
                    let at = first + 32 * g as u32;
                    if !self.start[m][half].is_null() && at < end {
                        // SAFETY: eight columns from `at` are inside the row, and aligned.
                        old[m][half][g] = unsafe { self.start[m][half].at(at).load16() };
                    }
                });
            });
        });
        old
    }

    /// Adds the weighted sums of these columns to the old values, if asked to, and stores them.
    ///
    /// # Safety
    /// As for [`OutRows::load_old`].
    #[inline(always)]
    pub unsafe fn add_and_store<E: Element, const G: usize, const FAST: bool>(
        &self,
        p: &ExpandParams,
        (first, end): (u32, u32),
        sum: &Accumulator<M, G>,
        old: &Old<M, G>,
    ) {
        unroll::<M>(|m| {
            unroll::<2>(|half| {
                unroll::<G>(|g| {
                    let at = first + 32 * g as u32;
                    if !self.start[m][half].is_null() && at < end {
                        let weight = self.weight[m][half];
                        let values = sum.columns(m, half, g).map(|value| value * weight);
                        let (stride, old) = (p.column_stride, old[m][half][g]);
                        let place = self.start[m][half].at(if FAST { at } else { at * stride });
                        let columns = ((end - at).min(8), stride);
                        // SAFETY: the columns from `at` on are inside the row.
                        unsafe { store::<E, FAST>(place, values, old, columns, p.accumulate != 0) };
                    }
                });
            });
        });
    }
}

/// Eight columns of one row: adds the old values if asked to, and stores. In a fast kernel they are side
/// by side, in another `stride` apart.
///
/// # Safety
/// `at` must be valid for reads and writes of `columns` (1 ..= 8) elements.
#[inline(always)]
unsafe fn store<E: Element, const FAST: bool>(
    at: Global<u16>,
    values: [f32; 8],
    old: [u32; 4],
    (columns, stride): (u32, u32),
    accumulate: bool,
) {
    if FAST {
        let mut packed = [0u32; 4];
        unroll::<4>(|i| {
            let [first, second] = E::unpack(old[i]);
            packed[i] = E::pack(values[2 * i] + first, values[2 * i + 1] + second);
        });
        // SAFETY: as the caller promises; fast columns come in eights.
        unsafe { at.store16(packed) };
    } else {
        unroll::<8>(|i| {
            if (i as u32) < columns {
                let at = at.at(i as u32 * stride);
                // SAFETY: as the caller promises.
                unsafe {
                    let old = if accumulate { E::unpack(at.load() as u32)[0] } else { 0.0 };
                    at.store(E::pack(values[i] + old, 0.0) as u16);
                }
            }
        });
    }
}
