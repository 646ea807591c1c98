//! Finding and listing segments.

mod in_warp;
mod ranks;
mod scratch;

use super::{LOOK, Room, SWEEP, WARP_PAIRS, counts, places_at};
use crate::arch::shared::Shared;
use crate::arch::{barrier, thread, warp};
use crate::decode::config::{Config, tiles_of};
use crate::decode::{A_LOADER, LANES, THREADS};
use crate::ids::{ExpertId, Ids, bucket, local_expert};
use crate::params::{RouteParams, Tile, count};
use crate::scan::inclusive;
use crate::slots::State;
use crate::tile::unroll;
pub use in_warp::WarpSegments;
use ranks::Ranks;
use scratch::{FREE, Scratch, Sweep};

/// Ids of a line of L2.
const LINE: u32 = 32;
/// Warps that list: all but the A loader.
const LISTERS: u32 = THREADS / LANES - 1;

/// The segments of a call, cut into tiles, in a block's shared memory: all tiles of a call of few pairs,
/// otherwise those of the cluster's work items.
#[derive(Clone, Copy)]
pub struct Segments {
    start: Shared,
}

impl Segments {
    #[inline(always)]
    fn tile_at(&self, room: &Room, number: u32) -> Shared {
        self.start.offset(4 * room.pairs + 8 * number)
    }

    /// Where pair `number` of the list is.
    #[inline(always)]
    pub fn pair_at(&self, number: u32) -> Shared {
        self.start.offset(4 * number)
    }

    /// Those that are, or will be, at `start`.
    #[inline(always)]
    pub fn at(start: Shared) -> Self {
        Segments { start }
    }

    /// Brings a call's ids and ranks into L2. Nothing is read yet: once the launch before has ended, they
    /// come sooner. One warp must come here.
    #[inline(always)]
    pub fn prefetch_ids(p: &RouteParams) {
        let pair = LINE * thread::lane();
        if pair < p.pair_count {
            ExpertId::of(p.topk_ids, p.ids_kind, pair).ask_for();
            p.token_lora.at(p.top_k.quotient(pair)).ask_for();
        }
        if thread::lane() == 0 {
            p.ranks.ask_for();
            p.adapter_enabled.ask_for();
        }
    }

    /// Empties what is in `scratch`. The whole block must come here, and meet before it comes to
    /// [`Segments::find`]; nothing is read that a launch before this one may write.
    ///
    /// # Safety
    /// `scratch` must have room for it.
    #[inline(always)]
    pub unsafe fn prepare(p: &RouteParams, scratch: Shared, room: &Room) {
        let scratch = Scratch::new(p, scratch, room);
        let counts = counts(scratch.places);
        let end = places_at(scratch.places, scratch.buckets.into()) + p.pair_count.next_multiple_of(LOOK);
        let mut word = 4 * thread::index();
        while word < end {
            let empty = if word < counts { 0 } else { FREE };
            // SAFETY: counts, keys and places are multiples of four, and follow one another.
            unsafe { scratch.count(word).store16([empty; 4]) };
            word += 4 * THREADS;
        }
    }

    /// Finds them, cut into tiles, and lists the work items of the cluster, of which `own` says tile and
    /// slice. Those of slice 0 are also left where `route` would have left them, for later calls, if this
    /// block `keeps` them. The whole block must come here, each thread with the ids of the pair of its number
    /// and the state of the slot of its lane's, with the `scratch` and `room` of [`Segments::prepare`], and
    /// meet before it uses the list.
    ///
    /// Returns the numbers of tiles, of active pairs, which come first, and of all. But the A loader, which
    /// lists none, does not know them; to it this returns the tile of the cluster's first work item, whose
    /// pairs are not listed yet, or an empty one.
    ///
    /// # Safety
    /// Every tensor of `p` must be as its field says, and hold no more than there is room for; `start` and
    /// `scratch` must have room for them.
    #[inline(always)]
    pub unsafe fn find<C: Config>(
        self,
        p: &RouteParams,
        (own_ids, own_slot): ([u32; 2], State),
        own: impl Fn(u32) -> [u32; 2],
        keeps: bool,
        scratch: Shared,
        room: &Room,
    ) -> ([u32; 2], Tile) {
        let (scratch, ranks) = (Scratch::new(p, scratch, room), Ranks::new(own_slot));
        // SAFETY: as the caller promises; all pairs are counted before the tiles are listed.
        unsafe {
            count_pairs(p, &scratch, own_ids, ranks);
            if !scratch.is_direct() {
                count_by_hash(p, &scratch);
            }
            self.list_own::<C>(p, &scratch, ranks, own, keeps, room)
        }
    }

    /// Lists the cluster's work items. Every warp goes through all segments, and lists every so many of the
    /// work items. The A loader stops at the first, and lists none.
    ///
    /// # Safety
    /// As for [`Segments::find`]; all pairs must be counted.
    #[inline(always)]
    unsafe fn list_own<C: Config>(
        self,
        p: &RouteParams,
        scratch: &Scratch,
        ranks: Ranks,
        own: impl Fn(u32) -> [u32; 2],
        keeps: bool,
        room: &Room,
    ) -> ([u32; 2], Tile) {
        let lists = thread::warp() != A_LOADER;
        let mut entry = if lists { thread::warp() - (thread::warp() > A_LOADER) as u32 } else { 0 };
        let mut first = Tile::EMPTY;
        // SAFETY: all counts are there.
        let counts = unsafe {
            let inactive = scratch.count(scratch.inactive()).load();
            let mut sweep = Sweep::new::<C>(scratch, 0, 0);
            loop {
                let [number, slice] = own(entry);
                let keeps = keeps && slice == 0;
                while number >= sweep.end >> 16 && sweep.start + SWEEP < scratch.places {
                    sweep = Sweep::new::<C>(scratch, sweep.start + SWEEP, sweep.end);
                }
                let active = sweep.end >> 16;
                let all = active + tiles_of::<C>(inactive);
                if number >= all {
                    break [active, all];
                }
                let [place, count, before] = if number < active {
                    sweep.locate::<C>(number)
                } else {
                    [scratch.inactive(), inactive, sweep.end]
                };
                let bucket = scratch.bucket(place);
                let slot = p.over_experts.quotient(bucket);
                // The tile's pairs among those of the segment.
                let skipped = (number - (before >> 16)) * C::ROWS;
                let tile = Tile {
                    slot,
                    expert: bucket - slot * p.experts,
                    first: (before & 0xffff) + skipped,
                    rows: (count - skipped).min(C::ROWS),
                    rank: ranks.of(p, slot),
                    reserved: [0; 3],
                };
                if !lists {
                    first = tile;
                    break [active, all];
                }
                self.list::<C>(room, scratch, [place, skipped, entry], &tile, |row, pair| {
                    if keeps {
                        p.pairs.at(tile.first + row).store(pair);
                    }
                });
                if keeps && thread::lane() == 0 {
                    p.tiles.at(number).store_tile(tile);
                }
                entry += LISTERS;
            }
        };
        (counts, first)
    }

    /// Lists a tile as work item `entry` of the cluster: of the segment of a place, whose first `skipped`
    /// pairs are in tiles before it. Calls `keep` with each row and pair. The whole warp must come here.
    ///
    /// # Safety
    /// As for [`Segments::find`]; there must be room for the work item.
    #[inline(always)]
    unsafe fn list<C: Config>(
        &self,
        room: &Room,
        scratch: &Scratch,
        [place, skipped, entry]: [u32; 3],
        tile: &Tile,
        keep: impl Fn(u32, u32),
    ) {
        let lane = thread::lane();
        let below = below(lane);
        let mut seen = 0;
        let mut at = 0;
        while seen < skipped + tile.rows {
            // SAFETY: the segment has so many pairs, so the list does not end before.
            let places = unsafe { scratch.place(at + 4 * lane).load16() };
            let mut is_any = false;
            unroll::<4>(|i| is_any |= places[i] == place);
            if warp::ballot(is_any) != 0 {
                let mut lanes = [0; 4];
                let mut position = seen;
                unroll::<4>(|i| {
                    lanes[i] = warp::ballot(places[i] == place);
                    position += (lanes[i] & below).count_ones();
                });
                unroll::<4>(|i| {
                    if places[i] == place {
                        let row = position.wrapping_sub(skipped);
                        if row < tile.rows {
                            let pair = at + 4 * lane + i as u32;
                            // SAFETY: there is room for the work item's pairs.
                            unsafe { self.pair_at(entry * C::ROWS + row).store(pair) };
                            keep(row, pair);
                        }
                        position += 1;
                    }
                    seen += lanes[i].count_ones();
                });
            }
            at += LOOK;
        }
        if lane == 0 {
            // SAFETY: as the caller promises.
            unsafe { self.put_tile(room, entry, &Tile { first: entry * C::ROWS, ..*tile }) };
        }
    }

    /// Lists all tiles of few pairs, and returns the numbers of tiles, of active pairs and of all. The whole
    /// warp must come here.
    ///
    /// # Safety
    /// There must be room for them.
    #[inline(always)]
    pub unsafe fn list_all<C: Config>(self, p: &RouteParams, found: &WarpSegments, room: &Room) -> [u32; 2] {
        let &WarpSegments { bucket, slot, rank, peers, size, before, leads, is_active } = found;
        let pair = thread::lane();
        let through = inclusive(if is_active && before == 0 { size } else { 0 });
        let start_of_active = warp::shuffle(through.wrapping_sub(size), peers.trailing_zeros());
        let (active, all_active) = (leads.count_ones(), warp::shuffle(through, WARP_PAIRS - 1));
        let tiles = active + tiles_of::<C>(p.pair_count - all_active);
        if pair < p.pair_count {
            let rows = (size - before).min(C::ROWS);
            let (number, tile) = if is_active {
                let first = start_of_active + before;
                let expert = bucket - slot * p.experts;
                let number = (leads & below(pair)).count_ones();
                (number, Tile { slot, expert, first, rows, rank, reserved: [0; 3] })
            } else {
                // Of one slot more, expert 0.
                let first = all_active + before;
                let number = active + before / C::ROWS;
                (number, Tile { slot: p.slots, expert: 0, first, rows, rank: 0, reserved: [0; 3] })
            };
            // SAFETY: every pair has a place in the list, and there is room for the tiles.
            unsafe {
                self.pair_at(tile.first).store(pair);
                if before.is_multiple_of(C::ROWS) {
                    self.put_tile(room, number, &tile);
                }
            }
        }
        [active, tiles]
    }

    /// Stores a tile.
    ///
    /// # Safety
    /// There must be room for it.
    #[inline(always)]
    unsafe fn put_tile(&self, room: &Room, number: u32, tile: &Tile) {
        // SAFETY: as the caller promises.
        unsafe {
            self.tile_at(room, number).store(tile.slot << 16 | tile.expert);
            self.tile_at(room, number).offset(4).store(tile.first << 16 | tile.rows << 10 | tile.rank);
        }
    }

    /// Tile `number`.
    ///
    /// # Safety
    /// There must be such a tile.
    #[inline(always)]
    pub unsafe fn tile(&self, room: &Room, number: u32) -> Tile {
        // SAFETY: as the caller promises.
        let [which, what] = unsafe { [0, 4].map(|word| self.tile_at(room, number).offset(word).load()) };
        let (slot, expert) = (which >> 16, which & 0xffff);
        let (first, rows, rank) = (what >> 16, what >> 10 & 63, what & 1023);
        Tile { slot, expert, first, rows, rank, reserved: [0; 3] }
    }

    /// Leaves the numbers of tiles, of active pairs and of all, where `route` would have left them, for later
    /// calls, and all pairs and tiles if all are listed. One warp must come here.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say.
    #[inline(always)]
    pub unsafe fn keep(&self, p: &RouteParams, room: &Room, [active, tiles]: [u32; 2]) {
        let i = thread::lane();
        // SAFETY: there is room for all pairs and tiles, and for two counts.
        unsafe {
            if room.lists_all() && i < p.pair_count {
                p.pairs.at(i).store(self.pair_at(i).load());
            }
            if room.lists_all() && i < tiles {
                p.tiles.at(i).store_tile(self.tile(room, i));
            }
            if i == 0 {
                p.counts.at(count::ACTIVE).store(active);
                p.counts.at(count::ALL).store(tiles);
            }
        }
    }
}

/// Counts each pair at its segment's place. Where places are not buckets' numbers, only enters the segments
/// into the table; [`count_by_hash`] counts. The whole block must come here, and meets.
///
/// # Safety
/// As for [`Segments::find`].
#[inline(always)]
unsafe fn count_pairs(p: &RouteParams, scratch: &Scratch, own_ids: [u32; 2], ranks: Ranks) {
    // The next pair's ids are loaded before a pair is counted.
    let mut next = own_ids;
    each_pair(p.pair_count, |pair, exists| {
        let [slot, global_expert] = next;
        // SAFETY: as the caller promises.
        next = unsafe { Ids::of(p, pair + THREADS, pair + THREADS < p.pair_count).load() };
        // SAFETY: as above.
        let rank = unsafe { ranks.of(p, slot) };
        if exists {
            // SAFETY: as the caller promises.
            unsafe {
                let bucket = bucket(p, slot, local_expert(p, global_expert), rank);
                if scratch.is_direct() {
                    let is_active = bucket < scratch.buckets;
                    scratch.enter(pair, if is_active { bucket } else { scratch.inactive() });
                } else {
                    scratch.place(pair).store(bucket);
                    if bucket < scratch.buckets {
                        scratch.insert(bucket);
                    }
                }
            }
        }
    });
    // Lanes leave the loops above one by one, and `bar.sync` wants whole warps.
    warp::sync();
    barrier::sync();
}

/// Counts each pair at the place that the table gives its bucket. The whole block must come here, and meets.
///
/// # Safety
/// As for [`Segments::find`], after [`count_pairs`].
#[inline(always)]
unsafe fn count_by_hash(p: &RouteParams, scratch: &Scratch) {
    each_pair(p.pair_count, |pair, exists| {
        if exists {
            // SAFETY: this thread stored the bucket; all are in the table.
            unsafe {
                let bucket = scratch.place(pair).load();
                let is_active = bucket < scratch.buckets;
                let place = if is_active { scratch.find(bucket) } else { scratch.inactive() };
                scratch.enter(pair, place);
            }
        }
    });
    warp::sync();
    barrier::sync();
}

/// Calls `body` with this thread's pairs, one after another, and whether they exist: the whole warp comes
/// there as long as any does.
#[inline(always)]
fn each_pair(pair_count: u32, mut body: impl FnMut(u32, bool)) {
    let mut pair = thread::index();
    while pair - thread::lane() < pair_count {
        body(pair, pair < pair_count);
        pair += THREADS;
    }
}

/// The lanes before `lane`.
#[inline(always)]
fn below(lane: u32) -> u32 {
    (1 << lane) - 1
}
