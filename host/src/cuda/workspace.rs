//! Scratch memory of calls: made once, so that a call allocates nothing.

use crate::cuda::context::Relaxed;
use crate::cuda::device::Device;
use crate::cuda::driver::api;
use crate::cuda::memory::Memory;
use crate::cuda::raw_stream::RawStream;
use crate::error::Result;
use crate::launch::Place;
use crate::plan::{Parts, Scratch};
use crate::projection::Projection;
use crate::route::HeldRoute;
use std::fmt;
use std::sync::Arc;

/// Scratch memory on a device. One call at a time may use it. A call on another stream than the last one's
/// waits for that one.
pub struct Workspace {
    memory: Arc<Memory>,
    scratch: Scratch,
    held: Arc<HeldRoute>,
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Workspace({} bytes on {:?})", self.bytes(), self.memory.device())
    }
}

impl Workspace {
    pub(super) fn new(device: &Device, projections: &[Projection], max_tokens: usize) -> Result<Self> {
        Self::with(device, Scratch::new(projections, max_tokens)?)
    }

    fn with(device: &Device, scratch: Scratch) -> Result<Self> {
        let memory = Memory::new(device, scratch.bytes())?;
        {
            let (api, _bound) = (api()?, device.bind()?);
            // On a stream of its own: that of the first call may be captured.
            let stream = RawStream::create(device)?;
            let _relaxed = Relaxed::begin(api)?;
            // SAFETY: the memory is long enough, and nobody else uses it yet. Every other part is written by
            // the kernel that comes before its reader.
            unsafe { api.cuMemsetD8Async(memory.address(), 0, scratch.zero_bytes(), stream.handle())? };
            stream.synchronize(api)?;
        }
        Ok(Workspace { memory: Arc::new(memory), scratch, held: Arc::default() })
    }

    /// Another workspace on the same device, with room for whatever this one has room for and for calls of up
    /// to `max_tokens` tokens on `projection`. It holds no route.
    ///
    /// # Errors
    /// As for [`Backend::workspace`](crate::Backend::workspace).
    pub fn grown(&self, projection: &Projection, max_tokens: usize) -> Result<Self> {
        Self::with(self.memory.device(), self.scratch.grown(projection, max_tokens)?)
    }

    /// Checks that a call of `tokens` tokens on `projection` fits.
    ///
    /// # Errors
    /// [`crate::Error::WorkspaceTooSmall`] when it does not, [`crate::Error::SizeTooLarge`] when it fits
    /// none.
    pub fn check_room(&self, projection: &Projection, tokens: usize) -> Result<()> {
        self.scratch.check_room(projection, tokens)
    }

    /// Bytes of device memory that this workspace takes.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    /// The device that it is on.
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    pub(super) fn held(&self) -> &Arc<HeldRoute> {
        &self.held
    }

    /// Where a call runs that is part of `recording`, or of none.
    pub(super) fn place(&self, recording: u64) -> Place<'_> {
        let Workspace { memory, scratch, held } = self;
        Place { scratch, base: memory.address(), held, recording }
    }

    pub(super) fn parts(&self) -> Parts {
        self.scratch.parts(self.memory.address())
    }

    /// Refuses more pairs than there is room for.
    pub(super) fn check_pairs(&self, pairs: usize) -> Result<()> {
        self.scratch.check_pairs(pairs)
    }

    /// Refuses more tiles than there is room for.
    pub(super) fn check_tiles(&self, tiles: usize) -> Result<()> {
        self.scratch.check_tiles(tiles)
    }
}
