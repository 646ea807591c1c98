//! Parameters of `decode`.

use super::{Divider, PairRows, RouteParams, WeightParams};
use crate::decode::segments::Room;
use crate::memory::Global;
#[cfg(not(target_arch = "nvptx64"))]
use bytemuck::{Pod, Zeroable};

/// Parameters of `decode`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct DecodeParams {
    /// What shared memory has room for; nothing when no segments are to be found.
    pub room: Room,
    /// Stages of the pipeline of shrink.
    pub shrink_stages: u32,
    /// Stages of the pipeline of expand.
    pub expand_stages: u32,
    /// Clusters of the launch.
    pub clusters: u32,
    /// 1: every block finds the segments itself. 0: `route` or `adopt` has left them.
    pub finds: u32,
    /// 1: add to `out`. 0: overwrite, zeros for inactive pairs.
    pub accumulate: u32,
    /// Parts that a tile of the route is taken in.
    pub tile_parts: u32,
    /// The number of a work item over S gives its part of a tile.
    pub over_slices: Divider,
    /// The number of a work item over these gives its tile's place in the list of those that were found: over
    /// the slices where all tiles are listed, over the clusters where a cluster lists those of its work
    /// items.
    pub over_listed: Divider,
    /// The number of a part over these gives its tile.
    pub over_parts: Divider,
    /// Keeps the block a multiple of 8 bytes.
    pub reserved: u32,
    /// The routing: what to find segments from, whose results are then left for later calls, or where they
    /// are.
    pub route: RouteParams,
    /// `[T or P, K]`.
    pub x: Global<u16>,
    /// Elements from one row of `x` to the next.
    pub x_stride: u64,
    /// Which rows belong to a pair.
    pub rows: PairRows,
    /// The adapters.
    pub weights: WeightParams,
    /// `[P, ≥ offset + ΣN]`, moved on by `offset`.
    pub out: Global<u16>,
    /// Elements from one row of `out` to the next.
    pub out_stride: u64,
    /// `[P]`, or null for 1.
    pub topk_weights: Global<f32>,
}

impl DecodeParams {
    /// Work items of so many tiles, of active pairs and of all.
    #[inline(always)]
    pub fn work_items(&self, [active, all]: [u32; 2]) -> u32 {
        let tiles = if self.accumulate != 0 { active } else { all };
        tiles * self.tile_parts * self.weights.slices
    }

    /// Tile, or part of one, and slice of a work item: which of all of the launch.
    #[inline(always)]
    pub fn tile_and_slice(&self, item: u32) -> [u32; 2] {
        let tile = self.over_slices.quotient(item);
        [tile, item - tile * self.weights.slices]
    }
}
