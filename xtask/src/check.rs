//! `cargo xtask check`

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use moe_lora_codegen::{Arch, Budget, CodeGenerator};

use crate::ptx::{self, Judged};
use crate::setup::{self, CodegenArgs};
use crate::shell::{cargo, run as run_command, target_dir};
use crate::{fuzz, header, package, python, text};

/// Check format, widths of lines, lints, documentation, the C header, Python's types, the packages for
/// crates.io, what strangers may send, and every kernel for every architecture.
///
/// Warnings of rustfmt, clippy, rustdoc, mypy and ptxas are errors. The kernels are compiled by the code
/// generator llvm for sm_80, sm_90a, sm_100 and sm_120, and by nvvm for sm_90a; they are assembled and
/// disassembled, with tools of NVIDIA's that are downloaded where they are not installed. A kernel that
/// spills registers or has a stack frame is an error too, and so is one that costs other than
/// codegen/budget.txt says, or whose machine code lacks what makes it fast. Fuzzing takes 10 seconds, from a
/// fixed seed. The packages are made as by `cargo xtask package`, and tried with one driver.
#[derive(clap::Args)]
pub struct Args {
    /// Instead, make what the kernels cost now the budget (codegen/budget.txt) that checks compare with
    #[arg(long)]
    bless_budget: bool,
    /// Instead, check the kernels alone: by both code generators, for every architecture
    #[arg(long, conflicts_with = "bless_budget")]
    every_kernel: bool,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    if args.bless_budget {
        return bless(kernels(Extent::All)?);
    }
    if args.every_kernel {
        return every_kernel();
    }
    setup::compiler(&CodegenArgs::default())?;
    run_command(cargo().args(["fmt", "--all", "--check"]))?;
    text::check()?;
    header::check()?;
    // In the release profile, as the tests are built: what both need is then compiled once.
    let clippy = ["clippy", "--release", "--all-targets"];
    let deny = ["--", "-D", "warnings"];
    run_command(cargo().args(clippy).arg("--workspace").args(deny))?;
    for package in ["moe-lora", "moe-lora-cli", "moe-lora-capi"] {
        run_command(cargo().args(clippy).args(["-p", package, "--no-default-features"]).args(deny))?;
    }
    run_command(
        cargo().args(["doc", "--release", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    python::check()?;
    package::briefly()?;

    let fuzzed = fuzz::briefly()?;
    let mut kernels = kernels(Extent::Brief)?;
    kernels.skipped.extend(fuzzed.err().map(|reason| format!("fuzzing: {reason}")));
    kernels.hold()
}

/// Checks every kernel, by every code generator that runs everywhere, for every architecture.
pub fn every_kernel() -> Result<()> {
    kernels(Extent::All)?.hold()
}

/// Which kernels are compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// By the usual code generator for every architecture; by others for the one that has all instructions.
    Brief,
    /// By each for every architecture.
    All,
}

impl Extent {
    fn arches(self, codegen: CodeGenerator) -> &'static [Arch] {
        match self {
            Extent::Brief if codegen != CodeGenerator::default() => &[Arch::Sm90a],
            _ => &Arch::ALL,
        }
    }
}

/// What was found out about the kernels.
#[derive(Default)]
struct Kernels {
    measured: Budget,
    /// What could not be done, and why.
    skipped: Vec<String>,
}

impl Kernels {
    /// Holds them to the budget, and tells what was skipped.
    fn hold(mut self) -> Result<()> {
        self.skipped.extend(compare(&read_budget()?, &self.measured)?);
        match self.skipped.is_empty() {
            true => println!("\nEverything was checked."),
            false => println!("\nSkipped:\n- {}\n\nEverything else was checked.", self.skipped.join("\n- ")),
        }
        Ok(())
    }
}

/// Compiles, assembles and reads the kernels by every code generator that runs everywhere.
fn kernels(extent: Extent) -> Result<Kernels> {
    let mut kernels = Kernels::default();
    for codegen in CodeGenerator::CHECKED {
        let compiler = match setup::compiler(&CodegenArgs::named(codegen)) {
            Err(error) if codegen != CodeGenerator::default() => {
                kernels.skipped.push(format!("the kernels by code generator {codegen}: {error:#}"));
                continue;
            }
            compiler => compiler?,
        };
        println!("\nCode generator {codegen}");
        let out = target_dir()?.join("ptx").join(codegen.name());
        match ptx::build(&compiler, extent.arches(codegen), &out, true)? {
            Ok(Judged { budget, unread }) => {
                kernels.measured.update(budget);
                let unread = unread.map(|reason| format!("reading machine code ({codegen}): {reason}"));
                kernels.skipped.extend(unread);
            }
            Err(reason) => kernels.skipped.push(format!("assembling the kernels ({codegen}): {reason}")),
        }
    }
    Ok(kernels)
}

fn read_budget() -> Result<Budget> {
    let path = Budget::path();
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    text.parse().with_context(|| format!("{}", path.display()))
}

/// Fails if a kernel costs other than its budget says; returns what could not be compared.
fn compare(budget: &Budget, measured: &Budget) -> Result<Vec<String>> {
    let differences = of_what_was_measured(budget, measured).differences(measured);
    ensure!(
        differences.is_empty(),
        "kernels cost other than {} says (registers, static shared memory, stack, spills):\n{}\n\
         If that is meant, run `cargo xtask check --bless-budget` and commit the file.",
        Budget::path().display(),
        differences.join("\n")
    );
    let other_compilers = |(&codegen, compilers): (&CodeGenerator, &String)| {
        let of = budget.compilers.get(&codegen).map_or("nothing", String::as_str);
        (!budget.is_comparable(measured, codegen)).then(|| {
            format!("the budget of code generator {codegen}: it was taken with {of}, and this is {compilers}")
        })
    };
    Ok(measured.compilers.iter().filter_map(other_compilers).collect())
}

/// The lines of a budget for the architectures that were compiled.
fn of_what_was_measured(budget: &Budget, measured: &Budget) -> Budget {
    let compiled: BTreeSet<_> = measured.kernels.keys().map(|(codegen, arch, _)| (*codegen, *arch)).collect();
    let mut part = budget.clone();
    part.kernels.retain(|(codegen, arch, _), _| compiled.contains(&(*codegen, *arch)));
    part
}

/// Makes what was measured the budget.
fn bless(kernels: Kernels) -> Result<()> {
    let Kernels { measured, skipped } = kernels;
    ensure!(!measured.kernels.is_empty(), "nothing was measured:\n- {}", skipped.join("\n- "));
    let mut budget = read_budget().unwrap_or_default();
    let differences = budget.differences(&measured);
    budget.update(measured);
    let path = Budget::path();
    std::fs::write(&path, budget.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    println!("\n{} is written.\n{}", path.display(), differences.join("\n"));
    for what in skipped {
        println!("Skipped: {what}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(text: &str) -> Budget {
        text.parse().expect("a budget")
    }

    #[test]
    fn a_regression_fails_with_the_difference_and_what_to_do() {
        let agreed = budget("compilers llvm: rustc 1\nllvm sm_80 route 40 0 0 0\n");
        assert_eq!(compare(&agreed, &agreed).unwrap(), [""; 0]);
        let measured = budget("compilers llvm: rustc 1\nllvm sm_80 route 64 0 0 0\n");
        let error = compare(&agreed, &measured).unwrap_err().to_string();
        for part in
            ["budget.txt", "\n-llvm sm_80  route", " 40 ", "\n+llvm sm_80  route", " 64 ", "--bless-budget"]
        {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }

    #[test]
    fn an_architecture_that_was_not_compiled_is_not_missed_and_a_kernel_is() {
        let agreed = budget(
            "compilers llvm: rustc 1\nllvm sm_80 route 40 0 0 0\nllvm sm_90a route 40 0 0 0\n\
             llvm sm_90a align 40 0 0 0\n",
        );
        let all_of_one = "compilers llvm: rustc 1\nllvm sm_90a route 40 0 0 0\nllvm sm_90a align 40 0 0 0\n";
        assert_eq!(compare(&agreed, &budget(all_of_one)).unwrap(), [""; 0]);
        let lacks_align = budget("compilers llvm: rustc 1\nllvm sm_90a route 40 0 0 0\n");
        assert!(compare(&agreed, &lacks_align).unwrap_err().to_string().contains("-llvm sm_90a align"));
    }

    #[test]
    fn what_other_compilers_made_is_said_not_to_be_compared() {
        let agreed = budget("compilers llvm: rustc 1\nllvm sm_80 route 40 0 0 0\n");
        let measured = budget("compilers llvm: rustc 2\nllvm sm_80 route 64 0 0 0\n");
        let skipped = compare(&agreed, &measured).unwrap();
        assert_eq!(
            skipped,
            ["the budget of code generator llvm: it was taken with rustc 1, and this is rustc 2"]
        );
    }
}
