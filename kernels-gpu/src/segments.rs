//! Segments found by one block on its own: what `route` does, for calls of so few pairs that a launch would
//! take longer.
//!
//! Every block finds the same tiles, in the same order: that of buckets, as `route` has it, those of inactive pairs last. So
//! the blocks agree on who takes what without meeting, and a cluster lists only the units that it takes itself. Pairs are
//! counted by segment; every warp adds up all counts on its own, which tells it in which segment a tile lies, and then looks
//! through the list of pairs for those of the tile. All threads run through the code once, so it costs its instructions: what is
//! done for every pair is little, and what takes more is done for few units.
//!
//! Where there are few (slot, expert) a segment is counted at its bucket's number ([`MAX_DIRECT`]). Otherwise a hash table
//! gives it a place; so that all blocks give it the same, a place keeps the smallest key that has come to it, and larger ones go on to the
//! next: the table then does not depend on who came first (Shun and Blelloch, "Phase-concurrent hash tables for
//! determinism", 2014).
//!
//! The weights that a cluster begins with lie where the tile of its first unit says; its pairs are not needed for that. So one warp ([`AHEAD`]) is told
//! that tile as soon as pairs are counted, and goes on while others list.
//!
//! Up to [`FEW`] pairs a warp finds the segments in registers ([`Few`]); one that lists all of them, and [`AHEAD`] for itself.
//!
//! Shared memory that stays, for as many pairs and tiles as [`Room`] says:
//!
//! | bytes | what |
//! |---|---|
//! | pairs × 4 | the pairs, tile after tile |
//! | tiles × 8 | tiles: slot and expert, first pair, rows and rank |
//!
//! and that is free again once they are found ([`Room::scratch_bytes`]), none for few pairs:
//!
//! | bytes | what |
//! |---|---|
//! | (places, in multiples of 256, + 4) × 4 | pairs of each segment, then the inactive ones |
//! | places × 4 | the bucket of each place, unless it is the place's number |
//! | pairs × 4, in multiples of 128 | the place of each pair's segment |

/// Most pairs.
pub const MAX_PAIRS: u32 = 1024;
/// Pairs up to which one warp finds the segments on its own, a lane each.
pub const FEW: u32 = 32;
/// Threads of the block.
pub const THREADS: u32 = 352;
/// The warp that lists nothing, and is told the tile of the cluster's first unit while others list.
pub const AHEAD: u32 = 8;
/// Most buckets of active pairs that are counted at their own number.
pub const MAX_DIRECT: u32 = 1024;
/// Counts that a warp adds up at a time.
const SWEEP: u32 = 256;
/// Pairs that a warp looks through at a time.
const LOOK: u32 = 128;

/// Most slots, and most experts: a number of each, and one more, must fit half a word.
pub const MAX_NUMBER: u32 = (1 << 16) - 1;

/// What shared memory has room for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Room {
    /// Pairs: a multiple of 4.
    pub pairs: u32,
    /// Tiles: a multiple of 2.
    pub tiles: u32,
    /// Segments that are counted, without that of inactive pairs: as many as buckets, or a power of two.
    pub places: u32,
}

impl Room {
    /// Nothing.
    pub const NONE: Self = Room { pairs: 0, tiles: 0, places: 0 };

    /// For `pairs` pairs of `buckets` buckets in at most `tiles` tiles of `rows` pairs, of which a cluster takes at most `own`.
    pub const fn new(pairs: u32, buckets: u64, tiles: u32, rows: u32, own: u32) -> Self {
        if pairs <= FEW {
            return Self::of(pairs, tiles, 0);
        }
        let places = if buckets <= MAX_DIRECT as u64 {
            buckets as u32
        } else {
            // At most two thirds of them are used.
            (pairs + pairs / 2).next_power_of_two()
        };
        Self::of(own * rows, own, places)
    }

    const fn of(pairs: u32, tiles: u32, places: u32) -> Self {
        Room { pairs: pairs.next_multiple_of(4), tiles: tiles.next_multiple_of(2), places }
    }

    /// Whether all tiles are listed, as those of few pairs are, or what one cluster takes.
    pub const fn lists_all(self) -> bool {
        self.places == 0
    }

    /// Bytes that stay.
    pub const fn shared_bytes(self) -> u32 {
        self.pairs * 4 + self.tiles * 8
    }

    /// Bytes that are free again once the segments of `pairs` pairs of `buckets` buckets are found.
    pub const fn scratch_bytes(self, pairs: u32, buckets: u64) -> u32 {
        if self.lists_all() {
            0
        } else {
            4 * (places_at(self.places, buckets) + pairs.next_multiple_of(LOOK))
        }
    }
}

/// The place of inactive pairs, after all others.
const fn inactive_place(places: u32) -> u32 {
    places.next_multiple_of(SWEEP)
}

/// Words of the counts of pairs.
const fn counts(places: u32) -> u32 {
    inactive_place(places) + 4
}

/// Word of the place of the first pair, after the counts and, where places are not buckets' numbers, the bucket of each.
const fn places_at(places: u32, buckets: u64) -> u32 {
    counts(places) + if places as u64 == buckets { 0 } else { places }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::{Few, Ids, Segments};

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::{AHEAD, FEW, LOOK, Room, SWEEP, THREADS, counts, inactive_place, places_at};
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, thread, warp};
    use crate::memory::Global;
    use crate::params::{RouteParams, Tile, count};
    use crate::route::{bucket_by, slot_rank};
    use crate::scan::inclusive;
    use crate::tile::unroll;

    /// No segment: no bucket and no place are this number.
    const FREE: u32 = u32::MAX;
    /// Threads of a warp.
    const LANES: u32 = 32;
    /// Ids of a line of L2.
    const LINE: u32 = 32;
    /// Warps that list: all but [`AHEAD`].
    const LISTERS: u32 = THREADS / LANES - 1;
    /// Counts that a lane adds up at a time.
    const LANE_COUNTS: usize = (SWEEP / LANES) as usize;

    /// Where things are in the scratch.
    #[derive(Clone, Copy)]
    struct Scratch {
        start: Shared,
        places: u32,
        /// Buckets of active pairs.
        buckets: u32,
    }

    impl Scratch {
        #[inline(always)]
        fn new(p: &RouteParams, start: Shared, room: &Room) -> Self {
            Scratch { start, places: room.places, buckets: p.slots * p.experts }
        }

        /// Whether a segment's place is its bucket's number.
        #[inline(always)]
        fn is_direct(&self) -> bool {
            self.places == self.buckets
        }

        /// The place of inactive pairs.
        #[inline(always)]
        fn inactive(&self) -> u32 {
            inactive_place(self.places)
        }

        /// How many pairs a place's segment has.
        #[inline(always)]
        fn count(&self, place: u32) -> Shared {
            self.start.offset(4 * place)
        }

        /// The bucket of a place.
        #[inline(always)]
        fn key(&self, place: u32) -> Shared {
            self.count(counts(self.places) + place)
        }

        /// The bucket of a place in use, or of [`Scratch::inactive`].
        ///
        /// # Safety
        /// All pairs must have been entered.
        #[inline(always)]
        unsafe fn bucket(&self, place: u32) -> u32 {
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
        fn place(&self, pair: u32) -> Shared {
            self.count(places_at(self.places, self.buckets.into()) + pair)
        }

        /// The place from which on a bucket's is looked for.
        #[inline(always)]
        fn home(&self, bucket: u32) -> u32 {
            bucket.wrapping_mul(0x9e37_79b1) >> (32 - self.places.trailing_zeros())
        }

        /// The place after `place`.
        #[inline(always)]
        fn after(&self, place: u32) -> u32 {
            (place + 1) & (self.places - 1)
        }

        /// Enters a bucket of active pairs into the table.
        ///
        /// # Safety
        /// The table must have been emptied, and have a free place.
        #[inline(always)]
        unsafe fn insert(&self, bucket: u32) {
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
        unsafe fn find(&self, bucket: u32) -> u32 {
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
        unsafe fn enter(&self, pair: u32, place: u32) {
            // SAFETY: as the caller promises.
            unsafe {
                self.place(pair).store(place);
                self.count(place).fetch_add(1);
            }
        }
    }

    /// Tiles and pairs of a segment, in halves of a word.
    #[inline(always)]
    fn tiles_and_pairs<const ROWS: u32>(pairs: u32) -> u32 {
        pairs.div_ceil(ROWS) << 16 | pairs
    }

    /// Sums of tiles and pairs, in halves of a word, over [`SWEEP`] places from `start` on, [`LANE_COUNTS`] a lane.
    #[derive(Clone, Copy)]
    struct Sweep {
        start: u32,
        /// How many pairs this lane's places have.
        counts: [u32; LANE_COUNTS],
        /// Before this lane's places.
        before: u32,
        /// Up to and with them.
        through: u32,
        /// Up to and with all.
        end: u32,
    }

    impl Sweep {
        /// Of the places from `start` on, with `past` tiles and pairs before them. The whole warp must come here.
        ///
        /// # Safety
        /// The counts must have so many places.
        #[inline(always)]
        unsafe fn new<const ROWS: u32>(scratch: &Scratch, start: u32, past: u32) -> Self {
            let first = start + LANE_COUNTS as u32 * thread::lane();
            let mut counts = [0; LANE_COUNTS];
            let mut here = 0;
            unroll::<{ LANE_COUNTS / 4 }>(|four| {
                // SAFETY: as the caller promises.
                let loaded = unsafe { scratch.count(first + 4 * four as u32).load16() };
                unroll::<4>(|i| {
                    counts[4 * four + i] = loaded[i];
                    here += tiles_and_pairs::<ROWS>(loaded[i]);
                });
            });
            let through = past + inclusive(here);
            Sweep { start, counts, before: through - here, through, end: warp::shuffle(through, 31) }
        }

        /// The place whose segment has tile `number`, how many pairs the segment has, and how many tiles and pairs come
        /// before it. The whole warp must come here, and the tile be one of these.
        #[inline(always)]
        fn locate<const ROWS: u32>(&self, number: u32) -> [u32; 3] {
            let owner = warp::ballot(self.through >> 16 <= number).count_ones();
            // Each lane looks among its own places, and the owner's answer counts.
            let (mut place, mut count, mut before) = (0, 0, 0);
            let mut through = self.before;
            unroll::<LANE_COUNTS>(|i| {
                if through >> 16 <= number {
                    (place, count, before) = (i as u32, self.counts[i], through);
                }
                through += tiles_and_pairs::<ROWS>(self.counts[i]);
            });
            place += self.start + LANE_COUNTS as u32 * thread::lane();
            let mut found = [0; 3];
            unroll::<3>(|i| found[i] = warp::shuffle([place, count, before][i], owner));
            found
        }
    }

    /// Where the ids of a pair are, if it exists: found before they may be read.
    #[derive(Clone, Copy)]
    pub struct Ids {
        slot: Global<u32>,
        expert: Global<u32>,
    }

    impl Ids {
        /// Of pair `pair`.
        #[inline(always)]
        pub fn of(p: &RouteParams, pair: u32) -> Self {
            if pair < p.pair_count {
                Ids { slot: p.token_lora.at(p.top_k.quotient(pair)), expert: p.topk_ids.at(pair) }
            } else {
                Ids { slot: Global::NULL, expert: Global::NULL }
            }
        }

        /// Slot and global expert; numbers that do not exist, if the pair does not.
        ///
        /// # Safety
        /// The ids must be as the fields of the call's parameters say.
        #[inline(always)]
        unsafe fn load(self) -> [u32; 2] {
            if self.expert.is_null() {
                [u32::MAX; 2]
            } else {
                // SAFETY: as the caller promises.
                unsafe { [self.slot.load(), self.expert.load()] }
            }
        }
    }

    /// The slots' ranks, a lane each of the first [`LANES`]: asked for together with a pair's ids, and not after them.
    #[derive(Clone, Copy)]
    struct Ranks {
        own: u32,
    }

    impl Ranks {
        /// Of the slots of `p`.
        ///
        /// # Safety
        /// Every tensor of `p` must be as its field says.
        #[inline(always)]
        unsafe fn new(p: &RouteParams) -> Self {
            // SAFETY: as the caller promises.
            Ranks { own: unsafe { slot_rank(p, thread::lane()) } }
        }

        /// The rank in use of a slot, 0 when it is off or does not exist. The whole warp must come here.
        ///
        /// # Safety
        /// As for [`Ranks::new`].
        #[inline(always)]
        unsafe fn of(self, p: &RouteParams, slot: u32) -> u32 {
            if p.slots <= LANES {
                let rank = warp::shuffle(self.own, slot);
                if slot < LANES { rank } else { 0 }
            } else {
                // SAFETY: as the caller promises.
                unsafe { slot_rank(p, slot) }
            }
        }
    }

    /// Calls `body` with this thread's pairs, one after another, and whether they exist: the whole warp comes there as
    /// long as any does.
    #[inline(always)]
    fn each_pair(pair_count: u32, mut body: impl FnMut(u32, bool)) {
        let mut pair = thread::index();
        while pair - thread::lane() < pair_count {
            body(pair, pair < pair_count);
            pair += THREADS;
        }
    }

    /// The lanes before `lane`.
    #[inline(always)]
    fn below(lane: u32) -> u32 {
        (1 << lane) - 1
    }

    /// The segments of at most [`FEW`] pairs, in the registers of a warp, a pair a lane.
    #[derive(Clone, Copy)]
    pub struct Few {
        bucket: u32,
        slot: u32,
        rank: u32,
        /// The pairs of the segment, how many these are, and how many of them come before this one.
        peers: u32,
        size: u32,
        before: u32,
        /// The first pairs of tiles of active pairs, in the order of tiles.
        leads: u32,
        is_active: bool,
    }

    impl Few {
        /// Finds them, cut into tiles of `ROWS` pairs. The whole warp must come here, each lane with the ids of the pair of its number. Nothing
        /// has to be prepared.
        ///
        /// # Safety
        /// Every tensor of `p` must be as its field says, and hold no more pairs.
        #[inline(always)]
        pub unsafe fn find<const ROWS: u32>(p: &RouteParams, own_ids: Ids) -> Self {
            // SAFETY: as the caller promises.
            let (bucket, slot, rank) = unsafe {
                let [slot, global_expert] = own_ids.load();
                let rank = Ranks::new(p).of(p, slot);
                (bucket_by(p, slot, global_expert, |_| rank), slot, rank)
            };
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
            let [bucket, slot, rank, left] = [self.bucket, self.slot, self.rank, self.size - self.before]
                .map(|own| warp::shuffle(own, lead));
            let expert = bucket - slot * p.experts;
            Tile { slot, expert, first: 0, rows: left.min(ROWS), rank, reserved: [0; 3] }
        }
    }

    /// The segments of a call, cut into tiles, in a block's shared memory: all tiles of a call of few pairs, otherwise those
    /// of the cluster's units.
    #[derive(Clone, Copy)]
    pub struct Segments {
        start: Shared,
    }

    impl Segments {
        #[inline(always)]
        fn tile_at(&self, room: &Room, number: u32) -> Shared {
            self.start.offset(4 * room.pairs + 8 * number)
        }

        /// Where pair `number` of the list is.
        #[inline(always)]
        pub fn pair_at(&self, number: u32) -> Shared {
            self.start.offset(4 * number)
        }

        /// Those that are, or will be, at `start`.
        #[inline(always)]
        pub fn at(start: Shared) -> Self {
            Segments { start }
        }

        /// Asks for a call's ids and ranks, of which nothing is read yet: once the launch before has ended they come sooner. One warp
        /// must come here.
        #[inline(always)]
        pub fn ask_for_ids(p: &RouteParams) {
            let pair = LINE * thread::lane();
            if pair < p.pair_count {
                p.topk_ids.at(pair).ask_for();
                p.token_lora.at(p.top_k.quotient(pair)).ask_for();
            }
            if thread::lane() == 0 {
                p.ranks.ask_for();
                p.adapter_enabled.ask_for();
            }
        }

        /// Empties what is in `scratch`. The whole block must come here, and meet before it comes to
        /// [`Segments::find`]; nothing is read that a launch before this one may write.
        ///
        /// # Safety
        /// `scratch` must have room for it.
        #[inline(always)]
        pub unsafe fn prepare(p: &RouteParams, scratch: Shared, room: &Room) {
            let scratch = Scratch::new(p, scratch, room);
            let counts = counts(scratch.places);
            let end = places_at(scratch.places, scratch.buckets.into()) + p.pair_count.next_multiple_of(LOOK);
            let mut word = 4 * thread::index();
            while word < end {
                let empty = if word < counts { 0 } else { FREE };
                // SAFETY: counts, keys and places are multiples of four, and follow one another.
                unsafe { scratch.count(word).store16([empty; 4]) };
                word += 4 * THREADS;
            }
        }

        /// Finds them, cut into tiles of `ROWS` pairs, and lists the units of the cluster, of which `own` says tile and slice. Those of
        /// slice 0 are also left where `route` would have left them, for later calls, if this block `keeps` them. The whole block
        /// must come here, each thread with the ids of the pair of its number, with the `scratch` and `room` of [`Segments::prepare`], and meet before it uses the list.
        ///
        /// Returns the numbers of tiles, of active pairs, which come first, and of all. But warp [`AHEAD`], which lists none, does not know them; to it this
        /// returns the tile of the cluster's first unit, whose pairs are not listed yet, or an empty one.
        ///
        /// # Safety
        /// Every tensor of `p` must be as its field says, and hold no more than there is room for; `start` and `scratch` must
        /// have room for them.
        #[inline(always)]
        pub unsafe fn find<const ROWS: u32>(
            self,
            p: &RouteParams,
            own_ids: Ids,
            own: impl Fn(u32) -> [u32; 2],
            keeps: bool,
            scratch: Shared,
            room: &Room,
        ) -> ([u32; 2], Tile) {
            let scratch = Scratch::new(p, scratch, room);

            // Each pair to the count of its segment. The next pair's ids are asked for before.
            // SAFETY: as the caller promises.
            let (mut next, ranks) = unsafe { (own_ids.load(), Ranks::new(p)) };
            each_pair(p.pair_count, |pair, exists| {
                let [slot, global_expert] = next;
                // SAFETY: as above.
                next = unsafe { Ids::of(p, pair + THREADS).load() };
                // SAFETY: as above.
                let rank = unsafe { ranks.of(p, slot) };
                if exists {
                    // SAFETY: as the caller promises.
                    unsafe {
                        let bucket = bucket_by(p, slot, global_expert, |_| rank);
                        if scratch.is_direct() {
                            let is_active = bucket < scratch.buckets;
                            scratch.enter(pair, if is_active { bucket } else { scratch.inactive() });
                        } else {
                            scratch.place(pair).store(bucket);
                            if bucket < scratch.buckets {
                                scratch.insert(bucket);
                            }
                        }
                    }
                }
            });
            // Lanes leave the loops above one by one, and `bar.sync` wants whole warps.
            warp::sync();
            barrier::sync();
            if !scratch.is_direct() {
                each_pair(p.pair_count, |pair, exists| {
                    if exists {
                        // SAFETY: this thread stored the bucket; all are in the table.
                        unsafe {
                            let bucket = scratch.place(pair).load();
                            let is_active = bucket < scratch.buckets;
                            let place = if is_active { scratch.find(bucket) } else { scratch.inactive() };
                            scratch.enter(pair, place);
                        }
                    }
                });
                warp::sync();
                barrier::sync();
            }

            // Every warp goes through all segments, and lists every so many of the cluster's units.
            let is_ahead = thread::warp() == AHEAD;
            let mut entry = if is_ahead { 0 } else { thread::warp() - (thread::warp() > AHEAD) as u32 };
            let mut first = Tile::EMPTY;
            // SAFETY: all counts are there.
            let counts = unsafe {
                let inactive = scratch.count(scratch.inactive()).load();
                let mut sweep = Sweep::new::<ROWS>(&scratch, 0, 0);
                loop {
                    let [number, slice] = own(entry);
                    let keeps = keeps && slice == 0;
                    while number >= sweep.end >> 16 && sweep.start + SWEEP < scratch.places {
                        sweep = Sweep::new::<ROWS>(&scratch, sweep.start + SWEEP, sweep.end);
                    }
                    let active = sweep.end >> 16;
                    let all = active + inactive.div_ceil(ROWS);
                    if number >= all {
                        break [active, all];
                    }
                    let [place, count, before] = if number < active {
                        sweep.locate::<ROWS>(number)
                    } else {
                        [scratch.inactive(), inactive, sweep.end]
                    };
                    let bucket = scratch.bucket(place);
                    let slot = p.over_experts.quotient(bucket);
                    // The tile's pairs among those of the segment.
                    let skipped = (number - (before >> 16)) * ROWS;
                    let tile = Tile {
                        slot,
                        expert: bucket - slot * p.experts,
                        first: (before & 0xffff) + skipped,
                        rows: (count - skipped).min(ROWS),
                        rank: ranks.of(p, slot),
                        reserved: [0; 3],
                    };
                    if is_ahead {
                        first = tile;
                        break [active, all];
                    }
                    self.list::<ROWS>(room, &scratch, [place, skipped, entry], &tile, |row, pair| {
                        if keeps {
                            p.pairs.at(tile.first + row).store(pair);
                        }
                    });
                    if keeps && thread::lane() == 0 {
                        p.tiles.at(number).store_tile(tile);
                    }
                    entry += LISTERS;
                }
            };
            (counts, first)
        }

        /// Lists a tile as unit `entry` of the cluster: of the segment of a place, whose first `skipped` pairs are in tiles before
        /// it. Calls `keep` with each row and pair. The whole warp must come here.
        ///
        /// # Safety
        /// As for [`Segments::find`]; there must be room for the unit.
        #[inline(always)]
        unsafe fn list<const ROWS: u32>(
            &self,
            room: &Room,
            scratch: &Scratch,
            [place, skipped, entry]: [u32; 3],
            tile: &Tile,
            keep: impl Fn(u32, u32),
        ) {
            let lane = thread::lane();
            let below = below(lane);
            let mut seen = 0;
            let mut at = 0;
            while seen < skipped + tile.rows {
                // SAFETY: the segment has so many pairs, so the list does not end before.
                let places = unsafe { scratch.place(at + 4 * lane).load16() };
                let mut is_any = false;
                unroll::<4>(|i| is_any |= places[i] == place);
                if warp::ballot(is_any) != 0 {
                    let mut lanes = [0; 4];
                    let mut position = seen;
                    unroll::<4>(|i| {
                        lanes[i] = warp::ballot(places[i] == place);
                        position += (lanes[i] & below).count_ones();
                    });
                    unroll::<4>(|i| {
                        if places[i] == place {
                            let row = position.wrapping_sub(skipped);
                            if row < tile.rows {
                                let pair = at + 4 * lane + i as u32;
                                // SAFETY: there is room for the unit's pairs.
                                unsafe { self.pair_at(entry * ROWS + row).store(pair) };
                                keep(row, pair);
                            }
                            position += 1;
                        }
                        seen += lanes[i].count_ones();
                    });
                }
                at += LOOK;
            }
            if lane == 0 {
                // SAFETY: as the caller promises.
                unsafe { self.put_tile(room, entry, &Tile { first: entry * ROWS, ..*tile }) };
            }
        }

        /// Lists all tiles of few pairs, and returns the numbers of tiles, of active pairs and of all. The whole warp must come here.
        ///
        /// # Safety
        /// There must be room for them.
        #[inline(always)]
        pub unsafe fn list_few<const ROWS: u32>(self, p: &RouteParams, few: &Few, room: &Room) -> [u32; 2] {
            let &Few { bucket, slot, rank, peers, size, before, leads, is_active } = few;
            let pair = thread::lane();
            let through = inclusive(if is_active && before == 0 { size } else { 0 });
            let start_of_active = warp::shuffle(through.wrapping_sub(size), peers.trailing_zeros());
            let (active, all_active) = (leads.count_ones(), warp::shuffle(through, FEW - 1));
            let tiles = active + (p.pair_count - all_active).div_ceil(ROWS);
            if pair < p.pair_count {
                let rows = (size - before).min(ROWS);
                let (number, tile) = if is_active {
                    let first = start_of_active + before;
                    let expert = bucket - slot * p.experts;
                    let number = (leads & below(pair)).count_ones();
                    (number, Tile { slot, expert, first, rows, rank, reserved: [0; 3] })
                } else {
                    // Of one slot more, expert 0.
                    let first = all_active + before;
                    let number = active + before / ROWS;
                    (number, Tile { slot: p.slots, expert: 0, first, rows, rank: 0, reserved: [0; 3] })
                };
                // SAFETY: every pair has a place in the list, and there is room for the tiles.
                unsafe {
                    self.pair_at(tile.first).store(pair);
                    if before.is_multiple_of(ROWS) {
                        self.put_tile(room, number, &tile);
                    }
                }
            }
            [active, tiles]
        }

        /// Stores a tile.
        ///
        /// # Safety
        /// There must be room for it.
        #[inline(always)]
        unsafe fn put_tile(&self, room: &Room, number: u32, tile: &Tile) {
            // SAFETY: as the caller promises.
            unsafe {
                self.tile_at(room, number).store(tile.slot << 16 | tile.expert);
                self.tile_at(room, number).offset(4).store(tile.first << 16 | tile.rows << 10 | tile.rank);
            }
        }

        /// Tile `number`.
        ///
        /// # Safety
        /// There must be such a tile.
        #[inline(always)]
        pub unsafe fn tile(&self, room: &Room, number: u32) -> Tile {
            // SAFETY: as the caller promises.
            let [which, what] = unsafe { [0, 4].map(|word| self.tile_at(room, number).offset(word).load()) };
            let (slot, expert) = (which >> 16, which & 0xffff);
            let (first, rows, rank) = (what >> 16, what >> 10 & 63, what & 1023);
            Tile { slot, expert, first, rows, rank, reserved: [0; 3] }
        }

        /// Leaves the numbers of tiles, of active pairs and of all, where `route` would have left them, for later calls, and all pairs and
        /// tiles if all are listed. One warp must come here.
        ///
        /// # Safety
        /// The tensors of `p` must be as their fields say.
        #[inline(always)]
        pub unsafe fn keep(&self, p: &RouteParams, room: &Room, [active, tiles]: [u32; 2]) {
            let i = thread::lane();
            // SAFETY: there is room for all pairs and tiles, and for two counts.
            unsafe {
                if room.lists_all() && i < p.pair_count {
                    p.pairs.at(i).store(self.pair_at(i).load());
                }
                if room.lists_all() && i < tiles {
                    p.tiles.at(i).store_tile(self.tile(room, i));
                }
                if i == 0 {
                    p.counts.at(count::ACTIVE).store(active);
                    p.counts.at(count::ALL).store(tiles);
                }
            }
        }
    }
}
