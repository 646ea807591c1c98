//! How wide lines are, and how long files.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::shell::{read, workspace_root};

/// Most characters of a line, of code, comments and prose: what rustfmt keeps code to.
const WIDTH: usize = 110;

/// Most lines of a source file of the crates that are read the most.
const LENGTH: usize = 450;

/// Folders of those crates.
const SHORT: [&str; 2] = ["host/", "kernels-gpu/"];

/// Kinds of files whose lines are counted.
const KINDS: [&str; 6] = ["rs", "in", "py", "toml", "sh", "md"];

/// Fails if a file that git tracks has lines too wide, or too many.
pub fn check() -> Result<()> {
    let listed = read(Command::new("git").current_dir(workspace_root()).args(["ls-files", "-z"]))?;
    let mut faults = Vec::new();
    for name in listed.split('\0').filter(|name| is_counted(name)) {
        let path = workspace_root().join(name);
        // One that was deleted and not yet committed.
        if path.is_file() {
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {name}"))?;
            faults.extend(faults_of(name, &text));
        }
    }
    ensure!(faults.is_empty(), "{} lines or files are too long:\n{}", faults.len(), faults.join("\n"));
    Ok(())
}

fn is_counted(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| KINDS.contains(&extension))
}

/// What is too long in a file, a line each.
fn faults_of(name: &str, text: &str) -> Vec<String> {
    let is_wide = |line: &str| {
        // A row of a table, an address and, in code, a string cannot be broken. rustfmt breaks all else.
        let prose = line.trim_start().trim_start_matches("//!").trim_start_matches("///").trim_start();
        let is_row = prose.starts_with('|') && (name.ends_with(".md") || prose.ends_with('|'));
        let is_comment = line.trim_start().starts_with("//");
        let has_string = name.ends_with(".rs") && !is_comment && line.contains('"');
        line.chars().count() > WIDTH && !is_row && !has_string && !line.contains("://")
    };
    let wide = text.lines().enumerate().filter(|(_, line)| is_wide(line));
    let mut faults: Vec<_> = wide
        .map(|(i, line)| format!("{name}:{}: {} characters, at most {WIDTH}", i + 1, line.chars().count()))
        .collect();
    let lines = text.lines().count();
    if name.ends_with(".rs") && SHORT.iter().any(|folder| name.starts_with(folder)) && lines > LENGTH {
        faults.push(format!("{name}: {lines} lines, at most {LENGTH}"));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_line_is_named_with_its_number_unless_it_cannot_be_broken() {
        let (fits, wide) = ("ä".repeat(WIDTH), "ä".repeat(WIDTH + 1));
        assert_eq!(faults_of("cli/src/main.rs", &fits), [""; 0]);
        let expected = "docs/A.md:2: 111 characters, at most 110";
        assert_eq!(faults_of("docs/A.md", &format!("{fits}\n{wide}\n")), [expected]);
        assert_eq!(faults_of("docs/A.md", &format!("| {wide} |\n[a](https://{wide})")), [""; 0]);
        assert_eq!(faults_of("host/src/a.rs", &format!("//! | {wide} |\n    \"{wide}\",")), [""; 0]);
        // A comment that quotes something can be broken, and so can a closure.
        assert_eq!(faults_of("host/src/a.rs", &format!("// \"{wide}\"\n|{wide}| a")).len(), 2);
    }

    #[test]
    fn a_long_file_is_named_where_files_are_to_be_short() {
        let long = "x\n".repeat(LENGTH + 1);
        for (name, faults) in
            [("host/src/a.rs", 1), ("kernels-gpu/src/a.rs", 1), ("tests/src/a.rs", 0), ("host/README.md", 0)]
        {
            assert_eq!(faults_of(name, &long).len(), faults, "{name}");
        }
        assert_eq!(faults_of("host/src/a.rs", &"x\n".repeat(LENGTH)), [""; 0]);
    }

    #[test]
    fn sources_and_prose_are_counted_and_data_is_not() {
        for name in ["a.rs", "xtask/src/consumer.rs.in", "bench/a.py", "Cargo.toml", "docs/A.md"] {
            assert!(is_counted(name), "{name}");
        }
        for name in ["Cargo.lock", "tests/fixtures/a.json", ".ci/run", "codegen/budget.txt"] {
            assert!(!is_counted(name), "{name}");
        }
    }
}
