//! Barriers of some of a block's threads (`bar.sync` with a number and a count, PTX ISA 9.7.12.1).

use super::machine::{Id, Machine, execute, suspend};
use super::report::Fault;
use super::thread::State;
use super::warp::LANES;
use std::panic::Location;

/// Barriers of a block.
const BARRIERS: usize = 16;

/// Where a thread waits at each.
const NAMES: [&str; BARRIERS] = [
    "bar.sync",
    "bar.sync 1",
    "bar.sync 2",
    "bar.sync 3",
    "bar.sync 4",
    "bar.sync 5",
    "bar.sync 6",
    "bar.sync 7",
    "bar.sync 8",
    "bar.sync 9",
    "bar.sync 10",
    "bar.sync 11",
    "bar.sync 12",
    "bar.sync 13",
    "bar.sync 14",
    "bar.sync 15",
];

/// A barrier at which somebody waits.
pub(super) struct Named {
    /// Threads that it takes.
    threads: u32,
    /// Those that have come.
    came: Vec<u32>,
}

impl Machine {
    fn sync_some(
        &mut self,
        id: Id,
        number: u32,
        threads: u32,
        at: &'static Location<'static>,
    ) -> Result<(), Fault> {
        self.thread(id).state = State::Waits(NAMES[number as usize], at);
        let barrier = self.block(id).named.entry(number).or_insert(Named { threads, came: Vec::new() });
        if barrier.threads != threads {
            return Err(Fault::BarrierCount { number, threads: [barrier.threads, threads] });
        }
        barrier.came.push(id.thread);
        if barrier.came.len() < threads as usize {
            return Ok(());
        }
        let mut came = self.block(id).named.remove(&number).map(|barrier| barrier.came).unwrap_or_default();
        came.sort_unstable();
        // `barrier.sync.aligned`: whole warps, each at one line.
        let line = |thread: u32| match self.blocks[id.rank as usize].threads[thread as usize].state {
            State::Waits(_, line) => Some(line),
            _ => None,
        };
        let whole_warps = came.chunks(LANES).all(|warp| {
            let first = warp[0] / LANES as u32 * LANES as u32;
            warp.iter().copied().eq(first..first + LANES as u32)
                && warp.iter().all(|&thread| line(thread) == line(first))
        });
        if !whole_warps {
            self.diverged();
            return Ok(());
        }
        self.unite(id.rank, came.iter().copied());
        for thread in came {
            let thread = Id { thread, ..id };
            self.thread(thread).state = State::Ready;
            self.ready.push(thread);
        }
        Ok(())
    }
}

/// `bar.sync` of `threads` threads.
#[track_caller]
pub(crate) fn sync_some(number: u32, threads: u32) {
    let at = Location::caller();
    execute(at, |machine, id| machine.sync_some(id, number, threads, at));
    suspend();
}
