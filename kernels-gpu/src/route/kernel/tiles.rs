//! Segments cut into tiles.

use super::OWN_TILES;
use super::map::Map;
use super::window::Window;
use crate::arch::thread;
use crate::params::{RouteParams, Tile};
use crate::tile::quotient;

/// Tiles of a segment of `pairs` pairs.
#[inline(always)]
pub(super) fn tiles_of(p: &RouteParams, pairs: u32) -> u32 {
    p.over_tile_rows.quotient(pairs + p.tile_rows - 1)
}

/// Writes this block's part of the tiles of a window, which are `first` up to `end`.
///
/// # Safety
/// The arrays of the window must be filled, and there must be room for its tiles.
#[inline(always)]
pub(super) unsafe fn write_tiles<const THREADS: u32, const GRID: bool, const WIDE: bool>(
    p: &RouteParams,
    map: Map,
    (block, blocks): (u32, u32),
    window: &Window,
    [first, end]: [u32; 2],
) {
    // The first tiles of each segment, by the highest threads, which have the fewest pairs.
    let counters = window.counters;
    let each = if GRID { quotient(counters + blocks - 1, blocks) } else { counters };
    let mut i = block * each + THREADS - 1 - thread::index();
    while i < counters.min((block + 1) * each) {
        // SAFETY: one of the window's; there is room for all tiles.
        unsafe { write_own_tiles::<WIDE>(p, map, window, i) };
        i += THREADS;
    }
    // The others by whoever has their number: a segment of many is not one thread's alone.
    // SAFETY: counted before the barrier.
    if unsafe { map.many().load() } > 0 {
        let mut tile = first + thread::index() * blocks + block;
        while tile < end {
            // SAFETY: there is room for all tiles.
            unsafe { write_other_tile::<WIDE>(p, map, window, tile) };
            tile += blocks * THREADS;
        }
    }
}

/// Writes the first tiles of bucket `bucket` of a window.
///
/// # Safety
/// It must be one of the window's, and there must be room for its tiles.
#[inline(always)]
unsafe fn write_own_tiles<const WIDE: bool>(p: &RouteParams, map: Map, window: &Window, bucket: u32) {
    // SAFETY: the arrays were filled before the barrier, and the tensors of `p` are as their fields say.
    unsafe {
        let (mut first, end) = (map.first(bucket).load(), map.first(bucket + 1).load());
        let mut tile = map.tile(bucket).load();
        let last = tile + OWN_TILES;
        while first < end && tile < last {
            write_tile::<WIDE>(p, map, window.start + bucket, (first, end), tile);
            first += p.tile_rows;
            tile += 1;
        }
    }
}

/// Writes tile number `tile`, one of a window's, unless [`write_own_tiles`] does.
///
/// # Safety
/// It must be one of the window's tiles, and there must be room for it.
#[inline(always)]
unsafe fn write_other_tile<const WIDE: bool>(p: &RouteParams, map: Map, window: &Window, tile: u32) {
    // SAFETY: as above.
    unsafe {
        // The last bucket whose first tile is not past this one: buckets without pairs share the number of
        // the next.
        let (mut low, mut high) = (0, window.counters);
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
            write_tile::<WIDE>(p, map, window.start + low, (first, map.first(low + 1).load()), tile);
        }
    }
}

/// Writes tile number `tile`, of the pairs of `bucket` from position `first` on, whose last come before
/// `end`.
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
        let rank = map.staged_rank::<WIDE>(p, slot);
        p.tiles.at(tile).store_tile(Tile { slot, expert, first, rows, rank, reserved: [0; 3] });
    }
}
