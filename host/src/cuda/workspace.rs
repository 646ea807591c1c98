//! Scratch memory of calls: made once, so that a call allocates nothing.

use crate::call::Route;
use crate::cuda::{failed, status};
use crate::error::Result;
use crate::launch::Scratch;
use crate::plan::RouteSource;
use crate::projection::Projection;
use crate::tensor::Space;
use cust::memory::DeviceBuffer;
use cust::stream::{Stream, StreamFlags};
use cust::sys;

/// Scratch memory on the device. One call at a time may use it, on one stream.
pub struct Workspace {
    memory: DeviceBuffer<u8>,
    scratch: Scratch,
}

impl Workspace {
    pub(super) fn new(projections: &[Projection], max_tokens: usize) -> Result<Self> {
        Self::with(Scratch::new(projections, max_tokens)?)
    }

    fn with(scratch: Scratch) -> Result<Self> {
        // SAFETY: every part is written by the kernel that comes before its reader, or zeroed below.
        let memory = unsafe { DeviceBuffer::uninitialized(scratch.bytes()) }.map_err(failed("cuMemAlloc"))?;
        // On a stream of its own: the default one may not be used while another is captured.
        let stream = Stream::new(StreamFlags::NON_BLOCKING, None).map_err(failed("cuStreamCreate"))?;
        // SAFETY: the memory is long enough, and nobody else uses it yet.
        status("cuMemsetD8Async", unsafe {
            let start = memory.as_device_ptr().as_raw();
            sys::cuMemsetD8Async(start, 0, scratch.zero_bytes(), stream.as_inner())
        })?;
        stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
        Ok(Workspace { memory, scratch })
    }

    /// Another workspace, on the device whose context is current, with room for whatever this one has room for
    /// and for calls of up to `max_tokens` tokens on `projection`. It keeps no route.
    ///
    /// # Errors
    /// As for [`Backend::workspace`](crate::Backend::workspace).
    pub fn grown(&self, projection: &Projection, max_tokens: usize) -> Result<Self> {
        Self::with(self.scratch.grown(projection, max_tokens)?)
    }

    /// Checks that a call of `tokens` tokens on `projection` fits.
    ///
    /// # Errors
    /// [`crate::Error::WorkspaceTooSmall`] when it does not, [`crate::Error::SizeTooLarge`] when it fits none.
    pub fn check_room(&self, projection: &Projection, tokens: usize) -> Result<()> {
        self.scratch.check_room(projection, tokens)
    }

    /// Bytes of device memory that this workspace takes.
    pub fn bytes(&self) -> usize {
        self.scratch.bytes()
    }

    /// Where a call's route comes from: itself, or what this workspace keeps.
    ///
    /// # Errors
    /// [`crate::Error::RouteNotKept`] when it keeps none that fits the call.
    pub fn route_source<S: Space>(
        &self,
        projection: &Projection,
        tokens: usize,
        route: &Route<'_, S>,
    ) -> Result<RouteSource> {
        self.scratch.route_source(projection, tokens, route)
    }

    /// The parts, and the address of the memory that they are in.
    pub(super) fn scratch(&mut self) -> (&mut Scratch, u64) {
        (&mut self.scratch, self.memory.as_device_ptr().as_raw())
    }
}
