//! What is likely of a call before its routing is known: experts are chosen evenly at random.

use crate::dtype::DType;
use crate::plan::Problem;
use crate::plan::costs::MemoryCosts;

/// The rank that an adapter is likely to have at least, where slots have ranks of their own.
const LEAST_RANK: f64 = 8.0;

/// What the costs of all candidates of a call are made from. Times are microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Likely {
    /// Segments with a pair or more.
    pub segments: f64,
    /// Rank of an adapter.
    pub rank: f64,
    /// What the bytes of the segments' weights take at the rate that a stream gets from memory.
    weights: f64,
    /// The same of x, once.
    x: f64,
    /// The same of `out`, read and written.
    out: f64,
    /// Tiles of 8, 16, 32, 64 and 128 pairs.
    tiles: [f64; TILE_ROWS.len()],
}

/// Pairs of the tiles that kernels have.
const TILE_ROWS: [u32; 5] = [8, 16, 32, 64, 128];

impl Likely {
    /// Of a call.
    pub fn of(problem: &Problem<'_>) -> Self {
        let sizes = problem.sizes();
        let rate = problem.limits.streamed();
        let rank = match problem.ranked {
            true => (LEAST_RANK * sizes.max_rank as f64).sqrt().max(LEAST_RANK),
            false => sizes.max_rank as f64,
        };
        let segments = problem.likely_segments();
        let time = |elements: f64| elements * DType::SIZE as f64 / rate;
        let [k, n, slices] =
            [sizes.in_dim, sizes.out_dims.total(), sizes.out_dims.len()].map(|size| size as f64);
        // The half that a call does not do moves neither its weights nor its rows.
        let (shrinks, expands) = (problem.shrinks(), problem.expands());
        let of = |does: bool, elements: f64| if does { elements } else { 0.0 };
        let columns = of(shrinks, slices * k) + of(expands, n);
        Likely {
            segments,
            rank,
            weights: time(segments * rank * columns),
            x: time(of(shrinks, problem.x_rows() as f64 * k)),
            out: time(of(expands, 2.0 * problem.pairs as f64 * n)),
            tiles: TILE_ROWS.map(|rows| problem.likely_tiles(rows)),
        }
    }

    /// Microseconds by which memory lengthens a call.
    pub fn memory(&self, costs: &MemoryCosts) -> f64 {
        costs.weights * self.weights + costs.x * self.x + costs.out * self.out
    }

    /// Tiles of `rows` pairs: of a given route's own, where these are smaller.
    pub fn tiles(&self, problem: &Problem<'_>, rows: u32) -> f64 {
        let rows = problem.route.tile_rows().map_or(rows, |given| given.min(rows));
        let known = TILE_ROWS.iter().position(|of| *of == rows);
        known.map_or_else(|| problem.likely_tiles(rows), |place| self.tiles[place])
    }
}

/// Of two times that go side by side, for the most part: their norm of degree 3.
pub(crate) fn side_by_side(one: f64, other: f64) -> f64 {
    (one * one * one + other * other * other).cbrt()
}
