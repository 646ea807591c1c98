//! Calls recorded once and replayed often.

use crate::backend::Backend;
use crate::cuda::gpu::start_driver;
use crate::cuda::{Queue, status};
use crate::error::Result;
use cust::sys::{self, CUevent, CUgraphExec, CUstreamCaptureMode};
use std::marker::PhantomData;
use std::ptr;

/// A recording of queued work. The buffers that were named in it must outlive it; what they hold may
/// change between replays.
pub struct Graph<'a> {
    executable: CUgraphExec,
    queue: PhantomData<&'a Queue<'a>>,
}

impl<'a> Queue<'a> {
    /// Records what `work` queues here, without running it.
    ///
    /// # Safety
    /// All device memory that the recorded calls name must outlive the graph.
    ///
    /// # Errors
    /// `work`'s own, or [`crate::Error::Driver`] when it did something that cannot be recorded. Nothing was
    /// run either way.
    pub unsafe fn capture(&self, work: impl FnOnce(&Self) -> Result<()>) -> Result<Graph<'_>> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let mut graph = ptr::null_mut();
        let mut executable = ptr::null_mut();
        // SAFETY: the stream is live, and this thread's; the graph is instantiated, then let go.
        unsafe {
            status("cuStreamBeginCapture", sys::cuStreamBeginCapture_v2(self.stream(), mode))?;
            let queued = work(self);
            let ended = status("cuStreamEndCapture", sys::cuStreamEndCapture(self.stream(), &mut graph));
            queued.and(ended)?;
            let made = status(
                "cuGraphInstantiateWithFlags",
                sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0),
            );
            status("cuGraphDestroy", sys::cuGraphDestroy(graph))?;
            made?;
        }
        Ok(Graph { executable, queue: PhantomData })
    }

    /// Queues everything that was recorded.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] when the driver refuses.
    pub fn replay(&self, graph: &Graph<'_>) -> Result<()> {
        // SAFETY: both are live.
        status("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.executable, self.stream()) })
    }

    /// Microseconds that each of `repeats` replays takes on the device.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] when the driver refuses or the work fails.
    pub fn time(&self, graph: &Graph<'_>, repeats: usize) -> Result<Vec<f64>> {
        let (start, end) = (TimeStamp::new()?, TimeStamp::new()?);
        (0..repeats)
            .map(|_| {
                start.record(self)?;
                self.replay(graph)?;
                end.record(self)?;
                self.synchronize()?;
                end.microseconds_since(&start)
            })
            .collect()
    }
}

impl Drop for Graph<'_> {
    fn drop(&mut self) {
        // SAFETY: instantiated by `capture`, and dropped once. A failure here has nobody to go to.
        let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
    }
}

/// Lets this thread allocate, free and load modules until it is dropped, whatever is being captured meanwhile: a
/// library that prepares itself at its first call, which may be made within a capture. What is done so is done
/// once, at the call, and is no part of the graph.
pub struct AllowAllocation(CUstreamCaptureMode);

impl AllowAllocation {
    /// Begins the stretch.
    ///
    /// # Errors
    /// [`crate::Error::NoDevice`] without a driver or device, [`crate::Error::Driver`] when the driver refuses.
    pub fn begin() -> Result<Self> {
        start_driver()?;
        Ok(AllowAllocation(exchange_mode(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?))
    }
}

impl Drop for AllowAllocation {
    fn drop(&mut self) {
        // A failure here has nobody to go to.
        let _ = exchange_mode(self.0);
    }
}

/// Makes `mode` this thread's, and returns what was.
fn exchange_mode(mut mode: CUstreamCaptureMode) -> Result<CUstreamCaptureMode> {
    // SAFETY: reads and writes one value.
    status("cuThreadExchangeStreamCaptureMode", unsafe {
        sys::cuThreadExchangeStreamCaptureMode(&mut mode)
    })?;
    Ok(mode)
}

/// An event, on any stream: cust's own records on its own streams alone.
struct TimeStamp(CUevent);

impl TimeStamp {
    fn new() -> Result<Self> {
        let mut event = ptr::null_mut();
        // SAFETY: writes one handle.
        status("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, 0) })?;
        Ok(TimeStamp(event))
    }

    fn record(&self, queue: &Queue<'_>) -> Result<()> {
        // SAFETY: both are live.
        status("cuEventRecord", unsafe { sys::cuEventRecord(self.0, queue.stream()) })
    }

    fn microseconds_since(&self, start: &Self) -> Result<f64> {
        let mut milliseconds = 0.0;
        // SAFETY: both are live; writes one number.
        status("cuEventElapsedTime", unsafe { sys::cuEventElapsedTime(&mut milliseconds, start.0, self.0) })?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl Drop for TimeStamp {
    fn drop(&mut self) {
        // SAFETY: created by `new`, and dropped once. A failure here has nobody to go to.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}
