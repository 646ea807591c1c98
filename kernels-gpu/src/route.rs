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
//! There are two forms: one block, and a grid of blocks that all run at once. A block of a grid stores how many
//! pairs of each bucket it has counted, one word a bucket, where all others look for it. The word's top bit says
//! that it has come, so no barrier of the grid is needed. The words lie in two tables that launches use in turn:
//! whoever uses one empties the other.
//!
//! When there are more buckets than room for counters, all this is done for one window of buckets after another.
//!
//! Shared memory, in words, for H sorters and windows of W buckets:
//!
//! | words | what |
//! |---|---|
//! | H × W | counters, then positions |
//! | W + 1 | pairs in all blocks, then the position of the first pair of a bucket |
//! | W + 1 | pairs in blocks before this one, then the number of the first tile of a bucket |
//! | 2 a warp | scan |
//! | [`STAGED`] | rank of a slot |
//! | 2 | turn, words that the launch before has written |

/// Threads of a block.
pub const THREADS: u32 = 512;

/// Most blocks of a grid: they must all run at once, one a multiprocessor.
pub const MAX_BLOCKS: u32 = 128;

/// Rows of 32 pairs that a sorter keeps in registers. The kernel's code is as long as these are many, and a call of
/// few pairs waits for code as it does for data.
pub const ROWS: u32 = 4;

/// Slots whose ranks are kept in shared memory. Those of others are loaded pair by pair.
pub const STAGED: u32 = 256;

/// Words of shared memory beside the counters and the two arrays of [`WINDOW_WORDS`].
const SCRATCH: u32 = 2 + 2 * THREADS / 32 + STAGED + 2;

/// Words of shared memory a bucket beside its counters.
const WINDOW_WORDS: u32 = 2;

/// Words that come before the tables of the exchange.
pub const EXCHANGE_HEAD: u32 = 4;

/// Bytes of shared memory of a block.
pub const fn shared_bytes(sorters: u32, window: u32) -> u32 {
    ((sorters + WINDOW_WORDS) * window + SCRATCH) * 4
}

/// Most buckets of a window, a multiple of 4, for `sorters` sorters of a block that may be given `shared_bytes`
/// bytes.
pub const fn max_window(sorters: u32, shared_bytes: u32) -> u32 {
    (shared_bytes / 4 - SCRATCH) / (sorters + WINDOW_WORDS) / 4 * 4
}

/// Words through which `blocks` blocks tell one another their counts. They must be zero before the first launch.
pub const fn exchange_words(blocks: u32, buckets: u32) -> u32 {
    EXCHANGE_HEAD + 2 * blocks * buckets
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
pub(crate) use kernel::{bucket, slot_rank};

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::{EXCHANGE_HEAD, STAGED, THREADS};
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, grid, thread, warp};
    use crate::memory::Global;
    use crate::params::{RouteParams, Tile, count};
    use crate::scan::scan;
    use crate::slots::Slots;
    use crate::tile::{quotient, unroll};

    /// Rows that a sorter takes at a time, so that their loads overlap.
    const ROWS: usize = super::ROWS as usize;

    /// The bucket of a pair that does not exist.
    const NONE: u32 = u32::MAX;

    /// A block's count of pairs, once it has come.
    const CAME: u32 = 1 << 31;

    /// The rank in use of a slot, 0 when it is off or does not exist.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say.
    #[inline(always)]
    pub(crate) unsafe fn slot_rank(p: &RouteParams, slot: u32) -> u32 {
        let &RouteParams { adapter_enabled, enabled_kind, ranks, slots: count, max_rank, .. } = p;
        // SAFETY: as the caller promises.
        unsafe { Slots { adapter_enabled, enabled_kind, ranks, count, max_rank }.rank(slot) }
    }

    /// The bucket of a pair, given its slot, its global expert, and the rank of each slot. One unsigned comparison
    /// a number catches −1 and everything else that is out of range.
    ///
    /// # Safety
    /// As for [`slot_rank`].
    #[inline(always)]
    unsafe fn bucket_by(p: &RouteParams, slot: u32, global_expert: u32, rank: impl Fn(u32) -> u32) -> u32 {
        let inactive = p.slots * p.experts;
        if global_expert >= p.global_experts {
            return inactive;
        }
        let expert = if p.expert_map.is_null() {
            global_expert
        } else {
            // SAFETY: the expert is one of `global_experts`.
            unsafe { p.expert_map.at(global_expert).load() }
        };
        if expert >= p.experts || rank(slot) == 0 {
            return inactive;
        }
        slot * p.experts + expert
    }

    /// The bucket of a pair, given its slot and global expert.
    ///
    /// # Safety
    /// As for [`slot_rank`].
    #[inline(always)]
    pub(crate) unsafe fn bucket(p: &RouteParams, slot: u32, global_expert: u32) -> u32 {
        // SAFETY: as the caller promises.
        unsafe { bucket_by(p, slot, global_expert, |slot| slot_rank(p, slot)) }
    }

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
            Self::word(sorter * self.window + bucket)
        }

        /// Of a bucket: its pairs in all blocks, then the position of its first.
        #[inline(always)]
        fn first(self, bucket: u32) -> Shared {
            Self::word(self.sorters * self.window + bucket)
        }

        /// Of a bucket: its pairs in blocks before this one, then the number of its first tile.
        #[inline(always)]
        fn tile(self, bucket: u32) -> Shared {
            self.first(self.window + 1 + bucket)
        }

        #[inline(always)]
        fn scan(self) -> Shared {
            self.tile(self.window + 1)
        }

        #[inline(always)]
        fn rank(self, slot: u32) -> Shared {
            self.scan().offset(4 * (2 * THREADS / 32 + slot))
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

    /// Slots and global experts of the pairs of some rows.
    ///
    /// # Safety
    /// The pairs must be among P, and the tensors of `p` as their fields say.
    #[inline(always)]
    unsafe fn ids(p: &RouteParams, rows: Rows) -> ([u32; ROWS], [u32; ROWS]) {
        let (mut slots, mut experts) = ([0; ROWS], [0; ROWS]);
        unroll::<ROWS>(|r| {
            if let Some(pair) = rows.pair(r) {
                // SAFETY: the pair is one of P, its token one of T.
                unsafe {
                    slots[r] = p.token_lora.at(p.top_k.quotient(pair)).load();
                    experts[r] = p.topk_ids.at(pair).load();
                }
            }
        });
        (slots, experts)
    }

    /// The buckets of the pairs of some rows, given their ids.
    ///
    /// # Safety
    /// As for [`ids`]; the ranks must have been staged.
    #[inline(always)]
    unsafe fn buckets(
        p: &RouteParams,
        map: Map,
        rows: Rows,
        (slots, experts): ([u32; ROWS], [u32; ROWS]),
    ) -> [u32; ROWS] {
        let mut found = [NONE; ROWS];
        unroll::<ROWS>(|r| {
            if rows.pair(r).is_some() {
                // SAFETY: as the caller promises.
                found[r] = unsafe { bucket_by(p, slots[r], experts[r], |slot| staged_rank(p, map, slot)) };
            }
        });
        found
    }

    /// [`slot_rank`], from shared memory where it is there.
    ///
    /// # Safety
    /// As for [`buckets`].
    #[inline(always)]
    unsafe fn staged_rank(p: &RouteParams, map: Map, slot: u32) -> u32 {
        // SAFETY: as the caller promises.
        unsafe {
            if slot >= p.slots {
                0
            } else if slot < STAGED {
                map.rank(slot).load()
            } else {
                slot_rank(p, slot)
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

    /// The kernel: blocks of [`THREADS`], `p.blocks` of them when it is a `GRID`, all of which must run at once.
    ///
    /// # Safety
    /// As for the entry point: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn route<const GRID: bool>(p: RouteParams) {
        let map = Map { sorters: p.sorters, window: p.window };
        let (block, blocks) = if GRID { (thread::block(), p.blocks) } else { (0, 1) };
        let all_buckets = p.slots * p.experts + 1;
        let inactive = all_buckets - 1;
        // This warp's pairs. A warp that is no sorter has none.
        let at = if thread::warp() < p.sorters {
            p.pair_count.min((block * p.sorters + thread::warp()) * p.run)
        } else {
            p.pair_count
        };
        let end = p.pair_count.min(at + p.run);
        let is_kept = p.run <= 32 * ROWS as u32;
        let all_rows = Rows { at, end };

        clear_counters(map);
        grid::wait_for_previous();
        grid::let_next_start();

        // 1. Ask for the first ids, and for what all of the block will need.
        // SAFETY: the pairs are among P.
        let first_ids = unsafe { ids(&p, all_rows) };
        let mut slot = thread::index();
        while slot < p.slots.min(STAGED) {
            // SAFETY: the tensors of `p` are as their fields say.
            unsafe { map.rank(slot).store(slot_rank(&p, slot)) };
            slot += THREADS;
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
        let (mut pairs_before, mut tiles_before) = (0u32, 0u32);
        let mut window_start = 0;
        loop {
            let buckets = p.window.min(all_buckets - window_start);
            // A bucket of another window has a number past those of this one.
            let number = |bucket: u32| bucket.wrapping_sub(window_start).min(buckets);
            let bits = 32 - buckets.leading_zeros();

            // 2. Count this sorter's pairs.
            let (mut rows, mut ids) = (all_rows, first_ids);
            while rows.at < end {
                // SAFETY: the pairs are among P, the ranks were staged before a barrier, and what is remembered was
                // stored by this thread.
                unsafe {
                    if window_start == 0 {
                        found = self::buckets(&p, map, rows, ids);
                        if !is_kept {
                            remember(&p, rows, found);
                            ids = self::ids(&p, rows.next());
                        }
                    } else if !is_kept {
                        found = remembered(&p, rows);
                    }
                }
                unroll::<ROWS>(|r| {
                    let number = number(found[r]);
                    if rows.pair(r).is_some() && number < buckets {
                        // SAFETY: one of this warp's counters.
                        unsafe { map.counter(thread::warp(), number).fetch_add(1) };
                    }
                });
                rows = rows.next();
            }
            barrier::sync();

            // 3. Each thread takes a run of buckets and adds up what the block's sorters have counted.
            let run = buckets.div_ceil(THREADS);
            let from = buckets.min(thread::index() * run);
            let to = buckets.min(from + run);
            let mut i = from;
            while i < to {
                let total = sum_counters(map, i);
                // SAFETY: the window has these buckets, the exchange a word a block and bucket.
                unsafe {
                    if GRID {
                        table.at(block * all_buckets + window_start + i).store_relaxed(CAME | total);
                        map.first(i).store(0);
                        map.tile(i).store(0);
                    } else {
                        map.first(i).store(total);
                    }
                }
                i += 1;
            }
            if is_kept {
                // While counts are on their way.
                lanes = peers(all_rows, found.map(number), bits);
            }
            if GRID {
                barrier::sync();
                // SAFETY: all blocks run at once, and store their words.
                unsafe { gather(&p, map, table.at(window_start), (block, all_buckets), buckets) };
                barrier::sync();
            }

            // 4. Counts become positions.
            let (mut pairs, mut tiles) = (0, 0);
            let mut i = from;
            while i < to {
                // SAFETY: one of the window's buckets: this thread stored it, or others before the barrier.
                let count = unsafe { map.first(i).load() };
                pairs += count;
                tiles += tiles_of(&p, count);
                i += 1;
            }
            let (before, all) = scan::<THREADS>(map.scan(), [pairs, tiles]);
            let (mut position, mut tile) = (pairs_before + before[0], tiles_before + before[1]);
            let mut i = from;
            while i < to {
                // SAFETY: as above; nobody else uses these words before the next barrier.
                unsafe {
                    let count = map.first(i).load();
                    let in_blocks_before = if GRID { map.tile(i).load() } else { 0 };
                    map.first(i).store(position);
                    map.tile(i).store(tile);
                    place_counters(map, i, position + in_blocks_before);
                    position += count;
                    tile += tiles_of(&p, count);
                }
                i += 1;
            }
            pairs_before += all[0];
            let first_tile = tiles_before;
            tiles_before += all[1];
            if thread::index() == 0 {
                // SAFETY: each array has a place past the last bucket.
                unsafe {
                    map.first(buckets).store(pairs_before);
                    map.tile(buckets).store(tiles_before);
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
                unsafe { place(&p, map, rows, found.map(number), lanes, buckets) };
                rows = rows.next();
            }

            // 6. Tiles, each by whoever has its number: a segment of many is not one thread's alone.
            let mut tile = first_tile + block * THREADS + thread::index();
            while tile < tiles_before {
                // SAFETY: there is room for all tiles.
                unsafe { write_tile(&p, map, (window_start, buckets), tile) };
                tile += blocks * THREADS;
            }
            window_start += buckets;
            if window_start == all_buckets {
                if block == 0 && thread::index() == 0 {
                    // SAFETY: two counts; the inactive bucket is the window's last.
                    unsafe {
                        p.counts.at(count::ACTIVE).store(map.tile(inactive + buckets - all_buckets).load());
                        p.counts.at(count::ALL).store(tiles_before);
                        if GRID {
                            // All blocks have come, so all have read these.
                            p.exchange.store_relaxed(turn + 1);
                            p.exchange.at(1u32).store_relaxed(blocks * all_buckets);
                        }
                    }
                }
                return;
            }
            barrier::sync();
            clear_counters(map);
            barrier::sync();
        }
    }

    /// Tiles of a segment of `pairs` pairs.
    #[inline(always)]
    fn tiles_of(p: &RouteParams, pairs: u32) -> u32 {
        (pairs + p.tile_rows - 1) >> p.tile_rows.trailing_zeros()
    }

    /// Zeroes all counters.
    #[inline(always)]
    fn clear_counters(map: Map) {
        let mut word = 4 * thread::index();
        while word < map.sorters * map.window {
            // SAFETY: windows are multiples of four.
            unsafe { Map::word(word).store16([0; 4]) };
            word += 4 * THREADS;
        }
    }

    /// Pairs of a bucket that all sorters of the block have counted.
    #[inline(always)]
    fn sum_counters(map: Map, bucket: u32) -> u32 {
        // SAFETY: the counters were zeroed before a barrier, and counted up before another.
        let count = |sorter: u32| unsafe { map.counter(sorter, bucket).load() };
        let mut sum = 0;
        let mut sorter = 0;
        while sorter + 8 <= map.sorters {
            unroll::<8>(|i| sum += count(sorter + i as u32));
            sorter += 8;
        }
        while sorter < map.sorters {
            sum += count(sorter);
            sorter += 1;
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
        while sorter + 8 <= map.sorters {
            let mut counts = [0; 8];
            // SAFETY: as the caller promises.
            unroll::<8>(|i| counts[i] = unsafe { map.counter(sorter + i as u32, bucket).load() });
            unroll::<8>(|i| {
                // SAFETY: as the caller promises.
                unsafe { map.counter(sorter + i as u32, bucket).store(position) };
                position += counts[i];
            });
            sorter += 8;
        }
        while sorter < map.sorters {
            // SAFETY: as the caller promises.
            unsafe {
                let count = map.counter(sorter, bucket).load();
                map.counter(sorter, bucket).store(position);
                position += count;
            }
            sorter += 1;
        }
    }

    /// Looks for the counts of all blocks, whose words of this window begin at `table`, and adds up those of all
    /// blocks and of the blocks before this one. A thread takes eight blocks at a time.
    ///
    /// # Safety
    /// All blocks must run at once and store their words.
    #[inline(always)]
    unsafe fn gather(
        p: &RouteParams,
        map: Map,
        table: Global<u32>,
        (block, stride): (u32, u32),
        buckets: u32,
    ) {
        let items = p.blocks.div_ceil(8) * buckets;
        let mut item = thread::index();
        while item < items {
            let group = quotient(item, buckets);
            let bucket = item - group * buckets;
            let mut counts = [CAME; 8];
            loop {
                let mut came = CAME;
                unroll::<8>(|i| {
                    let other = 8 * group + i as u32;
                    if other < p.blocks {
                        // SAFETY: the exchange has a word a block and bucket.
                        counts[i] = unsafe { table.at(other * stride + bucket).load_relaxed() };
                    }
                });
                unroll::<8>(|i| came &= counts[i]);
                if came != 0 {
                    break;
                }
            }
            let (mut all, mut before) = (0, 0);
            unroll::<8>(|i| {
                let count = counts[i] & !CAME;
                all += count;
                before += if 8 * group + (i as u32) < block { count } else { 0 };
            });
            // SAFETY: one of the window's buckets; both words were zeroed before the barrier.
            unsafe {
                if all > 0 {
                    map.first(bucket).fetch_add(all);
                }
                if before > 0 {
                    map.tile(bucket).fetch_add(before);
                }
            }
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

    /// Writes tile number `tile`, of a window of `buckets` buckets from `window_start` on.
    ///
    /// # Safety
    /// It must be one of the window's tiles, and there must be room for it.
    #[inline(always)]
    unsafe fn write_tile(p: &RouteParams, map: Map, (window_start, buckets): (u32, u32), tile: u32) {
        // SAFETY: the arrays were filled before the barrier, and the tensors of `p` are as their fields say.
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
            let first = map.first(low).load() + (tile - map.tile(low).load()) * p.tile_rows;
            let rows = (map.first(low + 1).load() - first).min(p.tile_rows);
            let bucket = window_start + low;
            let slot = quotient(bucket, p.experts);
            let expert = bucket - slot * p.experts;
            let rank = staged_rank(p, map, slot);
            p.tiles.at(tile).store_tile(Tile { slot, expert, first, rows, rank, reserved: [0; 3] });
        }
    }
}
