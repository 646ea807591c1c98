//! The CPU back end keeps the operator's contract.

use moe_lora::cpu::Cpu;
use moe_lora::{DType, OutDims};
use moe_lora_tests::cases::{cases, check_some};
use moe_lora_tests::tier::{amount, is_nightly};
use moe_lora_verify::{Case, Form, Runs, check, check_runs, full_grid, new_forms, quick_grid, vllm_grid};
use rayon::ThreadPoolBuilder;

/// Random calls.
const CASES: u32 = 128;

#[test]
fn every_mode_passes() {
    // Every mode of the full grid is in the quick one.
    let cases = if is_nightly() { [full_grid(), vllm_grid()].concat() } else { quick_grid() };
    for case in &cases {
        check(&Cpu, case).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn every_form_passes() {
    for form in [Form::Forward, Form::Split] {
        for (dtype, seed) in [(DType::Bf16, 1), (DType::F16, 2), (DType::Bf16, 3), (DType::F16, 4)] {
            let out_dims = OutDims::uniform(64, 2);
            for case in new_forms(&Case { form, dtype, tokens: 40, out_dims, seed, ..Case::default() }) {
                check(&Cpu, &case).unwrap_or_else(|failure| panic!("{failure}"));
            }
        }
    }
}

/// Any call agrees with the reference and touches nothing else, and to the bit with the same on other
/// threads.
#[test]
fn every_call_is_right_on_any_number_of_threads() {
    let pools = [1, 3].map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().expect("threads"));
    let passes = |case: &Case| {
        let digest = check(&Cpu, case)?.digest;
        for pool in &pools {
            let outcomes = pool.install(|| check_runs([(&Cpu, Runs::Once)], case))?;
            let threads = pool.current_num_threads();
            assert_eq!(outcomes[0].digest, digest, "{threads} threads: {}", case.command());
        }
        Ok(())
    };
    check_some(cases, amount(CASES, 4 * CASES), passes).unwrap_or_else(|failure| panic!("{failure}"));
}
