//! How `prefill` divides a call's work once it is chosen: tiles, passes, stages and splits.

use super::Candidate;
use crate::dtype::DType;
use crate::plan::{DeviceLimits, PrefillTile, Problem};
use crate::projection::ProjectionSizes;
use moe_lora_kernels::prefill::{self as kernel, Shape};

/// Columns of h with which a stage holds 256 bytes of a row.
const MOST_COLUMNS: u32 = 128;

/// Pairs a segment from which on most tiles of 128 are full.
const FULL_TILES: u64 = 96;

/// Columns of h that a pass is to take: those of all slices, so that x is asked for once, or of one.
///
/// In tiles of 64 a slice is a work tile of its own, since there are hardly more tiles than blocks. In tiles
/// of 128 that costs more, unless a stage then holds rows of x twice as long.
pub(super) fn columns(tile: PrefillTile, sizes: &ProjectionSizes) -> u32 {
    let of_slice = kernel::rank_room(sizes.max_rank as u32);
    let of_all = sizes.out_dims.len() as u32 * of_slice;
    if tile == PrefillTile::M64 || of_all > MOST_COLUMNS { of_slice } else { of_all }
}

/// Blocks that the device runs at a time, of passes over tiles of `rows` pairs that blocks can share, as most
/// others.
fn blocks(rows: u32, limits: &DeviceLimits) -> f64 {
    let shape = Shape { rows, width: kernel::MAX_SHARED_WIDTH };
    f64::from(limits.multiprocessors * shape.blocks_per_sm())
}

/// Elements that a pass of so many slices moves for a pair: x, and old and new values of `out`.
fn pair_elements(sizes: &ProjectionSizes, slices: f64) -> f64 {
    sizes.in_dim as f64 + 2.0 * slices * sizes.out_dims.mean()
}

/// Tiles of the route have multiples of so many pairs.
const ROW_STEP: u32 = 8;

/// Ways to cut segments evenly that are compared: of longer segments those with the fullest tiles.
const MOST_PARTS: usize = 8;

/// What an element of weights that a segment's other tiles read too costs, to one that comes from memory.
const WEIGHTS_FROM_L2: f64 = 0.4;

/// Pairs of the tiles that a route is to have for whole passes over tiles of up to as many as the
/// candidate's: those with which the last of the blocks' passes, all as long, are done first.
///
/// Where a segment's pairs are just more than full tiles hold, another tile has few of them; and where full
/// tiles have just begun a round of passes, most blocks are idle in it. Tiles of like sizes avoid both.
pub(super) fn route_rows(problem: &Problem<'_>, candidate: &Candidate) -> u32 {
    let &Candidate { tile, passes, .. } = candidate;
    let (sizes, segments, pairs) = (problem.sizes(), problem.segments, problem.pairs as f64);
    let mean = pairs / segments as f64;
    // Of nearly all segments, where experts are chosen evenly.
    let most = mean + 2.0 * mean.sqrt();
    // Elements of a pass's weights, and of a pair in it.
    let slices = sizes.out_dims.len().div_ceil(passes as usize);
    let weights = (slices * sizes.max_rank) as f64 * (sizes.in_dim as f64 + sizes.out_dims.mean());
    let pair = pair_elements(sizes, slices as f64);
    let time = |(_, tiles): &(u32, f64)| {
        let rounds = (tiles * f64::from(passes) / blocks(tile.rows(), problem.limits)).ceil();
        rounds * (WEIGHTS_FROM_L2 * weights + pairs / tiles * pair)
    };
    let full = (tile.rows(), problem.likely_tiles(tile.rows()));
    let parts = ((most / f64::from(tile.rows())).ceil() as u32).max(2)..;
    let evenly = parts.take(MOST_PARTS).map(|parts| {
        let rows = (most / f64::from(parts)) as u32;
        (rows.next_multiple_of(ROW_STEP), (segments * u64::from(parts)) as f64)
    });
    let evenly = evenly.take_while(|(rows, _)| 2 * rows > tile.rows());
    let first = std::iter::once(full).chain(evenly).min_by(|one, other| time(one).total_cmp(&time(other)));
    first.unwrap_or(full).0
}

/// Whether most tiles of a route in tiles of `tile_rows` pairs fill those of the kernel.
pub(super) fn is_full(problem: &Problem<'_>, shape: Shape, tile_rows: u32) -> bool {
    tile_rows >= shape.rows && problem.pairs as u64 / problem.buckets() >= FULL_TILES
}

/// Stages: as many as there is room for, unless memory does better with fewer bytes under way.
///
/// On an H100 full tiles have enough under way in two: what is under way takes room in L2 from rows of x that
/// would be found there. Faster memory gives back what was driven out sooner.
pub(super) fn stages(candidate: &Candidate, is_full: bool, limits: &DeviceLimits) -> u32 {
    let &Candidate { shape, passes, .. } = candidate;
    let is_large = shape.rows == PrefillTile::M128.rows();
    match shape.width {
        ..=MOST_COLUMNS if is_large && is_full && passes == 1 && !limits.has_fast_memory() => 2,
        64 if is_large => 3,
        _ => shape.max_stages(),
    }
}

/// Steps of expand that may be under way in `stages` stages at a time. What is asked for waits in a queue, in
/// which what blocks leave one another waits too, and bytes that have landed wait for h.
pub(super) fn under_way(candidate: &Candidate, stages: u32, is_full: bool, limits: &DeviceLimits) -> u32 {
    let &Candidate { shape, shared, .. } = candidate;
    let is_large = shape.rows == PrefillTile::M128.rows();
    match shape.width {
        64 | 128 if shared && !is_large && is_full && limits.has_fast_memory() => stages,
        64 | 128 if shared && !is_large => 1,
        128 if !is_large => 1,
        ..=128 => stages.min(2),
        _ => stages,
    }
}

/// Bytes that a call's x is asked for while its route is made, as many as memory gives meanwhile, and the
/// least of a row.
const AHEAD: u64 = 6 << 20;
const LEAST_AHEAD: u64 = 256;

/// Bytes of each row of x that are asked for before the launch waits for the route.
pub(super) fn ahead(problem: &Problem<'_>) -> u32 {
    let row = (AHEAD / problem.x_rows()).min((problem.sizes().in_dim * DType::SIZE) as u64);
    // Whole lines of L2.
    if row < LEAST_AHEAD { 0 } else { (row / 128 * 128) as u32 }
}

/// Most elements of `out` of a slice that a work tile of shared passes takes, of tiles that are full.
const SHARED_OUT: u64 = 32 << 10;

/// Parts of K, and of a slice's columns, of passes that blocks share: of K so many that each block gets one;
/// of columns so many that none has more than [`SHARED_OUT`] elements, so that who is done early takes more
/// of them.
pub(super) fn splits(problem: &Problem<'_>, candidate: &Candidate) -> [u32; 2] {
    let &Candidate { shape, passes, .. } = candidate;
    let passes = problem.likely_tiles(shape.rows) * f64::from(passes);
    let depth = ((blocks(shape.rows, problem.limits) / passes) as u32).max(1);
    let is_full = problem.pairs as u64 / problem.segments >= FULL_TILES;
    let out = if is_full { SHARED_OUT } else { SHARED_OUT / 2 };
    let columns = (problem.sizes().out_dims.max() as u64 * u64::from(shape.rows)).div_ceil(out);
    [depth, u32::try_from(columns).unwrap_or(u32::MAX)]
}
