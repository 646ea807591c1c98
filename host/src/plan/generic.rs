//! The generic form: `shrink`, then `expand`, for every call and every device.

use crate::dtype::DType;
use crate::error::Result;
#[cfg(any(feature = "cuda", feature = "emulate"))]
use crate::plan::arguments::Arguments;
use crate::plan::costs::{COPIED, Costs};
use crate::plan::launch::Launch;
use crate::plan::likely::{Likely, side_by_side};
use crate::plan::{DeviceLimits, Problem, RouteTiles, Stage};
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::MAX_SLICES;
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora_kernels::params::{ExpandParams, ShrinkParams};
use moe_lora_kernels::tile::{self, TileShape};
use moe_lora_kernels::{ElementType, IndexWidth, Kernel, TileKind, Variant, expand, shrink};
use std::fmt;

/// Most blocks that share K: each adds a pass over h that `expand` must sum.
pub(crate) const MAX_SPLITS: u32 = 16;

/// Elements of f32 that the parts of `h` may take, 16 MiB: beyond, a call has blocks enough without split-K.
pub(crate) const MAX_PARTIAL: u64 = 4 << 20;

/// Least steps of K a block: the stages must fill once to be worth its start.
const MIN_STEPS: u32 = 2;

/// Blocks a multiprocessor that keep enough loads in flight for the memory's bandwidth.
const BLOCKS_PER_MULTIPROCESSOR: u64 = 4;

/// Columns of shared memory that hold a stage come in whole groups of a warp.
const COLUMN_GROUP: usize = tile::GROUP as usize;

/// A way to run a call in two launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// The tile of both.
    pub tile: TileKind,
}

/// How the two launches, or one of them, divide the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GenericPlan {
    /// The tile of both.
    pub tile: TileKind,
    /// Parts that they take a tile of the route in.
    pub tile_parts: u32,
    /// Split-K: parts that h is summed from.
    pub splits: u32,
    /// `None` in [`Stage::Expand`].
    pub shrink: Option<ShrinkPlan>,
    /// `None` in [`Stage::Shrink`].
    pub expand: Option<ExpandPlan>,
}

/// How `shrink` divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShrinkPlan {
    /// The launch.
    pub launch: Launch,
    /// Blocks that share a tile's columns.
    pub column_blocks: u32,
    /// Columns that a stage has room for.
    pub column_room: u32,
    /// Steps of K that each split takes.
    pub steps_per_split: u32,
}

/// How `expand` divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExpandPlan {
    /// The launch.
    pub launch: Launch,
    /// For each slice, the number of the first block of a part that takes it; [`u32::MAX`] past the last.
    pub first_blocks: [u32; MAX_SLICES],
    /// Blocks that share a part's columns.
    pub column_blocks: u32,
    /// Columns that each of them takes.
    pub columns_per_block: u32,
}

impl Candidate {
    /// A way to run the call with this tile; `None` where it cannot be run so. Sizes and addresses that are
    /// not multiples of 8 elements have [`TileKind::Any`] alone, and all others [`TileKind::M16`] in any
    /// case.
    pub fn legal(problem: &Problem<'_>, tile: TileKind) -> Option<Self> {
        let shape = tile.shape();
        let is_smallest = shape.rows() == TileShape::M16.rows();
        let fits = || {
            let max_rank = problem.sizes().max_rank as u32;
            let shrink = shrink::shared_bytes(shape, column_room(problem, shape));
            // A larger tile than the route's would never be full.
            problem.route.tile_rows().is_none_or(|rows| shape.rows() <= rows)
                && shrink.max(expand::shared_bytes(shape, max_rank)) <= problem.limits.shared_bytes
        };
        let is_legal = if problem.vectors { is_smallest || fits() } else { tile == TileKind::Any };
        is_legal.then_some(Candidate { tile })
    }

    /// Microseconds that the call, or its half, is likely to take so, with its routing.
    pub fn cost(&self, problem: &Problem<'_>, likely: &Likely, costs: &Costs) -> f64 {
        let sizes = problem.sizes();
        let costs = match self.tile {
            TileKind::M16 | TileKind::Any => &costs.generic_m16,
            TileKind::M32 => &costs.generic_m32,
            TileKind::M64 => &costs.generic_m64,
        };
        let tiles = likely.tiles(problem, self.tile.shape().rows());
        let (in_dim, out_dim) = (sizes.in_dim as f64, sizes.out_dims.mean());
        let columns = sizes.out_dims.len() as f64 * likely.rank;
        let copies = |elements: f64| elements * DType::SIZE as f64 / COPIED;
        let mut item = 0.0;
        if problem.shrinks() {
            let column_blocks = (columns / 128.0).ceil();
            item += costs.a_bytes * copies(columns * in_dim)
                + costs.x_bytes * copies(problem.pairs as f64 / tiles * in_dim) * column_blocks
                + costs.k_step * in_dim / 512.0;
        }
        if problem.expands() {
            item += costs.b_bytes * copies(columns * out_dim)
                + costs.n_step * sizes.out_dims.len() as f64 * out_dim / 512.0;
        }
        let items = tiles.max(1.0) / f64::from(problem.limits.multiprocessors);
        let routed = costs.thousand_pairs * problem.pairs as f64 / 1e3;
        costs.start + routed + side_by_side(likely.memory(&costs.memory), items * item)
    }

    /// Split-K: how many blocks share K, and the steps that each takes.
    pub fn splits(self, problem: &Problem<'_>, tiles: &RouteTiles) -> [u32; 2] {
        let steps = (problem.sizes().in_dim as u32).div_ceil(TileShape::DEPTH);
        // The h of half a call is whole, and only the kernels for vectors store parts.
        let splits = if problem.stage == Stage::Forward && self.tile != TileKind::Any {
            let most = (MAX_PARTIAL / problem.h_elements).min(u64::from(MAX_SPLITS)) as u32;
            let blocks = self.busy_tiles(problem, tiles) * u64::from(self.column_blocks(problem));
            blocks_each(blocks, problem.limits).min(most).min(steps / MIN_STEPS).max(1)
        } else {
            1
        };
        let steps_per_split = steps.div_ceil(splits);
        [steps.div_ceil(steps_per_split), steps_per_split]
    }

    /// How the call is run so, on this route, with so many splits of so many steps.
    ///
    /// # Errors
    /// As for [`Launch::new`].
    pub fn plan(
        self,
        problem: &Problem<'_>,
        route: &RouteTiles,
        [splits, steps_per_split]: [u32; 2],
        element: ElementType,
        index: IndexWidth,
    ) -> Result<GenericPlan> {
        let tile = self.tile;
        let (sizes, shape) = (problem.sizes(), tile.shape());
        let tile_parts = route.parts(shape.rows());
        let tiles = route.most * u64::from(tile_parts);
        let variant = Variant { element, index, tile };
        let shrink = || {
            let (column_blocks, column_room) = (self.column_blocks(problem), column_room(problem, shape));
            let blocks = tiles * u64::from(column_blocks) * u64::from(splits);
            let shared_bytes = shrink::shared_bytes(shape, column_room);
            let launch = Launch::new(Kernel::Shrink(variant), blocks, 1, shared_bytes)?;
            Ok(ShrinkPlan { launch, column_blocks, column_room, steps_per_split })
        };
        let expand = || {
            // As many columns a block as still leave the device full, since h is read again by each.
            let column_tiles = (sizes.out_dims.max() as u32).div_ceil(shape.columns());
            let busy = self.busy_tiles(problem, route) * sizes.out_dims.len() as u64;
            let runs = blocks_each(busy, problem.limits).clamp(1, column_tiles);
            let columns_per_block = column_tiles.div_ceil(runs) * shape.columns();
            let mut column_blocks = 0;
            let mut first_blocks = [u32::MAX; MAX_SLICES];
            for (first, &out_dim) in first_blocks.iter_mut().zip(sizes.out_dims.as_slice()) {
                *first = column_blocks;
                column_blocks += (out_dim as u32).div_ceil(columns_per_block);
            }
            let blocks = tiles * u64::from(column_blocks);
            let shared_bytes = expand::shared_bytes(shape, sizes.max_rank as u32);
            let launch = Launch::new(Kernel::Expand(variant), blocks, 1, shared_bytes)?;
            Ok(ExpandPlan { launch, first_blocks, column_blocks, columns_per_block })
        };
        Ok(GenericPlan {
            tile,
            tile_parts,
            splits,
            shrink: (problem.stage != Stage::Expand).then(shrink).transpose()?,
            expand: (problem.stage != Stage::Shrink).then(expand).transpose()?,
        })
    }

    /// Blocks that share a tile's columns of h.
    fn column_blocks(self, problem: &Problem<'_>) -> u32 {
        let columns = problem.sizes().out_dims.len() * problem.sizes().max_rank;
        (columns as u32).div_ceil(self.tile.shape().columns())
    }

    /// Most tiles with pairs. Of a given route's parts most are empty where segments are short: those with
    /// pairs are as many as the tiles of a route of this call's own.
    fn busy_tiles(self, problem: &Problem<'_>, tiles: &RouteTiles) -> u64 {
        let rows = self.tile.shape().rows();
        (tiles.most * u64::from(tiles.parts(rows))).min(problem.most_tiles(rows))
    }
}

/// Blocks that each of `items` must be shared by to fill the device.
fn blocks_each(items: u64, limits: &DeviceLimits) -> u32 {
    (u64::from(limits.multiprocessors) * BLOCKS_PER_MULTIPROCESSOR).div_ceil(items) as u32
}

/// Columns that a stage of `shrink` must have room for.
fn column_room(problem: &Problem<'_>, shape: TileShape) -> u32 {
    let columns = (problem.sizes().out_dims.len() * problem.sizes().max_rank).next_multiple_of(COLUMN_GROUP);
    shape.columns().min(columns as u32)
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
impl GenericPlan {
    /// The h of a call of this stage: the caller's, or in the workspace.
    fn h(arguments: &Arguments<'_>) -> Global<u16> {
        match arguments.problem.stage {
            Stage::Shrink | Stage::Expand => arguments.operands.h,
            Stage::Route | Stage::Forward => Global::new(arguments.parts.scratch),
        }
    }

    /// The parameter block of `shrink`.
    pub fn shrink_parameters(&self, shrink: &ShrinkPlan, arguments: &Arguments<'_>) -> ShrinkParams {
        let &Arguments { problem, operands, parts, .. } = arguments;
        ShrinkParams {
            x: operands.x,
            weights: arguments.weights(),
            h: Self::h(arguments),
            partial: Global::new(parts.scratch),
            pairs: parts.pairs,
            tiles: parts.tiles,
            counts: parts.counts,
            x_stride: problem.layout.x_stride as u64,
            rows: arguments.rows(),
            pair_count: arguments.pair_count(),
            column_blocks: shrink.column_blocks,
            column_room: shrink.column_room,
            splits: self.splits,
            steps_per_split: shrink.steps_per_split,
            write_all: (problem.stage == Stage::Shrink).into(),
            tile_parts: self.tile_parts,
            reserved: 0,
        }
    }

    /// The parameter block of `expand`.
    pub fn expand_parameters(&self, expand: &ExpandPlan, arguments: &Arguments<'_>) -> ExpandParams {
        let &Arguments { problem, operands, parts, .. } = arguments;
        ExpandParams {
            h: Self::h(arguments),
            partial: Global::new(parts.scratch),
            weights: arguments.weights(),
            out: operands.out,
            topk_weights: operands.topk_weights,
            pairs: parts.pairs,
            tiles: parts.tiles,
            counts: parts.counts,
            out_stride: problem.layout.out_stride as u64,
            rows: arguments.rows(),
            first_blocks: expand.first_blocks,
            column_blocks: expand.column_blocks,
            pair_count: arguments.pair_count(),
            columns_per_block: expand.columns_per_block,
            column_stride: problem.layout.order.column_step(&problem.sizes().out_dims) as u32,
            splits: self.splits,
            accumulate: operands.accumulate.into(),
            // `shrink` lies between it and the launch that made the route.
            route_is_old: self.shrink.is_some().into(),
            tile_parts: self.tile_parts,
        }
    }
}

impl fmt::Display for GenericPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(ShrinkPlan { launch, steps_per_split, .. }) = self.shrink {
            write!(f, "\n  {launch}, K in {} splits of {steps_per_split} steps", self.splits)?;
        }
        if let Some(ExpandPlan { launch, columns_per_block, .. }) = self.expand {
            write!(f, "\n  {launch}, {columns_per_block} columns a block")?;
        }
        Ok(())
    }
}
