//! The driver's streams and events: what waits for what.

use crate::cuda::context::Relaxed;
use crate::cuda::device::Device;
use crate::cuda::driver::{Api, Handle, api, capture_status};
use crate::error::Result;
use std::ptr;
use std::sync::Arc;
use std::thread::{self, ThreadId};

/// A stream of the driver's, as one thread has it.
pub(super) struct RawStream {
    device: Device,
    handle: Handle,
    /// Where it is [`PER_THREAD`]: whose.
    thread: Option<ThreadId>,
    owner: Owner,
}

/// `CU_STREAM_PER_THREAD`: a stream of its own on each thread.
const PER_THREAD: usize = 2;

/// Whose a stream is.
#[derive(Clone)]
pub(super) enum Owner {
    /// This library's, which destroys it.
    This,
    /// Another's, which is kept alive.
    #[cfg(feature = "cudarc-unversioned")]
    Kept(#[allow(dead_code, reason = "held, and let go of")] Arc<dyn std::any::Any + Send + Sync>),
    /// The caller's, who has promised to keep it for as long as it is used.
    Caller,
}

// SAFETY: a stream may be used from any thread on which its context is current; `Device::bind` sees to that.
unsafe impl Send for RawStream {}
// SAFETY: as above; the driver locks what it must.
unsafe impl Sync for RawStream {}

impl RawStream {
    /// A new one, which waits for no other. The device's context must be current.
    pub fn create(device: &Device) -> Result<Self> {
        /// `CU_STREAM_NON_BLOCKING`.
        const NON_BLOCKING: u32 = 1;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { api()?.cuStreamCreate(&mut handle, NON_BLOCKING)? };
        Ok(Self::of(device, handle, Owner::This))
    }

    /// One that is there already, as this thread has it.
    pub fn of(device: &Device, handle: Handle, owner: Owner) -> Self {
        let thread = (handle as usize == PER_THREAD).then(|| thread::current().id());
        RawStream { device: device.clone(), handle, thread, owner }
    }

    /// The same handle as this thread has it.
    pub fn here(self: &Arc<Self>) -> Arc<Self> {
        match self.is_elsewhere() {
            false => Arc::clone(self),
            true => Arc::new(Self::of(&self.device, self.handle, self.owner.clone())),
        }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn handle(&self) -> Handle {
        self.handle
    }

    /// Whether both are one stream.
    pub fn is(&self, other: &RawStream) -> bool {
        self.handle == other.handle && self.thread == other.thread && self.device == other.device
    }

    /// Its name in messages.
    #[cfg(feature = "cudarc-unversioned")]
    pub fn name(&self) -> String {
        let of = self.thread.map(|thread| format!(" of {thread:?}")).unwrap_or_default();
        format!("the stream {:?}{of}", self.handle)
    }

    /// Whether its handle is another stream's on this thread.
    pub fn is_elsewhere(&self) -> bool {
        self.thread.is_some_and(|thread| thread != thread::current().id())
    }

    /// Whether the stream is there for as long as this is.
    pub fn is_kept(&self) -> bool {
        !matches!(self.owner, Owner::Caller)
    }

    /// What is queued next runs after all that is queued on `other`.
    pub fn wait_for(&self, other: &RawStream) -> Result<()> {
        let api = api()?;
        if other.is_elsewhere() {
            return other.wait_unless_captured(api);
        }
        if other.is_captured(api)? {
            // What is captured there does not run, and what ran before is over: a recording begins with that.
            return Ok(());
        }
        if self.is_captured(api)? {
            // A capture cannot wait for what is outside it.
            return other.wait_unless_captured(api);
        }
        let event = Event::new(api, Event::NO_TIMING)?;
        event.record(other)?;
        // SAFETY: both are live. The driver keeps the event until it has been waited for.
        unsafe { api.cuStreamWaitEvent(self.handle, event.handle, 0) }
    }

    /// Waits on this thread for all that is queued, unless the stream is captured and must not be waited for.
    pub fn wait_unless_captured(&self, api: &Api) -> Result<()> {
        if self.is_elsewhere() {
            let _relaxed = Relaxed::begin(api)?;
            // The stream has no handle here. The driver refuses while a stream of the device is captured.
            // SAFETY: the device's context is current, as in all calls here.
            return unsafe { api.cuCtxSynchronize() };
        }
        if self.is_captured(api)? {
            return Ok(());
        }
        self.synchronize(api)
    }

    /// Waits on this thread for all that is queued.
    pub fn synchronize(&self, api: &Api) -> Result<()> {
        // This thread may have a capture of its own under way.
        let _relaxed = Relaxed::begin(api)?;
        // SAFETY: the stream is live.
        unsafe { api.cuStreamSynchronize(self.handle) }
    }

    /// Whether anybody captures the stream.
    fn is_captured(&self, api: &Api) -> Result<bool> {
        let mut status = capture_status::NONE;
        // SAFETY: the stream is live; writes one value.
        unsafe { api.cuStreamIsCapturing(self.handle, &mut status)? };
        Ok(status != capture_status::NONE)
    }
}

impl Drop for RawStream {
    fn drop(&mut self) {
        if !matches!(self.owner, Owner::This) {
            return;
        }
        if let (Ok(api), Ok(_bound)) = (api(), self.device.bind()) {
            let _relaxed = Relaxed::begin(api);
            // SAFETY: created by `create`, and dropped once. A failure here has nobody to go to.
            let _ = unsafe { api.cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// An event of the current context.
pub(super) struct Event<'a> {
    api: &'a Api,
    pub handle: Handle,
}

impl<'a> Event<'a> {
    /// `CU_EVENT_DISABLE_TIMING`.
    pub const NO_TIMING: u32 = 2;
    /// `CU_EVENT_DEFAULT`.
    pub const TIMED: u32 = 0;

    pub fn new(api: &'a Api, flags: u32) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { api.cuEventCreate(&mut handle, flags)? };
        Ok(Event { api, handle })
    }

    pub fn record(&self, stream: &RawStream) -> Result<()> {
        // SAFETY: both are live.
        unsafe { self.api.cuEventRecord(self.handle, stream.handle) }
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        // SAFETY: created by `new`, and dropped once. A failure here has nobody to go to.
        let _ = unsafe { self.api.cuEventDestroy_v2(self.handle) };
    }
}
