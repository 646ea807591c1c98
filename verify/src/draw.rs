//! What a case's seed decides: ids, flags, ranks, indices and weights.

use crate::case::{Case, Experts, Flags, Indexed, Loras, Ranks};
use crate::data::FlagTensor;
use crate::tensor::Tensor;
use moe_lora::dtype::Element;
use moe_lora::projection::ExpertWeights;
use moe_lora::reference::Target;
use moe_lora::tensor::{Host, Space};
use rand::rngs::{SmallRng, StdRng};
use rand::seq::{SliceRandom, index};
use rand::{Rng, RngCore, SeedableRng};
use rand_distr::StandardNormal;
use rayon::prelude::*;
use std::any::TypeId;

/// Tokens of a batch belong to this many sequences, as in vLLM's tests.
const SEQUENCES: usize = 10;

/// Ids that are not below `limit`.
pub(crate) fn no_ids(limit: usize) -> [i32; 6] {
    [-1, -2, i32::MIN, limit as i32, limit as i32 + 1, i32::MAX]
}

/// `global_experts` ids a token chooses among; distinct ones as far as there are enough.
pub(crate) fn expert_ids(case: &Case, rng: &mut StdRng) -> Vec<i32> {
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
pub(crate) fn expert_map(case: &Case, rng: &mut StdRng) -> Option<Vec<i32>> {
    let mut map: Vec<i32> = (0..case.global_experts? as i32).collect();
    map.iter_mut().filter(|id| **id >= case.experts as i32).for_each(|id| *id = -1);
    map.shuffle(rng);
    if case.routing == Experts::OutOfRange {
        spoil(&mut map, &no_ids(case.experts), rng);
    }
    Some(map)
}

/// A slot, or none, for each token.
pub(crate) fn lora_slots(case: &Case, rng: &mut StdRng) -> Vec<i32> {
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
    // A slot that is no token's: whoever reads it goes wrong.
    loras.extend((0..case.lora_padding).map(|_| slots - 1));
    loras
}

/// The ids in 64 bits; of those that are none about half become such as 32 bits would make one of.
pub(crate) fn wide_ids(case: &Case, ids: &[i32]) -> Vec<i64> {
    let rng = &mut StdRng::seed_from_u64(!case.seed ^ 0x1d5);
    let experts = case.global_experts.unwrap_or(case.experts) as i64;
    let mut wide = |id: i64| match rng.random_range(0..6) {
        0 => (1 << 32) + rng.random_range(0..experts),
        1 => rng.random_range(0..experts) - (1 << 32),
        2 => i64::MAX,
        _ => id,
    };
    ids.iter()
        .map(|&id| i64::from(id))
        .map(|id| if (0..experts).contains(&id) { id } else { wide(id) })
        .collect()
}

/// Where an index leads.
pub(crate) struct Places {
    rows: Vec<i32>,
    rng: StdRng,
    out_of_range: bool,
}

/// An index over `rows` rows; `None` when there is none. `tensor` tells those of a case apart.
pub(crate) fn index(case: &Case, kind: Indexed, rows: usize, tensor: u8) -> Option<Places> {
    let mut rng = StdRng::seed_from_u64(case.seed.rotate_left(8) ^ u64::from(tensor));
    let mut places: Vec<i32> = (0..rows as i32).collect();
    places.shuffle(&mut rng);
    (kind != Indexed::None).then_some(Places { rows: places, rng, out_of_range: kind == Indexed::OutOfRange })
}

impl Places {
    /// A row of its own for each `source`.
    pub fn row(&self, source: usize) -> i32 {
        self.rows[source]
    }

    /// Leads some to another's row.
    pub fn repeat(&mut self, index: &mut [i32]) {
        for row in index {
            if self.rng.random_ratio(1, 8) {
                *row = self.rng.random_range(0..self.rows.len() as i32);
            }
        }
    }

    /// Makes about a third no row, when they are to be out of range.
    pub fn spoil(&mut self, index: &mut [i32]) {
        let no_rows = no_ids(self.rows.len());
        for row in index.iter_mut().filter(|_| self.out_of_range) {
            if self.rng.random_ratio(1, 3) {
                *row = no_rows[self.rng.random_range(0..no_rows.len())];
            }
        }
    }
}

/// Most slots, in any order, one of them twice, and what is no slot.
pub(crate) fn listed_slots(case: &Case) -> Vec<i32> {
    let rng = &mut StdRng::seed_from_u64(!case.seed);
    let slots: Vec<i32> = (0..case.slots as i32).filter(|_| !rng.random_ratio(1, 8)).collect();
    let mut ids = slots.clone();
    ids.extend(slots.first());
    ids.extend(no_ids(case.slots));
    ids.shuffle(rng);
    ids
}

/// Replaces about half of `ids` by some of `by`.
pub(crate) fn spoil(ids: &mut [i32], by: &[i32], rng: &mut StdRng) {
    for id in ids {
        if rng.random() {
            *id = by[rng.random_range(0..by.len())];
        }
    }
}

pub(crate) fn flags(case: &Case, rng: &mut StdRng) -> FlagTensor {
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

pub(crate) fn rank_values<S: Space>(case: &Case, rng: &mut StdRng) -> Option<Vec<i32>> {
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
pub(crate) fn ranks_in_use(
    case: &Case,
    targets: &[Option<Target>],
    experts: ExpertWeights,
) -> Vec<Option<usize>> {
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
pub(crate) fn weights_a<T: Element>(
    case: &Case,
    targets: &[Option<Target>],
    normals: &Normals,
    seed: u64,
) -> Tensor<T> {
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
pub(crate) fn weights_b<T: Element>(
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
pub(crate) struct Normals {
    pool: Vec<f32>,
}

impl Normals {
    /// Bits of an index into the pool: 16 KiB of f32, which stay in the L1 cache.
    const INDEX_BITS: u32 = 12;

    pub(crate) fn new(rng: &mut StdRng) -> Self {
        Normals { pool: rng.sample_iter(StandardNormal).take(1 << Self::INDEX_BITS).collect() }
    }

    pub(crate) fn fill<T: Element>(&self, values: &mut [T], scale: f32, seed: u64) {
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
