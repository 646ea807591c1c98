//! Times calls on a GPU: right first, then over graphs of many calls on weights that no cache holds.

mod candidates;
mod inputs;
mod rotation;

pub use candidates::Candidates;
use half::{bf16, f16};
pub use inputs::Choice;
use inputs::Inputs;
use moe_lora::cuda::{self, Stream};
use moe_lora::{
    AdapterEntry, Adapters, Backend, Buffer, Cuda, DType, Element, Expand, Factor, Forward, Layout,
    Projection, Route, Routing, RoutingTensors, Rows, Shrink, SliceOrder, TopkIds, View, Weights,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use rotation::Rotation;
use std::time::Instant;

/// Replays: first some that are not timed.
pub const WARM_UP: usize = 3;
/// Replays that are timed, at most.
pub const REPLAYS: usize = 15;
/// Replays that are timed, at least.
const FEWEST_REPLAYS: usize = 5;
/// Microseconds that all timed replays of a graph may take, where fewer than [`REPLAYS`] do.
const TIMED: f64 = 50e3;
/// Calls that are made one after another while the host is timed: few enough for the driver to queue them.
const QUEUED: usize = 16;
/// Pairs whose output is checked.
const CHECKED_PAIRS: usize = 64;

/// A call to time.
#[derive(Clone, Copy)]
pub struct Workload {
    pub projection: Projection,
    pub tokens: usize,
    /// Rank of every adapter, at most that which the weights are allocated for.
    pub rank: usize,
    /// Whether pairs are weighted, as those of w2 are.
    pub weighted: bool,
    /// Whether both halves are called apart, as where tensor parallelism comes between them.
    pub split: bool,
    /// Whether weights are named by address.
    pub table: bool,
    /// How tokens choose their experts.
    pub choice: Choice,
}

impl Workload {
    /// Its tensors are contiguous and aligned.
    pub fn layout(&self) -> Layout {
        let &Workload { projection, tokens, rank, .. } = self;
        let ranked = rank < projection.sizes().max_rank;
        Layout { table: self.table, ..contiguous(&projection, tokens, ranked) }
    }
}

/// The layout of a call on contiguous, aligned tensors.
pub fn contiguous(projection: &Projection, tokens: usize, ranked: bool) -> Layout {
    Layout { ranked, ..Layout::packed(projection, tokens) }
}

/// Times of a call, in microseconds.
#[derive(Clone, Copy)]
pub struct Times {
    /// With the route of a call before, if it was asked for.
    pub kernels: f64,
    /// With the routing step.
    pub routed: f64,
    /// What a call costs the host, if it was asked for.
    pub host: f64,
    /// Distance from float64.
    pub error: f64,
}

/// What was measured of a call.
pub struct Measured {
    /// What no implementation can go below, in microseconds.
    pub floor: f64,
    /// (slot, expert) with a pair or more.
    pub segments: usize,
    /// On each stream.
    pub times: Vec<Times>,
}

/// The middle one.
pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Microseconds that a call takes the host, which waits for nothing.
pub fn host_time(
    stream: &Stream,
    mut call: impl FnMut() -> moe_lora::Result<Route>,
) -> moe_lora::Result<f64> {
    let mut times = Vec::new();
    for _ in 0..WARM_UP + REPLAYS {
        stream.synchronize()?;
        let start = Instant::now();
        (0..QUEUED).try_for_each(|_| call().map(drop))?;
        times.push(start.elapsed().as_secs_f64() * 1e6 / QUEUED as f64);
    }
    stream.synchronize()?;
    Ok(median(times.split_off(WARM_UP)))
}

/// Microseconds of a graph of `work`: the median of its replays.
fn replayed(stream: &Stream, work: impl FnOnce(&Stream) -> moe_lora::Result<()>) -> moe_lora::Result<f64> {
    let graph = stream.capture(work)?;
    let once = median(graph.time(WARM_UP)?);
    let replays = ((TIMED / once) as usize).clamp(FEWEST_REPLAYS, REPLAYS);
    Ok(median(graph.time(replays)?))
}

/// The pairs whose output is checked, and each one's delta in float64.
fn expected<T: Element>(workload: &Workload, inputs: &Inputs<T>, seed: u64) -> Vec<(usize, Vec<f64>)> {
    let mut rng = StdRng::seed_from_u64(seed + 1);
    let pairs: Vec<_> = (0..CHECKED_PAIRS).map(|_| rng.random_range(0..inputs.topk_ids.len())).collect();
    pairs.into_par_iter().map(|pair| (pair, inputs.delta(workload, pair))).collect()
}

/// Distance of `result`, [P, width], from `times` times what is expected.
fn error<T: Element>(result: &[T], width: usize, times: f64, expected: &[(usize, Vec<f64>)]) -> f64 {
    let (mut wrong, mut right) = (0.0, 0.0);
    for (pair, delta) in expected {
        for (got, delta) in result[pair * width..][..width].iter().zip(delta) {
            wrong += (f64::from(got.to_f32()) - times * delta).powi(2);
            right += (times * delta).powi(2);
        }
    }
    (wrong / right).sqrt()
}

fn views<T: Element>(slices: &[cuda::Buffer<T>]) -> Vec<View<'_, Cuda, T>> {
    slices.iter().map(Buffer::view).collect()
}

/// The table that names a set of stacked weights.
fn entries<T: Element>(projection: &Projection, [a, b]: &[Vec<cuda::Buffer<T>>; 2]) -> Vec<AdapterEntry> {
    let s = projection.sizes();
    let of = |slot: usize, slice: usize| {
        let [a_slot, b_slot] = [s.in_dim, s.out_dims.get(slice)]
            .map(|dim| (slot * s.experts * s.max_rank * dim * DType::SIZE) as u64);
        AdapterEntry {
            rank: s.max_rank as i32,
            max_rank: s.max_rank as u32,
            scaling: 1.0,
            reserved: 0,
            a: a[slice].view().address() + a_slot,
            b: b[slice].view().address() + b_slot,
        }
    };
    (0..s.slots).flat_map(|slot| (0..s.out_dims.len()).map(move |slice| of(slot, slice))).collect()
}

/// Times a call on each of `streams`, after each of which `done` is called. `apart`: with the route of a call
/// before, and on the host, too.
pub fn time(
    streams: &[Stream],
    workload: &Workload,
    seed: u64,
    apart: bool,
    done: impl FnMut(),
) -> anyhow::Result<Measured> {
    match workload.projection.sizes().dtype {
        DType::Bf16 => time_in::<bf16>(streams, workload, seed, apart, done),
        DType::F16 => time_in::<f16>(streams, workload, seed, apart, done),
    }
}

fn time_in<T: Element>(
    streams: &[Stream],
    workload: &Workload,
    seed: u64,
    apart: bool,
    mut done: impl FnMut(),
) -> anyhow::Result<Measured> {
    let stream = &streams[0];
    let &Workload { projection, tokens, rank, weighted, split, table, .. } = workload;
    let s = *projection.sizes();
    let inputs = Inputs::<T>::new(workload, seed);
    let pairs = tokens * s.top_k;
    let expected = expected(workload, &inputs, seed);

    let rotation = Rotation::new(&projection, inputs.touched_bytes(workload), &inputs.experts());
    let ids = (0..rotation.groups).map(|group| stream.upload(&rotation.ids(&inputs.topk_ids, group)));
    let ids = ids.collect::<moe_lora::Result<Vec<_>>>()?;
    let mut workspaces = Vec::new();
    for _ in 0..if apart { rotation.groups } else { 1 } {
        workspaces.push(stream.workspace(&[projection], tokens)?);
    }
    let token_lora = stream.upload(&inputs.token_lora)?;
    let topk_weights = stream.upload(&inputs.topk_weights)?;
    let ranks = stream.upload(&vec![rank as i32; s.slots])?;
    let x = stream.upload(&inputs.x)?;
    let host_weights = inputs.weights(workload);
    let upload =
        |slices: &[Vec<T>]| slices.iter().map(|slice| stream.upload(slice)).collect::<Result<Vec<_>, _>>();
    let weights = (0..rotation.sets)
        .map(|_| Ok([upload(&host_weights[0])?, upload(&host_weights[1])?]))
        .collect::<moe_lora::Result<Vec<[Vec<cuda::Buffer<T>>; 2]>>>()?;
    let tables = weights.iter().map(|set| stream.upload(&entries(&projection, set)));
    let tables = tables.collect::<moe_lora::Result<Vec<_>>>()?;
    let mut h = stream.zeros::<T>(if split { projection.h_elements(tokens)? } else { 0 })?;
    let mut call = |stream: &Stream, out: &mut cuda::Buffer<T>, number: usize, on: Option<Route>| {
        let [set, group] = rotation.of(number);
        let [a, b] = [0, 1].map(|which| views(&weights[set][which]));
        // SAFETY: the entries name the set's own weights, which are aligned, of ranks in multiples of 8.
        let adapters = unsafe { Adapters::new(tables[set].view()) };
        let workspaces_len = workspaces.len();
        let workspace = &mut workspaces[group % workspaces_len];
        let tensors = RoutingTensors {
            ranks: (rank < s.max_rank).then(|| ranks.view()),
            ..RoutingTensors::new(ids[group].view(), token_lora.view())
        };
        let tensors = match (s.experts, s.top_k) {
            (1, 1) => RoutingTensors { topk_ids: TopkIds::None, ..tensors },
            _ => tensors,
        };
        let routing = on.map_or(Routing::Tokens(tensors), Routing::On);
        let factor = |stacked| if table { Factor::Table(adapters) } else { Factor::Stacked(stacked) };
        let topk_weights = weighted.then(|| topk_weights.view());
        let (x, out) = (Rows::from(x.view()), out.view_mut().into());
        let (offset, accumulate) = (0, true);
        if split {
            let shrink = Shrink { tokens, routing, x, a: factor(&a), h: h.view_mut() };
            let routing = stream.shrink(workspace, &projection, shrink)?.into();
            let h = h.view();
            let expand = Expand {
                tokens,
                routing,
                h,
                b: factor(&b),
                topk_weights,
                out,
                offset,
                order: SliceOrder::InOrder,
                accumulate,
            };
            stream.expand(workspace, &projection, expand)
        } else {
            let forward = Forward {
                tokens,
                routing,
                x,
                weights: match table {
                    true => Weights::Table(adapters),
                    false => Weights::Stacked { a: &a, b: &b },
                },
                topk_weights,
                out,
                offset,
                order: SliceOrder::InOrder,
                accumulate,
            };
            stream.forward(workspace, &projection, forward)
        }
    };

    let mut times = Vec::new();
    for stream in streams {
        let mut out = stream.zeros::<T>(pairs * projection.out_width())?;
        // Twice, on a fresh and on a kept route: out was zero, so it now holds twice the delta.
        let route = call(stream, &mut out, 0, None)?;
        call(stream, &mut out, 0, Some(route))?;
        let error = error(&stream.download(&out)?, projection.out_width(), 2.0, &expected);
        // Each of the two sums was rounded to the element type.
        let tolerance = 2.0 * T::DTYPE.tolerance();
        if error.is_nan() || error > tolerance {
            anyhow::bail!("{}: error {error:.1e}, at most {tolerance:.1e} is allowed", stream.variant());
        }

        // The calls' times do not depend on what out holds, as long as it stays finite.
        let calls = rotation.calls();
        let routed = replayed(stream, |stream| {
            (0..calls).try_for_each(|number| call(stream, &mut out, number, None).map(drop))
        })?;
        let (mut kernels, mut host) = (f64::NAN, f64::NAN);
        if apart {
            let mut kept = |repeats: usize| {
                replayed(stream, |stream| {
                    let mut found = Vec::new();
                    for group in 0..rotation.groups {
                        found.push(call(stream, &mut out, group * rotation.sets, None)?);
                    }
                    (0..repeats).try_for_each(|number| {
                        let [_, group] = rotation.of(number);
                        call(stream, &mut out, number, Some(found[group])).map(drop)
                    })
                })
            };
            // A recording finds its own routes: what those calls cost is taken off again.
            kernels = (kept(calls)? - kept(0)?) / calls as f64;
            host = host_time(stream, || call(stream, &mut out, 0, None))?;
        }
        times.push(Times { kernels, routed: routed / calls as f64, host, error });
        done();
    }
    let floor = inputs.floor(workload, &stream.device().limits());
    Ok(Measured { floor, segments: inputs.segments(s.top_k), times })
}
