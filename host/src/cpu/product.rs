//! The arithmetic of a tile: inputs widened to f32, products with a segment's weights, and what becomes of
//! them.

use super::segments::Tile;
use crate::dtype::Element;
use crate::projection::{Projection, XRows};
use crate::tensor::{Host, View};

/// Weight rows widened at a time: each load of an input then serves this many sums.
const BLOCK_ROWS: usize = 4;
/// Partial sums of one dot product: a whole number of vector registers on every machine.
const LANES: usize = 8;

/// Rows of f32, each filled up with zeros to whole lanes.
#[derive(Debug, Default)]
pub(super) struct LaneRows {
    lanes: Vec<[f32; LANES]>,
    rows: usize,
    width: usize,
}

impl LaneRows {
    pub fn clear(&mut self, rows: usize, width: usize) {
        (self.rows, self.width) = (rows, width);
        self.lanes.clear();
        self.lanes.resize(rows * width.div_ceil(LANES), [0.0; LANES]);
    }

    fn row(&self, row: usize) -> &[[f32; LANES]] {
        let stride = self.width.div_ceil(LANES);
        &self.lanes[row * stride..][..stride]
    }

    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let stride = self.width.div_ceil(LANES);
        &mut self.lanes[row * stride..][..stride].as_flattened_mut()[..self.width]
    }
}

/// What one thread needs for a tile.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Rows of `x`, one a pair.
    pub x: LaneRows,
    /// Rows of `h`, one a pair.
    pub h: LaneRows,
    /// The weight rows at hand.
    pub weights: LaneRows,
}

/// `emit(i, r, inputs[i] · weights[r])` for every input row and every weight row; `widened` is scratch.
pub(super) fn multiply<T: Element>(
    inputs: &LaneRows,
    weights: Matrix<'_, T>,
    widened: &mut LaneRows,
    mut emit: impl FnMut(usize, usize, f32),
) {
    widened.clear(BLOCK_ROWS, inputs.width);
    for first in (0..weights.rows).step_by(BLOCK_ROWS) {
        let count = BLOCK_ROWS.min(weights.rows - first);
        for row in 0..count {
            T::widen(&weights.row(first + row)[..inputs.width], widened.row_mut(row));
        }
        let block: [_; BLOCK_ROWS] = std::array::from_fn(|row| widened.row(row));
        for i in 0..inputs.rows {
            let sums = dot(block, inputs.row(i));
            for (row, &sum) in sums[..count].iter().enumerate() {
                emit(i, first + row, sum);
            }
        }
    }
}

fn dot(rows: [&[[f32; LANES]]; BLOCK_ROWS], input: &[[f32; LANES]]) -> [f32; BLOCK_ROWS] {
    let rows = rows.map(|row| &row[..input.len()]);
    let mut sums = [[0.0; LANES]; BLOCK_ROWS];
    for (i, input) in input.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for lane in 0..LANES {
                sums[lane] += row[i][lane] * input[lane];
            }
        }
    }
    sums.map(|lanes| lanes.iter().sum())
}

/// The weights of one segment and slice.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    stride: usize,
}

impl<'a, T: Element> Matrix<'a, T> {
    fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.stride..][..self.stride]
    }

    /// `[rank, K]`: the rows of the segment's `a` that are in use.
    pub fn a(tile: &Tile, projection: &Projection, a: View<'a, Host, T>) -> Self {
        let s = projection.sizes();
        let first = tile.matrix(s.experts, s.a_experts) * s.max_rank * s.in_dim;
        let data = &a.as_slice()[first..][..tile.rank * s.in_dim];
        Matrix { data, rows: tile.rank, stride: s.in_dim }
    }

    /// `[N_s, R]`: the segment's `b`, of whose rows the first `rank` columns are in use.
    pub fn b(tile: &Tile, projection: &Projection, slice: usize, b: View<'a, Host, T>) -> Self {
        let (s, out_dim) = (projection.sizes(), projection.sizes().out_dims.get(slice));
        let first = tile.matrix(s.experts, s.b_experts) * out_dim * s.max_rank;
        let data = &b.as_slice()[first..][..out_dim * s.max_rank];
        Matrix { data, rows: out_dim, stride: s.max_rank }
    }
}

/// The activations of a call.
pub(super) struct X<'a, T> {
    data: &'a [T],
    stride: usize,
    width: usize,
    /// Pairs that share a row.
    pairs_a_row: usize,
}

impl<'a, T: Element> X<'a, T> {
    pub fn new(projection: &Projection, data: View<'a, Host, T>, stride: usize) -> Self {
        let sizes = projection.sizes();
        let pairs_a_row = match sizes.x_rows {
            XRows::Token => sizes.top_k,
            XRows::Pair => 1,
        };
        X { data: data.as_slice(), stride, width: sizes.in_dim, pairs_a_row }
    }

    pub fn load(&self, pairs: &[usize], rows: &mut LaneRows) {
        rows.clear(pairs.len(), self.width);
        for (i, pair) in pairs.iter().enumerate() {
            T::widen(&self.data[pair / self.pairs_a_row * self.stride..][..self.width], rows.row_mut(i));
        }
    }
}

/// What becomes of a pair's delta.
pub(super) struct Epilogue<'a> {
    topk_weights: Option<&'a [f32]>,
    offset: usize,
    accumulate: bool,
}

impl<'a> Epilogue<'a> {
    pub fn new(topk_weights: Option<View<'a, Host, f32>>, offset: usize, accumulate: bool) -> Self {
        Epilogue { topk_weights: topk_weights.map(|weights| weights.as_slice()), offset, accumulate }
    }

    pub fn write<T: Element>(&self, pair: usize, row: &mut [T], column: usize, d: f32) {
        let delta = self.topk_weights.map_or(d, |weights| d * weights[pair]);
        let out = &mut row[self.offset + column];
        *out = T::from_f32(if self.accumulate { out.to_f32() + delta } else { delta });
    }

    /// Writes the rows of pairs that no segment has.
    pub fn write_inactive<'m, T: Element>(&self, rows: impl Iterator<Item = &'m mut [T]>, width: usize) {
        if !self.accumulate {
            rows.for_each(|row| row[self.offset..][..width].fill(T::zeroed()));
        }
    }
}
