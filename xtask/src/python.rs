//! `cargo xtask wheel`, and the tests of the Python package

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::bench;
use crate::glibc::{self, Glibc, Version};
use crate::setup::{self, CodegenArgs};
use crate::shell::{
    copy_tree, empty_dir, read, remove_dir, run as run_command, step, target_dir, workspace_root,
};
use crate::test::SKIP_LOG_VAR;

/// Names the Python to use, for example one that has PyTorch.
const PYTHON_VAR: &str = "MOE_LORA_PYTHON";

/// The oldest Python that the package is for: minor version of 3.
const OLDEST: u32 = 10;

/// What the Python code is built, checked and tested with, and the benchmark's chart drawn, the same everywhere.
const TOOLS: [&str; 5] =
    ["auditwheel==6.8.2", "maturin==1.16.0", "matplotlib==3.10.8", "mypy==2.4.1", "pytest==9.2.0"];

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
    let wheel = environment.wheel(&Glibc::oldest(&environment)?, &args.codegen)?;
    println!("{}", wheel.display());
    Ok(())
}

/// A Python that the package is for.
pub fn find() -> Result<PathBuf> {
    let named = std::env::var_os(PYTHON_VAR).filter(|name| !name.is_empty());
    let candidates = match &named {
        Some(name) => vec![PathBuf::from(name)],
        None => ["python3", "python3.13", "python3.12", "python3.11", "python3.10"].map(PathBuf::from).into(),
    };
    let suits = format!("import sys; sys.exit(sys.version_info < (3, {OLDEST}))");
    let found = candidates.iter().find(|python| read(Command::new(python).args(["-c", &suits])).is_ok());
    match (found, named) {
        (Some(python), _) => Ok(python.clone()),
        (None, Some(name)) => {
            bail!("{PYTHON_VAR}={} is not a Python 3.{OLDEST} or newer", name.display())
        }
        (None, None) => bail!(
            "no Python 3.{OLDEST} or newer was found: install one (Debian: apt-get install python3-venv), \
             or name one in {PYTHON_VAR}"
        ),
    }
}

/// A virtual environment in target/ with the tools in it. It sees the packages of the Python that it was made
/// with, PyTorch among them if that has it.
pub struct Environment {
    dir: PathBuf,
}

impl Environment {
    /// Makes it, unless it is there.
    pub fn new() -> Result<Self> {
        let python = find()?;
        let version =
            read(Command::new(&python).args(["-c", "import sys; print(sys.executable, sys.version)"]))?;
        let made_from = format!("{version}{}\n", TOOLS.join("\n"));
        let dir = target_dir()?.join("python");
        let stamp = dir.join("made-from.txt");
        let environment = Environment { dir };
        if std::fs::read_to_string(&stamp).is_ok_and(|text| text == made_from) {
            return Ok(environment);
        }
        remove_dir(&environment.dir)?;
        step(&format!("installing {} for Python", TOOLS.join(", ")), || {
            let venv = ["-m", "venv", "--system-site-packages"];
            read(Command::new(&python).args(venv).arg(&environment.dir)).with_context(|| {
                format!("{} has no venv (Debian: apt-get install python3-venv)", python.display())
            })?;
            read(environment.python().args(["-m", "pip", "install", "--quiet"]).args(TOOLS))
        })?;
        std::fs::write(&stamp, made_from)?;
        Ok(environment)
    }

    /// Its interpreter.
    pub fn python(&self) -> Command {
        Command::new(self.program("python"))
    }

    fn program(&self, name: &str) -> PathBuf {
        let folder = if cfg!(windows) { "Scripts" } else { "bin" };
        self.dir.join(folder).join(name)
    }

    /// Builds the wheel, checks what it asks of the machines that it is for, and returns where it is.
    pub fn wheel(&self, glibc: &Glibc, codegen: &CodegenArgs) -> Result<PathBuf> {
        let out = target_dir()?.join("wheels");
        empty_dir(&out)?;
        let mut maturin = Command::new(self.program("maturin"));
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
            self.audit(&wheel, glibc)?;
        }
        Ok(wheel)
    }

    /// Fails if a wheel is for a later glibc than it should be: by what `auditwheel show` says, and by the
    /// symbols of the libraries in it, which are named.
    fn audit(&self, wheel: &Path, glibc: &Glibc) -> Result<()> {
        let scratch = target_dir()?.join("wheel-contents");
        empty_dir(&scratch)?;
        read(self.python().args(["-m", "zipfile", "-e"]).arg(wheel).arg(&scratch))?;
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
        let shown = read(Command::new(self.program("auditwheel")).args(["show", "--json"]).arg(wheel))?;
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
    fn test(&self, wheel: &Path, skip_log: &Path) -> Result<()> {
        let install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall"];
        run_command(self.python().args(install).arg(wheel))?;
        run_command(
            self.python()
                .args(["-m", "pytest", "--quiet", "-p", "no:cacheprovider"])
                // Not in python/, whose folder moe_lora has no extension module and would hide the wheel's.
                .current_dir(workspace_root().join("python/tests"))
                // The folder is copied into bundles.
                .env("PYTHONDONTWRITEBYTECODE", "1")
                .env(SKIP_LOG_VAR, skip_log)
                // Where `cargo xtask bench --fetch` puts vLLM's own operators, to be compared with.
                .env("MOE_LORA_VLLM_OPS", bench::peers()?),
        )
    }

    /// Runs the benchmark's tests, none of which needs a GPU.
    fn test_bench(&self) -> Result<()> {
        run_command(
            self.python()
                .args(["-m", "pytest", "--quiet", "-p", "no:cacheprovider", "bench"])
                .current_dir(workspace_root())
                .env("PYTHONDONTWRITEBYTECODE", "1"),
        )
    }

    /// Checks the types of the package and of the benchmark.
    fn check(&self) -> Result<()> {
        let cache = target_dir()?.join("mypy");
        for (folder, config) in [("python", "pyproject.toml"), (".", "bench/mypy.ini")] {
            run_command(
                self.python()
                    .args(["-m", "mypy", "--config-file", config, "--cache-dir"])
                    .arg(&cache)
                    .current_dir(workspace_root().join(folder)),
            )?;
        }
        Ok(())
    }
}

/// Builds and tests the package, where there are a Python and the tools. Where there are none, its tests are
/// listed as skipped.
pub fn test(skip_log: &Path, codegen: &CodegenArgs) -> Result<()> {
    let ready = Environment::new().and_then(|environment| Ok((Glibc::oldest(&environment)?, environment)));
    match ready {
        Ok((glibc, environment)) => {
            environment.test(&environment.wheel(&glibc, codegen)?, skip_log)?;
            environment.test_bench()
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
    let wheel = environment.wheel(glibc, codegen)?;
    copy_tree(&workspace_root().join("python/tests"), &to.join("tests"))?;
    let name = wheel.file_name().context("a wheel has a name")?;
    std::fs::copy(&wheel, to.join(name)).with_context(|| format!("cannot copy {}", wheel.display()))?;
    Ok(())
}

/// Checks the types of the Python code, where there is what checks them.
pub fn check() -> Result<()> {
    match Environment::new() {
        Ok(environment) => environment.check(),
        Err(reason) => {
            println!("\nSkipped: checking the types of the Python code.\n{reason:#}");
            Ok(())
        }
    }
}
