//! The adapter slots: which are on, and with which rank.

use crate::memory::Global;
use crate::params::enabled;

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
    /// The rank in use of a slot, 0 when it is off or does not exist.
    ///
    /// # Safety
    /// The tensors must be as their fields say.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn rank(self, slot: u32) -> u32 {
        if slot >= self.count {
            return 0;
        }
        // SAFETY: the slot is one of L.
        unsafe {
            let on = match self.enabled_kind {
                enabled::U8 => self.adapter_enabled.at(slot).load() as u32,
                enabled::I32 => Global::<u32>::new(self.adapter_enabled.address()).at(slot).load(),
                _ => 1,
            };
            let rank = if self.ranks.is_null() { self.max_rank } else { self.ranks.at(slot).load() };
            // A negative rank is a large unsigned number: clamp it to 0, not to R.
            match (on, rank as i32) {
                (0, _) | (_, ..=0) => 0,
                _ => rank.min(self.max_rank),
            }
        }
    }
}
