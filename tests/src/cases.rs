//! Any call that the contract allows.

use moe_lora::{Backend, DType, ExpertWeights, OutDims, Projection, SliceOrder, XRows};
use moe_lora_verify::{Case, Experts, Failure, Flags, Form, IdsKind, Indexed, Loras, Ranks, check};
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

/// Whether the kernels take the forms of a call that [`Forms`] adds.
const NEW_FORMS_ON_KERNELS: bool = true;

/// Which forms of a call are drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Forms {
    /// Stacked weights, rows in order, slices of one width one behind another, ids of 32 bits.
    Plain,
    /// Any.
    All,
}

impl Forms {
    /// Those that the kernels take.
    const ON_KERNELS: Self = if NEW_FORMS_ON_KERNELS { Forms::All } else { Forms::Plain };

    /// `other` once in so many calls.
    fn now_and_then<T: Clone + std::fmt::Debug + 'static>(
        self,
        plain: T,
        others: Vec<T>,
        in_hundred: u32,
    ) -> impl Strategy<Value = T> {
        let others_weight = if self == Forms::All { in_hundred } else { 0 };
        prop_oneof![100 - others_weight => Just(plain), others_weight => select(others)]
    }
}

/// The forms of a call that kernels may not have: whether weights are named by address, the indices of the
/// rows of `x` and `out`, the order of slices, the ids' type, and elements of `token_lora` past T.
fn forms(forms: Forms) -> impl Strategy<Value = (bool, Indexed, Indexed, SliceOrder, IdsKind, usize)> {
    let index = || forms.now_and_then(Indexed::None, vec![Indexed::Permuted, Indexed::OutOfRange], 20);
    (
        forms.now_and_then(false, vec![true], 25),
        index(),
        index(),
        forms.now_and_then(SliceOrder::InOrder, vec![SliceOrder::Reversed, SliceOrder::Interleaved], 25),
        forms.now_and_then(IdsKind::I32, vec![IdsKind::I64, IdsKind::I64, IdsKind::None], 25),
        forms.now_and_then(0, vec![1, 4, 33], 20),
    )
}

/// N of each slice.
fn out_dims(forms: Forms) -> impl Strategy<Value = OutDims> {
    let one = || prop_oneof![9 => width(), 1 => select(vec![512, 1000, 1024])];
    let own = if forms == Forms::All { 20 } else { 0 };
    prop_oneof![
        100 - own => (one(), 1..=4usize).prop_map(|(width, slices)| OutDims::uniform(width, slices)),
        own => proptest::collection::vec(one(), 1..=4)
            .prop_map(|widths| OutDims::new(&widths).expect("one to four slices")),
    ]
}

/// R, K, N.
fn matrices(forms: Forms) -> impl Strategy<Value = (usize, usize, OutDims)> {
    let rank = prop_oneof![
        9 => select(vec![1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 32, 33, 48, 64]),
        1 => select(vec![65, 96, 128, 200, 256, 512, Projection::MAX_RANK]),
    ];
    let in_dim = prop_oneof![9 => width(), 1 => select(vec![512, 1000, 1024, 2048])];
    (rank, in_dim, out_dims(forms))
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
    cases_of(Forms::All)
}

/// As [`cases`], of the forms that the kernels take.
pub fn kernel_cases() -> impl Strategy<Value = Case> {
    cases_of(Forms::ON_KERNELS)
}

fn cases_of(drawn: Forms) -> impl Strategy<Value = Case> {
    let experts = || select(vec![ExpertWeights::PerExpert, ExpertWeights::Shared]);
    let types = (select(vec![DType::Bf16, DType::F16]), select(vec![XRows::Token, XRows::Pair]));
    let flags = (any::<bool>(), any::<bool>(), proptest::bool::weighted(0.2), proptest::bool::weighted(0.75));
    let form = select(vec![Form::Forward, Form::Split]);
    let paddings = (padding(), padding(), padding());
    let seed = any::<u64>().no_shrink();
    let block_size =
        proptest::option::weighted(0.3, prop_oneof![select(vec![16, 32, 64, 128]), 1..=256usize]);
    let rest = (types, experts(), experts(), flags, (form, block_size), paddings, seed);
    (routes(), matrices(drawn), patterns(), forms(drawn), rest).prop_map(
        |(route, matrix, pattern, forms, rest)| {
            let (tokens, top_k, experts, global_experts, slots) = route;
            let (max_rank, in_dim, out_dims) = matrix;
            let (table, x_index, out_index, order, ids, lora_padding) = forms;
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
                out_dims,
                x_rows,
                a_experts,
                b_experts,
                table,
                x_index,
                routing,
                ids,
                loras,
                lora_padding,
                enabled,
                ranks,
                routed_weight,
                accumulate,
                out_index,
                offset,
                order,
                x_padding,
                out_padding,
                form,
                block_size,
                misaligned,
                seed,
            };
            legal(if aligned { align(case) } else { case })
        },
    )
}

/// The call with what its forms rule out changed.
fn legal(case: Case) -> Case {
    let case = match case.ids {
        IdsKind::None => Case { top_k: 1, experts: 1, global_experts: None, ..case },
        IdsKind::I32 | IdsKind::I64 => case,
    };
    match case.order {
        SliceOrder::Interleaved if !case.out_dims.is_uniform() => {
            Case { order: SliceOrder::Reversed, ..case }
        }
        _ => case,
    }
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
    kernel_cases().prop_map(|case| {
        legal(Case {
            tokens: case.tokens % 40,
            top_k: case.top_k % 8 + 1,
            max_rank: case.max_rank.min(96),
            in_dim: case.in_dim.min(264),
            out_dims: case.out_dims.map(|width| width.min(264)),
            ..case
        })
    })
}

/// Checks many of [`kernel_cases`] on `backend`, and shrinks the first that does not pass.
///
/// # Errors
/// What was wrong with the smallest such case, and the command that runs it again.
pub fn check_cases<B: Backend>(backend: &B) -> Result<(), String> {
    let passes = |case| check(backend, &case).map(drop).map_err(failed);
    outcome(TestRunner::new(config(Config::default().cases)).run(&kernel_cases(), passes))
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
