//! What a tensor must be, and the view that the library is handed of one that is.

use super::{Dim, List, Tensor, Type, device_name, is_cuda, not_on_cuda};
use crate::fault::{Fault, Outcome};
use bytemuck::Pod;
use moe_lora::{Cuda, Rows, RowsMut, View, ViewMut};
use std::fmt;
use std::slice;

impl Tensor {
    /// The CUDA device that it lies on.
    pub fn cuda(&self) -> Outcome<u32> {
        if is_cuda(self.device) {
            Ok(self.device.device_id as u32)
        } else {
            Err(not_on_cuda(self.name, self.device))
        }
    }

    /// Its element type.
    pub fn dtype(&self) -> Type {
        self.dtype
    }

    /// Its sizes. An exporter's negative size is no size that is expected anywhere.
    pub fn shape(&self) -> &[usize] {
        let shape = &self.shape[..self.dims];
        // SAFETY: of one size and alignment, and every bit pattern is a value.
        unsafe { slice::from_raw_parts(shape.as_ptr().cast(), shape.len()) }
    }

    /// The first `len` elements of a list.
    pub fn first(mut self, len: usize) -> Self {
        self.shape[0] = self.shape[0].min(len as i64);
        self
    }

    /// An error about this tensor.
    pub fn fault(&self, expected: impl fmt::Display, got: impl fmt::Display) -> Fault {
        Fault::Argument(format!("{}: expected {expected}, got {got}", self.name))
    }

    /// Refuses it unless it lies on CUDA device `ordinal`, where `first` does.
    pub fn expect_on(&self, ordinal: u32) -> Outcome<()> {
        if self.cuda()? != ordinal {
            return Err(self.fault(format_args!("a tensor on cuda:{ordinal}"), device_name(self.device)));
        }
        Ok(())
    }

    /// Refuses any other type.
    pub fn expect_type(&self, expected: &[Type]) -> Outcome<()> {
        if expected.contains(&self.dtype) {
            return Ok(());
        }
        let names = expected.iter().map(Type::to_string).collect::<Vec<_>>();
        Err(self.fault(names.join(" or "), self.dtype))
    }

    /// Refuses any other shape.
    pub fn expect_shape(&self, expected: &[Dim]) -> Outcome<()> {
        let shape = self.shape();
        if shape.len() == expected.len() && expected.iter().zip(shape).all(|(dim, &size)| dim.holds(size)) {
            return Ok(());
        }
        Err(self.wrong_shape(List(expected)))
    }

    /// An error about this tensor's shape.
    pub fn wrong_shape(&self, expected: impl fmt::Display) -> Fault {
        self.fault(format_args!("shape {expected}"), format_args!("shape {}", List(self.shape())))
    }

    /// Refuses gaps between elements, and any other order of them than the shape's.
    pub fn expect_contiguous(&self) -> Outcome<()> {
        if self.is_packed() { Ok(()) } else { Err(self.wrong_strides("a contiguous tensor")) }
    }

    fn is_packed(&self) -> bool {
        let mut stride = 1;
        let mut packed = true;
        for (&size, &got) in self.shape[..self.dims].iter().zip(&self.strides).rev() {
            // The stride of a dimension of one says nothing.
            packed &= size == 1 || got == stride;
            stride *= size;
        }
        packed || stride == 0
    }

    /// Refuses weights, `[L, E or 1, …]`, that are not contiguous. Those of a slot may be one matrix for all
    /// experts, at a stride of 0, as PyTorch's `expand` leaves it. Says whether they are.
    pub fn expect_matrices(&self) -> Outcome<bool> {
        let shared = self.dims == 4 && self.shape[1] > 1 && self.strides[1] == 0;
        let mut matrices = *self;
        if shared {
            matrices.shape[1] = 1;
        }
        if matrices.is_packed() {
            return Ok(shared);
        }
        Err(self.wrong_strides(if shared {
            "a tensor that is contiguous but for its experts, which share one matrix"
        } else {
            "a contiguous tensor"
        }))
    }

    /// Elements from one row of the last dimension to the next, all dimensions before it taken as one.
    pub fn row_stride(&self) -> Outcome<usize> {
        let Some(last) = self.dims.checked_sub(1) else { return Err(self.wrong_shape("of rows")) };
        let width = self.shape[last];
        if width > 1 && self.strides[last] != 1 {
            return Err(self.wrong_strides("a contiguous innermost dimension"));
        }
        // Rows follow one another at the stride of the innermost dimension that has more than one of them.
        let mut next = None;
        for (&size, &got) in self.shape[..last].iter().zip(&self.strides).rev() {
            let (row, expected) = next.unwrap_or((got, got));
            if size > 1 {
                if got != expected {
                    return Err(self.wrong_strides("rows at equal distances"));
                }
                next = Some((row, got * size));
            }
        }
        match next {
            Some((stride, _)) if stride < width => {
                let expected = format!("a row stride of at least {width}");
                Err(self.wrong_strides(expected))
            }
            Some((stride, _)) => Ok(stride as usize),
            None => Ok(width as usize),
        }
    }

    /// An error about this tensor's strides.
    pub fn wrong_strides(&self, expected: impl fmt::Display) -> Fault {
        let (shape, strides) = (List(self.shape()), List(&self.strides[..self.dims]));
        self.fault(expected, format_args!("shape {shape} with strides {strides}"))
    }

    fn elements(&self) -> usize {
        self.shape().iter().product()
    }

    /// Elements from the first to the end of the last, where rows of the last dimension are `stride` apart.
    fn extent(&self, stride: usize) -> usize {
        let Some((&width, rows)) = self.shape().split_last() else { return 1 };
        match rows.iter().product::<usize>() {
            0 => 0,
            rows => (rows - 1) * stride + width,
        }
    }

    /// The elements of a tensor that is contiguous.
    ///
    /// # Safety
    /// `T` is its type. Its memory outlives the call that the view is handed to, and what that queues.
    pub unsafe fn view<T: Pod>(&self) -> View<'_, Cuda, T> {
        // SAFETY: as the caller promises.
        unsafe { View::from_raw(self.address, self.elements()) }
    }

    /// The first `len` elements of a tensor that is contiguous as far as they go.
    ///
    /// # Safety
    /// As for [`Tensor::view`].
    pub unsafe fn view_of<T: Pod>(&self, len: usize) -> View<'_, Cuda, T> {
        // SAFETY: as the caller promises.
        unsafe { View::from_raw(self.address, len) }
    }

    /// As [`Tensor::view`], to be written.
    ///
    /// # Safety
    /// As for [`Tensor::view`], and nothing else uses the memory meanwhile.
    pub unsafe fn view_mut<T: Pod>(&self) -> ViewMut<'_, Cuda, T> {
        // SAFETY: as the caller promises.
        unsafe { ViewMut::from_raw(self.address, self.elements()) }
    }

    /// Its rows, `stride` elements apart, in the order of `index` where there is one.
    ///
    /// # Safety
    /// As for [`Tensor::view`]; `index` is of 32-bit integers.
    pub unsafe fn rows<'a, T: Pod>(&'a self, stride: usize, index: Option<&'a Self>) -> Rows<'a, Cuda, T> {
        // SAFETY: as the caller promises.
        let data = unsafe { View::from_raw(self.address, self.extent(stride)) };
        // SAFETY: likewise, of the index.
        let index = index.map(|index| unsafe { index.view() });
        Rows { data, stride: Some(stride), index }
    }

    /// As [`Tensor::rows`], to be written.
    ///
    /// # Safety
    /// As for [`Tensor::view_mut`]; `index` is of 32-bit integers.
    pub unsafe fn rows_mut<'a, T: Pod>(
        &'a self,
        stride: usize,
        index: Option<&'a Self>,
    ) -> RowsMut<'a, Cuda, T> {
        // SAFETY: as the caller promises.
        let data = unsafe { ViewMut::from_raw(self.address, self.extent(stride)) };
        // SAFETY: likewise, of the index.
        let index = index.map(|index| unsafe { index.view() });
        RowsMut { data, stride: Some(stride), index }
    }
}
