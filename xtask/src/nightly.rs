//! `cargo xtask nightly`

use std::time::Instant;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::setup::{self, CodegenArgs};
use crate::shell::{cargo, installed, run as run_command, target_dir};
use crate::{bench, check, fuzz, miri, package, python, test};

/// Set where the suites are to do all that they can: more random calls, a hundred orders of threads, full
/// grids.
const NIGHTLY_VAR: &str = "MOE_LORA_NIGHTLY";

/// Seconds of fuzzing for each target.
const FUZZ_SECONDS: u32 = 600;

/// Run what continuous integration has no time for, and say what came of it.
///
/// A part that fails, or that this machine lacks something for, does not stop the others. CONTRIBUTING.md has
/// a table of what each tier holds, and the last result.
#[derive(clap::Args)]
pub struct Args {
    /// Only these parts, separated by commas
    #[arg(long, value_name = "PARTS", value_delimiter = ',')]
    only: Vec<Part>,
}

/// What the nightly run is made of, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The suites on the CPU and on the emulated machine: full grids, 100 orders of threads
    Suites,
    /// Miri on the host's own code
    Miri,
    /// AddressSanitizer on the same
    Sanitizer,
    /// Ten minutes of fuzzing for each target
    Fuzz,
    /// Every kernel by both code generators, for every architecture, held to the budget
    Kernels,
    /// A crate elsewhere that uses the repository by path, and one that uses the packages: with each driver,
    /// and from source
    Packages,
    /// The example on candle's tensors, on the CPU
    Candle,
    /// The same with candle's CUDA back end, built alone
    CandleCuda,
    /// The Python package beside vLLM's own operators, and the files of each vLLM that its plugin is for
    Peers,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    let parts = if args.only.is_empty() { Part::value_variants() } else { &args.only };
    let mut report = Vec::new();
    let mut failures = 0;
    for part in parts {
        println!("\nNightly: {part:?}");
        let start = Instant::now();
        let outcome = match part.missing() {
            Some(reason) => format!("not run: {reason}"),
            None => match part.run() {
                Ok(()) => "passed".to_owned(),
                Err(error) => {
                    eprintln!("\nerror: {error:#}");
                    failures += 1;
                    format!("FAILED: {error:#}")
                }
            },
        };
        let name = format!("{part:?}").to_lowercase();
        report.push(format!("{name:10} {:>6.0} s  {outcome}", start.elapsed().as_secs_f64()));
    }
    println!("\n{}", report.join("\n"));
    if failures > 0 {
        bail!("{failures} of {} parts failed", parts.len());
    }
    Ok(())
}

impl Part {
    /// What this machine lacks for it.
    fn missing(self) -> Option<String> {
        match self {
            Part::Miri => miri::missing(),
            Part::Fuzz => fuzz::missing(),
            Part::CandleCuda if !installed("nvcc") => Some("there is no nvcc on the PATH".to_owned()),
            _ => None,
        }
    }

    fn run(self) -> Result<()> {
        let codegen = CodegenArgs::default();
        match self {
            Part::Suites => {
                setup::compiler(&codegen)?;
                let test = ["test", "--release", "-p", "moe-lora-tests", "--no-fail-fast"];
                let suites = ["cpu", "emulated", "blocks"].map(|suite| ["--test", suite]);
                run_command(cargo().args(test).args(suites.as_flattened()).env(NIGHTLY_VAR, "1"))
            }
            Part::Miri => miri::run(&miri::Args::default()),
            Part::Sanitizer => miri::run(&miri::Args { address_sanitizer: true }),
            Part::Fuzz => fuzz::run(&fuzz::Args::all(FUZZ_SECONDS)),
            Part::Kernels => check::every_kernel(),
            Part::Packages => {
                setup::compiler(&codegen)?;
                test::path_dependency()?;
                package::run(&package::Args::default())
            }
            Part::Candle => {
                setup::compiler(&codegen)?;
                run_command(cargo().args(["test", "--release", "-p", "moe-lora-candle-example"]))
            }
            Part::CandleCuda => {
                setup::compiler(&codegen)?;
                let check = ["check", "--release", "-p", "moe-lora-candle-example", "--features", "cuda"];
                run_command(cargo().args(check).arg("--all-targets"))
            }
            Part::Peers => {
                bench::fetch_every_release()?;
                setup::compiler(&codegen)?;
                let skipped = target_dir()?.join("skipped-peers.txt");
                std::fs::write(&skipped, "")?;
                python::test(&skipped, &codegen)
            }
        }
    }
}
