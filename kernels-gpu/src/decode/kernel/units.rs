//! The units of work, one after another, and how the blocks of a cluster share each.

use super::barriers::unit_count;
use crate::arch::shared::Shared;
use crate::arch::thread;
use crate::decode::segments::Segments;
use crate::decode::{B_STAGE, CHUNK, GROUP, MAX_COLUMNS, RUN, landing_bytes};
use crate::memory::{Global, Index};
use crate::params::{DecodeParams, Tile};
use crate::tile::pieces;

/// What all roles know of the launch.
#[derive(Clone, Copy)]
pub(super) struct Context<'p> {
    pub p: &'p DecodeParams,
    pub found: Segments,
    pub block: u32,
    pub blocks: u32,
    pub h: Shared,
    pub sums: Shared,
    pub landings: Shared,
}

/// A tile of pairs and a slice.
#[derive(Clone, Copy)]
pub(super) struct Unit {
    pub tile: Tile,
    pub slice: u32,
}

impl Context<'_> {
    /// Calls `body` with the units of this block's cluster that have pairs, one after another.
    ///
    /// # Safety
    /// Where the segments come from `route`, it must have ended.
    #[inline(always)]
    pub unsafe fn each_unit(&self, rows: u32, mut body: impl FnMut(Unit)) {
        let p = self.p;
        let mut next = self.first_unit();
        // SAFETY: the number was stored before a barrier. Read anew each time, it takes no register.
        while next < unsafe { unit_count().load() } {
            // SAFETY: as the caller promises; the unit is one of the cluster's.
            let unit = unsafe { self.unit(next, rows) };
            next += p.clusters;
            if unit.tile.rows > 0 {
                body(unit);
            }
        }
    }

    /// The number of the first unit of the block's cluster.
    #[inline(always)]
    pub fn first_unit(&self) -> u32 {
        thread::block() >> log2(self.blocks)
    }

    /// Unit `number`.
    ///
    /// # Safety
    /// There must be such a unit, of the block's cluster, and where the block finds the segments, it must be listed.
    #[inline(always)]
    pub unsafe fn unit(&self, number: u32, rows: u32) -> Unit {
        let p = self.p;
        let [part, slice] = p.tile_and_slice(number);
        // SAFETY: as the caller promises.
        let tile = unsafe {
            if p.finds != 0 {
                self.found.tile(&p.room, p.over_listed.quotient(number))
            } else {
                let whole = p.over_parts.quotient(part);
                let tile = p.route.tiles.at(whole).load_tile();
                tile.part(part - whole * p.tile_parts, rows)
            }
        };
        Unit { tile, slice }
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
                self.found.pair_at(tile.first + row).load()
            } else {
                self.p.route.pairs.at(tile.first + row).load()
            }
        }
    }

    /// Where the slice's columns of a pair begin in `out`.
    #[inline(always)]
    pub fn out_row<I: Index>(&self, unit: &Unit, pair: u32) -> Global<u16> {
        let row = I::from_u32(pair).times(I::from_u64(self.p.out_stride));
        self.p.out.at(row.plus(I::from_u32(unit.slice).times(I::from_u32(self.p.out_dim))))
    }

    /// Where the parts of h of a turn land.
    #[inline(always)]
    pub fn landing<const ROWS: u32>(&self, turn: u32) -> Shared {
        // Blocks of a cluster are a power of two.
        self.landings.offset(turn * landing_bytes(ROWS, self.p.route.max_rank, self.blocks))
    }
}

/// How the blocks of a cluster share the shrink of units of one rank.
#[derive(Clone, Copy)]
pub(super) struct Shares {
    pub rank: u32,
    /// Blocks among which groups are shared: a power of two. Groups of a block are so many apart.
    pub group_shares: u32,
    /// This block's share of K: its first element, and its end.
    pub k: (u32, u32),
}

impl Shares {
    /// For units of no rank.
    pub const NONE: Self = Shares { rank: 0, group_shares: 1, k: (0, 0) };

    #[inline(always)]
    pub fn new(context: &Context<'_>, rank: u32) -> Self {
        let &Context { p, block, blocks, .. } = context;
        let groups = pieces::<GROUP>(rank);
        let group_shares = groups.next_power_of_two().min(blocks);
        let shift = log2(group_shares);
        let (first, end) = share_of(pieces::<RUN>(p.in_dim), block >> shift, blocks >> shift);
        let k = (RUN * first, p.in_dim.min(RUN * end));
        Shares { rank, group_shares, k }
    }

    /// Groups of 16 ranks.
    #[inline(always)]
    pub fn groups(&self) -> u32 {
        pieces::<GROUP>(self.rank)
    }

    /// This block's first group.
    #[inline(always)]
    pub fn group(&self, context: &Context<'_>) -> u32 {
        context.block & (self.group_shares - 1)
    }

    /// Of `blocks` blocks, those among which K is shared; of block `blocks`, its number among them.
    #[inline(always)]
    pub fn k_shares(&self, blocks: u32) -> u32 {
        blocks >> log2(self.group_shares)
    }

    /// The shares for units of another rank: most have the one before.
    #[inline(always)]
    pub fn change(&mut self, context: &Context<'_>, rank: u32) {
        if rank != self.rank {
            *self = Self::new(context, rank);
        }
    }

    /// Groups of ranks that a part of h has: as many of each block, the last ones zeros. A block that sent nothing would
    /// not wait either, and be ahead of the others by more than parities tell.
    #[inline(always)]
    pub fn landing_groups(&self) -> u32 {
        (self.groups() + self.group_shares - 1) & !(self.group_shares - 1)
    }
}

/// This block's share of the columns, for units of one rank.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    pub first: u32,
    pub end: u32,
    /// Ranks in use, rounded up to whole sixteen bytes.
    pub rank: u32,
    /// Columns of a stage: a power of two.
    pub step: u32,
}

impl Columns {
    /// Of no rank.
    #[inline(always)]
    pub fn new(context: &Context<'_>) -> Self {
        let &Context { p, block, blocks, .. } = context;
        let (first, end) = share_of(pieces::<GROUP>(p.out_dim), block, blocks);
        Columns { first: GROUP * first, end: p.out_dim.min(GROUP * end), rank: 0, step: MAX_COLUMNS }
    }

    #[inline(always)]
    pub fn change(&mut self, rank: u32) {
        self.rank = rank.next_multiple_of(8);
        self.step = ((B_STAGE / 2) >> log2(self.rank.next_power_of_two())).min(MAX_COLUMNS);
    }

    /// Calls `body` with each stage that they take: the first column, and how many. Without ranks there are none.
    #[inline(always)]
    pub fn each_step(&self, mut body: impl FnMut(u32, u32)) {
        let mut at = self.first;
        while at < self.end && self.rank > 0 {
            body(at, self.step.min(self.end - at));
            at += self.step;
        }
    }
}

/// Calls `body` with each stage that the block's share of a unit's shrink takes: the group of ranks, the first
/// element of K, and how many.
#[inline(always)]
pub(super) fn each_chunk(context: &Context<'_>, shares: &Shares, mut body: impl FnMut(u32, u32, u32)) {
    let mut group = shares.group(context);
    while group < shares.groups() {
        let (mut at, end) = shares.k;
        while at < end {
            body(group, at, CHUNK.min(end - at));
            at += CHUNK;
        }
        group += shares.group_shares;
    }
}

/// The share of `length` things that block `block` of `blocks`, a power of two, takes: the first, and the end.
#[inline(always)]
pub(super) fn share_of(length: u32, block: u32, blocks: u32) -> (u32, u32) {
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
