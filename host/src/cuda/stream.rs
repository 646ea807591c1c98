//! A stream that calls run on.

use crate::backend::Backend;
use crate::blocks::Align;
use crate::call::{Expand, Forward, Layout, RoutingTensors, Shrink};
use crate::cuda::device::{Device, Relaxed};
use crate::cuda::driver::{Api, Handle, api, capture_status};
use crate::cuda::launch::launch;
use crate::cuda::memory::{Access, Buffer, Memory};
use crate::cuda::tensors::Tensors;
use crate::cuda::workspace::Workspace;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::launch::{Launched, Launches, Parameters, Place, Planner};
use crate::plan::{Launch, Options, Plan, RouteSource, Stage};
use crate::projection::Projection;
use crate::route::{HeldRoute, NOT_RECORDED, Route};
use crate::tensor::Cuda;
use bytemuck::Pod;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::{fmt, ptr};

/// A stream of a [`Device`] that calls run on, one after another: a [`Backend`].
///
/// A handle: clones are the same stream. It may be used by several threads; their calls run in the order in which
/// they are made.
#[derive(Clone)]
pub struct Stream {
    raw: Arc<RawStream>,
    options: Options,
}

/// What all handles of a stream share.
pub(super) struct RawStream {
    device: Device,
    handle: Handle,
    /// Where it is [`PER_THREAD`]: whose.
    thread: Option<ThreadId>,
    owner: Owner,
    /// The number of the recording that is under way, or [`NOT_RECORDED`].
    recording: AtomicU64,
    recorded: Mutex<Recorded>,
}

/// `CU_STREAM_PER_THREAD`: a stream of its own on each thread.
const PER_THREAD: usize = 2;

/// Whose a stream is.
#[derive(Clone)]
pub(super) enum Owner {
    /// This library's, which destroys it.
    This,
    /// Another's, which is kept alive.
    #[cfg(feature = "cudarc-unversioned")]
    Kept(#[allow(dead_code, reason = "held, and let go of")] Arc<dyn std::any::Any + Send + Sync>),
    /// The caller's, who has promised to keep it for as long as it is used.
    Caller,
}

/// What the calls of a recording use.
#[derive(Default)]
pub(super) struct Recorded {
    pub memories: Vec<(Arc<Memory>, Access)>,
    /// The routes of workspaces that they find anew.
    pub routes: Vec<Arc<HeldRoute>>,
}

// SAFETY: a stream may be used from any thread on which its context is current; `Device::bind` sees to that.
unsafe impl Send for RawStream {}
// SAFETY: as above; the driver locks what it must.
unsafe impl Sync for RawStream {}

impl RawStream {
    /// A stream as this thread has it.
    fn new(device: &Device, handle: Handle, owner: Owner) -> Self {
        let thread = (handle as usize == PER_THREAD).then(|| thread::current().id());
        let recording = AtomicU64::new(NOT_RECORDED);
        RawStream { device: device.clone(), handle, thread, owner, recording, recorded: Mutex::default() }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn handle(&self) -> Handle {
        self.handle
    }

    /// Whether both are one stream.
    pub fn is(&self, other: &RawStream) -> bool {
        self.handle == other.handle && self.thread == other.thread && self.device == other.device
    }

    /// Its name in messages.
    #[cfg(feature = "cudarc-unversioned")]
    pub fn name(&self) -> String {
        let of = self.thread.map(|thread| format!(" of {thread:?}")).unwrap_or_default();
        format!("the stream {:?}{of}", self.handle)
    }

    /// Whether its handle is another stream's on this thread.
    pub fn is_elsewhere(&self) -> bool {
        self.thread.is_some_and(|thread| thread != thread::current().id())
    }

    pub fn recording(&self) -> &AtomicU64 {
        &self.recording
    }

    pub fn recorded(&self) -> MutexGuard<'_, Recorded> {
        // A panic leaves the lists as they were, or with one thing more.
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is queued next uses `memory`: after the uses of other streams or, in a recording, whenever that is
    /// replayed.
    pub fn use_memory(self: &Arc<Self>, memory: &Arc<Memory>, access: Access) -> Result<()> {
        if self.recording.load(Ordering::Acquire) == NOT_RECORDED {
            return memory.order(self, access);
        }
        if !memory.can_be_kept() {
            return Err(Error::NotRecordable { what: "memory that is lent for one call" });
        }
        self.recorded().memories.push((Arc::clone(memory), access));
        Ok(())
    }

    /// Whether the stream is there for as long as this is.
    pub fn is_kept(&self) -> bool {
        !matches!(self.owner, Owner::Caller)
    }

    /// What is queued next runs after all that is queued on `other`.
    pub fn wait_for(&self, other: &RawStream) -> Result<()> {
        let api = api()?;
        if other.is_elsewhere() {
            return other.wait_unless_captured(api);
        }
        if other.is_captured(api)? {
            // What is captured there does not run, and what ran before is over: a recording begins with that.
            return Ok(());
        }
        if self.is_captured(api)? {
            // A capture cannot wait for what is outside it.
            return other.wait_unless_captured(api);
        }
        let event = Event::new(api, Event::NO_TIMING)?;
        event.record(other)?;
        // SAFETY: both are live. The driver keeps the event until it has been waited for.
        unsafe { api.cuStreamWaitEvent(self.handle, event.handle, 0) }
    }

    /// Waits on this thread for all that is queued, unless the stream is captured and must not be waited for.
    pub fn wait_unless_captured(&self, api: &Api) -> Result<()> {
        if self.is_elsewhere() {
            let _relaxed = Relaxed::begin(api)?;
            // The stream has no handle here. The driver refuses while a stream of the device is captured.
            // SAFETY: the device's context is current, as in all calls here.
            return unsafe { api.cuCtxSynchronize() };
        }
        if self.is_captured(api)? {
            return Ok(());
        }
        // This thread may have a capture of its own under way.
        let _relaxed = Relaxed::begin(api)?;
        // SAFETY: the stream is live.
        unsafe { api.cuStreamSynchronize(self.handle) }
    }

    /// Whether anybody captures the stream.
    fn is_captured(&self, api: &Api) -> Result<bool> {
        let mut status = capture_status::NONE;
        // SAFETY: the stream is live; writes one value.
        unsafe { api.cuStreamIsCapturing(self.handle, &mut status)? };
        Ok(status != capture_status::NONE)
    }
}

impl Drop for RawStream {
    fn drop(&mut self) {
        if !matches!(self.owner, Owner::This) {
            return;
        }
        if let (Ok(api), Ok(_bound)) = (api(), self.device.bind()) {
            let _relaxed = Relaxed::begin(api);
            // SAFETY: created by `Stream::new`, and dropped once. A failure here has nobody to go to.
            let _ = unsafe { api.cuStreamDestroy_v2(self.handle) };
        }
    }
}

/// An event of the current context.
pub(super) struct Event<'a> {
    api: &'a Api,
    pub handle: Handle,
}

impl<'a> Event<'a> {
    /// `CU_EVENT_DISABLE_TIMING`.
    pub const NO_TIMING: u32 = 2;
    /// `CU_EVENT_DEFAULT`.
    pub const TIMED: u32 = 0;

    pub fn new(api: &'a Api, flags: u32) -> Result<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { api.cuEventCreate(&mut handle, flags)? };
        Ok(Event { api, handle })
    }

    pub fn record(&self, stream: &RawStream) -> Result<()> {
        // SAFETY: both are live.
        unsafe { self.api.cuEventRecord(self.handle, stream.handle) }
    }
}

impl Drop for Event<'_> {
    fn drop(&mut self) {
        // SAFETY: created by `new`, and dropped once. A failure here has nobody to go to.
        let _ = unsafe { self.api.cuEventDestroy_v2(self.handle) };
    }
}

/// What a workspace holds of a route, for tests and measurements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteContents {
    /// Pairs, segment by segment; inactive ones last.
    pub pairs: Vec<u32>,
    /// Segments cut into tiles.
    pub tiles: Vec<RouteTile>,
    /// Tiles of active pairs: the first ones.
    pub active_tiles: usize,
}

/// Pairs of one segment that a block works on together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteTile {
    /// Adapter slot.
    pub slot: u32,
    /// Local expert.
    pub expert: u32,
    /// Position of its first pair in [`RouteContents::pairs`].
    pub first: u32,
    /// Pairs.
    pub rows: u32,
    /// Rank in use; 0 where pairs are inactive.
    pub rank: u32,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?} of {:?})", self.raw.handle, self.raw.device)
    }
}

impl Stream {
    /// `CU_STREAM_NON_BLOCKING`.
    const NON_BLOCKING: u32 = 1;

    pub(super) fn new(device: &Device, options: Options) -> Result<Self> {
        let (api, _bound) = (api()?, device.bind()?);
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { api.cuStreamCreate(&mut handle, Self::NON_BLOCKING)? };
        Ok(Self::of(device, handle, Owner::This, options))
    }

    pub(super) fn foreign(device: &Device, handle: Handle, owner: Owner) -> Self {
        Self::of(device, handle, owner, Options::default())
    }

    fn of(device: &Device, handle: Handle, owner: Owner, options: Options) -> Self {
        Stream { raw: Arc::new(RawStream::new(device, handle, owner)), options }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.raw.device
    }

    /// The `CUstream`. It lives as long as this handle.
    pub fn as_raw(&self) -> *mut c_void {
        self.raw.handle
    }

    /// Whether this thread has another stream by this handle than the one it was made on.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.raw.is_elsewhere()
    }

    /// The stream as this thread has it.
    pub(super) fn raw(&self) -> Arc<RawStream> {
        match self.is_elsewhere() {
            false => Arc::clone(&self.raw),
            true => Arc::new(RawStream::new(&self.raw.device, self.raw.handle, self.raw.owner.clone())),
        }
    }

    /// Copies `elements` into a buffer from element `start` on, after the work queued before, and waits for that.
    ///
    /// # Errors
    /// [`Error::TooShort`] when they do not fit, [`Error::NotRecordable`] in a recording, [`Error::Driver`] when the
    /// driver refuses or queued work failed.
    pub fn write<T: Pod>(&self, buffer: &mut Buffer<T>, start: usize, elements: &[T]) -> Result<()> {
        let end = start.saturating_add(elements.len());
        if end > buffer.len() {
            let shape = format!("[{start}..{end}]");
            return Err(Error::TooShort { tensor: "buffer", shape, expected: end, got: buffer.len() });
        }
        let address = buffer.address() + (start * size_of::<T>()) as u64;
        self.copy("a copy from the host", buffer.memory(), Access::Write, |api| {
            // SAFETY: the elements fit, and are not let go before the copy has ended.
            unsafe {
                let (from, bytes) = (elements.as_ptr().cast(), size_of_val(elements));
                api.cuMemcpyHtoDAsync_v2(address, from, bytes, self.raw.handle)
            }
        })
    }

    /// Queues a copy between the host and `memory`, and waits for it.
    fn copy(
        &self,
        what: &'static str,
        memory: &Arc<Memory>,
        access: Access,
        copy: impl FnOnce(&Api) -> Result<()>,
    ) -> Result<()> {
        let (api, device) = (api()?, self.device());
        memory.check_device("buffer", device)?;
        let _bound = device.bind()?;
        let _relaxed = Relaxed::begin(api)?;
        {
            // No recording begins on another thread between the check and the copy.
            let _queueing = device.queueing();
            self.check_not_recorded(what)?;
            self.raw().use_memory(memory, access)?;
            copy(api)?;
        }
        // SAFETY: the stream is live.
        unsafe { api.cuStreamSynchronize(self.raw.handle) }
    }

    fn check_not_recorded(&self, what: &'static str) -> Result<()> {
        if self.recording() == NOT_RECORDED { Ok(()) } else { Err(Error::NotRecordable { what }) }
    }

    /// The number of the recording that calls here are part of, or [`NOT_RECORDED`].
    pub(super) fn recording(&self) -> u64 {
        self.raw().recording.load(Ordering::Acquire)
    }

    /// `len` zeros on the device.
    ///
    /// # Errors
    /// As for [`Backend::upload`].
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        // SAFETY: written at once. The elements are plain data, of which all zeros is one.
        let buffer = unsafe { Buffer::<T>::uninitialized(self.device(), len)? };
        let (address, bytes) = (buffer.address(), len * size_of::<T>());
        self.copy("making a buffer", buffer.memory(), Access::Write, |api| match bytes {
            0 => Ok(()),
            // SAFETY: the buffer has as many bytes.
            _ => unsafe { api.cuMemsetD8Async(address, 0, bytes, self.raw.handle) },
        })?;
        Ok(buffer)
    }

    /// Copies out the route of `pairs` pairs that a workspace holds, for tests and measurements: waits for queued
    /// work.
    ///
    /// # Errors
    /// [`Error::WorkspaceTooSmall`] for more pairs than it has room for, [`Error::Driver`] when the driver refuses,
    /// or queued work failed.
    pub fn download_route(&self, workspace: &mut Workspace, pairs: usize) -> Result<RouteContents> {
        use moe_lora_kernels::params::{Tile, count};
        workspace.check_pairs(pairs)?;
        let parts = workspace.parts();
        let counts = self.download_part::<u32>(workspace, parts.counts.address(), count::LEN)?;
        let tiles = counts[count::ALL as usize] as usize;
        workspace.check_tiles(tiles)?;
        let tiles = self.download_part::<Tile>(workspace, parts.tiles.address(), tiles)?;
        let tile = |&Tile { slot, expert, first, rows, rank, .. }: &Tile| RouteTile {
            slot,
            expert,
            first,
            rows,
            rank,
        };
        Ok(RouteContents {
            pairs: self.download_part(workspace, parts.pairs.address(), pairs)?,
            tiles: tiles.iter().map(tile).collect(),
            active_tiles: counts[count::ACTIVE as usize] as usize,
        })
    }

    fn download_part<T: Pod>(&self, workspace: &Workspace, address: u64, len: usize) -> Result<Vec<T>> {
        self.download_from(workspace.memory(), address, len)
    }

    /// Copies out what lies at `address` in `memory`.
    fn download_from<T: Pod>(&self, memory: &Arc<Memory>, address: u64, len: usize) -> Result<Vec<T>> {
        let mut elements = vec![T::zeroed(); len];
        let bytes = size_of_val(elements.as_slice());
        debug_assert!(address + bytes as u64 <= memory.address() + memory.bytes() as u64);
        self.copy("a copy to the host", memory, Access::Read, |api| {
            // SAFETY: the callers name addresses in the memory; `elements` holds `bytes`, and is not read before the
            // copy has ended.
            unsafe { api.cuMemcpyDtoHAsync_v2(elements.as_mut_ptr().cast(), address, bytes, self.raw.handle) }
        })?;
        Ok(elements)
    }

    /// What a call of this layout would launch; `None` when there is nothing to do.
    ///
    /// # Errors
    /// As for [`Plan::new`].
    pub fn plan(
        &self,
        projection: &Projection,
        layout: &Layout,
        stage: Stage,
        route: RouteSource,
    ) -> Result<Option<Plan>> {
        self.planner().plan(projection, layout, stage, route)
    }

    /// What this very call would launch; `None` when there is nothing to do.
    ///
    /// # Errors
    /// As for [`Backend::forward`], which launches it.
    pub fn plan_forward<T: Element>(
        &self,
        workspace: &Workspace,
        projection: &Projection,
        call: &Forward<'_, Cuda, T>,
    ) -> Result<Option<Plan>> {
        let layout = call.check(projection)?;
        let source = workspace.place(self).route_source(projection, layout.tokens, &call.routing)?;
        if layout.tokens == 0 {
            return Ok(None);
        }
        self.plan(projection, &layout, Stage::Forward, source)
    }

    fn planner(&self) -> Planner<'_> {
        let device = self.device();
        Planner { limits: device.limits(), options: self.options, tuning: device.tuning() }
    }

    /// Queues what a call turns out to launch, in the order of its memory's uses, and returns its route.
    fn call(
        &self,
        workspace: &Workspace,
        tensors: &impl Tensors,
        launched: impl FnOnce(&Planner<'_>, &Place<'_>) -> Result<Launched>,
    ) -> Result<Route> {
        let device = self.device();
        // A replay on another thread must not end the route that the call is found to have.
        let _queueing = device.queueing();
        let place = workspace.place(self);
        let launched = launched(&self.planner(), &place)?;
        workspace.memory().check_device("workspace", device)?;
        self.check_tensors(tensors)?;
        let _bound = device.bind()?;
        let raw = self.raw();
        raw.use_memory(workspace.memory(), Access::Write)?;
        if place.recording != NOT_RECORDED {
            raw.recorded().routes.push(Arc::clone(workspace.held()));
        }
        self.use_tensors(tensors)?;
        launched.queue(&place, |launches| self.launch_all(launches))
    }

    fn check_tensors(&self, tensors: &impl Tensors) -> Result<()> {
        tensors.each(&mut |name, memory, _| memory.check_device(name, self.device()))
    }

    fn use_tensors(&self, tensors: &impl Tensors) -> Result<()> {
        let raw = self.raw();
        tensors.each(&mut |_, memory, access| raw.use_memory(memory, access))
    }

    fn launch_all(&self, launches: &Launches) -> Result<()> {
        launches.iter().flatten().try_for_each(|(plan, parameters)| match parameters {
            Parameters::Route(parameters) => self.launch(plan, parameters),
            Parameters::Align(parameters) => self.launch(plan, parameters),
            Parameters::Adopt(parameters) => self.launch(plan, parameters),
            Parameters::Decode(parameters) => self.launch(plan, parameters),
            Parameters::Prefill(parameters) => self.launch(plan, parameters),
            Parameters::Shrink(parameters) => self.launch(plan, parameters),
            Parameters::Expand(parameters) => self.launch(plan, parameters),
        })
    }

    fn launch<P: Pod>(&self, plan: &Launch, parameters: &P) -> Result<()> {
        let device = self.device();
        // SAFETY: the parameters are of the entry's type, as `Planner` pairs them; their addresses were
        // checked, and live as long as the queued work: as `Memory` sees to, or `View::from_raw` asks.
        unsafe {
            launch(self.raw.handle, device.function(plan.entry), plan, parameters, device.overlaps_launches())
        }
    }
}

impl Backend for Stream {
    type Space = Cuda;
    type Buffer<T: Pod> = Buffer<T>;
    type Workspace = Workspace;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn variant(&self) -> String {
        self.options.name(self.name())
    }

    fn upload<T: Pod>(&self, elements: &[T]) -> Result<Buffer<T>> {
        self.check_not_recorded("a copy from the host")?;
        // SAFETY: written at once.
        let mut buffer = unsafe { Buffer::uninitialized(self.device(), elements.len())? };
        self.write(&mut buffer, 0, elements)?;
        Ok(buffer)
    }

    fn download<T: Pod>(&self, buffer: &Buffer<T>) -> Result<Vec<T>> {
        self.download_from(buffer.memory(), buffer.address(), buffer.len())
    }

    fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Workspace> {
        Workspace::new(self.device(), projections, max_tokens)
    }

    fn route(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        tokens: usize,
        routing: RoutingTensors<'_, Cuda>,
    ) -> Result<Route> {
        self.call(workspace, &routing, |planner, place| planner.route(place, projection, tokens, routing))
    }

    fn align(&self, call: Align<'_, Cuda>) -> Result<()> {
        let launches = self.planner().align(&call)?;
        self.check_tensors(&call)?;
        let _bound = self.device().bind()?;
        let _queueing = self.device().queueing();
        self.use_tensors(&call)?;
        self.launch_all(&launches)
    }

    fn forward<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Forward<'_, Cuda, T>,
    ) -> Result<Route> {
        self.call(workspace, &call, |planner, place| planner.forward(place, projection, &call))
    }

    fn shrink<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Shrink<'_, Cuda, T>,
    ) -> Result<Route> {
        self.call(workspace, &call, |planner, place| planner.shrink(place, projection, &call))
    }

    fn expand<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Expand<'_, Cuda, T>,
    ) -> Result<Route> {
        self.call(workspace, &call, |planner, place| planner.expand(place, projection, &call))
    }

    fn synchronize(&self) -> Result<()> {
        self.check_not_recorded("waiting")?;
        let (api, _bound) = (api()?, self.device().bind()?);
        let _relaxed = Relaxed::begin(api)?;
        // SAFETY: the stream is live.
        unsafe { api.cuStreamSynchronize(self.raw.handle) }
    }
}
