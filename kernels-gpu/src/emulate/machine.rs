//! Running clusters: their threads, and who may run next.
//!
//! The machine is a thread-local of the host thread that runs the launch, so that `arch` finds it with
//! no argument. Each instruction borrows it and lets go before a coroutine is left.

use super::block::Block;
use super::memory::{Buffer, Memory};
use super::order::{Gathering, Knowledge, Order};
use super::report::{Fault, Report};
use super::shadow::{By, Shadow, Touch};
use super::shared::WORD;
use super::thread::State;
use super::warp::LANES;
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::rc::Rc;

/// Bytes of a thread's stack. Only the pages that a kernel touches are ever real.
const STACK_BYTES: usize = 256 << 10;

/// Most threads of a block.
const MAX_THREADS: u32 = 1024;

/// Most blocks of a cluster, as every device with clusters allows.
const MAX_CLUSTER: u32 = 8;

/// Bytes of device memory that races are told apart by: an element of 16 bits.
const GLOBAL_GRANULE: usize = 2;

/// Where a thread waits for its cluster.
pub(super) const CLUSTER_WAIT: &str = "barrier.cluster.wait";

type Thread = Coroutine<(), (), ()>;

/// A thread of the cluster that runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Id {
    /// Its block's number in the cluster.
    pub rank: u32,
    /// Its number in the block.
    pub thread: u32,
}

thread_local! {
    static MACHINE: RefCell<Option<Machine>> = const { RefCell::new(None) };
    /// The thread that runs now, and its block's number in the grid.
    static RUNNING: Cell<(Id, u32)> = const { Cell::new((Id { rank: 0, thread: 0 }, 0)) };
    /// How the thread that runs now is left.
    static YIELDER: Cell<*const Yielder<(), ()>> = const { Cell::new(std::ptr::null()) };
    /// Stacks that no thread uses.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// A grid of blocks.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Name of the kernel, for reports.
    pub kernel: &'a str,
    /// Blocks: whole clusters.
    pub blocks: u32,
    /// Blocks of a cluster, at most 8; 1: no clusters.
    pub cluster: u32,
    /// Whether all blocks run at once (a cooperative launch). It has no clusters.
    pub cooperative: bool,
    /// Threads a block: whole warps, at most 1024.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Whether the launch may start before the one before it has ended (programmatic dependent launch).
    pub overlaps: bool,
    /// Decides the order of blocks and of threads.
    pub seed: u64,
}

/// A buffer of the launch.
pub(super) struct Region {
    pub buffer: Buffer,
    /// Where its bytes are in the memory.
    pub part: (usize, Range<usize>),
    /// Only what may be written can be raced for.
    pub shadow: Option<Shadow>,
}

pub(super) struct Machine {
    kernel: String,
    pub memory: Memory,
    pub regions: Vec<Region>,
    /// The blocks of the cluster that runs, or of the whole grid when the launch is cooperative.
    pub blocks: Vec<Block>,
    /// Blocks of a cluster.
    pub cluster: u32,
    /// Relaxed loads since anybody did anything else.
    pub looks: u32,
    /// Threads that have arrived at the next cluster barrier and have not ended.
    pub at_cluster_barrier: usize,
    /// Cluster barriers that the cluster has passed.
    pub cluster_barriers: u16,
    /// What the threads let each other know that arrive at cluster barriers, and what they had at the last
    /// that the cluster has passed.
    pub cluster_gathering: Gathering,
    pub cluster_knowledge: Rc<Knowledge>,
    pub order: Order,
    /// Threads that may run.
    pub ready: Vec<Id>,
    random: Random,
    report: Option<Box<Report>>,
}

/// SplitMix64 (Steele, Lea and Flood, 2014): enough for orders.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % limit as u64) as usize
    }
}

/// Runs a grid: see [`super::run`].
pub(super) fn run(
    launch: &Launch<'_>,
    memory: &mut Memory,
    buffers: &[Buffer],
    body: Rc<dyn Fn()>,
) -> Result<(), Box<Report>> {
    let Launch { threads, blocks, cluster, cooperative, .. } = *launch;
    let whole_warps = (1..=MAX_THREADS).contains(&threads) && threads.is_multiple_of(LANES as u32);
    assert!(whole_warps, "{threads} threads");
    let whole_clusters = (1..=MAX_CLUSTER).contains(&cluster) && blocks.is_multiple_of(cluster);
    assert!(whole_clusters, "{blocks} blocks in clusters of {cluster}");
    assert!(!cooperative || cluster == 1, "a cooperative launch of clusters");
    let mut random = Random(launch.seed);
    let mut order: Vec<u32> = (0..blocks / together(launch)).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, random.below(i + 1));
    }
    let machine = Machine::new(launch, std::mem::take(memory), buffers, random);
    let before = MACHINE.replace(Some(machine));
    assert!(before.is_none(), "a launch inside a launch");
    for cluster in order {
        run_cluster(cluster, launch, &body);
        if with(|machine| machine.report.is_some()) {
            break;
        }
    }
    let machine = MACHINE.take().expect("set above");
    *memory = machine.memory;
    machine.report.map_or(Ok(()), Err)
}

/// Blocks that run at once.
fn together(launch: &Launch<'_>) -> u32 {
    if launch.cooperative { launch.blocks } else { launch.cluster }
}

/// Runs the blocks of one cluster until all their threads have ended or a fault is found.
fn run_cluster(number: u32, launch: &Launch<'_>, body: &Rc<dyn Fn()>) {
    let (threads, cluster) = (launch.threads, together(launch));
    with(|machine| machine.begin_cluster(number * cluster, threads));
    let mut coroutines: Vec<Thread> = (0..cluster * threads).map(|_| new_thread(body.clone())).collect();
    while let Some(id) = with(Machine::next) {
        RUNNING.set((id, number * cluster + id.rank));
        let coroutine = &mut coroutines[(id.rank * threads + id.thread) as usize];
        match catch_unwind(AssertUnwindSafe(|| coroutine.resume(()))) {
            Ok(CoroutineResult::Yield(())) => with(|machine| machine.note_progress(id)),
            Ok(CoroutineResult::Return(())) => with(|machine| machine.end_thread(id)),
            Err(payload) => {
                let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
                let message = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
                with(|machine| machine.report(id, None, Fault::Panic { message }));
            }
        }
    }
    with(Machine::check_all_ended);
    STACKS.with_borrow_mut(|stacks| {
        // A thread that a fault left in the middle is unwound here.
        let ended = coroutines.into_iter().filter(Thread::done);
        stacks.extend(ended.map(Thread::into_stack));
    });
}

fn new_thread(body: Rc<dyn Fn()>) -> Thread {
    let stack = STACKS.with_borrow_mut(Vec::pop);
    let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("room for a stack"));
    Coroutine::with_stack(stack, move |yielder, ()| {
        YIELDER.set(yielder);
        body();
    })
}

/// Leaves the thread that runs now, until the scheduler comes back to it.
pub(super) fn suspend() {
    let yielder = YIELDER.get();
    // SAFETY: set by the coroutine that runs now, whose yielder lives as long as it does.
    unsafe { (*yielder).suspend(()) };
    YIELDER.set(yielder);
}

/// The thread that runs now, and its block's number in the grid.
pub(super) fn running() -> (Id, u32) {
    RUNNING.get()
}

/// Uses the machine for one instruction.
pub(super) fn with<R>(instruction: impl FnOnce(&mut Machine) -> R) -> R {
    MACHINE
        .with_borrow_mut(|machine| instruction(machine.as_mut().expect("kernels run inside `emulate::run`")))
}

/// Carries an instruction out; a fault ends the launch, and with it this thread.
pub(super) fn execute<R>(
    at: &'static Location<'static>,
    instruction: impl FnOnce(&mut Machine, Id) -> Result<R, Fault>,
) -> R {
    let (id, _) = running();
    match with(|machine| instruction(machine, id)) {
        Ok(result) => result,
        Err(fault) => stop(at, fault),
    }
}

/// Ends the launch.
pub(super) fn stop(at: &'static Location<'static>, fault: Fault) -> ! {
    with(|machine| machine.report(running().0, Some(at), fault));
    loop {
        suspend();
    }
}

impl Machine {
    fn new(launch: &Launch<'_>, mut memory: Memory, buffers: &[Buffer], random: Random) -> Self {
        memory.begin_launch(launch.kernel, launch.overlaps);
        let region = |buffer: &Buffer| Region {
            part: memory.find(buffer.address, buffer.bytes),
            shadow: buffer.writable.then(|| Shadow::new(buffer.bytes as usize, GLOBAL_GRANULE, false)),
            buffer: buffer.clone(),
        };
        let shared_bytes = launch.shared_bytes as usize;
        let block = |number| {
            Block::new(number, launch.threads, vec![0; shared_bytes], Shadow::new(shared_bytes, WORD, true))
        };
        Machine {
            kernel: launch.kernel.to_owned(),
            regions: buffers.iter().map(region).collect(),
            memory,
            blocks: (0..together(launch)).map(block).collect(),
            cluster: launch.cluster,
            looks: 0,
            at_cluster_barrier: 0,
            cluster_barriers: 0,
            cluster_gathering: Gathering::default(),
            cluster_knowledge: Rc::default(),
            order: Order::default(),
            ready: Vec::new(),
            random,
            report: None,
        }
    }

    /// Begins the cluster whose first block is `first`.
    fn begin_cluster(&mut self, first: u32, threads: u32) {
        let used = std::mem::take(&mut self.blocks).into_iter().zip(first..);
        let fresh = used.map(|(block, number)| Block::new(number, threads, block.shared, block.shadow));
        self.blocks = fresh.collect();
        (self.at_cluster_barrier, self.cluster_barriers) = (0, 0);
        (self.cluster_gathering, self.cluster_knowledge) = Default::default();
        let stamp = self.order.next_stamp();
        self.blocks.iter_mut().flat_map(|block| &mut block.threads).for_each(|it| it.place.stamp = stamp);
        let ranks = 0..self.blocks.len() as u32;
        self.ready = ranks.flat_map(|rank| (0..threads).map(move |thread| Id { rank, thread })).collect();
    }

    pub(super) fn block(&mut self, id: Id) -> &mut Block {
        &mut self.blocks[id.rank as usize]
    }

    pub(super) fn thread(&mut self, id: Id) -> &mut super::thread::Thread {
        &mut self.block(id).threads[id.thread as usize]
    }

    /// The thread to run next; none when all have ended, or wait, or a fault was found.
    fn next(&mut self) -> Option<Id> {
        if self.ready.is_empty() || self.report.is_some() {
            return None;
        }
        let number = self.random.below(self.ready.len());
        Some(self.ready.swap_remove(number))
    }

    fn report(&mut self, id: Id, at: Option<&'static Location<'static>>, fault: Fault) {
        let (kernel, block) = (self.kernel.clone(), self.block(id).number);
        self.report.get_or_insert_with(|| Box::new(Report { kernel, block, thread: id.thread, at, fault }));
    }

    /// A thread has stopped: unless it looks for a word, something has come of it.
    fn note_progress(&mut self, id: Id) {
        if !matches!(self.thread(id).state, State::Ready) {
            self.looks = 0;
        }
    }

    fn end_thread(&mut self, id: Id) {
        self.looks = 0;
        self.thread(id).state = State::Ended;
        self.block(id).ended += 1;
        if self.thread(id).arrived > self.cluster_barriers {
            self.at_cluster_barrier -= 1;
        }
        self.release_barrier(id.rank);
        self.release_cluster();
        if self.block(id).has_ended() {
            self.end_block(id);
        }
    }

    /// The last thread of a block has ended: nobody may use its shared memory from here on, and whoever has
    /// used it must have arrived, since, at a cluster barrier that the block has waited for, or have let one
    /// of its threads know in another way.
    fn end_block(&mut self, id: Id) {
        let known = self.block_knowledge(id.rank);
        if let Some((place, by)) = self.unfinished_copy(id, &known) {
            self.report(id, Some(by.at), Fault::EndsBeforeCopy { place, by });
        }
        let block = self.block(id);
        let (number, launch_dependents) = (block.number, block.launch_dependents);
        let passed = block.threads.iter().map(|thread| thread.passed).max().unwrap_or(0);
        let has_waited = block.threads.iter().any(|thread| thread.has_waited);
        let mut visitors = block.visitors.values().flatten().flatten();
        let is_late = |touch: &&Touch| touch.arrived >= passed && !known.has_seen(touch.actor, touch.stamp);
        let late = visitors.find(is_late).copied();
        self.memory.launch().end_block(has_waited, launch_dependents);
        if let Some(touch @ Touch { by: By::Thread { block, thread }, .. }) = late {
            let visitor = Id { rank: block - self.blocks[0].number, thread: thread.into() };
            let what = touch.kind.name();
            let fault = Fault::Absent { what, block: number, why: "may have ended by then" };
            self.report(visitor, Some(touch.at), fault);
        }
    }

    /// Whoever still waits when nobody can run waits for ever.
    fn check_all_ended(&mut self) {
        if !self.blocks.iter().all(Block::has_ended) {
            self.diverged();
        }
    }

    /// Reports who waits where.
    pub(super) fn diverged(&mut self) {
        let mut fates: BTreeMap<(u32, String), Vec<u32>> = BTreeMap::new();
        let mut first = None;
        for (rank, block) in self.blocks.iter().enumerate() {
            for (thread, state) in block.threads.iter().enumerate() {
                let fate = match state.state {
                    State::Ready => "run".to_owned(),
                    State::Ended => "have ended".to_owned(),
                    State::Waits(what, at) => {
                        first = first.or(Some((Id { rank: rank as u32, thread: thread as u32 }, at)));
                        format!("wait at {what} ({}:{})", at.file(), at.line())
                    }
                };
                fates.entry((block.number, fate)).or_default().push(thread as u32);
            }
        }
        let runs = |threads: &[u32]| {
            let runs = threads.chunk_by(|one, next| one + 1 == *next);
            let run = |run: &[u32]| match run {
                [one] => one.to_string(),
                run => format!("{}-{}", run[0], run[run.len() - 1]),
            };
            runs.map(run).collect::<Vec<_>>().join(", ")
        };
        let alone = self.blocks.len() == 1;
        let of = |block: u32| if alone { String::new() } else { format!(" of block {block}") };
        let lines = fates
            .iter()
            .map(|((block, fate), threads)| format!("  threads {}{} {fate}", runs(threads), of(*block)));
        let threads = lines.chain(self.open_phases()).collect::<Vec<_>>().join("\n");
        if let Some((id, at)) = first {
            self.report(id, Some(at), Fault::Divergence { threads });
        }
    }

    /// Lets a block pass its barrier once all threads that have not ended are there. `bar.sync` is
    /// `barrier.sync.aligned`: all threads of a warp must come to the same one (PTX ISA 9.7.12.1), so a warp
    /// waits whole or has ended whole.
    pub(super) fn release_barrier(&mut self, rank: u32) {
        let block = &mut self.blocks[rank as usize];
        if !block.is_at_barrier() {
            return;
        }
        if !block.waits_in_whole_warps() {
            return self.diverged();
        }
        let threads: Vec<u32> = block.pass_barrier().collect();
        self.unite_block(rank, &threads);
        self.ready.extend(threads.into_iter().map(|thread| Id { rank, thread }));
    }

    /// Lets the cluster pass its barrier once all threads that have not ended have arrived (PTX ISA
    /// 9.7.12.3).
    pub(super) fn release_cluster(&mut self) {
        let running = self.blocks.iter().map(|block| block.threads.len() - block.ended).sum();
        if self.at_cluster_barrier == 0 || self.at_cluster_barrier < running {
            return;
        }
        (self.at_cluster_barrier, self.cluster_barriers) = (0, self.cluster_barriers + 1);
        self.cluster_knowledge = self.cluster_gathering.knowledge();
        for (rank, block) in self.blocks.iter_mut().enumerate() {
            for (number, thread) in block.threads.iter_mut().enumerate() {
                if matches!(thread.state, State::Waits(CLUSTER_WAIT, _)) {
                    thread.state = State::Ready;
                    self.ready.push(Id { rank: rank as u32, thread: number as u32 });
                }
            }
        }
    }
}
