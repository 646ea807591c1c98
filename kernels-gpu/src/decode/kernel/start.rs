//! The prologue's search: how many tiles and work items there are, which pairs they have, and the A loader's
//! first tile.
//!
//! Segments of many pairs are found by the whole block. Those of few pairs are found by two warps, each on
//! its own: the X loader lists all, and the A loader takes its first tile. Where `route` has found them, the
//! same two warps read what it left.

use super::barriers::{item_count, segments_ready, tile_counts};
use super::context::Context;
use super::work::{ShrinkPart, WorkItem};
use crate::arch::shared::Shared;
use crate::arch::{bulk, grid, thread, warp};
use crate::decode::config::Config;
use crate::decode::segments::{Segments, WarpSegments};
use crate::decode::{A_LOADER, X_LOADER};
use crate::ids::Ids;
use crate::params::{Tile, count};
use crate::slots::{Slot, Slots};

/// What the search begins with. Where ids and ranks are is found before they may be read.
pub(super) struct Search<'c, 'p> {
    context: &'c Context<'p>,
    /// Whether the whole block searches.
    by_block: bool,
    /// Where the block's search keeps what it needs meanwhile.
    scratch: Shared,
    ids: Ids,
    own_slot: Slot,
    /// The cluster's first work item: its number, its tile's, and its slice.
    first: u32,
    first_tile: u32,
    first_slice: u32,
}

/// What the A loader begins with.
pub(super) struct Start {
    /// The cluster's first work item. Its pairs may not be listed yet.
    pub item: WorkItem,
    /// The block's part of it, where that was known early.
    pub part: ShrinkPart,
}

impl<'c, 'p> Search<'c, 'p> {
    /// Does what needs nothing of the launch before this one.
    ///
    /// # Safety
    /// The whole block must come here; the stages, where `scratch` lies, must not be in use yet.
    #[inline(always)]
    pub unsafe fn prepare(context: &'c Context<'p>, scratch: Shared) -> Self {
        let p = context.p;
        let by_block = p.finds != 0 && !p.room.lists_all();
        if by_block {
            // SAFETY: as the caller promises.
            unsafe { Segments::prepare(&p.route, scratch, &p.room) };
        }
        if p.finds != 0 && thread::index_anew() / 32 == X_LOADER {
            Segments::prefetch_ids(&p.route);
        }
        let warp = thread::warp();
        let finds = by_block || p.finds != 0 && (warp == A_LOADER || warp == X_LOADER);
        let pair = if by_block { thread::index() } else { thread::lane() };
        let ids = Ids::of(&p.route, pair, finds && pair < p.route.pair_count);
        let own_slot = Slots::of(&p.route).slot(if finds { thread::lane() } else { u32::MAX });
        let first = context.first_item();
        let [first_tile, first_slice] = p.tile_and_slice(first);
        Search { context, by_block, scratch, ids, own_slot, first, first_tile, first_slice }
    }

    /// Waits for the launch before this one, and searches. Only the A loader may use what it returns.
    ///
    /// # Safety
    /// The whole block must come here, and every tensor of the call be as its field says.
    #[inline(always)]
    pub unsafe fn run<C: Config>(self) -> Start {
        let Search { context, by_block, scratch, ids, own_slot, first, first_tile, first_slice } = self;
        let p = context.p;
        let warp = thread::warp();
        let mut part = ShrinkPart::NONE;
        // What the block's search need not keep meanwhile.
        if !by_block && warp == A_LOADER {
            part = ShrinkPart::new(context, p.route.max_rank);
        }
        grid::wait();
        // SAFETY: as the caller promises.
        let loaded = unsafe { (ids.load(), own_slot.load()) };

        let (mut counts, mut tile) = ([0; 2], Tile::EMPTY);
        // SAFETY: as the caller promises; the stages are not in use yet.
        unsafe {
            if by_block {
                let own = |entry| p.tile_and_slice(first + entry * p.clusters);
                let keeps = context.block == 0;
                (counts, tile) = context.segments.find::<C>(&p.route, loaded, own, keeps, scratch, &p.room);
            } else if warp == A_LOADER || warp == X_LOADER {
                if p.finds != 0 {
                    let found = WarpSegments::find::<C>(&p.route, loaded);
                    if warp == A_LOADER {
                        tile = found.tile::<C>(&p.route, first_tile);
                    } else {
                        counts = context.segments.list_all::<C>(&p.route, &found, &p.room);
                    }
                } else {
                    counts = [count::ACTIVE, count::ALL].map(|count| p.route.counts.at(count).load());
                    if warp == A_LOADER && first < p.work_items(counts) {
                        tile = context.item::<C>(first).tile;
                    }
                }
            }
        }
        // SAFETY: the warp has done its part of the search.
        unsafe { publish(context, by_block, &counts) };
        // SAFETY: as the caller promises.
        Start { item: unsafe { WorkItem::new::<C>(p, tile, first_slice) }, part }
    }
}

/// Ends this warp's part of the search. The X loader also stores how many tiles and work items there are, and
/// lets the next launch start.
///
/// # Safety
/// All warps must come here, once; that which stores the `counts` must know them.
#[inline(always)]
unsafe fn publish(context: &Context<'_>, by_block: bool, counts: &[u32; 2]) {
    if thread::warp() == X_LOADER {
        // Not sooner: while blocks of the next launch arrive, what runs on the multiprocessor stands still.
        grid::launch_dependents();
        if thread::lane() == 0 {
            // SAFETY: the words are nobody else's.
            unsafe {
                item_count().store(context.p.work_items(*counts));
                (0..2).for_each(|i| tile_counts().offset(4 * i).store(counts[i as usize]));
            }
        }
    }
    if by_block {
        // The B loader's copies go where the scratch was.
        bulk::fence();
    }
    warp::sync();
    if thread::lane() == 0 {
        // SAFETY: the barrier is initialised.
        unsafe { segments_ready().arrive() };
    }
}

/// Leaves the segments where `route` would have left them, for later calls. One warp of the launch must come
/// here.
///
/// # Safety
/// The segments must be ready.
#[inline(always)]
pub(super) unsafe fn keep(context: &Context<'_>) {
    let p = context.p;
    // SAFETY: as the caller promises.
    unsafe {
        let counts = [0, 4].map(|word| tile_counts().offset(word).load());
        context.segments.keep(&p.route, &p.room, counts);
    }
}
