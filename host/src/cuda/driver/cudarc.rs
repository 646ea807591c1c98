//! What this crate owns of the driver's, by `cudarc`.

use super::api::{Handle, api};
use crate::error::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUcontext, CUdevice};

/// The primary context of a device, which CUDA's runtime uses too. Let go of when dropped.
pub struct PrimaryContext {
    device: CUdevice,
    context: CUcontext,
}

// SAFETY: a context may be used from any thread.
unsafe impl Send for PrimaryContext {}
// SAFETY: as above.
unsafe impl Sync for PrimaryContext {}

impl PrimaryContext {
    /// Retains it. The thread's current context stays what it was.
    pub fn retain(ordinal: u32) -> Result<Self> {
        // cudarc panics where it finds no driver; this tells.
        api()?;
        result::init().map_err(failed("cuInit"))?;
        let device = result::device::get(ordinal as i32).map_err(failed("cuDeviceGet"))?;
        // SAFETY: the device is there.
        let context = unsafe { result::primary_ctx::retain(device) };
        Ok(PrimaryContext { device, context: context.map_err(failed("cuDevicePrimaryCtxRetain"))? })
    }

    pub fn handle(&self) -> Handle {
        self.context.cast()
    }
}

impl Drop for PrimaryContext {
    fn drop(&mut self) {
        // SAFETY: retained once, by `retain`. A failure here has nobody to go to.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Memory of a device. Freed when dropped, with the device's context current.
pub struct Allocation(u64);

impl Allocation {
    /// Bytes in the current context, unwritten.
    pub fn new(bytes: usize) -> Result<Self> {
        api()?;
        // SAFETY: what is unwritten is bytes, and nothing here reads them.
        Ok(Allocation(unsafe { result::malloc_sync(bytes) }.map_err(failed("cuMemAlloc"))?))
    }

    pub fn address(&self) -> u64 {
        self.0
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and freed once. A failure here has nobody to go to.
        let _ = unsafe { result::free_sync(self.0) };
    }
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| match api() {
        Ok(api) => api.error(call, error.0 as u32),
        Err(error) => error,
    }
}
