//! The calls that are timed: of well-known models, or random ones.

use crate::measure::{Choice, Workload};
use crate::models::{GPT_OSS_20B, MIXTRAL_8X7B, Model, OLMOE_1B, Op, QWEN3_30B};
use moe_lora::{DType, Projection, ProjectionSizes, XRows};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// A call, and what tables call it.
#[derive(Clone, Copy)]
pub struct Case {
    /// The model, or none.
    pub name: &'static str,
    /// The projection.
    pub op: Op,
    /// The call.
    pub workload: Workload,
}

/// Those of well-known models.
pub fn of_models(dtype: DType, split: bool) -> moe_lora::Result<Vec<Case>> {
    // Model, projection, rank that weights are allocated for, rank of the adapters, adapters, tokens.
    type Row = (Model, Op, usize, usize, usize, &'static [usize]);
    let rows: &[Row] = &[
        (QWEN3_30B, Op::W13, 64, 64, 2, &[1, 4, 16, 80, 256, 1024, 4096, 16384]),
        (QWEN3_30B, Op::W13, 16, 16, 2, &[80, 2048]),
        (QWEN3_30B, Op::W2, 64, 64, 2, &[1, 16, 80, 1024, 4096, 16384]),
        (GPT_OSS_20B, Op::W13, 32, 32, 4, &[64, 2048]),
        (OLMOE_1B, Op::W13, 16, 16, 8, &[64]),
        // Few segments, whose tiles blocks share.
        (MIXTRAL_8X7B, Op::W13, 64, 64, 2, &[128, 256, 512, 1024, 2048, 4096, 8192]),
        (MIXTRAL_8X7B, Op::W2, 64, 64, 2, &[512, 1024, 2048, 4096, 8192]),
        (GPT_OSS_20B, Op::W13, 32, 32, 2, &[2048, 4096]),
        (GPT_OSS_20B, Op::W2, 32, 32, 2, &[2048, 4096]),
        (MIXTRAL_8X7B, Op::W13, 64, 64, 2, &[12288, 16384]),
        // One adapter: segments half as many, cut evenly where full tiles would have begun a wave.
        (QWEN3_30B, Op::W13, 64, 64, 1, &[2048, 4096, 8192]),
        (QWEN3_30B, Op::W2, 64, 64, 1, &[2048, 4096]),
        (OLMOE_1B, Op::W13, 64, 64, 1, &[1024, 2048, 4096]),
        (OLMOE_1B, Op::W2, 64, 64, 1, &[192, 384, 2048, 4096]),
        (MIXTRAL_8X7B, Op::W13, 64, 64, 1, &[8192]),
        (GPT_OSS_20B, Op::W13, 32, 32, 1, &[8192]),
        // Large ranks, whose products are much of the work.
        (QWEN3_30B, Op::W13, 128, 128, 2, &[1024, 16384]),
        (QWEN3_30B, Op::W2, 128, 128, 2, &[1024, 16384]),
        (QWEN3_30B, Op::W13, 256, 256, 2, &[1024, 16384]),
        (QWEN3_30B, Op::W2, 256, 256, 2, &[1024, 16384]),
        // Small adapters, and the same beside a large one that needs a large allocation.
        (QWEN3_30B, Op::W13, 8, 8, 2, &[80, 1024]),
        (QWEN3_30B, Op::W13, 128, 8, 2, &[80, 1024]),
        // Dense layers: few segments of many rows, and small weights.
        (QWEN3_30B, Op::Qkv, 64, 64, 2, &[1, 16, 80, 256, 1024, 8192]),
        (QWEN3_30B, Op::O, 64, 64, 2, &[1, 16, 80, 256, 1024, 8192]),
    ];
    let mut cases = Vec::new();
    for &(model, op, max_rank, rank, slots, tokens) in rows {
        let projection = model.projection(op, max_rank, slots, dtype)?;
        let weighted = op == Op::W2;
        cases.extend(tokens.iter().map(|&tokens| {
            let workload =
                Workload { projection, tokens, rank, weighted, split, table: false, choice: Choice::Uniform };
            Case { name: model.name, op, workload }
        }));
    }
    Ok(cases)
}

/// Experts that layers have, and that a token chooses.
const EXPERTS: [usize; 9] = [8, 16, 32, 40, 60, 64, 128, 160, 256];
const TOP_K: [usize; 5] = [1, 2, 4, 6, 8];
/// Ranks of adapters: more often those that are trained most.
const RANKS: [usize; 14] = [8, 8, 16, 16, 16, 24, 32, 32, 48, 64, 64, 96, 128, 256];
/// Adapter slots.
const SLOTS: [usize; 8] = [1, 1, 2, 2, 3, 4, 8, 16];
/// Widths of a token and of an expert, in 64s.
const HIDDEN: [f64; 2] = [16.0, 112.0];
const INTERMEDIATE: [f64; 2] = [4.0, 224.0];
/// Tokens.
const TOKENS: [f64; 2] = [1.0, 16_384.0];
/// Most bytes of a call's weights, and of its activations.
const MOST_WEIGHTS: usize = 1_200_000_000;
const MOST_ACTIVATIONS: usize = 300_000_000;

/// A number between two, its logarithm evenly spread.
fn log_uniform(rng: &mut StdRng, [from, to]: [f64; 2]) -> usize {
    rng.random_range(from.ln()..=to.ln()).exp().round() as usize
}

fn one_of<T: Copy>(rng: &mut StdRng, values: &[T]) -> T {
    *values.choose(rng).expect("there are some")
}

/// A random call of the kinds that engines make: a seed is one call, always the same.
pub fn random(seed: u64) -> Case {
    let rng = &mut StdRng::seed_from_u64(seed);
    loop {
        let op = one_of(rng, &[Op::W13, Op::W2]);
        let dtype = one_of(rng, &[DType::Bf16, DType::Bf16, DType::Bf16, DType::F16]);
        let (experts, top_k) = (one_of(rng, &EXPERTS), one_of(rng, &TOP_K));
        let (slots, max_rank) = (one_of(rng, &SLOTS), one_of(rng, &RANKS));
        let hidden = 64 * log_uniform(rng, HIDDEN);
        let intermediate = 64 * log_uniform(rng, INTERMEDIATE);
        let tokens = log_uniform(rng, TOKENS);
        let choice = one_of(rng, &[Choice::Uniform, Choice::Uniform, Choice::Uniform, Choice::Zipf]);
        // One call in eight has small adapters in an allocation for large ones.
        let rank = if rng.random_range(0..8) == 0 { max_rank.min(8) } else { max_rank };
        let model = Model { name: "random", hidden, intermediate, experts, top_k, attention: [0; 2] };
        let Ok(projection) = model.projection(op, max_rank, slots, dtype) else { continue };
        let ProjectionSizes { in_dim, out_dims, x_rows, .. } = *projection.sizes();
        let weights = slots * experts * max_rank * (out_dims.len() * in_dim + out_dims.total()) * DType::SIZE;
        let rows = if x_rows == XRows::Pair { tokens * top_k } else { tokens };
        let activations = (rows * in_dim + tokens * top_k * out_dims.total()) * DType::SIZE;
        if weights > MOST_WEIGHTS || activations > MOST_ACTIVATIONS {
            continue;
        }
        let weighted = op == Op::W2;
        let workload = Workload { projection, tokens, rank, weighted, split: false, table: false, choice };
        return Case { name: model.name, op, workload };
    }
}

/// The layer of [`route`](super::route)'s calls.
pub fn of_routes() -> moe_lora::Result<Projection> {
    QWEN3_30B.projection(Op::W13, 64, 2, DType::Bf16)
}
