//! The memory that a call names, and what it does with it.

use crate::blocks::{Align, SortedTensors};
use crate::call::{Enabled, Expand, Factor, Forward, Routing, RoutingTensors, Shrink, TopkIds};
use crate::cuda::memory::{Access, Memory};
use crate::error::Result;
use crate::tensor::{Cuda, Rows, RowsMut, View, ViewMut};
use std::sync::Arc;

/// Takes a tensor's name, the allocation that it lies in, and what a call does with it.
pub(super) type Visit<'v> = &'v mut dyn FnMut(&'static str, &Arc<Memory>, Access) -> Result<()>;

/// The tensors of a call.
pub(super) trait Tensors {
    /// Visits every tensor whose allocation is known.
    fn each(&self, visit: Visit<'_>) -> Result<()>;
}

fn read<T: bytemuck::Pod>(name: &'static str, view: &View<'_, Cuda, T>, visit: Visit<'_>) -> Result<()> {
    view.memory().map_or(Ok(()), |memory| visit(name, memory, Access::Read))
}

fn write<T: bytemuck::Pod>(name: &'static str, view: &ViewMut<'_, Cuda, T>, visit: Visit<'_>) -> Result<()> {
    view.memory().map_or(Ok(()), |memory| visit(name, memory, Access::Write))
}

impl Tensors for Enabled<'_, Cuda> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        match self {
            Enabled::All => Ok(()),
            Enabled::U8(flags) => read("adapter_enabled", flags, visit),
            Enabled::I32(flags) => read("adapter_enabled", flags, visit),
        }
    }
}

impl Tensors for TopkIds<'_, Cuda> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        match self {
            TopkIds::None => Ok(()),
            TopkIds::I32(ids) => read("topk_ids", ids, visit),
            TopkIds::I64(ids) => read("topk_ids", ids, visit),
        }
    }
}

impl<T: bytemuck::Pod> Tensors for (&'static str, Factor<'_, Cuda, T>) {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        let (name, factor) = self;
        match factor {
            Factor::Stacked(slices) => slices.iter().try_for_each(|slice| read(name, slice, visit)),
            // What the table names is its owner's to keep.
            Factor::Table(adapters) => read("adapters", &adapters.entries(), visit),
        }
    }
}

impl<T: bytemuck::Pod> Tensors for Rows<'_, Cuda, T> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        read("x", &self.data, visit)?;
        self.index.iter().try_for_each(|index| read("x_index", index, visit))
    }
}

impl<T: bytemuck::Pod> Tensors for RowsMut<'_, Cuda, T> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        self.index.iter().try_for_each(|index| read("out_index", index, visit))?;
        write("out", &self.data, visit)
    }
}

impl Tensors for RoutingTensors<'_, Cuda> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        let RoutingTensors { topk_ids, token_lora, adapter_enabled, ranks, expert_map } = self;
        topk_ids.each(visit)?;
        read("token_lora", token_lora, visit)?;
        adapter_enabled.each(visit)?;
        ranks.iter().try_for_each(|ranks| read("ranks", ranks, visit))?;
        expert_map.iter().try_for_each(|map| read("expert_map", map, visit))
    }
}

impl Tensors for SortedTensors<'_, Cuda> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        read("sorted_token_ids", &self.sorted_token_ids, visit)?;
        read("expert_ids", &self.expert_ids, visit)?;
        read("num_tokens_post_padded", &self.num_tokens_post_padded, visit)?;
        read("lora_ids", &self.lora_ids, visit)?;
        self.adapter_enabled.each(visit)?;
        self.ranks.iter().try_for_each(|ranks| read("ranks", ranks, visit))
    }
}

impl Tensors for Routing<'_, Cuda> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        match self {
            Routing::Tokens(tensors) => tensors.each(visit),
            Routing::Sorted(sorted) => sorted.each(visit),
            Routing::On(_) => Ok(()),
        }
    }
}

impl<T: bytemuck::Pod> Tensors for Forward<'_, Cuda, T> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        self.routing.each(visit)?;
        self.x.each(visit)?;
        ("a", self.weights.a()).each(visit)?;
        ("b", self.weights.b()).each(visit)?;
        self.topk_weights.iter().try_for_each(|weights| read("topk_weights", weights, visit))?;
        self.out.each(visit)
    }
}

impl<T: bytemuck::Pod> Tensors for Shrink<'_, Cuda, T> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        self.routing.each(visit)?;
        self.x.each(visit)?;
        ("a", self.a).each(visit)?;
        write("h", &self.h, visit)
    }
}

impl<T: bytemuck::Pod> Tensors for Expand<'_, Cuda, T> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        self.routing.each(visit)?;
        read("h", &self.h, visit)?;
        ("b", self.b).each(visit)?;
        self.topk_weights.iter().try_for_each(|weights| read("topk_weights", weights, visit))?;
        self.out.each(visit)
    }
}

impl Tensors for Align<'_, Cuda> {
    fn each(&self, visit: Visit<'_>) -> Result<()> {
        self.topk_ids.each(visit)?;
        read("token_lora", &self.token_lora, visit)?;
        self.adapter_enabled.each(visit)?;
        read("lora_ids", &self.lora_ids, visit)?;
        self.expert_map.iter().try_for_each(|map| read("expert_map", map, visit))?;
        write("sorted_token_ids", &self.sorted_token_ids, visit)?;
        write("expert_ids", &self.expert_ids, visit)?;
        write("num_tokens_post_padded", &self.num_tokens_post_padded, visit)
    }
}
