//! `cargo xtask fuzz`

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::shell::{cargo, empty_dir, installed, read, run as run_command, step, target_dir, workspace_root};

/// The fuzz targets, each a module of the crate in fuzz/.
const TARGETS: [&str; 3] = ["abi", "adapter", "planner"];

/// Seconds after which an input counts as a failure: none takes a tenth of one.
const TIMEOUT: u32 = 20;

/// Most inputs that are added to a corpus at a time: it stands in the repository.
const MOST_KEPT: usize = 64;

/// Make up inputs for what takes them from strangers, guided by what code they reach.
///
/// The targets are adapter folders (adapter), calls through the C interface (abi), and sizes to plan for
/// (planner). libFuzzer makes up the inputs; it needs a C++ compiler, and works with stable Rust. It starts
/// from fuzz/corpus and keeps what it finds under target/fuzz, where the next run goes on. An input that
/// breaks a promise is written there, and the command that replays it is printed.
#[derive(clap::Args)]
pub struct Args {
    /// Only this target
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Seed of what is made up, from 1 on; a fresh one when left out
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    seed: Option<u32>,
    /// Run this input alone
    #[arg(long, value_name = "FILE", requires = "target")]
    replay: Option<PathBuf>,
    /// Add the smallest of the inputs that together reach as much as all that were found to fuzz/corpus
    #[arg(long, conflicts_with = "replay")]
    keep: bool,
}

impl Args {
    /// Every target, for so many seconds each.
    pub fn all(seconds: u32) -> Self {
        Args { target: None, seconds, seed: None, replay: None, keep: false }
    }
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    if let Some(reason) = missing() {
        bail!(reason);
    }
    let chosen = args.target.as_deref();
    let programs = Programs::build()?;
    for target in TARGETS.into_iter().filter(|target| chosen.is_none_or(|chosen| chosen == *target)) {
        match &args.replay {
            Some(input) => run_command(programs.command(target).arg(fs::canonicalize(input)?))?,
            // libFuzzer takes 0 for: choose one.
            None => programs.fuzz(target, args.seconds, args.seed.unwrap_or(0), true)?,
        }
        if args.keep {
            programs.keep(target)?;
        }
    }
    Ok(())
}

/// Fuzzes each target for a few seconds, from a fixed seed and fuzz/corpus alone. The inner error says why it
/// cannot be done.
pub fn briefly() -> Result<Result<(), String>> {
    const SECONDS: u32 = 10;
    if let Some(reason) = missing() {
        return Ok(Err(reason));
    }
    let programs = &Programs::build()?;
    // Each on one core.
    std::thread::scope(|scope| {
        let fuzz = |target| scope.spawn(move || programs.fuzz(target, SECONDS, 1, false));
        let threads = TARGETS.map(fuzz);
        threads.into_iter().try_for_each(|thread| thread.join().expect("fuzzing does not panic"))
    })?;
    Ok(Ok(()))
}

/// Why there can be no fuzzing here.
pub fn missing() -> Option<String> {
    let found = std::env::var_os("CXX").is_some() || ["c++", "g++", "clang++"].into_iter().any(installed);
    (!found).then(|| "libFuzzer needs a C++ compiler: on Debian, apt-get install g++".to_owned())
}

/// The instrumented targets.
struct Programs {
    /// `target/fuzz`.
    dir: PathBuf,
    /// Where the programs are.
    programs: PathBuf,
}

impl Programs {
    /// Builds all targets, with counters that libFuzzer reads, and with the checks of a debug build.
    fn build() -> Result<Self> {
        let flags = [
            "-Cpasses=sancov-module",
            "-Cllvm-args=-sanitizer-coverage-level=4",
            "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
            "-Cllvm-args=-sanitizer-coverage-pc-table",
            "-Cllvm-args=-sanitizer-coverage-trace-compares",
            "-Cdebug-assertions",
            "-Coverflow-checks",
            "-Ccodegen-units=1",
        ];
        let host = read(cargo().args(["-vV"]))?;
        let host =
            host.lines().find_map(|line| line.strip_prefix("host: ")).context("cargo -vV names no host")?;
        let dir = target_dir()?.join("fuzz");
        run_command(
            cargo()
                .args([
                    "build",
                    "--quiet",
                    "--release",
                    "-p",
                    "moe-lora-fuzz",
                    "--features",
                    "libfuzzer",
                    "--bins",
                ])
                // With a target, build scripts and macros are not instrumented.
                .args(["--target", host, "--target-dir"])
                .arg(&dir)
                .env("RUSTFLAGS", flags.join(" ")),
        )?;
        let programs = dir.join(host).join("release");
        Ok(Programs { dir, programs })
    }

    fn command(&self, target: &str) -> Command {
        Command::new(self.programs.join(format!("fuzz-{target}")))
    }

    /// What libFuzzer has found for a target on this machine.
    fn found(&self, target: &str) -> Result<PathBuf> {
        let found = self.dir.join("corpus").join(target);
        fs::create_dir_all(&found).with_context(|| format!("cannot create {}", found.display()))?;
        Ok(found)
    }

    /// Fuzzes one target. `go_on`: from what was found before, and keeping what is.
    fn fuzz(&self, target: &str, seconds: u32, seed: u32, go_on: bool) -> Result<()> {
        let failures = self.dir.join("failures");
        fs::create_dir_all(&failures).with_context(|| format!("cannot create {}", failures.display()))?;
        let before = files(&failures)?;
        let mut command = self.command(target);
        command.args([
            format!("-max_total_time={seconds}"),
            format!("-seed={seed}"),
            format!("-artifact_prefix={}/{target}-", failures.display()),
            format!("-timeout={TIMEOUT}"),
            "-print_final_stats=1".to_owned(),
            "-verbosity=0".to_owned(),
        ]);
        // One core.
        command.env("RAYON_NUM_THREADS", "1");
        let words = workspace_root().join("fuzz").join(target).with_extension("dict");
        if words.exists() {
            command.arg(format!("-dict={}", words.display()));
        }
        // libFuzzer writes what it finds to the first folder that it is given: never to the sources'.
        command.arg(if go_on {
            self.found(target)?
        } else {
            let brief = self.dir.join("brief").join(target);
            empty_dir(&brief)?;
            brief
        });
        let what = format!("fuzzing {target} for {seconds} s");
        let output = step(&what, || Ok(command.arg(kept(target)).output()?))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            let number = |name| said.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("?").trim();
            let [inputs, new] = ["stat::number_of_executed_units:", "stat::new_units_added:"].map(number);
            println!("{target}: {inputs} inputs, {new} of which reached something new");
            return Ok(());
        }
        eprintln!("{said}");
        for input in files(&failures)?.iter().filter(|input| !before.contains(input)) {
            eprintln!("To replay: cargo xtask fuzz {target} --replay {}", input.display());
        }
        bail!("{target} breaks a promise: {}", output.status)
    }

    /// Adds to a target's corpus the smallest of the few inputs that reach as much as all that was found.
    fn keep(&self, target: &str) -> Result<()> {
        let smallest = self.dir.join("smallest");
        empty_dir(&smallest)?;
        let mut command = self.command(target);
        command.args(["-set_cover_merge=1", "-use_counters=0", "-verbosity=0"]).arg(&smallest);
        run_command(command.arg(kept(target)).arg(self.found(target)?))?;
        let mut inputs = files(&smallest)?;
        ensure!(!inputs.is_empty(), "nothing of {target} is worth keeping");
        inputs.sort_by_cached_key(|input| fs::metadata(input).map_or(u64::MAX, |file| file.len()));
        for input in inputs.iter().take(MOST_KEPT) {
            fs::copy(input, kept(target).join(input.file_name().context("a file has a name")?))?;
        }
        Ok(())
    }
}

/// A target's corpus in the repository.
fn kept(target: &str) -> PathBuf {
    workspace_root().join("fuzz/corpus").join(target)
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}
