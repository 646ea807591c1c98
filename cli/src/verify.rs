use crate::backends::{Choice, Machine, Ways};
use crate::print::{PrintError, say};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use moe_lora::DType;
use moe_lora_verify::{Case, Outcome, full_grid, quick_grid, vllm_grid};

#[derive(clap::Args)]
#[command(after_help = "\
A GPU is checked under every plan: each form, each tile, 32-bit and 64-bit offsets. So is the emulated GPU
(--backend emulated), in a program built with the feature `emulate`.
A case that fails prints the command that repeats it.

Examples:
  moe-lora verify                                 A second
  moe-lora verify --grid vllm --backend cuda      The grid of vLLM's own test
  moe-lora verify --case '{\"tokens\": 3, \"max_rank\": 7}'")]
pub struct Args {
    /// List of cases
    #[arg(long, default_value = "quick")]
    grid: Grid,
    /// What to check; auto: every back end of this machine
    #[arg(long, default_value = "auto")]
    backend: Choice,
    /// Check one case alone, as JSON; a field that is left out has its default
    #[arg(long, value_name = "JSON", conflicts_with = "grid", value_parser = parse_case)]
    case: Option<Case>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Grid {
    /// Every mode on a small call: a second
    Quick,
    /// Every mode on many shapes: a minute
    Full,
    /// All 72 cases of vLLM's own test: minutes on a CPU
    Vllm,
}

fn parse_case(json: &str) -> Result<Case, serde_json::Error> {
    serde_json::from_str(json)
}

/// Failures printed in full; the rest is counted.
const SHOWN: usize = 20;

/// Checks back ends; fails when a case does.
pub fn verify(args: &Args) -> anyhow::Result<()> {
    let cases = match (&args.case, args.grid) {
        (Some(case), _) => vec![case.clone()],
        (None, Grid::Quick) => quick_grid(),
        (None, Grid::Full) => full_grid(),
        (None, Grid::Vllm) => vllm_grid(),
    };
    let machine = Machine::find();
    let backends = machine.ways(args.backend)?;
    let progress = ProgressBar::new((cases.len() * backends.len()) as u64).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  {eta} left").expect("a valid template"),
    );
    let mut failed = 0;
    let mut rows = Vec::new();
    for backend in &backends {
        let mut tally = Tally::default();
        for case in &cases {
            progress.set_message(case.to_string());
            match backend.check(case) {
                Ok(outcomes) => tally.pass(case, &outcomes),
                Err(failure) => {
                    tally.failed += 1;
                    failed += 1;
                    if failed <= SHOWN {
                        // Whether somebody reads it or not.
                        progress.suspend(|| say!("FAILED {failure}\n")).map_err(|_| wrong())?;
                    }
                }
            }
            progress.inc(1);
        }
        rows.push((backend, tally));
    }
    progress.finish_and_clear();

    let unchecked = machine.missing().filter(|_| args.backend == Choice::Auto);
    let printed = print(&rows, unchecked);
    match failed {
        0 => Ok(printed?),
        _ => Err(wrong()),
    }
}

fn wrong() -> anyhow::Error {
    anyhow::anyhow!("a back end is wrong; the commands above run what failed again")
}

/// Prints what became of all cases, and why there is no GPU among the back ends, where that is not what was
/// asked for.
fn print(rows: &[(&Ways<'_>, Tally)], unchecked: Option<String>) -> Result<(), PrintError> {
    say!(
        "{:<24} {:>6} {:>7} {:>7} {:>12} {:>12}",
        "back end",
        "cases",
        "passed",
        "failed",
        "bf16 error",
        "f16 error"
    )?;
    let (mut all_passed, mut all_failed) = (0, 0);
    for (backend, Tally { passed, failed, bf16, f16 }) in rows {
        let shown = |error: &Option<f64>| error.map_or("-".into(), |error| format!("{error:.1e}"));
        let cases = passed + failed;
        say!("{backend:<24} {cases:>6} {passed:>7} {failed:>7} {:>12} {:>12}", shown(bf16), shown(f16))?;
        (all_passed, all_failed) = (all_passed + passed, all_failed + failed);
    }
    if let Some(reason) = unchecked {
        say!("{:<24} not checked: {reason}", "cuda")?;
    }
    say!("\n{all_passed} passed, {all_failed} failed")
}

/// What became of the cases of one back end: how many, and the worst error that was tolerated.
#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    bf16: Option<f64>,
    f16: Option<f64>,
}

impl Tally {
    fn pass(&mut self, case: &Case, outcomes: &[Outcome]) {
        self.passed += 1;
        let worst = match case.dtype {
            DType::Bf16 => &mut self.bf16,
            DType::F16 => &mut self.f16,
        };
        let errors = outcomes.iter().map(|outcome| outcome.error);
        *worst = errors.chain(*worst).reduce(f64::max);
    }
}
