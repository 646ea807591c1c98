//! Embeds the GPU kernels: those that the package brings, in `kernels/` beside its manifest; or, in the
//! repository and with the feature `from-source`, those that are compiled here, as PTX and, where NVIDIA's
//! assembler is at hand, as cubins too.
//!
//! Either way there is a folder with each file packed and `manifest.txt`, a line an architecture:
//!
//! ```text
//! sm_80 13.0.88 moe-lora-codegen 0.2.0, codegen llvm, rustc 1.96.0, LLVM 22.1.8, sm_80
//! ```
//!
//! the name, the version of the ptxas that made the cubin or `-` where there is none, and what made the PTX.
//! `cargo xtask package` takes the folder as it is from a build's `OUT_DIR`.

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

use moe_lora_codegen::{
    Arch, Compiler, Generator, Ptxas, compile, cuda_tools, generator, lint, nvvm, ptxas, rust_cuda, toolchain,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The folder of packed kernels.
const FOLDER: &str = "kernels";

/// Names a folder with the PTX of every architecture, as `cargo xtask build-ptx` writes it, to embed instead
/// of compiling the kernels here.
const PTX_DIR_VAR: &str = "MOE_LORA_PTX_DIR";

/// Whether cubins are embedded beside the PTX: `always` (an error where no ptxas is found), `never`,
/// or, when unset, if a ptxas is found.
const CUBINS_VAR: &str = "MOE_LORA_CUBINS";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Err(error) = build() {
        // Cargo shows what a failed build script wrote to stderr; a panic would bury it.
        eprintln!("\n{error}");
        let mut cause = error.source();
        while let Some(error) = cause {
            eprintln!("caused by: {error}");
            cause = error.source();
        }
        eprintln!("\n{}", alternatives());
        std::process::exit(1);
    }
}

/// The kernels that the package brings; the repository has no such folder.
fn packaged() -> Option<PathBuf> {
    let dir = Path::new(&env::var_os("CARGO_MANIFEST_DIR")?).join(FOLDER);
    dir.is_dir().then_some(dir)
}

/// What to do about it, printed below any error.
fn alternatives() -> String {
    let mut ways = vec![match moe_lora_codegen::workspace() {
        Some(root) => format!(
            "cargo xtask build-ptx       run in {}: finds a toolchain or fetches one into target/",
            root.display()
        ),
        None => "without `from-source`       embeds the kernels that moe-lora-prebuilt brings".to_owned(),
    }];
    ways.push(format!(
        "{PTX_DIR_VAR}=/folder    embeds what `cargo xtask build-ptx --out /folder` wrote in the repository"
    ));
    ways.push("--no-default-features       leaves the GPU kernels out: the CPU back end alone".to_owned());
    format!("To get moe-lora built:\n  {}", ways.join("\n  "))
}

fn build() -> Result<()> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let table = match packaged().filter(|_| env::var_os("CARGO_FEATURE_FROM_SOURCE").is_none()) {
        Some(dir) => {
            println!("cargo::rerun-if-changed={}", dir.display());
            table(&dir, "CARGO_MANIFEST_DIR")?
        }
        None => {
            let dir = out.join(FOLDER);
            from_source(&out, &dir)?;
            table(&dir, "OUT_DIR")?
        }
    };
    Ok(fs::write(out.join("kernels.rs"), table)?)
}

/// Compiles the kernels, and packs them into `dir`.
fn from_source(out: &Path, dir: &Path) -> Result<()> {
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
    // `core` and what was made of the kernels are kept beside Cargo's own output, so that a rebuild does not
    // compile them again.
    let cache = moe_lora_codegen::target_dir_around(out).unwrap_or(out).join("kernel-core");
    let modules = match env::var_os(PTX_DIR_VAR).filter(|dir| !dir.is_empty()) {
        Some(dir) => read_modules(Path::new(&dir))?,
        None => compile_modules(&cache)?,
    };
    let cubins = match assembler()? {
        Some(ptxas) => Some((assemble(&ptxas, &modules, &cache)?, ptxas.version)),
        None => None,
    };
    pack(dir, &modules, cubins.as_ref())
}

fn compile_modules(cache: &Path) -> Result<Vec<(Arch, String)>> {
    let compiler = Compiler::new(Generator::from_env()?, cache)?;
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

fn read_modules(dir: &Path) -> Result<Vec<(Arch, String)>> {
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
fn assembler() -> Result<Option<Ptxas>> {
    let wanted = env::var(CUBINS_VAR).unwrap_or_default();
    // One that is fetched later counts too. Cargo can watch an empty folder, but not one that is
    // missing. `target` itself is left for Cargo to make, which then marks it as its own.
    if let Some(dir) = cuda_tools::project_dir() {
        let _ = fs::create_dir(&dir);
        if dir.is_dir() {
            println!("cargo::rerun-if-changed={}", dir.display());
        }
    }
    match (wanted.as_str(), Ptxas::find()) {
        ("never", _) | ("", Err(_)) => Ok(None),
        ("" | "always", Ok(ptxas)) => Ok(Some(ptxas)),
        ("always", Err(error)) => Err(format!("{CUBINS_VAR}=always: {error}").into()),
        (other, _) => Err(format!("{CUBINS_VAR} is `{other}`, expected `always` or `never`").into()),
    }
}

/// The modules as machine code.
fn assemble<'a>(ptxas: &Ptxas, modules: &'a [(Arch, String)], cache: &Path) -> Result<Vec<Vec<u8>>> {
    // ptxas uses one core too.
    let cubins: Vec<_> = std::thread::scope(|scope| {
        let start = |(arch, ptx): &'a (Arch, String)| {
            let (arch, ptx) = (*arch, ptx.as_str());
            scope.spawn(move || ptxas.cubin(ptx, arch, cache))
        };
        let threads: Vec<_> = modules.iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("assembling does not panic")).collect()
    });
    Ok(cubins.into_iter().collect::<std::result::Result<_, _>>()?)
}

/// Writes the modules, packed, and the manifest into `dir`. `cubins`: of each module, and the version of
/// ptxas.
fn pack(dir: &Path, modules: &[(Arch, String)], cubins: Option<&(Vec<Vec<u8>>, String)>) -> Result<()> {
    if dir.exists() {
        // A cubin of an earlier build would be taken for this one's.
        fs::remove_dir_all(dir)?;
    }
    fs::create_dir(dir)?;
    let packed = |name: String, bytes: &[u8]| {
        fs::write(dir.join(name + ".lz4"), lz4_flex::compress_prepend_size(bytes))
    };
    let mut manifest = String::new();
    for (i, (arch, ptx)) in modules.iter().enumerate() {
        packed(format!("{arch}.ptx"), ptx.as_bytes())?;
        if let Some((cubins, _)) = cubins {
            packed(format!("{arch}.cubin"), &cubins[i])?;
        }
        let ptxas = cubins.map_or("-", |(_, version)| version);
        writeln!(manifest, "{arch} {ptxas} {}", compile::made_by(ptx))?;
    }
    Ok(fs::write(dir.join("manifest.txt"), manifest)?)
}

/// The slice of `Kernels` that `src/lib.rs` includes, from the manifest in `dir`, which lies in the folder
/// that `root` names: rustc is told where that is, so the slice holds wherever a build is moved to.
fn table(dir: &Path, root: &str) -> Result<String> {
    let path = dir.join("manifest.txt");
    let manifest = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut rows = String::from("&[\n");
    for line in manifest.lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(arch), Some(ptxas), Some(made_by)) = (words.next(), words.next(), words.next()) else {
            return Err(format!("{}: not a line of three words: {line}", path.display()).into());
        };
        let arch: Arch = arch.parse()?;
        let packed = |kind: &str| {
            format!("Packed(include_bytes!(concat!(env!({root:?}), \"/{FOLDER}/{arch}.{kind}.lz4\")))")
        };
        let cubin = match ptxas {
            "-" => "None".to_owned(),
            _ => format!("Some(Cubin {{ image: {}, ptxas: {ptxas:?} }})", packed("cubin")),
        };
        writeln!(
            rows,
            "    Kernels {{ sm: {}, arch: \"{arch}\", made_by: {made_by:?}, ptx: {}, cubin: {cubin} }},",
            arch.capability(),
            packed("ptx"),
        )?;
    }
    rows.push_str("]\n");
    Ok(rows)
}
