//! What may be called while a stream is captured: "Stream Management", cuStreamBeginCapture and
//! cuThreadExchangeStreamCaptureMode.

use crate::stage::{BLOCKING, Cuda, GLOBAL, LAUNCH, Launch, NON_BLOCKING, RELAXED, Stage, THREAD_LOCAL};

/// Calls while `stream` is captured, and their codes in each mode. Behind them `!` where the capture has
/// failed, and `-` where it has ended.
struct Case {
    what: &'static str,
    flags: u32,
    calls: fn(&Stage<'_>),
    /// In the modes global, thread-local and relaxed.
    codes: [&'static str; 3],
    /// Where the fake does not let pass what a driver does.
    strict: Option<[&'static str; 3]>,
    /// What ending the capture returns, where that is not plain from the above.
    end: Option<&'static str>,
}

fn case(what: &'static str, codes: [&'static str; 3], calls: fn(&Stage<'_>)) -> Case {
    Case { what, flags: NON_BLOCKING, calls, codes, strict: None, end: None }
}

impl Case {
    fn strict(self, codes: [&'static str; 3]) -> Self {
        Case { strict: Some(codes), ..self }
    }

    fn blocking(self) -> Self {
        Case { flags: BLOCKING, ..self }
    }

    fn end(self, code: &'static str) -> Self {
        Case { end: Some(code), ..self }
    }
}

fn same(codes: &'static str) -> [&'static str; 3] {
    [codes; 3]
}

/// Forbidden to the thread that captures, unless relaxed.
const UNSAFE: [&str; 3] = ["900!", "900!", "0"];

/// Forbidden to other threads in the global mode.
const UNSAFE_ELSEWHERE: [&str; 3] = ["900!", "0", "0"];

#[expect(clippy::too_many_lines, reason = "a table")]
fn cases() -> Vec<Case> {
    vec![
        case("nothing", same(""), |_| ()),
        case("work on the stream", same("0 0"), |s| {
            s.cuda.launch(s.function, s.stream, LAUNCH);
            s.cuda.fill(s.memory, s.stream);
        }),
        case("work on another stream", same("0 0 0 0"), |s| {
            s.cuda.launch(s.function, s.other, LAUNCH);
            s.cuda.fill(s.memory, s.other);
            s.cuda.write(s.memory, s.other);
            s.cuda.cuGraphLaunch(s.executable, s.other);
        }),
        case("work on the stream by another thread", same("0"), |s| {
            s.cuda.elsewhere(|| s.cuda.fill(s.memory, s.stream))
        }),
        // Memory.
        case("allocating", UNSAFE, |s| {
            s.cuda.memory();
        }),
        case("freeing", UNSAFE, |s| s.cuda.cuMemFree_v2(s.spare_memory)),
        case("allocating on another thread", UNSAFE_ELSEWHERE, |s| {
            s.cuda.elsewhere(|| {
                s.cuda.memory();
            })
        }),
        case("copying to the device", same("0"), |s| s.cuda.write(s.memory, s.stream)).strict(same("900!")),
        case("copying to the host", same("0"), |s| {
            s.cuda.read(s.memory, s.stream);
        })
        .strict(same("900!")),
        // Modules.
        case("loading", same("0"), |s| {
            s.cuda.load(crate::stage::PTX);
        })
        .strict(UNSAFE),
        case("loading on another thread", same("0"), |s| {
            s.cuda.elsewhere(|| {
                s.cuda.load(crate::stage::PTX);
            })
        })
        .strict(UNSAFE_ELSEWHERE),
        case("unloading", UNSAFE, |s| s.cuda.cuModuleUnload(s.spare_module)),
        case("asking for functions and of them", same("0 0 0 0"), |s| {
            s.cuda.function(s.module, "kernel");
            s.cuda.cuFuncSetAttribute(s.function, 8, 65536);
            s.cuda.most_clusters(s.function, Launch { attribute: Some((4, 1)), ..LAUNCH });
            s.cuda.device_of(s.memory);
        }),
        case("retaining and releasing the context", same("0 0"), |s| {
            s.cuda.retain(0);
            s.cuda.cuDevicePrimaryCtxRelease_v2(0);
        }),
        // Waiting.
        case("waiting for the context", same("900!"), |s| s.cuda.cuCtxSynchronize()),
        case("waiting for the context on another thread", same("900!"), |s| {
            s.cuda.elsewhere(|| s.cuda.cuCtxSynchronize())
        }),
        case("waiting for the stream", same("900!"), |s| s.cuda.cuStreamSynchronize(s.stream)),
        case("waiting for another stream", UNSAFE, |s| s.cuda.cuStreamSynchronize(s.other)),
        case("waiting for another stream on another thread", UNSAFE_ELSEWHERE, |s| {
            s.cuda.elsewhere(|| s.cuda.cuStreamSynchronize(s.other))
        }),
        case("waiting for the default stream", UNSAFE, |s| s.cuda.cuStreamSynchronize(0)),
        case("asking the stream", same("900!"), |s| s.cuda.cuStreamQuery(s.stream)),
        case("asking another stream", UNSAFE, |s| s.cuda.cuStreamQuery(s.other)),
        case("waiting for an event", UNSAFE, |s| s.cuda.cuEventSynchronize(s.event)),
        case("asking an event", UNSAFE, |s| s.cuda.cuEventQuery(s.event)),
        case("asking an event on another thread", UNSAFE_ELSEWHERE, |s| {
            s.cuda.elsewhere(|| s.cuda.cuEventQuery(s.event))
        }),
        case("time between events", same("0"), |s| s.cuda.elapsed(s.event, s.event)),
        // Relaxing.
        case("allocating and asking while relaxed", same("0 0 0 0 0"), |s| {
            let mode = s.cuda.exchange(RELAXED);
            s.cuda.memory();
            s.cuda.cuMemFree_v2(s.spare_memory);
            s.cuda.cuEventQuery(s.event);
            assert_eq!(s.cuda.exchange(mode), RELAXED);
        }),
        case("loading while relaxed", same("0 0 0"), |s| {
            let mode = s.cuda.exchange(RELAXED);
            s.cuda.load(crate::stage::PTX);
            assert_eq!(s.cuda.exchange(mode), RELAXED);
        }),
        case("waiting for the context while relaxed", same("0 900 0!"), |s| {
            let mode = s.cuda.exchange(RELAXED);
            s.cuda.cuCtxSynchronize();
            s.cuda.exchange(mode);
        }),
        // Letting go.
        case("destroying another stream and an event", same("0 0"), |s| {
            s.cuda.cuStreamDestroy_v2(s.fork);
            s.cuda.cuEventDestroy_v2(s.fresh);
        }),
        case("destroying a graph that can be launched", UNSAFE, |s| {
            s.cuda.cuGraphExecDestroy(s.spare_executable);
        }),
        case("destroying an event of the capture", same("0 0"), |s| {
            s.cuda.cuEventRecord(s.fresh, s.stream);
            s.cuda.cuEventDestroy_v2(s.fresh);
        }),
        // Graphs and captures within it.
        case("launching a graph into it", same("900!"), |s| s.cuda.cuGraphLaunch(s.executable, s.stream)),
        case("beginning again", same("401"), |s| s.cuda.cuStreamBeginCapture_v2(s.stream, RELAXED)),
        case("going on after it failed", same("900 901 901 900 401!"), |s| {
            s.cuda.cuStreamSynchronize(s.stream);
            s.cuda.fill(s.memory, s.stream);
            s.cuda.cuEventRecord(s.fresh, s.stream);
            s.cuda.cuStreamQuery(s.stream);
            s.cuda.cuStreamBeginCapture_v2(s.stream, RELAXED);
        }),
        case("ending after it failed, twice", same("900 901 401 0-"), |s| {
            s.cuda.cuStreamQuery(s.stream);
            s.cuda.end(s.stream);
            s.cuda.end(s.stream);
            s.cuda.fill(s.memory, s.stream);
        }),
        case("ending twice", same("0 401-"), |s| {
            s.cuda.end(s.stream);
            s.cuda.end(s.stream);
        }),
        case("ending on another thread", ["908-", "908-", "0-"], |s| {
            s.cuda.elsewhere(|| {
                s.cuda.end(s.stream);
            });
        }),
        // Events.
        case("asking an event of the capture", same("0 907!"), |s| {
            s.cuda.cuEventRecord(s.fresh, s.stream);
            s.cuda.cuEventQuery(s.fresh);
        }),
        case("waiting for an event of the capture", same("0 907!"), |s| {
            s.cuda.cuEventRecord(s.fresh, s.stream);
            s.cuda.cuEventSynchronize(s.fresh);
        }),
        case("time to an event of the capture", same("0 907"), |s| {
            s.cuda.cuEventRecord(s.fresh, s.stream);
            s.cuda.elapsed(s.event, s.fresh);
        }),
        case("waiting on the device for work outside", same("905!"), |s| {
            s.cuda.cuStreamWaitEvent(s.stream, s.event, 0);
        }),
        case("waiting on the device for an event never recorded", same("0"), |s| {
            s.cuda.cuStreamWaitEvent(s.stream, s.fresh, 0);
        }),
        // Other streams that become part of it.
        case("a stream that is not waited for", same("0 0 0 0"), |s| {
            fork(s);
            s.cuda.fill(s.memory, s.fork);
        })
        .end("904"),
        case("a stream that did nothing", same("0 0 0"), fork),
        case("a stream that is waited for", same("0 0 0 0 0 0"), |s| {
            fork(s);
            s.cuda.fill(s.memory, s.fork);
            s.cuda.cuEventRecord(s.fresh, s.fork);
            s.cuda.cuStreamWaitEvent(s.stream, s.fresh, 0);
        }),
        case("ending it on another stream", same("0 0 0 903!"), |s| {
            fork(s);
            s.cuda.end(s.fork);
        }),
        case("two captures that meet", same("0 0 0 902!"), |s| {
            s.cuda.cuStreamBeginCapture_v2(s.fork, RELAXED);
            s.cuda.fill(s.memory, s.fork);
            s.cuda.cuEventRecord(s.fresh, s.fork);
            s.cuda.cuStreamWaitEvent(s.stream, s.fresh, 0);
        }),
        case("an event of a capture that has ended", same("0 0 0 1 1 1"), |s| {
            s.cuda.cuStreamBeginCapture_v2(s.fork, RELAXED);
            s.cuda.cuEventRecord(s.fresh, s.fork);
            s.cuda.end(s.fork);
            s.cuda.cuEventQuery(s.fresh);
            s.cuda.cuEventSynchronize(s.fresh);
            s.cuda.cuStreamWaitEvent(s.other, s.fresh, 0);
        }),
        // The default stream waits for blocking streams, and for no other.
        case("work on the default stream", same("0"), |s| s.cuda.fill(s.memory, 0)),
        case("work on the default stream, which waits", same("906!"), |s| s.cuda.fill(s.memory, 0))
            .blocking(),
        case("work on the default stream by another thread", same("906!"), |s| {
            s.cuda.elsewhere(|| s.cuda.fill(s.memory, 0))
        })
        .blocking(),
        case("capturing the default stream", same("900"), |s| s.cuda.cuStreamBeginCapture_v2(0, RELAXED)),
        case("capturing the default stream, which waits", same("906!"), |s| {
            s.cuda.cuStreamBeginCapture_v2(0, RELAXED);
        })
        .blocking(),
        case("whether the default stream is captured", same("0"), |s| {
            s.cuda.is_capturing(0);
        }),
        case("whether the default stream is captured, which waits", same("906"), |s| {
            s.cuda.is_capturing(0);
        })
        .blocking(),
        case("waiting for the default stream, which waits", same("906!"), |s| {
            s.cuda.cuStreamSynchronize(0);
        })
        .blocking(),
        case("recording on the default stream", same("0"), |s| s.cuda.cuEventRecord(s.fresh, 0)),
        case("recording on the default stream, which waits", same("906!"), |s| {
            s.cuda.cuEventRecord(s.fresh, 0);
        })
        .blocking(),
        case("the default stream waits for an event", same("0"), |s| s.cuda.cuStreamWaitEvent(0, s.event, 0)),
        case("the default stream, which waits, waits for an event", same("906!"), |s| {
            s.cuda.cuStreamWaitEvent(0, s.event, 0);
        })
        .blocking(),
        case("the default stream waits for the capture", same("0 906!"), |s| {
            s.cuda.cuEventRecord(s.fresh, s.stream);
            s.cuda.cuStreamWaitEvent(0, s.fresh, 0);
        }),
    ]
}

/// Makes `fork` part of the capture.
fn fork(s: &Stage<'_>) {
    s.cuda.fill(s.memory, s.stream);
    s.cuda.cuEventRecord(s.fresh, s.stream);
    s.cuda.cuStreamWaitEvent(s.fork, s.fresh, 0);
}

/// Checks all cases in all modes. `strict`: the driver is the fake, as it is.
pub fn check(cuda: &Cuda, strict: bool) {
    let mut wrong = Vec::new();
    for case in cases() {
        for mode in [GLOBAL, THREAD_LOCAL, RELAXED] {
            let codes = if strict { case.strict.unwrap_or(case.codes) } else { case.codes };
            let expected = codes[mode as usize];
            let stage = Stage::new(cuda, case.flags);
            cuda.cuStreamBeginCapture_v2(stage.stream, mode);
            assert_eq!(cuda.codes(), "0", "{}", case.what);
            (case.calls)(&stage);
            let codes = cuda.codes();
            let (state, end) =
                [("-", "401"), ("", "0"), ("!", "901")][cuda.is_capturing(stage.stream) as usize];
            cuda.codes();
            cuda.end(stage.stream);
            let (found, ended) = (format!("{codes}{state}"), cuda.codes());
            if found != expected || ended != case.end.unwrap_or(end) {
                wrong.push(format!("{}, mode {mode}: {found}, not {expected}; ending: {ended}", case.what));
            }
            // What began there of its own.
            if cuda.is_capturing(stage.fork) != 0 {
                cuda.end(stage.fork);
            }
            cuda.codes();
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    if strict {
        // A driver forgets the capture: then there is nothing to end.
        let stage = Stage::new(cuda, NON_BLOCKING);
        cuda.cuStreamBeginCapture_v2(stage.stream, THREAD_LOCAL);
        cuda.cuStreamDestroy_v2(stage.stream);
        cuda.end(stage.stream);
        assert_eq!(cuda.codes(), "0 900 901", "destroying the stream");
    }
}
