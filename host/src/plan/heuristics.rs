//! The rules that choose tiles and divide work, each with its reason. docs/PERFORMANCE.md has the
//! measurements.

use super::{DeviceLimits, TileKind};
use moe_lora_kernels::decode;
use moe_lora_kernels::tile::TileShape;

/// Most blocks that share K: each adds a pass over h that `expand` must sum.
pub(super) const MAX_SPLITS: u32 = 16;

/// Least steps of K a block: the ring must fill once to be worth its start.
const MIN_STEPS: u32 = 2;

/// Blocks a multiprocessor that keep enough loads in flight for the memory's bandwidth.
const BLOCKS_PER_MULTIPROCESSOR: u64 = 4;

/// Pairs from which on `align` is spread over a cluster: fewer are sorted sooner than a cluster can meet.
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

/// Most pairs of a call that `decode` serves better. Of 128 pairs, w13 takes 28 µs and 33 in three launches, w2 the
/// same in either; one launch costs the host 3 µs, three 8.
const DECODE_PAIRS: usize = 128;

/// Whether one launch of clusters is the faster form: while a call is so small that waiting for launches is much
/// of its time, and its segments are of a pair or two. 64 tokens of Mixtral (128 pairs, 16 segments of large
/// matrices) take `decode` 60 µs, three launches less than 40.
pub(super) fn wants_decode(pairs: usize, buckets: u64) -> bool {
    pairs <= DECODE_PAIRS && pairs as u64 <= 2 * buckets
}

/// Blocks of a cluster of `decode`: as many as give every multiprocessor a block. More only make the blocks meet
/// more often: 64 units take 14.0 µs in clusters of 2, 17.4 of 4 and 18.7 of 8; 16 units 11.2, 8.3 and 8.1.
pub(super) fn decode_cluster(units: u64, limits: &DeviceLimits, asked: Option<u32>) -> u32 {
    let most = u64::from(decode::MAX_CLUSTER);
    let cluster = match asked {
        Some(asked) => u64::from(asked).clamp(1, most),
        None => (u64::from(limits.multiprocessors) / units).clamp(2, most),
    };
    1 << cluster.ilog2()
}

/// Clusters of `decode`: as many as the device runs at a time, each of which takes one unit after another. With
/// one more, its units would come last of all.
pub(super) fn decode_clusters(units: u64, cluster: u32, limits: &DeviceLimits) -> u64 {
    units.min(u64::from(limits.decode_clusters[cluster.ilog2() as usize]))
}
