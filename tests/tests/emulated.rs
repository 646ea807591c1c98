//! The GPU's kernels, run on the emulated machine with every access checked, keep the operator's contract:
//! as the planner chooses, and with both index widths on every tile.

use moe_lora::emulated::Emulated;
use moe_lora::plan::{IndexWidth, Options, TileKind};
use moe_lora::verify::{Case, check_each, quick_grid};
use moe_lora_tests::cases::{check_some, small_cases};
use moe_lora_tests::refusals::check_refusals;
use rayon::prelude::*;

/// Random calls for each way to make the back end work.
const CASES: u32 = 64;

/// Every way to make the back end work.
fn ways() -> Vec<Options> {
    let forced = [IndexWidth::I32, IndexWidth::I64].into_iter().flat_map(|index| {
        TileKind::ALL.into_iter().map(move |tile| Options { index: Some(index), tile: Some(tile) })
    });
    std::iter::once(Options::default()).chain(forced).collect()
}

#[test]
fn whatever_is_wrong_is_refused_and_nothing_is_written() {
    check_refusals(&Emulated::new(Options::default(), 1), false);
}

#[test]
fn every_mode_passes_on_a_small_call() {
    let check = |case: &Case| {
        let machines: Vec<_> = ways().into_iter().map(|way| Emulated::new(way, case.seed)).collect();
        check_each(&machines, case).unwrap_or_else(|failure| panic!("{failure}"));
        machines.iter().map(Emulated::launches).sum::<u64>()
    };
    let cases = quick_grid();
    let launches: u64 = cases.par_iter().map(check).sum();
    println!("{} calls in {} ways, {launches} kernels launched", cases.len(), ways().len());
}

#[test]
fn every_call_agrees_with_the_reference_and_touches_nothing_else() {
    let check = |(seed, way): (usize, Options)| {
        let machine = Emulated::new(way, seed as u64);
        check_some(&machine, small_cases(), CASES).unwrap_or_else(|failure| panic!("{failure}"));
        machine.launches()
    };
    let launches: u64 = ways().into_par_iter().enumerate().map(check).sum();
    println!("{CASES} calls in each of {} ways, {launches} kernels launched", ways().len());
}
