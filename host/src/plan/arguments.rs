//! Where a planned call's tensors are: what the parameter blocks of its launches are made from.

use crate::plan::Problem;
use crate::plan::scratch::Parts;
use crate::projection::XRows;
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{AdapterEntry, Divider, MAX_SLICES, PairRows, WeightParams, indexed};

/// The addresses of a checked call's tensors, apart from its routing; null where the stage has none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    /// `[T or P, K]`.
    pub x: Global<u16>,
    /// `[P]` rows of `x`, or null.
    pub x_index: Global<u32>,
    /// `[L, S]` adapters by address, or null.
    pub table: Global<AdapterEntry>,
    /// S of `[L, E or 1, R, K]`, without a table.
    pub a: [Global<u16>; MAX_SLICES],
    /// `[S, P, R]`, the caller's: written by [`Stage::Shrink`](super::Stage::Shrink), read by
    /// [`Stage::Expand`](super::Stage::Expand).
    pub h: Global<u16>,
    /// S of `[L, E or 1, N_s, R]`, without a table.
    pub b: [Global<u16>; MAX_SLICES],
    /// `[P, ≥ Σ N_s]`, from the first column that the call writes.
    pub out: Global<u16>,
    /// `[P]` rows of `out`, or null.
    pub out_index: Global<u32>,
    /// `[P]`, or null for 1.
    pub topk_weights: Global<f32>,
    /// Whether the call adds to `out`.
    pub accumulate: bool,
}

impl Operands {
    /// No tensors.
    pub const NONE: Self = Operands {
        x: Global::NULL,
        x_index: Global::NULL,
        table: Global::NULL,
        a: [Global::NULL; MAX_SLICES],
        h: Global::NULL,
        b: [Global::NULL; MAX_SLICES],
        out: Global::NULL,
        out_index: Global::NULL,
        topk_weights: Global::NULL,
        accumulate: false,
    };
}

/// A planned call, and where all that it uses is.
#[derive(Clone, Copy)]
pub(crate) struct Arguments<'c> {
    pub problem: &'c Problem<'c>,
    pub operands: &'c Operands,
    pub parts: &'c Parts,
}

impl Arguments<'_> {
    /// P.
    pub fn pair_count(&self) -> u32 {
        self.problem.pairs as u32
    }

    /// Which rows belong to a pair.
    pub fn rows(&self) -> PairRows {
        let (layout, sizes) = (self.problem.layout, self.problem.sizes());
        let pairs_a_row = match sizes.x_rows {
            XRows::Token => sizes.top_k as u32,
            XRows::Pair => 1,
        };
        // More rows than an index can name are as good as these.
        let count = |rows: usize| rows.min(1 << 31) as u32;
        let &Operands { x_index, out_index, .. } = self.operands;
        let bit = |index: Global<u32>, which: u32| if index.is_null() { 0 } else { which };
        PairRows {
            indexed: bit(x_index, indexed::X) | bit(out_index, indexed::OUT),
            x_count: count(layout.x_rows),
            x_over: Divider::new(pairs_a_row),
            x_index,
            out_index,
            out_count: count(layout.out_rows),
            reserved: 0,
        }
    }

    /// The adapters.
    pub fn weights(&self) -> WeightParams {
        let &Arguments { problem, operands, .. } = self;
        let sizes = problem.sizes();
        let of_slices = |of: &dyn Fn(usize) -> usize| {
            std::array::from_fn(|slice| if slice < sizes.out_dims.len() { of(slice) as u32 } else { 0 })
        };
        WeightParams {
            table: operands.table,
            a: operands.a,
            b: operands.b,
            out_dims: of_slices(&|slice| sizes.out_dims.get(slice)),
            first_columns: of_slices(&|slice| problem.layout.order.first_column(&sizes.out_dims, slice)),
            in_dim: sizes.in_dim as u32,
            max_rank: sizes.max_rank as u32,
            slices: sizes.out_dims.len() as u32,
            a_experts: problem.projection.a_experts() as u32,
            b_experts: problem.projection.b_experts() as u32,
            has_table: (!operands.table.is_null()).into(),
        }
    }
}
