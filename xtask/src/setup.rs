//! What the other commands stand on: a toolchain for the kernels, and ptxas.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use moe_lora_codegen::toolchain::{Place, TARGET};
use moe_lora_codegen::{Compiler, Ptxas, Search, Toolchain, ToolchainError, workspace_root};

use crate::debian;
use crate::shell::{empty_dir, installed, read, remove_dir, step, target_dir};

/// The wheel that has ptxas, the same version wherever kernels are judged.
const PTXAS_WHEEL: &str = "nvidia-cuda-nvcc==13.0.88";

/// A compiler for the kernels: one that is here, or one that was fetched.
pub fn compiler() -> Result<Compiler> {
    let toolchain = toolchain()?;
    eprintln!("kernel toolchain: {toolchain}");
    let cache = target_dir()?.join("kernel-core");
    if Compiler::must_build_core(&toolchain, &cache) {
        step("compiling core for the GPU, once for this toolchain: about a minute", || {
            Ok(Compiler::new(toolchain, &cache)?)
        })
    } else {
        Ok(Compiler::new(toolchain, &cache)?)
    }
}

fn toolchain() -> Result<Toolchain> {
    let search = Search::from_env()?;
    let not_found = match search.find() {
        Err(error @ ToolchainError::NotFound { .. }) => error,
        found => return Ok(found?),
    };

    type Fetch = fn(&Search) -> Result<()>;
    let ways: [(Place, &str, Fetch); 2] = [
        (Place::Rustup, "rustup target add", |_| add_rustup_target()),
        (Place::Project, "unpacking the distribution's packages", |search| {
            debian::unpack_toolchain(&search.project_dir)
        }),
    ];
    let mut failures = String::new();
    for (place, way, fetch) in ways {
        if !search.places.contains(&place) {
            continue;
        }
        match fetch(&search).and_then(|()| Ok(search.find()?)) {
            Ok(toolchain) => return Ok(toolchain),
            Err(error) => failures.push_str(&format!("\n  {way}: {error:#}")),
        }
    }
    bail!("{not_found}\nTried to get one:{failures}")
}

/// Asks rustup for the target's ready-made `core`, in the toolchain of `rust-toolchain.toml`.
fn add_rustup_target() -> Result<()> {
    if !installed("rustup") {
        bail!("rustup is not installed");
    }
    step("asking rustup for the GPU target", || {
        let output = Command::new("rustup")
            .args(["target", "add", TARGET])
            .current_dir(workspace_root())
            .env("RUSTUP_MAX_RETRIES", "0")
            .env_remove("RUST_BACKTRACE")
            .output()?;
        if output.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        let reason = stderr.lines().find_map(|line| line.strip_prefix("error: "));
        bail!("{}", reason.unwrap_or("rustup failed without saying why"))
    })
}

/// A ptxas: one that is here or, if `fetch` says so, one from NVIDIA's Python package.
pub fn ptxas(fetch: bool) -> Result<Ptxas> {
    match Ptxas::find() {
        Err(_) if fetch => {
            fetch_ptxas()?;
            Ok(Ptxas::find()?)
        }
        found => Ok(found?),
    }
}

fn fetch_ptxas() -> Result<()> {
    let program = Ptxas::project_program();
    let dir = program.parent().context("ptxas lies in a folder")?;
    let scratch: PathBuf = dir.with_extension(format!("{}", std::process::id()));
    empty_dir(&scratch)?;
    let fetched = step(&format!("fetching ptxas ({PTXAS_WHEEL}, about 40 MB)"), || {
        read(
            Command::new("python3")
                .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", PTXAS_WHEEL])
                .arg("--dest")
                .arg(&scratch),
        )?;
        let wheel = std::fs::read_dir(&scratch)?.next().context("pip left no file")??.path();
        read(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&scratch))?;
        std::fs::create_dir_all(dir)?;
        let unpacked = scratch.join("nvidia/cu13/bin/ptxas");
        make_executable(&unpacked)?;
        std::fs::rename(&unpacked, &program).with_context(|| format!("{}", program.display()))
    });
    remove_dir(&scratch)?;
    fetched
}

#[cfg(unix)]
fn make_executable(program: &std::path::Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755))
        .with_context(|| format!("{}", program.display()))
}

#[cfg(not(unix))]
fn make_executable(_: &std::path::Path) -> Result<()> {
    Ok(())
}
