//! What strangers may hand to moe-lora, made up from bytes: [adapter folders](adapter), [calls through the C
//! interface](abi), and [sizes to plan for](planner). Each module's `check` panics when its promise is broken.
//!
//! `cargo xtask fuzz` lets libFuzzer make up the bytes; the tests of this crate replay `corpus/`, and bytes from a
//! generator of fixed seed.

pub mod abi;
pub mod adapter;
pub mod planner;

/// A promise about any bytes.
pub type Check = fn(&[u8]);

/// The targets by name: that of their module, and of their folder in `corpus/`.
pub const TARGETS: [(&str, Check); 3] =
    [("abi", abi::check), ("adapter", adapter::check), ("planner", planner::check)];
