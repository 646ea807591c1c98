//! Plans for devices that none of this has run on: every kernel that is planned is in their modules, and
//! every launch has room.

use super::*;
use crate::dtype::DType;
use crate::projection::{ExpertWeights, OutDims, ProjectionSizes, XRows};
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora_kernels::align;

/// A device, and the compute capability, times ten, of the module that it loads.
struct Chip {
    name: &'static str,
    capability: u32,
    limits: DeviceLimits,
}

/// The shared memory of a block is what NVIDIA's tables say; clusters are as many as fill the
/// multiprocessors, one block of `decode` each on the latter, which counts as two.
const CHIPS: [Chip; 2] = [
    Chip {
        name: "B200",
        capability: 100,
        limits: DeviceLimits {
            multiprocessors: 148,
            shared_bytes: 227 << 10,
            decode_clusters: [296, 148, 72, 36],
            wgmma: false,
            memory_rate: 8_000_000,
        },
    },
    Chip {
        name: "RTX 5090",
        capability: 120,
        limits: DeviceLimits {
            multiprocessors: 170,
            shared_bytes: 99 << 10,
            decode_clusters: [340, 170, 84, 42],
            wgmma: false,
            memory_rate: 1_792_000,
        },
    },
];

/// K, N of w13, experts, and choices of: Qwen3-30B-A3B, OLMoE-1B-7B, gpt-oss-20b, Mixtral-8x7B, and a small
/// one.
const MODELS: [[usize; 4]; 5] =
    [[2048, 768, 128, 8], [2048, 1024, 64, 8], [2880, 2880, 32, 4], [4096, 14336, 8, 2], [64, 32, 4, 1]];

fn projections() -> impl Iterator<Item = Projection> {
    let sizes = |[hidden, inner, experts, top_k]: [usize; 4], is_w2: bool, max_rank, slots| ProjectionSizes {
        dtype: DType::Bf16,
        x_rows: if is_w2 { XRows::Pair } else { XRows::Token },
        a_experts: ExpertWeights::PerExpert,
        b_experts: ExpertWeights::PerExpert,
        top_k,
        max_rank,
        experts,
        slots,
        in_dim: if is_w2 { inner } else { hidden },
        out_dims: OutDims::uniform(if is_w2 { hidden } else { inner }, if is_w2 { 1 } else { 2 }),
    };
    let each = move |model| {
        [false, true].into_iter().flat_map(move |is_w2| {
            [8, 16, 32, 64, 96, 128, 192, 256, 512].into_iter().flat_map(move |rank| {
                [1, 2, 8].into_iter().map(move |slots| {
                    Projection::new(sizes(model, is_w2, rank, slots)).expect("sizes as models have them")
                })
            })
        })
    };
    MODELS.into_iter().flat_map(each)
}

fn plan(
    projection: &Projection,
    tokens: usize,
    stage: Stage,
    route: RouteSource,
    options: &Options,
    chip: &Chip,
) -> Plan {
    let layout = Layout::packed(projection, tokens);
    let plan = Plan::new(projection, &layout, stage, route, &chip.limits, options);
    let plan = plan.expect("no size is too large").expect("there are tokens");
    // Among others, that each launch fits the shared memory.
    promises::hold(projection, &layout, &chip.limits, &plan);
    plan
}

/// What plans for a chip promise beside what any does.
fn hold(plan: &Plan, what: &str, chip: &Chip) {
    let Chip { name, capability, limits } = chip;
    assert!(!matches!(plan.work, Work::Prefill(_)), "{name}, {what}: wgmma is Hopper's alone\n{plan}");
    for Launch { entry, .. } in plan.each_launch() {
        assert!(entry.is_on(*capability), "{name}, {what}: {} is in no module of it", entry.name);
    }
    if let Work::Decode(DecodePlan { launch: Launch { entry, blocks, shared_bytes, .. }, .. }) = plan.work {
        // All of its blocks run at a time: as many a multiprocessor as there are registers and memory for.
        let fit = (1..=entry.min_blocks_on(*capability))
            .rev()
            .find(|fit| shared_bytes <= limits.shared_bytes_of(*fit));
        let most = limits.multiprocessors * fit.expect("one fits");
        assert!(blocks <= most, "{name}, {what}: {blocks} blocks of {most}\n{plan}");
    }
}

#[test]
fn every_launch_has_room_and_a_kernel() {
    let mut decoded = [0; CHIPS.len()];
    for projection in projections() {
        for tokens in [1, 3, 16, 80, 128, 500, 1024, 4096, 16384] {
            for (chip, decoded) in CHIPS.iter().zip(&mut decoded) {
                for options in Options::every() {
                    let what = format!("{tokens} tokens of {projection:?} as {}", options.name(chip.name));
                    let plan = plan(&projection, tokens, Stage::Forward, RouteSource::Made, &options, chip);
                    hold(&plan, &what, chip);
                    *decoded += u32::from(plan.form() == Form::Decode);
                }
                for stage in [Stage::Route, Stage::Forward, Stage::Shrink, Stage::Expand] {
                    for tile_rows in [8, 16, 64, 128] {
                        let routes = [
                            RouteSource::Kept { tile_rows, ranked: false },
                            RouteSource::Sorted { tile_rows },
                        ];
                        for route in routes {
                            let what = format!("{stage:?} of {tokens} tokens of {projection:?}, {route:?}");
                            let plan = plan(&projection, tokens, stage, route, &Options::default(), chip);
                            hold(&plan, &what, chip);
                        }
                    }
                }
            }
        }
    }
    assert!(decoded.iter().all(|plans| *plans > 0), "{decoded:?}");
}

#[test]
fn decode_is_planned_where_shared_memory_has_room() {
    let planned = |rank, chip| {
        let [hidden, inner, experts, top_k] = MODELS[0];
        let sizes = ProjectionSizes {
            dtype: DType::Bf16,
            x_rows: XRows::Token,
            a_experts: ExpertWeights::PerExpert,
            b_experts: ExpertWeights::PerExpert,
            top_k,
            max_rank: rank,
            experts,
            slots: 2,
            in_dim: hidden,
            out_dims: OutDims::uniform(inner, 2),
        };
        let projection = Projection::new(sizes).expect("sizes as a model has them");
        let plan = plan(&projection, 4, Stage::Forward, RouteSource::Made, &Options::default(), chip);
        plan.form() == Form::Decode
    };
    let [b200, rtx_5090] = &CHIPS;
    for (rank, expected) in [(16, [true, true]), (64, [true, false]), (128, [true, false])] {
        assert_eq!([planned(rank, b200), planned(rank, rtx_5090)], expected, "R = {rank}");
    }
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
#[test]
fn align_has_room() {
    for Chip { name, capability, limits } in &CHIPS {
        for pairs in [1, 4095, 4096, 1 << 20] {
            for experts in [1, 128, align::MAX_EXPERTS as usize] {
                let launch = super::align(pairs, experts, 8, limits).expect("no size is too large");
                assert!(launch.shared_bytes <= limits.shared_bytes, "{name}: {launch}");
                assert!(launch.entry.is_on(*capability), "{name}: {launch}");
            }
        }
    }
}
