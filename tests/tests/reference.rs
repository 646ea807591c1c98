//! The reference, which everything else is held against, computes what one can compute by hand.

use half::bf16;
use moe_lora::cpu::Cpu;
use moe_lora::reference::{self, Target};
use moe_lora::{
    Backend, DType, Enabled, Expand, ExpertWeights, Factor, Forward, OutDims, Projection, ProjectionSizes,
    Routing, RoutingTensors, Rows, RowsMut, Shrink, SliceOrder, View, ViewMut, Weights, XRows,
};

fn values(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

/// Two tokens with a row of two each, two choices; two slots of two experts, rank 2 of which slot 0 uses 1;
/// two slices of two columns. Token 0 has slot 1, token 1 has slot 0. The second choice of token 1 is none.
#[test]
fn a_call_of_two_tokens_by_hand() {
    let sizes = ProjectionSizes {
        dtype: DType::Bf16,
        top_k: 2,
        experts: 2,
        slots: 2,
        max_rank: 2,
        in_dim: 2,
        out_dims: OutDims::uniform(2, 2),
        x_rows: XRows::Token,
        a_experts: ExpertWeights::PerExpert,
        b_experts: ExpertWeights::Shared,
    };
    let projection = Projection::new(sizes).expect("a projection");
    let x = values(&[1.0, 2.0, 3.0, -1.0]);
    // [slot, expert, rank, K]: a matrix a line; the second row of slot 0 is above its rank.
    #[rustfmt::skip]
    let a0 = values(&[
        1.0, 1.0,   f32::NAN, f32::NAN,
        2.0, 0.0,   f32::NAN, f32::NAN,
        1.0, 0.0,   0.0, 1.0,
        3.0, 4.0,   -1.0, 1.0,
    ]);
    let a1: Vec<_> = a0.iter().map(|&value| value * bf16::from_f32(2.0)).collect();
    // [slot, 1, N, rank].
    #[rustfmt::skip]
    let b0 = values(&[
        5.0, f32::NAN,   7.0, f32::NAN,
        1.0, 10.0,       2.0, 0.0,
    ]);
    let b1 = b0.clone();
    let topk_weights = [1.0f32, 0.5, 2.0, 1.0];
    let (topk_ids, token_lora, ranks) = ([0, 1, 1, -1], [1, 0], [1, 2]);

    let routing = RoutingTensors {
        topk_ids: topk_ids[..].into(),
        token_lora: token_lora[..].into(),
        adapter_enabled: Enabled::All,
        ranks: Some(ranks[..].into()),
        expert_map: None,
    };
    let target = |slot, expert, rank| Some(Target { slot, expert, rank });
    let targets = [target(1, 0, 2), target(1, 1, 2), target(0, 1, 1), None];
    // [slice, pair, rank]: of slice 0 (1, 2), (3 + 8, -1 + 2), (6), and none; slice 1 has twice that.
    let expected_h = [1.0, 2.0, 11.0, 1.0, 6.0, 0.0, 0.0, 0.0, 2.0, 4.0, 22.0, 2.0, 12.0, 0.0, 0.0, 0.0];
    // [pair, slice · column]: (1 + 20, 2), (11 + 10, 22) / 2, (30, 42) · 2, and none.
    #[rustfmt::skip]
    let expected = [
        21.0, 2.0,   42.0, 4.0,
        10.5, 11.0,  21.0, 22.0,
        60.0, 84.0,  120.0, 168.0,
        0.0, 0.0,    0.0, 0.0,
    ];

    let (a, b) = ([a0[..].into(), a1[..].into()], [b0[..].into(), b1[..].into()]);
    let mut h = values(&[f32::NAN; 16]);
    let mut out = values(&[f32::NAN; 16]);
    let mut split_out = out.clone();
    let mut workspace = Cpu.workspace(&[projection], 2).expect("room");
    let (tokens, routing, x) = (2, Routing::Tokens(routing), Rows::from(View::from(&x[..])));
    let (topk_weights, offset, accumulate) = (Some(topk_weights[..].into()), 0, false);

    let call = Forward {
        tokens,
        routing,
        x,
        weights: Weights::Stacked { a: &a, b: &b },
        topk_weights,
        out: ViewMut::from(&mut out[..]).into(),
        offset,
        order: SliceOrder::InOrder,
        accumulate,
    };
    let forward = reference::forward(&projection, &call).expect("a legal call");
    Cpu.forward(&mut workspace, &projection, call).expect("a legal call");

    let call = Shrink { tokens, routing, x, a: Factor::Stacked(&a), h: (&mut h[..]).into() };
    let shrink = reference::shrink(&projection, &call).expect("a legal call");
    Cpu.shrink(&mut workspace, &projection, call).expect("a legal call");

    let call = Expand {
        tokens,
        routing,
        h: h[..].into(),
        b: Factor::Stacked(&b),
        topk_weights,
        out: ViewMut::from(&mut split_out[..]).into(),
        offset,
        order: SliceOrder::InOrder,
        accumulate,
    };
    let expand = reference::expand(&projection, &call).expect("a legal call");
    Cpu.expand(&mut workspace, &projection, call).expect("a legal call");

    assert_eq!(forward.targets, targets);
    assert_eq!(forward.values, expected);
    assert_eq!(shrink.values, expected_h);
    assert_eq!(expand.values, expected);
    // All of these are exact in bf16.
    let widened = |values: &[bf16]| values.iter().map(|value| value.to_f64()).collect::<Vec<_>>();
    assert_eq!(widened(&h), expected_h);
    assert_eq!(widened(&out), expected);
    assert_eq!(widened(&split_out), expected);
}

/// Pairs 0 … 3 of two tokens, K = 1, R = 1, x = 1, 2, 4, 8 by row, a = 1, and two slices whose columns
/// multiply by 1, 2 and by 10, 20.
#[test]
fn rows_and_columns_are_where_the_call_says() {
    let sizes = ProjectionSizes { top_k: 2, max_rank: 1, ..ProjectionSizes::gate_up(1, 2) };
    let projection = Projection::new(sizes).expect("legal sizes");
    let (x, a) = (values(&[1.0, 2.0, 4.0, 8.0]), values(&[1.0]));
    let (gate, up) = (values(&[1.0, 2.0]), values(&[10.0, 20.0]));
    let (a, b) = ([a[..].into(), a[..].into()], [gate[..].into(), up[..].into()]);
    let old = f32::NAN;
    let row = |x: f32, order| match order {
        SliceOrder::InOrder => [x, 2.0 * x, 10.0 * x, 20.0 * x],
        SliceOrder::Reversed => [10.0 * x, 20.0 * x, x, 2.0 * x],
        SliceOrder::Interleaved => [x, 10.0 * x, 2.0 * x, 20.0 * x],
    };
    let (none, up_to) = ([0.0; 4], i32::MAX);
    for (order, x_index, out_index, expected) in [
        (SliceOrder::InOrder, None, None, [Some(1.0), Some(1.0), Some(2.0), Some(2.0)]),
        (SliceOrder::Reversed, Some([3, 0, 0, 1]), None, [Some(8.0), Some(1.0), Some(1.0), Some(2.0)]),
        (SliceOrder::Interleaved, Some([3, -1, 4, 2]), Some([1, 0, 3, up_to]), [None, Some(8.0), None, None]),
        (SliceOrder::InOrder, None, Some([3, 2, 1, 0]), [Some(2.0), Some(2.0), Some(1.0), Some(1.0)]),
    ] {
        let routing = RoutingTensors::new(&[0i64; 4][..], [0, 0, 0][..].into());
        let mut out = values(&[old; 16]);
        let call = Forward {
            tokens: 2,
            routing: routing.into(),
            x: Rows { index: x_index.as_ref().map(|index| index[..].into()), ..View::from(&x[..]).into() },
            weights: Weights::Stacked { a: &a, b: &b },
            topk_weights: None,
            out: RowsMut {
                index: out_index.as_ref().map(|index| index[..].into()),
                ..ViewMut::from(&mut out[..]).into()
            },
            offset: 0,
            order,
            accumulate: false,
        };
        let mut workspace = Cpu.workspace(&[projection], 2).expect("room");
        let reference = reference::forward(&projection, &call).expect("a legal call").values;
        Cpu.forward(&mut workspace, &projection, call).expect("a legal call");
        let got: Vec<_> =
            out.chunks(4).map(|row| row.iter().map(|v| v.to_f32()).collect::<Vec<_>>()).collect();
        let written = expected.map(|x| x.map_or(none, |x| row(x, order)));
        // No pair names row 2 of the third call.
        let untouched = |i: usize| out_index.is_some_and(|index| !index.contains(&(i as i32)));
        for (i, (got, expected)) in got.iter().zip(written).enumerate() {
            match untouched(i) {
                true => assert!(got.iter().all(|v| v.is_nan()), "{order:?}: row {i} is {got:?}"),
                false => assert_eq!(got[..], expected, "{order:?}: row {i}"),
            }
        }
        let of_pair = |pair: usize| out_index.map_or(pair as i32, |index| index[pair]);
        for (pair, values) in reference.chunks(4).enumerate() {
            if let Some(row) = usize::try_from(of_pair(pair)).ok().filter(|&row| row < 4) {
                assert!(
                    values.iter().zip(&got[row]).all(|(value, got)| *value as f32 == *got),
                    "pair {pair}"
                );
            }
        }
    }
}
