//! A call's inputs on the host, and what it computes, in float64.

use super::Workload;
use moe_lora::plan::DeviceLimits;
use moe_lora::{DType, Element, XRows};
use rand::rngs::StdRng;
use rand::seq::index::{sample, sample_weighted};
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

/// 16-bit operations a microsecond that a large matrix product reaches on an H100 or H200.
const OPERATIONS: f64 = 790e6;
/// Sequences of a batch; each has one adapter.
const SEQUENCES: usize = 16;
/// Normal values that tensors are made of, over and over; a prime, so that no two rows are alike.
const POOL: usize = 1_000_003;

/// How tokens choose their experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// Each expert as often as any other.
    #[default]
    Uniform,
    /// By Zipf's law: the n-th expert 1 / n times as often as the first.
    Zipf,
}

/// A call's inputs.
pub struct Inputs<T> {
    /// [T, k].
    pub topk_ids: Vec<i32>,
    /// [T, k].
    pub topk_weights: Vec<f32>,
    /// [T].
    pub token_lora: Vec<i32>,
    /// [T, K], or [P, K].
    pub x: Vec<T>,
    /// Where in the pool each slice of `a`, then of `b`, begins.
    starts: Vec<usize>,
    pool: Vec<f32>,
}

/// The factor of a tensor whose sums have so many terms.
fn scale(terms: usize) -> f32 {
    (terms as f32).powf(-0.5)
}

impl<T: Element> Inputs<T> {
    /// Random ones.
    pub fn new(&Workload { projection, tokens, choice, .. }: &Workload, seed: u64) -> Self {
        let s = projection.sizes();
        let rng = &mut StdRng::seed_from_u64(seed);
        let pool: Vec<f32> = (0..POOL).map(|_| rng.sample(StandardNormal)).collect();
        let x_rows = match s.x_rows {
            XRows::Token => tokens,
            XRows::Pair => tokens * s.top_k,
        };
        let start = rng.random_range(0..POOL);
        let values = pool.iter().cycle().skip(start).take(x_rows * s.in_dim);
        let x = values.map(|value| T::from_f32(*value)).collect();
        // Which expert is how popular is drawn too.
        let popular = sample(rng, s.experts, s.experts).into_vec();
        let mut experts = || match choice {
            Choice::Uniform => sample(rng, s.experts, s.top_k),
            Choice::Zipf => sample_weighted(rng, s.experts, |rank| 1.0 / (rank + 1) as f64, s.top_k)
                .expect("as many weights as experts"),
        };
        let topk_ids = (0..tokens).flat_map(|_| experts()).map(|expert| popular[expert] as i32).collect();
        let topk_weights = (0..tokens * s.top_k).map(|_| rng.random_range(0.05..1.0)).collect();
        // Whole sequences share an adapter.
        let run = tokens.div_ceil(tokens.min(SEQUENCES));
        let token_lora = (0..tokens).map(|t| (t / run % s.slots) as i32).collect();
        let starts = (0..2 * s.out_dims.len()).map(|_| rng.random_range(0..POOL)).collect();
        Inputs { topk_ids, topk_weights, token_lora, x, starts, pool }
    }

    /// Slices of `a`, then of `b`.
    pub fn weights(&self, &Workload { projection, .. }: &Workload) -> [Vec<Vec<T>>; 2] {
        let s = projection.sizes();
        let scales = [scale(s.in_dim), scale(s.max_rank)];
        [0, 1].map(|which| {
            let pool: Vec<T> = self.pool.iter().map(|value| T::from_f32(value * scales[which])).collect();
            let starts = &self.starts[which * s.out_dims.len()..][..s.out_dims.len()];
            let slice = |(slice, start): (usize, &usize)| {
                let dim = [s.in_dim, s.out_dims.get(slice)][which];
                let elements = s.slots * s.experts * s.max_rank * dim;
                let mut slice = Vec::with_capacity(elements);
                let mut start = *start;
                while slice.len() < elements {
                    let count = (POOL - start).min(elements - slice.len());
                    slice.extend_from_slice(&pool[start..][..count]);
                    start = 0;
                }
                slice
            };
            starts.iter().enumerate().map(slice).collect()
        })
    }

    /// `count` elements of slice `slice` of `a` (0) or `b` (1), from element `first` on.
    fn row(
        &self,
        which: usize,
        slice: usize,
        slices: usize,
        first: usize,
        count: usize,
        scale: f32,
    ) -> Vec<f64> {
        let start = (self.starts[which * slices + slice] + first) % POOL;
        let values = self.pool.iter().cycle().skip(start).take(count);
        values.map(|value| T::from_f32(value * scale).to_f32().into()).collect()
    }

    /// Which (slot, expert) a pair uses.
    fn segment(&self, pair: usize, top_k: usize) -> (usize, usize) {
        (self.token_lora[pair / top_k] as usize, self.topk_ids[pair] as usize)
    }

    /// The experts that tokens have chosen, in order, each once.
    pub fn experts(&self) -> Vec<i32> {
        let mut experts = self.topk_ids.clone();
        experts.sort_unstable();
        experts.dedup();
        experts
    }

    /// (slot, expert) with a pair or more.
    pub fn segments(&self, top_k: usize) -> usize {
        let mut segments: Vec<_> = (0..self.topk_ids.len()).map(|pair| self.segment(pair, top_k)).collect();
        segments.sort_unstable();
        segments.dedup();
        segments.len()
    }

    /// One pair's delta, in float64.
    pub fn delta(&self, &Workload { projection, rank, weighted, .. }: &Workload, pair: usize) -> Vec<f64> {
        let s = projection.sizes();
        let (slot, expert) = self.segment(pair, s.top_k);
        let matrix = slot * s.experts + expert;
        let row = if s.x_rows == XRows::Pair { pair } else { pair / s.top_k };
        let dot = |v: &[f64], w: &[f64]| v.iter().zip(w).map(|(v, w)| v * w).sum::<f64>();
        let x: Vec<f64> = self.x[row * s.in_dim..][..s.in_dim].iter().map(|v| v.to_f32().into()).collect();
        let weight = if weighted { f64::from(self.topk_weights[pair]) } else { 1.0 };
        (0..s.out_dims.len())
            .flat_map(|slice| {
                let [a, b] = [(0, s.in_dim), (1, s.out_dims.get(slice))].map(|(which, dim)| {
                    let (len, terms) = (s.max_rank * dim, [s.in_dim, s.max_rank][which]);
                    self.row(which, slice, s.out_dims.len(), matrix * len, len, scale(terms))
                });
                let h: Vec<f64> = a.chunks(s.in_dim).take(rank).map(|row| dot(row, &x)).collect();
                b.chunks(s.max_rank).map(|row| weight * dot(&row[..rank], &h)).collect::<Vec<_>>()
            })
            .collect()
    }

    /// Bytes of weights that a call touches.
    pub fn touched_bytes(&self, &Workload { projection, rank, .. }: &Workload) -> usize {
        let s = projection.sizes();
        self.segments(s.top_k) * rank * (s.out_dims.len() * s.in_dim + s.out_dims.total()) * DType::SIZE
    }

    /// Microseconds that no implementation can go below on a device of these limits.
    pub fn floor(&self, workload: &Workload, limits: &DeviceLimits) -> f64 {
        let &Workload { projection, rank, .. } = workload;
        let s = projection.sizes();
        let pairs = self.topk_ids.len();
        let bytes =
            self.touched_bytes(workload) + (self.x.len() + 2 * pairs * s.out_dims.total()) * DType::SIZE;
        let operations = 2 * pairs * rank * (s.out_dims.len() * s.in_dim + s.out_dims.total());
        (bytes as f64 / limits.streamed()).max(operations as f64 / OPERATIONS)
    }
}
