//! Host memory that the back end owns.

use crate::backend::Buffer;
use crate::tensor::{Host, View, ViewMut};
use bytemuck::{Pod, Zeroable};
use std::marker::PhantomData;

/// Host memory that starts on a cache line.
#[derive(Clone, Debug)]
pub struct HostBuffer<T> {
    lines: Vec<CacheLine>,
    len: usize,
    element: PhantomData<T>,
}

#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C, align(64))]
struct CacheLine([u8; 64]);

impl<T: Pod> HostBuffer<T> {
    pub(super) fn new(elements: &[T]) -> Self {
        let lines = vec![CacheLine::zeroed(); size_of_val(elements).div_ceil(size_of::<CacheLine>())];
        let mut buffer = HostBuffer { lines, len: elements.len(), element: PhantomData };
        buffer.as_mut_slice().copy_from_slice(elements);
        buffer
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        let bytes: &[u8] = bytemuck::cast_slice(&self.lines);
        bytemuck::cast_slice(&bytes[..self.len * size_of::<T>()])
    }

    /// The elements, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.lines);
        bytemuck::cast_slice_mut(&mut bytes[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> Buffer<T> for HostBuffer<T> {
    type Space = Host;

    fn view(&self) -> View<'_, Host, T> {
        self.as_slice().into()
    }

    fn view_mut(&mut self) -> ViewMut<'_, Host, T> {
        self.as_mut_slice().into()
    }
}
