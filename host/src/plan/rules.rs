//! Rules that choose the form of a call, measured on an H100 unless said. docs/PERFORMANCE.md has the
//! measurements.

use crate::dtype::DType;
use crate::plan::choose::Candidate;
use crate::plan::prefill::division::{blocks, pair_elements};
use crate::plan::{DeviceLimits, Form, Options, PrefillTile, Problem, Stage, decode, generic, prefill};
use moe_lora_kernels::{DecodeRows, TileKind, decode as decode_kernel};

/// The candidate for a call: as it is forced, where that is legal, or the one that is likely the fastest.
pub(super) fn choose(problem: &Problem<'_>, options: &Options) -> Candidate {
    let decode = decode(problem, options);
    // A route made alone is made for the calls that will use it.
    let least = prefill_least(problem, decode.is_some() || problem.stage != Stage::Forward);
    match (prefill(problem, options, least), decode) {
        (Some(candidate), _) => Candidate::Prefill(candidate),
        (None, Some(candidate)) => Candidate::Decode(candidate),
        (None, None) => Candidate::Generic(generic(problem, options)),
    }
}

/// The tile: the smallest that holds most segments whole, since every further tile of a segment reads its
/// weights again. Segments are guessed to be of the size that uniform routing over all slots gives.
fn generic(problem: &Problem<'_>, options: &Options) -> generic::Candidate {
    let legal = |tile| generic::Candidate::legal(problem, tile);
    if let Some(forced) = options.tile.and_then(|tile| legal(tile.into())) {
        return forced;
    }
    let wanted = match problem.pairs as u64 / problem.buckets() {
        0..=12 => TileKind::M16,
        13..=40 => TileKind::M32,
        _ => TileKind::M64,
    };
    // From the wanted size downwards: a large rank may leave no room for a large tile.
    let tiles = [TileKind::M64, TileKind::M32, TileKind::M16].into_iter().skip_while(|tile| *tile != wanted);
    tiles.chain([TileKind::Any]).find_map(legal).expect("one of the last two is legal")
}

/// The tile and the cluster of `decode`, where it can be, and should be, what runs.
fn decode(problem: &Problem<'_>, options: &Options) -> Option<decode::Candidate> {
    if !decode::is_legal(problem) {
        return None;
    }
    let wanted = match (options.form, options.tile) {
        (Some(form), _) => form == Form::Decode,
        (None, Some(_)) => false,
        (None, None) => wants_decode(problem),
    };
    if !wanted {
        return None;
    }
    let rows = options.rows.map_or_else(|| decode_rows(problem), DecodeRows::from);
    // From the wanted size downwards: a large rank may leave no room for a large tile, and a route may have
    // small ones.
    DecodeRows::ALL.into_iter().rev().skip_while(|of| *of > rows).find_map(|rows| {
        let cluster = match options.cluster {
            Some(cluster) => 1 << cluster.clamp(1, decode_kernel::MAX_CLUSTER).ilog2(),
            None => decode_cluster(problem, rows),
        };
        decode::Candidate::legal(problem, rows, cluster)
    })
}

/// The tile of `prefill`, and whether blocks share passes, where it can be, and should be, what runs.
/// `least`: as by [`prefill_least`].
fn prefill(problem: &Problem<'_>, options: &Options, least: u64) -> Option<prefill::Candidate> {
    if !prefill::is_legal(problem) {
        return None;
    }
    let (tile, shared) = match (options.form, options.tile) {
        (Some(Form::Prefill(tile)), _) => (tile, false),
        (Some(Form::SharedPrefill(tile)), _) => (tile, true),
        (Some(_), _) | (None, Some(_)) => return None,
        (None, None) => prefill_tile(problem, least)?,
    };
    // A given route's tiles may be too small for the larger tile, and not for the smaller.
    let fits = |tile: &PrefillTile| prefill::Candidate::legal(problem, *tile, false).is_some();
    let tile = [tile, PrefillTile::M64].into_iter().find(fits)?;
    prefill::Candidate::legal(problem, tile, shared)
}

/// Pairs a segment from which on `decode` is the slower form, however small the weights are: at 8, segments
/// of more than a tile's pairs read them twice.
const DECODE_SEGMENT: u64 = 7;

/// Ranks up to which `decode` is the faster form.
const DECODE_RANK: usize = 128;

/// Bytes of a segment's weights, of all slices and ranks, from which on `prefill` is the faster form at fewer
/// pairs a segment, and at how many.
const PREFILL_SEGMENTS: &[(usize, u64)] = &[(512 << 10, 2), (256 << 10, 4)];

/// The same where memory is fast: the bytes that both forms read cost less there.
const PREFILL_SEGMENTS_FAST: &[(usize, u64)] = &[(512 << 10, 5)];

/// Pairs a segment from which on `prefill` is the faster form than `decode`. Its tiles being one block's, it
/// takes more where there are few segments. Its copies cost as much for few ranks as for many: so it takes
/// more, too, where slots have ranks of their own.
fn prefill_segment(problem: &Problem<'_>) -> u64 {
    let sizes = problem.sizes();
    let bytes = sizes.slices * sizes.max_rank * (sizes.in_dim + sizes.out_dim) * DType::SIZE;
    let are_few = 2 * problem.segments < 3 * u64::from(problem.limits.multiprocessors);
    let is_fast = problem.ranked || problem.limits.has_fast_memory();
    let rules = if is_fast { PREFILL_SEGMENTS_FAST } else { PREFILL_SEGMENTS };
    let mut fitting = rules.iter().filter(|(least, _)| bytes >= *least).map(|(_, segment)| *segment);
    fitting.nth(are_few.into()).unwrap_or(DECODE_SEGMENT)
}

/// Pairs a segment from which on `prefill` is the faster form than the other that the call could have:
/// `decode`, if it `decodes`, and otherwise two launches on tiles as large.
fn prefill_least(problem: &Problem<'_>, decodes: bool) -> u64 {
    match decodes {
        _ if problem.sizes().max_rank > DECODE_RANK => 0,
        true => prefill_segment(problem),
        false => 1,
    }
}

/// Most pairs for which `decode` takes a given route's tiles in parts, most of them empty: to see that a part
/// is costs a load.
const DECODE_IN_PARTS: usize = 64;

/// Whether `decode` is a faster form than two launches: where segments are so short that a call costs what
/// its weights' bytes cost.
fn wants_decode(problem: &Problem<'_>) -> bool {
    let pairs = problem.pairs;
    let in_parts = problem.route.tile_rows().is_some_and(|rows| rows > DecodeRows::M8.count());
    let is_short =
        (pairs as u64) < DECODE_SEGMENT * problem.buckets() && (!in_parts || pairs <= DECODE_IN_PARTS);
    is_short && problem.sizes().max_rank <= DECODE_RANK && !leaves_most_idle(problem)
}

/// Microseconds that two launches take beside what their bytes do.
const TWO_LAUNCHES: f64 = 9.5;

/// Whether work items of `decode` are so few and so large that two launches, whose blocks share K and columns
/// further than a cluster can, are done before one item is.
fn leaves_most_idle(problem: &Problem<'_>) -> bool {
    let bytes = decode::item_bytes(problem);
    let slices = problem.sizes().slices as f64;
    let read = problem.likely_segments() * slices * bytes.iter().sum::<f64>();
    let cluster = decode_kernel::MAX_CLUSTER;
    let item = DECODE_START + item_time(bytes, cluster, 0.0) + last_time(bytes, cluster);
    item > TWO_LAUNCHES + read / problem.limits.streamed()
}

/// Pairs of a tile of `decode`: the smallest that holds most segments whole.
fn decode_rows(problem: &Problem<'_>) -> DecodeRows {
    match problem.pairs as u64 / problem.buckets() {
        0..=8 => DecodeRows::M8,
        _ => DecodeRows::M16,
    }
}

/// Bytes a microsecond that one block of `decode` takes when nothing keeps it from it.
const STREAM_OF_ONE: f64 = 32e3;
/// Microseconds that each work item costs a block beside its bytes, and more for each block of its cluster.
const ITEM_TIME: f64 = 0.16;
const EXCHANGE_TIME: f64 = 0.096;
/// Part of an item's expand that a call ends with, with nothing left to shrink meanwhile.
const END: f64 = 0.26;
/// Microseconds that it costs to begin with two blocks a multiprocessor.
const CROWD_TIME: f64 = 1.07;
/// Part of these times that clusters of [`decode_kernel::MAX_CLUSTER`] take if their blocks have whole stages
/// of K.
const LARGEST_WHOLE: f64 = 0.95;
/// Microseconds that a call takes beside: the launch, the segments, the first copy's latency.
const DECODE_START: f64 = 3.6;

/// Microseconds of a work item of so many bytes in a cluster of so many blocks, while memory is busy for
/// `memory` microseconds with those of all clusters.
fn item_time([a, b]: [f64; 2], cluster: u32, memory: f64) -> f64 {
    let cluster = f64::from(cluster);
    memory.hypot((a + b) / (STREAM_OF_ONE * cluster)).hypot(ITEM_TIME + EXCHANGE_TIME * cluster)
}

/// Microseconds by which the last item's expand is later than its copies.
fn last_time([_, b]: [f64; 2], cluster: u32) -> f64 {
    END * b / (STREAM_OF_ONE * f64::from(cluster))
}

/// Blocks of a cluster of `decode`: those with which the last work item is done first. Clusters take one item
/// after another, so a call is as many full waves as there are, and a partial one, which large clusters
/// shorten.
fn decode_cluster(problem: &Problem<'_>, rows: DecodeRows) -> u32 {
    let (sizes, limits, blocks) = (problem.sizes(), problem.limits, decode::most_blocks(rows));
    let bytes = decode::item_bytes(problem);
    let read = problem.likely_segments();
    let tiles = problem.likely_tiles(rows.count()).max(read);
    let items = (tiles * sizes.slices as f64).ceil().max(1.0) as u64;
    // A segment's second tile finds its weights in L2.
    let memory = read / tiles * bytes.iter().sum::<f64>() / limits.streamed();
    let time = |cluster: u32| {
        let clusters = decode::clusters(items, cluster, blocks, limits);
        let wave = |items: u64| match items {
            0 => 0.0,
            _ => item_time(bytes, cluster, items as f64 * memory),
        };
        let waves = (items / clusters) as f64 * wave(clusters) + wave(items % clusters);
        let crowded = clusters * u64::from(cluster) > u64::from(limits.multiprocessors);
        let crowd = if crowded { CROWD_TIME } else { 0.0 };
        let is_whole = decode_kernel::has_whole_stages(sizes.in_dim as u32, sizes.max_rank as u32, cluster);
        let part = if cluster == decode_kernel::MAX_CLUSTER && is_whole { LARGEST_WHOLE } else { 1.0 };
        part * (DECODE_START + waves + last_time(bytes, cluster) + crowd)
    };
    let clusters = decode::CLUSTERS.into_iter();
    clusters.min_by(|one, other| time(*one).total_cmp(&time(*other))).unwrap_or(1)
}

/// Elements that a pass moves for a pair from which on it matters when some blocks have one more than others,
/// or when some have none; and which part of the passes that all could have is then enough.
const LONG_PASS: f64 = 8_000.0;
/// And up to which it does not matter when half of the blocks have none.
const SHORT_PASS: f64 = 6_000.0;
const VERY_LONG_PASS: f64 = 20_000.0;
const FULL_ROUNDS: f64 = 0.8;

/// Pairs a segment from which on passes are shared, if there are more columns than elements of K: while h is
/// summed the memory is busy with what is expanded.
const SHARED_SEGMENT: u64 = 16;

/// Pairs a segment from which on blocks share passes over tiles of 128, if x is read once in them, and not
/// for each slice, and each block has a whole one.
const LARGE_SHARED_SEGMENT: u64 = 256;

/// Pairs a segment from which on tiles of 128 are wanted.
const LARGE_TILE: u64 = 48;

/// Pairs of half a tile of 64, and of a quarter.
const HALF_TILE: u64 = 32;
const QUARTER_TILE: u64 = 16;

/// Passes a multiprocessor that make whole passes the faster form whatever their tiles hold, and where they
/// are full enough.
const ENOUGH_PASSES: f64 = 0.75;
const ENOUGH_FULL_PASSES: f64 = 0.4;

/// Passes over tiles of this size, to blocks that the device runs at a time.
fn prefill_rounds(problem: &Problem<'_>, candidate: &prefill::Candidate, limits: &DeviceLimits) -> f64 {
    let rows = candidate.tile.rows();
    let likely = problem.likely_tiles(rows);
    // Of segments with about as many tiles each, or one more, the deviation of their sum.
    let segments = problem.segments as f64;
    let more = (likely / segments).fract();
    let deviation = (segments * more * (1.0 - more)).sqrt();
    (likely + deviation) * f64::from(candidate.passes) / blocks(rows, limits)
}

/// The tile of `prefill`, where that is the faster form, and whether blocks share passes; segments are
/// guessed as for [`generic`]. `least`: as by [`prefill_least`].
///
/// A pass over a tile is one block's, so few of them leave multiprocessors idle. At three quarters of the
/// multiprocessors it is the faster form whatever the tiles hold; of fewer passes blocks take shares.
fn prefill_tile(problem: &Problem<'_>, least: u64) -> Option<(PrefillTile, bool)> {
    let (sizes, limits) = (problem.sizes(), problem.limits);
    let segment = problem.pairs as u64 / problem.segments;
    let multiprocessors = f64::from(limits.multiprocessors);
    let whole = |tile| prefill::Candidate::whole(problem.projection, tile);
    let (small, large) = (whole(PrefillTile::M64)?, whole(PrefillTile::M128)?);
    let of = |tile: PrefillTile| if tile == PrefillTile::M64 { &small } else { &large };
    let rounds = |tile: PrefillTile| prefill_rounds(problem, of(tile), limits);
    // In the larger tiles x is read once, where a pass over them has more slices; but there are fewer.
    let reads_once = large.passes < small.passes;
    let are_many = segment >= LARGE_SHARED_SEGMENT && rounds(PrefillTile::M128) >= 1.0;
    let is_large = reads_once && are_many && large.most_split_k(problem) > 0;
    let shared_tile = if is_large { PrefillTile::M128 } else { PrefillTile::M64 };
    let can_share = of(shared_tile).most_split_k(problem) > 0;
    let pass = |tile: PrefillTile| pair_elements(sizes, sizes.slices as f64 / f64::from(of(tile).passes));
    let is_enough = |tile: &PrefillTile| {
        let rows = prefill::division::route_rows(problem, of(*tile));
        let passes = problem.likely_tiles(rows) * f64::from(of(*tile).passes);
        let few_will_do = if can_share {
            // In place of shares, whose exchange costs more than short passes that some blocks have none of.
            *tile == PrefillTile::M64 && segment >= QUARTER_TILE && pass(*tile) < SHORT_PASS
        } else {
            segment >= HALF_TILE
        };
        passes >= multiprocessors * if few_will_do { ENOUGH_FULL_PASSES } else { ENOUGH_PASSES }
    };
    let wanted = match segment {
        _ if segment < least => &[][..],
        ..LARGE_TILE => &[PrefillTile::M64][..],
        _ => &[PrefillTile::M128, PrefillTile::M64][..],
    };
    let leaves_idle = |tile: &PrefillTile| {
        let rounds = rounds(*tile);
        let least = if rounds > 1.0 { LONG_PASS } else { VERY_LONG_PASS };
        rounds < FULL_ROUNDS * rounds.ceil() && pass(*tile) >= least
    };
    let whole = wanted.iter().find(|tile| is_enough(tile));
    let least_shared = if sizes.out_dim > sizes.in_dim { SHARED_SEGMENT } else { 2 * SHARED_SEGMENT };
    if can_share && segment >= least_shared && whole.is_none_or(leaves_idle) {
        return Some((shared_tile, true));
    }
    whole.map(|tile| (*tile, false))
}
