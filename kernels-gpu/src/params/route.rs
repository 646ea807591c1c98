//! Parameters of the kernels that make a route, and of those that write or read one in vLLM's form.

use super::{Divider, Tile};
use crate::memory::Global;
#[cfg(not(target_arch = "nvptx64"))]
use bytemuck::{Pod, Zeroable};

/// Parameters of `route`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct RouteParams {
    /// `[P]` global expert ids, of the kind that `ids_kind` names.
    pub topk_ids: Global<u32>,
    /// `[T]` adapter slots.
    pub token_lora: Global<u32>,
    /// `[L]` flags, of the kind that `enabled_kind` names.
    pub adapter_enabled: Global<u8>,
    /// `[L]` ranks in use, or null.
    pub ranks: Global<u32>,
    /// `[global_experts]` local ids, or null.
    pub expert_map: Global<u32>,
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
    /// R.
    pub max_rank: u32,
    /// One of [`enabled`](super::enabled).
    pub enabled_kind: u32,
    /// One of [`expert_ids`](super::expert_ids).
    pub ids_kind: u32,
    /// A bucket over these gives its slot.
    pub over_experts: Divider,
    /// Pairs a tile.
    pub tile_rows: u32,
    /// Pairs over these gives tiles.
    pub over_tile_rows: Divider,
    /// Blocks.
    pub blocks: u32,
    /// Pairs that each warp sorts, a multiple of 32.
    pub run: u32,
    /// Counters that a warp has room for, four more than active buckets are counted at a time: a multiple of
    /// 4.
    pub window: u32,
    /// Words of each of the two tables of the exchange: [`crate::route::table_words`].
    pub exchange_room: u32,
    /// `[P]` out: pairs sorted by bucket; inactive pairs last.
    pub pairs: Global<u32>,
    /// Out: the tiles.
    pub tiles: Global<Tile>,
    /// `[count::LEN]` out: how many tiles.
    pub counts: Global<u32>,
    /// `[P]` scratch: the bucket of each pair.
    pub buckets: Global<u32>,
    /// Where blocks tell one another their counts: [`crate::route::EXCHANGE_HEAD`] words and two tables, all
    /// zero before the first launch.
    pub exchange: Global<u32>,
}

/// Parameters of `align`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct AlignParams {
    /// `[P]` global expert ids, of the kind that `ids_kind` names.
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
    /// One of [`enabled`](super::enabled).
    pub enabled_kind: u32,
    /// One of [`expert_ids`](super::expert_ids).
    pub ids_kind: u32,
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
    /// One of [`enabled`](super::enabled).
    pub enabled_kind: u32,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
}
