//! Times calls on a GPU: right first, then over graphs of many calls on weights that no cache holds.

use moe_lora::cuda::{self, Stream};
use moe_lora::plan::DeviceLimits;
use moe_lora::{
    Backend, Buffer, Cuda, DType, Element, Expand, Forward, Projection, Route, Routing, RoutingTensors, Rows,
    Shrink, View, XRows,
};
use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use std::time::Instant;

/// 16-bit operations a microsecond that a large matrix product reaches on an H100 or H200.
const OPERATIONS: f64 = 790e6;
/// Bytes of weights that the calls on all sets touch: several times an H100's 50 MB of L2, or an H200's 60.
const ROTATION_BYTES: usize = 200_000_000;
/// Most bytes of all sets.
const MAX_BYTES: usize = 8_000_000_000;
/// Calls in a graph, at least.
const MIN_CALLS: usize = 8;
/// Replays: first some that are not timed.
pub const WARM_UP: usize = 3;
pub const REPLAYS: usize = 15;
/// Calls that are made one after another while the host is timed: few enough for the driver to queue them all.
const QUEUED: usize = 16;
/// Sequences of a batch; each has one adapter.
const SEQUENCES: usize = 16;
/// Pairs whose output is checked.
const CHECKED_PAIRS: usize = 64;
/// Normal values that weights are made of, over and over; a prime, so that no two rows are alike.
const POOL: usize = 1_000_003;

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
}

/// A call's inputs, on the host.
struct Inputs<T> {
    topk_ids: Vec<i32>,
    topk_weights: Vec<f32>,
    token_lora: Vec<i32>,
    x: Vec<T>,
    a: Vec<Vec<T>>,
    b: Vec<Vec<T>>,
}

impl<T: Element> Inputs<T> {
    fn new(&Workload { projection, tokens, .. }: &Workload, rng: &mut StdRng) -> Self {
        let s = projection.sizes();
        let pool: Vec<f32> = (0..POOL).map(|_| rng.sample(StandardNormal)).collect();
        let mut tensor = |len: usize, scale: f32| -> Vec<T> {
            let start = rng.random_range(0..POOL);
            pool.iter().cycle().skip(start).take(len).map(|value| T::from_f32(value * scale)).collect()
        };
        let x_rows = match s.x_rows {
            XRows::Token => tokens,
            XRows::Pair => tokens * s.top_k,
        };
        let x = tensor(x_rows * s.in_dim, 1.0);
        let a_len = s.slots * s.experts * s.max_rank * s.in_dim;
        let b_len = s.slots * s.experts * s.max_rank * s.out_dim;
        let a = (0..s.slices).map(|_| tensor(a_len, (s.in_dim as f32).powf(-0.5))).collect();
        let b = (0..s.slices).map(|_| tensor(b_len, (s.max_rank as f32).powf(-0.5))).collect();
        let topk_ids = (0..tokens).flat_map(|_| sample(rng, s.experts, s.top_k)).map(|e| e as i32).collect();
        let topk_weights = (0..tokens * s.top_k).map(|_| rng.random_range(0.05..1.0)).collect();
        // Whole sequences share an adapter.
        let run = tokens.div_ceil(tokens.min(SEQUENCES));
        let token_lora = (0..tokens).map(|t| (t / run % s.slots) as i32).collect();
        Inputs { topk_ids, topk_weights, token_lora, x, a, b }
    }

    /// Which (slot, expert) a pair uses.
    fn segment(&self, pair: usize, top_k: usize) -> (usize, usize) {
        (self.token_lora[pair / top_k] as usize, self.topk_ids[pair] as usize)
    }

    /// One pair's delta, in float64.
    fn delta(&self, &Workload { projection, rank, weighted, .. }: &Workload, pair: usize) -> Vec<f64> {
        let s = projection.sizes();
        let (slot, expert) = self.segment(pair, s.top_k);
        let matrix = slot * s.experts + expert;
        let row = if s.x_rows == XRows::Pair { pair } else { pair / s.top_k };
        let dot = |v: &[T], w: &[f64]| v.iter().zip(w).map(|(v, w)| f64::from(v.to_f32()) * w).sum::<f64>();
        let x: Vec<f64> = self.x[row * s.in_dim..][..s.in_dim].iter().map(|v| v.to_f32().into()).collect();
        let weight = if weighted { f64::from(self.topk_weights[pair]) } else { 1.0 };
        (0..s.slices)
            .flat_map(|slice| {
                let a = &self.a[slice][matrix * s.max_rank * s.in_dim..][..rank * s.in_dim];
                let b = &self.b[slice][matrix * s.max_rank * s.out_dim..][..s.max_rank * s.out_dim];
                let h: Vec<f64> = a.chunks(s.in_dim).map(|row| dot(row, &x)).collect();
                b.chunks(s.max_rank).map(|row| weight * dot(&row[..rank], &h)).collect::<Vec<_>>()
            })
            .collect()
    }
}

/// Times in microseconds.
pub struct Times {
    /// With the route of the call before.
    pub kernels: f64,
    /// With the routing step.
    pub routed: f64,
    /// What a call costs the host.
    pub host: f64,
    /// What no implementation can go below.
    pub floor: f64,
    /// Distance from float64.
    pub error: f64,
}

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

/// Elements of weights that a call touches.
fn touched<T: Element>(&Workload { projection, rank, .. }: &Workload, inputs: &Inputs<T>) -> usize {
    let s = projection.sizes();
    let mut segments: Vec<_> = (0..inputs.topk_ids.len()).map(|pair| inputs.segment(pair, s.top_k)).collect();
    segments.sort_unstable();
    segments.dedup();
    segments.len() * rank * (s.in_dim + s.out_dim) * s.slices
}

/// Microseconds that no implementation can go below on a device of these limits.
fn floor<T: Element>(workload: &Workload, inputs: &Inputs<T>, limits: &DeviceLimits) -> f64 {
    let &Workload { projection, rank, .. } = workload;
    let s = projection.sizes();
    let pairs = inputs.topk_ids.len();
    let elements = touched(workload, inputs) + inputs.x.len() + 2 * pairs * s.out_dim * s.slices;
    let operations = 2 * pairs * rank * (s.in_dim + s.out_dim) * s.slices;
    ((elements * DType::SIZE) as f64 / limits.streamed()).max(operations as f64 / OPERATIONS)
}

fn views<T: Element>(slices: &[cuda::Buffer<T>]) -> Vec<View<'_, Cuda, T>> {
    slices.iter().map(Buffer::view).collect()
}

/// Times of a call run on each of `streams`, after each of which `done` is called.
pub fn time<T: Element>(
    streams: &[Stream],
    workload: &Workload,
    seed: u64,
    mut done: impl FnMut(),
) -> anyhow::Result<Vec<Times>> {
    let stream = &streams[0];
    let &Workload { projection, tokens, rank, weighted, split } = workload;
    let s = *projection.sizes();
    let inputs = Inputs::<T>::new(workload, &mut StdRng::seed_from_u64(seed));
    let pairs = tokens * s.top_k;

    let [topk_ids, token_lora] = [&inputs.topk_ids, &inputs.token_lora].map(|ids| stream.upload(ids));
    let (topk_ids, token_lora) = (topk_ids?, token_lora?);
    let topk_weights = stream.upload(&inputs.topk_weights)?;
    let ranks = stream.upload(&vec![rank as i32; s.slots])?;
    let x = stream.upload(&inputs.x)?;
    let set_bytes = (inputs.a.iter().chain(&inputs.b).map(Vec::len).sum::<usize>()) * DType::SIZE;
    let touched_bytes = touched(workload, &inputs) * DType::SIZE;
    let sets = (ROTATION_BYTES / touched_bytes + 1).min(MAX_BYTES / set_bytes).max(1);
    let upload =
        |slices: &[Vec<T>]| slices.iter().map(|slice| stream.upload(slice)).collect::<Result<Vec<_>, _>>();
    let weights = (0..sets)
        .map(|_| Ok((upload(&inputs.a)?, upload(&inputs.b)?)))
        .collect::<moe_lora::Result<Vec<(Vec<cuda::Buffer<T>>, Vec<cuda::Buffer<T>>)>>>()?;
    let zeros = vec![T::from_f32(0.0); pairs * projection.out_width()];
    let mut out = stream.upload(&zeros)?;
    let mut h =
        stream.upload(&vec![T::from_f32(0.0); if split { projection.h_elements(tokens)? } else { 0 }])?;
    let mut workspace = stream.workspace(&[projection], tokens)?;
    let tensors = RoutingTensors {
        ranks: (rank < s.max_rank).then(|| ranks.view()),
        ..RoutingTensors::new(topk_ids.view(), token_lora.view())
    };
    let mut call = |stream: &Stream, out: &mut cuda::Buffer<T>, set: usize, on: Option<Route>| {
        let (a, b) = (views(&weights[set].0), views(&weights[set].1));
        let routing = on.map_or(Routing::Tokens(tensors), Routing::On);
        let topk_weights = weighted.then(|| topk_weights.view());
        let (x, out) = (Rows::from(x.view()), out.view_mut().into());
        let (offset, accumulate) = (0, true);
        if split {
            let shrink = Shrink { tokens, routing, x, a: &a, h: h.view_mut() };
            let routing = stream.shrink(&mut workspace, &projection, shrink)?.into();
            let h = h.view();
            let expand = Expand { tokens, routing, h, b: &b, topk_weights, out, offset, accumulate };
            stream.expand(&mut workspace, &projection, expand)
        } else {
            let forward = Forward { tokens, routing, x, a: &a, b: &b, topk_weights, out, offset, accumulate };
            stream.forward(&mut workspace, &projection, forward)
        }
    };

    let mut times = Vec::new();
    for stream in streams {
        stream.write(&mut out, 0, &zeros)?;
        // Twice, on a fresh and on a kept route: out was zero, so it now holds twice the delta.
        let route = call(stream, &mut out, 0, None)?;
        call(stream, &mut out, 0, Some(route))?;
        let result = stream.download(&out)?;
        let mut rng = StdRng::seed_from_u64(seed + 1);
        let (mut wrong, mut right) = (0.0, 0.0);
        for _ in 0..CHECKED_PAIRS {
            let pair = rng.random_range(0..pairs);
            let width = projection.out_width();
            for (got, delta) in result[pair * width..][..width].iter().zip(inputs.delta(workload, pair)) {
                wrong += (f64::from(got.to_f32()) - 2.0 * delta).powi(2);
                right += (2.0 * delta).powi(2);
            }
        }
        let error = (wrong / right).sqrt();
        // Each of the two sums was rounded to the element type.
        let tolerance = 2.0 * T::DTYPE.tolerance();
        if error.is_nan() || error > tolerance {
            anyhow::bail!("{}: error {error:.1e}, at most {tolerance:.1e} is allowed", stream.variant());
        }

        // The graphs: the calls' times do not depend on what out holds, as long as it stays finite.
        let calls = MIN_CALLS.div_ceil(sets) * sets;
        let mut replayed = |repeats: usize, kept: bool| -> moe_lora::Result<f64> {
            let graph = stream.capture(|stream| {
                let mut route = None;
                (0..repeats).try_for_each(|i| {
                    let found = call(stream, &mut out, i % sets, route)?;
                    route = kept.then_some(found);
                    Ok(())
                })
            })?;
            graph.time(WARM_UP)?;
            Ok(median(graph.time(REPLAYS)?))
        };
        // A recording finds its own route: what the first call costs is taken off again.
        let kernels = (replayed(1 + calls, true)? - replayed(1, true)?) / calls as f64;
        let routed = replayed(calls, false)? / calls as f64;
        let host = host_time(stream, || call(stream, &mut out, 0, None))?;
        times.push(Times {
            kernels,
            routed,
            host,
            floor: floor(workload, &inputs, &stream.device().limits()),
            error,
        });
        done();
    }
    Ok(times)
}
