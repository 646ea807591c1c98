//! The pipeline between the producer and the consumers, and the order of the consumers.

use super::steps::PANEL_COLUMNS;
use crate::arch::mbarrier::{self, Mbarrier};
use crate::arch::shared::Shared;
use crate::arch::{bulk, thread, warp};
use crate::prefill::config::Config;
use crate::prefill::{HEAD_BYTES, MAX_STAGES, WARPGROUP};
use crate::tile::TileShape;
use crate::tile::panel::Panel;
use core::marker::PhantomData;

/// A thread's place in the circular buffer of stages: the stage of the next step, and the phase of its
/// barriers. A stage has two barriers: *full*, which each thread of the producer arrives at once its copies
/// have landed, and *empty*, which each warp of the consumers arrives at once it has read the stage.
pub(super) struct Pipeline<C> {
    stages: u32,
    stage: u32,
    parity: u32,
    config: PhantomData<C>,
}

impl<C: Config> Pipeline<C> {
    /// Makes the barriers ready: for all, once they have met the thread that did this.
    ///
    /// # Safety
    /// They must not be in use; `stages` must be at most
    /// [`Shape::max_stages`](crate::prefill::Shape::max_stages).
    #[inline(always)]
    #[track_caller]
    pub unsafe fn init(stages: u32) {
        let mut stage = 0;
        while stage < stages {
            // SAFETY: as the caller promises.
            unsafe {
                Self::full(stage).init(WARPGROUP);
                Self::empty(stage).init(4 * C::SHAPE.consumers());
            }
            stage += 1;
        }
    }

    /// Before the first step.
    #[inline(always)]
    pub fn new(stages: u32) -> Self {
        Pipeline { stages, stage: 0, parity: 0, config: PhantomData }
    }

    #[inline(always)]
    fn full(stage: u32) -> Mbarrier {
        Mbarrier::at(Shared::base().offset(stage * mbarrier::BYTES))
    }

    #[inline(always)]
    fn empty(stage: u32) -> Mbarrier {
        Mbarrier::at(Shared::base().offset((MAX_STAGES + stage) * mbarrier::BYTES))
    }

    #[inline(always)]
    fn stage(&self) -> Stage<C> {
        let start = Shared::base().offset(HEAD_BYTES + self.stage * C::SHAPE.stage_bytes());
        Stage { start, config: PhantomData }
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.stage += 1;
        if self.stage == self.stages {
            (self.stage, self.parity) = (0, self.parity ^ 1);
        }
    }

    /// Waits until the next step's stage is empty.
    ///
    /// # Safety
    /// The barriers must be ready; the thread must be one of the producer's.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn producer_acquire(&self) -> Stage<C> {
        // SAFETY: as the caller promises. Before the first phase has ended the one before it has.
        unsafe { Self::empty(self.stage).wait(self.parity ^ 1) };
        self.stage()
    }

    /// Waits until the step `before` steps before the next has landed; `before` is at most the number of
    /// stages.
    ///
    /// # Safety
    /// As for [`Pipeline::producer_acquire`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn producer_wait(&self, before: u32) {
        let (stage, parity) = match self.stage.checked_sub(before) {
            Some(stage) => (stage, self.parity),
            None => (self.stage + self.stages - before, self.parity ^ 1),
        };
        // SAFETY: as the caller promises. Before the first phase has ended the one before it has.
        unsafe { Self::full(stage).wait(parity) };
    }

    /// The stage is full once the copies that this thread has started, and those of the producer's others,
    /// have landed.
    ///
    /// # Safety
    /// As for [`Pipeline::producer_acquire`], whose stage it is.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn producer_commit(&mut self) {
        // SAFETY: as the caller promises.
        unsafe { Self::full(self.stage).arrive_after_copies() };
        self.advance();
    }

    /// Waits until the next step's stage is full, and shows it to the tensor cores.
    ///
    /// # Safety
    /// The barriers must be ready; the thread must be one of a consumer's.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn consumer_wait(&self) -> Stage<C> {
        // SAFETY: as the caller promises.
        unsafe { Self::full(self.stage).wait(self.parity) };
        bulk::fence();
        self.stage()
    }

    /// The warp has read the stage.
    ///
    /// # Safety
    /// As for [`Pipeline::consumer_wait`], whose stage it is; its products must have been waited for. The
    /// whole warp must come here.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn consumer_release(&mut self) {
        warp::sync();
        if thread::lane() == 0 {
            // SAFETY: as the caller promises.
            unsafe { Self::empty(self.stage).arrive() };
        }
        self.advance();
    }
}

/// A stage in shared memory: panels of 128-byte rows, as the kernel's map says.
pub(super) struct Stage<C> {
    start: Shared,
    config: PhantomData<C>,
}

impl<C: Config> Stage<C> {
    /// Panel `panel` of x, or of old values.
    #[inline(always)]
    pub fn row_panel(&self, panel: u32) -> Panel {
        Panel::at(self.start.offset(panel * C::SHAPE.rows * TileShape::ROW_BYTES))
    }

    /// Panel `panel` of `a`, of `columns` rows, after `panels` of x.
    #[inline(always)]
    pub fn a_panel(&self, panels: u32, columns: u32, panel: u32) -> Panel {
        Panel::at(self.start.offset((panels * C::SHAPE.rows + panel * columns) * TileShape::ROW_BYTES))
    }

    /// The first of `panels` panels of ranks 64·`group` .. of `b`. They lie one after another, after those of
    /// `out`.
    #[inline(always)]
    pub fn b_panel(&self, panels: u32, group: u32) -> Panel {
        let rows = panels * (C::SHAPE.rows + group * PANEL_COLUMNS);
        Panel::at(self.start.offset(rows * TileShape::ROW_BYTES))
    }
}

/// Ping-pong order of two consumers: they start the products of their steps in turn, so that one's run while
/// the other stores its sums. A single consumer never waits.
pub(super) struct PingPong<C> {
    warpgroup: u32,
    parity: u32,
    config: PhantomData<C>,
}

impl<C: Config> PingPong<C> {
    const IS_ORDERED: bool = C::SHAPE.consumers() == 2;

    /// Makes the barriers ready: for all, once they have met the thread that did this.
    ///
    /// # Safety
    /// They must not be in use.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn init() {
        for warpgroup in 0..2 {
            // SAFETY: as the caller promises.
            unsafe { Self::barrier(warpgroup).init(4) };
        }
    }

    /// Before the first step.
    #[inline(always)]
    pub fn new() -> Self {
        let warpgroup = thread::index() / WARPGROUP;
        // The first need not wait the first time: before the first phase has ended the one before it has.
        PingPong { warpgroup, parity: warpgroup ^ 1, config: PhantomData }
    }

    #[inline(always)]
    fn barrier(warpgroup: u32) -> Mbarrier {
        Mbarrier::at(Shared::base().offset((2 * MAX_STAGES + warpgroup) * mbarrier::BYTES))
    }

    /// Waits until the other consumer has started its products.
    ///
    /// # Safety
    /// The barriers must be ready; both consumers must come here as often.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn wait(&mut self) {
        if Self::IS_ORDERED {
            // SAFETY: as the caller promises.
            unsafe { Self::barrier(self.warpgroup).wait(self.parity) };
            self.parity ^= 1;
        }
    }

    /// The warp has started its products.
    ///
    /// # Safety
    /// As for [`PingPong::wait`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn arrive(&self) {
        if Self::IS_ORDERED && thread::lane() == 0 {
            // SAFETY: as the caller promises.
            unsafe { Self::barrier(self.warpgroup ^ 1).arrive() };
        }
    }
}
