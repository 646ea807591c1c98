//! `prefill`: one launch of warpgroups that shrink and expand, for many pairs a segment, on sm_90a.

mod division;

use crate::dtype::DType;
use crate::error::Result;
#[cfg(any(feature = "cuda", feature = "emulate"))]
use crate::plan::arguments::Arguments;
use crate::plan::costs::{COPIED, Costs};
use crate::plan::generic::MAX_PARTIAL;
use crate::plan::launch::Launch;
use crate::plan::likely::{Likely, side_by_side};
use crate::plan::{Form, PrefillTile, Problem, RouteTiles, Stage};
use crate::projection::Projection;
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::Split;
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora_kernels::params::{Divider, PrefillParams, count, products};
use moe_lora_kernels::prefill as kernel;
use moe_lora_kernels::{ElementType, IndexWidth, Kernel, PrefillVariant, route};
use std::fmt;

/// A way to run a call, or half of one, as `prefill`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// The tile.
    pub tile: PrefillTile,
    /// Whether blocks share passes: by split-K, and by split-N.
    pub shared: bool,
    /// The kernel.
    pub shape: kernel::Shape,
    /// Passes that a tile of the largest rank is taken in.
    pub passes: u32,
    /// Where blocks share passes, the most parts of K; else 0.
    most_split_k: u32,
}

/// How `prefill` runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PrefillPlan {
    /// The launch.
    pub launch: Launch,
    /// The tile.
    pub tile: PrefillTile,
    /// Parts that it takes a tile of the route in.
    pub tile_parts: u32,
    /// Passes that a tile of the largest rank is taken in.
    pub passes: u32,
    /// Stages.
    pub stages: u32,
    /// Steps of expand that may be under way in them at a time.
    pub under_way: u32,
    /// Bytes of each row of x that it asks for before it waits for the route.
    pub ahead: u32,
    /// How blocks share a pass, where they do.
    pub splits: Option<Splits>,
}

/// How blocks share a pass of `prefill`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Splits {
    /// Split-K: the parts of K.
    pub split_k: Split,
    /// Split-N: the parts of a slice's columns.
    pub split_n: Split,
    /// Words of the h of all passes that may be left in the split-K workspace; the sums come after it.
    pub h_words: u64,
}

/// Whether `prefill` can run a call at all, whatever the tile.
fn is_legal(problem: &Problem<'_>) -> bool {
    let sizes = problem.sizes();
    // Elements of one matrix are counted in 32 bits, whatever the index width.
    let matrix = sizes.in_dim.max(sizes.out_dims.max()).saturating_mul(sizes.max_rank);
    problem.limits.wgmma
        && problem.vectors
        && problem.has_vector_sizes()
        && matrix <= i32::MAX as usize
        && sizes.max_rank <= kernel::MAX_WIDTH as usize
}

/// The kernel for a projection: the narrowest whose passes take as many columns of h as they are to, or the
/// widest. `None` where not even that has room for the ranks of a slice.
fn shape(projection: &Projection, tile: PrefillTile) -> Option<kernel::Shape> {
    let sizes = projection.sizes();
    if sizes.max_rank > kernel::MAX_WIDTH as usize {
        return None;
    }
    let columns = division::columns(tile, sizes);
    let width = kernel::Shape::WIDTHS.into_iter().find(|&width| columns <= width);
    Some(kernel::Shape { rows: tile.rows(), width: width.unwrap_or(kernel::MAX_WIDTH) })
}

impl Candidate {
    /// A way to run the call with this tile, in whole or in shared passes; `None` where it cannot be run so.
    pub fn legal(problem: &Problem<'_>, tile: PrefillTile, shared: bool) -> Option<Self> {
        let (sizes, shape) =
            (problem.sizes(), shape(problem.projection, tile).filter(|_| is_legal(problem))?);
        let passes = shape.passes(sizes.out_dims.len() as u32, sizes.max_rank as u32);
        let whole = Candidate { tile, shared: false, shape, passes, most_split_k: 0 };
        // Tiles of a route may have been made somewhat smaller than the larger tile.
        let is_in_route = |rows| tile.rows() < rows + PrefillTile::M64.rows();
        let shared_bytes = whole.shape.shared_bytes(whole.shape.max_stages());
        if shared_bytes > problem.limits.shared_bytes || !problem.route.tile_rows().is_none_or(is_in_route) {
            return None;
        }
        if !shared {
            return Some(whole);
        }
        let most_split_k = whole.most_split_k(problem);
        (most_split_k > 0).then_some(Candidate { shared, most_split_k, ..whole })
    }

    /// Most parts of K that blocks may take of a pass, for what they leave one another to have room; 0 where
    /// they cannot share.
    fn most_split_k(&self, problem: &Problem<'_>) -> u32 {
        let &Candidate { shape, passes, .. } = self;
        // The halves of the split form have a launch each.
        let is_whole = matches!(problem.stage, Stage::Route | Stage::Forward);
        if !is_whole || shape.width > kernel::MAX_SHARED_WIDTH {
            return 0;
        }
        let tiles = problem.route_tiles(shape.rows);
        let passes = tiles.most * u64::from(tiles.parts(shape.rows) * passes);
        if passes > u64::from(kernel::MAX_COUNTERS / shape.counters()) {
            return 0;
        }
        let room = shared_pass_room(problem.projection, problem.pairs);
        let fits = |split_k: &u32| passes * kernel::workspace_bytes(shape, *split_k) <= room;
        (1..=Split::MAX).rev().find(fits).unwrap_or(0)
    }

    /// The form.
    pub fn form(&self) -> Form {
        Form::prefill(self.shared, self.tile)
    }

    /// Microseconds that the call, or its half, is likely to take so, with its routing.
    pub fn cost(&self, problem: &Problem<'_>, likely: &Likely, costs: &Costs) -> f64 {
        let &Candidate { tile, shared, shape, .. } = self;
        let sizes = problem.sizes();
        let costs = match (shared, tile) {
            (false, PrefillTile::M64) => &costs.prefill_m64,
            (false, PrefillTile::M128) => &costs.prefill_m128,
            (true, PrefillTile::M64) => &costs.shared_prefill_m64,
            (true, PrefillTile::M128) => &costs.shared_prefill_m128,
        };
        let tiles = likely.tiles(problem, tile.rows());
        // The ranks in use decide what a pass costs, and not those that weights are allocated for.
        let rank_room = kernel::rank_room(likely.rank.round() as u32);
        let slices = (shape.width / rank_room).max(1).min(sizes.out_dims.len() as u32);
        let work_tiles = tiles * f64::from((sizes.out_dims.len() as u32).div_ceil(slices));
        let blocks = f64::from(problem.limits.multiprocessors * shape.blocks_per_sm());
        let columns = (slices * rank_room).next_power_of_two().max(32).min(shape.width);
        // A slice that blocks do not share is one block's: the widest ends last.
        let out_dim = if shared { sizes.out_dims.mean() } else { sizes.out_dims.max() as f64 };
        let in_dim = sizes.in_dim as f64;
        let millions = |columns: u32, length: f64| f64::from(tile.rows() * columns) * length / 1e6;
        let x_bytes = problem.pairs as f64 / tiles * in_dim * DType::SIZE as f64;
        let mut work_tile = costs.tile;
        if problem.shrinks() {
            work_tile += costs.k_step * (in_dim / 128.0).ceil()
                + costs.x_bytes * x_bytes / COPIED
                + costs.shrink_products * millions(columns, in_dim);
        }
        if problem.expands() {
            work_tile += costs.n_step * f64::from(slices) * (out_dim / 128.0).ceil()
                + costs.expand_products * millions(slices * rank_room, out_dim);
        }
        let waves = work_tiles / blocks;
        // Blocks that share passes have as much to do each, to the last.
        let waves = if shared { waves } else { waves.ceil() + costs.load * waves.min(1.0) };
        let memory = likely.memory(&costs.memory);
        let routed = costs.thousand_pairs * problem.pairs as f64 / 1e3;
        costs.start + routed + side_by_side(memory, waves * work_tile)
    }

    /// Pairs of the tiles of a route that is made for it: as many as its own, or fewer.
    pub fn route_rows(&self, problem: &Problem<'_>) -> u32 {
        if self.shared { self.tile.rows() } else { division::route_rows(problem, self) }
    }

    /// How the call is run so, on this route.
    ///
    /// # Errors
    /// As for [`Launch::new`].
    pub fn plan(
        self,
        problem: &Problem<'_>,
        route: &RouteTiles,
        element: ElementType,
        index: IndexWidth,
    ) -> Result<PrefillPlan> {
        let Candidate { tile, shape, passes, .. } = self;
        let tile_parts = route.parts(shape.rows);
        let all_passes = route.most * u64::from(tile_parts * passes);
        let splits = self.shared.then(|| self.splits(problem, all_passes));
        let work_tiles = splits.map_or(1, |splits| splits.split_k.count.max(splits.split_n.count));
        let most = u64::from(problem.limits.multiprocessors * shape.blocks_per_sm());
        let blocks = (all_passes * u64::from(work_tiles)).min(most);
        let is_full = division::is_full(problem, shape, route.rows);
        let stages = division::stages(&self, is_full, problem.limits);
        let kernel = Kernel::Prefill(PrefillVariant { element, index, shape });
        let launch = Launch::new(kernel, blocks, 1, shape.shared_bytes(stages))?;
        // Blocks that share a pass wait for one another.
        let launch = Launch { cooperative: self.shared, ..launch };
        let under_way = division::under_way(&self, stages, is_full, problem.limits);
        let asks = problem.stage != Stage::Expand && !problem.layout.x_indexed;
        let ahead = if asks { division::ahead(problem) } else { 0 };
        Ok(PrefillPlan { launch, tile, tile_parts, passes, stages, under_way, ahead, splits })
    }

    /// How blocks share each of `passes` passes.
    fn splits(&self, problem: &Problem<'_>, passes: u64) -> Splits {
        let (sizes, shape) = (problem.sizes(), self.shape);
        let [most_k, most_n] = division::splits(problem, self);
        Splits {
            split_k: split(sizes.in_dim, most_k.min(self.most_split_k), shape.split_k_unit()),
            split_n: split(sizes.out_dims.max(), most_n, shape.split_n_unit()),
            h_words: passes * kernel::h_words(shape),
        }
    }
}

/// Up to `most` parts of `length` elements, in multiples of `unit`.
fn split(length: usize, most: u32, unit: u32) -> Split {
    let length = length as u32;
    let each = length.div_ceil(most.clamp(1, Split::MAX)).next_multiple_of(unit);
    Split { count: length.div_ceil(each), each }
}

/// Multiprocessors whose blocks have room to share passes, at least.
const MOST_SHARING: u64 = 144;

/// Bytes of memory in which blocks that share passes leave sums and h for one another, in any call of so many
/// pairs: enough for a part of K a block if there are twice as many passes as is likely, up to as much as
/// parts of h may take. As all that a workspace has room for, it does not depend on K and N, and is not less
/// for larger ranks.
pub(crate) fn shared_pass_room(projection: &Projection, pairs: usize) -> u64 {
    let sizes = projection.sizes();
    let buckets = (sizes.slots * sizes.experts) as u64 + 1;
    let of = |tile: PrefillTile| {
        let widest = kernel::Shape { rows: tile.rows(), width: kernel::MAX_WIDTH };
        let shape = shape(projection, tile).unwrap_or(widest);
        let tiles = route::max_tiles(pairs as u64, buckets, u64::from(shape.rows));
        let passes = sizes.out_dims.len() as u64 * tiles;
        let shares =
            (2 * MOST_SHARING * u64::from(shape.blocks_per_sm())).min(passes * u64::from(Split::MAX));
        // Of a share the sums are twice as many bytes as h of a pass.
        shares.max(passes) * 3 * kernel::workspace_bytes(shape, 1)
    };
    PrefillTile::ALL.map(of).into_iter().fold(0, u64::max).min(MAX_PARTIAL * size_of::<f32>() as u64)
}

impl PrefillPlan {
    /// The form.
    pub fn form(&self) -> Form {
        Form::prefill(self.splits.is_some(), self.tile)
    }
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
impl PrefillPlan {
    /// The parameter block.
    pub fn parameters(&self, arguments: &Arguments<'_>) -> PrefillParams {
        let &PrefillPlan { launch, tile_parts, passes, stages, under_way, ahead, splits, .. } = self;
        let &Arguments { problem, operands, parts, .. } = arguments;
        let sizes = problem.sizes();
        let whole = Split { count: 1, each: sizes.out_dims.max() as u32 };
        let [split_k, split_n] =
            splits.map_or([Split::NONE, whole], |splits| [splits.split_k, splits.split_n]);
        let fragments = splits.map_or(Global::NULL, |_| parts.shared_passes);
        PrefillParams {
            x: operands.x,
            weights: arguments.weights(),
            h: operands.h,
            fragments,
            sums: fragments.at(splits.map_or(0, |splits| splits.h_words)),
            counters: parts.counters,
            out: operands.out,
            topk_weights: operands.topk_weights,
            pairs: parts.pairs,
            tiles: parts.tiles,
            tile_count: parts.counts.at(if operands.accumulate { count::ACTIVE } else { count::ALL }),
            scheduler: parts.scheduler,
            x_stride: problem.layout.x_stride as u64,
            out_stride: problem.layout.out_stride as u64,
            rows: arguments.rows(),
            pair_count: arguments.pair_count(),
            accumulate: operands.accumulate.into(),
            tile_parts,
            over_parts: Divider::new(tile_parts),
            passes,
            over_passes: Divider::new(passes),
            split_k,
            split_n,
            blocks: launch.blocks,
            stages,
            under_way,
            products: match problem.stage {
                Stage::Shrink => products::SHRINK,
                Stage::Expand => products::EXPAND,
                Stage::Route | Stage::Forward => products::BOTH,
            },
            ahead,
            reserved: 0,
        }
    }
}

impl fmt::Display for PrefillPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n  {}", self.launch)?;
        if let Some(Splits { split_k, split_n, .. }) = self.splits {
            write!(f, ", split-K {} × {}", split_k.count, split_k.each)?;
            write!(f, ", split-N {} × {}", split_n.count, split_n.each)?;
        }
        Ok(())
    }
}
