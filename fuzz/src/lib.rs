//! Fuzz targets: [adapter folders](adapter), [calls through the C interface](abi) and [sizes to plan
//! for](planner), each made of bytes. A module's `check` panics when a promise is broken.
//!
//! `cargo xtask fuzz` lets libFuzzer choose the bytes. The tests of this crate replay `corpus/`, and bytes of
//! a seeded generator.

pub mod abi;
pub mod adapter;
pub mod planner;

/// A promise about any bytes.
pub type Check = fn(&[u8]);

/// The targets by name: that of their module, and of their folder in `corpus/`.
pub const TARGETS: [(&str, Check); 3] =
    [("abi", abi::check), ("adapter", adapter::check), ("planner", planner::check)];
