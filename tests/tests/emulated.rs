//! The GPU's kernels, run on the emulated machine with every access checked, keep the operator's contract:
//! as the planner chooses, and with every form, tile and index width forced.

use moe_lora::DType;
use moe_lora::emulated::Emulated;
use moe_lora::plan::{Form as PlanForm, Options};
use moe_lora::verify::{Case, Experts, Form, Loras, Ranks, check, check_each, quick_grid};
use moe_lora_tests::cases::{check_some, small_cases};
use moe_lora_tests::refusals::check_refusals;
use moe_lora_tests::tally::Tally;
use rayon::prelude::*;
use std::cell::RefCell;

#[path = "emulated/route.rs"]
mod route;

/// Random calls for each way to make the back end work.
const CASES: u32 = 64;

const DTYPES: [DType; 2] = [DType::Bf16, DType::F16];

/// Orders of threads and blocks that every kernel is run in.
const SEEDS: u64 = 100;

/// Checks each case in each of `ways`, in an order of threads that is the case's own.
fn check_all(cases: &[Case], ways: &[Options]) -> Tally {
    let check = |case: &Case| {
        let machines: Vec<_> = ways.iter().map(|way| Emulated::new(*way, case.seed)).collect();
        check_each(&machines, case).unwrap_or_else(|failure| panic!("{failure}"));
        Tally::of(&machines)
    };
    cases.par_iter().map(check).reduce(Tally::default, Tally::plus)
}

/// Calls of so many pairs that a grid routes them and a cluster aligns them, and of as many buckets as the route of one
/// block has threads, all else as small as can be.
fn large_routes() -> Vec<Case> {
    let case = Case { tokens: 513, top_k: 8, in_dim: 8, out_dim: 8, max_rank: 8, ..Case::default() };
    vec![
        Case { loras: Loras::Random, accumulate: false, block_size: Some(64), ..case.clone() },
        Case { routing: Experts::OutOfRange, experts: 150, form: Form::Split, ..case.clone() },
        // More slots than ranks are kept, and more buckets than a block has threads.
        Case { tokens: 20, loras: Loras::Random, slots: 300, ..case.clone() },
        Case { tokens: 40, loras: Loras::Random, slots: 2, experts: 128, ..case },
    ]
}

/// Calls of `prefill` with every number of columns of h, and with tiles of more than one segment and of several
/// steps.
fn wide() -> Vec<Case> {
    let base = Case { tokens: 80, loras: Loras::Random, ranks: Ranks::Mixed, ..Case::default() };
    let wide = |max_rank, slices, in_dim, out_dim| Case { max_rank, slices, in_dim, out_dim, ..base.clone() };
    let cases = [
        wide(24, 2, 72, 136),
        wide(64, 1, 136, 72),
        wide(64, 2, 64, 64),
        wide(32, 4, 200, 64),
        Case { routing: Experts::One, loras: Loras::One, ..wide(40, 2, 64, 72) },
    ];
    let both = |case: &Case| DTYPES.map(|dtype| Case { dtype, ..case.clone() });
    cases.iter().flat_map(both).collect()
}

#[test]
fn whatever_is_wrong_is_refused_and_nothing_is_written() {
    check_refusals(&Emulated::new(Options::default(), 1), false);
}

#[test]
fn every_kernel_of_the_table_passes_in_every_mode() {
    let small = check_all(&quick_grid(), &Options::every());
    let in_blocks = Case { block_size: Some(16), loras: Loras::Random, ..Case::default() };
    let others = [large_routes(), vec![in_blocks]].concat();
    let prefill = |way: &Options| matches!(way.form, Some(PlanForm::Prefill(_)));
    let prefills: Vec<_> = Options::every().into_iter().filter(prefill).collect();
    let tally = small.plus(check_all(&others, &[Options::default()])).plus(check_all(&wide(), &prefills));
    tally.log();
    assert!(tally.missing().is_empty(), "kernels that did not run: {:?}", tally.missing());
}

#[test]
fn every_call_agrees_with_the_reference_and_touches_nothing_else() {
    let check = |way: Options| {
        let tally = RefCell::new(Tally::default());
        let passes = |case: &Case| {
            let machine = Emulated::new(way, case.seed);
            check(&machine, case)?;
            tally.replace_with(|tally| std::mem::take(tally).plus(Tally::of([&machine])));
            Ok(())
        };
        check_some(small_cases(), CASES, passes).unwrap_or_else(|failure| panic!("{failure}"));
        tally.into_inner()
    };
    Options::every().into_par_iter().map(check).reduce(Tally::default, Tally::plus).log();
}

#[test]
fn no_order_of_threads_and_blocks_shows_a_fault() {
    let case = |seed: u64| Case {
        tokens: 4 + seed as usize % 7,
        dtype: if seed.is_multiple_of(2) { DType::Bf16 } else { DType::F16 },
        form: if (seed / 2).is_multiple_of(2) { Form::Forward } else { Form::Split },
        in_dim: 72,
        slices: 2,
        loras: Loras::Random,
        block_size: (seed % 8 < 2).then_some(16),
        accumulate: !seed.is_multiple_of(3),
        seed,
        ..Case::default()
    };
    let cases: Vec<_> = (0..2 * SEEDS).map(case).collect();
    check_all(&cases, &Options::every()[1..]).log();
}
