//! `route`: sorts pairs into segments and cuts these into tiles.
//!
//! A *bucket* is a (slot, expert): slot · E + expert; one more, the last, is for inactive pairs. It is a stable
//! counting sort: the pairs of a segment are in ascending order, whatever the order of threads.
//!
//! Pairs are dealt out in runs, one a *sorter*: a warp that has counters of its own, one a bucket, in shared
//! memory. It counts its run; sums over the sorters before it, and over the buckets before each bucket, turn its
//! counts into positions; then it walks its run again, 32 pairs at a time, and each pair takes the next position
//! of its bucket. Pairs of one bucket that meet in a row of 32 find one another by ballots. A run of up to
//! [`ROWS`] rows stays in registers from one walk to the next; of a longer one the buckets are stored in between.
//!
//! There are three forms. *One block*, for few pairs. A *grid* of blocks that all run at once: a block stores how
//! many pairs of each bucket it has counted, one word a bucket, where all others look for it. The word's top bit
//! says that it has come, so no barrier of the grid is needed. The words lie in two tables that launches use in
//! turn: whoever uses one empties the other. Inactive pairs are not told: they are what is left. Both forms are for
//! calls in which every run stays in registers, every bucket has a thread, and every slot's rank has a place in
//! shared memory: then they are short, and a route of few pairs is little more than the time to issue its
//! instructions. The *wide* grid is for all others: it walks runs in parts, and when there are more buckets than
//! room for counters, does so for one window of buckets after another.
//!
//! Shared memory, in words, for H sorters and windows of W buckets:
//!
//! | words | what |
//! |---|---|
//! | (H \| 4) × W | counters, then positions: a bucket's side by side |
//! | W + 4 | pairs in all blocks, then the position of the first pair of a bucket |
//! | W + 4 | pairs in blocks before this one, then the number of the first tile of a bucket |
//! | 4 | how many segments have many tiles |
//! | 3 a warp | scan |
//! | [`STAGED`] | rank of a slot |
//! | 2 | turn, words that the launch before has written |

/// Threads of the form of one block: what all of them do is issued once a warp, so the fewer the sooner.
pub const BLOCK_THREADS: u32 = 256;

/// Threads of a block of a grid.
pub const GRID_THREADS: u32 = 512;

/// Most blocks of a grid: they must all run at once, one a multiprocessor.
pub const MAX_BLOCKS: u32 = 128;

/// Rows of 32 pairs that a sorter keeps in registers. The kernel's code is as long as these are many, and a call of
/// few pairs waits for code as it does for data.
pub const ROWS: u32 = 4;

/// Slots whose ranks are kept in shared memory. Those of others are loaded pair by pair.
pub const STAGED: u32 = 256;

/// Words of shared memory beside the counters and the two arrays of [`WINDOW_WORDS`].
const SCRATCH: u32 = 8 + 4 + 3 * GRID_THREADS / 32 + STAGED + 2;

/// Words of shared memory a bucket beside its counters.
const WINDOW_WORDS: u32 = 2;

/// Words that come before the tables of the exchange.
pub const EXCHANGE_HEAD: u32 = 4;

/// Bytes of shared memory of a block of `sorters` sorters, a multiple of 4.
pub const fn shared_bytes(sorters: u32, window: u32) -> u32 {
    ((counter_stride(sorters) + WINDOW_WORDS) * window + SCRATCH) * 4
}

/// Words from a bucket's counters to the next bucket's: an odd number of fours, so that threads that take a bucket
/// each, four words at a time, meet in no bank.
const fn counter_stride(sorters: u32) -> u32 {
    sorters | 4
}

/// Whether a form of blocks of `threads` threads that is not wide will do: `pairs` pairs a block.
pub const fn is_narrow(threads: u32, pairs: u64, slots: u64, buckets: u64) -> bool {
    pairs <= (threads * ROWS) as u64 && slots <= STAGED as u64 && buckets <= threads as u64 + 1
}

/// Most counters of a window, a multiple of 4, for the `sorters` sorters of a block that may be given `shared_bytes`
/// bytes.
pub const fn max_window(sorters: u32, shared_bytes: u32) -> u32 {
    (shared_bytes / 4 - SCRATCH) / (counter_stride(sorters) + WINDOW_WORDS) / 4 * 4
}

/// The window that counts `buckets` buckets at once, the inactive one included: a multiple of 4 for the others, and
/// a counter more.
pub const fn window(buckets: u64) -> u64 {
    (buckets - 1).next_multiple_of(4) + 4
}

/// Words of a table in which `blocks` blocks tell one another their counts of `buckets` buckets, the inactive one
/// included: it is left out, and the others are looked for four at a time.
pub const fn table_words(blocks: u64, buckets: u64) -> u64 {
    blocks * (buckets - 1).next_multiple_of(4)
}

/// Most tiles that `pairs` pairs in `buckets` buckets (the inactive one included) can be cut into.
pub const fn max_tiles(pairs: u64, buckets: u64, tile_rows: u64) -> u64 {
    let segments = if pairs < buckets { pairs } else { buckets };
    let tiles = segments + pairs / tile_rows;
    if tiles < pairs { tiles } else { pairs }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::route;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::{EXCHANGE_HEAD, GRID_THREADS, STAGED, counter_stride};
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, grid, thread, warp};
    use crate::ids::{Ids, bucket, local_expert};
    use crate::memory::Global;
    use crate::params::{RouteParams, Tile, count};
    use crate::scan::scan;
    use crate::slots::Slots;
    use crate::tile::{quotient, unroll};

    /// Rows that a sorter takes at a time, so that their loads overlap.
    const ROWS: usize = super::ROWS as usize;

    /// The bucket of a pair that does not exist.
    const NONE: u32 = u32::MAX;

    /// Tiles of a segment that one thread writes: as many as a segment of usual length has.
    const OWN_TILES: u32 = 8;

    /// A block's count of pairs, once it has come.
    const CAME: u32 = 1 << 31;

    /// Where things are in shared memory.
    #[derive(Clone, Copy)]
    struct Map {
        sorters: u32,
        window: u32,
    }

    impl Map {
        #[inline(always)]
        fn word(number: u32) -> Shared {
            Shared::base().offset(4 * number)
        }

        /// Sorter `sorter`'s counter of a bucket of the window.
        #[inline(always)]
        fn counter(self, sorter: u32, bucket: u32) -> Shared {
            Self::word(counter_stride(self.sorters) * bucket + sorter)
        }

        /// Of a bucket: its pairs in all blocks, then the position of its first.
        #[inline(always)]
        fn first(self, bucket: u32) -> Shared {
            Self::word(counter_stride(self.sorters) * self.window + bucket)
        }

        /// Of a bucket: its pairs in blocks before this one, then the number of its first tile.
        #[inline(always)]
        fn tile(self, bucket: u32) -> Shared {
            self.first(self.window + 4 + bucket)
        }

        #[inline(always)]
        fn scan(self) -> Shared {
            self.many().offset(16)
        }

        #[inline(always)]
        fn rank(self, slot: u32) -> Shared {
            self.scan().offset(4 * (3 * GRID_THREADS / 32 + slot))
        }

        /// Of a bucket of a grid: its pairs in blocks before this one.
        ///
        /// # Safety
        /// They must have been added up.
        #[inline(always)]
        unsafe fn before<const GRID: bool>(self, bucket: u32) -> u32 {
            // SAFETY: as the caller promises.
            if GRID { unsafe { self.tile(bucket).load() } } else { 0 }
        }

        /// How many segments have more than [`OWN_TILES`] tiles.
        #[inline(always)]
        fn many(self) -> Shared {
            self.tile(self.window + 4)
        }

        /// 0: turn; 1: words that the launch before has written.
        #[inline(always)]
        fn head(self, word: u32) -> Shared {
            self.rank(STAGED + word)
        }
    }

    /// Up to [`ROWS`] rows of 32 pairs, the first of which is pair `at`: lane i has pair i of each row.
    #[derive(Clone, Copy)]
    struct Rows {
        at: u32,
        end: u32,
    }

    impl Rows {
        /// Whether there is a row `row`: the same for the whole warp.
        #[inline(always)]
        fn has(self, row: usize) -> bool {
            self.at + 32 * (row as u32) < self.end
        }

        /// The rows after these.
        #[inline(always)]
        fn next(self) -> Self {
            Rows { at: self.at + 32 * ROWS as u32, ..self }
        }

        /// This lane's pair of a row.
        #[inline(always)]
        fn pair(self, row: usize) -> Option<u32> {
            let pair = self.at + 32 * row as u32 + thread::lane();
            (pair < self.end).then_some(pair)
        }
    }

    /// Where the ids of the pairs of some rows are.
    #[inline(always)]
    fn ids(p: &RouteParams, rows: Rows) -> [Ids; ROWS] {
        core::array::from_fn(|row| {
            let pair = rows.pair(row);
            Ids::of(p, pair.unwrap_or(0), pair.is_some())
        })
    }

    /// The buckets of the pairs of some rows, given their slots and global experts.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say; the ranks must have been staged.
    #[inline(always)]
    unsafe fn buckets<const WIDE: bool>(
        p: &RouteParams,
        map: Map,
        rows: Rows,
        ids: [[u32; 2]; ROWS],
    ) -> [u32; ROWS] {
        // SAFETY: as the caller promises.
        let experts = ids.map(|[_, global_expert]| unsafe { local_expert(p, global_expert) });
        let mut found = [NONE; ROWS];
        unroll::<ROWS>(|r| {
            let [slot, _] = ids[r];
            // SAFETY: as the caller promises.
            let bucket = bucket(p, slot, experts[r], unsafe { staged_rank::<WIDE>(p, map, slot) });
            found[r] = if rows.pair(r).is_some() { bucket } else { NONE };
        });
        found
    }

    /// The rank in use of a slot, 0 when it is off or does not exist, from shared memory where it is there.
    ///
    /// # Safety
    /// As for [`buckets`].
    #[inline(always)]
    unsafe fn staged_rank<const WIDE: bool>(p: &RouteParams, map: Map, slot: u32) -> u32 {
        // SAFETY: as the caller promises.
        unsafe {
            if WIDE && slot >= STAGED {
                Slots::of(p).rank(slot)
            } else {
                let rank = map.rank(slot.min(STAGED - 1)).load();
                if slot < STAGED { rank } else { 0 }
            }
        }
    }

    /// Of each row, the lanes whose pairs have this lane's number; numbers are below 2^`bits`. The whole warp must
    /// come here.
    #[inline(always)]
    fn peers(rows: Rows, numbers: [u32; ROWS], bits: u32) -> [u32; ROWS] {
        let mut peers = [0; ROWS];
        unroll::<ROWS>(|r| {
            if rows.has(r) {
                let mut lanes = u32::MAX;
                let mut bit = 0;
                while bit < bits {
                    // Three at a time: their votes overlap.
                    unroll::<3>(|i| {
                        let set = numbers[r] >> (bit + i as u32) & 1 != 0;
                        let votes = warp::ballot(set);
                        lanes &= if set { votes } else { !votes };
                    });
                    bit += 3;
                }
                peers[r] = lanes;
            }
        });
        peers
    }

    /// The kernel: blocks of `THREADS`, `p.blocks` of them when it is a `GRID`, all of which must run at once.
    ///
    /// # Safety
    /// As for the entry point: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn route<const THREADS: u32, const GRID: bool, const WIDE: bool>(p: RouteParams) {
        const { assert!(STAGED <= THREADS && (GRID || !WIDE)) };
        let map = Map { sorters: THREADS / 32, window: p.window };
        let (block, blocks) = if GRID { (thread::block(), p.blocks) } else { (0, 1) };
        let active = p.slots * p.experts;
        // Words from the counts of a block to those of the next.
        let stride = (active + 3) & !3;
        // This warp's pairs.
        let start = p.pair_count.min(block * map.sorters * p.run);
        let at = p.pair_count.min(start + thread::warp() * p.run);
        let end = p.pair_count.min(at + p.run);
        let is_kept = !WIDE || p.run <= 32 * ROWS as u32;
        let all_rows = Rows { at, end };

        // Where things are is found before they may be read.
        let slot = Slots::of(&p).slot(thread::index());
        let first_ids = ids(&p, all_rows);
        clear_counters::<THREADS>(map);
        grid::wait_for_previous();
        grid::let_next_start();

        // 1. Ask for what all of the block will need, and for the first ids.
        // SAFETY: the tensors of `p` are as their fields say.
        let state = unsafe { slot.load() };
        // SAFETY: the pairs are among P.
        let first_ids = first_ids.map(|ids| unsafe { ids.load() });
        if thread::index() < STAGED {
            // SAFETY: there is a place for each of so many slots.
            unsafe { map.rank(thread::index()).store(state.rank()) };
        }
        if GRID && thread::index() < 2 {
            // SAFETY: the exchange begins with these words. One thread reads them for all of the block, so that
            // they have been read when the block's counts are seen, after which they change.
            unsafe { map.head(thread::index()).store(p.exchange.at(thread::index()).load_relaxed()) };
        }
        barrier::sync();

        let mut table = Global::NULL;
        let mut turn = 0;
        if GRID {
            // SAFETY: stored before the barrier; the tables come after the head.
            unsafe {
                turn = map.head(0).load();
                let tables = [0, 1].map(|table| p.exchange.at(EXCHANGE_HEAD + table * p.exchange_room));
                let [mine, other] = if turn & 1 == 0 { tables } else { [tables[1], tables[0]] };
                table = mine;
                let used = map.head(1).load();
                let mut word = block * THREADS + thread::index();
                while word < used {
                    other.at(word).store_relaxed(0);
                    word += blocks * THREADS;
                }
            }
        }

        let (mut found, mut lanes) = ([NONE; ROWS], [0; ROWS]);
        // Of buckets before the window: pairs, tiles, and pairs in blocks before this one.
        let mut past = [0u32; 3];
        let mut window_start = 0;
        loop {
            // Active buckets of this window. The last has a counter more, for inactive pairs.
            let room = if WIDE { p.window - 4 } else { active };
            let buckets = room.min(active - window_start);
            let is_last = !WIDE || window_start + buckets == active;
            let counters = buckets + is_last as u32;
            // A bucket of another window has a number past those of this one.
            let number = |bucket: u32| bucket.wrapping_sub(window_start).min(counters);
            let bits = 32 - counters.leading_zeros();

            // 2. Count this sorter's pairs.
            let (mut rows, mut ids) = (all_rows, first_ids);
            while rows.at < end {
                // SAFETY: the pairs are among P, the ranks were staged before a barrier, and what is remembered was
                // stored by this thread.
                unsafe {
                    if window_start == 0 {
                        found = self::buckets::<WIDE>(&p, map, rows, ids);
                        if !is_kept {
                            remember(&p, rows, found);
                            ids = self::ids(&p, rows.next()).map(|ids| ids.load());
                        }
                    } else if !is_kept {
                        found = remembered(&p, rows);
                    }
                }
                unroll::<ROWS>(|r| {
                    let number = number(found[r]);
                    if rows.pair(r).is_some() && number < counters {
                        // SAFETY: one of this warp's counters.
                        unsafe { map.counter(thread::warp(), number).fetch_add(1) };
                    }
                });
                if is_kept {
                    break;
                }
                rows = rows.next();
            }
            barrier::sync();

            // 3. Each thread takes a run of buckets and adds up what the block's sorters have counted.
            let run = if WIDE { buckets.div_ceil(THREADS) } else { 1 };
            let from = buckets.min(thread::index() * run);
            let to = buckets.min(from + run);
            each::<WIDE>(from, to, |i| {
                let total = sum_counters(map, i);
                // SAFETY: the window has these buckets, the exchange a word a block and bucket.
                unsafe {
                    if GRID {
                        table.at(block * stride + window_start + i).store_relaxed(CAME | total);
                    } else {
                        map.first(i).store(total);
                    }
                }
            });
            if is_kept {
                // While counts are on their way.
                lanes = peers(all_rows, found.map(number), bits);
            }
            if GRID {
                // SAFETY: all blocks run at once, and store their words.
                unsafe { gather::<THREADS>(&p, map, table.at(window_start), (block, stride), buckets) };
                barrier::sync();
            }

            // 4. Counts become positions.
            let mut sums = [0; 3];
            each::<WIDE>(from, to, |i| {
                // SAFETY: one of the window's buckets: this thread stored it, or others before the barrier.
                let [count, before] = unsafe { [map.first(i).load(), map.before::<GRID>(i)] };
                sums = [sums[0] + count, sums[1] + tiles_of(&p, count), sums[2] + before];
            });
            let (before, all) = if GRID {
                scan::<THREADS, 3>(map.scan(), sums)
            } else {
                let ([pairs, tiles], [all_pairs, all_tiles]) =
                    scan::<THREADS, 2>(map.scan(), [sums[0], sums[1]]);
                ([pairs, tiles, 0], [all_pairs, all_tiles, 0])
            };
            let (mut position, mut tile) = (past[0] + before[0], past[1] + before[1]);
            each::<WIDE>(from, to, |i| {
                // SAFETY: as above; nobody else uses these words before the next barrier.
                unsafe {
                    let [count, before] = [map.first(i).load(), map.before::<GRID>(i)];
                    map.first(i).store(position);
                    map.tile(i).store(tile);
                    place_counters(map, i, position + before);
                    position += count;
                    let tiles = tiles_of(&p, count);
                    tile += tiles;
                    if tiles > OWN_TILES {
                        map.many().fetch_add(1);
                    }
                }
            });
            let first_tile = past[1];
            past = [past[0] + all[0], past[1] + all[1], past[2] + all[2]];
            let active_tiles = past[1];
            let mut end_position = past[0];
            if is_last {
                // What is left is inactive.
                let tiles = tiles_of(&p, p.pair_count - past[0]);
                past[1] += tiles;
                end_position = p.pair_count;
                if thread::index() == THREADS - 1 {
                    // SAFETY: the last counters and the last places but one are the inactive bucket's.
                    unsafe {
                        map.first(buckets).store(past[0]);
                        map.tile(buckets).store(active_tiles);
                        place_counters(map, buckets, past[0] + start - past[2]);
                        if tiles > OWN_TILES {
                            map.many().fetch_add(1);
                        }
                    }
                }
            }
            if thread::index() == 0 {
                // SAFETY: each array has a place past the last counter.
                unsafe {
                    map.first(counters).store(end_position);
                    map.tile(counters).store(past[1]);
                }
            }
            barrier::sync();

            // 5. Each pair to its place.
            let mut rows = all_rows;
            while rows.at < end {
                if !is_kept {
                    // SAFETY: this thread stored them.
                    found = unsafe { remembered(&p, rows) };
                    lanes = peers(rows, found.map(number), bits);
                }
                // SAFETY: the counters are this warp's, and hold positions.
                unsafe { place(&p, map, rows, found.map(number), lanes, counters) };
                if is_kept {
                    break;
                }
                rows = rows.next();
            }

            // 6. The first tiles of each segment, by the highest threads, which have the fewest pairs.
            let share = if GRID { quotient(counters + blocks - 1, blocks) } else { counters };
            let mut i = block * share + THREADS - 1 - thread::index();
            while i < counters.min((block + 1) * share) {
                // SAFETY: one of the window's; there is room for all tiles.
                unsafe { write_own_tiles::<WIDE>(&p, map, (window_start, i)) };
                i += THREADS;
            }
            // The others by whoever has their number: a segment of many is not one thread's alone.
            // SAFETY: counted before the barrier.
            if unsafe { map.many().load() } > 0 {
                let mut tile = first_tile + thread::index() * blocks + block;
                while tile < past[1] {
                    // SAFETY: there is room for all tiles.
                    unsafe { write_other_tile::<WIDE>(&p, map, (window_start, counters), tile) };
                    tile += blocks * THREADS;
                }
            }
            window_start += buckets;
            if is_last {
                if block == 0 && thread::index() == THREADS - 1 {
                    // SAFETY: two counts.
                    unsafe {
                        p.counts.at(count::ACTIVE).store(active_tiles);
                        p.counts.at(count::ALL).store(past[1]);
                        if GRID {
                            // All blocks have come, so all have read these.
                            p.exchange.store_relaxed(turn + 1);
                            p.exchange.at(1u32).store_relaxed(blocks * stride);
                        }
                    }
                }
                return;
            }
            barrier::sync();
            clear_counters::<THREADS>(map);
            barrier::sync();
        }
    }

    /// Tiles of a segment of `pairs` pairs.
    #[inline(always)]
    fn tiles_of(p: &RouteParams, pairs: u32) -> u32 {
        p.over_tile_rows.quotient(pairs + p.tile_rows - 1)
    }

    /// Calls `body` with `from`, … `to` − 1; unless the form is wide that is one number or none, and no loop.
    #[inline(always)]
    fn each<const WIDE: bool>(from: u32, to: u32, mut body: impl FnMut(u32)) {
        let mut i = from;
        while i < to {
            body(i);
            if !WIDE {
                break;
            }
            i += 1;
        }
    }

    /// Zeroes all counters, and what is added up beside them.
    #[inline(always)]
    fn clear_counters<const THREADS: u32>(map: Map) {
        let mut word = 4 * thread::index();
        while word < counter_stride(map.sorters) * map.window + 2 * (map.window + 4) + 4 {
            // SAFETY: a bucket's counters are a multiple of four, and so is a window.
            unsafe { Map::word(word).store16([0; 4]) };
            word += 4 * THREADS;
        }
    }

    /// Pairs of a bucket that all sorters of the block have counted.
    #[inline(always)]
    fn sum_counters(map: Map, bucket: u32) -> u32 {
        let mut sum = 0;
        let mut sorter = 0;
        while sorter < map.sorters {
            // SAFETY: the counters were zeroed before a barrier, and counted up before another.
            let [a, b, c, d] = unsafe { map.counter(sorter, bucket).load16() };
            sum += a + b + c + d;
            sorter += 4;
        }
        sum
    }

    /// Turns the counts of a bucket, whose first pair in this block goes to `position`, into positions.
    ///
    /// # Safety
    /// Nobody else may use these counters before the next barrier.
    #[inline(always)]
    unsafe fn place_counters(map: Map, bucket: u32, mut position: u32) {
        let mut sorter = 0;
        while sorter < map.sorters {
            // SAFETY: as the caller promises.
            unsafe {
                let four = map.counter(sorter, bucket);
                let [a, b, c, d] = four.load16();
                four.store16([position, position + a, position + a + b, position + a + b + c]);
                position += a + b + c + d;
            }
            sorter += 4;
        }
    }

    /// Looks for the counts of all blocks, whose words of this window begin at `table`, and adds up those of all
    /// blocks and of the blocks before this one. A thread takes four buckets of eight blocks at a time.
    ///
    /// # Safety
    /// All blocks must run at once and store their words.
    #[inline(always)]
    unsafe fn gather<const THREADS: u32>(
        p: &RouteParams,
        map: Map,
        table: Global<u32>,
        (block, stride): (u32, u32),
        buckets: u32,
    ) {
        let fours = buckets.div_ceil(4);
        let items = p.blocks.div_ceil(8) * fours;
        let mut item = thread::index();
        while item < items {
            let group = quotient(item, fours);
            let bucket = 4 * (item - group * fours);
            // Words that are no bucket's are never stored.
            let needed = [0, 1, 2, 3].map(|i| if bucket + i < buckets { CAME } else { 0 });
            let mut counts = [[CAME; 4]; 8];
            loop {
                unroll::<8>(|i| {
                    let other = 8 * group + i as u32;
                    if other < p.blocks {
                        // SAFETY: the exchange has a word a block and bucket, rows in multiples of four.
                        counts[i] = unsafe { table.at(other * stride + bucket).load16_relaxed() };
                    }
                });
                let mut came = [CAME; 4];
                unroll::<8>(|i| unroll::<4>(|j| came[j] &= counts[i][j]));
                let mut all = true;
                unroll::<4>(|j| all &= came[j] == needed[j] || needed[j] == 0);
                if all {
                    break;
                }
            }
            unroll::<4>(|j| {
                let (mut all, mut before) = (0, 0);
                unroll::<8>(|i| {
                    let count = counts[i][j] & !CAME;
                    all += count;
                    before += if 8 * group + (i as u32) < block { count } else { 0 };
                });
                // SAFETY: one of the window's buckets; both words were zeroed before a barrier.
                unsafe {
                    if needed[j] != 0 && all > 0 {
                        map.first(bucket + j as u32).fetch_add(all);
                        if before > 0 {
                            map.tile(bucket + j as u32).fetch_add(before);
                        }
                    }
                }
            });
            item += THREADS;
        }
    }

    /// Keeps the buckets of pairs for later.
    ///
    /// # Safety
    /// The pairs must be among P.
    #[inline(always)]
    unsafe fn remember(p: &RouteParams, rows: Rows, found: [u32; ROWS]) {
        unroll::<ROWS>(|r| {
            if let Some(pair) = rows.pair(r) {
                // SAFETY: as the caller promises.
                unsafe { p.buckets.at(pair).store(found[r]) };
            }
        });
    }

    /// The buckets of pairs that this thread looked up before.
    ///
    /// # Safety
    /// This thread must have stored them.
    #[inline(always)]
    unsafe fn remembered(p: &RouteParams, rows: Rows) -> [u32; ROWS] {
        let mut found = [NONE; ROWS];
        unroll::<ROWS>(|r| {
            if let Some(pair) = rows.pair(r) {
                // SAFETY: as the caller promises.
                found[r] = unsafe { p.buckets.at(pair).load() };
            }
        });
        found
    }

    /// Puts the pairs of some rows in their places, row by row: those of one bucket in the order of lanes. The
    /// whole warp must come here.
    ///
    /// # Safety
    /// This warp's counters must hold the positions of its next pairs.
    #[inline(always)]
    unsafe fn place(
        p: &RouteParams,
        map: Map,
        rows: Rows,
        numbers: [u32; ROWS],
        lanes: [u32; ROWS],
        buckets: u32,
    ) {
        let wanted = |r: usize| rows.pair(r).filter(|_| numbers[r] < buckets);
        let mut positions = [0; ROWS];
        unroll::<ROWS>(|r| {
            if rows.has(r) {
                // The first lane of a bucket takes the positions of all.
                if wanted(r).is_some() && lanes[r].trailing_zeros() == thread::lane() {
                    let counter = map.counter(thread::warp(), numbers[r]);
                    // SAFETY: one of this warp's counters.
                    positions[r] = unsafe { counter.fetch_add(lanes[r].count_ones()) };
                }
                // Rows in order.
                warp::sync();
            }
        });
        unroll::<ROWS>(|r| {
            if rows.has(r) {
                let first = warp::shuffle(positions[r], lanes[r].trailing_zeros());
                if let Some(pair) = wanted(r) {
                    let below = (1u32 << thread::lane()) - 1;
                    // SAFETY: each position below P is handed out once.
                    unsafe { p.pairs.at(first + (lanes[r] & below).count_ones()).store(pair) };
                }
            }
        });
    }

    /// Writes the first tiles of bucket `bucket` of a window that begins at `window_start`.
    ///
    /// # Safety
    /// It must be one of the window's, and there must be room for its tiles.
    #[inline(always)]
    unsafe fn write_own_tiles<const WIDE: bool>(
        p: &RouteParams,
        map: Map,
        (window_start, bucket): (u32, u32),
    ) {
        // SAFETY: the arrays were filled before the barrier, and the tensors of `p` are as their fields say.
        unsafe {
            let (mut first, end) = (map.first(bucket).load(), map.first(bucket + 1).load());
            let mut tile = map.tile(bucket).load();
            let last = tile + OWN_TILES;
            while first < end && tile < last {
                write_tile::<WIDE>(p, map, window_start + bucket, (first, end), tile);
                first += p.tile_rows;
                tile += 1;
            }
        }
    }

    /// Writes tile number `tile`, of a window of `buckets` buckets from `window_start` on, unless
    /// [`write_own_tiles`] does.
    ///
    /// # Safety
    /// It must be one of the window's tiles, and there must be room for it.
    #[inline(always)]
    unsafe fn write_other_tile<const WIDE: bool>(
        p: &RouteParams,
        map: Map,
        (window_start, buckets): (u32, u32),
        tile: u32,
    ) {
        // SAFETY: as above.
        unsafe {
            // The last bucket whose first tile is not past this one: buckets without pairs share the number of the
            // next.
            let (mut low, mut high) = (0, buckets);
            while high - low > 1 {
                let middle = (low + high) / 2;
                if map.tile(middle).load() <= tile {
                    low = middle;
                } else {
                    high = middle;
                }
            }
            let number = tile - map.tile(low).load();
            if number >= OWN_TILES {
                let first = map.first(low).load() + number * p.tile_rows;
                write_tile::<WIDE>(p, map, window_start + low, (first, map.first(low + 1).load()), tile);
            }
        }
    }

    /// Writes tile number `tile`, of the pairs of `bucket` from position `first` on, whose last come before `end`.
    ///
    /// # Safety
    /// There must be room for it.
    #[inline(always)]
    unsafe fn write_tile<const WIDE: bool>(
        p: &RouteParams,
        map: Map,
        bucket: u32,
        (first, end): (u32, u32),
        tile: u32,
    ) {
        let slot = p.over_experts.quotient(bucket);
        let expert = bucket - slot * p.experts;
        let rows = (end - first).min(p.tile_rows);
        // SAFETY: as the caller promises; the ranks are staged.
        unsafe {
            let rank = staged_rank::<WIDE>(p, map, slot);
            p.tiles.at(tile).store_tile(Tile { slot, expert, first, rows, rank, reserved: [0; 3] });
        }
    }
}
