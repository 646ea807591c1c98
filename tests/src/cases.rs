//! Any call that the contract allows.

use moe_lora::{Backend, DType, ExpertWeights, OutDims, Projection, XRows};
use moe_lora_verify::{Case, Experts, Failure, Flags, Form, Loras, Ranks, check};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestError, TestRunner};
use std::panic::resume_unwind;
use std::sync::Mutex;
use std::thread;

/// Elements of 16 bytes.
const VECTOR: usize = 8;

/// Widths around vectors of 8 elements and tiles of 16 to 128.
fn width() -> impl Strategy<Value = usize> {
    select(vec![1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 96, 128, 136, 200, 256])
}

/// Elements that something is off the start or the end of a row by.
fn padding() -> impl Strategy<Value = usize> {
    prop_oneof![3 => Just(0), 1 => select(vec![8, 16, 64]), 2 => 1..=17usize]
}

/// T, k, E, the length of `expert_map`, L.
fn routes() -> impl Strategy<Value = (usize, usize, usize, Option<usize>, usize)> {
    let tokens = prop_oneof![6 => 1..=20usize, 2 => 0..=70usize, 1 => 100..=300usize];
    let top_k = prop_oneof![8 => 1..=8usize, 1 => 9..=64usize];
    (tokens, top_k, 1..=9usize, proptest::option::of(1..=20usize), 1..=4usize)
}

/// R, S, K, N.
fn matrices() -> impl Strategy<Value = (usize, usize, usize, usize)> {
    let rank = prop_oneof![
        9 => select(vec![1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 32, 33, 48, 64]),
        1 => select(vec![65, 96, 128, 200, 256, 512, Projection::MAX_RANK]),
    ];
    let in_dim = prop_oneof![9 => width(), 1 => select(vec![512, 1000, 1024, 2048])];
    let out_dim = prop_oneof![9 => width(), 1 => select(vec![512, 1000, 1024])];
    (rank, 1..=4usize, in_dim, out_dim)
}

/// Who goes where.
fn patterns() -> impl Strategy<Value = (Experts, Loras, Flags, Ranks)> {
    (
        select(vec![Experts::Uniform, Experts::Zipf, Experts::One, Experts::OutOfRange]),
        select(vec![Loras::Sequences, Loras::Random, Loras::One, Loras::None, Loras::OutOfRange]),
        select(vec![Flags::All, Flags::U8, Flags::I32]),
        select(vec![Ranks::Max, Ranks::Mixed, Ranks::OutOfRange]),
    )
}

/// Any call, small enough to be checked in milliseconds. Three of four are aligned: of sizes, strides and
/// addresses drawn one by one, nearly all calls have one that is not, and run the kernels for those alone.
/// Shrinks to few tokens, narrow matrices and plain modes.
pub fn cases() -> impl Strategy<Value = Case> {
    let experts = || select(vec![ExpertWeights::PerExpert, ExpertWeights::Shared]);
    let types = (select(vec![DType::Bf16, DType::F16]), select(vec![XRows::Token, XRows::Pair]));
    let flags = (any::<bool>(), any::<bool>(), proptest::bool::weighted(0.2), proptest::bool::weighted(0.75));
    let form = select(vec![Form::Forward, Form::Split]);
    let paddings = (padding(), padding(), padding());
    let seed = any::<u64>().no_shrink();
    let block_size =
        proptest::option::weighted(0.3, prop_oneof![select(vec![16, 32, 64, 128]), 1..=256usize]);
    let rest = (types, experts(), experts(), flags, (form, block_size), paddings, seed);
    (routes(), matrices(), patterns(), rest).prop_map(|(route, matrix, pattern, rest)| {
        let (tokens, top_k, experts, global_experts, slots) = route;
        let (max_rank, slices, in_dim, out_dim) = matrix;
        let (routing, loras, enabled, ranks) = pattern;
        let ((dtype, x_rows), a_experts, b_experts, flags, (form, block_size), paddings, seed) = rest;
        let (routed_weight, accumulate, misaligned, aligned) = flags;
        let (offset, x_padding, out_padding) = paddings;
        let case = Case {
            dtype,
            tokens,
            top_k,
            experts,
            global_experts,
            slots,
            max_rank,
            in_dim,
            out_dims: OutDims::uniform(out_dim, slices),
            x_rows,
            a_experts,
            b_experts,
            routing,
            loras,
            enabled,
            ranks,
            routed_weight,
            accumulate,
            offset,
            x_padding,
            out_padding,
            form,
            block_size,
            misaligned,
            seed,
        };
        if aligned { align(case) } else { case }
    })
}

/// The call with each size and stride rounded up to whole vectors, as the fast kernels want them.
fn align(case: Case) -> Case {
    let up = |size: usize| size.next_multiple_of(VECTOR);
    Case {
        max_rank: up(case.max_rank),
        in_dim: up(case.in_dim),
        out_dims: case.out_dims.map(up),
        offset: up(case.offset),
        x_padding: up(case.x_padding),
        out_padding: up(case.out_padding),
        misaligned: false,
        ..case
    }
}

/// Any call that a slow back end can be asked for: as [`cases`], cut to few tokens and narrow matrices.
pub fn small_cases() -> impl Strategy<Value = Case> {
    cases().prop_map(|case| Case {
        tokens: case.tokens % 40,
        top_k: case.top_k % 8 + 1,
        max_rank: case.max_rank.min(96),
        in_dim: case.in_dim.min(264),
        out_dims: case.out_dims.map(|width| width.min(264)),
        ..case
    })
}

/// Checks many of [`cases`] on `backend`, and shrinks the first that does not pass.
///
/// # Errors
/// What was wrong with the smallest such case, and the command that runs it again.
pub fn check_cases<B: Backend>(backend: &B) -> Result<(), String> {
    let passes = |case| check(backend, &case).map(drop).map_err(failed);
    outcome(TestRunner::new(config(Config::default().cases)).run(&cases(), passes))
}

/// Checks `count` of `cases` as `passes` does, on all cores, and shrinks the first that does not pass.
///
/// # Errors
/// As for [`check_cases`].
pub fn check_some<S: Strategy<Value = Case>>(
    cases: impl Fn() -> S + Sync,
    count: u32,
    passes: impl Fn(&Case) -> Result<(), Box<Failure>> + Sync,
) -> Result<(), String> {
    // A runner a case, each with a generator of its own. Threads and no pool: a thread of a pool that waits
    // for a call takes up the next case meanwhile, one on top of another until its stack is full.
    let mut first = TestRunner::new(config(1));
    let generators: Vec<_> = (0..count).map(|_| first.new_rng()).collect();
    let left = Mutex::new(generators.into_iter());
    let next = || left.lock().expect("no thread has panicked").next();
    let check_rest = || {
        while let Some(random) = next() {
            let mut runner = TestRunner::new_with_rng(config(1), random);
            outcome(runner.run(&cases(), |case| passes(&case).map_err(failed)))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(check_rest)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|cause| resume_unwind(cause)))
    })
}

/// A failing case prints its command: there is nothing to persist.
fn config(cases: u32) -> Config {
    Config { failure_persistence: None, cases, ..Config::default() }
}

fn failed(failure: Box<Failure>) -> TestCaseError {
    TestCaseError::fail(failure.to_string())
}

fn outcome(result: Result<(), TestError<Case>>) -> Result<(), String> {
    match result {
        Ok(()) => Ok(()),
        Err(TestError::Abort(reason)) => Err(reason.to_string()),
        Err(TestError::Fail(failure, _)) => Err(failure.to_string()),
    }
}
