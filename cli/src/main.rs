//! The program `moe-lora`: what this machine can run, whether its results are right, how fast they come, and
//! calls on files.

// `println!` panics where a pipe is closed or a disk is full. `say!` does not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod backends;
#[cfg(feature = "cuda")]
mod bench;
mod demo;
#[cfg(feature = "cuda")]
mod fit;
mod info;
#[cfg(feature = "cuda")]
mod layer;
#[cfg(feature = "cuda")]
mod measure;
#[cfg(feature = "cuda")]
mod models;
#[cfg(feature = "cuda")]
mod plan;
mod print;
mod run;
#[cfg(feature = "cuda")]
mod tune;
mod verify;

use clap::{Parser, Subcommand, ValueEnum};
use moe_lora::DType;
use std::process::ExitCode;

/// The fused MoE-LoRA operator: for every (token, expert) pair of a mixture-of-experts layer,
/// out += routing weight · B · (A · x), with the matrices of the token's own adapter.
#[derive(Parser)]
#[command(
    version,
    after_help = "\
Examples:
  moe-lora info                  What this machine has, and what is missing
  moe-lora demo                  A layer of Qwen3-30B-A3B on every back end: errors and times
  moe-lora plan --model qwen3-30b-a3b --tokens 80
                                 Which kernels calls launch, and why
  moe-lora verify --grid full    Every mode on many shapes, against float64
  moe-lora run --help            One layer of a PEFT adapter on tensors in a file"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the GPU, the driver and the kernels built into this program, and what is missing
    Info,
    /// Run a layer of Qwen3-30B-A3B on every back end, check the results and time the calls
    Demo(demo::Args),
    /// Time the operator on a GPU at the shapes of well-known models
    #[cfg(feature = "cuda")]
    Bench(bench::Args),
    /// Show which kernels a call would launch, and what each candidate is predicted to take
    #[cfg(feature = "cuda")]
    Plan(plan::Args),
    /// Autotune a model's calls on this GPU, and write the fastest plans to a file
    #[cfg(feature = "cuda")]
    Tune(tune::Args),
    /// Apply one layer of PEFT adapters to tensors in a file
    Run(run::Args),
    /// Compare back ends with the float64 reference, over a grid of shapes and modes
    Verify(verify::Args),
}

/// A type to compute in.
#[derive(Clone, Copy, ValueEnum)]
enum DTypeArg {
    Bf16,
    F16,
}

impl From<DTypeArg> for DType {
    fn from(dtype: DTypeArg) -> Self {
        match dtype {
            DTypeArg::Bf16 => DType::Bf16,
            DTypeArg::F16 => DType::F16,
        }
    }
}

fn main() -> ExitCode {
    print::exit_code(run_command())
}

fn run_command() -> anyhow::Result<()> {
    match Cli::try_parse()?.command {
        Command::Info => info::info(),
        Command::Demo(args) => demo::demo(&args),
        #[cfg(feature = "cuda")]
        Command::Bench(args) => bench::bench(&args),
        #[cfg(feature = "cuda")]
        Command::Plan(args) => plan::plan(&args),
        #[cfg(feature = "cuda")]
        Command::Tune(args) => tune::tune(&args),
        Command::Run(args) => run::run(&args),
        Command::Verify(args) => verify::verify(&args),
    }
}
