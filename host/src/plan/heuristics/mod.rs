//! The rules that choose tiles and divide work, each with its reason: here those of the kernels that every generation
//! has, and a file for what one has alone. docs/PERFORMANCE.md has the measurements.

mod sm_90;

pub(super) use sm_90::{
    decode_cluster, decode_clusters, decode_rows, prefill_ahead, prefill_columns, prefill_is_full,
    prefill_least, prefill_rows, prefill_shares, prefill_stages, prefill_tile, prefill_under_way,
    wants_decode,
};

use super::DeviceLimits;
use moe_lora_kernels::TileKind;
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
