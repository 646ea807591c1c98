//! Segments of few pairs.

use super::below;
use super::ranks::Ranks;
use crate::arch::{thread, warp};
use crate::decode::segments::FEW;
use crate::ids::{bucket, local_expert};
use crate::params::{RouteParams, Tile};
use crate::slots::State;

/// The segments of at most [`FEW`] pairs, in the registers of a warp, a pair a lane.
#[derive(Clone, Copy)]
pub struct Few {
    pub(super) bucket: u32,
    pub(super) slot: u32,
    pub(super) rank: u32,
    /// The pairs of the segment, how many these are, and how many of them come before this one.
    pub(super) peers: u32,
    pub(super) size: u32,
    pub(super) before: u32,
    /// The first pairs of tiles of active pairs, in the order of tiles.
    pub(super) leads: u32,
    pub(super) is_active: bool,
}

impl Few {
    /// Finds them, cut into tiles of `ROWS` pairs. The whole warp must come here, each lane with what it has loaded:
    /// the ids of the pair of its number, and the state of that slot. Nothing has to be prepared.
    ///
    /// # Safety
    /// Every tensor of `p` must be as its field says, and hold no more pairs.
    #[inline(always)]
    pub unsafe fn find<const ROWS: u32>(
        p: &RouteParams,
        ([slot, global_expert], own_slot): ([u32; 2], State),
    ) -> Self {
        // SAFETY: as the caller promises.
        let (rank, expert) = unsafe { (Ranks::new(own_slot).of(p, slot), local_expert(p, global_expert)) };
        let bucket = bucket(p, slot, expert, rank);
        let is_active = bucket < p.slots * p.experts;
        let peers = warp::match_any(bucket) & (u32::MAX >> (FEW - p.pair_count));
        let (size, before) = (peers.count_ones(), (peers & below(thread::lane())).count_ones());
        let leads = warp::ballot(is_active && before.is_multiple_of(ROWS));
        Few { bucket, slot, rank, peers, size, before, leads, is_active }
    }

    /// Tile `number` without its pairs, if it is one of active pairs; otherwise an empty one. The whole warp must come here.
    #[inline(always)]
    pub fn tile<const ROWS: u32>(&self, p: &RouteParams, number: u32) -> Tile {
        if number >= self.leads.count_ones() {
            return Tile::EMPTY;
        }
        let is_its = self.is_active
            && self.before.is_multiple_of(ROWS)
            && (self.leads & below(thread::lane())).count_ones() == number;
        let lead = warp::ballot(is_its).trailing_zeros();
        let [bucket, slot, rank, left] =
            [self.bucket, self.slot, self.rank, self.size - self.before].map(|own| warp::shuffle(own, lead));
        let expert = bucket - slot * p.experts;
        Tile { slot, expert, first: 0, rows: left.min(ROWS), rank, reserved: [0; 3] }
    }
}
