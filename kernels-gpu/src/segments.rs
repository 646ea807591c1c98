//! Segments found by one block on its own: what `route` does, for calls of so few pairs that a launch would
//! take longer.
//!
//! Every block of a launch finds the same tiles, in the same order, so the blocks agree on who takes what without
//! meeting. A hash table in shared memory lists the pairs of each segment; a pair that walks the list of its own
//! knows how many come before it. Every [`Tile`]'s first pair is its *lead*: tiles of active pairs come in the order of
//! their leads, those of inactive pairs last. The pairs of a segment are in ascending order; where in the list of pairs
//! a segment lies is each block's own affair.
//!
//! All threads run through the code once, so it costs its instructions, fetched once each: loops over a thread's pairs,
//! with what is known of a pair in shared memory, take less time than the same unrolled, with it in registers.
//!
//! Shared memory that stays, for as many pairs and tiles as [`Room`] says:
//!
//! | bytes | what |
//! |---|---|
//! | pairs × 4 | the pairs, segment after segment |
//! | tiles × 8 | tiles: slot and expert, first pair, rows and rank |
//!
//! and that is free again once they are found ([`Room::scratch_bytes`]):
//!
//! | bytes | what |
//! |---|---|
//! | places × 4 × 4 | the table: of each place slot and expert, of each a pair, the rank in use, the position of the segment |
//! | pairs × 4 | the next pair of each pair's segment |
//! | pairs × 4 | of each pair: its place, how many of the segment come before it, rows of the tile that it leads |
//! | 2 × 128 | of each 32 pairs: which are leads, and which are inactive |
//! | 16 | pairs that have positions |
//!
//! The table has as many places as twice the pairs, rounded up to a power of two.
//!
//! [`Tile`]: crate::params::Tile

/// Most pairs.
pub const MAX_PAIRS: u32 = 1024;
/// Pairs up to which each warp finds the segments on its own.
pub const FEW: u32 = 32;
/// Threads of the block.
pub const THREADS: u32 = 352;
/// Bytes of a bit for each pair.
const BITS: u32 = MAX_PAIRS / 8;
const _: () = assert!(MAX_PAIRS / 32 <= 32, "a lane of a warp for each 32 pairs");

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
}

impl Room {
    /// Nothing.
    pub const NONE: Self = Room { pairs: 0, tiles: 0 };

    /// For `pairs` pairs in at most `tiles` tiles.
    pub const fn new(pairs: u32, tiles: u32) -> Self {
        Room { pairs: pairs.next_multiple_of(4), tiles: tiles.next_multiple_of(2) }
    }

    /// Bytes that stay.
    pub const fn shared_bytes(self) -> u32 {
        self.pairs * 4 + self.tiles * 8
    }

    /// Places of the table.
    const fn places(self) -> u32 {
        let pairs = self.pairs.next_power_of_two();
        2 * if pairs < 32 { 32 } else { pairs }
    }

    /// Bytes that are free again once the segments are found.
    pub const fn scratch_bytes(self) -> u32 {
        self.places() * 16 + self.pairs * 8 + 2 * BITS + 16
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::Segments;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::{BITS, FEW, MAX_PAIRS, Room, THREADS};
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, thread, warp};
    use crate::params::{RouteParams, Tile, count};
    use crate::route::{bucket_by, slot_rank};
    use crate::scan::inclusive;

    /// A place of the table that is free, or no segment: no slot and expert are this number.
    const FREE: u32 = u32::MAX;
    /// No pair.
    const NONE: u32 = u32::MAX;
    /// What is known of an inactive pair.
    const INACTIVE: u32 = u32::MAX;

    /// Bits of a place's number, and of a pair's.
    const PLACE_BITS: u32 = (2 * MAX_PAIRS).trailing_zeros();
    const PAIR_BITS: u32 = MAX_PAIRS.trailing_zeros();
    const _: () = assert!(PLACE_BITS + PAIR_BITS + 6 < 32);

    /// Where things are in the scratch.
    #[derive(Clone, Copy)]
    struct Scratch {
        start: Shared,
        room: Room,
    }

    impl Scratch {
        /// Slot and expert of a place of the table.
        #[inline(always)]
        fn key(self, place: u32) -> Shared {
            self.start.offset(4 * place)
        }

        /// A pair of a place's segment.
        #[inline(always)]
        fn pair(self, place: u32) -> Shared {
            self.key(self.room.places() + place)
        }

        /// The rank in use of a place's segment.
        #[inline(always)]
        fn rank(self, place: u32) -> Shared {
            self.pair(self.room.places() + place)
        }

        /// The position of a place's segment in the list of pairs.
        #[inline(always)]
        fn position(self, place: u32) -> Shared {
            self.rank(self.room.places() + place)
        }

        /// The next pair of a pair's segment.
        #[inline(always)]
        fn next(self, pair: u32) -> Shared {
            self.position(self.room.places() + pair)
        }

        /// What is known of a pair.
        #[inline(always)]
        fn known(self, pair: u32) -> Shared {
            self.next(self.room.pairs + pair)
        }

        /// Which of 32 pairs are leads.
        #[inline(always)]
        fn leads(self, group: u32) -> Shared {
            self.known(self.room.pairs + group)
        }

        /// Which of 32 pairs are inactive.
        #[inline(always)]
        fn inactive(self, group: u32) -> Shared {
            self.leads(group).offset(BITS)
        }

        /// Pairs that have positions.
        #[inline(always)]
        fn placed(self) -> Shared {
            self.leads(0).offset(2 * BITS)
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

    /// The segments of a call, cut into tiles, in a block's shared memory.
    #[derive(Clone, Copy)]
    pub struct Segments {
        start: Shared,
        room: Room,
        /// Tiles of active pairs: these come first.
        pub active: u32,
        /// All tiles.
        pub tiles: u32,
    }

    impl Segments {
        #[inline(always)]
        fn tile_at(&self, number: u32) -> Shared {
            self.start.offset(4 * self.room.pairs + 8 * number)
        }

        /// Where pair `number` of the sorted list is.
        #[inline(always)]
        pub fn pair_at(&self, number: u32) -> Shared {
            self.start.offset(4 * number)
        }

        /// No segments.
        #[inline(always)]
        pub fn none(start: Shared) -> Self {
            Segments { start, room: Room::NONE, active: 0, tiles: 0 }
        }

        /// Empties the table in `scratch`, for `room` pairs. The whole block must come here, and meet before it comes to
        /// [`Segments::find`]; nothing is read that a launch before this one may write.
        ///
        /// # Safety
        /// `scratch` must have room for the table.
        #[inline(always)]
        pub unsafe fn prepare(scratch: Shared, room: Room) {
            let scratch = Scratch { start: scratch, room };
            let mut number = 4 * thread::index();
            // SAFETY: the places are in the table, whose rows are multiples of 16 bytes.
            unsafe {
                if number == 0 {
                    scratch.placed().store(0);
                }
                while number < room.places() {
                    scratch.key(number).store16([FREE; 4]);
                    scratch.pair(number).store16([NONE; 4]);
                    number += 4 * THREADS;
                }
            }
        }

        /// Finds them, and cuts them into tiles of `ROWS` pairs. The whole block must come here, with the `scratch` and
        /// `room` of [`Segments::prepare`], and meet before it uses the result.
        ///
        /// # Safety
        /// Every tensor of `p` must be as its field says, and hold no more than there is room for; `start` and `scratch` must
        /// have room for them.
        #[inline(always)]
        pub unsafe fn find<const ROWS: u32>(
            p: &RouteParams,
            start: Shared,
            scratch: Shared,
            room: Room,
        ) -> Self {
            let pair_count = p.pair_count;
            let scratch = Scratch { start: scratch, room };
            let lane = thread::lane();

            // Each active pair into the list of its segment. The next pair's ids are asked for before.
            // SAFETY: as the caller promises.
            let ids = |pair: u32| unsafe { ids(p, pair) };
            let mut next = ids(thread::index());
            let shift = 32 - room.places().trailing_zeros();
            each_pair(pair_count, |pair, exists| {
                let [slot, global_expert] = next;
                next = ids(pair + THREADS);
                if exists {
                    let mut known = INACTIVE;
                    // SAFETY: as the caller promises; the table has twice as many places as there are pairs, so a free
                    // one is found.
                    unsafe {
                        let (key, rank) = segment(p, slot, global_expert);
                        if key != FREE {
                            let mut number = key.wrapping_mul(0x9e37_79b1) >> shift;
                            loop {
                                let before = scratch.key(number).compare_exchange(FREE, key);
                                if before == FREE {
                                    scratch.rank(number).store(rank);
                                }
                                if before == FREE || before == key {
                                    break;
                                }
                                number = (number + 1) & (room.places() - 1);
                            }
                            let other = scratch.pair(number).exchange(pair);
                            scratch.next(pair).store(other);
                            known = number;
                        }
                        scratch.known(pair).store(known);
                    }
                }
            });
            // Lanes leave the loops above one by one, and `bar.sync` wants whole warps.
            warp::sync();
            barrier::sync();

            // How many of its segment come before each, and where the segment's pairs are to be.
            each_pair(pair_count, |pair, exists| {
                // SAFETY: all lists are whole.
                unsafe {
                    let place = if exists { scratch.known(pair).load() } else { INACTIVE };
                    let is_active = place != INACTIVE;
                    let (mut before, mut size) = (0, 0);
                    if is_active {
                        let mut other = scratch.pair(place).load();
                        while other != NONE {
                            before += (other < pair) as u32;
                            size += 1;
                            other = scratch.next(other).load();
                        }
                        if before == 0 {
                            let position = scratch.placed().fetch_add(size);
                            scratch.position(place).store(position);
                        }
                        let rows = (size - before).min(ROWS);
                        scratch.known(pair).store((rows << PAIR_BITS | before) << PLACE_BITS | place);
                    }
                    let leads = warp::ballot(is_active && before.is_multiple_of(ROWS));
                    let inactive = warp::ballot(exists && !is_active);
                    if lane == 0 {
                        scratch.leads(pair / 32).store(leads);
                        scratch.inactive(pair / 32).store(inactive);
                    }
                }
            });
            barrier::sync();

            // A lane counts the leads and the inactive of 32 pairs, in halves of a word.
            let (mut leads, mut inactive) = (0, 0);
            if 32 * lane < pair_count {
                // SAFETY: as many words were stored.
                unsafe { (leads, inactive) = (scratch.leads(lane).load(), scratch.inactive(lane).load()) };
            }
            let here = leads.count_ones() << 16 | inactive.count_ones();
            let through = inclusive(here);
            let total = warp::shuffle(through, 31);
            let [active_tiles, inactive_pairs] = [total >> 16, total & 0xffff];
            let tiles = active_tiles + inactive_pairs.div_ceil(ROWS);
            let found = Segments { start, room, active: active_tiles, tiles };

            // Each pair to its position, and the tiles that they lead.
            each_pair(pair_count, |pair, exists| {
                let group = pair / 32;
                let below = (1 << lane) - 1;
                let leads = (warp::shuffle(leads, group) & below).count_ones();
                let inactive = (warp::shuffle(inactive, group) & below).count_ones();
                let before_group = warp::shuffle(through - here, group);
                if exists {
                    // SAFETY: every pair has a place in the list, and there is room for the tiles.
                    unsafe {
                        let known = scratch.known(pair).load();
                        if known != INACTIVE {
                            let place = known & ((1 << PLACE_BITS) - 1);
                            let (key, rank) = (scratch.key(place).load(), scratch.rank(place).load());
                            let first = scratch.position(place).load();
                            let before = known >> PLACE_BITS & ((1 << PAIR_BITS) - 1);
                            let rows = known >> (PLACE_BITS + PAIR_BITS);
                            let number = (before_group >> 16) + leads;
                            found.put::<ROWS>(pair, first, before, number, [key, rows << 10 | rank]);
                        } else {
                            let before = (before_group & 0xffff) + inactive;
                            found.put_inactive::<ROWS>(p, pair, inactive_pairs, before);
                        }
                    }
                }
            });
            found
        }

        /// As [`Segments::find`], of at most [`FEW`] pairs: each warp finds them on its own, in registers, and the first
        /// stores them. Nothing has to be prepared.
        ///
        /// # Safety
        /// As for [`Segments::find`].
        #[inline(always)]
        pub unsafe fn find_few<const ROWS: u32>(p: &RouteParams, start: Shared, room: Room) -> Self {
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
            let found = Segments { start, room, active, tiles: active + inactive_pairs.div_ceil(ROWS) };
            if thread::warp() == 0 && exists {
                // SAFETY: every pair has a place in the list, and there is room for the tiles.
                unsafe {
                    if is_active {
                        let tile = [key, (size - before).min(ROWS) << 10 | rank];
                        found.put::<ROWS>(pair, position, before, (leads & below).count_ones(), tile);
                    } else {
                        found.put_inactive::<ROWS>(p, pair, inactive_pairs, (inactive & below).count_ones());
                    }
                }
            }
            found
        }

        /// Stores a pair, with the position of its segment and how many of that come before it; and tile `number`, if the
        /// pair leads it: slot and expert, rows and rank.
        ///
        /// # Safety
        /// There must be room for both.
        #[inline(always)]
        unsafe fn put<const ROWS: u32>(
            &self,
            pair: u32,
            first: u32,
            before: u32,
            number: u32,
            tile: [u32; 2],
        ) {
            let position = first + before;
            // SAFETY: as the caller promises.
            unsafe {
                self.pair_at(position).store(pair);
                if before.is_multiple_of(ROWS) {
                    self.tile_at(number).store(tile[0]);
                    self.tile_at(number).offset(4).store(position << 16 | tile[1]);
                }
            }
        }

        /// As [`Segments::put`], of an inactive pair, of which there are `all`: expert 0 of one slot more.
        ///
        /// # Safety
        /// As for [`Segments::put`].
        #[inline(always)]
        unsafe fn put_inactive<const ROWS: u32>(&self, p: &RouteParams, pair: u32, all: u32, before: u32) {
            let tile = [p.slots << 16, (all - before).min(ROWS) << 10];
            // SAFETY: as the caller promises.
            unsafe { self.put::<ROWS>(pair, p.pair_count - all, before, self.active + before / ROWS, tile) };
        }

        /// Tile `number`.
        ///
        /// # Safety
        /// There must be such a tile.
        #[inline(always)]
        pub unsafe fn tile(&self, number: u32) -> Tile {
            // SAFETY: as the caller promises.
            let [which, what] = unsafe { [0, 4].map(|word| self.tile_at(number).offset(word).load()) };
            let (slot, expert) = (which >> 16, which & 0xffff);
            let (first, rows, rank) = (what >> 16, what >> 10 & 63, what & 1023);
            Tile { slot, expert, first, rows, rank, reserved: [0; 3] }
        }

        /// Leaves all where `route` would have left it, for later calls. One whole warp of the launch must come here.
        ///
        /// # Safety
        /// The tensors of `p` must be as their fields say.
        #[inline(always)]
        pub unsafe fn keep(&self, p: &RouteParams) {
            // SAFETY: there is room for all pairs and tiles, and all were found.
            unsafe {
                let mut i = thread::lane();
                while i < p.pair_count {
                    p.pairs.at(i).store(self.pair_at(i).load());
                    if i < self.tiles {
                        p.tiles.at(i).store_tile(self.tile(i));
                    }
                    i += 32;
                }
                if thread::lane() == 0 {
                    p.counts.at(count::ACTIVE).store(self.active);
                    p.counts.at(count::ALL).store(self.tiles);
                }
            }
        }
    }
}
