//! A stream that calls run on.

use crate::backend::Backend;
use crate::blocks::Align;
use crate::call::{Expand, Forward, Layout, RoutingTensors, Shrink};
use crate::check::check_room;
use crate::cuda::buffer::Buffer;
use crate::cuda::context::Relaxed;
use crate::cuda::device::Device;
use crate::cuda::driver::{Api, Handle, api};
use crate::cuda::launch::launch;
use crate::cuda::memory::{Access, Memory};
use crate::cuda::raw_stream::{Owner, RawStream};
use crate::cuda::recording::Recording;
use crate::cuda::tensors::Tensors;
use crate::cuda::workspace::Workspace;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::launch::{Launched, Launches, Parameters, Place, Planner};
use crate::plan::{Launch, Options, Plan, RouteSource, Stage};
use crate::projection::Projection;
use crate::route::{NOT_RECORDED, Route};
use crate::tensor::Cuda;
use bytemuck::Pod;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

/// A stream of a [`Device`] that calls run on, one after another: a [`Backend`].
///
/// A handle: clones are the same stream. It may be used by several threads; their calls run in the order in
/// which they are made.
#[derive(Clone)]
pub struct Stream {
    raw: Arc<RawStream>,
    recording: Arc<Recording>,
    options: Options,
}

impl Device {
    /// A new stream. It waits for no other, the default one among them.
    ///
    /// # Errors
    /// [`Error::Driver`] when no stream can be made.
    pub fn new_stream(&self) -> Result<Stream> {
        self.new_stream_with(Options::default())
    }

    /// A new stream, on which `options` are forced on calls.
    ///
    /// # Errors
    /// As for [`Device::new_stream`].
    pub fn new_stream_with(&self, options: Options) -> Result<Stream> {
        Stream::new(self, options)
    }

    /// A stream that another library made.
    ///
    /// # Safety
    /// - `stream` is a `CUstream` of this device's primary context, or null, its default stream.
    /// - It lives as long as this handle and its clones; and where a buffer, workspace or graph that was used
    ///   on it is then used on another stream, until that.
    /// - The work that is queued on it has ended when such a buffer, workspace or graph is dropped.
    /// - `CU_STREAM_PER_THREAD` (2) is another stream on each thread, and lives as long as that. What was
    ///   used on one waits for the device before it is used on another.
    pub unsafe fn foreign_stream(&self, stream: *mut c_void) -> Stream {
        Stream::foreign(self, stream, Owner::Caller)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?} of {:?})", self.raw.handle(), self.raw.device())
    }
}

impl Stream {
    fn new(device: &Device, options: Options) -> Result<Self> {
        let _bound = device.bind()?;
        Ok(Self::of(RawStream::create(device)?, options))
    }

    pub(super) fn foreign(device: &Device, handle: Handle, owner: Owner) -> Self {
        Self::of(RawStream::of(device, handle, owner), Options::default())
    }

    fn of(raw: RawStream, options: Options) -> Self {
        Stream { raw: Arc::new(raw), recording: Arc::default(), options }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        self.raw.device()
    }

    /// The `CUstream`. It lives as long as this handle.
    pub fn as_raw(&self) -> *mut c_void {
        self.raw.handle()
    }

    /// Whether this thread has another stream by this handle than the one it was made on.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.raw.is_elsewhere()
    }

    /// The stream as this thread has it.
    pub(super) fn raw(&self) -> Arc<RawStream> {
        self.raw.here()
    }

    /// The recording that calls here are part of. None on another thread than the stream is of.
    pub(super) fn recording(&self) -> Option<&Recording> {
        Some(&*self.recording).filter(|recording| !self.is_elsewhere() && recording.number() != NOT_RECORDED)
    }

    /// What calls of a recording of this stream use.
    pub(super) fn own_recording(&self) -> &Recording {
        &self.recording
    }

    /// What is queued next uses `memory`: after the uses of other streams or, in a recording, whenever that
    /// is replayed.
    pub(super) fn use_memory(&self, memory: &Arc<Memory>, access: Access) -> Result<()> {
        match self.recording() {
            None => memory.order(&self.raw(), access),
            Some(recording) => recording.add_memory(memory, access),
        }
    }

    /// Copies `elements` into a buffer from element `start` on, after the work queued before, and waits for
    /// that.
    ///
    /// # Errors
    /// [`Error::TooShort`] when they do not fit, [`Error::NotRecordable`] in a recording, [`Error::Driver`]
    /// when the driver refuses or queued work failed.
    pub fn write<T: Pod>(&self, buffer: &mut Buffer<T>, start: usize, elements: &[T]) -> Result<()> {
        check_room(buffer.len(), start, elements.len())?;
        let address = buffer.address() + (start * size_of::<T>()) as u64;
        self.copy("a copy from the host", buffer.memory(), Access::Write, |api| {
            // SAFETY: the elements fit, and are not let go before the copy has ended.
            unsafe {
                let (from, bytes) = (elements.as_ptr().cast(), size_of_val(elements));
                api.cuMemcpyHtoDAsync_v2(address, from, bytes, self.raw.handle())
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
            self.use_memory(memory, access)?;
            copy(api)?;
        }
        self.raw.synchronize(api)
    }

    fn check_not_recorded(&self, what: &'static str) -> Result<()> {
        match self.recording() {
            None => Ok(()),
            Some(_) => Err(Error::NotRecordable { what }),
        }
    }

    /// The number of the recording that calls here are part of, or [`NOT_RECORDED`].
    fn recording_number(&self) -> u64 {
        self.recording().map_or(NOT_RECORDED, Recording::number)
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
            _ => unsafe { api.cuMemsetD8Async(address, 0, bytes, self.raw.handle()) },
        })?;
        Ok(buffer)
    }

    /// Copies out what lies at `address` in `memory`.
    pub(super) fn download_from<T: Pod>(
        &self,
        memory: &Arc<Memory>,
        address: u64,
        len: usize,
    ) -> Result<Vec<T>> {
        let mut elements = vec![T::zeroed(); len];
        let bytes = size_of_val(elements.as_slice());
        debug_assert!(address + bytes as u64 <= memory.address() + memory.bytes() as u64);
        self.copy("a copy to the host", memory, Access::Read, |api| {
            // SAFETY: the callers name addresses in the memory; `elements` holds `bytes`, and is not read
            // before the copy has ended.
            unsafe {
                api.cuMemcpyDtoHAsync_v2(elements.as_mut_ptr().cast(), address, bytes, self.raw.handle())
            }
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
        let source = workspace.place(self.recording_number()).route_source(
            projection,
            layout.tokens,
            &call.routing,
        )?;
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
        let place = workspace.place(self.recording_number());
        let launched = launched(&self.planner(), &place)?;
        workspace.memory().check_device("workspace", device)?;
        self.check_tensors(tensors)?;
        let _bound = device.bind()?;
        self.use_memory(workspace.memory(), Access::Write)?;
        if let Some(recording) = self.recording() {
            recording.add_routes([workspace.held()]);
        }
        self.use_tensors(tensors)?;
        launched.queue(&place, |launches| self.launch_all(launches))
    }

    fn check_tensors(&self, tensors: &impl Tensors) -> Result<()> {
        tensors.each(&mut |name, memory, _| memory.check_device(name, self.device()))
    }

    fn use_tensors(&self, tensors: &impl Tensors) -> Result<()> {
        tensors.each(&mut |_, memory, access| self.use_memory(memory, access))
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
            launch(
                self.raw.handle(),
                device.function(plan.entry),
                plan,
                parameters,
                device.overlaps_launches(),
            )
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

    fn write<T: Pod>(&self, buffer: &mut Buffer<T>, start: usize, elements: &[T]) -> Result<()> {
        Stream::write(self, buffer, start, elements)
    }

    fn check_own<T: Pod>(&self, what: &'static str, buffer: &Buffer<T>) -> Result<()> {
        buffer.memory().check_device(what, self.device())
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
        self.raw.synchronize(api)
    }
}
