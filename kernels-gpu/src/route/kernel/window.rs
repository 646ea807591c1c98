//! The buckets that are counted at a time.

use crate::arch::thread;
use crate::params::RouteParams;

/// Some buckets, one after another: all of them, unless the form is wide.
pub(super) struct Window {
    /// The first.
    pub start: u32,
    /// Active buckets.
    pub buckets: u32,
    /// Counters of a sorter: the last window has one more, for inactive pairs.
    pub counters: u32,
    /// Whether there is none after it.
    pub is_last: bool,
}

impl Window {
    /// The window from bucket `start` on, of `active` active ones.
    #[inline(always)]
    pub fn new<const WIDE: bool>(p: &RouteParams, start: u32, active: u32) -> Self {
        let room = if WIDE { p.window - 4 } else { active };
        let buckets = room.min(active - start);
        let is_last = !WIDE || start + buckets == active;
        Window { start, buckets, counters: buckets + is_last as u32, is_last }
    }

    /// The number of a bucket in it. A bucket of another window has one past those of this one.
    #[inline(always)]
    pub fn number(&self, bucket: u32) -> u32 {
        bucket.wrapping_sub(self.start).min(self.counters)
    }

    /// Bits of such a number.
    #[inline(always)]
    pub fn bits(&self) -> u32 {
        32 - self.counters.leading_zeros()
    }

    /// This thread's run of its active buckets.
    #[inline(always)]
    pub fn run<const THREADS: u32, const WIDE: bool>(&self) -> BucketRun<WIDE> {
        let run = if WIDE { self.buckets.div_ceil(THREADS) } else { 1 };
        let from = self.buckets.min(thread::index() * run);
        BucketRun { from, to: self.buckets.min(from + run) }
    }
}

/// A run of buckets of a window.
#[derive(Clone, Copy)]
pub(super) struct BucketRun<const WIDE: bool> {
    from: u32,
    to: u32,
}

impl<const WIDE: bool> BucketRun<WIDE> {
    /// Calls `body` with their numbers; unless the form is wide that is one or none, and no loop.
    #[inline(always)]
    pub fn each(self, mut body: impl FnMut(u32)) {
        let mut i = self.from;
        while i < self.to {
            body(i);
            if !WIDE {
                break;
            }
            i += 1;
        }
    }
}
