//! The layers of well-known models: mixtures of experts, and the projections of attention.

use clap::ValueEnum;
use moe_lora::{DType, Projection, ProjectionSizes};
use std::fmt;

/// A model's layer.
#[derive(Clone, Copy)]
pub struct Model {
    pub name: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
    /// Widths of q, and of k and of v; 0 where they do not matter.
    pub attention: [usize; 2],
}

/// A projection of such a layer.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// Gate and up: two slices, a row of x a token
    W13,
    /// Down: one slice, a row of x a pair, weighted
    W2,
    /// q, k and v of attention: a dense layer of three slices of their own widths
    Qkv,
    /// Attention's output: a dense layer
    O,
}

pub const QWEN3_30B: Model = Model {
    name: "qwen3-30b-a3b",
    hidden: 2048,
    intermediate: 768,
    experts: 128,
    top_k: 8,
    attention: [4096, 512],
};
pub const GPT_OSS_20B: Model = Model {
    name: "gpt-oss-20b",
    hidden: 2880,
    intermediate: 2880,
    experts: 32,
    top_k: 4,
    attention: [4096, 512],
};
pub const OLMOE_1B: Model = Model {
    name: "olmoe-1b-7b",
    hidden: 2048,
    intermediate: 1024,
    experts: 64,
    top_k: 8,
    attention: [2048, 2048],
};
pub const MIXTRAL_8X7B: Model = Model {
    name: "mixtral-8x7b",
    hidden: 4096,
    intermediate: 14336,
    experts: 8,
    top_k: 2,
    attention: [4096, 1024],
};

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
        let &Model { hidden, intermediate, experts, top_k, attention: [q, kv], .. } = self;
        let sizes = match op {
            Op::W13 => ProjectionSizes { top_k, experts, ..ProjectionSizes::gate_up(hidden, intermediate) },
            Op::W2 => ProjectionSizes { top_k, experts, ..ProjectionSizes::down(hidden, intermediate) },
            Op::Qkv => ProjectionSizes::dense(hidden, &[q, kv, kv]),
            Op::O => ProjectionSizes::dense(q, &[hidden]),
        };
        Projection::new(ProjectionSizes { dtype, slots, max_rank: rank, ..sizes })
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::W13 => "w13",
            Op::W2 => "w2",
            Op::Qkv => "qkv",
            Op::O => "o",
        })
    }
}
