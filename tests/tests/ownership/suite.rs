//! The tests, each in a process of its own.

use half::bf16;
use libtest_mimic::{Arguments, Trial};
use moe_lora::cuda::{Buffer, Device, Form, Graph, Options, Stream, Workspace, device_of};
use moe_lora::tuning::{Tuned, Tuning};
use moe_lora::{
    Backend, Buffer as _, Cuda, Error, Forward, Projection, ProjectionSizes, Route, Routing, RoutingTensors,
    SliceOrder, ViewMut,
};
use moe_lora_tests::fake::{Control, Log, Version, trial};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Every test.
pub fn tests(arguments: &Arguments) -> Vec<Trial> {
    let tests: &[(&'static str, fn())] = &[
        #[cfg(feature = "cudarc")]
        (
            "a_slice_that_is_lent_is_used_on_its_stream_alone",
            lent::a_slice_that_is_lent_is_used_on_its_stream_alone,
        ),
        ("each_thread_has_a_default_stream_of_its_own", each_thread_has_a_default_stream_of_its_own),
        #[cfg(feature = "cudarc")]
        ("a_slice_is_lent_on_every_kind_of_stream", lent::a_slice_is_lent_on_every_kind_of_stream),
        ("all_handles_can_go_to_other_threads", all_handles_can_go_to_other_threads),
        ("handles_go_in_any_order_and_leave_nothing", handles_go_in_any_order_and_leave_nothing),
        ("a_call_leaves_the_context_of_its_thread", a_call_leaves_the_context_of_its_thread),
        ("what_is_of_another_device_is_refused", what_is_of_another_device_is_refused),
        ("a_second_stream_waits_for_the_first", a_second_stream_waits_for_the_first),
        ("reads_on_two_streams_go_side_by_side", reads_on_two_streams_go_side_by_side),
        ("a_launch_that_fails_ends_the_route", a_launch_that_fails_ends_the_route),
        ("a_route_of_a_recording_is_valid_within_it_alone", a_route_of_a_recording_is_valid_within_it_alone),
        (
            "what_cannot_be_recorded_is_refused_before_the_driver_is_asked",
            what_cannot_be_recorded_is_refused_before_the_driver_is_asked,
        ),
        ("a_recording_ends_whatever_becomes_of_the_work", a_recording_ends_whatever_becomes_of_the_work),
        ("a_graph_keeps_what_it_names", a_graph_keeps_what_it_names),
        ("the_plan_of_a_call_is_what_it_launches", the_plan_of_a_call_is_what_it_launches),
        (
            "things_are_made_and_dropped_within_the_capture_of_another_stream",
            things_are_made_and_dropped_within_the_capture_of_another_stream,
        ),
    ];
    tests.iter().map(|&(name, test)| trial(arguments, name, Version::New, &[], test)).collect()
}

const TOKENS: usize = 8;

fn projection() -> Projection {
    let sizes =
        ProjectionSizes { top_k: 2, experts: 4, slots: 2, max_rank: 16, ..ProjectionSizes::gate_up(64, 32) };
    Projection::new(sizes).expect("legal sizes")
}

/// A call's inputs on a device.
struct Inputs {
    topk_ids: Buffer<i32>,
    token_lora: Buffer<i32>,
    x: Buffer<bf16>,
    a: [Buffer<bf16>; 2],
    b: [Buffer<bf16>; 2],
}

impl Inputs {
    fn routing(&self) -> RoutingTensors<'_, Cuda> {
        RoutingTensors::new(self.topk_ids.view(), self.token_lora.view())
    }

    /// What `take` makes of the call that adds to `out`.
    fn call<R>(
        &self,
        routing: Routing<'_, Cuda>,
        out: ViewMut<'_, Cuda, bf16>,
        take: impl FnOnce(Forward<'_, Cuda, bf16>) -> R,
    ) -> R {
        take(Forward {
            tokens: TOKENS,
            routing,
            x: self.x.view().into(),
            weights: moe_lora::Weights::Stacked {
                a: &self.a.each_ref().map(|a| a.view()),
                b: &self.b.each_ref().map(|b| b.view()),
            },
            topk_weights: None,
            out: out.into(),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate: true,
        })
    }
}

/// A call's memory on a device.
struct Layer {
    inputs: Inputs,
    out: Buffer<bf16>,
}

impl Layer {
    fn new(stream: &Stream) -> Self {
        let zeros = |len| stream.zeros::<bf16>(len).expect("room");
        let ids = |len: usize| stream.upload(&vec![0i32; len]).expect("room");
        let (a, b) = (2 * 4 * 16 * 64, 2 * 4 * 32 * 16);
        let inputs = Inputs {
            topk_ids: ids(TOKENS * 2),
            token_lora: ids(TOKENS),
            x: zeros(TOKENS * 64),
            a: [zeros(a), zeros(a)],
            b: [zeros(b), zeros(b)],
        };
        Layer { inputs, out: zeros(TOKENS * 2 * 64) }
    }

    /// The call, on a route or on one of its own.
    fn call(
        &mut self,
        stream: &Stream,
        workspace: &mut Workspace,
        on: Option<Route>,
    ) -> moe_lora::Result<Route> {
        let Layer { inputs, out } = self;
        let routing = on.map_or_else(|| inputs.routing().into(), Routing::On);
        inputs.call(routing, out.view_mut(), |call| stream.forward(workspace, &projection(), call))
    }
}

/// A device with a stream, a call's memory and a workspace.
struct Engine {
    stream: Stream,
    layer: Layer,
    workspace: Workspace,
}

impl Engine {
    fn on(ordinal: u32) -> Self {
        let stream = Device::untuned(ordinal).expect("the fake has devices").new_stream().expect("a stream");
        let workspace = stream.workspace(&[projection()], TOKENS).expect("room");
        Engine { layer: Layer::new(&stream), stream, workspace }
    }

    fn call(&mut self, on: Option<Route>) -> moe_lora::Result<Route> {
        self.layer.call(&self.stream, &mut self.workspace, on)
    }

    fn graph(&mut self) -> Graph {
        let Engine { stream, layer, workspace } = self;
        stream.capture(|stream| layer.call(stream, workspace, None).map(drop)).expect("a recording")
    }
}

/// What is left on the devices.
fn left(control: &Control) -> Vec<(&'static str, usize)> {
    let kinds = ["memory", "stream", "event", "module", "graph", "context"];
    kinds.into_iter().map(|kind| (kind, control.live(kind))).filter(|(_, count)| *count > 0).collect()
}

fn none_left(control: &Control) {
    assert_eq!(left(control), [], "things are left");
    assert_eq!(control.faults(), [""; 0]);
}

fn is_stale(result: moe_lora::Result<Route>) {
    assert!(matches!(result, Err(Error::StaleRoute { .. })), "{result:?}");
}

fn all_handles_can_go_to_other_threads() {
    fn check<T: Send + Sync + 'static>() {}
    check::<Device>();
    check::<Stream>();
    check::<Buffer<bf16>>();
    check::<Workspace>();
    check::<Graph>();
    check::<moe_lora::Operator<Stream>>();
}

/// Orders of `0..count` in which each goes first and last once, and each before each other.
fn orders(count: usize) -> impl Iterator<Item = Vec<usize>> {
    let rotated = move |by: usize| (0..count).cycle().skip(by).take(count).collect::<Vec<_>>();
    (0..count).flat_map(move |by| [rotated(by), rotated(by).into_iter().rev().collect()])
}

fn handles_go_in_any_order_and_leave_nothing() {
    let control = Control::here();
    for order in orders(5) {
        let mut engine = Engine::on(0);
        let (device, graph) = (engine.stream.device().clone(), engine.graph());
        graph.replay().expect("a replay");
        let Engine { stream, layer, workspace } = engine;
        let mut parts = (Some(device), Some(stream), Some(layer), Some(workspace), Some(graph));
        for part in &order {
            match part {
                0 => drop(parts.0.take()),
                1 => drop(parts.1.take()),
                2 => drop(parts.2.take()),
                3 => drop(parts.3.take()),
                _ => drop(parts.4.take()),
            }
        }
        none_left(&control);
    }
}

fn a_call_leaves_the_context_of_its_thread() {
    let control = Control::here();
    // What a thread of somebody else's has current: nothing, or another device's context.
    let (other, mut current) = (Driver::open(), std::ptr::null_mut());
    for others in [std::ptr::null_mut(), other.retain(1)] {
        other.set_current(others);
        let mut engine = Engine::on(0);
        let route = engine.call(None).expect("a call");
        engine.call(Some(route)).expect("a call");
        let graph = engine.graph();
        graph.replay().expect("a replay");
        engine.stream.download(&engine.layer.out).expect("a copy");
        // It is on its own device, whichever was current.
        assert_eq!(device_of(engine.layer.out.address()), Ok(0));
        drop((engine, graph));
        other.current(&mut current);
        assert_eq!(current, others);
    }
    other.set_current(std::ptr::null_mut());
    other.release(1);
    none_left(&control);
}

fn what_is_of_another_device_is_refused() {
    let control = Control::here();
    let (mut here, mut there) = (Engine::on(0), Engine::on(1));
    let launches = control.launches();
    let refused = |result: moe_lora::Result<Route>, what| {
        let (expected, got) = ("cuda:0".to_owned(), "cuda:1".to_owned());
        assert_eq!(result.err(), Some(Error::OtherDevice { what, expected, got }));
    };
    refused(here.layer.call(&here.stream, &mut there.workspace, None), "workspace");
    refused(there.layer.call(&here.stream, &mut here.workspace, None), "topk_ids");
    let swapped = |layer: &mut Layer, other: &mut Layer, part: fn(&mut Layer) -> &mut Buffer<bf16>| {
        std::mem::swap(part(layer), part(other));
    };
    type Part = (&'static str, fn(&mut Layer) -> &mut Buffer<bf16>);
    let parts: [Part; 4] = [
        ("x", |layer| &mut layer.inputs.x),
        ("a", |layer| &mut layer.inputs.a[1]),
        ("b", |layer| &mut layer.inputs.b[0]),
        ("out", |layer| &mut layer.out),
    ];
    for (what, part) in parts {
        swapped(&mut here.layer, &mut there.layer, part);
        refused(here.call(None), what);
        swapped(&mut here.layer, &mut there.layer, part);
    }
    let copied = here.stream.download(&there.layer.out);
    assert!(matches!(copied, Err(Error::OtherDevice { what: "buffer", .. })));
    assert_eq!(control.launches(), launches, "something was launched");
    here.call(None).expect("a call");
}

fn a_second_stream_waits_for_the_first() {
    let control = Control::here();
    let mut engine = Engine::on(0);
    let other = engine.stream.device().new_stream().expect("a stream");
    // Each pair of calls shares one thing that the first or the second writes.
    type Share = (&'static str, fn(&mut Engine, &Stream));
    let shares: [Share; 5] = [
        ("a workspace", |engine, other| {
            let mut layer = Layer::new(other);
            engine.call(None).expect("a call");
            layer.call(other, &mut engine.workspace, None).expect("a call");
        }),
        ("an output", |engine, other| {
            let mut workspace = other.workspace(&[projection()], TOKENS).expect("room");
            engine.call(None).expect("a call");
            engine.layer.call(other, &mut workspace, None).expect("a call");
        }),
        ("a workspace with a graph", |engine, other| {
            let mut layer = Layer::new(other);
            engine.graph().replay().expect("a replay");
            layer.call(other, &mut engine.workspace, None).expect("a call");
        }),
        ("an output while the first is recorded", |engine, other| {
            engine.call(None).expect("a call");
            let Engine { stream, layer, .. } = engine;
            let out = &layer.out;
            stream.capture(|_| other.download(out).map(drop)).expect("a recording of nothing");
        }),
        ("an output that is copied", |engine, other| {
            engine.call(None).expect("a call");
            other.download(&engine.layer.out).expect("a copy");
        }),
    ];
    for (what, share) in shares {
        let before = control.log().0.len();
        share(&mut engine, &other);
        let log = control.log();
        let streams = [&engine.stream, &other].map(|stream| (0, stream.as_raw() as usize));
        let of = |stream, kinds: &[&str]| {
            let mut entries = log.0.iter().enumerate().skip(before);
            let found = entries.rfind(|(_, entry)| entry.stream == stream && kinds.contains(&&*entry.kind));
            found.unwrap_or_else(|| panic!("{what}: {stream:?} has done nothing")).0
        };
        let (first, second) = (of(streams[0], &["launch"]), of(streams[1], &["launch", "copy_to_host"]));
        assert!(log.is_before(first, second), "{what}: {:#?}", &log.0[before..]);
    }
    assert_eq!(control.faults(), [""; 0]);
}

fn reads_on_two_streams_go_side_by_side() {
    let control = Control::here();
    let (stream, before) = {
        let engine = Engine::on(0);
        (engine.stream.clone(), control.log().0.len())
    };
    let other = stream.device().new_stream().expect("a stream");
    let buffer = stream.zeros::<bf16>(64).expect("room");
    other.download(&buffer).expect("a copy");
    let once = control.log().0.len();
    // Both have read since it was written: neither waits for the other any more.
    stream.download(&buffer).expect("a copy");
    other.download(&buffer).expect("a copy");
    let log = control.log();
    let waits =
        |range: std::ops::Range<usize>| log.0[range].iter().filter(|entry| entry.kind == "wait").count();
    assert_eq!((waits(before..once), waits(once..log.0.len())), (1, 1), "{:#?}", &log.0[before..]);
}

fn a_launch_that_fails_ends_the_route() {
    let control = Control::here();
    let mut engine = Engine::on(0);
    let route = engine.call(None).expect("a call");
    engine.call(Some(route)).expect("a call on its route");
    for on in [None, Some(route)] {
        let route = engine.call(None).expect("a call");
        control.fail_nth("cuLaunchKernelEx", 701, 1);
        let failed = engine.call(on.map(|_| route));
        assert!(
            matches!(failed, Err(Error::Driver { call: "cuLaunchKernelEx", code: 701, .. })),
            "{failed:?}"
        );
        is_stale(engine.call(Some(route)));
    }
    // One that is refused launches nothing, and ends nothing.
    let route = engine.call(None).expect("a call");
    let out = std::mem::replace(&mut engine.layer.out, engine.stream.zeros(8).expect("room"));
    assert!(matches!(engine.call(None), Err(Error::TooShort { tensor: "out", .. })));
    engine.layer.out = out;
    engine.call(Some(route)).expect("the route is as it was");
}

fn a_route_of_a_recording_is_valid_within_it_alone() {
    let mut engine = Engine::on(0);
    let before = engine.call(None).expect("a call");
    let mut recorded = None;
    let Engine { stream, layer, workspace } = &mut engine;
    let graph = stream.capture(|stream| {
        is_stale(layer.call(stream, workspace, Some(before)));
        let route = layer.call(stream, workspace, None)?;
        recorded = Some(route);
        layer.call(stream, workspace, Some(route)).map(drop)
    });
    let (graph, recorded) = (graph.expect("a recording"), recorded.expect("a route"));
    is_stale(engine.call(Some(recorded)));
    is_stale(engine.call(Some(before)));
    // In another recording neither.
    let Engine { stream, layer, workspace } = &mut engine;
    stream
        .capture(|stream| {
            is_stale(layer.call(stream, workspace, Some(recorded)));
            Ok(())
        })
        .expect("a recording of nothing");
    // A replay finds another.
    let after = engine.call(None).expect("a call");
    engine.call(Some(after)).expect("a call on its route");
    graph.replay().expect("a replay");
    is_stale(engine.call(Some(after)));
}

fn what_cannot_be_recorded_is_refused_before_the_driver_is_asked() {
    let control = Control::here();
    let mut engine = Engine::on(0);
    let Engine { stream, layer, workspace } = &mut engine;
    let graph = stream.capture(|stream| {
        let refused =
            |error: Option<Error>| assert!(matches!(error, Some(Error::NotRecordable { .. })), "{error:?}");
        refused(stream.upload(&[0i32]).err());
        refused(stream.download(&layer.out).err());
        refused(stream.write(&mut layer.inputs.x, 0, &[bf16::ONE]).err());
        refused(stream.synchronize().err());
        layer.call(stream, workspace, None).map(drop)
    });
    graph.expect("the recording goes on").replay().expect("a replay");
    assert_eq!(control.faults(), [""; 0]);
}

fn a_recording_ends_whatever_becomes_of_the_work() {
    let control = Control::here();
    let mut engine = Engine::on(0);
    for panics in [true, false] {
        let Engine { stream, layer, workspace } = &mut engine;
        let work = || {
            stream.capture(|stream| {
                layer.call(stream, workspace, None)?;
                assert!(!panics, "the work panics");
                Err(Error::ZeroSize { what: "the work" })
            })
        };
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(ended) => assert_eq!(ended.err(), Some(Error::ZeroSize { what: "the work" })),
            Err(_) => assert!(panics),
        }
        let launches = control.launches();
        engine.call(None).expect("a call");
        engine.stream.synchronize().expect("nothing is captured");
        assert!(control.launches() > launches, "the call ran");
    }
    drop(engine);
    none_left(&control);
}

fn a_graph_keeps_what_it_names() {
    let control = Control::here();
    let mut engine = Engine::on(0);
    let graph = engine.graph();
    let held = control.live("memory");
    drop(engine);
    assert_eq!(control.live("memory"), held, "the graph has the call's memory");
    graph.replay().expect("a replay");
    drop(graph);
    none_left(&control);
}

/// What is planned for a call is what it launches, with a tuning and without.
fn the_plan_of_a_call_is_what_it_launches() {
    let control = Control::here();
    let device = Device::untuned(0).expect("a device");
    let mut tuning = Tuning::new(device.info().name.clone(), device.kernels().fingerprint());
    let candidate = Options { form: Some(Form::Generic), ..Options::default() };
    let (microseconds, planned_microseconds) = (1.0, 2.0);
    let sizes = *projection().sizes();
    tuning.insert(Tuned { projection: sizes, tokens: TOKENS, candidate, microseconds, planned_microseconds });
    let tuned = device.tuned(tuning).expect("a tuning of this device");
    for (device, form) in [(device, Form::Decode), (tuned, Form::Generic)] {
        let stream = device.new_stream().expect("a stream");
        let mut workspace = stream.workspace(&[projection()], TOKENS).expect("room");
        let mut layer = Layer::new(&stream);
        let mut out = stream.zeros::<bf16>(TOKENS * 2 * 64).expect("room");
        let plan = layer.inputs.call(layer.inputs.routing().into(), out.view_mut(), |call| {
            stream.plan_forward(&workspace, &projection(), &call).expect("a call").expect("work")
        });
        assert_eq!(plan.form(), form);
        let before = control.log().kernels().len();
        layer.call(&stream, &mut workspace, None).expect("a call");
        let planned: Vec<_> = plan.launches().map(|launch| launch.kernel).collect();
        assert_eq!(control.log().kernels()[before..], planned);
    }
}

/// A library that prepares itself, or lets go of things, while its thread captures another stream.
fn things_are_made_and_dropped_within_the_capture_of_another_stream() {
    let control = Control::here();
    let (mut engine, mut old) = (Engine::on(0), Engine::on(0));
    let old_graph = old.graph();
    let Engine { stream, layer, workspace } = &mut engine;
    let graph = stream.capture(|stream| {
        drop((old_graph, old));
        let mut new = Engine::on(0);
        new.call(None)?;
        layer.call(stream, workspace, None).map(drop)
    });
    graph.expect("a recording").replay().expect("a replay");
    drop(engine);
    none_left(&control);
}

fn each_thread_has_a_default_stream_of_its_own() {
    let control = Control::here();
    let device = Device::untuned(0).expect("the fake has devices");
    // SAFETY: `CU_STREAM_PER_THREAD`. No work is left when memory goes: the fake's ends at once.
    let stream = unsafe { device.foreign_stream(std::ptr::without_provenance_mut(2)) };
    let workspace = stream.workspace(&[projection()], TOKENS).expect("room");
    let mut engine = Engine { layer: Layer::new(&stream), stream, workspace };
    let mut route = engine.call(None).expect("a call");
    let launched = |log: &Log| log.0.iter().rposition(|entry| entry.kind == "launch").expect("a launch");
    // The same memory on another thread, and on this one again.
    for elsewhere in [true, false] {
        let first = launched(&control.log());
        route = match elsewhere {
            true => std::thread::scope(|scope| scope.spawn(|| engine.call(Some(route))).join().unwrap()),
            false => engine.call(Some(route)),
        }
        .expect("a call");
        let log = control.log();
        let second = launched(&log);
        assert_ne!(log.0[first].stream, log.0[second].stream);
        assert!(log.is_before(first, second), "{:#?}", &log.0[first..]);
    }
    // Calls on another thread would not find the recording that the handle has.
    let recorded = std::thread::scope(|scope| {
        scope.spawn(|| engine.stream.capture(|_| Ok(())).map(drop)).join().expect("no panic")
    });
    assert!(matches!(recorded, Err(Error::NotRecordable { .. })), "{recorded:?}");
    drop(engine.graph());
    assert_eq!(control.faults(), [""; 0]);
}

/// Memory of another library's, and its streams.
#[cfg(feature = "cudarc")]
mod lent {
    use super::*;
    use cudarc::driver::CudaContext;
    use moe_lora::{Operator, cuda::CudarcStream};

    /// A call on slices is in order with what other streams do with them; a slice that is lent to one stream
    /// is of no use on another, in a recording, or on another device.
    pub fn a_slice_that_is_lent_is_used_on_its_stream_alone() {
        let control = Control::here();
        let context = CudaContext::new(0).expect("a context");
        let (first, second) =
            (context.new_stream().expect("a stream"), context.new_stream().expect("a stream"));
        let mut engine = Engine::on(0);
        let device = engine.stream.device().clone();
        let [here, there] =
            [&first, &second].map(|stream| CudarcStream::new(&device, stream.clone()).expect("a stream"));
        let mut out = first.alloc_zeros::<bf16>(TOKENS * 2 * 64).expect("room");
        for (stream, lent_to, refused) in
            [(&here, &here, false), (&there, &here, true), (&there, &there, false)]
        {
            let mut out = lent_to.write(out.as_view_mut()).expect("a slice");
            let Engine { layer: Layer { inputs, .. }, workspace, .. } = &mut engine;
            let done = inputs.call(inputs.routing().into(), out.view_mut(), |call| {
                stream.stream().forward(workspace, &projection(), call)
            });
            assert_eq!(
                matches!(done, Err(Error::OtherDevice { what: "a slice that is lent", .. })),
                refused,
                "{done:?}"
            );
        }
        // cudarc's own events keep the two calls that were made in order.
        let log = control.log();
        let launches: Vec<_> =
            log.0.iter().enumerate().filter(|(_, entry)| entry.kernel().is_some()).collect();
        assert!(log.is_before(launches[0].0, launches[launches.len() - 1].0), "{:#?}", log.0);

        let read = here.read(out.as_view()).expect("a slice");
        let recorded = here.stream().capture(|stream| {
            let mut x = stream.zeros::<bf16>(8).err();
            assert!(matches!(x.take(), Some(Error::NotRecordable { .. })));
            let [topk_ids, token_lora] =
                [&engine.layer.inputs.topk_ids, &engine.layer.inputs.token_lora].map(|ids| ids.view());
            let shrink = moe_lora::Shrink {
                tokens: TOKENS,
                routing: (topk_ids, token_lora).into(),
                x: read.view().slice(0..TOKENS * 64).into(),
                a: moe_lora::Factor::Stacked(&engine.layer.inputs.a.each_ref().map(|a| a.view())),
                h: engine.layer.out.view_mut(),
            };
            stream.shrink(&mut engine.workspace, &projection(), shrink).map(drop)
        });
        let refused = recorded.err();
        assert!(
            matches!(refused, Some(Error::NotRecordable { what: "memory that is lent for one call" })),
            "{refused:?}"
        );

        let elsewhere = CudaContext::new(1).expect("a context").default_stream();
        assert!(matches!(CudarcStream::new(&device, elsewhere.clone()), Err(Error::OtherDevice { .. })));
        let slice = elsewhere.alloc_zeros::<bf16>(8).expect("room");
        assert!(matches!(here.read(slice.as_view()), Err(Error::OtherDevice { .. })));
    }

    /// On each kind of stream that cudarc has; the default stream of a thread is another on each.
    pub fn a_slice_is_lent_on_every_kind_of_stream() {
        let control = Control::here();
        let (context, device) =
            (CudaContext::new(0).expect("a context"), Device::untuned(0).expect("a device"));
        let streams = [context.default_stream(), context.per_thread_stream(), context.new_stream().unwrap()];
        let streams = streams.map(|cudarc| CudarcStream::new(&device, cudarc).expect("the same device"));
        for (i, (stream, other)) in streams.iter().zip(streams.iter().cycle().skip(1)).enumerate() {
            let operator = |stream: &CudarcStream| {
                let [operator] =
                    Operator::builder(stream.stream()).max_tokens(1).build([projection()]).expect("room");
                operator
            };
            let (here, there) = (operator(stream), operator(other));
            let memory = context.default_stream();
            let weights = memory.alloc_zeros::<bf16>(2 * 4 * 16 * 64).expect("room");
            let mut ids = memory.alloc_zeros::<u32>(2).expect("room");
            let mut out = memory.alloc_zeros::<bf16>(2 * 64).expect("room");
            memory.memcpy_htod(&[1, u32::MAX], &mut ids).expect("a copy");

            let (weights, ids) =
                (stream.read(weights.as_view()).unwrap(), stream.read(ids.as_view()).unwrap());
            let mut out = stream.write(out.as_view_mut()).unwrap();
            let (weights, ids) = (weights.view(), ids.view().cast::<i32>());
            let call = |operator: &Operator<Stream>, out: ViewMut<'_, Cuda, bf16>| {
                operator
                    .call(weights, [weights; 2], [weights; 2], (ids, ids.slice(1..2)), out)
                    .run()
                    .map(drop)
            };
            call(&here, out.view_mut()).expect("a call");
            let refused = |result: moe_lora::Result<()>| {
                assert!(
                    matches!(result, Err(Error::OtherDevice { what, .. }) if what.contains("lent")),
                    "{result:?}"
                );
            };
            refused(call(&there, out.view_mut()));
            let out = out.view_mut();
            let elsewhere = std::thread::scope(|scope| scope.spawn(|| call(&here, out)).join().unwrap());
            // Another thread's default stream is another.
            if i == 1 { refused(elsewhere) } else { elsewhere.expect("a call") }
        }
        assert_eq!(control.faults(), [""; 0]);
    }
}

/// The driver as another library in the process would call it.
struct Driver(libloading::Library);

impl Driver {
    fn open() -> Self {
        // SAFETY: the fake has no initialisers.
        let library = unsafe { libloading::Library::new(moe_lora_tests::fake::LIBRARY) }.expect("the fake");
        let driver = Driver(library);
        let init = driver.get::<unsafe extern "C" fn(u32) -> u32>("cuInit");
        // SAFETY: as cuda.h has it.
        assert_eq!(unsafe { init(0) }, 0);
        driver
    }

    fn get<T: Copy>(&self, name: &str) -> T {
        // SAFETY: the callers know the signature.
        *unsafe { self.0.get::<T>(name.as_bytes()) }.expect("a function")
    }

    fn retain(&self, device: i32) -> *mut c_void {
        let mut context = std::ptr::null_mut();
        let retain =
            self.get::<unsafe extern "C" fn(*mut *mut c_void, i32) -> u32>("cuDevicePrimaryCtxRetain");
        // SAFETY: as cuda.h has it.
        assert_eq!(unsafe { retain(&mut context, device) }, 0);
        context
    }

    fn release(&self, device: i32) {
        let release = self.get::<unsafe extern "C" fn(i32) -> u32>("cuDevicePrimaryCtxRelease_v2");
        // SAFETY: as cuda.h has it.
        assert_eq!(unsafe { release(device) }, 0);
    }

    fn set_current(&self, context: *mut c_void) {
        let set = self.get::<unsafe extern "C" fn(*mut c_void) -> u32>("cuCtxSetCurrent");
        // SAFETY: as cuda.h has it.
        assert_eq!(unsafe { set(context) }, 0);
    }

    fn current(&self, context: &mut *mut c_void) {
        let current = self.get::<unsafe extern "C" fn(*mut *mut c_void) -> u32>("cuCtxGetCurrent");
        // SAFETY: as cuda.h has it.
        assert_eq!(unsafe { current(context) }, 0);
    }
}
