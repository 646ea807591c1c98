//! Why a call is refused.

use crate::cuda_h::Status;

/// The code that a call returns, and what is wrong with the caller, if anything.
pub(crate) struct Refusal {
    pub(crate) code: Status,
    pub(crate) fault: Option<String>,
}

pub(crate) type Answer<T = ()> = Result<T, Refusal>;

/// Refuses what a correct caller would not have asked.
pub(crate) fn fault<T>(code: Status, what: impl Into<String>) -> Answer<T> {
    Err(Refusal { code, fault: Some(what.into()) })
}

/// Refuses what a correct caller may have to ask, to hear that it is not so.
pub(crate) fn refuse<T>(code: Status) -> Answer<T> {
    Err(Refusal { code, fault: None })
}

pub(crate) fn require(condition: bool, code: Status, what: impl Into<String>) -> Answer {
    if condition { Ok(()) } else { fault(code, what) }
}
