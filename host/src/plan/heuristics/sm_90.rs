//! Rules of the forms that sm_90's kernels alone have, `decode` and `prefill`, measured on an H100 unless said.

use crate::dtype::DType;
use crate::plan::{DeviceLimits, PrefillTile};
use crate::projection::ProjectionSizes;
use moe_lora_kernels::DecodeRows;
use moe_lora_kernels::{decode, prefill};

/// Pairs a segment from which on `decode` is the slower form, however small the weights are: at 8, segments of more than a tile's pairs
/// read them twice.
const DECODE_SEGMENT: u64 = 7;

/// Ranks up to which `decode` is the faster form. Of R = 192 w13 takes 99.6 µs in it at 16 tokens, 92.0 in two launches and 84.7 in `prefill`, w2 108, 48.7 and
/// 44.1; of R = 128 55.8, 61.9 and 57.7, w2 34.1, 38.2 and 35.3.
const DECODE_RANK: usize = 128;

/// Bytes of a segment's weights, of all slices and ranks, from which on `prefill` is the faster form at fewer pairs a segment, and at how many.
/// With routing, µs in `decode` and in `prefill` on an H100: w13 of R = 64 (704 KiB) takes 65.7 and 65.0 at two pairs, 74.1 and 71.7 at four, 80.9 and 72.2 at five;
/// of R = 32 43.9 and 43.0 at four, and w2 of R = 64 38.5 and 39.3 at two and a half, 43.1 and 42.3 at four, 49.0 and 44.0 at five; w13 of R = 16
/// 27.2 and 28.8 at four.
const PREFILL_SEGMENTS: &[(usize, u64)] = &[(512 << 10, 2), (256 << 10, 4)];

/// The same where memory is fast: the bytes that both forms read cost less there, and the start of `route` and `prefill` as much. On an H200: w13 of R = 64 44.3 and 48.6 at two pairs, 50.9 and 54.0 at four, 54.5 and 54.8 at five (where experts are chosen by Zipf's law 35.9 and 46.9,
/// 50.8 and 49.4, 56.8 and 52.2); of R = 128 93.5 and 95.9 at four, 104 and 98.5 at six; of R = 32 29.3 and 37.5, 34.1 and 38.8; w2 of R = 64 29.7 and 32.1, 34.7 and 33.9; adapters of rank 8 in
/// an allocation of 128 17.9 and 30.6 at two, 20.4 and 32.9 at four.
const PREFILL_SEGMENTS_FAST: &[(usize, u64)] = &[(512 << 10, 5)];

/// Whether memory is fast: an H200's, of 4.8 TB/s, and not an H100's, of 3.35.
fn is_fast(limits: &DeviceLimits) -> bool {
    limits.memory_rate >= 4_000_000
}

/// Pairs a segment from which on `prefill` is the faster form. Its tiles being one block's, it takes more where there are few segments: the 128 of gpt-oss-20b with
/// four adapters (720 KiB) take w13 38.7 and 41.6 µs at two pairs, 44.6 and 44.4 at four; on an H200 27.0 and 38.9, 31.9 and 39.9, 36.2 and 40.7 at six.
///
/// Where slots have ranks of their own (`ranked`) it is so from as many on as with fast memory: `prefill`'s copies cost as much for few ranks as for many, so adapters of rank 8 in an allocation of 128 take 25.6 µs in `decode` at two and a half pairs
/// on an H100 and 31.3 in `prefill`, and of the largest rank few more in the former.
fn prefill_segment(sizes: &ProjectionSizes, ranked: bool, limits: &DeviceLimits) -> u64 {
    let segments = (sizes.slots * sizes.experts) as u64;
    let bytes = sizes.slices * sizes.max_rank * (sizes.in_dim + sizes.out_dim) * DType::SIZE;
    let are_few = 2 * segments < 3 * u64::from(limits.multiprocessors);
    let rules = if ranked || is_fast(limits) { PREFILL_SEGMENTS_FAST } else { PREFILL_SEGMENTS };
    let mut fitting = rules.iter().filter(|(least, _)| bytes >= *least).map(|(_, segment)| *segment);
    fitting.nth(are_few.into()).unwrap_or(DECODE_SEGMENT)
}

/// Pairs a segment from which on `prefill` is the faster form than the other that the call could have: `decode`, if it `decodes`, and otherwise two launches on tiles as large.
pub(in crate::plan) fn prefill_least(
    sizes: &ProjectionSizes,
    decodes: bool,
    ranked: bool,
    limits: &DeviceLimits,
) -> u64 {
    match decodes {
        _ if sizes.max_rank > DECODE_RANK => 0,
        true => prefill_segment(sizes, ranked, limits),
        false => 1,
    }
}

/// Most pairs for which `decode` takes a given route's tiles in parts, most of them empty: to see that a part is costs a
/// load. On vLLM's blocks w13 takes 24 µs at 64 pairs, 38 at 128 and 98 at 640; on tiles of its own 19, 30 and 65.
const DECODE_IN_PARTS: usize = 64;

/// Whether `decode` is a faster form than two launches: where segments are so short that a call costs what its weights' bytes cost.
/// `tile_rows`: pairs a tile of a given route.
pub(in crate::plan) fn wants_decode(
    pairs: usize,
    buckets: u64,
    sizes: &ProjectionSizes,
    tile_rows: Option<u32>,
    limits: &DeviceLimits,
) -> bool {
    let in_parts = tile_rows.is_some_and(|rows| rows > DecodeRows::M8.count());
    let is_short = (pairs as u64) < DECODE_SEGMENT * buckets && (!in_parts || pairs <= DECODE_IN_PARTS);
    is_short && sizes.max_rank <= DECODE_RANK && !leaves_most_idle(pairs, sizes, limits)
}

/// Microseconds that two launches take beside what their bytes do.
const TWO_LAUNCHES: f64 = 9.5;

/// Whether units of `decode` are so few and so large that two launches, whose blocks share K and columns further than a cluster can, are done before
/// one unit is: one token of Mixtral-8x7B takes w13 14.8 µs in `decode` and 11.6 in two launches, w2 13.7 and 12.2; four tokens w13 19.8 and 20.0.
fn leaves_most_idle(pairs: usize, sizes: &ProjectionSizes, limits: &DeviceLimits) -> bool {
    let segments = (sizes.slots * sizes.experts) as u64;
    let read = likely_segments(pairs, segments) * sizes.slices as f64 * unit_bytes(sizes).iter().sum::<f64>();
    let unit =
        DECODE_START + unit_time(sizes, decode::MAX_CLUSTER, 0.0) + last_time(sizes, decode::MAX_CLUSTER);
    unit > TWO_LAUNCHES + read / limits.streamed()
}

/// Bytes of a unit's weights: of `a`, and of `b`.
fn unit_bytes(sizes: &ProjectionSizes) -> [f64; 2] {
    [sizes.in_dim, sizes.out_dim].map(|dim| (sizes.max_rank * dim * DType::SIZE) as f64)
}

/// Segments that uniform routing over `buckets` leaves with a pair or more.
fn likely_segments(pairs: usize, buckets: u64) -> f64 {
    buckets as f64 * (1.0 - (-(pairs as f64) / buckets as f64).exp())
}

/// Pairs of a tile of `decode`: the smallest that holds most segments whole, as for [`tile`](super::tile). At 8 pairs a segment w13
/// takes 79 µs in tiles of 8, whose second ones read half of the weights again, and 80 to 93 in tiles of 16. So these are
/// for longer segments that `decode` is asked to take all the same.
pub(in crate::plan) fn decode_rows(pairs: usize, buckets: u64) -> DecodeRows {
    match pairs as u64 / buckets {
        0..=8 => DecodeRows::M8,
        _ => DecodeRows::M16,
    }
}

/// Bytes a microsecond that one block of `decode` takes when nothing keeps it from it.
const STREAM_OF_ONE: f64 = 32e3;
/// Microseconds that each unit costs a block beside its bytes, and more for each block of its cluster: they tell one another h.
const UNIT_TIME: f64 = 0.16;
const EXCHANGE_TIME: f64 = 0.096;
/// Part of a unit's expand that a call ends with, with nothing left to shrink meanwhile.
const END: f64 = 0.26;
/// Microseconds that it costs to begin with two blocks a multiprocessor: the next launch finds no room before one ends.
const CROWD_TIME: f64 = 1.07;
/// Part of these times that clusters of [`decode::MAX_CLUSTER`] take if their blocks have whole stages of K. In the run beside vLLM w13 of R = 64 takes 7.6 µs at two tokens in clusters of 8 and 8.3 of 4, 11.0 and
/// 12.3 at four, but w2, whose blocks then have 384 elements of K, 8.1 and 7.3.
const LARGEST_WHOLE: f64 = 0.95;
/// Microseconds that a call takes beside: the launch, the segments, the first copy's latency.
const DECODE_START: f64 = 3.6;

/// Microseconds of a unit in a cluster of so many blocks, while memory is busy for `memory` microseconds with those of all clusters: what is asked for at once is
/// done later than the longest would be alone.
fn unit_time(sizes: &ProjectionSizes, cluster: u32, memory: f64) -> f64 {
    let [a, b] = unit_bytes(sizes);
    let cluster = f64::from(cluster);
    memory.hypot((a + b) / (STREAM_OF_ONE * cluster)).hypot(UNIT_TIME + EXCHANGE_TIME * cluster)
}

/// Microseconds by which the last unit's expand is later than its copies.
fn last_time(sizes: &ProjectionSizes, cluster: u32) -> f64 {
    let [_, b] = unit_bytes(sizes);
    END * b / (STREAM_OF_ONE * f64::from(cluster))
}

/// Blocks of a cluster of `decode`, with up to `blocks` blocks a multiprocessor: those with which the last unit is done
/// first.
///
/// Clusters take one unit after another, so a call is as many rounds of units as are full, and a last one in which fewer clusters have one: those are done as soon as a cluster
/// alone is, so large clusters have short last rounds, and small ones less to tell. The constants are those by which 129 calls (one to 160 tokens of four models, ranks 16 to 128, one to
/// eight adapters) take 1.0 % longer on an H200 than with the best cluster of each; the worst takes 18 %.
pub(in crate::plan) fn decode_cluster(
    pairs: usize,
    rows: u32,
    blocks: u32,
    sizes: &ProjectionSizes,
    limits: &DeviceLimits,
    asked: Option<u32>,
) -> u32 {
    if let Some(asked) = asked {
        return 1 << asked.clamp(1, decode::MAX_CLUSTER).ilog2();
    }
    let segments = (sizes.slots * sizes.experts) as u64;
    let read = likely_segments(pairs, segments);
    let tiles = likely_tiles(pairs, segments, rows).max(read);
    let units = (tiles * sizes.slices as f64).ceil().max(1.0) as u64;
    // A segment's second tile finds its weights in L2.
    let memory = read / tiles * unit_bytes(sizes).iter().sum::<f64>() / limits.streamed();
    let time = |cluster: u32| {
        let clusters = decode_clusters(units, cluster, blocks, limits);
        let round = |units: u64| match units {
            0 => 0.0,
            _ => unit_time(sizes, cluster, units as f64 * memory),
        };
        let rounds = (units / clusters) as f64 * round(clusters) + round(units % clusters);
        let crowded = clusters * u64::from(cluster) > u64::from(limits.multiprocessors);
        let crowd = if crowded { CROWD_TIME } else { 0.0 };
        let is_whole = decode::has_whole_stages(sizes.in_dim as u32, sizes.max_rank as u32, cluster);
        let part = if cluster == decode::MAX_CLUSTER && is_whole { LARGEST_WHOLE } else { 1.0 };
        part * (DECODE_START + rounds + last_time(sizes, cluster) + crowd)
    };
    let clusters = (0..=decode::MAX_CLUSTER.ilog2()).map(|log| 1 << log);
    clusters.min_by(|one, other| time(*one).total_cmp(&time(*other))).unwrap_or(1)
}

/// Clusters of `decode`: as many as the device runs at a time with `blocks` blocks a multiprocessor, each of which takes
/// one unit after another. With one more, its units would come last of all.
pub(in crate::plan) fn decode_clusters(units: u64, cluster: u32, blocks: u32, limits: &DeviceLimits) -> u64 {
    let most = limits.decode_clusters[cluster.ilog2() as usize] * blocks / decode::BLOCKS;
    units.min(u64::from(most)).max(1)
}

/// The tile of `prefill`, where that is the faster form, and whether blocks share passes; segments are guessed as for [`tile`](super::tile). `least`:
/// as by [`prefill_least`]. `shares`: whether blocks can share.
///
/// At 32 pairs a segment w13 takes 89 µs for 107 in two launches with tiles of 64, 93 with tiles of 128, of which three quarters are empty; at 64
/// pairs 72 and 66.
///
/// A pass over a tile is one block's, so few of them leave multiprocessors idle. At three quarters of the multiprocessors it is the faster form whatever the
/// tiles hold: of R = 192 8 tokens take w13, two passes over each of 57 tiles, 48.7 µs for 53.6, and w2, one over each, 39.2 for 31.3. Of fewer passes blocks take
/// shares: the 16 segments of Mixtral-8x7B take w13 47.4 µs at 128 tokens (54.2 in two launches), 80.4 at 512 (in passes over tiles of 128 pairs 86.9), 128 at 1,024 (138.4, and
/// 143.2 in whole passes), w2 62.3 at 1,024 (61.9, 83.5), 93.0 at 2,048 (94.2, 99.4). They
/// also do where turns are long and some blocks have one more than others, or some have none: w13 220 at 2,048 tokens (235 in whole passes), 401 at 4,096 (514, over tiles of 128 452), 778 at 8,192 (865, 1,046),
/// w2 154 at 4,096 (156), 284 at 8,192 (279, 388); gpt-oss-20b with two adapters w13 189 at 4,096 (208, 227), w2 122 (141, 148). But with turns as short as those of Qwen3-30B-A3B, of one adapter, w13 takes 66 in shares at
/// 1,024 tokens and 59 in whole passes over tiles of 128. With few columns the exchange of sums shows, at 16 pairs a segment: w2 33.4 at 128 tokens (30.0 in two launches). Where blocks cannot share, whole passes over
/// tiles that are at least half full are the faster form from two fifths of the multiprocessors on, and where turns are short also where they could: the 64 segments of OLMoE-1B-7B with one adapter take w2 23.5 µs at 192 tokens (26.0 in two launches),
/// 28.5 at 384 (31.7 in shares).
pub(in crate::plan) fn prefill_tile(
    pairs: usize,
    sizes: &ProjectionSizes,
    least: u64,
    shares: impl Fn(PrefillTile) -> bool,
    passes: impl Fn(PrefillTile) -> u32,
    limits: &DeviceLimits,
) -> Option<(PrefillTile, bool)> {
    let segments = (sizes.slots * sizes.experts) as u64;
    let segment = pairs as u64 / segments;
    let multiprocessors = f64::from(limits.multiprocessors);
    let turns = |tile: PrefillTile| {
        let passes = passes(tile);
        likely_tiles(pairs, segments, prefill_rows(pairs, sizes, tile, passes, limits)) * f64::from(passes)
    };
    let rounds = |tile: PrefillTile| {
        let likely = likely_tiles(pairs, segments, tile.rows());
        // Of segments with about as many tiles each, or one more, the deviation of their sum.
        let more = (likely / segments as f64).fract();
        let deviation = (segments as f64 * more * (1.0 - more)).sqrt();
        (likely + deviation) * f64::from(passes(tile)) / blocks(tile.rows(), limits)
    };
    // In the larger tiles x is read once, where a pass over them has more slices; but there are fewer.
    let reads_once = passes(PrefillTile::M128) < passes(PrefillTile::M64);
    let are_many = segment >= LARGE_SHARED_SEGMENT && rounds(PrefillTile::M128) >= 1.0;
    let is_large = reads_once && are_many && shares(PrefillTile::M128);
    let shared_tile = if is_large { PrefillTile::M128 } else { PrefillTile::M64 };
    let can_share = shares(shared_tile);
    let turn = |tile: &PrefillTile| pair_elements(sizes, sizes.slices as f64 / f64::from(passes(*tile)));
    let is_enough = |tile: &PrefillTile| {
        let turns = turns(*tile);
        let few_will_do = if can_share {
            // In place of shares, whose exchange costs more than short turns that some blocks have none of.
            *tile == PrefillTile::M64 && segment >= QUARTER_TILE && turn(tile) < SHORT_TURN
        } else {
            segment >= HALF_TILE
        };
        turns >= multiprocessors * if few_will_do { ENOUGH_FULL_TURNS } else { ENOUGH_TURNS }
    };
    let wanted = match segment {
        _ if segment < least => &[][..],
        ..LARGE_TILE => &[PrefillTile::M64][..],
        _ => &[PrefillTile::M128, PrefillTile::M64][..],
    };
    let leaves_idle = |tile: &PrefillTile| {
        let rounds = rounds(*tile);
        let least = if rounds > 1.0 { LONG_TURN } else { VERY_LONG_TURN };
        rounds < FULL_ROUNDS * rounds.ceil() && turn(tile) >= least
    };
    let whole = wanted.iter().find(|tile| is_enough(tile));
    let least_shared = if sizes.out_dim > sizes.in_dim { SHARED_SEGMENT } else { 2 * SHARED_SEGMENT };
    if can_share && segment >= least_shared && whole.is_none_or(leaves_idle) {
        return Some((shared_tile, true));
    }
    whole.map(|tile| (*tile, false))
}

/// Elements that a turn of so many slices moves for a pair: x, and old and new values of `out`.
fn pair_elements(sizes: &ProjectionSizes, slices: f64) -> f64 {
    sizes.in_dim as f64 + 2.0 * slices * sizes.out_dim as f64
}

/// Elements that a turn moves for a pair from which on it matters when some blocks have one more than others, or when some have none; and which part of the turns
/// that all could have is then enough.
const LONG_TURN: f64 = 8_000.0;
/// And up to which it does not matter when half of the blocks have none: OLMoE-1B-7B's w13 of R = 16, 6,144 elements, takes 23.1 µs at 192 tokens for 18.6.
const SHORT_TURN: f64 = 6_000.0;
const VERY_LONG_TURN: f64 = 20_000.0;
const FULL_ROUNDS: f64 = 0.8;

/// Pairs a segment from which on passes are shared, if there are more columns than elements of K: while h is summed the memory is busy with
/// what is expanded.
const SHARED_SEGMENT: u64 = 16;

/// Pairs a segment from which on blocks share passes over tiles of 128, if x is read once in them, and not for each slice, and each block has a whole one: Mixtral-8x7B takes w13 1,509 µs at 16,384 tokens for 1,541
/// in tiles of 64, 769 at 8,192 for 777, but with one adapter at 4,096, 64 passes, 404 for 388; gpt-oss-20b with one adapter 354 at 8,192 for 367, with four, 128 pairs a segment, 204 at 4,096 for 200.
const LARGE_SHARED_SEGMENT: u64 = 256;

/// Pairs a segment from which on tiles of 128 are wanted.
const LARGE_TILE: u64 = 48;

/// Pairs of half a tile of 64, and of a quarter.
const HALF_TILE: u64 = 32;
const QUARTER_TILE: u64 = 16;

/// Turns a multiprocessor that make whole passes the faster form whatever their tiles hold, and where they are full enough.
const ENOUGH_TURNS: f64 = 0.75;
const ENOUGH_FULL_TURNS: f64 = 0.4;

/// Pairs of the tiles that a route is to have for whole passes of `prefill` over tiles of up to as many as `tile` has: those with which the last of the blocks' turns, all as long, are
/// done first. Nearly all segments are then cut into tiles of like sizes.
///
/// Where a segment's pairs are just more than full tiles hold, another tile has few of them; and where full tiles have just begun a round of turns, most blocks are idle in it. In full tiles of 128,
/// and in those of so many, Qwen3-30B-A3B with one adapter takes w13 96.1 and 86.1 µs at 2,048 tokens (80 pairs), 149.6 and 136.3 at 4,096 (96), 259.7 and 250.8 at 8,192 (112), w2 89.8 and 81.9, 149.2 and 142.7 at 2,048 and 4,096;
/// OLMoE-1B-7B w13 107.4 and 88.8 at 2,048, 169.8 and 150.7 at 4,096; and of 57 cases none takes 1.2 % longer.
pub(in crate::plan) fn prefill_rows(
    pairs: usize,
    sizes: &ProjectionSizes,
    tile: PrefillTile,
    passes: u32,
    limits: &DeviceLimits,
) -> u32 {
    let segments = (sizes.slots * sizes.experts) as u64;
    let mean = pairs as f64 / segments as f64;
    // Of nearly all segments, where experts are chosen evenly.
    let most = mean + 2.0 * mean.sqrt();
    // Elements of a turn's weights, and of a pair in it.
    let slices = sizes.slices.div_ceil(passes as usize);
    let weights = (slices * sizes.max_rank * (sizes.in_dim + sizes.out_dim)) as f64;
    let pair = pair_elements(sizes, slices as f64);
    let time = |(_, tiles): &(u32, f64)| {
        let rounds = (tiles * f64::from(passes) / blocks(tile.rows(), limits)).ceil();
        rounds * (WEIGHTS_FROM_L2 * weights + pairs as f64 / tiles * pair)
    };
    let full = (tile.rows(), likely_tiles(pairs, segments, tile.rows()));
    let parts = ((most / f64::from(tile.rows())).ceil() as u32).max(2)..;
    let evenly = parts.take(MOST_PARTS).map(|parts| {
        let rows = (most / f64::from(parts)) as u32;
        (rows.next_multiple_of(ROW_STEP), (segments * u64::from(parts)) as f64)
    });
    let evenly = evenly.take_while(|(rows, _)| 2 * rows > tile.rows());
    let first = std::iter::once(full).chain(evenly).min_by(|one, other| time(one).total_cmp(&time(other)));
    first.unwrap_or(full).0
}

/// Tiles of the route for `prefill` have multiples of so many pairs.
const ROW_STEP: u32 = 8;

/// Ways to cut segments evenly that are compared: of longer segments those with the fullest tiles.
const MOST_PARTS: usize = 8;

/// What an element of weights that a segment's other tiles read too costs, to one that comes from memory.
const WEIGHTS_FROM_L2: f64 = 0.4;

/// Columns of h that a pass of `prefill` is to take: those of all slices, so that x is asked for once, or of one.
///
/// In tiles of 64 a slice is a turn of its own, since there are hardly more tiles than blocks: where experts are chosen by Zipf's law w13 takes
/// 92 µs at 1,024 tokens for 97, and 86 for 84 where they are chosen evenly. In tiles of 128 that costs more (165 for 159 at 4,096 tokens), unless a stage
/// then holds rows of x twice as long: of R = 128, whose two slices take 256 columns, 16,384 tokens take 597 µs for 647.
pub(in crate::plan) fn prefill_columns(tile: PrefillTile, sizes: &ProjectionSizes) -> u32 {
    let of_slice = prefill::rank_room(sizes.max_rank as u32);
    let of_all = sizes.slices as u32 * of_slice;
    if tile == PrefillTile::M64 || of_all > MOST_COLUMNS { of_slice } else { of_all }
}

/// Columns of h with which a stage holds 256 bytes of a row.
const MOST_COLUMNS: u32 = 128;

/// Pairs a segment from which on most tiles of 128 are full.
const FULL_TILES: u64 = 96;

/// Whether most tiles of a route in tiles of `tile_rows` pairs fill those of the kernel.
pub(in crate::plan) fn prefill_is_full(
    shape: prefill::Shape,
    pairs: usize,
    buckets: u64,
    tile_rows: u32,
) -> bool {
    tile_rows >= shape.rows && pairs as u64 / buckets >= FULL_TILES
}

/// Stages of the ring of `prefill`: as many as there is room for, unless memory does better with fewer bytes under way.
///
/// Full tiles have enough under way in two stages, and with more the same bytes take longer, as do more of them: what is under way takes
/// room in L2 from rows of x that would be found there. w13 takes 161 µs in two and 177 in three at 128 pairs a segment, 494 and
/// 526 at 512; w2 156 and 167, 521 and 534 (of R = 128 578 and 604). On an H200, whose memory gives what was driven out sooner, it is the other way round: 135.6 and 126.4, 414 and 382, w2 119.5 and 116.9, 376.2 and 376.3 (R = 128
/// 419 and 411). With steps of more work it is the other way round: w2 of R = 256 takes 710 and 674, and
/// w13, where h takes two passes, 675 and 621 of R = 128, 1,078 and 945 of R = 256. Of the half empty tiles of gpt-oss-20b three are best: 115.6, 113.0 and, of four,
/// 115.0.
pub(in crate::plan) fn prefill_stages(
    shape: prefill::Shape,
    passes: u32,
    is_full: bool,
    limits: &DeviceLimits,
) -> u32 {
    let is_large = shape.rows == PrefillTile::M128.rows();
    match shape.width {
        ..=MOST_COLUMNS if is_large && is_full && passes == 1 && !is_fast(limits) => 2,
        64 if is_large => 3,
        _ => shape.max_stages(),
    }
}

/// Bytes that a call's x is asked for while its route is made, and the least of a row.
const AHEAD: u64 = 6 << 20;
const LEAST_AHEAD: u64 = 256;

/// Bytes of each of x's `rows` rows that `prefill` asks for before it waits for the route: as many as memory gives meanwhile. Of w2 Qwen3-30B-A3B takes
/// 37.6, 36.8, 36.6 and 36.9 µs at 512 tokens with 0, 4, 8 and 16 MiB, 51.2, 50.4, 50.0 and 49.8 at 1,024, Mixtral-8x7B 57.3, 56.2, 56.9 and 57.4 at
/// 1,024 and 87.0, 85.2, 85.6 and 87.0 at 2,048; of w13, whose x is less, 49.5, 49.1, 48.9 and 49.0 at 512. `out`, which is read last, is pushed out again by then.
pub(in crate::plan) fn prefill_ahead(rows: u64, in_dim: usize) -> u32 {
    let row = (AHEAD / rows).min((in_dim * DType::SIZE) as u64);
    // Whole lines of L2.
    if row < LEAST_AHEAD { 0 } else { (row / 128 * 128) as u32 }
}

/// Steps of expand that may be under way in a ring of `stages` at a time. What is asked for waits in a queue, in which what blocks tell one another waits too, and which does not serve all multiprocessors
/// alike; bytes that have landed wait as well for h, in the ring. Mixtral-8x7B takes w13 at 1,024 tokens, in tiles of 64, 135.0 µs with one, 143.6 with two and 145.8 with
/// three, at 256 56.5, 57.5 and 58.5, but of R = 16, whose steps are half as long, 39.8, 36.8 and 40.0; Qwen3-30B-A3B w13 at 1,024 90.2, 90.0 and 90.9, of R = 128
/// 150.8, 152.4 and 152.5, but in tiles of 128 at 4,096 169.4, 164.7 and, of two stages, 164.7.
///
/// On an H200 Mixtral-8x7B takes w13 46.5 µs with one at 256, 48.1 with two and 47.9 with three, but 101.8, 100.0 and 101.5 at 1,024, and 315.3 with one and 303.5 with three at 4,096.
pub(in crate::plan) fn prefill_under_way(
    shape: prefill::Shape,
    stages: u32,
    is_shared: bool,
    is_full: bool,
    limits: &DeviceLimits,
) -> u32 {
    let is_large = shape.rows == PrefillTile::M128.rows();
    match shape.width {
        64 | 128 if is_shared && !is_large && is_full && is_fast(limits) => stages,
        64 | 128 if is_shared && !is_large => 1,
        128 if !is_large => 1,
        ..=128 => stages.min(2),
        _ => stages,
    }
}

/// Shares of K, and of a slice's columns, of passes that blocks share: of K so many that each block gets one; of columns so many that none has more than [`SHARED_OUT`] elements, so that who is
/// done early takes more of them. In tiles of 64 pairs Mixtral-8x7B takes w13 84.2 µs at 512 tokens in shares of 1,024 columns, 82.2 of 512 and 80.7 of 256, at 1,024 132, 127 and 129, at 4,096 408, 406 and 410; w2 at 1,024
/// 69.3, 61.2 and 61.7.
pub(in crate::plan) fn prefill_shares(
    pairs: usize,
    sizes: &ProjectionSizes,
    shape: prefill::Shape,
    passes: u32,
    limits: &DeviceLimits,
) -> [u32; 2] {
    let segments = (sizes.slots * sizes.experts) as u64;
    let passes = likely_tiles(pairs, segments, shape.rows) * f64::from(passes);
    let depth = ((blocks(shape.rows, limits) / passes) as u32).max(1);
    let is_full = pairs as u64 / segments >= FULL_TILES;
    let out = if is_full { SHARED_OUT } else { SHARED_OUT / 2 };
    let columns = (sizes.out_dim as u64 * u64::from(shape.rows)).div_ceil(out);
    [depth, u32::try_from(columns).unwrap_or(u32::MAX)]
}

/// Most elements of `out` of a slice that a turn of shared passes takes, of tiles that are full.
const SHARED_OUT: u64 = 32 << 10;

/// Blocks that the device runs at a time, of passes over tiles of `rows` pairs that blocks can share, as most others.
fn blocks(rows: u32, limits: &DeviceLimits) -> f64 {
    let shape = prefill::Shape { rows, width: prefill::MAX_SHARED_WIDTH };
    f64::from(limits.multiprocessors * shape.blocks_per_sm())
}

/// How many tiles of `rows` pairs uniform routing over all slots makes on average: of a segment of n pairs, n / rows rounded up.
fn likely_tiles(pairs: usize, segments: u64, rows: u32) -> f64 {
    let (segments, rows) = (segments as f64, f64::from(rows));
    let mean = pairs as f64 / segments;
    if mean.sqrt() > rows {
        // Segments differ by more than a tile: what is above the last full one is as likely to be much as little.
        return segments * (mean / rows + 0.5);
    }
    let most_off = WHOLLY_UNLIKELY * mean.sqrt();
    // The sum over tiles of how likely a segment has more pairs than are in those before: nearly always, in the first of many.
    let sure = ((mean - most_off) / rows).floor().max(0.0);
    let (mut tiles, mut before) = (sure, sure * rows);
    while before < mean + most_off {
        tiles += if before == 0.0 { 1.0 - (-mean).exp() } else { likely_more(mean, before) };
        before += rows;
    }
    segments * tiles
}

/// How likely a segment has more than `pairs` pairs, dozens, if it has `mean` on average: by the logistic function that is nearest to the normal
/// distribution's, which is at most 0.01 from it.
fn likely_more(mean: f64, pairs: f64) -> f64 {
    1.0 / (1.0 + (1.702 * (pairs + 0.5 - mean) / mean.sqrt()).exp())
}

/// Deviations from the mean past which no segment is.
const WHOLLY_UNLIKELY: f64 = 4.0;
