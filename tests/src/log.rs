//! What a run of the tests has to say to who started it: lines in a file that an environment variable names.

use std::fs::OpenOptions;
use std::io::Write;

/// Appends a line to the file that `variable` names; does nothing where it is not set.
///
/// # Panics
/// When the line cannot be written: then it would seem that there was nothing to say.
pub fn append(variable: &str, line: &str) {
    let Some(path) = std::env::var_os(variable) else { return };
    let log = OpenOptions::new().create(true).append(true).open(&path);
    log.and_then(|mut log| log.write_all(format!("{line}\n").as_bytes()))
        .unwrap_or_else(|error| panic!("{variable}={}: {error}", path.display()));
}
