//! `decode`: one launch of clusters that shrink and expand, for few pairs a segment, on sm_90 and later.

use crate::dtype::DType;
use crate::error::Result;
#[cfg(any(feature = "cuda", feature = "emulate"))]
use crate::plan::arguments::Arguments;
use crate::plan::launch::{Launch, entry};
use crate::plan::{DeviceLimits, Problem, RouteSource, RouteTiles, Stage};
use moe_lora_kernels::decode::segments::{self, Room};
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora_kernels::params::{DecodeParams, Divider, RouteParams};
use moe_lora_kernels::{DecodeRows, ElementType, IndexWidth, Kernel, decode as kernel};
use std::fmt;

/// Blocks of a cluster that a plan may choose.
pub(crate) const CLUSTERS: [u32; 4] = [1, 2, 4, 8];

/// A way to run a call as `decode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Pairs of a tile.
    pub rows: DecodeRows,
    /// Blocks of a cluster, one of [`CLUSTERS`].
    pub cluster: u32,
    fit: Fit,
}

/// What a block has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fit {
    /// Blocks that a multiprocessor runs at a time.
    blocks: u32,
    /// Whether each block finds the segments itself.
    finds: bool,
    /// For these; nothing when it finds none.
    room: Room,
    /// Stages for shrink and for expand.
    stages: [u32; 2],
}

/// How `decode` divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DecodePlan {
    /// The launch.
    pub launch: Launch,
    /// Parts that it takes a tile of the route in.
    pub tile_parts: u32,
    /// Whether each block finds the segments itself.
    pub finds: bool,
    /// What the blocks have room for; nothing when they find no segments.
    pub room: Room,
    /// Stages for shrink and for expand.
    pub stages: [u32; 2],
}

/// Whether `decode` can run a call at all, whatever the tile and the cluster.
pub(crate) fn is_legal(problem: &Problem<'_>) -> bool {
    let sizes = problem.sizes();
    problem.stage == Stage::Forward
        && problem.vectors
        && problem.limits.has_clusters()
        && sizes.max_rank <= kernel::MAX_RANK as usize
        // Elements of one matrix of b are counted in 32 bits, whatever the index width.
        && sizes.out_dim.saturating_mul(sizes.max_rank) <= i32::MAX as usize
}

impl Candidate {
    /// A way to run the call with this tile and this cluster, one of [`CLUSTERS`]; `None` where it cannot be
    /// run so: a large rank may leave no room for a large tile, and a given route's tiles may be smaller.
    pub fn legal(problem: &Problem<'_>, rows: DecodeRows, cluster: u32) -> Option<Self> {
        let most_rows = problem.route.tile_rows().unwrap_or(u32::MAX).max(DecodeRows::M8.count());
        if !is_legal(problem) || rows.count() > most_rows {
            return None;
        }
        // Where segments and h leave too little room for several blocks, one takes all.
        let fit =
            (1..=most_blocks(rows)).rev().find_map(|blocks| Fit::new(problem, rows, cluster, blocks))?;
        Some(Candidate { rows, cluster, fit })
    }

    /// How the call is run so, on this route.
    ///
    /// # Errors
    /// As for [`Launch::new`].
    pub fn plan(
        self,
        problem: &Problem<'_>,
        tiles: &RouteTiles,
        element: ElementType,
        index: IndexWidth,
    ) -> Result<DecodePlan> {
        let Candidate { rows, cluster, fit: Fit { blocks, finds, room, stages } } = self;
        let sizes = problem.sizes();
        let tile_parts = tiles.parts(rows.count());
        let items = tiles.most * u64::from(tile_parts) * sizes.slices as u64;
        let fixed = kernel::fixed_bytes(rows.count(), sizes.max_rank as u32, cluster, room);
        let shared_bytes = fixed + stages_bytes(rows.count(), stages);
        let clusters = clusters(items, cluster, blocks, problem.limits);
        let kernel = Kernel::Decode { element, index, rows };
        let launch = Launch::new(kernel, clusters * u64::from(cluster), cluster, shared_bytes)?;
        Ok(DecodePlan { launch, tile_parts, finds, room, stages })
    }
}

impl Fit {
    /// Of `blocks` blocks a multiprocessor; `None` where there is not room for so many.
    fn new(problem: &Problem<'_>, rows: DecodeRows, cluster: u32, blocks: u32) -> Option<Self> {
        let (sizes, rows) = (problem.sizes(), rows.count());
        let finds = problem.route == RouteSource::Made
            && problem.pairs <= segments::MAX_PAIRS as usize
            && sizes.slots.max(sizes.experts) <= segments::MAX_NUMBER as usize;
        let (mut room, mut scratch) = (Room::NONE, 0);
        if finds {
            let tiles = problem.most_tiles(rows);
            let items = tiles * sizes.slices as u64;
            let own = items.div_ceil(clusters(items, cluster, blocks, problem.limits));
            let pairs = problem.pairs as u32;
            room = Room::new(pairs, problem.segments, tiles as u32, rows, own as u32);
            scratch = room.scratch_bytes(pairs, problem.segments);
        }
        let fixed = kernel::fixed_bytes(rows, sizes.max_rank as u32, cluster, room);
        let left = problem.limits.shared_bytes_of(blocks).checked_sub(fixed)?;
        let stages = stages(problem, rows, left)?;
        let has_scratch = stages[1] * kernel::expand_stage_bytes(rows) >= scratch;
        has_scratch.then_some(Fit { blocks, finds, room, stages })
    }
}

/// Blocks with tiles of so many pairs for which a multiprocessor has registers.
pub(crate) fn most_blocks(rows: DecodeRows) -> u32 {
    entry(Kernel::Decode { element: ElementType::Bf16, index: IndexWidth::I32, rows }).min_blocks
}

/// Clusters of a launch: as many as the device runs at a time with `blocks` blocks a multiprocessor, each of
/// which takes one work item after another. With one more, its items would come last of all.
pub(crate) fn clusters(items: u64, cluster: u32, blocks: u32, limits: &DeviceLimits) -> u64 {
    let most = limits.decode_clusters[cluster.ilog2() as usize] * blocks / kernel::BLOCKS;
    items.min(u64::from(most)).max(1)
}

/// Bytes of a work item's weights, the (tile, slice) that one cluster takes: of `a`, and of `b`.
pub(crate) fn item_bytes(problem: &Problem<'_>) -> [f64; 2] {
    let sizes = problem.sizes();
    [sizes.in_dim, sizes.out_dim].map(|dim| (sizes.max_rank * dim * DType::SIZE) as f64)
}

/// Bytes of all stages.
fn stages_bytes(rows: u32, [shrink, expand]: [u32; 2]) -> u32 {
    shrink * kernel::shrink_stage_bytes(rows) + expand * kernel::expand_stage_bytes(rows)
}

/// Stages for which `bytes` bytes have room: as many for shrink and for expand as their shares of the
/// weights' bytes are. `None` when there is not even room for the fewest.
fn stages(problem: &Problem<'_>, rows: u32, bytes: u32) -> Option<[u32; 2]> {
    let sizes = problem.sizes();
    let fits = |stages: [u32; 2]| {
        stages_bytes(rows, stages) <= bytes && stages.iter().all(|stages| *stages <= kernel::MAX_STAGES)
    };
    let mut stages = Some([kernel::MIN_STAGES; 2]).filter(|stages| fits(*stages))?;
    loop {
        let [shrink, expand] = stages;
        let more = [[shrink + 1, expand], [shrink, expand + 1]];
        let wanted = usize::from(
            (shrink * kernel::A_STAGE) as usize * sizes.out_dim
                > (expand * kernel::B_STAGE) as usize * sizes.in_dim,
        );
        match [more[wanted], more[1 - wanted]].into_iter().find(|stages| fits(*stages)) {
            Some(more) => stages = more,
            None => return Some(stages),
        }
    }
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
impl DecodePlan {
    /// The parameter block. `route`: the routing, if the blocks find the segments, or where these are.
    pub fn parameters(&self, arguments: &Arguments<'_>, route: RouteParams) -> DecodeParams {
        let &DecodePlan { launch, tile_parts, finds, room, stages } = self;
        let &Arguments { problem, operands, .. } = arguments;
        let (sizes, projection) = (problem.sizes(), problem.projection);
        let clusters = launch.blocks / launch.cluster;
        DecodeParams {
            route,
            x: operands.x,
            a: operands.a,
            b: operands.b,
            out: operands.out,
            topk_weights: operands.topk_weights,
            x_stride: problem.layout.x_stride as u64,
            out_stride: problem.layout.out_stride as u64,
            x_row: arguments.x_row(),
            in_dim: sizes.in_dim as u32,
            out_dim: sizes.out_dim as u32,
            slices: sizes.slices as u32,
            over_slices: Divider::new(sizes.slices as u32),
            tile_parts,
            over_parts: Divider::new(tile_parts),
            a_experts: projection.a_experts() as u32,
            b_experts: projection.b_experts() as u32,
            accumulate: operands.accumulate.into(),
            finds: finds.into(),
            room,
            shrink_stages: stages[0],
            expand_stages: stages[1],
            clusters,
            over_listed: Divider::new(if room.lists_all() { sizes.slices as u32 } else { clusters }),
        }
    }
}

impl fmt::Display for DecodePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [shrink, expand] = self.stages;
        write!(f, "\n  {}, {shrink} + {expand} stages", self.launch)
    }
}
