//! The ids of pairs, which nobody has checked, and the buckets that pairs are sorted by.
//!
//! Everything here is branch-free, predicated instructions and selections, so that loads overlap.

use crate::memory::Global;
use crate::params::RouteParams;

/// Where the ids of a pair are, if it exists: found before they may be read.
#[derive(Clone, Copy)]
pub struct Ids {
    slot: Global<u32>,
    expert: Global<u32>,
    exist: bool,
}

impl Ids {
    /// Of pair `pair`, one of P if it exists.
    #[inline(always)]
    pub fn of(p: &RouteParams, pair: u32, exists: bool) -> Self {
        Ids { slot: p.token_lora.at(p.top_k.quotient(pair)), expert: p.topk_ids.at(pair), exist: exists }
    }

    /// Slot and global expert; numbers that do not exist, if the pair does not.
    ///
    /// # Safety
    /// The ids must be as the fields of the call's parameters say.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> [u32; 2] {
        // SAFETY: as the caller promises; the token of an existing pair is one of T.
        unsafe { [self.slot.load_or(u32::MAX, self.exist), self.expert.load_or(u32::MAX, self.exist)] }
    }
}

/// The local expert of a global one, a number that does not exist if it has none. One unsigned comparison
/// catches −1 and everything else that is out of range.
///
/// # Safety
/// The tensors of `p` must be as their fields say.
#[inline(always)]
#[track_caller]
pub unsafe fn local_expert(p: &RouteParams, global_expert: u32) -> u32 {
    let exists = global_expert < p.global_experts;
    // SAFETY: as the caller promises; the expert is one of `global_experts`.
    let local =
        unsafe { p.expert_map.at(global_expert).load_or(global_expert, exists & !p.expert_map.is_null()) };
    if exists { local } else { u32::MAX }
}

/// The bucket of a pair, given its slot, its local expert, and the slot's rank, 0 of one that does not exist.
#[inline(always)]
pub fn bucket(p: &RouteParams, slot: u32, expert: u32, rank: u32) -> u32 {
    if (expert < p.experts) & (rank > 0) { slot * p.experts + expert } else { p.slots * p.experts }
}
