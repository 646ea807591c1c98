//! The layers of well-known models.

use clap::ValueEnum;
use moe_lora::{DType, ExpertWeights, OutDims, Projection, ProjectionSizes, XRows};
use std::fmt;

/// A model's mixture-of-experts layer.
#[derive(Clone, Copy)]
pub struct Model {
    pub name: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
}

/// A projection of such a layer.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// Gate and up: two slices, a row of x a token
    W13,
    /// Down: one slice, a row of x a pair, weighted
    W2,
}

pub const QWEN3_30B: Model =
    Model { name: "qwen3-30b-a3b", hidden: 2048, intermediate: 768, experts: 128, top_k: 8 };
pub const GPT_OSS_20B: Model =
    Model { name: "gpt-oss-20b", hidden: 2880, intermediate: 2880, experts: 32, top_k: 4 };
pub const OLMOE_1B: Model =
    Model { name: "olmoe-1b-7b", hidden: 2048, intermediate: 1024, experts: 64, top_k: 8 };
pub const MIXTRAL_8X7B: Model =
    Model { name: "mixtral-8x7b", hidden: 4096, intermediate: 14336, experts: 8, top_k: 2 };

/// All of them.
pub const MODELS: [Model; 4] = [QWEN3_30B, GPT_OSS_20B, OLMOE_1B, MIXTRAL_8X7B];

impl Model {
    /// A projection of its layer, with `slots` adapters of rank `rank`.
    pub fn projection(
        &self,
        op: Op,
        rank: usize,
        slots: usize,
        dtype: DType,
    ) -> moe_lora::Result<Projection> {
        let &Model { hidden, intermediate, experts, top_k, .. } = self;
        let (in_dim, out_dim, slices, x_rows) = match op {
            Op::W13 => (hidden, intermediate, 2, XRows::Token),
            Op::W2 => (intermediate, hidden, 1, XRows::Pair),
        };
        Projection::new(ProjectionSizes {
            dtype,
            top_k,
            experts,
            slots,
            max_rank: rank,
            in_dim,
            out_dims: OutDims::uniform(out_dim, slices),
            x_rows,
            a_experts: ExpertWeights::PerExpert,
            b_experts: ExpertWeights::PerExpert,
        })
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::W13 => "w13",
            Op::W2 => "w2",
        })
    }
}
