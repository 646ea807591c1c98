//! The CPU back end keeps the operator's contract.

use moe_lora::cpu::Cpu;
use moe_lora_tests::cases::{cases, check_cases};
use moe_lora_verify::{Case, check, full_grid, quick_grid, vllm_grid};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

#[test]
fn every_call_agrees_with_the_reference_and_touches_nothing_else() {
    check_cases(&Cpu).unwrap_or_else(|failure| panic!("{failure}"));
}

fn all_pass(cases: &[Case]) {
    for case in cases {
        check(&Cpu, case).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn every_mode_passes_on_a_small_call() {
    all_pass(&quick_grid());
}

#[test]
fn every_mode_passes_on_calls_of_many_shapes() {
    all_pass(&full_grid());
}

#[test]
fn vllms_own_grid_passes() {
    all_pass(&vllm_grid());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn results_do_not_depend_on_the_number_of_threads(case in cases()) {
        let digest = |threads| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| check(&Cpu, &case)).map(|outcome| outcome.digest)
        };
        let alone = digest(1).map_err(|failure| TestCaseError::fail(failure.to_string()))?;
        for threads in [2, 3, 8] {
            let together = digest(threads).map_err(|failure| TestCaseError::fail(failure.to_string()))?;
            prop_assert_eq!(alone, together, "{} threads: {}", threads, case.command());
        }
    }
}
