//! Routes in vLLM's form: what `align` leaves and what a call makes of it, on every back end that is on the
//! CPU, with any ids.

use half::bf16;
use moe_lora::cpu::Cpu;
use moe_lora::emulated::Emulated;
use moe_lora::plan::Options;
use moe_lora::{
    Align, Backend, BlockShape, Buffer, DType, Enabled, Error, ExpertWeights, Factor, Forward, OutDims,
    Projection, ProjectionSizes, Routing, SliceOrder, SortedTensors, TopkIds, View, ViewMut, Weights, XRows,
    reference,
};
use moe_lora_tests::cases::check_some;
use moe_lora_tests::tally::Tally;
use moe_lora_verify::{Case, Experts, Flags, Form, Loras, Ranks, check};
use proptest::prelude::*;
use proptest::sample::select;
use std::sync::Mutex;

/// Calls of many routes and small matrices, on blocks of vLLM's sizes and others.
fn routes() -> impl Strategy<Value = Case> {
    let sizes = (0..=90usize, 1..=8usize, prop_oneof![1..=16usize, 17..=256usize], 1..=8usize);
    let blocks = (prop_oneof![3 => select(vec![16, 32, 64, 128]), 1 => 1..=256usize], 0..=70usize);
    let patterns = (
        select(vec![Experts::Uniform, Experts::Zipf, Experts::One, Experts::OutOfRange]),
        select(vec![Loras::Sequences, Loras::Random, Loras::One, Loras::None, Loras::OutOfRange]),
        select(vec![Flags::All, Flags::U8, Flags::I32]),
        select(vec![Ranks::Max, Ranks::Mixed, Ranks::OutOfRange]),
    );
    let modes = (any::<[bool; 3]>(), any::<u64>().no_shrink());
    (sizes, blocks, patterns, modes).prop_map(|(sizes, blocks, patterns, modes)| {
        let (tokens, top_k, experts, slots) = sizes;
        let ((block_size, more_experts), (routing, loras, enabled, ranks)) = (blocks, patterns);
        let ([mapped, accumulate, split], seed) = modes;
        Case {
            tokens,
            top_k,
            experts,
            slots,
            global_experts: mapped.then_some(experts + more_experts),
            max_rank: 8,
            in_dim: 8,
            out_dims: OutDims::uniform(8, 1),
            block_size: Some(block_size),
            routing,
            loras,
            enabled,
            ranks,
            accumulate,
            form: if split { Form::Split } else { Form::Forward },
            seed,
            ..Case::default()
        }
    })
}

#[test]
fn blocks_of_any_size_pass_on_the_cpu() {
    let passes = |case: &Case| check(&Cpu, case).map(drop);
    check_some(routes, 256, passes).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn blocks_of_any_size_pass_on_the_emulated_machine() {
    let tally = Mutex::new(Tally::default());
    let passes = |case: &Case| {
        let machine = Emulated::new(Options::default(), case.seed);
        check(&machine, case)?;
        tally.lock().expect("no thread has panicked").take_in(Tally::of([&machine]));
        Ok(())
    };
    check_some(routes, 48, passes).unwrap_or_else(|failure| panic!("{failure}"));
    tally.into_inner().expect("no thread has panicked").log();
}

/// Three tokens, two choices, four experts of which the map keeps two, two slots; blocks of two places.
#[test]
fn a_route_of_three_tokens_by_hand() {
    let check = |name: &str, aligned: [Vec<i32>; 3]| {
        // Slot 0 is listed and on: token 0 and 2. Expert 1 has pairs 0, 4 and 5, expert 0 has pair 1.
        let [mut places, experts, counts] = aligned;
        places[2..5].sort_unstable();
        assert_eq!(places[..8], [1, 6, 0, 4, 5, 6, 6, 6], "{name}");
        assert_eq!(experts[..5], [0, 1, 1, -1, -1], "{name}");
        // Slot 1 is off: its rows stay as they were.
        assert_eq!((&places[8..], &experts[5..]), (&[-7; 8][..], &[-7; 5][..]), "{name}");
        assert_eq!(counts, [6, -7], "{name}");
    };
    check("cpu", align(&Cpu));
    check("emulated", align(&Emulated::new(Options::default(), 3)));

    fn align<B: Backend>(backend: &B) -> [Vec<i32>; 3] {
        let upload = |ids: &[i32]| backend.upload(ids).expect("room");
        let (topk_ids, token_lora) = (upload(&[3, 0, 1, 2, 3, 3]), upload(&[0, 1, 0]));
        let (lora_ids, flags, map) = (upload(&[-1, 1, 0]), upload(&[1, 0]), upload(&[0, -1, 5, 1]));
        let (mut places, mut experts, mut counts) = (upload(&[-7; 16]), upload(&[-7; 10]), upload(&[-7; 2]));
        let call = Align {
            tokens: 3,
            top_k: 2,
            experts: 2,
            slots: 2,
            shape: BlockShape { block_size: 2, max_padded: 8, max_blocks: 5 },
            topk_ids: topk_ids.view().into(),
            token_lora: token_lora.view(),
            adapter_enabled: Enabled::I32(flags.view()),
            lora_ids: lora_ids.view(),
            expert_map: Some(map.view()),
            sorted_token_ids: places.view_mut(),
            expert_ids: experts.view_mut(),
            num_tokens_post_padded: counts.view_mut(),
        };
        backend.align(call).expect("a legal call");
        [&places, &experts, &counts].map(|array| backend.download(array).expect("what was written"))
    }
}

/// A route in vLLM's form that nobody would make.
#[derive(Clone, Debug)]
struct Wild {
    tokens: usize,
    top_k: usize,
    experts: usize,
    slots: usize,
    shape: BlockShape,
    places: Vec<i32>,
    block_experts: Vec<i32>,
    counts: Vec<i32>,
    lora_ids: Vec<i32>,
    flags: Vec<u8>,
    ranks: Vec<i32>,
    accumulate: bool,
}

const MAX_RANK: usize = 8;

/// An id below `limit`, or none.
fn id(limit: usize) -> impl Strategy<Value = i32> {
    let none = select(vec![-1, -2, i32::MIN, limit as i32, limit as i32 + 1, i32::MAX]);
    prop_oneof![3 => 0..limit as i32, 1 => none]
}

fn wild() -> impl Strategy<Value = Wild> {
    let sizes = (1..=20usize, 1..=4usize, 1..=5usize, 1..=4usize, select(vec![16, 17, 32, 33, 100, 256]));
    sizes.prop_flat_map(|(tokens, top_k, experts, slots, block_size)| {
        let pairs = tokens * top_k;
        // As many blocks as pairs can fill, so that none is left out.
        let most = pairs.min(pairs.min(slots * experts) + pairs / block_size);
        let max_blocks = (most / slots).max(1);
        // One more block than there are places for, or places past the last block.
        let (blocks, places) = (0..=1usize, 0..block_size);
        (Just((tokens, top_k, experts, slots, block_size, max_blocks)), blocks, places).prop_flat_map(
            |((tokens, top_k, experts, slots, block_size, usable), more_blocks, more_places)| {
                let max_padded = usable * block_size + more_places;
                let shape = BlockShape { block_size, max_padded, max_blocks: usable + more_blocks };
                let count = prop_oneof![
                    4 => 0..=max_padded as i32,
                    1 => select(vec![-1, i32::MIN, i32::MAX, max_padded as i32 + 1])
                ];
                let rank = select(vec![-1, 0, 1, 3, 8, 9, i32::MAX, i32::MIN]);
                let vec = proptest::collection::vec::<BoxedStrategy<i32>>;
                let pairs = tokens * top_k;
                let order = Just((0..pairs as i32).collect::<Vec<_>>()).prop_shuffle();
                (
                    (order, vec(id(pairs).boxed(), slots * max_padded)),
                    vec(id(experts).boxed(), slots * shape.max_blocks),
                    vec(count.boxed(), slots),
                    proptest::collection::vec(id(slots), 0..=slots + 3),
                    proptest::collection::vec(0..=1u8, slots),
                    vec(rank.boxed(), slots),
                    any::<bool>(),
                )
                    .prop_map(
                        move |(
                            (order, mut places),
                            block_experts,
                            counts,
                            lora_ids,
                            flags,
                            ranks,
                            accumulate,
                        )| {
                            // Each pair in one place at most: two would race for its row.
                            let mut order = order.into_iter();
                            for place in places.iter_mut().filter(|place| (0..pairs as i32).contains(place)) {
                                *place = order.next().unwrap_or(pairs as i32);
                            }
                            Wild {
                                tokens,
                                top_k,
                                experts,
                                slots,
                                shape,
                                places,
                                block_experts,
                                counts,
                                lora_ids,
                                flags,
                                ranks,
                                accumulate,
                            }
                        },
                    )
            },
        )
    })
}

/// Small whole numbers, whose products and sums are exact in bf16.
fn values(count: usize, seed: usize) -> Vec<bf16> {
    let digit = |i: usize| (((i + seed) * 2_654_435_761) >> 7) % 3;
    (0..count).map(|i| bf16::from_f32(digit(i) as f32 - 1.0)).collect()
}

impl Wild {
    fn projection(&self) -> Projection {
        let &Wild { top_k, experts, slots, .. } = self;
        let per_expert = ExpertWeights::PerExpert;
        Projection::new(ProjectionSizes {
            dtype: DType::Bf16,
            top_k,
            experts,
            slots,
            max_rank: MAX_RANK,
            in_dim: 8,
            out_dims: OutDims::uniform(8, 1),
            x_rows: XRows::Token,
            a_experts: per_expert,
            b_experts: per_expert,
        })
        .expect("a projection")
    }

    /// What `backend` makes of a call on this route: `out`, which held 5 everywhere.
    fn run<B: Backend>(
        &self,
        backend: &B,
        ranks: &[i32],
    ) -> (Vec<f32>, Vec<Option<reference::Target>>, Vec<f64>) {
        let projection = self.projection();
        let pairs = self.tokens * self.top_k;
        let matrices = self.slots * self.experts;
        let (x, a, b) = (values(self.tokens * 8, 1), values(matrices * 64, 2), values(matrices * 64, 3));
        let mut out = vec![bf16::from_f32(5.0); pairs * 8];

        let host_a = [View::from(&a[..])];
        let host_b = [View::from(&b[..])];
        let mut unused = out.clone();
        let sorted = SortedTensors {
            shape: self.shape,
            sorted_token_ids: self.places[..].into(),
            expert_ids: self.block_experts[..].into(),
            num_tokens_post_padded: self.counts[..].into(),
            lora_ids: self.lora_ids[..].into(),
            adapter_enabled: Enabled::U8(self.flags[..].into()),
            ranks: Some(ranks.into()),
        };
        let call = Forward {
            tokens: self.tokens,
            routing: Routing::Sorted(sorted),
            x: View::from(&x[..]).into(),
            weights: Weights::Stacked { a: &host_a, b: &host_b },
            topk_weights: None,
            out: ViewMut::from(&mut unused[..]).into(),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate: self.accumulate,
        };
        let expected = reference::forward(&projection, &call).expect("a legal call");

        let ids = |ids: &[i32]| backend.upload(ids).expect("room");
        let floats = |values: &[bf16]| backend.upload(values).expect("room");
        let (places, block_experts, counts) =
            (ids(&self.places), ids(&self.block_experts), ids(&self.counts));
        let (lora_ids, ranks) = (ids(&self.lora_ids), ids(ranks));
        let flags = backend.upload(&self.flags).expect("room");
        let (x, a, b) = (floats(&x), floats(&a), floats(&b));
        let mut placed = floats(&out);
        let (a, b) = ([a.view()], [b.view()]);
        let mut workspace = backend.workspace(&[projection], self.tokens).expect("room");
        let routing = Routing::Sorted(SortedTensors {
            shape: self.shape,
            sorted_token_ids: places.view(),
            expert_ids: block_experts.view(),
            num_tokens_post_padded: counts.view(),
            lora_ids: lora_ids.view(),
            adapter_enabled: Enabled::U8(flags.view()),
            ranks: Some(ranks.view()),
        });
        let call = Forward {
            tokens: self.tokens,
            routing,
            x: x.view().into(),
            weights: Weights::Stacked { a: &a, b: &b },
            topk_weights: None,
            out: placed.view_mut().into(),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate: self.accumulate,
        };
        backend.forward(&mut workspace, &projection, call).unwrap_or_else(|error| panic!("{error}"));
        out = backend.download(&placed).expect("what was written");
        (out.iter().map(|value| value.to_f32()).collect(), expected.targets, expected.values)
    }

    fn check<B: Backend>(&self, backend: &B, ranks: &[i32]) -> Result<(), TestCaseError> {
        let (out, targets, deltas) = self.run(backend, ranks);
        for (i, (&got, &delta)) in out.iter().zip(&deltas).enumerate() {
            let kept = self.accumulate || targets[i / 8].is_none();
            let expected = delta + if kept { 5.0 } else { 0.0 };
            prop_assert_eq!(f64::from(got), expected, "pair {}, column {}", i / 8, i % 8);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_ids_in_blocks_are_safe_and_those_in_range_count(wild in wild(), seed in any::<u64>()) {
        let on_host: Vec<_> = wild.ranks.iter().map(|&rank| rank.min(MAX_RANK as i32)).collect();
        wild.check(&Cpu, &on_host)?;
        wild.check(&Emulated::new(Options::default(), seed), &wild.ranks)?;
    }
}

/// More blocks than the pairs can fill, all of pairs that are none: nothing is written, inside or outside.
#[test]
fn blocks_past_what_pairs_can_fill_are_left_out() {
    let (blocks, pairs) = (40, 4);
    let shape = BlockShape { block_size: 16, max_padded: blocks * 16, max_blocks: blocks };
    let mut places = vec![pairs; 2 * shape.max_padded];
    places[0] = 2;
    // The second slot's only pair is far past the room.
    places[shape.max_padded + 17] = 3;
    let wild = Wild {
        tokens: 2,
        top_k: 2,
        experts: 2,
        slots: 2,
        shape,
        places,
        block_experts: vec![1; 2 * blocks],
        counts: vec![(blocks * 16) as i32; 2],
        lora_ids: vec![0, 1],
        flags: vec![1; 2],
        ranks: vec![8; 2],
        accumulate: true,
    };
    let (out, targets, deltas) = wild.run(&Emulated::new(Options::default(), 1), &wild.ranks);
    assert!(targets[2].is_some() && targets[3].is_some());
    let row = |pair: usize| pair * 8..pair * 8 + 8;
    for i in row(2) {
        assert_eq!(f64::from(out[i]), 5.0 + deltas[i]);
    }
    for i in row(0).chain(row(1)).chain(row(3)) {
        assert_eq!(out[i], 5.0);
    }
}

/// The pieces of a call of [`Align`] and of a route in blocks, each of which can be spoiled.
#[derive(Clone)]
struct Pieces {
    sizes: [usize; 4],
    shape: BlockShape,
    arrays: [(u64, usize); ARRAYS.len()],
}

/// Name, shape and elements of each array.
const ARRAYS: [(&str, &str, usize); 9] = [
    ("topk_ids", "[3, 2]", 6),
    ("token_lora", "[3]", 3),
    ("adapter_enabled", "[2]", 2),
    ("lora_ids", "[3]", 3),
    ("expert_map", "[5]", 5),
    ("sorted_token_ids", "[2, 40]", 80),
    ("expert_ids", "[2, 3]", 6),
    ("num_tokens_post_padded", "[2]", 2),
    ("ranks", "[2]", 2),
];

impl Pieces {
    fn view<S: moe_lora::Space>(&self, array: usize) -> View<'_, S, i32> {
        let (address, len) = self.arrays[array];
        // SAFETY: pieces that are not spoiled name live buffers; others must be refused unread.
        unsafe { View::from_raw(address, len) }
    }

    fn view_mut<S: moe_lora::Space>(&self, array: usize) -> ViewMut<'_, S, i32> {
        let (address, len) = self.arrays[array];
        // SAFETY: as in `view`, and one call uses the buffers at a time.
        unsafe { ViewMut::from_raw(address, len) }
    }

    fn align<B: Backend>(&self, backend: &B) -> moe_lora::Result<()> {
        let [tokens, top_k, experts, slots] = self.sizes;
        backend.align(Align {
            tokens,
            top_k,
            experts,
            slots,
            shape: self.shape,
            topk_ids: TopkIds::I32(self.view(0)),
            token_lora: self.view(1),
            adapter_enabled: Enabled::I32(self.view(2)),
            lora_ids: self.view(3),
            expert_map: Some(self.view(4)),
            sorted_token_ids: self.view_mut(5),
            expert_ids: self.view_mut(6),
            num_tokens_post_padded: self.view_mut(7),
        })
    }

    /// The split form's first half, of no tokens: it is checked like any other, and computes nothing.
    fn shrink<B: Backend>(&self, backend: &B) -> moe_lora::Result<()> {
        let projection = Wild { slots: self.sizes[3], ..plain() }.projection();
        let sorted = SortedTensors {
            shape: self.shape,
            sorted_token_ids: self.view(5),
            expert_ids: self.view(6),
            num_tokens_post_padded: self.view(7),
            lora_ids: self.view(3),
            adapter_enabled: Enabled::I32(self.view(2)),
            ranks: Some(self.view(8)),
        };
        let weights = backend.upload(&vec![bf16::ONE; self.sizes[3] * 2 * 64]).expect("room");
        let x = backend.upload(&[bf16::ONE; 8]).expect("room");
        let mut h = backend.upload(&[bf16::ONE; 8]).expect("room");
        let a = [weights.view()];
        let (routing, x, h) = (Routing::Sorted(sorted), x.view().into(), h.view_mut());
        let mut workspace = backend.workspace(&[projection], 1).expect("room");
        let call = moe_lora::Shrink { tokens: 0, routing, x, a: Factor::Stacked(&a), h };
        backend.shrink(&mut workspace, &projection, call).map(drop)
    }
}

fn plain() -> Wild {
    Wild {
        tokens: 0,
        top_k: 2,
        experts: 2,
        slots: 2,
        shape: BlockShape { block_size: 16, max_padded: 40, max_blocks: 3 },
        places: Vec::new(),
        block_experts: Vec::new(),
        counts: Vec::new(),
        lora_ids: Vec::new(),
        flags: Vec::new(),
        ranks: Vec::new(),
        accumulate: true,
    }
}

fn check_refusals<B: Backend>(backend: &B) {
    const MOST: usize = i32::MAX as usize;
    let buffers = ARRAYS.map(|(.., elements)| backend.upload(&vec![1i32; elements]).expect("room"));
    let arrays = std::array::from_fn(|i| (buffers[i].view().address(), ARRAYS[i].2));
    let good = Pieces { sizes: [3, 2, 2, 2], shape: plain().shape, arrays };
    assert_eq!(good.align(backend), Ok(()));
    assert_eq!(good.shrink(backend), Ok(()));
    let contents = || buffers.each_ref().map(|buffer| backend.download(buffer).expect("what was written"));
    let before = contents();
    let refused = |name: &str, [by_align, by_route]: [bool; 2], spoil: &dyn Fn(&mut Pieces), error: Error| {
        let mut pieces = good.clone();
        spoil(&mut pieces);
        if by_align {
            assert_eq!(pieces.align(backend), Err(error.clone()), "align: {name}");
        }
        if by_route {
            assert_eq!(pieces.shrink(backend), Err(error), "route: {name}");
        }
        assert_eq!(contents(), before, "{name} wrote something");
    };

    for (i, &(tensor, shape, expected)) in ARRAYS.iter().enumerate() {
        let by = [tensor != "ranks", i != 0 && i != 1 && i != 4];
        let null = Error::NullPointer { tensor, expected };
        refused(&format!("{tensor} is null"), by, &|pieces| pieces.arrays[i].0 = 0, null);
        let address = good.arrays[i].0 + 1;
        let odd = Error::Misaligned { tensor, expected: 4, address };
        refused(&format!("{tensor} is at an odd address"), by, &|pieces| pieces.arrays[i].0 += 1, odd);
        // Lists may have any length.
        if tensor != "lora_ids" && tensor != "expert_map" {
            let short = Error::TooShort { tensor, shape: shape.to_owned(), expected, got: expected - 1 };
            refused(&format!("{tensor} is one short"), by, &|pieces| pieces.arrays[i].1 -= 1, short);
        }
    }
    let zero = |what| Error::ZeroSize { what };
    let large = |what, limit| Error::SizeTooLarge { what, limit, got: limit + 1 };
    let row = |tensor, expected: usize| {
        let shape = "a row of 6 pairs of 2 experts in blocks of 16".to_owned();
        Error::TooShort { tensor, shape, expected, got: expected - 1 }
    };
    type Row = (&'static str, [bool; 2], fn(&mut Pieces), Error);
    const ALIGN: [bool; 2] = [true, false];
    const ROUTE: [bool; 2] = [false, true];
    const BOTH: [bool; 2] = [true, true];
    let small = Error::SizeTooSmall { what: "block_size", limit: 16, got: 15 };
    let rows: [Row; 15] = [
        ("no expert map", ALIGN, |pieces| pieces.arrays[4].1 = 0, zero("expert_map")),
        ("no choices", ALIGN, |pieces| pieces.sizes[1] = 0, zero("top_k")),
        ("too many choices", ALIGN, |pieces| pieces.sizes[1] = 65, large("top_k", 64)),
        ("no experts", ALIGN, |pieces| pieces.sizes[2] = 0, zero("experts")),
        ("too many experts", ALIGN, |pieces| pieces.sizes[2] = 8193, large("experts", 8192)),
        ("no slots", ALIGN, |pieces| pieces.sizes[3] = 0, zero("slots")),
        ("too many slots", ROUTE, |pieces| pieces.sizes[3] = 8193, large("slots", 8192)),
        ("pairs over 31 bits", ALIGN, |pieces| pieces.sizes[0] = MOST / 2 + 1, large("tokens", MOST / 2)),
        ("blocks of nothing", BOTH, |pieces| pieces.shape.block_size = 0, zero("block_size")),
        ("small blocks", ROUTE, |pieces| pieces.shape.block_size = 15, small),
        ("large blocks", ROUTE, |pieces| pieces.shape.block_size = 257, large("block_size", 256)),
        ("no places", BOTH, |pieces| pieces.shape.max_padded = 0, zero("max_padded")),
        (
            "too many blocks",
            BOTH,
            |pieces| pieces.shape.max_blocks = MOST / 2 + 1,
            large("max_blocks", MOST / 2),
        ),
        // One segment of each expert, in a block each.
        ("too few places", ALIGN, |pieces| pieces.shape.max_padded = 31, row("sorted_token_ids", 32)),
        ("too few blocks", ALIGN, |pieces| pieces.shape.max_blocks = 1, row("expert_ids", 2)),
    ];
    for (name, by, spoil, error) in rows {
        refused(name, by, &spoil, error);
    }
}

#[test]
fn whatever_is_wrong_with_blocks_is_refused_and_nothing_is_written() {
    check_refusals(&Cpu);
    check_refusals(&Emulated::new(Options::default(), 1));
}
