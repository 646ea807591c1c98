use crate::fit::fit;
use crate::layer::Layer;
use crate::measure::{Candidates, Choice, Workload, time};
use crate::models::Op;
use crate::print::say;
use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use moe_lora::cuda::{Device, Options};
use moe_lora::tuning::{TUNING_VAR, Tuned, Tuning, candidates};
use std::path::PathBuf;

#[derive(clap::Args)]
#[command(after_help = "\
Each candidate (every form, tile and cluster that a plan could choose) is checked against float64 and
timed, on graphs of calls with their routing. The fastest goes into FILE, beside what FILE holds of other
calls. A measured number of tokens stands for calls of half to twice as many. Without a measurement that
near, the planner predicts times by its own table.

The library takes FILE where the environment says so, from Rust, C and Python alike, and from the next
process on:
  MOE_LORA_TUNING=FILE moe-lora bench

Examples:
  moe-lora tune --model qwen3-30b-a3b --rank 64 --adapters 2 h100.json
  moe-lora tune --fit docs/bench/h200-candidates-fit.jsonl
  moe-lora tune --hidden 4096 --intermediate 1536 --experts 128 --top-k 8 --tokens 1,8,64 h100.json")]
pub struct Args {
    /// Where to write, and to read what was measured before
    #[arg(required_unless_present = "fit")]
    file: Option<PathBuf>,
    #[command(flatten)]
    layer: Layer,
    /// Numbers of tokens
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192")]
    tokens: Vec<usize>,
    /// Fit the planner's own table of a device to what `moe-lora bench --every-candidate --record` has
    /// recorded there, and print it; FILE is not written
    #[arg(long, value_name = "RECORDS", conflicts_with_all = ["file", "tokens"])]
    fit: Option<PathBuf>,
    /// Device number
    #[arg(long, default_value_t = 0)]
    device: u32,
}

/// Of the random inputs.
const SEED: u64 = 1;

/// A candidate must be faster than the planner's choice by more than measurements differ.
const MARGIN: f64 = 0.98;

/// Finds the fastest candidate of each call, and writes the file after each.
pub fn tune(args: &Args) -> anyhow::Result<()> {
    if let Some(records) = &args.fit {
        return fit(records, args.device);
    }
    // Arguments first: what is wrong with them does not depend on the device.
    args.layer.model()?;
    // Without a tuning of before: it would change what is measured as planned.
    let gpu = Device::untuned(args.device)?;
    let file = args.file.as_deref().context("no file")?;
    let device = &gpu.info().name;
    let mut tuning = match file.exists() {
        true => Tuning::load(file)?,
        false => Tuning::new(device.clone(), gpu.kernels().fingerprint()),
    };
    let of = tuning.device();
    anyhow::ensure!(of == device, "{} is of {of}, and this is {device}: name another file", file.display());
    tuning.check_kernels(&gpu.kernels().fingerprint())?;

    say!("{}", gpu.info())?;
    say!("| op | T | as planned µs | fastest µs | candidate |\n|---|---|---|---|---|")?;
    for &op in &args.layer.op {
        let projection = args.layer.projection(op)?;
        for &tokens in &args.tokens {
            let workload = Workload {
                projection,
                tokens,
                rank: args.layer.rank,
                weighted: op == Op::W2,
                split: false,
                table: false,
                choice: Choice::Uniform,
            };
            let tuned = fastest(&gpu, &workload).with_context(|| format!("{op}, {tokens} tokens"))?;
            let candidate = match tuned.candidate.name("") {
                name if name.is_empty() => "as planned".to_owned(),
                name => name,
            };
            let (planned, time) = (tuned.planned_microseconds, tuned.microseconds);
            tuning.insert(tuned);
            tuning.save(file)?;
            say!("| {op} | {tokens} | {planned:.1} | {time:.1} | {candidate} |")?;
        }
    }
    say!("\n{TUNING_VAR}={} makes every process that loads this library take them.", file.display())?;
    Ok(())
}

/// The fastest candidate of a call: the planner's own choice, unless another is faster for sure.
fn fastest(device: &Device, workload: &Workload) -> anyhow::Result<Tuned> {
    let &Workload { projection, tokens, .. } = workload;
    let Candidates { options, streams, planned } = Candidates::new(device, &candidates(), workload)?;
    let progress =
        ProgressBar::new(streams.len() as u64).with_message(format!("{tokens} tokens")).with_style(
            ProgressStyle::with_template("{bar:30} {pos}/{len} candidates  {msg}").expect("a valid template"),
        );
    let times = time(&streams, workload, SEED, false, || progress.inc(1))?.times;
    progress.finish_and_clear();
    let planned = times[planned].routed;
    let measured = options.into_iter().zip(times.iter().map(|times| times.routed));
    let (candidate, microseconds) = measured
        .min_by(|(_, one), (_, other)| one.total_cmp(other))
        .filter(|(_, time)| *time < MARGIN * planned)
        .unwrap_or((Options::default(), planned));
    let projection = *projection.sizes();
    Ok(Tuned { projection, tokens, candidate, microseconds, planned_microseconds: planned })
}
