use crate::DTypeArg;
use crate::measure::{REPLAYS, Times, WARM_UP, Workload, host_time, median, time};
use crate::models::{GPT_OSS_20B, MIXTRAL_8X7B, Model, OLMOE_1B, Op, QWEN3_30B};
use anyhow::Context;
use half::{bf16, f16};
use moe_lora::cuda::{Device, Options, Stream, TileKind, Workspace};
use moe_lora::tuning::ways;
use moe_lora::{Backend, Buffer, DType, Projection, RoutingTensors};
use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};

#[derive(clap::Args)]
#[command(after_help = "\
time   of shrink and expand: the median over replays of a CUDA graph that calls the operator on one set of
       weights after another, together larger than the L2 cache, as the layers of a model would
route  what routing adds to that
host   what a call with its routing costs the thread that makes it, outside a graph
floor  the bytes that must move (each touched weight once, x once, out read and written) at nine tenths of what
       the memory's clock and width allow (3.0 TB/s on an H100, 4.3 on an H200), or the operations at
       790 TFLOP/s, whichever takes longer
error  distance from float64 at randomly drawn pairs; a wrong result is not timed

Examples:
  moe-lora bench
  moe-lora bench --tokens 1,80,1024 --op w13
  moe-lora bench --route --route-blocks 1,8,64")]
pub struct Args {
    /// Only cases of these numbers of tokens
    #[arg(long, value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Only cases of this projection
    #[arg(long)]
    op: Option<Op>,
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
    /// Time calls of the split form: shrink, then expand
    #[arg(long)]
    split: bool,
    /// Time the route alone, on --tokens of 8 pairs each, 128 experts and 2 adapters
    #[arg(long, conflicts_with_all = ["op", "tile", "every_way", "split"])]
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

struct Case {
    model: &'static Model,
    op: Op,
    tokens: usize,
    /// Rank that weights are allocated for.
    max_rank: usize,
    /// Rank of the adapters.
    rank: usize,
    loras: usize,
}

fn cases() -> Vec<Case> {
    let case = |model, op, rank, loras| move |tokens| Case { model, op, tokens, max_rank: rank, rank, loras };
    let mut cases = Vec::new();
    cases.extend([1, 4, 16, 80, 256, 1024, 4096, 16384].map(case(&QWEN3_30B, Op::W13, 64, 2)));
    cases.extend([80, 2048].map(case(&QWEN3_30B, Op::W13, 16, 2)));
    cases.extend([1, 16, 80, 1024, 4096, 16384].map(case(&QWEN3_30B, Op::W2, 64, 2)));
    cases.extend([64, 2048].map(case(&GPT_OSS_20B, Op::W13, 32, 4)));
    cases.extend([64].map(case(&OLMOE_1B, Op::W13, 16, 8)));
    // Few segments, whose tiles blocks share.
    cases.extend([128, 256, 512, 1024, 2048, 4096, 8192].map(case(&MIXTRAL_8X7B, Op::W13, 64, 2)));
    cases.extend([512, 1024, 2048, 4096, 8192].map(case(&MIXTRAL_8X7B, Op::W2, 64, 2)));
    cases.extend([2048, 4096].map(case(&GPT_OSS_20B, Op::W13, 32, 2)));
    cases.extend([2048, 4096].map(case(&GPT_OSS_20B, Op::W2, 32, 2)));
    cases.extend([12288, 16384].map(case(&MIXTRAL_8X7B, Op::W13, 64, 2)));
    // One adapter: segments half as many, cut evenly where full tiles would have begun a round of turns.
    cases.extend([2048, 4096, 8192].map(case(&QWEN3_30B, Op::W13, 64, 1)));
    cases.extend([2048, 4096].map(case(&QWEN3_30B, Op::W2, 64, 1)));
    cases.extend([1024, 2048, 4096].map(case(&OLMOE_1B, Op::W13, 64, 1)));
    cases.extend([192, 384, 2048, 4096].map(case(&OLMOE_1B, Op::W2, 64, 1)));
    cases.extend([8192].map(case(&MIXTRAL_8X7B, Op::W13, 64, 1)));
    cases.extend([8192].map(case(&GPT_OSS_20B, Op::W13, 32, 1)));
    // Large ranks, whose products are much of the work.
    for rank in [128, 256] {
        cases.extend([1024, 16384].map(case(&QWEN3_30B, Op::W13, rank, 2)));
        cases.extend([1024, 16384].map(case(&QWEN3_30B, Op::W2, rank, 2)));
    }
    // Small adapters, and the same beside a large one that needs a large allocation.
    for max_rank in [8, 128] {
        let small = |tokens| Case { max_rank, ..case(&QWEN3_30B, Op::W13, 8, 2)(tokens) };
        cases.extend([80, 1024].map(small));
    }
    cases
}

impl Case {
    fn projection(&self, dtype: DType) -> moe_lora::Result<Projection> {
        self.model.projection(self.op, self.max_rank, self.loras, dtype)
    }

    fn workload(&self, dtype: DType, split: bool) -> moe_lora::Result<Workload> {
        let &Case { op, tokens, rank, .. } = self;
        Ok(Workload { projection: self.projection(dtype)?, tokens, rank, weighted: op == Op::W2, split })
    }
}

pub fn bench(args: &Args) -> anyhow::Result<()> {
    let device = Device::new(args.device)?;
    println!("{}", device.info());
    if args.route {
        return bench_routes(&device, args);
    }
    let is_wanted = |way: &Options| {
        let name = way.name("");
        *way == Options::default() || args.every_way || args.ways.iter().any(|part| name.contains(part))
    };
    let ways = match args.tile {
        Some(_) => vec![Options { tile: args.tile, ..Options::default() }],
        None => ways().into_iter().filter(is_wanted).collect(),
    };
    let streams =
        ways.into_iter().map(|options| device.new_stream_with(options)).collect::<Result<Vec<_>, _>>()?;
    println!(
        "| model | op | T | R | adapters | way | floor µs | time µs | with routing | × floor | host µs | error |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    let wanted = |case: &Case| {
        (args.tokens.is_empty() || args.tokens.contains(&case.tokens))
            && args.op.is_none_or(|op| op == case.op)
            && args.rank.is_none_or(|rank| rank == case.rank)
    };
    for (seed, case) in cases().into_iter().enumerate().filter(|(_, case)| wanted(case)) {
        let workload = case.workload(args.dtype.into(), args.split)?;
        let timed = match args.dtype {
            DTypeArg::Bf16 => time::<bf16>(&streams, &workload, seed as u64, || {}),
            DTypeArg::F16 => time::<f16>(&streams, &workload, seed as u64, || {}),
        };
        let Case { model, op, tokens, max_rank, rank, loras } = case;
        let name = model.name;
        let rank = if rank == max_rank { rank.to_string() } else { format!("{rank} of {max_rank}") };
        let timed = timed.with_context(|| format!("{name} {op} T={tokens} R={rank}"))?;
        for (stream, Times { kernels, routed, host, floor, error }) in streams.iter().zip(timed) {
            let (way, ratio) = (stream.variant(), routed / floor);
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

fn bench_routes(device: &Device, args: &Args) -> anyhow::Result<()> {
    let mut ways = vec![Options::default()];
    ways.extend(
        args.route_blocks.iter().map(|&blocks| Options { route_blocks: Some(blocks), ..Options::default() }),
    );
    let tokens = if args.tokens.is_empty() { &ROUTE_TOKENS } else { args.tokens.as_slice() };
    println!("| pairs | way | µs | host µs |\n|---|---|---|---|");
    for (seed, &tokens) in (0..).zip(tokens) {
        let case = Case { model: &QWEN3_30B, op: Op::W13, tokens, max_rank: 64, rank: 64, loras: 2 };
        for way in &ways {
            let stream = device.new_stream_with(*way)?;
            let (time, host) =
                time_route(&stream, &case, seed).with_context(|| format!("T={tokens}, {way:?}"))?;
            println!("| {} | {} | {time:.2} | {host:.2} |", tokens * case.model.top_k, stream.variant());
        }
    }
    Ok(())
}

/// Microseconds of a route on the device, and of the thread that asks for it.
fn time_route(stream: &Stream, case: &Case, seed: u64) -> anyhow::Result<(f64, f64)> {
    let projection = case.projection(DType::Bf16)?;
    let s = *projection.sizes();
    let mut workspace = stream.workspace(&[projection], case.tokens)?;
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
    let (mut ids_on_device, mut lora_on_device) = (stream.upload(&topk_ids)?, stream.upload(&token_lora)?);
    macro_rules! routing {
        () => {
            RoutingTensors::new(ids_on_device.view(), lora_on_device.view())
        };
    }
    check_route(stream, &projection, &mut workspace, (&topk_ids, &token_lora), |workspace| {
        stream.route(workspace, &projection, case.tokens, routing!()).map(drop)
    })?;
    let graph = stream.capture(|stream| {
        (0..ROUTES)
            .try_for_each(|_| stream.route(&mut workspace, &projection, case.tokens, routing!()).map(drop))
    })?;
    // Other routing in the buffers that the graph names.
    for _ in 0..3 {
        let (topk_ids, token_lora) = draw();
        stream.write(&mut ids_on_device, 0, &topk_ids)?;
        stream.write(&mut lora_on_device, 0, &token_lora)?;
        check_route(stream, &projection, &mut workspace, (&topk_ids, &token_lora), |_| graph.replay())?;
    }
    graph.time(WARM_UP)?;
    let time = median(graph.time(REPLAYS)?) / ROUTES as f64;
    let host = host_time(stream, || stream.route(&mut workspace, &projection, case.tokens, routing!()))?;
    Ok((time, host))
}

/// Lets `route` fill the workspace, and holds what it leaves against the same done plainly, to the bit.
fn check_route(
    stream: &Stream,
    projection: &Projection,
    workspace: &mut Workspace,
    (topk_ids, token_lora): (&[i32], &[i32]),
    route: impl FnOnce(&mut Workspace) -> moe_lora::Result<()>,
) -> anyhow::Result<()> {
    let s = projection.sizes();
    route(workspace)?;
    let got = stream.download_route(workspace, topk_ids.len())?;
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
