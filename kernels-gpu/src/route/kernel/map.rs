//! Where things are in shared memory, and a bucket's counters.

use crate::arch::shared::Shared;
use crate::arch::thread;
use crate::params::RouteParams;
use crate::route::{GRID_THREADS, STAGED, counter_stride};
use crate::slots::Slots;

/// Where things are in shared memory.
#[derive(Clone, Copy)]
pub(super) struct Map {
    pub sorters: u32,
    pub window: u32,
}

impl Map {
    #[inline(always)]
    fn word(number: u32) -> Shared {
        Shared::base().offset(4 * number)
    }

    /// Sorter `sorter`'s counter of a bucket of the window.
    #[inline(always)]
    pub fn counter(self, sorter: u32, bucket: u32) -> Shared {
        Self::word(counter_stride(self.sorters) * bucket + sorter)
    }

    /// Of a bucket: its pairs in all blocks, then the position of its first.
    #[inline(always)]
    pub fn first(self, bucket: u32) -> Shared {
        Self::word(counter_stride(self.sorters) * self.window + bucket)
    }

    /// Of a bucket: its pairs in blocks before this one, then the number of its first tile.
    #[inline(always)]
    pub fn tile(self, bucket: u32) -> Shared {
        self.first(self.window + 4 + bucket)
    }

    /// For a sum over the block.
    #[inline(always)]
    pub fn scan(self) -> Shared {
        self.many().offset(16)
    }

    /// The rank in use of a slot.
    #[inline(always)]
    pub fn rank(self, slot: u32) -> Shared {
        self.scan().offset(4 * (3 * GRID_THREADS / 32 + slot))
    }

    /// Of a bucket of a grid: its pairs in blocks before this one.
    ///
    /// # Safety
    /// They must have been added up.
    #[inline(always)]
    pub unsafe fn before<const GRID: bool>(self, bucket: u32) -> u32 {
        // SAFETY: as the caller promises.
        if GRID { unsafe { self.tile(bucket).load() } } else { 0 }
    }

    /// How many segments have more than [`OWN_TILES`](super::OWN_TILES) tiles.
    #[inline(always)]
    pub fn many(self) -> Shared {
        self.tile(self.window + 4)
    }

    /// 0: number of the launch; 1: words that the launch before has written.
    #[inline(always)]
    pub fn head(self, word: u32) -> Shared {
        self.rank(STAGED + word)
    }

    /// The rank in use of a slot, 0 when it is off or does not exist, from shared memory where it is there.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say; the ranks must have been staged.
    #[inline(always)]
    pub unsafe fn staged_rank<const WIDE: bool>(self, p: &RouteParams, slot: u32) -> u32 {
        // SAFETY: as the caller promises.
        unsafe {
            if WIDE && slot >= STAGED {
                Slots::of(p).rank(slot)
            } else {
                let rank = self.rank(slot.min(STAGED - 1)).load();
                if slot < STAGED { rank } else { 0 }
            }
        }
    }

    /// Zeroes all counters, and what is added up beside them.
    #[inline(always)]
    pub fn clear<const THREADS: u32>(self) {
        let mut word = 4 * thread::index();
        while word < counter_stride(self.sorters) * self.window + 2 * (self.window + 4) + 4 {
            // SAFETY: a bucket's counters are a multiple of four, and so is a window.
            unsafe { Self::word(word).store16([0; 4]) };
            word += 4 * THREADS;
        }
    }

    /// Pairs of a bucket that all sorters of the block have counted.
    #[inline(always)]
    pub fn sum(self, bucket: u32) -> u32 {
        let mut sum = 0;
        let mut sorter = 0;
        while sorter < self.sorters {
            // SAFETY: the counters were zeroed before a barrier, and counted up before another.
            let [a, b, c, d] = unsafe { self.counter(sorter, bucket).load16() };
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
    pub unsafe fn place(self, bucket: u32, mut position: u32) {
        let mut sorter = 0;
        while sorter < self.sorters {
            // SAFETY: as the caller promises.
            unsafe {
                let four = self.counter(sorter, bucket);
                let [a, b, c, d] = four.load16();
                four.store16([position, position + a, position + a + b, position + a + b + c]);
                position += a + b + c + d;
            }
            sorter += 4;
        }
    }
}
