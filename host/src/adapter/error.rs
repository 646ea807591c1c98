//! Why an adapter was refused.

use super::name;
use super::target::LayerProjection;
use crate::dtype::DType;
use crate::error::Error;
use crate::tensor_file::FileError;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why an adapter was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The weights' file, or a tensor in it.
    #[error(transparent)]
    File(#[from] FileError),
    /// The weights are pickled Python objects, which can run code when they are loaded.
    #[error("{} is a pickle, which is not read: save the adapter again as safetensors", path.display())]
    Pickled {
        /// `adapter_model.bin`.
        path: PathBuf,
    },
    /// The configuration is not JSON, or lacks a field.
    #[error("{} is not a LoRA configuration: {reason}", path.display())]
    Json {
        /// `adapter_config.json`.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The configuration asks for something that the operator does not compute.
    #[error("{}: {field} is {got}, expected {expected}", path.display())]
    Config {
        /// `adapter_config.json`.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What would do.
        expected: &'static str,
        /// Its value.
        got: String,
    },
    /// A weight belongs to the experts, but is not a LoRA matrix of one expert's projection.
    #[error("{}: {tensor} is not understood, expected {}", path.display(), name::EXPECTED)]
    UnknownTensor {
        /// The weights' file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// Two weights are for the same matrix.
    #[error("{}: {first} and {second} are the same matrix of the same expert", path.display())]
    Duplicate {
        /// The weights' file.
        path: PathBuf,
        /// A tensor.
        first: String,
        /// The other.
        second: String,
    },
    /// A matrix lacks the other half of its product.
    #[error("{}: {tensor} has no counterpart, expected both lora_A and lora_B", path.display())]
    Unpaired {
        /// The weights' file.
        path: PathBuf,
        /// The tensor that is there.
        tensor: String,
    },
    /// A weight is for an expert that the layer does not have.
    #[error("{}: {tensor} is for expert {expert}, expected fewer than {experts} experts", path.display())]
    ExpertOutOfRange {
        /// The weights' file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The expert in its name.
        expert: usize,
        /// Experts of the layer; [`Stack::MAX_EXPERTS`](super::Stack::MAX_EXPERTS) when the caller did not
        /// say.
        experts: usize,
    },
    /// A weight is infinite or not a number, or becomes so in the type asked for.
    #[error("{}: {tensor} holds {value}, which is not a number in {dtype}", path.display())]
    NotFinite {
        /// The weights' file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The weight, scaled.
        value: f32,
        /// The type asked for.
        dtype: DType,
    },
    /// None of the adapters changes this projection.
    #[error("no expert of layer {layer} has a LoRA on {projection} in {adapters}")]
    NothingToStack {
        /// The layer.
        layer: usize,
        /// The projection.
        projection: LayerProjection,
        /// The adapters, with what they target.
        adapters: String,
    },
    /// The sizes do not make a projection.
    #[error(transparent)]
    Sizes(#[from] Error),
    /// The stacked weights do not fit in memory.
    #[error("{tensor} of {shape:?} {dtype} does not fit in memory")]
    OutOfMemory {
        /// `a` or `b`.
        tensor: &'static str,
        /// Its shape.
        shape: [usize; 4],
        /// Its type.
        dtype: DType,
    },
}

impl AdapterError {
    pub(super) fn io(path: &Path, reason: io::Error) -> Self {
        FileError::Io { path: path.into(), action: "read", reason }.into()
    }
}
