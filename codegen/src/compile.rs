//! Runs rustc, and after it a code generator, over the kernels.
//!
//! The crate goes to rustc directly, not through Cargo: it has no dependencies on the device, and
//! a plain rustc needs neither a nightly Cargo (`-Zbuild-std`) nor a registry. `core` is compiled
//! once for each version of rustc and kept in a cache that builds share.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use moe_lora_kernels::Entry;

use crate::kept::{Emitted, Kept};
use crate::lint::{LintError, lint};
use crate::sources::{entries, kernel_sources};
use crate::stamp::stamp;
use crate::toolchain::{Core, TARGET, Toolchain};
use crate::{Arch, Generator, NvvmError, RustCudaError, nvvm};

/// `core` is compiled for the oldest architecture; that serves every later one, since what is
/// inlined from it is compiled again with the kernels.
const CORE_ARCH: Arch = Arch::Sm80;

/// Raised when `core` is compiled in another way, so that older caches are left alone.
const CORE_RECIPE: u32 = 1;

/// `compiler_builtins`, which every crate links: empty, since LLVM expands memory copies and the
/// rest for NVPTX itself.
const COMPILER_BUILTINS: &str = "#![feature(compiler_builtins)]\n#![compiler_builtins]\n#![no_std]\n";

/// A code generator made ready to compile the kernels.
#[derive(Clone, Debug)]
pub struct Compiler {
    generator: Generator,
    /// Where `core` lies, unless the toolchain has its own.
    core_dir: Option<PathBuf>,
    /// Where there is room for temporary files.
    cache: PathBuf,
}

/// The kernels in PTX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// What they were compiled for.
    pub arch: Arch,
    /// The text: stamped, checked, and with [`made_by`] as its first line.
    pub ptx: String,
    /// Who compiled them: `rustc 1.96.0, LLVM 22.1.8`.
    pub compilers: String,
    /// What rustc and libNVVM had to say on the way; empty when they were content.
    pub warnings: String,
}

/// Why there is no PTX.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// `core` does not compile.
    #[error("{toolchain} does not compile core for {TARGET}:\n{message}")]
    Core {
        /// The toolchain.
        toolchain: String,
        /// What rustc wrote.
        message: String,
    },
    /// The kernels do not compile.
    #[error("the kernels do not compile for {arch}:\n{message}")]
    Kernels {
        /// The architecture.
        arch: Arch,
        /// What rustc wrote.
        message: String,
    },
    /// libNVVM gave no PTX.
    #[error("libNVVM does not compile the kernels for {arch}")]
    Nvvm {
        /// The architecture.
        arch: Arch,
        /// Why not.
        source: NvvmError,
    },
    /// rust-cuda's back end gave no PTX.
    #[error("no kernels for {arch}")]
    RustCuda {
        /// The architecture.
        arch: Arch,
        /// Why not.
        source: RustCudaError,
    },
    /// The PTX was refused.
    #[error("the PTX for {arch} is refused:\n{faults}")]
    Refused {
        /// The architecture.
        arch: Arch,
        /// What is wrong with it.
        faults: LintError,
        /// The text, to look the lines up in.
        ptx: String,
    },
    /// A program could not be started, or a file not be written.
    #[error("{}", path.display())]
    Io {
        /// The program or file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl Compiler {
    /// Whether [`Compiler::new`] will have to compile `core` first, which takes most of a minute.
    pub fn must_build_core(toolchain: &Toolchain, cache: &Path) -> bool {
        matches!(toolchain.core, Core::Sources(_)) && !core_dir(toolchain, cache).is_dir()
    }

    /// Makes a code generator ready, compiling `core` into `cache` where it is not there yet. Several
    /// processes may share a cache.
    ///
    /// # Errors
    ///
    /// [`CompileError::Core`] or [`CompileError::Io`].
    pub fn new(generator: Generator, cache: &Path) -> Result<Self, CompileError> {
        let core_dir = match generator.toolchain() {
            Some(toolchain @ Toolchain { core: Core::Sources(library), .. }) => {
                let dir = core_dir(toolchain, cache);
                if !dir.is_dir() {
                    build_core(toolchain, library, &dir)?;
                }
                Some(dir)
            }
            _ => None,
        };
        Ok(Self { generator, core_dir, cache: cache.to_owned() })
    }

    /// The code generator in use.
    pub fn generator(&self) -> &Generator {
        &self.generator
    }

    /// Compiles the kernels for `arch`, stamps their launch bounds and checks the result.
    ///
    /// # Errors
    ///
    /// [`CompileError::Kernels`] when rustc finds fault with the source, [`CompileError::Nvvm`] or
    /// [`CompileError::RustCuda`] when another code generator does, [`CompileError::Refused`] when
    /// [`lint`] finds fault with the PTX.
    pub fn compile(&self, arch: Arch) -> Result<Module, CompileError> {
        let mut entries = entries(arch);
        if let Generator::Nvvm(..) = self.generator {
            entries.iter_mut().for_each(|entry| entry.min_blocks = nvvm::min_blocks(entry));
        }
        self.compile_crate("moe_lora_kernels", &kernel_sources().join("lib.rs"), &entries, arch)
    }

    fn compile_crate(
        &self,
        name: &str,
        source: &Path,
        entries: &[Entry],
        arch: Arch,
    ) -> Result<Module, CompileError> {
        let (asm, warnings, compilers) = match &self.generator {
            Generator::Llvm(toolchain) => {
                let (text, warnings) = self.rustc(toolchain, name, source, arch, "asm")?;
                let Toolchain { release, llvm, .. } = toolchain;
                (text, warnings, format!("rustc {release}, LLVM {llvm}"))
            }
            Generator::Nvvm(toolchain, nvvm) => {
                let (text, mut warnings) = self.rustc(toolchain, name, source, arch, "llvm-ir")?;
                let compiled =
                    nvvm.compile(&text, arch).map_err(|source| CompileError::Nvvm { arch, source })?;
                warnings.push_str(compiled.log.trim());
                (compiled.ptx, warnings, format!("rustc {}, libNVVM {}", toolchain.release, compiled.version))
            }
            Generator::RustCuda(rust_cuda) => {
                let asm = rust_cuda
                    .compile(arch, &self.cache.join("rust-cuda"))
                    .map_err(|source| CompileError::RustCuda { arch, source })?;
                (asm, String::new(), rust_cuda.toolchain.clone())
            }
        };
        let this = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));
        let made_by = format!("{this}, codegen {}, {compilers}, {arch}", self.generator.name());
        let ptx = format!("// {made_by}\n{}", stamp(&asm, entries));
        match lint(&ptx, entries) {
            Ok(()) => Ok(Module { arch, ptx, compilers, warnings }),
            Err(faults) => Err(CompileError::Refused { arch, faults, ptx }),
        }
    }

    /// What rustc emits of a crate, as one module after all optimisation: `asm`, which is PTX, or `llvm-ir`;
    /// and its warnings. It is kept beside `core`, for the next build of the same.
    fn rustc(
        &self,
        toolchain: &Toolchain,
        name: &str,
        source: &Path,
        arch: Arch,
        emit: &str,
    ) -> Result<(String, String), CompileError> {
        let mut rustc = toolchain.command();
        rustc
            .args(["--crate-name", name, "--crate-type", "cdylib"])
            .arg(source)
            .args(common_flags(arch))
            .arg(format!("-Ctarget-feature=+{}", arch.ptx_feature()))
            // One module, and nothing kept that no entry point uses.
            .args(["-Ccodegen-units=1", "-Clto=fat"])
            .arg(format!("--emit={emit}"))
            .args([
                "--check-cfg",
                "cfg(test)",
                "--check-cfg",
                "cfg(feature, values(\"sm_90\", \"sm_90a\", \"emulate\", \"rust_cuda\"))",
            ]);
        for feature in arch.kernel_features() {
            rustc.arg("--cfg").arg(format!("feature=\"{feature}\""));
        }
        if let Some(dir) = &self.core_dir {
            rustc.arg("-L").arg(dir);
        }

        let Toolchain { release, commit, llvm, .. } = toolchain;
        let file = self.cache.join(format!("{name}-{arch}.{emit}"));
        let sources = source.parent().unwrap_or(source);
        // Less the environment: what Cargo puts on the loader's path is another in each profile.
        let (program, args) = (rustc.get_program(), rustc.get_args().filter(|&arg| arg != source));
        let args: Vec<_> = args.collect();
        let command = format!("{program:?} {args:?}, {release} {commit}, LLVM {llvm}");
        let kept = Kept::new(file, &command, sources);
        if let Some(Emitted { bytes, warnings }) = kept.as_ref().and_then(Kept::read)
            && let Ok(text) = String::from_utf8(bytes)
        {
            return Ok((text, warnings));
        }

        // rustc names its own temporary files after the crate alone.
        let scratch = Scratch::new(&self.cache).map_err(io(&self.cache))?;
        let target = scratch.0.join("kernels");
        let output = run(rustc.arg("-o").arg(&target))?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(CompileError::Kernels { arch, message: stderr.trim_end().to_owned() });
        }
        let text = std::fs::read_to_string(&target).map_err(io(&target))?;
        let warnings = warnings(&stderr);
        if let Some(kept) = kept {
            let (bytes, warnings) = (text.clone().into_bytes(), warnings.clone());
            kept.write(&Emitted { bytes, warnings }, &scratch.0);
        }
        Ok((text, warnings))
    }
}

/// What made a module, as its first line tells; `unknown` for PTX that is not from here.
pub fn made_by(ptx: &str) -> &str {
    ptx.lines().next().and_then(|line| line.strip_prefix("// ")).unwrap_or("unknown")
}

/// The flags that `core` and the kernels share.
fn common_flags(arch: Arch) -> [String; 6] {
    [
        "--edition=2024".to_owned(),
        format!("--target={TARGET}"),
        format!("-Ctarget-cpu={arch}"),
        "-Copt-level=3".to_owned(),
        "-Cpanic=abort".to_owned(),
        "--color=never".to_owned(),
    ]
}

/// Where in a cache the `core` of a toolchain lies.
fn core_dir(toolchain: &Toolchain, cache: &Path) -> PathBuf {
    let Toolchain { release, commit, .. } = toolchain;
    let commit = commit.get(..9).unwrap_or(commit);
    cache.join(format!("core-{release}-{commit}-{CORE_RECIPE}"))
}

fn build_core(toolchain: &Toolchain, library: &Path, dir: &Path) -> Result<(), CompileError> {
    // Another process may be building the same: each builds in a folder of its own, and the last
    // step is a rename, which one of them wins.
    let cache = dir.parent().unwrap_or(dir);
    let scratch = Scratch::new(cache).map_err(io(cache))?;
    build_core_in(toolchain, library, &scratch.0)?;
    match std::fs::rename(&scratch.0, dir) {
        Err(_) if dir.is_dir() => Ok(()),
        renamed => renamed.map_err(io(dir)),
    }
}

fn build_core_in(toolchain: &Toolchain, library: &Path, scratch: &Path) -> Result<(), CompileError> {
    let builtins = scratch.join("compiler_builtins.rs");
    std::fs::write(&builtins, COMPILER_BUILTINS).map_err(io(&builtins))?;
    let core = library.join("core/src/lib.rs");
    for (name, source) in [("core", &core), ("compiler_builtins", &builtins)] {
        let mut rustc = toolchain.command();
        rustc
            .args(["--crate-name", name, "--crate-type", "rlib"])
            .arg(source)
            .args(common_flags(CORE_ARCH))
            .args(["-Zforce-unstable-if-unmarked", "--cap-lints=allow"])
            .arg("-L")
            .arg(scratch)
            .arg("-o")
            .arg(scratch.join(format!("lib{name}.rlib")));
        let output = run(&mut rustc)?;
        if !output.status.success() {
            return Err(CompileError::Core {
                toolchain: toolchain.to_string(),
                message: String::from_utf8_lossy(&output.stderr).trim_end().to_owned(),
            });
        }
    }
    Ok(())
}

/// A folder that nobody else uses, removed with what is left in it.
pub(crate) struct Scratch(pub PathBuf);

impl Scratch {
    /// In `cache`.
    pub fn new(cache: &Path) -> std::io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        std::fs::create_dir_all(cache)?;
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let dir = cache.join(format!("scratch-{}-{number}", std::process::id()));
            match std::fs::create_dir(&dir) {
                // Left behind by a process that was killed.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                created => return created.map(|()| Self(dir)),
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is litter in a cache, and no reason to fail a build.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> CompileError + use<> {
    let path = path.to_owned();
    move |source| CompileError::Io { path, source }
}

fn run(command: &mut Command) -> Result<Output, CompileError> {
    command.output().map_err(|source| CompileError::Io { path: command.get_program().into(), source })
}

/// What rustc wrote, less the note that `+ptx80` is an unstable name, which no flag silences, and
/// less the count that includes it.
fn warnings(stderr: &str) -> String {
    stderr
        .split("\n\n")
        .map(str::trim_end)
        .filter(|paragraph| {
            let counts = paragraph.starts_with("warning: ") && paragraph.ends_with(" emitted");
            let unstable =
                paragraph.starts_with("warning: unstable feature specified for `-Ctarget-feature`");
            !(paragraph.is_empty() || counts || unstable)
        })
        .collect::<Vec<_>>()
        .join("\n\n")
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;
    use crate::{Search, target_dir_around, test_entry};

    #[test]
    fn only_the_note_on_ptx_versions_is_dropped() {
        let note = "warning: unstable feature specified for `-Ctarget-feature`: `ptx80`\n  |\n  = note: this feature is not stably supported; its behavior can change in the future\n";
        let real = "warning: function `f` is never used\n --> k.rs:6:4\n  |\n6 | fn f() {}\n  |    ^";
        let one = format!("{note}\nwarning: 1 warning emitted\n\n");
        assert_eq!(warnings(&one), "");
        let two = format!("{note}\n{real}\n\nwarning: 2 warnings emitted\n\n");
        assert_eq!(warnings(&two), real);
    }

    /// The compiler that the tests share; `None` on a machine without a toolchain.
    fn compiler() -> Option<&'static Compiler> {
        static COMPILER: LazyLock<Option<Compiler>> = LazyLock::new(|| {
            let toolchain = Search::from_env().unwrap().find().ok()?;
            let program = std::env::current_exe().unwrap();
            let cache = target_dir_around(&program).unwrap().join("kernel-core");
            Some(Compiler::new(Generator::Llvm(toolchain), &cache).unwrap())
        });
        if COMPILER.is_none() {
            eprintln!("skipped: no toolchain compiles for {TARGET}");
        }
        COMPILER.as_ref()
    }

    /// Compiles a small kernel as the real ones are.
    fn compile(name: &str, body: &str) -> Option<Result<Module, CompileError>> {
        let compiler = compiler()?;
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("kernel.rs");
        let text = format!(
            "#![no_std]\n#![feature(abi_ptx)]\n\
             #[panic_handler] fn panic(_: &core::panic::PanicInfo) -> ! {{ loop {{}} }}\n\
             #[unsafe(no_mangle)] pub unsafe extern \"ptx-kernel\" fn {name}(p: *mut u32, n: usize) {{\n{body}\n}}\n"
        );
        std::fs::write(&source, text).unwrap();
        let entries = [test_entry("kernel", 128, 2)];
        Some(compiler.compile_crate("kernel", &source, &entries, Arch::Sm90a))
    }

    fn refused(name: &str, body: &str) -> Option<String> {
        match compile(name, body)? {
            Err(CompileError::Refused { faults, .. }) => Some(faults.to_string()),
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn a_kernel_becomes_a_stamped_module() {
        let Some(module) = compile("kernel", "let unused = 1; unsafe { *p = n as u32 }") else {
            return;
        };
        let module = module.unwrap();
        assert!(module.ptx.contains(".version 8.1\n.target sm_90a\n"));
        assert!(module.ptx.contains("\n)\n.maxntid 128, 1, 1\n.minnctapersm 2\n{"));
        assert!(made_by(&module.ptx).ends_with(", sm_90a"));
        assert!(module.warnings.starts_with("warning: unused variable"));
        assert!(!module.warnings.contains("ptx81"), "{}", module.warnings);
    }

    #[test]
    fn traps_are_refused() {
        let traps = [
            (
                "let mut a = [0; 32]; for i in 0..n { unsafe { a[*p.add(i) as usize & 31] += 1 } }\n\
                 for i in 0..n { unsafe { *p.add(i) = a[i & 31] } }",
                "kernel: local memory",
            ),
            ("unsafe { core::slice::from_raw_parts_mut(p, 32)[n] = 1 }", "can panic"),
            (
                "#[inline(never)] fn power(x: u32, n: u32) -> u32 { x.pow(n) }\n\
                 unsafe { *p = power(*p, n as u32) }",
                "kernel: calls ",
            ),
            ("unsafe extern \"C\" { fn elsewhere(); } unsafe { elsewhere() }", "elsewhere has no body"),
        ];
        for (body, fault) in traps {
            let Some(message) = refused("kernel", body) else {
                return;
            };
            assert!(message.contains(fault), "{fault:?} is not in: {message}");
        }
    }

    #[test]
    fn an_entry_that_the_table_lacks_is_refused() {
        let Some(message) = refused("stray", "unsafe { *p = n as u32 }") else {
            return;
        };
        assert!(message.contains("stray: entry point is missing from ENTRIES"), "{message}");
        assert!(message.contains("kernel: entry point of ENTRIES is missing"), "{message}");
    }

    #[test]
    fn a_source_with_errors_is_told_with_rustcs_words() {
        let Some(result) = compile("kernel", "let x: u32 = p;") else {
            return;
        };
        let message = result.unwrap_err().to_string();
        assert!(message.contains("error[E0308]: mismatched types"), "{message}");
    }

    /// With rust-cuda's feature, any code generator compiles the kernels, and makes functions of all entry
    /// points: one that rustc still finds for itself has not gone through the macro.
    #[test]
    fn entry_points_for_rust_cuda_are_plain_functions() {
        let Some(compiler) = compiler() else { return };
        let toolchain = compiler.generator().toolchain().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let asm = dir.path().join("kernels.ptx");
        let mut rustc = toolchain.command();
        rustc
            .args(["--crate-name", "moe_lora_kernels", "--crate-type", "rlib", "--emit=asm"])
            .arg(kernel_sources().join("lib.rs"))
            .args(common_flags(Arch::Sm90a))
            .args(["--cfg", "feature=\"rust_cuda\"", "-Ccodegen-units=1", "-o"])
            .arg(&asm);
        for feature in Arch::Sm90a.kernel_features() {
            rustc.arg("--cfg").arg(format!("feature=\"{feature}\""));
        }
        if let Some(dir) = &compiler.core_dir {
            rustc.arg("-L").arg(dir);
        }
        let output = rustc.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let asm = std::fs::read_to_string(&asm).unwrap();
        for Entry { name, .. } in entries(Arch::Sm90a) {
            assert!(asm.contains(&format!(".func {name}(")), "{name} is no function");
        }
        assert!(!asm.contains(".entry "));
    }

    #[test]
    fn a_module_tells_what_made_it() {
        let line = "moe-lora-codegen 0.1.0, codegen llvm, rustc 1.96.0, LLVM 22.1.8, sm_80";
        assert_eq!(made_by(&format!("// {line}\n//\n.version 8.0\n")), line);
        assert_eq!(made_by(".version 8.0\n"), "unknown");
        assert_eq!(made_by(""), "unknown");
    }
}
