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

/// Pairs a segment up to which `decode` is the faster form. At 8, w13 takes 80 µs and shrink and expand 82; from more
/// than a tile of 16 on, `decode` would read weights twice.
const DECODE_SEGMENT: u64 = 12;

/// Whether `decode` is the faster form: where segments are so short that a call costs what its weights' bytes cost.
pub(super) fn wants_decode(pairs: usize, buckets: u64) -> bool {
    pairs as u64 <= DECODE_SEGMENT * buckets
}

/// Pairs of a tile of `decode`: the smallest that holds most segments whole, as for [`tile`].
pub(super) fn decode_rows(pairs: usize, buckets: u64) -> DecodeRows {
    match pairs as u64 / buckets {
        0..=3 => DecodeRows::M8,
        _ => DecodeRows::M16,
    }
}

/// Bytes a microsecond that a device of the H100's kind streams from memory; and that one multiprocessor takes when
/// half of them have work, as in a call of one token.
const STREAM: f64 = 3.0e6;
const STREAM_OF_ONE: f64 = 45e3;
/// Microseconds that a unit of `decode` takes a block, however small: a chain of waits, not of work.
const UNIT_TIME: f64 = 1.5;

/// Blocks of a cluster of `decode`: those with which the last unit is done first, if each takes what its bytes take.
pub(super) fn decode_cluster(
    pairs: usize,
    rows: u32,
    sizes: &ProjectionSizes,
    limits: &DeviceLimits,
    asked: Option<u32>,
) -> u32 {
    let most = decode::MAX_CLUSTER.ilog2();
    if let Some(asked) = asked {
        return 1 << asked.clamp(1, decode::MAX_CLUSTER).ilog2();
    }
    // As many segments as uniform routing over all slots leaves without an empty one.
    let (pairs, buckets) = (pairs as f64, (sizes.slots * sizes.experts) as f64);
    let segments = buckets * (1.0 - (-pairs / buckets).exp());
    let tiles = segments.max(pairs / f64::from(rows)).ceil() as u64;
    let units = tiles * sizes.slices as u64;
    let bytes = (sizes.max_rank * (sizes.in_dim + sizes.out_dim) * DType::SIZE) as f64;
    let time = |cluster: u32| {
        let clusters = decode_clusters(units, cluster, limits);
        let rate = (STREAM / (clusters * u64::from(cluster)) as f64).min(STREAM_OF_ONE);
        let unit = (bytes / f64::from(cluster) / rate).max(UNIT_TIME);
        unit * units.div_ceil(clusters) as f64
    };
    // Larger tiles are a longer chain, which clusters of many blocks wait for: of 256 tokens w13 takes 80 µs in clusters
    // of 2, 83 of 4 and 87 of 8.
    let most = if rows > 8 && units > u64::from(limits.decode_clusters[1]) { 1 } else { most };
    let sizes = (0..=most).map(|log| 1 << log);
    sizes.min_by(|one, other| time(*one).total_cmp(&time(*other))).unwrap_or(1)
}

/// Clusters of `decode`: as many as the device runs at a time, each of which takes one unit after another. With
/// one more, its units would come last of all.
pub(super) fn decode_clusters(units: u64, cluster: u32, limits: &DeviceLimits) -> u64 {
    units.min(u64::from(limits.decode_clusters[cluster.ilog2() as usize])).max(1)
}

/// The tile of `prefill`, where that is the faster form; `segment` is guessed as for [`tile`].
///
/// From eight pairs a segment on, w13 takes 74 µs for 76 in two launches; at 32 pairs 87 for 107 with tiles of 64, 99
/// with tiles of 128, of which three quarters are empty; at 64 pairs 78 and 67. With one slice, much of whose traffic is
/// `out`, two launches are level at 128 pairs (177 and 174), and at 512 they take 556 µs for 587: each does one kind of
/// access at a time.
pub(super) fn prefill_tile(pairs: usize, buckets: u64, slices: usize) -> Option<PrefillTile> {
    match pairs as u64 / buckets {
        0..8 => None,
        8..48 => Some(PrefillTile::M64),
        256.. if slices == 1 => None,
        _ => Some(PrefillTile::M128),
    }
}
