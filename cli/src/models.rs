//! The layers of well-known models.

use clap::ValueEnum;
use moe_lora::{DType, ExpertWeights, Projection, ProjectionSizes, XRows};
use std::fmt;

/// A model's mixture-of-experts layer.
#[derive(Clone, Copy)]
pub struct Model {
    pub name: &'static str,
    pub hidden: usize,
    pub intermediate: usize,
    pub experts: usize,
    pub top_k: usize,
}

/// A projection of such a layer.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// Gate and up: two slices, a row of x a token
    W13,
    /// Down: one slice, a row of x a pair, weighted
    W2,
}

pub const QWEN3_30B: Model =
    Model { name: "qwen3-30b-a3b", hidden: 2048, intermediate: 768, experts: 128, top_k: 8 };
pub const GPT_OSS_20B: Model =
    Model { name: "gpt-oss-20b", hidden: 2880, intermediate: 2880, experts: 32, top_k: 4 };
pub const OLMOE_1B: Model =
    Model { name: "olmoe-1b-7b", hidden: 2048, intermediate: 1024, experts: 64, top_k: 8 };
pub const MIXTRAL_8X7B: Model =
    Model { name: "mixtral-8x7b", hidden: 4096, intermediate: 14336, experts: 8, top_k: 2 };

/// All of them.
pub const MODELS: [Model; 4] = [QWEN3_30B, GPT_OSS_20B, OLMOE_1B, MIXTRAL_8X7B];

impl Model {
    /// A projection of its layer, with `slots` adapters of rank `rank`.
    pub fn projection(
        &self,
        op: Op,
        rank: usize,
        slots: usize,
        dtype: DType,
    ) -> moe_lora::Result<Projection> {
        let &Model { hidden, intermediate, experts, top_k, .. } = self;
        let (in_dim, out_dim, slices, x_rows) = match op {
            Op::W13 => (hidden, intermediate, 2, XRows::Token),
            Op::W2 => (intermediate, hidden, 1, XRows::Pair),
        };
        Projection::new(ProjectionSizes {
            dtype,
            top_k,
            experts,
            slots,
            max_rank: rank,
            slices,
            in_dim,
            out_dim,
            x_rows,
            a_experts: ExpertWeights::PerExpert,
            b_experts: ExpertWeights::PerExpert,
        })
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::W13 => "w13",
            Op::W2 => "w2",
        })
    }
}

#[cfg(test)]
mod tests {
    //! The form that the planner chooses, and the cluster of `decode`, for calls at which these were timed: docs/PERFORMANCE.md has the times.

    use super::*;
    use moe_lora::Layout;
    use moe_lora::plan::{DeviceLimits, Form, Options, Plan, PrefillTile, RouteSource, Stage};

    fn w13(model: &Model, slots: usize, rank: usize) -> Projection {
        model.projection(Op::W13, rank, slots, DType::Bf16).expect("the sizes are right")
    }

    fn w2(model: &Model, slots: usize, rank: usize) -> Projection {
        model.projection(Op::W2, rank, slots, DType::Bf16).expect("the sizes are right")
    }

    /// A whole call of so many tokens.
    fn plan(projection: &Projection, tokens: usize, ranked: bool, limits: &DeviceLimits) -> Plan {
        let sizes = projection.sizes();
        let layout = Layout {
            tokens,
            x_stride: sizes.in_dim,
            out_stride: sizes.slices * sizes.out_dim,
            offset: 0,
            aligned: true,
            ranked,
        };
        let plan =
            Plan::new(projection, &layout, Stage::Forward, RouteSource::Made, limits, &Options::default());
        plan.expect("no size is too large").expect("there are tokens")
    }

    /// The form of a whole call of so many tokens, in the words of [`Options::name`], and the pairs of its tiles where the kernel has room for more.
    fn form(projection: &Projection, tokens: usize, ranked: bool, limits: &DeviceLimits) -> String {
        let plan = plan(projection, tokens, ranked, limits);
        let of = |name: &str, tile: PrefillTile| {
            let (rows, tile_rows) = (tile.rows(), plan.tile_rows());
            let form = format!("{name}(m{rows})");
            if tile_rows < rows { format!("{form} in {tile_rows}") } else { form }
        };
        match plan.form() {
            Form::Decode => "decode".to_owned(),
            Form::Prefill(tile) => of("prefill", tile),
            Form::SharedPrefill(tile) => of("sharedprefill", tile),
            Form::Generic => "generic".to_owned(),
        }
    }

    #[test]
    fn the_fastest_form_is_planned() {
        let cases: &[(Projection, &[(usize, &str)])] = &[
            (
                w13(&QWEN3_30B, 2, 64),
                &[(1, "decode"), (16, "decode"), (256, "prefill(m64)"), (1024, "prefill(m64)")],
            ),
            (w13(&QWEN3_30B, 2, 64), &[(4096, "prefill(m128)"), (16384, "prefill(m128)")]),
            (w2(&QWEN3_30B, 2, 64), &[(1, "decode"), (80, "decode"), (1024, "prefill(m64)")]),
            (w13(&QWEN3_30B, 2, 16), &[(80, "decode"), (2048, "prefill(m128)")]),
            // Segments half as many: tiles are as large as fills the last round of turns.
            (w13(&QWEN3_30B, 1, 64), &[(1024, "prefill(m128)"), (2048, "prefill(m128) in 80")]),
            (w13(&QWEN3_30B, 1, 64), &[(4096, "prefill(m128) in 96"), (8192, "prefill(m128) in 112")]),
            (w2(&QWEN3_30B, 1, 64), &[(4096, "prefill(m128) in 96")]),
            (
                w13(&OLMOE_1B, 1, 64),
                &[(512, "prefill(m64) in 40"), (1024, "prefill(m128) in 80"), (4096, "prefill(m128) in 96")],
            ),
            (
                w2(&OLMOE_1B, 1, 64),
                &[(192, "prefill(m64)"), (384, "prefill(m64)"), (4096, "prefill(m128) in 96")],
            ),
            (w13(&GPT_OSS_20B, 4, 32), &[(64, "decode"), (2048, "prefill(m128)")]),
            (
                w13(&GPT_OSS_20B, 2, 32),
                &[(1024, "prefill(m64) in 40"), (2048, "prefill(m128) in 80"), (4096, "sharedprefill(m128)")],
            ),
            (w2(&GPT_OSS_20B, 2, 32), &[(2048, "prefill(m128) in 80"), (4096, "sharedprefill(m64)")]),
            (
                w13(&MIXTRAL_8X7B, 2, 64),
                &[(1, "generic"), (128, "sharedprefill(m64)"), (2048, "sharedprefill(m64)")],
            ),
            (w13(&MIXTRAL_8X7B, 2, 64), &[(8192, "sharedprefill(m128)"), (16384, "sharedprefill(m128)")]),
            // Passes that are about as many as blocks may be more.
            (w13(&MIXTRAL_8X7B, 1, 64), &[(4096, "sharedprefill(m64)"), (8192, "sharedprefill(m128)")]),
            (w13(&GPT_OSS_20B, 1, 32), &[(8192, "sharedprefill(m128)")]),
            (w2(&MIXTRAL_8X7B, 2, 64), &[(512, "sharedprefill(m64)"), (8192, "sharedprefill(m64)")]),
            // Ranks for which `decode` has no room.
            (w13(&QWEN3_30B, 2, 192), &[(16, "prefill(m64)")]),
        ];
        for (projection, forms) in cases {
            for (tokens, expected) in *forms {
                let form = form(projection, *tokens, false, &DeviceLimits::H100);
                assert_eq!(form, *expected, "{tokens} tokens of {projection:?}");
            }
        }
    }

    #[test]
    fn with_fast_memory_decode_is_the_form_of_more_calls() {
        let cases: &[(Projection, usize, [&str; 2])] = &[
            (w13(&QWEN3_30B, 2, 64), 80, ["prefill(m64)", "decode"]),
            (w13(&QWEN3_30B, 2, 64), 128, ["prefill(m64)", "decode"]),
            (w13(&QWEN3_30B, 2, 64), 192, ["prefill(m64)"; 2]),
            (w13(&QWEN3_30B, 2, 32), 128, ["prefill(m64)", "decode"]),
            (w13(&GPT_OSS_20B, 4, 32), 192, ["prefill(m64)", "decode"]),
        ];
        for (projection, tokens, expected) in cases {
            let forms = [&DeviceLimits::H100, &DeviceLimits::H200]
                .map(|limits| form(projection, *tokens, false, limits));
            assert_eq!(forms, *expected, "{tokens} tokens of {projection:?}");
        }
    }

    #[test]
    fn with_ranks_of_the_slots_own_decode_is_the_form_of_more_calls() {
        for (tokens, expected) in [(80, ["prefill(m64)", "decode"]), (192, ["prefill(m64)"; 2])] {
            let projection = w13(&QWEN3_30B, 2, 128);
            let forms = [false, true].map(|ranked| form(&projection, tokens, ranked, &DeviceLimits::H100));
            assert_eq!(forms, expected, "{tokens} tokens");
        }
    }

    #[test]
    fn the_fastest_cluster_is_planned() {
        let cases: &[(Projection, &[(usize, u32)])] = &[
            (w13(&QWEN3_30B, 2, 64), &[(1, 8), (2, 8), (4, 8), (6, 8), (16, 8), (24, 8)]),
            (w13(&QWEN3_30B, 2, 16), &[(1, 4), (4, 2), (16, 2), (32, 2)]),
            (w2(&QWEN3_30B, 2, 64), &[(1, 8), (4, 4), (8, 4), (48, 8)]),
            (w2(&QWEN3_30B, 2, 16), &[(16, 2)]),
            (w13(&GPT_OSS_20B, 4, 32), &[(1, 8), (24, 8), (48, 8)]),
            (w13(&MIXTRAL_8X7B, 2, 16), &[(4, 8)]),
        ];
        for (projection, clusters) in cases {
            for (tokens, expected) in *clusters {
                let plan = plan(projection, *tokens, false, &DeviceLimits::H200);
                assert_eq!(plan.form(), Form::Decode);
                let cluster = plan.launches().map(|launch| launch.cluster).max().expect("a launch");
                assert_eq!(cluster, *expected, "{tokens} tokens of {projection:?}");
            }
        }
    }
}
