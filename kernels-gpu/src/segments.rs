//! Segments found by one block on its own: what `route` does, for calls of so few pairs that a launch would
//! take longer.
//!
//! Every block of a launch finds the same segments, in the same order, so the blocks agree on who takes what
//! without meeting. A hash table in shared memory counts the pairs of each bucket and remembers the first; the
//! tiles of active segments come in the order of their first pairs (as the threads see them), those of
//! inactive pairs last. The pairs of a segment are in ascending order.
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
//! | places × 16 | the table: key, first pair, count, position of the segment |
//! | pairs × 4 | the pairs, each segment's in the order of arrival |
//! | 128 | scratch of the scan |
//!
//! The table has as many places as twice the pairs, rounded up to a power of two.

/// Most pairs.
pub const MAX_PAIRS: u32 = 1024;
/// Threads of the block.
pub const THREADS: u32 = 640;
/// Bytes for the scan.
const SCAN: u32 = 128;
const _: () = assert!(SCAN >= THREADS / 32 * 4);

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
        self.places() * 16 + self.pairs * 4 + SCAN
    }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::Segments;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::{MAX_PAIRS, Room, THREADS};
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, thread};
    use crate::params::{RouteParams, Tile, count};
    use crate::route::{bucket, slot_rank};
    use crate::scan::scan;
    use crate::tile::unroll;

    /// Pairs a thread.
    const BATCH: usize = MAX_PAIRS.div_ceil(THREADS) as usize;
    /// A place of the table that is free; no bucket has this number.
    const FREE: u32 = u32::MAX;

    /// Words of a place of the table.
    const FIRST: u32 = 4;
    const COUNT: u32 = 8;
    const POSITION: u32 = 12;

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

        /// Empties the table in `scratch`, for `room` pairs. The whole block must come here before it comes to
        /// [`Segments::find`]; nothing is read that a launch before this one may write.
        ///
        /// # Safety
        /// `scratch` must have room for the table.
        #[inline(always)]
        pub unsafe fn prepare(scratch: Shared, room: Room) {
            let mut number = thread::index();
            while number < room.places() {
                // SAFETY: the place is in the table.
                unsafe { scratch.offset(16 * number).store16([FREE, FREE, 0, 0]) };
                number += THREADS;
            }
        }

        /// Finds them, and cuts them into tiles of `ROWS` pairs. The whole block must come here, with the `start`, `scratch` and `room` of
        /// [`Segments::prepare`], and meet before it uses the result.
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
            let mut found = Segments { start, room, active: 0, tiles: 0 };
            let places = room.places();
            let inactive = p.slots * p.experts;
            let place = |number: u32| scratch.offset(16 * number);
            let arrived = scratch.offset(16 * places);
            let scan_scratch = arrived.offset(4 * room.pairs);
            let pair_of = |i: usize| i as u32 * THREADS + thread::index();

            // Ask for the ids.
            let (mut slots, mut experts) = ([u32::MAX; BATCH], [u32::MAX; BATCH]);
            unroll::<BATCH>(|i| {
                if pair_of(i) < p.pair_count {
                    // SAFETY: the pair is one of P, its token one of T.
                    unsafe {
                        slots[i] = p.token_lora.at(p.top_k.quotient(pair_of(i))).load();
                        experts[i] = p.topk_ids.at(pair_of(i)).load();
                    }
                }
            });
            // The table is empty.
            barrier::sync();

            // Each pair into its bucket's place.
            let (mut buckets, mut at, mut arrival) = ([FREE; BATCH], [scratch; BATCH], [0; BATCH]);
            let shift = 32 - places.trailing_zeros();
            unroll::<BATCH>(|i| {
                if pair_of(i) < p.pair_count {
                    // SAFETY: as the caller promises; the table has twice as many places as there are pairs, so a
                    // free one is found.
                    unsafe {
                        buckets[i] = bucket(p, slots[i], experts[i]);
                        let mut number = buckets[i].wrapping_mul(0x9e37_79b1) >> shift;
                        loop {
                            let key = place(number).compare_exchange(FREE, buckets[i]);
                            if key == FREE || key == buckets[i] {
                                break;
                            }
                            number = (number + 1) & (places - 1);
                        }
                        at[i] = place(number);
                        at[i].offset(FIRST).fetch_min(pair_of(i));
                        arrival[i] = at[i].offset(COUNT).fetch_add(1);
                    }
                }
            });
            barrier::sync();

            // The first pair of each segment cuts it into tiles. Pairs and tiles are counted in halves of a word.
            let mut counts = [0; BATCH];
            let mut leads = [false; BATCH];
            let mut sum = 0;
            unroll::<BATCH>(|i| {
                if pair_of(i) < p.pair_count {
                    // SAFETY: the place is in the table.
                    let [_, first, count, _] = unsafe { at[i].load16() };
                    counts[i] = count;
                    leads[i] = first == pair_of(i);
                    if leads[i] && buckets[i] != inactive {
                        sum += count << 16 | count.div_ceil(ROWS);
                    }
                }
            });
            let ([before], [total]) = scan::<THREADS, 1>(scan_scratch, [sum]);
            let [active_pairs, active_tiles] = [total >> 16, total & 0xffff];
            found.active = active_tiles;
            found.tiles = active_tiles + (p.pair_count - active_pairs).div_ceil(ROWS);
            let [mut first, mut tile] = [before >> 16, before & 0xffff];
            unroll::<BATCH>(|i| {
                if leads[i] {
                    let is_active = buckets[i] != inactive;
                    // The bucket of inactive pairs is expert 0 of one slot more.
                    let slot = if is_active { slots[i] } else { p.slots };
                    // SAFETY: the tensors of `p` are as their fields say; there is a tile for every pair.
                    unsafe {
                        let rank = if is_active { slot_rank(p, slot) } else { 0 };
                        let [mut first_here, mut tile_here] =
                            if is_active { [first, tile] } else { [active_pairs, active_tiles] };
                        at[i].offset(POSITION).store(first_here);
                        let mut left = counts[i];
                        while left > 0 {
                            let rows = left.min(ROWS);
                            let expert = buckets[i] - slot * p.experts;
                            let place = found.tile_at(tile_here);
                            place.store(slot << 16 | expert);
                            place.offset(4).store(first_here << 16 | rows << 10 | rank);
                            left -= rows;
                            first_here += rows;
                            tile_here += 1;
                        }
                        if is_active {
                            [first, tile] = [first_here, tile_here];
                        }
                    }
                }
            });
            barrier::sync();

            // Each pair into its segment, as it arrived; then in order: a pair's rank is how many of its segment
            // are smaller.
            let mut positions = [0; BATCH];
            unroll::<BATCH>(|i| {
                if pair_of(i) < p.pair_count {
                    // SAFETY: the place is in the table; positions are below P.
                    unsafe {
                        positions[i] = at[i].offset(POSITION).load();
                        arrived.offset(4 * (positions[i] + arrival[i])).store(pair_of(i));
                    }
                }
            });
            barrier::sync();
            unroll::<BATCH>(|i| {
                if pair_of(i) < p.pair_count {
                    let (mut rank, mut other) = (0, 0);
                    // SAFETY: every pair of the segment has arrived.
                    unsafe {
                        while counts[i] > 1 && other < counts[i] {
                            let pair = arrived.offset(4 * (positions[i] + other)).load();
                            rank += (pair < pair_of(i)) as u32;
                            other += 1;
                        }
                        found.pair_at(positions[i] + rank).store(pair_of(i));
                    }
                }
            });
            found
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

        /// Leaves all where `route` would have left it, for later calls: thread `number` of `threads` takes its share.
        ///
        /// # Safety
        /// The tensors of `p` must be as their fields say, and `threads` threads come here.
        #[inline(always)]
        pub unsafe fn keep(&self, p: &RouteParams, number: u32, threads: u32) {
            // SAFETY: there is room for all pairs and tiles, and all were found.
            unsafe {
                let mut i = number;
                while i < p.pair_count {
                    p.pairs.at(i).store(self.pair_at(i).load());
                    if i < self.tiles {
                        p.tiles.at(i).store_tile(self.tile(i));
                    }
                    i += threads;
                }
                if number == 0 {
                    p.counts.at(count::ACTIVE).store(self.active);
                    p.counts.at(count::ALL).store(self.tiles);
                }
            }
        }
    }
}
