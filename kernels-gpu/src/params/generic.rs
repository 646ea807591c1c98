//! Parameters of the generic form: `shrink`, then `expand`.

use super::{MAX_SLICES, PairRows, Tile, WeightParams};
use crate::memory::Global;
#[cfg(not(target_arch = "nvptx64"))]
use bytemuck::{Pod, Zeroable};

/// Parameters of `shrink`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct ShrinkParams {
    /// `[T or P, K]`.
    pub x: Global<u16>,
    /// The adapters.
    pub weights: WeightParams,
    /// `[S, P, R]` out, when `splits` is 1.
    pub h: Global<u16>,
    /// `[splits, S, P, R]` out, when `splits` is more than 1.
    pub partial: Global<f32>,
    /// Sorted pairs.
    pub pairs: Global<u32>,
    /// Tiles.
    pub tiles: Global<Tile>,
    /// How many tiles.
    pub counts: Global<u32>,
    /// Elements from one row of `x` to the next.
    pub x_stride: u64,
    /// Which rows belong to a pair.
    pub rows: PairRows,
    /// P.
    pub pair_count: u32,
    /// Blocks that share a tile's columns.
    pub column_blocks: u32,
    /// Columns that a stage has room for.
    pub column_room: u32,
    /// Blocks that share K.
    pub splits: u32,
    /// Steps of K that each of them takes.
    pub steps_per_split: u32,
    /// 1: write `h` whole, zeros for inactive pairs and above the rank. 0: what `expand` will read.
    pub write_all: u32,
    /// Parts that a tile of the route is taken in.
    pub tile_parts: u32,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
}

/// Parameters of `expand`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct ExpandParams {
    /// `[S, P, R]`, when `splits` is 1.
    pub h: Global<u16>,
    /// `[splits, S, P, R]`, when `splits` is more than 1.
    pub partial: Global<f32>,
    /// The adapters.
    pub weights: WeightParams,
    /// `[P, ≥ offset + ΣN]`, moved on by `offset`.
    pub out: Global<u16>,
    /// `[P]`, or null for 1.
    pub topk_weights: Global<f32>,
    /// Sorted pairs.
    pub pairs: Global<u32>,
    /// Tiles.
    pub tiles: Global<Tile>,
    /// How many tiles.
    pub counts: Global<u32>,
    /// Elements from one row of `out` to the next.
    pub out_stride: u64,
    /// Which rows belong to a pair.
    pub rows: PairRows,
    /// For each slice, the number of the first block of a part that takes it; after the last, of all blocks.
    pub first_blocks: [u32; MAX_SLICES],
    /// Blocks that a part's columns are shared by.
    pub column_blocks: u32,
    /// P.
    pub pair_count: u32,
    /// Columns that each block takes, a multiple of the tile's.
    pub columns_per_block: u32,
    /// Elements of `out` from one column of a slice to the next: 1, or S where slices are interleaved, which
    /// tile `any` alone takes.
    pub column_stride: u32,
    /// Partial sums of `h`.
    pub splits: u32,
    /// 1: add to `out`. 0: overwrite, zeros for inactive pairs.
    pub accumulate: u32,
    /// 1: the route is older than the launch before this one, so tiles may be read, and `b` requested,
    /// before that launch has ended.
    pub route_is_old: u32,
    /// Parts that a tile of the route is taken in.
    pub tile_parts: u32,
}
