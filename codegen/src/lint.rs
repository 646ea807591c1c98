//! Refuses PTX that would run slowly or not load.
//!
//! Everything a kernel needs is inlined into it and held in registers. What breaks that is easy to
//! write in Rust and silent until a profile shows it, so the build fails instead.

use std::fmt;

use moe_lora_kernels::Entry;

use crate::stamp::entry_name;

/// What is wrong with a place in the PTX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An array or a spilled value lives in local memory, which is device memory.
    LocalMemory,
    /// The code can panic, and would call into `core`.
    Panics {
        /// The panic function.
        callee: String,
    },
    /// A function was not inlined.
    Calls {
        /// The function.
        callee: String,
    },
    /// A function is declared and has no body: the module would not load.
    External {
        /// The function.
        callee: String,
    },
    /// The entry point is not in `moe_lora_kernels::ENTRIES`.
    NotInTable,
    /// The entry point is in `moe_lora_kernels::ENTRIES` only.
    NotInPtx,
    /// The entry point has no launch bounds.
    NoLaunchBounds,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LocalMemory => f.write_str(
                "local memory: an array is indexed at run time, or its address escapes; \
                 unroll until every index is a constant",
            ),
            Self::Panics { callee } => write!(
                f,
                "can panic ({callee}): no checked indexing, unwrap, or division whose divisor may be zero",
            ),
            Self::Calls { callee } => write!(f, "calls {callee}: mark it #[inline(always)]"),
            Self::External { callee } => write!(f, "{callee} has no body on the device"),
            Self::NotInTable => f.write_str("entry point is missing from ENTRIES"),
            Self::NotInPtx => f.write_str("entry point of ENTRIES is missing from the PTX"),
            Self::NoLaunchBounds => f.write_str("entry point has no .maxntid"),
        }
    }
}

/// One fault, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The kernel or device function; empty for a fault outside all of them.
    pub kernel: String,
    /// The line of the PTX, counted from 1; 0 where there is none.
    pub line: usize,
    /// What is wrong.
    pub fault: Fault,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: ", self.line)?;
        }
        if !self.kernel.is_empty() {
            write!(f, "{}: ", self.kernel)?;
        }
        self.fault.fmt(f)
    }
}

/// All that is wrong with a module.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n"))]
pub struct LintError {
    /// The faults, in the order of the PTX.
    pub findings: Vec<Finding>,
}

/// Checks stamped PTX against the table of entry points.
///
/// # Errors
///
/// [`LintError`] with everything that was found.
pub fn lint(ptx: &str, entries: &[Entry]) -> Result<(), LintError> {
    let mut findings = Vec::new();
    let mut seen = Vec::new();
    // The function whose text is being read, and the entry point that still lacks launch bounds.
    let mut function = String::new();
    let mut unbounded: Option<usize> = None;

    for (index, line) in ptx.lines().enumerate() {
        let line_number = index + 1;
        let text = line.trim();
        let mut report = |fault| {
            findings.push(Finding { kernel: function.clone(), line: line_number, fault });
        };

        if let Some(name) = entry_name(text) {
            function = name.to_owned();
            seen.push(name);
            if entries.iter().any(|entry| entry.name == name) {
                unbounded = Some(line_number);
            } else {
                findings.push(Finding {
                    kernel: function.clone(),
                    line: line_number,
                    fault: Fault::NotInTable,
                });
            }
        } else if let Some(declared) = text.strip_prefix(".extern .func ") {
            let callee = function_name(declared);
            report(match is_panic(callee) {
                true => Fault::Panics { callee: callee.to_owned() },
                false => Fault::External { callee: callee.to_owned() },
            });
        } else if let Some((before, defined)) = text.split_once(".func ")
            && matches!(before.trim(), "" | ".visible" | ".weak")
        {
            function = function_name(defined).to_owned();
        } else if text.starts_with(".maxntid") {
            unbounded = None;
        } else if text == "{" {
            if let Some(line) = unbounded.take() {
                findings.push(Finding { kernel: function.clone(), line, fault: Fault::NoLaunchBounds });
            }
        } else if line == "}" {
            function.clear();
        } else if text.starts_with(".local ") {
            report(Fault::LocalMemory);
        } else if let Some(callee) = callee(text) {
            let callee = callee.to_owned();
            report(match is_panic(&callee) {
                true => Fault::Panics { callee },
                false => Fault::Calls { callee },
            });
        }
    }
    findings.extend(entries.iter().filter(|entry| !seen.contains(&entry.name)).map(|entry| Finding {
        kernel: entry.name.to_owned(),
        line: 0,
        fault: Fault::NotInPtx,
    }));

    if findings.is_empty() { Ok(()) } else { Err(LintError { findings }) }
}

/// The name in `(.param .b32 func_retval0) name(`, the part of a function's header after `.func`.
fn function_name(header: &str) -> &str {
    let header = match header.trim_start().strip_prefix('(') {
        Some(rest) => rest.split_once(')').map_or(rest, |(_, name)| name),
        None => header,
    };
    header.split('(').next().unwrap_or_default().trim()
}

/// The callee in `call.uni (retval0), name, (param0);` or `@%p1 call name;`.
fn callee(instruction: &str) -> Option<&str> {
    let unguarded = match instruction.strip_prefix('@') {
        Some(guarded) => guarded.split_once(char::is_whitespace)?.1.trim_start(),
        None => instruction,
    };
    let (opcode, operands) = unguarded.split_once(char::is_whitespace)?;
    if !matches!(opcode, "call" | "call.uni") {
        return None;
    }
    let operands = operands.trim_start();
    let operands = match operands.strip_prefix('(') {
        Some(results) => results.split_once(')')?.1.trim_start_matches([',', ' ']),
        None => operands,
    };
    operands.split([',', ';']).next().map(str::trim)
}

/// Whether a mangled name is one of core's panic functions.
fn is_panic(name: &str) -> bool {
    name.contains("9panicking") || name.contains("panic_fmt") || name.contains("unwrap_failed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_entry;

    const ENTRIES: &[Entry] = &[test_entry("shrink", 128, 4)];

    /// A module with the one entry point, and `body` in it from line 10 on.
    fn module(before: &str, body: &str) -> String {
        format!(
            "//\n.version 8.0\n.target sm_90a\n.address_size 64\n{before}\n\
             .visible .entry shrink(\n\t.param .u64 shrink_param_0\n)\n.maxntid 128, 1, 1\n\
             {{\n{body}\tret;\n\n}}\n"
        )
    }

    fn findings(ptx: &str) -> Vec<String> {
        match lint(ptx, ENTRIES) {
            Ok(()) => Vec::new(),
            Err(error) => error.findings.iter().map(Finding::to_string).collect(),
        }
    }

    #[track_caller]
    fn assert_one(ptx: &str, start: &str) {
        let found = findings(ptx);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with(start), "{found:?}");
    }

    #[test]
    fn a_clean_module_passes() {
        let body = "\t.reg .b32 %r<4>;\n\t.shared .align 4 .b8 tile[64];\n\t{ // callseq\n\t}\n";
        assert_eq!(findings(&module("", body)), [""; 0]);
    }

    #[test]
    fn local_memory_is_refused() {
        let ptx = module("", "\t.local .align 4 .b8 \t__local_depot4[128];\n");
        assert_one(&ptx, "line 11: shrink: local memory");
    }

    #[test]
    fn a_panic_is_refused_where_it_is_called() {
        let name = "_RNvNtCs2DxGA1hvVcO_4core9panicking18panic_bounds_check";
        let ptx = module("", &format!("\tcall.uni {name}, (param0, param1);\n"));
        assert_one(&ptx, &format!("line 11: shrink: can panic ({name})"));
        let ptx = module(&format!(".extern .func {name}\n(\n)\n.noreturn;"), "");
        assert_one(&ptx, &format!("line 5: can panic ({name})"));
    }

    #[test]
    fn a_function_that_was_not_inlined_is_refused() {
        for call in [
            "\tcall.uni (retval0), outlined, (param0);\n",
            "\t@%p1 call outlined, (param0);\n",
            "\tcall outlined;\n",
        ] {
            assert_one(&module("", call), "line 11: shrink: calls outlined:");
        }
        let helper = ".func  (.param .b32 func_retval0) outer(\n)\n{\n\tcall.uni inner, ();\n}";
        assert_one(&module(helper, ""), "line 8: outer: calls inner:");
    }

    #[test]
    fn a_function_without_a_body_is_refused() {
        let ptx = module(".extern .func  (.param .b32 retval) vprintf\n(\n)\n;", "");
        assert_one(&ptx, "line 5: vprintf has no body");
    }

    #[test]
    fn the_table_and_the_module_must_agree() {
        let ptx = module(".visible .entry stray()\n{\n}", "");
        assert_one(&ptx, "line 5: stray: entry point is missing from ENTRIES");
        assert_one("", "shrink: entry point of ENTRIES is missing from the PTX");
    }

    #[test]
    fn an_entry_without_launch_bounds_is_refused() {
        let ptx = module("", "").replace(".maxntid 128, 1, 1\n", "");
        assert_one(&ptx, "line 6: shrink: entry point has no .maxntid");
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let ptx = module("", "\t.local .b8 a[4];\n\tcall.uni f, ();\n");
        assert_eq!(findings(&ptx).len(), 2);
    }
}
