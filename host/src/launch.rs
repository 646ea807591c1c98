//! From a checked call to launches: its plan, the parts of the workspace, and the parameter block of each
//! kernel. Whatever runs the kernels, a GPU or the emulated machine, runs what comes from here.

use crate::blocks::Align;
use crate::call::{Expand, Factor, Forward, Layout, Routing, RoutingTensors, Shrink};
use crate::dtype::Element;
use crate::error::Result;
use crate::plan::{
    self, Arguments, DeviceLimits, Launch, Operands, Options, Plan, Problem, RouteSource, Scratch, Stage,
    Step, Work,
};
use crate::projection::Projection;
use crate::route::{HeldRoute, Route, RouteSizes};
use crate::tensor::{Space, View};
use crate::tuning::Tuning;
use bytemuck::Pod;
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{
    AdapterEntry, AdoptParams, AlignParams, DecodeParams, ExpandParams, MAX_SLICES, PrefillParams,
    RouteParams, ShrinkParams,
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
    /// The call finds it.
    Found {
        sizes: RouteSizes,
        /// Pairs of its largest tile.
        tile_rows: u32,
        /// Whether slots had ranks of their own.
        ranked: bool,
    },
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
        if matches!(self.route, AfterCall::Found { .. }) {
            place.held.forget();
        }
        run(&self.launches).inspect_err(|_| place.held.forget())?;
        Ok(match self.route {
            AfterCall::Found { sizes, tile_rows, ranked } => {
                place.held.hold(sizes, tile_rows, ranked, place.recording)
            }
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
        if layout.tokens == 0 {
            return Ok(None);
        }
        self.plan_of(&Problem::new(projection, layout, stage, route, &self.limits)?).map(Some)
    }

    fn plan_of(&self, problem: &Problem<'_>) -> Result<Plan> {
        let tuning = self.tuning.filter(|_| self.options == Options::default());
        let tuned = tuning.and_then(|tuning| {
            let Problem { projection, layout, stage, route, .. } = problem;
            tuning.fastest(projection, layout.tokens, *stage, *route)
        });
        Plan::of(problem, &tuned.unwrap_or(self.options))
    }

    /// Plans a checked call and makes its launches; none when there is nothing to do.
    fn prepare<S: Space>(
        &self,
        place: &Place<'_>,
        projection: &Projection,
        layout: &Layout,
        stage: Stage,
        routing: &Routing<'_, S>,
        operands: &Operands,
    ) -> Result<Launched> {
        let sizes = RouteSizes::new(projection, layout.tokens);
        let after = |tile_rows| match *routing {
            Routing::On(route) => AfterCall::Given(route),
            _ => AfterCall::Found { sizes, tile_rows, ranked: routing.is_ranked() },
        };
        let source = place.route_source(projection, layout.tokens, routing)?;
        if layout.tokens == 0 {
            return Ok(Launched { launches: [None, None, None], route: after(0) });
        }
        let problem = Problem::new(projection, layout, stage, source, &self.limits)?;
        let plan = self.plan_of(&problem)?;
        let parts = place.scratch.parts_of(projection, layout.tokens, &plan, place.base)?;
        let arguments = Arguments { problem: &problem, operands, parts: &parts };
        Ok(Launched { launches: launches(&plan, &arguments, routing), route: after(plan.tile_rows()) })
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
        let ranked = tensors.ranks.is_some();
        let layout = Layout { tokens, aligned: true, ranked, ..Layout::default() };
        let routing = Routing::Tokens(tensors);
        self.prepare(place, projection, &layout, Stage::Route, &routing, &Operands::NONE)
    }

    /// Checks and plans the sorting of pairs into blocks, which has no workspace and leaves no route.
    pub fn align<S: Space>(&self, call: &Align<'_, S>) -> Result<Launches> {
        call.check()?;
        let launch = plan::align(call.pairs(), call.experts, call.slots, &self.limits)?;
        Ok([Some((launch, Parameters::Align(plan::align_parameters(call)))), None, None])
    }

    /// Checks and plans a whole call.
    pub fn forward<S: Space, T: Element>(
        &self,
        place: &Place<'_>,
        projection: &Projection,
        call: &Forward<'_, S, T>,
    ) -> Result<Launched> {
        let layout = call.check(projection)?;
        let operands = Operands {
            x: Global::new(call.x.data.address()),
            x_index: address(&call.x.index),
            table: table(&call.weights.a()),
            a: addresses(&call.weights.a()),
            h: Global::NULL,
            b: addresses(&call.weights.b()),
            out: Global::new(call.out.data.address()).at(layout.offset as u64),
            out_index: address(&call.out.index),
            topk_weights: address(&call.topk_weights),
            accumulate: call.accumulate,
        };
        self.prepare(place, projection, &layout, Stage::Forward, &call.routing, &operands)
    }

    /// Checks and plans the first half of a call.
    pub fn shrink<S: Space, T: Element>(
        &self,
        place: &Place<'_>,
        projection: &Projection,
        call: &Shrink<'_, S, T>,
    ) -> Result<Launched> {
        let layout = call.check(projection)?;
        let operands = Operands {
            x: Global::new(call.x.data.address()),
            x_index: address(&call.x.index),
            table: table(&call.a),
            a: addresses(&call.a),
            h: Global::new(call.h.address()),
            ..Operands::NONE
        };
        self.prepare(place, projection, &layout, Stage::Shrink, &call.routing, &operands)
    }

    /// Checks and plans the second half of a call.
    pub fn expand<S: Space, T: Element>(
        &self,
        place: &Place<'_>,
        projection: &Projection,
        call: &Expand<'_, S, T>,
    ) -> Result<Launched> {
        let layout = call.check(projection)?;
        let operands = Operands {
            h: Global::new(call.h.address()),
            table: table(&call.b),
            b: addresses(&call.b),
            out: Global::new(call.out.data.address()).at(layout.offset as u64),
            out_index: address(&call.out.index),
            topk_weights: address(&call.topk_weights),
            accumulate: call.accumulate,
            ..Operands::NONE
        };
        self.prepare(place, projection, &layout, Stage::Expand, &call.routing, &operands)
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
                RouteSource::Kept { tile_rows: route.tile_rows(), ranked: route.is_ranked() }
            }
        })
    }
}

/// The launches of a planned call, in order.
fn launches<S: Space>(plan: &Plan, arguments: &Arguments<'_>, routing: &Routing<'_, S>) -> Launches {
    let route = match (plan.route.step, routing) {
        (Step::Sort(sorting), Routing::Tokens(tensors)) => {
            let parameters = plan.route.route_parameters(arguments, tensors);
            Some((sorting.launch, Parameters::Route(parameters)))
        }
        (Step::Adopt(launch), Routing::Sorted(sorted)) => {
            Some((launch, Parameters::Adopt(plan.route.adopt_parameters(arguments, sorted))))
        }
        _ => None,
    };
    match plan.work {
        Work::None => [route, None, None],
        Work::Decode(decode) => {
            let found = match routing {
                Routing::Tokens(tensors) if decode.finds => plan.route.route_parameters(arguments, tensors),
                _ => plan.route.kept_parameters(arguments),
            };
            [route, Some((decode.launch, Parameters::Decode(decode.parameters(arguments, found)))), None]
        }
        Work::Prefill(prefill) => {
            [route, Some((prefill.launch, Parameters::Prefill(prefill.parameters(arguments)))), None]
        }
        Work::Generic(generic) => {
            let shrink = generic.shrink.map(|shrink| {
                let parameters = generic.shrink_parameters(&shrink, arguments);
                (shrink.launch, Parameters::Shrink(parameters))
            });
            let expand = generic.expand.map(|expand| {
                let parameters = generic.expand_parameters(&expand, arguments);
                (expand.launch, Parameters::Expand(parameters))
            });
            [route, shrink, expand]
        }
    }
}

/// The address of a tensor; null where there is none.
fn address<S: Space, T: Pod, G>(tensor: &Option<View<'_, S, T>>) -> Global<G> {
    Global::new(tensor.map_or(0, |tensor| tensor.address()))
}

/// The table of adapters; null where weights are stacked.
fn table<S: Space, T>(factor: &Factor<'_, S, T>) -> Global<AdapterEntry> {
    match factor {
        Factor::Stacked(_) => Global::NULL,
        Factor::Table(adapters) => Global::new(adapters.entries().address()),
    }
}

/// The addresses of stacked tensors.
fn addresses<S: Space, T: Pod>(factor: &Factor<'_, S, T>) -> [Global<u16>; MAX_SLICES] {
    let mut addresses = [Global::NULL; MAX_SLICES];
    for (address, slice) in addresses.iter_mut().zip(factor.stacked()) {
        *address = Global::new(slice.address());
    }
    addresses
}
