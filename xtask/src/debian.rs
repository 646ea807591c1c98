//! A toolchain out of Debian's or Ubuntu's packages, unpacked into this project.
//!
//! Nothing is installed: package lists and packages are downloaded into a folder under target/,
//! which needs no root, and what they contain is unpacked there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use moe_lora_codegen::Toolchain;
use moe_lora_codegen::toolchain::OLDEST_RUSTC;

use crate::shell::{empty_dir, installed, read, remove_dir, step};

/// The packages that have a compiler, with those that have its library's sources. Debian's
/// stable releases keep a current rustc under the first name, for browsers.
const PACKAGES: [(&str, &str); 2] = [("rustc-web", "rust-web-src"), ("rustc", "rust-src")];

/// Fetches and unpacks a toolchain into `dir`.
pub fn unpack_toolchain(dir: &Path) -> Result<()> {
    for program in ["apt-get", "apt-cache", "dpkg-deb", "tar", "ldd"] {
        ensure!(installed(program), "this machine has no {program}: it is neither Debian nor Ubuntu");
    }
    let scratch = dir.with_extension(format!("{}", std::process::id()));
    let unpacked = Apt::new(&scratch).and_then(|apt| {
        let root = apt.unpack_rustc()?;
        // Last, so that a toolchain is there whole or not at all.
        remove_dir(dir)?;
        std::fs::rename(&root, dir).with_context(|| format!("{}", dir.display()))
    });
    remove_dir(&scratch)?;
    unpacked
}

/// apt with its lists, its cache and its downloads in a folder of ours.
struct Apt {
    scratch: PathBuf,
}

impl Apt {
    fn new(scratch: &Path) -> Result<Self> {
        empty_dir(scratch)?;
        for dir in ["lists/partial", "cache/archives/partial", "packages", "root/usr/lib"] {
            std::fs::create_dir_all(scratch.join(dir))?;
        }
        // Some packages still name /lib, which has long been /usr/lib.
        std::os::unix::fs::symlink("usr/lib", scratch.join("root/lib"))?;
        Ok(Self { scratch: scratch.to_owned() })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::State::Lists", self.scratch.join("lists")),
            ("Dir::Cache", self.scratch.join("cache")),
            ("Acquire::Languages", "none".into()),
            // Else apt started by root downloads as another user, who cannot write here.
            ("APT::Sandbox::User", "root".into()),
        ] {
            command.arg("-o").arg(format!("{option}={}", value.display()));
        }
        command.current_dir(self.scratch.join("packages")).env("LC_ALL", "C");
        command
    }

    fn unpack_rustc(&self) -> Result<PathBuf> {
        // One unreachable source among many is no reason to stop: what counts is the next step.
        let updated =
            step("reading the package lists, into target/", || read(self.command("apt-get").arg("update")));
        let (compiler, sources) = match (self.choose()?, updated) {
            (Some(pair), _) => pair,
            (None, Err(error)) => return Err(error),
            (None, Ok(_)) => bail!(
                "no package has rustc {}.{} or later (looked for {})",
                OLDEST_RUSTC.0,
                OLDEST_RUSTC.1,
                PACKAGES.map(|(compiler, _)| compiler).join(", ")
            ),
        };
        let is_own_library = |name: &String| {
            (name.starts_with("libstd-rust") || name.starts_with("libllvm")) && !name.ends_with("-dev")
        };
        let libraries: Vec<_> = self.dependencies(&[compiler])?.into_iter().filter(is_own_library).collect();
        let mut packages = vec![compiler.to_owned(), sources.to_owned()];
        packages.extend(libraries.iter().cloned());
        self.unpack(&packages)?;

        let root = self.scratch.join("root");
        let rustc = root.join("usr/bin/rustc");
        if !missing_libraries(&root, &rustc)?.is_empty() {
            let libraries: Vec<_> = libraries.iter().map(String::as_str).collect();
            let others = self.dependencies(&libraries)?;
            // libc is the machine's own: another one would not match its loader.
            let others: Vec<_> = others
                .into_iter()
                .filter(|name| {
                    name.starts_with("lib") && !name.starts_with("libc6") && !packages.contains(name)
                })
                .collect();
            self.unpack(&others)?;
            let missing = missing_libraries(&root, &rustc)?;
            ensure!(missing.is_empty(), "{compiler} lacks {}", missing.join(", "));
        }
        keep_library(&root.join("usr/src"))?;
        Toolchain::probe(&rustc)
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("{compiler} was unpacked, but will not do"))?;
        Ok(root)
    }

    /// The first of [`PACKAGES`] that is new enough.
    fn choose(&self) -> Result<Option<(&'static str, &'static str)>> {
        for (compiler, sources) in PACKAGES {
            let version = self.candidate(compiler)?;
            let recent =
                version.as_deref().and_then(major_minor).is_some_and(|version| version >= OLDEST_RUSTC);
            if recent && self.candidate(sources)? == version {
                return Ok(Some((compiler, sources)));
            }
        }
        Ok(None)
    }

    /// The version that apt would install.
    fn candidate(&self, package: &str) -> Result<Option<String>> {
        let policy = read(self.command("apt-cache").args(["policy", package]))?;
        let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        Ok(version.filter(|version| *version != "(none)").map(str::to_owned))
    }

    /// Everything that the packages depend on, directly or not.
    fn dependencies(&self, packages: &[&str]) -> Result<BTreeSet<String>> {
        let depends = read(
            self.command("apt-cache")
                .args(["depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts"])
                .args(["--no-breaks", "--no-replaces", "--no-enhances"])
                .args(packages),
        )?;
        // Packages stand at the start of a line, their relations and <virtual packages> do not.
        let is_package = |line: &&str| line.starts_with(|c: char| c.is_ascii_alphanumeric());
        Ok(depends.lines().filter(is_package).map(str::to_owned).collect())
    }

    fn unpack(&self, packages: &[String]) -> Result<()> {
        let uris = read(self.command("apt-get").args(["download", "--print-uris"]).args(packages))?;
        let bytes: u64 =
            uris.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok()).sum();
        step(&format!("downloading {} ({} MB)", packages.join(", "), bytes.div_ceil(1_000_000)), || {
            read(self.command("apt-get").arg("download").args(packages))
        })?;
        step("unpacking them into target/", || {
            for entry in std::fs::read_dir(self.scratch.join("packages"))? {
                let package = entry?.path();
                unpack_one(&package, &self.scratch.join("root"))?;
                std::fs::remove_file(&package)?;
            }
            Ok(())
        })
    }
}

/// `dpkg-deb -x`, except that it follows the link that `/lib` is.
fn unpack_one(package: &Path, root: &Path) -> Result<()> {
    let mut archive = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run dpkg-deb")?;
    let contents = archive.stdout.take().context("dpkg-deb has no output")?;
    read(Command::new("tar").args(["-x", "--keep-directory-symlink", "-C"]).arg(root).stdin(contents))?;
    ensure!(archive.wait()?.success(), "dpkg-deb cannot read {}", package.display());
    Ok(())
}

/// Removes the compiler's own sources, which are most of it, and leaves the library's.
fn keep_library(sources: &Path) -> Result<()> {
    for version in std::fs::read_dir(sources)? {
        for part in std::fs::read_dir(version?.path())? {
            let part = part?;
            if part.file_type()?.is_dir() && part.file_name() != "library" {
                std::fs::remove_dir_all(part.path())?;
            }
        }
    }
    Ok(())
}

/// The shared libraries that the loader does not find for `program`, with those under `root` in
/// its reach.
fn missing_libraries(root: &Path, program: &Path) -> Result<Vec<String>> {
    let mut path = Vec::new();
    for entry in std::fs::read_dir(root.join("usr/lib"))? {
        let dir = entry?.path();
        if dir.to_string_lossy().contains("-linux-gnu") {
            path.push(dir);
        }
    }
    let output = read(Command::new("ldd").arg(program).env("LD_LIBRARY_PATH", std::env::join_paths(path)?))?;
    let missing = output.lines().filter_map(|line| line.trim().strip_suffix(" => not found"));
    Ok(missing.map(str::to_owned).collect())
}

/// (1, 96) of `1.96.0+dfsg1-1~deb12u2`
fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(['.', '+', '-', '~']).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_versions_parse() {
        assert_eq!(major_minor("1.96.0+dfsg1-1~deb12u2"), Some((1, 96)));
        assert_eq!(major_minor("1.85-1"), Some((1, 85)));
        assert_eq!(major_minor("(none)"), None);
    }
}
