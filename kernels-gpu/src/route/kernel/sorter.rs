//! A sorter: a warp, its run of pairs, and what it knows of them.

use super::map::Map;
use super::window::Window;
use crate::arch::{thread, warp};
use crate::ids::{Ids, bucket, local_expert};
use crate::params::RouteParams;
use crate::tile::unroll;

/// Rows that a sorter takes at a time, so that their loads overlap.
const ROWS: usize = crate::route::ROWS as usize;

/// The bucket of a pair that does not exist.
const NONE: u32 = u32::MAX;

/// Up to [`ROWS`] rows of 32 pairs, the first of which is pair `at`: lane i has pair i of each row.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub at: u32,
    pub end: u32,
}

impl Rows {
    /// Whether there is a row `row`: the same for the whole warp.
    #[inline(always)]
    fn has(self, row: usize) -> bool {
        self.at + 32 * (row as u32) < self.end
    }

    /// The rows after these.
    #[inline(always)]
    fn next(self) -> Self {
        Rows { at: self.at + 32 * ROWS as u32, ..self }
    }

    /// This lane's pair of a row.
    #[inline(always)]
    fn pair(self, row: usize) -> Option<u32> {
        let pair = self.at + 32 * row as u32 + thread::lane();
        (pair < self.end).then_some(pair)
    }

    /// Where the ids of their pairs are.
    #[inline(always)]
    pub fn ids(self, p: &RouteParams) -> [Ids; ROWS] {
        core::array::from_fn(|row| {
            let pair = self.pair(row);
            Ids::of(p, pair.unwrap_or(0), pair.is_some())
        })
    }

    /// The buckets of their pairs, given their slots and global experts.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say; the ranks must have been staged.
    #[inline(always)]
    unsafe fn buckets<const WIDE: bool>(
        self,
        p: &RouteParams,
        map: Map,
        ids: [[u32; 2]; ROWS],
    ) -> [u32; ROWS] {
        // SAFETY: as the caller promises.
        let experts = ids.map(|[_, global_expert]| unsafe { local_expert(p, global_expert) });
        let mut found = [NONE; ROWS];
        unroll::<ROWS>(|r| {
            let [slot, _] = ids[r];
            // SAFETY: as the caller promises.
            let bucket = bucket(p, slot, experts[r], unsafe { map.staged_rank::<WIDE>(p, slot) });
            found[r] = if self.pair(r).is_some() { bucket } else { NONE };
        });
        found
    }

    /// Of each row, the lanes whose pairs have this lane's number; numbers are below 2^`bits`. The whole warp
    /// must come here.
    #[inline(always)]
    fn peers(self, numbers: [u32; ROWS], bits: u32) -> [u32; ROWS] {
        let mut peers = [0; ROWS];
        unroll::<ROWS>(|r| {
            if self.has(r) {
                let mut lanes = u32::MAX;
                let mut bit = 0;
                while bit < bits {
                    // Three at a time: their votes overlap.
                    unroll::<3>(|i| {
                        let set = numbers[r] >> (bit + i as u32) & 1 != 0;
                        let votes = warp::ballot(set);
                        lanes &= if set { votes } else { !votes };
                    });
                    bit += 3;
                }
                peers[r] = lanes;
            }
        });
        peers
    }

    /// Keeps the buckets of their pairs for later.
    ///
    /// # Safety
    /// The pairs must be among P.
    #[inline(always)]
    unsafe fn remember(self, p: &RouteParams, found: [u32; ROWS]) {
        unroll::<ROWS>(|r| {
            if let Some(pair) = self.pair(r) {
                // SAFETY: as the caller promises.
                unsafe { p.buckets.at(pair).store(found[r]) };
            }
        });
    }

    /// The buckets of their pairs, which this thread looked up before.
    ///
    /// # Safety
    /// This thread must have stored them.
    #[inline(always)]
    unsafe fn remembered(self, p: &RouteParams) -> [u32; ROWS] {
        let mut found = [NONE; ROWS];
        unroll::<ROWS>(|r| {
            if let Some(pair) = self.pair(r) {
                // SAFETY: as the caller promises.
                found[r] = unsafe { p.buckets.at(pair).load() };
            }
        });
        found
    }

    /// Puts their pairs in their places, row by row: those of one bucket in the order of lanes. The
    /// whole warp must come here.
    ///
    /// # Safety
    /// This warp's counters must hold the positions of its next pairs.
    #[inline(always)]
    unsafe fn place(self, p: &RouteParams, map: Map, numbers: [u32; ROWS], lanes: [u32; ROWS], buckets: u32) {
        let wanted = |r: usize| self.pair(r).filter(|_| numbers[r] < buckets);
        let mut positions = [0; ROWS];
        unroll::<ROWS>(|r| {
            if self.has(r) {
                // The first lane of a bucket takes the positions of all.
                if wanted(r).is_some() && lanes[r].trailing_zeros() == thread::lane() {
                    let counter = map.counter(thread::warp(), numbers[r]);
                    // SAFETY: one of this warp's counters.
                    positions[r] = unsafe { counter.fetch_add(lanes[r].count_ones()) };
                }
                // Rows in order.
                warp::sync();
            }
        });
        unroll::<ROWS>(|r| {
            if self.has(r) {
                let first = warp::shuffle(positions[r], lanes[r].trailing_zeros());
                if let Some(pair) = wanted(r) {
                    let below = (1u32 << thread::lane()) - 1;
                    // SAFETY: each position below P is handed out once.
                    unsafe { p.pairs.at(first + (lanes[r] & below).count_ones()).store(pair) };
                }
            }
        });
    }
}

/// A warp and its run, of which up to [`ROWS`] rows are kept in registers.
pub(super) struct Sorter {
    /// The first rows of its run; all, where it is kept.
    rows: Rows,
    /// Whether the whole run stays in registers.
    is_kept: bool,
    /// Of the rows in registers: the buckets of their pairs.
    found: [u32; ROWS],
    /// … and which lanes have pairs of the same bucket.
    lanes: [u32; ROWS],
}

impl Sorter {
    /// Before it has seen any pair.
    #[inline(always)]
    pub fn new(rows: Rows, is_kept: bool) -> Self {
        Sorter { rows, is_kept, found: [NONE; ROWS], lanes: [0; ROWS] }
    }

    /// Counts its pairs of a window, given the ids of those of its first rows.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say; its counters must be zeros, and the ranks be staged.
    #[inline(always)]
    pub unsafe fn count<const WIDE: bool>(
        &mut self,
        p: &RouteParams,
        map: Map,
        window: &Window,
        first_ids: [[u32; 2]; ROWS],
    ) {
        let (mut rows, mut ids) = (self.rows, first_ids);
        while rows.at < self.rows.end {
            // SAFETY: the pairs are among P, the ranks were staged before a barrier, and what is remembered
            // was stored by this thread.
            unsafe {
                if window.start == 0 {
                    self.found = rows.buckets::<WIDE>(p, map, ids);
                    if !self.is_kept {
                        rows.remember(p, self.found);
                        ids = rows.next().ids(p).map(|ids| ids.load());
                    }
                } else if !self.is_kept {
                    self.found = rows.remembered(p);
                }
            }
            unroll::<ROWS>(|r| {
                let number = window.number(self.found[r]);
                if rows.pair(r).is_some() && number < window.counters {
                    // SAFETY: one of this warp's counters.
                    unsafe { map.counter(thread::warp(), number).fetch_add(1) };
                }
            });
            if self.is_kept {
                break;
            }
            rows = rows.next();
        }
    }

    /// Numbers in a window of the buckets in registers.
    #[inline(always)]
    fn numbers(&self, window: &Window) -> [u32; ROWS] {
        self.found.map(|bucket| window.number(bucket))
    }

    /// Finds out which lanes have pairs of the same bucket, if the run is kept. The whole warp must come
    /// here.
    #[inline(always)]
    pub fn find_peers(&mut self, window: &Window) {
        if self.is_kept {
            self.lanes = self.rows.peers(self.numbers(window), window.bits());
        }
    }

    /// Puts its pairs of a window in their places. The whole warp must come here.
    ///
    /// # Safety
    /// Its counters must hold positions.
    #[inline(always)]
    pub unsafe fn place(&mut self, p: &RouteParams, map: Map, window: &Window) {
        let mut rows = self.rows;
        while rows.at < self.rows.end {
            if !self.is_kept {
                // SAFETY: this thread stored them.
                self.found = unsafe { rows.remembered(p) };
                self.lanes = rows.peers(self.numbers(window), window.bits());
            }
            // SAFETY: the counters are this warp's, and hold positions.
            unsafe { rows.place(p, map, self.numbers(window), self.lanes, window.counters) };
            if self.is_kept {
                break;
            }
            rows = rows.next();
        }
    }
}
