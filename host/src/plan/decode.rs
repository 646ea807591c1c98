//! `decode`: one launch of clusters that shrink and expand, for few pairs a segment, on sm_90 and later.

use crate::dtype::DType;
use crate::error::Result;
#[cfg(any(feature = "cuda", feature = "emulate"))]
use crate::plan::arguments::Arguments;
use crate::plan::costs::{COPIED, Costs, DecodeCosts};
use crate::plan::launch::Launch;
use crate::plan::likely::Likely;
use crate::plan::{DeviceLimits, Problem, RouteSource, RouteTiles, Stage};
use moe_lora_kernels::decode::segments::{self, Room};
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora_kernels::params::{DecodeParams, Divider, RouteParams};
use moe_lora_kernels::{DecodeRows, DecodeTile, ENTRIES, ElementType, IndexWidth, Kernel, decode as kernel};
use std::fmt;

/// Blocks of a cluster that a plan may choose.
pub(crate) const CLUSTERS: [u32; 4] = [1, 2, 4, 8];

/// Ranks of a group, which a warp multiplies at a time.
const GROUP: f64 = 16.0;

/// Elements of K of a stage.
const STAGE_K: f64 = kernel::A_STAGE as f64 / 2.0 / GROUP;

/// Largest rank whose costs are known.
const MOST_KNOWN_RANK: usize = 128;

/// Microseconds in which a cluster sees that a part of a given route's tile has no pairs: it costs a load.
const EMPTY_PART: f64 = 1.3;

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
fn is_legal(problem: &Problem<'_>) -> bool {
    let sizes = problem.sizes();
    matches!(problem.stage, Stage::Route | Stage::Forward)
        && problem.vectors
        && problem.has_vector_sizes()
        && problem.limits.has_clusters()
        && sizes.max_rank <= kernel::MAX_RANK as usize
        // Elements of one matrix of b are counted in 32 bits, whatever the index width.
        && sizes.out_dims.max().saturating_mul(sizes.max_rank) <= i32::MAX as usize
}

/// Whether it may be chosen where it is not forced: the costs of larger ranks were not measured.
pub(crate) fn is_known(problem: &Problem<'_>) -> bool {
    problem.sizes().max_rank <= MOST_KNOWN_RANK
}

/// The cluster of [`CLUSTERS`] that a number of blocks stands for: the largest up to it.
pub(crate) fn nearest_cluster(blocks: u32) -> u32 {
    1 << blocks.clamp(1, kernel::MAX_CLUSTER).ilog2()
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

    /// Microseconds that the call is likely to take so, with its routing.
    pub fn cost(&self, problem: &Problem<'_>, likely: &Likely, costs: &Costs) -> f64 {
        let &Candidate { rows, cluster, fit } = self;
        let (slices, limits) = (problem.sizes().out_dims.len() as f64, problem.limits);
        let multiprocessors = f64::from(limits.multiprocessors);
        let costs = match rows {
            DecodeRows::M8 => &costs.decode_m8,
            DecodeRows::M16 => &costs.decode_m16,
        };
        let tiles = likely.tiles(problem, rows.count()).max(likely.segments);
        let items = (tiles * slices).ceil().max(1.0);
        let clusters = clusters(items as u64, cluster, fit.blocks, limits) as f64;
        let blocks = clusters * f64::from(cluster);
        let found = match problem.route {
            RouteSource::Made if !fit.finds => costs.route,
            RouteSource::Made if problem.pairs > segments::WARP_PAIRS as usize => costs.find,
            _ => 0.0,
        };
        let when = |is_so: bool, time: f64| if is_so { time } else { 0.0 };
        let start = costs.start
            + found
            + when(cluster > 1, costs.cluster)
            + when(blocks > multiprocessors / 2.0, costs.half_full)
            + when(blocks > multiprocessors, costs.full);
        let others = (blocks / multiprocessors).max(1.0) - 1.0;
        let [a, b] = self.item_times(problem, likely, costs);
        let full = (items / clusters).ceil();
        let even = (items / clusters).max(1.0);
        let waves = even + costs.partial_wave * (full - even);
        // Shrink of an item goes side by side with expand of the one before it.
        let item = (a.powi(4) + b.powi(4) + costs.item.powi(4)).sqrt().sqrt();
        let later = (waves - 1.0) * item * (1.0 + costs.second_block_waves * others);
        let empty = problem.route.tile_rows().map_or(0.0, |given| {
            let parts = f64::from(given.div_ceil(rows.count()));
            EMPTY_PART * (parts * likely.tiles(problem, given) * slices - items).max(0.0) / clusters
        });
        start + (a + b) * (1.0 + costs.second_block * others) + likely.memory(&costs.memory) + later + empty
    }

    /// Microseconds of a work item's shrink, and of its expand.
    fn item_times(&self, problem: &Problem<'_>, likely: &Likely, costs: &DecodeCosts) -> [f64; 2] {
        let (sizes, rank) = (problem.sizes(), likely.rank);
        let (in_dim, out_dim, cluster) =
            (sizes.in_dim as f64, sizes.out_dims.mean(), f64::from(self.cluster));
        // Blocks of a cluster share groups of ranks, and where there are more blocks K as well.
        let groups = (rank / GROUP).ceil();
        let group_blocks = (groups as u32).next_power_of_two().min(self.cluster);
        let k_parts = f64::from(self.cluster / group_blocks);
        let groups_of_block = (groups / f64::from(group_blocks)).ceil();
        let a_stages = groups_of_block * (in_dim / k_parts / STAGE_K).ceil();
        let columns = (out_dim / cluster / 16.0).ceil() * 16.0;
        let stage_columns = (f64::from(kernel::B_STAGE) / 2.0 / rank / 16.0).floor() * 16.0;
        let b_stages = (columns / stage_columns.clamp(16.0, 256.0)).ceil();
        let copies = |dim: f64| rank * dim * DType::SIZE as f64 / cluster / COPIED;
        let a = costs.a_stage * a_stages + costs.a_bytes * copies(in_dim) + costs.k_share * k_parts;
        let b = costs.b_stage * b_stages + costs.b_bytes * copies(out_dim);
        [a, b]
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
        let items = tiles.most * u64::from(tile_parts) * sizes.out_dims.len() as u64;
        let fixed = kernel::fixed_bytes(rows.count(), sizes.max_rank as u32, cluster, room);
        let shared_bytes = fixed + stages_bytes(rows.count(), stages);
        let clusters = clusters(items, cluster, blocks, problem.limits);
        let tile = DecodeTile { rows, is_general: !problem.is_plain() };
        let kernel = Kernel::Decode { element, index, tile };
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
            let items = tiles * sizes.out_dims.len() as u64;
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
fn most_blocks(rows: DecodeRows) -> u32 {
    const M8: u32 = min_blocks(DecodeRows::M8);
    const M16: u32 = min_blocks(DecodeRows::M16);
    match rows {
        DecodeRows::M8 => M8,
        DecodeRows::M16 => M16,
    }
}

/// What the table of kernels says of it, looked up once.
const fn min_blocks(of: DecodeRows) -> u32 {
    let mut place = 0;
    loop {
        match ENTRIES[place].kernel {
            Kernel::Decode { tile, .. } if tile.rows.count() == of.count() => {
                return ENTRIES[place].min_blocks;
            }
            _ => place += 1,
        }
    }
}

/// Clusters of a launch: as many as the device runs at a time with `blocks` blocks a multiprocessor, each of
/// which takes one work item after another. With one more, its items would come last of all.
fn clusters(items: u64, cluster: u32, blocks: u32, limits: &DeviceLimits) -> u64 {
    let most = limits.decode_clusters[cluster.ilog2() as usize] * blocks / kernel::BLOCKS_PER_SM;
    items.min(u64::from(most)).max(1)
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
            (shrink * kernel::A_STAGE) as usize * sizes.out_dims.max()
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
        let slices = problem.sizes().out_dims.len() as u32;
        let clusters = launch.blocks / launch.cluster;
        DecodeParams {
            route,
            x: operands.x,
            weights: arguments.weights(),
            out: operands.out,
            topk_weights: operands.topk_weights,
            x_stride: problem.layout.x_stride as u64,
            out_stride: problem.layout.out_stride as u64,
            rows: arguments.rows(),
            over_slices: Divider::new(slices),
            tile_parts,
            over_parts: Divider::new(tile_parts),
            accumulate: operands.accumulate.into(),
            finds: finds.into(),
            room,
            shrink_stages: stages[0],
            expand_stages: stages[1],
            clusters,
            over_listed: Divider::new(if room.lists_all() { slices } else { clusters }),
            reserved: 0,
        }
    }
}

impl fmt::Display for DecodePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [shrink, expand] = self.stages;
        write!(f, "\n  {}, {shrink} + {expand} stages", self.launch)
    }
}
