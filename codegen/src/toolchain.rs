//! Finds a rustc that can compile for `nvptx64-nvidia-cuda`.
//!
//! Any rustc since 1.95 has the NVPTX back end; what differs is where `core` for that target comes
//! from. A rustup toolchain may have it ready-made (`rustup target add`), or may have the
//! library's sources (`rust-src`); distributions package the sources too. Places are searched in
//! this order, and the first that will do is taken:
//!
//! | place | what is looked at |
//! |---|---|
//! | `MOE_LORA_KERNEL_RUSTC` | that program alone: when it will not do, that is an error |
//! | `rustup` | those in `$RUSTUP_HOME`: `core` before sources, releases before nightlies, newer before older |
//! | `system` | `/usr/bin/rustc` |
//! | `project` | `target/kernel-toolchain`, which `cargo xtask build-ptx` fills where nothing else is found |
//!
//! `MOE_LORA_KERNEL_SEARCH=system,project` narrows or reorders the last three.

use std::cmp::Reverse;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use crate::cuda_tools;
use crate::sources::workspace;

/// The oldest rustc that will do, as (major, minor): the first with LLVM 22, whose NVPTX back end
/// knows every architecture in [`crate::Arch::ALL`].
pub const OLDEST_RUSTC: (u32, u32) = (1, 95);

/// rustc's name for the GPU.
pub const TARGET: &str = "nvptx64-nvidia-cuda";

/// Names the rustc to use, and ends the search there.
pub const RUSTC_VAR: &str = "MOE_LORA_KERNEL_RUSTC";

/// Lists the places to search, comma-separated.
pub const SEARCH_VAR: &str = "MOE_LORA_KERNEL_SEARCH";

/// A rustc that can compile the kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// Its version, for example `1.96.0`.
    pub release: String,
    /// The commit it was built from, or `unknown`.
    pub commit: String,
    /// The version of its LLVM, for example `22.1.8`.
    pub llvm: String,
    /// Where `core` for the GPU comes from.
    pub core: Core,
    /// Folders that the dynamic loader must search for it to start.
    libraries: Vec<PathBuf>,
}

/// Where a toolchain's `core` for the GPU comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Core {
    /// Installed ready-made: rustc finds it by itself.
    ReadyMade,
    /// To be compiled from the standard library's sources in this folder.
    Sources(PathBuf),
}

impl Toolchain {
    /// A command that runs this rustc with unstable features allowed: the `ptx-kernel` calling
    /// convention and GPU inline assembly are unstable in every release.
    pub fn command(&self) -> Command {
        let mut command = command(&self.rustc, &self.libraries);
        command.env("RUSTC_BOOTSTRAP", "1");
        command
    }

    /// The major version of its LLVM; 0 where it does not tell.
    pub fn llvm_major(&self) -> u32 {
        self.llvm.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0)
    }

    /// Looks at one rustc.
    ///
    /// # Errors
    ///
    /// In words, why it will not do.
    pub fn probe(rustc: &Path) -> Result<Self, String> {
        if !rustc.is_file() {
            return Err("no such file".to_owned());
        }
        let libraries = private_libraries(rustc);
        let ask = |arguments: &[&str]| -> Result<String, String> {
            let output = command(rustc, &libraries)
                .args(arguments)
                .output()
                .map_err(|error| format!("does not run: {error}"))?;
            if output.status.success() {
                Ok(String::from_utf8_lossy(&output.stdout).into_owned())
            } else {
                let stderr = String::from_utf8_lossy(&output.stderr);
                let first = stderr.lines().next().unwrap_or("no message");
                Err(format!("does not run: {first}"))
            }
        };

        let version = ask(&["-vV"])?;
        let field = |name: &str| {
            version
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                .unwrap_or("unknown")
                .to_owned()
        };
        let release = field("release");
        match parse_release(&release) {
            Some((major, minor, _)) if (major, minor) >= OLDEST_RUSTC => {}
            _ => return Err(format!("rustc {release} is older than {}", oldest())),
        }

        let sysroot = PathBuf::from(ask(&["--print", "sysroot"])?.trim_end());
        let core = find_core(&sysroot, &release)
            .ok_or_else(|| format!("rustc {release} has neither core for {TARGET} nor rust-src"))?;
        Ok(Self {
            rustc: rustc.to_owned(),
            commit: field("commit-hash"),
            llvm: field("LLVM version"),
            release,
            core,
            libraries,
        })
    }

    /// Best first: ready-made `core`, then releases, then the newest.
    fn rank(&self) -> impl Ord + use<> {
        let (major, minor, pre) = parse_release(&self.release).unwrap_or_default();
        (self.core != Core::ReadyMade, pre, Reverse((major, minor)), self.rustc.clone())
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = match self.core {
            Core::ReadyMade => "ready-made core",
            Core::Sources(_) => "core from its sources",
        };
        let Self { release, llvm, rustc, .. } = self;
        write!(f, "rustc {release} (LLVM {llvm}, {core}) at {}", rustc.display())
    }
}

/// A place that toolchains are looked for in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The toolchains that rustup has installed.
    Rustup,
    /// The distribution's package.
    System,
    /// The one that this project has unpacked for itself.
    Project,
}

impl Place {
    /// The order of the search, unless `MOE_LORA_KERNEL_SEARCH` says otherwise.
    pub const ALL: [Self; 3] = [Self::Rustup, Self::System, Self::Project];

    /// The name in `MOE_LORA_KERNEL_SEARCH` and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rustup => "rustup",
            Self::System => "system",
            Self::Project => "project",
        }
    }
}

impl FromStr for Place {
    type Err = ToolchainError;

    fn from_str(name: &str) -> Result<Self, ToolchainError> {
        Self::ALL
            .into_iter()
            .find(|place| place.name() == name)
            .ok_or_else(|| ToolchainError::UnknownPlace(name.to_owned()))
    }
}

/// Where to look for a toolchain.
#[derive(Clone, Debug)]
pub struct Search {
    /// The one rustc to take, when the user names it.
    pub named: Option<PathBuf>,
    /// The places to search, in order.
    pub places: Vec<Place>,
    /// rustup's home, where there is one.
    pub rustup_home: Option<PathBuf>,
    /// The distribution's rustc.
    pub system_rustc: PathBuf,
    /// The folder that this project unpacks its own toolchain into; there is none outside of the workspace.
    pub project_dir: Option<PathBuf>,
}

impl Search {
    /// The search as the environment asks for it.
    ///
    /// # Errors
    ///
    /// [`ToolchainError::UnknownPlace`] when `MOE_LORA_KERNEL_SEARCH` has a word that is no place.
    pub fn from_env() -> Result<Self, ToolchainError> {
        let places = match std::env::var(SEARCH_VAR) {
            Ok(list) if !list.trim().is_empty() => {
                list.split(',').map(|name| name.trim().parse()).collect::<Result<_, _>>()?
            }
            _ => Place::ALL.to_vec(),
        };
        Ok(Self {
            named: path(RUSTC_VAR),
            places,
            rustup_home: rustup_home(),
            system_rustc: PathBuf::from("/usr/bin/rustc"),
            project_dir: workspace().map(|root| root.join("target/kernel-toolchain")),
        })
    }

    /// The first toolchain that will do.
    ///
    /// # Errors
    ///
    /// [`ToolchainError::Named`] when the user named a rustc that will not do, otherwise
    /// [`ToolchainError::NotFound`], which tells all that was looked at and how to get one.
    pub fn find(&self) -> Result<Toolchain, ToolchainError> {
        if let Some(rustc) = &self.named {
            return Toolchain::probe(rustc)
                .map_err(|reason| ToolchainError::Named { rustc: rustc.clone(), reason });
        }
        let mut looked = Looked::default();
        for &place in &self.places {
            let mut found = Vec::new();
            for rustc in self.candidates(place) {
                match Toolchain::probe(&rustc) {
                    Ok(toolchain) => found.push(toolchain),
                    Err(reason) => looked.0.push((place, rustc, reason)),
                }
            }
            if let Some(best) = found.into_iter().min_by_key(Toolchain::rank) {
                return Ok(best);
            }
        }
        Err(ToolchainError::NotFound { looked })
    }

    fn candidates(&self, place: Place) -> Vec<PathBuf> {
        match place {
            Place::Rustup => {
                // A toolchain may have several names (`rustup toolchain link`): look once.
                let mut toolchains: Vec<_> = self
                    .rustup_home
                    .iter()
                    .flat_map(|home| folder(&home.join("toolchains")))
                    .filter_map(|dir| dir.canonicalize().ok())
                    .collect();
                toolchains.sort();
                toolchains.dedup();
                toolchains.into_iter().map(|dir| dir.join("bin/rustc")).collect()
            }
            Place::System => vec![self.system_rustc.clone()],
            Place::Project => self.project_dir.iter().map(|dir| dir.join("usr/bin/rustc")).collect(),
        }
    }
}

/// What a search has looked at, and why none of it would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looked(Vec<(Place, PathBuf, String)>);

impl fmt::Display for Looked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            write!(f, "\n  nothing: no toolchain lies in the places searched")?;
        }
        for (place, rustc, reason) in &self.0 {
            write!(f, "\n  {:8} {}: {reason}", place.name(), rustc.display())?;
        }
        Ok(())
    }
}

/// Why no toolchain was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ToolchainError {
    /// The user named a rustc that will not do.
    #[error("{RUSTC_VAR} names {}, which will not do: {reason}\n{}", rustc.display(), remedies())]
    Named {
        /// The rustc.
        rustc: PathBuf,
        /// Why not.
        reason: String,
    },
    /// `MOE_LORA_KERNEL_SEARCH` has a word that is no place.
    #[error(
        "{SEARCH_VAR} has the unknown place `{0}`: known are {known}",
        known = Place::ALL.map(Place::name).join(", ")
    )]
    UnknownPlace(String),
    /// Nothing that was looked at will do.
    #[error("found no Rust toolchain that can compile the GPU kernels. Looked at:{looked}\n{}", remedies())]
    NotFound {
        /// All that was looked at.
        looked: Looked,
    },
}

/// A path that the environment names.
fn path(variable: &str) -> Option<PathBuf> {
    cuda_tools::set(variable).map(PathBuf::from)
}

/// Where rustup keeps its toolchains.
pub(crate) fn rustup_home() -> Option<PathBuf> {
    path("RUSTUP_HOME").or_else(|| Some(path("HOME")?.join(".rustup")))
}

fn oldest() -> String {
    format!("{}.{}", OLDEST_RUSTC.0, OLDEST_RUSTC.1)
}

fn remedies() -> String {
    format!(
        "Needed is rustc {} or later with `core` for {TARGET}, or with the library's sources to build it \
         from. Any of these gives one:\n  \
         rustup target add {TARGET}\n  \
         rustup component add rust-src\n  \
         apt-get install rustc-web rust-web-src    on Debian 12\n  \
         {RUSTC_VAR}=/path/to/rustc",
        oldest(),
    )
}

/// (major, minor, whether it is a beta or nightly)
fn parse_release(release: &str) -> Option<(u32, u32, bool)> {
    let (numbers, suffix) = match release.split_once('-') {
        Some((numbers, suffix)) => (numbers, Some(suffix)),
        None => (release, None),
    };
    let mut numbers = numbers.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, suffix.is_some()))
}

fn find_core(sysroot: &Path, release: &str) -> Option<Core> {
    let rustlib = sysroot.join("lib/rustlib");
    let ready_made = folder(&rustlib.join(TARGET).join("lib"))
        .iter()
        .filter_map(|path| path.file_name()?.to_str())
        .any(|name| name.starts_with("libcore-") && name.ends_with(".rlib"));
    if ready_made {
        return Some(Core::ReadyMade);
    }
    // rust-src, and Debian's package, which also names the folder after the version.
    [rustlib.join("src/rust/library"), sysroot.join(format!("src/rustc-{release}/library"))]
        .into_iter()
        .find(|library| library.join("core/src/lib.rs").is_file())
        .map(Core::Sources)
}

/// The library folders of a distribution's rustc that was unpacked somewhere other than `/`: the
/// loader's default search does not reach them.
fn private_libraries(rustc: &Path) -> Vec<PathBuf> {
    let Some(prefix) = rustc.parent().and_then(Path::parent) else {
        return Vec::new();
    };
    if prefix == Path::new("/usr") {
        return Vec::new();
    }
    folder(&prefix.join("lib"))
        .into_iter()
        .filter(|dir| {
            let multiarch = dir
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.contains("-linux-gnu"));
            multiarch && dir.is_dir()
        })
        .collect()
}

fn command(rustc: &Path, libraries: &[PathBuf]) -> Command {
    const LOADER_PATH: &str = "LD_LIBRARY_PATH";
    let mut command = Command::new(rustc);
    if !libraries.is_empty() {
        let inherited = std::env::var_os(LOADER_PATH).unwrap_or_default();
        let inherited = std::env::split_paths(&inherited).filter(|dir| !dir.as_os_str().is_empty());
        let path = std::env::join_paths(libraries.iter().cloned().chain(inherited));
        // A folder with a colon in its name cannot be on the path at all: go without.
        command.env(LOADER_PATH, path.unwrap_or_default());
    }
    command
}

/// What lies in a folder, sorted; nothing when there is no such folder.
pub(crate) fn folder(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> =
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;

    /// A script cannot be run while any process has it open for writing, and a child that another
    /// test has just forked may: these tests take turns.
    fn turn() -> MutexGuard<'static, ()> {
        static TURN: Mutex<()> = Mutex::new(());
        TURN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A folder laid out as a toolchain, whose rustc is a script with the answers.
    fn install(prefix: &Path, release: &str, parts: &[&str]) -> PathBuf {
        let rustc = prefix.join("bin/rustc");
        fs::create_dir_all(prefix.join("bin")).unwrap();
        let script = format!(
            "#!/bin/sh\nif [ \"$1\" = -vV ]; then\n\
             printf 'rustc {release}\\ncommit-hash: 0123456789ab\\nrelease: {release}\\n'\n\
             printf 'LLVM version: 22.1.8\\n'\n\
             else echo '{}'; fi\n",
            prefix.display()
        );
        fs::write(&rustc, script).unwrap();
        fs::set_permissions(&rustc, fs::Permissions::from_mode(0o755)).unwrap();
        for part in parts {
            let path = prefix.join(part);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        rustc
    }

    const READY_MADE: &str = "lib/rustlib/nvptx64-nvidia-cuda/lib/libcore-0123.rlib";
    const SOURCES: &str = "lib/rustlib/src/rust/library/core/src/lib.rs";

    fn search(root: &Path) -> Search {
        Search {
            named: None,
            places: Place::ALL.to_vec(),
            rustup_home: Some(root.join("rustup")),
            system_rustc: root.join("system/bin/rustc"),
            project_dir: Some(root.join("project")),
        }
    }

    #[test]
    fn the_first_place_that_will_do_wins() {
        let _turn = turn();
        let root = tempfile::tempdir().unwrap();
        let find = || search(root.path()).find();
        assert!(matches!(find(), Err(ToolchainError::NotFound { .. })));

        let project = install(&root.path().join("project/usr"), "1.96.0", &[SOURCES]);
        assert_eq!(find().unwrap().rustc, project);

        let system =
            install(&root.path().join("system"), "1.96.0", &["src/rustc-1.96.0/library/core/src/lib.rs"]);
        let found = find().unwrap();
        assert_eq!(found.rustc, system);
        let sources = root.path().join("system/src/rustc-1.96.0/library");
        assert_eq!(found.core, Core::Sources(sources));

        let rustup = root.path().join("rustup/toolchains");
        install(&rustup.join("a"), "1.97.0-nightly", &[SOURCES]);
        let release = install(&rustup.join("b"), "1.95.0", &[SOURCES]);
        assert_eq!(find().unwrap().rustc, release);

        let newer = install(&rustup.join("c"), "1.96.1", &[SOURCES]);
        assert_eq!(find().unwrap().rustc, newer);

        let ready = install(&rustup.join("d"), "1.95.0", &[SOURCES, READY_MADE]);
        let found = find().unwrap();
        assert_eq!((found.rustc, found.core), (ready, Core::ReadyMade));
    }

    #[test]
    fn the_error_names_all_that_was_looked_at_and_what_helps() {
        let _turn = turn();
        let root = tempfile::tempdir().unwrap();
        let toolchains = root.path().join("rustup/toolchains");
        install(&toolchains.join("old"), "1.94.1", &[READY_MADE]);
        install(&toolchains.join("bare"), "1.95.0", &[]);
        let error = search(root.path()).find().unwrap_err().to_string();
        for part in [
            "old/bin/rustc: rustc 1.94.1 is older than 1.95",
            "bare/bin/rustc: rustc 1.95.0 has neither core for nvptx64-nvidia-cuda nor rust-src",
            "system/bin/rustc: no such file",
            "project/usr/bin/rustc: no such file",
            "rustup component add rust-src",
            "rustup target add nvptx64-nvidia-cuda",
        ] {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }

    #[test]
    fn a_named_rustc_that_will_not_do_is_an_error() {
        let _turn = turn();
        let root = tempfile::tempdir().unwrap();
        install(&root.path().join("system"), "1.96.0", &[SOURCES]);
        let mut search = search(root.path());
        search.named = Some(root.path().join("nowhere"));
        let error = search.find().unwrap_err();
        assert!(matches!(error, ToolchainError::Named { .. }), "{error}");
    }

    #[test]
    fn an_unpacked_toolchain_is_run_with_its_own_libraries() {
        let _turn = turn();
        let root = tempfile::tempdir().unwrap();
        let prefix = root.path().join("project/usr");
        let rustc = install(&prefix, "1.96.0", &[SOURCES, "lib/x86_64-linux-gnu/libLLVM.so"]);
        let command = Toolchain::probe(&rustc).unwrap().command();
        let (_, path) = command.get_envs().find(|(name, _)| *name == "LD_LIBRARY_PATH").unwrap();
        let first = std::env::split_paths(path.unwrap()).next();
        assert_eq!(first, Some(prefix.join("lib/x86_64-linux-gnu")));
    }

    #[test]
    fn releases_parse() {
        assert_eq!(parse_release("1.96.0"), Some((1, 96, false)));
        assert_eq!(parse_release("1.97.0-nightly"), Some((1, 97, true)));
        assert_eq!(parse_release("unknown"), None);
    }
}
