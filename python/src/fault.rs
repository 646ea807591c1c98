//! Why a call was refused, and the exception that Python is told it with.

use moe_lora::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyValueError};

/// What was wrong.
pub enum Fault {
    /// An argument, in words: the tensor, what was expected, what came. A `ValueError`.
    Argument(String),
    /// The library refused the call: a `RuntimeError` where the device or the driver is at fault, otherwise a
    /// `ValueError`.
    Refused(Error),
    /// Python raised something while an argument was read.
    Raised(PyErr),
}

/// Result with [`Fault`].
pub type Outcome<T> = Result<T, Fault>;

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Fault::Refused(error)
    }
}

impl From<PyErr> for Fault {
    fn from(error: PyErr) -> Self {
        Fault::Raised(error)
    }
}

impl From<Fault> for PyErr {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Argument(message) => PyValueError::new_err(message),
            Fault::Raised(error) => error,
            Fault::Refused(error) => match error {
                Error::NoDevice { .. }
                | Error::UnsupportedDevice { .. }
                | Error::DriverTooOld { .. }
                | Error::Driver { .. } => PyRuntimeError::new_err(error.to_string()),
                Error::StaleRoute { .. } => PyValueError::new_err(format!(
                    "{error}: pass topk_ids and token_lora in the first call of a layer"
                )),
                error => PyValueError::new_err(error.to_string()),
            },
        }
    }
}
