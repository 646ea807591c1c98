//! What the driver says of a device.

use crate::cuda::driver::{Api, attribute};
use crate::error::{Error, Result};
use crate::plan::DeviceLimits;
use std::ffi::CStr;
use std::fmt;

/// What the driver says of a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its number, from 0.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of L2 cache.
    pub l2_bytes: usize,
    /// Bytes of memory.
    pub memory_bytes: usize,
    /// Bytes a microsecond that its memory's clock and width allow.
    pub memory_rate: u32,
    /// Most shared memory that a block may be given, in bytes.
    pub shared_bytes: u32,
    /// Newest CUDA version that the driver knows: major, minor.
    pub driver: (u32, u32),
}

impl DeviceInfo {
    pub(super) fn of(api: &Api, ordinal: u32) -> Result<Self> {
        let (mut device, mut version, mut memory_bytes, mut name) = (0, 0, 0, [0u8; 256]);
        // SAFETY: each writes one value, or a text of as many bytes as is said, its zero among them.
        unsafe {
            api.cuDeviceGet(&mut device, ordinal as i32).map_err(|error| no_device(ordinal, error))?;
            api.cuDriverGetVersion(&mut version)?;
            api.cuDeviceTotalMem_v2(&mut memory_bytes, device)?;
            api.cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device)?;
        }
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: writes one integer.
            unsafe { api.cuDeviceGetAttribute(&mut value, attribute, device)? };
            Ok::<_, Error>(value as u32)
        };
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        Ok(DeviceInfo {
            ordinal,
            name: name.to_string_lossy().into_owned(),
            capability: (attribute(attribute::CAPABILITY_MAJOR)?, attribute(attribute::CAPABILITY_MINOR)?),
            multiprocessors: attribute(attribute::MULTIPROCESSORS)?,
            l2_bytes: attribute(attribute::L2_BYTES)? as usize,
            memory_rate: memory_rate(
                attribute(attribute::MEMORY_CLOCK_KHZ)?,
                attribute(attribute::MEMORY_BITS)?,
            ),
            memory_bytes,
            shared_bytes: attribute(attribute::MOST_SHARED_BYTES)?,
            driver: (version as u32 / 1000, version as u32 % 1000 / 10),
        })
    }
}

/// The driver has started, and has no device of this number.
fn no_device(ordinal: u32, error: Error) -> Error {
    match error {
        Error::Driver { code, name, reason, .. } => {
            Error::NoDevice { reason: format!("device {ordinal}: {name} ({code}): {reason}") }
        }
        other => other,
    }
}

/// Bytes a microsecond of a memory with this clock, in kHz, and so many bits, which come twice a cycle. Where
/// the driver keeps either to itself, as it may in a virtual machine, an H100's.
fn memory_rate(clock: u32, bits: u32) -> u32 {
    let rate = u64::from(clock) * u64::from(bits) / 8 * 2 / 1000;
    u32::try_from(rate).ok().filter(|rate| *rate > 0).unwrap_or(DeviceLimits::H100.memory_rate)
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        write!(
            f,
            "{}, compute capability {major}.{minor}, {} multiprocessors, {} GiB, driver for CUDA {}.{}",
            self.name,
            self.multiprocessors,
            self.memory_bytes >> 30,
            self.driver.0,
            self.driver.1
        )
    }
}
