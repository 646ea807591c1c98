//! What the program `moe-lora` does beside talking: one call of the operator on tensors that lie in files.

pub mod files;
