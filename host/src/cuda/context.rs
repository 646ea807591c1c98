//! The context that is current on a thread, and what a thread may do while a graph is recorded.

use crate::cuda::driver::{Api, CaptureMode, PrimaryContext, api};
use crate::error::Result;
use std::marker::PhantomData;
use std::ptr;

/// A context that is current on this thread until this is dropped; then the one before it is again.
pub(super) struct Bound {
    pushed: bool,
    /// Of this thread.
    _thread: PhantomData<*const ()>,
}

impl Bound {
    pub fn to(context: &PrimaryContext) -> Result<Self> {
        let api = api()?;
        let mut current = ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { api.cuCtxGetCurrent(&mut current)? };
        let pushed = current != context.handle();
        if pushed {
            // SAFETY: the context is retained.
            unsafe { api.cuCtxPushCurrent_v2(context.handle())? };
        }
        Ok(Bound { pushed, _thread: PhantomData })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let (true, Ok(api)) = (self.pushed, api()) {
            let mut popped = ptr::null_mut();
            // SAFETY: writes one handle. A failure has nobody to go to.
            let _ = unsafe { api.cuCtxPopCurrent_v2(&mut popped) };
        }
    }
}

/// A stretch in which this thread may allocate, free and load modules, whatever is being captured meanwhile,
/// by this library or another. What is done so is no part of a graph.
pub(super) struct Relaxed<'a>(&'a Api, u32);

impl<'a> Relaxed<'a> {
    pub fn begin(api: &'a Api) -> Result<Self> {
        let mut mode = CaptureMode::Relaxed as u32;
        // SAFETY: reads and writes one value.
        unsafe { api.cuThreadExchangeStreamCaptureMode(&mut mode)? };
        Ok(Relaxed(api, mode))
    }
}

impl Drop for Relaxed<'_> {
    fn drop(&mut self) {
        // SAFETY: as above. A failure has nobody to go to.
        let _ = unsafe { self.0.cuThreadExchangeStreamCaptureMode(&mut self.1) };
    }
}
