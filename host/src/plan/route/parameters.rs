//! The parameter blocks of `route`, `adopt` and `align`.

use super::{RoutePlan, Step};
use crate::blocks::{Align, BlockShape, SortedTensors};
use crate::call::{Enabled, RoutingTensors, TopkIds};
use crate::plan::arguments::Arguments;
use crate::tensor::Space;
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{AdoptParams, AlignParams, Divider, RouteParams, enabled, expert_ids};

impl RoutePlan {
    /// What `route` is told, or `decode` in its place.
    pub fn route_parameters<S: Space>(
        &self,
        arguments: &Arguments<'_>,
        routing: &RoutingTensors<'_, S>,
    ) -> RouteParams {
        let RoutingTensors { ranks, expert_map, .. } = routing;
        let experts = arguments.problem.sizes().experts;
        let (adapter_enabled, enabled_kind) = flags(&routing.adapter_enabled);
        RouteParams {
            topk_ids: Global::new(routing.topk_ids.address()),
            ids_kind: kind(&routing.topk_ids),
            token_lora: Global::new(routing.token_lora.address()),
            adapter_enabled,
            enabled_kind,
            ranks: Global::new(ranks.map_or(0, |view| view.address())),
            expert_map: Global::new(expert_map.map_or(0, |view| view.address())),
            global_experts: expert_map.map_or(experts, |map| map.len()) as u32,
            ..self.kept_parameters(arguments)
        }
    }

    /// What is told of a route that was made before: where it is.
    pub fn kept_parameters(&self, arguments: &Arguments<'_>) -> RouteParams {
        let Arguments { problem, parts, .. } = arguments;
        let sizes = problem.sizes();
        let [blocks, run, window] = match self.step {
            Step::Sort(sorting) => [sorting.launch.blocks, sorting.run, sorting.window],
            Step::None | Step::Adopt(_) => [0; 3],
        };
        RouteParams {
            topk_ids: Global::NULL,
            token_lora: Global::NULL,
            adapter_enabled: Global::NULL,
            enabled_kind: enabled::ALL,
            ranks: Global::NULL,
            expert_map: Global::NULL,
            global_experts: sizes.experts as u32,
            pairs: parts.pairs,
            tiles: parts.tiles,
            counts: parts.counts,
            buckets: parts.buckets,
            exchange: parts.exchange,
            pair_count: arguments.pair_count(),
            top_k: Divider::new(sizes.top_k as u32),
            slots: sizes.slots as u32,
            experts: sizes.experts as u32,
            over_experts: Divider::new(sizes.experts as u32),
            max_rank: sizes.max_rank as u32,
            tile_rows: self.tiles.rows,
            over_tile_rows: Divider::new(self.tiles.rows),
            blocks,
            run,
            window,
            exchange_room: parts.exchange_room,
            ids_kind: expert_ids::NONE,
        }
    }

    /// What `adopt` is told.
    pub fn adopt_parameters<S: Space>(
        &self,
        arguments: &Arguments<'_>,
        sorted: &SortedTensors<'_, S>,
    ) -> AdoptParams {
        let Arguments { problem, parts, .. } = arguments;
        let sizes = problem.sizes();
        let BlockShape { block_size, max_padded, max_blocks } = sorted.shape;
        let (adapter_enabled, enabled_kind) = flags(&sorted.adapter_enabled);
        AdoptParams {
            sorted: Global::new(sorted.sorted_token_ids.address()),
            block_experts: Global::new(sorted.expert_ids.address()),
            padded_counts: Global::new(sorted.num_tokens_post_padded.address()),
            lora_ids: Global::new(sorted.lora_ids.address()),
            adapter_enabled,
            ranks: Global::new(sorted.ranks.map_or(0, |view| view.address())),
            pairs: parts.pairs,
            tiles: parts.tiles,
            counts: parts.counts,
            pair_count: arguments.pair_count(),
            slots: sizes.slots as u32,
            experts: sizes.experts as u32,
            max_rank: sizes.max_rank as u32,
            lora_count: sorted.lora_ids.len() as u32,
            block_size: block_size as u32,
            max_padded: max_padded as u32,
            max_blocks: max_blocks as u32,
            usable_blocks: sorted.shape.usable_blocks() as u32,
            most_tiles: self.tiles.most as u32,
            enabled_kind,
            reserved: 0,
        }
    }
}

/// How ids are stored.
fn kind<S: Space>(topk_ids: &TopkIds<'_, S>) -> u32 {
    match topk_ids {
        TopkIds::None => expert_ids::NONE,
        TopkIds::I32(_) => expert_ids::I32,
        TopkIds::I64(_) => expert_ids::I64,
    }
}

/// What `align` is told.
pub(crate) fn align_parameters<S: Space>(call: &Align<'_, S>) -> AlignParams {
    let &Align { experts, slots, expert_map, .. } = call;
    let BlockShape { block_size, max_padded, max_blocks } = call.shape;
    let (adapter_enabled, enabled_kind) = flags(&call.adapter_enabled);
    AlignParams {
        topk_ids: Global::new(call.topk_ids.address()),
        ids_kind: kind(&call.topk_ids),
        token_lora: Global::new(call.token_lora.address()),
        adapter_enabled,
        lora_ids: Global::new(call.lora_ids.address()),
        expert_map: Global::new(expert_map.map_or(0, |view| view.address())),
        sorted: Global::new(call.sorted_token_ids.address()),
        block_experts: Global::new(call.expert_ids.address()),
        padded_counts: Global::new(call.num_tokens_post_padded.address()),
        pair_count: call.pairs() as u32,
        top_k: Divider::new(call.top_k as u32),
        slots: slots as u32,
        experts: experts as u32,
        global_experts: expert_map.map_or(experts, |map| map.len()) as u32,
        lora_count: call.lora_ids.len() as u32,
        block_size: block_size as u32,
        max_padded: max_padded as u32,
        max_blocks: max_blocks as u32,
        enabled_kind,
    }
}

/// `adapter_enabled` as kernels take it: where, and of which kind.
fn flags<S: Space>(adapter_enabled: &Enabled<'_, S>) -> (Global<u8>, u32) {
    match adapter_enabled {
        Enabled::All => (Global::NULL, enabled::ALL),
        Enabled::U8(view) => (Global::new(view.address()), enabled::U8),
        Enabled::I32(view) => (Global::new(view.address()), enabled::I32),
    }
}
