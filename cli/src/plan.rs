//! `moe-lora plan`.

use crate::layer::Layer;
use crate::measure::contiguous;
use crate::print::say;
use clap::ValueEnum;
use moe_lora::plan::{Costs, DeviceLimits, Options, Plan, RouteSource, Stage, predict};

#[derive(clap::Args)]
#[command(after_help = "\
A call runs as the candidate with the least predicted time. Candidates are what the call could legally run as:
  decode m8 cluster4   decode, in tiles of 8 pairs, a cluster of 4 blocks each
  prefill(m64)         prefill, in tiles of 64 pairs
  sharedprefill(m64)   the same, where blocks share tiles by split-K and split-N
  m32                  shrink, then expand, in tiles of 32 pairs
The prediction is made from the shapes and the device's table of costs; it expects experts to be chosen
evenly.
No GPU is needed. `moe-lora bench --every-candidate` measures what this predicts.

Examples:
  moe-lora plan --model qwen3-30b-a3b --op w13 --tokens 80
  moe-lora plan --device h100 --hidden 4096 --intermediate 1536 --experts 128 --top-k 8 --tokens 1,1024")]
pub struct Args {
    #[command(flatten)]
    layer: Layer,
    /// Numbers of tokens
    #[arg(long, value_delimiter = ',', default_value = "1,80,1024")]
    tokens: Vec<usize>,
    /// Whether slots have ranks of their own, smaller than --rank
    #[arg(long)]
    ranked: bool,
    /// The device that is planned for
    #[arg(long, default_value = "h200")]
    device: DeviceArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceArg {
    H100,
    H200,
}

/// Shows what calls would launch, and why.
pub fn plan(args: &Args) -> anyhow::Result<()> {
    let limits = match args.device {
        DeviceArg::H100 => DeviceLimits::H100,
        DeviceArg::H200 => DeviceLimits::H200,
    };
    let costs = Costs::of(&limits);
    for &op in &args.layer.op {
        let projection = args.layer.projection(op)?;
        for &tokens in &args.tokens {
            let layout = contiguous(&projection, tokens, args.ranked);
            let (stage, route) = (Stage::Forward, RouteSource::Made);
            let options = Options::default();
            say!("{op}, {tokens} tokens")?;
            match Plan::new(&projection, &layout, stage, route, &limits, &options)? {
                Some(plan) => say!("  {plan}\n")?,
                None => say!("  nothing to do\n")?,
            }
            let predicted = predict(&projection, &layout, route, &limits, costs)?;
            say!("  | candidate | predicted µs |\n  |---|---|")?;
            for (options, time) in predicted {
                say!("  | {} | {time:.1} |", options.name("").trim_start())?;
            }
            say!("")?;
        }
    }
    Ok(())
}
