//! What blocks that share a pass tell one another: each the sums that its share of K has, then a part of h, added up from all of them; or h itself, where one block has all of K.
//!
//! A warp deals with the same warp of the other blocks alone, which has the same pairs, and the same places of each thread in the
//! fragments: so nothing is in rows, and all of it is read and written 16 bytes a thread, side by side.
//!
//! No fence stands between what is told and that it was, which would wait for all that memory has under way: each word tells itself, as it is
//! zero until it is told ([`NOT_ZERO`] stands for a zero), and who needs it asks until it is there. Who has read it makes it zero again: of sums, the one
//! that adds them up; of h, the last of those that expand, whom a counter tells. Another counter says when sums are worth asking for, which are
//! too many to ask for again and again.

use super::ring::Ring;
use super::turns::Turn;
use crate::arch::mma::Element;
use crate::arch::{thread, warp};
use crate::memory::Global;
use crate::params::PrefillParams;
use crate::prefill::WARP_ROWS;
use crate::tile::unroll;

/// Sums of a thread that are stored, and loaded, at a time: its part of an n8 tile.
const CHUNK_SUMS: usize = 4;

/// Words of a warp in 16 bytes a thread.
const WARP_WORDS: u32 = 32 * 4;

/// Shares whose sums are asked for at a time.
const AT_A_TIME: usize = 8;

/// In place of a word of zeros: the same number, or numbers, of which one has the other sign.
const NOT_ZERO: u32 = 1 << 31;

/// A word as it is told.
#[inline(always)]
fn told(word: u32) -> u32 {
    if word == 0 { NOT_ZERO } else { word }
}

/// Whether all words were told.
#[inline(always)]
fn are_told(words: [u32; 4]) -> bool {
    words[0] != 0 && words[1] != 0 && words[2] != 0 && words[3] != 0
}

/// Words of a share's sums of a warp.
const fn share_words<const BLOCKS: usize>() -> u32 {
    2 * BLOCKS as u32 * WARP_WORDS
}

/// One warp's, of a pass.
pub(super) struct Exchange {
    /// Where this thread's sums begin, of the first share.
    sums: Global<u32>,
    /// Where its fragments of h begin.
    h: Global<u32>,
    /// How many have left sums, or are about to, and then how many have taken them.
    sharing: Global<u32>,
    /// How many have read h.
    reading: Global<u32>,
}

impl Exchange {
    /// Of this warp. To be made where it is used: it is told anew where that is, and takes no registers elsewhere.
    #[inline(always)]
    pub fn new<const BLOCKS: usize, const SWEEPS: usize>(p: &PrefillParams, turn: &Turn) -> Self {
        let shape = Ring::<BLOCKS, SWEEPS>::SHAPE;
        let me = thread::index_anew();
        let warp = turn.number_of_pass * (shape.rows / WARP_ROWS) + me / 32;
        let own = me % 32 * 4;
        Exchange {
            sums: p.sums.at(warp * p.split_k.count * share_words::<BLOCKS>() + own),
            h: p.fragments.at(warp * BLOCKS as u32 * WARP_WORDS + own),
            sharing: p.counters.at(2 * warp),
            reading: p.counters.at(2 * warp + 1),
        }
    }

    /// Where the thread's chunk `chunk` of share `share` is, and of the shares after it as many words further on as [`share_words`].
    #[inline(always)]
    fn chunk<const BLOCKS: usize>(&self, share: u32, chunk: u32) -> Global<u32> {
        self.sums.at(share * share_words::<BLOCKS>()).at(chunk * WARP_WORDS)
    }

    /// Leaves a share's sums, of the first `columns` columns, for the others.
    ///
    /// # Safety
    /// What `p` has for the exchange must be as its fields say; the whole warp must come here.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn leave_sums<const SUMS: usize, const BLOCKS: usize>(
        &self,
        sums: &[f32; SUMS],
        share: u32,
        shares: u32,
        columns: u32,
    ) {
        unroll::<BLOCKS>(|block| {
            unroll::<2>(|half| {
                let chunk = 2 * block + half;
                let mut words = [0; CHUNK_SUMS];
                unroll::<CHUNK_SUMS>(|i| {
                    if let Some(sum) = sums.get(CHUNK_SUMS * chunk + i) {
                        words[i] = told(sum.to_bits());
                    }
                });
                let to = self.chunk::<BLOCKS>(share, chunk as u32);
                // SAFETY: as the caller promises.
                unsafe { to.store16_relaxed_if(words, 8 * (chunk as u32) < columns) };
            });
        });
        // SAFETY: as the caller promises.
        unsafe { self.count_sharing(shares) };
    }

    /// A share more has left its sums, or taken its part of all.
    ///
    /// # Safety
    /// As for [`Exchange::leave_sums`].
    #[inline(always)]
    #[track_caller]
    unsafe fn count_sharing(&self, shares: u32) {
        // SAFETY: the counter is this warp's, and those of the same pairs.
        unsafe { self.sharing.count_up_if(2 * shares - 1, thread::lane() == 0) };
    }

    /// Adds up this share's part of h, in the order of K, once all sums are there.
    ///
    /// # Safety
    /// As for [`Exchange::leave_sums`], which must have been before.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn add_up<E: Element, const BLOCKS: usize>(&self, share: u32, shares: u32, columns: u32) {
        // All ask, and go on together, since a branch that a warp's threads may take apart would hold up its products.
        // SAFETY: as the caller promises.
        while warp::ballot(unsafe { self.sharing.load_relaxed() } < shares) != 0 {}
        // SAFETY: as the caller promises.
        unsafe { self.count_sharing(shares) };
        let mut chunk = share;
        while 8 * chunk < columns {
            let mut sums = [0f32; CHUNK_SUMS];
            let mut first = 0;
            while first < shares {
                let from = self.chunk::<BLOCKS>(first, chunk);
                let mut left = [[0u32; CHUNK_SUMS]; AT_A_TIME];
                let mut are_there = false;
                while !are_there {
                    let mut here = true;
                    unroll::<AT_A_TIME>(|i| {
                        let is_one = first + (i as u32) < shares;
                        // SAFETY: the chunk is one of the shares'.
                        left[i] =
                            unsafe { from.at(i as u32 * share_words::<BLOCKS>()).load16_relaxed_if(is_one) };
                        here &= !is_one || are_told(left[i]);
                    });
                    are_there = warp::ballot(!here) == 0;
                }
                unroll::<AT_A_TIME>(|i| {
                    let is_one = first + (i as u32) < shares;
                    // SAFETY: only this warp reads the chunk, and has read it.
                    unsafe { from.at(i as u32 * share_words::<BLOCKS>()).store16_relaxed_if([0; 4], is_one) };
                    unroll::<CHUNK_SUMS>(|j| sums[j] += f32::from_bits(left[i][j]));
                });
                first += AT_A_TIME as u32;
            }
            // Two registers of the fragment of sixteen ranks.
            let h = self.h.at(chunk / 2 * WARP_WORDS + chunk % 2 * 2);
            let words = [E::pack(sums[0], sums[1]), E::pack(sums[2], sums[3])];
            // SAFETY: as the caller promises.
            unsafe { h.store8_relaxed(words.map(told)) };
            chunk += shares;
        }
    }

    /// Where the fragment of h of sixteen columns is.
    #[inline(always)]
    fn fragment(&self, block: usize) -> Global<u32> {
        self.h.at(block as u32 * WARP_WORDS)
    }

    /// Leaves the first `columns` columns of h, whose sums a block has all.
    ///
    /// # Safety
    /// As for [`Exchange::leave_sums`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn leave_h<E: Element, const SUMS: usize, const BLOCKS: usize>(
        &self,
        sums: &[f32; SUMS],
        columns: u32,
    ) {
        unroll::<BLOCKS>(|block| {
            let mut words = [0; 4];
            unroll::<4>(|i| {
                let at = 8 * block + 2 * i;
                if at < SUMS {
                    words[i] = told(E::pack(sums[at], sums[at + 1]));
                }
            });
            // SAFETY: it is one of the pass's.
            unsafe { self.fragment(block).store16_relaxed_if(words, 16 * (block as u32) < columns) };
        });
    }

    /// The fragments of h of the first `columns` columns, once all of them are there.
    ///
    /// # Safety
    /// As for [`Exchange::leave_sums`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn h<const BLOCKS: usize>(&self, columns: u32) -> [[u32; 4]; BLOCKS] {
        let mut h = [[0; 4]; BLOCKS];
        let mut are_there = false;
        while !are_there {
            let mut here = true;
            unroll::<BLOCKS>(|block| {
                let is_wanted = 16 * (block as u32) < columns;
                // SAFETY: it is one of the pass's.
                h[block] = unsafe { self.fragment(block).load16_relaxed_if(is_wanted) };
                here &= !is_wanted || are_told(h[block]);
            });
            are_there = warp::ballot(!here) == 0;
        }
        h
    }

    /// The warp needs [h](Exchange::h) no more: the last one makes it zero again.
    ///
    /// # Safety
    /// As for [`Exchange::leave_sums`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn forget_h<const BLOCKS: usize>(&self, p: &PrefillParams) {
        let last = p.split_n.count - 1;
        // SAFETY: the counter is this warp's, and those of the same pairs.
        let before = unsafe { self.reading.count_up_if(last, thread::lane() == 0) };
        if warp::ballot(before == last) != 0 {
            unroll::<BLOCKS>(|block| {
                // SAFETY: all others have read it.
                unsafe { self.fragment(block).store16_relaxed_if([0; 4], true) };
            });
        }
    }
}
