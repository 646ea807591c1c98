//! The one way that this program prints. `println!` panics where standard output cannot be written; here that
//! is an error like any other, and [`exit_code`] says what becomes of it.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use thiserror::Error;

/// Why a line was not printed.
#[derive(Debug, Error)]
pub enum PrintError {
    /// Nobody reads any more, as behind `| head`.
    #[error("standard output is closed")]
    Closed,
    /// The system would not write it.
    #[error("cannot write to standard output: {0}")]
    Failed(io::Error),
}

impl From<io::Error> for PrintError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::BrokenPipe => PrintError::Closed,
            _ => PrintError::Failed(error),
        }
    }
}

/// Prints a line: the arguments are those of `println!`.
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::print::line(format_args!($($argument)*))
    };
}
pub(crate) use say;

/// Prints a line.
pub fn line(text: fmt::Arguments<'_>) -> Result<(), PrintError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    // Rust's own flush, at the end of the process, tells nobody that it failed.
    Ok(out.flush()?)
}

/// Tells on standard error what went wrong, if anything did, and returns the exit code: 0, also where nobody
/// reads what is printed; 2 for arguments that make no sense; else 1.
pub fn exit_code(done: anyhow::Result<()>) -> ExitCode {
    let done = done.or_else(|error| match error.downcast::<clap::Error>() {
        Ok(usage) if usage.use_stderr() => Err(usage.into()),
        // --help and --version come as errors too.
        Ok(asked) => Ok(asked.print().map_err(PrintError::from)?),
        Err(error) => Err(error),
    });
    let Err(error) = done else { return ExitCode::SUCCESS };
    if let Some(PrintError::Closed) = error.downcast_ref() {
        return ExitCode::SUCCESS;
    }
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        // Standard error that cannot be written is no reason for another exit code, here and below.
        let _ = usage.print();
        return ExitCode::from(2);
    }
    let _ = writeln!(io::stderr(), "error: {error:#}");
    ExitCode::FAILURE
}
