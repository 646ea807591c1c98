//! The GPU back end, on `cust`.
//!
//! | here | what it is | in CUDA's words |
//! |---|---|---|
//! | [`Gpu`] | a device with the kernels loaded | primary context, module |
//! | [`Queue`] | a stream that calls run on; a [`crate::Backend`] | stream |
//! | [`DeviceBuffer`] | memory that is freed when dropped | `cuMemAlloc` |
//! | [`Workspace`] | scratch memory of calls | `cuMemAlloc` |
//! | [`Graph`] | calls recorded once, replayed often | stream capture, graph |
//! | [`AllowAllocation`] | a stretch in which a stream may be captured and memory allocated | relaxed capture mode |
//!
//! The driver is bound when it is first used, so a program with this back end starts on a machine without
//! a GPU and is told [`crate::Error::NoDevice`].

mod bind;
mod gpu;
mod graph;
mod launch;
mod queue;
mod workspace;

pub use crate::plan::{DecodeRows, Form, IndexWidth, Options, PrefillTile, TileKind};
pub use gpu::{CallersContext, DeviceInfo, Gpu, LoadedFrom, device_of};
pub use graph::{AllowAllocation, Graph};
pub use moe_lora_prebuilt::{Cubin, KERNELS as EMBEDDED, Kernels as Embedded, Packed};
pub use queue::{DeviceBuffer, KeptRoute, Queue};
pub use workspace::Workspace;

use crate::error::{Error, Result};
use cust::error::CudaError;
use cust::sys::CUresult;

/// Names the call of cust that failed.
fn failed(call: &'static str) -> impl Fn(CudaError) -> Error {
    move |error| Error::Driver { call, reason: format!("{error:?}") }
}

/// The status of a driver function that cust has no safe form of.
fn status(call: &'static str, status: CUresult) -> Result<()> {
    match status {
        CUresult::CUDA_SUCCESS => Ok(()),
        status => Err(Error::Driver { call, reason: format!("{status:?}") }),
    }
}
