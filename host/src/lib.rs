//! The fused MoE-LoRA operator.
//!
//! For every (token, expert) pair of a mixture-of-experts layer, the low-rank update of the adapter
//! that the token uses: `out[p] (+)= weight[p] · B[l, e] · (A[l, e] · x[row(p)])`.
//!
//! Data walks through this crate in one direction: the tensors of a call ([`call`]) are checked,
//! planned for ([`plan`]), and launched by a [`Backend`]: [`cpu::Cpu`] everywhere, `cuda::Stream` where
//! a GPU is, `emulated::Emulated` for the GPU's kernels with every access checked. [`reference`](mod@reference) is the plain float64 form that all are tested against.

pub mod adapter;
pub mod backend;
pub mod blocks;
pub mod call;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod dtype;
#[cfg(feature = "emulate")]
pub mod emulated;
pub mod error;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod launch;
#[cfg(all(doctest, feature = "cuda"))]
mod misuse;
pub mod operator;
pub mod plan;
pub mod projection;
pub mod reference;
pub mod route;
pub mod tensor;
pub mod tensor_file;
pub mod tuning;
#[doc(hidden)]
pub mod whole_file;

pub use backend::{Backend, Buffer};
pub use blocks::{Align, BlockShape, SortedTensors};
pub use call::{Enabled, Expand, Forward, Layout, Routing, RoutingTensors, Shrink};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use operator::{Call, Operator, OperatorBuilder};
pub use projection::{ExpertWeights, Projection, ProjectionSizes, XRows};
pub use route::Route;
pub use tensor::{Cuda, Host, Rows, RowsMut, Space, View, ViewMut};
