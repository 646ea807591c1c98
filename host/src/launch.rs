//! From a checked call to launches: its plan, the parts of the workspace, and the parameter block of each
//! kernel. Whatever runs the kernels, a GPU or the emulated machine, runs what comes from here.

mod scratch;

pub(crate) use scratch::{Parts, Scratch};

use crate::blocks::{Align, BlockShape, SortedTensors};
use crate::call::{Enabled, Expand, Forward, Layout, Routing, RoutingTensors, Shrink};
use crate::dtype::Element;
use crate::error::Result;
use crate::plan::{self, DeviceLimits, Launch, Options, PassShares, Plan, PrefillPlan, RouteSource, Stage};
use crate::projection::{Projection, XRows};
use crate::route::{HeldRoute, Route, RouteSizes};
use crate::tensor::{Space, View};
use crate::tuning::Tuning;
use bytemuck::Pod;
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{
    AdoptParams, AlignParams, DecodeParams, Divider, ExpandParams, MAX_SLICES, PrefillParams, RouteParams,
    ShrinkParams, Split, count, enabled, products,
};

/// The parameter block of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Parameters {
    Route(RouteParams),
    Align(AlignParams),
    Adopt(AdoptParams),
    Decode(DecodeParams),
    Prefill(PrefillParams),
    Shrink(ShrinkParams),
    Expand(ExpandParams),
}

/// Launches, in order.
pub(crate) type Launches = [Option<(Launch, Parameters)>; 3];

/// What a call launches, and the route that it has afterwards.
pub(crate) struct Launched {
    launches: Launches,
    route: AfterCall,
}

/// The route of a call.
enum AfterCall {
    /// The call finds it, in tiles of so many pairs at most.
    Found(RouteSizes, u32),
    /// It was given.
    Given(Route),
}

/// Where a call runs: its workspace, and the recording of a graph that it is part of.
#[derive(Clone, Copy)]
pub(crate) struct Place<'w> {
    pub scratch: &'w Scratch,
    /// Address of the workspace's memory.
    pub base: u64,
    pub held: &'w HeldRoute,
    /// The number of the recording, or [`NOT_RECORDED`](crate::route::NOT_RECORDED).
    pub recording: u64,
}

impl Launched {
    /// Has `run` queue the launches. Unless all are queued, the workspace holds no route afterwards.
    pub fn queue(&self, place: &Place<'_>, run: impl FnOnce(&Launches) -> Result<()>) -> Result<Route> {
        if matches!(self.route, AfterCall::Found(..)) {
            place.held.forget();
        }
        run(&self.launches).inspect_err(|_| place.held.forget())?;
        Ok(match self.route {
            AfterCall::Found(sizes, tile_rows) => place.held.hold(sizes, tile_rows, place.recording),
            AfterCall::Given(route) => route,
        })
    }
}

/// What decides how calls are planned.
pub(crate) struct Planner<'t> {
    pub limits: DeviceLimits,
    pub options: Options,
    /// Where nothing is forced, what was measured comes before the planner's own rules.
    pub tuning: Option<&'t Tuning>,
}

impl Planner<'_> {
    /// What a call of this layout would launch; `None` when there is nothing to do.
    pub fn plan(
        &self,
        projection: &Projection,
        layout: &Layout,
        stage: Stage,
        route: RouteSource,
    ) -> Result<Option<Plan>> {
        let tuning = self.tuning.filter(|_| self.options == Options::default());
        let tuned = tuning.and_then(|tuning| tuning.way(projection, layout.tokens, stage, route));
        Plan::new(projection, layout, stage, route, &self.limits, &tuned.unwrap_or(self.options))
    }

    /// Plans a checked call, and has `launches` make its launches; none when there is nothing to do.
    fn prepare<S: Space>(
        &self,
        place: &Place<'_>,
        projection: &Projection,
        layout: Layout,
        stage: Stage,
        routing: &Routing<'_, S>,
        launches: impl FnOnce(&Prepared<'_>) -> Launches,
    ) -> Result<Launched> {
        let sizes = RouteSizes::new(projection, layout.tokens);
        let after = |tile_rows| match *routing {
            Routing::On(route) => AfterCall::Given(route),
            _ => AfterCall::Found(sizes, tile_rows),
        };
        let source = place.route_source(projection, layout.tokens, routing)?;
        if layout.tokens == 0 {
            return Ok(Launched { launches: [None, None, None], route: after(0) });
        }
        let Some(plan) = self.plan(projection, &layout, stage, source)? else {
            return Ok(Launched { launches: [None, None, None], route: after(0) });
        };
        let parts = place.scratch.parts_of(projection, layout.tokens, &plan, place.base)?;
        let pair_count = projection.pairs(layout.tokens)? as u32;
        let route = after(plan.tile_rows);
        let prepared = Prepared { projection, layout, plan, parts, pair_count };
        Ok(Launched { launches: launches(&prepared), route })
    }

    /// Checks and plans the routing alone.
    pub fn route<S: Space>(
        &self,
        place: &Place<'_>,
        projection: &Projection,
        tokens: usize,
        tensors: RoutingTensors<'_, S>,
    ) -> Result<Launched> {
        tensors.check(projection, tokens)?;
        // The tile of a fast call: any call can use its route, in parts if need be.
        let layout = Layout { tokens, x_stride: 0, out_stride: 0, offset: 0, aligned: true, ranked: false };
        let routing = Routing::Tokens(tensors);
        let route = |prepared: &Prepared<'_>| [prepared.route(&routing), None, None];
        self.prepare(place, projection, layout, Stage::Route, &routing, route)
    }

    /// Checks and plans the sorting of pairs into blocks, which has no workspace and leaves no route.
    pub fn align<S: Space>(&self, call: &Align<'_, S>) -> Result<Launches> {
        call.check()?;
        let &Align { experts, slots, expert_map, .. } = call;
        let BlockShape { block_size, max_padded, max_blocks } = call.shape;
        let (adapter_enabled, enabled_kind) = flags(&call.adapter_enabled);
        let parameters = AlignParams {
            topk_ids: Global::new(call.topk_ids.address()),
            token_lora: Global::new(call.token_lora.address()),
            adapter_enabled,
            lora_ids: Global::new(call.lora_ids.address()),
            expert_map: Global::new(expert_map.map_or(0, |view| view.address())),
            sorted: Global::new(call.sorted_token_ids.address()),
            block_experts: Global::new(call.expert_ids.address()),
            padded_counts: Global::new(call.num_tokens_post_padded.address()),
            pair_count: call.pairs() as u32,
            top_k: Divider::new(call.top_k as u32),
            slots: slots as u32,
            experts: experts as u32,
            global_experts: expert_map.map_or(experts, |map| map.len()) as u32,
            lora_count: call.lora_ids.len() as u32,
            block_size: block_size as u32,
            max_padded: max_padded as u32,
            max_blocks: max_blocks as u32,
            enabled_kind,
            reserved: 0,
        };
        let launch = plan::align(call.pairs(), experts, slots, &self.limits)?;
        Ok([Some((launch, Parameters::Align(parameters))), None, None])
    }

    /// Checks and plans a whole call.
    pub fn forward<S: Space, T: Element>(
        &self,
        place: &Place<'_>,
        projection: &Projection,
        call: &Forward<'_, S, T>,
    ) -> Result<Launched> {
        let layout = call.check(projection)?;
        let &Forward { a, b, topk_weights, accumulate, .. } = call;
        let (x, out) = (call.x.data.address(), call.out.data.address());
        let tail = ExpandTail { b, topk_weights, out, accumulate };
        let launches = |prepared: &Prepared<'_>| {
            let route = prepared.route(&call.routing);
            if let Some(decode) = prepared.decode(x, a, &tail, &call.routing) {
                return [route, Some(decode), None];
            }
            if let Some(plan) = &prepared.plan.prefill {
                return [route, Some(prepared.prefill(plan, Some((x, a)), H::Scratch, Some(&tail))), None];
            }
            [route, prepared.shrink(x, a, H::Scratch), prepared.expand(&tail, H::Scratch)]
        };
        self.prepare(place, projection, layout, Stage::Forward, &call.routing, launches)
    }

    /// Checks and plans the first half of a call.
    pub fn shrink<S: Space, T: Element>(
        &self,
        place: &Place<'_>,
        projection: &Projection,
        call: &Shrink<'_, S, T>,
    ) -> Result<Launched> {
        let layout = call.check(projection)?;
        let (x, h) = (call.x.data.address(), H::Caller(call.h.address()));
        let launches = |prepared: &Prepared<'_>| {
            let prefill = prepared.plan.prefill.as_ref();
            let prefill = prefill.map(|plan| prepared.prefill(plan, Some((x, call.a)), h, None));
            [prepared.route(&call.routing), prefill.or_else(|| prepared.shrink(x, call.a, h)), None]
        };
        self.prepare(place, projection, layout, Stage::Shrink, &call.routing, launches)
    }

    /// Checks and plans the second half of a call.
    pub fn expand<S: Space, T: Element>(
        &self,
        place: &Place<'_>,
        projection: &Projection,
        call: &Expand<'_, S, T>,
    ) -> Result<Launched> {
        let layout = call.check(projection)?;
        let &Expand { b, topk_weights, accumulate, .. } = call;
        let tail = ExpandTail { b, topk_weights, out: call.out.data.address(), accumulate };
        let h = H::Caller(call.h.address());
        let launches = |prepared: &Prepared<'_>| {
            let prefill = prepared.plan.prefill.as_ref();
            let prefill = prefill.map(|plan| prepared.prefill(plan, None, h, Some(&tail)));
            [prepared.route(&call.routing), None, prefill.or_else(|| prepared.expand(&tail, h))]
        };
        self.prepare(place, projection, layout, Stage::Expand, &call.routing, launches)
    }
}

impl Place<'_> {
    /// Where a call's route comes from: itself, or what the workspace holds.
    pub fn route_source<S: Space>(
        &self,
        projection: &Projection,
        tokens: usize,
        routing: &Routing<'_, S>,
    ) -> Result<RouteSource> {
        Ok(match routing {
            Routing::Tokens(_) => RouteSource::Made,
            Routing::Sorted(sorted) => RouteSource::Sorted { tile_rows: sorted.shape.block_size as u32 },
            Routing::On(route) => {
                self.held.check(route, RouteSizes::new(projection, tokens), self.recording)?;
                RouteSource::Kept { tile_rows: route.tile_rows() }
            }
        })
    }
}

/// A call that was checked and planned.
struct Prepared<'c> {
    projection: &'c Projection,
    layout: Layout,
    plan: Plan,
    parts: Parts,
    /// P.
    pair_count: u32,
}

impl Prepared<'_> {
    fn route<S: Space>(&self, routing: &Routing<'_, S>) -> Option<(Launch, Parameters)> {
        let launch = self.plan.route?;
        let parameters = match routing {
            Routing::Tokens(tensors) => Parameters::Route(self.routing(tensors)),
            Routing::Sorted(sorted) => Parameters::Adopt(self.adopt(sorted)),
            Routing::On(_) => return None,
        };
        Some((launch, parameters))
    }

    /// What `route` is told, or `decode` in its place.
    fn routing<S: Space>(&self, routing: &RoutingTensors<'_, S>) -> RouteParams {
        let sizes = self.projection.sizes();
        let RoutingTensors { ranks, expert_map, .. } = routing;
        let (adapter_enabled, enabled_kind) = flags(&routing.adapter_enabled);
        RouteParams {
            topk_ids: Global::new(routing.topk_ids.address()),
            token_lora: Global::new(routing.token_lora.address()),
            adapter_enabled,
            enabled_kind,
            ranks: Global::new(ranks.map_or(0, |view| view.address())),
            expert_map: Global::new(expert_map.map_or(0, |view| view.address())),
            global_experts: expert_map.map_or(sizes.experts, |map| map.len()) as u32,
            ..self.made()
        }
    }

    /// What is told of a route that was made before: where it is.
    fn made(&self) -> RouteParams {
        let Prepared { projection, plan, parts, pair_count, .. } = self;
        let sizes = projection.sizes();
        RouteParams {
            topk_ids: Global::NULL,
            token_lora: Global::NULL,
            adapter_enabled: Global::NULL,
            enabled_kind: enabled::ALL,
            ranks: Global::NULL,
            expert_map: Global::NULL,
            global_experts: sizes.experts as u32,
            pairs: parts.pairs,
            tiles: parts.tiles,
            counts: parts.counts,
            buckets: parts.buckets,
            exchange: parts.exchange,
            pair_count: *pair_count,
            top_k: Divider::new(sizes.top_k as u32),
            slots: sizes.slots as u32,
            experts: sizes.experts as u32,
            over_experts: Divider::new(sizes.experts as u32),
            max_rank: sizes.max_rank as u32,
            tile_rows: plan.tile_rows,
            over_tile_rows: Divider::new(plan.tile_rows),
            blocks: plan.sorting.blocks,
            run: plan.sorting.run,
            window: plan.sorting.window,
            exchange_room: parts.exchange_room,
            reserved: 0,
        }
    }

    fn decode<S: Space, T: Element>(
        &self,
        x: u64,
        a: &[View<'_, S, T>],
        tail: &ExpandTail<'_, S, T>,
        routing: &Routing<'_, S>,
    ) -> Option<(Launch, Parameters)> {
        let Prepared { projection, layout, plan, .. } = self;
        let decode = plan.decode?;
        let sizes = projection.sizes();
        let clusters = decode.launch.blocks / decode.launch.cluster;
        let parameters = DecodeParams {
            route: match routing {
                Routing::Tokens(tensors) if decode.finds => self.routing(tensors),
                _ => self.made(),
            },
            x: Global::new(x),
            a: addresses(a),
            b: addresses(tail.b),
            out: Global::<u16>::new(tail.out).at(layout.offset as u64),
            topk_weights: Global::new(tail.topk_weights.map_or(0, |weights| weights.address())),
            x_stride: layout.x_stride as u64,
            out_stride: layout.out_stride as u64,
            x_row: self.x_row(),
            in_dim: sizes.in_dim as u32,
            out_dim: sizes.out_dim as u32,
            slices: sizes.slices as u32,
            over_slices: Divider::new(sizes.slices as u32),
            tile_parts: plan.tile_parts,
            over_parts: Divider::new(plan.tile_parts),
            a_experts: projection.a_experts() as u32,
            b_experts: projection.b_experts() as u32,
            accumulate: tail.accumulate.into(),
            finds: decode.finds.into(),
            room: decode.room,
            shrink_stages: decode.stages[0],
            expand_stages: decode.stages[1],
            clusters,
            over_listed: Divider::new(if decode.room.lists_all() { sizes.slices as u32 } else { clusters }),
        };
        Some((decode.launch, Parameters::Decode(parameters)))
    }

    /// What `prefill` is told: to shrink where it is given x and `a` (`head`), to expand where it is given what that takes (`tail`).
    /// Where it does one of them, `h` is the caller's.
    fn prefill<S: Space, T: Element>(
        &self,
        prefill: &PrefillPlan,
        head: Option<(u64, &[View<'_, S, T>])>,
        h: H,
        tail: Option<&ExpandTail<'_, S, T>>,
    ) -> (Launch, Parameters) {
        let Prepared { projection, layout, plan, parts, pair_count } = self;
        let &PrefillPlan { launch, passes, stages, under_way, ahead, shares } = prefill;
        let sizes = projection.sizes();
        let products = match (head, tail) {
            (Some(_), Some(_)) => products::BOTH,
            (_, None) => products::SHRINK,
            (None, _) => products::EXPAND,
        };
        let h = if products == products::BOTH { 0 } else { h.address(parts) };
        let accumulates = tail.is_some_and(|tail| tail.accumulate);
        let whole = Split { count: 1, each: sizes.out_dim as u32 };
        let [depth, columns] =
            shares.map_or([Split::NONE, whole], |PassShares { depth, columns, .. }| [depth, columns]);
        let fragments = shares.map_or(Global::NULL, |_| parts.shared_passes);
        let sums = fragments.at(shares.map_or(0, |shares| shares.h_words));
        let out = tail.map_or(Global::NULL, |tail| Global::<u16>::new(tail.out).at(layout.offset as u64));
        let topk_weights = tail.and_then(|tail| tail.topk_weights).map_or(0, |weights| weights.address());
        let parameters = PrefillParams {
            x: Global::new(head.map_or(0, |(x, _)| x)),
            a: addresses(head.map_or(&[], |(_, a)| a)),
            h: Global::new(h),
            fragments,
            sums,
            counters: parts.counters,
            b: addresses(tail.map_or(&[], |tail| tail.b)),
            out,
            topk_weights: Global::new(topk_weights),
            pairs: parts.pairs,
            tiles: parts.tiles,
            tile_count: parts.counts.at(if accumulates { count::ACTIVE } else { count::ALL }),
            scheduler: parts.scheduler,
            x_stride: layout.x_stride as u64,
            out_stride: layout.out_stride as u64,
            x_row: self.x_row(),
            pair_count: *pair_count,
            in_dim: sizes.in_dim as u32,
            out_dim: sizes.out_dim as u32,
            max_rank: sizes.max_rank as u32,
            slices: sizes.slices as u32,
            a_experts: projection.a_experts() as u32,
            b_experts: projection.b_experts() as u32,
            accumulate: accumulates.into(),
            tile_parts: plan.tile_parts,
            over_parts: Divider::new(plan.tile_parts),
            passes,
            over_passes: Divider::new(passes),
            split_k: depth,
            split_n: columns,
            blocks: launch.blocks,
            stages,
            under_way,
            products,
            ahead,
            reserved: 0,
        };
        (launch, Parameters::Prefill(parameters))
    }

    /// P over this gives the row of x.
    fn x_row(&self) -> Divider {
        let sizes = self.projection.sizes();
        Divider::new(match sizes.x_rows {
            XRows::Token => sizes.top_k as u32,
            XRows::Pair => 1,
        })
    }

    fn adopt<S: Space>(&self, sorted: &SortedTensors<'_, S>) -> AdoptParams {
        let Prepared { projection, plan, parts, pair_count, .. } = self;
        let sizes = projection.sizes();
        let BlockShape { block_size, max_padded, max_blocks } = sorted.shape;
        let (adapter_enabled, enabled_kind) = flags(&sorted.adapter_enabled);
        AdoptParams {
            sorted: Global::new(sorted.sorted_token_ids.address()),
            block_experts: Global::new(sorted.expert_ids.address()),
            padded_counts: Global::new(sorted.num_tokens_post_padded.address()),
            lora_ids: Global::new(sorted.lora_ids.address()),
            adapter_enabled,
            ranks: Global::new(sorted.ranks.map_or(0, |view| view.address())),
            pairs: parts.pairs,
            tiles: parts.tiles,
            counts: parts.counts,
            pair_count: *pair_count,
            slots: sizes.slots as u32,
            experts: sizes.experts as u32,
            max_rank: sizes.max_rank as u32,
            lora_count: sorted.lora_ids.len() as u32,
            block_size: block_size as u32,
            max_padded: max_padded as u32,
            max_blocks: max_blocks as u32,
            usable_blocks: sorted.shape.usable_blocks() as u32,
            most_tiles: plan.route_tiles as u32,
            enabled_kind,
            reserved: 0,
        }
    }

    fn shrink<S: Space, T: Element>(
        &self,
        x: u64,
        a: &[View<'_, S, T>],
        h: H,
    ) -> Option<(Launch, Parameters)> {
        let Prepared { projection, layout, plan, parts, pair_count } = self;
        let shrink = plan.shrink?;
        let sizes = projection.sizes();
        let parameters = ShrinkParams {
            x: Global::new(x),
            a: addresses(a),
            h: Global::new(h.address(parts)),
            partial: Global::new(parts.scratch),
            pairs: parts.pairs,
            tiles: parts.tiles,
            counts: parts.counts,
            x_stride: layout.x_stride as u64,
            x_row: self.x_row(),
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
            tile_parts: plan.tile_parts,
            reserved: 0,
        };
        Some((shrink.launch, Parameters::Shrink(parameters)))
    }

    fn expand<S: Space, T: Element>(
        &self,
        tail: &ExpandTail<'_, S, T>,
        h: H,
    ) -> Option<(Launch, Parameters)> {
        let Prepared { projection, layout, plan, parts, pair_count } = self;
        let expand = plan.expand?;
        let sizes = projection.sizes();
        let parameters = ExpandParams {
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
            tile_parts: plan.tile_parts,
            reserved: 0,
        };
        Some((expand.launch, Parameters::Expand(parameters)))
    }
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
struct ExpandTail<'a, S: Space, T> {
    b: &'a [View<'a, S, T>],
    topk_weights: Option<View<'a, S, f32>>,
    out: u64,
    accumulate: bool,
}

/// `adapter_enabled` as kernels take it: where, and of which kind.
fn flags<S: Space>(adapter_enabled: &Enabled<'_, S>) -> (Global<u8>, u32) {
    match adapter_enabled {
        Enabled::All => (Global::NULL, enabled::ALL),
        Enabled::U8(view) => (Global::new(view.address()), enabled::U8),
        Enabled::I32(view) => (Global::new(view.address()), enabled::I32),
    }
}

fn addresses<S: Space, T: Pod>(slices: &[View<'_, S, T>]) -> [Global<u16>; MAX_SLICES] {
    let mut addresses = [Global::NULL; MAX_SLICES];
    for (address, slice) in addresses.iter_mut().zip(slices) {
        *address = Global::new(slice.address());
    }
    addresses
}
