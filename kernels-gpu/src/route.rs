//! `route`: sorts pairs into segments and cuts these into tiles.
//!
//! A *bucket* is a (slot, expert): slot · E + expert; one more, the last, is for inactive pairs. Blocks count
//! the pairs of each bucket, turn counts into positions, and put each pair in its place: a counting sort,
//! with the counters in shared memory. When there are more buckets than counters, it does so for one window
//! of buckets after another.
//!
//! There are two forms: one block, and (from sm_90 on) a cluster of eight. Each block of a cluster counts its
//! own pairs; then each takes an eighth of the buckets, reads all eight counts of every bucket, and hands each
//! block the position of its first pair there.
//!
//! Which pair of a segment comes first is up to the order of atomic additions and may differ between runs.
//! Nothing that is computed later depends on it: each pair's sums are its own.
//!
//! Shared memory: `window` counters, then two words a warp for the scan, then two words a block of the cluster.

/// Threads of a block.
pub const THREADS: u32 = 1024;

/// Blocks of the clustered form: as many as every device with clusters allows.
pub const CLUSTER: u32 = 8;

/// Most counters that a block is given: 128 KiB of shared memory.
pub const MAX_WINDOW: u32 = 32 * 1024;

/// Words of shared memory beside the counters.
const SCRATCH: u32 = 2 * THREADS / 32 + 2 * CLUSTER;

/// Bytes of shared memory of a block.
pub const fn shared_bytes(window: u32) -> u32 {
    (window + SCRATCH) * 4
}

/// Most counters of a block that may be given `shared_bytes` bytes.
pub const fn max_window(shared_bytes: u32) -> u32 {
    let room = shared_bytes / 4 - SCRATCH;
    if room < MAX_WINDOW { room } else { MAX_WINDOW }
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
pub(crate) use kernel::{BATCH, Batches, Team, bucket, slot_rank};

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::THREADS;
    #[cfg(any(feature = "sm_90", feature = "emulate"))]
    use crate::arch::cluster;
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, grid, thread};
    use crate::params::{RouteParams, Tile, count};
    use crate::scan::scan;
    use crate::slots::Slots;
    use crate::tile::{quotient, unroll};

    /// Pairs that a thread looks up at a time, so that their loads overlap.
    pub(crate) const BATCH: usize = 4;

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

    /// The bucket of a pair, given its slot and global expert. One unsigned comparison a number catches −1
    /// and everything else that is out of range.
    ///
    /// # Safety
    /// As for [`slot_rank`].
    #[inline(always)]
    pub(crate) unsafe fn bucket(p: &RouteParams, slot: u32, global_expert: u32) -> u32 {
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
        // SAFETY: as the caller promises.
        if expert >= p.experts || unsafe { slot_rank(p, slot) } == 0 {
            return inactive;
        }
        slot * p.experts + expert
    }

    /// The blocks that sort together.
    #[derive(Clone, Copy)]
    pub(crate) struct Team<const BLOCKS: u32>;

    impl<const BLOCKS: u32> Team<BLOCKS> {
        /// Number of this block.
        #[inline(always)]
        pub fn block(self) -> u32 {
            #[cfg(any(feature = "sm_90", feature = "emulate"))]
            if BLOCKS > 1 {
                return cluster::block();
            }
            0
        }

        /// All threads of all blocks meet.
        #[inline(always)]
        pub fn sync(self) {
            #[cfg(any(feature = "sm_90", feature = "emulate"))]
            if BLOCKS > 1 {
                return cluster::sync();
            }
            barrier::sync();
        }

        /// The word at `place` in the memory of block `block`.
        ///
        /// # Safety
        /// As for [`Shared::load`].
        #[inline(always)]
        pub unsafe fn load(self, place: Shared, block: u32) -> u32 {
            #[cfg(any(feature = "sm_90", feature = "emulate"))]
            if BLOCKS > 1 {
                // SAFETY: as the caller promises.
                return unsafe { place.in_block(block).load() };
            }
            // There is one block.
            let _ = block;
            // SAFETY: as the caller promises.
            unsafe { place.load() }
        }

        /// Stores a word at `place` in the memory of block `block`.
        ///
        /// # Safety
        /// As for [`Shared::store`].
        #[inline(always)]
        pub unsafe fn store(self, place: Shared, block: u32, value: u32) {
            #[cfg(any(feature = "sm_90", feature = "emulate"))]
            if BLOCKS > 1 {
                // SAFETY: as the caller promises.
                return unsafe { place.in_block(block).store(value) };
            }
            // There is one block.
            let _ = block;
            // SAFETY: as the caller promises.
            unsafe { place.store(value) }
        }
    }

    /// The pairs that one thread handles: every so many, in batches whose loads overlap.
    #[derive(Clone, Copy)]
    pub(crate) struct Batches {
        pub first: u32,
        pub stride: u32,
        pub count: u32,
    }

    impl Batches {
        /// Calls `body` with each batch; a pair that does not exist is `None`.
        #[inline(always)]
        pub fn each(self, mut body: impl FnMut([Option<u32>; BATCH])) {
            let mut first = self.first;
            while first < self.count {
                let mut pairs = [None; BATCH];
                unroll::<BATCH>(|i| {
                    let pair = first + i as u32 * self.stride;
                    pairs[i] = (pair < self.count).then_some(pair);
                });
                body(pairs);
                first += BATCH as u32 * self.stride;
            }
        }
    }

    /// The kernel: `BLOCKS` blocks of [`THREADS`].
    ///
    /// # Safety
    /// As for the entry point: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn route<const BLOCKS: u32>(p: RouteParams) {
        let team = Team::<BLOCKS>;
        let counters = Shared::base();
        let counter = |number: u32| counters.offset(4 * number);
        let scratch = counter(p.window);
        let totals = scratch.offset(4 * 2 * THREADS / 32);
        let inactive = p.slots * p.experts;
        let block = team.block();
        let mine = Batches {
            first: block * THREADS + thread::index(),
            stride: BLOCKS * THREADS,
            count: p.pair_count,
        };
        let (mut pairs_before, mut tiles_before) = (0u32, 0u32);
        let mut window_start = 0;

        grid::wait_for_previous();
        grid::let_next_start();
        while window_start <= inactive {
            let buckets = p.window.min(inactive + 1 - window_start);
            // 1. Zero the counters.
            let mut i = thread::index();
            while i < buckets {
                // SAFETY: `window` counters.
                unsafe { counter(i).store(0) };
                i += THREADS;
            }
            barrier::sync();

            // 2. Count this block's pairs. The first window looks pairs up and remembers their buckets.
            mine.each(|pairs| {
                let mut found = [u32::MAX; BATCH];
                if window_start == 0 {
                    let (mut slots, mut experts) = ([0; BATCH], [0; BATCH]);
                    unroll::<BATCH>(|i| {
                        if let Some(pair) = pairs[i] {
                            // SAFETY: the pair is one of P, its token one of T.
                            unsafe {
                                slots[i] = p.token_lora.at(p.top_k.quotient(pair)).load();
                                experts[i] = p.topk_ids.at(pair).load();
                            }
                        }
                    });
                    unroll::<BATCH>(|i| {
                        if let Some(pair) = pairs[i] {
                            // SAFETY: as above.
                            unsafe {
                                found[i] = bucket(&p, slots[i], experts[i]);
                                p.buckets.at(pair).store(found[i]);
                            }
                        }
                    });
                } else {
                    // SAFETY: this thread stored them.
                    found = unsafe { remembered(&p, pairs) };
                }
                unroll::<BATCH>(|i| {
                    let number = found[i].wrapping_sub(window_start);
                    if number < buckets {
                        // SAFETY: one of `window` counters.
                        unsafe { counter(number).fetch_add(1) };
                    }
                });
            });
            team.sync();

            // 3. Each block takes a share of the buckets, each thread a run of these: counts become positions,
            // and tiles are written.
            let share = buckets.div_ceil(BLOCKS);
            let (share_from, share_to) = (buckets.min(block * share), buckets.min((block + 1) * share));
            let run = share.div_ceil(THREADS);
            let from = share_to.min(share_from + thread::index() * run);
            let to = share_to.min(from + run);
            // SAFETY: one of `window` counters.
            let count_in = |number: u32, block: u32| unsafe { team.load(counter(number), block) };
            let (mut pairs, mut tiles) = (0, 0);
            let mut i = from;
            while i < to {
                let mut count = 0;
                unroll::<8>(|other| {
                    if (other as u32) < BLOCKS {
                        count += count_in(i, other as u32);
                    }
                });
                pairs += count;
                tiles += quotient(count + p.tile_rows - 1, p.tile_rows);
                i += 1;
            }
            let (before, total) = scan::<THREADS, 2>(scratch, [pairs, tiles]);
            // The shares of the blocks before this one come first.
            if thread::index() < BLOCKS {
                // SAFETY: two words a block.
                unsafe {
                    team.store(totals.offset(8 * block), thread::index(), total[0]);
                    team.store(totals.offset(8 * block + 4), thread::index(), total[1]);
                }
            }
            team.sync();
            let (mut position, mut tile) = (pairs_before + before[0], tiles_before + before[1]);
            unroll::<8>(|other| {
                if (other as u32) < BLOCKS {
                    // SAFETY: two words a block, which it stored before the barrier.
                    let [pairs, tiles] =
                        [0, 4].map(|word| unsafe { totals.offset(8 * other as u32 + word).load() });
                    if (other as u32) < block {
                        position += pairs;
                        tile += tiles;
                    }
                    pairs_before += pairs;
                    tiles_before += tiles;
                }
            });
            let mut i = from;
            while i < to {
                let bucket = window_start + i;
                let first = position;
                unroll::<8>(|other| {
                    if (other as u32) < BLOCKS {
                        let count = count_in(i, other as u32);
                        // SAFETY: one of `window` counters; nobody else reads it before the next barrier.
                        unsafe { team.store(counter(i), other as u32, position) };
                        position += count;
                    }
                });
                // SAFETY: there is room for all tiles.
                unsafe {
                    if bucket == inactive {
                        p.counts.at(count::ACTIVE).store(tile);
                    }
                    tile = write_tiles(&p, bucket, first, position, tile);
                    if bucket == inactive {
                        p.counts.at(count::ALL).store(tile);
                    }
                }
                i += 1;
            }
            team.sync();

            // 4. Each pair to its place.
            mine.each(|pairs| {
                // SAFETY: this thread stored them.
                let found = unsafe { remembered(&p, pairs) };
                unroll::<BATCH>(|i| {
                    let number = found[i].wrapping_sub(window_start);
                    if let (Some(pair), true) = (pairs[i], number < buckets) {
                        // SAFETY: one of `window` counters, which hands out each position once.
                        unsafe {
                            let place = counter(number).fetch_add(1);
                            p.pairs.at(place).store(pair);
                        }
                    }
                });
            });
            barrier::sync();
            window_start += p.window;
        }
    }

    /// The buckets of pairs that this thread looked up before.
    ///
    /// # Safety
    /// This thread must have stored them.
    #[inline(always)]
    unsafe fn remembered(p: &RouteParams, pairs: [Option<u32>; BATCH]) -> [u32; BATCH] {
        let mut found = [u32::MAX; BATCH];
        unroll::<BATCH>(|i| {
            if let Some(pair) = pairs[i] {
                // SAFETY: the pair is one of P.
                found[i] = unsafe { p.buckets.at(pair).load() };
            }
        });
        found
    }

    /// Writes the tiles of a segment whose pairs have positions `first` .. `end`, from tile number `tile` on;
    /// returns the number of the next tile.
    ///
    /// # Safety
    /// There must be room for them.
    #[inline(always)]
    unsafe fn write_tiles(p: &RouteParams, bucket: u32, first: u32, end: u32, tile: u32) -> u32 {
        let slot = quotient(bucket, p.experts);
        let expert = bucket - slot * p.experts;
        let (mut first, mut tile) = (first, tile);
        if first < end {
            let inactive = bucket == p.slots * p.experts;
            // SAFETY: the tensors of `p` are as their fields say.
            let rank = if inactive { 0 } else { unsafe { slot_rank(p, slot) } };
            while first < end {
                let rows = (end - first).min(p.tile_rows);
                // SAFETY: as the caller promises.
                unsafe {
                    p.tiles.at(tile).store_tile(Tile { slot, expert, first, rows, rank, reserved: [0; 3] })
                };
                first += rows;
                tile += 1;
            }
        }
        tile
    }
}
