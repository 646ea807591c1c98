//! What there is: devices, memory, streams, captures, graphs, and the log.

use crate::answer::{Answer, Refusal};
use crate::cuda_h::{Address, Handle, INVALID_HANDLE, INVALID_VALUE, Status};
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::str::FromStr;

/// Objects of one kind by handle, those that are no more among them.
pub(crate) struct Table<T> {
    pub(crate) kind: &'static str,
    /// What a handle that is none is refused with.
    pub(crate) code: Status,
    pub(crate) live: BTreeMap<Handle, T>,
    pub(crate) gone: BTreeSet<Handle>,
}

impl<T> Table<T> {
    pub(crate) fn new(kind: &'static str, code: Status) -> Self {
        Table { kind, code, live: BTreeMap::new(), gone: BTreeSet::new() }
    }

    pub(crate) fn add(&mut self, handle: Handle, object: T) {
        self.live.insert(handle, object);
    }

    pub(crate) fn get(&self, handle: Handle) -> Answer<&T> {
        self.live.get(&handle).ok_or_else(|| self.missing(handle))
    }

    pub(crate) fn get_mut(&mut self, handle: Handle) -> Answer<&mut T> {
        if self.live.contains_key(&handle) {
            return Ok(self.live.get_mut(&handle).expect("it was found"));
        }
        Err(self.missing(handle))
    }

    pub(crate) fn missing(&self, handle: Handle) -> Refusal {
        let state = if self.gone.contains(&handle) { "was destroyed" } else { "is none" };
        Refusal { code: self.code, fault: Some(format!("{} {handle:#x} {state}", self.kind)) }
    }

    pub(crate) fn remove(&mut self, handle: Handle) -> Answer<T> {
        let object = self.live.remove(&handle).ok_or_else(|| self.missing(handle))?;
        self.gone.insert(handle);
        Ok(object)
    }

    /// Lets go of those that `which` names; tells how many.
    pub(crate) fn remove_all(&mut self, which: impl Fn(&T) -> bool) -> usize {
        let handles: Vec<Handle> =
            self.live.iter().filter(|(_, object)| which(object)).map(|(h, _)| *h).collect();
        for handle in &handles {
            self.live.remove(handle);
            self.gone.insert(*handle);
        }
        handles.len()
    }
}

/// A device, with its primary context.
pub(crate) struct Device {
    pub(crate) context: Handle,
    pub(crate) retained: u32,
    pub(crate) flags: u32,
    pub(crate) default_stream: Handle,
}

/// Memory on a device. Addresses are not used again, so what was freed is known for good.
pub(crate) struct Allocation {
    pub(crate) device: usize,
    pub(crate) bytes: Vec<u8>,
    pub(crate) len: u64,
    pub(crate) freed: bool,
}

/// For each stream, the number of the last entry of it that comes before something, whatever the hardware
/// does: in the log, or among the nodes of a capture.
pub(crate) type Clock = BTreeMap<Handle, usize>;

pub(crate) fn join(clock: &mut Clock, other: &Clock) {
    for (stream, number) in other {
        let last = clock.entry(*stream).or_default();
        *last = (*last).max(*number);
    }
}

pub(crate) struct Stream {
    pub(crate) device: usize,
    /// It waits for the default stream and the default stream for it; true of that one itself.
    pub(crate) blocking: bool,
    pub(crate) default: bool,
    /// Whose default stream it is, where it is a thread's.
    pub(crate) thread: Option<usize>,
    pub(crate) clock: Clock,
    pub(crate) capture: Option<Handle>,
    /// As `clock`, within the capture.
    pub(crate) captured: Clock,
}

pub(crate) struct Event {
    pub(crate) device: usize,
    pub(crate) timed: bool,
    pub(crate) recorded: Recorded,
}

#[derive(Clone)]
pub(crate) enum Recorded {
    Never,
    /// By this entry of the log.
    Ran(usize, Clock),
    InCapture(Handle, Clock),
}

/// A capture under way.
pub(crate) struct Capture {
    pub(crate) device: usize,
    pub(crate) origin: Handle,
    pub(crate) mode: u32,
    pub(crate) thread: usize,
    pub(crate) streams: BTreeSet<Handle>,
    pub(crate) nodes: Vec<Work>,
    pub(crate) valid: bool,
}

/// A graph, or one made ready to launch.
pub(crate) struct Graph {
    pub(crate) device: usize,
    pub(crate) nodes: Vec<Work>,
}

pub(crate) struct Module {
    pub(crate) device: usize,
    pub(crate) image: Image,
    /// Of the kernels that were asked for.
    pub(crate) functions: BTreeMap<String, Handle>,
}

pub(crate) enum Image {
    Ptx(Vec<Kernel>),
    /// The whole file.
    Cubin(Vec<u8>),
}

/// What PTX says of an entry point; of a cubin's only the name is known.
#[derive(Clone, Default)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// Bytes of each parameter.
    pub(crate) parameters: Option<Vec<usize>>,
    /// `.maxntid`, `.reqntid`, `.reqnctapercluster`.
    pub(crate) most_threads: Option<[u32; 3]>,
    pub(crate) exact_threads: Option<[u32; 3]>,
    pub(crate) exact_cluster: Option<[u32; 3]>,
}

pub(crate) struct Function {
    pub(crate) device: usize,
    pub(crate) module: Handle,
    pub(crate) kernel: Kernel,
    /// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
    pub(crate) most_shared: u32,
    /// `CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED`.
    pub(crate) large_clusters: bool,
}

/// Something queued on a stream.
#[derive(Clone)]
pub(crate) struct Work {
    pub(crate) kind: &'static str,
    /// `key=value` words for the log.
    pub(crate) words: String,
    /// Address and bytes of what it reads or writes: of a launch the allocations that its parameters point
    /// into.
    pub(crate) memory: Vec<(Address, u64)>,
    /// The kernel that must be loaded.
    pub(crate) function: Option<Handle>,
    /// What the memory is filled with.
    pub(crate) fill: Option<u8>,
}

impl Work {
    pub(crate) fn new(kind: &'static str, words: String) -> Self {
        Work { kind, words, memory: Vec::new(), function: None, fill: None }
    }
}

/// A line of the log.
pub(crate) struct Entry {
    pub(crate) device: usize,
    /// 0 for the default stream.
    pub(crate) stream: Handle,
    pub(crate) thread: usize,
    pub(crate) work: Work,
    /// Entries that ended before it began, whatever the hardware does: the last one of each stream.
    pub(crate) after: Vec<usize>,
}

/// What a thread of the caller has to itself.
#[derive(Default)]
pub(crate) struct Thread {
    /// From 1, in the order of their first calls.
    pub(crate) number: usize,
    /// Which of the drivers between resets it belongs to.
    pub(crate) driver: usize,
    pub(crate) contexts: Vec<Handle>,
    pub(crate) capture_mode: u32,
}

/// A failure that a test asked for.
pub(crate) struct Failure {
    pub(crate) code: Status,
    /// Which call fails; 0: every one.
    pub(crate) nth: i32,
    pub(crate) calls: i32,
}

pub(crate) struct Driver {
    pub(crate) started: bool,
    pub(crate) capability: (u32, u32),
    pub(crate) version: i32,
    pub(crate) refuse_cubin: Option<Status>,
    pub(crate) refuse_ptx: Option<Status>,
    pub(crate) lenient: bool,

    pub(crate) devices: Vec<Device>,
    pub(crate) memory: BTreeMap<Address, Allocation>,
    pub(crate) streams: Table<Stream>,
    pub(crate) events: Table<Event>,
    pub(crate) modules: Table<Module>,
    pub(crate) functions: Table<Function>,
    pub(crate) captures: Table<Capture>,
    pub(crate) graphs: Table<Graph>,
    pub(crate) executables: Table<Graph>,

    /// What the host has waited for.
    pub(crate) waited: Clock,
    pub(crate) log: Vec<Entry>,
    pub(crate) faults: Vec<String>,
    pub(crate) failures: BTreeMap<String, Failure>,

    /// The calling thread's, during a call.
    pub(crate) thread: Thread,
    pub(crate) threads: usize,
    pub(crate) number: usize,
    pub(crate) next_handle: Handle,
    pub(crate) next_address: Address,
}

pub(crate) const FIRST_HANDLE: Handle = 0x1000;
/// Where the handles of the threads' default streams begin, which no program knows.
pub(crate) const THREAD_STREAMS: Handle = 1 << 40;
pub(crate) const FIRST_ADDRESS: Address = 0x7000_0000_0000;
/// Unused addresses behind each allocation, at least.
pub(crate) const GAP: u64 = 4096;
pub(crate) const MEMORY_BYTES: u64 = 16 << 30;
pub(crate) const MULTIPROCESSORS: u32 = 132;
/// Multiprocessors by cluster of processors (GPC): no cluster of blocks spans two.
pub(crate) const GPCS: [u32; 8] = [18, 18, 18, 16, 16, 16, 16, 14];
/// Shared memory that a block has without asking for more.
pub(crate) const PORTABLE_SHARED: u32 = 48 << 10;
/// Shared memory that the driver takes of each block.
pub(crate) const RESERVED_SHARED: u32 = 1 << 10;

impl Driver {
    pub(crate) fn new(number: usize) -> Self {
        let mut faults = Vec::new();
        let capability = setting("MOE_LORA_FAKE_CAPABILITY", "9.0".to_owned(), &mut faults);
        let capability = two_numbers(&capability).unwrap_or_else(|| {
            faults.push(format!("MOE_LORA_FAKE_CAPABILITY: what is `{capability}`?"));
            (9, 0)
        });
        let version = if cfg!(feature = "old") { 11080 } else { 13000 };
        let mut driver = Driver {
            started: false,
            capability,
            version: setting("MOE_LORA_FAKE_DRIVER", version, &mut faults),
            refuse_cubin: Some(setting("MOE_LORA_FAKE_REFUSE_CUBIN", 0, &mut faults))
                .filter(|code| *code != 0),
            refuse_ptx: Some(setting("MOE_LORA_FAKE_REFUSE_PTX", 0, &mut faults)).filter(|code| *code != 0),
            lenient: setting("MOE_LORA_FAKE_LENIENT", 0, &mut faults) != 0,
            devices: Vec::new(),
            memory: BTreeMap::new(),
            streams: Table::new("stream", INVALID_HANDLE),
            events: Table::new("event", INVALID_HANDLE),
            modules: Table::new("module", INVALID_HANDLE),
            functions: Table::new("function", INVALID_HANDLE),
            captures: Table::new("capture", INVALID_VALUE),
            graphs: Table::new("graph", INVALID_VALUE),
            executables: Table::new("executable graph", INVALID_VALUE),
            waited: Clock::new(),
            log: Vec::new(),
            faults,
            failures: BTreeMap::new(),
            thread: Thread::default(),
            threads: 0,
            number,
            next_handle: FIRST_HANDLE,
            next_address: FIRST_ADDRESS,
        };
        for device in 0..setting("MOE_LORA_FAKE_DEVICES", 2, &mut driver.faults) {
            let [context, default_stream] = [(); 2].map(|()| driver.handle());
            driver.devices.push(Device { context, retained: 0, flags: 0, default_stream });
            driver.streams.add(default_stream, Stream::new(device, true, true));
        }
        for failure in
            env::var("MOE_LORA_FAKE_FAIL").unwrap_or_default().split(';').filter(|text| !text.is_empty())
        {
            let parsed = failure.split_once('=').and_then(|(call, code)| {
                let (code, nth) = code.split_once('@').unwrap_or((code, "0"));
                Some((
                    call.to_owned(),
                    Failure { code: code.parse().ok()?, nth: nth.parse().ok()?, calls: 0 },
                ))
            });
            match parsed {
                Some((call, failure)) => drop(driver.failures.insert(call, failure)),
                None => driver.faults.push(format!("MOE_LORA_FAKE_FAIL: what is `{failure}`?")),
            }
        }
        driver
    }

    pub(crate) fn handle(&mut self) -> Handle {
        self.next_handle += 0x10;
        self.next_handle
    }

    /// Most shared memory that a block may ask for, and what a multiprocessor has: the programming guide's
    /// table of technical specifications.
    pub(crate) fn shared_bytes(&self) -> (u32, u32) {
        match self.capability {
            (8, 0 | 7) => (163 << 10, 164 << 10),
            (8, _) | (12, _) => (99 << 10, 100 << 10),
            (7, _) => (64 << 10, 64 << 10),
            _ => (227 << 10, 228 << 10),
        }
    }

    /// The failure that a test asked for this call.
    pub(crate) fn failure(&mut self, call: &str) -> Option<Status> {
        let failure = self.failures.get_mut(call)?;
        failure.calls += 1;
        (failure.nth == 0 || failure.nth == failure.calls).then_some(failure.code)
    }
}

impl Stream {
    pub(crate) fn new(device: usize, blocking: bool, default: bool) -> Self {
        let (clock, captured) = (Clock::new(), Clock::new());
        Stream { device, blocking, default, thread: None, clock, capture: None, captured }
    }

    /// Whether a program has made it.
    pub(crate) fn is_made(&self) -> bool {
        !self.default && self.thread.is_none()
    }
}

pub(crate) fn setting<T: FromStr>(variable: &str, default: T, faults: &mut Vec<String>) -> T {
    let Ok(text) = env::var(variable) else { return default };
    text.parse().unwrap_or_else(|_| {
        faults.push(format!("{variable}: what is `{text}`?"));
        default
    })
}

/// `7.0` and the like.
pub(crate) fn two_numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
