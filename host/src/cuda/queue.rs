//! A stream that calls run on.

use crate::backend::{Backend, Buffer};
use crate::call::{Enabled, Expand, Forward, Layout, Route, RoutingTensors, Shrink};
use crate::cuda::gpu::Gpu;
use crate::cuda::launch::launch;
use crate::cuda::workspace::{Parts, Workspace};
use crate::cuda::{failed, status};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::plan::{Launch, Options, Plan, RouteSource, Stage};
use crate::projection::{Projection, XRows};
use crate::tensor::{Device, View, ViewMut};
use bytemuck::Pod;
use cust::stream::Stream;
use cust::sys::{self, CUstream};
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{Divider, ExpandParams, MAX_SLICES, RouteParams, ShrinkParams, enabled};
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
        Plan::new(projection, layout, stage, route, &self.gpu.limits(), &self.options)
    }

    /// Plans a checked call and makes its workspace ready; `None` when there is nothing to do.
    fn prepare<'c>(
        &self,
        workspace: &mut Workspace,
        projection: &'c Projection,
        layout: Layout,
        stage: Stage,
        route: &Route<'_, Device>,
    ) -> Result<Option<Prepared<'c>>> {
        if layout.tokens == 0 {
            return Ok(None);
        }
        let source = workspace.route_source(projection, layout.tokens, route)?;
        let Some(plan) = self.plan(projection, &layout, stage, source)? else { return Ok(None) };
        let parts = workspace.prepare(projection, layout.tokens, &plan)?;
        let pair_count = projection.pairs(layout.tokens)? as u32;
        Ok(Some(Prepared { projection, layout, plan, parts, pair_count }))
    }

    fn launch<P: Pod>(&self, plan: &Launch, parameters: &P) -> Result<()> {
        // SAFETY: the parameters are of the entry's type, since each kind of launch has one caller below;
        // their addresses were checked, and live as long as the queued work, as `View::from_raw` asks.
        unsafe {
            launch(self.stream, self.gpu.function(plan.entry), plan, parameters, self.gpu.overlaps_launches())
        }
    }

    fn launch_route(&self, call: &Prepared<'_>, route: &Route<'_, Device>) -> Result<()> {
        let Prepared { projection, plan, parts, pair_count, .. } = call;
        let (Some(launch), Route::From(routing)) = (&plan.route, route) else { return Ok(()) };
        let sizes = projection.sizes();
        let (adapter_enabled, enabled_kind) = match &routing.adapter_enabled {
            Enabled::All => (0, enabled::ALL),
            Enabled::U8(view) => (view.address(), enabled::U8),
            Enabled::I32(view) => (view.address(), enabled::I32),
        };
        let address = |view: &Option<View<'_, Device, i32>>| view.map_or(0, |view| view.address());
        self.launch(
            launch,
            &RouteParams {
                topk_ids: Global::new(routing.topk_ids.address()),
                token_lora: Global::new(routing.token_lora.address()),
                adapter_enabled: Global::new(adapter_enabled),
                ranks: Global::new(address(&routing.ranks)),
                expert_map: Global::new(address(&routing.expert_map)),
                pairs: parts.pairs,
                tiles: parts.tiles,
                counts: parts.counts,
                buckets: parts.buckets,
                pair_count: *pair_count,
                top_k: Divider::new(sizes.top_k as u32),
                slots: sizes.slots as u32,
                experts: sizes.experts as u32,
                global_experts: routing.expert_map.map_or(sizes.experts, |map| map.len()) as u32,
                max_rank: sizes.max_rank as u32,
                tile_rows: plan.tile_rows,
                enabled_kind,
                window: plan.route_window,
            },
        )
    }

    fn launch_shrink<T: Element>(
        &self,
        call: &Prepared<'_>,
        x: u64,
        a: &[View<'_, Device, T>],
        h: H,
    ) -> Result<()> {
        let Prepared { projection, layout, plan, parts, pair_count } = call;
        let Some(shrink) = &plan.shrink else { return Ok(()) };
        let sizes = projection.sizes();
        let x_row = match sizes.x_rows {
            XRows::Token => sizes.top_k as u32,
            XRows::Pair => 1,
        };
        self.launch(
            &shrink.launch,
            &ShrinkParams {
                x: Global::new(x),
                a: addresses(a),
                h: Global::new(h.address(parts)),
                partial: Global::new(parts.scratch),
                pairs: parts.pairs,
                tiles: parts.tiles,
                counts: parts.counts,
                x_stride: layout.x_stride as u64,
                x_row: Divider::new(x_row),
                pair_count: *pair_count,
                in_dim: sizes.in_dim as u32,
                max_rank: sizes.max_rank as u32,
                slices: sizes.slices as u32,
                a_experts: projection.a_experts() as u32,
                column_blocks: shrink.column_blocks,
                column_room: shrink.column_room,
                splits: shrink.splits,
                steps_per_split: shrink.steps_per_split,
                write_all: matches!(h, H::Caller(_)).into(),
                tile_parts: plan.tile_parts(),
                reserved: 0,
            },
        )
    }

    fn launch_expand<T: Element>(&self, call: &Prepared<'_>, tail: &ExpandTail<'_, T>, h: H) -> Result<()> {
        let Prepared { projection, layout, plan, parts, pair_count } = call;
        let Some(expand) = &plan.expand else { return Ok(()) };
        let sizes = projection.sizes();
        self.launch(
            &expand.launch,
            &ExpandParams {
                h: Global::new(h.address(parts)),
                partial: Global::new(parts.scratch),
                b: addresses(tail.b),
                out: Global::<u16>::new(tail.out).at(layout.offset as u64),
                topk_weights: Global::new(tail.topk_weights.map_or(0, |weights| weights.address())),
                pairs: parts.pairs,
                tiles: parts.tiles,
                counts: parts.counts,
                out_stride: layout.out_stride as u64,
                pair_count: *pair_count,
                out_dim: sizes.out_dim as u32,
                max_rank: sizes.max_rank as u32,
                slices: sizes.slices as u32,
                b_experts: projection.b_experts() as u32,
                blocks_per_slice: expand.blocks_per_slice,
                columns_per_block: expand.columns_per_block,
                splits: plan.splits(),
                accumulate: tail.accumulate.into(),
                route_is_old: plan.shrink.is_some().into(),
                tile_parts: plan.tile_parts(),
                reserved: 0,
            },
        )
    }
}

/// A call that was checked and planned, and whose workspace is ready.
struct Prepared<'c> {
    projection: &'c Projection,
    layout: Layout,
    plan: Plan,
    parts: Parts,
    /// P.
    pair_count: u32,
}

/// Which h a launch uses.
#[derive(Clone, Copy)]
enum H {
    /// The workspace's.
    Scratch,
    /// The caller's, whole, at this address.
    Caller(u64),
}

impl H {
    fn address(self, parts: &Parts) -> u64 {
        match self {
            H::Scratch => parts.scratch,
            H::Caller(address) => address,
        }
    }
}

/// What `forward` and `expand` have in common.
struct ExpandTail<'a, T> {
    b: &'a [View<'a, Device, T>],
    topk_weights: Option<View<'a, Device, f32>>,
    out: u64,
    accumulate: bool,
}

fn addresses<T: Pod>(slices: &[View<'_, Device, T>]) -> [Global<u16>; MAX_SLICES] {
    let mut addresses = [Global::NULL; MAX_SLICES];
    for (address, slice) in addresses.iter_mut().zip(slices) {
        *address = Global::new(slice.address());
    }
    addresses
}

impl Backend for Queue<'_> {
    type Space = Device;
    type Buffer<T: Pod> = DeviceBuffer<T>;
    type Workspace = Workspace;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn variant(&self) -> String {
        let Options { index, tile } = self.options;
        let index = index.map_or(String::new(), |index| format!(" {index:?}"));
        let tile = tile.map_or(String::new(), |tile| format!(" {tile:?}"));
        format!("cuda{index}{tile}").to_lowercase()
    }

    fn upload<T: Pod>(&self, elements: &[T]) -> Result<DeviceBuffer<T>> {
        // SAFETY: written at once.
        let mut buffer = unsafe { DeviceBuffer::uninitialized(elements.len())? };
        self.write(&mut buffer, 0, elements)?;
        Ok(buffer)
    }

    fn download<T: Pod>(&self, buffer: &DeviceBuffer<T>) -> Result<Vec<T>> {
        let mut elements = vec![T::zeroed(); buffer.len];
        let bytes = size_of_val(elements.as_slice());
        // SAFETY: both sides hold `bytes`, and `elements` is not read before the copy has ended.
        status("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(elements.as_mut_ptr().cast(), buffer.address(), bytes, self.stream)
        })?;
        self.synchronize()?;
        Ok(elements)
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
        routing.check(projection, tokens)?;
        // The tile of a fast call: any call can use its route, in parts if need be.
        let layout = Layout { tokens, x_stride: 0, out_stride: 0, offset: 0, aligned: true };
        let route = Route::From(routing);
        let Some(prepared) = self.prepare(workspace, projection, layout, Stage::Route, &route)? else {
            return Ok(());
        };
        self.launch_route(&prepared, &route)
    }

    fn forward<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Forward<'_, Device, T>,
    ) -> Result<()> {
        let layout = call.check(projection)?;
        let Some(prepared) = self.prepare(workspace, projection, layout, Stage::Forward, &call.route)? else {
            return Ok(());
        };
        let Forward { b, topk_weights, accumulate, .. } = call;
        let tail = ExpandTail { b, topk_weights, out: call.out.data.address(), accumulate };
        self.launch_route(&prepared, &call.route)?;
        self.launch_shrink(&prepared, call.x.data.address(), call.a, H::Scratch)?;
        self.launch_expand(&prepared, &tail, H::Scratch)
    }

    fn shrink<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Shrink<'_, Device, T>,
    ) -> Result<()> {
        let layout = call.check(projection)?;
        let Some(prepared) = self.prepare(workspace, projection, layout, Stage::Shrink, &call.route)? else {
            return Ok(());
        };
        self.launch_route(&prepared, &call.route)?;
        let h = H::Caller(call.h.address());
        self.launch_shrink(&prepared, call.x.data.address(), call.a, h)
    }

    fn expand<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Expand<'_, Device, T>,
    ) -> Result<()> {
        let layout = call.check(projection)?;
        let Some(prepared) = self.prepare(workspace, projection, layout, Stage::Expand, &call.route)? else {
            return Ok(());
        };
        let Expand { b, topk_weights, accumulate, .. } = call;
        let tail = ExpandTail { b, topk_weights, out: call.out.data.address(), accumulate };
        self.launch_route(&prepared, &call.route)?;
        self.launch_expand(&prepared, &tail, H::Caller(call.h.address()))
    }

    fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is live.
        status("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }
}
