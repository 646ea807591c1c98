use crate::case::Case;
use moe_lora::error::Error;
use thiserror::Error as ThisError;

/// What a back end made of a case that it passed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// ‖out − ref‖ / ‖ref‖, Frobenius, over the deltas of all active pairs; 0 when there are none.
    pub error: f64,
    /// Active pairs.
    pub active: usize,
    /// P.
    pub pairs: usize,
    /// Hash of the bytes of `out`: equal where results are bitwise equal.
    pub digest: u64,
}

/// A case that a back end did not pass.
#[derive(Clone, Debug, ThisError)]
#[error("{backend}: {fault}\n  case: {case}\n  again: {}", case.command())]
pub struct Failure {
    /// The back end and what was forced on it, as [`moe_lora::Backend::variant`] says.
    pub backend: String,
    /// The case.
    pub case: Case,
    /// What was wrong.
    #[source]
    pub fault: Fault,
}

/// What was wrong.
#[derive(Clone, Debug, ThisError)]
pub enum Fault {
    /// The back end, or the check of the case, returned an error.
    #[error("refused: {0}")]
    Refused(#[from] Error),
    /// The result as a whole is too far from the reference.
    #[error("{tensor} is off by {error:.2e} of its norm, tolerance {tolerance:.0e}")]
    Inaccurate {
        /// `h` or `out`.
        tensor: &'static str,
        /// ‖got − expected‖ / ‖expected‖.
        error: f64,
        /// What is allowed.
        tolerance: f64,
    },
    /// One element is wrong, or was never written (then it is NaN).
    #[error("{tensor} at {place} is {got}, expected {expected}")]
    WrongElement {
        /// `h` or `out`.
        tensor: &'static str,
        /// Where.
        place: String,
        /// The back end's value.
        got: f32,
        /// The reference's value.
        expected: f64,
    },
    /// An id of a route in vLLM's form is wrong.
    #[error("{tensor} at {place} is {got}, expected {expected}")]
    WrongId {
        /// The array.
        tensor: &'static str,
        /// Where.
        place: String,
        /// The back end's value.
        got: i32,
        /// The reference's value.
        expected: i32,
    },
    /// Memory was changed that the call must leave alone.
    #[error("{tensor} at {place} became {got}, expected {expected} as before")]
    Touched {
        /// Name of the tensor.
        tensor: &'static str,
        /// Where.
        place: String,
        /// Bytes found.
        got: String,
        /// Bytes expected.
        expected: String,
    },
    /// The same call gave two results.
    #[error("{tensor} came out differently at {place} when {run}")]
    NotRepeatable {
        /// `h` or `out`.
        tensor: &'static str,
        /// Where.
        place: String,
        /// What was run again.
        run: &'static str,
    },
}
