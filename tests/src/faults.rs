//! Mistakes that tests plant, to see that they are caught.

use crate::log;

/// Names the file that caught mistakes are listed in, a line each: `cargo xtask test` knows how many there
/// are.
const LOG_VAR: &str = "MOE_LORA_FAULT_LOG";

/// Says that a planted mistake was caught.
///
/// # Panics
/// When it cannot be said to who asked for it.
pub fn caught(what: &str) {
    log::append(LOG_VAR, what);
}
