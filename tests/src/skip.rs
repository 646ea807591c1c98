//! Tests that cannot run on this machine: they are reported as ignored, never as passed.

use crate::log;
use libtest_mimic::{Arguments, Trial};

/// Names the file that skipped tests are listed in, a line each; there is none when it is not set.
const LOG_VAR: &str = "MOE_LORA_SKIP_LOG";

/// A test that is reported as ignored, and fails when it is run all the same (`--include-ignored`). Says
/// so, and why, unless `arguments` leave the test out.
///
/// # Panics
/// When the list of skipped tests cannot be written: then it would seem that nothing was skipped.
pub fn skipped(arguments: &Arguments, test: &str, why: &str) -> Trial {
    let wanted = arguments.filter.as_ref().is_none_or(|filter| test.contains(filter.as_str()));
    if wanted && !arguments.list {
        println!("SKIPPED {test}: {why}");
        log::append(LOG_VAR, &format!("{test}: {why}"));
    }
    let why = why.to_owned();
    Trial::test(test, move || Err(why.into())).with_ignored_flag(true)
}
