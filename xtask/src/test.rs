//! `cargo xtask test` and `cargo xtask demo`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use moe_lora_kernels::ENTRIES;

use crate::python;
use crate::setup::{self, CodegenArgs};
use crate::shell::{SKIP_LOG_VAR, cargo, empty_dir, run as run_command, target_dir, workspace_root};

/// The tests of the emulated machine append a line to the file that this names for each entry point that they
/// ran: its name, the cases in which it ran, and its launches.
pub const EMULATED_LOG_VAR: &str = "MOE_LORA_EMULATED_LOG";

/// The tests append a line to the file that this names for each planted mistake that they caught.
const FAULT_LOG_VAR: &str = "MOE_LORA_FAULT_LOG";

/// Mistakes that tests plant, in kernels and in back ends, at least: each is caught, or its test fails, and a
/// test that is lost is missed.
const PLANTED: usize = 123;

/// Run every test, the Python package's among them.
///
/// Tests of the GPU back end run where there is a GPU and are listed as skipped where there is
/// none; everything else runs everywhere, the kernels themselves on the emulated machine.
/// `cargo xtask bundle` takes the tests to a GPU machine that has no Rust.
#[derive(clap::Args)]
pub struct Args {
    /// Fail if any test was skipped: for machines that have a GPU
    #[arg(long)]
    require_gpu: bool,
    #[command(flatten)]
    codegen: CodegenArgs,
    /// Arguments for `cargo test`, for example: -p moe-lora-tests --test cuda -- i64
    #[arg(last = true, value_name = "CARGO TEST ARGUMENTS")]
    cargo_test: Vec<String>,
}

/// Carries `test` out.
pub fn run(args: &Args) -> Result<()> {
    setup::compiler(&args.codegen)?;
    let skip_log = empty_log("skipped-tests.txt")?;
    let emulated_log = empty_log("emulated-kernels.txt")?;
    let fault_log = empty_log("caught-faults.txt")?;

    let mut test = cargo();
    args.codegen.pass_to(&mut test).args(["test", "--release"]);
    test.env(SKIP_LOG_VAR, &skip_log).env(EMULATED_LOG_VAR, &emulated_log).env(FAULT_LOG_VAR, &fault_log);
    let all = args.cargo_test.is_empty();
    if all {
        // The example on candle's tensors is type-checked, and tested every night: candle takes minutes to
        // build.
        test.args(["--workspace", "--exclude", "moe-lora-candle-example", "--no-fail-fast"]);
    }
    let tested = run_command(test.args(&args.cargo_test));
    let other_driver = if all { other_driver(args, &skip_log) } else { Ok(()) };
    let python = if all { python::test(&skip_log, &args.codegen) } else { Ok(()) };
    let skipped = std::fs::read_to_string(&skip_log)?;
    print_emulated(&std::fs::read_to_string(&emulated_log)?);
    print_skipped(&skipped);
    tested?;
    other_driver?;
    python?;
    if all {
        let caught = std::fs::read_to_string(&fault_log)?.lines().count();
        println!("\nPlanted mistakes that were caught: {caught}.");
        ensure!(caught >= PLANTED, "tests that planted mistakes are gone: there were {PLANTED}");
    }
    ensure!(!args.require_gpu || skipped.is_empty(), "tests were skipped, and --require-gpu forbids that");
    Ok(())
}

/// What depends on the driver, with cudarc in cust's place.
fn other_driver(args: &Args, skip_log: &Path) -> Result<()> {
    let mut test = cargo();
    args.codegen.pass_to(&mut test).args(["test", "--release", "-p", "moe-lora-tests"]);
    test.args([
        "--no-default-features",
        "--features",
        "cudarc",
        "--test",
        "ownership",
        "--test",
        "driver_failures",
    ]);
    run_command(test.env(SKIP_LOG_VAR, skip_log))
}

/// An empty file in the target directory for tests to write to.
fn empty_log(name: &str) -> Result<PathBuf> {
    let log = target_dir()?.join(name);
    std::fs::write(&log, "").with_context(|| format!("cannot write {}", log.display()))?;
    Ok(log)
}

/// Says how many kernels ran under emulation, and in how many cases; that all do, a test sees to.
fn print_emulated(log: &str) {
    let mut cases = BTreeMap::<&str, u64>::new();
    for line in log.lines() {
        if let [name, count, _] = line.split(' ').collect::<Vec<_>>()[..] {
            *cases.entry(name).or_default() += count.parse::<u64>().unwrap_or(0);
        }
    }
    let least = cases.iter().min_by_key(|(_, cases)| **cases);
    if let Some((kernel, least)) = least {
        let (ran, all, total) = (cases.len(), ENTRIES.len(), cases.values().sum::<u64>());
        println!(
            "\nUnder emulation: {ran} of {all} kernels, {total} kernel × shape cases; \
             fewest for {kernel}: {least}"
        );
    }
}

/// Lists skipped tests by what they were skipped for; a line of the log is `test: reason`.
fn print_skipped(log: &str) {
    let mut reasons = BTreeMap::<&str, Vec<&str>>::new();
    for line in log.lines() {
        let (test, reason) = line.split_once(": ").unwrap_or((line, "no reason given"));
        reasons.entry(reason).or_default().push(test);
    }
    if reasons.is_empty() {
        println!("\nNo test was skipped.");
    }
    for (reason, tests) in reasons {
        println!("\n{} tests were skipped: {reason}", tests.len());
        for test in tests {
            println!("  {test}");
        }
    }
}

/// Builds and runs a crate that is no part of this workspace and names moe-lora by path, as the
/// README tells users to.
pub fn path_dependency() -> Result<()> {
    const MAIN: &str = include_str!("path_dependency.rs.in");
    let dir = target_dir()?.join("path-dependency");
    let root = workspace_root();
    empty_dir(&dir.join("src"))?;
    let manifest = format!(
        "[package]\nname = \"path-dependency\"\nedition = \"2024\"\n\n\
         [dependencies]\nmoe-lora = {{ path = {:?} }}\n\n[workspace]\n",
        root.join("host")
    );
    std::fs::write(dir.join("Cargo.toml"), manifest)?;
    std::fs::write(dir.join("src/main.rs"), MAIN)?;
    // The versions that the workspace was tested with; Cargo drops what is not needed here.
    std::fs::copy(root.join("Cargo.lock"), dir.join("Cargo.lock"))?;
    run_command(
        cargo()
            .args(["run", "--quiet", "--release", "--manifest-path"])
            .arg(dir.join("Cargo.toml"))
            // Where `core` and the kernels are compiled already.
            .arg("--target-dir")
            .arg(target_dir()?)
            .env("CUDA_LIBRARY_PATH", root.join("host/cuda-stub"))
            // Away from the workspace, whose .cargo/config.toml would help.
            .current_dir(Path::new("/")),
    )
}

/// Build the program `moe-lora` and run its demo.
///
/// The demo runs the operator on the GPU where there is one and on the CPU otherwise, and checks
/// the result against the float64 reference.
#[derive(clap::Args)]
pub struct DemoArgs {
    #[command(flatten)]
    codegen: CodegenArgs,
    /// Arguments for `moe-lora demo`; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "DEMO ARGUMENTS")]
    demo: Vec<String>,
}

/// Carries `demo` out.
pub fn demo(args: &DemoArgs) -> Result<()> {
    setup::compiler(&args.codegen)?;
    let mut run = cargo();
    run_command(
        args.codegen
            .pass_to(&mut run)
            .args(["run", "--release", "-p", "moe-lora-cli", "--bin", "moe-lora", "--", "demo"])
            .args(&args.demo),
    )
}
