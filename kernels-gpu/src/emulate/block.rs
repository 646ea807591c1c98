//! One block of the cluster that runs: its shared memory, its threads, and where they are.

use super::mbarrier::Mbarrier;
use super::named::Named;
use super::order::{Knowledge, Place};
use super::shadow::{Now, Shadow, Touch};
use super::thread::{Rendezvous, State, Thread};
use super::warp::{LANES, Operation};
use super::warpgroup::{self, Warpgroup};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// A block.
pub(super) struct Block {
    /// Number of the block in the grid.
    pub number: u32,
    pub shared: Vec<u8>,
    pub shadow: Shadow,
    /// Barriers that the block has passed.
    pub epoch: u32,
    pub threads: Vec<Thread>,
    pub warps: Vec<Rendezvous>,
    /// Of whole warpgroups: none in blocks of less than four warps.
    pub warpgroups: Vec<Warpgroup>,
    /// Threads that wait at the block's barrier.
    pub at_barrier: usize,
    /// Threads that have ended.
    pub ended: usize,
    /// The last access to this block's memory by each thread of another, by block and thread.
    pub visitors: BTreeMap<u32, Vec<Option<Touch>>>,
    /// By their first bytes.
    pub mbarriers: BTreeMap<usize, Mbarrier>,
    /// Barriers of some threads at which somebody waits, by their numbers.
    pub named: BTreeMap<u32, Named>,
    /// Whether all threads that let the next launch start had waited for the one before; `None`: nobody did.
    pub launch_dependents: Option<bool>,
}

impl Block {
    /// Block `number`, of `threads` threads, none of which has run. `shared` and its `shadow` may have been
    /// another's.
    pub fn new(number: u32, threads: u32, shared: Vec<u8>, mut shadow: Shadow) -> Self {
        shadow.clear();
        let known: Rc<Knowledge> = Rc::default();
        let thread = || Thread {
            state: State::Ready,
            arrived: 0,
            waited: 0,
            passed: 0,
            has_waited: false,
            place: Place { known: known.clone(), stamp: 0, fenced: 0 },
            may_multiply: false,
            open: Vec::new(),
            groups: VecDeque::new(),
            result: [0; 4],
        };
        let warp = || Rendezvous { operations: [Operation::None; LANES], came: 0 };
        Block {
            number,
            shared,
            shadow,
            epoch: 0,
            threads: std::iter::repeat_with(thread).take(threads as usize).collect(),
            warps: std::iter::repeat_with(warp).take(threads as usize / LANES).collect(),
            warpgroups: std::iter::repeat_with(Warpgroup::default)
                .take(threads as usize / warpgroup::THREADS)
                .collect(),
            at_barrier: 0,
            ended: 0,
            visitors: BTreeMap::new(),
            mbarriers: BTreeMap::new(),
            named: BTreeMap::new(),
            launch_dependents: None,
        }
    }

    /// Notes an access by a thread of another block.
    pub fn note_visitor(&mut self, now: &Now) {
        let visitors = self.visitors.entry(now.block).or_default();
        let thread = usize::from(now.thread);
        visitors.resize(visitors.len().max(thread + 1), None);
        visitors[thread] = Some(now.touch);
    }

    /// True when no thread will run any more.
    pub fn has_ended(&self) -> bool {
        self.ended == self.threads.len()
    }

    /// True when all threads that have not ended wait at the block's barrier.
    pub fn is_at_barrier(&self) -> bool {
        self.at_barrier > 0 && self.at_barrier + self.ended == self.threads.len()
    }

    /// True when each warp has ended whole, or waits whole at one line.
    pub fn waits_in_whole_warps(&self) -> bool {
        self.threads.chunks(LANES).all(|warp| {
            warp.iter().all(|thread| match (thread.state, warp[0].state) {
                (State::Ended, State::Ended) => true,
                (State::Waits(_, one), State::Waits(_, other)) => std::ptr::eq(one, other) || one == other,
                _ => false,
            })
        })
    }

    /// Lets the threads that wait at the barrier run, each of which then knows what any of them knew. Returns
    /// their numbers.
    pub fn pass_barrier(&mut self) -> impl Iterator<Item = u32> {
        let waits = |thread: &&Thread| matches!(thread.state, State::Waits(..));
        let passed = self.threads.iter().filter(waits).map(|thread| thread.passed).max().unwrap_or(0);
        let has_waited = self.threads.iter().filter(waits).any(|thread| thread.has_waited);
        (self.at_barrier, self.epoch) = (0, self.epoch + 1);
        self.threads.iter_mut().enumerate().filter_map(move |(number, thread)| {
            matches!(thread.state, State::Waits(..)).then(|| {
                (thread.state, thread.passed, thread.has_waited) = (State::Ready, passed, has_waited);
                number as u32
            })
        })
    }
}
