//! How the blocks of a grid exchange what they have counted.
//!
//! Four words, of which the first counts launches and the second says how many words the launch before has
//! written. Then two tables, which launches use alternately.

use super::map::Map;
use super::window::Window;
use crate::arch::thread;
use crate::memory::Global;
use crate::params::RouteParams;
use crate::route::EXCHANGE_HEAD;
use crate::tile::{quotient, unroll};

/// The ready flag of a block's count of pairs.
const READY: u32 = 1 << 31;

/// This launch's table.
pub(super) struct Exchange {
    table: Global<u32>,
    /// This launch's number.
    launch: u32,
    block: u32,
    /// Words from the counts of a block to those of the next.
    stride: u32,
}

impl Exchange {
    /// Reads what the exchange begins with, for all of the block.
    ///
    /// # Safety
    /// The launch before must have ended.
    #[inline(always)]
    pub unsafe fn read_head(p: &RouteParams, map: Map) {
        if thread::index() < 2 {
            // SAFETY: the exchange begins with these words. One thread reads them for all of the block, so
            // that they have been read when the block's counts are seen, after which they change.
            unsafe { map.head(thread::index()).store(p.exchange.at(thread::index()).load_relaxed()) };
        }
    }

    /// This launch's, of `active` buckets; empties the other table, for the next launch.
    ///
    /// # Safety
    /// The block must have met since [`Exchange::read_head`].
    #[inline(always)]
    pub unsafe fn open<const THREADS: u32>(p: &RouteParams, map: Map, block: u32, active: u32) -> Self {
        // SAFETY: stored before the barrier; the tables come after the head.
        unsafe {
            let launch = map.head(0).load();
            let tables = [0, 1].map(|table| p.exchange.at(EXCHANGE_HEAD + table * p.exchange_room));
            let [mine, other] = if launch & 1 == 0 { tables } else { [tables[1], tables[0]] };
            let used = map.head(1).load();
            let mut word = block * THREADS + thread::index();
            while word < used {
                other.at(word).store_relaxed(0);
                word += p.blocks * THREADS;
            }
            Exchange { table: mine, launch, block, stride: (active + 3) & !3 }
        }
    }

    /// None, of a block on its own.
    pub const NONE: Self = Exchange { table: Global::NULL, launch: 0, block: 0, stride: 0 };

    /// Publishes that this block has counted so many pairs of bucket `bucket`.
    ///
    /// # Safety
    /// There must be such a bucket, and an exchange.
    #[inline(always)]
    pub unsafe fn publish(&self, bucket: u32, total: u32) {
        // SAFETY: the exchange has a word a block and bucket.
        unsafe { self.table.at(self.block * self.stride + bucket).store_relaxed(READY | total) };
    }

    /// Waits for the counts of a window of all blocks, and adds up those of all blocks and of the blocks
    /// before this one. A thread takes four buckets of eight blocks at a time.
    ///
    /// # Safety
    /// All blocks must run at once and publish theirs.
    #[inline(always)]
    pub unsafe fn gather<const THREADS: u32>(&self, p: &RouteParams, map: Map, window: &Window) {
        let table = self.table.at(window.start);
        let buckets = window.buckets;
        let fours = buckets.div_ceil(4);
        let items = p.blocks.div_ceil(8) * fours;
        let mut item = thread::index();
        while item < items {
            let group = quotient(item, fours);
            let bucket = 4 * (item - group * fours);
            // Words that are no bucket's are never stored.
            let needed = [0, 1, 2, 3].map(|i| if bucket + i < buckets { READY } else { 0 });
            let mut counts = [[READY; 4]; 8];
            loop {
                unroll::<8>(|i| {
                    let other = 8 * group + i as u32;
                    if other < p.blocks {
                        // SAFETY: the exchange has a word a block and bucket, rows in multiples of four.
                        counts[i] = unsafe { table.at(other * self.stride + bucket).load16_relaxed() };
                    }
                });
                let mut ready = [READY; 4];
                unroll::<8>(|i| unroll::<4>(|j| ready[j] &= counts[i][j]));
                let mut all = true;
                unroll::<4>(|j| all &= ready[j] == needed[j] || needed[j] == 0);
                if all {
                    break;
                }
            }
            unroll::<4>(|j| {
                let (mut all, mut before) = (0, 0);
                unroll::<8>(|i| {
                    let count = counts[i][j] & !READY;
                    all += count;
                    before += if 8 * group + (i as u32) < self.block { count } else { 0 };
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

    /// The other table is the next launch's.
    ///
    /// # Safety
    /// The counts of all blocks must have come, so that all have read what this changes; one thread must come
    /// here.
    #[inline(always)]
    pub unsafe fn close(&self, p: &RouteParams) {
        // SAFETY: the exchange begins with these words.
        unsafe {
            p.exchange.store_relaxed(self.launch + 1);
            p.exchange.at(1u32).store_relaxed(p.blocks * self.stride);
        }
    }
}
