//! What every kernel may cost, in a file: a change of any number is seen when it is made, not when
//! somebody measures.
//!
//! `codegen/budget.txt` has a line for each kernel of each code generator and architecture:
//!
//! ```text
//! compilers llvm: rustc 1.96.0, LLVM 22.1.8, ptxas 13.0.88
//! llvm sm_90a shrink_bf16_i32_m16 128 0 0 0
//! ```
//!
//! The numbers are [`Cost`]'s, in its order. Another compiler may spend registers otherwise, so numbers are
//! compared where the compilers are those of the file.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::ptxas::Usage;
use crate::{Arch, CodeGenerator};

/// What a kernel costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Registers a thread.
    pub registers: u32,
    /// Bytes of shared memory whose size is fixed at compile time.
    pub static_shared: u32,
    /// Bytes of stack a thread.
    pub stack: u32,
    /// Bytes stored to and loaded from local memory for want of registers.
    pub spills: u32,
}

impl From<&Usage> for Cost {
    fn from(usage: &Usage) -> Self {
        let &Usage { registers, static_shared, stack, spill_stores, spill_loads, .. } = usage;
        Self { registers, static_shared, stack, spills: spill_stores + spill_loads }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { registers, static_shared, stack, spills } = self;
        write!(f, "{registers:>3} {static_shared:>5} {stack} {spills}")
    }
}

/// The kernel of a module.
type Key = (CodeGenerator, Arch, String);

/// What every kernel costs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// What compiled for each code generator, ptxas included.
    pub compilers: BTreeMap<CodeGenerator, String>,
    /// The costs.
    pub kernels: BTreeMap<Key, Cost>,
}

/// A line that is no line of a budget.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} is neither `compilers NAME: …` nor a kernel with four numbers: {text}")]
pub struct BudgetError {
    /// Its number, from 1.
    pub line: usize,
    /// What it is.
    pub text: String,
}

impl Budget {
    /// The file in this project.
    pub fn path() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("budget.txt")
    }

    /// Takes the place of what `self` says of the code generators in `measured`.
    pub fn update(&mut self, measured: Budget) {
        self.kernels.retain(|(generator, ..), _| !measured.compilers.contains_key(generator));
        self.compilers.extend(measured.compilers);
        self.kernels.extend(measured.kernels);
    }

    /// Whether the numbers of a code generator can be compared: both are of the same compilers.
    pub fn is_comparable(&self, measured: &Budget, generator: CodeGenerator) -> bool {
        self.compilers.get(&generator) == measured.compilers.get(&generator)
    }

    /// How `measured` differs, for the code generators that can be compared: lines of the file that no
    /// longer hold with a `-` before them, and what would stand there with a `+`.
    pub fn differences(&self, measured: &Budget) -> Vec<String> {
        let is_compared = |(generator, ..): &Key| {
            measured.compilers.contains_key(generator) && self.is_comparable(measured, *generator)
        };
        let mut keys: Vec<_> = self.kernels.keys().chain(measured.kernels.keys()).collect();
        keys.sort();
        keys.dedup();
        let mut lines = Vec::new();
        for key in keys.into_iter().filter(|key| is_compared(key)) {
            let (before, after) = (self.kernels.get(key), measured.kernels.get(key));
            if before != after {
                lines.extend(before.map(|cost| format!("-{}", line(key, cost))));
                lines.extend(after.map(|cost| format!("+{}", line(key, cost))));
            }
        }
        lines
    }
}

fn line((generator, arch, kernel): &Key, cost: &Cost) -> String {
    format!("{generator} {arch:6} {kernel:24} {cost}")
}

const HEADER: &str = "\
# What every kernel costs: registers a thread; bytes of static shared memory, of stack, of spills.
# `cargo xtask check` compares, `cargo xtask check --bless-budget` writes.
";

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HEADER)?;
        for (generator, compilers) in &self.compilers {
            writeln!(f, "compilers {generator}: {compilers}")?;
        }
        for (key, cost) in &self.kernels {
            writeln!(f, "{}", line(key, cost))?;
        }
        Ok(())
    }
}

impl FromStr for Budget {
    type Err = BudgetError;

    fn from_str(text: &str) -> Result<Self, BudgetError> {
        let mut budget = Self::default();
        for (number, text) in text.lines().enumerate() {
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let read = match text.strip_prefix("compilers ") {
                Some(rest) => rest.split_once(": ").and_then(|(generator, compilers)| {
                    budget.compilers.insert(generator.parse().ok()?, compilers.to_owned());
                    Some(())
                }),
                None => parse_kernel(text).map(|(key, cost)| {
                    budget.kernels.insert(key, cost);
                }),
            };
            read.ok_or_else(|| BudgetError { line: number + 1, text: text.to_owned() })?;
        }
        Ok(budget)
    }
}

fn parse_kernel(line: &str) -> Option<(Key, Cost)> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [generator, arch, kernel, ref numbers @ ..] = words[..] else { return None };
    let numbers: Vec<u32> = numbers.iter().map(|number| number.parse().ok()).collect::<Option<_>>()?;
    let [registers, static_shared, stack, spills] = numbers[..] else { return None };
    let key = (generator.parse().ok()?, arch.parse().ok()?, kernel.to_owned());
    Some((key, Cost { registers, static_shared, stack, spills }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
compilers llvm: rustc 1.96.0, LLVM 22.1.8, ptxas 13.0.88
compilers nvvm: rustc 1.96.0, libNVVM 13.5.37, ptxas 13.0.88
llvm sm_80  route                     40  8320 0 0
llvm sm_90a shrink_bf16_i32_m16      126     0 0 0
nvvm sm_80  route                     38  8320 0 0
";

    fn budget() -> Budget {
        TEXT.parse().unwrap()
    }

    #[test]
    fn a_budget_reads_as_it_was_written() {
        let text = budget().to_string();
        assert_eq!(text, format!("{HEADER}{TEXT}"));
        assert_eq!(text.parse(), Ok(budget()));
    }

    #[test]
    fn the_file_in_git_is_as_it_would_be_written() {
        let text = std::fs::read_to_string(Budget::path()).unwrap();
        let budget: Budget = text.parse().unwrap();
        assert_eq!(budget.to_string(), text);
        for ((generator, arch, kernel), cost) in &budget.kernels {
            assert_eq!((cost.stack, cost.spills), (0, 0), "{generator} {arch} {kernel}");
        }
    }

    #[test]
    fn a_line_that_is_none_is_told() {
        for text in ["llvm sm_80 route 40 8320 0", "llvm sm_75 route 40 8320 0 0", "compilers gcc: 12"] {
            let error = format!("{TEXT}{text}\n").parse::<Budget>().unwrap_err();
            assert_eq!(error, BudgetError { line: 6, text: text.to_owned() });
        }
    }

    #[test]
    fn every_difference_is_a_line() {
        let mut measured = budget();
        assert_eq!(budget().differences(&measured), [""; 0]);
        let llvm = |arch, kernel: &str| (CodeGenerator::Llvm, arch, kernel.to_owned());
        measured.kernels.get_mut(&llvm(Arch::Sm80, "route")).unwrap().registers = 64;
        let cost = measured.kernels.remove(&llvm(Arch::Sm90a, "shrink_bf16_i32_m16")).unwrap();
        measured.kernels.insert(llvm(Arch::Sm90a, "decode"), cost);
        assert_eq!(
            budget().differences(&measured),
            [
                "-llvm sm_80  route                     40  8320 0 0",
                "+llvm sm_80  route                     64  8320 0 0",
                "+llvm sm_90a decode                   126     0 0 0",
                "-llvm sm_90a shrink_bf16_i32_m16      126     0 0 0",
            ]
        );
    }

    #[test]
    fn what_was_not_built_or_was_built_otherwise_is_not_compared() {
        let mut measured = budget();
        measured.kernels.clear();
        measured.compilers.remove(&CodeGenerator::Nvvm);
        measured.compilers.insert(CodeGenerator::Llvm, "rustc 1.97.0".to_owned());
        assert_eq!(budget().differences(&measured), [""; 0]);
        assert!(!budget().is_comparable(&measured, CodeGenerator::Llvm));
    }

    #[test]
    fn an_update_keeps_what_was_not_built() {
        let measured: Budget = "compilers llvm: rustc 1.97.0\nllvm sm_80 route 41 0 0 0\n".parse().unwrap();
        let mut budget = budget();
        budget.update(measured);
        let lines: Vec<_> = budget.kernels.iter().map(|(key, cost)| line(key, cost)).collect();
        assert_eq!(
            lines,
            [
                "llvm sm_80  route                     41     0 0 0",
                "nvvm sm_80  route                     38  8320 0 0",
            ]
        );
        assert_eq!(budget.compilers[&CodeGenerator::Llvm], "rustc 1.97.0");
    }
}
