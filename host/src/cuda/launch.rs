//! `cuLaunchKernelEx`, which cust 0.3.2 (CUDA 11.4) does not know: a launch with attributes.

use crate::cuda::status;
use crate::error::Result;
use crate::plan::Launch;
use bytemuck::Pod;
use cust::sys::{CUfunction, CUresult, CUstream};
use std::ffi::c_void;
use std::ptr;

/// `CUlaunchAttribute`: an id and 64 bytes of value.
#[repr(C, align(8))]
struct Attribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

/// `CUlaunchConfig`.
#[repr(C)]
struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: CUstream,
    attributes: *const Attribute,
    attribute_count: u32,
}

unsafe extern "C" {
    fn cuLaunchKernelEx(
        config: *const Config,
        function: CUfunction,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> CUresult;
}

/// Queues one launch. `overlap`: it may start before the launch before it has ended (programmatic
/// dependent launch); the kernel waits where it must.
///
/// # Safety
/// `function` must be the launch's entry in a live module, `parameters` the block that it takes, with every
/// address in it valid until the launch has ended.
pub(super) unsafe fn launch<P: Pod>(
    stream: CUstream,
    function: CUfunction,
    launch: &Launch,
    parameters: &P,
    overlap: bool,
) -> Result<()> {
    let attribute = Attribute {
        id: PROGRAMMATIC_STREAM_SERIALIZATION,
        padding: 0,
        value: [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    };
    let config = Config {
        grid: [launch.blocks, 1, 1],
        block: [launch.entry.threads, 1, 1],
        shared_bytes: launch.shared_bytes,
        stream,
        attributes: &attribute,
        attribute_count: u32::from(overlap),
    };
    let mut parameter = ptr::from_ref(parameters).cast_mut().cast::<c_void>();
    // SAFETY: the driver copies the parameters before it returns; the rest is as the caller promises.
    status("cuLaunchKernelEx", unsafe {
        cuLaunchKernelEx(&config, function, &mut parameter, ptr::null_mut())
    })
}
