//! Lists of cases: a few seconds' worth, a few minutes' worth, and vLLM's own.

use crate::case::{Case, Experts, Flags, Form, IdsKind, Indexed, Loras, Ranks};
use moe_lora::call::SliceOrder;
use moe_lora::dtype::DType;
use moe_lora::projection::{ExpertWeights, OutDims, XRows};

const DTYPES: [DType; 2] = [DType::Bf16, DType::F16];
const FORMS: [Form; 2] = [Form::Forward, Form::Split];

/// Every mode that a call has, each in a case that differs from `base` in little else.
fn modes(base: &Case) -> Vec<Case> {
    let base = base.clone();
    vec![
        base.clone(),
        Case { accumulate: false, ..base.clone() },
        Case { routed_weight: true, ..base.clone() },
        Case { x_rows: XRows::Pair, routed_weight: true, ..base.clone() },
        Case { a_experts: ExpertWeights::Shared, ..base.clone() },
        Case { b_experts: ExpertWeights::Shared, accumulate: false, ..base.clone() },
        Case { global_experts: Some(2 * base.experts + 1), ..base.clone() },
        Case { enabled: Flags::U8, loras: Loras::Random, ..base.clone() },
        Case { enabled: Flags::I32, loras: Loras::Random, accumulate: false, ..base.clone() },
        Case { ranks: Ranks::Mixed, ..base.clone() },
        Case { ranks: Ranks::OutOfRange, accumulate: false, ..base.clone() },
        Case { routing: Experts::Zipf, ..base.clone() },
        Case { routing: Experts::One, loras: Loras::One, ..base.clone() },
        Case { routing: Experts::OutOfRange, accumulate: false, ..base.clone() },
        Case { routing: Experts::OutOfRange, global_experts: Some(base.experts + 3), ..base.clone() },
        Case { loras: Loras::None, ..base.clone() },
        Case { loras: Loras::None, accumulate: false, ..base.clone() },
        Case { loras: Loras::OutOfRange, ..base.clone() },
        Case { block_size: Some(32), loras: Loras::Random, enabled: Flags::I32, ..base.clone() },
        Case { block_size: Some(16), routing: Experts::OutOfRange, accumulate: false, ..base.clone() },
        Case { x_padding: 8, out_padding: 8, offset: 8, ..base.clone() },
        Case { x_padding: 3, out_padding: 5, offset: 1, accumulate: false, ..base.clone() },
        Case { misaligned: true, ..base },
    ]
}

/// Forms of a call beside the plainest, each in a case that differs from `base` in little else: slices of
/// their own widths and in other orders, rows by an index, weights by address, other ids.
pub fn new_forms(base: &Case) -> Vec<Case> {
    let base = base.clone();
    let dense = Case { experts: 1, top_k: 1, loras: Loras::Random, ..base.clone() };
    let own_widths = OutDims::new(&[64, 24, 40]).expect("three slices");
    let table = Case { table: true, loras: Loras::Random, ..base.clone() };
    let permuted = Case { x_index: Indexed::Permuted, out_index: Indexed::Permuted, ..base.clone() };
    let cases = vec![
        Case { out_dims: own_widths, ..base.clone() },
        Case { out_dims: own_widths, order: SliceOrder::Reversed, accumulate: false, ..base.clone() },
        Case { order: SliceOrder::Interleaved, offset: 8, ..base.clone() },
        Case { order: SliceOrder::Interleaved, accumulate: false, ranks: Ranks::OutOfRange, ..base.clone() },
        Case { ids: IdsKind::None, out_dims: own_widths, ..dense.clone() },
        Case { ids: IdsKind::None, lora_padding: 5, accumulate: false, ..dense },
        Case { ids: IdsKind::I64, routing: Experts::OutOfRange, ..base.clone() },
        Case { ids: IdsKind::I64, global_experts: Some(base.experts + 3), ..base.clone() },
        permuted.clone(),
        Case { x_rows: XRows::Pair, accumulate: false, routed_weight: true, ..permuted },
        Case { x_index: Indexed::OutOfRange, routed_weight: true, ..base.clone() },
        Case { x_index: Indexed::OutOfRange, accumulate: false, block_size: Some(16), ..base.clone() },
        Case { out_index: Indexed::OutOfRange, out_padding: 3, ..base.clone() },
        Case { out_index: Indexed::OutOfRange, accumulate: false, block_size: Some(16), ..base.clone() },
        table.clone(),
        Case { ranks: Ranks::Mixed, accumulate: false, ..table.clone() },
        Case { a_experts: ExpertWeights::Shared, routed_weight: true, ..table.clone() },
        Case { b_experts: ExpertWeights::Shared, ranks: Ranks::OutOfRange, ..table.clone() },
        Case { out_dims: own_widths, x_index: Indexed::OutOfRange, out_index: Indexed::Permuted, ..table },
    ];
    cases
}

/// Every mode, in both forms, and both types, on a small call: seconds on a laptop.
pub fn quick_grid() -> Vec<Case> {
    let mut cases = Vec::new();
    for form in FORMS {
        for dtype in DTYPES {
            cases.extend(modes(&Case {
                form,
                dtype,
                tokens: 40,
                out_dims: OutDims::uniform(64, 2),
                ..Case::default()
            }));
        }
    }
    cases
}

/// Every mode in both forms on a small call, with one type and then the other: half of [`quick_grid`], for a
/// back end that is slow.
pub fn short_grid() -> Vec<Case> {
    let call = Case { tokens: 40, out_dims: OutDims::uniform(64, 2), ..Case::default() };
    let forms = FORMS.into_iter().enumerate();
    let cases = forms.flat_map(|(i, form)| {
        modes(&call).into_iter().zip(DTYPES.into_iter().cycle().skip(i)).map(move |(mode, dtype)| Case {
            form,
            dtype,
            ..mode
        })
    });
    cases.collect()
}

/// Every mode, in both forms and both types, on calls of many shapes: no tokens, one token, odd
/// sizes, sizes around those of tiles, many adapters, and the projections of Qwen3-30B-A3B. Minutes on a
/// laptop.
pub fn full_grid() -> Vec<Case> {
    // T, k, E, L, R, S, K, N
    const SHAPES: [[usize; 8]; 10] = [
        [0, 2, 4, 2, 16, 2, 64, 64],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 8, 32, 2, 64, 2, 256, 128],
        [3, 2, 5, 3, 7, 1, 9, 17],
        [17, 4, 9, 2, 8, 2, 72, 40],
        [33, 3, 4, 4, 33, 3, 63, 65],
        [5, 64, 64, 2, 16, 1, 64, 64],
        [130, 4, 4, 2, 32, 1, 256, 128],
        [129, 8, 16, 8, 64, 2, 136, 192],
        [30, 4, 64, 40, 8, 1, 64, 64],
    ];
    let shape = |[tokens, top_k, experts, slots, max_rank, slices, in_dim, out_dim]: [usize; 8]| Case {
        tokens,
        top_k,
        experts,
        slots,
        max_rank,
        in_dim,
        out_dims: OutDims::uniform(out_dim, slices),
        ..Case::default()
    };
    let mut cases = Vec::new();
    for form in FORMS {
        for dtype in DTYPES {
            for sizes in SHAPES {
                cases.extend(modes(&Case { form, dtype, ..shape(sizes) }));
            }
        }
    }
    for tokens in [1, 16, 80] {
        let gate_up = Case { routing: Experts::Zipf, ..shape([tokens, 8, 128, 2, 64, 2, 2048, 768]) };
        let down = Case { routing: Experts::Zipf, ..shape([tokens, 8, 128, 2, 64, 1, 768, 2048]) };
        cases.push(gate_up);
        cases.push(Case { x_rows: XRows::Pair, routed_weight: true, ..down });
    }
    cases
}

/// The grid of vLLM's own test of its fused MoE-LoRA operator (`tests/lora/test_fused_moe_lora_kernel.py`):
/// all 72 combinations of its parameters.
pub fn vllm_grid() -> Vec<Case> {
    let mut cases = Vec::new();
    for top_k in [6, 12] {
        for slots in [4, 6, 16] {
            for max_rank in [16, 32, 64] {
                for slices in [1, 2] {
                    for dtype in DTYPES {
                        cases.push(Case {
                            dtype,
                            tokens: 100,
                            top_k,
                            experts: 64,
                            slots,
                            max_rank,
                            in_dim: 2048,
                            out_dims: OutDims::uniform(1408, slices),
                            seed: cases.len() as u64,
                            ..Case::default()
                        });
                    }
                }
            }
        }
    }
    cases
}
