//! Checks that a back end keeps the operator's contract. `moe-lora verify` and the test suites share it.
//!
//! A [`Case`] describes one call by its sizes, modes and a seed. [`check`] makes its tensors ([`CaseData`]),
//! runs it on a back end, and compares the result with the float64 [`reference`](mod@moe_lora::reference). It
//! also compares everything that a call must leave alone. A case that fails prints the command that repeats
//! it.

mod blocks;
mod case;
mod check;
mod data;
mod draw;
mod fault;
mod grid;
mod own;
mod placed;
mod tensor;

pub use case::{Case, Experts, Flags, Form, IdsKind, Indexed, Loras, Ranks};
pub use check::{Runs, check, check_each, check_runs};
pub use data::{CaseData, Operands};
pub use fault::{Failure, Fault, Outcome};
pub use grid::{full_grid, new_forms, quick_grid, short_grid, vllm_grid};
pub use tensor::Tensor;
