//! A CUDA driver without a GPU, for tests of programs that call one.
//!
//! Built as a shared library, it is found as `libcuda.so.1` and plays the driver API by its rules, on host
//! memory. Kernels do not run: a launch is checked and noted in a log. The driver is strict. Whatever a
//! correct program would not do is refused with an error code, and is a *fault*: a line of text that tests
//! ask for ([`fake_faults`]).
//!
//! One file that needs nothing but `std`: `rustc --crate-type cdylib --edition 2024 -O src/lib.rs` builds it,
//! and with `--cfg 'feature="old"'` a driver of before CUDA 12.0.
//!
//! What it is like is read from the environment when it is loaded, and again by [`fake_reset`]:
//!
//! | variable | what it is | otherwise |
//! |---|---|---|
//! | `MOE_LORA_FAKE_DEVICES` | devices | 2 |
//! | `MOE_LORA_FAKE_CAPABILITY` | their compute capability | 9.0 |
//! | `MOE_LORA_FAKE_DRIVER` | version, as of `cuDriverGetVersion` | 13000; 11080 if `old` |
//! | `MOE_LORA_FAKE_REFUSE_CUBIN` | code that loading a cubin fails with | it loads |
//! | `MOE_LORA_FAKE_REFUSE_PTX` | code that loading PTX fails with | it loads |
//! | `MOE_LORA_FAKE_FAIL` | `cuInit=803;cuMemAlloc_v2=2@3`: calls that fail, always or the third | none |
//! | `MOE_LORA_FAKE_LENIENT` | `1`: as lenient as a driver was seen to be | strict |
//!
//! Codes are those that driver 580 (CUDA 13.0) was seen to return. It lets pass, and a lenient fake does too,
//! what the manual promises nothing of and other drivers refuse: objects used while the context of another
//! device, or none, is current; a stream destroyed while it is captured; a module loaded, or pageable host
//! memory copied, in a capture.
//!
//! Not modelled, and refused as a fault where a call shows it: contexts that are not primary, peer access,
//! graphs over several devices, pinned and managed memory, memory pools. Work ends at once, so nothing is
//! ever "not ready". Captured copies are not made again by a replay. The parameters of a cubin's kernels are not
//! known. Occupancy is a guess.

#![allow(non_snake_case)]
#![cfg_attr(feature = "old", allow(dead_code))]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt::Write;
use std::mem;
use std::ptr;
use std::slice;
use std::str::FromStr;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

// -----------------------------------------------------------------------------------------------------------
// What cuda.h calls them

/// `CUresult`.
type Status = u32;
/// Any of the opaque pointers, as `CUstream`. Here a number that nothing in memory lies at.
type Handle = usize;
/// `CUdeviceptr`.
type Address = u64;

const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const OUT_OF_MEMORY: Status = 2;
const NOT_INITIALIZED: Status = 3;
const NO_DEVICE: Status = 100;
const INVALID_DEVICE: Status = 101;
const INVALID_IMAGE: Status = 200;
const INVALID_CONTEXT: Status = 201;
const INVALID_PTX: Status = 218;
const UNSUPPORTED_PTX_VERSION: Status = 222;
const INVALID_HANDLE: Status = 400;
const ILLEGAL_STATE: Status = 401;
const NOT_FOUND: Status = 500;
const ILLEGAL_ADDRESS: Status = 700;
const CONTEXT_IS_DESTROYED: Status = 709;
const COOPERATIVE_LAUNCH_TOO_LARGE: Status = 720;
const CAPTURE_UNSUPPORTED: Status = 900;
const CAPTURE_INVALIDATED: Status = 901;
const CAPTURE_MERGE: Status = 902;
const CAPTURE_UNMATCHED: Status = 903;
const CAPTURE_UNJOINED: Status = 904;
const CAPTURE_ISOLATION: Status = 905;
const CAPTURE_IMPLICIT: Status = 906;
const CAPTURED_EVENT: Status = 907;
const CAPTURE_WRONG_THREAD: Status = 908;
const INVALID_CLUSTER_SIZE: Status = 912;

/// `CUstreamCaptureMode`.
const GLOBAL: u32 = 0;
const RELAXED: u32 = 2;

/// `CUstreamCaptureStatus`.
const NOT_CAPTURED: u32 = 0;
const CAPTURED: u32 = 1;
const CAPTURE_FAILED: u32 = 2;

/// `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: Handle,
    attributes: *const LaunchAttribute,
    attribute_count: u32,
}

/// `CUlaunchAttribute`: an id and 64 bytes of value.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct LaunchAttribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

// -----------------------------------------------------------------------------------------------------------
// Why a call is refused

/// The code that a call returns, and what is wrong with the caller, if anything.
struct Refusal {
    code: Status,
    fault: Option<String>,
}

type Answer<T = ()> = Result<T, Refusal>;

/// Refuses what a correct caller would not have asked.
fn fault<T>(code: Status, what: impl Into<String>) -> Answer<T> {
    Err(Refusal { code, fault: Some(what.into()) })
}

/// Refuses what a correct caller may have to ask, to hear that it is not so.
fn refuse<T>(code: Status) -> Answer<T> {
    Err(Refusal { code, fault: None })
}

fn require(condition: bool, code: Status, what: impl Into<String>) -> Answer {
    if condition { Ok(()) } else { fault(code, what) }
}

// -----------------------------------------------------------------------------------------------------------
// What there is

/// Objects of one kind by handle, those that are no more among them.
struct Table<T> {
    kind: &'static str,
    /// What a handle that is none is refused with.
    code: Status,
    live: BTreeMap<Handle, T>,
    gone: BTreeSet<Handle>,
}

impl<T> Table<T> {
    fn new(kind: &'static str, code: Status) -> Self {
        Table { kind, code, live: BTreeMap::new(), gone: BTreeSet::new() }
    }

    fn add(&mut self, handle: Handle, object: T) {
        self.live.insert(handle, object);
    }

    fn get(&self, handle: Handle) -> Answer<&T> {
        self.live.get(&handle).ok_or_else(|| self.missing(handle))
    }

    fn get_mut(&mut self, handle: Handle) -> Answer<&mut T> {
        if self.live.contains_key(&handle) {
            return Ok(self.live.get_mut(&handle).expect("it was found"));
        }
        Err(self.missing(handle))
    }

    fn missing(&self, handle: Handle) -> Refusal {
        let state = if self.gone.contains(&handle) { "was destroyed" } else { "is none" };
        Refusal { code: self.code, fault: Some(format!("{} {handle:#x} {state}", self.kind)) }
    }

    fn remove(&mut self, handle: Handle) -> Answer<T> {
        let object = self.live.remove(&handle).ok_or_else(|| self.missing(handle))?;
        self.gone.insert(handle);
        Ok(object)
    }

    /// Lets go of those that `which` names; tells how many.
    fn remove_all(&mut self, which: impl Fn(&T) -> bool) -> usize {
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
struct Device {
    context: Handle,
    retained: u32,
    flags: u32,
    default_stream: Handle,
}

/// Memory on a device. Addresses are not used again, so what was freed is known for good.
struct Allocation {
    device: usize,
    bytes: Vec<u8>,
    len: u64,
    freed: bool,
}

/// For each stream, the number of the last entry of it that comes before something, whatever the hardware
/// does: in the log, or among the nodes of a capture.
type Clock = BTreeMap<Handle, usize>;

fn join(clock: &mut Clock, other: &Clock) {
    for (stream, number) in other {
        let last = clock.entry(*stream).or_default();
        *last = (*last).max(*number);
    }
}

struct Stream {
    device: usize,
    /// It waits for the default stream and the default stream for it; true of that one itself.
    blocking: bool,
    default: bool,
    /// Whose default stream it is, where it is a thread's.
    thread: Option<usize>,
    clock: Clock,
    capture: Option<Handle>,
    /// As `clock`, within the capture.
    captured: Clock,
}

struct Event {
    device: usize,
    timed: bool,
    recorded: Recorded,
}

#[derive(Clone)]
enum Recorded {
    Never,
    /// By this entry of the log.
    Ran(usize, Clock),
    InCapture(Handle, Clock),
}

/// A capture under way.
struct Capture {
    device: usize,
    origin: Handle,
    mode: u32,
    thread: usize,
    streams: BTreeSet<Handle>,
    nodes: Vec<Work>,
    valid: bool,
}

/// A graph, or one made ready to launch.
struct Graph {
    device: usize,
    nodes: Vec<Work>,
}

struct Module {
    device: usize,
    image: Image,
    /// Of the kernels that were asked for.
    functions: BTreeMap<String, Handle>,
}

enum Image {
    Ptx(Vec<Kernel>),
    /// The whole file.
    Cubin(Vec<u8>),
}

/// What PTX says of an entry point; of a cubin's only the name is known.
#[derive(Clone, Default)]
struct Kernel {
    name: String,
    /// Bytes of each parameter.
    parameters: Option<Vec<usize>>,
    /// `.maxntid`, `.reqntid`, `.reqnctapercluster`.
    most_threads: Option<[u32; 3]>,
    exact_threads: Option<[u32; 3]>,
    exact_cluster: Option<[u32; 3]>,
}

struct Function {
    device: usize,
    module: Handle,
    kernel: Kernel,
    /// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
    most_shared: u32,
    /// `CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED`.
    large_clusters: bool,
}

/// Something queued on a stream.
#[derive(Clone)]
struct Work {
    kind: &'static str,
    /// `key=value` words for the log.
    words: String,
    /// Address and bytes of what it reads or writes: of a launch the allocations that its parameters point
    /// into.
    memory: Vec<(Address, u64)>,
    /// The kernel that must be loaded.
    function: Option<Handle>,
    /// What the memory is filled with.
    fill: Option<u8>,
}

impl Work {
    fn new(kind: &'static str, words: String) -> Self {
        Work { kind, words, memory: Vec::new(), function: None, fill: None }
    }
}

/// A line of the log.
struct Entry {
    device: usize,
    /// 0 for the default stream.
    stream: Handle,
    thread: usize,
    work: Work,
    /// Entries that ended before it began, whatever the hardware does: the last one of each stream.
    after: Vec<usize>,
}

/// What a thread of the caller has to itself.
#[derive(Default)]
struct Thread {
    /// From 1, in the order of their first calls.
    number: usize,
    /// Which of the drivers between resets it belongs to.
    driver: usize,
    contexts: Vec<Handle>,
    capture_mode: u32,
}

/// A failure that a test asked for.
struct Failure {
    code: Status,
    /// Which call fails; 0: every one.
    nth: i32,
    calls: i32,
}

struct Driver {
    started: bool,
    capability: (u32, u32),
    version: i32,
    refuse_cubin: Option<Status>,
    refuse_ptx: Option<Status>,
    lenient: bool,

    devices: Vec<Device>,
    memory: BTreeMap<Address, Allocation>,
    streams: Table<Stream>,
    events: Table<Event>,
    modules: Table<Module>,
    functions: Table<Function>,
    captures: Table<Capture>,
    graphs: Table<Graph>,
    executables: Table<Graph>,

    /// What the host has waited for.
    waited: Clock,
    log: Vec<Entry>,
    faults: Vec<String>,
    failures: BTreeMap<String, Failure>,

    /// The calling thread's, during a call.
    thread: Thread,
    threads: usize,
    number: usize,
    next_handle: Handle,
    next_address: Address,
}

const FIRST_HANDLE: Handle = 0x1000;
/// Where the handles of the threads' default streams begin, which no program knows.
const THREAD_STREAMS: Handle = 1 << 40;
const FIRST_ADDRESS: Address = 0x7000_0000_0000;
/// Unused addresses behind each allocation, at least.
const GAP: u64 = 4096;
const MEMORY_BYTES: u64 = 16 << 30;
const MULTIPROCESSORS: u32 = 132;
/// Multiprocessors by cluster of processors (GPC): no cluster of blocks spans two.
const GPCS: [u32; 8] = [18, 18, 18, 16, 16, 16, 16, 14];
/// Shared memory that a block has without asking for more.
const PORTABLE_SHARED: u32 = 48 << 10;
/// Shared memory that the driver takes of each block.
const RESERVED_SHARED: u32 = 1 << 10;

impl Driver {
    fn new(number: usize) -> Self {
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

    fn handle(&mut self) -> Handle {
        self.next_handle += 0x10;
        self.next_handle
    }

    /// Most shared memory that a block may ask for, and what a multiprocessor has: the programming guide's
    /// table of technical specifications.
    fn shared_bytes(&self) -> (u32, u32) {
        match self.capability {
            (8, 0 | 7) => (163 << 10, 164 << 10),
            (8, _) | (12, _) => (99 << 10, 100 << 10),
            (7, _) => (64 << 10, 64 << 10),
            _ => (227 << 10, 228 << 10),
        }
    }

    /// The failure that a test asked for this call.
    fn failure(&mut self, call: &str) -> Option<Status> {
        let failure = self.failures.get_mut(call)?;
        failure.calls += 1;
        (failure.nth == 0 || failure.nth == failure.calls).then_some(failure.code)
    }
}

impl Stream {
    fn new(device: usize, blocking: bool, default: bool) -> Self {
        let (clock, captured) = (Clock::new(), Clock::new());
        Stream { device, blocking, default, thread: None, clock, capture: None, captured }
    }

    /// Whether a program has made it.
    fn is_made(&self) -> bool {
        !self.default && self.thread.is_none()
    }
}

fn setting<T: FromStr>(variable: &str, default: T, faults: &mut Vec<String>) -> T {
    let Ok(text) = env::var(variable) else { return default };
    text.parse().unwrap_or_else(|_| {
        faults.push(format!("{variable}: what is `{text}`?"));
        default
    })
}

// -----------------------------------------------------------------------------------------------------------
// Calls

static DRIVER: LazyLock<Mutex<Driver>> = LazyLock::new(|| Mutex::new(Driver::new(1)));

thread_local! {
    static THREAD: RefCell<Thread> = RefCell::default();
}

fn driver() -> MutexGuard<'static, Driver> {
    DRIVER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call of a driver that `cuInit` must have started.
fn call(name: &str, body: impl FnOnce(&mut Driver) -> Answer) -> Status {
    early_call(name, |driver| match driver.started {
        true => body(driver),
        // Whoever keeps the caller's context asks before anything else.
        false if name.starts_with("cuCtx") && name.ends_with("Current") => refuse(NOT_INITIALIZED),
        false => fault(NOT_INITIALIZED, "cuInit was not called"),
    })
}

/// A call that may come before `cuInit`.
fn early_call(name: &str, body: impl FnOnce(&mut Driver) -> Answer) -> Status {
    let mut driver = driver();
    // A thread that ends may have let its own go before.
    driver.thread = THREAD.try_with(RefCell::take).unwrap_or_default();
    if driver.thread.driver != driver.number {
        driver.threads += 1;
        driver.thread = Thread { number: driver.threads, driver: driver.number, ..Thread::default() };
        let thread = Some(driver.threads);
        for device in 0..driver.devices.len() {
            let handle = THREAD_STREAMS + driver.threads * driver.devices.len() + device;
            driver.streams.add(handle, Stream { thread, ..Stream::new(device, true, false) });
        }
    }
    let answer = match driver.failure(name) {
        Some(code) => refuse(code),
        None => body(&mut driver),
    };
    let thread = mem::take(&mut driver.thread);
    let _ = THREAD.try_with(|kept| kept.replace(thread));
    match answer {
        Ok(()) => SUCCESS,
        Err(Refusal { code, fault }) => {
            driver.faults.extend(fault.map(|what| format!("{name}: {what}")));
            code
        }
    }
}

/// Gives the caller a value.
fn put<T>(out: *mut T, value: T) -> Answer {
    require(!out.is_null(), INVALID_VALUE, "there is nowhere to write the answer")?;
    // SAFETY: a caller of the driver promises that a pointer is null or valid.
    unsafe { out.write(value) };
    Ok(())
}

/// As [`put`], where the caller need not want it.
fn put_if<T>(out: *mut T, value: T) -> Answer {
    if out.is_null() { Ok(()) } else { put(out, value) }
}

/// A name that the caller gives.
fn name_of<'a>(text: *const c_char) -> Answer<&'a str> {
    require(!text.is_null(), INVALID_VALUE, "there is no name")?;
    // SAFETY: as above; names end with NUL.
    Ok(unsafe { CStr::from_ptr(text) }.to_str().unwrap_or(""))
}

/// Elements that the caller gives.
fn elements<'a, T>(first: *const T, count: usize) -> Answer<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    require(!first.is_null(), INVALID_VALUE, "a pointer is null")?;
    // SAFETY: as above.
    Ok(unsafe { slice::from_raw_parts(first, count) })
}

/// Writes `text`, and NUL, as far as it fits into `len` bytes; tells how many it has.
fn put_text(text: &str, out: *mut c_char, len: usize) -> usize {
    if !out.is_null() && len > 0 {
        let fits = text.len().min(len - 1);
        // SAFETY: the caller has room for `len` bytes.
        unsafe {
            ptr::copy_nonoverlapping(text.as_ptr().cast(), out, fits);
            out.add(fits).write(0);
        }
    }
    text.len()
}

// -----------------------------------------------------------------------------------------------------------
// Rules that many calls share

impl Driver {
    fn device(&self, ordinal: c_int) -> Answer<usize> {
        let device = usize::try_from(ordinal).ok().filter(|device| *device < self.devices.len());
        device.ok_or(Refusal { code: INVALID_DEVICE, fault: None })
    }

    fn device_of_context(&self, context: Handle) -> Answer<usize> {
        match self.devices.iter().position(|device| device.context == context) {
            Some(device) => Ok(device),
            None => fault(INVALID_CONTEXT, format!("context {context:#x} is none")),
        }
    }

    /// The device whose context is current, "Context Management".
    fn current(&self) -> Answer<usize> {
        let Some(context) = self.thread.contexts.last() else {
            return fault(INVALID_CONTEXT, "no context is current");
        };
        let device = self.device_of_context(*context)?;
        let retained = self.devices[device].retained > 0;
        require(
            retained,
            CONTEXT_IS_DESTROYED,
            format!("the current context, of device {device}, was released"),
        )?;
        Ok(device)
    }

    /// Checks that something may be used while this context is current.
    fn check_context(&self, device: usize, what: &str) -> Answer {
        if self.lenient {
            return Ok(());
        }
        let current = self.current()?;
        let text = || format!("{what} is of device {device}, and the context of device {current} is current");
        if current == device { Ok(()) } else { fault(INVALID_CONTEXT, text()) }
    }

    /// The stream that a handle stands for: "Stream synchronization behavior".
    fn stream(&self, handle: Handle) -> Answer<Handle> {
        match handle {
            0 | 1 => Ok(self.devices[self.current()?].default_stream),
            2 => Ok(THREAD_STREAMS + self.thread.number * self.devices.len() + self.current()?),
            _ => {
                let device = self.streams.get(handle)?.device;
                self.check_context(device, "the stream")?;
                Ok(handle)
            }
        }
    }

    /// The allocation that holds `address`, freed or not.
    fn allocation(&self, address: Address) -> Option<(Address, &Allocation)> {
        let (start, allocation) = self.memory.range(..=address).next_back()?;
        (address - start < allocation.len).then_some((*start, allocation))
    }

    /// Checks that memory is within one allocation of a device; tells where that starts.
    fn check_range(&self, address: Address, len: u64, device: usize) -> Answer<Address> {
        let Some((start, allocation)) = self.allocation(address) else {
            return fault(INVALID_VALUE, format!("address {address:#x} is in no allocation"));
        };
        require(!allocation.freed, INVALID_VALUE, format!("the memory at {address:#x} was freed"))?;
        let left = allocation.len - (address - start);
        let what = format!("{len} bytes at {address:#x}, where the allocation has {left}");
        require(len <= left, INVALID_VALUE, what)?;
        let what =
            format!("the memory at {address:#x} is of device {}, the stream of {device}", allocation.device);
        require(allocation.device == device, INVALID_VALUE, what)?;
        Ok(start)
    }

    /// The bytes of memory that was checked.
    fn bytes_mut(&mut self, start: Address, address: Address, len: u64) -> &mut [u8] {
        let first = (address - start) as usize;
        &mut self.memory.get_mut(&start).expect("it was checked").bytes[first..first + len as usize]
    }

    /// Makes captures fail, for what the caller did meanwhile.
    fn invalidate(&mut self, which: impl Fn(&Capture) -> bool) -> bool {
        let mut any = false;
        for capture in self.captures.live.values_mut().filter(|capture| which(capture)) {
            capture.valid = false;
            any = true;
        }
        any
    }

    /// A call that allocates, frees or waits: `cuThreadExchangeStreamCaptureMode` calls it potentially
    /// unsafe, and says when captures forbid it.
    fn unsafe_call(&mut self) -> Answer {
        let Thread { number, capture_mode, .. } = self.thread;
        let forbids = |capture: &Capture| match capture.mode {
            RELAXED => false,
            _ if capture_mode == RELAXED => false,
            _ if capture.thread == number => true,
            mode => capture_mode == GLOBAL && mode == GLOBAL,
        };
        if self.invalidate(forbids) {
            return fault(CAPTURE_UNSUPPORTED, "a capture under way forbids it");
        }
        Ok(())
    }

    /// What the default stream must not do while a stream that waits for it is captured.
    fn check_default(&mut self, stream: Handle) -> Answer {
        let &Stream { device, default, .. } = self.streams.get(stream)?;
        if default && self.invalidate_blocking(device) {
            return fault(CAPTURE_IMPLICIT, "the default stream would wait for a stream that is captured");
        }
        Ok(())
    }

    /// Makes the captures fail that a blocking stream of this device is part of.
    fn invalidate_blocking(&mut self, device: usize) -> bool {
        let blocking = self.captures_blocking(device);
        for capture in &blocking {
            self.captures.live.get_mut(capture).expect("it lives").valid = false;
        }
        !blocking.is_empty()
    }

    fn captures_blocking(&self, device: usize) -> Vec<Handle> {
        let streams = self.streams.live.values();
        streams
            .filter(|stream| stream.device == device && stream.blocking)
            .filter_map(|stream| stream.capture)
            .collect()
    }

    /// The capture that what is queued on a stream becomes part of.
    fn capture_of(&self, stream: Handle) -> Answer<Option<Handle>> {
        let Some(capture) = self.streams.get(stream)?.capture else { return Ok(None) };
        require(self.captures.get(capture)?.valid, CAPTURE_INVALIDATED, "the capture failed before")?;
        Ok(Some(capture))
    }

    /// Queues work on a stream: it runs at once, or becomes a node of the graph that the stream is captured
    /// into. Returns whether it ran.
    fn queue(&mut self, stream: Handle, work: Work) -> Answer<bool> {
        if let Some(capture) = self.capture_of(stream)? {
            let nodes = &mut self.captures.get_mut(capture)?.nodes;
            nodes.push(work);
            let number = nodes.len();
            self.streams.get_mut(stream)?.captured.insert(stream, number);
            return Ok(false);
        }
        self.check_default(stream)?;
        self.run(stream, work)?;
        Ok(true)
    }

    /// Runs work on a stream that is not captured.
    fn run(&mut self, stream: Handle, work: Work) -> Answer {
        let &Stream { device, blocking, default, .. } = self.streams.get(stream)?;
        let mut clock = self.waited.clone();
        for (handle, other) in &self.streams.live {
            let waits = *handle == stream
                || other.device == device && blocking && other.blocking && (default || other.default);
            if waits {
                join(&mut clock, &other.clock);
            }
        }
        let after = clock.values().copied().collect();
        clock.insert(stream, self.log.len() + 1);
        self.streams.get_mut(stream)?.clock = clock;
        if let (Some(value), &[(address, len)]) = (work.fill, work.memory.as_slice()) {
            let start = self.check_range(address, len, device)?;
            self.bytes_mut(start, address, len).fill(value);
        }
        let stream = if default { 0 } else { stream };
        self.log.push(Entry { device, stream, thread: self.thread.number, work, after });
        Ok(())
    }

    /// Lets the streams of a capture go.
    fn end_capture(&mut self, capture: Handle) -> Answer<Capture> {
        let capture = self.captures.remove(capture)?;
        for stream in &capture.streams {
            if let Some(stream) = self.streams.live.get_mut(stream) {
                stream.capture = None;
            }
        }
        Ok(capture)
    }
}

// -----------------------------------------------------------------------------------------------------------
// "Error Handling", "Initialization", "Version Management"

fn put_error(code: Status, out: *mut *const c_char, text: impl Fn(&ErrorText) -> &'static CStr) -> Answer {
    let known = ERRORS.iter().find(|error| error.0 == code);
    put(out, known.map_or(ptr::null(), |error| text(error).as_ptr()))?;
    if known.is_some() { Ok(()) } else { refuse(INVALID_VALUE) }
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(code: Status, out: *mut *const c_char) -> Status {
    early_call("cuGetErrorName", |_| put_error(code, out, |error| error.1))
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(code: Status, out: *mut *const c_char) -> Status {
    early_call("cuGetErrorString", |_| put_error(code, out, |error| error.2))
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: u32) -> Status {
    early_call("cuInit", |driver| {
        require(flags == 0, INVALID_VALUE, format!("flags {flags} mean nothing"))?;
        if driver.devices.is_empty() {
            return refuse(NO_DEVICE);
        }
        driver.started = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    early_call("cuDriverGetVersion", |driver| put(version, driver.version))
}

// -----------------------------------------------------------------------------------------------------------
// "Device Management"

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    call("cuDeviceGet", |driver| put(device, driver.device(ordinal)? as c_int))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    call("cuDeviceGetCount", |driver| put(count, driver.devices.len() as c_int))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> Status {
    call("cuDeviceGetName", |driver| {
        driver.device(device)?;
        require(!name.is_null() && len > 0, INVALID_VALUE, "there is nowhere to write the name")?;
        put_text("Fake GPU", name, len as usize);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> Status {
    call("cuDeviceTotalMem_v2", |driver| {
        driver.device(device)?;
        put(bytes, MEMORY_BYTES as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: u32, device: c_int) -> Status {
    call("cuDeviceGetAttribute", |driver| {
        driver.device(device)?;
        let (major, minor) = driver.capability;
        let (most_shared, shared) = driver.shared_bytes();
        let answer = match attribute {
            // Threads of a block, and its sides.
            1..=3 => 1024,
            4 => 64,
            // The grid's sides.
            5 => i32::MAX,
            6 | 7 => 65535,
            // MAX_SHARED_MEMORY_PER_BLOCK, WARP_SIZE, MAX_REGISTERS_PER_BLOCK.
            8 => PORTABLE_SHARED as c_int,
            10 => 32,
            12 => 65536,
            // CLOCK_RATE, MULTIPROCESSOR_COUNT.
            13 => 1_980_000,
            16 => MULTIPROCESSORS as c_int,
            // MEMORY_CLOCK_RATE and GLOBAL_MEMORY_BUS_WIDTH: 3352 GB/s.
            36 => 2_619_000,
            37 => 5120,
            // L2_CACHE_SIZE, MAX_THREADS_PER_MULTIPROCESSOR, UNIFIED_ADDRESSING.
            38 => 50 << 20,
            39 => 2048,
            41 => 1,
            // COMPUTE_CAPABILITY_MAJOR and _MINOR.
            75 => major as c_int,
            76 => minor as c_int,
            // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            // RESERVED_SHARED_MEMORY_PER_BLOCK.
            81 => shared as c_int,
            97 => most_shared as c_int,
            111 => RESERVED_SHARED as c_int,
            // COOPERATIVE_LAUNCH, CLUSTER_LAUNCH.
            95 => 1,
            120 => c_int::from(major >= 9),
            // Whatever else there is in CUDA 13.0, the device has not.
            9..150 => 0,
            _ => return fault(INVALID_VALUE, format!("attribute {attribute} is none")),
        };
        put(value, answer)
    })
}

// -----------------------------------------------------------------------------------------------------------
// "Primary Context Management"

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> Status {
    call("cuDevicePrimaryCtxRetain", |driver| {
        let device = driver.device(device)?;
        let device = &mut driver.devices[device];
        put(context, device.context)?;
        device.retained += 1;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Status {
    call("cuDevicePrimaryCtxRelease_v2", |driver| driver.release(device))
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease(device: c_int) -> Status {
    call("cuDevicePrimaryCtxRelease", |driver| driver.release(device))
}

impl Driver {
    fn release(&mut self, device: c_int) -> Answer {
        let ordinal = self.device(device)?;
        let device = &mut self.devices[ordinal];
        require(device.retained > 0, INVALID_CONTEXT, format!("device {ordinal}'s context is not retained"))?;
        device.retained -= 1;
        if device.retained > 0 {
            return Ok(());
        }
        let default_stream = device.default_stream;
        let mut freed = 0;
        for memory in self.memory.values_mut().filter(|memory| memory.device == ordinal && !memory.freed) {
            memory.free();
            freed += 1;
        }
        self.captures.remove_all(|capture| capture.device == ordinal);
        let lost = [
            ("allocations", freed),
            ("streams", self.streams.remove_all(|stream| stream.device == ordinal && stream.is_made())),
            ("events", self.events.remove_all(|event| event.device == ordinal)),
            ("modules", self.modules.remove_all(|module| module.device == ordinal)),
            ("graphs", self.graphs.remove_all(|graph| graph.device == ordinal)),
            ("executable graphs", self.executables.remove_all(|graph| graph.device == ordinal)),
        ];
        self.functions.remove_all(|function| function.device == ordinal);
        *self.streams.get_mut(default_stream)? = Stream::new(ordinal, true, true);
        let lost: Vec<String> = lost
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(what, count)| format!("{count} {what}"))
            .collect();
        if !lost.is_empty() {
            // The call succeeds all the same, as the driver's does.
            let lost = lost.join(", ");
            self.faults.push(format!("context of device {ordinal} released with {lost} alive"));
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut u32, active: *mut c_int) -> Status {
    call("cuDevicePrimaryCtxGetState", |driver| {
        let device = driver.device(device)?;
        put(flags, driver.devices[device].flags)?;
        put(active, c_int::from(driver.devices[device].retained > 0))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, flags: u32) -> Status {
    call("cuDevicePrimaryCtxSetFlags_v2", |driver| {
        let device = driver.device(device)?;
        require(flags <= 0xff, INVALID_VALUE, format!("flags {flags:#x} mean nothing"))?;
        driver.devices[device].flags = flags;
        Ok(())
    })
}

// -----------------------------------------------------------------------------------------------------------
// "Context Management"

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> Status {
    call("cuCtxGetCurrent", |driver| put(context, driver.thread.contexts.last().copied().unwrap_or(0)))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Handle) -> Status {
    call("cuCtxSetCurrent", |driver| {
        if context != 0 {
            driver.device_of_context(context)?;
        }
        // It takes the place of the topmost; null takes that away.
        driver.thread.contexts.pop();
        driver.thread.contexts.extend((context != 0).then_some(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> Status {
    call("cuCtxPushCurrent_v2", |driver| {
        require(context != 0, INVALID_VALUE, "there is no context")?;
        driver.device_of_context(context)?;
        driver.thread.contexts.push(context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPopCurrent_v2(context: *mut Handle) -> Status {
    call("cuCtxPopCurrent_v2", |driver| match driver.thread.contexts.pop() {
        Some(top) => put_if(context, top),
        None => fault(INVALID_CONTEXT, "no context is current"),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: *mut c_int) -> Status {
    call("cuCtxGetDevice", |driver| match driver.thread.contexts.last() {
        Some(context) => put(device, driver.device_of_context(*context)? as c_int),
        // How a program finds out whether there is one.
        None => refuse(INVALID_CONTEXT),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> Status {
    call("cuCtxSynchronize", |driver| {
        let device = driver.current()?;
        if driver.invalidate(|capture| capture.device == device) {
            return fault(CAPTURE_UNSUPPORTED, "a stream of the context is captured");
        }
        driver.unsafe_call()?;
        for stream in driver.streams.live.values().filter(|stream| stream.device == device) {
            join(&mut driver.waited, &stream.clock);
        }
        let stream = driver.devices[device].default_stream;
        driver.run(stream, Work::new("synchronize_context", String::new()))
    })
}

// -----------------------------------------------------------------------------------------------------------
// "Module Management", "Execution Control"

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const u8) -> Status {
    call("cuModuleLoadData", |driver| {
        let handle = driver.load(image).map_err(|(refusal, _)| refusal)?;
        put(module, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadDataEx(
    module: *mut Handle,
    image: *const u8,
    count: u32,
    options: *const u32,
    values: *mut *mut c_void,
) -> Status {
    call("cuModuleLoadDataEx", |driver| {
        // CU_JIT_ERROR_LOG_BUFFER and CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES.
        let options = elements(options, count as usize)?;
        let place = |id: u32| options.iter().position(|option| *option == id);
        let values_given = elements(values.cast_const(), count as usize)?;
        let buffer = place(5).map_or(ptr::null_mut(), |i| values_given[i].cast::<c_char>());
        let room = place(6).map_or(0, |i| values_given[i] as u32 as usize);
        let loaded = driver.load(image);
        let log = loaded.as_ref().err().map_or("", |(_, log)| log.as_str());
        let written = put_text(log, buffer, room).min(room.saturating_sub(1));
        if let Some(i) = place(6) {
            // SAFETY: as of any pointer that a caller gives; the size is replaced by what was written.
            unsafe { values.add(i).write(written as *mut c_void) };
        }
        put(module, loaded.map_err(|(refusal, _)| refusal)?)
    })
}

impl Driver {
    /// Loads an image; an error comes with the text for the log of the compiler.
    fn load(&mut self, image: *const u8) -> Result<Handle, (Refusal, String)> {
        let silent = |refusal| (refusal, String::new());
        let device = self.current().map_err(silent)?;
        if !self.lenient {
            self.unsafe_call().map_err(silent)?;
        }
        let first = elements(image, 1).map_err(silent)?[0];
        let image = match first {
            0x7f => self.cubin(image),
            b'.' | b'/' | b' ' | b'\n' => self.ptx(image),
            _ => fault(INVALID_IMAGE, "the image is neither a cubin nor PTX"),
        };
        let image = image.map_err(|refusal| {
            let log = refusal.fault.clone().unwrap_or_else(|| "refused, as the test asked".to_owned());
            (refusal, format!("fatal: {log}"))
        })?;
        let handle = self.handle();
        self.modules.add(handle, Module { device, image, functions: BTreeMap::new() });
        Ok(handle)
    }

    fn cubin(&self, image: *const u8) -> Answer<Image> {
        let image = elf(image)?;
        if let Some(code) = self.refuse_cubin {
            return refuse(code);
        }
        Ok(Image::Cubin(image.to_vec()))
    }

    fn ptx(&self, image: *const u8) -> Answer<Image> {
        let mut len = 0;
        loop {
            // SAFETY: PTX goes on until NUL, and all before it was text.
            let byte = unsafe { image.add(len).read() };
            if byte == 0 {
                break;
            }
            let text = byte.is_ascii_graphic() || byte.is_ascii_whitespace();
            require(text, INVALID_IMAGE, format!("PTX has byte {byte:#x} at {len}: no NUL ends it"))?;
            len += 1;
        }
        if let Some(code) = self.refuse_ptx {
            return refuse(code);
        }
        let text = str::from_utf8(elements(image, len)?).expect("ASCII is UTF-8");
        let word = |directive: &str| {
            let lines = text.lines().map(str::trim_start).take_while(|line| !line.contains(".entry"));
            lines.filter_map(|line| line.strip_prefix(directive)).next()?.split_whitespace().next()
        };
        let version = word(".version").and_then(two_numbers);
        let Some(version) = version else { return fault(INVALID_PTX, "PTX has no .version") };
        let newest = ptx_version(self.version);
        let what = format!("PTX is of version {version:?}, and the driver knows {newest:?}");
        require(version <= newest, UNSUPPORTED_PTX_VERSION, what)?;
        let Some(target) = word(".target") else { return fault(INVALID_PTX, "PTX has no .target") };
        let capability = self.capability;
        let what = format!("PTX is for {target}, the device has capability {capability:?}");
        require(runs_on(target.trim_end_matches(','), capability), INVALID_PTX, what)?;
        Ok(Image::Ptx(kernels(text)))
    }
}

/// `7.0` and the like.
fn two_numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The newest PTX that a driver compiles: the PTX manual, "Release Notes".
fn ptx_version(driver: i32) -> (u32, u32) {
    let (major, minor) = ((driver / 1000) as u32, (driver % 1000 / 10) as u32);
    match (major, minor) {
        (12, 6..) => (8, minor - 1),
        _ => (major.saturating_sub(4), minor),
    }
}

/// Whether PTX for a target, as `sm_90a`, may be compiled for a device: the PTX manual, `.target`.
fn runs_on(target: &str, (major, minor): (u32, u32)) -> bool {
    let Some(number) = target.strip_prefix("sm_") else { return false };
    let digits = number.trim_end_matches(['a', 'f']);
    let (Ok(sm), capability) = (digits.parse::<u32>(), major * 10 + minor) else { return false };
    match &number[digits.len()..] {
        "a" => capability == sm,
        "f" => capability >= sm && capability / 10 == sm / 10,
        _ => capability >= sm,
    }
}

/// The entry points of PTX text.
fn kernels(text: &str) -> Vec<Kernel> {
    let starts = text.match_indices(".entry").map(|(at, word)| (at, at + word.len()));
    let commented = |at: usize| text[..at].rsplit('\n').next().is_some_and(|line| line.contains("//"));
    starts.filter(|(at, _)| !commented(*at)).map(|(_, start)| kernel(&text[start..])).collect()
}

/// An entry point, from its name on.
fn kernel(text: &str) -> Kernel {
    let head = text.split(['{', ';']).next().unwrap_or("");
    let (signature, directives) = head.split_once(')').unwrap_or((head, head));
    let (name, parameters) = signature.split_once('(').unwrap_or((signature, ""));
    let name = name.split_whitespace().next().unwrap_or("").to_owned();
    // `.param .align 8 .b8 name[120]`, `.param .u64 name`.
    let bytes = |parameter: &str| {
        let types = parameter.split_whitespace().filter_map(|word| word.strip_prefix(['.']));
        let bits = types
            .filter_map(|word| word.trim_start_matches(['b', 'u', 's', 'f']).parse::<usize>().ok())
            .next_back();
        let count =
            parameter.split_once('[').and_then(|(_, count)| count.split(']').next()?.trim().parse().ok());
        bits.unwrap_or(0) / 8 * count.unwrap_or(1)
    };
    let parameters =
        parameters.split(',').map(str::trim).filter(|text| !text.is_empty()).map(bytes).collect();
    let three = |directive: &str| {
        let text = directives.split_once(directive)?.1;
        let line = text.lines().next().unwrap_or("").split('.').next().unwrap_or("");
        let mut numbers = line.split(',').map(|number| number.trim().parse().unwrap_or(1));
        Some([(); 3].map(|()| numbers.next().unwrap_or(1)))
    };
    Kernel {
        name,
        parameters: Some(parameters),
        most_threads: three(".maxntid"),
        exact_threads: three(".reqntid"),
        exact_cluster: three(".reqnctapercluster"),
    }
}

/// The bytes of an ELF file of 64 bits for a GPU: up to the end of its section headers, sections and
/// segments.
fn elf<'a>(image: *const u8) -> Answer<&'a [u8]> {
    const HEADER: usize = 64;
    const GPU: u64 = 190;
    let number = |bytes: &[u8], at: usize, len: usize| {
        bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    let start = elements(image, 5)?;
    require(start == b"\x7fELF\x02", INVALID_IMAGE, "the image is no ELF file of 64 bits")?;
    let header = elements(image, HEADER)?;
    require(number(header, 18, 2) == GPU, INVALID_IMAGE, "the ELF file is not for a GPU")?;
    let table = |offset: usize, size: usize, count: usize| {
        [number(header, offset, 8), number(header, size, 2), number(header, count, 2)]
            .map(|number| number as usize)
    };
    let [segments, segment_size, segment_count] = table(32, 54, 56);
    let [sections, section_size, section_count] = table(40, 58, 60);
    let what = "the ELF file has no section headers that make sense";
    require(section_count == 0 || section_size == 64, INVALID_IMAGE, what)?;
    let mut end =
        HEADER.max(segments + segment_size * segment_count).max(sections + section_size * section_count);
    let headers = elements(image, end)?;
    for section in headers[sections..].chunks_exact(64).take(section_count) {
        const EMPTY: u64 = 8;
        if number(section, 4, 4) != EMPTY {
            end = end.max((number(section, 24, 8) + number(section, 32, 8)) as usize);
        }
    }
    elements(image, end)
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> Status {
    call("cuModuleUnload", |driver| {
        let device = driver.modules.get(module)?.device;
        driver.check_context(device, "the module")?;
        driver.unsafe_call()?;
        driver.modules.remove(module)?;
        driver.functions.remove_all(|function| function.module == module);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) -> Status {
    call("cuModuleGetFunction", |driver| {
        let Module { device, image, functions } = driver.modules.get(module)?;
        let (device, name) = (*device, name_of(name)?);
        driver.check_context(device, "the module")?;
        require(!name.is_empty(), INVALID_VALUE, "the name is empty")?;
        if let Some(known) = functions.get(name) {
            return put(function, *known);
        }
        let kernel = match image {
            Image::Ptx(kernels) => kernels.iter().find(|kernel| kernel.name == name).cloned(),
            Image::Cubin(bytes) => {
                let section = format!(".text.{name}\0");
                let found = bytes.windows(section.len()).any(|window| window == section.as_bytes());
                found.then(|| Kernel { name: name.to_owned(), ..Kernel::default() })
            }
        };
        let Some(kernel) = kernel else { return refuse(NOT_FOUND) };
        let handle = driver.handle();
        put(function, handle)?;
        driver.modules.get_mut(module)?.functions.insert(name.to_owned(), handle);
        let most_shared = PORTABLE_SHARED;
        driver.functions.add(handle, Function { device, module, kernel, most_shared, large_clusters: false });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: Handle, attribute: u32, value: c_int) -> Status {
    call("cuFuncSetAttribute", |driver| {
        let most = driver.shared_bytes().0;
        driver.check_context(driver.functions.get(function)?.device, "the function")?;
        let function = driver.functions.get_mut(function)?;
        match attribute {
            8 => {
                let bytes = u32::try_from(value).ok().filter(|bytes| *bytes <= most);
                let Some(bytes) = bytes else {
                    return fault(
                        INVALID_VALUE,
                        format!("{value} bytes of shared memory, where a block has {most}"),
                    );
                };
                function.most_shared = bytes;
            }
            // PREFERRED_SHARED_MEMORY_CARVEOUT, CLUSTER_SCHEDULING_POLICY_PREFERENCE.
            9 | 15 => {}
            14 => function.large_clusters = value != 0,
            _ => return fault(INVALID_VALUE, format!("attribute {attribute} cannot be set")),
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncGetAttribute(value: *mut c_int, attribute: u32, function: Handle) -> Status {
    call("cuFuncGetAttribute", |driver| {
        let capability = driver.capability;
        let function = driver.functions.get(function)?;
        driver.check_context(function.device, "the function")?;
        let threads = function.kernel.most_threads.or(function.kernel.exact_threads);
        let answer = match attribute {
            // MAX_THREADS_PER_BLOCK, NUM_REGS, PTX_VERSION, BINARY_VERSION.
            0 => threads.map_or(1024, |threads| volume(threads) as c_int),
            4 => 32,
            5 | 6 => (capability.0 * 10 + capability.1) as c_int,
            8 => function.most_shared as c_int,
            14 => c_int::from(function.large_clusters),
            1..=3 | 7 | 10..=13 | 15 => 0,
            9 => -1,
            _ => return fault(INVALID_VALUE, format!("attribute {attribute} is none")),
        };
        put(value, answer)
    })
}

/// How many a grid, a block or a cluster of these sides has.
fn volume(sides: [u32; 3]) -> u64 {
    sides.into_iter().map(u64::from).fold(1, u64::saturating_mul)
}

/// A launch as it was asked for, checked as far as both the launch and the question of how many clusters fit
/// need.
struct Launch<'a> {
    config: &'a LaunchConfig,
    /// Blocks of a cluster; `None` where none was asked for.
    cluster: Option<[u32; 3]>,
    cooperative: bool,
    overlaps: bool,
    /// Blocks that a multiprocessor holds.
    resident: u32,
}

impl Driver {
    fn launch<'a>(&self, config: *const LaunchConfig, function: &Function) -> Answer<Launch<'a>> {
        let config = &elements(config, 1)?[0];
        let kernel = &function.kernel;
        let (mut cluster, mut cooperative, mut overlaps) = (kernel.exact_cluster, false, false);
        for attribute in elements(config.attributes, config.attribute_count as usize)? {
            let [x, y, z] = [0, 1, 2].map(|i| attribute.value[i]);
            // IGNORE; COOPERATIVE; CLUSTER_DIMENSION, _SCHEDULING_POLICY_PREFERENCE;
            // PROGRAMMATIC_STREAM_SERIALIZATION, PRIORITY.
            match attribute.id {
                0 | 5 | 8 => {}
                2 => cooperative = x != 0,
                4 => {
                    let exact = kernel.exact_cluster.is_none_or(|exact| exact == [x, y, z]);
                    require(exact, INVALID_CLUSTER_SIZE, "the kernel is for clusters of another size")?;
                    cluster = Some([x, y, z]);
                }
                6 => overlaps = x != 0,
                id => return fault(INVALID_VALUE, format!("launch attribute {id} is not known")),
            }
        }
        let [blocks, threads] = [config.grid, config.block].map(volume);
        require(blocks > 0 && threads > 0, INVALID_VALUE, "the grid or the block is empty")?;
        let most = kernel.most_threads.map_or(1024, volume);
        let what = format!("{threads} threads, where {} takes {most}", kernel.name);
        require(threads <= most.min(1024), INVALID_VALUE, what)?;
        let exact = kernel.exact_threads.is_none_or(|exact| exact == config.block);
        require(exact, INVALID_VALUE, format!("{} is for {:?} threads", kernel.name, kernel.exact_threads))?;
        if let Some(sides) = cluster {
            let size = volume(sides);
            require(self.capability.0 >= 9, INVALID_CLUSTER_SIZE, "the device has no clusters")?;
            let most = if function.large_clusters { 16 } else { 8 };
            let what = format!("clusters of {size} blocks, where {most} are allowed");
            require((1..=most).contains(&size), INVALID_CLUSTER_SIZE, what)?;
            let fits = config.grid.iter().zip(sides).all(|(blocks, side)| blocks % side == 0);
            require(
                fits,
                INVALID_CLUSTER_SIZE,
                format!("a grid of {:?} in clusters of {sides:?}", config.grid),
            )?;
        }
        let warps = (threads as u32).div_ceil(32);
        let by_shared = self.shared_bytes().1 / config.shared_bytes.saturating_add(RESERVED_SHARED);
        let resident = (64 / warps).min(by_shared).min(if cluster.is_some() { 8 } else { 32 });
        Ok(Launch { config, cluster, cooperative, overlaps, resident })
    }
}

#[cfg(not(feature = "old"))]
#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernelEx(
    config: *const LaunchConfig,
    function: Handle,
    parameters: *const *const u8,
    extra: *const *const c_void,
) -> Status {
    call("cuLaunchKernelEx", |driver| {
        let found = driver.functions.get(function)?;
        let Launch { config, cluster, cooperative, overlaps, resident } = driver.launch(config, found)?;
        let stream = driver.stream(config.stream)?;
        let device = driver.streams.get(stream)?.device;
        let kernel = &found.kernel;
        let what = format!("{} is loaded on device {}, the stream is of {device}", kernel.name, found.device);
        require(found.device == device, INVALID_HANDLE, what)?;
        let (shared, most) = (config.shared_bytes, found.most_shared);
        let what = format!("{shared} bytes of shared memory, where {} may have {most}", kernel.name);
        require(shared <= most, INVALID_VALUE, what)?;
        let blocks = volume(config.grid);
        let fits = !cooperative || blocks <= u64::from(resident * MULTIPROCESSORS);
        require(fits, COOPERATIVE_LAUNCH_TOO_LARGE, format!("{blocks} blocks are more than run at a time"))?;
        require(extra.is_null(), INVALID_VALUE, "`extra` is not modelled")?;
        let memory = match &kernel.parameters {
            Some(sizes) => driver.named_memory(elements(parameters, sizes.len())?, sizes, device)?,
            None => Vec::new(),
        };
        let sides = |[x, y, z]: [u32; 3]| format!("{x},{y},{z}");
        let mut words =
            format!("kernel={} grid={} block={}", kernel.name, sides(config.grid), sides(config.block));
        write!(words, " shared={shared}").expect("strings grow");
        for (set, word) in [(cooperative, " cooperative=1"), (overlaps, " overlaps=1")] {
            words.push_str(if set { word } else { "" });
        }
        if let Some(cluster) = cluster {
            write!(words, " cluster={}", sides(cluster)).expect("strings grow");
        }
        let work = Work { memory, function: Some(function), ..Work::new("launch", words) };
        driver.queue(stream, work).map(drop)
    })
}

impl Driver {
    /// The allocations that a launch's parameters point into: every word of them that looks like an address
    /// is one.
    fn named_memory(
        &self,
        parameters: &[*const u8],
        sizes: &[usize],
        device: usize,
    ) -> Answer<Vec<(Address, u64)>> {
        let mut memory = BTreeSet::new();
        for (parameter, bytes) in parameters.iter().zip(sizes) {
            for word in elements(*parameter, *bytes)?.chunks_exact(8) {
                let address = u64::from_ne_bytes(word.try_into().expect("eight bytes"));
                let Some((start, allocation)) = self.allocation(address) else { continue };
                let what = format!("a parameter is the address {address:#x}, of memory that was freed");
                require(!allocation.freed, ILLEGAL_ADDRESS, what)?;
                let what =
                    format!("a parameter is the address {address:#x}, of device {}", allocation.device);
                require(allocation.device == device, ILLEGAL_ADDRESS, what)?;
                memory.insert((start, allocation.len));
            }
        }
        Ok(memory.into_iter().collect())
    }
}

#[cfg(not(feature = "old"))]
#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxActiveClusters(
    count: *mut c_int,
    function: Handle,
    config: *const LaunchConfig,
) -> Status {
    call("cuOccupancyMaxActiveClusters", |driver| {
        let function = driver.functions.get(function)?;
        driver.check_context(function.device, "the function")?;
        let Launch { cluster, resident, config, .. } = driver.launch(config, function)?;
        let size = cluster.map_or(0, |sides| volume(sides) as u32);
        let clusters = if size == 0 || config.shared_bytes > function.most_shared {
            0
        } else {
            GPCS.iter().map(|multiprocessors| multiprocessors / size).sum::<u32>() * resident
        };
        put(count, clusters as c_int)
    })
}

// -----------------------------------------------------------------------------------------------------------
// "Memory Management", "Unified Addressing"

impl Allocation {
    fn free(&mut self) {
        self.freed = true;
        self.bytes = Vec::new();
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: *mut Address, bytes: usize) -> Status {
    call("cuMemAlloc_v2", |driver| {
        let device = driver.current()?;
        driver.unsafe_call()?;
        require(bytes > 0, INVALID_VALUE, "no bytes are asked for")?;
        let live = driver.memory.values().filter(|memory| memory.device == device && !memory.freed);
        let used: u64 = live.map(|memory| memory.len).sum();
        let len = bytes as u64;
        if len > MEMORY_BYTES - used {
            return refuse(OUT_OF_MEMORY);
        }
        let start = driver.next_address;
        put(address, start)?;
        driver.next_address = (start + len + GAP).next_multiple_of(GAP);
        driver.memory.insert(start, Allocation { device, bytes: vec![0; bytes], len, freed: false });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: Address) -> Status {
    call("cuMemFree_v2", |driver| {
        if address == 0 {
            return Ok(());
        }
        // That the context was released is told before anything of the memory.
        if driver.thread.contexts.last().is_some() {
            driver.current()?;
        }
        let device = match driver.memory.get(&address) {
            Some(memory) if memory.freed => {
                return fault(INVALID_VALUE, format!("{address:#x} was freed before"));
            }
            Some(memory) => memory.device,
            None => return fault(INVALID_VALUE, format!("no allocation starts at {address:#x}")),
        };
        driver.check_context(device, "the memory")?;
        driver.unsafe_call()?;
        driver.memory.get_mut(&address).expect("it was found").free();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(address: Address, value: u8, bytes: usize, stream: Handle) -> Status {
    call("cuMemsetD8Async", |driver| {
        let stream = driver.stream(stream)?;
        if bytes == 0 {
            return Ok(());
        }
        let len = bytes as u64;
        driver.check_range(address, len, driver.streams.get(stream)?.device)?;
        let words = format!("value={value}");
        let work = Work { memory: vec![(address, len)], fill: Some(value), ..Work::new("memset", words) };
        driver.queue(stream, work).map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: Address, from: *const u8, bytes: usize, stream: Handle) -> Status {
    call("cuMemcpyHtoDAsync_v2", |driver| {
        let from = elements(from, bytes)?;
        if let Some(start) = driver.queue_copy("copy_to_device", to, bytes, stream)? {
            driver.bytes_mut(start, to, bytes as u64).copy_from_slice(from);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: Address, bytes: usize, stream: Handle) -> Status {
    call("cuMemcpyDtoHAsync_v2", |driver| {
        require(bytes == 0 || !to.is_null(), INVALID_VALUE, "there is nowhere to copy to")?;
        if let Some(start) = driver.queue_copy("copy_to_host", from, bytes, stream)? {
            let from = driver.bytes_mut(start, from, bytes as u64).as_ptr();
            // SAFETY: the caller has room for as many bytes; they are its own.
            unsafe { ptr::copy_nonoverlapping(from, to, bytes) };
        }
        Ok(())
    })
}

impl Driver {
    /// Queues a copy between pageable host memory and a device; tells the start of the allocation if it is to
    /// be made now.
    fn queue_copy(
        &mut self,
        kind: &'static str,
        address: Address,
        bytes: usize,
        stream: Handle,
    ) -> Answer<Option<Address>> {
        let stream = self.stream(stream)?;
        if bytes == 0 {
            return Ok(None);
        }
        let start = self.check_range(address, bytes as u64, self.streams.get(stream)?.device)?;
        if let Some(capture) = self.capture_of(stream)?.filter(|_| !self.lenient) {
            self.captures.get_mut(capture)?.valid = false;
            return fault(CAPTURE_UNSUPPORTED, "a replay would use the host's pageable memory");
        }
        let memory = vec![(address, bytes as u64)];
        let ran = self.queue(stream, Work { memory, ..Work::new(kind, String::new()) })?;
        Ok(ran.then_some(start))
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuPointerGetAttribute(out: *mut c_void, attribute: u32, address: Address) -> Status {
    call("cuPointerGetAttribute", |driver| {
        // How a program finds out whether an address is a device's.
        let Some((start, memory)) = driver.allocation(address).filter(|(_, memory)| !memory.freed) else {
            return refuse(INVALID_VALUE);
        };
        match attribute {
            // CONTEXT; MEMORY_TYPE: a device's; DEVICE_POINTER; DEVICE_ORDINAL; RANGE_START_ADDR; RANGE_SIZE.
            1 => put(out.cast(), driver.devices[memory.device].context),
            2 => put(out.cast(), 2u32),
            3 => put(out.cast(), address),
            9 => put(out.cast(), memory.device as c_int),
            11 => put(out.cast(), start),
            12 => put(out.cast(), memory.len as usize),
            _ => fault(INVALID_VALUE, format!("attribute {attribute} is not modelled")),
        }
    })
}

// -----------------------------------------------------------------------------------------------------------
// "Stream Management"

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: *mut Handle, flags: u32) -> Status {
    call("cuStreamCreate", |driver| driver.create_stream(stream, flags))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(stream: *mut Handle, flags: u32, _priority: c_int) -> Status {
    call("cuStreamCreateWithPriority", |driver| driver.create_stream(stream, flags))
}

impl Driver {
    fn create_stream(&mut self, stream: *mut Handle, flags: u32) -> Answer {
        const NON_BLOCKING: u32 = 1;
        let device = self.current()?;
        require(flags <= NON_BLOCKING, INVALID_VALUE, format!("flags {flags:#x} mean nothing"))?;
        let handle = self.handle();
        put(stream, handle)?;
        self.streams.add(handle, Stream::new(device, flags != NON_BLOCKING, false));
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Handle) -> Status {
    call("cuStreamDestroy_v2", |driver| {
        let &Stream { device, default, capture, .. } = driver.streams.get(stream)?;
        require(!default, INVALID_HANDLE, "it is the default stream")?;
        driver.check_context(device, "the stream")?;
        if let Some(capture) = capture {
            if !driver.lenient {
                driver.captures.get_mut(capture)?.valid = false;
                return fault(CAPTURE_UNSUPPORTED, "the stream is captured");
            }
            driver.end_capture(capture)?;
        }
        driver.streams.remove(stream).map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Handle) -> Status {
    call("cuStreamSynchronize", |driver| {
        let stream = driver.wait_for(stream)?;
        driver.run(stream, Work::new("synchronize", String::new()))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: Handle) -> Status {
    call("cuStreamQuery", |driver| driver.wait_for(stream).map(drop))
}

impl Driver {
    /// The caller learns that all work of a stream has ended.
    fn wait_for(&mut self, stream: Handle) -> Answer<Handle> {
        let stream = self.stream(stream)?;
        self.check_default(stream)?;
        if let Some(capture) = self.streams.get(stream)?.capture {
            self.captures.get_mut(capture)?.valid = false;
            return fault(CAPTURE_UNSUPPORTED, "the stream is captured");
        }
        self.unsafe_call()?;
        join(&mut self.waited, &self.streams.get(stream)?.clock);
        Ok(stream)
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamGetCtx(stream: Handle, context: *mut Handle) -> Status {
    call("cuStreamGetCtx", |driver| {
        let device = match stream {
            0..=2 => driver.current()?,
            _ => driver.streams.get(stream)?.device,
        };
        put(context, driver.devices[device].context)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32) -> Status {
    call("cuStreamWaitEvent", |driver| {
        let stream = driver.stream(stream)?;
        // It may be of another device.
        let recorded = driver.events.get(event)?.recorded.clone();
        require(flags == 0, INVALID_VALUE, format!("flags {flags:#x} are not modelled"))?;
        let own = driver.capture_of(stream)?;
        driver.check_default(stream)?;
        match (recorded, own) {
            (Recorded::Never, _) => Ok(()),
            (Recorded::Ran(_, clock), None) => {
                join(&mut driver.streams.get_mut(stream)?.clock, &clock);
                driver.run(stream, Work::new("wait", format!("event={event:#x}")))
            }
            (Recorded::Ran(..), Some(own)) => {
                driver.captures.get_mut(own)?.valid = false;
                fault(CAPTURE_ISOLATION, "a captured stream would wait for work that is not captured")
            }
            (Recorded::InCapture(capture, clock), own) => driver.join_capture(stream, own, capture, &clock),
        }
    })
}

impl Driver {
    /// A stream waits for an event that was recorded in a capture, and so becomes part of that.
    fn join_capture(
        &mut self,
        stream: Handle,
        own: Option<Handle>,
        capture: Handle,
        clock: &Clock,
    ) -> Answer {
        let Ok(joined) = self.captures.get_mut(capture) else {
            return fault(INVALID_VALUE, "the event was recorded in a capture that has ended");
        };
        let joining = self.streams.get_mut(stream)?;
        if joining.default {
            joined.valid = false;
            return fault(CAPTURE_IMPLICIT, "the default stream would become part of a capture");
        }
        require(joined.valid, CAPTURE_INVALIDATED, "the capture failed before")?;
        match own {
            Some(own) if own != capture => {
                joined.valid = false;
                self.captures.get_mut(own)?.valid = false;
                return fault(CAPTURE_MERGE, "two captures would become one");
            }
            Some(_) => join(&mut joining.captured, clock),
            None => {
                joining.capture = Some(capture);
                joining.captured = clock.clone();
                joined.streams.insert(stream);
            }
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) -> Status {
    call("cuStreamBeginCapture_v2", |driver| {
        let stream = driver.stream(stream)?;
        require(mode <= RELAXED, INVALID_VALUE, format!("mode {mode} is none"))?;
        driver.check_default(stream)?;
        let &Stream { device, default, capture, .. } = driver.streams.get(stream)?;
        require(!default, CAPTURE_UNSUPPORTED, "the default stream cannot be captured")?;
        require(capture.is_none(), ILLEGAL_STATE, "the stream is captured already")?;
        let handle = driver.handle();
        let captured = driver.streams.get_mut(stream)?;
        captured.capture = Some(handle);
        captured.captured.clear();
        let (thread, streams) = (driver.thread.number, BTreeSet::from([stream]));
        let capture =
            Capture { device, origin: stream, mode, thread, streams, nodes: Vec::new(), valid: true };
        driver.captures.add(handle, capture);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> Status {
    call("cuStreamEndCapture", |driver| {
        let stream = driver.stream(stream)?;
        put(graph, 0)?;
        let Some(handle) = driver.streams.get(stream)?.capture else {
            return fault(ILLEGAL_STATE, "the stream is not captured");
        };
        let capture = driver.captures.get_mut(handle)?;
        if capture.origin != stream {
            capture.valid = false;
            return fault(CAPTURE_UNMATCHED, "the capture began on another stream");
        }
        // Whatever comes of it, the capture has ended.
        let Capture { device, mode, thread, streams, nodes, valid, .. } = driver.end_capture(handle)?;
        let here = mode == RELAXED || thread == driver.thread.number;
        require(here, CAPTURE_WRONG_THREAD, "the capture began on another thread")?;
        require(valid, CAPTURE_INVALIDATED, "the capture failed before")?;
        let known = &driver.streams.get(stream)?.captured;
        for other in streams.iter().filter(|other| **other != stream) {
            let last =
                driver.streams.live.get(other).and_then(|other_stream| other_stream.captured.get(other));
            let what = format!("stream {other:#x} is not waited for");
            require(last <= known.get(other), CAPTURE_UNJOINED, what)?;
        }
        let handle = driver.handle();
        driver.graphs.add(handle, Graph { device, nodes });
        put(graph, handle)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamIsCapturing(stream: Handle, status: *mut u32) -> Status {
    call("cuStreamIsCapturing", |driver| put(status, driver.capture_status(stream)?))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamGetCaptureInfo_v2(
    stream: Handle,
    status: *mut u32,
    id: *mut u64,
    graph: *mut Handle,
    dependencies: *mut *const Handle,
    count: *mut usize,
) -> Status {
    call("cuStreamGetCaptureInfo_v2", |driver| {
        put(status, driver.capture_status(stream)?)?;
        let capture = driver.streams.get(driver.stream(stream)?)?.capture;
        put_if(id, capture.unwrap_or(0) as u64)?;
        // Nodes can be added to no graph.
        put_if(graph, 0)?;
        put_if(dependencies, ptr::null())?;
        put_if(count, 0)
    })
}

impl Driver {
    fn capture_status(&self, stream: Handle) -> Answer<u32> {
        let stream = self.streams.get(self.stream(stream)?)?;
        if stream.default && !self.captures_blocking(stream.device).is_empty() {
            return fault(CAPTURE_IMPLICIT, "a stream that waits for the default stream is captured");
        }
        let Some(capture) = stream.capture else { return Ok(NOT_CAPTURED) };
        Ok(if self.captures.get(capture)?.valid { CAPTURED } else { CAPTURE_FAILED })
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) -> Status {
    call("cuThreadExchangeStreamCaptureMode", |driver| {
        let new = elements(mode, 1)?[0];
        require(new <= RELAXED, INVALID_VALUE, format!("mode {new} is none"))?;
        put(mode, mem::replace(&mut driver.thread.capture_mode, new))
    })
}

// -----------------------------------------------------------------------------------------------------------
// "Event Management"

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: *mut Handle, flags: u32) -> Status {
    call("cuEventCreate", |driver| {
        const DISABLE_TIMING: u32 = 2;
        let device = driver.current()?;
        require(flags < 8, INVALID_VALUE, format!("flags {flags:#x} mean nothing"))?;
        let handle = driver.handle();
        put(event, handle)?;
        let timed = flags & DISABLE_TIMING == 0;
        driver.events.add(handle, Event { device, timed, recorded: Recorded::Never });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> Status {
    call("cuEventDestroy_v2", |driver| {
        driver.check_context(driver.events.get(event)?.device, "the event")?;
        driver.events.remove(event).map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> Status {
    call("cuEventRecord", |driver| {
        let of_event = driver.events.get(event)?.device;
        let stream = driver.stream(stream)?;
        let device = driver.streams.get(stream)?.device;
        let what = format!("the event is of device {of_event}, the stream of {device}");
        require(of_event == device, INVALID_HANDLE, what)?;
        let recorded = match driver.capture_of(stream)? {
            Some(capture) => Recorded::InCapture(capture, driver.streams.get(stream)?.captured.clone()),
            None => {
                driver.check_default(stream)?;
                driver.run(stream, Work::new("record", format!("event={event:#x}")))?;
                Recorded::Ran(driver.log.len(), driver.streams.get(stream)?.clock.clone())
            }
        };
        driver.events.get_mut(event)?.recorded = recorded;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> Status {
    call("cuEventSynchronize", |driver| driver.wait_for_event(event))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Handle) -> Status {
    call("cuEventQuery", |driver| driver.wait_for_event(event))
}

impl Driver {
    /// The caller learns that the work before an event has ended.
    fn wait_for_event(&mut self, event: Handle) -> Answer {
        let event = self.events.get(event)?;
        self.check_context(event.device, "the event")?;
        let recorded = event.recorded.clone();
        if let Recorded::InCapture(capture, _) = &recorded {
            let Ok(capture) = self.captures.get_mut(*capture) else {
                return fault(INVALID_VALUE, "the event was recorded in a capture that has ended");
            };
            capture.valid = false;
            return fault(CAPTURED_EVENT, "the event was recorded in a capture");
        }
        self.unsafe_call()?;
        if let Recorded::Ran(_, clock) = &recorded {
            join(&mut self.waited, clock);
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) -> Status {
    call("cuEventElapsedTime", |driver| {
        let mut times = [0.0; 2];
        for (time, event) in times.iter_mut().zip([start, end]) {
            let event = driver.events.get(event)?;
            driver.check_context(event.device, "the event")?;
            require(event.timed, INVALID_HANDLE, "the event is not timed")?;
            *time = match &event.recorded {
                Recorded::Never => return fault(INVALID_HANDLE, "the event was never recorded"),
                Recorded::InCapture(..) => {
                    return fault(CAPTURED_EVENT, "the event was recorded in a capture");
                }
                // A microsecond an entry of the log.
                Recorded::Ran(number, _) => *number as f32 * 1e-3,
            };
        }
        put(milliseconds, times[1] - times[0])
    })
}

// -----------------------------------------------------------------------------------------------------------
// "Graph Management"

#[unsafe(no_mangle)]
extern "C" fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64) -> Status {
    call("cuGraphInstantiateWithFlags", |driver| {
        let Graph { device, nodes } = driver.graphs.get(graph)?;
        let (device, nodes) = (*device, nodes.clone());
        driver.check_context(device, "the graph")?;
        require(flags == 0, INVALID_VALUE, format!("flags {flags:#x} are not modelled"))?;
        driver.unsafe_call()?;
        let handle = driver.handle();
        put(executable, handle)?;
        driver.executables.add(handle, Graph { device, nodes });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(executable: Handle, stream: Handle) -> Status {
    call("cuGraphLaunch", |driver| {
        let Graph { device, nodes } = driver.executables.get(executable)?;
        let (of_graph, nodes) = (*device, nodes.clone());
        let stream = driver.stream(stream)?;
        let &Stream { device, capture, .. } = driver.streams.get(stream)?;
        let what = format!("the graph is of device {of_graph}, the stream of {device}");
        require(of_graph == device, INVALID_VALUE, what)?;
        if let Some(capture) = capture {
            driver.captures.get_mut(capture)?.valid = false;
            return fault(CAPTURE_UNSUPPORTED, "a graph within a capture");
        }
        driver.check_default(stream)?;
        for node in &nodes {
            for (address, len) in &node.memory {
                let what = format!("the graph's {} names memory at {address:#x} that was freed", node.kind);
                require(driver.check_range(*address, *len, device).is_ok(), ILLEGAL_ADDRESS, what)?;
            }
            if let Some(function) = node.function {
                driver.functions.get(function)?;
            }
        }
        driver
            .run(stream, Work::new("graph_launch", format!("graph={executable:#x} nodes={}", nodes.len())))?;
        nodes.into_iter().try_for_each(|node| driver.run(stream, node))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: Handle) -> Status {
    call("cuGraphDestroy", |driver| {
        driver.check_context(driver.graphs.get(graph)?.device, "the graph")?;
        driver.graphs.remove(graph).map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(executable: Handle) -> Status {
    call("cuGraphExecDestroy", |driver| {
        driver.check_context(driver.executables.get(executable)?.device, "the graph")?;
        driver.unsafe_call()?;
        driver.executables.remove(executable).map(drop)
    })
}

// -----------------------------------------------------------------------------------------------------------
// For tests

/// Makes a call fail with `code`: always, or the `nth` time from now alone where that is not 0. With code 0
/// it fails no more.
#[unsafe(no_mangle)]
pub extern "C" fn fake_fail(name: *const c_char, code: i32, nth: i32) {
    let Ok(name) = name_of(name) else { return };
    let failures = &mut driver().failures;
    match code {
        0 => drop(failures.remove(name)),
        _ => drop(failures.insert(name.to_owned(), Failure { code: code as Status, nth, calls: 0 })),
    }
}

/// Forgets everything, on all threads, and reads the environment again.
#[unsafe(no_mangle)]
pub extern "C" fn fake_reset() {
    let mut driver = driver();
    let number = driver.number + 1;
    *driver = Driver::new(number);
}

/// Writes the faults, a line each and NUL, as far as they fit into `len` bytes; tells how many bytes they
/// have.
#[unsafe(no_mangle)]
pub extern "C" fn fake_faults(out: *mut c_char, len: usize) -> usize {
    put_text(&driver().faults.join("\n"), out, len)
}

/// How many there are that must be let go of: `memory`, `stream`, `event`, `module`, `graph` (ready to launch
/// or not), `context` (how often contexts are retained). `usize::MAX` for anything else.
#[unsafe(no_mangle)]
pub extern "C" fn fake_live(kind: *const c_char) -> usize {
    let driver = driver();
    match name_of(kind) {
        Ok("memory") => driver.memory.values().filter(|memory| !memory.freed).count(),
        Ok("stream") => driver.streams.live.values().filter(|stream| stream.is_made()).count(),
        Ok("event") => driver.events.live.len(),
        Ok("module") => driver.modules.live.len(),
        Ok("graph") => driver.graphs.live.len() + driver.executables.live.len(),
        Ok("context") => driver.devices.iter().map(|device| device.retained as usize).sum(),
        _ => usize::MAX,
    }
}

/// Writes the log as [`fake_faults`] does: what ran, a line each, in the order of the calls. A line is the
/// kind (`launch`, `copy_to_device`, `copy_to_host`, `memset`, `record`, `wait`, `graph_launch`, whose nodes
/// follow it, `synchronize`, `synchronize_context`) and `key=value` words:
///
/// - `device=0 stream=0x1040 thread=1`, where stream 0 is the device's default stream;
/// - `memory=0x700000000000+64,…`: address and bytes of what it reads or writes; of a launch the
///   allocations that its parameters point into;
/// - `after=3,7`: lines, counted from 1, that ended before this one began, whatever the hardware does: the
///   last of each stream, and so the earlier ones of those streams too. What one thread has waited for has
///   ended for all;
/// - what else there is to say of it: `kernel=`, `grid=`, `block=`, `shared=`, `cluster=`, `event=`.
///
/// What is captured is no part of it until a graph runs it.
#[unsafe(no_mangle)]
pub extern "C" fn fake_log(out: *mut c_char, len: usize) -> usize {
    let mut text = String::new();
    for Entry { device, stream, thread, work, after } in &driver().log {
        let memory: Vec<String> =
            work.memory.iter().map(|(address, len)| format!("{address:#x}+{len}")).collect();
        let after: Vec<String> = after.iter().map(usize::to_string).collect();
        let (kind, memory, after, words) = (work.kind, memory.join(","), after.join(","), &work.words);
        text.push_str(if text.is_empty() { "" } else { "\n" });
        write!(
            text,
            "{kind} device={device} stream={stream:#x} thread={thread} memory={memory} after={after} {words}"
        )
        .expect("strings grow");
    }
    put_text(&text, out, len)
}

/// How many launches ran, those of graphs among them.
#[unsafe(no_mangle)]
pub extern "C" fn fake_launches() -> usize {
    driver().log.iter().filter(|entry| entry.work.kind == "launch").count()
}

// -----------------------------------------------------------------------------------------------------------
// Codes, names and texts, as driver 580 has them

type ErrorText = (Status, &'static CStr, &'static CStr);

#[rustfmt::skip]
const ERRORS: &[ErrorText] = &[
    (0, c"CUDA_SUCCESS", c"no error"),
    (1, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
    (2, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
    (3, c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
    (4, c"CUDA_ERROR_DEINITIALIZED", c"driver shutting down"),
    (5, c"CUDA_ERROR_PROFILER_DISABLED", c"profiler disabled while using external profiling tool"),
    (6, c"CUDA_ERROR_PROFILER_NOT_INITIALIZED", c"profiler not initialized: call cudaProfilerInitialize()"),
    (7, c"CUDA_ERROR_PROFILER_ALREADY_STARTED", c"profiler already started"),
    (8, c"CUDA_ERROR_PROFILER_ALREADY_STOPPED", c"profiler already stopped"),
    (34, c"CUDA_ERROR_STUB_LIBRARY", c"CUDA driver is a stub library"),
    (36, c"CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER", c"API call is not supported in the installed CUDA driver"),
    (46, c"CUDA_ERROR_DEVICE_UNAVAILABLE", c"CUDA-capable device(s) is/are busy or unavailable"),
    (100, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"),
    (101, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
    (102, c"CUDA_ERROR_DEVICE_NOT_LICENSED", c"device doesn't have valid Grid license"),
    (200, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
    (201, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
    (202, c"CUDA_ERROR_CONTEXT_ALREADY_CURRENT", c"context already current"),
    (205, c"CUDA_ERROR_MAP_FAILED", c"mapping of buffer object failed"),
    (206, c"CUDA_ERROR_UNMAP_FAILED", c"unmapping of buffer object failed"),
    (207, c"CUDA_ERROR_ARRAY_IS_MAPPED", c"array is mapped"),
    (208, c"CUDA_ERROR_ALREADY_MAPPED", c"resource already mapped"),
    (209, c"CUDA_ERROR_NO_BINARY_FOR_GPU", c"no kernel image is available for execution on the device"),
    (210, c"CUDA_ERROR_ALREADY_ACQUIRED", c"resource already acquired"),
    (211, c"CUDA_ERROR_NOT_MAPPED", c"resource not mapped"),
    (212, c"CUDA_ERROR_NOT_MAPPED_AS_ARRAY", c"resource not mapped as array"),
    (213, c"CUDA_ERROR_NOT_MAPPED_AS_POINTER", c"resource not mapped as pointer"),
    (214, c"CUDA_ERROR_ECC_UNCORRECTABLE", c"uncorrectable ECC error encountered"),
    (215, c"CUDA_ERROR_UNSUPPORTED_LIMIT", c"limit is not supported on this architecture"),
    (216, c"CUDA_ERROR_CONTEXT_ALREADY_IN_USE",
     c"exclusive-thread device already in use by a different thread"),
    (217, c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", c"peer access is not supported between these two devices"),
    (218, c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed"),
    (219, c"CUDA_ERROR_INVALID_GRAPHICS_CONTEXT", c"invalid OpenGL or DirectX context"),
    (220, c"CUDA_ERROR_NVLINK_UNCORRECTABLE", c"uncorrectable NVLink error detected during the execution"),
    (221, c"CUDA_ERROR_JIT_COMPILER_NOT_FOUND", c"PTX JIT compiler library not found"),
    (222, c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     c"the provided PTX was compiled with an unsupported toolchain."),
    (223, c"CUDA_ERROR_JIT_COMPILATION_DISABLED", c"PTX JIT compilation was disabled"),
    (224, c"CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY", c"the provided execution affinity is not supported"),
    (225, c"CUDA_ERROR_UNSUPPORTED_DEVSIDE_SYNC",
     c"the provided PTX contains unsupported call to cudaDeviceSynchronize"),
    (226, c"CUDA_ERROR_CONTAINED", c"Invalid access of peer GPU memory over nvlink or a hardware error"),
    (300, c"CUDA_ERROR_INVALID_SOURCE", c"device kernel image is invalid"),
    (301, c"CUDA_ERROR_FILE_NOT_FOUND", c"file not found"),
    (302, c"CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND", c"shared object symbol not found"),
    (303, c"CUDA_ERROR_SHARED_OBJECT_INIT_FAILED", c"shared object initialization failed"),
    (304, c"CUDA_ERROR_OPERATING_SYSTEM", c"OS call failed or operation not supported on this OS"),
    (400, c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
    (401, c"CUDA_ERROR_ILLEGAL_STATE", c"the operation cannot be performed in the present state"),
    (402, c"CUDA_ERROR_LOSSY_QUERY", c"attempted introspection would be semantically lossy"),
    (500, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
    (600, c"CUDA_ERROR_NOT_READY", c"device not ready"),
    (700, c"CUDA_ERROR_ILLEGAL_ADDRESS", c"an illegal memory access was encountered"),
    (701, c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", c"too many resources requested for launch"),
    (702, c"CUDA_ERROR_LAUNCH_TIMEOUT", c"the launch timed out and was terminated"),
    (703, c"CUDA_ERROR_LAUNCH_INCOMPATIBLE_TEXTURING", c"launch uses incompatible texturing mode"),
    (704, c"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", c"peer access is already enabled"),
    (705, c"CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", c"peer access has not been enabled"),
    (708, c"CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE", c"cannot set while device is active in this process"),
    (709, c"CUDA_ERROR_CONTEXT_IS_DESTROYED", c"context is destroyed"),
    (710, c"CUDA_ERROR_ASSERT", c"device-side assert triggered"),
    (711, c"CUDA_ERROR_TOO_MANY_PEERS", c"peer mapping resources exhausted"),
    (712, c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     c"part or all of the requested memory range is already mapped"),
    (713, c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     c"pointer does not correspond to a registered memory region"),
    (714, c"CUDA_ERROR_HARDWARE_STACK_ERROR", c"hardware stack error"),
    (715, c"CUDA_ERROR_ILLEGAL_INSTRUCTION", c"an illegal instruction was encountered"),
    (716, c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address"),
    (717, c"CUDA_ERROR_INVALID_ADDRESS_SPACE", c"operation not supported on global/shared address space"),
    (718, c"CUDA_ERROR_INVALID_PC", c"invalid program counter"),
    (719, c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
    (720, c"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", c"too many blocks in cooperative launch"),
    (721, c"CUDA_ERROR_TENSOR_MEMORY_LEAK", c"tensor memory not completely freed"),
    (800, c"CUDA_ERROR_NOT_PERMITTED", c"operation not permitted"),
    (801, c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
    (802, c"CUDA_ERROR_SYSTEM_NOT_READY", c"system not yet initialized"),
    (803, c"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
     c"system has unsupported display driver / cuda driver combination"),
    (804, c"CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
     c"forward compatibility was attempted on non supported HW"),
    (805, c"CUDA_ERROR_MPS_CONNECTION_FAILED",
     c"MPS client failed to connect to the MPS control daemon or the MPS server"),
    (806, c"CUDA_ERROR_MPS_RPC_FAILURE",
     c"the remote procedural call between the MPS server and the MPS client failed"),
    (807, c"CUDA_ERROR_MPS_SERVER_NOT_READY", c"MPS server is not ready to accept new MPS client requests"),
    (808, c"CUDA_ERROR_MPS_MAX_CLIENTS_REACHED",
     c"the hardware resources required to create MPS client have been exhausted"),
    (809, c"CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED",
     c"the hardware resources required to support device connections have been exhausted"),
    (810, c"CUDA_ERROR_MPS_CLIENT_TERMINATED", c"the MPS client has been terminated by the server"),
    (811, c"CUDA_ERROR_CDP_NOT_SUPPORTED",
     c"is using CUDA Dynamic Parallelism, but the current configuration, like MPS, does not support it"),
    (812, c"CUDA_ERROR_CDP_VERSION_MISMATCH",
     c"unsupported interaction between different versions of CUDA Dynamic Parallelism"),
    (900, c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", c"operation not permitted when stream is capturing"),
    (901, c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     c"operation failed due to a previous error during capture"),
    (902, c"CUDA_ERROR_STREAM_CAPTURE_MERGE",
     c"operation would result in a merge of separate capture sequences"),
    (903, c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", c"capture was not ended in the same stream as it began"),
    (904, c"CUDA_ERROR_STREAM_CAPTURE_UNJOINED", c"capturing stream has unjoined work"),
    (905, c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", c"dependency created on uncaptured work in another stream"),
    (906, c"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     c"operation would make the legacy stream depend on a capturing blocking stream"),
    (907, c"CUDA_ERROR_CAPTURED_EVENT",
     c"operation not permitted on an event last recorded in a capturing stream"),
    (908, c"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     c"attempt to terminate a thread-local capture sequence from another thread"),
    (909, c"CUDA_ERROR_TIMEOUT", c"wait operation timed out"),
    (910, c"CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE",
     c"the graph update was not performed because it included changes which violated constraints \
     specific to instantiated graph update"),
    (911, c"CUDA_ERROR_EXTERNAL_DEVICE", c"an async error has occured in external entity outside of CUDA"),
    (912, c"CUDA_ERROR_INVALID_CLUSTER_SIZE",
     c"a kernel launch error has occurred due to cluster misconfiguration"),
    (913, c"CUDA_ERROR_FUNCTION_NOT_LOADED",
     c"the function handle is not loaded when calling an API that requires a loaded function"),
    (914, c"CUDA_ERROR_INVALID_RESOURCE_TYPE",
     c"one or more resources passed in are not valid resource types for the operation"),
    (915, c"CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION",
     c"one or more resources are insufficient or non-applicable for the operation"),
    (916, c"CUDA_ERROR_KEY_ROTATION", c"an error happened during the key rotation sequence"),
    (999, c"CUDA_ERROR_UNKNOWN", c"unknown error"),
];
