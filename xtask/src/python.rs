//! `cargo xtask wheel`, and the tests of the Python package

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::environment::Environment;
use crate::glibc::{self, Glibc, Version};
use crate::setup::{self, CodegenArgs};
use crate::shell::{
    SKIP_LOG_VAR, copy_tree, empty_dir, peers_dir, read, remove_dir, run as run_command, target_dir,
    workspace_root,
};

/// Build the Python package, one wheel for Python 3.10 and later, into target/wheels.
///
/// Uses the Python that MOE_LORA_PYTHON names or a python3 of the PATH, and puts maturin into a virtual
/// environment in target/. On Linux the wheel is for glibc 2.28 and later, whatever this machine has.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    codegen: CodegenArgs,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    setup::compiler(&args.codegen)?;
    // With the assembler at hand, the wheel carries cubins, and its users' drivers have nothing to compile.
    if let Err(reason) = setup::ptxas(true) {
        eprintln!("no cubins, the driver will compile the PTX: {reason:#}");
    }
    let environment = Environment::new()?;
    let wheel = wheel(&environment, &Glibc::oldest(&environment)?, &args.codegen)?;
    println!("{}", wheel.display());
    Ok(())
}

/// Builds the wheel, checks what it asks of the machines that it is for, and returns where it is.
pub fn wheel(environment: &Environment, glibc: &Glibc, codegen: &CodegenArgs) -> Result<PathBuf> {
    let out = target_dir()?.join("wheels");
    empty_dir(&out)?;
    let mut maturin = Command::new(environment.program("maturin"));
    maturin
        .args(["build", "--release", "--locked", "--manifest-path", "python/Cargo.toml", "--out"])
        .arg(&out);
    if let Glibc::Stubs(_) = glibc {
        let Version(major, minor) = glibc::OLDEST;
        maturin.args(["--compatibility", &format!("manylinux_{major}_{minor}")]);
    }
    run_command(
        codegen
            .pass_to(&mut maturin)
            .arg("--")
            .args(glibc.rustc_args())
            // Here, where .cargo/config.toml is found.
            .current_dir(workspace_root()),
    )?;
    let mut wheels = out.read_dir()?.collect::<std::io::Result<Vec<_>>>()?;
    let wheel = match wheels.pop() {
        Some(wheel) if wheels.is_empty() => wheel.path(),
        _ => bail!("expected one wheel in {}", out.display()),
    };
    if let Glibc::Stubs(_) = glibc {
        audit(environment, &wheel, glibc)?;
    }
    Ok(wheel)
}

/// Fails if a wheel is for a later glibc than it should be: by what `auditwheel show` says, and by the
/// symbols of the libraries in it, which are named.
fn audit(environment: &Environment, wheel: &Path, glibc: &Glibc) -> Result<()> {
    let scratch = target_dir()?.join("wheel-contents");
    empty_dir(&scratch)?;
    read(environment.python().args(["-m", "zipfile", "-e"]).arg(wheel).arg(&scratch))?;
    let mut libraries = 0;
    for file in scratch.join("moe_lora").read_dir()? {
        let file = file?.path();
        if file.extension().is_some_and(|extension| extension == "so") {
            glibc.check(&file)?;
            libraries += 1;
        }
    }
    remove_dir(&scratch)?;
    ensure!(libraries > 0, "{} has no extension module", wheel.display());
    let shown = read(Command::new(environment.program("auditwheel")).args(["show", "--json"]).arg(wheel))?;
    let shown: Value = serde_json::from_str(&shown).context("auditwheel show --json")?;
    let tag = shown["overall_tag"].as_str().unwrap_or_default();
    println!("auditwheel: {tag}");
    ensure!(
        Version::of_tag(tag).is_some_and(|version| version <= glibc::OLDEST),
        "auditwheel says that {} is for {tag:?}, expected manylinux_2_{} or older",
        wheel.display(),
        glibc::OLDEST.1
    );
    Ok(())
}

/// Runs the tests of the package as it comes out of `wheel`; those that are skipped are listed in `skip_log`.
fn test_package(environment: &Environment, wheel: &Path, skip_log: &Path) -> Result<()> {
    let install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall"];
    run_command(environment.python().args(install).arg(wheel))?;
    run_command(
        environment
            .python()
            .args(["-m", "pytest", "--quiet", "-p", "no:cacheprovider"])
            // Not in python/, whose folder moe_lora has no extension module and would hide the wheel's.
            .current_dir(workspace_root().join("python/tests"))
            // The folder is copied into bundles.
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env(SKIP_LOG_VAR, skip_log)
            // Where `cargo xtask bench --fetch` puts vLLM's own operators, to be compared with.
            .env("MOE_LORA_VLLM_OPS", peers_dir()?),
    )
}

/// Runs the benchmark's tests, none of which needs a GPU.
fn test_bench(environment: &Environment) -> Result<()> {
    run_command(
        environment
            .python()
            .args(["-m", "pytest", "--quiet", "-p", "no:cacheprovider", "bench"])
            .current_dir(workspace_root())
            .env("PYTHONDONTWRITEBYTECODE", "1"),
    )
}

/// Checks the types of the package and of the benchmark.
fn check_types(environment: &Environment) -> Result<()> {
    let cache = target_dir()?.join("mypy");
    for (folder, config) in [("python", "pyproject.toml"), (".", "bench/mypy.ini")] {
        run_command(
            environment
                .python()
                .args(["-m", "mypy", "--config-file", config, "--cache-dir"])
                .arg(&cache)
                .current_dir(workspace_root().join(folder)),
        )?;
    }
    Ok(())
}

/// Builds and tests the package, where there are a Python and the tools. Where there are none, its tests are
/// listed as skipped.
pub fn test(skip_log: &Path, codegen: &CodegenArgs) -> Result<()> {
    let ready = Environment::new().and_then(|environment| Ok((Glibc::oldest(&environment)?, environment)));
    match ready {
        Ok((glibc, environment)) => {
            test_package(&environment, &wheel(&environment, &glibc, codegen)?, skip_log)?;
            test_bench(&environment)
        }
        Err(reason) => {
            let reason = format!("{reason:#}").replace('\n', " ");
            let mut log = std::fs::OpenOptions::new().append(true).open(skip_log)?;
            Ok(writeln!(log, "python/tests: {reason}\nbench/tests: {reason}")?)
        }
    }
}

/// Puts the wheel and its tests into a folder, where there is what builds it.
pub fn copy(to: &Path, glibc: &Glibc, codegen: &CodegenArgs) -> Result<()> {
    let environment = match Environment::new() {
        Ok(environment) => environment,
        Err(reason) => {
            eprintln!("without the Python package: {reason:#}");
            return Ok(());
        }
    };
    let wheel = wheel(&environment, glibc, codegen)?;
    copy_tree(&workspace_root().join("python/tests"), &to.join("tests"))?;
    let name = wheel.file_name().context("a wheel has a name")?;
    std::fs::copy(&wheel, to.join(name)).with_context(|| format!("cannot copy {}", wheel.display()))?;
    Ok(())
}

/// Checks the types of the Python code, where there is what checks them.
pub fn check() -> Result<()> {
    match Environment::new() {
        Ok(environment) => check_types(&environment),
        Err(reason) => {
            println!("\nSkipped: checking the types of the Python code.\n{reason:#}");
            Ok(())
        }
    }
}
