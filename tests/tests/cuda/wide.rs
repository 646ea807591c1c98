//! Tensors of more than 2³¹ elements: the calls that the i64 kernels exist for. `check` makes everything that
//! a call has no business to touch NaN, or compares it afterwards, so an offset that wraps shows.

use libtest_mimic::Failed;
use moe_lora::cuda::{Device, Options, TileKind};
use moe_lora::{OutDims, XRows};
use moe_lora_verify::{Case, Loras, check_each};

/// Just past what 31 bits count.
const PAST_31_BITS: usize = (1 << 31) + (1 << 20);

/// Checks a case with a small tile and a large one, and with the index width that the planner chooses.
fn check(device: &Device, case: &Case) -> Result<(), Failed> {
    let stream = |tile| device.new_stream_with(Options { tile: Some(tile), ..Options::default() });
    let streams = [stream(TileKind::M16)?, stream(TileKind::M64)?];
    check_each(&streams, case)?;
    Ok(())
}

/// Rows of `x`, then of `out`, so far apart that the last ones begin past 2³¹ elements.
pub fn rows_past_31_bits_are_reached(device: &Device) -> Result<(), Failed> {
    let case = Case { tokens: 260, top_k: 2, x_rows: XRows::Pair, ..Case::default() };
    let rows = case.tokens * case.top_k;
    let stride = PAST_31_BITS.div_ceil(rows - 1).next_multiple_of(8);
    check(device, &Case { x_padding: stride - case.x_stride(), ..case.clone() })?;
    check(device, &Case { out_padding: stride - case.out_stride(), ..case })
}

/// All tokens use the last slot of `a` and `b`, which lies past 2³¹ elements.
pub fn weights_past_31_bits_are_reached(device: &Device) -> Result<(), Failed> {
    let case = Case {
        tokens: 40,
        experts: 1,
        top_k: 1,
        in_dim: 16_384,
        out_dims: OutDims::uniform(16_384, 1),
        ..Case::default()
    };
    let slots = PAST_31_BITS / (case.max_rank * case.in_dim) + 1;
    check(device, &Case { slots, loras: Loras::One, ..case })
}
