use crate::DTypeArg;
use crate::backends::{Choice, Machine, with_backend};
use crate::print::say;
use clap::ValueEnum;
use moe_lora::adapter::LayerProjection;
use moe_lora::tensor_file::FileError;
use moe_lora::{Backend, DType};
use moe_lora_cli::files::{Run, RunError};
use safetensors::tensor::Dtype;
use std::path::PathBuf;
use std::time::Instant;

#[derive(clap::Args)]
#[command(after_help = "\
The input is a safetensors file that holds
  x             [T, K] for w13, [T·k, K] for w2     BF16, F16, or F32 with --dtype
  topk_ids      [T, k]      I32   experts of each token
  topk_weights  [T, k]      F32   routing weights, for w2
  token_lora    [T]         I32   adapter of each token, in the order of --adapter; -1 for none
  out           [T, k, S·N]       optional: what the result is added to
The output is a safetensors file that holds out, [T, k, S·N]: gate then up for w13, down for w2.
Infinite and NaN inputs are refused, and finite ones that do not fit the compute type. So is such a result.
The output file appears when it is complete. It must not be a file that is read.

Examples:
  moe-lora run --adapter sql --layer 0 --projection w13 --input x.safetensors --output gate_up.safetensors
  moe-lora run --adapter sql --adapter legal --layer 11 --projection w2 --input h.safetensors \
    --output down.safetensors

From PyTorch:
  safetensors.torch.save_file({'x': x, 'topk_ids': ids.int(), 'topk_weights': weights.float(),
                               'token_lora': slots.int()}, 'x.safetensors')")]
pub struct Args {
    /// PEFT adapter folder; repeat for more adapters
    #[arg(long, required = true, value_name = "DIR")]
    adapter: Vec<PathBuf>,
    /// Layer of the model, from 0
    #[arg(long)]
    layer: usize,
    /// Which projection of the layer's experts
    #[arg(long)]
    projection: Projection,
    /// Safetensors file or pipe to read; - is standard input
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Safetensors file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Where to run
    #[arg(long, default_value = "auto")]
    backend: Choice,
    /// Compute type [default: that of x]
    #[arg(long)]
    dtype: Option<DTypeArg>,
    /// Multiply by topk_weights [default: true for w2, false for w13]
    #[arg(long, value_name = "BOOL")]
    mul_routed_weight: Option<bool>,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Projection {
    /// gate_proj and up_proj
    W13,
    /// down_proj
    W2,
}

/// Runs one call on files.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let projection = match args.projection {
        Projection::W13 => LayerProjection::W13,
        Projection::W2 => LayerProjection::W2,
    };
    let run = Run {
        adapters: args.adapter.clone(),
        layer: args.layer,
        projection,
        input: args.input.clone(),
        dtype: args.dtype.map(Into::into),
        mul_routed_weight: args.mul_routed_weight.unwrap_or(projection == LayerProjection::W2),
    };
    run.check_output(&args.output, args.force).map_err(advised)?;
    let machine = Machine::find();
    let place = machine.one(args.backend)?;
    let start = Instant::now();
    let (name, output) =
        with_backend!(&place, backend => (backend.name(), run.on(backend).map_err(advised)?));
    output.save(&args.output, args.force).map_err(advised)?;
    say!(
        "{name}: layer {} {projection}, {} tokens, {}, ranks {:?}; {} written in {:.2?}",
        args.layer,
        output.tokens,
        output.projection,
        output.ranks,
        args.output.display(),
        start.elapsed()
    )?;
    Ok(())
}

const LARGER_RANGE: &str = "--dtype bf16 has the range of F32";

/// The error, and which argument would help.
fn advised(error: RunError) -> anyhow::Error {
    let advice = match &error {
        RunError::OutputExists { .. } => "--force replaces it",
        RunError::File(FileError::DType { tensor, got: Dtype::F32, .. }) if tensor == "x" => {
            "--dtype says which, and x is rounded to it"
        }
        RunError::NotFinite { value, dtype, .. } if value.is_finite() && *dtype == DType::F16.to_string() => {
            LARGER_RANGE
        }
        RunError::Overflow { dtype: DType::F16, .. } => LARGER_RANGE,
        _ => return error.into(),
    };
    anyhow::anyhow!("{error}: {advice}")
}
