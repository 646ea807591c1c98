//! `moe-lora bench`.

mod cases;
mod record;
mod route;

use crate::DTypeArg;
use crate::measure::{Candidates, Measured, Times, Workload, median, time};
use crate::models::Op;
use crate::print::say;
use anyhow::Context;
pub use cases::{Case, of_models};
use indicatif::{ProgressBar, ProgressStyle};
use moe_lora::Backend;
use moe_lora::cuda::{Device, Options, Stream, TileKind};
use moe_lora::tuning::candidates;
pub use record::Record;
use record::Recorder;
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "\
time   of shrink and expand: the median over replays of a CUDA graph that calls the operator on one set of
       weights after another, together larger than the L2 cache, as the layers of a model would
route  what routing adds to that
host   what a call with its routing costs the thread that makes it, outside a graph
floor  the bytes that must move (each touched weight once, x once, out read and written) at nine tenths of
       what the memory's clock and width allow (3.0 TB/s on an H100, 4.3 on an H200), or the operations at
       790 TFLOP/s, whichever takes longer
error  distance from float64 at randomly drawn pairs; a wrong result is not timed

Random calls (--random) are timed with their routing alone. A summary says how far the planner's choices are
from their floors, and lists the ten farthest. With --every-candidate it also says how far they are behind
the fastest candidate, and lists the ten farthest behind.

Examples:
  moe-lora bench
  moe-lora bench --tokens 1,80,1024 --op w13
  moe-lora bench --random 200 --seed 1
  moe-lora bench --random 200 --seed 1 --every-candidate --record h200.jsonl
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
    /// Type of activations and weights; random calls have their own
    #[arg(long, default_value = "bf16", conflicts_with = "random")]
    dtype: DTypeArg,
    /// Only this tile, where it can be had: m16, m32, m64 or any
    #[arg(long, value_parser = tile)]
    tile: Option<TileKind>,
    /// Time each candidate: every form, tile and cluster that a plan could choose
    #[arg(long, conflicts_with = "tile")]
    every_candidate: bool,
    /// Time the candidates whose names hold one of these, besides the planner's choice
    #[arg(long, value_delimiter = ',', value_name = "PARTS", conflicts_with = "tile")]
    candidates: Vec<String>,
    /// Time so many random calls in place of those of models
    #[arg(long, value_name = "N", conflicts_with_all = ["op", "tokens", "rank", "split", "route"])]
    random: Option<u64>,
    /// Number of the first random call: the same number is the same call, on every machine
    #[arg(long, default_value_t = 1, requires = "random")]
    seed: u64,
    /// Append what was measured of each call to this file, a line of JSON each
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tile", "split", "route"])]
    record: Option<PathBuf>,
    /// Time calls of the split form: shrink, then expand
    #[arg(long)]
    split: bool,
    /// Time each call on stacked weights, and on the same weights by address
    #[arg(long, conflicts_with_all = ["random", "route", "record"])]
    table: bool,
    /// Time the route alone, on --tokens of 8 pairs each, 128 experts and 2 adapters
    #[arg(long, conflicts_with_all = ["op", "tile", "every_candidate", "split"])]
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

/// Times calls, and prints a table.
pub fn bench(args: &Args) -> anyhow::Result<()> {
    // What is recorded is to be of the planner's own rules, whatever the environment says.
    let device = match args.record {
        Some(_) => Device::untuned(args.device)?,
        None => Device::new(args.device)?,
    };
    say!("{}", device.info())?;
    if args.route {
        return route::bench_routes(&device, &args.tokens, &args.route_blocks);
    }
    let is_wanted = |option: &Options| {
        let name = option.name("");
        *option == Options::default()
            || args.every_candidate
            || args.candidates.iter().any(|part| name.contains(part))
    };
    let options = match args.tile {
        Some(_) => vec![Options { tile: args.tile, ..Options::default() }],
        None => candidates().into_iter().filter(is_wanted).collect(),
    };
    let mut recorder = Recorder::new(args.record.as_deref())?;
    match args.random {
        Some(count) => bench_random(&device, &options, args.seed..args.seed + count, &mut recorder),
        None => bench_models(&device, &options, args, &mut recorder),
    }
}

fn measure(streams: &[Stream], case: &Case, seed: u64, apart: bool) -> anyhow::Result<Measured> {
    let Case { name, op, workload } = case;
    time(streams, workload, seed, apart, || {})
        .with_context(|| format!("{name} {op} T={}: {:?}", workload.tokens, workload.projection.sizes()))
}

/// The rank of a call's adapters, and of its allocation where that is larger.
fn rank(case: &Case) -> String {
    let (rank, max_rank) = (case.workload.rank, case.workload.projection.sizes().max_rank);
    if rank == max_rank { rank.to_string() } else { format!("{rank} of {max_rank}") }
}

fn bench_models(
    device: &Device,
    options: &[Options],
    args: &Args,
    recorder: &mut Recorder,
) -> anyhow::Result<()> {
    say!(
        "| model | op | T | R | adapters | candidate | floor µs | time µs | with routing | × floor | host µs \
         | error |"
    )?;
    say!("|---|---|---|---|---|---|---|---|---|---|---|---|")?;
    let wanted = |case: &Case| {
        (args.tokens.is_empty() || args.tokens.contains(&case.workload.tokens))
            && args.op.is_none_or(|op| op == case.op)
            && args.rank.is_none_or(|rank| rank == case.workload.rank)
    };
    let cases = of_models(args.dtype.into(), args.split)?;
    let mut by_address = Vec::new();
    for (seed, case) in (0..).zip(cases).filter(|(_, case)| wanted(case)) {
        let Candidates { options, streams, .. } = Candidates::new(device, options, &case.workload)?;
        let measured = measure(&streams, &case, seed, args.record.is_none())?;
        recorder.add(&Record::new(&device.info().name, &case, &options, &measured))?;
        let Case { name, op, workload } = case;
        let (tokens, loras, rank) = (workload.tokens, workload.projection.sizes().slots, rank(&case));
        let floor = measured.floor;
        if args.table {
            by_address.push(by_address_and_stacked(&streams[..1], &case, seed)?);
        }
        for (stream, Times { kernels, routed, host, error }) in streams.iter().zip(measured.times) {
            let (option, ratio) = (stream.variant(), routed / floor);
            say!(
                "| {name} | {op} | {tokens} | {rank} | {loras} | {option} | {floor:.1} | {kernels:.1} \
                 | {routed:.1} | {ratio:.2} | {host:.2} | {error:.1e} |"
            )?;
        }
    }
    if let Some(worst) = by_address.iter().copied().max_by(f64::total_cmp) {
        let mean = (by_address.iter().map(|ratio| ratio.ln()).sum::<f64>() / by_address.len() as f64).exp();
        say!("\nBy address: {mean:.3} times as long as stacked (geometric mean), at most {worst:.3} times")?;
    }
    Ok(())
}

/// Rounds in which stacked weights and those by address take turns.
const ROUNDS: usize = 3;

/// How many times as long as on stacked weights a call takes on the same weights by address.
fn by_address_and_stacked(streams: &[Stream], case: &Case, seed: u64) -> anyhow::Result<f64> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (times, table) in times.iter_mut().zip([false, true]) {
            let case = Case { workload: Workload { table, ..case.workload }, ..*case };
            times.push(measure(streams, &case, seed, false)?.times[0].routed);
        }
    }
    let [stacked, by_address] = times.map(median);
    say!("by address {by_address:.1} µs, stacked {stacked:.1}: {:.3}", by_address / stacked)?;
    Ok(by_address / stacked)
}

/// What a summary of random calls says of one.
struct Timed {
    seed: u64,
    case: Case,
    floor: f64,
    planned: f64,
    /// The fastest candidate, and its time.
    fastest: (Options, f64),
}

/// Calls that a summary lists.
const WORST: usize = 10;
/// Microseconds of a floor from which on times are compared with it by their ratio.
const LARGE_FLOOR: f64 = 20.0;

fn bench_random(
    device: &Device,
    options: &[Options],
    seeds: std::ops::Range<u64>,
    recorder: &mut Recorder,
) -> anyhow::Result<()> {
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} calls, {eta} left").expect("a valid template");
    let progress = ProgressBar::new(seeds.end - seeds.start).with_style(style);
    let mut timed = Vec::new();
    for seed in seeds {
        let case = cases::random(seed);
        let Candidates { options, streams, planned } = Candidates::new(device, options, &case.workload)?;
        let measured = measure(&streams, &case, seed, false).with_context(|| format!("--seed {seed}"))?;
        recorder.add(&Record::new(&device.info().name, &case, &options, &measured))?;
        let times = measured.times.iter().map(|times| times.routed);
        let fastest = options.into_iter().zip(times).min_by(|(_, one), (_, other)| one.total_cmp(other));
        let planned = measured.times[planned].routed;
        timed.push(Timed {
            seed,
            case,
            floor: measured.floor,
            planned,
            fastest: fastest.context("no candidate")?,
        });
        progress.inc(1);
    }
    progress.finish_and_clear();
    summarize(&mut timed, options.len() > 1)
}

/// Prints how far calls are from their floors, and, where every candidate was timed, from the fastest.
fn summarize(timed: &mut [Timed], has_candidates: bool) -> anyhow::Result<()> {
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let of = |is_large: bool, value: fn(&Timed) -> f64| {
        timed.iter().filter(|call| (call.floor >= LARGE_FLOOR) == is_large).map(value).collect::<Vec<_>>()
    };
    let [ratios, above] =
        [of(true, |call| (call.planned / call.floor).ln()), of(false, |call| call.planned - call.floor)];
    say!(
        "{} calls with a floor of {LARGE_FLOOR} µs or more: {:.2} × the floor (geometric mean)",
        ratios.len(),
        mean(ratios.clone()).exp()
    )?;
    say!("{} others: {:.1} µs above it (mean)", above.len(), mean(above.clone()))?;
    let row = |call: &Timed| {
        let Timed { seed, case, floor, planned, fastest: (option, time) } = call;
        let s = case.workload.projection.sizes();
        let (op, tokens, rank, choice) = (case.op, case.workload.tokens, rank(case), case.workload.choice);
        let option = match option.name("") {
            name if name.is_empty() => "as planned".to_owned(),
            name => name.trim_start().to_owned(),
        };
        format!(
            "| {seed} | {op} | {tokens} | {rank} | {} | {} | {} | {} → {} | {choice:?} | {floor:.1} \
             | {planned:.1} | {time:.1} | {option} |",
            s.slots, s.experts, s.top_k, s.in_dim, s.out_dims
        )
    };
    let table = |title: &str, calls: &[Timed]| {
        say!("\n{title}\n")?;
        say!(
            "| seed | op | T | R | adapters | experts | k | K → N | experts chosen | floor µs \
             | planned µs | fastest µs | candidate |"
        )?;
        say!("|---|---|---|---|---|---|---|---|---|---|---|---|---|")?;
        calls.iter().take(WORST).try_for_each(|call| say!("{}", row(call)))
    };
    // Below the launches' own time a ratio says nothing.
    let excess = |call: &Timed| call.planned / call.floor.max(LARGE_FLOOR / 2.0);
    timed.sort_by(|one, other| excess(other).total_cmp(&excess(one)));
    table("Farthest from their floors:", timed)?;
    if has_candidates {
        let behind = |call: &Timed| call.planned / call.fastest.1;
        say!(
            "\nBehind the fastest candidate by {:.2} % (mean)",
            100.0 * (mean(timed.iter().map(behind).collect()) - 1.0)
        )?;
        timed.sort_by(|one, other| behind(other).total_cmp(&behind(one)));
        table("Farthest behind the fastest candidate:", timed)?;
    }
    Ok(())
}
