//! The kernel: its phases, one after another.

mod exchange;
mod map;
mod positions;
mod sorter;
mod tiles;
mod window;

use super::{ROWS, STAGED};
use crate::arch::{barrier, grid, thread};
use crate::params::{RouteParams, count};
use crate::slots::Slots;
use exchange::Exchange;
use map::Map;
use positions::Past;
use sorter::{Rows, Sorter};
use tiles::write_tiles;
use window::Window;

/// Tiles of a segment that one thread writes: as many as a segment of usual length has.
const OWN_TILES: u32 = 8;

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
    // This warp's pairs.
    let start = p.pair_count.min(block * map.sorters * p.run);
    let at = p.pair_count.min(start + thread::warp() * p.run);
    let rows = Rows { at, end: p.pair_count.min(at + p.run) };
    let mut sorter = Sorter::new(rows, !WIDE || p.run <= 32 * ROWS);

    // Where things are is found before they may be read.
    let slot = Slots::of(&p).slot(thread::index());
    let first_ids = rows.ids(&p);
    map.clear::<THREADS>();
    grid::wait();
    grid::launch_dependents();

    // 1. Ask for what all of the block will need, and for the first ids.
    // SAFETY: the tensors of `p` are as their fields say.
    let state = unsafe { slot.load() };
    // SAFETY: the pairs are among P.
    let first_ids = first_ids.map(|ids| unsafe { ids.load() });
    if thread::index() < STAGED {
        // SAFETY: there is a place for each of so many slots.
        unsafe { map.rank(thread::index()).store(state.rank()) };
    }
    if GRID {
        // SAFETY: the launch before this one has ended.
        unsafe { Exchange::read_head(&p, map) };
    }
    barrier::sync();
    let mut exchange = Exchange::NONE;
    if GRID {
        // SAFETY: the block has met.
        exchange = unsafe { Exchange::open::<THREADS>(&p, map, block, active) };
    }

    let mut past = Past::NONE;
    let mut window_start = 0;
    loop {
        let window = Window::new::<WIDE>(&p, window_start, active);

        // 2. Count this sorter's pairs.
        // SAFETY: counters were zeroed, and ranks staged, before a barrier.
        unsafe { sorter.count::<WIDE>(&p, map, &window, first_ids) };
        barrier::sync();

        // 3. Each thread takes a run of buckets, and adds up what the block's sorters have counted.
        let run = window.run::<THREADS, WIDE>();
        run.each(|i| {
            let total = map.sum(i);
            // SAFETY: the window has these buckets.
            unsafe {
                if GRID {
                    exchange.publish(window.start + i, total);
                } else {
                    map.first(i).store(total);
                }
            }
        });
        // While counts are on their way.
        sorter.find_peers(&window);
        if GRID {
            // SAFETY: all blocks run at once, and publish theirs.
            unsafe { exchange.gather::<THREADS>(&p, map, &window) };
            barrier::sync();
        }

        // 4. Counts become positions.
        let first_tile = past.tiles;
        // SAFETY: counts were added up by the thread that has the bucket, or before the barrier.
        let active_tiles = unsafe { past.place_window::<THREADS, GRID, WIDE>(&p, map, &window, run, start) };
        barrier::sync();

        // 5. Each pair to its place.
        // SAFETY: the counters hold positions.
        unsafe { sorter.place(&p, map, &window) };

        // 6. Segments become tiles.
        // SAFETY: the window's arrays were filled before the barrier.
        unsafe {
            write_tiles::<THREADS, GRID, WIDE>(&p, map, (block, blocks), &window, [first_tile, past.tiles]);
        }
        window_start += window.buckets;
        if window.is_last {
            if block == 0 && thread::index() == THREADS - 1 {
                // SAFETY: two counts; the counts of all blocks have come.
                unsafe {
                    p.counts.at(count::ACTIVE).store(active_tiles);
                    p.counts.at(count::ALL).store(past.tiles);
                    if GRID {
                        exchange.close(&p);
                    }
                }
            }
            return;
        }
        barrier::sync();
        map.clear::<THREADS>();
        barrier::sync();
    }
}
