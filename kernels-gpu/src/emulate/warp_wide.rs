//! A warp's lanes meet at an operation: the functions that `arch` calls, and what happens once the last lane
//! is there.

use super::machine::{CLUSTER_WAIT, Id, Machine, execute, running, suspend, with};
use super::report::Fault;
use super::shadow::Kind;
use super::shared::words;
use super::thread::{Rendezvous, State};
use super::warp::{self, LANES, Operation};
use crate::ElementType;
use std::panic::Location;

impl Machine {
    /// Notes that a thread's lane has come to a warp-wide operation. Once the last one is there, carries it
    /// out and wakes the others; until then the thread must wait.
    fn meet(&mut self, id: Id, operation: Operation, at: &'static Location<'static>) -> Result<bool, Fault> {
        let (warp, lane) = (id.thread as usize / LANES, id.thread as usize % LANES);
        let block = self.block(id);
        block.threads[id.thread as usize].state = State::Waits(operation.name(), at);
        let Rendezvous { operations, came } = &mut block.warps[warp];
        operations[lane] = operation;
        *came += 1;
        if *came < LANES {
            return Ok(true);
        }
        *came = 0;
        let operations = *operations;
        let lanes = warp * LANES..(warp + 1) * LANES;
        // `.sync.aligned`: all threads of the warp execute the same instruction.
        let same = block.threads[lanes.clone()].iter().all(|lane| match lane.state {
            State::Waits(name, line) => name == operation.name() && line == at,
            _ => false,
        });
        if !same {
            self.diverged();
            return Ok(true);
        }
        let first = Id { thread: lanes.start as u32, ..id };
        let results = self.compute(first, operation, &operations, at)?;
        for (thread, result) in lanes.zip(results) {
            let thread = Id { thread: thread as u32, ..id };
            let state = self.thread(thread);
            (state.result, state.state) = (result, State::Ready);
            if thread != id {
                self.ready.push(thread);
            }
        }
        Ok(false)
    }

    /// What a warp's operation gives each lane; `first` is the thread of lane 0.
    fn compute(
        &mut self,
        first: Id,
        operation: Operation,
        operations: &[Operation; LANES],
        at: &'static Location<'static>,
    ) -> Result<[[u32; 4]; LANES], Fault> {
        let thread = |lane: usize| Id { thread: first.thread + lane as u32, ..first };
        Ok(match operation {
            Operation::None => [[0; 4]; LANES],
            Operation::Sync => {
                self.unite(first.rank, first.thread..first.thread + LANES as u32);
                [[0; 4]; LANES]
            }
            Operation::ShuffleUp(..) => {
                let operands = operations.map(|operation| match operation {
                    Operation::ShuffleUp(value, distance) => (value, distance),
                    _ => (0, 0),
                });
                warp::shuffle_up(operands).map(|value| [value; 4])
            }
            Operation::Shuffle(..) => {
                let operands = operations.map(|operation| match operation {
                    Operation::Shuffle(value, lane) => (value, lane),
                    _ => (0, 0),
                });
                warp::shuffle(operands).map(|value| [value; 4])
            }
            Operation::Ballot(_) => {
                let votes = operations.map(|operation| matches!(operation, Operation::Ballot(true)));
                [[warp::ballot(votes); 4]; LANES]
            }
            Operation::MatchAny(_) => {
                let values = operations.map(|operation| match operation {
                    Operation::MatchAny(value) => value,
                    _ => 0,
                });
                warp::match_any(values).map(|peers| [peers; 4])
            }
            Operation::LoadMatrices(_) => {
                let mut rows = [[0; 4]; LANES];
                for (lane, operation) in operations.iter().enumerate() {
                    let &Operation::LoadMatrices(address) = operation else { continue };
                    let now = self.now(thread(lane), Kind::Read, at);
                    let range = self.shared(first.rank, address, 16, &now)?;
                    rows[lane] = words(&self.block(first).shared[range]);
                }
                warp::distribute_matrices(rows)
            }
            Operation::Mma(element, _) => {
                let fragments = operations.map(|operation| match operation {
                    Operation::Mma(_, fragments) => fragments,
                    _ => Default::default(),
                });
                warp::mma(element, &fragments).map(|d| d.map(f32::to_bits))
            }
            Operation::ArriveCluster => {
                self.check_cluster()?;
                for lane in 0..LANES {
                    let state = self.thread(thread(lane));
                    if state.arrived != state.waited {
                        return Err(Fault::BarrierOrder);
                    }
                    state.arrived += 1;
                    let release = self.release(thread(lane));
                    self.cluster_gathering.add(&release);
                }
                self.at_cluster_barrier += LANES;
                self.release_cluster();
                [[0; 4]; LANES]
            }
            Operation::WaitCluster => [[0; 4]; LANES],
        })
    }

    /// Refuses what is for clusters in a cooperative launch, whose blocks share no memory.
    pub(super) fn check_cluster(&self) -> Result<(), Fault> {
        if self.blocks.len() as u32 == self.cluster { Ok(()) } else { Err(Fault::NoCluster) }
    }
}

#[track_caller]
fn meet(operation: Operation) -> [u32; 4] {
    let at = Location::caller();
    if execute(at, |machine, id| machine.meet(id, operation, at)) {
        suspend();
    }
    with(|machine| machine.thread(running().0).result)
}

/// `shfl.sync.up`.
#[track_caller]
pub(crate) fn shuffle_up(value: u32, distance: u32) -> u32 {
    meet(Operation::ShuffleUp(value, distance))[0]
}

/// `shfl.sync.idx`.
#[track_caller]
pub(crate) fn shuffle(value: u32, lane: u32) -> u32 {
    meet(Operation::Shuffle(value, lane))[0]
}

/// `bar.warp.sync`.
#[track_caller]
pub(crate) fn sync_warp() {
    meet(Operation::Sync);
}

/// `vote.sync.ballot`.
#[track_caller]
pub(crate) fn ballot(vote: bool) -> u32 {
    meet(Operation::Ballot(vote))[0]
}

/// `match.any.sync`.
#[track_caller]
pub(crate) fn match_any(value: u32) -> u32 {
    meet(Operation::MatchAny(value))[0]
}

/// `ldmatrix.x4`.
#[track_caller]
pub(crate) fn load_matrices(address: u32) -> [u32; 4] {
    meet(Operation::LoadMatrices(address))
}

/// `mma.sync.m16n8k16`.
#[track_caller]
pub(crate) fn mma(element: ElementType, d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
    *d = meet(Operation::Mma(element, (*d, a, b))).map(f32::from_bits);
}

/// `barrier.cluster.arrive.release.aligned`.
#[track_caller]
pub(crate) fn arrive_cluster() {
    meet(Operation::ArriveCluster);
}

/// `barrier.cluster.wait.acquire.aligned`.
#[track_caller]
pub(crate) fn wait_cluster() {
    let at = Location::caller();
    meet(Operation::WaitCluster);
    let waits = execute(at, |machine, id| {
        let passed = machine.cluster_barriers;
        let thread = machine.thread(id);
        if thread.arrived != thread.waited + 1 {
            return Err(Fault::BarrierOrder);
        }
        let waits = thread.arrived > passed;
        if waits {
            thread.state = State::Waits(CLUSTER_WAIT, at);
        }
        Ok(waits)
    });
    if waits {
        suspend();
    }
    execute(at, |machine, id| {
        let thread = machine.thread(id);
        thread.waited += 1;
        thread.passed = thread.passed.max(thread.waited);
        let news = machine.cluster_knowledge.clone();
        machine.acquire(id, &news);
        Ok(())
    });
}
