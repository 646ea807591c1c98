//! What the suites over the back ends share: any call as a proptest strategy ([`cases`]), calls that
//! must be refused ([`refusals`]), and how a test that cannot run here says so ([`skip`]).

pub mod cases;
pub mod refusals;
pub mod skip;
