//! Ids and ranks in device memory, read once.

use super::LANES;
use crate::arch::{thread, warp};
use crate::memory::Global;
use crate::params::RouteParams;
use crate::route::slot_rank;

/// Where the ids of a pair are, if it exists: found before they may be read.
#[derive(Clone, Copy)]
pub struct Ids {
    slot: Global<u32>,
    expert: Global<u32>,
}

impl Ids {
    /// Of pair `pair`.
    #[inline(always)]
    pub fn of(p: &RouteParams, pair: u32) -> Self {
        if pair < p.pair_count {
            Ids { slot: p.token_lora.at(p.top_k.quotient(pair)), expert: p.topk_ids.at(pair) }
        } else {
            Ids { slot: Global::NULL, expert: Global::NULL }
        }
    }

    /// Slot and global expert; numbers that do not exist, if the pair does not.
    ///
    /// # Safety
    /// The ids must be as the fields of the call's parameters say.
    #[inline(always)]
    pub(super) unsafe fn load(self) -> [u32; 2] {
        if self.expert.is_null() {
            [u32::MAX; 2]
        } else {
            // SAFETY: as the caller promises.
            unsafe { [self.slot.load(), self.expert.load()] }
        }
    }
}

/// The slots' ranks, a lane each of the first [`LANES`]: asked for together with a pair's ids, and not after them.
#[derive(Clone, Copy)]
pub(super) struct Ranks {
    own: u32,
}

impl Ranks {
    /// Of the slots of `p`.
    ///
    /// # Safety
    /// Every tensor of `p` must be as its field says.
    #[inline(always)]
    pub(super) unsafe fn new(p: &RouteParams) -> Self {
        // SAFETY: as the caller promises.
        Ranks { own: unsafe { slot_rank(p, thread::lane()) } }
    }

    /// The rank in use of a slot, 0 when it is off or does not exist. The whole warp must come here.
    ///
    /// # Safety
    /// As for [`Ranks::new`].
    #[inline(always)]
    pub(super) unsafe fn of(self, p: &RouteParams, slot: u32) -> u32 {
        if p.slots <= LANES {
            let rank = warp::shuffle(self.own, slot);
            if slot < LANES { rank } else { 0 }
        } else {
            // SAFETY: as the caller promises.
            unsafe { slot_rank(p, slot) }
        }
    }
}
