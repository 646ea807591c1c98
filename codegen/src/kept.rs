//! What rustc and ptxas have made of the kernels, kept from one build to the next.
//!
//! Cargo runs a build script anew for each profile, set of features and lint, and `cargo xtask test` and
//! `check` do so eight times; the kernels are the same in all of them. What is kept goes with everything that
//! it was made from, in full, so that nothing but the same command over the same sources by the same compiler
//! finds it. Where the sources lie is no part of that: the kernels have no path in them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::toolchain::folder;

/// What a compiler emitted, and its warnings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Emitted {
    pub bytes: Vec<u8>,
    pub warnings: String,
}

/// A file for what one command emits.
pub(crate) struct Kept {
    file: PathBuf,
    /// What it is made from.
    key: String,
}

impl Kept {
    /// In `file`, for what `command` makes of the sources below `sources`; `None` if one of them cannot be
    /// read.
    pub fn new(file: PathBuf, command: &str, sources: &Path) -> Option<Self> {
        let mut key = format!("{command}\n");
        append(&mut key, sources, sources).ok()?;
        Some(Kept { file, key })
    }

    /// In `file`, for what `command` makes of one text.
    pub fn of_text(file: PathBuf, command: &str, text: &str) -> Self {
        Kept { file, key: format!("{command}\n{text}") }
    }

    /// What was made of the same.
    pub fn read(&self) -> Option<Emitted> {
        let all = fs::read(&self.file).ok()?;
        let end = all.iter().position(|byte| *byte == b'\n')?;
        let (lengths, rest) = (std::str::from_utf8(&all[..end]).ok()?, &all[end + 1..]);
        let mut lengths = lengths.split(' ').map(|length| length.parse().ok());
        let (key, rest) = rest.split_at_checked(lengths.next()??)?;
        let (warnings, rest) = rest.split_at_checked(lengths.next()??)?;
        // What is torn has fewer bytes.
        let is_same = key == self.key.as_bytes() && lengths.next()?? == rest.len();
        let warnings = String::from_utf8(warnings.to_owned()).ok()?;
        is_same.then(|| Emitted { bytes: rest.to_owned(), warnings })
    }

    /// Keeps it, in place of what was made of something else. `scratch` is a folder beside the file, in which
    /// nobody else writes: another build sees all of it or nothing. What cannot be written is made anew next
    /// time.
    pub fn write(&self, emitted: &Emitted, scratch: &Path) {
        let (key, Emitted { bytes, warnings }) = (&self.key, emitted);
        let new = scratch.join("kept");
        let mut all =
            format!("{} {} {}\n{key}{warnings}", key.len(), warnings.len(), bytes.len()).into_bytes();
        all.extend(bytes);
        let _ = fs::write(&new, all).and_then(|()| fs::rename(&new, &self.file));
    }
}

/// Appends every file below `dir`, its path below `root` and its text.
fn append(key: &mut String, root: &Path, dir: &Path) -> std::io::Result<()> {
    for path in folder(dir) {
        if path.is_dir() {
            append(key, root, &path)?;
        } else {
            let text = fs::read_to_string(&path)?;
            let name = path.strip_prefix(root).unwrap_or(&path);
            key.push_str(&format!("{} {}\n{text}\n", name.display(), text.len()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_command_over_the_same_sources_finds_it() {
        let dir = tempfile::tempdir().unwrap();
        let (sources, cache) = (dir.path().join("src"), dir.path().join("cache"));
        fs::create_dir_all(sources.join("arch")).unwrap();
        fs::create_dir_all(cache.join("scratch")).unwrap();
        fs::write(sources.join("lib.rs"), "mod arch;").unwrap();
        fs::write(sources.join("arch/mod.rs"), "// ä").unwrap();
        let kept = |command| Kept::new(cache.join("kernels"), command, &sources).unwrap();
        let write = |emitted| kept("rustc").write(emitted, &cache.join("scratch"));

        let first = Emitted { bytes: b".version 8.0 \n\xff\n".to_vec(), warnings: "warning: ü".to_owned() };
        assert_eq!(kept("rustc").read(), None);
        write(&first);
        assert_eq!(kept("rustc").read(), Some(first.clone()));
        assert_eq!(kept("rustc --other").read(), None);

        fs::write(sources.join("arch/mod.rs"), "// o").unwrap();
        assert_eq!(kept("rustc").read(), None, "a source has changed");
        let second = Emitted { bytes: Vec::new(), warnings: String::new() };
        write(&second);
        assert_eq!(kept("rustc").read(), Some(second));
        fs::write(sources.join("new.rs"), "").unwrap();
        assert_eq!(kept("rustc").read(), None, "there is a source more");
        fs::remove_file(sources.join("new.rs")).unwrap();
        assert!(kept("rustc").read().is_some());
        let elsewhere = dir.path().join("elsewhere");
        fs::rename(&sources, &elsewhere).unwrap();
        let moved = Kept::new(cache.join("kernels"), "rustc", &elsewhere).unwrap();
        assert!(moved.read().is_some(), "all sources have moved");
        fs::rename(elsewhere.join("arch/mod.rs"), elsewhere.join("arch/other.rs")).unwrap();
        let moved = Kept::new(cache.join("kernels"), "rustc", &elsewhere).unwrap();
        assert_eq!(moved.read(), None, "a source has another name");
    }

    #[test]
    fn of_a_text_the_same_text_finds_it() {
        let dir = tempfile::tempdir().unwrap();
        let kept = |text| Kept::of_text(dir.path().join("cubin"), "ptxas 13.0.88", text);
        let emitted = Emitted { bytes: b"\x7fELF\0\n".to_vec(), warnings: String::new() };
        kept(".version 8.0").write(&emitted, dir.path());
        assert_eq!(kept(".version 8.0").read(), Some(emitted));
        assert_eq!(kept(".version 8.1").read(), None);
    }

    #[test]
    fn what_is_torn_is_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let sources = dir.path().join("src");
        let kept = Kept::new(dir.path().join("kernels"), "rustc", &sources).unwrap();
        let emitted = Emitted { bytes: b"text".to_vec(), warnings: "warnings".to_owned() };
        kept.write(&emitted, dir.path());
        let whole = fs::read_to_string(dir.path().join("kernels")).unwrap();
        let less = [&whole[..whole.len() - 5], &whole[..whole.len() - 1]];
        for torn in ["", "7", "7 8", "7 8 4\nrust", "x 8 4\nrustc\nwarningstext"].into_iter().chain(less) {
            fs::write(dir.path().join("kernels"), torn).unwrap();
            assert_eq!(kept.read(), None, "{torn:?}");
        }
    }
}
