//! What the suites over the back ends share: any call as a proptest strategy ([`cases`]), calls that
//! must be refused ([`refusals`]), a driver that needs no GPU ([`fake`]), planted
//! mistakes that were caught ([`faults`]), how a test that cannot run here
//! says so ([`skip`]), which options make a difference ([`plans`]), which kernels the emulated machine ran
//! ([`tally`]), and how much is done ([`tier`]).

pub mod cases;
pub mod fake;
pub mod faults;
mod log;
pub mod plans;
pub mod refusals;
pub mod skip;
pub mod tally;
pub mod tier;
