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
//! Up to [`FEW`] pairs each warp finds the segments in registers, and the first stores all of them.
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

use crate::params::Divider;

/// Most pairs.
pub const MAX_PAIRS: u32 = 1024;
/// Pairs up to which each warp finds the segments on its own.
pub const FEW: u32 = 32;
/// Threads of the block.
pub const THREADS: u32 = 352;
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
        let keys = if self.places as u64 == buckets { 0 } else { self.places };
        if self.lists_all() { 0 } else { 4 * (counts(self.places) + keys + pairs.next_multiple_of(LOOK)) }
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

/// The units that a cluster takes: every `clusters`th from number `cluster` on. A unit is a tile and a slice.
#[derive(Clone, Copy)]
pub struct Deal {
    /// Number of this cluster.
    pub cluster: u32,
    /// Clusters of the launch.
    pub clusters: u32,
    /// Slices of a tile.
    pub slices: u32,
    /// A number over these gives the tile.
    pub over_slices: Divider,
}

impl Deal {
    /// Tile and slice of the cluster's unit `entry`.
    #[inline(always)]
    pub fn unit(&self, entry: u32) -> [u32; 2] {
        let number = self.cluster + entry * self.clusters;
        let tile = self.over_slices.quotient(number);
        [tile, number - tile * self.slices]
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::Segments;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::{Deal, FEW, LOOK, Room, SWEEP, THREADS, counts, inactive_place};
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, thread, warp};
    use crate::params::{RouteParams, Tile, count};
    use crate::route::{bucket_by, slot_rank};
    use crate::scan::inclusive;
    use crate::tile::unroll;

    /// No segment: no slot and expert, no bucket and no place are this number.
    const FREE: u32 = u32::MAX;
    /// Warps of the block.
    const WARPS: u32 = THREADS / 32;
    /// Counts that a lane adds up at a time.
    const LANE_COUNTS: usize = SWEEP as usize / 32;

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

        /// The place of a pair's segment.
        #[inline(always)]
        fn place(&self, pair: u32) -> Shared {
            self.key(if self.is_direct() { 0 } else { self.places } + pair)
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

    /// Slot and global expert of a pair, if it exists.
    ///
    /// # Safety
    /// Every tensor of `p` must be as its field says.
    #[inline(always)]
    unsafe fn ids(p: &RouteParams, pair: u32) -> [u32; 2] {
        if pair < p.pair_count {
            // SAFETY: the pair is one of P, its token one of T.
            unsafe { [p.token_lora.at(p.top_k.quotient(pair)).load(), p.topk_ids.at(pair).load()] }
        } else {
            [u32::MAX; 2]
        }
    }

    /// The segment of a pair with these ids, as slot and local expert in halves of a word, and the slot's rank;
    /// [`FREE`] and 0 for an inactive pair.
    ///
    /// # Safety
    /// As for [`ids`].
    #[inline(always)]
    unsafe fn segment(p: &RouteParams, slot: u32, global_expert: u32) -> (u32, u32) {
        // SAFETY: as the caller promises.
        unsafe {
            let rank = slot_rank(p, slot);
            let bucket = bucket_by(p, slot, global_expert, |_| rank);
            if bucket == p.slots * p.experts {
                (FREE, 0)
            } else {
                (slot << 16 | (bucket - slot * p.experts), rank)
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

    /// The segments of a call, cut into tiles, in a block's shared memory: all tiles of a call of few pairs, otherwise those
    /// of the cluster's units.
    #[derive(Clone, Copy)]
    pub struct Segments {
        start: Shared,
        /// Tiles of active pairs: these come first.
        pub active: u32,
        /// All tiles.
        pub tiles: u32,
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

        /// No segments.
        #[inline(always)]
        pub fn none(start: Shared) -> Self {
            Segments { start, active: 0, tiles: 0 }
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
            let keys = if scratch.is_direct() { 0 } else { scratch.places };
            let end = counts + keys + p.pair_count.next_multiple_of(LOOK);
            let mut word = 4 * thread::index();
            while word < end {
                let empty = if word < counts { 0 } else { FREE };
                // SAFETY: counts, keys and places are multiples of four, and follow one another.
                unsafe { scratch.count(word).store16([empty; 4]) };
                word += 4 * THREADS;
            }
        }

        /// Finds them, cut into tiles of `ROWS` pairs, and lists the units of `deal`; those of slice 0 are also left where
        /// `route` would have left them, for later calls, if this block `keeps` them. The whole block must come here, with the
        /// `scratch` and `room` of [`Segments::prepare`], and meet before it uses the result.
        ///
        /// # Safety
        /// Every tensor of `p` must be as its field says, and hold no more than there is room for; `start` and `scratch` must
        /// have room for them.
        #[inline(always)]
        pub unsafe fn find<const ROWS: u32>(
            p: &RouteParams,
            deal: &Deal,
            keeps: bool,
            start: Shared,
            scratch: Shared,
            room: &Room,
        ) -> Self {
            let scratch = Scratch::new(p, scratch, room);

            // Each pair to the count of its segment. The next pair's ids are asked for before.
            // SAFETY: as the caller promises.
            let ids = |pair: u32| unsafe { ids(p, pair) };
            let mut next = ids(thread::index());
            each_pair(p.pair_count, |pair, exists| {
                let [slot, global_expert] = next;
                next = ids(pair + THREADS);
                if exists {
                    // SAFETY: as the caller promises.
                    unsafe {
                        let bucket = bucket_by(p, slot, global_expert, |slot| slot_rank(p, slot));
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
            let mut found = Self::none(start);
            let mut entry = thread::warp();
            // SAFETY: all counts are there.
            unsafe {
                let inactive = scratch.count(scratch.inactive()).load();
                let mut sweep = Sweep::new::<ROWS>(&scratch, 0, 0);
                loop {
                    let [number, slice] = deal.unit(entry);
                    while number >= sweep.end >> 16 && sweep.start + SWEEP < scratch.places {
                        sweep = Sweep::new::<ROWS>(&scratch, sweep.start + SWEEP, sweep.end);
                    }
                    found.active = sweep.end >> 16;
                    found.tiles = found.active + inactive.div_ceil(ROWS);
                    if number >= found.tiles {
                        break;
                    }
                    let segment = if number < found.active {
                        sweep.locate::<ROWS>(number)
                    } else {
                        [scratch.inactive(), inactive, sweep.end]
                    };
                    found.list::<ROWS>(p, room, &scratch, segment, [number, entry], keeps && slice == 0);
                    entry += WARPS;
                }
                if keeps && deal.cluster == 0 && thread::index() == 0 {
                    found.keep_counts(p);
                }
            }
            found
        }

        /// Lists tile `number`, which lies in the segment of a place of so many pairs, with as many tiles and pairs before it,
        /// as unit `entry` of the cluster. The whole warp must come here.
        ///
        /// # Safety
        /// As for [`Segments::find`]; there must be room for the unit.
        #[inline(always)]
        unsafe fn list<const ROWS: u32>(
            &self,
            p: &RouteParams,
            room: &Room,
            scratch: &Scratch,
            [place, count, before]: [u32; 3],
            [number, entry]: [u32; 2],
            is_kept: bool,
        ) {
            // The tile's pairs among those of the segment.
            let skipped = (number - (before >> 16)) * ROWS;
            let rows = (count - skipped).min(ROWS);
            let first = (before & 0xffff) + skipped;
            let lane = thread::lane();
            let below = (1 << lane) - 1;
            let mut seen = 0;
            let mut at = 0;
            while seen < skipped + rows {
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
                            if row < rows {
                                let pair = at + 4 * lane + i as u32;
                                // SAFETY: there is room for the unit's pairs.
                                unsafe {
                                    self.pair_at(entry * ROWS + row).store(pair);
                                    if is_kept {
                                        p.pairs.at(first + row).store(pair);
                                    }
                                }
                            }
                            position += 1;
                        }
                        seen += lanes[i].count_ones();
                    });
                }
                at += LOOK;
            }
            // SAFETY: as the caller promises; a place in use has a bucket.
            unsafe {
                let bucket = if place == scratch.inactive() {
                    scratch.buckets
                } else if scratch.is_direct() {
                    place
                } else {
                    scratch.key(place).load()
                };
                let slot = p.over_experts.quotient(bucket);
                let expert = bucket - slot * p.experts;
                let rank = slot_rank(p, slot);
                if lane == 0 {
                    self.put_tile(room, entry, [slot << 16 | expert, entry * ROWS, rows << 10 | rank]);
                    if is_kept {
                        p.tiles.at(number).store_tile(Tile {
                            slot,
                            expert,
                            first,
                            rows,
                            rank,
                            reserved: [0; 3],
                        });
                    }
                }
            }
        }

        /// As [`Segments::find`], of at most [`FEW`] pairs: each warp finds them on its own, in registers, and the first
        /// stores them. Nothing has to be prepared.
        ///
        /// # Safety
        /// As for [`Segments::find`].
        #[inline(always)]
        pub unsafe fn find_few<const ROWS: u32>(p: &RouteParams, start: Shared, room: &Room) -> Self {
            let pair = thread::lane();
            let exists = pair < p.pair_count;
            // SAFETY: as the caller promises.
            let (key, rank) = unsafe {
                let [slot, global_expert] = ids(p, pair);
                segment(p, slot, global_expert)
            };
            let is_active = key != FREE;
            // Of the segment: pairs before this one, all pairs, and the first.
            let (mut before, mut size, mut first) = (0, 0, FEW);
            let mut other = p.pair_count;
            while other > 0 {
                other -= 1;
                if warp::shuffle(key, other) == key {
                    before += (other < pair) as u32;
                    size += 1;
                    first = other;
                }
            }
            let through = inclusive(if is_active && before == 0 { size } else { 0 });
            let position = warp::shuffle(through.wrapping_sub(size), first % FEW);
            let below = (1 << pair) - 1;
            let leads = warp::ballot(is_active && before.is_multiple_of(ROWS));
            let inactive = warp::ballot(exists && !is_active);
            let (active, inactive_pairs) = (leads.count_ones(), inactive.count_ones());
            let tiles = active + inactive_pairs.div_ceil(ROWS);
            let found = Segments { start, active, tiles };
            if thread::warp() == 0 && exists {
                // SAFETY: every pair has a place in the list, and there is room for the tiles.
                unsafe {
                    if is_active {
                        let tile = [key, (size - before).min(ROWS) << 10 | rank];
                        found.put::<ROWS>(room, pair, position, before, (leads & below).count_ones(), tile);
                    } else {
                        found.put_inactive::<ROWS>(
                            p,
                            room,
                            pair,
                            inactive_pairs,
                            (inactive & below).count_ones(),
                        );
                    }
                }
            }
            found
        }

        /// Stores a tile: slot and expert, the position of its first pair, rows and rank.
        ///
        /// # Safety
        /// There must be room for it.
        #[inline(always)]
        unsafe fn put_tile(&self, room: &Room, number: u32, [which, first, what]: [u32; 3]) {
            // SAFETY: as the caller promises.
            unsafe {
                self.tile_at(room, number).store(which);
                self.tile_at(room, number).offset(4).store(first << 16 | what);
            }
        }

        /// Stores a pair, with the position of its segment and how many of that come before it; and tile `number`, if the
        /// pair leads it: slot and expert, rows and rank.
        ///
        /// # Safety
        /// There must be room for both.
        #[inline(always)]
        unsafe fn put<const ROWS: u32>(
            &self,
            room: &Room,
            pair: u32,
            first: u32,
            before: u32,
            number: u32,
            [which, what]: [u32; 2],
        ) {
            let position = first + before;
            // SAFETY: as the caller promises.
            unsafe {
                self.pair_at(position).store(pair);
                if before.is_multiple_of(ROWS) {
                    self.put_tile(room, number, [which, position, what]);
                }
            }
        }

        /// As [`Segments::put`], of an inactive pair, of which there are `all`: expert 0 of one slot more.
        ///
        /// # Safety
        /// As for [`Segments::put`].
        #[inline(always)]
        unsafe fn put_inactive<const ROWS: u32>(
            &self,
            p: &RouteParams,
            room: &Room,
            pair: u32,
            all: u32,
            before: u32,
        ) {
            let tile = [p.slots << 16, (all - before).min(ROWS) << 10];
            // SAFETY: as the caller promises.
            unsafe {
                self.put::<ROWS>(room, pair, p.pair_count - all, before, self.active + before / ROWS, tile)
            };
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

        /// Leaves all of [`Segments::find_few`] where `route` would have left it, for later calls. One whole warp of the launch
        /// must come here.
        ///
        /// # Safety
        /// The tensors of `p` must be as their fields say.
        #[inline(always)]
        pub unsafe fn keep(&self, p: &RouteParams, room: &Room) {
            let i = thread::lane();
            // SAFETY: there is room for all pairs and tiles, and all were found.
            unsafe {
                if i < p.pair_count {
                    p.pairs.at(i).store(self.pair_at(i).load());
                }
                if i < self.tiles {
                    p.tiles.at(i).store_tile(self.tile(room, i));
                }
                if i == 0 {
                    self.keep_counts(p);
                }
            }
        }

        /// Leaves the numbers of tiles.
        ///
        /// # Safety
        /// As for [`Segments::keep`].
        #[inline(always)]
        unsafe fn keep_counts(&self, p: &RouteParams) {
            // SAFETY: there is room for two counts.
            unsafe {
                p.counts.at(count::ACTIVE).store(self.active);
                p.counts.at(count::ALL).store(self.tiles);
            }
        }
    }
}
