//! What the host hands to a kernel: one `repr(C)` block a launch, passed by value.
//!
//! 16-bit floats are `u16` here: a block is the same for bf16 and f16, the entry point knows which.

use crate::decode::segments::Room;
use crate::memory::{Global, Index};
#[cfg(not(target_arch = "nvptx64"))]
use bytemuck::{Pod, Zeroable};

/// Most slices of a projection.
pub const MAX_SLICES: usize = 4;

/// Division of 31-bit numbers by a 31-bit divisor that is known when the block is made: a
/// multiplication and a shift.
///
/// With `shift = ⌈log2 d⌉` and `magic = ⌈2^(31+shift) / d⌉`, `magic·d − 2^(31+shift) < 2^shift`, so
/// the error of `n·magic / 2^(31+shift)` stays below 1/d for every n < 2³¹ (Granlund and Montgomery,
/// "Division by invariant integers using multiplication", 1994).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct Divider {
    magic: u32,
    shift: u32,
}

impl Divider {
    /// Largest divisor.
    pub const MAX: u32 = i32::MAX as u32;

    /// Division by `divisor`, which must be 1 ..= [`Divider::MAX`].
    ///
    /// # Panics
    /// For any other divisor.
    pub const fn new(divisor: u32) -> Self {
        assert!(divisor >= 1 && divisor <= Self::MAX);
        let shift = divisor.next_power_of_two().trailing_zeros();
        let magic = (1u64 << (31 + shift)).div_ceil(divisor as u64);
        // For powers of two the quotient is exactly 2^31: it fits, as every quotient does.
        Divider { magic: magic as u32, shift }
    }

    /// `n / divisor`, for `n` below 2³¹.
    #[inline(always)]
    pub const fn quotient(self, n: u32) -> u32 {
        ((n as u64 * self.magic as u64) >> (31 + self.shift)) as u32
    }
}

/// How blocks share K, or a slice's columns.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct Shares {
    /// How many there are.
    pub count: u32,
    /// Elements of each, the last of which may have fewer: a multiple of what a step takes, or all of them.
    pub each: u32,
}

impl Shares {
    /// Most shares.
    pub const MAX: u32 = 64;

    /// None.
    pub const NONE: Self = Shares { count: 0, each: 0 };
}

/// One tile of work: up to `tile_rows` pairs of one segment. Written by `route` or `adopt`, read by the others.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct Tile {
    /// Adapter slot.
    pub slot: u32,
    /// Local expert.
    pub expert: u32,
    /// Position of the tile's first pair in the sorted pair list.
    pub first: u32,
    /// Pairs in the tile, 0 ..= `tile_rows`; none when `adopt` found a block without any.
    pub rows: u32,
    /// Rank in use, 0 ..= R. 0 marks pairs that are inactive and must be zeroed.
    pub rank: u32,
    /// To 32 bytes, so that a tile is two 16-byte loads.
    pub reserved: [u32; 3],
}

impl Tile {
    /// No pairs.
    pub const EMPTY: Self = Tile { slot: 0, expert: 0, first: 0, rows: 0, rank: 0, reserved: [0; 3] };

    /// Part `part` of the tile, `rows` pairs at most; no pairs when the tile ends before it. A route may be
    /// used by kernels of smaller tiles than it was cut into.
    #[inline(always)]
    pub fn part(self, part: u32, rows: u32) -> Self {
        let skipped = part * rows;
        Tile { first: self.first + skipped, rows: self.rows.saturating_sub(skipped).min(rows), ..self }
    }

    /// Number of the tile's matrix in `[L, experts, …]` weights, of which a slot has E or one.
    #[inline(always)]
    pub fn matrix<I: Index>(&self, experts: u32) -> I {
        let expert = if experts == 1 { 0 } else { self.expert };
        I::from_u32(self.slot).times(I::from_u32(experts)).plus(I::from_u32(expert))
    }
}

/// How `adapter_enabled` is stored.
pub mod enabled {
    /// No tensor: every slot is on.
    pub const ALL: u32 = 0;
    /// One byte a slot.
    pub const U8: u32 = 1;
    /// One 32-bit integer a slot.
    pub const I32: u32 = 2;
}

/// Index into the tile counts that `route` leaves.
pub mod count {
    /// Tiles of active pairs: these come first in the list.
    pub const ACTIVE: u32 = 0;
    /// All tiles, those of inactive pairs included.
    pub const ALL: u32 = 1;
    /// How many counts there are.
    pub const LEN: usize = 2;
}

/// Parameters of `route`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct RouteParams {
    /// `[P]` global expert ids.
    pub topk_ids: Global<u32>,
    /// `[T]` adapter slots.
    pub token_lora: Global<u32>,
    /// `[L]` flags, of the kind that `enabled_kind` names.
    pub adapter_enabled: Global<u8>,
    /// `[L]` ranks in use, or null.
    pub ranks: Global<u32>,
    /// `[global_experts]` local ids, or null.
    pub expert_map: Global<u32>,
    /// `[P]` out: pairs sorted by bucket; inactive pairs last.
    pub pairs: Global<u32>,
    /// Out: the tiles.
    pub tiles: Global<Tile>,
    /// `[count::LEN]` out: how many tiles.
    pub counts: Global<u32>,
    /// `[P]` scratch: the bucket of each pair.
    pub buckets: Global<u32>,
    /// Where blocks tell one another their counts: [`crate::route::EXCHANGE_HEAD`] words and two tables, all zero
    /// before the first launch.
    pub exchange: Global<u32>,
    /// P.
    pub pair_count: u32,
    /// P / k gives the token.
    pub top_k: Divider,
    /// L.
    pub slots: u32,
    /// E.
    pub experts: u32,
    /// A bucket over these gives its slot.
    pub over_experts: Divider,
    /// Length of `expert_map`; E without one.
    pub global_experts: u32,
    /// R.
    pub max_rank: u32,
    /// Pairs a tile.
    pub tile_rows: u32,
    /// Pairs over these gives tiles.
    pub over_tile_rows: Divider,
    /// One of [`enabled`].
    pub enabled_kind: u32,
    /// Blocks.
    pub blocks: u32,
    /// Pairs that each warp sorts, a multiple of 32.
    pub run: u32,
    /// Counters that a warp has room for, four more than active buckets are counted at a time: a multiple of 4.
    pub window: u32,
    /// Words of each of the two tables of the exchange: [`crate::route::table_words`].
    pub exchange_room: u32,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
}

/// Parameters of `align`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct AlignParams {
    /// `[P]` global expert ids.
    pub topk_ids: Global<u32>,
    /// `[T]` adapter slots.
    pub token_lora: Global<u32>,
    /// `[L]` flags, of the kind that `enabled_kind` names.
    pub adapter_enabled: Global<u8>,
    /// `[lora_count]` slots whose rows are written.
    pub lora_ids: Global<u32>,
    /// `[global_experts]` local ids, or null.
    pub expert_map: Global<u32>,
    /// `[L, max_padded]` out: pairs, or P.
    pub sorted: Global<u32>,
    /// `[L, max_blocks]` out: the expert of each block, or −1.
    pub block_experts: Global<u32>,
    /// `[L]` out: pairs and padding in all.
    pub padded_counts: Global<u32>,
    /// P.
    pub pair_count: u32,
    /// P / k gives the token.
    pub top_k: Divider,
    /// L.
    pub slots: u32,
    /// E.
    pub experts: u32,
    /// Length of `expert_map`; E without one.
    pub global_experts: u32,
    /// Length of `lora_ids`.
    pub lora_count: u32,
    /// Pairs a block.
    pub block_size: u32,
    /// Elements of a row of `sorted`.
    pub max_padded: u32,
    /// Elements of a row of `block_experts`.
    pub max_blocks: u32,
    /// One of [`enabled`].
    pub enabled_kind: u32,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
}

/// Parameters of `adopt`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct AdoptParams {
    /// `[L, max_padded]` pairs; any other number is none.
    pub sorted: Global<u32>,
    /// `[L, max_blocks]` the expert of each block.
    pub block_experts: Global<u32>,
    /// `[L]` pairs and padding in all.
    pub padded_counts: Global<u32>,
    /// `[lora_count]` slots that take part.
    pub lora_ids: Global<u32>,
    /// `[L]` flags, of the kind that `enabled_kind` names.
    pub adapter_enabled: Global<u8>,
    /// `[L]` ranks in use, or null.
    pub ranks: Global<u32>,
    /// `[most_tiles, block_size]` out: the pairs of each tile.
    pub pairs: Global<u32>,
    /// `[most_tiles]` out: the tiles.
    pub tiles: Global<Tile>,
    /// `[count::LEN]` out: how many tiles.
    pub counts: Global<u32>,
    /// P.
    pub pair_count: u32,
    /// L.
    pub slots: u32,
    /// E.
    pub experts: u32,
    /// R.
    pub max_rank: u32,
    /// Length of `lora_ids`.
    pub lora_count: u32,
    /// Pairs a block.
    pub block_size: u32,
    /// Elements of a row of `sorted`.
    pub max_padded: u32,
    /// Elements of a row of `block_experts`.
    pub max_blocks: u32,
    /// Whole blocks that both rows have.
    pub usable_blocks: u32,
    /// Tiles that there is room for.
    pub most_tiles: u32,
    /// One of [`enabled`].
    pub enabled_kind: u32,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
}

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

/// Parameters of `decode`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct DecodeParams {
    /// The routing: what to find segments from, whose results are then left for later calls, or where they are.
    pub route: RouteParams,
    /// `[T or P, K]`.
    pub x: Global<u16>,
    /// S of `[L, E or 1, R, K]`.
    pub a: [Global<u16>; MAX_SLICES],
    /// S of `[L, E or 1, N, R]`.
    pub b: [Global<u16>; MAX_SLICES],
    /// `[P, ≥ offset + S·N]`, moved on by `offset`.
    pub out: Global<u16>,
    /// `[P]`, or null for 1.
    pub topk_weights: Global<f32>,
    /// Elements from one row of `x` to the next.
    pub x_stride: u64,
    /// Elements from one row of `out` to the next.
    pub out_stride: u64,
    /// Row of `x` of a pair: the pair over this (k, or 1 when `x` has a row a pair).
    pub x_row: Divider,
    /// K.
    pub in_dim: u32,
    /// N.
    pub out_dim: u32,
    /// S.
    pub slices: u32,
    /// A number over S gives the tile's part of a unit.
    pub over_slices: Divider,
    /// Parts that a tile of the route is taken in.
    pub tile_parts: u32,
    /// A number over these gives the tile.
    pub over_parts: Divider,
    /// Matrices of `a` in a slot: E or 1.
    pub a_experts: u32,
    /// Matrices of `b` in a slot: E or 1.
    pub b_experts: u32,
    /// 1: add to `out`. 0: overwrite, zeros for inactive pairs.
    pub accumulate: u32,
    /// 1: every block finds the segments itself. 0: `route` or `adopt` has left them.
    pub finds: u32,
    /// What shared memory has room for; nothing when no segments are to be found.
    pub room: Room,
    /// Stages of the ring for shrink.
    pub shrink_stages: u32,
    /// Stages of the ring for expand.
    pub expand_stages: u32,
    /// Clusters of the launch.
    pub clusters: u32,
    /// The number of a unit over these gives its tile's place in the list of those that were found: over the slices
    /// where all tiles are listed, over the clusters where a cluster lists those of its units.
    pub over_listed: Divider,
}

impl DecodeParams {
    /// Units of so many tiles, of active pairs and of all.
    #[inline(always)]
    pub fn units(&self, [active, all]: [u32; 2]) -> u32 {
        let tiles = if self.accumulate != 0 { active } else { all };
        tiles * self.tile_parts * self.slices
    }

    /// Tile, or part of one, and slice of a unit: which of all of the launch.
    #[inline(always)]
    pub fn tile_and_slice(&self, unit: u32) -> [u32; 2] {
        let tile = self.over_slices.quotient(unit);
        [tile, unit - tile * self.slices]
    }
}

/// What `prefill` does, or a block in one turn of it: bits.
pub mod products {
    /// Shrink. A call that does nothing else writes h whole: zeros for inactive pairs and above the rank.
    pub const SHRINK: u32 = 1;
    /// Expand. A call that does nothing else takes the h of an earlier one.
    pub const EXPAND: u32 = 2;
    /// Both; h stays in registers.
    pub const BOTH: u32 = SHRINK | EXPAND;
}

/// Parameters of `prefill`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct PrefillParams {
    /// `[T or P, K]`.
    pub x: Global<u16>,
    /// S of `[L, E or 1, R, K]`.
    pub a: [Global<u16>; MAX_SLICES],
    /// `[S, P, R]`: out of [`products::SHRINK`], in of [`products::EXPAND`]; null of both.
    pub h: Global<u16>,
    /// `[passes, warps of a tile, columns of h / 16, 32, 4]`: h of passes that blocks share, as fragments; 0 before and after the launch.
    pub fragments: Global<u32>,
    /// `[passes, warps of a tile, shares of K, columns of h / 8, 32, 4]` of f32: where shares of K leave their sums, if there are several; 0 before and after the launch.
    pub sums: Global<u32>,
    /// `[passes, warps of a tile, 2]`: where the warps that share a pass count one another; 0 before and after the launch.
    pub counters: Global<u32>,
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
    /// How many of them to take: those of active pairs, or all where inactive pairs are to get zeros.
    pub tile_count: Global<u32>,
    /// Where the blocks count their turns; 0 before and after the launch.
    pub turn: Global<u32>,
    /// Elements from one row of `x` to the next.
    pub x_stride: u64,
    /// Elements from one row of `out` to the next.
    pub out_stride: u64,
    /// Row of `x` of a pair: the pair over this (k, or 1 when `x` has a row a pair).
    pub x_row: Divider,
    /// P.
    pub pair_count: u32,
    /// K.
    pub in_dim: u32,
    /// N.
    pub out_dim: u32,
    /// R.
    pub max_rank: u32,
    /// S.
    pub slices: u32,
    /// Matrices of `a` in a slot: E or 1.
    pub a_experts: u32,
    /// Matrices of `b` in a slot: E or 1.
    pub b_experts: u32,
    /// 1: add to `out`. 0: overwrite, zeros for inactive pairs.
    pub accumulate: u32,
    /// Parts that a tile of the route is taken in.
    pub tile_parts: u32,
    /// The number of a part over these gives its tile's.
    pub over_parts: Divider,
    /// Passes that a tile of the largest rank is taken in.
    pub passes: u32,
    /// The number of a pass over these gives its part's.
    pub over_passes: Divider,
    /// Most shares of K that a pass begins with, each a turn: fewer where all passes' are more than blocks; none where blocks do not share.
    pub depth: Shares,
    /// Shares of a slice's columns that it ends with, each a turn; one where blocks do not share.
    pub columns: Shares,
    /// Blocks of the launch.
    pub blocks: u32,
    /// Stages of the ring.
    pub stages: u32,
    /// Steps of expand that may be under way at a time, 1 ..= `stages`.
    pub under_way: u32,
    /// One of [`products`].
    pub products: u32,
    /// Bytes of each row of `x` that are asked for before the launch waits for the route: a multiple of 16.
    pub ahead: u32,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divider_divides_like_the_processor() {
        let numbers = (0..10_000).chain((0..10_000).map(|i| i32::MAX as u32 - i));
        for n in numbers {
            for d in (1..=64).chain([127, 128, 129, 264, 40_000, 65_535, 65_537, 1 << 30, Divider::MAX]) {
                assert_eq!(Divider::new(d).quotient(n), n / d, "{n} / {d}");
            }
        }
    }
}
