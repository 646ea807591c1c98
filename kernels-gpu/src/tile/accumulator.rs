//! One warp's part of a tile's product, in registers.

use super::panel::Panel;
use super::unroll;
use crate::arch::mma::Element;
use crate::arch::thread;

/// `M` m16 fragments of pairs × `G` groups of 32 columns, in f32.
pub struct Accumulator<const M: usize, const G: usize>([[[[f32; 4]; 4]; G]; M]);

impl<const M: usize, const G: usize> Accumulator<M, G> {
    /// All zeros.
    #[inline(always)]
    pub fn zero() -> Self {
        Accumulator([[[[0.0; 4]; 4]; G]; M])
    }

    /// Adds rows `row` .. of `rows` times rows `column` .. of `weights`, over the 16 elements of `step`, in
    /// the first `groups` groups.
    ///
    /// # Safety
    /// Both panels must be written there; the whole warp must come here.
    #[inline(always)]
    pub unsafe fn multiply<E: Element>(
        &mut self,
        rows: Panel,
        row: u32,
        weights: Panel,
        column: u32,
        groups: u32,
        step: u32,
    ) {
        let mut a = [[0u32; 4]; M];
        // SAFETY: as the caller promises.
        unroll::<M>(|m| a[m] = unsafe { rows.rows_fragment(row + 16 * m as u32, step) });
        unroll::<G>(|g| {
            if g as u32 >= groups {
                return;
            }
            unroll::<2>(|half| {
                // SAFETY: as the caller promises.
                let b = unsafe { weights.columns_fragments(column + 32 * g as u32 + 16 * half as u32, step) };
                unroll::<M>(|m| {
                    E::mma(&mut self.0[m][g][2 * half], a[m], b[0]);
                    E::mma(&mut self.0[m][g][2 * half + 1], a[m], b[1]);
                });
            });
        });
    }

    /// The eight columns of group `group` that this thread holds of its row `half` (0 or 1) of fragment
    /// `fragment`; [`row_of`] and [`column_of`] say which they are.
    #[inline(always)]
    pub fn columns(&self, fragment: usize, half: usize, group: usize) -> [f32; 8] {
        let tiles = &self.0[fragment][group];
        let [low, high] = [2 * half, 2 * half + 1];
        [
            tiles[0][low],
            tiles[0][high],
            tiles[1][low],
            tiles[1][high],
            tiles[2][low],
            tiles[2][high],
            tiles[3][low],
            tiles[3][high],
        ]
    }
}

/// Row, within a warp's rows, of this thread's row `half` of fragment `fragment`.
#[inline(always)]
pub fn row_of(fragment: usize, half: usize) -> u32 {
    16 * fragment as u32 + 8 * half as u32 + thread::lane() / 4
}

/// First of this thread's eight columns, within a group of 32.
#[inline(always)]
pub fn column_of() -> u32 {
    8 * (thread::lane() % 4)
}
