//! The machine: one module a hardware feature, and the only place that names an instruction.
//!
//! | module | unit | PTX | since |
//! |---|---|---|---|
//! | [`thread`] | who am I | `%tid`, `%ctaid`, `trap` | – |
//! | [`global`] | device memory | `ld.global`, `st.global`, `prefetch` | – |
//! | [`relaxed`] | words between running blocks | `ld.relaxed`, `st.relaxed`, `atom.relaxed` | – |
//! | [`shared`] | a block's memory | `ld.shared`, `st.shared`, `atom.shared`, `ldmatrix` | sm_75 |
//! | [`async_copy`] | global → shared without registers | `cp.async` | sm_80 |
//! | `bulk` | copies whose bytes are counted | `cp.async.bulk`, `st.async` | sm_90 |
//! | [`barrier`] | a block's threads meet | `bar.sync` | – |
//! | `mbarrier` | arrivals and bytes are counted | `mbarrier` | sm_90 |
//! | [`warp`] | a warp's threads meet and exchange | `shfl.sync`, `vote.sync`, `bar.warp.sync` | – |
//! | `cluster` | blocks that share their memories | `mapa`, `barrier.cluster` | sm_90 |
//! | [`mma`] | tensor cores, 16-bit floats | `mma.sync.m16n8k16`, `cvt` | sm_80 |
//! | `wgmma` | tensor cores of a warpgroup | `wgmma.mma_async` | sm_90a alone |
//! | [`grid`] | overlap of dependent launches | `griddepcontrol` | sm_90 |
//!
//! Each function has two forms side by side: the instruction, for `nvptx64`, and what the emulated machine
//! does instead (`crate::emulate`, feature `emulate`). Both are described by one doc comment.
//!
//! Section numbers in this folder are those of the PTX ISA manual, version 8.0.

pub mod async_copy;
pub mod barrier;
#[cfg(any(feature = "sm_90", feature = "emulate"))]
pub mod bulk;
#[cfg(any(feature = "sm_90", feature = "emulate"))]
pub mod cluster;
pub mod global;
pub mod grid;
#[cfg(any(feature = "sm_90", feature = "emulate"))]
pub mod mbarrier;
pub mod mma;
pub mod relaxed;
pub mod shared;
pub mod thread;
pub mod warp;
#[cfg(any(feature = "sm_90a", feature = "emulate"))]
pub mod wgmma;
