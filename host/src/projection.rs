//! The shape of one LoRA'd projection of a mixture-of-experts layer.

use crate::dtype::DType;
use crate::error::{Error, Result};
pub use crate::out_dims::OutDims;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a row of `x` belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum XRows {
    /// One row a token, `[T, K]`: gate and up projections (w13).
    Token,
    /// One row a (token, choice) pair, `[T·k, K]`: the down projection (w2).
    Pair,
}

/// Whether the experts of a slot have a matrix each or share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertWeights {
    /// One matrix an expert: `[L, E, …]`.
    PerExpert,
    /// One matrix for all experts of a slot: `[L, 1, …]`.
    Shared,
}

/// The sizes that a [`Projection`] is made from, named as in the operator's contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProjectionSizes {
    /// Type of activations and weights.
    pub dtype: DType,
    /// k: experts chosen per token, at most [`Projection::MAX_TOP_K`].
    pub top_k: usize,
    /// E: experts whose adapters this device holds.
    pub experts: usize,
    /// L: adapter slots resident on the device.
    pub slots: usize,
    /// R: rank that the stacked weights are allocated for.
    pub max_rank: usize,
    /// K: width of a row of `x`.
    pub in_dim: usize,
    /// N of each of the S slices of the output, at most [`Projection::MAX_SLICES`]; 2 for gate and up, 1 for
    /// down.
    pub out_dims: OutDims,
    /// What a row of `x` belongs to.
    pub x_rows: XRows,
    /// Whether `a` has a matrix an expert.
    pub a_experts: ExpertWeights,
    /// Whether `b` has a matrix an expert.
    pub b_experts: ExpertWeights,
}

impl ProjectionSizes {
    /// Gate and up (w13) of experts of width `intermediate` on tokens of width `hidden`: two slices, a row of
    /// `x` a token. Of all else there is one, in bf16, for ranks up to 64: say what differs by
    /// `ProjectionSizes { experts: 128, top_k: 8, ..ProjectionSizes::gate_up(2048, 768) }`.
    pub fn gate_up(hidden: usize, intermediate: usize) -> Self {
        ProjectionSizes {
            dtype: DType::Bf16,
            top_k: 1,
            experts: 1,
            slots: 1,
            max_rank: 64,
            in_dim: hidden,
            out_dims: OutDims::uniform(intermediate, 2),
            x_rows: XRows::Token,
            a_experts: ExpertWeights::PerExpert,
            b_experts: ExpertWeights::PerExpert,
        }
    }

    /// Down (w2) of the same experts: one slice, a row of `x` a pair. All else as for
    /// [`ProjectionSizes::gate_up`].
    pub fn down(hidden: usize, intermediate: usize) -> Self {
        ProjectionSizes {
            in_dim: intermediate,
            out_dims: OutDims::uniform(hidden, 1),
            x_rows: XRows::Pair,
            ..Self::gate_up(hidden, intermediate)
        }
    }

    /// A dense layer: no experts to choose among (E = 1, k = 1), a row of `x` a token, and a slice of each
    /// width of `out_dims`; q, k and v of an attention layer are three slices of one x. All else as for
    /// [`ProjectionSizes::gate_up`]. Too many widths are refused by [`Projection::new`].
    pub fn dense(in_dim: usize, out_dims: &[usize]) -> Self {
        let out_dims = OutDims::new(out_dims).unwrap_or(OutDims::uniform(0, out_dims.len()));
        ProjectionSizes { out_dims, ..Self::gate_up(in_dim, 0) }
    }
}

impl From<Projection> for ProjectionSizes {
    fn from(projection: Projection) -> Self {
        projection.0
    }
}

/// Sizes that have been checked: a `Projection` that exists can be planned for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Projection(ProjectionSizes);

/// Elements of a tensor may be this many at most, so that byte offsets fit 63 bits.
const MAX_ELEMENTS: usize = 1 << 61;
/// A single size may be this large at most: kernels hold sizes in 31 bits.
pub(crate) const MAX_SIZE: usize = i32::MAX as usize;

/// `sizes` multiplied, or an error that names the tensor.
pub(crate) fn elements(tensor: &'static str, sizes: &[usize]) -> Result<usize> {
    sizes
        .iter()
        .try_fold(1usize, |product, &size| product.checked_mul(size))
        .filter(|&product| product <= MAX_ELEMENTS)
        .ok_or_else(|| Error::SizeOverflow { tensor, shape: format!("{sizes:?}") })
}

impl Projection {
    /// Most experts a token may choose.
    pub const MAX_TOP_K: usize = 64;
    /// Most slices of one projection.
    pub const MAX_SLICES: usize = OutDims::MAX_SLICES;
    /// Largest rank that weights may be allocated for.
    pub const MAX_RANK: usize = 1024;

    /// Checks sizes.
    ///
    /// # Errors
    /// [`Error::ZeroSize`] and [`Error::SizeTooLarge`] name the size; [`Error::SizeOverflow`] names
    /// the tensor whose elements cannot be addressed.
    pub fn new(sizes: ProjectionSizes) -> Result<Self> {
        let ProjectionSizes { top_k, experts, slots, max_rank, in_dim, out_dims, .. } = sizes;
        out_dims.check()?;
        let widths = out_dims.as_slice().iter().map(|&width| ("out_dim", width, MAX_SIZE));
        let others = [
            ("top_k", top_k, Self::MAX_TOP_K),
            ("experts", experts, MAX_SIZE),
            ("slots", slots, MAX_SIZE),
            ("max_rank", max_rank, Self::MAX_RANK),
            ("in_dim", in_dim, MAX_SIZE),
        ];
        for (what, got, limit) in others.into_iter().chain(widths) {
            if got == 0 {
                return Err(Error::ZeroSize { what });
            }
            if got > limit {
                return Err(Error::SizeTooLarge { what, limit, got });
            }
        }
        // A (slot, expert) bucket has a 31-bit number.
        let buckets = elements("(slot, expert)", &[slots, experts])?;
        if buckets > MAX_SIZE {
            return Err(Error::SizeTooLarge { what: "slots · experts", limit: MAX_SIZE, got: buckets });
        }
        let projection = Projection(sizes);
        projection.a_elements()?;
        (0..projection.slices()).try_for_each(|s| projection.b_elements(s).map(drop))?;
        Ok(projection)
    }

    /// The sizes as given.
    pub fn sizes(&self) -> &ProjectionSizes {
        &self.0
    }

    /// S: slices, each with an `a` and a `b` of its own.
    pub fn slices(&self) -> usize {
        self.0.out_dims.len()
    }

    /// Matrices of `a` in one slot: E, or 1 when shared.
    pub fn a_experts(&self) -> usize {
        match self.0.a_experts {
            ExpertWeights::PerExpert => self.0.experts,
            ExpertWeights::Shared => 1,
        }
    }

    /// Matrices of `b` in one slot: E, or 1 when shared.
    pub fn b_experts(&self) -> usize {
        match self.0.b_experts {
            ExpertWeights::PerExpert => self.0.experts,
            ExpertWeights::Shared => 1,
        }
    }

    /// Elements of one slice of `a`, `[L, E, R, K]`.
    pub(crate) fn a_elements(&self) -> Result<usize> {
        elements("a", &[self.0.slots, self.a_experts(), self.0.max_rank, self.0.in_dim])
    }

    /// Elements of slice `s` of `b`, `[L, E, N_s, R]`.
    pub(crate) fn b_elements(&self, s: usize) -> Result<usize> {
        elements("b", &[self.0.slots, self.b_experts(), self.0.out_dims.get(s), self.0.max_rank])
    }

    /// Elements of `h`, `[S, P, R]`, for `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::SizeTooLarge`] and [`Error::SizeOverflow`] when there are too many.
    pub fn h_elements(&self, tokens: usize) -> Result<usize> {
        elements("h", &[self.slices(), self.pairs(tokens)?, self.0.max_rank])
    }

    /// P: (token, choice) pairs of `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::SizeTooLarge`] when a pair's number does not fit 31 bits.
    pub fn pairs(&self, tokens: usize) -> Result<usize> {
        match tokens.checked_mul(self.0.top_k) {
            Some(pairs) if pairs <= MAX_SIZE => Ok(pairs),
            _ => Err(Error::SizeTooLarge { what: "tokens", limit: MAX_SIZE / self.0.top_k, got: tokens }),
        }
    }

    /// Rows of `x` for `tokens` tokens: T or P.
    ///
    /// # Errors
    /// As for [`Projection::pairs`].
    pub fn x_rows(&self, tokens: usize) -> Result<usize> {
        Ok(match self.0.x_rows {
            XRows::Token => tokens,
            XRows::Pair => self.pairs(tokens)?,
        })
    }

    /// Columns of `out` that a call writes: Σ N_s.
    pub fn out_width(&self) -> usize {
        self.0.out_dims.total()
    }

    /// Elements of an `out` without padding, `[T, k, Σ N_s]`, for `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::SizeTooLarge`] and [`Error::SizeOverflow`] when there are too many.
    pub fn out_elements(&self, tokens: usize) -> Result<usize> {
        elements("out", &[self.pairs(tokens)?, self.out_width()])
    }

    /// Checks ranks that are known on the host, before they are copied to a device.
    ///
    /// # Errors
    /// [`Error::TooShort`] when there are fewer than slots, [`Error::RankTooLarge`] for a rank over
    /// `max_rank`.
    pub fn check_ranks(&self, ranks: &[i32]) -> Result<()> {
        let ProjectionSizes { slots, max_rank, .. } = self.0;
        if ranks.len() < slots {
            return Err(Error::TooShort {
                tensor: "ranks",
                shape: format!("[{slots}]"),
                expected: slots,
                got: ranks.len(),
            });
        }
        match ranks[..slots].iter().position(|&rank| rank > max_rank as i32) {
            Some(slot) => Err(Error::RankTooLarge { slot, rank: ranks[slot], max_rank }),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.0;
        write!(
            f,
            "{} K={} N={} S={} R={} E={} L={} k={}",
            s.dtype,
            s.in_dim,
            s.out_dims,
            s.out_dims.len(),
            s.max_rank,
            s.experts,
            s.slots,
            s.top_k
        )
    }
}
