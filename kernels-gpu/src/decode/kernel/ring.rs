//! A ring of stages in shared memory, which one or two warps fill and the warps of a role work on, in turns.

use super::barriers::mbarrier;
use crate::arch::mbarrier::Mbarrier;
use crate::arch::shared::Shared;
use crate::arch::{thread, warp};
use crate::decode::{MAX_STAGES, WORKERS};

/// A ring of stages, and where in it a warp is: each warp keeps that for itself.
#[derive(Clone, Copy)]
pub(super) struct Ring {
    pub start: Shared,
    pub stages: u32,
    pub stage_bytes: u32,
    /// Number of the first of its barriers: a stage's *full* ends when the warps that fill it have come, and all
    /// that they asked for has; its *empty* when all warps that work on it have left it.
    pub barriers: u32,
    pub stage: u32,
    /// Parity of the phase of the stage's barriers.
    pub parity: u32,
}

impl Ring {
    /// Makes the barriers ready, for `arrivals` arrivals at a full stage.
    ///
    /// # Safety
    /// As for [`init_barriers`](super::init_barriers).
    #[inline(always)]
    pub unsafe fn init(&self, arrivals: u32) {
        let mut stage = 0;
        while stage < self.stages {
            // SAFETY: as the caller promises.
            unsafe {
                self.full(stage).init(arrivals);
                self.empty(stage).init(WORKERS);
            }
            stage += 1;
        }
    }

    #[inline(always)]
    pub fn full(&self, stage: u32) -> Mbarrier {
        mbarrier(self.barriers + stage)
    }

    #[inline(always)]
    pub fn empty(&self, stage: u32) -> Mbarrier {
        mbarrier(self.barriers + MAX_STAGES + stage)
    }

    #[inline(always)]
    pub fn step(&mut self) {
        self.stage += 1;
        if self.stage == self.stages {
            self.stage = 0;
            self.parity ^= 1;
        }
    }

    /// Waits until the next stage is empty. Returns it, and the barrier that counts what comes.
    ///
    /// # Safety
    /// The whole warp must come here, and then to [`announce`].
    #[inline(always)]
    pub unsafe fn claim(&mut self) -> (Shared, Mbarrier) {
        let full = self.full(self.stage);
        let stage = self.start.offset(self.stage * self.stage_bytes);
        // SAFETY: the barrier is initialised.
        unsafe { self.empty(self.stage).wait(self.parity ^ 1) };
        self.step();
        (stage, full)
    }

    /// Waits for the next stage.
    ///
    /// # Safety
    /// The whole warp must come here, and then to [`Ring::leave`].
    #[inline(always)]
    pub unsafe fn enter(&self) -> Shared {
        // SAFETY: the barrier is initialised.
        unsafe { self.full(self.stage).wait(self.parity) };
        self.start.offset(self.stage * self.stage_bytes)
    }

    /// Gives the stage back.
    ///
    /// # Safety
    /// As for [`Ring::enter`].
    #[inline(always)]
    pub unsafe fn leave(&mut self) {
        warp::sync();
        if thread::lane() == 0 {
            // SAFETY: the barrier is initialised.
            unsafe { self.empty(self.stage).arrive() };
        }
        self.step();
    }
}

/// Comes to a claimed stage's barrier for this warp, whose bulk copies of `bytes` bytes follow.
///
/// # Safety
/// The whole warp must come here, once for each stage, and then start copies of so many bytes.
#[inline(always)]
pub(super) unsafe fn announce(full: Mbarrier, bytes: u32) {
    if thread::lane() == 0 {
        // SAFETY: the barrier is initialised.
        unsafe { full.arrive_expecting(bytes) };
    }
    warp::sync();
}
