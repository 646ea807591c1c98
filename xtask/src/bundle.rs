//! `cargo xtask bundle`

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use moe_lora_codegen::Arch;
use serde_json::Value;

use crate::setup::{self, CodegenArgs};
use crate::shell::{
    cargo, copy_tree, empty_dir, installed, read, run as run_command, step, target_dir, workspace_root,
};
use crate::{bench, ptx, python};

/// A bundle has to travel: more than this and something is in it that should not be. By code generator llvm it
/// is 109 MB, of which 24 are the kernels of four generations as they are and 48 the same, packed, in six
/// programs; by nvvm the kernels are about a quarter larger.
const LARGEST: u64 = 140_000_000;

const README: &str = include_str!("bundle/README.txt");
const RUN_TESTS: &str = include_str!("bundle/run-tests.sh");
const BENCH: &str = include_str!("bundle/bench.sh");

/// Gather all that a GPU machine without Rust needs in one folder.
///
/// The folder holds the program moe-lora, the examples, every test of moe-lora-tests with its
/// fixtures, libmoe_lora.so with its header and its tests, the Python package with its tests, and the PTX. Copy it to a Linux machine with an NVIDIA driver and the same processor
/// architecture, and run ./run-tests.sh there.
#[derive(clap::Args)]
pub struct Args {
    /// Folder to write to, emptied first [default: target/bundle]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Also the files of vLLM that bench.sh measures, 46 MB, for a machine that cannot fetch them.
    /// They are vLLM's, not this project's: do not pass them on
    #[arg(long)]
    peers: bool,
    #[command(flatten)]
    codegen: CodegenArgs,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    let out = match &args.out {
        Some(out) => out.clone(),
        None => target_dir()?.join("bundle"),
    };
    let is_ours = out.join("run-tests.sh").is_file();
    let is_free = out.read_dir().map_or(true, |mut entries| entries.next().is_none());
    ensure!(is_ours || is_free, "{} holds something other than a bundle", out.display());
    empty_dir(&out)?;
    // First, so that what an interrupted run leaves behind is known for a bundle.
    write_script(&out.join("run-tests.sh"), RUN_TESTS)?;
    std::fs::write(out.join("README.txt"), README)?;

    // With the assembler at hand, the programs built below carry cubins as well.
    let compiler = setup::compiler(&args.codegen)?;
    if let Err(reason) = ptx::build(&compiler, &Arch::EMBEDDED, &out.join("ptx"), true)? {
        eprintln!("no cubins, the driver will compile the PTX: {reason}");
    }
    for (folder, build) in [
        (".", &["build", "-p", "moe-lora-cli", "--bins"][..]),
        ("examples", &["build", "-p", "moe-lora", "--examples"]),
        ("tests", &["test", "-p", "moe-lora-tests", "-p", "moe-lora-capi", "--no-run"]),
    ] {
        let dir = out.join(folder);
        std::fs::create_dir_all(&dir)?;
        for (name, program) in executables(build, &args.codegen)? {
            let copy = dir.join(name);
            std::fs::copy(&program, &copy).with_context(|| format!("cannot copy {}", program.display()))?;
            strip(&copy)?;
        }
    }
    copy_tree(&workspace_root().join("tests/fixtures"), &out.join("fixtures"))?;
    copy_capi(&out.join("capi"), &args.codegen)?;
    python::copy(&out.join("python"), &args.codegen)?;
    write_script(&out.join("bench.sh"), BENCH)?;
    copy_tree(&workspace_root().join("bench"), &out.join("bench"))?;

    let total = print_sizes(&out)?;
    ensure!(total < LARGEST, "the bundle is larger than {} MB", LARGEST / 1_000_000);
    if args.peers {
        bench::fetch()?;
        copy_tree(&bench::peers()?, &out.join("peers"))?;
    }
    Ok(())
}

/// Builds with Cargo, and returns the name and the path of every program that came out.
fn executables(build: &[&str], codegen: &CodegenArgs) -> Result<Vec<(String, PathBuf)>> {
    let mut cargo = cargo();
    cargo
        .args(build)
        .args(["--release", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit());
    codegen.pass_to(&mut cargo);
    let messages = step(&format!("cargo {} --release", build.join(" ")), || read(&mut cargo))?;
    let mut found = Vec::new();
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line)?;
        if let (Some(program), Some(name)) =
            (message["executable"].as_str(), message["target"]["name"].as_str())
        {
            found.push((name.to_owned(), PathBuf::from(program)));
        }
    }
    Ok(found)
}

/// The C interface, in the layout that its tests expect: the library, the header, the example.
fn copy_capi(to: &Path, codegen: &CodegenArgs) -> Result<()> {
    let capi = workspace_root().join("capi");
    for folder in ["include", "examples"] {
        copy_tree(&capi.join(folder), &to.join(folder))?;
    }
    let mut build = cargo();
    build.args(["build", "-p", "moe-lora-capi", "--lib", "--release"]);
    run_command(codegen.pass_to(&mut build))?;
    let (library, copy) = (target_dir()?.join("release/libmoe_lora.so"), to.join("lib/libmoe_lora.so"));
    std::fs::create_dir_all(to.join("lib"))?;
    std::fs::copy(&library, &copy).with_context(|| format!("cannot copy {}", library.display()))?;
    strip(&copy)
}

/// Drops the symbols of a program, where the tool for it is installed.
fn strip(program: &Path) -> Result<()> {
    if installed("strip") {
        run_command(Command::new("strip").arg(program))?;
    }
    Ok(())
}

fn write_script(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Prints what lies in the bundle, and returns its size.
fn print_sizes(out: &Path) -> Result<u64> {
    println!("\n{}:", out.display());
    let mut total = 0;
    let mut entries: Vec<_> = std::fs::read_dir(out)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let bytes = size(&entry.path())?;
        total += bytes;
        println!("  {:16} {:>8.2} MB", entry.file_name().display(), bytes as f64 / 1e6);
    }
    println!("  {:16} {:>8.2} MB", "in all", total as f64 / 1e6);
    Ok(total)
}

fn size(path: &Path) -> Result<u64> {
    if !path.is_dir() {
        return Ok(path.metadata()?.len());
    }
    let mut total = 0;
    for entry in std::fs::read_dir(path)? {
        total += size(&entry?.path())?;
    }
    Ok(total)
}
