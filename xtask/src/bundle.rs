//! `cargo xtask bundle`

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use moe_lora_codegen::Arch;
use serde_json::Value;

use crate::environment::Environment;
use crate::glibc::Glibc;
use crate::setup::{self, CodegenArgs};
use crate::shell::{
    cargo, copy_tree, empty_dir, installed, peers_dir, read, run as run_command, step, target_dir,
    workspace_root,
};
use crate::{bench, ptx, python};

/// A bundle has to travel: more than this and something is in it that should not be. By code generator llvm
/// it is 182 MB, of which 36 are the kernels of four generations as they are and 99 the same, packed, in nine
/// programs; by nvvm the kernels are about a quarter larger. As a `.tar.xz`, which keeps what is alike once,
/// it is a quarter.
const LARGEST: u64 = 240_000_000;

const README: &str = include_str!("bundle/README.txt");
const RUN_TESTS: &str = include_str!("bundle/run-tests.sh");
const BENCH: &str = include_str!("bundle/bench.sh");

/// Gather all that a GPU machine without Rust needs in one folder.
///
/// The folder holds the program moe-lora, the examples, every test of moe-lora-tests with its fixtures,
/// libmoe_lora.so with its header and its tests, the Python package with its tests, and the PTX. Copy it to a
/// Linux machine with an NVIDIA driver and the same processor architecture, and run ./run-tests.sh there.
#[derive(clap::Args)]
pub struct Args {
    /// Folder to write to, emptied first [default: target/bundle]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Also the files of vLLM that bench.sh measures, 46 MB, for a machine that cannot fetch them.
    /// They are vLLM's, not this project's: do not pass them on
    #[arg(long)]
    peers: bool,
    /// Link with this machine's glibc: the bundle then needs one no older, in place of glibc 2.28. To link
    /// for that takes Python, and 100 MB to fetch the first time
    #[arg(long)]
    native_glibc: bool,
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
    let glibc = match args.native_glibc {
        true => Glibc::Native,
        false => Environment::new().and_then(|environment| Glibc::oldest(&environment)).context(
            "nothing to link with that is older than this machine's glibc (--native-glibc takes that)",
        )?,
    };
    std::fs::write(out.join("README.txt"), README.replace("{glibc}", &glibc.to_string()))?;

    // With the assembler at hand, the programs built below carry cubins as well.
    let compiler = setup::compiler(&args.codegen)?;
    if let Err(reason) = ptx::build(&compiler, &Arch::EMBEDDED, &out.join("ptx"), true)? {
        eprintln!("no cubins, the driver will compile the PTX: {reason}");
    }
    for (folder, package, kind) in [
        (".", "moe-lora-cli", Kind::Bin),
        ("examples", "moe-lora", Kind::Example),
        ("tests", "moe-lora-tests", Kind::Test),
        ("tests", "moe-lora-capi", Kind::Test),
    ] {
        for target in targets(package, kind)? {
            let built = build(package, &target, &args.codegen, &glibc)?;
            ship(&built, &out.join(folder), &target.name, &glibc)?;
        }
    }
    copy_tree(&workspace_root().join("tests/fixtures"), &out.join("fixtures"))?;
    copy_capi(&out.join("capi"), &args.codegen, &glibc)?;
    python::copy(&out.join("python"), &glibc, &args.codegen)?;
    write_script(&out.join("bench.sh"), BENCH)?;
    copy_tree(&workspace_root().join("bench"), &out.join("bench"))?;

    let total = print_sizes(&out)?;
    ensure!(total < LARGEST, "the bundle is larger than {} MB", LARGEST / 1_000_000);
    if args.peers {
        bench::fetch()?;
        copy_tree(&peers_dir()?, &out.join("peers"))?;
    }
    Ok(())
}

/// What a package has of programs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bin,
    Example,
    Test,
}

/// A program that Cargo can build.
struct Target {
    name: String,
    /// What tells Cargo which.
    arguments: Vec<String>,
}

/// The programs of a package.
fn targets(package: &str, kind: Kind) -> Result<Vec<Target>> {
    let metadata = read(cargo().args(["metadata", "--format-version=1", "--no-deps", "--locked"]))?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let described = packages.iter().find(|described| described["name"] == package);
    let described = described.with_context(|| format!("there is no package {package}"))?;
    let mut targets = Vec::new();
    for target in described["targets"].as_array().context("a package has targets")? {
        let name = target["name"].as_str().context("a target has a name")?.to_owned();
        let release = |option: &str| vec![option.to_owned(), name.clone(), "--release".to_owned()];
        let arguments = match (kind, target["kind"][0].as_str().unwrap_or_default()) {
            (Kind::Bin, "bin") => release("--bin"),
            (Kind::Example, "example") => release("--example"),
            (Kind::Test, "test") => release("--test"),
            // The tests within a library, optimised: what `cargo rustc` knows as the profile `bench`.
            (Kind::Test, "lib" | "cdylib") if target["test"] == true => {
                ["--lib", "--profile", "bench"].map(str::to_owned).into()
            }
            _ => continue,
        };
        targets.push(Target { name, arguments });
    }
    Ok(targets)
}

/// Builds a program with Cargo, and returns where it is.
fn build(package: &str, target: &Target, codegen: &CodegenArgs, glibc: &Glibc) -> Result<PathBuf> {
    let mut cargo = cargo();
    cargo
        .args(["rustc", "--package", package])
        .args(&target.arguments)
        .args(["--message-format=json-render-diagnostics", "--"])
        .args(glibc.rustc_args())
        .stderr(Stdio::inherit());
    codegen.pass_to(&mut cargo);
    let what = format!("building {package} {}", target.arguments.join(" "));
    let messages = step(&what, || read(&mut cargo))?;
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line)?;
        if let Some(program) = message["executable"].as_str() {
            return Ok(program.into());
        }
    }
    bail!("{what}: no program came out")
}

/// Puts a program or a shared library into a folder of the bundle.
fn ship(built: &Path, folder: &Path, name: &str, glibc: &Glibc) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let copy = folder.join(name);
    std::fs::copy(built, &copy).with_context(|| format!("cannot copy {}", built.display()))?;
    strip(&copy)?;
    glibc.check(&copy)
}

/// The C interface, in the layout that its tests expect: the library, the header, the example.
fn copy_capi(to: &Path, codegen: &CodegenArgs, glibc: &Glibc) -> Result<()> {
    let capi = workspace_root().join("capi");
    for folder in ["include", "examples"] {
        copy_tree(&capi.join(folder), &to.join(folder))?;
    }
    let mut build = cargo();
    build.args(["rustc", "-p", "moe-lora-capi", "--lib", "--release", "--"]).args(glibc.rustc_args());
    run_command(codegen.pass_to(&mut build))?;
    let name = "libmoe_lora.so";
    ship(&target_dir()?.join("release").join(name), &to.join("lib"), name, glibc)
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
