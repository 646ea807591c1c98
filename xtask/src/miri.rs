//! `cargo xtask miri`

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell::{read, run as run_command, target_dir, workspace_root};

/// What is run: the host's own code on small calls, without a driver.
const TESTS: [&str; 6] = ["-p", "moe-lora", "--no-default-features", "--lib", "--test", "small"];

/// What Miri leaves out: the planner's own tests, which make plans by the thousand and without unsafe code,
/// and a test of a system call that it does not know (`renameat2`).
const NOT_IN_MIRI: [&str; 5] = ["--", "--skip", "plan::", "--skip", "whole_file::"];

/// Random inputs of each property under Miri, which is a thousand times as slow.
const MIRI_CASES: &str = "8";

/// Watch the host's own code for undefined behaviour: checks, plans and the CPU back end on small calls.
///
/// Miri interprets it and sees all of it. It is part of nightly toolchains:
/// `rustup toolchain install nightly --component miri,rust-src`. AddressSanitizer sees accesses outside of
/// memory, at full speed, with the stable toolchain.
#[derive(Default, clap::Args)]
pub struct Args {
    /// AddressSanitizer in place of Miri
    #[arg(long)]
    pub address_sanitizer: bool,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(workspace_root())
        .env_remove("RUSTUP_TOOLCHAIN")
        .env("CARGO_TARGET_DIR", target_dir()?.join("miri"));
    if args.address_sanitizer {
        // Sanitizers are unstable, and in every toolchain.
        cargo.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", "-Zsanitizer=address");
        // With a target of its own, build scripts and procedural macros are left as they are.
        let target = host()?;
        return run_command(cargo.arg("test").args(TESTS).args(["--target", &target]));
    }
    if let Some(reason) = missing() {
        bail!("{reason}\nWithout one: cargo xtask miri --address-sanitizer");
    }
    // Addresses are numbers here, as they are on a device. rayon keeps its threads, and its queues
    // (crossbeam-epoch) break the rules of stacked borrows, not those of tree borrows.
    let flags = "-Zmiri-permissive-provenance -Zmiri-ignore-leaks -Zmiri-disable-isolation \
                 -Zmiri-tree-borrows";
    cargo.env("MIRIFLAGS", flags).env("RAYON_NUM_THREADS", "2").env("PROPTEST_CASES", MIRI_CASES);
    run_command(cargo.args(["+nightly", "miri", "test"]).args(TESTS).args(NOT_IN_MIRI))
}

/// Why Miri cannot run here.
pub fn missing() -> Option<String> {
    let mut version = Command::new("cargo");
    version.args(["+nightly", "miri", "--version"]).env_remove("RUSTUP_TOOLCHAIN");
    let how = "rustup toolchain install nightly --component miri,rust-src";
    read(&mut version).is_err().then(|| format!("no nightly toolchain with Miri: {how}"))
}

/// The machine that this runs on, as rustc names it.
fn host() -> Result<String> {
    let version = read(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}
