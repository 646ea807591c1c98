//! The call that is planned: everything that a plan depends on, and what follows from it for every form.

use crate::call::{Layout, SliceOrder};
use crate::dtype::DType;
use crate::error::Result;
use crate::plan::DeviceLimits;
use crate::projection::{Projection, ProjectionSizes, XRows};
use moe_lora_kernels::{ElementType, route};

/// Where a call's route comes from, as far as a plan must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteSource {
    /// This call makes it.
    Made,
    /// The caller made it, in blocks of this many places: each becomes a tile.
    Sorted {
        /// Pairs a tile.
        tile_rows: u32,
    },
    /// An earlier call made it, in tiles of this many pairs.
    Kept {
        /// Pairs a tile.
        tile_rows: u32,
        /// Whether that call had ranks of the slots' own: `ranks` of its routing.
        ranked: bool,
    },
}

impl RouteSource {
    /// Pairs a tile of a route that is there already; `None` where this call makes it.
    pub(crate) fn tile_rows(self) -> Option<u32> {
        match self {
            RouteSource::Made => None,
            RouteSource::Sorted { tile_rows } | RouteSource::Kept { tile_rows, .. } => Some(tile_rows),
        }
    }
}

/// Which part of the operator a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Neither: the routing alone.
    Route,
    /// Shrink and expand.
    Forward,
    /// Shrink alone.
    Shrink,
    /// Expand alone.
    Expand,
}

/// Elements are 16-byte aligned when counts of them are multiples of this.
const VECTOR: usize = 8;

/// A checked call on a device. Made once, and passed by reference to all that plans it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Problem<'c> {
    /// The projection.
    pub projection: &'c Projection,
    /// Strides and offsets of the call.
    pub layout: &'c Layout,
    /// Which part of the operator it is.
    pub stage: Stage,
    /// Where its route comes from.
    pub route: RouteSource,
    /// The device.
    pub limits: &'c DeviceLimits,
    /// P.
    pub pairs: usize,
    /// Elements of h.
    pub h_elements: u64,
    /// (slot, expert) segments that pairs may belong to.
    pub segments: u64,
    /// Whether kernels may load and store 16 bytes at a time. A route made alone may: those that cannot take
    /// its tiles whole take them in parts.
    pub vectors: bool,
    /// Whether slots have ranks of their own, which may be smaller than the one that weights are allocated
    /// for.
    pub ranked: bool,
}

impl<'c> Problem<'c> {
    /// A call whose inputs were checked, of one token or more.
    ///
    /// # Errors
    /// As for [`Projection::pairs`] and [`Projection::h_elements`].
    pub fn new(
        projection: &'c Projection,
        layout: &'c Layout,
        stage: Stage,
        route: RouteSource,
        limits: &'c DeviceLimits,
    ) -> Result<Self> {
        let sizes = projection.sizes();
        let strides = [layout.x_stride, layout.out_stride, layout.offset];
        let side_by_side = layout.order != SliceOrder::Interleaved;
        let aligned = layout.aligned && side_by_side && are_vectors(&strides) && has_vector_sizes(sizes);
        Ok(Problem {
            projection,
            layout,
            stage,
            route,
            limits,
            pairs: projection.pairs(layout.tokens)?,
            h_elements: projection.h_elements(layout.tokens)? as u64,
            segments: (sizes.slots * sizes.experts) as u64,
            vectors: aligned || stage == Stage::Route,
            ranked: match route {
                RouteSource::Kept { ranked, .. } => ranked,
                RouteSource::Made | RouteSource::Sorted { .. } => layout.ranked,
            },
        })
    }

    /// The projection's sizes.
    pub fn sizes(&self) -> &'c ProjectionSizes {
        self.projection.sizes()
    }

    /// The element type, as the kernels' table has it.
    pub fn element(&self) -> ElementType {
        match self.sizes().dtype {
            DType::Bf16 => ElementType::Bf16,
            DType::F16 => ElementType::F16,
        }
    }

    /// Whether weights are stacked, slices in order and of one width, and no rows indexed.
    pub fn is_plain(&self) -> bool {
        let Layout { table, x_indexed, out_indexed, order, .. } = self.layout;
        let out_dims = &self.sizes().out_dims;
        let in_order = *order == SliceOrder::InOrder || out_dims.len() == 1;
        in_order && out_dims.is_uniform() && !(*table || *x_indexed || *out_indexed)
    }

    /// Buckets of `route`: the segments, and one for inactive pairs.
    pub fn buckets(&self) -> u64 {
        self.segments + 1
    }

    /// Rows of x.
    pub fn x_rows(&self) -> u64 {
        match self.sizes().x_rows {
            XRows::Token => self.layout.tokens as u64,
            XRows::Pair => self.pairs as u64,
        }
    }

    /// Whether K, N and R themselves are such that rows of every matrix begin at multiples of 16 bytes.
    pub fn has_vector_sizes(&self) -> bool {
        has_vector_sizes(self.sizes())
    }

    /// Largest element offset over all tensors of the call, where `h` has `splits` parts.
    pub fn largest_offset(&self, splits: u32) -> Result<u64> {
        let (projection, layout) = (self.projection, self.layout);
        let b_elements = |s| projection.b_elements(s).map(|elements| elements as u64);
        let b_elements =
            (0..projection.slices()).map(b_elements).try_fold(0, |most, b| b.map(|b| b.max(most)))?;
        // An index may name any row that there is.
        let x_rows = if layout.x_indexed { layout.x_rows as u64 } else { self.x_rows() };
        let out_rows = if layout.out_indexed { layout.out_rows } else { self.pairs } as u64;
        // What a table names is a slot's alone, of a rank in multiples of 8.
        let sizes = self.sizes();
        let slots = if layout.table { sizes.slots as u64 } else { 1 };
        let rank = sizes.max_rank as u64;
        let named = |elements: u64| elements / slots / rank * rank.next_multiple_of(VECTOR as u64);
        let of_weights = |elements: u64| if layout.table { named(elements) } else { elements };
        let offsets = [
            x_rows.saturating_mul(layout.x_stride as u64),
            out_rows.saturating_mul(layout.out_stride as u64),
            of_weights(projection.a_elements()? as u64),
            of_weights(b_elements),
            self.h_elements * u64::from(splits),
        ];
        Ok(offsets.into_iter().fold(0, u64::max))
    }

    /// Most tiles of `rows` pairs that the call's pairs can make, whatever their routing.
    pub fn most_tiles(&self, rows: u32) -> u64 {
        route::max_tiles(self.pairs as u64, self.buckets(), u64::from(rows))
    }

    /// The tiles of the call's route: as it is given, or else of `rows` pairs.
    pub fn route_tiles(&self, rows: u32) -> RouteTiles {
        let rows = self.route.tile_rows().unwrap_or(rows);
        RouteTiles { rows, most: self.most_tiles(rows) }
    }

    /// Whether it has a first half: h = a x.
    pub fn shrinks(&self) -> bool {
        self.stage != Stage::Expand
    }

    /// Whether it has a second half: out = b h.
    pub fn expands(&self) -> bool {
        self.stage != Stage::Shrink
    }

    /// Segments with a pair or more, where tokens choose slots and different experts evenly at random.
    pub fn likely_segments(&self) -> f64 {
        let sizes = self.sizes();
        let [k, experts, slots] = [sizes.top_k, sizes.experts, sizes.slots].map(|size| size as f64);
        let tokens = self.layout.tokens as f64;
        if k >= experts {
            return experts * tokens.min(slots);
        }
        let segments = self.segments as f64 * (1.0 - (1.0 - k / experts).powf(tokens / slots));
        segments.min(self.pairs as f64)
    }

    /// Tiles of `rows` pairs, where the pairs are routed evenly at random: the mean, over all segments, of a
    /// segment's pairs over `rows`, rounded up.
    pub fn likely_tiles(&self, rows: u32) -> f64 {
        let (segments, rows) = (self.segments as f64, f64::from(rows));
        let mean = self.pairs as f64 / segments;
        if mean.sqrt() > rows {
            // Segments differ by more than a tile: what is above the last full one is as likely much as
            // little.
            return segments * (mean / rows + 0.5);
        }
        let most_off = WHOLLY_UNLIKELY * mean.sqrt();
        // The sum over tiles of how likely a segment has more pairs than are in the tiles before: nearly
        // always so in the first of many.
        let sure = ((mean - most_off) / rows).floor().max(0.0);
        let (mut tiles, mut before) = (sure, sure * rows);
        while before < mean + most_off {
            tiles += if before == 0.0 { 1.0 - (-mean).exp() } else { likely_more(mean, before) };
            before += rows;
        }
        segments * tiles
    }
}

fn are_vectors(sizes: &[usize]) -> bool {
    sizes.iter().all(|size| size % VECTOR == 0)
}

fn has_vector_sizes(sizes: &ProjectionSizes) -> bool {
    are_vectors(&[sizes.in_dim, sizes.max_rank]) && are_vectors(sizes.out_dims.as_slice())
}

/// Deviations from the mean past which no segment is.
const WHOLLY_UNLIKELY: f64 = 4.0;

/// How likely a segment has more than `pairs` pairs, dozens, if it has `mean` on average: by the logistic
/// function that is nearest to the normal distribution's, which is at most 0.01 from it.
fn likely_more(mean: f64, pairs: f64) -> f64 {
    1.0 / (1.0 + (1.702 * (pairs + 0.5 - mean) / mean.sqrt()).exp())
}

/// The tiles of a call's route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RouteTiles {
    /// Pairs of the largest.
    pub rows: u32,
    /// Most that there can be.
    pub most: u64,
}

impl RouteTiles {
    /// Parts that a kernel with tiles of `rows` pairs takes each of them in: as many as a full one needs.
    pub fn parts(&self, rows: u32) -> u32 {
        self.rows.div_ceil(rows)
    }
}
