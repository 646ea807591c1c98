//! What the other commands stand on: a toolchain for the kernels, and NVIDIA's tools.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use moe_lora_codegen::generator::CODEGEN_VAR;
use moe_lora_codegen::rust_cuda::{BACKEND_VAR, TOOLCHAIN_VAR};
use moe_lora_codegen::toolchain::{Place, TARGET};
use moe_lora_codegen::{
    CodeGenerator, Compiler, Generator, Nvdisasm, Nvvm, Ptxas, RustCuda, Search, Toolchain, ToolchainError,
    cuda_tools,
};

use crate::debian;
use crate::shell::{empty_dir, installed, read, remove_dir, step, target_dir, workspace_root};

/// Which code generator makes the PTX.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct CodegenArgs {
    /// Code generator: llvm, nvvm (libNVVM, downloaded where none is installed), rustc_codegen_nvvm
    /// [default: $MOE_LORA_CODEGEN, or llvm]
    #[arg(long, value_name = "NAME")]
    codegen: Option<CodeGenerator>,
    /// The library of rust-cuda's back end, for rustc_codegen_nvvm
    #[arg(long, value_name = "PATH")]
    backend: Option<PathBuf>,
    /// The rustup toolchain that the back end was built with, for rustc_codegen_nvvm
    #[arg(long, value_name = "NAME")]
    toolchain: Option<String>,
}

impl CodegenArgs {
    /// A code generator that needs nothing but its name.
    pub fn named(codegen: CodeGenerator) -> Self {
        Self { codegen: Some(codegen), ..Self::default() }
    }

    /// The code generator that is asked for, by argument or by environment.
    pub fn codegen(&self) -> Result<CodeGenerator> {
        match self.codegen {
            Some(codegen) => Ok(codegen),
            None => CodeGenerator::from_env().context(CODEGEN_VAR),
        }
    }

    /// Lets a build that `command` runs use the same.
    pub fn pass_to<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        if let Some(codegen) = self.codegen {
            command.env(CODEGEN_VAR, codegen.name());
        }
        if let Some(backend) = &self.backend {
            command.env(BACKEND_VAR, backend);
        }
        if let Some(toolchain) = &self.toolchain {
            command.env(TOOLCHAIN_VAR, toolchain);
        }
        command
    }
}

/// A compiler for the kernels: of what is here, or of what was fetched.
pub fn compiler(args: &CodegenArgs) -> Result<Compiler> {
    let generator = match args.codegen()? {
        CodeGenerator::Llvm => Generator::Llvm(toolchain()?),
        CodeGenerator::Nvvm => {
            let toolchain = toolchain()?;
            let nvvm = nvvm(toolchain.llvm_major())?;
            Generator::Nvvm(toolchain, nvvm)
        }
        CodeGenerator::RustcCodegenNvvm => {
            let from_env = |name| std::env::var_os(name).filter(|value| !value.is_empty());
            let backend = args.backend.clone().or_else(|| from_env(BACKEND_VAR).map(PathBuf::from));
            let toolchain = args.toolchain.clone();
            let toolchain = toolchain.or_else(|| from_env(TOOLCHAIN_VAR)?.into_string().ok());
            Generator::RustCuda(RustCuda::new(backend, toolchain)?)
        }
    };
    eprintln!("kernel toolchain: {generator}");
    let cache = target_dir()?.join("kernel-core");
    let is_slow = generator.toolchain().is_some_and(|toolchain| Compiler::must_build_core(toolchain, &cache));
    if is_slow {
        step("compiling core for the GPU, once for this toolchain: about a minute", || {
            Ok(Compiler::new(generator, &cache)?)
        })
    } else {
        Ok(Compiler::new(generator, &cache)?)
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
            debian::unpack_toolchain(search.project_dir.as_deref().context("there is no workspace")?)
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

/// A file of one of NVIDIA's Python packages.
struct Tool {
    /// The package, the same version wherever kernels are judged.
    wheel: &'static str,
    /// The file in it.
    member: &'static str,
    /// What the download weighs, for those who wait.
    megabytes: u32,
}

const PTXAS: Tool =
    Tool { wheel: "nvidia-cuda-nvcc==13.0.88", member: "nvidia/cu13/bin/ptxas", megabytes: 40 };
const NVDISASM: Tool =
    Tool { wheel: "nvidia-cuda-nvdisasm==13.5.37", member: "nvidia/cu13/bin/nvdisasm", megabytes: 5 };
const LIBNVVM: Tool =
    Tool { wheel: "nvidia-nvvm==13.5.37", member: "nvidia/cu13/lib/libnvvm.so.4", megabytes: 75 };

/// A ptxas: one that is here or, if `fetch` says so, one that is downloaded.
pub fn ptxas(fetch: bool) -> Result<Ptxas> {
    match Ptxas::find() {
        Err(_) if fetch => {
            PTXAS.fetch()?;
            Ok(Ptxas::find()?)
        }
        found => Ok(found?),
    }
}

/// A disassembler, likewise.
pub fn nvdisasm(fetch: bool) -> Result<Nvdisasm> {
    match Nvdisasm::find() {
        Err(_) if fetch => {
            NVDISASM.fetch()?;
            Ok(Nvdisasm::find()?)
        }
        found => Ok(found?),
    }
}

/// A libNVVM that reads the IR of LLVM `llvm`: one that is here, or one that is downloaded.
fn nvvm(llvm: u32) -> Result<Nvvm> {
    match Nvvm::find(llvm) {
        Err(_) => {
            LIBNVVM.fetch()?;
            Ok(Nvvm::find(llvm)?)
        }
        found => Ok(found?),
    }
}

impl Tool {
    /// Downloads the package and leaves the file in `target/cuda-tools`.
    fn fetch(&self) -> Result<()> {
        let Self { wheel, member, megabytes } = self;
        let dir = cuda_tools::project_dir().context("there is no workspace")?;
        let scratch: PathBuf = dir.with_extension(format!("{}", std::process::id()));
        empty_dir(&scratch)?;
        let fetched = step(&format!("fetching {wheel}, about {megabytes} MB"), || {
            read(
                Command::new("python3")
                    .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", wheel])
                    .arg("--dest")
                    .arg(&scratch),
            )?;
            let file = std::fs::read_dir(&scratch)?.next().context("pip left no file")??.path();
            read(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&file).arg(&scratch))?;
            std::fs::create_dir_all(&dir)?;
            let unpacked = scratch.join(member);
            make_executable(&unpacked)?;
            let kept = dir.join(unpacked.file_name().context("a member is a file")?);
            std::fs::rename(&unpacked, &kept).with_context(|| format!("{}", kept.display()))
        });
        remove_dir(&scratch)?;
        fetched
    }
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
