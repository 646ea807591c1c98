//! The GPU's kernels, run on the emulated machine with every access checked, keep the operator's contract:
//! as the planner chooses, and with every form, tile and index width forced.

use moe_lora::emulated::Emulated;
use moe_lora::plan::{Form as PlanForm, IndexWidth, Options, TileKind};
use moe_lora::{Align, Backend, BlockShape, Buffer, DType, Enabled, OutDims, XRows};
use moe_lora_kernels::ENTRIES;
use moe_lora_tests::cases::{check_some, small_cases};
use moe_lora_tests::plans::{distinct, kernels, splits_k};
use moe_lora_tests::refusals::check_refusals;
use moe_lora_tests::tally::Tally;
use moe_lora_tests::tier::amount;
use moe_lora_verify::{
    Case, Experts, Failure, Form, Loras, Ranks, Runs, check, check_runs, new_forms, short_grid,
};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::Mutex;

#[path = "emulated/route.rs"]
mod route;

/// Random calls, each on the machines for which its plans differ.
const CASES: u32 = 32;

const DTYPES: [DType; 2] = [DType::Bf16, DType::F16];

/// Machines that check a case together, which is checked anew for others: few, so that no core is left with
/// much at the end.
const TOGETHER: usize = 4;

/// Of so many checks, one repeats its calls.
const REPEATED: usize = 8;

/// Orders of threads and blocks that every kernel is run in, at least: each launch has one of its own.
fn seeds() -> u64 {
    amount(20, 100)
}

/// Kernels that small calls do not run: [`route`] and the test of a cluster that aligns run them in as many
/// orders.
const IN_TESTS_OF_THEIR_OWN: [&str; 3] = ["route_grid", "route_wide", "align_cluster"];

/// Checks a case in some ways, in an order of threads that is the case's own. Of the ways that are checked
/// one after another every [`REPEATED`]th repeats its calls; `first` is the number of the first.
fn check_in(ways: &[Options], case: &Case, first: usize) -> Result<Tally, Box<Failure>> {
    let machines: Vec<_> = ways.iter().map(|way| Emulated::new(*way, case.seed)).collect();
    let runs = |number: usize| if number.is_multiple_of(REPEATED) { Runs::Repeated } else { Runs::Once };
    check_runs(machines.iter().zip((first..).map(runs)), case)?;
    Ok(Tally::of(&machines))
}

/// Checks each case in each of `ways` that makes a difference to it.
fn check_all(cases: &[Case], ways: &[Options]) -> Tally {
    check_chosen(cases.iter().map(|case| (case, distinct(ways, case))))
}

/// Checks each case in the ways that come with it.
fn check_chosen<'c>(chosen: impl IntoIterator<Item = (&'c Case, Vec<Options>)>) -> Tally {
    let mut parts = Vec::new();
    let mut first = 0;
    for (case, ways) in chosen {
        for ways in ways.chunks(TOGETHER) {
            parts.push((case, ways.to_vec(), first));
            first += ways.len();
        }
    }
    let check = |(case, ways, first): &(&Case, Vec<Options>, usize)| {
        check_in(ways, case, *first).unwrap_or_else(|failure| panic!("{failure}"))
    };
    parts.par_iter().with_max_len(1).map(check).reduce(Tally::default, Tally::plus)
}

/// Checks each case as it is planned, with its calls repeated: on routes that were made alone, too.
fn check_repeated(cases: &[Case]) -> Tally {
    let check = |case: &Case| {
        let machine = Emulated::new(Options::default(), case.seed);
        check(&machine, case).unwrap_or_else(|failure| panic!("{failure}"));
        Tally::of([&machine])
    };
    cases.par_iter().with_max_len(1).map(check).reduce(Tally::default, Tally::plus)
}

/// Calls of so many pairs that a grid routes them and a cluster aligns them, and of as many buckets as the
/// route of one block has threads, all else as small as can be.
fn large_routes() -> Vec<Case> {
    let case = Case {
        tokens: 513,
        top_k: 8,
        in_dim: 8,
        out_dims: OutDims::uniform(8, 1),
        max_rank: 8,
        ..Case::default()
    };
    vec![
        Case { loras: Loras::Random, accumulate: false, block_size: Some(64), ..case.clone() },
        Case { routing: Experts::OutOfRange, experts: 150, form: Form::Split, ..case.clone() },
        // More slots than ranks are kept, and more buckets than a block has threads.
        Case { tokens: 20, loras: Loras::Random, slots: 300, ..case.clone() },
        Case { tokens: 40, loras: Loras::Random, slots: 2, experts: 128, ..case },
    ]
}

/// The ways that force `prefill`.
fn prefills() -> Vec<Options> {
    let prefill = |way: &Options| matches!(way.form, Some(PlanForm::Prefill(_) | PlanForm::SharedPrefill(_)));
    Options::every().into_iter().filter(prefill).collect()
}

/// The ways that force `decode`.
fn decodes() -> Vec<Options> {
    Options::every().into_iter().filter(|way| matches!(way.form, Some(PlanForm::Decode))).collect()
}

/// Whether blocks share passes.
fn is_shared(way: &Options) -> bool {
    matches!(way.form, Some(PlanForm::SharedPrefill(_)))
}

/// Calls of `prefill` with every number of columns of h, in one pass and in several, with small ranks in
/// large allocations, and with tiles of more than one segment and of several steps.
fn wide() -> Vec<Case> {
    let base = Case { tokens: 80, loras: Loras::Random, ranks: Ranks::Mixed, ..Case::default() };
    let wide = |max_rank, slices, in_dim, out_dim| {
        let out_dims = OutDims::uniform(out_dim, slices);
        Case { max_rank, in_dim, out_dims, ..base.clone() }
    };
    let cases = [
        wide(24, 2, 72, 136),
        wide(64, 1, 136, 72),
        wide(64, 2, 64, 64),
        wide(32, 4, 200, 64),
        Case { routing: Experts::One, loras: Loras::One, ..wide(40, 2, 64, 72) },
        wide(72, 2, 136, 136),
        Case { ranks: Ranks::Max, ..wide(128, 2, 72, 200) },
        Case { x_rows: XRows::Pair, routed_weight: true, ..wide(128, 1, 264, 72) },
        Case { accumulate: false, ..wide(200, 3, 136, 72) },
        Case { ranks: Ranks::OutOfRange, ..wide(256, 1, 72, 136) },
        // Several shares of K and of columns.
        wide(24, 2, 520, 264),
        Case { routing: Experts::One, accumulate: false, ..wide(72, 1, 264, 520) },
    ];
    cases.into_iter().zip(DTYPES.into_iter().cycle()).map(|(case, dtype)| Case { dtype, ..case }).collect()
}

#[test]
fn whatever_is_wrong_is_refused_and_nothing_is_written() {
    check_refusals(&Emulated::new(Options::default(), 1), false);
}

/// The ways that force this index width, and those that force none.
fn ways_of(index: IndexWidth) -> Vec<Options> {
    Options::every().into_iter().filter(|way| way.index.is_none_or(|forced| forced == index)).collect()
}

#[test]
fn every_kernel_of_the_table_passes_in_every_mode() {
    // The type is another with every case, and the width of offsets with every second: neither changes more
    // than how values are converted and offsets computed.
    let grid = short_grid();
    let of_width = |width| {
        let cases = grid.iter().enumerate().filter(|(i, _)| i / 2 % 2 == width);
        cases.map(|(_, case)| case.clone()).collect::<Vec<_>>()
    };
    let small = check_all(&of_width(0), &ways_of(IndexWidth::I32))
        .plus(check_all(&of_width(1), &ways_of(IndexWidth::I64)));
    // `decode` has kernels of its own for calls by address.
    let by_address: Vec<_> = grid.iter().map(|case| Case { table: true, ..case.clone() }).collect();
    let small = small.plus(check_all(&by_address, &decodes()));
    let in_blocks = Case { block_size: Some(16), loras: Loras::Random, ..Case::default() };
    let others = [large_routes(), vec![in_blocks]].concat();
    let tally = small.plus(check_repeated(&others)).plus(check_all(&wide(), &prefills()));
    tally.log();
    assert!(tally.missing().is_empty(), "kernels that did not run: {:?}", tally.missing());
}

/// Slices of own widths and in other orders, rows by an index, adapters by address and other ids, in every
/// form and on every tile: few pairs a segment, and tiles of more than one.
#[test]
fn every_form_takes_what_engines_have() {
    let few = Case { tokens: 12, out_dims: OutDims::uniform(64, 2), in_dim: 136, ..Case::default() };
    let many = Case { tokens: 80, top_k: 1, max_rank: 40, dtype: DType::F16, ..few.clone() };
    let split = Case { form: Form::Split, max_rank: 24, ..few.clone() };
    let plain = check_all(&new_forms(&few), &ways_of(IndexWidth::I32));
    let is_wide = |way: &Options| way.index == Some(IndexWidth::I64);
    let ways: Vec<_> = prefills().into_iter().filter(is_wide).collect();
    let third: Vec<_> = new_forms(&split).into_iter().step_by(3).collect();
    plain.plus(check_all(&new_forms(&many), &ways)).plus(check_all(&third, &ways_of(IndexWidth::I64))).log();
}

/// Small K is not worth splitting: the calls of the table's test and most random ones run whole.
#[test]
fn blocks_of_shrink_share_k() {
    let long = Case { in_dim: 520, out_dims: OutDims::uniform(72, 2), max_rank: 24, ..Case::default() };
    let cases = [
        Case { accumulate: false, loras: Loras::Random, ..long.clone() },
        Case { dtype: DType::F16, x_rows: XRows::Pair, ranks: Ranks::Mixed, ..long },
    ];
    let forces_tile = |way: &Options| way.tile.is_some_and(|tile| tile != TileKind::Any);
    let ways: Vec<_> = Options::every().into_iter().filter(forces_tile).collect();
    for (way, case) in ways.iter().flat_map(|way| cases.iter().map(move |case| (way, case))) {
        assert!(splits_k(*way, case), "{}: {}", way.name("emulated"), case.command());
    }
    check_all(&cases, &ways).log();
}

#[test]
fn every_call_agrees_with_the_reference_and_touches_nothing_else() {
    let tally = Mutex::new(Tally::default());
    let every = Options::every();
    let passes = |case: &Case| {
        let ran = check_in(&distinct(&every, case), case, case.seed as usize % REPEATED)?;
        tally.lock().expect("no thread has panicked").take_in(ran);
        Ok(())
    };
    check_some(small_cases, amount(CASES, 16 * CASES), passes).unwrap_or_else(|failure| panic!("{failure}"));
    tally.into_inner().expect("no thread has panicked").log();
}

#[test]
fn no_order_of_threads_and_blocks_shows_a_fault() {
    let case = |seed: u64| Case {
        tokens: 4 + seed as usize % 7,
        dtype: if seed.is_multiple_of(2) { DType::Bf16 } else { DType::F16 },
        form: if seed / 2 % 3 < 2 { Form::Forward } else { Form::Split },
        in_dim: 72,
        out_dims: OutDims::uniform(64, 2),
        loras: Loras::Random,
        block_size: (seed % 8 < 2).then_some(16),
        accumulate: !seed.is_multiple_of(3),
        seed,
        ..Case::default()
    };
    // By turns: 32, 64, 128 and 256 columns of h in tiles of 64 pairs, 64, 128 and 256 in tiles of 128, whose
    // passes take two slices.
    let width = |seed: u64| match seed / 2 % 8 {
        0 | 4 => Case { max_rank: 40, out_dims: OutDims::uniform(64, 2), ..case(seed) },
        1 | 5 => Case { max_rank: 72, out_dims: OutDims::uniform(64, 2), ranks: Ranks::Mixed, ..case(seed) },
        2 | 6 => Case { max_rank: 136, out_dims: OutDims::uniform(64, 1), ranks: Ranks::Mixed, ..case(seed) },
        3 => Case { max_rank: 16, out_dims: OutDims::uniform(64, 4), ..case(seed) },
        _ => Case { max_rank: 24, out_dims: OutDims::uniform(64, 2), ..case(seed) },
    };
    let width = |seed| Case { form: Form::Forward, block_size: None, ..width(seed) };
    // As many as are needed: of each case the ways that launch a kernel which has not run often enough.
    let mut orders = BTreeMap::<&str, u64>::new();
    let mut lacking = |ways: &[Options], case: &Case| -> Vec<Options> {
        let lacks = |way: &&Options| {
            let kernels = kernels(**way, case);
            let lacks = kernels.iter().any(|name| orders.get(name).is_none_or(|ran| *ran < seeds()));
            kernels.into_iter().filter(|_| lacks).for_each(|name| *orders.entry(name).or_default() += 1);
            lacks
        };
        distinct(ways, case).iter().filter(lacks).copied().collect()
    };
    let (cases, widths): (Vec<_>, Vec<_>) = (0..16 * seeds()).map(|seed| (case(seed), width(seed))).unzip();
    let every = Options::every();
    let (shared, whole): (Vec<_>, Vec<_>) = prefills().into_iter().partition(is_shared);
    let mut chosen: Vec<_> = cases.iter().map(|case| (case, lacking(&every[1..], case))).collect();
    chosen.extend(widths.iter().map(|case| (case, lacking(&whole, case))));
    // Where blocks share passes, a launch has as many more steps.
    let tally = check_chosen(chosen).plus(check_all(&widths[..32], &shared));
    // `decode` has kernels of its own for calls by address.
    let whole_calls = cases.iter().filter(|case| case.form == Form::Forward).take(4 * seeds() as usize);
    let by_address: Vec<_> = whole_calls.map(|case| Case { table: true, ..case.clone() }).collect();
    let tally = tally.plus(check_all(&by_address, &decodes()));
    tally.log();
    // Each launch has an order of its own.
    let few = |name: &&str| tally.launches(name) < seeds() && !IN_TESTS_OF_THEIR_OWN.contains(name);
    let few: Vec<_> = ENTRIES.iter().map(|entry| entry.name).filter(few).collect();
    assert!(few.is_empty(), "kernels in less than {} orders: {few:?}", seeds());
}

/// Clusters whose units have ranks of one, two, three … groups of sixteen, one after another: blocks without
/// a group of their own keep step with the others.
#[test]
fn ranks_of_any_number_of_groups_follow_one_another() {
    let case = |seed: u64| Case {
        tokens: 14,
        slots: 3,
        out_dims: OutDims::uniform(64, 2),
        max_rank: if seed.is_multiple_of(2) { 64 } else { 128 },
        ranks: Ranks::Mixed,
        loras: Loras::Random,
        seed,
        ..Case::default()
    };
    let decode = Options { form: Some(PlanForm::Decode), ..Options::default() };
    let ways = [4, 8].map(|cluster| Options { cluster: Some(cluster), ..decode });
    let cases: Vec<_> = (0..seeds()).map(case).collect();
    check_all(&cases, &ways).log();
}

/// Passes that blocks of `prefill` share, where there are more of them than the planner expects: in as many
/// shares of K as it wants a block would have two, perhaps of one pass.
#[test]
fn no_block_waits_for_a_share_of_its_own() {
    let case = |seed: u64| Case {
        // A pair a segment, which is more tiles than even routing makes on average.
        tokens: 1,
        top_k: 12,
        experts: 12,
        slots: 1,
        loras: Loras::One,
        in_dim: 520,
        out_dims: OutDims::uniform(72, 1),
        max_rank: 16,
        seed,
        ..Case::default()
    };
    let ways: Vec<_> = ways_of(IndexWidth::I32).into_iter().filter(is_shared).collect();
    let cases: Vec<_> = (0..amount(5, 25)).map(case).collect();
    check_all(&cases, &ways).log();
}

/// Segments that `decode` finds by itself: counted at their buckets' numbers, in one sweep and in several, or
/// in a hash table that is nearly as full as it gets; most pairs of one segment, and most inactive.
#[test]
fn segments_are_found_in_any_order_of_threads() {
    let base = Case {
        in_dim: 8,
        out_dims: OutDims::uniform(8, 1),
        max_rank: 8,
        loras: Loras::Random,
        ..Case::default()
    };
    let case = |seed: u64| {
        let shape =
            |tokens, top_k, experts, slots| Case { tokens, top_k, experts, slots, seed, ..base.clone() };
        match seed % 6 {
            0 => shape(40, 3, 16, 2),
            1 => shape(70, 4, 128, 3),
            2 => Case { accumulate: false, ..shape(21, 2, 600, 2) },
            3 => Case { out_dims: OutDims::uniform(8, 2), ..shape(84, 8, 512, 8) },
            4 => Case { routing: Experts::One, loras: Loras::One, ..shape(60, 1, 90, 40) },
            _ => Case { loras: Loras::OutOfRange, accumulate: false, ..shape(45, 2, 64, 40) },
        }
    };
    let decode = Options { form: Some(PlanForm::Decode), ..Options::default() };
    let ways = [1, 4].map(|cluster| Options { cluster: Some(cluster), ..decode });
    let cases: Vec<_> = (0..seeds()).map(case).collect();
    check_all(&cases, &ways).log();
}

#[test]
fn a_cluster_aligns_in_any_order_of_threads_and_blocks() {
    const EXPERTS: usize = 4;
    const PAIRS: usize = 4096;
    const BLOCK: usize = 16;
    const ROOM: usize = PAIRS + EXPERTS * BLOCK;
    (0..seeds()).into_par_iter().for_each(|seed| {
        let machine = Emulated::new(Options::default(), seed);
        let upload = |ids: &[i32]| machine.upload(ids).expect("room");
        let ids: Vec<_> = (0..PAIRS).map(|pair| (pair % EXPERTS) as i32).collect();
        let (topk_ids, token_lora, lora_ids) = (upload(&ids), upload(&[0; PAIRS / 2]), upload(&[0]));
        let (mut places, mut experts) = (upload(&[-7; ROOM]), upload(&[-7; ROOM / BLOCK]));
        let mut padded = upload(&[-7]);
        let call = Align {
            tokens: PAIRS / 2,
            top_k: 2,
            experts: EXPERTS,
            slots: 1,
            shape: BlockShape { block_size: BLOCK, max_padded: ROOM, max_blocks: ROOM / BLOCK },
            topk_ids: topk_ids.view().into(),
            token_lora: token_lora.view(),
            adapter_enabled: Enabled::All,
            lora_ids: lora_ids.view(),
            expert_map: None,
            sorted_token_ids: places.view_mut(),
            expert_ids: experts.view_mut(),
            num_tokens_post_padded: padded.view_mut(),
        };
        machine.align(call).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let [mut places, experts, padded] =
            [&places, &experts, &padded].map(|array| machine.download(array).expect("what was written"));
        let of_each = PAIRS / EXPERTS;
        places[..PAIRS].chunks_mut(of_each).for_each(<[i32]>::sort_unstable);
        let place = |place: usize| place % of_each * EXPERTS + place / of_each;
        let expected = (0..ROOM).map(|i| if i < PAIRS { place(i) } else { PAIRS } as i32);
        assert!(places.iter().copied().eq(expected), "seed {seed}: {places:?}");
        let expected =
            (0..ROOM / BLOCK).map(|i| if i < PAIRS / BLOCK { (i * BLOCK / of_each) as i32 } else { -1 });
        assert!(experts.iter().copied().eq(expected), "seed {seed}: {experts:?}");
        assert_eq!(padded, [PAIRS as i32]);
        assert!(machine.launches().contains_key("align_cluster"));
    });
}
