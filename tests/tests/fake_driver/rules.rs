//! Whatever is not about captures.

use crate::stage::{Cuda, LAUNCH, Launch, NON_BLOCKING, PTX, Stage, THREAD_LOCAL};
use moe_lora_tests::fake::{self, Control, Log};
use std::ffi::{CStr, CString};
use std::ptr;

/// Ids of launch attributes.
const COOPERATIVE: u32 = 2;
const CLUSTER: u32 = 4;
const OVERLAPS: u32 = 6;
const MAX_DYNAMIC_SHARED: u32 = 8;

fn with(attribute: u32, value: u32) -> Launch {
    Launch { attribute: Some((attribute, value)), ..LAUNCH }
}

type Calls = fn(&Stage<'_>);

/// Calls with one of everything there, and their codes: those of a driver; `?` is behind one that is no
/// fault.
const CALLS: &[(&str, &str, Calls)] = &[
    ("no bytes", "1", |s| {
        s.cuda.allocate(0);
    }),
    ("more bytes than there are", "2?", |s| {
        s.cuda.allocate(1 << 50);
    }),
    ("freeing null", "0", |s| s.cuda.cuMemFree_v2(0)),
    ("freeing within memory", "1", |s| s.cuda.cuMemFree_v2(s.memory + 8)),
    ("freeing twice", "0 1", |s| {
        s.cuda.cuMemFree_v2(s.spare_memory);
        s.cuda.cuMemFree_v2(s.spare_memory);
    }),
    ("freed memory", "0 1 1", |s| {
        s.cuda.cuMemFree_v2(s.spare_memory);
        s.cuda.fill(s.spare_memory, s.stream);
        s.cuda.write(s.spare_memory, s.stream);
    }),
    ("null is no memory", "1", |s| s.cuda.fill(0, s.stream)),
    ("nothing to set", "0", |s| s.cuda.cuMemsetD8Async(s.memory, 7, 0, s.stream)),
    ("where memory is, and where none is", "0 0 1?", |s| {
        assert_eq!(s.cuda.device_of(s.memory), 0);
        s.cuda.device_of(s.memory + 100);
        s.cuda.device_of(64);
    }),
    ("a stream with a priority", "0", |s| s.cuda.cuStreamCreateWithPriority(&mut 0, NON_BLOCKING, -1)),
    ("an event never recorded", "0 0 0 400", |s| {
        s.cuda.cuEventQuery(s.fresh);
        s.cuda.cuEventSynchronize(s.fresh);
        s.cuda.cuStreamWaitEvent(s.stream, s.fresh, 0);
        s.cuda.elapsed(s.event, s.fresh);
    }),
    ("an event without time", "0 0 400", |s| {
        const DISABLE_TIMING: u32 = 2;
        let mut event = 0;
        s.cuda.cuEventCreate(&mut event, DISABLE_TIMING);
        s.cuda.cuEventRecord(event, s.other);
        s.cuda.elapsed(s.event, event);
    }),
    ("no event", "400 400 400", |s| {
        s.cuda.cuStreamWaitEvent(s.stream, 0, 0);
        s.cuda.cuEventRecord(0, s.stream);
        s.cuda.cuEventDestroy_v2(0);
    }),
    ("no stream, module or graph to let go of", "400 400 1", |s| {
        s.cuda.cuStreamDestroy_v2(0);
        s.cuda.cuModuleUnload(0);
        s.cuda.cuGraphDestroy(0);
    }),
    ("no graph to launch", "1", |s| s.cuda.cuGraphLaunch(0, s.stream)),
    ("ending no capture", "401", |s| {
        s.cuda.end(s.stream);
    }),
    ("a device that is none", "101? 1", |s| {
        s.cuda.cuDeviceGet(&mut 0, 99);
        s.cuda.cuDeviceGetAttribute(&mut 0, 9999, 0);
    }),
    ("names of kernels", "0 500? 1", |s| {
        s.cuda.function(s.module, "kernel");
        s.cuda.function(s.module, "nope");
        s.cuda.function(s.module, "");
    }),
    ("attributes of a function", "0 1 1 1 1", |s| {
        let mut most = 0;
        const MOST_SHARED: u32 = 97;
        s.cuda.quiet(|| s.cuda.cuDeviceGetAttribute(&mut most, MOST_SHARED, 0));
        for (attribute, value) in [
            (MAX_DYNAMIC_SHARED, most),
            (MAX_DYNAMIC_SHARED, most + 1),
            (MAX_DYNAMIC_SHARED, -1),
            (99, 1),
            (0, 1),
        ] {
            s.cuda.cuFuncSetAttribute(s.function, attribute, value);
        }
    }),
    ("no blocks, no threads", "1 1", |s| {
        s.cuda.launch(s.function, s.stream, Launch { blocks: 0, ..LAUNCH });
        s.cuda.launch(s.function, s.stream, Launch { threads: 0, ..LAUNCH });
    }),
    ("threads as many as the kernel takes, and more", "0 1 1", |s| {
        for threads in [64, 65, 2048] {
            s.cuda.launch(s.function, s.stream, Launch { threads, ..LAUNCH });
        }
    }),
    ("shared memory, and more than was asked for", "0 1 0 0 0", |s| {
        s.cuda.launch(s.function, s.stream, Launch { shared: 48 << 10, ..LAUNCH });
        let more = Launch { shared: (48 << 10) + 1, ..LAUNCH };
        s.cuda.launch(s.function, s.stream, more);
        s.cuda.cuFuncSetAttribute(s.function, MAX_DYNAMIC_SHARED, 64 << 10);
        s.cuda.launch(s.function, s.stream, more);
        let mut most = 0;
        s.cuda.cuFuncGetAttribute(&mut most, MAX_DYNAMIC_SHARED, s.function);
        assert_eq!(most, 64 << 10);
    }),
    ("a parameter is missing", "1", |s| {
        s.cuda.launch(s.function, s.stream, Launch { parameter: None, ..LAUNCH })
    }),
    ("no function", "400", |s| s.cuda.launch(0, s.stream, LAUNCH)),
    ("launch attributes", "0 0 1", |s| {
        s.cuda.launch(s.function, s.stream, with(OVERLAPS, 1));
        s.cuda.launch(s.function, s.stream, with(COOPERATIVE, 1));
        s.cuda.launch(s.function, s.stream, with(99, 1));
    }),
    ("clusters", "0 0 912 912 912", |s| {
        for (blocks, cluster) in [(1, 1), (8, 8), (16, 16), (4, 3), (1, 0)] {
            s.cuda.launch(s.function, s.stream, Launch { blocks, ..with(CLUSTER, cluster) });
        }
    }),
    ("more blocks than run at a time", "720", |s| {
        s.cuda.launch(s.function, s.stream, Launch { blocks: 1_000_000, ..with(COOPERATIVE, 1) });
    }),
    ("clusters that run at a time", "0 0 912 0 0", |s| {
        let most = |launch| s.cuda.most_clusters(s.function, launch);
        assert_eq!(most(LAUNCH), 0, "no clusters");
        assert!(most(Launch { blocks: 8, ..with(CLUSTER, 8) }) >= 15);
        most(with(CLUSTER, 8));
        assert!(most(with(CLUSTER, 1)) >= 132);
        assert_eq!(most(Launch { shared: 240_000, ..with(CLUSTER, 1) }), 0, "too much shared memory");
    }),
    ("images that are none", "200 200", |s| {
        s.cuda.load("no image");
        s.cuda.load("");
    }),
    ("PTX for other devices and of later versions", "218 218 222", |s| {
        s.cuda.load(&PTX.replace("sm_80", "sm_80a"));
        s.cuda.load(&PTX.replace("sm_80", "sm_121"));
        s.cuda.load(&PTX.replace("7.0", "99.0"));
    }),
    ("pushing no context", "1", |s| s.cuda.cuCtxPushCurrent_v2(0)),
    ("no context is current", "0 201 201 201 201 201 201? 201", |s| {
        s.cuda.cuCtxSetCurrent(0);
        s.cuda.memory();
        s.cuda.stream(NON_BLOCKING);
        s.cuda.load(PTX);
        s.cuda.cuCtxSynchronize();
        s.cuda.cuStreamSynchronize(0);
        s.cuda.cuCtxGetDevice(&mut 0);
        s.cuda.cuCtxPopCurrent_v2(ptr::null_mut());
    }),
];

/// Objects while no context is current: a driver takes them all the same, where it does not need the default
/// stream.
const WITHOUT_CONTEXT: &[Calls] = &[
    |s| s.cuda.fill(s.memory, s.stream),
    |s| s.cuda.write(s.memory, s.stream),
    |s| s.cuda.launch(s.function, s.stream, LAUNCH),
    |s| s.cuda.cuStreamSynchronize(s.stream),
    |s| s.cuda.cuEventRecord(s.event, s.stream),
    |s| s.cuda.cuEventQuery(s.event),
    |s| {
        s.cuda.function(s.module, "kernel");
    },
    |s| s.cuda.cuFuncSetAttribute(s.function, MAX_DYNAMIC_SHARED, 1024),
    |s| s.cuda.cuMemFree_v2(s.spare_memory),
    |s| s.cuda.cuStreamBeginCapture_v2(s.fork, THREAD_LOCAL),
];

/// Checks each of [`CALLS`]. `strict`: the driver is the fake, as it is.
pub fn check_calls(cuda: &Cuda, strict: bool) {
    let context = cuda.current();
    let mut wrong = Vec::new();
    let mut check = |what: &str, found: String, expected: &str| {
        let expected = if cuda.control.is_some() { expected.to_owned() } else { expected.replace('?', "") };
        if found != expected {
            wrong.push(format!("{what}: {found}, not {expected}"));
        }
    };
    cuda.codes();
    for (what, expected, calls) in CALLS {
        let stage = Stage::new(cuda, NON_BLOCKING);
        calls(&stage);
        check(what, cuda.codes(), expected);
        cuda.cuCtxSetCurrent(context);
        cuda.codes();
    }
    let stage = Stage::new(cuda, NON_BLOCKING);
    cuda.cuCtxSetCurrent(0);
    cuda.codes();
    for (number, calls) in WITHOUT_CONTEXT.iter().enumerate() {
        calls(&stage);
        check(&format!("without a context, {number}"), cuda.codes(), if strict { "201" } else { "0" });
    }
    cuda.cuCtxSetCurrent(context);
    if !strict {
        cuda.end(stage.fork);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// "Context Management": an object is used while its context is current.
pub fn contexts(cuda: &Cuda) {
    let stage = Stage::new(cuda, NON_BLOCKING);
    let second = cuda.retain(1);
    cuda.cuCtxSetCurrent(second);
    cuda.codes();
    for calls in WITHOUT_CONTEXT {
        calls(&stage);
    }
    cuda.cuStreamDestroy_v2(stage.stream);
    cuda.cuEventDestroy_v2(stage.event);
    cuda.cuModuleUnload(stage.module);
    cuda.cuGraphDestroy(stage.graph);
    cuda.cuGraphExecDestroy(stage.executable);
    let codes = cuda.codes();
    assert!(codes.split(' ').all(|code| code == "201"), "{codes}");
    let faults = cuda.faults();
    assert_eq!(faults.len(), WITHOUT_CONTEXT.len() + 5);
    let freed = "cuMemFree_v2: the memory is of device 0, and the context of device 1 is current";
    assert!(faults.iter().any(|fault| fault == freed), "{faults:#?}");
    // What only asks may.
    assert_eq!(cuda.device_of(stage.memory), 0);
    let mut context = 0;
    cuda.cuStreamGetCtx(stage.stream, &mut context);
    cuda.cuStreamGetCtx(0, ptr::from_mut(&mut context));
    assert_eq!((cuda.codes().as_str(), context), ("0 0 0", second));
}

/// Streams take memory, functions, events and graphs of their own device.
pub fn two_devices(cuda: &Cuda) {
    let first = Stage::new(cuda, NON_BLOCKING);
    let second = cuda.retain(1);
    cuda.cuCtxSetCurrent(second);
    let stream = cuda.stream(NON_BLOCKING);
    let event = cuda.event();
    cuda.codes();
    cuda.fill(first.memory, stream);
    cuda.write(first.memory, stream);
    cuda.launch(first.function, stream, LAUNCH);
    cuda.cuEventRecord(first.event, stream);
    cuda.cuGraphLaunch(first.executable, stream);
    assert_eq!(cuda.codes(), "1 1 400 400 1");
    // A parameter that is an address of the other device: there is no peer access.
    let module = cuda.load(PTX);
    let function = cuda.function(module, "kernel");
    cuda.launch(function, stream, Launch { parameter: Some(first.memory), ..LAUNCH });
    assert_eq!(cuda.codes(), "0 0 700");
    // But a stream may wait for another device.
    cuda.cuEventRecord(event, stream);
    cuda.cuStreamWaitEvent(stream, first.event, 0);
    assert_eq!(cuda.codes(), "0 0");
}

/// "Context Management": setting replaces the topmost context, pushing and popping keep those below.
pub fn stack(cuda: &Cuda) {
    let (first, second) = (cuda.current(), cuda.retain(1));
    assert_ne!(first, second);
    cuda.cuCtxPushCurrent_v2(second);
    assert_eq!(cuda.current(), second);
    let mut device = 9;
    cuda.cuCtxGetDevice(&mut device);
    assert_eq!(device, 1);
    cuda.cuCtxSetCurrent(first);
    let mut popped = 0;
    cuda.cuCtxPopCurrent_v2(&mut popped);
    assert_eq!((popped, cuda.current()), (first, first), "setting replaces");
    cuda.cuCtxPushCurrent_v2(second);
    cuda.cuCtxSetCurrent(0);
    assert_eq!(cuda.current(), first, "setting null pops");
    cuda.elsewhere(|| {
        cuda.cuCtxSetCurrent(0);
        assert_eq!(cuda.current(), 0);
    });
    assert_eq!(cuda.current(), first, "each thread has its own");
    assert!(cuda.faults().is_empty());
    cuda.codes();
    cuda.cuCtxSetCurrent(0x99);
    assert_eq!(cuda.codes(), "201");
}

/// "Primary Context Management".
pub fn release(cuda: &Cuda) {
    let control = cuda.control.as_ref().expect("this is the fake");
    let context = cuda.current();
    assert_eq!(cuda.retain(0), context);
    cuda.cuDevicePrimaryCtxRelease_v2(0);
    assert!(cuda.faults().is_empty(), "it is retained still");
    Stage::new(cuda, NON_BLOCKING);
    let live = || ["memory", "stream", "event", "module", "graph", "context"].map(|kind| control.live(kind));
    assert_eq!(live(), [2, 3, 2, 2, 3, 1]);
    cuda.codes();
    cuda.cuDevicePrimaryCtxRelease_v2(0);
    let lost = "2 allocations, 3 streams, 2 events, 2 modules, 1 graphs, 2 executable graphs";
    assert_eq!(cuda.faults(), [format!("context of device 0 released with {lost} alive")]);
    assert_eq!(live(), [0; 6]);
    // It is current still, and no good.
    cuda.memory();
    cuda.cuCtxSynchronize();
    cuda.cuDevicePrimaryCtxRelease_v2(0);
    assert_eq!(cuda.codes(), "0 709 709 201");
    let (mut flags, mut active) = (9, 9);
    cuda.cuDevicePrimaryCtxGetState(0, &mut flags, &mut active);
    assert_eq!((flags, active), (0, 0));
    assert_eq!(cuda.retain(0), context);
    cuda.cuDevicePrimaryCtxSetFlags_v2(0, 4);
    cuda.memory();
    cuda.cuDevicePrimaryCtxGetState(0, &mut flags, &mut active);
    assert_eq!((flags, active, cuda.codes().as_str()), (4, 1, "0 0 0 0 0"));
    control.reset();
    assert_eq!((live(), cuda.faults().len()), ([0; 6], 0));
    cuda.memory();
    assert_eq!(cuda.codes(), "3", "cuInit comes first again");
}

/// "Module Management".
pub fn images(cuda: &Cuda) {
    const ERROR_LOG: u32 = 5;
    const ERROR_LOG_BYTES: u32 = 6;
    let load = |image: &[u8]| {
        let (mut module, mut log) = (0, [0u8; 64]);
        let mut values = [log.as_mut_ptr() as usize, log.len()];
        let options = [ERROR_LOG, ERROR_LOG_BYTES];
        cuda.cuModuleLoadDataEx(&mut module, image.as_ptr(), 2, options.as_ptr(), values.as_mut_ptr());
        let text =
            CStr::from_bytes_until_nul(&log).expect("the log ends with NUL").to_str().expect("it is text");
        assert_eq!(values[1], text.len());
        (module, cuda.codes(), text.to_owned())
    };
    let text = |ptx: &str| load(CString::new(ptx).expect("PTX has no NUL").as_bytes_with_nul());

    let (module, codes, log) = load(&fake::cubin(&["one", "another"]));
    assert_eq!((codes.as_str(), log.as_str()), ("0", ""));
    cuda.function(module, "one");
    cuda.function(module, "another");
    cuda.function(module, "other");
    assert_eq!(cuda.codes(), "0 0 500?");
    let (module, codes, log) = text(PTX);
    assert_eq!((codes.as_str(), log.as_str()), ("0", ""));
    let function = cuda.function(module, "kernel");
    assert_eq!(cuda.function(module, "kernel"), function);
    cuda.function(module, "in_a_comment");
    assert_eq!(cuda.codes(), "0 0 500?");

    let two = format!("{PTX}// another\n.entry another()\n{{\n\tret;\n}}\n");
    cuda.function(text(&two).0, "another");
    assert_eq!(cuda.codes(), "0");

    let (_, codes, log) = text(&PTX.replace("sm_80", "sm_100"));
    assert_eq!(
        (codes.as_str(), log.as_str()),
        ("218", "fatal: PTX is for sm_100, the device has capability (9, 0)")
    );
    for (target, code) in
        [("sm_90a", "0"), ("sm_80a", "218"), ("sm_90f", "0"), ("sm_75", "0"), ("compute_80", "218")]
    {
        assert_eq!(text(&PTX.replace("sm_80", target)).1, code, "{target}");
    }
    for (version, code) in [("9.0", "0"), ("9.1", "222"), ("8.9", "0")] {
        assert_eq!(text(&PTX.replace("7.0", version)).1, code, "{version}");
    }
    assert_eq!(load(&[PTX.as_bytes(), b"\xff\0"].concat()).1, "200", "no NUL ends it");
    let mut other_machine = fake::cubin(&["one"]);
    other_machine[18] = 62;
    assert_eq!(load(&other_machine).1, "200");

    cuda.cuModuleUnload(module);
    cuda.launch(function, 0, LAUNCH);
    cuda.cuModuleUnload(module);
    assert_eq!(cuda.codes(), "0 400 400");
}

/// "Memory Management".
pub fn memory(cuda: &Cuda) {
    let stream = cuda.stream(NON_BLOCKING);
    let [first, second] = [cuda.allocate(96), cuda.allocate(96)];
    assert!(second >= first + 96);
    cuda.write(first, stream);
    assert_eq!(cuda.read(first, stream), [5; 64]);
    cuda.fill(first + 32, stream);
    let mut expected = [5; 64];
    expected[32..].fill(7);
    assert_eq!(cuda.read(first, stream), expected);
    assert_eq!(cuda.read(first + 32, stream), [7; 64]);
    assert!(cuda.faults().is_empty());
    cuda.codes();
    cuda.fill(first + 33, stream);
    cuda.write(first + 33, stream);
    cuda.read(first + 33, stream);
    assert_eq!(cuda.codes(), "1 1 1", "past the end");
    let fault = format!("cuMemsetD8Async: 64 bytes at {:#x}, where the allocation has 63", first + 33);
    assert_eq!(cuda.faults()[0], fault);
    cuda.cuMemFree_v2(first);
    assert_ne!(cuda.allocate(96), first, "addresses are not used again");
}

/// Addresses in parameters.
pub fn freed(cuda: &Cuda) {
    let s = Stage::new(cuda, NON_BLOCKING);
    let launch =
        |parameter| cuda.launch(s.function, s.stream, Launch { parameter: Some(parameter), ..LAUNCH });
    launch(s.spare_memory + 8);
    launch(s.spare_memory + 4096);
    cuda.cuMemFree_v2(s.spare_memory);
    launch(s.spare_memory + 8);
    assert_eq!(cuda.codes(), "0 0 0 700");
    let fault = format!(
        "cuLaunchKernelEx: a parameter is the address {:#x}, of memory that was freed",
        s.spare_memory + 8
    );
    assert_eq!(cuda.faults(), [fault]);
    let log = cuda.control.as_ref().expect("this is the fake").log();
    let launches: Vec<_> = log.0.iter().filter(|entry| entry.kind == "launch").collect();
    assert_eq!(launches[0].memory, [(s.spare_memory, 4096)]);
    assert_eq!(launches[1].memory, [], "the end is not within");
}

/// "Graph Management".
pub fn graphs(cuda: &Cuda) {
    let control = cuda.control.as_ref().expect("this is the fake");
    let s = Stage::new(cuda, NON_BLOCKING);
    let launch = Launch { parameter: Some(s.spare_memory), ..LAUNCH };
    cuda.cuStreamBeginCapture_v2(s.stream, THREAD_LOCAL);
    cuda.launch(s.function, s.stream, launch);
    cuda.fill(s.memory, s.stream);
    let graph = cuda.end(s.stream);
    assert_eq!((control.launches(), cuda.read(s.memory, s.other)), (0, [0; 64]), "nothing ran yet");
    let executable = cuda.instantiate(graph);
    cuda.cuGraphDestroy(graph);
    for replays in 1..3 {
        cuda.cuGraphLaunch(executable, s.stream);
        assert_eq!((control.launches(), cuda.read(s.memory, s.other)), (replays, [7; 64]));
    }
    assert_eq!(control.log().kernels(), ["kernel"; 2]);
    assert!(cuda.faults().is_empty());
    cuda.codes();
    cuda.cuGraphDestroy(graph);
    cuda.cuMemFree_v2(s.spare_memory);
    cuda.cuGraphLaunch(executable, s.stream);
    assert_eq!(cuda.codes(), "1 0 700", "its memory was freed");
    cuda.cuGraphLaunch(s.executable, s.stream);
    cuda.cuGraphExecDestroy(s.executable);
    cuda.cuGraphLaunch(s.executable, s.stream);
    cuda.cuGraphExecDestroy(s.executable);
    assert_eq!(cuda.codes(), "0 0 1 1");
    assert_eq!(control.launches(), 2);
}

/// What comes before what: "Stream synchronization behavior", and events.
pub fn order(cuda: &Cuda) {
    let control = cuda.control.as_ref().expect("this is the fake");
    let s = Stage::new(cuda, NON_BLOCKING);
    let blocking = cuda.stream(0);
    let last = |log: &Log| log.0.len() - 1;
    let unordered = || {
        let log = control.log();
        log.unordered().contains(&(last(&log) - 1, last(&log)))
    };
    let pairs: &[(&str, bool, &dyn Fn())] = &[
        ("one stream", false, &|| {
            cuda.fill(s.memory, s.stream);
            cuda.fill(s.memory, s.stream);
        }),
        ("two streams", true, &|| {
            cuda.fill(s.memory, s.stream);
            cuda.fill(s.memory, s.other);
        }),
        ("other bytes", false, &|| {
            cuda.fill(s.memory, s.stream);
            cuda.fill(s.memory + 64, s.other);
        }),
        ("reading alone", false, &|| {
            cuda.read(s.memory, s.stream);
            cuda.read(s.memory, s.other);
        }),
        ("a launch", true, &|| {
            cuda.launch(s.function, s.stream, Launch { parameter: Some(s.memory), ..LAUNCH });
            cuda.fill(s.memory + 1000, s.other);
        }),
        ("the default stream does not wait for it", true, &|| {
            cuda.fill(s.memory, s.stream);
            cuda.fill(s.memory, 0);
        }),
        ("the default stream waits", false, &|| {
            cuda.fill(s.memory, blocking);
            cuda.fill(s.memory, 0);
        }),
        ("and is waited for", false, &|| {
            cuda.fill(s.memory, 0);
            cuda.fill(s.memory, blocking);
        }),
        ("a graph", true, &|| {
            cuda.fill(s.memory, s.stream);
            // Its node is the last line.
            cuda.cuGraphLaunch(s.executable, s.other);
        }),
    ];
    for (what, expected, calls) in pairs {
        cuda.cuCtxSynchronize();
        calls();
        let found = match *what {
            "a graph" => {
                control.log().unordered().contains(&(last(&control.log()) - 2, last(&control.log())))
            }
            _ => unordered(),
        };
        assert_eq!(found, *expected, "{what}: {:#?}", control.log().0);
    }
    // An event, and waiting on the host, between the two.
    let between: &[(&str, bool, &dyn Fn())] = &[
        ("nothing", true, &|| ()),
        ("the event", false, &|| {
            cuda.cuEventRecord(s.fresh, s.stream);
            cuda.cuStreamWaitEvent(s.other, s.fresh, 0);
        }),
        ("the event too early", true, &|| cuda.cuStreamWaitEvent(s.other, s.fresh, 0)),
        ("the event on the host", false, &|| {
            cuda.cuEventRecord(s.fresh, s.stream);
            cuda.cuEventSynchronize(s.fresh);
        }),
        ("the stream on the host", false, &|| cuda.cuStreamSynchronize(s.stream)),
        ("another stream on the host", true, &|| cuda.cuStreamSynchronize(s.other)),
        ("the context on the host", false, &|| cuda.cuCtxSynchronize()),
    ];
    for (what, expected, calls) in between {
        cuda.cuCtxSynchronize();
        cuda.fill(s.memory, s.stream);
        let first = last(&control.log());
        calls();
        cuda.fill(s.memory, s.other);
        let log = control.log();
        assert_eq!(log.unordered().contains(&(first, last(&log))), *expected, "{what}: {:#?}", log.0);
    }
    assert!(cuda.faults().is_empty());
}

/// Failures that a test asks for.
pub fn failures(cuda: &Cuda) {
    let control = cuda.control.as_ref().expect("this is the fake");
    cuda.codes();
    control.fail("cuMemAlloc_v2", 2);
    cuda.memory();
    cuda.memory();
    control.fail("cuMemAlloc_v2", 0);
    cuda.memory();
    assert_eq!(cuda.codes(), "2? 2? 0");
    control.fail_nth("cuMemAlloc_v2", 700, 2);
    for _ in 0..3 {
        cuda.memory();
    }
    assert_eq!(cuda.codes(), "0 700? 0");
    assert_eq!((control.live("memory"), cuda.faults().len()), (3, 0));
    control.reset();
    cuda.cuDeviceGetCount(&mut 0);
    cuda.cuCtxGetCurrent(&mut 0);
    assert_eq!(
        cuda.codes(),
        "3 3?",
        "the driver was not started, and whoever asks for the context may not know"
    );
}

/// "Error Handling".
pub fn errors(cuda: &Cuda) {
    cuda.codes();
    let text = |code| {
        let (mut name, mut text) = (ptr::null(), ptr::null());
        cuda.cuGetErrorName(code, &mut name);
        cuda.cuGetErrorString(code, &mut text);
        let read = |text: *const i8| {
            // SAFETY: the driver's texts live as long as it does.
            (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_str().expect("it is text"))
        };
        (cuda.codes(), read(name), read(text))
    };
    let known = |name, what| ("0 0".to_owned(), Some(name), Some(what));
    assert_eq!(text(0), known("CUDA_SUCCESS", "no error"));
    let what = "system has unsupported display driver / cuda driver combination";
    assert_eq!(text(803), known("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", what));
    assert_eq!(text(12345), ("1? 1?".to_owned(), None, None));
}

/// In a process where the environment says so.
pub fn environment(cuda: &Cuda) {
    cuda.codes();
    let (mut count, mut version, mut name) = (0, 0, [0; 16]);
    cuda.cuDeviceGetCount(&mut count);
    cuda.cuDriverGetVersion(&mut version);
    cuda.cuDeviceGetName(name.as_mut_ptr(), 16, 0);
    assert_eq!((count, version, &name[..9]), (3, 12040, b"Fake GPU\0".as_slice()));
    let attribute = |id| {
        let mut value = 0;
        cuda.cuDeviceGetAttribute(&mut value, id, 2);
        value
    };
    // Capability, shared memory of a block, multiprocessors, L2, clock and width of the memory.
    let expected = [8, 9, 99 << 10, 132, 50 << 20, 2_619_000, 5120];
    assert_eq!([75, 76, 97, 16, 38, 36, 37].map(attribute), expected);
    cuda.codes();
    for _ in 0..3 {
        cuda.cuCtxSynchronize();
    }
    cuda.cuDeviceTotalMem_v2(&mut 0, 0);
    cuda.cuModuleLoadData(&mut 0, fake::cubin(&["one"]).as_ptr());
    cuda.load(PTX);
    cuda.load(&PTX.replace("7.0", "8.5"));
    assert_eq!(cuda.codes(), "0 719? 0 999? 209? 0 222");
    let s = Stage::new(cuda, NON_BLOCKING);
    cuda.launch(s.function, s.stream, with(CLUSTER, 1));
    assert_eq!(cuda.codes(), "912", "there are no clusters");
}

/// In a process with an old driver.
pub fn old() {
    let cuda = Cuda::open(fake::LIBRARY.as_ref()).expect("the fake driver is found");
    let mut version = 0;
    cuda.cuDriverGetVersion(&mut version);
    assert_eq!(version, 11080);
    // SAFETY: the fake has no initialisers, and only addresses are taken.
    unsafe {
        let library = libloading::Library::new(fake::LIBRARY).expect("it was found");
        assert!(library.get::<*const ()>(b"cuModuleLoadDataEx\0").is_ok());
        for name in [b"cuLaunchKernelEx\0".as_slice(), b"cuOccupancyMaxActiveClusters\0"] {
            assert!(library.get::<*const ()>(name).is_err());
        }
    }
    assert_eq!(Control::here().faults(), <[String; 0]>::default());
}
