use crate::DTypeArg;
use anyhow::Context;
use half::{bf16, f16};
use moe_lora::cuda::{DecodeRows, DeviceBuffer, Form, Gpu, Options, PrefillTile, Queue, TileKind, Workspace};
use moe_lora::{
    Backend, Buffer, DType, Device, Element, Enabled, ExpertWeights, Forward, Projection, ProjectionSizes,
    Route, RoutingTensors, Rows, View, XRows,
};
use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use std::time::Instant;

#[derive(clap::Args)]
#[command(after_help = "\
time   of shrink and expand: the median over replays of a CUDA graph that calls the operator on one set of
       weights after another, together larger than the L2 cache, as the layers of a model would
route  what routing adds to that
host   what a call with its routing costs the thread that makes it, outside a graph
floor  the bytes that must move (each touched weight once, x once, out read and written) at 3.0 TB/s, or the
       operations at 790 TFLOP/s, whichever takes longer: an H100's
error  distance from float64 at randomly drawn pairs; a wrong result is not timed

Examples:
  moe-lora bench
  moe-lora bench --tokens 1,80,1024 --op w13
  moe-lora bench --route --route-blocks 1,8,64")]
pub struct Args {
    /// Only cases of these numbers of tokens
    #[arg(long, value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Only cases of this projection: w13 or w2
    #[arg(long)]
    op: Option<String>,
    /// Only cases of this rank
    #[arg(long)]
    rank: Option<usize>,
    /// Type of activations and weights
    #[arg(long, default_value = "bf16")]
    dtype: DTypeArg,
    /// Only this tile, where it can be had: m16, m32, m64 or any
    #[arg(long, value_parser = tile)]
    tile: Option<TileKind>,
    /// Time every form, tile and cluster that a plan could choose, too
    #[arg(long, conflicts_with = "tile")]
    every_way: bool,
    /// Time those of them whose names hold one of these, besides the plan's own
    #[arg(long, value_delimiter = ',', conflicts_with = "tile")]
    ways: Vec<String>,
    /// Time the route alone, on --tokens of 8 pairs each, 128 experts and 2 adapters
    #[arg(long, conflicts_with_all = ["op", "tile", "every_way"])]
    route: bool,
    /// Blocks of the route: the planner's choice without; several are timed in turn
    #[arg(long, value_delimiter = ',', requires = "route")]
    route_blocks: Vec<u32>,
    /// Device number
    #[arg(long, default_value_t = 0)]
    device: u32,
}

fn tile(name: &str) -> Result<TileKind, String> {
    let named = |tile: &TileKind| format!("{tile:?}").eq_ignore_ascii_case(name);
    TileKind::ALL.into_iter().find(named).ok_or_else(|| "expected m16, m32, m64 or any".to_owned())
}

/// A model's MoE layer.
struct Model {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    top_k: usize,
}

const QWEN3_30B: Model =
    Model { name: "qwen3-30b-a3b", hidden: 2048, intermediate: 768, experts: 128, top_k: 8 };
const GPT_OSS_20B: Model =
    Model { name: "gpt-oss-20b", hidden: 2880, intermediate: 2880, experts: 32, top_k: 4 };
const OLMOE_1B: Model =
    Model { name: "olmoe-1b-7b", hidden: 2048, intermediate: 1024, experts: 64, top_k: 8 };

struct Case {
    model: &'static Model,
    op: &'static str,
    tokens: usize,
    rank: usize,
    loras: usize,
}

fn cases() -> Vec<Case> {
    let case = |model, op, rank, loras| move |tokens| Case { model, op, tokens, rank, loras };
    let mut cases = Vec::new();
    cases.extend([1, 4, 16, 80, 256, 1024, 4096, 16384].map(case(&QWEN3_30B, "w13", 64, 2)));
    cases.extend([80, 2048].map(case(&QWEN3_30B, "w13", 16, 2)));
    cases.extend([1, 16, 80, 1024, 4096, 16384].map(case(&QWEN3_30B, "w2", 64, 2)));
    cases.extend([64, 2048].map(case(&GPT_OSS_20B, "w13", 32, 4)));
    cases.extend([64].map(case(&OLMOE_1B, "w13", 16, 8)));
    cases
}

/// Bytes a second that a stream reaches on an H100.
const BANDWIDTH: f64 = 3.0e12;
/// 16-bit operations a second that a large matrix product reaches on an H100.
const OPERATIONS: f64 = 790e12;
/// Weights of all sets together: several times an H100's 50 MB of L2.
const ROTATION_BYTES: usize = 400_000_000;
/// Most sets of weights.
const MAX_SETS: usize = 12;
/// Calls in a graph, at least.
const MIN_CALLS: usize = 8;
/// Replays: first some that are not timed.
const WARM_UP: usize = 3;
const REPLAYS: usize = 15;
/// Calls that are made one after another while the host is timed: few enough for the driver to queue them all.
const QUEUED: usize = 16;
/// Sequences of a batch; each has one adapter.
const SEQUENCES: usize = 16;
/// Pairs whose output is checked.
const CHECKED_PAIRS: usize = 64;
/// Normal values that weights are made of, over and over; a prime, so that no two rows are alike.
const POOL: usize = 1_000_003;

impl Case {
    fn projection(&self, dtype: DType) -> moe_lora::Result<Projection> {
        let Model { hidden, intermediate, experts, top_k, .. } = *self.model;
        let (in_dim, out_dim, slices, x_rows) = match self.op {
            "w13" => (hidden, intermediate, 2, XRows::Token),
            _ => (intermediate, hidden, 1, XRows::Pair),
        };
        Projection::new(ProjectionSizes {
            dtype,
            top_k,
            experts,
            slots: self.loras,
            max_rank: self.rank,
            slices,
            in_dim,
            out_dim,
            x_rows,
            a_experts: ExpertWeights::PerExpert,
            b_experts: ExpertWeights::PerExpert,
        })
    }
}

/// One case's inputs, on the host.
struct Inputs<T> {
    topk_ids: Vec<i32>,
    topk_weights: Vec<f32>,
    token_lora: Vec<i32>,
    x: Vec<T>,
    a: Vec<Vec<T>>,
    b: Vec<Vec<T>>,
}

impl<T: Element> Inputs<T> {
    fn new(case: &Case, projection: &Projection, rng: &mut StdRng) -> Self {
        let s = projection.sizes();
        let pool: Vec<f32> = (0..POOL).map(|_| rng.sample(StandardNormal)).collect();
        let mut tensor = |len: usize, scale: f32| -> Vec<T> {
            let start = rng.random_range(0..POOL);
            pool.iter().cycle().skip(start).take(len).map(|value| T::from_f32(value * scale)).collect()
        };
        let x_rows = match s.x_rows {
            XRows::Token => case.tokens,
            XRows::Pair => case.tokens * s.top_k,
        };
        let x = tensor(x_rows * s.in_dim, 1.0);
        let a_len = s.slots * s.experts * s.max_rank * s.in_dim;
        let b_len = s.slots * s.experts * s.max_rank * s.out_dim;
        let a = (0..s.slices).map(|_| tensor(a_len, (s.in_dim as f32).powf(-0.5))).collect();
        let b = (0..s.slices).map(|_| tensor(b_len, (s.max_rank as f32).powf(-0.5))).collect();
        let topk_ids =
            (0..case.tokens).flat_map(|_| sample(rng, s.experts, s.top_k)).map(|e| e as i32).collect();
        let topk_weights = (0..case.tokens * s.top_k).map(|_| rng.random_range(0.05..1.0)).collect();
        // Whole sequences share an adapter.
        let run = case.tokens.div_ceil(case.tokens.min(SEQUENCES));
        let token_lora = (0..case.tokens).map(|t| (t / run % case.loras) as i32).collect();
        Inputs { topk_ids, topk_weights, token_lora, x, a, b }
    }

    /// Which (slot, expert) a pair uses.
    fn segment(&self, pair: usize, top_k: usize) -> (usize, usize) {
        (self.token_lora[pair / top_k] as usize, self.topk_ids[pair] as usize)
    }

    /// One pair's delta, in float64.
    fn delta(&self, projection: &Projection, pair: usize, weighted: bool) -> Vec<f64> {
        let s = projection.sizes();
        let (slot, expert) = self.segment(pair, s.top_k);
        let matrix = slot * s.experts + expert;
        let row = if s.x_rows == XRows::Pair { pair } else { pair / s.top_k };
        let dot = |v: &[T], w: &[f64]| v.iter().zip(w).map(|(v, w)| f64::from(v.to_f32()) * w).sum::<f64>();
        let x: Vec<f64> = self.x[row * s.in_dim..][..s.in_dim].iter().map(|v| v.to_f32().into()).collect();
        let weight = if weighted { f64::from(self.topk_weights[pair]) } else { 1.0 };
        (0..s.slices)
            .flat_map(|slice| {
                let a = &self.a[slice][matrix * s.max_rank * s.in_dim..][..s.max_rank * s.in_dim];
                let b = &self.b[slice][matrix * s.max_rank * s.out_dim..][..s.max_rank * s.out_dim];
                let h: Vec<f64> = a.chunks(s.in_dim).map(|row| dot(row, &x)).collect();
                b.chunks(s.max_rank).map(|row| weight * dot(row, &h)).collect::<Vec<_>>()
            })
            .collect()
    }
}

/// Times in microseconds.
struct Times {
    /// With the route of the call before.
    kernels: f64,
    /// With the routing step.
    routed: f64,
    /// What a call costs the host.
    host: f64,
    floor: f64,
    error: f64,
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Microseconds that a call takes the host, which waits for nothing.
fn host_time(queue: &Queue<'_>, mut call: impl FnMut() -> moe_lora::Result<()>) -> moe_lora::Result<f64> {
    let mut times = Vec::new();
    for _ in 0..WARM_UP + REPLAYS {
        queue.synchronize()?;
        let start = Instant::now();
        (0..QUEUED).try_for_each(|_| call())?;
        times.push(start.elapsed().as_secs_f64() * 1e6 / QUEUED as f64);
    }
    queue.synchronize()?;
    Ok(median(times.split_off(WARM_UP)))
}

/// Time that no implementation can go below.
fn floor<T: Element>(projection: &Projection, inputs: &Inputs<T>) -> f64 {
    let s = projection.sizes();
    let pairs = inputs.topk_ids.len();
    let mut touched: Vec<_> = (0..pairs).map(|pair| inputs.segment(pair, s.top_k)).collect();
    touched.sort_unstable();
    touched.dedup();
    let matrices = touched.len() * s.max_rank * (s.in_dim + s.out_dim) * s.slices;
    let elements = matrices + inputs.x.len() + 2 * pairs * s.out_dim * s.slices;
    let operations = 2 * pairs * s.max_rank * (s.in_dim + s.out_dim) * s.slices;
    ((elements * DType::SIZE) as f64 / BANDWIDTH).max(operations as f64 / OPERATIONS) * 1e6
}

/// Times of the case run in each of `ways`.
fn time<T: Element>(queues: &[Queue<'_>], case: &Case, seed: u64) -> anyhow::Result<Vec<Times>> {
    let queue = &queues[0];
    let projection = case.projection(T::DTYPE)?;
    let s = *projection.sizes();
    let inputs = Inputs::<T>::new(case, &projection, &mut StdRng::seed_from_u64(seed));
    let pairs = case.tokens * s.top_k;
    let weighted = case.op == "w2";

    let [topk_ids, token_lora] = [&inputs.topk_ids, &inputs.token_lora].map(|ids| queue.upload(ids));
    let (topk_ids, token_lora) = (topk_ids?, token_lora?);
    let topk_weights = queue.upload(&inputs.topk_weights)?;
    let x = queue.upload(&inputs.x)?;
    let set_bytes = (inputs.a.iter().chain(&inputs.b).map(Vec::len).sum::<usize>()) * DType::SIZE;
    let sets = (ROTATION_BYTES / set_bytes + 1).clamp(1, MAX_SETS);
    let upload =
        |slices: &[Vec<T>]| slices.iter().map(|slice| queue.upload(slice)).collect::<Result<Vec<_>, _>>();
    let weights = (0..sets)
        .map(|_| Ok((upload(&inputs.a)?, upload(&inputs.b)?)))
        .collect::<moe_lora::Result<Vec<(Vec<DeviceBuffer<T>>, Vec<DeviceBuffer<T>>)>>>()?;
    let views = |slices: &[DeviceBuffer<T>]| -> Vec<View<'_, Device, T>> {
        // SAFETY: the buffers outlive the graphs below.
        slices.iter().map(|slice| unsafe { View::from_raw(slice.view().address(), slice.len()) }).collect()
    };
    let zeros = vec![T::from_f32(0.0); pairs * projection.out_width()];
    let mut out = queue.upload(&zeros)?;
    let mut workspace = queue.workspace(&[projection], case.tokens)?;
    let mut call = |queue: &Queue<'_>, out: &mut DeviceBuffer<T>, set: usize, kept: bool| {
        let (a, b) = (views(&weights[set].0), views(&weights[set].1));
        let routing = RoutingTensors {
            topk_ids: topk_ids.view(),
            token_lora: token_lora.view(),
            adapter_enabled: Enabled::All,
            ranks: None,
            expert_map: None,
        };
        queue.forward(
            &mut workspace,
            &projection,
            Forward {
                tokens: case.tokens,
                route: if kept { Route::Kept } else { Route::From(routing) },
                x: Rows::from(x.view()),
                a: &a,
                b: &b,
                topk_weights: weighted.then(|| topk_weights.view()),
                out: out.view_mut().into(),
                offset: 0,
                accumulate: true,
            },
        )
    };

    let mut times = Vec::new();
    for queue in queues {
        queue.write(&mut out, 0, &zeros)?;
        // Twice, on a fresh and on a kept route: out was zero, so it now holds twice the delta.
        call(queue, &mut out, 0, false)?;
        call(queue, &mut out, 0, true)?;
        let result = queue.download(&out)?;
        let mut rng = StdRng::seed_from_u64(seed + 1);
        let (mut wrong, mut right) = (0.0, 0.0);
        for _ in 0..CHECKED_PAIRS {
            let pair = rng.random_range(0..pairs);
            let width = projection.out_width();
            for (got, delta) in
                result[pair * width..][..width].iter().zip(inputs.delta(&projection, pair, weighted))
            {
                wrong += (f64::from(got.to_f32()) - 2.0 * delta).powi(2);
                right += (2.0 * delta).powi(2);
            }
        }
        let error = (wrong / right).sqrt();
        // Each of the two sums was rounded to the element type.
        let tolerance = 2.0 * T::DTYPE.tolerance();
        if error.is_nan() || error > tolerance {
            anyhow::bail!("{}: error {error:.1e}, at most {tolerance:.1e} is allowed", queue.variant());
        }

        // The graphs: the calls' times do not depend on what out holds, as long as it stays finite.
        let calls = MIN_CALLS.div_ceil(sets) * sets;
        let mut measured = Vec::new();
        for kept in [true, false] {
            // SAFETY: every buffer outlives the graph.
            let graph = unsafe {
                queue.capture(|queue| (0..calls).try_for_each(|i| call(queue, &mut out, i % sets, kept)))
            }?;
            queue.time(&graph, WARM_UP)?;
            measured.push(median(queue.time(&graph, REPLAYS)?) / calls as f64);
        }
        let [kernels, routed] = measured[..] else { unreachable!("two graphs were timed") };
        let host = host_time(queue, || call(queue, &mut out, 0, false))?;
        times.push(Times { kernels, routed, host, floor: floor(&projection, &inputs), error });
    }
    Ok(times)
}

pub fn bench(args: &Args) -> anyhow::Result<()> {
    let gpu = Gpu::new(args.device)?;
    println!("{}", gpu.info());
    if args.route {
        return bench_routes(&gpu, args);
    }
    let is_wanted = |way: &Options| {
        let name = way.name("");
        *way == Options::default() || args.every_way || args.ways.iter().any(|part| name.contains(part))
    };
    let ways = match args.tile {
        Some(_) => vec![Options { tile: args.tile, ..Options::default() }],
        None => ways().into_iter().filter(is_wanted).collect(),
    };
    let queues = ways.into_iter().map(|options| gpu.queue(options)).collect::<Result<Vec<_>, _>>()?;
    println!(
        "| model | op | T | R | adapters | way | floor µs | time µs | with routing | × floor | host µs | error |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    let wanted = |case: &Case| {
        (args.tokens.is_empty() || args.tokens.contains(&case.tokens))
            && args.op.as_deref().is_none_or(|op| op == case.op)
            && args.rank.is_none_or(|rank| rank == case.rank)
    };
    for (seed, case) in cases().into_iter().enumerate().filter(|(_, case)| wanted(case)) {
        let timed = match args.dtype {
            DTypeArg::Bf16 => time::<bf16>(&queues, &case, seed as u64),
            DTypeArg::F16 => time::<f16>(&queues, &case, seed as u64),
        };
        let Case { model, op, tokens, rank, loras } = case;
        let name = model.name;
        let timed = timed.with_context(|| format!("{name} {op} T={tokens} R={rank}"))?;
        for (queue, Times { kernels, routed, host, floor, error }) in queues.iter().zip(timed) {
            let (way, ratio) = (queue.variant(), routed / floor);
            println!(
                "| {name} | {op} | {tokens} | {rank} | {loras} | {way} | {floor:.1} | {kernels:.1} | {routed:.1} | {ratio:.2} | {host:.2} | {error:.1e} |"
            );
        }
    }
    Ok(())
}

/// Numbers of tokens whose routes are timed: 640, 8,192, 131,072 and 1,048,576 pairs.
const ROUTE_TOKENS: [usize; 4] = [80, 1024, 16_384, 131_072];
/// Routes in a graph.
const ROUTES: usize = 20;

fn bench_routes(gpu: &Gpu, args: &Args) -> anyhow::Result<()> {
    let mut ways = vec![Options::default()];
    ways.extend(
        args.route_blocks.iter().map(|&blocks| Options { route_blocks: Some(blocks), ..Options::default() }),
    );
    let tokens = if args.tokens.is_empty() { &ROUTE_TOKENS } else { args.tokens.as_slice() };
    println!("| pairs | way | µs | host µs |\n|---|---|---|---|");
    for (seed, &tokens) in (0..).zip(tokens) {
        let case = Case { model: &QWEN3_30B, op: "w13", tokens, rank: 64, loras: 2 };
        for way in &ways {
            let queue = gpu.queue(*way)?;
            let (time, host) =
                time_route(&queue, &case, seed).with_context(|| format!("T={tokens}, {way:?}"))?;
            println!("| {} | {} | {time:.2} | {host:.2} |", tokens * case.model.top_k, queue.variant());
        }
    }
    Ok(())
}

/// Microseconds of a route on the device, and of the thread that asks for it.
fn time_route(queue: &Queue<'_>, case: &Case, seed: u64) -> anyhow::Result<(f64, f64)> {
    let projection = case.projection(DType::Bf16)?;
    let s = *projection.sizes();
    let mut workspace = queue.workspace(&[projection], case.tokens)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut draw = || -> (Vec<i32>, Vec<i32>) {
        let experts = (0..case.tokens).flat_map(|_| sample(&mut rng, s.experts, s.top_k));
        let topk_ids = experts.map(|e| e as i32).collect();
        // One token in nine has no adapter.
        (
            topk_ids,
            (0..case.tokens)
                .map(|_| rng.random_range(-1..8))
                .map(|l| if l < 0 { l } else { l % 2 })
                .collect(),
        )
    };
    let (topk_ids, token_lora) = draw();
    let (mut ids_on_device, mut lora_on_device) = (queue.upload(&topk_ids)?, queue.upload(&token_lora)?);
    check_route(queue, &projection, &mut workspace, (&topk_ids, &token_lora), |workspace| {
        queue.route(workspace, &projection, case.tokens, routing(&ids_on_device, &lora_on_device))
    })?;
    // SAFETY: every buffer outlives the graph.
    let graph = unsafe {
        queue.capture(|queue| {
            (0..ROUTES).try_for_each(|_| {
                queue.route(
                    &mut workspace,
                    &projection,
                    case.tokens,
                    routing(&ids_on_device, &lora_on_device),
                )
            })
        })
    }?;
    // Other routing in the buffers that the graph names.
    for _ in 0..3 {
        let (topk_ids, token_lora) = draw();
        queue.write(&mut ids_on_device, 0, &topk_ids)?;
        queue.write(&mut lora_on_device, 0, &token_lora)?;
        check_route(queue, &projection, &mut workspace, (&topk_ids, &token_lora), |_| queue.replay(&graph))?;
    }
    queue.time(&graph, WARM_UP)?;
    let time = median(queue.time(&graph, REPLAYS)?) / ROUTES as f64;
    let host = host_time(queue, || {
        queue.route(&mut workspace, &projection, case.tokens, routing(&ids_on_device, &lora_on_device))
    })?;
    Ok((time, host))
}

fn routing<'a>(
    topk_ids: &'a DeviceBuffer<i32>,
    token_lora: &'a DeviceBuffer<i32>,
) -> RoutingTensors<'a, Device> {
    RoutingTensors {
        topk_ids: topk_ids.view(),
        token_lora: token_lora.view(),
        adapter_enabled: Enabled::All,
        ranks: None,
        expert_map: None,
    }
}

/// Lets `route` fill the workspace, and holds what it leaves against the same done plainly, to the bit.
fn check_route(
    queue: &Queue<'_>,
    projection: &Projection,
    workspace: &mut Workspace,
    (topk_ids, token_lora): (&[i32], &[i32]),
    route: impl FnOnce(&mut Workspace) -> moe_lora::Result<()>,
) -> anyhow::Result<()> {
    let s = projection.sizes();
    route(workspace)?;
    let got = queue.download_route(workspace, topk_ids.len())?;
    let inactive = s.slots * s.experts;
    let bucket = |pair: usize| match token_lora[pair / s.top_k] {
        -1 => inactive,
        slot => slot as usize * s.experts + topk_ids[pair] as usize,
    };
    let mut segments = vec![Vec::new(); inactive + 1];
    (0..topk_ids.len()).for_each(|pair| segments[bucket(pair)].push(pair as u32));
    let mut tiles = got.tiles.iter();
    let mut first = 0;
    for (bucket, segment) in segments.iter().enumerate() {
        if bucket == inactive {
            anyhow::ensure!(
                got.tiles.len() - tiles.len() == got.active_tiles,
                "wrong number of active tiles"
            );
        }
        anyhow::ensure!(got.pairs[first..][..segment.len()] == *segment, "wrong pairs in bucket {bucket}");
        let (mut at, end) = (first as u32, (first + segment.len()) as u32);
        while at < end {
            let tile = tiles.next().context("too few tiles")?;
            let rank = if bucket == inactive { 0 } else { s.max_rank as u32 };
            let place = (tile.slot as usize, tile.expert as usize, tile.first, tile.rank);
            anyhow::ensure!(
                place == (bucket / s.experts, bucket % s.experts, at, rank),
                "wrong tile: {tile:?}"
            );
            anyhow::ensure!(tile.rows > 0 && tile.rows <= end - at, "wrong rows: {tile:?}");
            at += tile.rows;
        }
        first += segment.len();
    }
    anyhow::ensure!(tiles.next().is_none(), "too many tiles");
    Ok(())
}

/// As planned, and every form, tile and cluster that a plan could choose.
fn ways() -> Vec<Options> {
    let mut ways = vec![Options::default()];
    for rows in DecodeRows::ALL {
        ways.extend([1, 2, 4, 8].map(|cluster| Options {
            form: Some(Form::Decode),
            rows: Some(rows),
            cluster: Some(cluster),
            ..Options::default()
        }));
    }
    ways.extend(
        PrefillTile::ALL.map(|tile| Options { form: Some(Form::Prefill(tile)), ..Options::default() }),
    );
    let tiles = [TileKind::M16, TileKind::M32, TileKind::M64];
    ways.extend(tiles.map(|tile| Options { tile: Some(tile), ..Options::default() }));
    ways.push(Options { form: Some(Form::TwoLaunches), ..Options::default() });
    ways
}
