//! Typed memory of a device.

use crate::backend;
use crate::cuda::device::Device;
use crate::cuda::memory::Memory;
use crate::error::{Error, Result};
use crate::tensor::{Cuda, View, ViewMut};
use bytemuck::Pod;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// Memory on a device, freed when dropped: after all work that uses it, whichever streams that is queued on.
/// (For streams of the caller's see [`Device::foreign_stream`].)
pub struct Buffer<T> {
    memory: Arc<Memory>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// Room for `len` elements, unwritten.
    ///
    /// # Safety
    /// The elements must be written before they are read.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`] and [`Error::Driver`] when there is no room.
    pub unsafe fn uninitialized(device: &Device, len: usize) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|bytes| *bytes <= isize::MAX as usize);
        let too_many = || Error::SizeOverflow { tensor: "buffer", shape: format!("[{len}]") };
        let memory = Arc::new(Memory::new(device, bytes.ok_or_else(too_many)?)?);
        Ok(Buffer { memory, len, element: PhantomData })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device that it is on.
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// Address of the first element, on the device. Whoever reads or writes there sees to the order of work
    /// itself.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} elements on {:?})", self.len, self.memory.device())
    }
}

impl<T: Pod> backend::Buffer<T> for Buffer<T> {
    type Space = Cuda;

    fn view(&self) -> View<'_, Cuda, T> {
        // SAFETY: the memory is this buffer's for as long as it is borrowed, and a call keeps it and its uses
        // in order.
        unsafe { View::of(self.address(), self.len, &self.memory) }
    }

    fn view_mut(&mut self) -> ViewMut<'_, Cuda, T> {
        // SAFETY: as above, and nobody else may use it.
        unsafe { ViewMut::of(self.memory.address(), self.len, &self.memory) }
    }
}
