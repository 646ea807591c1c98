//! The rules that choose tiles and divide work, each with its reason. docs/PERFORMANCE.md has the
//! measurements.

use super::{DecodeRows, DeviceLimits, PrefillTile, TileKind};
use crate::dtype::DType;
use crate::projection::ProjectionSizes;
use moe_lora_kernels::decode;
use moe_lora_kernels::tile::TileShape;

/// Most blocks that share K: each adds a pass over h that `expand` must sum.
pub(super) const MAX_SPLITS: u32 = 16;

/// Least steps of K a block: the ring must fill once to be worth its start.
const MIN_STEPS: u32 = 2;

/// Blocks a multiprocessor that keep enough loads in flight for the memory's bandwidth.
const BLOCKS_PER_MULTIPROCESSOR: u64 = 4;

/// Pairs from which on `align` is spread over a cluster: fewer are sorted sooner than a cluster can meet.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(super) const ALIGN_CLUSTER_PAIRS: usize = 4096;

/// Blocks of `route`: one for as many pairs as its warps keep in registers, then so many that each has a warp's width
/// of pairs a warp. 640 pairs take 3.3 µs in one block and 4.0 in a grid, 960 4.4 in either; 8,192 take 5.1 in 8
/// blocks, 4.6 in 16 and 4.8 in 32. All blocks read what all have counted, so more than 64 pay only where a block
/// has thousands of pairs: 131,072 take 7.9 in 64 and 8.3 in 128, 262,144 13.3 and 11.3.
pub(super) fn route_blocks(pairs: usize) -> u32 {
    match pairs {
        0..=1024 => 1,
        1025..32_768 => pairs.div_ceil(512) as u32,
        32_768..262_144 => 64,
        _ => 128,
    }
}

/// The tile: the smallest that holds most segments whole, since every further tile of a segment reads its
/// weights again. Segments are guessed to be of the size that uniform routing over all slots gives. At 32
/// pairs a segment, M32 and M64 take the same time in w13, and M32 6 % less in w2; at 63, M64 takes 21 % less.
pub(super) fn tile(pairs: usize, buckets: u64, fits: impl Fn(&TileKind) -> bool) -> TileKind {
    let segment = pairs as u64 / buckets;
    let wanted = match segment {
        0..=12 => TileKind::M16,
        13..=40 => TileKind::M32,
        _ => TileKind::M64,
    };
    // From the wanted size downwards: a large rank may leave no room for a large tile.
    [TileKind::M64, TileKind::M32, TileKind::M16]
        .into_iter()
        .skip_while(|tile| *tile != wanted)
        .find(fits)
        .unwrap_or(TileKind::M16)
}

/// Blocks that share K, so that `blocks` of them fill the device.
pub(super) fn splits(blocks: u64, steps: u32, most: u32, limits: &DeviceLimits) -> u32 {
    let wanted = (u64::from(limits.multiprocessors) * BLOCKS_PER_MULTIPROCESSOR).div_ceil(blocks);
    (wanted as u32).min(most).min(steps / MIN_STEPS).max(1)
}

/// Columns of a slice that one block of `expand` takes: as many as still leave the device full, since h is
/// read again by each.
pub(super) fn expand_columns(blocks: u64, out_dim: u32, shape: TileShape, limits: &DeviceLimits) -> u32 {
    let column_tiles = out_dim.div_ceil(shape.columns());
    let wanted = (u64::from(limits.multiprocessors) * BLOCKS_PER_MULTIPROCESSOR).div_ceil(blocks);
    let runs = (wanted as u32).clamp(1, column_tiles);
    column_tiles.div_ceil(runs) * shape.columns()
}

/// Pairs a segment from which on `decode` is the slower form: at 8, w13 takes 79 µs in it, 77 in `prefill` and 80 in
/// two launches. Segments of more than a tile's pairs read their weights twice.
const DECODE_SEGMENT: u64 = 7;

/// Whether `decode` is the faster form: where segments are so short that a call costs what its weights' bytes cost.
pub(super) fn wants_decode(pairs: usize, buckets: u64) -> bool {
    (pairs as u64) < DECODE_SEGMENT * buckets
}

/// Pairs of a tile of `decode`: the smallest that holds most segments whole, as for [`tile`]. At 8 pairs a segment w13
/// takes 79 µs in tiles of 8, whose second ones read half of the weights again, and 80 to 93 in tiles of 16. So these are
/// for longer segments that `decode` is asked to take all the same.
pub(super) fn decode_rows(pairs: usize, buckets: u64) -> DecodeRows {
    match pairs as u64 / buckets {
        0..=8 => DecodeRows::M8,
        _ => DecodeRows::M16,
    }
}

/// Bytes a microsecond that a device of the H100's kind streams from memory, and that one block of `decode` takes when
/// nothing keeps it from it: the 101 units of w2 at 16 tokens take 23.0 µs in clusters of 1, 19.7 of 2 and 18.5 of 4.
const STREAM: f64 = 3.0e6;
const STREAM_OF_ONE: f64 = 22e3;
/// Microseconds that each unit costs a block beside its bytes: R = 16 at 80 tokens takes 23.9, 24.0, 25.8 and 30.6 µs
/// with 2, 4, 8 and 16 units a block.
const UNIT_TIME: f64 = 0.6;
/// Part of a unit's expand that a call ends with, with nothing left to shrink meanwhile: w2, most of whose weights are b,
/// takes 0.8 µs less at 80 tokens in clusters of 2 than of 1, and w13 as long.
const END: f64 = 0.26;
/// Microseconds that it costs to begin with two blocks a multiprocessor: the next launch finds no room before one ends.
/// Four tokens take 16.4 µs in 252 blocks and 14.1 in 126.
const CROWD_TIME: f64 = 1.5;

/// Blocks of a cluster of `decode`, with up to `blocks` blocks a multiprocessor: those with which the last unit is done
/// first.
pub(super) fn decode_cluster(
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
    // As many segments as uniform routing over all slots leaves without an empty one.
    let (pairs, buckets) = (pairs as f64, (sizes.slots * sizes.experts) as f64);
    let segments = buckets * (1.0 - (-pairs / buckets).exp());
    let tiles = segments.max(pairs / f64::from(rows)).ceil() as u64;
    let units = tiles * sizes.slices as u64;
    let [a, b] = [sizes.in_dim, sizes.out_dim].map(|dim| (sizes.max_rank * dim * DType::SIZE) as f64);
    let time = |cluster: u32| {
        let clusters = decode_clusters(units, cluster, blocks, limits);
        let blocks = clusters * u64::from(cluster);
        let rounds = units.div_ceil(clusters) as f64;
        let rate = STREAM_OF_ONE * f64::from(cluster);
        let streamed = (units as f64 * (a + b) / STREAM).max(rounds * (a + b) / rate);
        let crowd = if blocks > u64::from(limits.multiprocessors) { CROWD_TIME } else { 0.0 };
        streamed + rounds * UNIT_TIME + END * b / rate + crowd
    };
    let clusters = (0..=decode::MAX_CLUSTER.ilog2()).map(|log| 1 << log);
    clusters.min_by(|one, other| time(*one).total_cmp(&time(*other))).unwrap_or(1)
}

/// Clusters of `decode`: as many as the device runs at a time with `blocks` blocks a multiprocessor, each of which takes
/// one unit after another. With one more, its units would come last of all.
pub(super) fn decode_clusters(units: u64, cluster: u32, blocks: u32, limits: &DeviceLimits) -> u64 {
    let most = limits.decode_clusters[cluster.ilog2() as usize] * blocks / decode::BLOCKS;
    units.min(u64::from(most)).max(1)
}

/// The tile of `prefill`, where that is the faster form; `segment` is guessed as for [`tile`].
///
/// At eight pairs a segment w13 takes 77 µs for 80 in two launches; at 32 pairs 87 for 107 with tiles of 64, 99
/// with tiles of 128, of which three quarters are empty; at 64 pairs 78 and 67. With one slice, much of whose traffic is
/// `out`, two launches are level at 128 pairs (177 and 174), and at 512 they take 556 µs for 587: each does one kind of
/// access at a time.
pub(super) fn prefill_tile(pairs: usize, buckets: u64, slices: usize) -> Option<PrefillTile> {
    match pairs as u64 / buckets {
        0..DECODE_SEGMENT => None,
        DECODE_SEGMENT..48 => Some(PrefillTile::M64),
        256.. if slices == 1 => None,
        _ => Some(PrefillTile::M128),
    }
}
