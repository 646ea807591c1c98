//! The GPU back end.
//!
//! | here | what it is | in CUDA's words |
//! |---|---|---|
//! | [`Device`] | a device with the kernels loaded | primary context, module |
//! | [`Stream`] | what calls run on; a [`crate::Backend`] | stream |
//! | [`Buffer`] | memory that is freed when dropped | `cuMemAlloc` |
//! | [`Workspace`] | scratch memory of calls | `cuMemAlloc` |
//! | [`Graph`] | calls recorded once, replayed often | stream capture, graph |
//!
//! All of them own what they need, and can be dropped in any order: a device lives until the last thing made
//! of it is gone. All can be sent to other threads. Each call makes the device's context current while it
//! lasts, and leaves the thread's own as it was.
//!
//! The driver is bound when it is first used. So a program with this back end starts on a machine without a
//! GPU, and gets [`crate::Error::NoDevice`] there.

mod buffer;
mod context;
#[cfg(feature = "cudarc-unversioned")]
mod cudarc;
mod device;
mod driver;
mod graph;
mod info;
mod launch;
mod memory;
mod raw_stream;
mod recording;
mod route_contents;
mod stream;
mod tensors;
mod workspace;

pub use crate::plan::{DecodeRows, Form, IndexWidth, Options, PrefillTile, TileKind};
pub use buffer::Buffer;
#[cfg(feature = "cudarc-unversioned")]
pub use cudarc::{CudarcRead, CudarcStream, CudarcWrite};
pub use device::{Device, LoadedFrom, device_of};
pub use graph::Graph;
pub use info::DeviceInfo;
#[doc(hidden)]
pub use memory::Memory;
pub use moe_lora_prebuilt::{Cubin, KERNELS as EMBEDDED, Kernels as Embedded, Packed};
pub use route_contents::{RouteContents, RouteTile};
pub use stream::Stream;
pub use workspace::Workspace;
