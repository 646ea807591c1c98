//! `route`: sorts pairs into segments and cuts these into tiles.
//!
//! A *bucket* is a (slot, expert): slot · E + expert; one more, the last, is for inactive pairs. One block
//! counts the pairs of each bucket, turns counts into positions, and puts each pair in its place: a
//! counting sort, with the counters in shared memory. When there are more buckets than counters, it does
//! so for one window of buckets after another.
//!
//! Which pair of a segment comes first is up to the order of atomic additions and may differ between runs.
//! Nothing that is computed later depends on it: each pair's sums are its own.
//!
//! Shared memory: `window` counters, then two words a warp for the scan.

/// Threads of the block.
pub const THREADS: u32 = 1024;

/// Most counters that a block is given: 128 KiB of shared memory, which every device since sm_80 has.
pub const MAX_WINDOW: u32 = 32 * 1024;

/// Bytes of shared memory of the block.
pub const fn shared_bytes(window: u32) -> u32 {
    (window + 2 * THREADS / 32) * 4
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
    use super::THREADS;
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, grid, thread, warp};
    use crate::memory::Global;
    use crate::params::{RouteParams, Tile, count, enabled};
    use crate::tile::{quotient, unroll};

    /// Pairs that a thread looks up at a time, so that their loads overlap.
    const BATCH: usize = 4;

    /// The rank in use of a slot, 0 when it is off or does not exist.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say.
    #[inline(always)]
    unsafe fn slot_rank(p: &RouteParams, slot: u32) -> u32 {
        if slot >= p.slots {
            return 0;
        }
        // SAFETY: the slot is one of L.
        unsafe {
            let on = match p.enabled_kind {
                enabled::U8 => p.adapter_enabled.at(slot).load() as u32,
                enabled::I32 => Global::<u32>::new(p.adapter_enabled.address()).at(slot).load(),
                _ => 1,
            };
            let rank = if p.ranks.is_null() { p.max_rank } else { p.ranks.at(slot).load() };
            // A negative rank is a large unsigned number: clamp it to 0, not to R.
            match (on, rank as i32) {
                (0, _) | (_, ..=0) => 0,
                _ => rank.min(p.max_rank),
            }
        }
    }

    /// The bucket of a pair, given its slot and global expert. One unsigned comparison a number catches −1
    /// and everything else that is out of range.
    ///
    /// # Safety
    /// As for [`slot_rank`].
    #[inline(always)]
    unsafe fn bucket(p: &RouteParams, slot: u32, global_expert: u32) -> u32 {
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

    /// Sums over the threads before this one, and over all, of two numbers at once. The whole block must
    /// come here; `scratch` has two words a warp.
    #[inline(always)]
    fn scan(scratch: Shared, values: [u32; 2]) -> ([u32; 2], [u32; 2]) {
        let lane = thread::lane();
        let inclusive = |value: u32| {
            let mut sum = value;
            let mut distance = 1;
            while distance < 32 {
                let below = warp::shuffle_up(sum, distance);
                sum += if lane >= distance { below } else { 0 };
                distance *= 2;
            }
            sum
        };
        let sums = values.map(inclusive);
        let word = |number: u32| scratch.offset(4 * number);
        // SAFETY: two words a warp; the barriers separate their writers from their readers.
        unsafe {
            if lane == 31 {
                word(2 * thread::warp()).store(sums[0]);
                word(2 * thread::warp() + 1).store(sums[1]);
            }
            barrier::sync();
            let mut before = [0u32; 2];
            let mut total = [0u32; 2];
            let mut w = 0;
            while w < THREADS / 32 {
                let [a, b] = [word(2 * w).load(), word(2 * w + 1).load()];
                if w < thread::warp() {
                    before = [before[0] + a, before[1] + b];
                }
                total = [total[0] + a, total[1] + b];
                w += 1;
            }
            barrier::sync();
            ([before[0] + sums[0] - values[0], before[1] + sums[1] - values[1]], total)
        }
    }

    /// The kernel: one block of [`THREADS`].
    ///
    /// # Safety
    /// As for the entry point: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn route(p: RouteParams) {
        let counters = Shared::base();
        let scratch = counters.offset(4 * p.window);
        let inactive = p.slots * p.experts;
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
                unsafe { counters.offset(4 * i).store(0) };
                i += THREADS;
            }
            barrier::sync();

            // 2. Count. The first window looks pairs up and remembers their buckets for later.
            let mut first = thread::index();
            while first < p.pair_count {
                let mut found = [u32::MAX; BATCH];
                if window_start == 0 {
                    let mut slots = [0u32; BATCH];
                    let mut experts = [0u32; BATCH];
                    unroll::<BATCH>(|i| {
                        let pair = first + i as u32 * THREADS;
                        if pair < p.pair_count {
                            // SAFETY: the pair is one of P, its token one of T.
                            unsafe {
                                slots[i] = p.token_lora.at(p.top_k.quotient(pair)).load();
                                experts[i] = p.topk_ids.at(pair).load();
                            }
                        }
                    });
                    unroll::<BATCH>(|i| {
                        let pair = first + i as u32 * THREADS;
                        if pair < p.pair_count {
                            // SAFETY: as above.
                            unsafe {
                                found[i] = bucket(&p, slots[i], experts[i]);
                                p.buckets.at(pair).store(found[i]);
                            }
                        }
                    });
                } else {
                    unroll::<BATCH>(|i| {
                        let pair = first + i as u32 * THREADS;
                        if pair < p.pair_count {
                            // SAFETY: this thread stored it.
                            found[i] = unsafe { p.buckets.at(pair).load() };
                        }
                    });
                }
                unroll::<BATCH>(|i| {
                    let counter = found[i].wrapping_sub(window_start);
                    if counter < buckets {
                        // SAFETY: one of `window` counters.
                        unsafe { counters.offset(4 * counter).fetch_add(1) };
                    }
                });
                first += BATCH as u32 * THREADS;
            }
            barrier::sync();

            // 3. Each thread takes a run of buckets; counts become positions, and tiles are written.
            let run = buckets.div_ceil(THREADS);
            let (from, to) = (buckets.min(thread::index() * run), buckets.min((thread::index() + 1) * run));
            let (mut pairs, mut tiles) = (0, 0);
            let mut i = from;
            while i < to {
                // SAFETY: one of `window` counters.
                let count = unsafe { counters.offset(4 * i).load() };
                pairs += count;
                tiles += quotient(count + p.tile_rows - 1, p.tile_rows);
                i += 1;
            }
            let (before, total) = scan(scratch, [pairs, tiles]);
            let (mut position, mut tile) = (pairs_before + before[0], tiles_before + before[1]);
            let mut i = from;
            while i < to {
                let bucket = window_start + i;
                // SAFETY: one of `window` counters; there is room for all tiles.
                unsafe {
                    let mut left = counters.offset(4 * i).load();
                    counters.offset(4 * i).store(position);
                    if bucket == inactive {
                        p.counts.at(count::ACTIVE).store(tile);
                    }
                    if left > 0 {
                        let slot = quotient(bucket, p.experts);
                        let expert = bucket - slot * p.experts;
                        let rank = if bucket == inactive { 0 } else { slot_rank(&p, slot) };
                        while left > 0 {
                            let rows = left.min(p.tile_rows);
                            let record = Tile { slot, expert, first: position, rows, rank, reserved: [0; 3] };
                            p.tiles.at(tile).store_tile(record);
                            position += rows;
                            left -= rows;
                            tile += 1;
                        }
                    }
                    if bucket == inactive {
                        p.counts.at(count::ALL).store(tile);
                    }
                }
                i += 1;
            }
            pairs_before += total[0];
            tiles_before += total[1];
            barrier::sync();

            // 4. Each pair to its place.
            let mut first = thread::index();
            while first < p.pair_count {
                let mut found = [u32::MAX; BATCH];
                unroll::<BATCH>(|i| {
                    let pair = first + i as u32 * THREADS;
                    if pair < p.pair_count {
                        // SAFETY: this thread stored it.
                        found[i] = unsafe { p.buckets.at(pair).load() };
                    }
                });
                unroll::<BATCH>(|i| {
                    let counter = found[i].wrapping_sub(window_start);
                    if counter < buckets {
                        // SAFETY: one of `window` counters, which hands out each position once.
                        unsafe {
                            let place = counters.offset(4 * counter).fetch_add(1);
                            p.pairs.at(place).store(first + i as u32 * THREADS);
                        }
                    }
                });
                first += BATCH as u32 * THREADS;
            }
            barrier::sync();
            window_start += p.window;
        }
    }
}
