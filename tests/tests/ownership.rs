//! Who owns what on a GPU, in which order memory is used, and when a route is valid: under a driver that
//! plays CUDA's rules and runs no kernel (`moe_lora_tests::fake`).

use libtest_mimic::Arguments;
#[cfg(not(feature = "cuda"))]
use moe_lora_tests::skip::skipped;

#[cfg(feature = "cuda")]
#[path = "ownership/suite.rs"]
mod suite;

fn main() {
    let arguments = Arguments::from_args();
    #[cfg(feature = "cuda")]
    let tests = suite::tests(&arguments);
    #[cfg(not(feature = "cuda"))]
    let tests = vec![skipped(&arguments, "ownership", "built without the feature `cuda`")];
    libtest_mimic::run(&arguments, tests).exit();
}
