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
//!
//! Every number must be finite, also of tokens that have no adapter, and in the type computed in: one that is
//! not is refused by its place. So is a result that is not finite; nothing is written then.

use half::{bf16, f16};
use moe_lora::adapter::{Adapter, AdapterError, LayerProjection, Stack};
use moe_lora::backend::{Backend, Buffer};
use moe_lora::call::{Forward, RoutingTensors, SliceOrder, Weights};
use moe_lora::dtype::{DType, Element};
use moe_lora::error::Error as CallError;
use moe_lora::projection::{Projection, XRows};
use moe_lora::tensor_file::{FileError, TensorFile};
use moe_lora::whole_file;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::io;
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
    /// A number of the input is infinite or none, or becomes so in the type computed in.
    #[error("{}: {tensor}{index:?} is {value:?}, which is not a finite number in {dtype}", path.display())]
    NotFinite {
        /// The input file.
        path: PathBuf,
        /// The tensor.
        tensor: &'static str,
        /// The element.
        index: Vec<usize>,
        /// Its value in the file.
        value: f32,
        /// The type that it is taken in: `bf16`, `f16` or `f32`.
        dtype: String,
    },
    /// A number of the result is infinite or none, though those of the input are finite.
    #[error(
        "out{index:?} comes out as {value:?} in {dtype}: sums are too large for it, and nothing was written"
    )]
    Overflow {
        /// The element.
        index: Vec<usize>,
        /// Its value.
        value: f32,
        /// The type computed in.
        dtype: DType,
    },
    /// The output exists and may not be replaced.
    #[error("{} exists", path.display())]
    OutputExists {
        /// The output file.
        path: PathBuf,
    },
    /// The output is one of the files that are read.
    #[error("{} is the same file as {}, which is read: write to another", output.display(), input.display())]
    OutputIsInput {
        /// The output file.
        output: PathBuf,
        /// What is read.
        input: PathBuf,
    },
}

/// The name that stands for standard input.
const STANDARD_INPUT: &str = "-";
/// A file that is standard input.
const STANDARD_INPUT_FILE: &str = "/dev/stdin";

/// One call: which weights, on what.
#[derive(Clone, Debug)]
pub struct Run {
    /// PEFT adapter folders; the first is adapter 0 of `token_lora`.
    pub adapters: Vec<PathBuf>,
    /// The layer of the model.
    pub layer: usize,
    /// Which of its projections.
    pub projection: LayerProjection,
    /// The input file; a pipe will do, and so will `-` for standard input.
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
    /// The input, where `-` has the name that the system has for it.
    fn input_file(&self) -> &Path {
        match self.input == Path::new(STANDARD_INPUT) {
            true => Path::new(STANDARD_INPUT_FILE),
            false => &self.input,
        }
    }

    /// Refuses an output that exists, unless `replace` is set, one that is a file of the input, and one in no
    /// folder. [`Output::save`] would find out about most of it, but after work that may take long.
    ///
    /// # Errors
    /// [`RunError::OutputIsInput`], [`RunError::OutputExists`], [`FileError::Io`].
    pub fn check_output(&self, path: &Path, replace: bool) -> Result<(), RunError> {
        let of_adapters =
            self.adapters.iter().filter_map(|folder| folder.read_dir().ok()).flatten().flatten();
        let mut read = of_adapters.map(|file| file.path()).chain([self.input_file().to_owned()]);
        if let Some(input) = read.find(|file| is_same_file(file, path)) {
            return Err(RunError::OutputIsInput { output: path.into(), input });
        }
        if !replace && path.symlink_metadata().is_ok() {
            return Err(RunError::OutputExists { path: path.into() });
        }
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            folder.metadata().map_err(|reason| FileError::Io {
                path: path.into(),
                action: "write",
                reason,
            })?;
        }
        Ok(())
    }

    /// Reads the files and runs the call on `backend`.
    ///
    /// # Errors
    /// [`RunError`]; the messages name file, tensor, expected and got.
    pub fn on<B: Backend>(&self, backend: &B) -> Result<Output, RunError> {
        let input = open(self.input_file())?;
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
        let x = backend.upload(&rounded::<T>(input, "x")?)?;
        let topk_ids = backend.upload(&input.ints("topk_ids")?)?;
        input.expect_shape("token_lora", &[tokens], "[T]")?;
        let token_lora = backend.upload(&self.token_lora(input)?)?;
        let topk_weights = match self.mul_routed_weight {
            false => None,
            true => {
                input.expect_shape("topk_weights", &[tokens, top_k], "[T, k]")?;
                let topk_weights = input.floats("topk_weights")?;
                refuse_infinite(input, "topk_weights", &topk_weights, |weight| weight, "f32".into())?;
                Some(backend.upload(&topk_weights)?)
            }
        };
        let accumulate = input.contains("out");
        let mut out = backend.upload(&match accumulate {
            false => vec![T::zeroed(); out_elements],
            true => {
                input.expect_shape("out", &[tokens, top_k, out_width], "[T, k, S·N]")?;
                rounded(input, "out")?
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
            weights: Weights::Stacked {
                a: &a.iter().map(Buffer::view).collect::<Vec<_>>(),
                b: &b.iter().map(Buffer::view).collect::<Vec<_>>(),
            },
            topk_weights: topk_weights.as_ref().map(Buffer::view),
            out: out.view_mut().into(),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate,
        };
        backend.forward(&mut workspace, &stack.projection, call)?;
        let out = backend.download(&out)?;
        if let Some(at) = out.iter().position(|value| !value.to_f32().is_finite()) {
            let index = unravel(at, &[tokens, top_k, out_width]);
            return Err(RunError::Overflow { index, value: out[at].to_f32(), dtype: T::DTYPE });
        }
        let out = bytemuck::cast_slice(&out).to_vec();
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

/// Whether two paths lead to one file. Neither is opened: to open a pipe is to wait for somebody who writes
/// to it.
fn is_same_file(one: &Path, other: &Path) -> bool {
    #[cfg(unix)]
    let id = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        path.metadata().map(|file| (file.dev(), file.ino()))
    };
    #[cfg(not(unix))]
    let id = |path: &Path| path.canonicalize();
    matches!((id(one), id(other)), (Ok(one), Ok(other)) if one == other)
}

/// Opens the input. What comes through a pipe is kept in a file first, since tensors are read in any order.
fn open(path: &Path) -> Result<TensorFile, FileError> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if path.metadata().is_ok_and(|path| path.file_type().is_fifo()) {
            let copy = || -> io::Result<std::fs::File> {
                let mut copy = tempfile::tempfile()?;
                io::copy(&mut std::fs::File::open(path)?, &mut copy)?;
                Ok(copy)
            };
            let copy =
                copy().map_err(|reason| FileError::Io { path: path.into(), action: "copy", reason })?;
            return TensorFile::read(copy, path);
        }
    }
    TensorFile::open(path)
}

/// A tensor rounded to `T`, refused where that is not finite.
fn rounded<T: Element>(file: &TensorFile, tensor: &'static str) -> Result<Vec<T>, RunError> {
    let values = file.floats(tensor)?;
    refuse_infinite(file, tensor, &values, |value| T::from_f32(value).to_f32(), T::DTYPE.to_string())?;
    Ok(values.into_iter().map(T::from_f32).collect())
}

/// Refuses a tensor of which a value, as `taken` in `dtype`, is not finite.
fn refuse_infinite(
    file: &TensorFile,
    tensor: &'static str,
    values: &[f32],
    taken: impl Fn(f32) -> f32,
    dtype: String,
) -> Result<(), RunError> {
    match values.iter().position(|&value| !taken(value).is_finite()) {
        None => Ok(()),
        Some(at) => Err(RunError::NotFinite {
            path: file.path().into(),
            tensor,
            index: unravel(at, file.shape(tensor)?),
            value: values[at],
            dtype,
        }),
    }
}

/// The indices of element `at` of a tensor of this shape.
fn unravel(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<_> = shape
        .iter()
        .rev()
        .map(|&size| {
            let here = at % size;
            at /= size;
            here
        })
        .collect();
    index.reverse();
    index
}

impl Output {
    /// Writes `out` to a safetensors file, whole or not at all. One that exists is replaced only when
    /// `replace` is set.
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
        let failed = |reason| FileError::Io { path: path.into(), action: "write", reason };
        let bytes = TensorView::new(dtype, shape, &self.out)
            .and_then(|out| serialize([("out", out)], None))
            .map_err(|error| failed(io::Error::other(error)))?;
        match whole_file::write(path, &bytes, replace) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(RunError::OutputExists { path: path.into() })
            }
            other => Ok(other.map_err(failed)?),
        }
    }
}
