//! A stream that calls run on.

use crate::backend::{Backend, Buffer};
use crate::blocks::Align;
use crate::call::{Expand, Forward, Layout, RoutingTensors, Shrink};
use crate::cuda::gpu::Gpu;
use crate::cuda::launch::launch;
use crate::cuda::workspace::Workspace;
use crate::cuda::{failed, status};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::launch::{Launches, Parameters, Parts, Planner};
use crate::plan::{Launch, Options, Plan, RouteSource, Stage};
use crate::projection::Projection;
use crate::tensor::{Device, View, ViewMut};
use bytemuck::Pod;
use cust::stream::Stream;
use cust::sys::{self, CUstream};
use moe_lora_kernels::params::{Tile, count};
use std::marker::PhantomData;

/// A stream of a [`Gpu`] that calls run on, one after another. It stays on the thread that made it, where
/// the device's context is current.
pub struct Queue<'a> {
    gpu: &'a Gpu,
    stream: CUstream,
    options: Options,
    _owned: Option<Stream>,
    /// The context is current on one thread: neither `Send` nor `Sync`.
    _thread: PhantomData<*const ()>,
}

/// What `route` leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptRoute {
    /// Pairs, segment by segment; inactive ones last.
    pub pairs: Vec<u32>,
    /// Segments cut into tiles.
    pub tiles: Vec<Tile>,
    /// Tiles of active pairs: the first ones.
    pub active_tiles: usize,
}

/// Memory on the device, freed when dropped.
pub struct DeviceBuffer<T> {
    memory: cust::memory::DeviceBuffer<u8>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// Room for `len` elements, unwritten.
    ///
    /// # Safety
    /// The elements must be written before they are read.
    ///
    /// # Errors
    /// [`crate::Error::Driver`] when there is no room.
    pub unsafe fn uninitialized(len: usize) -> Result<Self> {
        // SAFETY: as the caller promises. An empty buffer has an address too.
        let memory = unsafe { cust::memory::DeviceBuffer::uninitialized((len * size_of::<T>()).max(1)) };
        Ok(DeviceBuffer { memory: memory.map_err(failed("cuMemAlloc"))?, len, element: PhantomData })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn address(&self) -> u64 {
        self.memory.as_device_ptr().as_raw()
    }
}

impl<T: Pod> Buffer<T> for DeviceBuffer<T> {
    type Space = Device;

    fn view(&self) -> View<'_, Device, T> {
        // SAFETY: the memory is this buffer's for as long as it is borrowed.
        unsafe { View::from_raw(self.address(), self.len) }
    }

    fn view_mut(&mut self) -> ViewMut<'_, Device, T> {
        // SAFETY: as above, and nobody else may use it.
        unsafe { ViewMut::from_raw(self.address(), self.len) }
    }
}

impl<'a> Queue<'a> {
    pub(super) fn owned(gpu: &'a Gpu, stream: Stream, options: Options) -> Self {
        Queue { gpu, stream: stream.as_inner(), options, _owned: Some(stream), _thread: PhantomData }
    }

    pub(super) fn borrowed(gpu: &'a Gpu, stream: CUstream, options: Options) -> Self {
        Queue { gpu, stream, options, _owned: None, _thread: PhantomData }
    }

    /// The device.
    pub fn gpu(&self) -> &'a Gpu {
        self.gpu
    }

    /// The stream.
    pub fn stream(&self) -> CUstream {
        self.stream
    }

    /// Copies `elements` into a buffer from element `start` on, after the work queued before.
    ///
    /// # Errors
    /// [`Error::TooShort`] when they do not fit, [`Error::Driver`] when the driver refuses.
    pub fn write<T: Pod>(&self, buffer: &mut DeviceBuffer<T>, start: usize, elements: &[T]) -> Result<()> {
        let end = start.saturating_add(elements.len());
        if end > buffer.len {
            let shape = format!("[{start}..{end}]");
            return Err(Error::TooShort { tensor: "buffer", shape, expected: end, got: buffer.len });
        }
        let address = buffer.address() + (start * size_of::<T>()) as u64;
        // SAFETY: the elements fit, and are not let go before the copy has ended.
        status("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(address, elements.as_ptr().cast(), size_of_val(elements), self.stream)
        })?;
        self.synchronize()
    }

    /// Copies out the route of `pairs` pairs that a workspace keeps, for tests and measurements: waits for queued work.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver refuses, or queued work failed.
    pub fn download_route(&self, workspace: &mut Workspace, pairs: usize) -> Result<KeptRoute> {
        let (scratch, base) = workspace.scratch();
        let Parts { pairs: list, tiles, counts, .. } = scratch.parts(base);
        let counts = self.download_at::<u32>(counts.address(), count::LEN)?;
        Ok(KeptRoute {
            pairs: self.download_at(list.address(), pairs)?,
            tiles: self.download_at(tiles.address(), counts[count::ALL as usize] as usize)?,
            active_tiles: counts[count::ACTIVE as usize] as usize,
        })
    }

    fn download_at<T: Pod>(&self, address: u64, len: usize) -> Result<Vec<T>> {
        let mut elements = vec![T::zeroed(); len];
        let bytes = size_of_val(elements.as_slice());
        // SAFETY: the address is of memory of this device that lives; `elements` holds `bytes`, and is not read
        // before the copy has ended.
        status("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(elements.as_mut_ptr().cast(), address, bytes, self.stream)
        })?;
        self.synchronize()?;
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

    fn planner(&self) -> Planner<'a> {
        Planner { limits: self.gpu.limits(), options: self.options, tuning: self.gpu.tuning() }
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
        // SAFETY: the parameters are of the entry's type, as `Planner` pairs them; their addresses were
        // checked, and live as long as the queued work, as `View::from_raw` asks.
        unsafe {
            launch(self.stream, self.gpu.function(plan.entry), plan, parameters, self.gpu.overlaps_launches())
        }
    }
}

impl Backend for Queue<'_> {
    type Space = Device;
    type Buffer<T: Pod> = DeviceBuffer<T>;
    type Workspace = Workspace;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn variant(&self) -> String {
        self.options.name(self.name())
    }

    fn upload<T: Pod>(&self, elements: &[T]) -> Result<DeviceBuffer<T>> {
        // SAFETY: written at once.
        let mut buffer = unsafe { DeviceBuffer::uninitialized(elements.len())? };
        self.write(&mut buffer, 0, elements)?;
        Ok(buffer)
    }

    fn download<T: Pod>(&self, buffer: &DeviceBuffer<T>) -> Result<Vec<T>> {
        self.download_at(buffer.address(), buffer.len)
    }

    fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Workspace> {
        Workspace::new(projections, max_tokens)
    }

    fn route(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        tokens: usize,
        routing: RoutingTensors<'_, Device>,
    ) -> Result<()> {
        self.launch_all(&self.planner().route(workspace.scratch(), projection, tokens, routing)?)
    }

    fn align(&self, call: Align<'_, Device>) -> Result<()> {
        self.launch_all(&self.planner().align(&call)?)
    }

    fn forward<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Forward<'_, Device, T>,
    ) -> Result<()> {
        self.launch_all(&self.planner().forward(workspace.scratch(), projection, &call)?)
    }

    fn shrink<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Shrink<'_, Device, T>,
    ) -> Result<()> {
        self.launch_all(&self.planner().shrink(workspace.scratch(), projection, &call)?)
    }

    fn expand<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Expand<'_, Device, T>,
    ) -> Result<()> {
        self.launch_all(&self.planner().expand(workspace.scratch(), projection, &call)?)
    }

    fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is live.
        status("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}
