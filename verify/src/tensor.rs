//! Tensors as they lie in memory.

use bytemuck::Pod;
use moe_lora::tensor::{Host, View};
use std::ops::Range;

/// Bytes of guard before and after a tensor: a multiple of every alignment that kernels care about,
/// and longer than the rows of most cases.
const GUARD_BYTES: usize = 4096;

/// The byte pattern of guards, padding and poison: a NaN as bf16, f16 and f32, and no id as i32.
const POISON: [u8; 8] = [0xE5, 0x7F, 0xE5, 0x7F, 0xE5, 0x7F, 0xE5, 0x7F];

/// The element that [`POISON`] makes.
pub(crate) fn poison<T: Pod>() -> T {
    let bytes: Vec<u8> = POISON.into_iter().cycle().take(size_of::<T>()).collect();
    bytemuck::pod_read_unaligned(&bytes)
}

/// A tensor as it lies in memory: its elements between two guards.
#[derive(Clone, Debug)]
pub struct Tensor<T> {
    name: &'static str,
    image: Vec<T>,
    elements: Range<usize>,
    rows: usize,
    stride: usize,
}

impl<T: Pod> Tensor<T> {
    /// `rows` rows of `width` elements, `stride` apart, all `fill`; nothing follows the last one.
    pub(crate) fn filled(
        name: &'static str,
        [rows, stride, width]: [usize; 3],
        fill: T,
        misaligned: bool,
    ) -> Self {
        let len = rows.checked_sub(1).map_or(0, |before| before * stride + width);
        let guard = GUARD_BYTES / size_of::<T>();
        let first = guard + usize::from(misaligned);
        Tensor { name, image: vec![fill; first + len + guard], elements: first..first + len, rows, stride }
    }

    pub(crate) fn poisoned(name: &'static str, rows: [usize; 3], misaligned: bool) -> Self {
        Self::filled(name, rows, poison(), misaligned)
    }

    /// One row of elements.
    pub(crate) fn new(name: &'static str, elements: &[T], misaligned: bool) -> Self {
        let mut tensor = Self::poisoned(name, [1, elements.len(), elements.len()], misaligned);
        tensor.elements_mut().copy_from_slice(elements);
        tensor
    }

    /// How many rows it has.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Its name in the operator's contract.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The elements with their guards: what is copied to a back end.
    pub fn image(&self) -> &[T] {
        &self.image
    }

    /// Where the elements are in the image.
    pub fn range(&self) -> Range<usize> {
        self.elements.clone()
    }

    /// The elements.
    pub fn elements(&self) -> &[T] {
        &self.image[self.elements.clone()]
    }

    pub(crate) fn elements_mut(&mut self) -> &mut [T] {
        &mut self.image[self.elements.clone()]
    }

    /// Where the image's element `index` is, in words.
    pub fn place(&self, index: usize) -> String {
        let Range { start, end } = self.elements;
        if index < start {
            format!("{} elements before its first", start - index)
        } else if index >= end {
            format!("{} elements past its last", index - end + 1)
        } else {
            format!("row {}, column {}", (index - start) / self.stride, (index - start) % self.stride)
        }
    }

    /// The elements as a host view.
    pub fn view(&self) -> View<'_, Host, T> {
        self.elements().into()
    }
}
