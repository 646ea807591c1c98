//! `cargo xtask check`

use anyhow::Result;
use moe_lora_codegen::Arch;

use crate::setup::{self, CodegenArgs};
use crate::shell::{cargo, run as run_command, target_dir};
use crate::{header, ptx};

/// Check format, lints, documentation, the C header, and every kernel for every architecture.
///
/// Warnings of rustfmt, clippy, rustdoc and ptxas are errors. The kernels are assembled for sm_80,
/// sm_90a, sm_100 and sm_120, with a ptxas that is downloaded where none is installed; a kernel
/// that spills registers or has a stack frame is an error too.
#[derive(clap::Args)]
pub struct Args {}

/// Carries the command out.
pub fn run(_: &Args) -> Result<()> {
    setup::compiler(&CodegenArgs::default())?;
    run_command(cargo().args(["fmt", "--all", "--check"]))?;
    header::check()?;
    // In the release profile, as the tests are built: what both need is then compiled once.
    let clippy = ["clippy", "--release", "--all-targets"];
    let deny = ["--", "-D", "warnings"];
    run_command(cargo().args(clippy).arg("--workspace").args(deny))?;
    for package in ["moe-lora", "moe-lora-capi"] {
        run_command(cargo().args(clippy).args(["-p", package, "--no-default-features"]).args(deny))?;
    }
    run_command(
        cargo().args(["doc", "--release", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    let assembled = ptx::build(&CodegenArgs::default(), &Arch::ALL, &target_dir()?.join("ptx"), true)?;
    match assembled {
        Ok(()) => println!("\nEverything was checked."),
        Err(reason) => println!(
            "\nSkipped: assembling the kernels with ptxas.\n{reason}\n\nEverything else was checked."
        ),
    }
    Ok(())
}
