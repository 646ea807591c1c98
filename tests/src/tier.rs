//! How much the suites do: what there is time for at each change, or all of it.

/// Set by `cargo xtask nightly`: all of it.
const NIGHTLY_VAR: &str = "MOE_LORA_NIGHTLY";

/// Whether this is the nightly run.
pub fn is_nightly() -> bool {
    std::env::var_os(NIGHTLY_VAR).is_some()
}

/// One of two amounts: for each change, and for every night.
pub fn amount<T>(always: T, nightly: T) -> T {
    if is_nightly() { nightly } else { always }
}
