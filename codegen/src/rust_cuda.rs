//! Code generator `rustc_codegen_nvvm`: rust-cuda's back end for rustc, on a machine that has one built.
//!
//! The kernels are compiled as rust-cuda's `cuda_builder` compiles a crate: by the Cargo of the toolchain
//! that the back end was built with, with `core` and `alloc` built along, and with the same flags. This
//! project has no such toolchain in CI: what is tested is that each missing piece is told, and the command
//! that would be run.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::nvvm::restate;
use crate::sources::kernel_sources;
use crate::toolchain::{TARGET, folder, rustup_home};
use crate::{Arch, cuda_tools};

/// Names the back end's library.
pub const BACKEND_VAR: &str = "MOE_LORA_CODEGEN_BACKEND";

/// Names the rustup toolchain that the library was built with.
pub const TOOLCHAIN_VAR: &str = "MOE_LORA_CODEGEN_TOOLCHAIN";

/// The feature of `moe-lora-kernels` that marks entry points for this back end.
pub const FEATURE: &str = "rust_cuda";

/// The back end, and the toolchain that loads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RustCuda {
    /// `librustc_codegen_nvvm.so`.
    pub backend: PathBuf,
    /// The toolchain, for example `nightly-2026-04-02`.
    pub toolchain: String,
    /// Where it lies.
    sysroot: PathBuf,
}

/// Why rust-cuda's back end cannot be used, or did not compile the kernels.
#[derive(Debug, thiserror::Error)]
pub enum RustCudaError {
    /// No library was named.
    #[error(
        "code generator rustc_codegen_nvvm: no back end was named. Build it in a checkout of rust-cuda \
         (cargo build --release -p rustc_codegen_nvvm) and pass --backend /path/librustc_codegen_nvvm.so, \
         or set {BACKEND_VAR}"
    )]
    NoBackend,
    /// The library is not there.
    #[error("code generator rustc_codegen_nvvm: the back end {} is no file", .0.display())]
    BackendMissing(PathBuf),
    /// No toolchain was named.
    #[error(
        "code generator rustc_codegen_nvvm: no toolchain was named. Pass --toolchain with the name of the \
         one that the back end was built with (rust-cuda's rust-toolchain.toml tells), or set {TOOLCHAIN_VAR}"
    )]
    NoToolchain,
    /// rustup has no such toolchain.
    #[error(
        "code generator rustc_codegen_nvvm: the toolchain {name} is not installed (looked at {}): \
         rustup toolchain install {name}", dir.display()
    )]
    ToolchainMissing {
        /// Its name.
        name: String,
        /// Where it would lie.
        dir: PathBuf,
    },
    /// A back end is loaded by nightly compilers alone.
    #[error(
        "code generator rustc_codegen_nvvm: the toolchain {0} is no nightly; only a nightly loads a back \
         end, and only the one that it was built with"
    )]
    NotNightly(String),
    /// The toolchain lacks a component.
    #[error(
        "code generator rustc_codegen_nvvm: the toolchain {toolchain} lacks {component}: \
         rustup component add {component} --toolchain {toolchain}"
    )]
    NoComponent {
        /// The toolchain.
        toolchain: String,
        /// The component.
        component: &'static str,
    },
    /// Cargo or the back end found fault with something.
    #[error("{tried} does not compile the kernels:\n{message}")]
    Failed {
        /// The toolchain and the back end.
        tried: String,
        /// What it wrote.
        message: String,
    },
}

impl fmt::Display for RustCuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with {}", self.toolchain, self.backend.display())
    }
}

impl RustCuda {
    /// The back end and the toolchain that the environment names.
    ///
    /// # Errors
    ///
    /// As for [`RustCuda::new`].
    pub fn from_env() -> Result<Self, RustCudaError> {
        let toolchain = cuda_tools::set(TOOLCHAIN_VAR).map(|name| name.to_string_lossy().into_owned());
        Self::new(cuda_tools::set(BACKEND_VAR).map(PathBuf::from), toolchain)
    }

    /// Looks for every piece that is needed: the library, a nightly, its `rustc-dev` and its `rust-src`.
    ///
    /// # Errors
    ///
    /// The first piece that is missing, each with its own variant of [`RustCudaError`].
    pub fn new(backend: Option<PathBuf>, toolchain: Option<String>) -> Result<Self, RustCudaError> {
        let toolchains = rustup_home().unwrap_or_default().join("toolchains");
        Self::new_in(backend, toolchain, &toolchains)
    }

    fn new_in(
        backend: Option<PathBuf>,
        toolchain: Option<String>,
        toolchains: &Path,
    ) -> Result<Self, RustCudaError> {
        let backend = backend.ok_or(RustCudaError::NoBackend)?;
        if !backend.is_file() {
            return Err(RustCudaError::BackendMissing(backend));
        }
        let name = toolchain.ok_or(RustCudaError::NoToolchain)?;
        // rustup takes `nightly-2026-04-02` for `nightly-2026-04-02-x86_64-unknown-linux-gnu`.
        let sysroot = folder(toolchains)
            .into_iter()
            .find(|dir| {
                let full = dir.file_name().and_then(|full| full.to_str()).unwrap_or_default();
                full.strip_prefix(&name).is_some_and(|host| host.is_empty() || host.starts_with('-'))
                    && dir.join("bin/rustc").is_file()
            })
            .ok_or_else(|| RustCudaError::ToolchainMissing {
                name: name.clone(),
                dir: toolchains.join(&name),
            })?;
        if !name.starts_with("nightly") {
            return Err(RustCudaError::NotNightly(name));
        }
        let has_rustc_dev = folder(&sysroot.join("lib/rustlib"))
            .iter()
            .flat_map(|host| folder(&host.join("lib")))
            .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
            .any(|file| file.starts_with("librustc_middle-"));
        let has_sources = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file();
        for (component, has_it) in [("rustc-dev", has_rustc_dev), ("rust-src", has_sources)] {
            if !has_it {
                return Err(RustCudaError::NoComponent { toolchain: name, component });
            }
        }
        Ok(Self { backend, toolchain: name, sysroot })
    }

    /// Compiles the kernels for `arch`; Cargo's output goes to `target_dir`.
    ///
    /// # Errors
    ///
    /// [`RustCudaError::Failed`] with what Cargo and the back end wrote.
    pub fn compile(&self, arch: Arch, target_dir: &Path) -> Result<String, RustCudaError> {
        let mut cargo = self.command(arch, target_dir);
        let failed = |message: String| RustCudaError::Failed { tried: self.to_string(), message };
        let output = cargo.output().map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim_end().to_owned()));
        }
        let ptx = target_dir.join(TARGET).join("release/moe_lora_kernels.ptx");
        let ptx =
            std::fs::read_to_string(&ptx).map_err(|error| failed(format!("{}: {error}", ptx.display())))?;
        Ok(restate(&ptx, arch))
    }

    /// The command that `cuda_builder` would run, on this crate.
    fn command(&self, arch: Arch, target_dir: &Path) -> Command {
        let mut features = vec![FEATURE];
        features.extend(arch.kernel_features());
        let mut cargo = Command::new(self.sysroot.join("bin/cargo"));
        cargo
            .args(["rustc", "--lib", "--release", "--crate-type", "cdylib", "-Zbuild-std=core,alloc"])
            .arg(format!("--target={TARGET}"))
            .arg("--manifest-path")
            .arg(kernel_sources().with_file_name("Cargo.toml"))
            .arg("--target-dir")
            .arg(target_dir)
            .arg(format!("--features={}", features.join(",")))
            .env("RUSTC", self.sysroot.join("bin/rustc"))
            .env("CARGO_ENCODED_RUSTFLAGS", self.rustc_flags(arch).join("\x1f"))
            // As `cuda_builder` does: the back end knows neither type.
            .env("CARGO_FEATURE_NO_F16_F128", "1")
            // This Cargo may itself be run by a build script of another toolchain's Cargo.
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER");
        let inherited = cuda_tools::set("LD_LIBRARY_PATH").unwrap_or_default();
        let path =
            std::env::join_paths(self.library_dirs().into_iter().chain(std::env::split_paths(&inherited)));
        // A folder with a colon in its name cannot be on the path at all: go without.
        cargo.env("LD_LIBRARY_PATH", path.unwrap_or_default());
        cargo
    }

    /// The flags of `cuda_builder`, less those that the source itself states (`no_std`, the tool
    /// `nvvm_internal`).
    fn rustc_flags(&self, arch: Arch) -> Vec<String> {
        let compute = arch.name().replace("sm_", "compute_");
        vec![
            format!("-Zcodegen-backend={}", self.backend.display()),
            "-Zunstable-options".to_owned(),
            "-Zsaturating_float_casts=false".to_owned(),
            "-Cpanic=immediate-abort".to_owned(),
            format!("-Cllvm-args=-arch={compute} --override-libm"),
        ]
    }

    /// Where the back end's own libraries may lie: beside it, and in the compiler.
    fn library_dirs(&self) -> Vec<PathBuf> {
        let beside = self.backend.parent().into_iter().flat_map(|dir| [dir.to_owned(), dir.join("deps")]);
        beside.chain([self.sysroot.join("lib")]).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const BACKEND: &str = "librustc_codegen_nvvm.so";
    const RUSTC: &str = "toolchains/nightly-2026-04-02-x86_64-unknown-linux-gnu/bin/rustc";
    const RUSTC_DEV: &str = "toolchains/nightly-2026-04-02-x86_64-unknown-linux-gnu/lib/rustlib/x86_64-unknown-linux-gnu/lib/librustc_middle-0123.rlib";
    const SOURCES: &str =
        "toolchains/nightly-2026-04-02-x86_64-unknown-linux-gnu/lib/rustlib/src/rust/library/core/src/lib.rs";

    fn put(root: &Path, file: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    /// What is found where only `files` are.
    fn find(files: &[&str], backend: bool, toolchain: Option<&str>) -> Result<RustCuda, String> {
        let root = tempfile::tempdir().unwrap();
        files.iter().for_each(|file| put(root.path(), file));
        let backend = backend.then(|| root.path().join(BACKEND));
        RustCuda::new_in(backend, toolchain.map(str::to_owned), &root.path().join("toolchains"))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn each_missing_piece_is_told() {
        let nightly = Some("nightly-2026-04-02");
        let stable = "toolchains/1.95.0-x86_64-unknown-linux-gnu/bin/rustc";
        type Case<'a> = (&'a [&'a str], bool, Option<&'a str>, &'a str);
        let cases: [Case<'_>; 7] = [
            (&[], false, nightly, "no back end was named"),
            (&[], true, nightly, "librustc_codegen_nvvm.so is no file"),
            (&[BACKEND], true, None, "no toolchain was named"),
            (&[BACKEND, stable], true, nightly, "rustup toolchain install nightly-2026-04-02"),
            (&[BACKEND, stable], true, Some("1.95.0"), "the toolchain 1.95.0 is no nightly"),
            (&[BACKEND, RUSTC, SOURCES], true, nightly, "rustup component add rustc-dev"),
            (&[BACKEND, RUSTC, RUSTC_DEV], true, nightly, "rustup component add rust-src"),
        ];
        for (files, backend, toolchain, part) in cases {
            let error = find(files, backend, toolchain).unwrap_err();
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }

    #[test]
    fn the_command_is_cuda_builders() {
        let rust_cuda =
            find(&[BACKEND, RUSTC, RUSTC_DEV, SOURCES], true, Some("nightly-2026-04-02")).unwrap();
        let command = rust_cuda.command(Arch::Sm90a, Path::new("out"));
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        for argument in
            ["-Zbuild-std=core,alloc", "--target=nvptx64-nvidia-cuda", "--features=rust_cuda,sm_90,sm_90a"]
        {
            assert!(arguments.iter().any(|other| other == argument), "{argument} is not in {arguments:?}");
        }
        let (_, flags) = command.get_envs().find(|(name, _)| *name == "CARGO_ENCODED_RUSTFLAGS").unwrap();
        let flags = flags.unwrap().to_string_lossy();
        let flags: Vec<_> = flags.split('\x1f').collect();
        assert_eq!(flags[0], format!("-Zcodegen-backend={}", rust_cuda.backend.display()));
        assert_eq!(flags.last(), Some(&"-Cllvm-args=-arch=compute_90a --override-libm"));
    }
}
