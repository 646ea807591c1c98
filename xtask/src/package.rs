//! `cargo xtask package`

use std::ffi::OsString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::setup::{self, CodegenArgs};
use crate::shell::{
    cargo, copy_tree, empty_dir, read, remove_dir, run as run_command, step, target_dir, workspace_root,
};

/// The crate whose package has the compiled kernels in it, and the folder that they are in.
const PREBUILT: &str = "moe-lora-prebuilt";
const KERNELS: &str = "kernels";

/// What crates.io takes: bytes of a .crate file.
const LARGEST: u64 = 10_000_000;

/// What the crate that uses the packages asks of moe-lora in place of the default features: the driver that
/// needs no word of where a CUDA toolkit is.
const FEATURES: &[&str] = &["cudarc"];

/// The crate that uses the packages.
const CONSUMER: &str = include_str!("consumer.rs.in");

/// Variables that would show a build a compiler, an assembler or a CUDA toolkit of this machine.
const TOOLS: &[&str] = &["PTXAS", "NVDISASM", "LIBNVVM", "CUDA_HOME", "CUDA_PATH", "CUDA_LIBRARY_PATH"];

/// Make the packages that crates.io takes, into target/package, and try them.
///
/// Compiles the kernels and copies what git tracks to target/package-stage. There moe-lora-prebuilt gets the
/// kernels, as PTX and as cubins, and each crate the licences. Then `cargo package` packs every crate that is
/// not marked `publish = false`. A package larger than 10 MB is an error; moe-lora-prebuilt first leaves out
/// cubins, those for the newest GPUs first, and says so.
///
/// Then a crate outside of this repository uses the packages, unpacked, and nothing else. It sees no compiler
/// for GPUs and no CUDA toolkit. It is built and run three times: with `cudarc` for a driver; with the
/// default features; and with `from-source`, with a compiler. `cargo xtask check` does the first alone. That
/// is what shows that the packages compile: `cargo package` itself does not try it, as it would compile each
/// crate and all that it depends on again.
///
/// To publish: run `cargo publish --workspace` in target/package-stage.
#[derive(Default, clap::Args)]
pub struct Args {
    #[command(flatten)]
    codegen: CodegenArgs,
}

/// Carries the command out.
pub fn run(args: &Args) -> Result<()> {
    let compiler = setup::compiler(&args.codegen)?;
    let outside = packed(&args.codegen)?;
    outside.run("cudarc", &[], &[], &CodegenArgs::default())?;
    let stub = outside.unpacked("moe-lora")?.join("cuda-stub").into_os_string();
    outside.run(
        "the default features",
        &["default-features"],
        &[("CUDA_LIBRARY_PATH", stub)],
        &CodegenArgs::default(),
    )?;
    let mut with_compiler = Vec::new();
    if let Some(toolchain) = compiler.generator().toolchain() {
        with_compiler.push(("MOE_LORA_KERNEL_RUSTC", toolchain.rustc.clone().into_os_string()));
    }
    // It takes what rustc has made of the same sources for the package.
    outside.run("from-source", &["from-source"], &with_compiler, &args.codegen)?;
    outside.remove()
}

/// Makes the packages, and uses them with one driver.
pub fn briefly() -> Result<()> {
    let codegen = CodegenArgs::default();
    setup::compiler(&codegen)?;
    let outside = packed(&codegen)?;
    outside.run("cudarc", &[], &[], &codegen)?;
    outside.remove()
}

/// Makes the packages, and a crate that uses them.
fn packed(codegen: &CodegenArgs) -> Result<Outside> {
    // With the assembler at hand, the package carries cubins, and its users' drivers have nothing to compile.
    if let Err(reason) = setup::ptxas(true) {
        eprintln!("no cubins, the driver will compile the PTX: {reason:#}");
    }
    let stage = target_dir()?.join("package-stage");
    stage_sources(&stage)?;
    let crates = publishable(&stage)?;
    for crate_ in &crates {
        for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
            std::fs::copy(stage.join(licence), crate_.dir.join(licence)).context(licence)?;
        }
    }
    let prebuilt = crates.iter().find(|crate_| crate_.name == PREBUILT).context(PREBUILT)?;
    let kernels = prebuilt.dir.join(KERNELS);
    copy_tree(&compiled_kernels(codegen)?, &kernels)?;
    let packages = package(&stage, &crates, &kernels)?;
    print_sizes(&packages)?;

    Outside::new(&packages)
}

/// A crate that goes to crates.io.
struct Crate {
    name: String,
    version: String,
    /// Where it is staged.
    dir: PathBuf,
}

/// Copies what git tracks.
fn stage_sources(stage: &Path) -> Result<()> {
    empty_dir(stage)?;
    let listed = read(Command::new("git").current_dir(workspace_root()).args(["ls-files", "-z"]))?;
    for file in listed.split('\0').filter(|file| !file.is_empty()) {
        let (from, to) = (workspace_root().join(file), stage.join(file));
        // One that was deleted and not yet committed.
        if !from.is_file() {
            continue;
        }
        std::fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
        std::fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

/// The crates that go to crates.io: all that do not say otherwise. One that lacks what its page there shows
/// is an error.
fn publishable(stage: &Path) -> Result<Vec<Crate>> {
    let metadata = read(cargo().current_dir(stage).args(["metadata", "--no-deps", "--format-version=1"]))?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let mut crates = Vec::new();
    let packages = metadata["packages"].as_array().context("cargo metadata lists packages")?;
    for package in packages.iter().filter(|package| package["publish"].is_null()) {
        let field = |name: &str| package[name].as_str().map(str::to_owned);
        let name = field("name").context("a package has a name")?;
        let is_empty = |name: &&str| match &package[*name] {
            Value::String(text) => text.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => true,
        };
        let wanted =
            ["description", "license", "repository", "documentation", "readme", "keywords", "categories"];
        let missing: Vec<_> = wanted.into_iter().filter(is_empty).collect();
        ensure!(missing.is_empty(), "{name} has no {} in its Cargo.toml", missing.join(", "));
        let manifest = PathBuf::from(field("manifest_path").context("a package has a manifest")?);
        let dir = manifest.parent().context("a manifest lies in a folder")?.to_owned();
        crates.push(Crate { name, version: field("version").context("a package has a version")?, dir });
    }
    Ok(crates)
}

/// Compiles the kernels as for any program of this workspace, and returns the folder that they are packed in.
fn compiled_kernels(codegen: &CodegenArgs) -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--release", "-p", PREBUILT, "--message-format=json-render-diagnostics"]);
    let messages =
        step("compiling the kernels", || read(codegen.pass_to(&mut build).stderr(Stdio::inherit())))?;
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line)?;
        let id = message["package_id"].as_str().unwrap_or_default();
        if let ("build-script-executed", Some(out), true) = (
            message["reason"].as_str().unwrap_or_default(),
            message["out_dir"].as_str(),
            id.contains(PREBUILT),
        ) {
            return Ok(Path::new(out).join(KERNELS));
        }
    }
    bail!("cargo build did not say where {PREBUILT} was built")
}

/// Packs the crates, and returns the packages.
fn package(stage: &Path, crates: &[Crate], kernels: &Path) -> Result<Vec<PathBuf>> {
    let out = target_dir()?.join("package");
    loop {
        empty_dir(&out)?;
        let mut package = cargo();
        package.current_dir(stage).args(["package", "--no-verify", "--allow-dirty", "--target-dir"]);
        package.arg(target_dir()?);
        for Crate { name, .. } in crates {
            package.args(["-p", name]);
        }
        run_command(&mut package)?;
        let file = |crate_: &Crate| out.join(format!("{}-{}.crate", crate_.name, crate_.version));
        let mut too_large = None;
        for crate_ in crates {
            let bytes = file(crate_).metadata().with_context(|| crate_.name.clone())?.len();
            if bytes >= LARGEST {
                too_large = Some((crate_, bytes));
            }
        }
        let Some((crate_, bytes)) = too_large else {
            // The registry of its own in which Cargo has shown each crate those before it.
            for left in ["tmp-crate", "tmp-registry"] {
                remove_dir(&out.join(left))?;
            }
            return Ok(crates.iter().map(file).collect());
        };
        let left_out = if crate_.name == PREBUILT { leave_out_newest(kernels)? } else { None };
        let Some(arch) = left_out else {
            bail!("{} is a package of {bytes} bytes, and crates.io takes {LARGEST}", crate_.name)
        };
        println!("{PREBUILT} would be {bytes} bytes: it goes without the cubin for {arch}");
    }
}

/// Removes the cubin for the newest architecture that has one, and returns which; `None` where none is left.
/// The oldest architectures are what most devices are, and what this was tested on.
fn leave_out_newest(kernels: &Path) -> Result<Option<String>> {
    let manifest = kernels.join("manifest.txt");
    let text = std::fs::read_to_string(&manifest)?;
    let cubin = |arch: &str| kernels.join(format!("{arch}.cubin.lz4"));
    let mut arches = text.lines().filter_map(|line| line.split(' ').next());
    let Some(newest) = arches.rfind(|arch| cubin(arch).is_file()) else { return Ok(None) };
    std::fs::remove_file(cubin(newest))?;
    std::fs::write(&manifest, without_cubin(&text, newest))?;
    Ok(Some(newest.to_owned()))
}

/// The manifest of the kernels without the cubin for `arch`.
fn without_cubin(manifest: &str, arch: &str) -> String {
    let line = |line: &str| match line.splitn(3, ' ').collect::<Vec<_>>()[..] {
        [of, _, made_by] if of == arch => format!("{of} - {made_by}\n"),
        _ => format!("{line}\n"),
    };
    manifest.lines().map(line).collect()
}

fn print_sizes(packages: &[PathBuf]) -> Result<()> {
    println!();
    for package in packages {
        println!("{:>8.2} MB  {}", package.metadata()?.len() as f64 / 1e6, package.display());
    }
    Ok(())
}

/// A folder outside of the workspace, with the packages unpacked and a crate that uses them.
struct Outside {
    dir: PathBuf,
}

impl Outside {
    fn new(packages: &[PathBuf]) -> Result<Self> {
        // The same for each run in this workspace, so that Cargo knows its own builds again.
        let mut hasher = DefaultHasher::new();
        workspace_root().hash(&mut hasher);
        let dir = std::env::temp_dir().join(format!("moe-lora-consumer-{:016x}", hasher.finish()));
        empty_dir(&dir.join("src"))?;
        empty_dir(&dir.join("packages"))?;
        for package in packages {
            // Files in a package are all as old as one another. Cargo would take them for what it has
            // compiled before.
            let mut tar = Command::new("tar");
            read(tar.args(["-x", "-z", "-m", "-f"]).arg(package).arg("-C").arg(dir.join("packages")))?;
        }
        let outside = Outside { dir };
        let mut patches = String::new();
        for package in packages {
            let unpacked = package.file_stem().context("a package has a name")?;
            let unpacked = outside.dir.join("packages").join(unpacked);
            for file in ["Cargo.toml", "README.md", "LICENSE-APACHE", "LICENSE-MIT"] {
                ensure!(unpacked.join(file).is_file(), "{} has no {file}", package.display());
            }
            let folder =
                unpacked.file_name().and_then(|name| name.to_str()).context("crates have ASCII names")?;
            let (name, _) = folder.rsplit_once('-').context("a package has a version")?;
            patches.push_str(&format!("{name} = {{ path = {unpacked:?} }}\n"));
        }
        std::fs::write(outside.dir.join("Cargo.toml"), manifest(&patches))?;
        std::fs::write(outside.dir.join("src/main.rs"), CONSUMER)?;
        // The versions that the workspace was tested with; Cargo drops what is not needed here.
        std::fs::copy(workspace_root().join("Cargo.lock"), outside.dir.join("Cargo.lock"))?;
        Ok(outside)
    }

    /// Where the package of a crate is unpacked.
    fn unpacked(&self, name: &str) -> Result<PathBuf> {
        let version = env!("CARGO_PKG_VERSION");
        let dir = self.dir.join("packages").join(format!("{name}-{version}"));
        ensure!(dir.is_dir(), "{name} {version} is not among the packages");
        Ok(dir)
    }

    /// Builds the crate with `features` of its own, and runs it.
    fn run(
        &self,
        what: &str,
        features: &[&str],
        variables: &[(&str, OsString)],
        codegen: &CodegenArgs,
    ) -> Result<()> {
        println!("\nA crate outside of the repository, with {what}:");
        let mut cargo = cargo();
        for (name, _) in std::env::vars_os() {
            let is_ours = name.to_str().is_some_and(|name| name.starts_with("MOE_LORA_"));
            if is_ours || TOOLS.iter().any(|tool| name == *tool) {
                cargo.env_remove(name);
            }
        }
        // Of the places where compilers are looked for, one that there is in the workspace alone.
        cargo.env("MOE_LORA_KERNEL_SEARCH", "project");
        cargo.env("MOE_LORA_CUBINS", "never");
        cargo.envs(variables.iter().map(|(name, value)| (name, value)));
        run_command(
            codegen
                .pass_to(&mut cargo)
                // Where there is no .cargo/config.toml of the workspace's.
                .current_dir(&self.dir)
                .args(["run", "--quiet", "--target-dir"])
                // Where other crates are compiled already, and what rustc has made of the kernels is kept.
                .arg(target_dir()?)
                .args(["--features", &features.join(",")]),
        )
        .with_context(|| {
            format!("the packages do not work with {what}; the crate is left in {}", self.dir.display())
        })
    }

    /// Removes it all: where something failed, it stays to be looked at.
    fn remove(self) -> Result<()> {
        remove_dir(&self.dir)
    }
}

/// The manifest of the crate that uses the packages, with the entries that take them from where they are
/// unpacked.
fn manifest(patches: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "[package]
name = \"moe-lora-consumer\"
edition = \"2024\"

[features]
default-features = [\"moe-lora/default\"]
from-source = [\"moe-lora/from-source\", \"moe-lora-prebuilt/from-source\"]

[dependencies]
half = \"2\"
moe-lora = {{ version = \"{version}\", default-features = false, features = {FEATURES:?} }}
moe-lora-cli = {{ version = \"{version}\", default-features = false }}
moe-lora-prebuilt = \"{version}\"
moe-lora-verify = \"{version}\"

[patch.crates-io]
{patches}
[workspace]
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_cubin_is_left_out_first() {
        let dir = std::env::temp_dir().join(format!("moe-lora-xtask-{}", std::process::id()));
        empty_dir(&dir).unwrap();
        let manifest = "sm_80 13.0.88 llvm, rustc 1, sm_80\nsm_90a 13.0.88 llvm, rustc 1, sm_90a\n";
        std::fs::write(dir.join("manifest.txt"), manifest).unwrap();
        std::fs::write(dir.join("sm_80.cubin.lz4"), [0; 2]).unwrap();
        std::fs::write(dir.join("sm_90a.cubin.lz4"), [0; 3]).unwrap();
        let left_out = || leave_out_newest(&dir).unwrap();
        assert_eq!(left_out().as_deref(), Some("sm_90a"));
        let text = std::fs::read_to_string(dir.join("manifest.txt")).unwrap();
        assert_eq!(text, "sm_80 13.0.88 llvm, rustc 1, sm_80\nsm_90a - llvm, rustc 1, sm_90a\n");
        assert!(!dir.join("sm_90a.cubin.lz4").exists());
        assert_eq!(left_out().as_deref(), Some("sm_80"));
        assert_eq!(left_out(), None);
        remove_dir(&dir).unwrap();
    }
}
