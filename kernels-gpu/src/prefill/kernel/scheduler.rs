//! The dynamic tile scheduler of the persistent blocks: which work tile a block takes next.

use super::work_tile::{WorkTile, count};
use crate::arch::mbarrier::{self, Mbarrier};
use crate::arch::shared::Shared;
use crate::arch::{thread, warp};
use crate::params::PrefillParams;
use crate::prefill::{BARRIERS_BYTES, Shape, WARPGROUP};

/// Stages of the scheduler's pipeline: one is written while the other is read.
const STAGES: u32 = 2;

/// In place of a number past the last work tile's.
const NO_WORK: u32 = u32::MAX;

/// Where the pipeline lies: in what the barriers of the stages leave.
const OFFSET: u32 = BARRIERS_BYTES / 2;

/// A thread's place among the block's work tiles. The first is the one of the block's number in the grid.
/// Each further one comes from a counter in device memory once the block has room for it, so that blocks with
/// small tiles take more.
///
/// The producer's first thread [fetches](TileScheduler::fetch_next) the numbers and hands them to the block
/// through a pipeline of [`STAGES`] words, each with a *full* and an *empty* barrier.
///
/// The counter is fetched from once for each work tile of the launch, and wraps around: it ends where it
/// began.
pub(super) struct TileScheduler {
    shape: Shape,
    /// Work tiles taken so far.
    taken: u32,
}

impl TileScheduler {
    /// Makes the barriers ready: for all, once they have met the thread that did this.
    ///
    /// # Safety
    /// They must not be in use.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn init(shape: Shape) {
        for stage in 0..STAGES {
            // SAFETY: as the caller promises.
            unsafe {
                Self::full(stage).init(1);
                Self::empty(stage).init(shape.threads() / 32);
            }
        }
    }

    /// Before the first work tile.
    #[inline(always)]
    pub fn new(shape: Shape) -> Self {
        TileScheduler { shape, taken: 0 }
    }

    #[inline(always)]
    fn full(stage: u32) -> Mbarrier {
        Mbarrier::at(Shared::base().offset(OFFSET + stage * mbarrier::BYTES))
    }

    #[inline(always)]
    fn empty(stage: u32) -> Mbarrier {
        Mbarrier::at(Shared::base().offset(OFFSET + (STAGES + stage) * mbarrier::BYTES))
    }

    #[inline(always)]
    fn number(stage: u32) -> Shared {
        Shared::base().offset(OFFSET + 2 * STAGES * mbarrier::BYTES + stage * 4)
    }

    /// The stage of the work tile after those that were taken, and its phase.
    #[inline(always)]
    fn stage(&self) -> (u32, u32) {
        let fetched = self.taken - 1;
        (fetched % STAGES, fetched / STAGES % 2)
    }

    /// Goes on to the next work tile that has something to do; one of no pairs when there is none. The
    /// producer, who says `FETCHES`, must [fetch](TileScheduler::fetch_next) before it comes here again.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say, the route be written, and the barriers be ready; the
    /// whole warp must come here.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn get_current<const FETCHES: bool>(&mut self, p: &PrefillParams) -> WorkTile {
        let mut work = WorkTile::NONE;
        loop {
            // SAFETY: as the caller promises.
            let number = unsafe { if self.taken == 0 { Self::first(p) } else { self.consume() } };
            self.taken += 1;
            if number == NO_WORK {
                break;
            }
            // SAFETY: as the caller promises; the number is below the launch's.
            work = unsafe { WorkTile::number(p, self.shape, number) };
            if work.tile.rows > 0 {
                break;
            }
            if FETCHES {
                // SAFETY: as the caller promises.
                unsafe { self.fetch_next(p) };
            }
        }
        work
    }

    /// The number of the block's first work tile.
    ///
    /// # Safety
    /// The route must be written.
    #[inline(always)]
    unsafe fn first(p: &PrefillParams) -> u32 {
        // SAFETY: as the caller promises.
        if thread::block() < unsafe { count(p) } { thread::block() } else { NO_WORK }
    }

    /// The number that the producer fetched.
    ///
    /// # Safety
    /// As for [`TileScheduler::get_current`].
    #[inline(always)]
    #[track_caller]
    unsafe fn consume(&self) -> u32 {
        let (stage, parity) = self.stage();
        // SAFETY: as the caller promises; the number was written before the barrier was arrived at.
        unsafe {
            Self::full(stage).wait(parity);
            let number = Self::number(stage).load();
            warp::sync();
            if thread::index_anew().is_multiple_of(32) {
                Self::empty(stage).arrive();
            }
            number
        }
    }

    /// Fetches the number of the work tile after the current one and hands it to the block. The producer
    /// waits for a read of device memory meanwhile: the place for this is where the stages are full.
    ///
    /// # Safety
    /// As for [`TileScheduler::get_current`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn fetch_next(&self, p: &PrefillParams) {
        if thread::index_anew().is_multiple_of(WARPGROUP) {
            let (stage, parity) = self.stage();
            // SAFETY: as the caller promises; the stage is empty when it is written.
            unsafe {
                let count = count(p);
                let number = p.blocks + p.scheduler.count_up(count - 1);
                Self::empty(stage).wait(parity ^ 1);
                Self::number(stage).store(if number < count { number } else { NO_WORK });
                Self::full(stage).arrive();
            }
        }
    }
}
