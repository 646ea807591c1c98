//! Files that are there whole or not at all, for [`Tuning::save`](crate::tuning::Tuning::save) and the
//! program `moe-lora`.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// Writes a file. Where that fails, a full disk say, nothing is there that was not there before: the bytes go
/// to a file beside it, which takes its name when all of them are written.
///
/// A file that exists is replaced only when `replace` is set; a link to it then stays a link, and its
/// permissions stay. A device or a pipe has nothing to lose, and is written to as it is.
///
/// # Errors
/// [`io::ErrorKind::AlreadyExists`] for a file that may not be replaced, whenever it has come to be there;
/// and whatever the system says.
pub fn write(path: &Path, bytes: &[u8], replace: bool) -> io::Result<()> {
    let target = match replace {
        true => fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
        false => path.to_owned(),
    };
    let replaced = if replace { fs::metadata(&target).ok() } else { None };
    if replaced.as_ref().is_some_and(|replaced| !replaced.is_file() && !replaced.is_dir()) {
        return fs::OpenOptions::new().write(true).open(&target)?.write_all(bytes);
    }
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".moe-lora-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Less the umask, as any new file. The default, for secrets, keeps all others from reading.
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder)?;
    file.write_all(bytes)?;
    if let Some(replaced) = replaced {
        file.as_file().set_permissions(replaced.permissions())?;
    }
    // Some file systems say only now that they are full.
    file.as_file().sync_all()?;
    match replace {
        true => file.persist(target)?,
        false => file.persist_noclobber(target)?,
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    /// The names in a folder.
    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_file_is_replaced_only_where_that_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write(&path, b"one", false).unwrap();
        assert_eq!(write(&path, b"two", false).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write(&path, b"three", true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        assert_eq!(names(dir.path()), ["file"]);
    }

    #[test]
    fn what_cannot_be_replaced_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder");
        fs::create_dir(&path).unwrap();
        for replace in [false, true] {
            write(&path, b"one", replace).unwrap_err();
            assert_eq!(names(dir.path()), ["folder"]);
        }
        let missing = write(&dir.path().join("no/file"), b"one", false).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }

    #[cfg(unix)]
    #[test]
    fn links_and_permissions_stay_and_devices_are_written_to() {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("file"), dir.path().join("link"));
        let mode = |path: &Path| fs::metadata(path).expect("a file").permissions().mode() & 0o777;

        write(&path, b"one", false).unwrap();
        fs::write(dir.path().join("other"), b"").unwrap();
        assert_eq!(mode(&path), mode(&dir.path().join("other")));

        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        symlink("file", &link).unwrap();
        assert_eq!(write(&link, b"two", false).unwrap_err().kind(), ErrorKind::AlreadyExists);
        write(&link, b"two", true).unwrap();
        assert!(link.is_symlink());
        assert_eq!((fs::read(&path).unwrap().as_slice(), mode(&path)), (&b"two"[..], 0o640));

        write(Path::new("/dev/null"), b"three", true).unwrap();
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    }
}
