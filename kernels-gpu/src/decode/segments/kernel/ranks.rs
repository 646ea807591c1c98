//! The slots' ranks, in the registers of a warp.

use crate::arch::warp;
use crate::decode::LANES;
use crate::params::RouteParams;
use crate::slots::{Slots, State};

/// The ranks of the first [`LANES`] slots, a lane each: loaded together with a pair's ids, not after them.
#[derive(Clone, Copy)]
pub struct Ranks {
    own: u32,
}

impl Ranks {
    /// Those of a call, of which this lane has loaded its own slot.
    #[inline(always)]
    pub fn new(own: State) -> Self {
        Ranks { own: own.rank() }
    }

    /// The rank in use of a slot, 0 when it is off or does not exist. The whole warp must come here.
    ///
    /// # Safety
    /// Every tensor of `p` must be as its field says.
    #[inline(always)]
    pub(super) unsafe fn of(self, p: &RouteParams, slot: u32) -> u32 {
        if p.slots <= LANES {
            let rank = warp::shuffle(self.own, slot);
            if slot < LANES { rank } else { 0 }
        } else {
            // SAFETY: as the caller promises.
            unsafe { Slots::of(p).rank(slot) }
        }
    }
}
