//! The host's own code on calls so small that Miri can watch it: checks, plans, and every call of the CPU
//! back end held against the reference. `cargo xtask miri` runs this where a nightly toolchain with Miri is
//! to be had.

use half::bf16;
use moe_lora::cpu::Cpu;
use moe_lora::plan::{DeviceLimits, Options, Plan, RouteSource, Stage, promises};
use moe_lora::{
    AdapterSlice, AdapterTable, Align, Backend, BlockShape, Buffer, Enabled, Error, Expand, ExpertWeights,
    Factor, Forward, Host, Layout, Operator, Projection, ProjectionSizes, Routing, RoutingTensors, Rows,
    RowsMut, Shrink, SliceOrder, SortedTensors, View, Weights, XRows, reference,
};

/// Sizes that differ from one another, and ids of which some are none.
fn sizes(x_rows: XRows, shared: ExpertWeights) -> ProjectionSizes {
    ProjectionSizes {
        top_k: 2,
        experts: 3,
        slots: 2,
        max_rank: 3,
        x_rows,
        a_experts: shared,
        ..ProjectionSizes::gate_up(5, 4)
    }
}

const TOKENS: usize = 3;
const TOPK_IDS: [i32; 6] = [0, 2, 1, 9, 2, -1];
const TOKEN_LORA: [i32; 3] = [1, 0, -1];

fn values(len: usize) -> Vec<bf16> {
    (0..len).map(|i| bf16::from_f32((i * 7 % 13) as f32 / 8.0 - 0.75)).collect()
}

/// Holds 16-bit results against float64 ones: a few roundings apart, each by 2⁻⁸ of at most 8.
fn agrees(got: &[bf16], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert!((f64::from(got.to_f32()) - expected).abs() <= 0.1, "{got} is not {expected}");
    }
}

/// All calls on one routing, and on the route that the first has found.
fn calls(projection: &Projection, routing: Routing<'_, Host>) {
    let s = projection.sizes();
    let (x, weights) = (values(projection.x_rows(TOKENS).unwrap() * s.in_dim), [0.5f32; 6]);
    let a = values(s.slots * projection.a_experts() * s.max_rank * s.in_dim);
    let b = values(s.slots * projection.b_experts() * s.out_dims.max() * s.max_rank);
    let (a, b) = ([a[..].into(), a[..].into()], [b[..].into(), b[..].into()]);
    let mut workspace = Cpu.workspace(&[*projection], TOKENS).unwrap();
    let mut out = Cpu.upload(&vec![bf16::ZERO; projection.out_elements(TOKENS).unwrap()]).unwrap();
    let mut h = Cpu.upload(&vec![bf16::ZERO; projection.h_elements(TOKENS).unwrap()]).unwrap();
    let (tokens, topk_weights) = (TOKENS, Some(weights[..].into()));
    let x = Rows::from(View::from(&x[..]));
    let (offset, accumulate) = (0, false);

    let mut on = routing;
    for _ in 0..2 {
        let out_view = out.view_mut().into();
        let call = Forward {
            tokens,
            routing,
            x,
            weights: Weights::Stacked { a: &a, b: &b },
            topk_weights,
            out: out_view,
            offset,
            order: SliceOrder::InOrder,
            accumulate,
        };
        let expected = reference::forward(projection, &call).unwrap();
        on = Cpu.forward(&mut workspace, projection, Forward { routing: on, ..call }).unwrap().into();
        agrees(out.as_slice(), &expected.values);
    }
    let call = Shrink { tokens, routing, x, a: Factor::Stacked(&a), h: h.view_mut() };
    let expected = reference::shrink(projection, &call).unwrap();
    Cpu.shrink(&mut workspace, projection, Shrink { routing: on, ..call }).unwrap();
    agrees(h.as_slice(), &expected.values);
    let out_view = out.view_mut().into();
    let call = Expand {
        tokens,
        routing,
        h: h.view(),
        b: Factor::Stacked(&b),
        topk_weights,
        out: out_view,
        offset,
        order: SliceOrder::InOrder,
        accumulate,
    };
    let expected = reference::expand(projection, &call).unwrap();
    Cpu.expand(&mut workspace, projection, Expand { routing: on, ..call }).unwrap();
    agrees(out.as_slice(), &expected.values);
}

#[test]
fn every_call_of_the_cpu_agrees_with_the_reference() {
    for (x_rows, shared) in [(XRows::Token, ExpertWeights::Shared), (XRows::Pair, ExpertWeights::PerExpert)] {
        let projection = Projection::new(sizes(x_rows, shared)).unwrap();
        let routing = RoutingTensors {
            adapter_enabled: Enabled::U8([1, 2][..].into()),
            ranks: Some([2, 3][..].into()),
            expert_map: Some([1, 0, 2, 5][..].into()),
            ..RoutingTensors::new(&TOPK_IDS[..], TOKEN_LORA[..].into())
        };
        calls(&projection, routing.into());
    }
}

/// Rows by index, weights by address, interleaved slices, and ids of 64 bits; two pairs share a row of `out`.
#[test]
fn every_form_of_the_cpu_agrees_with_the_reference() {
    let projection = Projection::new(sizes(XRows::Token, ExpertWeights::Shared)).unwrap();
    let mut table = AdapterTable::<Cpu, bf16>::new(&Cpu, &projection).unwrap();
    let slice = |rank, scaling| {
        let upload = |len| Cpu.upload(&values(len)).unwrap();
        Some(AdapterSlice { a: upload(8 * 5), b: upload(3 * 4 * 8), rank, max_rank: 8, scaling })
    };
    table.set(0, vec![slice(2, 0.5), None]).unwrap();
    table.set(1, vec![slice(3, 1.0), slice(1, -2.0)]).unwrap();
    table.set(1, vec![slice(3, 1.0), slice(1, -1.5)]).unwrap();
    let ids = TOPK_IDS.map(i64::from);
    let routing = RoutingTensors::new(&ids[..], TOKEN_LORA[..].into());
    let (x, x_index, out_index) = (values(4 * 5), [3, 0, 1, -1, 4, 2], [6, 1, 0, 2, -1, 1]);
    let mut out = Cpu.upload(&[bf16::ZERO; 7 * 8]).unwrap();
    let mut workspace = Cpu.workspace(&[projection], TOKENS).unwrap();
    let call = Forward {
        tokens: TOKENS,
        routing: routing.into(),
        x: Rows { index: Some(x_index[..].into()), ..View::from(&x[..]).into() },
        weights: Weights::Table(table.adapters()),
        topk_weights: None,
        out: RowsMut { index: Some(out_index[..].into()), ..out.view_mut().into() },
        offset: 0,
        order: SliceOrder::Interleaved,
        accumulate: false,
    };
    let expected = reference::forward(&projection, &call).unwrap().values;
    Cpu.forward(&mut workspace, &projection, call).unwrap();
    let rows: Vec<_> = out.as_slice().chunks(8).collect();
    for (pair, row) in [(0, 6), (2, 0), (3, 2)] {
        agrees(rows[row], &expected[pair * 8..][..8]);
    }
    for row in [3, 4, 5] {
        agrees(rows[row], &[0.0; 8]);
    }
}

#[test]
fn a_dense_layer_needs_no_ids() {
    let sizes = ProjectionSizes { max_rank: 1, ..ProjectionSizes::dense(2, &[1, 2, 1]) };
    let [operator] = Operator::builder(&Cpu).max_tokens(2).build([sizes]).unwrap();
    let (x, ones) = ([bf16::ONE; 4], [bf16::ONE; 2]);
    let mut out = [bf16::ONE; 8];
    let a = [&ones[..]; 3];
    // There is a slot for a token that there is not.
    let routing = RoutingTensors::dense([0, -1, 0][..].into());
    let call = operator.call(&x[..], a, [&ones[..1], &ones[..], &ones[..1]], routing, &mut out[..]);
    call.tokens(2).out_index(&[1, 0][..]).x_index(&[0, 1][..]).order(SliceOrder::Reversed).run().unwrap();
    agrees(&out, &[1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0]);
    let too_many = Projection::new(ProjectionSizes::dense(2, &[1; 5]));
    assert_eq!(too_many.map(drop), Err(Error::SizeTooLarge { what: "slices", limit: 4, got: 5 }));
}

#[test]
fn blocks_are_made_and_taken() {
    let projection = Projection::new(sizes(XRows::Token, ExpertWeights::PerExpert)).unwrap();
    let shape = BlockShape { block_size: 16, max_padded: 48, max_blocks: 3 };
    let (mut places, mut experts, mut counts) = (vec![0; 96], vec![0; 6], vec![0; 2]);
    let (lora_ids, adapter_enabled) = ([0, 1, -1], Enabled::All);
    let (topk_ids, token_lora) = (View::from(&TOPK_IDS[..]), View::from(&TOKEN_LORA[..]));
    let align = Align {
        tokens: TOKENS,
        top_k: 2,
        experts: 3,
        slots: 2,
        shape,
        topk_ids: topk_ids.into(),
        token_lora,
        adapter_enabled,
        lora_ids: lora_ids[..].into(),
        expert_map: None,
        sorted_token_ids: (&mut places[..]).into(),
        expert_ids: (&mut experts[..]).into(),
        num_tokens_post_padded: (&mut counts[..]).into(),
    };
    Cpu.align(align).unwrap();
    assert_eq!((&counts[..], places[0], places[48]), (&[16, 32][..], 2, 0));
    let sorted = SortedTensors {
        shape,
        sorted_token_ids: places[..].into(),
        expert_ids: experts[..].into(),
        num_tokens_post_padded: counts[..].into(),
        lora_ids: lora_ids[..].into(),
        adapter_enabled,
        ranks: None,
    };
    let own = reference::targets(&projection, TOKENS, &RoutingTensors::new(topk_ids, token_lora));
    assert_eq!(reference::sorted_targets(&projection, TOKENS, &sorted), own);
    calls(&projection, sorted.into());
}

#[test]
fn plans_keep_their_promises() {
    for (tokens, max_rank) in [(1, 8), (80, 64), (4096, 16), (7, 1024)] {
        let like = ProjectionSizes::gate_up(2048, 768);
        let sizes = ProjectionSizes { experts: 128, top_k: 8, slots: 2, max_rank, ..like };
        let projection = Projection::new(sizes).unwrap();
        let layout = Layout::packed(&projection, tokens);
        for stage in [Stage::Route, Stage::Forward, Stage::Shrink, Stage::Expand] {
            for limits in [DeviceLimits::H100, DeviceLimits::H200] {
                let (source, options) = (RouteSource::Made, Options::default());
                let plan = Plan::new(&projection, &layout, stage, source, &limits, &options).unwrap();
                promises::hold(&projection, &layout, &limits, &plan.expect("there are tokens"));
            }
        }
    }
}
