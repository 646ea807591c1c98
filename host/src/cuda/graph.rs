//! Calls recorded once and replayed often.

use crate::backend::Backend;
use crate::cuda::context::Relaxed;
use crate::cuda::driver::{Api, CaptureMode, Handle, api};
use crate::cuda::memory::{Access, Memory};
use crate::cuda::raw_stream::Event;
use crate::cuda::recording::Recorded;
use crate::cuda::stream::Stream;
use crate::error::{Error, Result};
use crate::route::HeldRoute;
use std::sync::{Arc, Mutex, PoisonError};
use std::{fmt, ptr};

/// A recording of queued work, replayed on the stream that it was recorded on.
///
/// It keeps the buffers and workspaces that its calls name alive, and each replay waits for what other
/// streams do with them. What the buffers hold may change between replays.
pub struct Graph {
    /// A driver's graph may be launched by one thread at a time.
    executable: Mutex<Executable>,
    stream: Stream,
    memories: Vec<(Arc<Memory>, Access)>,
    routes: Vec<Arc<HeldRoute>>,
}

/// `CUgraphExec`.
struct Executable(Handle);

// SAFETY: it may be used from any thread, by one at a time.
unsafe impl Send for Executable {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph(on {:?})", self.stream)
    }
}

/// A capture under way; it is ended when this is dropped, also by a panic.
struct Capture<'a> {
    api: &'a Api,
    stream: &'a Stream,
    ended: bool,
}

impl<'a> Capture<'a> {
    fn begin(api: &'a Api, stream: &'a Stream) -> Result<Self> {
        // A call of another thread comes before it, or is part of it.
        let _queueing = stream.device().queueing_alone();
        // What other streams wait for is over by then: while it is captured, a stream cannot be waited for.
        stream.raw().wait_unless_captured(api)?;
        // SAFETY: the stream is live.
        unsafe { api.cuStreamBeginCapture_v2(stream.as_raw(), CaptureMode::ThreadLocal as u32)? };
        // A stream that is captured already was refused just now.
        stream.own_recording().begin();
        Ok(Capture { api, stream, ended: false })
    }

    /// Ends it, and returns the driver's graph and what its calls use.
    fn end(&mut self) -> Result<(Handle, Recorded)> {
        self.ended = true;
        let _queueing = self.stream.device().queueing_alone();
        let recorded = self.stream.own_recording().end();
        // What they found was not found yet.
        recorded.routes.iter().for_each(|held| held.forget());
        let mut graph = ptr::null_mut();
        // SAFETY: this thread has begun it; writes one handle.
        unsafe { self.api.cuStreamEndCapture(self.stream.as_raw(), &mut graph)? };
        Ok((graph, recorded))
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Ok((graph, _)) = self.end() {
            // SAFETY: it came from the capture, and nothing else has it. A failure here has nobody to go to.
            let _ = unsafe { self.api.cuGraphDestroy(graph) };
        }
    }
}

impl Stream {
    /// Records what `work` queues on this stream, without running it. Routes that are found in it are valid
    /// in it alone.
    ///
    /// # Errors
    /// `work`'s own, or [`Error::Driver`] when it did something that cannot be recorded. Nothing was run
    /// either way. [`Error::NotRecordable`] for `CU_STREAM_PER_THREAD` of another thread than the handle was
    /// made on.
    pub fn capture(&self, work: impl FnOnce(&Self) -> Result<()>) -> Result<Graph> {
        if self.is_elsewhere() {
            // Calls would not find the recording.
            return Err(Error::NotRecordable { what: "a call on another thread's default stream" });
        }
        let api = api()?;
        let _bound = self.device().bind()?;
        let mut capture = Capture::begin(api, self)?;
        let queued = work(self);
        let (graph, Recorded { memories, routes }) = match (queued, capture.end()) {
            (Ok(()), ended) => ended?,
            (Err(error), Ok((graph, _))) => {
                // SAFETY: it came from the capture, and nothing else has it.
                let _ = unsafe { api.cuGraphDestroy(graph) };
                return Err(error);
            }
            (Err(error), Err(_)) => return Err(error),
        };
        let mut executable = ptr::null_mut();
        // This thread may have a capture of its own under way, elsewhere.
        let _relaxed = Relaxed::begin(api)?;
        // SAFETY: the graph is live, and let go of once.
        unsafe {
            let made = api.cuGraphInstantiateWithFlags(&mut executable, graph, 0);
            let destroyed = api.cuGraphDestroy(graph);
            made?;
            destroyed?;
        }
        Ok(Graph {
            executable: Mutex::new(Executable(executable)),
            stream: self.clone(),
            memories: once_each(memories),
            routes,
        })
    }
}

/// Each allocation once, written if any of its uses writes.
fn once_each(mut memories: Vec<(Arc<Memory>, Access)>) -> Vec<(Arc<Memory>, Access)> {
    memories.sort_by_key(|(memory, access)| (Arc::as_ptr(memory), *access == Access::Read));
    memories.dedup_by(|(one, _), (other, _)| Arc::ptr_eq(one, other));
    memories
}

impl Graph {
    /// The stream that it was recorded on, and is replayed on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Queues everything that was recorded. Routes that were found on its workspaces before are no longer
    /// valid.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver refuses.
    pub fn replay(&self) -> Result<()> {
        let (api, raw, device) = (api()?, self.stream.raw(), self.stream.device());
        let _bound = device.bind()?;
        let _queueing = device.queueing_alone();
        let executable = self.executable.lock().unwrap_or_else(PoisonError::into_inner);
        self.memories.iter().try_for_each(|(memory, access)| self.stream.use_memory(memory, *access))?;
        self.routes.iter().for_each(|held| held.forget());
        if let Some(recording) = self.stream.recording() {
            recording.add_routes(&self.routes);
        }
        // SAFETY: both are live.
        unsafe { api.cuGraphLaunch(executable.0, raw.handle()) }
    }

    /// Microseconds that each of `repeats` replays takes on the device.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver refuses or the work fails.
    pub fn time(&self, repeats: usize) -> Result<Vec<f64>> {
        let api = api()?;
        let _bound = self.stream.device().bind()?;
        let (start, end) = (Event::new(api, Event::TIMED)?, Event::new(api, Event::TIMED)?);
        let once = |_| {
            start.record(&self.stream.raw())?;
            self.replay()?;
            end.record(&self.stream.raw())?;
            self.stream.synchronize()?;
            let mut milliseconds = 0.0;
            // SAFETY: both are live; writes one number.
            unsafe { api.cuEventElapsedTime(&mut milliseconds, start.handle, end.handle)? };
            Ok(f64::from(milliseconds) * 1e3)
        };
        (0..repeats).map(once).collect()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(_bound) = self.stream.device().bind() else { return };
        let executable = self.executable.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Ok(api) = api() {
            let _relaxed = Relaxed::begin(api);
            // A replay may be under way. A failure here has nobody to go to.
            if self.stream.raw().is_kept() {
                let _ = self.stream.raw().wait_unless_captured(api);
            }
            // SAFETY: instantiated by `capture`, and dropped once.
            let _ = unsafe { api.cuGraphExecDestroy(executable.0) };
        }
    }
}
