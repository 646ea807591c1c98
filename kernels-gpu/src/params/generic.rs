//! Parameters of the generic form: `shrink`, then `expand`.

use super::{Divider, MAX_SLICES, Tile};
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
    /// S of `[L, E or 1, R, K]`.
    pub a: [Global<u16>; MAX_SLICES],
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
    /// Row of `x` of a pair: the pair over this (k, or 1 when `x` has a row a pair).
    pub x_row: Divider,
    /// P.
    pub pair_count: u32,
    /// K.
    pub in_dim: u32,
    /// R.
    pub max_rank: u32,
    /// S.
    pub slices: u32,
    /// Matrices of `a` in a slot: E or 1.
    pub a_experts: u32,
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
    /// S of `[L, E or 1, N, R]`.
    pub b: [Global<u16>; MAX_SLICES],
    /// `[P, ≥ offset + S·N]`, moved on by `offset`.
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
    /// P.
    pub pair_count: u32,
    /// N.
    pub out_dim: u32,
    /// R.
    pub max_rank: u32,
    /// S.
    pub slices: u32,
    /// Matrices of `b` in a slot: E or 1.
    pub b_experts: u32,
    /// Blocks that share a slice's columns.
    pub blocks_per_slice: u32,
    /// Columns that each of them takes, a multiple of the tile's.
    pub columns_per_block: u32,
    /// Partial sums of `h`.
    pub splits: u32,
    /// 1: add to `out`. 0: overwrite, zeros for inactive pairs.
    pub accumulate: u32,
    /// 1: the route is older than the launch before this one, so tiles may be read, and `b` requested,
    /// before that launch has ended.
    pub route_is_old: u32,
    /// Parts that a tile of the route is taken in.
    pub tile_parts: u32,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
}
