//! "Stream Management", captures among it.

use crate::answer::*;
use crate::calls::*;
use crate::cuda_h::*;
use crate::state::*;
use std::collections::BTreeSet;
use std::ffi::c_int;
use std::mem;
use std::ptr;

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
