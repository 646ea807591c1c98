//! Counts become positions.

use super::OWN_TILES;
use super::map::Map;
use super::tiles::tiles_of;
use super::window::{BucketRun, Window};
use crate::arch::thread;
use crate::params::RouteParams;
use crate::scan::scan;

/// What buckets before a window have: pairs, tiles, and pairs in blocks before this one.
#[derive(Clone, Copy)]
pub(super) struct Past {
    pub pairs: u32,
    pub tiles: u32,
    pub before: u32,
}

impl Past {
    /// Before the first window.
    pub const NONE: Self = Past { pairs: 0, tiles: 0, before: 0 };

    /// Turns the counts of a window into positions, those of all sorters of the block, whose first pair is
    /// `start`, and fills the window's arrays; then this is past the window. Returns the number of tiles of
    /// active pairs so far.
    ///
    /// # Safety
    /// What a bucket has in all blocks, and in those before this one, must have been added up, and been
    /// stored by the thread whose `run` has the bucket, or before a barrier. The whole block must come here.
    #[inline(always)]
    pub unsafe fn place_window<const THREADS: u32, const GRID: bool, const WIDE: bool>(
        &mut self,
        p: &RouteParams,
        map: Map,
        window: &Window,
        run: BucketRun<WIDE>,
        start: u32,
    ) -> u32 {
        let mut sums = [0; 3];
        run.each(|i| {
            // SAFETY: one of the window's buckets: this thread stored it, or others before the barrier.
            let [count, before] = unsafe { [map.first(i).load(), map.before::<GRID>(i)] };
            sums = [sums[0] + count, sums[1] + tiles_of(p, count), sums[2] + before];
        });
        let (before, all) = if GRID {
            scan::<THREADS, 3>(map.scan(), sums)
        } else {
            let ([pairs, tiles], [all_pairs, all_tiles]) = scan::<THREADS, 2>(map.scan(), [sums[0], sums[1]]);
            ([pairs, tiles, 0], [all_pairs, all_tiles, 0])
        };
        let (mut position, mut tile) = (self.pairs + before[0], self.tiles + before[1]);
        run.each(|i| {
            // SAFETY: as above; nobody else uses these words before the next barrier.
            unsafe {
                let [count, before] = [map.first(i).load(), map.before::<GRID>(i)];
                map.first(i).store(position);
                map.tile(i).store(tile);
                map.place(i, position + before);
                position += count;
                let tiles = tiles_of(p, count);
                tile += tiles;
                if tiles > OWN_TILES {
                    map.many().fetch_add(1);
                }
            }
        });
        *self = Past { pairs: self.pairs + all[0], tiles: self.tiles + all[1], before: self.before + all[2] };
        let active_tiles = self.tiles;
        let mut end_position = self.pairs;
        if window.is_last {
            // What is left is inactive.
            let tiles = tiles_of(p, p.pair_count - self.pairs);
            self.tiles += tiles;
            end_position = p.pair_count;
            if thread::index() == THREADS - 1 {
                // SAFETY: the last counters and the last places but one are the inactive bucket's.
                unsafe {
                    map.first(window.buckets).store(self.pairs);
                    map.tile(window.buckets).store(active_tiles);
                    map.place(window.buckets, self.pairs + start - self.before);
                    if tiles > OWN_TILES {
                        map.many().fetch_add(1);
                    }
                }
            }
        }
        if thread::index() == 0 {
            // SAFETY: each array has a place past the last counter.
            unsafe {
                map.first(window.counters).store(end_position);
                map.tile(window.counters).store(self.tiles);
            }
        }
        active_tiles
    }
}
