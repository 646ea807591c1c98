//! The ring of stages in shared memory, which the producer fills and the consumers leave, in turns. A stage has two barriers:
//! *full*, which each thread of the producer arrives at once its copies have landed, and *empty*, which each warp of the
//! consumers arrives at once it has read the stage.

use super::steps::PANEL_COLUMNS;
use crate::arch::mbarrier::{self, Mbarrier};
use crate::arch::shared::Shared;
use crate::arch::{bulk, thread, warp};
use crate::prefill::{BARRIERS_BYTES, MAX_STAGES, Shape, WARPGROUP};
use crate::tile::TileShape;
use crate::tile::panel::Panel;

/// A thread's place in the ring: where the next step's stage is, and which phase its barriers are in.
pub(super) struct Ring<const BLOCKS: usize, const SWEEPS: usize> {
    stages: u32,
    stage: u32,
    parity: u32,
}

impl<const BLOCKS: usize, const SWEEPS: usize> Ring<BLOCKS, SWEEPS> {
    /// The block's work.
    pub const SHAPE: Shape = Shape { rows: 16 * SWEEPS as u32, width: 16 * BLOCKS as u32 };

    /// Makes the barriers ready: for all, once they have met the thread that did this.
    ///
    /// # Safety
    /// They must not be in use; `stages` must be at most [`Shape::max_stages`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn init(stages: u32) {
        let mut stage = 0;
        while stage < stages {
            // SAFETY: as the caller promises.
            unsafe {
                Self::full(stage).init(WARPGROUP);
                Self::empty(stage).init(4 * Self::SHAPE.consumers());
            }
            stage += 1;
        }
        for warpgroup in 0..2 {
            // SAFETY: as the caller promises.
            unsafe { Precedence::barrier(warpgroup).init(4) };
        }
    }

    /// Before the first step.
    #[inline(always)]
    pub fn new(stages: u32) -> Self {
        Ring { stages, stage: 0, parity: 0 }
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
    fn stage(&self) -> Shared {
        Shared::base().offset(BARRIERS_BYTES + self.stage * Self::SHAPE.stage_bytes())
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
    pub unsafe fn claim(&self) -> Shared {
        // SAFETY: as the caller promises. Before the first phase has ended the one before it has.
        unsafe { Self::empty(self.stage).wait(self.parity ^ 1) };
        self.stage()
    }

    /// Waits until the step `before` steps before the next has landed, at most as many as there are stages.
    ///
    /// # Safety
    /// As for [`Ring::claim`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn wait_for_landing(&self, before: u32) {
        let (stage, parity) = match self.stage.checked_sub(before) {
            Some(stage) => (stage, self.parity),
            None => (self.stage + self.stages - before, self.parity ^ 1),
        };
        // SAFETY: as the caller promises. Before the first phase has ended the one before it has.
        unsafe { Self::full(stage).wait(parity) };
    }

    /// The stage is full once the copies that this thread has started, and those of the producer's others, have landed.
    ///
    /// # Safety
    /// As for [`Ring::claim`], whose stage it is.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn fill(&mut self) {
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
    pub unsafe fn landed(&self) -> Shared {
        // SAFETY: as the caller promises.
        unsafe { Self::full(self.stage).wait(self.parity) };
        bulk::fence();
        self.stage()
    }

    /// The warp has read the stage.
    ///
    /// # Safety
    /// As for [`Ring::landed`], whose stage it is; products of it must have been waited for. The whole warp must come here.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn leave(&mut self) {
        warp::sync();
        if thread::lane() == 0 {
            // SAFETY: as the caller promises.
            unsafe { Self::empty(self.stage).arrive() };
        }
        self.advance();
    }

    /// Panel `panel` of a stage's x, or old values.
    #[inline(always)]
    pub fn row_panel(stage: Shared, panel: u32) -> Panel {
        Panel::at(stage.offset(panel * Self::SHAPE.rows * TileShape::ROW_BYTES))
    }

    /// Panel `panel` of a stage's `a`, of `columns` rows, after `panels` of x.
    #[inline(always)]
    pub fn a_panel(stage: Shared, panels: u32, columns: u32, panel: u32) -> Panel {
        Panel::at(stage.offset((panels * Self::SHAPE.rows + panel * columns) * TileShape::ROW_BYTES))
    }

    /// The first of a stage's `panels` panels of ranks 64·`group` .. of `b`, which lie one after another, after those of
    /// `out`.
    #[inline(always)]
    pub fn b_panel(stage: Shared, panels: u32, group: u32) -> Panel {
        let rows = panels * (Self::SHAPE.rows + group * PANEL_COLUMNS);
        Panel::at(stage.offset(rows * TileShape::ROW_BYTES))
    }
}

/// Which of two warpgroups starts its products of a step, the first or the second, in turns: so that the products of one run beside what the
/// other does with its sums.
pub(super) struct Precedence {
    warpgroup: u32,
    parity: u32,
}

impl Precedence {
    /// Before the first step, in warpgroup 0 or 1.
    #[inline(always)]
    pub fn new(warpgroup: u32) -> Self {
        // The first need not wait the first time: before the first phase has ended the one before it has.
        Precedence { warpgroup, parity: warpgroup ^ 1 }
    }

    #[inline(always)]
    fn barrier(warpgroup: u32) -> Mbarrier {
        Mbarrier::at(Shared::base().offset((2 * MAX_STAGES + warpgroup) * mbarrier::BYTES))
    }

    /// Waits for this warpgroup's turn.
    ///
    /// # Safety
    /// The barriers must be ready; both warpgroups must come here as often.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn wait(&mut self) {
        // SAFETY: as the caller promises.
        unsafe { Self::barrier(self.warpgroup).wait(self.parity) };
        self.parity ^= 1;
    }

    /// The other's turn: the warp has started its products.
    ///
    /// # Safety
    /// As for [`Precedence::wait`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn pass(&self) {
        if thread::lane() == 0 {
            // SAFETY: as the caller promises.
            unsafe { Self::barrier(self.warpgroup ^ 1).arrive() };
        }
    }
}
