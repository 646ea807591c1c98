//! The oldest glibc that what is shipped runs on. A linker takes the newest version of each function that the
//! glibc before it has, so on a machine of today a program comes to ask for a glibc of today. Here programs
//! are linked with stubs of an old one, and what came out is checked.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use object::Endianness;
use object::read::elf::ElfFile64;

use crate::environment::Environment;
use crate::shell::{empty_dir, read, remove_dir, step, target_dir};

/// The glibc that PyTorch's wheels ask for.
pub const OLDEST: Version = Version(2, 28);

/// Makes the stubs: its `zig cc` has the functions of every glibc.
const ZIG: &str = "ziglang==0.17.1";

/// What zig makes when it links a program, and the names that a linker looks for.
const STUBS: [(&str, &str); 10] = [
    ("Scrt1.o", "Scrt1.o"),
    ("libc.so.6", "libc.so.6"),
    ("libc_nonshared.a", "libc_nonshared.a"),
    ("libld.so.2", "libld.so.2"),
    ("libm.so.6", "libm.so"),
    ("libdl.so.2", "libdl.so"),
    ("libpthread.so.0", "libpthread.so"),
    ("libresolv.so.2", "libresolv.so"),
    ("librt.so.1", "librt.so"),
    ("libutil.so.1", "libutil.so"),
];

/// What `-lc` means, as in glibc's own file of this name: some functions are no part of the shared library.
const LIBC: (&str, &str) = ("libc.so", "GROUP ( libc.so.6 libc_nonshared.a AS_NEEDED ( libld.so.2 ) )\n");

/// A version of glibc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl Version {
    /// That of a symbol: `GLIBC_2.28`. `None` for a name that does not say when it came, as
    /// `GLIBC_ABI_DT_RELR`.
    fn of_symbol(name: &str) -> Option<Self> {
        // A third number is as old as glibc 2.3.4.
        let mut numbers = name.strip_prefix("GLIBC_")?.split('.').map(|number| number.parse().ok());
        Some(Version(numbers.next()??, numbers.next()??))
    }

    /// That of a wheel's tag: `manylinux_2_28_x86_64`.
    pub fn of_tag(tag: &str) -> Option<Self> {
        let mut numbers = tag.strip_prefix("manylinux_")?.split('_').map(|number| number.parse().ok());
        Some(Version(numbers.next()??, numbers.next()??))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// What programs are linked with.
pub enum Glibc {
    /// This machine's own.
    Native,
    /// Stubs of [`OLDEST`], in this folder.
    Stubs(PathBuf),
}

impl Glibc {
    /// The oldest, where that can be had: on Linux with glibc. The stubs are made once.
    pub fn oldest(environment: &Environment) -> Result<Self> {
        if !cfg!(all(target_os = "linux", target_env = "gnu")) {
            return Ok(Glibc::Native);
        }
        let target = format!("{}-linux-gnu.{OLDEST}", std::env::consts::ARCH);
        let dir = target_dir()?.join("glibc-stubs");
        let (stamp, made_by) = (dir.join("made-by.txt"), format!("{ZIG} {target}\n"));
        if std::fs::read_to_string(&stamp).is_ok_and(|text| text == made_by) {
            return Ok(Glibc::Stubs(dir));
        }
        let scratch = dir.with_extension(std::process::id().to_string());
        empty_dir(&scratch)?;
        let made =
            step(&format!("making stubs of glibc {OLDEST} with {ZIG} (100 MB to fetch, not kept)"), || {
                make_stubs(environment, &target, &scratch, &dir)
            });
        remove_dir(&scratch)?;
        made?;
        std::fs::write(stamp, made_by)?;
        Ok(Glibc::Stubs(dir))
    }

    /// Arguments for rustc, when it makes a program or a shared library. They go behind `cargo rustc … --`,
    /// to its last crate alone: in `RUSTFLAGS` they would have all others compiled again, too.
    pub fn rustc_args(&self) -> Vec<String> {
        match self {
            Glibc::Native => Vec::new(),
            Glibc::Stubs(dir) => {
                let (library, start) = (format!("-L{}", dir.display()), format!("-B{}", dir.display()));
                // This machine's libgcc_s asks for its glibc. Elsewhere, elsewhere's is taken.
                let args = [library, start, "-Wl,--allow-shlib-undefined".to_owned()];
                args.iter().map(|arg| format!("-Clink-arg={arg}")).collect()
            }
        }
    }

    /// Fails if a program or a shared library asks for a later glibc.
    pub fn check(&self, program: &Path) -> Result<()> {
        if let Glibc::Native = self {
            return Ok(());
        }
        let name = program.display();
        let bytes = std::fs::read(program).with_context(|| format!("cannot read {name}"))?;
        let needs = needs(&bytes).with_context(|| format!("{name}"))?;
        let late = later_than(OLDEST, &needs);
        ensure!(late.is_empty(), "{name} does not run with glibc {OLDEST}: it asks for {}", late.join(", "));
        Ok(())
    }
}

impl fmt::Display for Glibc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Glibc::Native => f.write_str("a glibc no older than that of the machine it was built on"),
            Glibc::Stubs(_) => write!(f, "glibc {OLDEST} or later"),
        }
    }
}

/// Lets zig link a program, and takes what it linked it with.
fn make_stubs(environment: &Environment, target: &str, scratch: &Path, dir: &Path) -> Result<()> {
    let (zig, cache) = (scratch.join("zig"), scratch.join("cache"));
    read(
        environment
            .python()
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", ZIG, "--target"])
            .arg(&zig),
    )?;
    std::fs::write(scratch.join("main.c"), "int main(void) { return 0; }\n")?;
    read(
        Command::new(zig.join("ziglang/zig"))
            // Optimised, so that it makes no libraries for sanitizers.
            .args(["cc", "-O2", "-pie", "-target", target, "main.c", "-o", "main"])
            .current_dir(scratch)
            .env("ZIG_GLOBAL_CACHE_DIR", &cache)
            .env("ZIG_LOCAL_CACHE_DIR", &cache),
    )?;
    let mut made = BTreeMap::new();
    for folder in cache.join("o").read_dir()? {
        for file in folder?.path().read_dir()? {
            let file = file?;
            made.insert(file.file_name(), file.path());
        }
    }
    empty_dir(dir)?;
    for (name, wanted) in STUBS {
        let Some(file) = made.get(std::ffi::OsStr::new(name)) else { bail!("{ZIG} made no {name}") };
        std::fs::copy(file, dir.join(wanted)).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let (name, text) = LIBC;
    Ok(std::fs::write(dir.join(name), text)?)
}

/// A version that a program asks for, and a symbol that it is asked of.
struct Need {
    version: String,
    /// `None` for a version that is asked for by itself.
    symbol: Option<String>,
}

/// What a program asks for of the libraries that it names.
fn needs(program: &[u8]) -> Result<Vec<Need>> {
    let elf = ElfFile64::<Endianness>::parse(program)?;
    let (endian, sections) = (elf.endian(), elf.elf_section_table());
    let Some((mut libraries, link)) = sections.gnu_verneed(endian, program)? else { return Ok(Vec::new()) };
    let versions = sections.versions(endian, program)?.unwrap_or_default();
    let symbols = elf.elf_dynamic_symbol_table();
    let mut by_version = BTreeMap::<u16, Vec<String>>::new();
    for (index, symbol) in symbols.enumerate() {
        let name = String::from_utf8_lossy(symbols.symbol_name(endian, symbol)?).into_owned();
        by_version.entry(versions.version_index(endian, index).index().0).or_default().push(name);
    }
    let strings = sections.strings(endian, program, link)?;
    let mut needs = Vec::new();
    while let Some((_, mut asked)) = libraries.next()? {
        while let Some(version) = asked.next()? {
            let name = String::from_utf8_lossy(version.name(endian, strings)?).into_owned();
            let need = |symbol| Need { version: name.clone(), symbol };
            match by_version.remove(&version.vna_other(endian).index().0) {
                Some(symbols) => needs.extend(symbols.into_iter().map(|symbol| need(Some(symbol)))),
                None => needs.push(need(None)),
            }
        }
    }
    Ok(needs)
}

/// The needs that a glibc of this version does not meet.
fn later_than(version: Version, needs: &[Need]) -> Vec<String> {
    let of_glibc = needs.iter().filter(|need| need.version.starts_with("GLIBC_"));
    let late = of_glibc.filter(|need| Version::of_symbol(&need.version).is_none_or(|its| its > version));
    late.map(|Need { version, symbol }| match symbol {
        Some(symbol) => format!("{symbol} of {version}"),
        None => version.clone(),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_symbols_and_tags() {
        for (name, expected) in [
            ("GLIBC_2.28", Some(Version(2, 28))),
            ("GLIBC_2.2.5", Some(Version(2, 2))),
            ("GLIBC_3.0", Some(Version(3, 0))),
            ("GLIBC_2", None),
            ("GLIBC_ABI_DT_RELR", None),
            ("GLIBC_PRIVATE", None),
            ("GCC_3.0", None),
        ] {
            assert_eq!(Version::of_symbol(name), expected, "{name}");
        }
        for (tag, expected) in [
            ("manylinux_2_28_x86_64", Some(Version(2, 28))),
            ("manylinux_2_5_i686", Some(Version(2, 5))),
            ("manylinux2014_x86_64", None),
            ("linux_x86_64", None),
        ] {
            assert_eq!(Version::of_tag(tag), expected, "{tag}");
        }
        assert!(Version(2, 5) < Version(2, 28) && Version(2, 28) < Version(3, 0));
    }

    #[test]
    fn what_is_too_late_is_named() {
        let needs = [
            ("GLIBC_2.2.5", Some("malloc")),
            ("GLIBC_2.28", Some("statx")),
            ("GLIBC_2.29", Some("pow")),
            ("GLIBC_2.35", Some("hypot")),
            ("GLIBC_ABI_DT_RELR", None),
            ("GLIBC_PRIVATE", Some("__libc_secret")),
            ("GCC_14.0.0", Some("_Unwind_Resume")),
        ];
        let needs = needs
            .map(|(version, symbol)| Need { version: version.to_owned(), symbol: symbol.map(str::to_owned) });
        assert_eq!(
            later_than(Version(2, 28), &needs),
            [
                "pow of GLIBC_2.29",
                "hypot of GLIBC_2.35",
                "GLIBC_ABI_DT_RELR",
                "__libc_secret of GLIBC_PRIVATE"
            ]
        );
        assert_eq!(later_than(Version(2, 35), &needs).len(), 2);
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn the_needs_of_a_program_are_found() {
        let program = std::env::current_exe().expect("this program");
        let bytes = std::fs::read(&program).expect("this program");
        let needs = needs(&bytes).expect("an ELF file");
        let start = needs.iter().find(|need| need.symbol.as_deref() == Some("__libc_start_main"));
        let start =
            Version::of_symbol(&start.expect("every program asks for it").version).expect("a version");
        assert!(later_than(start, &needs).iter().all(|late| !late.starts_with("__libc_start_main ")));
        let late = later_than(Version(0, 0), &needs);
        assert!(late.iter().any(|late| late.starts_with("__libc_start_main of GLIBC_")), "{late:?}");
    }
}
