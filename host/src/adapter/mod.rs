//! PEFT adapters: from folders on disk to the stacked weights of a layer.
//!
//! A folder holds `adapter_config.json` and `adapter_model.safetensors`. The weights wanted are those of
//! the experts, one small matrix each, as PEFT names them:
//!
//! ```text
//! base_model.model.model.layers.3.mlp.experts.17.gate_proj.lora_A.weight    [r, K]
//! base_model.model.model.layers.3.mlp.experts.17.gate_proj.lora_B.weight    [N, r]
//! ```
//!
//! Weights of anything else (attention, router, shared experts) belong to other operators and are skipped. A
//! setting that would change the result and is not supported is refused: see [`AdapterError`].
//!
//! ```no_run
//! # use half::bf16;
//! use moe_lora::adapter::{Adapter, LayerProjection, Stack};
//!
//! let adapters = [Adapter::open("sql")?, Adapter::open("legal")?]; // slots 0 and 1
//! let w13: Stack<bf16> = Stack::load(&adapters, 3, LayerProjection::W13, 8, Some(128))?;
//! let w2: Stack<bf16> = Stack::load(&adapters, 3, LayerProjection::W2, 8, Some(128))?;
//! # Ok::<(), moe_lora::adapter::AdapterError>(())
//! ```

mod config;
mod error;
mod folder;
mod name;
mod stack;
mod target;
#[cfg(test)]
mod tests;

pub use error::AdapterError;
pub use folder::Adapter;
pub use stack::{Layer, Stack, Uploaded};
pub use target::LayerProjection;
