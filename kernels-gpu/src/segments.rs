//! Segments found by one block on its own: what `route` does, for calls of so few pairs that a launch would
//! take longer.
//!
//! Every block of a launch finds the same segments, in the same order, so the blocks agree on who takes what
//! without meeting. A hash table in shared memory counts the pairs of each bucket and remembers the first; the
//! tiles of active segments come in the order of their first pairs (as the threads see them), those of
//! inactive pairs last. The pairs of a segment are in ascending order.
//!
//! Shared memory, for `room` pairs:
//!
//! | bytes | what |
//! |---|---|
//! | room × 4 | bucket of each pair |
//! | room × 16 | tiles |
//! | room × 24 | the table: key, first pair and count of 2 · room places |
//! | 256 | scratch of the scan, and pairs a warp found |

/// Most pairs: four a thread.
pub const MAX_PAIRS: u32 = 4 * THREADS;
/// Threads of the block.
pub const THREADS: u32 = 256;
/// Bytes for the scan and for the counts of [`MAX_PAIRS`] / 32 warps' worth of pairs.
const SCRATCH: u32 = 256;
const _: () = assert!(SCRATCH >= THREADS / 32 * 8 && SCRATCH >= MAX_PAIRS / 32 * 4);

/// Pairs that shared memory has room for when `pairs` are to be sorted: a power of two.
pub const fn room(pairs: u32) -> u32 {
    let room = pairs.next_power_of_two();
    if room < 32 { 32 } else { room }
}

/// Bytes of shared memory for `room` pairs.
pub const fn shared_bytes(room: u32) -> u32 {
    room * 44 + SCRATCH
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::Segments;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::{MAX_PAIRS, THREADS};
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, thread, warp};
    use crate::params::{RouteParams, Tile, count};
    use crate::route::{bucket, slot_rank};
    use crate::scan::scan;
    use crate::tile::{quotient, unroll};

    /// Pairs a thread.
    const BATCH: usize = (MAX_PAIRS / THREADS) as usize;
    /// A place of the table that is free; no bucket has this number.
    const FREE: u32 = u32::MAX;

    /// A tile, and the pairs of its segment that come before it.
    #[derive(Clone, Copy)]
    pub struct FoundTile {
        /// The tile.
        pub tile: Tile,
        skipped: u32,
    }

    /// The segments of a call, cut into tiles, in a block's shared memory.
    pub struct Segments {
        start: Shared,
        room: u32,
        /// All tiles.
        pub tiles: u32,
    }

    impl Segments {
        #[inline(always)]
        fn bucket_of(&self, pair: u32) -> Shared {
            self.start.offset(4 * pair)
        }

        #[inline(always)]
        fn tile_at(&self, number: u32) -> Shared {
            self.start.offset(4 * self.room + 16 * number)
        }

        #[inline(always)]
        fn key(&self, place: u32) -> Shared {
            self.start.offset(20 * self.room + 4 * place)
        }

        #[inline(always)]
        fn first(&self, place: u32) -> Shared {
            self.key(2 * self.room + place)
        }

        #[inline(always)]
        fn count(&self, place: u32) -> Shared {
            self.key(4 * self.room + place)
        }

        #[inline(always)]
        fn scratch(&self) -> Shared {
            self.start.offset(44 * self.room)
        }

        /// Finds them. The whole block must come here, with the same `start` and `room`.
        ///
        /// # Safety
        /// Every tensor of `p` must be as its field says, and hold at most `room` pairs.
        #[inline(always)]
        pub unsafe fn find(p: &RouteParams, start: Shared, room: u32) -> Self {
            let mut found = Segments { start, room, tiles: 0 };
            let places = 2 * room;
            let inactive = p.slots * p.experts;

            // Ask for the ids, then empty the table.
            let (mut slots, mut experts) = ([u32::MAX; BATCH], [u32::MAX; BATCH]);
            unroll::<BATCH>(|i| {
                let pair = i as u32 * THREADS + thread::index();
                if pair < p.pair_count {
                    // SAFETY: the pair is one of P, its token one of T.
                    unsafe {
                        slots[i] = p.token_lora.at(p.top_k.quotient(pair)).load();
                        experts[i] = p.topk_ids.at(pair).load();
                    }
                }
            });
            let mut place = thread::index();
            while place < places {
                // SAFETY: the place is in the table.
                unsafe {
                    found.key(place).store(FREE);
                    found.first(place).store(FREE);
                    found.count(place).store(0);
                }
                place += THREADS;
            }
            barrier::sync();

            // Each pair into its bucket's place.
            let (mut buckets, mut at) = ([FREE; BATCH], [0; BATCH]);
            let shift = 32 - places.trailing_zeros();
            unroll::<BATCH>(|i| {
                let pair = i as u32 * THREADS + thread::index();
                if pair < p.pair_count {
                    // SAFETY: as the caller promises; the table has twice as many places as there are pairs, so a
                    // free one is found.
                    unsafe {
                        buckets[i] = bucket(p, slots[i], experts[i]);
                        found.bucket_of(pair).store(buckets[i]);
                        at[i] = buckets[i].wrapping_mul(0x9e37_79b1) >> shift;
                        loop {
                            let key = found.key(at[i]).compare_exchange(FREE, buckets[i]);
                            if key == FREE || key == buckets[i] {
                                break;
                            }
                            at[i] = (at[i] + 1) & (places - 1);
                        }
                        found.first(at[i]).fetch_min(pair);
                        found.count(at[i]).fetch_add(1);
                    }
                }
            });
            barrier::sync();

            // The first pair of each segment cuts it into tiles.
            let mut counts = [0; BATCH];
            let (mut pairs, mut tiles) = (0, 0);
            unroll::<BATCH>(|i| {
                let pair = i as u32 * THREADS + thread::index();
                // SAFETY: the place is in the table.
                if pair < p.pair_count && unsafe { found.first(at[i]).load() } == pair {
                    // SAFETY: as above.
                    counts[i] = unsafe { found.count(at[i]).load() };
                    if buckets[i] != inactive {
                        pairs += counts[i];
                        tiles += quotient(counts[i] + p.tile_rows - 1, p.tile_rows);
                    }
                }
            });
            let (before, total) = scan::<THREADS, 2>(found.scratch(), [pairs, tiles]);
            found.tiles = total[1] + quotient(p.pair_count - total[0] + p.tile_rows - 1, p.tile_rows);
            let [mut first, mut tile] = before;
            unroll::<BATCH>(|i| {
                if counts[i] > 0 {
                    let is_active = buckets[i] != inactive;
                    let slot = quotient(buckets[i], p.experts);
                    // SAFETY: the tensors of `p` are as their fields say; there is a tile for every pair.
                    unsafe {
                        let rank = if is_active { slot_rank(p, slot) } else { 0 };
                        let [mut first_here, mut tile_here] =
                            if is_active { [first, tile] } else { [total[0], total[1]] };
                        let mut skipped = 0;
                        while skipped < counts[i] {
                            let rows = (counts[i] - skipped).min(p.tile_rows);
                            found.tile_at(tile_here).store16([
                                buckets[i],
                                first_here,
                                skipped,
                                rows << 16 | rank,
                            ]);
                            skipped += rows;
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
            found
        }

        /// Whether tile `number` is of active pairs: these come first.
        ///
        /// # Safety
        /// There must be such a tile.
        #[inline(always)]
        unsafe fn is_active(&self, p: &RouteParams, number: u32) -> bool {
            // SAFETY: as the caller promises.
            unsafe { self.tile_at(number).load() != p.slots * p.experts }
        }

        /// Tile `number`.
        ///
        /// # Safety
        /// There must be such a tile.
        #[inline(always)]
        pub unsafe fn tile(&self, p: &RouteParams, number: u32) -> FoundTile {
            // SAFETY: as the caller promises.
            let [bucket, first, skipped, rows_and_rank] = unsafe { self.tile_at(number).load16() };
            let slot = quotient(bucket, p.experts);
            let expert = bucket - slot * p.experts;
            let (rows, rank) = (rows_and_rank >> 16, rows_and_rank & 0xffff);
            FoundTile { tile: Tile { slot, expert, first, rows, rank, reserved: [0; 3] }, skipped }
        }

        /// Writes the pairs of a tile to `list`, one word a pair. The whole block must come here, and meet before
        /// anybody reads `list` or comes here again.
        ///
        /// # Safety
        /// `list` must have room for the tile's rows.
        #[inline(always)]
        pub unsafe fn pairs(&self, p: &RouteParams, FoundTile { tile, skipped }: FoundTile, list: Shared) {
            let bucket = tile.slot * p.experts + tile.expert;
            let counts = self.scratch();
            let mut votes = [0; BATCH];
            unroll::<BATCH>(|i| {
                if i as u32 * THREADS < p.pair_count {
                    let pair = i as u32 * THREADS + thread::index();
                    // SAFETY: the pair's bucket was stored.
                    let mine = pair < p.pair_count && unsafe { self.bucket_of(pair).load() } == bucket;
                    votes[i] = warp::ballot(mine);
                    if thread::lane() == 0 {
                        let group = i as u32 * (THREADS / 32) + thread::warp();
                        // SAFETY: a word for every 32 pairs.
                        unsafe { counts.offset(4 * group).store(votes[i].count_ones()) };
                    }
                }
            });
            barrier::sync();
            let mut groups_before = 0;
            unroll::<BATCH>(|i| {
                if i as u32 * THREADS < p.pair_count {
                    // Pairs of the segment before this thread's.
                    let (mut before, mut here) = (groups_before, 0);
                    unroll::<{ (THREADS / 32) as usize }>(|w| {
                        // SAFETY: stored before the barrier.
                        let count =
                            unsafe { counts.offset(4 * (i as u32 * (THREADS / 32) + w as u32)).load() };
                        before += if (w as u32) < thread::warp() { count } else { 0 };
                        here += count;
                    });
                    groups_before += here;
                    let below = (1u32 << thread::lane()) - 1;
                    let row = (before + (votes[i] & below).count_ones()).wrapping_sub(skipped);
                    if votes[i] >> thread::lane() & 1 != 0 && row < tile.rows {
                        // SAFETY: as the caller promises.
                        unsafe { list.offset(4 * row).store(i as u32 * THREADS + thread::index()) };
                    }
                }
            });
        }

        /// Leaves tile `number` where `route` would have left it, for later calls. One block must come here for
        /// each tile, whole.
        ///
        /// # Safety
        /// `list` must hold the tile's pairs.
        #[inline(always)]
        pub unsafe fn keep(
            &self,
            p: &RouteParams,
            number: u32,
            FoundTile { tile, .. }: FoundTile,
            list: Shared,
        ) {
            // SAFETY: there is room for all tiles and pairs.
            unsafe {
                if thread::index() < tile.rows {
                    let pair = list.offset(4 * thread::index()).load();
                    p.pairs.at(tile.first + thread::index()).store(pair);
                }
                if thread::index() == 0 {
                    p.tiles.at(number).store_tile(tile);
                    // Tiles of active pairs come first.
                    let is_active = tile.slot < p.slots;
                    if number == 0 && !is_active {
                        p.counts.at(count::ACTIVE).store(0);
                    }
                    if is_active && (number + 1 == self.tiles || !self.is_active(p, number + 1)) {
                        p.counts.at(count::ACTIVE).store(number + 1);
                    }
                    if number == 0 {
                        p.counts.at(count::ALL).store(self.tiles);
                    }
                }
            }
        }
    }
}
