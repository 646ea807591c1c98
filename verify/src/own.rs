//! Weights by address: an allocation of its own for each slot and slice, and the table that names them.

use crate::case::Case;
use crate::draw::Normals;
use crate::fault::Fault;
use crate::placed::{Placed, check_unchanged};
use crate::tensor::Tensor;
use moe_lora::backend::{Backend, Buffer};
use moe_lora::dtype::Element;
use moe_lora::projection::ExpertWeights;
use moe_lora::reference::Target;
use moe_lora::table::{AdapterEntry, Adapters};
use rand::rngs::StdRng;
use rand::{Rng, RngCore};

/// Ranks that weights are allocated for are multiples of this.
const RANK_MULTIPLE: usize = 8;

/// The weights of each slot and slice, `[L, S]`.
#[derive(Clone, Debug)]
pub(crate) struct OwnWeights<T> {
    slices: usize,
    max_rank: usize,
    all: Vec<OwnSlice<T>>,
}

/// The weights of one slot and slice, and its entry but for the addresses.
#[derive(Clone, Debug)]
struct OwnSlice<T> {
    entry: AdapterEntry,
    /// `[E or 1, r, K]` and `[E or 1, N_s, r]`; none where the slice is off.
    weights: Option<[Tensor<T>; 2]>,
}

impl<T: Element> OwnWeights<T> {
    /// Of `case`, whose pairs are routed to `targets`.
    pub fn new(case: &Case, targets: &[Option<Target>], normals: &Normals, rng: &mut StdRng) -> Self {
        // Rank in use of each segment; `None` where no pair uses it.
        let mut segments = vec![None; case.slots * case.experts];
        for target in targets.iter().flatten() {
            segments[target.slot * case.experts + target.expert] = Some(target.rank);
        }
        let slice = |i: usize| {
            let (slot, s) = (i / case.out_dims.len(), i % case.out_dims.len());
            OwnSlice::new(
                case,
                case.out_dims.get(s),
                &segments[slot * case.experts..][..case.experts],
                normals,
                rng,
            )
        };
        let all = (0..case.slots * case.out_dims.len()).map(slice).collect();
        OwnWeights { slices: case.out_dims.len(), max_rank: case.max_rank, all }
    }

    fn entry(&self, s: usize, target: Target) -> &AdapterEntry {
        &self.all[target.slot * self.slices + s].entry
    }

    /// Rank in use of a slice.
    pub fn rank(&self, s: usize, target: Target) -> usize {
        self.entry(s, target).rank_in_use(target.rank.min(self.max_rank))
    }

    /// What multiplies a slice's delta.
    pub fn scaling(&self, s: usize, target: Target) -> f32 {
        self.entry(s, target).scaling
    }
}

impl<T: Element> OwnSlice<T> {
    fn new(
        case: &Case,
        out_dim: usize,
        segments: &[Option<usize>],
        normals: &Normals,
        rng: &mut StdRng,
    ) -> Self {
        let rank = rng.random_range(0..=case.max_rank);
        let max_rank = rank.next_multiple_of(RANK_MULTIPLE);
        let scaling = [1.0, 0.5, 2.0, -1.5][rng.random_range(0..4)];
        if rank == 0 {
            // Where it leads must not matter.
            let off =
                AdapterEntry { rank: [0, -3, i32::MIN][rng.random_range(0..3)], ..AdapterEntry::default() };
            let addresses = AdapterEntry { a: 16, b: 32, max_rank: 8, scaling, ..off };
            let entry = if rng.random() { off } else { addresses };
            return OwnSlice { entry, weights: None };
        }
        // One that is over what is allocated is cut to it.
        let rank = if rng.random_ratio(1, 8) { max_rank + 5 } else { rank };
        let entry =
            AdapterEntry { rank: rank as i32, max_rank: max_rank as u32, scaling, ..AdapterEntry::default() };
        let used = |rank: Option<usize>| rank.map(|rank| entry.rank_in_use(rank));
        let ranks = |experts| match experts {
            ExpertWeights::PerExpert => segments.iter().map(|&rank| used(rank)).collect::<Vec<_>>(),
            ExpertWeights::Shared => vec![used(segments.iter().flatten().next().copied())],
        };
        let (a_ranks, b_ranks) = (ranks(case.a_experts), ranks(case.b_experts));
        let mut a = Tensor::poisoned("a", [a_ranks.len() * max_rank, case.in_dim, case.in_dim], false);
        let (scale, seed) = (1.0 / (case.in_dim as f32).sqrt(), rng.next_u64());
        let matrices = a.elements_mut().chunks_mut(max_rank * case.in_dim).zip(a_ranks).enumerate();
        for (i, (matrix, rank)) in matrices {
            normals.fill(&mut matrix[..rank.unwrap_or(0) * case.in_dim], scale, seed ^ i as u64);
        }
        let mut b = Tensor::poisoned("b", [b_ranks.len() * out_dim, max_rank, max_rank], false);
        let seed = rng.next_u64();
        let rows = b.elements_mut().chunks_mut(max_rank).enumerate();
        for (i, row) in rows {
            let rank = b_ranks[i / out_dim].unwrap_or(0);
            normals.fill(&mut row[..rank], 1.0 / (rank.max(1) as f32).sqrt(), seed ^ i as u64);
        }
        OwnSlice { entry, weights: Some([a, b]) }
    }
}

/// The same on a back end.
pub(crate) struct PlacedTable<'d, B: Backend, T: Element> {
    weights: Vec<[Placed<'d, B, T>; 2]>,
    entries: Tensor<AdapterEntry>,
    buffer: B::Buffer<AdapterEntry>,
}

impl<'d, B: Backend, T: Element> PlacedTable<'d, B, T> {
    pub fn new(backend: &B, own: &'d OwnWeights<T>) -> moe_lora::Result<Self> {
        let (mut weights, mut entries) = (Vec::new(), Vec::new());
        for OwnSlice { entry, weights: of_slice } in &own.all {
            let mut entry = *entry;
            if let Some([a, b]) = of_slice {
                let placed = [Placed::new(backend, a)?, Placed::new(backend, b)?];
                [entry.a, entry.b] = placed.each_ref().map(|placed| placed.view().address());
                weights.push(placed);
            }
            entries.push(entry);
        }
        let entries = Tensor::new("adapters", &entries, false);
        let buffer = backend.upload(entries.image())?;
        Ok(PlacedTable { weights, entries, buffer })
    }

    pub fn adapters(&self) -> Adapters<'_, B::Space> {
        // SAFETY: what the entries name lives as long as this, and is of the sizes of the case's projection.
        // It begins after a guard of whole lines, and ranks are rounded up.
        unsafe { Adapters::new(self.buffer.view().slice(self.entries.range())) }
    }

    pub fn check_unchanged(&self, backend: &B) -> Result<(), Fault> {
        let image = backend.download(&self.buffer)?;
        check_unchanged(&self.entries, &image, 0..image.len())?;
        self.weights.iter().flatten().try_for_each(|placed| placed.check_unchanged(backend))
    }
}
