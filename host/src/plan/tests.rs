//! The form that the planner chooses on an H100, for calls at which the forms were timed: docs/PERFORMANCE.md has the times.

use super::*;
use crate::projection::{ExpertWeights, ProjectionSizes};

/// Width of a token, width of an expert, experts, and experts that a token chooses.
type Model = [usize; 4];

const QWEN3_30B: Model = [2048, 768, 128, 8];
const GPT_OSS_20B: Model = [2880, 2880, 32, 4];
const OLMOE_1B: Model = [2048, 1024, 64, 8];
const MIXTRAL_8X7B: Model = [4096, 14336, 8, 2];

/// Gate and up, or down, with so many adapters of this rank.
fn w13([hidden, intermediate, experts, top_k]: Model, slots: usize, max_rank: usize) -> ProjectionSizes {
    ProjectionSizes {
        dtype: DType::Bf16,
        top_k,
        experts,
        slots,
        max_rank,
        slices: 2,
        in_dim: hidden,
        out_dim: intermediate,
        x_rows: XRows::Token,
        a_experts: ExpertWeights::PerExpert,
        b_experts: ExpertWeights::PerExpert,
    }
}

fn w2(model: Model, slots: usize, max_rank: usize) -> ProjectionSizes {
    let w13 = w13(model, slots, max_rank);
    ProjectionSizes { slices: 1, in_dim: w13.out_dim, out_dim: w13.in_dim, x_rows: XRows::Pair, ..w13 }
}

/// The form of a whole call of so many tokens, in the words of [`Options::name`].
fn form(sizes: ProjectionSizes, tokens: usize) -> String {
    let projection = Projection::new(sizes).expect("the sizes are right");
    let layout = Layout {
        tokens,
        x_stride: sizes.in_dim,
        out_stride: sizes.slices * sizes.out_dim,
        offset: 0,
        aligned: true,
    };
    let plan = Plan::new(
        &projection,
        &layout,
        Stage::Forward,
        RouteSource::Made,
        &DeviceLimits::H100,
        &Options::default(),
    );
    let plan = plan.expect("no size is too large").expect("there are tokens");
    match (plan.decode, plan.prefill) {
        (Some(_), _) => "decode".to_owned(),
        (None, Some(PrefillPlan { launch, shares, .. })) => {
            let Kernel::Prefill(PrefillVariant { shape, .. }) = launch.entry.kernel else {
                panic!("{}", launch.entry.name)
            };
            format!("{}prefill(m{})", if shares.is_some() { "shared" } else { "" }, shape.rows)
        }
        (None, None) => "two launches".to_owned(),
    }
}

#[test]
fn the_fastest_form_is_planned() {
    let cases: &[(ProjectionSizes, &[(usize, &str)])] = &[
        (
            w13(QWEN3_30B, 2, 64),
            &[(1, "decode"), (16, "decode"), (256, "prefill(m64)"), (1024, "prefill(m64)")],
        ),
        (w13(QWEN3_30B, 2, 64), &[(4096, "prefill(m128)"), (16384, "prefill(m128)")]),
        (w2(QWEN3_30B, 2, 64), &[(1, "decode"), (80, "decode"), (1024, "prefill(m64)")]),
        (w13(QWEN3_30B, 2, 16), &[(80, "decode"), (2048, "prefill(m128)")]),
        // Segments half as many: rounds of passes are one of what matters.
        (w13(QWEN3_30B, 1, 64), &[(1024, "prefill(m128)"), (4096, "prefill(m128)")]),
        (w13(OLMOE_1B, 1, 64), &[(4096, "prefill(m64)")]),
        (w2(OLMOE_1B, 1, 64), &[(4096, "prefill(m64)")]),
        (w13(GPT_OSS_20B, 4, 32), &[(64, "decode"), (2048, "prefill(m128)")]),
        (
            w13(GPT_OSS_20B, 2, 32),
            &[(1024, "prefill(m64)"), (2048, "sharedprefill(m64)"), (4096, "sharedprefill(m64)")],
        ),
        (w2(GPT_OSS_20B, 2, 32), &[(2048, "prefill(m64)"), (4096, "sharedprefill(m64)")]),
        (
            w13(MIXTRAL_8X7B, 2, 64),
            &[(1, "two launches"), (128, "sharedprefill(m64)"), (2048, "sharedprefill(m64)")],
        ),
        (w13(MIXTRAL_8X7B, 2, 64), &[(8192, "sharedprefill(m64)"), (12288, "sharedprefill(m64)")]),
        (w2(MIXTRAL_8X7B, 2, 64), &[(512, "sharedprefill(m64)"), (8192, "sharedprefill(m64)")]),
        // Ranks for which `decode` has no room.
        (w13(QWEN3_30B, 2, 192), &[(16, "prefill(m64)")]),
    ];
    for (sizes, forms) in cases {
        for (tokens, expected) in *forms {
            assert_eq!(form(*sizes, *tokens), *expected, "{tokens} tokens of {sizes:?}");
        }
    }
}
