use crate::case::{Case, Experts, Flags, Loras, Ranks};
use bytemuck::Pod;
use moe_lora::call::{
    Enabled, Expand, Factor, Forward, RoutingTensors, Shrink, SliceOrder, TopkIds, Weights,
};
use moe_lora::dtype::Element;
use moe_lora::error::Result;
use moe_lora::projection::{ExpertWeights, XRows};
use moe_lora::reference::{self, Target};
use moe_lora::tensor::{Host, Rows, RowsMut, Space, View, ViewMut};
use rand::rngs::{SmallRng, StdRng};
use rand::seq::{SliceRandom, index};
use rand::{Rng, RngCore, SeedableRng};
use rand_distr::StandardNormal;
use rayon::prelude::*;
use std::any::TypeId;
use std::ops::Range;

/// Bytes of guard before and after a tensor: a multiple of every alignment that kernels care about,
/// and longer than the rows of most cases.
const GUARD_BYTES: usize = 4096;

/// The byte pattern of guards, padding and poison: a NaN as bf16, f16 and f32, and no id as i32.
const POISON: [u8; 8] = [0xE5, 0x7F, 0xE5, 0x7F, 0xE5, 0x7F, 0xE5, 0x7F];

/// Old values of `out` are this much smaller than what is added to them.
///
/// Rounding the sum to 16 bits is part of the error that is measured over the delta; so small, the
/// old values add only 3% to it, and the tolerance means what it means when overwriting.
const OLD_OUT: f32 = 0.25;

/// The guards and padding of `out` when accumulating: adding to a NaN would not show.
const UNADDED: f32 = 1.0 / 1024.0;

/// Tokens of a batch belong to this many sequences, as in vLLM's tests.
const SEQUENCES: usize = 10;

/// Ids that are not below `limit`.
fn no_ids(limit: usize) -> [i32; 6] {
    [-1, -2, i32::MIN, limit as i32, limit as i32 + 1, i32::MAX]
}

/// The element that [`POISON`] makes.
fn poison<T: Pod>() -> T {
    bytemuck::pod_read_unaligned(&POISON[..size_of::<T>()])
}

/// A tensor as it lies in memory: its elements between two guards.
#[derive(Clone, Debug)]
pub struct Tensor<T> {
    name: &'static str,
    image: Vec<T>,
    elements: Range<usize>,
    stride: usize,
}

impl<T: Pod> Tensor<T> {
    /// `rows` rows of `width` elements, `stride` apart, all `fill`; nothing follows the last one.
    fn filled(name: &'static str, [rows, stride, width]: [usize; 3], fill: T, misaligned: bool) -> Self {
        let len = rows.checked_sub(1).map_or(0, |before| before * stride + width);
        let guard = GUARD_BYTES / size_of::<T>();
        let first = guard + usize::from(misaligned);
        Tensor { name, image: vec![fill; first + len + guard], elements: first..first + len, stride }
    }

    pub(crate) fn poisoned(name: &'static str, rows: [usize; 3], misaligned: bool) -> Self {
        Self::filled(name, rows, poison(), misaligned)
    }

    /// One row of elements.
    fn new(name: &'static str, elements: &[T], misaligned: bool) -> Self {
        let mut tensor = Self::poisoned(name, [1, elements.len(), elements.len()], misaligned);
        tensor.elements_mut().copy_from_slice(elements);
        tensor
    }

    /// Its name in the operator's contract.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The elements with their guards: what is copied to a back end.
    pub fn image(&self) -> &[T] {
        &self.image
    }

    /// Where the elements are in the image.
    pub fn range(&self) -> Range<usize> {
        self.elements.clone()
    }

    /// The elements.
    pub fn elements(&self) -> &[T] {
        &self.image[self.elements.clone()]
    }

    fn elements_mut(&mut self) -> &mut [T] {
        &mut self.image[self.elements.clone()]
    }

    /// Where the image's element `index` is, in words.
    pub fn place(&self, index: usize) -> String {
        let Range { start, end } = self.elements;
        if index < start {
            format!("{} elements before its first", start - index)
        } else if index >= end {
            format!("{} elements past its last", index - end + 1)
        } else {
            format!("row {}, column {}", (index - start) / self.stride, (index - start) % self.stride)
        }
    }

    /// The elements as a host view.
    pub fn view(&self) -> View<'_, Host, T> {
        self.elements().into()
    }
}

/// `adapter_enabled`.
#[derive(Clone, Debug)]
pub(crate) enum FlagTensor {
    All,
    U8(Tensor<u8>),
    I32(Tensor<i32>),
}

/// All tensors of a [`Case`], generated from its seed.
///
/// `x` is normal(0, 1); `a` and `b` are scaled by 1/√K and 1/√rank, so deltas have about unit
/// variance (times the router weight, when there is one). Whatever a call has no business to read is
/// NaN: rows of `a` and columns of `b` above a slot's rank, the weights of segments without a pair,
/// activations and router weights of inactive pairs, the padding of rows, the guards. So is `out` when it is
/// overwritten.
#[derive(Clone, Debug)]
pub struct CaseData<T> {
    /// `[T, k]`.
    pub topk_ids: Tensor<i32>,
    /// `[T]`.
    pub token_lora: Tensor<i32>,
    pub(crate) enabled: FlagTensor,
    pub(crate) ranks: Option<Tensor<i32>>,
    pub(crate) expert_map: Option<Tensor<i32>>,
    /// The slots that a route in vLLM's form lists, when the case has one.
    pub(crate) lora_ids: Option<Tensor<i32>>,
    /// `[T or P, K]`, rows apart by the stride.
    pub x: Tensor<T>,
    /// S of `[L, E or 1, R, K]`.
    pub a: Vec<Tensor<T>>,
    /// S of `[L, E or 1, N, R]`.
    pub b: Vec<Tensor<T>>,
    /// `[T, k]`, when deltas are multiplied by them.
    pub topk_weights: Option<Tensor<f32>>,
    pub(crate) h: Tensor<T>,
    pub(crate) out: Tensor<T>,
}

impl<T: Element> CaseData<T> {
    /// Generates the tensors of `case` for a back end whose ranks lie in space `S`.
    ///
    /// # Errors
    /// As [`moe_lora::Projection::new`] and [`moe_lora::Projection::pairs`], when there is no such call.
    pub fn new<S: Space>(case: &Case) -> Result<Self> {
        let projection = case.projection()?;
        let pairs = projection.pairs(case.tokens)?;
        let rng = &mut StdRng::seed_from_u64(case.seed);
        let normals = Normals::new(rng);
        let odd = case.misaligned;

        let ranks = rank_values::<S>(case, rng);
        let topk_weights: Option<Vec<f32>> = case
            .routed_weight
            .then(|| (0..pairs).map(|_| rng.random_range(0.25..1.0) / case.top_k as f32).collect());
        let out_fill = if case.accumulate { T::from_f32(UNADDED) } else { poison() };
        let mut data = CaseData {
            topk_ids: Tensor::new("topk_ids", &expert_ids(case, rng), odd),
            token_lora: Tensor::new("token_lora", &lora_slots(case, rng), odd),
            enabled: flags(case, rng),
            ranks: ranks.map(|ranks| Tensor::new("ranks", &ranks, odd)),
            expert_map: expert_map(case, rng).map(|map| Tensor::new("expert_map", &map, odd)),
            lora_ids: case.block_size.map(|_| Tensor::new("lora_ids", &listed_slots(case), odd)),
            x: Tensor::poisoned("x", [projection.x_rows(case.tokens)?, case.x_stride(), case.in_dim], odd),
            a: Vec::new(),
            b: Vec::new(),
            topk_weights: topk_weights.as_ref().map(|weights| Tensor::new("topk_weights", weights, odd)),
            h: Tensor::poisoned("h", [case.out_dims.len() * pairs, case.max_rank, case.max_rank], odd),
            out: Tensor::filled("out", [pairs, case.out_stride(), case.out_width()], out_fill, odd),
        };

        let seed = rng.next_u64();
        let x_rows = data.x.elements_mut().par_chunks_mut(case.x_stride()).enumerate();
        x_rows.for_each(|(i, row)| normals.fill(&mut row[..case.in_dim], 1.0, seed ^ i as u64));
        if case.accumulate {
            let seed = rng.next_u64();
            let out_rows = data.out.elements_mut().par_chunks_mut(case.out_stride()).enumerate();
            out_rows.for_each(|(pair, row)| {
                let weight = topk_weights.as_ref().map_or(1.0, |weights| weights[pair]);
                normals.fill(&mut row[case.offset..case.out_width()], OLD_OUT * weight, seed ^ pair as u64);
            });
        }
        let targets = reference::targets(&projection, case.tokens, &data.routing())?;
        for &out_dim in case.out_dims.as_slice() {
            data.a.push(weights_a(case, &targets, &normals, rng.next_u64()));
            data.b.push(weights_b(case, out_dim, &targets, &normals, rng.next_u64()));
        }
        data.poison_inactive(case, &targets);
        Ok(data)
    }

    /// Makes NaN of the router weights of inactive pairs, and of rows of `x` that no active pair has.
    fn poison_inactive(&mut self, case: &Case, targets: &[Option<Target>]) {
        if let Some(weights) = &mut self.topk_weights {
            let pairs = weights.elements_mut().iter_mut().zip(targets);
            pairs.filter(|(_, target)| target.is_none()).for_each(|(weight, _)| *weight = poison());
        }
        let pairs_a_row = match case.x_rows {
            XRows::Token => case.top_k,
            XRows::Pair => 1,
        };
        let rows = self.x.elements_mut().chunks_mut(case.x_stride()).zip(targets.chunks(pairs_a_row));
        rows.filter(|(_, targets)| targets.iter().all(Option::is_none))
            .for_each(|(row, _)| row.fill(poison()));
    }

    pub(crate) fn routing(&self) -> RoutingTensors<'_, Host> {
        RoutingTensors {
            topk_ids: TopkIds::I32(self.topk_ids.view()),
            token_lora: self.token_lora.view(),
            adapter_enabled: match &self.enabled {
                FlagTensor::All => Enabled::All,
                FlagTensor::U8(flags) => Enabled::U8(flags.view()),
                FlagTensor::I32(flags) => Enabled::I32(flags.view()),
            },
            ranks: self.ranks.as_ref().map(Tensor::view),
            expert_map: self.expert_map.as_ref().map(Tensor::view),
        }
    }

    /// The inputs, on the host.
    pub fn operands(&self) -> Operands<'_, Host, T> {
        Operands {
            routing: self.routing(),
            x: self.x.view(),
            a: self.a.iter().map(Tensor::view).collect(),
            b: self.b.iter().map(Tensor::view).collect(),
            topk_weights: self.topk_weights.as_ref().map(Tensor::view),
        }
    }
}

/// The inputs of a case's calls, in some space.
#[derive(Clone, Debug)]
pub struct Operands<'a, S: Space, T> {
    /// Who goes where.
    pub routing: RoutingTensors<'a, S>,
    /// `x`, with the case's row stride.
    pub x: View<'a, S, T>,
    /// S tensors.
    pub a: Vec<View<'a, S, T>>,
    /// S tensors.
    pub b: Vec<View<'a, S, T>>,
    /// Router weights, when the case has them.
    pub topk_weights: Option<View<'a, S, f32>>,
}

impl<S: Space, T: Element> Operands<'_, S, T> {
    /// The whole call, on the operands' own routing.
    pub fn forward<'c>(&'c self, case: &Case, out: ViewMut<'c, S, T>) -> Forward<'c, S, T> {
        Forward {
            tokens: case.tokens,
            routing: self.routing.into(),
            x: Rows { data: self.x, stride: Some(case.x_stride()), index: None },
            weights: Weights::Stacked { a: &self.a, b: &self.b },
            topk_weights: self.topk_weights,
            out: RowsMut { data: out, stride: Some(case.out_stride()), index: None },
            offset: case.offset,
            order: SliceOrder::InOrder,
            accumulate: case.accumulate,
        }
    }

    /// The first half of the call.
    pub fn shrink<'c>(&'c self, case: &Case, h: ViewMut<'c, S, T>) -> Shrink<'c, S, T> {
        Shrink {
            tokens: case.tokens,
            routing: self.routing.into(),
            x: Rows { data: self.x, stride: Some(case.x_stride()), index: None },
            a: Factor::Stacked(&self.a),
            h,
        }
    }

    /// The second half of the call.
    pub fn expand<'c>(&'c self, case: &Case, h: View<'c, S, T>, out: ViewMut<'c, S, T>) -> Expand<'c, S, T> {
        Expand {
            tokens: case.tokens,
            routing: self.routing.into(),
            h,
            b: Factor::Stacked(&self.b),
            topk_weights: self.topk_weights,
            out: RowsMut { data: out, stride: Some(case.out_stride()), index: None },
            offset: case.offset,
            order: SliceOrder::InOrder,
            accumulate: case.accumulate,
        }
    }
}

/// `global_experts` ids a token chooses among; distinct ones as far as there are enough.
fn expert_ids(case: &Case, rng: &mut StdRng) -> Vec<i32> {
    let experts = case.global_experts.unwrap_or(case.experts);
    let mut popular: Vec<i32> = (0..experts as i32).collect();
    popular.shuffle(rng);
    let mut choices = Vec::with_capacity(case.tokens * case.top_k);
    for _ in 0..case.tokens {
        let first = choices.len();
        let distinct = case.top_k.min(experts);
        match case.routing {
            Experts::One => choices.resize(first + distinct, popular[0]),
            Experts::Uniform | Experts::OutOfRange => {
                choices.extend(index::sample(rng, experts, distinct).iter().map(|i| popular[i]));
            }
            Experts::Zipf => {
                let share = |i: usize| 1.0 / (i + 1) as f64;
                let sample = index::sample_weighted(rng, experts, share, distinct).expect("positive shares");
                choices.extend(sample.iter().map(|i| popular[i]));
            }
        }
        while choices.len() < first + case.top_k {
            choices.push(choices[first + (choices.len() - first) % distinct]);
        }
    }
    if case.routing == Experts::OutOfRange {
        spoil(&mut choices, &no_ids(experts), rng);
    }
    choices
}

/// Local ids of the global experts: E of them are here, in some order.
fn expert_map(case: &Case, rng: &mut StdRng) -> Option<Vec<i32>> {
    let mut map: Vec<i32> = (0..case.global_experts? as i32).collect();
    map.iter_mut().filter(|id| **id >= case.experts as i32).for_each(|id| *id = -1);
    map.shuffle(rng);
    if case.routing == Experts::OutOfRange {
        spoil(&mut map, &no_ids(case.experts), rng);
    }
    Some(map)
}

/// A slot, or none, for each token.
fn lora_slots(case: &Case, rng: &mut StdRng) -> Vec<i32> {
    let slots = case.slots as i32;
    let sequence = case.tokens.div_ceil(SEQUENCES).max(1);
    let mut loras: Vec<i32> = (0..case.tokens).map(|_| rng.random_range(-1..slots)).collect();
    match case.loras {
        Loras::Random => {}
        Loras::Sequences => loras.chunks_mut(sequence).for_each(|run| run.fill(rng.random_range(0..slots))),
        Loras::One => loras.fill(slots - 1),
        Loras::None => loras.fill(-1),
        Loras::OutOfRange => spoil(&mut loras, &no_ids(case.slots), rng),
    }
    loras
}

/// Most slots, in any order, one of them twice, and what is no slot.
fn listed_slots(case: &Case) -> Vec<i32> {
    let rng = &mut StdRng::seed_from_u64(!case.seed);
    let slots: Vec<i32> = (0..case.slots as i32).filter(|_| !rng.random_ratio(1, 8)).collect();
    let mut ids = slots.clone();
    ids.extend(slots.first());
    ids.extend(no_ids(case.slots));
    ids.shuffle(rng);
    ids
}

/// Replaces about half of `ids` by some of `by`.
fn spoil(ids: &mut [i32], by: &[i32], rng: &mut StdRng) {
    for id in ids {
        if rng.random() {
            *id = by[rng.random_range(0..by.len())];
        }
    }
}

fn flags(case: &Case, rng: &mut StdRng) -> FlagTensor {
    const ON: [i32; 3] = [1, 2, -1];
    let mut flag = || if rng.random_ratio(1, 4) { 0 } else { ON[rng.random_range(0..ON.len())] };
    let flags: Vec<i32> = (0..case.slots).map(|_| flag()).collect();
    match case.enabled {
        Flags::All => FlagTensor::All,
        Flags::U8 => {
            let bytes: Vec<u8> = flags.iter().map(|&flag| flag as u8).collect();
            FlagTensor::U8(Tensor::new("adapter_enabled", &bytes, case.misaligned))
        }
        Flags::I32 => FlagTensor::I32(Tensor::new("adapter_enabled", &flags, case.misaligned)),
    }
}

fn rank_values<S: Space>(case: &Case, rng: &mut StdRng) -> Option<Vec<i32>> {
    let max = case.max_rank as i32;
    let on_host = TypeId::of::<S>() == TypeId::of::<Host>();
    let wild = [0, max, max + 1, i32::MAX, -1, i32::MIN];
    let mut rank = || match case.ranks {
        Ranks::OutOfRange if on_host => wild[rng.random_range(0..wild.len())].min(max),
        Ranks::OutOfRange => wild[rng.random_range(0..wild.len())],
        Ranks::Mixed | Ranks::Max => rng.random_range(1..=max),
    };
    let ranks = (0..case.slots).map(|_| rank()).collect();
    (case.ranks != Ranks::Max).then_some(ranks)
}

/// The rank in use of each matrix of a slice; `None` where no pair uses the matrix.
fn ranks_in_use(case: &Case, targets: &[Option<Target>], experts: ExpertWeights) -> Vec<Option<usize>> {
    let a_slot = match experts {
        ExpertWeights::PerExpert => case.experts,
        ExpertWeights::Shared => 1,
    };
    let mut ranks = vec![None; case.slots * a_slot];
    for target in targets.iter().flatten() {
        ranks[target.slot * a_slot + target.expert % a_slot] = Some(target.rank);
    }
    ranks
}

/// One slice of `a`.
fn weights_a<T: Element>(case: &Case, targets: &[Option<Target>], normals: &Normals, seed: u64) -> Tensor<T> {
    let ranks = ranks_in_use(case, targets, case.a_experts);
    let matrix = case.max_rank * case.in_dim;
    let scale = 1.0 / (case.in_dim as f32).sqrt();
    let mut a =
        Tensor::poisoned("a", [ranks.len() * case.max_rank, case.in_dim, case.in_dim], case.misaligned);
    a.elements_mut().par_chunks_mut(matrix).zip(ranks).enumerate().for_each(|(i, (matrix, rank))| {
        normals.fill(&mut matrix[..rank.unwrap_or(0) * case.in_dim], scale, seed ^ i as u64);
    });
    a
}

/// One slice of `b`.
fn weights_b<T: Element>(
    case: &Case,
    out_dim: usize,
    targets: &[Option<Target>],
    normals: &Normals,
    seed: u64,
) -> Tensor<T> {
    let ranks = ranks_in_use(case, targets, case.b_experts);
    let matrix = out_dim * case.max_rank;
    let mut b = Tensor::poisoned("b", [ranks.len() * out_dim, case.max_rank, case.max_rank], case.misaligned);
    b.elements_mut().par_chunks_mut(matrix).zip(ranks).enumerate().for_each(|(i, (matrix, rank))| {
        let rank = rank.unwrap_or(0);
        let scale = 1.0 / (rank.max(1) as f32).sqrt();
        for (n, row) in matrix.chunks_mut(case.max_rank).enumerate() {
            normals.fill(&mut row[..rank], scale, seed ^ (i * out_dim + n) as u64);
        }
    });
    b
}

/// Normal deviates by the hundred million: draws from a pool of draws.
struct Normals {
    pool: Vec<f32>,
}

impl Normals {
    /// Bits of an index into the pool: 16 KiB of f32, which stay in the L1 cache.
    const INDEX_BITS: u32 = 12;

    fn new(rng: &mut StdRng) -> Self {
        Normals { pool: rng.sample_iter(StandardNormal).take(1 << Self::INDEX_BITS).collect() }
    }

    fn fill<T: Element>(&self, values: &mut [T], scale: f32, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        for values in values.chunks_mut((u64::BITS / Self::INDEX_BITS) as usize) {
            let mut bits = rng.next_u64();
            for value in values {
                *value = T::from_f32(scale * self.pool[bits as usize % self.pool.len()]);
                bits >>= Self::INDEX_BITS;
            }
        }
    }
}
