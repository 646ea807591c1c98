//! Segments of few pairs, found by one warp in its registers.

use super::below;
use super::ranks::Ranks;
use crate::arch::{thread, warp};
use crate::decode::config::Config;
use crate::decode::segments::WARP_PAIRS;
use crate::ids::{bucket, local_expert};
use crate::params::{RouteParams, Tile};
use crate::slots::State;

/// The segments of at most [`WARP_PAIRS`] pairs, in the registers of a warp, a pair a lane.
#[derive(Clone, Copy)]
pub struct WarpSegments {
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

impl WarpSegments {
    /// Finds them, cut into tiles. The whole warp must come here, each lane with what it has loaded: the ids
    /// of the pair of its number, and the state of the slot of its number. Nothing has to be prepared.
    ///
    /// # Safety
    /// Every tensor of `p` must be as its field says, and hold no more pairs.
    #[inline(always)]
    pub unsafe fn find<C: Config>(
        p: &RouteParams,
        ([slot, global_expert], own_slot): ([u32; 2], State),
    ) -> Self {
        // SAFETY: as the caller promises.
        let (rank, expert) = unsafe { (Ranks::new(own_slot).of(p, slot), local_expert(p, global_expert)) };
        let bucket = bucket(p, slot, expert, rank);
        let is_active = bucket < p.slots * p.experts;
        let peers = warp::match_any(bucket) & (u32::MAX >> (WARP_PAIRS - p.pair_count));
        let (size, before) = (peers.count_ones(), (peers & below(thread::lane())).count_ones());
        let leads = warp::ballot(is_active && before.is_multiple_of(C::ROWS));
        WarpSegments { bucket, slot, rank, peers, size, before, leads, is_active }
    }

    /// Tile `number` without its pairs, if it is one of active pairs; otherwise an empty one. The whole warp
    /// must come here.
    #[inline(always)]
    pub fn tile<C: Config>(&self, p: &RouteParams, number: u32) -> Tile {
        if number >= self.leads.count_ones() {
            return Tile::EMPTY;
        }
        let is_its = self.is_active
            && self.before.is_multiple_of(C::ROWS)
            && (self.leads & below(thread::lane())).count_ones() == number;
        let lead = warp::ballot(is_its).trailing_zeros();
        let [bucket, slot, rank, left] =
            [self.bucket, self.slot, self.rank, self.size - self.before].map(|own| warp::shuffle(own, lead));
        let expert = bucket - slot * p.experts;
        Tile { slot, expert, first: 0, rows: left.min(C::ROWS), rank, reserved: [0; 3] }
    }
}
