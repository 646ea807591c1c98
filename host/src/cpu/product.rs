//! The arithmetic of a tile: inputs widened to f32, products with a segment's weights, and what becomes of
//! them.

use super::segments::Tile;
use crate::call::{Factor, Layout, SliceOrder};
use crate::dtype::Element;
use crate::projection::{OutDims, Projection, XRows};
use crate::table::AdapterEntry;
use crate::tensor::{Host, Rows, View};

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

/// What one segment and slice uses of its weights.
#[derive(Clone, Copy)]
pub(super) struct InUse {
    /// Rank in use.
    pub rank: usize,
    /// Multiplies the delta.
    pub scaling: f32,
    /// Where the weights are, when it is not among stacked ones.
    entry: Option<AdapterEntry>,
}

impl InUse {
    pub fn of<T: Element>(
        tile: &Tile,
        projection: &Projection,
        slice: usize,
        weights: &Factor<'_, Host, T>,
    ) -> Self {
        let entry = match weights {
            Factor::Stacked(_) => return InUse { rank: tile.rank, scaling: 1.0, entry: None },
            Factor::Table(adapters) => adapters.entry(projection, tile.slot, slice),
        };
        InUse { rank: entry.rank_in_use(tile.rank), scaling: entry.scaling, entry: Some(entry) }
    }
}

impl<'a, T: Element> Matrix<'a, T> {
    /// Nothing: its products are none.
    const NONE: Self = Matrix { data: &[], rows: 0, stride: 0 };

    fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.stride..][..self.stride]
    }

    /// `[rank, K]`: the rows of the segment's `a` that are in use.
    pub fn a(
        tile: &Tile,
        projection: &Projection,
        slice: usize,
        used: &InUse,
        a: &Factor<'a, Host, T>,
    ) -> Self {
        let s = projection.sizes();
        let data = match (a, &used.entry) {
            (Factor::Stacked(a), _) => {
                &a[slice].as_slice()[tile.matrix(s.experts, s.a_experts) * s.max_rank * s.in_dim..]
            }
            (Factor::Table(adapters), Some(entry)) if used.rank > 0 => {
                adapters.a(projection, entry, tile.expert)
            }
            (Factor::Table(_), _) => return Self::NONE,
        };
        Matrix { data: &data[..used.rank * s.in_dim], rows: used.rank, stride: s.in_dim }
    }

    /// `[N_s, r]`: the segment's `b`, of whose rows the first `rank` columns are in use.
    pub fn b(
        tile: &Tile,
        projection: &Projection,
        slice: usize,
        used: &InUse,
        b: &Factor<'a, Host, T>,
    ) -> Self {
        let (s, rows) = (projection.sizes(), projection.sizes().out_dims.get(slice));
        let (data, stride) = match (b, &used.entry) {
            (Factor::Stacked(b), _) => {
                let first = tile.matrix(s.experts, s.b_experts) * rows * s.max_rank;
                (&b[slice].as_slice()[first..], s.max_rank)
            }
            (Factor::Table(adapters), Some(entry)) if used.rank > 0 => {
                (adapters.b(projection, slice, entry, tile.expert), entry.max_rank as usize)
            }
            // Of no columns: its products are zeros.
            (Factor::Table(_), _) => return Matrix { data: &[], rows, stride: 0 },
        };
        Matrix { data: &data[..rows * stride], rows, stride }
    }
}

/// The activations of a call.
pub(super) struct X<'a, T> {
    data: &'a [T],
    stride: usize,
    width: usize,
    /// Pairs that share a row.
    pairs_a_row: usize,
    rows: usize,
    index: Option<&'a [i32]>,
}

impl<'a, T: Element> X<'a, T> {
    pub fn new(projection: &Projection, x: &Rows<'a, Host, T>, layout: &Layout) -> Self {
        let sizes = projection.sizes();
        X {
            data: x.data.as_slice(),
            stride: layout.x_stride,
            width: sizes.in_dim,
            pairs_a_row: match sizes.x_rows {
                XRows::Token => sizes.top_k,
                XRows::Pair => 1,
            },
            rows: layout.x_rows,
            index: x.index.map(|index| index.as_slice()),
        }
    }

    /// Whether a pair has a row.
    pub fn has(&self, pair: usize) -> bool {
        self.row(pair).is_some()
    }

    fn row(&self, pair: usize) -> Option<&'a [T]> {
        let row = match self.index {
            None => pair / self.pairs_a_row,
            Some(index) => usize::try_from(index[pair]).ok().filter(|&row| row < self.rows)?,
        };
        Some(&self.data[row * self.stride..][..self.width])
    }

    /// Widens the rows of pairs that have one.
    pub fn load(&self, pairs: &[usize], rows: &mut LaneRows) {
        rows.clear(pairs.len(), self.width);
        for (i, row) in pairs.iter().filter_map(|&pair| self.row(pair)).enumerate() {
            T::widen(row, rows.row_mut(i));
        }
    }
}

/// What becomes of a pair's delta.
pub(super) struct Epilogue<'a> {
    topk_weights: Option<&'a [f32]>,
    offset: usize,
    order: SliceOrder,
    out_dims: OutDims,
    accumulate: bool,
}

impl<'a> Epilogue<'a> {
    pub fn new(
        projection: &Projection,
        topk_weights: Option<View<'a, Host, f32>>,
        layout: &Layout,
        accumulate: bool,
    ) -> Self {
        Epilogue {
            topk_weights: topk_weights.map(|weights| weights.as_slice()),
            offset: layout.offset,
            order: layout.order,
            out_dims: projection.sizes().out_dims,
            accumulate,
        }
    }

    /// Expands `h` by a slice's `b` into the rows of `pairs`.
    pub fn expand<T: Element>(
        &self,
        (h, b): (&LaneRows, Matrix<'_, T>),
        widened: &mut LaneRows,
        (slice, used): (usize, &InUse),
        pairs: &[usize],
        out: &mut [&mut [T]],
    ) {
        // Nothing is added: not even a rounding may show.
        if used.rank == 0 && self.accumulate {
            return;
        }
        let first = self.offset + self.order.first_column(&self.out_dims, slice);
        let step = self.order.column_step(&self.out_dims);
        multiply(h, b, widened, |i, n, d| {
            let column = &mut out[i][first + n * step];
            let weighted = self.topk_weights.map_or(d, |weights| d * weights[pairs[i]]);
            let delta = weighted * used.scaling;
            *column = T::from_f32(if self.accumulate { column.to_f32() + delta } else { delta });
        });
    }

    /// Writes the rows of inactive pairs.
    pub fn write_inactive<'m, T: Element>(&self, rows: impl Iterator<Item = &'m mut [T]>) {
        if !self.accumulate {
            rows.for_each(|row| row[self.offset..][..self.out_dims.total()].fill(T::zeroed()));
        }
    }
}
