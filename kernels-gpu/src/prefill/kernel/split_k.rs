//! Split-K: h of a pass that several work tiles share, through device memory.
//!
//! A split of K stores its partial sums, then reduces a part of h from those of all splits, in the order of
//! K; where K is not split, it stores h itself. The splits of columns of the same pass read h.
//!
//! A warp deals only with the same warp of other blocks: it has the same pairs, and each of its threads the
//! same places in fragments. So nothing is kept in rows, and a warp reads and writes 16 bytes a thread, side
//! by side.
//!
//! Each word of the workspace is its own ready flag: zero means absent, and [`NOT_ZERO`] stands for a zero.
//! No fence is needed between data and flag, which would wait for all that memory has in flight. The last
//! reader of a word clears it: of sums, the split that reduces them; of h, the last of the work tiles that
//! expand, which a counter tells. Another counter says when sums are worth reading, of which there are too
//! many to ask for again and again.

use super::h::H;
use super::steps::{MAX_FRAGMENTS, each_fragment};
use super::work_tile::{SplitsOfK, WorkTile};
use crate::arch::mma::Element;
use crate::arch::{thread, warp};
use crate::memory::Global;
use crate::params::PrefillParams;
use crate::prefill::WARP_ROWS;
use crate::prefill::config::{Accumulators, Config};
use crate::tile::unroll;

/// Sums of a thread that are stored, and loaded, at a time: its part of an n8 tile.
const CHUNK_SUMS: usize = 4;

/// Words of a warp in 16 bytes a thread.
const WARP_WORDS: u32 = 32 * 4;

/// Splits whose sums are loaded at a time.
const AT_A_TIME: usize = 8;

/// In place of a word of zeros: the same number, or numbers, of which one has the other sign.
const NOT_ZERO: u32 = 1 << 31;

/// A word as it is stored.
#[inline(always)]
fn ready(word: u32) -> u32 {
    if word == 0 { NOT_ZERO } else { word }
}

/// Whether all words are there.
#[inline(always)]
fn are_ready(words: [u32; 4]) -> bool {
    words[0] != 0 && words[1] != 0 && words[2] != 0 && words[3] != 0
}

/// Words of a split's sums of a warp.
const fn split_words<C: Config>() -> u32 {
    2 * C::FRAGMENTS as u32 * WARP_WORDS
}

/// The workspace of one warp, of a pass.
pub(super) struct SplitK {
    /// Where this thread's partial sums begin, of the first split.
    sums: Global<u32>,
    /// Where its fragments of h begin.
    h: Global<u32>,
    /// How many splits have left their sums, or are about to, and then how many have reduced their part.
    reduced: Global<u32>,
    /// How many work tiles have read h.
    read: Global<u32>,
}

impl SplitK {
    /// Of this warp. To be made where it is used, so that it takes no registers elsewhere.
    #[inline(always)]
    pub fn new<C: Config>(p: &PrefillParams, work: &WorkTile) -> Self {
        let me = thread::index_anew();
        let warp = work.pass_number * (C::SHAPE.rows / WARP_ROWS) + me / 32;
        let own = me % 32 * 4;
        SplitK {
            sums: p.sums.at(warp * p.split_k.count * split_words::<C>() + own),
            h: p.fragments.at(warp * C::FRAGMENTS as u32 * WARP_WORDS + own),
            reduced: p.counters.at(2 * warp),
            read: p.counters.at(2 * warp + 1),
        }
    }

    /// Gives the first `columns` columns of h to the work tiles that expand: from this split's sums and those
    /// of the others.
    ///
    /// # Safety
    /// The workspace of `p` must be as its fields say, and the route be written; the whole warp must come
    /// here.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn give<C: Config>(
        &self,
        sums: &C::Accumulators,
        p: &PrefillParams,
        work: &WorkTile,
        columns: u32,
    ) {
        // SAFETY: as the caller promises.
        unsafe {
            let splits = SplitsOfK::new(p).count(p);
            if splits > 1 {
                self.store_sums::<C>(sums, work.split, splits, columns);
                self.reduce::<C>(work.split, splits, columns);
            } else {
                self.store_h::<C>(sums, columns);
            }
        }
    }

    /// Where the thread's chunk `chunk` of split `split` is. That of the next split is [`split_words`] words
    /// further on.
    #[inline(always)]
    fn chunk<C: Config>(&self, split: u32, chunk: u32) -> Global<u32> {
        self.sums.at(split * split_words::<C>()).at(chunk * WARP_WORDS)
    }

    /// Stores a split's sums of the first `columns` columns.
    ///
    /// # Safety
    /// As for [`SplitK::give`].
    #[inline(always)]
    #[track_caller]
    unsafe fn store_sums<C: Config>(&self, sums: &C::Accumulators, split: u32, splits: u32, columns: u32) {
        each_fragment::<C>(|fragment| {
            unroll::<2>(|half| {
                let chunk = 2 * fragment + half;
                let mut words = [0; CHUNK_SUMS];
                unroll::<CHUNK_SUMS>(|i| words[i] = ready(sums.sum(CHUNK_SUMS * chunk + i).to_bits()));
                let to = self.chunk::<C>(split, chunk as u32);
                // SAFETY: as the caller promises.
                unsafe { to.store16_relaxed_if(words, 8 * (chunk as u32) < columns) };
            });
        });
        // SAFETY: as the caller promises.
        unsafe { self.count_split(splits) };
    }

    /// Counts a split more that has stored its sums, or is about to reduce its part.
    ///
    /// # Safety
    /// As for [`SplitK::give`].
    #[inline(always)]
    #[track_caller]
    unsafe fn count_split(&self, splits: u32) {
        // SAFETY: the counter is this warp's, and those of the same pairs.
        unsafe { self.reduced.count_up_if(2 * splits - 1, thread::lane() == 0) };
    }

    /// Adds up this split's part of h, in the order of K, once all sums are there, and stores it.
    ///
    /// # Safety
    /// As for [`SplitK::give`], after [`SplitK::store_sums`].
    #[inline(always)]
    #[track_caller]
    unsafe fn reduce<C: Config>(&self, split: u32, splits: u32, columns: u32) {
        // All threads ask and go on together: a branch that a warp's threads may take apart would hold up its
        // products.
        // SAFETY: as the caller promises.
        while warp::ballot(unsafe { self.reduced.load_relaxed() } < splits) != 0 {}
        // SAFETY: as the caller promises.
        unsafe { self.count_split(splits) };
        let mut chunk = split;
        while 8 * chunk < columns {
            let mut sums = [0f32; CHUNK_SUMS];
            let mut first = 0;
            while first < splits {
                let from = self.chunk::<C>(first, chunk);
                let mut partial = [[0u32; CHUNK_SUMS]; AT_A_TIME];
                let mut all_ready = false;
                while !all_ready {
                    let mut is_ready = true;
                    unroll::<AT_A_TIME>(|i| {
                        let is_one = first + (i as u32) < splits;
                        let from = from.at(i as u32 * split_words::<C>());
                        // SAFETY: the chunk is one of the splits'.
                        partial[i] = unsafe { from.load16_relaxed_if(is_one) };
                        is_ready &= !is_one || are_ready(partial[i]);
                    });
                    all_ready = warp::ballot(!is_ready) == 0;
                }
                unroll::<AT_A_TIME>(|i| {
                    let is_one = first + (i as u32) < splits;
                    let from = from.at(i as u32 * split_words::<C>());
                    // SAFETY: only this warp reads the chunk, and has read it.
                    unsafe { from.store16_relaxed_if([0; 4], is_one) };
                    unroll::<CHUNK_SUMS>(|j| sums[j] += f32::from_bits(partial[i][j]));
                });
                first += AT_A_TIME as u32;
            }
            // Two registers of the fragment of sixteen ranks.
            let h = self.h.at(chunk / 2 * WARP_WORDS + chunk % 2 * 2);
            let words = [C::Element::pack(sums[0], sums[1]), C::Element::pack(sums[2], sums[3])];
            // SAFETY: as the caller promises.
            unsafe { h.store8_relaxed(words.map(ready)) };
            chunk += splits;
        }
    }

    /// Where the fragment of h of sixteen columns is.
    #[inline(always)]
    fn fragment(&self, fragment: usize) -> Global<u32> {
        self.h.at(fragment as u32 * WARP_WORDS)
    }

    /// Stores the first `columns` columns of h, where K is not split.
    ///
    /// # Safety
    /// As for [`SplitK::give`].
    #[inline(always)]
    #[track_caller]
    unsafe fn store_h<C: Config>(&self, sums: &C::Accumulators, columns: u32) {
        each_fragment::<C>(|fragment| {
            let mut words = [0; 4];
            unroll::<4>(|i| {
                let at = 8 * fragment + 2 * i;
                words[i] = ready(C::Element::pack(sums.sum(at), sums.sum(at + 1)));
            });
            // SAFETY: it is one of the pass's.
            unsafe { self.fragment(fragment).store16_relaxed_if(words, 16 * (fragment as u32) < columns) };
        });
    }

    /// The first `columns` columns of h, once all of them are there.
    ///
    /// # Safety
    /// As for [`SplitK::give`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn take<C: Config>(&self, columns: u32) -> H {
        let mut h = [[0; 4]; MAX_FRAGMENTS];
        let mut all_ready = false;
        while !all_ready {
            let mut is_ready = true;
            each_fragment::<C>(|fragment| {
                let is_wanted = 16 * (fragment as u32) < columns;
                // SAFETY: it is one of the pass's.
                h[fragment] = unsafe { self.fragment(fragment).load16_relaxed_if(is_wanted) };
                is_ready &= !is_wanted || are_ready(h[fragment]);
            });
            all_ready = warp::ballot(!is_ready) == 0;
        }
        h
    }

    /// The warp needs [h](SplitK::take) no more: the last work tile that reads it makes it zero again.
    ///
    /// # Safety
    /// As for [`SplitK::give`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn forget<C: Config>(&self, p: &PrefillParams) {
        let last = p.split_n.count - 1;
        // SAFETY: the counter is this warp's, and those of the same pairs.
        let before = unsafe { self.read.count_up_if(last, thread::lane() == 0) };
        if warp::ballot(before == last) != 0 {
            each_fragment::<C>(|fragment| {
                // SAFETY: all others have read it.
                unsafe { self.fragment(fragment).store16_relaxed_if([0; 4], true) };
            });
        }
    }
}
