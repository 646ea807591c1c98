//! What `moe-lora run` does, as a library: one call of the operator on tensors in files.

pub mod files;
