//! The Python that the package, its tests and the benchmark's report are made with.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell::{read, remove_dir, step, target_dir};

/// Names the Python to use, for example one that has PyTorch.
const PYTHON_VAR: &str = "MOE_LORA_PYTHON";

/// The oldest Python that the package is for: minor version of 3.
const OLDEST: u32 = 10;

/// What the Python code is built, checked and tested with, and the benchmark's chart drawn, the same
/// everywhere.
const TOOLS: [&str; 5] =
    ["auditwheel==6.8.2", "maturin==1.16.0", "matplotlib==3.10.8", "mypy==2.4.1", "pytest==9.2.0"];

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

    /// One of its programs.
    pub fn program(&self, name: &str) -> PathBuf {
        let folder = if cfg!(windows) { "Scripts" } else { "bin" };
        self.dir.join(folder).join(name)
    }
}
