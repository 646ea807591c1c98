//! The route: a launch that sorts the pairs into tiles (`route`), or takes over tiles that the caller has
//! sorted (`adopt`); and `align`, which sorts pairs as vLLM has them.

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod parameters;

use crate::check::check_limit;
use crate::error::Result;
#[cfg(any(feature = "cuda", feature = "emulate"))]
use crate::plan::DeviceLimits;
use crate::plan::launch::{Launch, entry};
use crate::plan::{Problem, RouteSource, RouteTiles};
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora_kernels::align;
use moe_lora_kernels::{Kernel, adopt, route as kernel};
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) use parameters::align_parameters;
use std::fmt;

/// Pairs of a block of `route` below which more blocks are never worth it.
const MIN_BLOCK_PAIRS: usize = 256;

/// Blocks of `route` that any workspace has room for, when buckets are not too many.
const MIN_ROUTE_BLOCKS: usize = 4;

/// Most words of a table in which blocks of `route` leave their counts for one another: 2 MiB.
const MAX_EXCHANGE: u64 = 1 << 19;

/// Threads of a warp.
const WARP: u32 = 32;

/// Pairs from which on `align` is spread over a cluster: fewer are sorted sooner than a cluster can meet.
#[cfg(any(feature = "cuda", feature = "emulate"))]
const ALIGN_CLUSTER_PAIRS: usize = 4096;

/// The route of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoutePlan {
    /// Its tiles.
    pub tiles: RouteTiles,
    /// What makes it.
    pub step: Step,
}

/// What makes a call's route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing: it is kept from an earlier call, or `decode` finds it.
    None,
    /// `route` sorts the pairs.
    Sort(Sorting),
    /// `adopt` takes over blocks of the caller's.
    Adopt(Launch),
}

/// How `route` divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sorting {
    /// The launch.
    pub launch: Launch,
    /// Pairs that each warp takes.
    pub run: u32,
    /// Buckets that are counted at a time.
    pub window: u32,
}

impl RoutePlan {
    /// The route in these tiles. `found`: by `decode`. `blocks`: of `route`, where they are forced.
    ///
    /// # Errors
    /// As for [`Launch::new`], and for more slots than `adopt` takes.
    pub fn new(problem: &Problem<'_>, tiles: RouteTiles, found: bool, blocks: Option<u32>) -> Result<Self> {
        let step = match problem.route {
            RouteSource::Made if found => Step::None,
            RouteSource::Made => Step::Sort(Sorting::new(problem, blocks)?),
            RouteSource::Sorted { .. } => {
                let slots = problem.sizes().slots;
                check_limit("slots", slots, adopt::MAX_SLOTS as usize)?;
                let blocks = tiles.most.div_ceil(u64::from(adopt::TILES));
                let shared_bytes = adopt::shared_bytes(slots as u32);
                Step::Adopt(Launch::new(Kernel::Adopt, blocks, 1, shared_bytes)?)
            }
            RouteSource::Kept { .. } => Step::None,
        };
        Ok(RoutePlan { tiles, step })
    }

    /// The launch that makes it.
    pub fn launch(&self) -> Option<Launch> {
        match self.step {
            Step::None => None,
            Step::Sort(Sorting { launch, .. }) | Step::Adopt(launch) => Some(launch),
        }
    }
}

impl Sorting {
    fn new(problem: &Problem<'_>, blocks: Option<u32>) -> Result<Self> {
        let (pairs, buckets, limits) = (problem.pairs, problem.buckets(), problem.limits);
        let slots = problem.sizes().slots as u64;
        let most = most_route_blocks(pairs, buckets).min(limits.multiprocessors);
        let blocks = blocks.unwrap_or(route_blocks(pairs)).clamp(1, most);
        let run = |kernel| {
            let warps = blocks * entry(kernel).threads / WARP;
            pairs.div_ceil(warps as usize).next_multiple_of(WARP as usize)
        };
        let room = |kernel| kernel::max_window(entry(kernel).threads / WARP, limits.shared_bytes);
        let is_narrow = |kernel: &Kernel| {
            let threads = entry(*kernel).threads;
            let block_pairs = run(*kernel) as u64 * u64::from(threads / WARP);
            (*kernel == Kernel::RouteGrid || blocks == 1)
                && kernel::is_narrow(threads, block_pairs, slots, buckets)
                && kernel::window(buckets) <= room(*kernel).into()
        };
        let narrow = [Kernel::Route, Kernel::RouteGrid].into_iter().find(is_narrow);
        let kernel = narrow.unwrap_or(Kernel::RouteWide);
        let window = kernel::window(buckets).min(room(kernel).into()) as u32;
        let shared_bytes = kernel::shared_bytes(entry(kernel).threads / WARP, window);
        let launch = Launch::new(kernel, blocks.into(), 1, shared_bytes)?;
        Ok(Sorting { launch, run: run(kernel) as u32, window })
    }
}

/// Blocks of `route`: one for as many pairs as its warps keep in registers, then so many that each has a
/// warp's width of pairs a warp. All blocks read what all have counted, so more than 64 pay only where a
/// block has thousands of pairs.
fn route_blocks(pairs: usize) -> u32 {
    match pairs {
        0..=1024 => 1,
        1025..32_768 => pairs.div_ceil(512) as u32,
        32_768..262_144 => 64,
        _ => 128,
    }
}

/// Most blocks of `route` on `pairs` pairs: a workspace has room for what so many leave for one another.
pub fn most_route_blocks(pairs: usize, buckets: u64) -> u32 {
    let most = (pairs / MIN_BLOCK_PAIRS).clamp(MIN_ROUTE_BLOCKS, kernel::MAX_BLOCKS as usize) as u64;
    most.min(MAX_EXCHANGE / buckets).max(1) as u32
}

/// The launch that sorts `pairs` pairs of `experts` experts into blocks, slot by slot.
///
/// # Errors
/// As for [`Launch::new`].
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) fn align(pairs: usize, experts: usize, slots: usize, limits: &DeviceLimits) -> Result<Launch> {
    let clustered = limits.has_clusters() && pairs >= ALIGN_CLUSTER_PAIRS;
    let kernel = if clustered { Kernel::AlignCluster } else { Kernel::Align };
    let cluster = entry(kernel).cluster;
    Launch::new(kernel, slots as u64 * u64::from(cluster), cluster, align::shared_bytes(experts as u32))
}

impl fmt::Display for RoutePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.launch().map_or(Ok(()), |launch| write!(f, "\n  {launch}"))
    }
}
