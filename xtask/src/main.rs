//! What a contributor runs: `cargo xtask --help`.

mod bench;
mod bundle;
mod check;
mod debian;
mod environment;
mod fuzz;
mod glibc;
mod header;
mod miri;
mod nightly;
mod package;
mod ptx;
mod python;
mod setup;
mod shell;
mod test;
mod text;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Everything that is built, tested and shipped from this repository.
///
/// Each command first makes sure that a Rust toolchain is there that compiles for the GPU. Where
/// none is found, one is fetched into target/, without root and without changing the machine.
/// No command needs a CUDA toolkit, and none but `bench` a GPU.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    BuildPtx(ptx::Args),
    Demo(test::DemoArgs),
    Test(test::Args),
    Bench(bench::Args),
    Check(check::Args),
    Fuzz(fuzz::Args),
    Header(header::Args),
    Miri(miri::Args),
    Nightly(nightly::Args),
    Wheel(python::Args),
    Package(package::Args),
    Bundle(bundle::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::BuildPtx(args) => ptx::run(&args),
        Task::Demo(args) => test::demo(&args),
        Task::Test(args) => test::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Check(args) => check::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Header(args) => header::run(&args),
        Task::Miri(args) => miri::run(&args),
        Task::Nightly(args) => nightly::run(&args),
        Task::Wheel(args) => python::run(&args),
        Task::Package(args) => package::run(&args),
        Task::Bundle(args) => bundle::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not `{error:?}`, which adds a backtrace where RUST_BACKTRACE is set.
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
