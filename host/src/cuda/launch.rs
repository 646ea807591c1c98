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
#[derive(Clone, Copy)]
struct Attribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`.
const CLUSTER_DIMENSION: u32 = 4;

/// `CU_LAUNCH_ATTRIBUTE_COOPERATIVE`: all blocks run at once, or the launch is refused.
const COOPERATIVE: u32 = 2;

impl Attribute {
    fn new(id: u32, words: [u32; 3]) -> Self {
        let mut value = [0; 16];
        value[..3].copy_from_slice(&words);
        Attribute { id, padding: 0, value }
    }
}

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
    fn cuOccupancyMaxActiveClusters(
        clusters: *mut i32,
        function: CUfunction,
        config: *const Config,
    ) -> CUresult;
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
    let mut attributes = [Attribute::new(0, [0; 3]); 3];
    let mut count = 0;
    for (wanted, id, words) in [
        (overlap, PROGRAMMATIC_STREAM_SERIALIZATION, [1, 0, 0]),
        // Also a cluster of one: its block stores to itself as to another.
        (launch.entry.cluster > 1, CLUSTER_DIMENSION, [launch.cluster, 1, 1]),
        (launch.cooperative, COOPERATIVE, [1, 0, 0]),
    ] {
        if wanted {
            attributes[count] = Attribute::new(id, words);
            count += 1;
        }
    }
    let config = Config {
        grid: [launch.blocks, 1, 1],
        block: [launch.entry.threads, 1, 1],
        shared_bytes: launch.shared_bytes,
        stream,
        attributes: attributes.as_ptr(),
        attribute_count: count as u32,
    };
    let mut parameter = ptr::from_ref(parameters).cast_mut().cast::<c_void>();
    // SAFETY: the driver copies the parameters before it returns; the rest is as the caller promises.
    status("cuLaunchKernelEx", unsafe {
        cuLaunchKernelEx(&config, function, &mut parameter, ptr::null_mut())
    })
}

/// Clusters of this launch that the device runs at a time.
pub(super) fn most_clusters(function: CUfunction, launch: &Launch) -> Result<u32> {
    let attribute = Attribute::new(CLUSTER_DIMENSION, [launch.cluster, 1, 1]);
    let config = Config {
        grid: [launch.blocks, 1, 1],
        block: [launch.entry.threads, 1, 1],
        shared_bytes: launch.shared_bytes,
        stream: ptr::null_mut(),
        attributes: &attribute,
        attribute_count: 1,
    };
    let mut clusters = 0;
    // SAFETY: writes one integer; the configuration and its attribute live through the call.
    status("cuOccupancyMaxActiveClusters", unsafe {
        cuOccupancyMaxActiveClusters(&mut clusters, function, &config)
    })?;
    Ok(clusters as u32)
}
