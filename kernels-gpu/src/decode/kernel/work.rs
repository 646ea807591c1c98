//! The work items, one after another, and which part of each a block of the cluster takes.

use super::barriers::item_count;
use super::context::Context;
use crate::arch::thread;
use crate::decode::config::Config;
use crate::decode::{B_STAGE, GROUP, MAX_COLUMNS, RUN, STAGE_K};
use crate::params::{DecodeParams, Tile};
use crate::tile::pieces;

/// A tile of pairs and a slice.
#[derive(Clone, Copy)]
pub(super) struct WorkItem {
    /// The tile, with the rank of its slot's slice.
    pub tile: Tile,
    pub slice: u32,
}

impl WorkItem {
    /// Of a tile with the rank that the route knows.
    ///
    /// # Safety
    /// The tile and the slice must be of the call.
    #[inline(always)]
    pub unsafe fn new<C: Config>(p: &DecodeParams, tile: Tile, slice: u32) -> Self {
        // SAFETY: as the caller promises.
        let rank = if C::GENERAL { unsafe { p.weights.rank(&tile, slice) } } else { tile.rank };
        WorkItem { tile: Tile { rank, ..tile }, slice }
    }
}

impl Context<'_> {
    /// Calls `body` with the work items of this block's cluster that have pairs, one after another.
    ///
    /// # Safety
    /// Where the segments come from `route`, it must have ended.
    #[inline(always)]
    pub unsafe fn each_item<C: Config>(&self, mut body: impl FnMut(WorkItem)) {
        let mut next = self.first_item();
        // SAFETY: the number was stored before a barrier. Read anew each time, it takes no register.
        while next < unsafe { item_count().load() } {
            // SAFETY: as the caller promises; the work item is one of the cluster's.
            let item = unsafe { self.item::<C>(next) };
            next += self.p.clusters;
            if item.tile.rows > 0 {
                body(item);
            }
        }
    }

    /// The number of the first work item of the block's cluster. The others follow at distances of the number
    /// of clusters.
    #[inline(always)]
    pub fn first_item(&self) -> u32 {
        thread::block() >> log2(self.blocks)
    }

    /// Work item `number`.
    ///
    /// # Safety
    /// There must be such a work item, of the block's cluster, and where the block finds the segments, it
    /// must be listed.
    #[inline(always)]
    pub unsafe fn item<C: Config>(&self, number: u32) -> WorkItem {
        let p = self.p;
        let [part, slice] = p.tile_and_slice(number);
        // SAFETY: as the caller promises.
        let tile = unsafe {
            if p.finds != 0 {
                self.segments.tile(&p.room, p.over_listed.quotient(number))
            } else {
                let whole = p.over_parts.quotient(part);
                let tile = p.route.tiles.at(whole).load_tile();
                tile.part(part - whole * p.tile_parts, C::ROWS)
            }
        };
        // SAFETY: as the caller promises.
        unsafe { WorkItem::new::<C>(p, tile, slice) }
    }
}

/// Which part of the shrink of work items of one rank a block of the cluster takes: groups of ranks, and,
/// where these are fewer than blocks, a split of K.
#[derive(Clone, Copy)]
pub(super) struct ShrinkPart {
    pub rank: u32,
    /// Blocks that take turns with the groups, a power of two: the groups of one block are so many apart.
    pub group_stride: u32,
    /// The block's split of K: its first element, and its end.
    pub k: (u32, u32),
}

impl ShrinkPart {
    /// Of work items of no rank.
    pub const NONE: Self = ShrinkPart { rank: 0, group_stride: 1, k: (0, 0) };

    #[inline(always)]
    pub fn new(context: &Context<'_>, rank: u32) -> Self {
        let &Context { p, block, blocks, .. } = context;
        let groups = pieces::<GROUP>(rank);
        let group_stride = groups.next_power_of_two().min(blocks);
        let shift = log2(group_stride);
        let (first, end) = split(pieces::<RUN>(p.weights.in_dim), block >> shift, blocks >> shift);
        let k = (RUN * first, p.weights.in_dim.min(RUN * end));
        ShrinkPart { rank, group_stride, k }
    }

    /// That of work items of another rank: most have the one before.
    #[inline(always)]
    pub fn change(&mut self, context: &Context<'_>, rank: u32) {
        if rank != self.rank {
            *self = Self::new(context, rank);
        }
    }

    /// Groups of 16 ranks.
    #[inline(always)]
    pub fn groups(&self) -> u32 {
        pieces::<GROUP>(self.rank)
    }

    /// The block's first group.
    #[inline(always)]
    pub fn first_group(&self, context: &Context<'_>) -> u32 {
        context.block & (self.group_stride - 1)
    }

    /// Of `blocks` blocks, the splits of K; of block `blocks`, the number of its split.
    #[inline(always)]
    pub fn k_splits(&self, blocks: u32) -> u32 {
        blocks >> log2(self.group_stride)
    }

    /// Groups of ranks that are sent of each split of K: as many by each block, so the last may be zeros. A
    /// block that sent nothing would not wait either, and run ahead of the others by more phases than a
    /// parity tells apart.
    #[inline(always)]
    pub fn sent_groups(&self) -> u32 {
        (self.groups() + self.group_stride - 1) & !(self.group_stride - 1)
    }

    /// Calls `body` with each stage that the part takes: the group of ranks, the first element of K, and how
    /// many.
    #[inline(always)]
    pub fn each_stage(&self, context: &Context<'_>, mut body: impl FnMut(u32, u32, u32)) {
        let mut group = self.first_group(context);
        while group < self.groups() {
            let (mut at, end) = self.k;
            while at < end {
                body(group, at, STAGE_K.min(end - at));
                at += STAGE_K;
            }
            group += self.group_stride;
        }
    }
}

/// Which columns of a work item's slice a block of the cluster expands.
#[derive(Clone, Copy)]
pub(super) struct ExpandPart {
    pub first: u32,
    pub end: u32,
    /// Ranks in use, rounded up to whole sixteen bytes.
    pub rank: u32,
    /// Columns of a stage: a power of two.
    pub stage_columns: u32,
}

impl ExpandPart {
    #[inline(always)]
    pub fn new<C: Config>(context: &Context<'_>, item: &WorkItem) -> Self {
        let &Context { block, blocks, .. } = context;
        let out_dim = context.out_dim::<C>(item.slice);
        let (first, end) = split(pieces::<GROUP>(out_dim), block, blocks);
        let rank = item.tile.rank.next_multiple_of(8);
        ExpandPart {
            first: GROUP * first,
            end: out_dim.min(GROUP * end),
            rank,
            stage_columns: ((B_STAGE / 2) >> log2(rank.next_power_of_two())).min(MAX_COLUMNS),
        }
    }

    /// Calls `body` with each stage that the part takes: the first column, and how many. Without ranks there
    /// are none.
    #[inline(always)]
    pub fn each_stage(&self, mut body: impl FnMut(u32, u32)) {
        let mut at = self.first;
        while at < self.end && self.rank > 0 {
            body(at, self.stage_columns.min(self.end - at));
            at += self.stage_columns;
        }
    }
}

/// The part of `length` things that block `block` of `blocks`, a power of two, takes: the first, and the end.
#[inline(always)]
fn split(length: u32, block: u32, blocks: u32) -> (u32, u32) {
    let each = length >> log2(blocks);
    let more = length & (blocks - 1);
    let first = block * each + block.min(more);
    (first, first + each + (block < more) as u32)
}

/// The logarithm of a power of two. (Of no other number, so that nothing has to be said of zero.)
#[inline(always)]
pub(super) fn log2(power: u32) -> u32 {
    31 - power.leading_zeros()
}
