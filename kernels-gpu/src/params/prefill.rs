//! Parameters of `prefill`.

use super::{Divider, PairRows, Split, Tile, WeightParams};
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::arch::thread::anew;
use crate::memory::Global;
#[cfg(not(target_arch = "nvptx64"))]
use bytemuck::{Pod, Zeroable};

/// The products that `prefill` computes, or a block in one work tile of it: bits.
pub mod products {
    /// Shrink. A call that does nothing else writes all of h: zeros for inactive pairs and above the rank.
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
    /// The adapters.
    pub weights: WeightParams,
    /// `[S, P, R]`: out of [`products::SHRINK`], in of [`products::EXPAND`]; null of both.
    pub h: Global<u16>,
    /// Split-K workspace, `[passes, warps of a tile, columns of h / 16, 32, 4]`: h of passes that blocks
    /// share, as fragments of mma. Like all of the workspace it is 0 before and after the launch.
    pub fragments: Global<u32>,
    /// Split-K workspace, `[passes, warps of a tile, splits of K, columns of h / 8, 32, 4]` of f32: partial
    /// sums of h, where K is split.
    pub sums: Global<u32>,
    /// Split-K workspace, `[passes, warps of a tile, 2]`: how far the warps that share a pass have come.
    pub counters: Global<u32>,
    /// `[P, ≥ offset + ΣN]`, moved on by `offset`.
    pub out: Global<u16>,
    /// `[P]`, or null for 1.
    pub topk_weights: Global<f32>,
    /// Sorted pairs.
    pub pairs: Global<u32>,
    /// Tiles.
    pub tiles: Global<Tile>,
    /// How many of them to take: those of active pairs, or all where inactive pairs are to get zeros.
    pub tile_count: Global<u32>,
    /// The tile scheduler's counter: work tiles that were fetched; 0 before and after the launch.
    pub scheduler: Global<u32>,
    /// Elements from one row of `x` to the next.
    pub x_stride: u64,
    /// Elements from one row of `out` to the next.
    pub out_stride: u64,
    /// Which rows belong to a pair.
    pub rows: PairRows,
    /// P.
    pub pair_count: u32,
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
    /// Splits of K of a pass, each a work tile, at most: where all passes' were more than the blocks of the
    /// launch, neighbours are taken as one. [`Split::NONE`] where blocks do not share passes.
    pub split_k: Split,
    /// Splits of a slice's columns, each a work tile; one where blocks do not share passes.
    pub split_n: Split,
    /// Blocks of the launch.
    pub blocks: u32,
    /// Stages of the pipeline.
    pub stages: u32,
    /// Steps of expand that may be in flight at a time, 1 ..= `stages`.
    pub under_way: u32,
    /// One of [`products`].
    pub products: u32,
    /// Bytes of each row of `x` that are prefetched to L2 before the launch waits for the route: a multiple
    /// of 16.
    pub ahead: u32,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
impl PrefillParams {
    /// Whether blocks share passes.
    #[inline(always)]
    pub fn shares_passes(&self) -> bool {
        anew(self.split_k.count) > 0
    }

    /// What the launch computes: one of [`products`].
    #[inline(always)]
    pub fn computed(&self) -> u32 {
        anew(self.products)
    }
}
