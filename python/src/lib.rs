//! `moe_lora._native`: the operator on Python's tensors.
//!
//! Data walks in one direction: Python's objects become [`tensor::Tensor`]s, which know their names; [`call`]
//! checks their shapes against one another and makes the library's call of them; [`place`] finds the device, the
//! stream and the workspace that it runs on. `moe_lora/_native.pyi` documents every function for its users.
//!
//! The GIL is kept throughout: a call takes microseconds, most of them in the driver, and giving the GIL up and
//! taking it back costs as much as it would lend to another thread.

mod call;
mod fault;
mod place;
mod tensor;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    use crate::call::{self, Arguments, Delta};
    use crate::fault::Outcome;
    #[pymodule_export]
    use crate::place::Workspace;
    use pyo3::prelude::*;

    type Object<'a, 'py> = &'a Bound<'py, PyAny>;
    type Optional<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

    #[pyfunction]
    #[pyo3(signature = (
        topk_ids, token_lora, *, experts, slots, max_rank, adapter_enabled=None, ranks=None, expert_map=None,
        workspace=None, stream=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn route<'py>(
        topk_ids: Object<'_, 'py>,
        token_lora: Object<'_, 'py>,
        experts: usize,
        slots: usize,
        max_rank: usize,
        adapter_enabled: Optional<'_, 'py>,
        ranks: Optional<'_, 'py>,
        expert_map: Optional<'_, 'py>,
        workspace: Option<&Bound<'py, Workspace>>,
        stream: Optional<'_, 'py>,
    ) -> Outcome<()> {
        let (ids, lora) = (Some(topk_ids), Some(token_lora));
        let arguments = Arguments {
            topk_ids: ids,
            token_lora: lora,
            adapter_enabled,
            ranks,
            expert_map,
            experts: Some(experts),
            workspace,
            stream,
        };
        call::route(topk_ids, slots, max_rank, experts, &arguments)
    }

    #[pyfunction]
    #[pyo3(signature = (
        x, a, b, topk_ids, token_lora, out, *, topk_weights=None, adapter_enabled=None, ranks=None,
        expert_map=None, mul_routed_weight=false, accumulate=true, offset=0, experts=None, workspace=None,
        stream=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn forward<'py>(
        x: Object<'_, 'py>,
        a: Object<'_, 'py>,
        b: Object<'_, 'py>,
        topk_ids: Optional<'_, 'py>,
        token_lora: Optional<'_, 'py>,
        out: Object<'_, 'py>,
        topk_weights: Optional<'_, 'py>,
        adapter_enabled: Optional<'_, 'py>,
        ranks: Optional<'_, 'py>,
        expert_map: Optional<'_, 'py>,
        mul_routed_weight: bool,
        accumulate: bool,
        offset: usize,
        experts: Option<usize>,
        workspace: Option<&Bound<'py, Workspace>>,
        stream: Optional<'_, 'py>,
    ) -> Outcome<()> {
        let delta = Delta { out, topk_weights, mul_routed_weight, accumulate, offset };
        let arguments = Arguments {
            topk_ids,
            token_lora,
            adapter_enabled,
            ranks,
            expert_map,
            experts,
            workspace,
            stream,
        };
        call::forward(x, a, b, &delta, &arguments)
    }

    #[pyfunction]
    #[pyo3(signature = (
        x, a, topk_ids, token_lora, h, *, adapter_enabled=None, ranks=None, expert_map=None, experts=None,
        workspace=None, stream=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn shrink<'py>(
        x: Object<'_, 'py>,
        a: Object<'_, 'py>,
        topk_ids: Optional<'_, 'py>,
        token_lora: Optional<'_, 'py>,
        h: Object<'_, 'py>,
        adapter_enabled: Optional<'_, 'py>,
        ranks: Optional<'_, 'py>,
        expert_map: Optional<'_, 'py>,
        experts: Option<usize>,
        workspace: Option<&Bound<'py, Workspace>>,
        stream: Optional<'_, 'py>,
    ) -> Outcome<()> {
        let arguments = Arguments {
            topk_ids,
            token_lora,
            adapter_enabled,
            ranks,
            expert_map,
            experts,
            workspace,
            stream,
        };
        call::shrink(x, a, h, &arguments)
    }

    #[pyfunction]
    #[pyo3(signature = (
        h, b, topk_ids, token_lora, out, *, topk_weights=None, adapter_enabled=None, ranks=None, expert_map=None,
        mul_routed_weight=false, accumulate=true, offset=0, experts=None, workspace=None, stream=None,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn expand<'py>(
        h: Object<'_, 'py>,
        b: Object<'_, 'py>,
        topk_ids: Optional<'_, 'py>,
        token_lora: Optional<'_, 'py>,
        out: Object<'_, 'py>,
        topk_weights: Optional<'_, 'py>,
        adapter_enabled: Optional<'_, 'py>,
        ranks: Optional<'_, 'py>,
        expert_map: Optional<'_, 'py>,
        mul_routed_weight: bool,
        accumulate: bool,
        offset: usize,
        experts: Option<usize>,
        workspace: Option<&Bound<'py, Workspace>>,
        stream: Optional<'_, 'py>,
    ) -> Outcome<()> {
        let delta = Delta { out, topk_weights, mul_routed_weight, accumulate, offset };
        let arguments = Arguments {
            topk_ids,
            token_lora,
            adapter_enabled,
            ranks,
            expert_map,
            experts,
            workspace,
            stream,
        };
        call::expand(h, b, &delta, &arguments)
    }

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
