//! What all roles know of the launch: the call, the cluster, and the map of shared memory.

use super::pipeline::Pipeline;
use super::work::WorkItem;
use crate::arch::cluster;
use crate::arch::shared::Shared;
use crate::decode::config::Config;
use crate::decode::segments::Segments;
use crate::decode::{
    BARRIER_BYTES, CONSUMER_WARPS, MAX_STAGES, RUN, SUM_ROW, expand_stage_bytes, fixed_bytes, receive_bytes,
    row_bytes, shrink_stage_bytes,
};
use crate::memory::{Global, Index};
use crate::params::{DecodeParams, Matrix, Tile};

/// What all roles know of the launch.
#[derive(Clone, Copy)]
pub(super) struct Context<'p> {
    pub p: &'p DecodeParams,
    /// This block's number in its cluster, and how many blocks the cluster has: a power of two.
    pub block: u32,
    pub blocks: u32,
    pub segments: Segments,
    h: Shared,
    /// The shrink warps' sums.
    pub sums: Shared,
    receive_buffers: Shared,
}

impl<'p> Context<'p> {
    /// The launch's, with the map of shared memory that [`decode`](crate::decode) shows.
    #[inline(always)]
    pub fn new<C: Config>(p: &'p DecodeParams) -> Self {
        let (block, blocks) = (cluster::block(), cluster::blocks());
        let segments = Shared::base().offset(BARRIER_BYTES);
        let h = segments.offset(p.room.shared_bytes());
        let sums = h.offset(2 * C::ROWS * h_row_bytes(p));
        let receive_buffers = sums.offset(CONSUMER_WARPS * C::ROWS * SUM_ROW);
        Context { p, block, blocks, segments: Segments::at(segments), h, sums, receive_buffers }
    }

    /// The pipeline of shrink, after all else.
    #[inline(always)]
    pub fn shrink_pipeline<C: Config>(&self) -> Pipeline {
        let p = self.p;
        let start = Shared::base().offset(fixed_bytes(C::ROWS, p.route.max_rank, self.blocks, p.room));
        let stage_bytes = const { shrink_stage_bytes(C::ROWS) };
        Pipeline { start, stages: p.shrink_stages, stage_bytes, barriers: 0, stage: 0, parity: 0 }
    }

    /// The pipeline of expand, after that of shrink.
    #[inline(always)]
    pub fn expand_pipeline<C: Config>(&self, shrink: &Pipeline) -> Pipeline {
        let start = shrink.start.offset(shrink.stages * shrink.stage_bytes);
        let stage_bytes = const { expand_stage_bytes(C::ROWS) };
        let stages = self.p.expand_stages;
        Pipeline { start, stages, stage_bytes, barriers: 2 * MAX_STAGES, ..*shrink }
    }

    /// Pair `row` of a tile.
    ///
    /// # Safety
    /// The tile must have so many.
    #[inline(always)]
    pub unsafe fn pair(&self, tile: &Tile, row: u32) -> u32 {
        // SAFETY: as the caller promises.
        unsafe {
            if self.p.finds != 0 {
                self.segments.pair_at(tile.first + row).load()
            } else {
                self.p.route.pairs.at(tile.first + row).load()
            }
        }
    }

    /// Where the slice's columns begin in a row of `out`.
    #[inline(always)]
    pub fn out_row<C: Config>(&self, item: &WorkItem, row: u32) -> Global<u16> {
        let row = C::Index::from_u32(row).times(C::Index::from_u64(self.p.out_stride));
        let weights = &self.p.weights;
        let first = match C::GENERAL {
            true => C::Index::from_u32(weights.first_column(item.slice)),
            false => C::Index::from_u32(item.slice).times(C::Index::from_u32(weights.out_dims[0])),
        };
        self.p.out.at(row.plus(first))
    }

    /// Columns of a slice.
    #[inline(always)]
    pub fn out_dim<C: Config>(&self, slice: u32) -> u32 {
        if C::GENERAL { self.p.weights.out_dim(slice) } else { self.p.weights.out_dims[0] }
    }

    /// The tile's expert's matrix of `a`.
    ///
    /// # Safety
    /// The tile must have a rank.
    #[inline(always)]
    pub unsafe fn a<C: Config>(&self, tile: &Tile, slice: u32) -> Matrix {
        let weights = &self.p.weights;
        match C::GENERAL {
            // SAFETY: as the caller promises.
            true => unsafe { weights.a::<C::Index>(tile, slice) },
            false => weights.stacked_a::<C::Index>(tile, slice),
        }
    }

    /// The tile's expert's matrix of `b`.
    ///
    /// # Safety
    /// The tile must have a rank.
    #[inline(always)]
    pub unsafe fn b<C: Config>(&self, tile: &Tile, slice: u32) -> Matrix {
        let weights = &self.p.weights;
        match C::GENERAL {
            // SAFETY: as the caller promises.
            true => unsafe { weights.b::<C::Index>(tile, slice) },
            false => weights.stacked_b::<C::Index>(tile, slice, weights.out_dims[0]),
        }
    }

    /// Buffer `buffer` of h, rows [`h_row_bytes`] apart.
    #[inline(always)]
    pub fn h<C: Config>(&self, buffer: u32) -> Shared {
        self.h.offset(buffer * C::ROWS * h_row_bytes(self.p))
    }

    /// Receive buffer `buffer`, for the parts of h.
    #[inline(always)]
    pub fn receive_buffer<C: Config>(&self, buffer: u32) -> Shared {
        self.receive_buffers.offset(buffer * receive_bytes(C::ROWS, self.p.route.max_rank, self.blocks))
    }
}

/// Bytes from one row of h to the next.
#[inline(always)]
pub(super) fn h_row_bytes(p: &DecodeParams) -> u32 {
    row_bytes(p.route.max_rank.next_multiple_of(RUN))
}
