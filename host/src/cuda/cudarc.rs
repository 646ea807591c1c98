//! Calls on `cudarc`'s streams and slices, without copies.
//!
//! ```no_run
//! use half::bf16;
//! use moe_lora::{Operator, ProjectionSizes, cuda::{CudarcStream, Device}};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let context = cudarc::driver::CudaContext::new(0)?;
//! let cudarc = context.default_stream();
//! let stream = CudarcStream::new(&Device::new(0)?, cudarc.clone())?;
//! let sizes = ProjectionSizes { experts: 8, slots: 2, max_rank: 16, ..ProjectionSizes::down(2048, 768) };
//! let [w2] = Operator::builder(stream.stream()).max_tokens(64).build([sizes])?;
//!
//! let (x, a) = (cudarc.alloc_zeros::<bf16>(64 * 768)?, cudarc.alloc_zeros::<bf16>(2 * 8 * 16 * 768)?);
//! let b = cudarc.alloc_zeros::<bf16>(2 * 8 * 2048 * 16)?;
//! let mut out = cudarc.alloc_zeros::<bf16>(64 * 2048)?;
//! let (topk_ids, token_lora) = (cudarc.alloc_zeros::<i32>(64)?, cudarc.alloc_zeros::<i32>(64)?);
//! // Borrowed until the call is queued: cudarc keeps what other streams do with them in order.
//! let (x, a, b) = (stream.read(x.as_view())?, stream.read(a.as_view())?, stream.read(b.as_view())?);
//! let (topk_ids, token_lora) = (stream.read(topk_ids.as_view())?, stream.read(token_lora.as_view())?);
//! let mut out = stream.write(out.as_view_mut())?;
//! let routing = (topk_ids.view(), token_lora.view());
//! w2.call(x.view(), [a.view()], [b.view()], routing, out.view_mut()).run()?;
//! # Ok(())
//! # }
//! ```

use crate::cuda::device::Device;
use crate::cuda::memory::Memory;
use crate::cuda::raw_stream::Owner;
use crate::cuda::stream::Stream;
use crate::error::{Error, Result};
use crate::tensor::{Cuda, View, ViewMut};
use bytemuck::Pod;
use cudarc::driver::{CudaContext, CudaStream, CudaView, CudaViewMut, DeviceSlice, SyncOnDrop};
use std::marker::PhantomData;
use std::sync::Arc;

/// A stream of `cudarc`'s that calls run on. It may be the one that each thread has its own of
/// (`CudaContext::per_thread_stream`): where buffers and workspaces go from one thread to another, the later
/// call first waits for the device.
#[derive(Clone, Debug)]
pub struct CudarcStream {
    stream: Stream,
    cudarc: Arc<CudaStream>,
}

/// A slice of `cudarc`'s that a call on one stream reads. When it is dropped, `cudarc` notes that what was
/// queued there until then may read it.
#[must_use]
pub struct CudarcRead<'a, T> {
    // Dropped after the call that it is lent to has been queued.
    _guard: SyncOnDrop<'a>,
    lent: Lent<T>,
}

/// A slice of `cudarc`'s that a call on one stream writes. When it is dropped, `cudarc` notes that what was
/// queued there until then may write it.
#[must_use]
pub struct CudarcWrite<'a, T> {
    _guard: SyncOnDrop<'a>,
    lent: Lent<T>,
}

/// Memory of another's, to be used on one stream. It stays on its thread, which may have a stream of its own:
/// what `cudarc` notes when the loan ends is of the thread where it ends.
struct Lent<T> {
    memory: Arc<Memory>,
    len: usize,
    element: PhantomData<(T, *const ())>,
}

impl CudarcStream {
    /// Calls on `cudarc`, a stream of the same device.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] when it is of another.
    pub fn new(device: &Device, cudarc: Arc<CudaStream>) -> Result<Self> {
        check_context("the stream", device, cudarc.context())?;
        let stream =
            Stream::foreign(device, cudarc.cu_stream().cast(), Owner::Kept(Arc::clone(&cudarc) as Arc<_>));
        Ok(CudarcStream { stream, cudarc })
    }

    /// The stream as this library has it.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Lends a slice to a call on this stream, which reads it: after what other streams have queued that
    /// writes it.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] when it is of another device.
    pub fn read<'a, T: Pod>(&'a self, slice: CudaView<'a, T>) -> Result<CudarcRead<'a, T>> {
        check_context("a slice", self.stream.device(), slice.stream().context())?;
        let len = slice.len();
        let (address, guard) = slice.view_ptr(&self.cudarc);
        Ok(CudarcRead { _guard: guard, lent: self.lent(address, len) })
    }

    /// Lends a slice to a call on this stream, which writes it: after what other streams have queued that
    /// uses it.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] when it is of another device.
    pub fn write<'a, T: Pod>(&'a self, slice: CudaViewMut<'a, T>) -> Result<CudarcWrite<'a, T>> {
        check_context("a slice", self.stream.device(), slice.stream().context())?;
        let len = slice.len();
        let (address, guard) = slice.view_ptr_mut(&self.cudarc);
        Ok(CudarcWrite { _guard: guard, lent: self.lent(address, len) })
    }

    fn lent<T>(&self, address: u64, len: usize) -> Lent<T> {
        Lent {
            memory: Arc::new(Memory::lent(self.stream.raw(), address, len * size_of::<T>())),
            len,
            element: PhantomData,
        }
    }
}

fn check_context(what: &'static str, device: &Device, context: &CudaContext) -> Result<()> {
    if device.is_context(context.cu_ctx().cast()) {
        return Ok(());
    }
    let (expected, got) = (device.name(), format!("cuda:{}", context.ordinal()));
    Err(Error::OtherDevice { what, expected, got })
}

impl<T: Pod> CudarcRead<'_, T> {
    /// All elements, for a call.
    pub fn view(&self) -> View<'_, Cuda, T> {
        // SAFETY: the slice is borrowed, and the memory is used on one stream alone, which has waited for
        // others.
        unsafe { View::of(self.lent.memory.address(), self.lent.len, &self.lent.memory) }
    }
}

impl<T: Pod> CudarcWrite<'_, T> {
    /// All elements, for a call.
    pub fn view(&self) -> View<'_, Cuda, T> {
        // SAFETY: as above.
        unsafe { View::of(self.lent.memory.address(), self.lent.len, &self.lent.memory) }
    }

    /// All elements, for a call to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, Cuda, T> {
        // SAFETY: as above, and the slice is borrowed alone.
        unsafe { ViewMut::of(self.lent.memory.address(), self.lent.len, &self.lent.memory) }
    }
}
