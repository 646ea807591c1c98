//! The emulated back end: the GPU's kernels on the CPU, planned and launched as on an H100, with every access
//! checked ([`moe_lora_kernels::emulate`]).
//!
//! It is slow, and for tests. A race or wrong address is [`Error::KernelFault`], with kernel, thread, line.

mod buffers;

use crate::backend::{Backend, Buffer};
use crate::blocks::Align;
use crate::call::{Expand, Forward, Layout, Routing, RoutingTensors, Shrink};
use crate::check::check_room;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::launch::{Launched, Launches, Parameters, Place, Planner};
use crate::plan::{DeviceLimits, Launch, Options, Plan, RouteSource, Scratch, Stage};
use crate::projection::Projection;
use crate::route::{HeldRoute, NOT_RECORDED, Route};
use crate::tensor::{self as space, View, ViewMut};
use buffers::{
    Which, buffer, counts, flags, h_buffer, ids, made_route, routed, routing_tensors, split_k_workspace,
    tensor, weights,
};
use bytemuck::Pod;
use moe_lora_kernels::emulate::{self, Memory};
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::products;
use moe_lora_kernels::route::EXCHANGE_HEAD;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::rc::Rc;

/// What the workspace holds before a kernel writes it: no id, and a NaN as bf16, f16 and f32.
const POISON: u8 = 0x7f;

/// An emulated device. Every call is done when it returns.
pub struct Emulated {
    memory: Rc<RefCell<Memory>>,
    options: Options,
    seed: Cell<u64>,
    launches: RefCell<BTreeMap<&'static str, u64>>,
}

/// Memory of an emulated device, freed when dropped.
pub struct EmulatedBuffer<T> {
    memory: Rc<RefCell<Memory>>,
    address: u64,
    len: usize,
    element: PhantomData<T>,
}

/// Scratch memory of calls: what a launch is to write is poison before, and reading it a fault.
pub struct Workspace {
    memory: EmulatedBuffer<u8>,
    scratch: Scratch,
    held: HeldRoute,
}

/// The limits of the emulated device.
const LIMITS: DeviceLimits =
    DeviceLimits { multiprocessors: 8, decode_clusters: [3, 2, 1, 1], ..DeviceLimits::H100 };

impl Emulated {
    /// A device like an H100 with few multiprocessors and clusters, as a test has time for few threads.
    /// `seed` decides the order of threads and blocks; each launch has another.
    pub fn new(options: Options, seed: u64) -> Self {
        Emulated { memory: Rc::default(), options, seed: Cell::new(seed), launches: RefCell::default() }
    }

    /// How often each entry point was launched so far, by name.
    pub fn launches(&self) -> BTreeMap<&'static str, u64> {
        self.launches.borrow().clone()
    }

    fn allocate<T: Pod>(&self, elements: &[T]) -> EmulatedBuffer<T> {
        let mut memory = self.memory.borrow_mut();
        // As `cuMemAlloc` and a copy that is waited for.
        memory.synchronize();
        let address = memory.allocate(bytemuck::cast_slice(elements));
        EmulatedBuffer { memory: self.memory.clone(), address, len: elements.len(), element: PhantomData }
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

    fn planner(&self) -> Planner<'static> {
        Planner { limits: LIMITS, options: self.options, tuning: None }
    }

    /// Refuses a workspace of another emulated device.
    fn check_workspace(&self, workspace: &Workspace) -> Result<()> {
        self.check_memory("workspace", &workspace.memory.memory)
    }

    fn check_memory(&self, what: &'static str, memory: &Rc<RefCell<Memory>>) -> Result<()> {
        if Rc::ptr_eq(memory, &self.memory) {
            return Ok(());
        }
        let (expected, got) = ("the emulated device of the call".to_owned(), "another".to_owned());
        Err(Error::OtherDevice { what, expected, got })
    }

    /// Runs a call's launches, and returns its route.
    fn queue(
        &self,
        workspace: &Workspace,
        launched: &Launched,
        tensors: &[emulate::Buffer],
    ) -> Result<Route> {
        let listed = workspace.scratch.listed();
        launched.queue(&workspace.place(), |launches| self.launch_all(launches, tensors, listed))
    }

    /// Runs a call's launches, which may write the last of `tensors`. There is room for `listed` pairs.
    fn launch_all(&self, launches: &Launches, tensors: &[emulate::Buffer], listed: usize) -> Result<()> {
        launches.iter().flatten().try_for_each(|(launch, parameters)| match parameters {
            Parameters::Route(p) => {
                let buckets = buffer("buckets", p.buckets, p.pair_count.into());
                let fresh: Vec<_> = made_route(p).into_iter().chain([buckets]).collect();
                let words = u64::from(EXCHANGE_HEAD + 2 * p.exchange_room);
                self.launch(launch, p, tensors, &fresh, &[buffer("exchange", p.exchange, words)])
            }
            Parameters::Decode(p) => {
                let (out, tensors) = tensors.split_last().expect("a call that expands has an out");
                let (read, fresh) = if p.finds == 0 {
                    (
                        routed(
                            tensors,
                            (p.route.pairs, listed),
                            p.route.tiles,
                            counts(p.route.counts),
                            p.route.pair_count,
                        ),
                        vec![],
                    )
                } else {
                    (tensors.to_vec(), made_route(&p.route).to_vec())
                };
                self.launch(launch, p, &read, &fresh, std::slice::from_ref(out))
            }
            Parameters::Prefill(p) => {
                let counts = buffer("a count", p.tile_count, 1);
                let routed = |tensors| routed(tensors, (p.pairs, listed), p.tiles, counts, p.pair_count);
                let h = h_buffer(p.h, Global::NULL, [1, p.weights.slices, p.pair_count, p.weights.max_rank]);
                let scheduler = buffer("scheduler", p.scheduler, 1);
                if p.products == products::SHRINK {
                    return self.launch(launch, p, &routed(tensors), &[], &[h, scheduler]);
                }
                let (out, tensors) = tensors.split_last().expect("a call that expands has an out");
                let mut read = routed(tensors);
                if p.products == products::EXPAND {
                    read.push(h);
                }
                let mut written = vec![out.clone(), scheduler];
                if p.split_k.count > 0 {
                    written.extend(split_k_workspace(p));
                }
                self.launch(launch, p, &read, &[], &written)
            }
            Parameters::Align(p) => {
                let row = |elements: u32| u64::from(p.slots) * u64::from(elements);
                let written = [
                    buffer("sorted_token_ids", p.sorted, row(p.max_padded)),
                    buffer("expert_ids", p.block_experts, row(p.max_blocks)),
                    buffer("num_tokens_post_padded", p.padded_counts, row(1)),
                ];
                self.launch(launch, p, tensors, &[], &written)
            }
            Parameters::Adopt(p) => {
                let tiles = u64::from(p.most_tiles);
                let written = [
                    buffer("pairs", p.pairs, tiles * u64::from(p.block_size)),
                    buffer("tiles", p.tiles, tiles),
                    counts(p.counts),
                ];
                self.launch(launch, p, tensors, &written, &[])
            }
            Parameters::Shrink(p) => {
                let h =
                    h_buffer(p.h, p.partial, [p.splits, p.weights.slices, p.pair_count, p.weights.max_rank]);
                let read = routed(tensors, (p.pairs, listed), p.tiles, counts(p.counts), p.pair_count);
                let (fresh, written) =
                    if p.write_all == 0 { (&[h][..], &[][..]) } else { (&[][..], &[h][..]) };
                self.launch(launch, p, &read, fresh, written)
            }
            Parameters::Expand(p) => {
                let (out, tensors) = tensors.split_last().expect("a call that expands has an out");
                let mut read = routed(tensors, (p.pairs, listed), p.tiles, counts(p.counts), p.pair_count);
                read.push(h_buffer(
                    p.h,
                    p.partial,
                    [p.splits, p.weights.slices, p.pair_count, p.weights.max_rank],
                ));
                self.launch(launch, p, &read, &[], std::slice::from_ref(out))
            }
        })
    }

    /// Runs one launch, which may read `read`, and write `written` and `fresh`, which is poisoned first.
    fn launch<P: Pod>(
        &self,
        launch: &Launch,
        parameters: &P,
        read: &[emulate::Buffer],
        fresh: &[emulate::Buffer],
        written: &[emulate::Buffer],
    ) -> Result<()> {
        let memory = &mut *self.memory.borrow_mut();
        fresh.iter().for_each(|buffer| memory.forget(buffer.address, buffer.bytes, POISON));
        let written = fresh.iter().chain(written);
        let written = written.map(|buffer| emulate::Buffer { writable: true, ..buffer.clone() });
        let mut buffers: Vec<_> = written.collect();
        buffers.extend_from_slice(read);
        self.seed.set(self.seed.get().wrapping_add(1));
        let Launch { entry, blocks, cluster, cooperative, shared_bytes } = *launch;
        let grid = emulate::Grid { blocks, cluster, cooperative };
        *self.launches.borrow_mut().entry(entry.name).or_default() += 1;
        emulate::launch(entry, grid, shared_bytes, parameters, memory, &buffers, self.seed.get())
            .map_err(|report| Error::KernelFault { report: report.to_string() })
    }
}

impl<T> Drop for EmulatedBuffer<T> {
    fn drop(&mut self) {
        self.memory.borrow_mut().free(self.address);
    }
}

impl<T: Pod> Buffer<T> for EmulatedBuffer<T> {
    type Space = space::Emulated;

    fn view(&self) -> View<'_, space::Emulated, T> {
        // SAFETY: the memory is this buffer's for as long as it is borrowed; no access leaves it unchecked.
        unsafe { View::from_raw(self.address, self.len) }
    }

    fn view_mut(&mut self) -> ViewMut<'_, space::Emulated, T> {
        // SAFETY: as above, and nobody else may use it.
        unsafe { ViewMut::from_raw(self.address, self.len) }
    }
}

impl Workspace {
    fn place(&self) -> Place<'_> {
        let Workspace { memory, scratch, held } = self;
        Place { scratch, base: memory.address, held, recording: NOT_RECORDED }
    }
}

impl Backend for Emulated {
    type Space = space::Emulated;
    type Buffer<T: Pod> = EmulatedBuffer<T>;
    type Workspace = Workspace;

    fn name(&self) -> &'static str {
        "emulated"
    }

    fn variant(&self) -> String {
        self.options.name(self.name())
    }

    fn upload<T: Pod>(&self, elements: &[T]) -> Result<EmulatedBuffer<T>> {
        Ok(self.allocate(elements))
    }

    fn write<T: Pod>(&self, buffer: &mut EmulatedBuffer<T>, start: usize, elements: &[T]) -> Result<()> {
        self.check_own("buffer", buffer)?;
        check_room(buffer.len, start, elements.len())?;
        self.synchronize()?;
        let address = buffer.address + (start * size_of::<T>()) as u64;
        let bytes = bytemuck::cast_slice(elements);
        self.memory.borrow_mut().bytes_mut(address, bytes.len() as u64).copy_from_slice(bytes);
        Ok(())
    }

    fn check_own<T: Pod>(&self, what: &'static str, buffer: &EmulatedBuffer<T>) -> Result<()> {
        self.check_memory(what, &buffer.memory)
    }

    fn download<T: Pod>(&self, buffer: &EmulatedBuffer<T>) -> Result<Vec<T>> {
        self.check_memory("buffer", &buffer.memory)?;
        self.synchronize()?;
        let memory = self.memory.borrow();
        let bytes = memory.bytes(buffer.address, (buffer.len * size_of::<T>()) as u64);
        Ok(bytemuck::pod_collect_to_vec(bytes))
    }

    fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Workspace> {
        let scratch = Scratch::new(projections, max_tokens)?;
        let memory = self.allocate(&vec![POISON; scratch.bytes()]);
        let (all, zeros) = (scratch.bytes() as u64, scratch.zero_bytes() as u64);
        let memories = &mut *self.memory.borrow_mut();
        memories.bytes_mut(memory.address, zeros).fill(0);
        memories.forget(memory.address + zeros, all - zeros, POISON);
        Ok(Workspace { memory, scratch, held: HeldRoute::default() })
    }

    fn route(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        tokens: usize,
        routing: RoutingTensors<'_, space::Emulated>,
    ) -> Result<Route> {
        self.check_workspace(workspace)?;
        let launched = self.planner().route(&workspace.place(), projection, tokens, routing)?;
        self.queue(workspace, &launched, &routing_tensors(&Routing::Tokens(routing)))
    }

    fn align(&self, call: Align<'_, space::Emulated>) -> Result<()> {
        let mut tensors = vec![tensor("token_lora", call.token_lora), tensor("lora_ids", call.lora_ids)];
        tensors.extend(ids(&call.topk_ids));
        tensors.extend(call.expert_map.map(|map| tensor("expert_map", map)));
        tensors.extend(flags(call.adapter_enabled));
        self.launch_all(&self.planner().align(&call)?, &tensors, 0)
    }

    fn forward<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Forward<'_, space::Emulated, T>,
    ) -> Result<Route> {
        self.check_workspace(workspace)?;
        let launched = self.planner().forward(&workspace.place(), projection, &call)?;
        let mut tensors = routing_tensors(&call.routing);
        tensors.extend(buffers::x(&call.x));
        tensors.extend(weights(&self.memory.borrow(), projection, Which::A, &call.weights.a()));
        tensors.extend(weights(&self.memory.borrow(), projection, Which::B, &call.weights.b()));
        tensors.extend(call.topk_weights.map(|weights| tensor("topk_weights", weights)));
        tensors.extend(buffers::out(&call.out));
        self.queue(workspace, &launched, &tensors)
    }

    fn shrink<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Shrink<'_, space::Emulated, T>,
    ) -> Result<Route> {
        self.check_workspace(workspace)?;
        let launched = self.planner().shrink(&workspace.place(), projection, &call)?;
        let mut tensors = routing_tensors(&call.routing);
        tensors.extend(buffers::x(&call.x));
        tensors.extend(weights(&self.memory.borrow(), projection, Which::A, &call.a));
        self.queue(workspace, &launched, &tensors)
    }

    fn expand<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Expand<'_, space::Emulated, T>,
    ) -> Result<Route> {
        self.check_workspace(workspace)?;
        let launched = self.planner().expand(&workspace.place(), projection, &call)?;
        let mut tensors = routing_tensors(&call.routing);
        tensors.extend(weights(&self.memory.borrow(), projection, Which::B, &call.b));
        tensors.extend(call.topk_weights.map(|weights| tensor("topk_weights", weights)));
        tensors.extend(buffers::out(&call.out));
        self.queue(workspace, &launched, &tensors)
    }

    fn synchronize(&self) -> Result<()> {
        self.memory.borrow_mut().synchronize();
        Ok(())
    }
}
