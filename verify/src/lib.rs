//! Whether a back end keeps the operator's contract: what `moe-lora verify` and the test suites share.
//!
//! A [`Case`] describes one call in a few words and a seed. [`check`] generates its tensors
//! ([`CaseData`]), runs it on a back end, and holds the result against the float64
//! [`reference`](mod@moe_lora::reference) and against everything that a call must leave alone. A case that fails
//! prints the command that runs it again.

mod blocks;
mod case;
mod check;
mod data;
mod grid;

pub use case::{Case, Experts, Flags, Form, Loras, Ranks};
pub use check::{Failure, Fault, Outcome, check, check_each};
pub use data::{CaseData, Operands, Tensor};
pub use grid::{full_grid, quick_grid, vllm_grid};
