//! Where a planned call's tensors are: what the parameter blocks of its launches are made from.

use crate::plan::Problem;
use crate::plan::scratch::Parts;
use crate::projection::XRows;
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{Divider, MAX_SLICES};

/// The addresses of a checked call's tensors, apart from its routing; null where the stage has none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    /// `[T or P, K]`.
    pub x: Global<u16>,
    /// S of `[L, E or 1, R, K]`.
    pub a: [Global<u16>; MAX_SLICES],
    /// `[S, P, R]`, the caller's: written by [`Stage::Shrink`](super::Stage::Shrink), read by
    /// [`Stage::Expand`](super::Stage::Expand).
    pub h: Global<u16>,
    /// S of `[L, E or 1, N, R]`.
    pub b: [Global<u16>; MAX_SLICES],
    /// `[P, ≥ S·N]`, from the first column that the call writes.
    pub out: Global<u16>,
    /// `[P]`, or null for 1.
    pub topk_weights: Global<f32>,
    /// Whether the call adds to `out`.
    pub accumulate: bool,
}

impl Operands {
    /// No tensors.
    pub const NONE: Self = Operands {
        x: Global::NULL,
        a: [Global::NULL; MAX_SLICES],
        h: Global::NULL,
        b: [Global::NULL; MAX_SLICES],
        out: Global::NULL,
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

    /// P over this gives the row of x.
    pub fn x_row(&self) -> Divider {
        let sizes = self.problem.sizes();
        Divider::new(match sizes.x_rows {
            XRows::Token => sizes.top_k as u32,
            XRows::Pair => 1,
        })
    }
}
