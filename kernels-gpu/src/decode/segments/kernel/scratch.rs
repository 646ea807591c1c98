//! What is in shared memory while segments are found: the counts of pairs, by place, and the place of each
//! pair.

use crate::arch::shared::Shared;
use crate::arch::{thread, warp};
use crate::decode::LANES;
use crate::decode::config::{Config, tiles_of};
use crate::decode::segments::{Room, SWEEP, counts, inactive_place, places_at};
use crate::params::RouteParams;
use crate::scan::inclusive;
use crate::tile::unroll;

/// No segment: no bucket and no place are this number.
pub(super) const FREE: u32 = u32::MAX;
/// Counts that a lane adds up at a time.
const LANE_COUNTS: usize = (SWEEP / LANES) as usize;

/// Where things are in the scratch.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    pub(super) start: Shared,
    pub(super) places: u32,
    /// Buckets of active pairs.
    pub(super) buckets: u32,
}

impl Scratch {
    #[inline(always)]
    pub(super) fn new(p: &RouteParams, start: Shared, room: &Room) -> Self {
        Scratch { start, places: room.places, buckets: p.slots * p.experts }
    }

    /// Whether a segment's place is its bucket's number.
    #[inline(always)]
    pub(super) fn is_direct(&self) -> bool {
        self.places == self.buckets
    }

    /// The place of inactive pairs.
    #[inline(always)]
    pub(super) fn inactive(&self) -> u32 {
        inactive_place(self.places)
    }

    /// How many pairs a place's segment has.
    #[inline(always)]
    pub(super) fn count(&self, place: u32) -> Shared {
        self.start.offset(4 * place)
    }

    /// The bucket of a place.
    #[inline(always)]
    pub(super) fn key(&self, place: u32) -> Shared {
        self.count(counts(self.places) + place)
    }

    /// The bucket of a place in use, or of [`Scratch::inactive`].
    ///
    /// # Safety
    /// All pairs must have been entered.
    #[inline(always)]
    pub(super) unsafe fn bucket(&self, place: u32) -> u32 {
        if place == self.inactive() {
            self.buckets
        } else if self.is_direct() {
            place
        } else {
            // SAFETY: the place is one of the table's.
            unsafe { self.key(place).load() }
        }
    }

    /// The place of a pair's segment.
    #[inline(always)]
    pub(super) fn place(&self, pair: u32) -> Shared {
        self.count(places_at(self.places, self.buckets.into()) + pair)
    }

    /// The place from which on a bucket's is looked for.
    #[inline(always)]
    pub(super) fn home(&self, bucket: u32) -> u32 {
        bucket.wrapping_mul(0x9e37_79b1) >> (32 - self.places.trailing_zeros())
    }

    /// The place after `place`.
    #[inline(always)]
    pub(super) fn after(&self, place: u32) -> u32 {
        (place + 1) & (self.places - 1)
    }

    /// Enters a bucket of active pairs into the table.
    ///
    /// # Safety
    /// The table must have been emptied, and have a free place.
    #[inline(always)]
    pub(super) unsafe fn insert(&self, bucket: u32) {
        let (mut key, mut place) = (bucket, self.home(bucket));
        loop {
            // SAFETY: the place is one of the table's.
            let before = unsafe { self.key(place).fetch_min(key) };
            if before == FREE || before == key {
                return;
            }
            key = key.max(before);
            place = self.after(place);
        }
    }

    /// The place of a bucket of active pairs.
    ///
    /// # Safety
    /// It must have been entered, and nobody enter others.
    #[inline(always)]
    pub(super) unsafe fn find(&self, bucket: u32) -> u32 {
        let mut place = self.home(bucket);
        // SAFETY: the place is one of the table's.
        while unsafe { self.key(place).load() } != bucket {
            place = self.after(place);
        }
        place
    }

    /// Notes a pair's place, and counts it.
    ///
    /// # Safety
    /// The counts must have been emptied, and have that place.
    #[inline(always)]
    pub(super) unsafe fn enter(&self, pair: u32, place: u32) {
        // SAFETY: as the caller promises.
        unsafe {
            self.place(pair).store(place);
            self.count(place).fetch_add(1);
        }
    }
}

/// Sums of tiles and pairs, in halves of a word, over [`SWEEP`] places from `start` on, [`LANE_COUNTS`] a
/// lane.
#[derive(Clone, Copy)]
pub(super) struct Sweep {
    pub(super) start: u32,
    /// How many pairs this lane's places have.
    pub(super) counts: [u32; LANE_COUNTS],
    /// Before this lane's places.
    pub(super) before: u32,
    /// Up to and with them.
    pub(super) through: u32,
    /// Up to and with all.
    pub(super) end: u32,
}

impl Sweep {
    /// Of the places from `start` on, with `past` tiles and pairs before them. The whole warp must come here.
    ///
    /// # Safety
    /// The counts must have so many places.
    #[inline(always)]
    pub(super) unsafe fn new<C: Config>(scratch: &Scratch, start: u32, past: u32) -> Self {
        let first = start + LANE_COUNTS as u32 * thread::lane();
        let mut counts = [0; LANE_COUNTS];
        let mut here = 0;
        unroll::<{ LANE_COUNTS / 4 }>(|four| {
            // SAFETY: as the caller promises.
            let loaded = unsafe { scratch.count(first + 4 * four as u32).load16() };
            unroll::<4>(|i| {
                counts[4 * four + i] = loaded[i];
                here += tiles_and_pairs::<C>(loaded[i]);
            });
        });
        let through = past + inclusive(here);
        Sweep { start, counts, before: through - here, through, end: warp::shuffle(through, 31) }
    }

    /// The place whose segment has tile `number`, how many pairs the segment has, and how many tiles and
    /// pairs come before it. The whole warp must come here, and the tile be one of these.
    #[inline(always)]
    pub(super) fn locate<C: Config>(&self, number: u32) -> [u32; 3] {
        let owner = warp::ballot(self.through >> 16 <= number).count_ones();
        // Each lane looks among its own places, and the owner's answer counts.
        let (mut place, mut count, mut before) = (0, 0, 0);
        let mut through = self.before;
        unroll::<LANE_COUNTS>(|i| {
            if through >> 16 <= number {
                (place, count, before) = (i as u32, self.counts[i], through);
            }
            through += tiles_and_pairs::<C>(self.counts[i]);
        });
        place += self.start + LANE_COUNTS as u32 * thread::lane();
        let mut found = [0; 3];
        unroll::<3>(|i| found[i] = warp::shuffle([place, count, before][i], owner));
        found
    }
}

/// Tiles and pairs of a segment, in halves of a word.
#[inline(always)]
fn tiles_and_pairs<C: Config>(pairs: u32) -> u32 {
    (tiles_of::<C>(pairs) << 16) + pairs
}
