//! One call on tensors that lie in files: what `moe-lora run` does.
//!
//! Adapters are PEFT folders. The input is a safetensors file that holds
//!
//! | tensor | shape | type | |
//! |---|---|---|---|
//! | `x` | `[T, K]` for w13, `[T·k, K]` for w2 | BF16, F16, F32 | F32 is rounded to the type computed in |
//! | `topk_ids` | `[T, k]` | I32 | experts of each token |
//! | `topk_weights` | `[T, k]` | F32 | needed when the result is multiplied by them |
//! | `token_lora` | `[T]` | I32 | adapter of each token, in the order given; −1 for none |
//! | `out` | `[T, k, S·N]` | as `x` | optional: what the result is added to |
//!
//! and the output one that holds `out`, `[T, k, S·N]`.

use half::{bf16, f16};
use moe_lora::adapter::{Adapter, AdapterError, LayerProjection, Stack};
use moe_lora::backend::{Backend, Buffer};
use moe_lora::call::{Forward, RoutingTensors};
use moe_lora::dtype::{DType, Element};
use moe_lora::error::Error as CallError;
use moe_lora::projection::{Projection, XRows};
use moe_lora::tensor_file::{FileError, TensorFile};
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a run was refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// An adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The input file, or writing the output.
    #[error(transparent)]
    File(#[from] FileError),
    /// The call itself.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A token names an adapter that was not given.
    #[error("{}: token_lora[{token}] is {got}, expected −1 or one of the {adapters} adapters, from 0", path.display())]
    NoSuchAdapter {
        /// The input file.
        path: PathBuf,
        /// The token.
        token: usize,
        /// Its adapter.
        got: i32,
        /// Adapters given.
        adapters: usize,
    },
    /// The output exists and may not be replaced.
    #[error("{} exists", path.display())]
    OutputExists {
        /// The output file.
        path: PathBuf,
    },
}

/// One call: which weights, on what.
#[derive(Clone, Debug)]
pub struct Run {
    /// PEFT adapter folders; the first is adapter 0 of `token_lora`.
    pub adapters: Vec<PathBuf>,
    /// The layer of the model.
    pub layer: usize,
    /// Which of its projections.
    pub projection: LayerProjection,
    /// The input file.
    pub input: PathBuf,
    /// The type computed in; `None` for that of `x`.
    pub dtype: Option<DType>,
    /// Whether the result is multiplied by `topk_weights`.
    pub mul_routed_weight: bool,
}

/// The result of a [`Run`].
#[derive(Clone, Debug)]
pub struct Output {
    /// Sizes of the call.
    pub projection: Projection,
    /// T.
    pub tokens: usize,
    /// Rank of each adapter.
    pub ranks: Vec<i32>,
    /// `[T, k, S·N]`, in the type computed in.
    out: Vec<u8>,
}

impl Run {
    /// Reads the files and runs the call on `backend`.
    ///
    /// # Errors
    /// [`RunError`]; the messages name file, tensor, expected and got.
    pub fn on<B: Backend>(&self, backend: &B) -> Result<Output, RunError> {
        let input = TensorFile::open(&self.input)?;
        let own = match input.dtype("x")? {
            Dtype::BF16 => Some(DType::Bf16),
            Dtype::F16 => Some(DType::F16),
            _ => None,
        };
        match self.dtype.or(own) {
            Some(DType::Bf16) => self.on_as::<bf16, B>(backend, &input),
            Some(DType::F16) => self.on_as::<f16, B>(backend, &input),
            None => {
                Err(input.dtype_error("x", "BF16 or F16, or a type to compute in", input.dtype("x")?).into())
            }
        }
    }

    fn on_as<T: Element, B: Backend>(&self, backend: &B, input: &TensorFile) -> Result<Output, RunError> {
        let [tokens, top_k] = input.matrix("topk_ids", "[T, k]")?;
        let adapters = self.adapters.iter().map(Adapter::open).collect::<Result<Vec<_>, _>>()?;
        let stack = Stack::<T>::load(&adapters, self.layer, self.projection, top_k, None)?;
        let (in_dim, out_width) = (stack.projection.sizes().in_dim, stack.projection.out_width());
        let out_elements = stack.projection.out_elements(tokens)?;

        let x_shape = match self.projection.x_rows() {
            XRows::Token => "[T, K]",
            XRows::Pair => "[T·k, K]",
        };
        input.expect_shape("x", &[stack.projection.x_rows(tokens)?, in_dim], x_shape)?;
        let x = backend.upload(&floats_as::<T>(input, "x")?)?;
        let topk_ids = backend.upload(&input.ints("topk_ids")?)?;
        input.expect_shape("token_lora", &[tokens], "[T]")?;
        let token_lora = backend.upload(&self.token_lora(input)?)?;
        let topk_weights = match self.mul_routed_weight {
            false => None,
            true => {
                input.expect_shape("topk_weights", &[tokens, top_k], "[T, k]")?;
                Some(backend.upload(&input.floats("topk_weights")?)?)
            }
        };
        let accumulate = input.contains("out");
        let mut out = backend.upload(&match accumulate {
            false => vec![T::zeroed(); out_elements],
            true => {
                input.expect_shape("out", &[tokens, top_k, out_width], "[T, k, S·N]")?;
                floats_as(input, "out")?
            }
        })?;

        let upload = |slice: &Vec<T>| backend.upload(slice);
        let a = stack.a.iter().map(upload).collect::<Result<Vec<_>, _>>()?;
        let b = stack.b.iter().map(upload).collect::<Result<Vec<_>, _>>()?;
        let ranks = backend.upload(&stack.ranks)?;
        let mut workspace = backend.workspace(&[stack.projection], tokens)?;
        let call = Forward {
            tokens,
            routing: RoutingTensors {
                ranks: Some(ranks.view()),
                ..RoutingTensors::new(topk_ids.view(), token_lora.view())
            }
            .into(),
            x: x.view().into(),
            a: &a.iter().map(Buffer::view).collect::<Vec<_>>(),
            b: &b.iter().map(Buffer::view).collect::<Vec<_>>(),
            topk_weights: topk_weights.as_ref().map(Buffer::view),
            out: out.view_mut().into(),
            offset: 0,
            accumulate,
        };
        backend.forward(&mut workspace, &stack.projection, call)?;
        let out = bytemuck::cast_slice(&backend.download(&out)?).to_vec();
        Ok(Output { projection: stack.projection, tokens, ranks: stack.ranks, out })
    }

    /// `token_lora`, refused where a token's adapter was not given: to the operator that is a token without
    /// one, to whoever made the file it is a mistake.
    fn token_lora(&self, input: &TensorFile) -> Result<Vec<i32>, RunError> {
        let token_lora = input.ints("token_lora")?;
        let known = -1..self.adapters.len() as i32;
        match token_lora.iter().position(|slot| !known.contains(slot)) {
            None => Ok(token_lora),
            Some(token) => Err(RunError::NoSuchAdapter {
                path: input.path().into(),
                token,
                got: token_lora[token],
                adapters: self.adapters.len(),
            }),
        }
    }
}

fn floats_as<T: Element>(file: &TensorFile, tensor: &str) -> Result<Vec<T>, FileError> {
    Ok(file.floats(tensor)?.into_iter().map(T::from_f32).collect())
}

impl Output {
    /// Writes `out` to a safetensors file. One that exists is replaced only when `replace` is set.
    ///
    /// # Errors
    /// [`RunError::OutputExists`], [`FileError::Io`].
    pub fn save(&self, path: &Path, replace: bool) -> Result<(), RunError> {
        let sizes = self.projection.sizes();
        let dtype = match sizes.dtype {
            DType::Bf16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
        };
        let shape = vec![self.tokens, sizes.top_k, self.projection.out_width()];
        let io = |reason| FileError::Io { path: path.into(), action: "write", reason };
        let bytes = TensorView::new(dtype, shape, &self.out)
            .and_then(|out| serialize([("out", out)], None))
            .map_err(|error| io(std::io::Error::other(error)))?;
        let mut options = OpenOptions::new();
        match replace {
            true => options.create(true).truncate(true),
            false => options.create_new(true),
        };
        match options.write(true).open(path).and_then(|mut file| file.write_all(&bytes)) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(RunError::OutputExists { path: path.into() })
            }
            other => Ok(other.map_err(io)?),
        }
    }
}
