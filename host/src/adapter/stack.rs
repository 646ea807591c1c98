//! The weights of a layer's projections, stacked one slot an adapter.

use super::error::AdapterError;
use super::folder::{Adapter, Lora};
use super::target::{LayerProjection, Target};
use crate::backend::Backend;
use crate::dtype::Element;
use crate::error::Error;
use crate::projection::{ExpertWeights, OutDims, Projection, ProjectionSizes, elements};
use crate::tensor_file::TensorFile;
use std::fmt;
use std::path::Path;

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
        let ProjectionSizes { slots, experts, max_rank, in_dim, out_dims, .. } = sizes;
        let (slices, out_dim) = (out_dims.len(), out_dims.max());
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
            in_dim,
            out_dims: OutDims::uniform(out_dim, projection.slices()),
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
