//! One launch, with its attributes.

use crate::cuda::driver::{Handle, LaunchAttribute, LaunchConfig, api};
use crate::error::Result;
use crate::plan::Launch;
use bytemuck::Pod;
use std::ffi::c_void;
use std::ptr;

/// Queues one launch. `overlap`: it may start before the launch before it has ended (programmatic
/// dependent launch); the kernel waits where it must.
///
/// # Safety
/// `function` must be the launch's entry in a live module, `parameters` the block that it takes, with every
/// address in it valid until the launch has ended.
pub(super) unsafe fn launch<P: Pod>(
    stream: Handle,
    function: Handle,
    launch: &Launch,
    parameters: &P,
    overlap: bool,
) -> Result<()> {
    let mut attributes = [LaunchAttribute::new(0, [0; 3]); 3];
    let mut count = 0;
    for (wanted, id, words) in [
        (overlap, LaunchAttribute::PROGRAMMATIC_STREAM_SERIALIZATION, [1, 0, 0]),
        // Also a cluster of one: its block stores to itself as to another.
        (launch.entry.cluster > 1, LaunchAttribute::CLUSTER_DIMENSION, [launch.cluster, 1, 1]),
        (launch.cooperative, LaunchAttribute::COOPERATIVE, [1, 0, 0]),
    ] {
        if wanted {
            attributes[count] = LaunchAttribute::new(id, words);
            count += 1;
        }
    }
    let config = LaunchConfig {
        grid: [launch.blocks, 1, 1],
        block: [launch.entry.threads, 1, 1],
        shared_bytes: launch.shared_bytes,
        stream,
        attributes: attributes.as_ptr(),
        attribute_count: count as u32,
    };
    let mut parameter = ptr::from_ref(parameters).cast_mut().cast::<c_void>();
    // SAFETY: the driver copies the parameters before it returns; the rest is as the caller promises.
    unsafe { api()?.cuLaunchKernelEx(&config, function, &mut parameter, ptr::null_mut()) }
}
