//! What commands share: the folders of the workspace, running programs, and telling what takes long.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use moe_lora_codegen::{target_dir_around, workspace};

/// The tests append a line to the file that this names whenever they skip something.
pub const SKIP_LOG_VAR: &str = "MOE_LORA_SKIP_LOG";

/// The root of the workspace, which this program was built in.
pub fn workspace_root() -> &'static Path {
    workspace().expect("xtask is no crate of a registry")
}

/// Cargo, in the root of the workspace.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace_root());
    cargo
}

/// The target directory that this program was built into.
pub fn target_dir() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let dir = target_dir_around(&program).context("xtask does not lie in a Cargo target directory")?;
    Ok(dir.to_owned())
}

/// Where vLLM's files lie: below the target directory, for they are not this project's to keep.
pub fn peers_dir() -> Result<PathBuf> {
    Ok(target_dir()?.join("bench/peers"))
}

/// Runs a command with its output in view; an exit status other than 0 is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let line = show(command);
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("cannot run {line}"))?;
    if !status.success() {
        bail!("{line}: {status}");
    }
    Ok(())
}

/// Runs a command and returns what it wrote to stdout; on failure, the error is its stderr.
pub fn read(command: &mut Command) -> Result<String> {
    let line = show(command);
    let output = command.output().with_context(|| format!("cannot run {line}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{line}: {}\n{}", output.status, stderr.trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Does a step that may take long: says what it is, ticks while it lasts, and says how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    const TICK: Duration = Duration::from_secs(10);
    let start = Instant::now();
    eprintln!("{what} …");
    let (done, waiting) = channel::<()>();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = waiting.recv_timeout(TICK) {
                eprintln!("  … {:.0} s", start.elapsed().as_secs_f64());
            }
        });
        let result = work();
        drop(done);
        result
    });
    let outcome = if result.is_ok() { "done" } else { "failed" };
    eprintln!("  {outcome} after {:.1} s", start.elapsed().as_secs_f64());
    result
}

/// Whether a program is on the `PATH`.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// An empty folder at `dir`, whatever was there.
pub fn empty_dir(dir: &Path) -> Result<()> {
    remove_dir(dir)?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
}

/// Removes a folder and all that is in it, if it is there.
pub fn remove_dir(dir: &Path) -> Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

/// Copies a folder and all that is in it.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("{}", from.display()))? {
        let entry = entry?;
        // What Python leaves beside its sources.
        if entry.file_name() == "__pycache__" {
            continue;
        }
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            copy_tree(&from, &to)?;
        } else {
            std::fs::copy(&from, &to).with_context(|| format!("{}", from.display()))?;
        }
    }
    Ok(())
}

/// Removes a file, if it is there.
pub fn remove_file(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", file.display()))
        }
        _ => Ok(()),
    }
}

fn show(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    std::iter::once(program)
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}
