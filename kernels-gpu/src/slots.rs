//! The adapter slots: which are on, and with which rank.

use crate::memory::Global;
use crate::params::{RouteParams, enabled};

/// The slots as the parameters of a kernel describe them.
#[derive(Clone, Copy)]
pub struct Slots {
    /// `[count]` flags, of the kind that `enabled_kind` names.
    pub adapter_enabled: Global<u8>,
    /// One of [`enabled`].
    pub enabled_kind: u32,
    /// `[count]` ranks in use, or null for `max_rank`.
    pub ranks: Global<u32>,
    /// L.
    pub count: u32,
    /// R.
    pub max_rank: u32,
}

impl Slots {
    /// Those of a call's routing.
    #[inline(always)]
    pub fn of(p: &RouteParams) -> Self {
        let &RouteParams { adapter_enabled, enabled_kind, ranks, slots: count, max_rank, .. } = p;
        Slots { adapter_enabled, enabled_kind, ranks, count, max_rank }
    }

    /// Where a slot's flag and rank are, if it exists.
    #[inline(always)]
    pub fn slot(self, slot: u32) -> Slot {
        let Slots { adapter_enabled, enabled_kind, ranks, count, max_rank } = self;
        let exists = slot < count;
        Slot {
            byte: adapter_enabled.at(slot),
            has_byte: exists & (enabled_kind == enabled::U8),
            word: Global::<u32>::new(adapter_enabled.address()).at(slot),
            has_word: exists & (enabled_kind == enabled::I32),
            rank: ranks.at(slot),
            has_rank: exists & !ranks.is_null(),
            max_rank: if exists { max_rank } else { 0 },
        }
    }

    /// The rank in use of a slot, 0 when it is off or does not exist.
    ///
    /// # Safety
    /// The tensors must be as their fields say.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn rank(self, slot: u32) -> u32 {
        // SAFETY: as the caller promises.
        unsafe { self.slot(slot).load() }.rank()
    }
}

/// Where the flag and the rank of a slot are: found before they may be read.
#[derive(Clone, Copy)]
pub struct Slot {
    byte: Global<u8>,
    has_byte: bool,
    word: Global<u32>,
    has_word: bool,
    rank: Global<u32>,
    has_rank: bool,
    /// R, or 0 of a slot that does not exist.
    max_rank: u32,
}

impl Slot {
    /// Asks for both, side by side.
    ///
    /// # Safety
    /// The tensors of the [`Slots`] must be as their fields say.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> State {
        // SAFETY: as the caller promises; what is loaded exists.
        unsafe {
            State {
                byte: self.byte.load_or(1, self.has_byte),
                word: self.word.load_or(1, self.has_word),
                rank: self.rank.load_or(self.max_rank, self.has_rank),
                max_rank: self.max_rank,
            }
        }
    }
}

/// What was loaded of a slot.
#[derive(Clone, Copy)]
pub struct State {
    byte: u8,
    word: u32,
    rank: u32,
    max_rank: u32,
}

impl State {
    /// The rank in use, 0 of a slot that is off or does not exist.
    #[inline(always)]
    pub fn rank(self) -> u32 {
        // A negative rank is a large unsigned number: it becomes 0, not R.
        let is_on = (self.byte != 0) & (self.word != 0) & (self.rank as i32 > 0);
        if is_on { self.rank.min(self.max_rank) } else { 0 }
    }
}
