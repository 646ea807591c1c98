//! The fused MoE-LoRA operator: many LoRA adapters over one mixture-of-experts layer.
//!
//! A *pair* p is a (token, choice) of the router. Its token uses adapter l, its choice is expert e. The
//! operator adds the low-rank update of that adapter to every pair's row of the output:
//! `out[p] (+)= weight[p] · B[l, e] · (A[l, e] · x[row(p)])`.
//!
//! | to | see |
//! |---|---|
//! | run the operator | [`Operator`] and its calls |
//! | choose where it runs | [`Backend`]: `cuda::Stream`, [`cpu::Cpu`], or `emulated::Emulated` for tests |
//! | know shapes and types of tensors | [`ProjectionSizes`], [`Forward`] |
//! | find a layer's route once | [`Route`] |
//! | load PEFT adapters | [`adapter`] |
//! | exchange adapters between calls | [`AdapterTable`] |
//! | see what a call launches | [`plan`] |
//! | know what is right | [`reference`](mod@reference), the formula in float64 |
//!
//! Data goes one way through this crate: a call's tensors are checked, planned for, and launched by the back
//! end. A call that returns an error has launched and written nothing.

pub mod adapter;
pub mod backend;
pub mod blocks;
pub mod call;
mod check;
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
mod out_dims;
pub mod plan;
pub mod projection;
pub mod reference;
pub mod route;
mod routing;
pub mod table;
pub mod tensor;
pub mod tensor_file;
pub mod tuning;
mod weights;
#[doc(hidden)]
pub mod whole_file;

pub use backend::{Backend, Buffer};
pub use blocks::{Align, BlockShape, SortedTensors};
pub use call::{
    Enabled, Expand, Factor, Forward, Layout, Routing, RoutingTensors, Shrink, SliceOrder, TopkIds, Weights,
};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use operator::{Call, Operator, OperatorBuilder};
pub use projection::{ExpertWeights, OutDims, Projection, ProjectionSizes, XRows};
pub use route::Route;
pub use table::{AdapterEntry, AdapterSlice, AdapterTable, Adapters};
pub use tensor::{Cuda, Host, Rows, RowsMut, Space, View, ViewMut};
