//! Compiles the GPU kernels and embeds them, as PTX and, where NVIDIA's assembler is at hand, as
//! cubins too; and satisfies the linker's `-lcuda` on machines without CUDA. Without the feature `cuda`
//! there is nothing to do.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(error) = cuda::build() {
        // Cargo shows what a failed build script wrote to stderr; a panic would bury it.
        eprintln!("\n{error}");
        let mut cause = error.source();
        while let Some(error) = cause {
            eprintln!("caused by: {error}");
            cause = error.source();
        }
        eprintln!("\n{}", cuda::alternatives());
        std::process::exit(1);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::error::Error;
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::{env, fs};

    use moe_lora_codegen::{
        Arch, Compiler, Generator, Ptxas, compile, cuda_tools, generator, lint, nvvm, ptxas, rust_cuda,
        toolchain,
    };

    /// Names a folder with `sm_80.ptx` and `sm_90a.ptx`, as `cargo xtask build-ptx` writes them, to
    /// embed instead of compiling the kernels here.
    const PTX_DIR_VAR: &str = "MOE_LORA_PTX_DIR";

    /// Whether cubins are embedded beside the PTX: `always` (an error where no ptxas is found), `never`,
    /// or, when unset, if a ptxas is found.
    const CUBINS_VAR: &str = "MOE_LORA_CUBINS";

    /// What to do about it, printed below any error.
    pub fn alternatives() -> String {
        let root = moe_lora_codegen::workspace_root().display();
        format!(
            "To get moe-lora built:\n  \
             cargo xtask build-ptx       run in {root}: finds a toolchain or fetches one into target/\n  \
             {PTX_DIR_VAR}=/folder    embeds PTX that `cargo xtask build-ptx --out /folder` wrote elsewhere\n  \
             --no-default-features       leaves the GPU kernels out: the CPU back end alone"
        )
    }

    pub fn build() -> Result<(), Box<dyn Error>> {
        let out = PathBuf::from(env::var("OUT_DIR")?);
        let modules = match env::var_os(PTX_DIR_VAR).filter(|dir| !dir.is_empty()) {
            Some(dir) => read_modules(Path::new(&dir))?,
            None => compile_modules(&out)?,
        };
        embed(&out, &modules, assembler()?.as_ref())?;
        write_driver_archive(&out)?;
        for variable in [
            PTX_DIR_VAR,
            CUBINS_VAR,
            ptxas::PTXAS_VAR,
            generator::CODEGEN_VAR,
            nvvm::LIBNVVM_VAR,
            rust_cuda::BACKEND_VAR,
            rust_cuda::TOOLCHAIN_VAR,
            toolchain::RUSTC_VAR,
            toolchain::SEARCH_VAR,
            "RUSTUP_HOME",
        ] {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        println!("cargo::rerun-if-changed={}", moe_lora_codegen::kernel_sources().display());
        Ok(())
    }

    /// The linker wants a libcuda for `cust_raw`; the functions themselves are looked up in the
    /// driver at run time (`src/cuda/bind.rs`). An archive with nothing in it contents the linker.
    fn write_driver_archive(out: &Path) -> Result<(), Box<dyn Error>> {
        let dir = out.join("cuda-stub");
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("libcuda.a"), "!<arch>\n")?;
        println!("cargo::rustc-link-search=native={}", dir.display());
        Ok(())
    }

    fn compile_modules(out: &Path) -> Result<Vec<(Arch, String)>, Box<dyn Error>> {
        // `core` and what was made of the kernels are kept beside Cargo's own output, so that a rebuild does not compile them again.
        let cache = moe_lora_codegen::target_dir_around(out).unwrap_or(out).join("kernel-core");
        let compiler = Compiler::new(Generator::from_env()?, &cache)?;
        // rustc uses one core here: the architectures go side by side.
        let modules = std::thread::scope(|scope| {
            let compiler = &compiler;
            let threads = Arch::EMBEDDED.map(|arch| scope.spawn(move || compiler.compile(arch)));
            threads.map(|thread| thread.join().expect("compiling kernels does not panic"))
        });
        let mut compiled = Vec::new();
        for module in modules {
            let module = module?;
            for line in module.warnings.lines() {
                println!("cargo::warning={line}");
            }
            compiled.push((module.arch, module.ptx));
        }
        Ok(compiled)
    }

    fn read_modules(dir: &Path) -> Result<Vec<(Arch, String)>, Box<dyn Error>> {
        let read = |arch: Arch| {
            let path = dir.join(format!("{arch}.ptx"));
            println!("cargo::rerun-if-changed={}", path.display());
            let ptx = fs::read_to_string(&path)
                .map_err(|error| format!("{PTX_DIR_VAR}: cannot read {}: {error}", path.display()))?;
            // PTX of another version of the kernels would fail at run time, or worse.
            lint::lint(&ptx, &moe_lora_codegen::entries(arch))
                .map_err(|faults| format!("{PTX_DIR_VAR}: {} is refused:\n{faults}", path.display()))?;
            Ok((arch, ptx))
        };
        Arch::EMBEDDED.into_iter().map(read).collect()
    }

    /// The assembler for cubins; `None` where there is none, or none is wanted.
    fn assembler() -> Result<Option<Ptxas>, Box<dyn Error>> {
        let wanted = env::var(CUBINS_VAR).unwrap_or_default();
        // One that is fetched later counts too. Cargo can watch an empty folder, but not one that is
        // missing. `target` itself is left for Cargo to make, which then marks it as its own.
        let dir = cuda_tools::project_dir();
        let _ = fs::create_dir(&dir);
        if dir.is_dir() {
            println!("cargo::rerun-if-changed={}", dir.display());
        }
        match (wanted.as_str(), Ptxas::find()) {
            ("never", _) | ("", Err(_)) => Ok(None),
            ("" | "always", Ok(ptxas)) => Ok(Some(ptxas)),
            ("always", Err(error)) => Err(format!("{CUBINS_VAR}=always: {error}").into()),
            (other, _) => Err(format!("{CUBINS_VAR} is `{other}`, expected `always` or `never`").into()),
        }
    }

    /// Writes the modules, packed, and `embedded.rs`: a slice of `Embedded` that `src/cuda/gpu.rs` includes.
    fn embed(
        out: &Path,
        modules: &[(Arch, String)],
        assembler: Option<&Ptxas>,
    ) -> Result<(), Box<dyn Error>> {
        let mut rows = String::from("&[\n");
        for (arch, ptx) in modules {
            let path = out.join(format!("{arch}.ptx"));
            fs::write(&path, ptx)?;
            pack(&path)?;
            let cubin = match assembler {
                Some(ptxas) => {
                    let cubin = out.join(format!("{arch}.cubin"));
                    ptxas.assemble(&path, *arch, &cubin)?;
                    pack(&cubin)?;
                    format!(
                        "Some(Cubin {{ image: Packed(include_bytes!(concat!(env!(\"OUT_DIR\"), \
                         \"/{arch}.cubin.lz4\"))), ptxas: {:?} }})",
                        ptxas.version
                    )
                }
                None => "None".to_owned(),
            };
            let sm = arch.capability();
            let made_by = compile::made_by(ptx);
            writeln!(
                rows,
                "    Embedded {{ sm: {sm}, arch: \"{arch}\", made_by: {made_by:?}, \
                 ptx: Packed(include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{arch}.ptx.lz4\"))), cubin: {cubin} }},"
            )?;
        }
        rows.push_str("]\n");
        fs::write(out.join("embedded.rs"), rows)?;
        Ok(())
    }

    /// Writes FILE.lz4 beside FILE: its length, and an LZ4 block.
    fn pack(path: &Path) -> Result<(), Box<dyn Error>> {
        let packed = lz4_flex::compress_prepend_size(&fs::read(path)?);
        let mut name = path.as_os_str().to_owned();
        name.push(".lz4");
        Ok(fs::write(name, packed)?)
    }
}
