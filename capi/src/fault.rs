//! Why a function did not do what it was asked to, and what its caller is told.

use crate::abi::Status;
use moe_lora::Error;
use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What was wrong.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The library refused the call.
    #[error(transparent)]
    Refused(#[from] Error),
    /// An argument that must not be null is.
    #[error("{argument} is a null pointer")]
    NullArgument {
        /// Name of the argument.
        argument: &'static str,
    },
    /// A struct is smaller than every version of it, or uses what this version does not have.
    #[error("{what}.size is {got}, expected {expected}")]
    StructSize {
        /// Name of the argument.
        what: &'static str,
        /// The size of the struct here.
        expected: usize,
        /// What its field `size` says.
        got: usize,
    },
    /// Weights are given stacked and by address.
    #[error("{tensor} is given beside adapters, expected one of the two")]
    WeightsTwice {
        /// `a` or `b`.
        tensor: &'static str,
    },
    /// A field has a value that it does not allow.
    #[error("{field} is {got}, expected {expected}")]
    InvalidValue {
        /// Name of the field.
        field: &'static str,
        /// Values that would do.
        expected: &'static str,
        /// The value.
        got: i128,
    },
}

impl Fault {
    fn status(&self) -> Status {
        match self {
            Fault::NullArgument { .. } => Status::NullArgument,
            Fault::StructSize { .. } => Status::StructSize,
            Fault::InvalidValue { .. } => Status::InvalidValue,
            Fault::WeightsTwice { .. } => Status::WeightsTwice,
            Fault::Refused(error) => match error {
                Error::ZeroSize { .. } => Status::ZeroSize,
                Error::SizeTooLarge { .. } => Status::SizeTooLarge,
                Error::SizeOverflow { .. } => Status::SizeOverflow,
                Error::SliceCount { .. } => Status::SliceCount,
                Error::TooShort { .. } => Status::TooShort,
                Error::RowStride { .. } => Status::RowStride,
                Error::NullPointer { .. } => Status::NullPointer,
                Error::Misaligned { .. } => Status::Misaligned,
                Error::UnsupportedDType { .. } => Status::UnsupportedDtype,
                Error::RankTooLarge { .. } => Status::RankTooLarge,
                Error::WorkspaceTooSmall { .. } => Status::WorkspaceTooSmall,
                Error::StaleRoute { .. } => Status::RouteNotKept,
                Error::NoDevice { .. } => Status::NoDevice,
                Error::UnsupportedDevice { .. } => Status::UnsupportedDevice,
                Error::Driver { .. } => Status::Driver,
                Error::SizeTooSmall { .. } => Status::SizeTooSmall,
                Error::DTypeMismatch { .. } => Status::DtypeMismatch,
                Error::Tuning { .. } => Status::Tuning,
                Error::TunedElsewhere { .. } => Status::TunedElsewhere,
                Error::DriverTooOld { .. } => Status::DriverTooOld,
                Error::OtherDevice { .. } => Status::OtherDevice,
                Error::PartOfRoute { .. } => Status::PartOfRoute,
                Error::NotRecordable { .. } => Status::NotRecordable,
                Error::NotMultiple { .. } => Status::NotMultiple,
                Error::NotFinite { .. } => Status::NotFinite,
                Error::OffBoundary { .. } => Status::OffBoundary,
                Error::UnequalSlices { .. } => Status::UnequalSlices,
                Error::NoTopkIds { .. } => Status::NoTopkIds,
                Error::NothingToMap => Status::NothingToMap,
                Error::OtherTable { .. } => Status::OtherTable,
                // An emulated kernel's: no emulated device is behind this interface.
                _ => Status::Internal,
            },
        }
    }
}

thread_local! {
    /// What the last function that failed on this thread says.
    static MESSAGE: RefCell<CString> = RefCell::default();
}

/// The text that `moe_lora_last_error` returns.
pub fn message() -> *const c_char {
    MESSAGE.with_borrow(|message| message.as_ptr())
}

fn keep(message: String) {
    let message = CString::new(message.replace('\0', " ")).expect("no byte is zero");
    MESSAGE.set(message);
}

/// Does the work of one function; a fault or a panic becomes a status and a message.
pub fn run(work: impl FnOnce() -> Result<(), Fault>) -> Status {
    // Nothing that a panic leaves half done is used again, but outputs, and the header says so.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => Status::Ok,
        Ok(Err(fault)) => {
            keep(fault.to_string());
            fault.status()
        }
        Err(panic) => {
            keep(format!("a bug in moe-lora: {}", reason(&*panic)));
            Status::Internal
        }
    }
}

fn reason(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    #[test]
    fn a_panic_becomes_a_status_and_a_message() {
        let number = 7;
        assert_eq!(run(|| panic!("pair {number} of 3")), Status::Internal);
        // SAFETY: the message of this thread, which is not replaced meanwhile.
        let message = unsafe { CStr::from_ptr(message()) };
        assert_eq!(message, c"a bug in moe-lora: pair 7 of 3");
    }

    /// What comes of each error: a status of its own, and never that of a bug.
    #[test]
    fn each_error_has_a_status_of_its_own() {
        let (what, tensor, text) = ("what", "tensor", String::new);
        let (expected, got) = (moe_lora::DType::Bf16, moe_lora::DType::F16);
        let errors = [
            Error::ZeroSize { what },
            Error::SizeTooLarge { what, limit: 1, got: 2 },
            Error::SizeTooSmall { what, limit: 2, got: 1 },
            Error::SizeOverflow { tensor, shape: text() },
            Error::SliceCount { tensor, expected: 1, got: 2 },
            Error::TooShort { tensor, shape: text(), expected: 2, got: 1 },
            Error::RowStride { tensor, expected: 2, got: 1 },
            Error::NullPointer { tensor, expected: 1 },
            Error::Misaligned { tensor, expected: 2, address: 1 },
            Error::DTypeMismatch { tensor, expected, got },
            Error::UnsupportedDType { tensor: text(), expected: "", got: text() },
            Error::RankTooLarge { slot: 0, rank: 2, max_rank: 1 },
            Error::WorkspaceTooSmall { what, limit: 1, got: 2 },
            Error::StaleRoute { reason: text() },
            Error::PartOfRoute { what },
            Error::OtherDevice { what, expected: text(), got: text() },
            Error::NoDevice { reason: text() },
            Error::UnsupportedDevice { device: text(), capability: text(), needed: "" },
            Error::Tuning { path: text(), reason: text() },
            Error::TunedElsewhere { tuned: text(), device: text() },
            Error::NotRecordable { what },
            Error::NotMultiple { what, of: 2, got: 1 },
            Error::NotFinite { what, got: text() },
            Error::OffBoundary { tensor, expected: 16, address: 1 },
            Error::UnequalSlices { out_dims: text() },
            Error::NoTopkIds { experts: 2, top_k: 1 },
            Error::NothingToMap,
            Error::OtherTable { table: text(), call: text() },
            Error::DriverTooOld { version: text(), needed: "" },
            Error::Driver { call: "", code: 1, name: text(), reason: text() },
        ];
        // In the order of their statuses, as the header has them.
        let mut statuses: Vec<_> = errors.map(|error| Fault::from(error).status() as i32).into();
        statuses.sort_unstable();
        use Status::{Internal, InvalidValue, NullArgument, StructSize, WeightsTwice};
        let of_arguments = [NullArgument, StructSize, InvalidValue, WeightsTwice, Internal];
        let of_errors = (1..=35).filter(|status| of_arguments.iter().all(|other| *other as i32 != *status));
        assert_eq!(statuses, of_errors.collect::<Vec<_>>());
    }

    #[test]
    fn a_message_is_a_c_string_whatever_it_quotes() {
        let reason = "nul\0here".to_owned();
        assert_eq!(run(|| Err(Error::NoDevice { reason }.into())), Status::NoDevice);
        // SAFETY: as above.
        assert_eq!(unsafe { CStr::from_ptr(message()) }, c"no CUDA device: nul here");
    }
}
