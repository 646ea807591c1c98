//! `moe_lora._native`: the operator on Python's tensors.
//!
//! Data walks in one direction: Python's objects become [`tensor::Tensor`]s, which know their names;
//! [`read`], [`weights`] and [`routing`] check each; [`call`] and [`sort`] check them against one another and
//! make the library's call of them; [`place`] finds the device, the stream and the workspace that it runs on.
//! `moe_lora/_native.pyi` documents every function for its users.
//!
//! The GIL is kept throughout: a call takes microseconds, most of them in the driver, and giving the GIL up
//! and taking it back costs as much as it would lend to another thread.

mod call;
mod fault;
mod place;
mod read;
mod routing;
mod sort;
mod tensor;
mod weights;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    use crate::call::{self, Arguments};
    use crate::fault::Outcome;
    #[pymodule_export]
    use crate::place::Workspace;
    use crate::read::Delta;
    use crate::routing::{BlocksArgument, Routing, Tokens};
    use crate::sort::{self, Align, RouteSizes};
    use crate::weights::Given;
    #[pymodule_export]
    use crate::weights::Table;
    use moe_lora::BlockShape;
    use pyo3::prelude::*;

    type Object<'a, 'py> = &'a Bound<'py, PyAny>;
    type Optional<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

    /// Sorts the pairs of a layer by slot and expert, and keeps the result in the workspace.
    #[pyfunction]
    #[pyo3(signature = (
        topk_ids, token_lora, *, experts, slots, max_rank, adapter_enabled=None, ranks=None, expert_map=None,
        tokens=None, workspace=None, stream=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn route<'py>(
        topk_ids: Optional<'_, 'py>,
        token_lora: Optional<'_, 'py>,
        experts: usize,
        slots: usize,
        max_rank: usize,
        adapter_enabled: Optional<'_, 'py>,
        ranks: Optional<'_, 'py>,
        expert_map: Optional<'_, 'py>,
        tokens: Option<usize>,
        workspace: Option<&Bound<'py, Workspace>>,
        stream: Optional<'_, 'py>,
    ) -> Outcome<()> {
        let ids = Tokens { topk_ids, token_lora, adapter_enabled, ranks, expert_map };
        let arguments =
            Arguments { routing: Routing::Tokens(ids), experts: Some(experts), workspace, stream };
        sort::route(&ids, &RouteSizes { tokens, slots, max_rank, experts }, &arguments)
    }

    /// Adds the low-rank update of every active pair to `out`.
    #[pyfunction]
    #[pyo3(signature = (
        x, a=None, b=None, topk_ids=None, token_lora=None, out=None, *, table=None, topk_weights=None,
        adapter_enabled=None, ranks=None, expert_map=None, x_index=None, out_index=None,
        mul_routed_weight=false, accumulate=true, offset=0, order="in_order", experts=None, workspace=None,
        stream=None, blocks=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn forward<'py>(
        x: Object<'_, 'py>,
        a: Optional<'_, 'py>,
        b: Optional<'_, 'py>,
        topk_ids: Optional<'_, 'py>,
        token_lora: Optional<'_, 'py>,
        out: Optional<'_, 'py>,
        table: Option<&Bound<'py, Table>>,
        topk_weights: Optional<'_, 'py>,
        adapter_enabled: Optional<'_, 'py>,
        ranks: Optional<'_, 'py>,
        expert_map: Optional<'_, 'py>,
        x_index: Optional<'_, 'py>,
        out_index: Optional<'_, 'py>,
        mul_routed_weight: bool,
        accumulate: bool,
        offset: usize,
        order: &str,
        experts: Option<usize>,
        workspace: Option<&Bound<'py, Workspace>>,
        stream: Optional<'_, 'py>,
        blocks: Option<BlocksArgument<'py>>,
    ) -> Outcome<()> {
        let delta = Delta { out, out_index, topk_weights, mul_routed_weight, accumulate, offset, order };
        let tokens = Tokens { topk_ids, token_lora, adapter_enabled, ranks, expert_map };
        let routing = Routing::new(tokens, blocks.as_ref())?;
        let arguments = Arguments { routing, experts, workspace, stream };
        let weights = Given { a: Some(a), b: Some(b), table };
        call::forward(x, x_index, &weights, &delta, &arguments)
    }

    /// The first half of `forward`: h = a @ x.
    #[pyfunction]
    #[pyo3(signature = (
        x, a=None, topk_ids=None, token_lora=None, h=None, *, table=None, adapter_enabled=None, ranks=None,
        expert_map=None, x_index=None, experts=None, workspace=None, stream=None, blocks=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn shrink<'py>(
        x: Object<'_, 'py>,
        a: Optional<'_, 'py>,
        topk_ids: Optional<'_, 'py>,
        token_lora: Optional<'_, 'py>,
        h: Optional<'_, 'py>,
        table: Option<&Bound<'py, Table>>,
        adapter_enabled: Optional<'_, 'py>,
        ranks: Optional<'_, 'py>,
        expert_map: Optional<'_, 'py>,
        x_index: Optional<'_, 'py>,
        experts: Option<usize>,
        workspace: Option<&Bound<'py, Workspace>>,
        stream: Optional<'_, 'py>,
        blocks: Option<BlocksArgument<'py>>,
    ) -> Outcome<()> {
        let tokens = Tokens { topk_ids, token_lora, adapter_enabled, ranks, expert_map };
        let routing = Routing::new(tokens, blocks.as_ref())?;
        let arguments = Arguments { routing, experts, workspace, stream };
        call::shrink(x, x_index, &Given { a: Some(a), b: None, table }, h, &arguments)
    }

    /// The second half of `forward`: out (+)= weight * b @ h.
    #[pyfunction]
    #[pyo3(signature = (
        h, b=None, topk_ids=None, token_lora=None, out=None, *, table=None, topk_weights=None,
        adapter_enabled=None, ranks=None, expert_map=None, out_index=None, mul_routed_weight=false,
        accumulate=true, offset=0, order="in_order", experts=None, workspace=None, stream=None, blocks=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn expand<'py>(
        h: Object<'_, 'py>,
        b: Optional<'_, 'py>,
        topk_ids: Optional<'_, 'py>,
        token_lora: Optional<'_, 'py>,
        out: Optional<'_, 'py>,
        table: Option<&Bound<'py, Table>>,
        topk_weights: Optional<'_, 'py>,
        adapter_enabled: Optional<'_, 'py>,
        ranks: Optional<'_, 'py>,
        expert_map: Optional<'_, 'py>,
        out_index: Optional<'_, 'py>,
        mul_routed_weight: bool,
        accumulate: bool,
        offset: usize,
        order: &str,
        experts: Option<usize>,
        workspace: Option<&Bound<'py, Workspace>>,
        stream: Optional<'_, 'py>,
        blocks: Option<BlocksArgument<'py>>,
    ) -> Outcome<()> {
        let delta = Delta { out, out_index, topk_weights, mul_routed_weight, accumulate, offset, order };
        let tokens = Tokens { topk_ids, token_lora, adapter_enabled, ranks, expert_map };
        let routing = Routing::new(tokens, blocks.as_ref())?;
        let arguments = Arguments { routing, experts, workspace, stream };
        call::expand(h, &Given { a: None, b: Some(b), table }, &delta, &arguments)
    }

    /// Sorts pairs into blocks, as vLLM's `moe_lora_align_block_size` does.
    #[pyfunction]
    #[pyo3(signature = (
        topk_ids, token_lora_mapping, num_experts, block_size, max_loras, max_num_tokens_padded,
        max_num_m_blocks, sorted_token_ids, expert_ids, num_tokens_post_pad, adapter_enabled, lora_ids,
        expert_map=None, *, stream=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn align<'py>(
        topk_ids: Object<'_, 'py>,
        token_lora_mapping: Object<'_, 'py>,
        num_experts: usize,
        block_size: usize,
        max_loras: usize,
        max_num_tokens_padded: usize,
        max_num_m_blocks: usize,
        sorted_token_ids: Object<'_, 'py>,
        expert_ids: Object<'_, 'py>,
        num_tokens_post_pad: Object<'_, 'py>,
        adapter_enabled: Object<'_, 'py>,
        lora_ids: Object<'_, 'py>,
        expert_map: Optional<'_, 'py>,
        stream: Optional<'_, 'py>,
    ) -> Outcome<()> {
        let shape =
            BlockShape { block_size, max_padded: max_num_tokens_padded, max_blocks: max_num_m_blocks };
        let call = Align {
            topk_ids,
            token_lora_mapping,
            experts: num_experts,
            slots: max_loras,
            shape,
            sorted_token_ids,
            expert_ids,
            num_tokens_post_pad,
            adapter_enabled,
            lora_ids,
            expert_map,
        };
        sort::align(&call, stream)
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
