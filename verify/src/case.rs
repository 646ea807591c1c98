use moe_lora::call::SliceOrder;
use moe_lora::dtype::DType;
use moe_lora::error::Result;
use moe_lora::projection::{ExpertWeights, OutDims, Projection, ProjectionSizes, XRows};
use serde::{Deserialize, Serialize};
use std::fmt;

/// One call, described: shapes, modes, who goes where, and the seed of everything else.
///
/// Its JSON form may leave out whatever is as in [`Case::default`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Case {
    /// Type of activations and weights.
    pub dtype: DType,
    /// T.
    pub tokens: usize,
    /// k.
    pub top_k: usize,
    /// E.
    pub experts: usize,
    /// Length of `expert_map`; `None`: there is no map, and E experts are all there are.
    pub global_experts: Option<usize>,
    /// L.
    pub slots: usize,
    /// R.
    pub max_rank: usize,
    /// K.
    pub in_dim: usize,
    /// N of each of the S slices.
    pub out_dims: OutDims,
    /// What a row of `x` belongs to.
    pub x_rows: XRows,
    /// Whether `a` has a matrix an expert.
    pub a_experts: ExpertWeights,
    /// Whether `b` has a matrix an expert.
    pub b_experts: ExpertWeights,
    /// Whether weights are named by address, each slot's and slice's own.
    pub table: bool,
    /// Whether an index names the rows of `x`.
    pub x_index: Indexed,
    /// `topk_ids`.
    pub routing: Experts,
    /// Of which type they are. Those of no type are a dense layer's: E = 1, k = 1 and no `global_experts`.
    pub ids: IdsKind,
    /// `token_lora`.
    pub loras: Loras,
    /// Elements of `token_lora` less T.
    pub lora_padding: usize,
    /// `adapter_enabled`.
    pub enabled: Flags,
    /// `ranks`.
    pub ranks: Ranks,
    /// Whether deltas are multiplied by `topk_weights`.
    pub routed_weight: bool,
    /// Whether deltas are added to `out`, or overwrite it.
    pub accumulate: bool,
    /// Whether an index names the rows of `out`.
    pub out_index: Indexed,
    /// First column of `out` that is written.
    pub offset: usize,
    /// Where the columns of the slices are, from there on.
    pub order: SliceOrder,
    /// Row stride of `x` less K.
    pub x_padding: usize,
    /// Row stride of `out` less offset + Σ N_s.
    pub out_padding: usize,
    /// One call, or the two halves.
    pub form: Form,
    /// The call is made on a route in vLLM's form too, in blocks of this many pairs; blocks that are too
    /// small for a route are only made.
    pub block_size: Option<usize>,
    /// Whether every tensor starts one element off a 16-byte boundary.
    pub misaligned: bool,
    /// Seed of all values.
    pub seed: u64,
}

/// How tokens choose experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Experts {
    /// All experts alike.
    Uniform,
    /// Few experts have most of the tokens.
    Zipf,
    /// Every choice of every token is the same expert.
    One,
    /// About half of the ids, and of the values of `expert_map`, are no expert: negative, just past
    /// the end, and the extremes of i32.
    OutOfRange,
}

/// How tokens come by adapter slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loras {
    /// Runs of tokens share a slot, as the sequences of a batch do.
    Sequences,
    /// Each token has any slot, or none.
    Random,
    /// All tokens have the last slot.
    One,
    /// No token has a slot.
    None,
    /// About half of the slots are none: negative, just past the end, and the extremes of i32.
    OutOfRange,
}

/// The form of `adapter_enabled`. Where there is a tensor, about a quarter of the slots is off, and
/// those that are on say so with any value but zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Flags {
    /// No tensor.
    All,
    /// One byte a slot.
    U8,
    /// One 32-bit integer a slot.
    I32,
}

/// The ranks of the slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ranks {
    /// No tensor: R for all.
    Max,
    /// Any rank from 1 to R.
    Mixed,
    /// Negative, zero, over R and the extremes of i32. On the host, where a rank over R is an error,
    /// R stands in for it.
    OutOfRange,
}

/// The type of `topk_ids`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdsKind {
    /// 32 bits.
    I32,
    /// 64 bits. Of ids that are none some are such as their low 32 bits would be.
    I64,
    /// No tensor.
    None,
}

/// An index of rows. There are a few rows more than pairs need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Indexed {
    /// No tensor: rows are in order.
    None,
    /// Rows in any order. Some pairs share one of `x`, none one of `out`.
    Permuted,
    /// The same, but about a third is no row: negative, just past the end, and the extremes of i32.
    OutOfRange,
}

/// Which calls compute the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// One whole call.
    Forward,
    /// Shrink, then expand.
    Split,
}

impl Default for Case {
    /// A small call of the plainest kind.
    fn default() -> Self {
        Case {
            dtype: DType::Bf16,
            tokens: 16,
            top_k: 2,
            experts: 4,
            global_experts: None,
            slots: 2,
            max_rank: 16,
            in_dim: 64,
            out_dims: OutDims::uniform(64, 1),
            x_rows: XRows::Token,
            a_experts: ExpertWeights::PerExpert,
            b_experts: ExpertWeights::PerExpert,
            table: false,
            x_index: Indexed::None,
            routing: Experts::Uniform,
            ids: IdsKind::I32,
            loras: Loras::Sequences,
            lora_padding: 0,
            enabled: Flags::All,
            ranks: Ranks::Max,
            routed_weight: false,
            accumulate: true,
            out_index: Indexed::None,
            offset: 0,
            order: SliceOrder::InOrder,
            x_padding: 0,
            out_padding: 0,
            form: Form::Forward,
            block_size: None,
            misaligned: false,
            seed: 1,
        }
    }
}

impl Case {
    /// The projection of this call.
    ///
    /// # Errors
    /// As [`Projection::new`].
    pub fn projection(&self) -> Result<Projection> {
        Projection::new(ProjectionSizes {
            dtype: self.dtype,
            top_k: self.top_k,
            experts: self.experts,
            slots: self.slots,
            max_rank: self.max_rank,
            in_dim: self.in_dim,
            out_dims: self.out_dims,
            x_rows: self.x_rows,
            a_experts: self.a_experts,
            b_experts: self.b_experts,
        })
    }

    /// Elements from one row of `x` to the next.
    pub fn x_stride(&self) -> usize {
        self.in_dim + self.x_padding
    }

    /// Columns of a row of `out` up to the last one written: offset + Σ N_s.
    pub fn out_width(&self) -> usize {
        self.offset + self.out_dims.total()
    }

    /// Elements from one row of `out` to the next.
    pub fn out_stride(&self) -> usize {
        self.out_width() + self.out_padding
    }

    /// The command that checks this case again.
    pub fn command(&self) -> String {
        let json = serde_json::to_string(self).expect("a case is plain data");
        format!("moe-lora verify --case '{json}'")
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { dtype, tokens, top_k, experts, slots, max_rank, in_dim, out_dims, .. } = self;
        write!(f, "{dtype} T={tokens} k={top_k} E={experts} L={slots} R={max_rank}")?;
        write!(f, " S={} K={in_dim} N={out_dims}", out_dims.len())?;
        if let Some(global_experts) = self.global_experts {
            write!(f, " of {global_experts} experts")?;
        }
        write!(f, ", {:?}", self.form)?;
        if let Some(block_size) = self.block_size {
            write!(f, ", blocks of {block_size}")?;
        }
        let modes = [
            (self.accumulate, "accumulate"),
            (!self.accumulate, "overwrite"),
            (self.x_rows == XRows::Pair, "x a pair"),
            (self.routed_weight, "weighted"),
            (self.a_experts == ExpertWeights::Shared, "a shared"),
            (self.b_experts == ExpertWeights::Shared, "b shared"),
            (self.offset + self.x_padding + self.out_padding > 0, "strided"),
            (self.misaligned, "misaligned"),
            (self.table, "by address"),
            (self.lora_padding > 0, "token_lora longer"),
        ];
        for (_, mode) in modes.iter().filter(|(on, _)| *on) {
            write!(f, ", {mode}")?;
        }
        for (what, index) in [("x", self.x_index), ("out", self.out_index)] {
            if index != Indexed::None {
                write!(f, ", rows of {what} {index:?}")?;
            }
        }
        if self.order != SliceOrder::InOrder {
            write!(f, ", slices {:?}", self.order)?;
        }
        write!(f, "; experts {:?} {:?}, loras {:?}", self.routing, self.ids, self.loras)?;
        write!(f, ", flags {:?}, ranks {:?}", self.enabled, self.ranks)
    }
}
