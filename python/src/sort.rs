//! Calls that sort pairs and multiply nothing: the route alone, and blocks in vLLM's form.

use crate::call::{Arguments, Queued, run};
use crate::fault::{Fault, Outcome};
use crate::place::{self, On, Place};
use crate::read::{Optional, Reader};
use crate::routing::{FLAGS, IDS, Source, Tokens, enabled, topk_ids};
use crate::tensor::{Dim, Type};
use moe_lora::cuda;
use moe_lora::{Backend, BlockShape, Element, Projection, Route, Routing as CallRouting};
use pyo3::prelude::*;

/// The sizes that a route depends on, beside T and k.
pub struct RouteSizes {
    /// T of a dense layer; otherwise as many as `token_lora` has elements.
    pub tokens: Option<usize>,
    pub slots: usize,
    pub max_rank: usize,
    pub experts: usize,
}

/// The routing alone.
pub fn route(ids: &Tokens<'_, '_>, sizes: &RouteSizes, arguments: &Arguments<'_, '_>) -> Outcome<()> {
    struct Call {
        tokens: usize,
        source: Source,
    }
    impl Queued for Call {
        unsafe fn run<T: Element>(
            &self,
            on: On<'_>,
            workspace: &mut cuda::Workspace,
            projection: &Projection,
        ) -> moe_lora::Result<Route> {
            // SAFETY: as the caller promises.
            match unsafe { self.source.routing(on.1)? } {
                CallRouting::Tokens(routing) => on.0.route(workspace, projection, self.tokens, routing),
                CallRouting::Sorted(_) | CallRouting::On(_) => unreachable!("routing alone is of tokens"),
            }
        }
    }
    let &RouteSizes { tokens, slots, max_rank, experts } = sizes;
    let (reader, (tokens, top_k)) = match (ids.topk_ids, ids.token_lora) {
        (Some(topk_ids), _) => {
            let (reader, ids) = Reader::first("topk_ids", topk_ids)?;
            ids.expect_shape(&[Dim::Named("T"), Dim::Named("k")])?;
            let (expected, top_k) = (ids.shape()[0], ids.shape()[1]);
            if let Some(got) = tokens
                && got != expected
            {
                let fault = format!("tokens: expected {expected} as topk_ids has, got {got}");
                return Err(Fault::Argument(fault));
            }
            (reader, (expected, top_k))
        }
        (None, Some(token_lora)) => {
            let (reader, lora) = Reader::first("token_lora", token_lora)?;
            lora.expect_shape(&[Dim::AtLeast(tokens.unwrap_or(0))])?;
            let tokens = tokens.unwrap_or(lora.shape()[0]);
            (reader, (tokens, 1))
        }
        (None, None) => return Err(Fault::Argument("token_lora: expected a tensor, got None".to_owned())),
    };
    let source = Source::read(&reader, &arguments.routing, tokens, top_k, [experts, slots])?;
    let sizes = *place::layer(top_k, experts, slots, max_rank, 1)?.sizes();
    run(&reader, arguments, sizes, tokens, false, &Call { tokens, source })
}

/// The sorting of pairs into blocks. Names and shapes are vLLM's.
pub struct Align<'a, 'py> {
    pub topk_ids: &'a Bound<'py, PyAny>,
    pub token_lora_mapping: &'a Bound<'py, PyAny>,
    pub experts: usize,
    pub slots: usize,
    pub shape: BlockShape,
    pub sorted_token_ids: &'a Bound<'py, PyAny>,
    pub expert_ids: &'a Bound<'py, PyAny>,
    pub num_tokens_post_pad: &'a Bound<'py, PyAny>,
    pub adapter_enabled: &'a Bound<'py, PyAny>,
    pub lora_ids: &'a Bound<'py, PyAny>,
    pub expert_map: Optional<'a, 'py>,
}

/// Sorts pairs into blocks.
pub fn align<'py>(call: &Align<'_, 'py>, stream: Optional<'_, 'py>) -> Outcome<()> {
    let (reader, ids) = Reader::first("topk_ids", call.topk_ids)?;
    ids.expect_type(&IDS)?;
    ids.expect_shape(&[Dim::Named("T"), Dim::Named("k")])?;
    ids.expect_contiguous()?;
    let &Align { experts, slots, shape, .. } = call;
    let (tokens, top_k) = (ids.shape()[0], ids.shape()[1]);
    let list = |name, object, least| reader.array(name, object, &[Type::I32], &[Dim::AtLeast(least)]);
    let token_lora = list("token_lora_mapping", call.token_lora_mapping, tokens)?;
    let lora_ids = list("lora_ids", call.lora_ids, 0)?;
    let expert_map = call.expert_map.map(|map| list("expert_map", map, 1)).transpose()?;
    let adapter_enabled =
        reader.array("adapter_enabled", call.adapter_enabled, &FLAGS, &[Dim::AtLeast(slots)])?;
    // Flat or in rows, as long as all of it is there: the library sees to that.
    let sorted_token_ids = reader.packed("sorted_token_ids", call.sorted_token_ids, Type::I32)?;
    let expert_ids = reader.packed("expert_ids", call.expert_ids, Type::I32)?;
    let num_tokens_post_padded = reader.packed("num_tokens_post_pad", call.num_tokens_post_pad, Type::I32)?;
    let stream = place::stream(stream, &reader)?;
    Place { ordinal: reader.ordinal, stream, workspace: None }.run_alone(|stream| {
        // SAFETY: the types were checked. The caller holds the tensors, as for the other calls.
        unsafe {
            stream.align(moe_lora::Align {
                tokens,
                top_k,
                experts,
                slots,
                shape,
                topk_ids: topk_ids(Some(&ids)),
                token_lora: token_lora.view(),
                adapter_enabled: enabled(Some(&adapter_enabled)),
                lora_ids: lora_ids.view(),
                expert_map: expert_map.as_ref().map(|map| map.view()),
                sorted_token_ids: sorted_token_ids.view_mut(),
                expert_ids: expert_ids.view_mut(),
                num_tokens_post_padded: num_tokens_post_padded.view_mut(),
            })
        }
    })
}
