//! The ids of pairs, which nobody has checked, and the buckets that pairs are sorted by.
//!
//! Everything here is branch-free, predicated instructions and selections, so that loads overlap.

use crate::memory::Global;
use crate::params::{RouteParams, expert_ids};

/// Where the expert id of a pair is, if there is one.
#[derive(Clone, Copy)]
pub struct ExpertId {
    /// Its lower half, or all of it.
    low: Global<u32>,
    kind: u32,
}

impl ExpertId {
    /// Of pair `pair` in `topk_ids` of this kind.
    #[inline(always)]
    pub fn of(topk_ids: Global<u32>, kind: u32, pair: u32) -> Self {
        ExpertId { low: topk_ids.at(pair << (kind == expert_ids::I64) as u32), kind }
    }

    /// Brings it into L2: see [`Global::ask_for`].
    #[inline(always)]
    pub fn ask_for(self) {
        self.low.ask_for();
    }

    /// The id: 0 where there are none, a number that does not exist where the pair does not or where the id
    /// is wider than 32 bits.
    ///
    /// # Safety
    /// If the pair exists, there must be such an id.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_if(self, exists: bool) -> u32 {
        let other = if self.kind == expert_ids::NONE { 0 } else { u32::MAX };
        // SAFETY: as the caller promises.
        let [low, high] = unsafe {
            [
                self.low.load_or(other, exists & (self.kind != expert_ids::NONE)),
                self.low.at(1u32).load_or(0, exists & (self.kind == expert_ids::I64)),
            ]
        };
        if high == 0 { low } else { u32::MAX }
    }
}

/// Where the ids of a pair are, if it exists: found before they may be read.
#[derive(Clone, Copy)]
pub struct Ids {
    slot: Global<u32>,
    expert: ExpertId,
    exist: bool,
}

impl Ids {
    /// Of pair `pair`, one of P if it exists.
    #[inline(always)]
    pub fn of(p: &RouteParams, pair: u32, exists: bool) -> Self {
        let expert = ExpertId::of(p.topk_ids, p.ids_kind, pair);
        Ids { slot: p.token_lora.at(p.top_k.quotient(pair)), expert, exist: exists }
    }

    /// Slot and global expert; numbers that do not exist, if the pair does not.
    ///
    /// # Safety
    /// The ids must be as the fields of the call's parameters say.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> [u32; 2] {
        // SAFETY: as the caller promises; the token of an existing pair is one of T.
        unsafe { [self.slot.load_or(u32::MAX, self.exist), self.expert.load_if(self.exist)] }
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
