//! The kernel: its roles, and what they walk through.

mod barriers;
mod expand;
mod fill;
mod ring;
mod shrink;
mod units;
mod worker;

use super::{
    BARRIER_BYTES, FILL, FILLERS, GROUP, LANES, MAX_STAGES, RUN, SUM_ROW, THREADS, WORKERS,
    expand_stage_bytes, fixed_bytes, row_bytes, shrink_stage_bytes,
};
use crate::arch::mbarrier;
use crate::arch::mma::Element;
use crate::arch::shared::Shared;
use crate::arch::{barrier, bulk, cluster, grid, thread, warp};
use crate::decode::segments::{Few, Segments};
use crate::ids::Ids;
use crate::memory::Index;
use crate::params::{DecodeParams, Tile, count};
use crate::slots::Slots;
use crate::tile::unroll;
use barriers::{begun, landed, listed, read, tile_counts, unit_count};
use expand::expand;
use fill::{fill_a, fill_expand, fill_x};
use ring::Ring;
use shrink::shrink;
use units::{Context, Shares, Unit};

/// The first warp that expands.
const EXPAND: u32 = WORKERS;
/// The warp that fills the ring for shrink with x: it also lists few pairs, and knows how many tiles there are.
const LIST: u32 = FILL + 1;

/// The kernel, launched in clusters of a power of two of blocks. `FRAGMENTS`: of eight pairs each, of a tile of
/// `ROWS`.
///
/// # Safety
/// As for the entry points: every tensor of `p` must be as its field says.
#[inline(always)]
pub unsafe fn decode<E: Element, I: Index, const FRAGMENTS: usize, const ROWS: u32>(p: DecodeParams) {
    const { assert!(ROWS == 8 * FRAGMENTS as u32 && GROUP + ROWS <= 32) };
    let (block, blocks) = (cluster::block(), cluster::blocks());

    // The map of shared memory.
    let max_rank = p.route.max_rank;
    let found_at = Shared::base().offset(BARRIER_BYTES);
    let h = found_at.offset(p.room.shared_bytes());
    let sums = h.offset(2 * ROWS * row_bytes(max_rank.next_multiple_of(RUN)));
    let landings = sums.offset(WORKERS * ROWS * SUM_ROW);
    let start = Shared::base().offset(fixed_bytes(ROWS, max_rank, blocks, p.room));
    let shrink_ring = Ring {
        start,
        stages: p.shrink_stages,
        stage_bytes: const { shrink_stage_bytes(ROWS) },
        barriers: 0,
        stage: 0,
        parity: 0,
    };
    let expand_ring = Ring {
        start: start.offset(p.shrink_stages * const { shrink_stage_bytes(ROWS) }),
        stages: p.expand_stages,
        stage_bytes: const { expand_stage_bytes(ROWS) },
        barriers: 2 * MAX_STAGES,
        ..shrink_ring
    };

    if thread::index() == 0 {
        // SAFETY: nobody uses them yet.
        unsafe { init_barriers(&shrink_ring, &expand_ring, blocks) };
    }
    // No block may be sent anything before it has its barriers.
    cluster::arrive_relaxed();
    let context = Context { p: &p, found: Segments::at(found_at), block, blocks, h, sums, landings };
    let searches = p.finds != 0 && !p.room.lists_all();
    if searches {
        // SAFETY: the rings are not in use yet.
        unsafe { Segments::prepare(&p.route, expand_ring.start, &p.room) };
    }
    if p.finds != 0 && thread::index_anew() / 32 == LIST {
        Segments::ask_for_ids(&p.route);
    }
    // Where ids and ranks are is found before they may be read.
    let warp = thread::warp();
    let finds = searches || p.finds != 0 && (warp == FILL || warp == LIST);
    let pair = if searches { thread::index() } else { thread::lane() };
    let ids = Ids::of(&p.route, pair, finds && pair < p.route.pair_count);
    let own_slot = Slots::of(&p.route).slot(if finds { thread::lane() } else { u32::MAX });
    let first = context.first_unit();
    let [first_tile, first_slice] = p.tile_and_slice(first);
    barrier::sync();
    let mut shares = Shares::NONE;
    // What the search need not keep meanwhile.
    if !searches && warp == FILL {
        shares = Shares::new(&context, max_rank);
    }
    grid::wait();
    // SAFETY: as the caller promises.
    let loaded = unsafe { (ids.load(), own_slot.load()) };

    // The number of tiles, and the tile of the cluster's first unit, whose pairs may not be listed yet.
    let (mut counts, mut tile) = ([0; 2], Tile::EMPTY);
    // SAFETY: as the caller promises; the rings are not in use yet.
    unsafe {
        if searches {
            let own = |entry| p.tile_and_slice(first + entry * p.clusters);
            (counts, tile) =
                context.found.find::<ROWS>(&p.route, loaded, own, block == 0, expand_ring.start, &p.room);
        } else if warp == FILL || warp == LIST {
            if p.finds != 0 {
                let few = Few::find::<ROWS>(&p.route, loaded);
                if warp == FILL {
                    tile = few.tile::<ROWS>(&p.route, first_tile);
                } else {
                    counts = context.found.list_few::<ROWS>(&p.route, &few, &p.room);
                }
            } else {
                counts = [count::ACTIVE, count::ALL].map(|count| p.route.counts.at(count).load());
                if warp == FILL && first < p.units(counts) {
                    tile = context.unit(first, ROWS).tile;
                }
            }
        }
    }
    if warp == LIST {
        // Not sooner: while blocks of the next launch arrive, what runs on the multiprocessor stands still.
        grid::launch_dependents();
        if thread::lane() == 0 {
            // SAFETY: the words are nobody else's.
            unsafe {
                unit_count().store(p.units(counts));
                (0..2).for_each(|i| tile_counts().offset(4 * i).store(counts[i as usize]));
            }
        }
    }
    if searches {
        // The ring for expand held the scratch.
        bulk::fence();
    }
    warp::sync();
    if thread::lane() == 0 {
        // SAFETY: the barrier is initialised.
        unsafe { listed().arrive() };
    }

    // SAFETY: the launch before this one has ended; the warps of each role are whole, and come to `listed` before they read what is.
    unsafe {
        if warp == FILL {
            fill_a::<I>(&context, shares, shrink_ring, ROWS, Unit { tile, slice: first_slice });
        } else {
            listed().wait(0);
            if warp < EXPAND {
                cluster::wait();
                shrink::<E, FRAGMENTS, ROWS>(&context, shrink_ring);
            } else if warp < FILL {
                cluster::wait();
                expand::<E, I, FRAGMENTS, ROWS>(&context, expand_ring);
            } else if warp == LIST {
                fill_x::<I, ROWS>(&context, shrink_ring);
            } else {
                fill_expand::<I, ROWS>(&context, expand_ring);
            }
        }
        if warp >= FILL {
            // Not earlier: a store to device memory before the block meets costs 0.2 µs.
            if p.finds != 0 && thread::block() == 0 && warp == LIST {
                let counts = [0, 4].map(|word| tile_counts().offset(word).load());
                context.found.keep(&p.route, &p.room, counts);
            }
            cluster::wait();
        }
    }
    // No block may end while another may still send to it.
    cluster::arrive_relaxed();
    cluster::wait();
}

/// Makes the barriers ready. One thread does: those of several would be served one by one, at a fence each.
///
/// # Safety
/// One thread must come here, before anybody uses them.
#[inline(always)]
unsafe fn init_barriers(shrink: &Ring, expand: &Ring, blocks: u32) {
    // SAFETY: the first bytes of shared memory are the barriers'.
    unsafe {
        shrink.init(FILLERS);
        // The warp, and each lane with its copies.
        expand.init(1 + LANES);
        unroll::<2>(|turn| {
            // One thread that expands; and the warps that shrink, unless they send what the barrier counts.
            landed(turn as u32).init(if blocks == 1 { 1 + WORKERS } else { 1 });
            read(turn as u32).init(blocks);
        });
        begun().init(1);
        listed().init(THREADS / LANES);
    }
    mbarrier::publish();
}
