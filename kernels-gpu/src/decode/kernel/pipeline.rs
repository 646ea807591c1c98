//! A pipeline of stages in shared memory: producer warps fill them, consumer warps multiply them.

use super::barriers::mbarrier;
use crate::arch::mbarrier::Mbarrier;
use crate::arch::shared::Shared;
use crate::arch::{thread, warp};
use crate::decode::{CONSUMER_WARPS, MAX_STAGES};

/// A circular buffer of stages, each with a *full* and an *empty* barrier, and where in it a warp is: each
/// warp keeps that for itself.
#[derive(Clone, Copy)]
pub(super) struct Pipeline {
    pub start: Shared,
    pub stages: u32,
    pub stage_bytes: u32,
    /// Number of the first of its barriers. A stage's *full* ends when its producers have arrived and all
    /// bytes that they expect have come; its *empty* when all its consumers have released it.
    pub barriers: u32,
    pub stage: u32,
    /// Parity of the phase of the stage's barriers.
    pub parity: u32,
}

impl Pipeline {
    /// Makes the barriers ready, for `arrivals` arrivals at a full stage.
    ///
    /// # Safety
    /// As for [`init`](super::barriers::init).
    #[inline(always)]
    pub unsafe fn init(&self, arrivals: u32) {
        let mut stage = 0;
        while stage < self.stages {
            // SAFETY: as the caller promises.
            unsafe {
                self.full(stage).init(arrivals);
                self.empty(stage).init(CONSUMER_WARPS);
            }
            stage += 1;
        }
    }

    #[inline(always)]
    fn full(&self, stage: u32) -> Mbarrier {
        mbarrier(self.barriers + stage)
    }

    #[inline(always)]
    fn empty(&self, stage: u32) -> Mbarrier {
        mbarrier(self.barriers + MAX_STAGES + stage)
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.stage += 1;
        if self.stage == self.stages {
            self.stage = 0;
            self.parity ^= 1;
        }
    }

    /// A producer waits until the next stage is empty. Returns it, and its full barrier.
    ///
    /// # Safety
    /// The whole warp must come here, and then to [`expect_bytes`].
    #[inline(always)]
    pub unsafe fn acquire(&mut self) -> (Shared, Mbarrier) {
        let full = self.full(self.stage);
        let stage = self.start.offset(self.stage * self.stage_bytes);
        // SAFETY: the barrier is initialised.
        unsafe { self.empty(self.stage).wait(self.parity ^ 1) };
        self.advance();
        (stage, full)
    }

    /// A consumer waits until the next stage is full.
    ///
    /// # Safety
    /// The whole warp must come here, and then to [`Pipeline::release`].
    #[inline(always)]
    pub unsafe fn wait(&self) -> Shared {
        // SAFETY: the barrier is initialised.
        unsafe { self.full(self.stage).wait(self.parity) };
        self.start.offset(self.stage * self.stage_bytes)
    }

    /// A consumer gives the stage back.
    ///
    /// # Safety
    /// As for [`Pipeline::wait`].
    #[inline(always)]
    pub unsafe fn release(&mut self) {
        warp::sync();
        if thread::lane() == 0 {
            // SAFETY: the barrier is initialised.
            unsafe { self.empty(self.stage).arrive() };
        }
        self.advance();
    }
}

/// Arrives at an acquired stage's full barrier for this warp, whose bulk copies of `bytes` bytes follow.
///
/// # Safety
/// The whole warp must come here, once for each stage, and then start copies of so many bytes.
#[inline(always)]
pub(super) unsafe fn expect_bytes(full: Mbarrier, bytes: u32) {
    if thread::lane() == 0 {
        // SAFETY: the barrier is initialised.
        unsafe { full.arrive_expecting(bytes) };
    }
    warp::sync();
}
