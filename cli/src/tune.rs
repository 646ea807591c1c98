use crate::DTypeArg;
use crate::measure::{Choice, Workload, time};
use crate::models::{MODELS, Model, Op};
use crate::print::say;
use anyhow::Context;
use half::{bf16, f16};
use indicatif::{ProgressBar, ProgressStyle};
use moe_lora::cuda::{Device, Options};
use moe_lora::plan::{RouteSource, Stage};
use moe_lora::tuning::{TUNING_VAR, Tuned, Tuning, candidates};
use moe_lora::{DType, Layout};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "\
Every form, tile and cluster that a plan could choose is checked against float64 and timed, on graphs of calls
with their routing; the fastest goes into FILE, beside what it holds of other calls. A measured number of tokens
stands for calls of up to twice and down to half as many; where nothing near was measured, the built-in rules
apply.

The library takes FILE where the environment says so, from Rust, C and Python alike, and from the next process on:
  MOE_LORA_TUNING=FILE moe-lora bench

Examples:
  moe-lora tune --model qwen3-30b-a3b --rank 64 --adapters 2 h100.json
  moe-lora tune --hidden 4096 --intermediate 1536 --experts 128 --top-k 8 --op w13 --tokens 1,8,64 h100.json")]
pub struct Args {
    /// Where to write, and to read what was measured before
    file: PathBuf,
    /// A model whose layer it is: qwen3-30b-a3b, gpt-oss-20b, olmoe-1b-7b or mixtral-8x7b. Of another give
    /// the next four
    #[arg(long, value_parser = model, conflicts_with_all = ["hidden", "intermediate", "experts", "top_k"])]
    model: Option<Model>,
    /// Width of a token
    #[arg(long)]
    hidden: Option<usize>,
    /// Width of an expert
    #[arg(long)]
    intermediate: Option<usize>,
    /// Experts of the layer
    #[arg(long)]
    experts: Option<usize>,
    /// Experts that a token chooses
    #[arg(long)]
    top_k: Option<usize>,
    /// Projections
    #[arg(long, value_delimiter = ',', default_value = "w13,w2")]
    op: Vec<Op>,
    /// Rank that the weights are allocated for
    #[arg(long, default_value_t = 64)]
    rank: usize,
    /// Adapter slots, all of which are used
    #[arg(long, default_value_t = 2)]
    adapters: usize,
    /// Numbers of tokens
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192")]
    tokens: Vec<usize>,
    /// Type of activations and weights
    #[arg(long, default_value = "bf16")]
    dtype: DTypeArg,
    /// Device number
    #[arg(long, default_value_t = 0)]
    device: u32,
}

fn model(name: &str) -> Result<Model, String> {
    let names = MODELS.map(|model| model.name).join(", ");
    MODELS.into_iter().find(|model| model.name == name).ok_or_else(|| format!("expected one of {names}"))
}

/// Of the random inputs.
const SEED: u64 = 1;

/// A candidate must be faster than the planner's choice by more than measurements differ.
const MARGIN: f64 = 0.98;

/// Finds the fastest candidate of each call, and writes the file after each.
pub fn tune(args: &Args) -> anyhow::Result<()> {
    let own = || {
        let &Args { hidden, intermediate, experts, top_k, .. } = args;
        let (hidden, intermediate) = (hidden?, intermediate?);
        Some(Model { name: "", hidden, intermediate, experts: experts?, top_k: top_k? })
    };
    let model = args.model.or_else(own).ok_or_else(|| {
        let which = "which layer? give --model, or all of --hidden, --intermediate, --experts and --top-k\n";
        clap::Error::raw(clap::error::ErrorKind::MissingRequiredArgument, which)
    })?;
    // Without a tuning of before: it would change what is measured as planned.
    let gpu = Device::untuned(args.device)?;
    let device = &gpu.info().name;
    let mut tuning = match args.file.exists() {
        true => Tuning::load(&args.file)?,
        false => Tuning::new(device.clone(), gpu.kernels().fingerprint()),
    };
    let (file, of) = (args.file.display(), tuning.device());
    anyhow::ensure!(of == device, "{file} is of {of}, and this is {device}: name another file");
    tuning.check_kernels(&gpu.kernels().fingerprint())?;

    say!("{}", gpu.info())?;
    say!("| op | T | as planned µs | fastest µs | way |\n|---|---|---|---|---|")?;
    for &op in &args.op {
        let projection = model.projection(op, args.rank, args.adapters, args.dtype.into())?;
        for &tokens in &args.tokens {
            let workload = Workload {
                projection,
                tokens,
                rank: args.rank,
                weighted: op == Op::W2,
                split: false,
                choice: Choice::Uniform,
            };
            let tuned = fastest(&gpu, &workload).with_context(|| format!("{op}, {tokens} tokens"))?;
            let way = match tuned.candidate.name("") {
                name if name.is_empty() => "as planned".to_owned(),
                name => name,
            };
            let (planned, time) = (tuned.planned_microseconds, tuned.microseconds);
            tuning.insert(tuned);
            tuning.save(&args.file)?;
            say!("| {op} | {tokens} | {planned:.1} | {time:.1} | {way} |")?;
        }
    }
    say!("\n{TUNING_VAR}={file} makes every process that loads this library take them.")?;
    Ok(())
}

/// The fastest candidate of a call: the planner's own choice, unless another is faster for sure.
fn fastest(device: &Device, workload: &Workload) -> anyhow::Result<Tuned> {
    let &Workload { projection, tokens, .. } = workload;
    let layout = Layout {
        tokens,
        x_stride: projection.sizes().in_dim,
        out_stride: projection.out_width(),
        offset: 0,
        aligned: true,
        ranked: false,
    };
    // Candidates that come to the same plan are timed once.
    let (mut tried, mut plans) = (Vec::new(), Vec::new());
    for candidate in candidates() {
        let stream = device.new_stream_with(candidate)?;
        let plan = stream.plan(&projection, &layout, Stage::Forward, RouteSource::Made)?;
        if !plans.contains(&plan) {
            plans.push(plan);
            tried.push((candidate, stream));
        }
    }
    let (tried, streams): (Vec<_>, Vec<_>) = tried.into_iter().unzip();
    let progress =
        ProgressBar::new(streams.len() as u64).with_message(format!("{tokens} tokens")).with_style(
            ProgressStyle::with_template("{bar:30} {pos}/{len} ways  {msg}").expect("a valid template"),
        );
    let times = match projection.sizes().dtype {
        DType::Bf16 => time::<bf16>(&streams, workload, SEED, false, || progress.inc(1)),
        DType::F16 => time::<f16>(&streams, workload, SEED, false, || progress.inc(1)),
    }?
    .times;
    progress.finish_and_clear();
    let planned = times[0].routed;
    let measured = tried.into_iter().zip(times.iter().map(|times| times.routed));
    let (candidate, microseconds) = measured
        .min_by(|(_, one), (_, other)| one.total_cmp(other))
        .filter(|(_, time)| *time < MARGIN * planned)
        .unwrap_or((Options::default(), planned));
    let projection = *projection.sizes();
    Ok(Tuned { projection, tokens, candidate, microseconds, planned_microseconds: planned })
}
