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
mod name;
#[cfg(test)]
mod tests;

use crate::backend::Backend;
use crate::dtype::{DType, Element};
use crate::error::Error;
use crate::projection::{ExpertWeights, Projection, ProjectionSizes, XRows, elements};
use crate::tensor_file::{FileError, TensorFile};
use config::Config;
use name::{Module, Name, Side};
use std::collections::BTreeMap;
use std::fmt;
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
        /// Experts of the layer; [`Stack::MAX_EXPERTS`] when the caller did not say.
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
    fn io(path: &Path, reason: io::Error) -> Self {
        FileError::Io { path: path.into(), action: "read", reason }.into()
    }
}

/// The two projections of a gated expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerProjection {
    /// Gate and up side by side: two slices, one row of `x` a token.
    W13,
    /// Down: one slice, one row of `x` a pair; its result is multiplied by the routing weights.
    W2,
}

impl LayerProjection {
    /// What a row of `x` belongs to.
    pub fn x_rows(self) -> XRows {
        match self {
            LayerProjection::W13 => XRows::Token,
            LayerProjection::W2 => XRows::Pair,
        }
    }

    /// S.
    pub fn slices(self) -> usize {
        self.modules().len()
    }

    fn modules(self) -> &'static [Module] {
        match self {
            LayerProjection::W13 => &[Module::Gate, Module::Up],
            LayerProjection::W2 => &[Module::Down],
        }
    }
}

impl fmt::Display for LayerProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LayerProjection::W13 => "w13",
            LayerProjection::W2 => "w2",
        })
    }
}

/// Whose LoRA a pair of matrices is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    layer: usize,
    expert: usize,
    module: Module,
}

/// `a` and `b` of one expert's projection: what the file calls them and what the header says of them.
#[derive(Debug)]
struct Lora {
    a: String,
    b: String,
    rank: usize,
    in_dim: usize,
    out_dim: usize,
    scaling: f32,
}

/// An adapter whose configuration and header have been checked. Its weights are still on disk.
#[derive(Debug)]
pub struct Adapter {
    config: Config,
    file: TensorFile,
    loras: BTreeMap<Target, Lora>,
}

impl Adapter {
    /// Opens a PEFT adapter folder.
    ///
    /// # Errors
    /// Every [`AdapterError`] that can be found without reading weights.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, AdapterError> {
        let folder = folder.as_ref();
        let config = Config::read(&folder.join("adapter_config.json"))?;
        let (weights, pickle) = (folder.join("adapter_model.safetensors"), folder.join("adapter_model.bin"));
        if !weights.exists() && pickle.exists() {
            return Err(AdapterError::Pickled { path: pickle });
        }
        let file = TensorFile::open(weights)?;
        let loras = loras(&file, &config)?;
        Ok(Adapter { config, file, loras })
    }

    /// The file that holds the weights.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The matrices of one layer.
    fn layer(&self, layer: usize) -> impl Iterator<Item = (&Target, &Lora)> + Clone {
        self.loras.iter().filter(move |(target, _)| target.layer == layer)
    }

    /// The matrices of one projection of one layer.
    fn of(
        &self,
        layer: usize,
        projection: LayerProjection,
    ) -> impl Iterator<Item = (&Target, &Lora)> + Clone {
        self.layer(layer).filter(move |(target, _)| projection.modules().contains(&target.module))
    }
}

/// Finds the experts' matrices by their names and checks them against the configuration.
fn loras(file: &TensorFile, config: &Config) -> Result<BTreeMap<Target, Lora>, AdapterError> {
    let mut sides = BTreeMap::<(Target, Side), &str>::new();
    for tensor in file.names() {
        match Name::parse(tensor) {
            Name::Elsewhere => {}
            Name::Unknown => {
                return Err(AdapterError::UnknownTensor { path: file.path().into(), tensor: tensor.into() });
            }
            Name::Expert(target, side) => {
                if let Some(first) = sides.insert((target, side), tensor) {
                    let (path, first, second) = (file.path().into(), first.into(), tensor.into());
                    return Err(AdapterError::Duplicate { path, first, second });
                }
            }
        }
    }
    let unpaired = |tensor: &str| AdapterError::Unpaired { path: file.path().into(), tensor: tensor.into() };
    let mut loras = BTreeMap::new();
    for (&(target, side), &tensor) in &sides {
        let &other = sides.get(&(target, side.other())).ok_or_else(|| unpaired(tensor))?;
        if side == Side::B {
            continue; // Seen with its A.
        }
        let (a, b) = (tensor, other);
        let module = Name::module(a);
        let rank = config.rank(module);
        let [a_rank, in_dim] = file.matrix(a, "[r, K]")?;
        let [out_dim, b_rank] = file.matrix(b, "[N, r]")?;
        if a_rank != rank || in_dim == 0 {
            return Err(file.shape_error(a, format!("[r, K] with r = {rank}")).into());
        }
        if b_rank != rank || out_dim == 0 {
            return Err(file.shape_error(b, format!("[N, r] with r = {rank}")).into());
        }
        let scaling = config.scaling(module);
        loras.insert(target, Lora { a: a.into(), b: b.into(), rank, in_dim, out_dim, scaling });
    }
    Ok(loras)
}

/// The weights of one projection of one layer, one slot an adapter, as a call wants them.
pub struct Stack<T> {
    /// Sizes. L is the number of adapters; R, and E unless it was given, are the layer's: both of its
    /// projections can share a route.
    pub projection: Projection,
    /// S tensors `[L, E, R, K]`, zero above an adapter's rank and for experts that it leaves alone.
    pub a: Vec<Vec<T>>,
    /// S tensors `[L, E, N, R]`, multiplied by the adapter's scaling; zero likewise.
    pub b: Vec<Vec<T>>,
    /// `[L]`: the largest rank of each adapter in either projection of the layer; 0 for one that leaves
    /// the layer alone.
    pub ranks: Vec<i32>,
}

/// The weights of a [`Stack`] where calls run.
pub struct Uploaded<B: Backend, T: Element> {
    /// S tensors `[L, E, R, K]`.
    pub a: Vec<B::Buffer<T>>,
    /// S tensors `[L, E, N, R]`.
    pub b: Vec<B::Buffer<T>>,
    /// `[L]`.
    pub ranks: B::Buffer<i32>,
}

/// The stacked weights of both projections of a layer.
#[derive(Debug)]
pub struct Layer<T> {
    /// Gate and up.
    pub w13: Stack<T>,
    /// Down.
    pub w2: Stack<T>,
}

impl<T: Element> Layer<T> {
    /// Reads one layer of PEFT adapters; the adapter of folder `i` becomes slot `i`. `experts` is as for
    /// [`Stack::load`].
    ///
    /// # Errors
    /// As for [`Adapter::open`] and [`Stack::load`].
    pub fn load(
        folders: &[impl AsRef<Path>],
        layer: usize,
        top_k: usize,
        experts: Option<usize>,
    ) -> Result<Self, AdapterError> {
        let adapters = folders.iter().map(Adapter::open).collect::<Result<Vec<_>, _>>()?;
        let stack = |projection| Stack::load(&adapters, layer, projection, top_k, experts);
        Ok(Layer { w13: stack(LayerProjection::W13)?, w2: stack(LayerProjection::W2)? })
    }
}

impl<T: Element> Stack<T> {
    /// Most experts when their number is taken from the adapters. No model has as many, and a name
    /// in a file must not decide how much is allocated.
    pub const MAX_EXPERTS: usize = 4096;

    /// Copies the weights to where calls run.
    ///
    /// # Errors
    /// As for [`Backend::upload`].
    pub fn upload<B: Backend>(&self, backend: &B) -> Result<Uploaded<B, T>, Error> {
        let upload = |slices: &[Vec<T>]| {
            slices.iter().map(|slice| backend.upload(slice)).collect::<Result<Vec<_>, _>>()
        };
        Ok(Uploaded { a: upload(&self.a)?, b: upload(&self.b)?, ranks: backend.upload(&self.ranks)? })
    }

    /// Reads one projection of one layer; adapter `i` becomes slot `i`.
    ///
    /// `experts` is E; when it is `None`, one more than the largest expert that an adapter names.
    /// Scaling is multiplied into `b` in f32, before the one rounding to `T`.
    ///
    /// # Errors
    /// Any [`AdapterError`] about weights, and [`AdapterError::Sizes`] for a rank or `top_k` over what a
    /// [`Projection`] supports.
    pub fn load(
        adapters: &[Adapter],
        layer: usize,
        projection: LayerProjection,
        top_k: usize,
        experts: Option<usize>,
    ) -> Result<Self, AdapterError> {
        let sizes = Self::sizes(adapters, layer, projection, top_k, experts)?;
        let ProjectionSizes { slots, experts, max_rank, slices, in_dim, out_dim, .. } = sizes;
        let rank = |adapter: &Adapter| adapter.layer(layer).map(|(_, lora)| lora.rank as i32).max();
        let mut stack = Stack {
            projection: Projection::new(sizes)?,
            a: Self::zeros(slices, "a", [slots, experts, max_rank, in_dim])?,
            b: Self::zeros(slices, "b", [slots, experts, out_dim, max_rank])?,
            ranks: adapters.iter().map(|adapter| rank(adapter).unwrap_or(0)).collect(),
        };
        for (slot, adapter) in adapters.iter().enumerate() {
            for (target, lora) in adapter.of(layer, projection) {
                let slice = target.module.slice();
                let matrix = slot * experts + target.expert;
                let a = read(&adapter.file, &lora.a, 1.0)?;
                stack.a[slice][matrix * max_rank * in_dim..][..a.len()].copy_from_slice(&a);
                let b: Vec<T> = read(&adapter.file, &lora.b, lora.scaling)?;
                let rows = stack.b[slice][matrix * out_dim * max_rank..].chunks_exact_mut(max_rank);
                for (row, values) in rows.zip(b.chunks_exact(lora.rank)) {
                    row[..lora.rank].copy_from_slice(values);
                }
            }
        }
        Ok(stack)
    }

    /// The sizes that all matrices agree on.
    fn sizes(
        adapters: &[Adapter],
        layer: usize,
        projection: LayerProjection,
        top_k: usize,
        experts: Option<usize>,
    ) -> Result<ProjectionSizes, AdapterError> {
        let mut all = adapters.iter().flat_map(|a| a.of(layer, projection).map(move |(_, lora)| (a, lora)));
        let Some((_, &Lora { in_dim, out_dim, .. })) = all.clone().next() else {
            let shown = |a: &Adapter| format!("{} (targets {})", a.path().display(), a.config.target_modules);
            let adapters = adapters.iter().map(shown).collect::<Vec<_>>().join(", ");
            return Err(AdapterError::NothingToStack { layer, projection, adapters });
        };
        all.try_for_each(|(Adapter { file, .. }, Lora { a, b, rank, .. })| {
            file.expect_shape(a, &[*rank, in_dim], "[r, K] with the K of the layer's others")?;
            file.expect_shape(b, &[out_dim, *rank], "[N, r] with the N of the layer's others")
        })?;

        let limit = experts.unwrap_or(Self::MAX_EXPERTS);
        let (mut named, mut max_rank) = (0, 0);
        for adapter in adapters {
            for (&Target { expert, .. }, lora) in adapter.layer(layer) {
                if expert >= limit {
                    let (path, tensor) = (adapter.path().into(), lora.a.clone());
                    return Err(AdapterError::ExpertOutOfRange { path, tensor, expert, experts: limit });
                }
                (named, max_rank) = (named.max(expert + 1), max_rank.max(lora.rank));
            }
        }
        Ok(ProjectionSizes {
            dtype: T::DTYPE,
            top_k,
            experts: experts.unwrap_or(named),
            slots: adapters.len(),
            max_rank,
            slices: projection.slices(),
            in_dim,
            out_dim,
            x_rows: projection.x_rows(),
            a_experts: ExpertWeights::PerExpert,
            b_experts: ExpertWeights::PerExpert,
        })
    }

    fn zeros(slices: usize, tensor: &'static str, shape: [usize; 4]) -> Result<Vec<Vec<T>>, AdapterError> {
        let length = elements(tensor, &shape)?;
        let zeros = |_| bytemuck::try_zeroed_vec(length);
        (0..slices).map(zeros).collect::<Result<_, ()>>().map_err(|()| AdapterError::OutOfMemory {
            tensor,
            shape,
            dtype: T::DTYPE,
        })
    }
}

impl<T> fmt::Debug for Stack<T> {
    /// Without the weights, of which there may be millions.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stack { projection, ranks, .. } = self;
        f.debug_struct("Stack").field("projection", projection).field("ranks", ranks).finish_non_exhaustive()
    }
}

/// A tensor of the file, scaled in f32 and rounded to `T`.
fn read<T: Element>(file: &TensorFile, tensor: &str, scaling: f32) -> Result<Vec<T>, AdapterError> {
    let round = |weight: f32| {
        let value = weight * scaling;
        let rounded = T::from_f32(value);
        if rounded.to_f32().is_finite() {
            return Ok(rounded);
        }
        let (path, tensor) = (file.path().into(), tensor.into());
        Err(AdapterError::NotFinite { path, tensor, value, dtype: T::DTYPE })
    };
    file.floats(tensor)?.into_iter().map(round).collect()
}
