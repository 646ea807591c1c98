//! What this crate owns of the driver's, by rust-cuda's `cust`.

use super::api::{Handle, api};
use crate::error::{Error, Result};
use cust::context::Context;
use cust::device::Device;
use cust::error::CudaError;
use cust::memory::DeviceBuffer;

/// The primary context of a device, which CUDA's runtime uses too. Let go of when dropped.
pub struct PrimaryContext(Context);

impl PrimaryContext {
    /// Retains it. The thread's current context stays what it was.
    pub fn retain(ordinal: u32) -> Result<Self> {
        let api = api()?;
        let device = Device::get_device(ordinal).map_err(failed("cuDeviceGet"))?;
        let mut callers = std::ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { api.cuCtxGetCurrent(&mut callers)? };
        // cust makes the context current.
        let context = Context::new(device).map_err(failed("cuDevicePrimaryCtxRetain"));
        // SAFETY: null stands for none; otherwise it was current just now.
        unsafe { api.cuCtxSetCurrent(callers)? };
        Ok(PrimaryContext(context?))
    }

    pub fn handle(&self) -> Handle {
        self.0.as_raw().cast()
    }
}

/// Memory of a device. Freed when dropped, with the device's context current.
pub struct Allocation(DeviceBuffer<u8>);

impl Allocation {
    /// Bytes in the current context, unwritten.
    pub fn new(bytes: usize) -> Result<Self> {
        // SAFETY: what is unwritten is bytes, and nothing here reads them.
        let memory = unsafe { DeviceBuffer::uninitialized(bytes) }.map_err(failed("cuMemAlloc"))?;
        Ok(Allocation(memory))
    }

    pub fn address(&self) -> u64 {
        self.0.as_device_ptr().as_raw()
    }
}

/// cust keeps the codes that it knows, and has one for all others.
fn failed(call: &'static str) -> impl Fn(CudaError) -> Error {
    move |error| match api() {
        Ok(api) => api.error(call, error as u32),
        Err(error) => error,
    }
}
