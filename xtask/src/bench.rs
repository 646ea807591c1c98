//! `cargo xtask bench`

use std::path::{Path, PathBuf, absolute};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::environment::{self, Environment};
use crate::glibc::Glibc;
use crate::python;
use crate::setup::{self, CodegenArgs};
use crate::shell::{empty_dir, peers_dir, read, run as run_command, target_dir, workspace_root};

/// What to do where nothing can be measured.
const ELSEWHERE: &str = "\
The benchmark needs a GPU and a Python with torch and triton. MOE_LORA_PYTHON names another than python3.
For a GPU machine without Rust:
  cargo xtask bundle --peers               here; then copy target/bundle there
  ./bench.sh                               there; then bring results.jsonl back
  cargo xtask bench --from results.jsonl   here";

/// Measure beside vLLM's fused MoE-LoRA operators, on this machine's GPU, in one process.
///
/// Builds the Python package, fetches vLLM's operator files out of its wheels, measures, and writes
/// tables and charts to docs/bench, docs/PERFORMANCE.md and README.md: under eight minutes. Needs a GPU and a
/// Python that has torch and triton: python3, or the one that MOE_LORA_PYTHON names. For a GPU machine
/// without Rust, `cargo xtask bundle --peers` makes a folder with everything in it; --from then makes the
/// report of what was measured there.
#[derive(clap::Args)]
pub struct Args {
    /// Few cases and a short replay, about 90 seconds; the report goes to target/bench/report
    #[arg(long)]
    quick: bool,
    /// JSON file of cases to measure in place of the built-in ones; bench/cases.py says what is in it
    #[arg(long, value_name = "FILE.json")]
    cases: Option<PathBuf>,
    /// Only these parts: first,cases,layers,routes,dense,replay; or table, this project with itself
    #[arg(long, value_name = "PARTS")]
    parts: Option<String>,
    /// Folder for tables and charts; docs/PERFORMANCE.md and README.md then stay as they are
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Measure nothing: report what was measured elsewhere. Needs no GPU
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["quick", "cases", "parts"])]
    from: Option<PathBuf>,
    /// Measure a whole vLLM instead, with adapters and without, about four minutes a variant: the one in
    /// KIT/site, or the one that is installed. Results go to docs/bench and README.md
    #[arg(long, value_name = "KIT", num_args = 0..=1, conflicts_with_all = ["quick", "cases", "parts", "from"])]
    vllm: Option<Option<PathBuf>>,
    /// Of --vllm, only these variants: base,off-x,on-x,off,on
    #[arg(long, value_name = "VARIANTS", requires = "vllm")]
    variants: Option<String>,
    /// Measure nothing: fetch vLLM's files, for `cargo xtask bundle --peers`
    #[arg(long, conflicts_with_all = ["quick", "cases", "parts", "from", "out", "vllm"])]
    fetch: bool,
    #[command(flatten)]
    codegen: CodegenArgs,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    if args.fetch {
        return fetch();
    }
    if let Some(results) = &args.from {
        return report(args, &absolute(results)?);
    }
    if let Some(kit) = &args.vllm {
        return in_vllm(args, kit.as_deref());
    }
    let results = target_dir()?.join("bench/results.jsonl");
    let measured = measure(args, &results)?;
    let reported = report(args, &results);
    measured.and(reported)
}

/// Brings vLLM's files, where they are not there yet.
pub fn fetch() -> Result<()> {
    run_command(machine_python()?.args(["-m", "bench.fetch"]).arg(peers_dir()?))
}

/// Brings also what is read of each release of vLLM that the plugin is for: 3 GB are fetched.
pub fn fetch_every_release() -> Result<()> {
    run_command(machine_python()?.args(["-m", "bench.fetch", "--every-release"]).arg(peers_dir()?))
}

/// Measures. The inner result is an error when it began: the results of what did not fail are there.
fn measure(args: &Args, results: &Path) -> Result<Result<()>> {
    probe()?;
    fetch()?;
    let path = package(args)?;
    let mut bench = machine_python()?;
    bench.args(["-m", "bench", "run", "--peers"]).arg(peers_dir()?).arg("--out").arg(results);
    bench.args(args.quick.then_some("--quick"));
    if let Some(cases) = &args.cases {
        bench.arg("--cases").arg(absolute(cases)?);
    }
    if let Some(parts) = &args.parts {
        bench.args(["--parts", parts]);
    }
    Ok(run_command(bench.env("PYTHONPATH", path)))
}

/// Measures a whole vLLM, and replaces its table in README.md where all variants were measured.
fn in_vllm(args: &Args, kit: Option<&Path>) -> Result<()> {
    probe()?;
    let results = match &args.out {
        Some(out) => absolute(out)?.join("vllm.jsonl"),
        None => target_dir()?.join("bench/vllm.jsonl"),
    };
    let mut bench = machine_python()?;
    bench.args(["-m", "bench", "vllm", "--out"]).arg(&results);
    if let Some(kit) = kit {
        bench.arg("--kit").arg(absolute(kit)?);
    }
    if let Some(variants) = &args.variants {
        bench.args(["--variants", variants]);
    }
    run_command(bench.env("PYTHONPATH", package(args)?))?;
    if args.out.is_none() && args.variants.is_none() {
        let mut report = Environment::new()?.python();
        report.current_dir(workspace_root()).args(["-m", "bench", "report", "--only", "in vLLM"]);
        report.args(["--out", "docs/bench", "--into", "README.md"]).arg(&results);
        run_command(&mut report)?;
    }
    println!("{}", results.display());
    Ok(())
}

/// Says what to do where nothing can be measured.
fn probe() -> Result<()> {
    let probe = machine_python()?.args(["-m", "bench.probe"]).output().context("cannot run Python")?;
    if !probe.status.success() {
        bail!("{}\n{ELSEWHERE}", String::from_utf8_lossy(&probe.stderr).trim_end());
    }
    Ok(())
}

/// Builds the Python package for this machine alone, and says where Python finds it, and the benchmark.
fn package(args: &Args) -> Result<std::ffi::OsString> {
    setup::compiler(&args.codegen)?;
    let wheel = python::wheel(&Environment::new()?, &Glibc::Native, &args.codegen)?;
    let site = target_dir()?.join("bench/site");
    empty_dir(&site)?;
    // A wheel of this project's holds files to be found by Python, and nothing to be run at installation.
    read(machine_python()?.args(["-m", "zipfile", "-e"]).arg(wheel).arg(&site))?;
    Ok(std::env::join_paths([site.as_path(), workspace_root()])?)
}

fn report(args: &Args, results: &Path) -> Result<()> {
    let docs = workspace_root().join("docs");
    let partial = args.quick || args.cases.is_some() || args.parts.is_some();
    let (out, into) = match &args.out {
        Some(out) => (absolute(out)?, vec![]),
        None if partial => (target_dir()?.join("bench/report"), vec![]),
        None => (docs.join("bench"), vec![docs.join("PERFORMANCE.md"), workspace_root().join("README.md")]),
    };
    let mut report = Environment::new()?.python();
    report.current_dir(workspace_root()).args(["-m", "bench", "report"]).arg(results).arg("--out").arg(&out);
    for document in into {
        report.arg("--into").arg(document);
    }
    run_command(&mut report)?;
    println!("{}", out.display());
    Ok(())
}

/// The machine's Python, not the environment's: PyTorch may be in an environment that this one does not see.
fn machine_python() -> Result<Command> {
    let mut python = Command::new(environment::find()?);
    // Where it finds the package `bench`.
    python.current_dir(workspace_root());
    Ok(python)
}
