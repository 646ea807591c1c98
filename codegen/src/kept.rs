//! What rustc has made of the kernels, kept from one build to the next.
//!
//! Cargo runs a build script anew for each profile, set of features and lint, and `cargo xtask test` and `check` do
//! so eight times; the kernels are the same in all of them. What is kept goes with everything that it was made from, in full, so that
//! nothing but the same command over the same sources by the same compiler finds it. Where the sources lie is no part of that: the kernels
//! have no path in them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::toolchain::folder;

/// What a compiler emitted, and its warnings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Emitted {
    pub text: String,
    pub warnings: String,
}

/// A file for what one command emits.
pub(crate) struct Kept {
    file: PathBuf,
    /// What it is made from.
    key: String,
}

impl Kept {
    /// In `file`, for what `command` makes of the sources below `sources`; `None` if one of them cannot be read.
    pub fn new(file: PathBuf, command: &str, sources: &Path) -> Option<Self> {
        let mut key = format!("{command}\n");
        append(&mut key, sources, sources).ok()?;
        Some(Kept { file, key })
    }

    /// What was made of the same.
    pub fn read(&self) -> Option<Emitted> {
        let all = fs::read_to_string(&self.file).ok()?;
        let (lengths, rest) = all.split_once('\n')?;
        let (key, warnings) = lengths.split_once(' ')?;
        let (key, rest) = rest.split_at_checked(key.parse().ok()?)?;
        let (warnings, text) = rest.split_at_checked(warnings.parse().ok()?)?;
        (key == self.key).then(|| Emitted { text: text.to_owned(), warnings: warnings.to_owned() })
    }

    /// Keeps it, in place of what was made of something else. `scratch` is a folder beside the file, in which nobody else writes: another
    /// build sees all of it or nothing. What cannot be written is made anew next time.
    pub fn write(&self, emitted: &Emitted, scratch: &Path) {
        let (key, Emitted { text, warnings }) = (&self.key, emitted);
        let new = scratch.join("kept");
        let all = format!("{} {}\n{key}{warnings}{text}", key.len(), warnings.len());
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

        let first = Emitted { text: ".version 8.0 // µ\n".to_owned(), warnings: "warning: ü".to_owned() };
        assert_eq!(kept("rustc").read(), None);
        write(&first);
        assert_eq!(kept("rustc").read(), Some(first.clone()));
        assert_eq!(kept("rustc --other").read(), None);

        fs::write(sources.join("arch/mod.rs"), "// o").unwrap();
        assert_eq!(kept("rustc").read(), None, "a source has changed");
        let second = Emitted { text: String::new(), warnings: String::new() };
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
    fn what_is_torn_is_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let sources = dir.path().join("src");
        let kept = Kept::new(dir.path().join("kernels"), "rustc", &sources).unwrap();
        let emitted = Emitted { text: "text".to_owned(), warnings: "warnings".to_owned() };
        kept.write(&emitted, dir.path());
        let whole = fs::read_to_string(dir.path().join("kernels")).unwrap();
        for torn in ["", "7", "7 8", "7 8\nrust", "x 8\nrustc\nwarningstext", &whole[..whole.len() - 5]] {
            fs::write(dir.path().join("kernels"), torn).unwrap();
            assert_eq!(kept.read(), None, "{torn:?}");
        }
    }
}
