//! Sorting pairs into blocks, as vLLM does.

use super::segments::{listed, local_expert, on};
use crate::blocks::{Align, BlockShape};
use crate::error::Result;
use crate::tensor::Host;

/// Checks and carries out a call.
pub(super) fn align(call: Align<'_, Host>) -> Result<()> {
    call.check()?;
    let BlockShape { block_size, max_padded, max_blocks } = call.shape;
    let pairs = call.pairs();
    let token_lora = call.token_lora.as_slice();
    let expert = |pair| local_expert(&call.topk_ids, &call.expert_map, pair, call.experts);
    let mut segments = vec![Vec::new(); call.slots * call.experts];
    for pair in 0..pairs {
        let slot = usize::try_from(token_lora[pair / call.top_k]).ok().filter(|&slot| slot < call.slots);
        if let (Some(slot), Some(expert)) = (slot, expert(pair)) {
            segments[slot * call.experts + expert].push(pair as i32);
        }
    }
    let listed = listed(call.lora_ids, on(&call.adapter_enabled, call.slots));
    let padded_counts = call.num_tokens_post_padded.into_slice();
    let rows = call.sorted_token_ids.into_slice().chunks_exact_mut(max_padded);
    let rows = rows.zip(call.expert_ids.into_slice().chunks_exact_mut(max_blocks));
    let rows = rows.zip(segments.chunks_exact(call.experts)).zip(padded_counts).zip(listed);
    for ((((places, experts), segments), padded), _) in rows.filter(|(_, listed)| *listed) {
        places.fill(pairs as i32);
        experts.fill(-1);
        let mut first = 0;
        for (expert, segment) in segments.iter().enumerate() {
            places[first..][..segment.len()].copy_from_slice(segment);
            let blocks = segment.len().div_ceil(block_size);
            experts[first / block_size..][..blocks].fill(expert as i32);
            first += blocks * block_size;
        }
        *padded = first as i32;
    }
    Ok(())
}
