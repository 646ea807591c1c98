//! A running block: its threads, who may run next, and what each instruction does.
//!
//! The machine is a thread-local of the host thread that runs the launch, so that `arch` finds it with
//! no argument. Each function here borrows it for one instruction and lets go before a coroutine is left.

use super::memory::{Buffer, Memory};
use super::report::{Fault, Report};
use super::shadow::{Conflict, Kind, Shadow, Touch};
use super::warp::{self, Fragments, LANES};
use super::{Launch, SHARED_BASE};
use crate::ElementType;
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::rc::Rc;

/// Bytes of a thread's stack. Only the pages that a kernel touches are ever real.
const STACK_BYTES: usize = 256 << 10;

/// Most threads of a block.
const MAX_THREADS: u32 = 1024;

/// Shared memory is read and written in whole words.
const WORD: usize = 4;

/// Bytes of device memory that races are told apart by: an element of 16 bits.
const GLOBAL_GRANULE: usize = 2;

type Thread = Coroutine<(), (), ()>;

thread_local! {
    static MACHINE: RefCell<Option<Machine>> = const { RefCell::new(None) };
    /// Thread and block that run now.
    static RUNNING: Cell<(u32, u32)> = const { Cell::new((0, 0)) };
    /// How the thread that runs now is left.
    static YIELDER: Cell<*const Yielder<(), ()>> = const { Cell::new(std::ptr::null()) };
    /// Stacks that no thread uses.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of the launch.
struct Region {
    buffer: Buffer,
    /// Where its bytes are in the memory.
    part: (usize, Range<usize>),
    /// Only what may be written can be raced for.
    shadow: Option<Shadow>,
}

/// Why a thread does not run.
#[derive(Clone, Copy)]
enum State {
    Ready,
    Waits(&'static str, &'static Location<'static>),
    Ended,
}

/// Sixteen bytes on their way to shared memory.
struct Copy {
    target: u32,
    source: u64,
    bytes: u32,
}

/// What the machine keeps of a thread.
struct ThreadState {
    state: State,
    /// Copies that were started and belong to no group yet.
    open: Vec<Copy>,
    /// Groups of copies under way, the oldest first.
    groups: VecDeque<Vec<Copy>>,
    /// What the last warp-wide operation gave this thread.
    result: [u32; 4],
}

/// A warp-wide operation, as one lane asks for it.
#[derive(Clone, Copy)]
enum Operation {
    None,
    ShuffleUp(u32, u32),
    LoadMatrices(u32),
    Mma(ElementType, Fragments),
}

impl Operation {
    fn name(&self) -> &'static str {
        match self {
            Operation::None => "nothing",
            Operation::ShuffleUp(..) => "shfl.sync",
            Operation::LoadMatrices(_) => "ldmatrix",
            Operation::Mma(..) => "mma.sync",
        }
    }
}

/// The lanes of a warp that have come to a warp-wide operation.
struct Rendezvous {
    operations: [Operation; LANES],
    came: usize,
}

struct Machine {
    kernel: String,
    memory: Memory,
    regions: Vec<Region>,
    shared: Vec<u8>,
    shared_shadow: Shadow,
    block: u32,
    /// Barriers that the block has passed, counted from 1.
    epoch: u32,
    threads: Vec<ThreadState>,
    warps: Vec<Rendezvous>,
    /// Threads that may run.
    ready: Vec<u32>,
    at_barrier: usize,
    ended: usize,
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
    let Launch { threads, blocks, .. } = *launch;
    assert!(
        (1..=MAX_THREADS).contains(&threads) && threads.is_multiple_of(LANES as u32),
        "{threads} threads"
    );
    let mut random = Random(launch.seed);
    let mut order: Vec<u32> = (0..blocks).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, random.below(i + 1));
    }
    let machine = Machine::new(launch, std::mem::take(memory), buffers, random);
    let before = MACHINE.replace(Some(machine));
    assert!(before.is_none(), "a launch inside a launch");
    for block in order {
        run_block(block, threads, &body);
        if with(|machine| machine.report.is_some()) {
            break;
        }
    }
    let machine = MACHINE.take().expect("set above");
    *memory = machine.memory;
    machine.report.map_or(Ok(()), Err)
}

/// Runs one block until all its threads have ended or a fault is found.
fn run_block(block: u32, threads: u32, body: &Rc<dyn Fn()>) {
    with(|machine| machine.begin_block(block, threads));
    let mut coroutines: Vec<Thread> = (0..threads).map(|_| new_thread(body.clone())).collect();
    while let Some(thread) = with(Machine::next) {
        RUNNING.set((thread, block));
        let coroutine = &mut coroutines[thread as usize];
        match catch_unwind(AssertUnwindSafe(|| coroutine.resume(()))) {
            Ok(CoroutineResult::Yield(())) => {}
            Ok(CoroutineResult::Return(())) => with(|machine| machine.end_thread(thread)),
            Err(payload) => {
                let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
                let message = text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_default();
                with(|machine| machine.report(thread, None, Fault::Panic { message }));
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
fn suspend() {
    let yielder = YIELDER.get();
    // SAFETY: set by the coroutine that runs now, whose yielder lives as long as it does.
    unsafe { (*yielder).suspend(()) };
    YIELDER.set(yielder);
}

/// Uses the machine for one instruction.
fn with<R>(instruction: impl FnOnce(&mut Machine) -> R) -> R {
    MACHINE
        .with_borrow_mut(|machine| instruction(machine.as_mut().expect("kernels run inside `emulate::run`")))
}

/// Carries an instruction out; a fault ends the launch, and with it this thread.
fn execute<R>(
    at: &'static Location<'static>,
    instruction: impl FnOnce(&mut Machine, u32) -> Result<R, Fault>,
) -> R {
    let thread = thread();
    match with(|machine| instruction(machine, thread)) {
        Ok(result) => result,
        Err(fault) => stop(at, fault),
    }
}

fn stop(at: &'static Location<'static>, fault: Fault) -> ! {
    with(|machine| machine.report(thread(), Some(at), fault));
    loop {
        suspend();
    }
}

impl Machine {
    fn new(launch: &Launch<'_>, memory: Memory, buffers: &[Buffer], random: Random) -> Self {
        let region = |buffer: &Buffer| Region {
            part: memory.find(buffer.address, buffer.bytes),
            shadow: buffer.writable.then(|| Shadow::new(buffer.bytes as usize, GLOBAL_GRANULE, false)),
            buffer: buffer.clone(),
        };
        let shared_bytes = launch.shared_bytes as usize;
        Machine {
            kernel: launch.kernel.to_owned(),
            regions: buffers.iter().map(region).collect(),
            memory,
            shared: vec![0; shared_bytes],
            shared_shadow: Shadow::new(shared_bytes, WORD, true),
            block: 0,
            epoch: 1,
            threads: Vec::new(),
            warps: Vec::new(),
            ready: Vec::new(),
            at_barrier: 0,
            ended: 0,
            random,
            report: None,
        }
    }

    fn begin_block(&mut self, block: u32, threads: u32) {
        self.block = block;
        self.epoch = 1;
        self.shared_shadow.clear();
        self.threads.clear();
        self.threads.resize_with(threads as usize, || ThreadState {
            state: State::Ready,
            open: Vec::new(),
            groups: VecDeque::new(),
            result: [0; 4],
        });
        self.warps.clear();
        self.warps.resize_with(threads as usize / LANES, || Rendezvous {
            operations: [Operation::None; LANES],
            came: 0,
        });
        self.ready = (0..threads).collect();
        (self.at_barrier, self.ended) = (0, 0);
    }

    /// The thread to run next; none when all have ended, or wait, or a fault was found.
    fn next(&mut self) -> Option<u32> {
        if self.ready.is_empty() || self.report.is_some() {
            return None;
        }
        let number = self.random.below(self.ready.len());
        Some(self.ready.swap_remove(number))
    }

    fn report(&mut self, thread: u32, at: Option<&'static Location<'static>>, fault: Fault) {
        let kernel = self.kernel.clone();
        self.report.get_or_insert_with(|| Box::new(Report { kernel, block: self.block, thread, at, fault }));
    }

    fn end_thread(&mut self, thread: u32) {
        self.threads[thread as usize].state = State::Ended;
        self.ended += 1;
        self.release_barrier();
    }

    /// Whoever still waits when nobody can run waits for ever.
    fn check_all_ended(&mut self) {
        if self.ended < self.threads.len() {
            self.diverged();
        }
    }

    /// Reports who waits where.
    fn diverged(&mut self) {
        let mut fates: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        let mut first = None;
        for (thread, state) in self.threads.iter().enumerate() {
            let fate = match state.state {
                State::Ready => "run".to_owned(),
                State::Ended => "have ended".to_owned(),
                State::Waits(what, at) => {
                    first = first.or(Some((thread as u32, at)));
                    format!("wait at {what} ({}:{})", at.file(), at.line())
                }
            };
            fates.entry(fate).or_default().push(thread as u32);
        }
        let runs = |threads: &[u32]| {
            let runs = threads.chunk_by(|one, next| one + 1 == *next);
            let run = |run: &[u32]| match run {
                [one] => one.to_string(),
                run => format!("{}-{}", run[0], run[run.len() - 1]),
            };
            runs.map(run).collect::<Vec<_>>().join(", ")
        };
        let lines = fates.iter().map(|(fate, threads)| format!("  threads {} {fate}", runs(threads)));
        let threads = lines.collect::<Vec<_>>().join("\n");
        if let Some((thread, at)) = first {
            self.report(thread, Some(at), Fault::Divergence { threads });
        }
    }

    /// Lets the block pass its barrier once all threads that have not ended are there. `bar.sync` is
    /// `barrier.sync.aligned`: all threads of a warp must come to the same one (PTX ISA 9.7.12.1), so a warp
    /// waits whole or has ended whole.
    fn release_barrier(&mut self) {
        if self.at_barrier == 0 || self.at_barrier + self.ended < self.threads.len() {
            return;
        }
        let aligned = self.threads.chunks(LANES).all(|warp| {
            warp.iter().all(|thread| match (thread.state, warp[0].state) {
                (State::Ended, State::Ended) => true,
                (State::Waits(_, one), State::Waits(_, other)) => std::ptr::eq(one, other) || one == other,
                _ => false,
            })
        });
        if !aligned {
            return self.diverged();
        }
        for (number, thread) in self.threads.iter_mut().enumerate() {
            if matches!(thread.state, State::Waits(..)) {
                thread.state = State::Ready;
                self.ready.push(number as u32);
            }
        }
        self.at_barrier = 0;
        self.epoch += 1;
    }

    fn touch(&self, thread: u32, kind: Kind, at: &'static Location<'static>) -> Touch {
        Touch { block: self.block, thread, epoch: self.epoch, kind, at }
    }

    /// Checks an access to shared memory, and says which bytes it is.
    fn shared(&mut self, address: u32, bytes: u32, now: &Touch) -> Result<Range<usize>, Fault> {
        let byte = i64::from(address) - i64::from(SHARED_BASE);
        let allocated = self.shared.len() as u32;
        if byte < 0 || byte + i64::from(bytes) > i64::from(allocated) {
            return Err(Fault::SharedOutOfBounds { byte, bytes, allocated });
        }
        let place = |byte: usize| format!("byte {byte} of shared memory");
        if !address.is_multiple_of(bytes) {
            return Err(Fault::Misaligned { place: place(byte as usize), bytes: bytes.into() });
        }
        let range = byte as usize..(byte as usize + bytes as usize);
        match self.shared_shadow.touch(range.clone(), now) {
            Ok(()) => Ok(range),
            Err(conflict) => Err(fault(conflict, now, place)),
        }
    }

    /// Checks an access to device memory, at a multiple of `alignment`, and says which bytes it is.
    fn global(
        &mut self,
        address: u64,
        bytes: u64,
        alignment: u64,
        now: &Touch,
    ) -> Result<(usize, Range<usize>), Fault> {
        let what = now.kind.name();
        let inside = |region: &Region| {
            let start = address.checked_sub(region.buffer.address);
            start.is_some_and(|start| start + bytes <= region.buffer.bytes)
        };
        let Some(number) = self.regions.iter().position(inside) else {
            return Err(Fault::OutOfBounds { what, address, bytes, near: self.near(address) });
        };
        let Region { buffer, part, shadow } = &mut self.regions[number];
        let start = (address - buffer.address) as usize;
        let place = |byte: usize| format!("byte {byte} of {}", buffer.name);
        if !address.is_multiple_of(alignment) {
            return Err(Fault::Misaligned { place: place(start), bytes: alignment });
        }
        let (allocation, range) = (part.0, part.1.start + start..part.1.start + start + bytes as usize);
        match shadow {
            Some(shadow) => shadow
                .touch(start..start + bytes as usize, now)
                .map_err(|conflict| fault(conflict, now, place))?,
            None if now.kind != Kind::Read => return Err(Fault::ReadOnly { buffer: buffer.name.clone() }),
            None => {}
        }
        Ok((allocation, range))
    }

    /// Where the buffer nearest to an address is.
    fn near(&self, address: u64) -> String {
        let distance = |region: &Region| {
            let Buffer { address: start, bytes, .. } = region.buffer;
            start.saturating_sub(address).max(address.saturating_sub(start + bytes))
        };
        let Some(Region { buffer, .. }) = self.regions.iter().min_by_key(|region| distance(region)) else {
            return "and the launch has no buffers".to_owned();
        };
        let Buffer { name, address: start, bytes, .. } = buffer;
        if address < *start {
            format!("{} bytes before {name}", start - address)
        } else {
            format!("byte {} of {name}, which has {bytes}", address - start)
        }
    }

    /// Notes that a thread's lane has come to a warp-wide operation. Once the last one is there, carries it
    /// out and wakes the others; until then the thread must wait.
    fn meet(
        &mut self,
        thread: u32,
        operation: Operation,
        at: &'static Location<'static>,
    ) -> Result<bool, Fault> {
        let (number, lane) = (thread as usize / LANES, thread as usize % LANES);
        self.threads[thread as usize].state = State::Waits(operation.name(), at);
        self.warps[number].operations[lane] = operation;
        self.warps[number].came += 1;
        if self.warps[number].came < LANES {
            return Ok(true);
        }
        self.warps[number].came = 0;
        let lanes = number * LANES..(number + 1) * LANES;
        // `.sync.aligned`: all threads of the warp execute the same instruction.
        let same = self.threads[lanes.clone()].iter().all(|lane| match lane.state {
            State::Waits(name, line) => name == operation.name() && line == at,
            _ => false,
        });
        if !same {
            self.diverged();
            return Ok(true);
        }
        let results = self.compute(number, lane, at)?;
        for (thread, result) in lanes.zip(results) {
            let state = &mut self.threads[thread];
            (state.result, state.state) = (result, State::Ready);
            if thread % LANES != lane {
                self.ready.push(thread as u32);
            }
        }
        Ok(false)
    }

    /// What the warp's operation gives each lane.
    fn compute(
        &mut self,
        number: usize,
        lane: usize,
        at: &'static Location<'static>,
    ) -> Result<[[u32; 4]; LANES], Fault> {
        let operations = self.warps[number].operations;
        Ok(match operations[lane] {
            Operation::None => [[0; 4]; LANES],
            Operation::ShuffleUp(..) => {
                let operands = operations.map(|operation| match operation {
                    Operation::ShuffleUp(value, distance) => (value, distance),
                    _ => (0, 0),
                });
                warp::shuffle_up(operands).map(|value| [value; 4])
            }
            Operation::LoadMatrices(_) => {
                let mut rows = [[0; 4]; LANES];
                for (lane, operation) in operations.iter().enumerate() {
                    let &Operation::LoadMatrices(address) = operation else { continue };
                    let now = self.touch((number * LANES + lane) as u32, Kind::Read, at);
                    let range = self.shared(address, 16, &now)?;
                    rows[lane] = words(&self.shared[range]);
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
        })
    }

    /// Lands a copy: its bytes are now the thread's that started it.
    fn land(&mut self, thread: u32, copy: &Copy, at: &'static Location<'static>) -> Result<(), Fault> {
        let mut data = [0; 16];
        if copy.bytes > 0 {
            let now = self.touch(thread, Kind::Read, at);
            let part = self.global(copy.source, copy.bytes.into(), 16, &now)?;
            data[..copy.bytes as usize].copy_from_slice(self.memory.part(part));
        }
        let now = self.touch(thread, Kind::CopyEnd, at);
        let range = self.shared(copy.target, 16, &now)?;
        self.shared[range].copy_from_slice(&data);
        Ok(())
    }
}

fn fault(conflict: Conflict, now: &Touch, place: impl Fn(usize) -> String) -> Fault {
    match conflict {
        Conflict::Race(byte, other) => Fault::Race { what: now.kind.name(), place: place(byte), other },
        Conflict::CopyUnderWay(byte, by) => Fault::CopyUnderWay { place: place(byte), by },
        Conflict::Unwritten(byte) => Fault::Unwritten { place: place(byte) },
    }
}

fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let (words, _) = bytes.as_chunks::<WORD>();
    std::array::from_fn(|i| u32::from_le_bytes(words[i]))
}

/// `%tid.x`.
pub(crate) fn thread() -> u32 {
    RUNNING.get().0
}

/// `%ctaid.x`.
pub(crate) fn block() -> u32 {
    RUNNING.get().1
}

/// `trap`.
#[track_caller]
pub(crate) fn trap() -> ! {
    stop(Location::caller(), Fault::Trap)
}

/// An offset that does not fit its width.
#[track_caller]
pub(crate) fn overflow(expression: String) -> ! {
    stop(Location::caller(), Fault::Overflow { expression })
}

/// `bar.sync`.
#[track_caller]
pub(crate) fn sync_block() {
    let at = Location::caller();
    with(|machine| {
        machine.threads[thread() as usize].state = State::Waits("bar.sync", at);
        machine.at_barrier += 1;
        machine.release_barrier();
    });
    suspend();
}

#[track_caller]
fn meet(operation: Operation) -> [u32; 4] {
    let at = Location::caller();
    if execute(at, |machine, thread| machine.meet(thread, operation, at)) {
        suspend();
    }
    with(|machine| machine.threads[thread() as usize].result)
}

/// `shfl.sync.up`.
#[track_caller]
pub(crate) fn shuffle_up(value: u32, distance: u32) -> u32 {
    meet(Operation::ShuffleUp(value, distance))[0]
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

/// `ld.shared` of `N` words.
#[track_caller]
pub(crate) fn load_shared<const N: usize>(address: u32) -> [u32; N] {
    let at = Location::caller();
    execute(at, |machine, thread| {
        let now = machine.touch(thread, Kind::Read, at);
        let range = machine.shared(address, (N * WORD) as u32, &now)?;
        Ok(words(&machine.shared[range]))
    })
}

/// `st.shared` of `N` words.
#[track_caller]
pub(crate) fn store_shared<const N: usize>(address: u32, values: [u32; N]) {
    let at = Location::caller();
    execute(at, |machine, thread| {
        let now = machine.touch(thread, Kind::Write, at);
        let range = machine.shared(address, (N * WORD) as u32, &now)?;
        machine.shared[range].copy_from_slice(values.map(u32::to_le_bytes).as_flattened());
        Ok(())
    })
}

/// `atom.shared.add.u32`.
#[track_caller]
pub(crate) fn add_shared(address: u32, value: u32) -> u32 {
    let at = Location::caller();
    execute(at, |machine, thread| {
        let now = machine.touch(thread, Kind::Atomic, at);
        let range = machine.shared(address, WORD as u32, &now)?;
        let [before] = words(&machine.shared[range.clone()]);
        machine.shared[range].copy_from_slice(&before.wrapping_add(value).to_le_bytes());
        Ok(before)
    })
}

/// `ld.global` of `N` bytes.
#[track_caller]
pub(crate) fn load_global<const N: usize>(address: u64) -> [u8; N] {
    let at = Location::caller();
    execute(at, |machine, thread| {
        let now = machine.touch(thread, Kind::Read, at);
        let part = machine.global(address, N as u64, N as u64, &now)?;
        Ok(machine.memory.part(part).try_into().expect("a range of N bytes"))
    })
}

/// `st.global` of `N` bytes.
#[track_caller]
pub(crate) fn store_global<const N: usize>(address: u64, bytes: [u8; N]) {
    let at = Location::caller();
    execute(at, |machine, thread| {
        let now = machine.touch(thread, Kind::Write, at);
        let part = machine.global(address, N as u64, N as u64, &now)?;
        machine.memory.part(part).copy_from_slice(&bytes);
        Ok(())
    })
}

/// `cp.async` of 16 bytes, the first `bytes` of which come from `source`. Both ends are checked now; the
/// data is read, and written, when it is waited for: the latest moment that the manual allows. A copy of no
/// bytes reads nothing, so its source may be anything.
#[track_caller]
pub(crate) fn start_copy(target: u32, source: u64, bytes: u32) {
    let at = Location::caller();
    assert!(bytes <= 16, "cp.async of {bytes} bytes");
    execute(at, |machine, thread| {
        let now = machine.touch(thread, Kind::Read, at);
        if bytes > 0 {
            machine.global(source, bytes.into(), 16, &now)?;
        }
        let now = machine.touch(thread, Kind::CopyStart, at);
        machine.shared(target, 16, &now)?;
        machine.threads[thread as usize].open.push(Copy { target, source, bytes });
        Ok(())
    });
}

/// `cp.async.commit_group`.
pub(crate) fn commit_copies() {
    with(|machine| {
        let thread = &mut machine.threads[thread() as usize];
        thread.groups.push_back(std::mem::take(&mut thread.open));
    });
}

/// `cp.async.wait_group`: lands all groups but the `newest` newest.
#[track_caller]
pub(crate) fn wait_for_copies(newest: u32) {
    let at = Location::caller();
    execute(at, |machine, thread| {
        while machine.threads[thread as usize].groups.len() > newest as usize {
            let group = machine.threads[thread as usize].groups.pop_front();
            for copy in group.into_iter().flatten() {
                machine.land(thread, &copy, at)?;
            }
        }
        Ok(())
    });
}
