//! From the tensors of a call to the library's call: every shape is checked against the others, and the sizes
//! of the projection follow from them.

use crate::fault::Outcome;
use crate::place::{self, On, Place, Workspace};
use crate::read::{Delta, Optional, Output, Reader, Slices, element, x_rows};
use crate::routing::{FLAGS, Routing, Source, Tokens, enabled};
use crate::tensor::{Dim, Tensor, Type};
use half::{bf16, f16};
use moe_lora::cuda;
use moe_lora::{
    Backend, BlockShape, Cuda, DType, Element, Error, Expand, ExpertWeights, Factor, Forward, OutDims,
    Projection, ProjectionSizes, Route, Routing as CallRouting, Shrink, SliceOrder, TopkIds, Weights, XRows,
};
use pyo3::prelude::*;

/// What all calls take: who goes where, and where it runs.
#[derive(Clone, Copy)]
pub struct Arguments<'a, 'py> {
    pub routing: Routing<'a, 'py>,
    pub experts: Option<usize>,
    pub workspace: Option<&'a Bound<'py, Workspace>>,
    pub stream: Optional<'a, 'py>,
}

/// Work that is queued for elements of a type.
trait Queued {
    /// # Safety
    /// `T` is the type of the call's tensors, which outlive what is queued.
    unsafe fn run<T: Element>(
        &self,
        on: On<'_>,
        workspace: &mut cuda::Workspace,
        projection: &Projection,
    ) -> moe_lora::Result<Route>;
}

/// Finds the place, and queues the work there.
fn run(
    reader: &Reader<'_>,
    arguments: &Arguments<'_, '_>,
    sizes: ProjectionSizes,
    tokens: usize,
    kept: bool,
    work: &impl Queued,
) -> Outcome<()> {
    let projection = Projection::new(sizes)?;
    let stream = place::stream(arguments.stream, reader)?;
    let place = Place { ordinal: reader.ordinal, stream, workspace: arguments.workspace };
    place.run(&projection, tokens, kept, |on, workspace| {
        // SAFETY: the sizes' type is that of the tensors. The caller holds them, and whatever frees their
        // memory does so in the order of the stream, as for any work that is queued on it.
        unsafe {
            match sizes.dtype {
                DType::Bf16 => work.run::<bf16>(on, workspace, &projection),
                DType::F16 => work.run::<f16>(on, workspace, &projection),
            }
        }
    })
}

/// What the first half of a call reads.
struct First {
    x: Tensor,
    a: Slices,
}

/// What the second half of a call reads and writes.
struct Second {
    b: Slices,
    output: Output,
}

/// The tensors of a call, whole or half. A half has `h` too.
enum Part {
    Forward(First, Second),
    Shrink(First, Tensor),
    Expand(Tensor, Second),
}

/// A call whose tensors were read and checked.
struct Call {
    part: Part,
    tokens: usize,
    /// Elements from one row of `x` to the next; 0 without `x`.
    x_stride: usize,
    source: Source,
}

impl Queued for Call {
    unsafe fn run<T: Element>(
        &self,
        on: On<'_>,
        workspace: &mut cuda::Workspace,
        projection: &Projection,
    ) -> moe_lora::Result<Route> {
        let &Call { ref part, tokens, x_stride, ref source } = self;
        // SAFETY: as the caller promises.
        unsafe {
            let routing = source.routing(on.1)?;
            match part {
                Part::Forward(First { x, a }, Second { b, output }) => {
                    let call = Forward::<Cuda, T> {
                        tokens,
                        routing,
                        x: x.rows(x_stride),
                        weights: Weights::Stacked { a: &a.views(), b: &b.views() },
                        topk_weights: output.weights(),
                        out: output.rows(),
                        offset: output.offset,
                        order: SliceOrder::InOrder,
                        accumulate: output.accumulate,
                    };
                    on.0.forward(workspace, projection, call)
                }
                Part::Shrink(First { x, a }, h) => {
                    let (x, h) = (x.rows(x_stride), h.view_mut());
                    let call = Shrink::<Cuda, T> { tokens, routing, x, a: Factor::Stacked(&a.views()), h };
                    on.0.shrink(workspace, projection, call)
                }
                Part::Expand(h, Second { b, output }) => {
                    let call = Expand::<Cuda, T> {
                        tokens,
                        routing,
                        h: h.view(),
                        b: Factor::Stacked(&b.views()),
                        topk_weights: output.weights(),
                        out: output.rows(),
                        offset: output.offset,
                        order: SliceOrder::InOrder,
                        accumulate: output.accumulate,
                    };
                    on.0.expand(workspace, projection, call)
                }
            }
        }
    }
}

impl Part {
    fn first(&self) -> Option<&First> {
        match self {
            Part::Forward(first, _) | Part::Shrink(first, _) => Some(first),
            Part::Expand(..) => None,
        }
    }

    /// The sizes of the projection, on which all tensors agree, and of whose type they are. A size that a
    /// half does not have is 1.
    fn sizes(
        &self,
        (dtype, element): (Type, DType),
        (tokens, top_k): (usize, usize),
        experts: Option<usize>,
    ) -> Outcome<ProjectionSizes> {
        let (first, second, h) = match self {
            Part::Forward(first, second) => (Some(first), Some(second), None),
            Part::Shrink(first, h) => (Some(first), None, Some(h)),
            Part::Expand(h, second) => (None, Some(second), Some(h)),
        };
        let (a, b) = (first.map(|first| &first.a), second.map(|second| &second.b));
        let ([slots, ..], max_rank, slices) = match (a, b) {
            (Some(a), Some(b)) if a.tensors.len() != b.tensors.len() => {
                let (expected, got) = (a.tensors.len(), b.tensors.len());
                return Err(Error::SliceCount { tensor: "b", expected, got }.into());
            }
            (Some(a), _) => (a.sizes, a.sizes[2], a.tensors.len()),
            (None, Some(b)) => (b.sizes, b.sizes[3], b.tensors.len()),
            (None, None) => unreachable!("each half has weights"),
        };
        let (a_experts, in_dim) = a.map_or((0, 1), |a| (a.sizes[1], a.sizes[3]));
        let (b_experts, out_dim) = b.map_or((0, 1), |b| (b.sizes[1], b.sizes[2]));
        if let Some(h) = h {
            check_h(h, dtype, slices, max_rank)?;
        }
        if let Some(Second { output, .. }) = second {
            output.check(dtype, slices, out_dim)?;
        }
        let experts = experts.unwrap_or(a_experts.max(b_experts));
        let weights = |slices: Option<&Slices>| match slices {
            Some(slices) => slices.experts(experts),
            None => Ok(ExpertWeights::Shared),
        };
        Ok(ProjectionSizes {
            dtype: element,
            top_k,
            experts,
            slots,
            max_rank,
            in_dim,
            out_dims: OutDims::uniform(out_dim, slices),
            x_rows: first.map_or(Ok(XRows::Token), |first| x_rows(&first.x, tokens, top_k, in_dim))?,
            a_experts: weights(a)?,
            b_experts: weights(b)?,
        })
    }
}

/// Reads `a`, S tensors `[L, E or 1, R, K]`.
fn read_a(reader: &Reader<'_>, a: &Bound<'_, PyAny>, dtype: Type) -> Outcome<Slices> {
    let shape = [Dim::Named("L"), Dim::Named("E or 1"), Dim::Named("R"), Dim::Named("K")];
    reader.slices("a", a, dtype, shape)
}

/// Reads `b`, S tensors `[L, E or 1, N, R]`.
fn read_b(reader: &Reader<'_>, b: &Bound<'_, PyAny>, dtype: Type, slots: Dim, rank: Dim) -> Outcome<Slices> {
    reader.slices("b", b, dtype, [slots, Dim::Named("E or 1"), Dim::Named("N"), rank])
}

/// Checks the tensors of a call against one another, and queues it.
fn queue(
    reader: &Reader<'_>,
    part: Part,
    types: (Type, DType),
    (tokens, top_k): (usize, usize),
    arguments: &Arguments<'_, '_>,
) -> Outcome<()> {
    let sizes = part.sizes(types, (tokens, top_k), arguments.experts)?;
    let source = Source::read(reader, &arguments.routing, tokens, top_k, sizes.slots)?;
    let kept = source.is_kept();
    let x_stride = part.first().map_or(Ok(0), |first| first.x.row_stride())?;
    run(reader, arguments, sizes, tokens, kept, &Call { part, tokens, x_stride, source })
}

/// The tokens and choices that the pairs of `h`, `[S, T, k, R]` or `[S, P, R]`, stand for. The shorter form
/// says only how many pairs there are, so `topk_ids` must say the rest.
fn tokens_of(reader: &Reader<'_>, h: &Tensor, arguments: &Arguments<'_, '_>) -> Outcome<(usize, usize)> {
    match *h.shape() {
        [_, tokens, top_k, _] => Ok((tokens, top_k)),
        [_, pairs, _] => {
            let Routing::Tokens(Tokens { topk_ids: Some(topk_ids), .. }) = arguments.routing else {
                return Err(h.wrong_shape("[S, T, k, R], as there is no topk_ids to tell T from k"));
            };
            match *reader.whole("topk_ids", topk_ids)?.shape() {
                [tokens, top_k] if tokens * top_k == pairs => Ok((tokens, top_k)),
                [tokens, top_k] => Err(h.wrong_shape(format_args!("[S, {}, R]", tokens * top_k))),
                _ => Err(h.wrong_shape("[S, T, k, R]")),
            }
        }
        _ => Err(h.wrong_shape("[S, T, k, R] or [S, P, R]")),
    }
}

/// Checks `h` against the sizes of the projection.
fn check_h(h: &Tensor, dtype: Type, slices: usize, max_rank: usize) -> Outcome<()> {
    h.expect_type(&[dtype])?;
    let mut expected = h.shape().iter().map(|&size| Dim::Is(size)).collect::<Vec<_>>();
    expected[0] = Dim::Is(slices);
    *expected.last_mut().expect("it has three dimensions or four") = Dim::Is(max_rank);
    h.expect_shape(&expected)?;
    h.expect_contiguous()
}

/// A whole call.
pub fn forward<'py>(
    x: &Bound<'py, PyAny>,
    a: &Bound<'py, PyAny>,
    b: &Bound<'py, PyAny>,
    delta: &Delta<'_, 'py>,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
    let (reader, x) = Reader::first("x", x)?;
    let types = (x.dtype(), element(&x)?);
    let output = Output::read(&reader, delta)?;
    let size = (output.tokens(), output.top_k());
    let a = read_a(&reader, a, types.0)?;
    let [slots, _, max_rank, _] = a.sizes;
    let b = read_b(&reader, b, types.0, Dim::Is(slots), Dim::Is(max_rank))?;
    queue(&reader, Part::Forward(First { x, a }, Second { b, output }), types, size, arguments)
}

/// The first half of a call.
pub fn shrink<'py>(
    x: &Bound<'py, PyAny>,
    a: &Bound<'py, PyAny>,
    h: &Bound<'py, PyAny>,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
    let (reader, x) = Reader::first("x", x)?;
    let types = (x.dtype(), element(&x)?);
    let h = reader.whole("h", h)?;
    let size = tokens_of(&reader, &h, arguments)?;
    let a = read_a(&reader, a, types.0)?;
    queue(&reader, Part::Shrink(First { x, a }, h), types, size, arguments)
}

/// The second half of a call.
pub fn expand<'py>(
    h: &Bound<'py, PyAny>,
    b: &Bound<'py, PyAny>,
    delta: &Delta<'_, 'py>,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
    let (reader, h) = Reader::first("h", h)?;
    let types = (h.dtype(), element(&h)?);
    let output = Output::read(&reader, delta)?;
    let (tokens, top_k) = (output.tokens(), output.top_k());
    let b = read_b(&reader, b, types.0, Dim::Named("L"), Dim::Named("R"))?;
    match *h.shape() {
        [_, t, k, _] if (t, k) == (tokens, top_k) => {}
        [_, pairs, _] if pairs == tokens * top_k => {}
        _ => {
            let (slices, max_rank, pairs) = (b.tensors.len(), b.sizes[3], tokens * top_k);
            return Err(h.wrong_shape(format_args!(
                "[{slices}, {tokens}, {top_k}, {max_rank}] or [{slices}, {pairs}, {max_rank}]"
            )));
        }
    }
    queue(&reader, Part::Expand(h, Second { b, output }), types, (tokens, top_k), arguments)
}

/// The routing alone.
pub fn route<'py>(
    topk_ids: &Bound<'py, PyAny>,
    slots: usize,
    max_rank: usize,
    experts: usize,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
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
    let (reader, ids) = Reader::first("topk_ids", topk_ids)?;
    ids.expect_shape(&[Dim::Named("T"), Dim::Named("k")])?;
    let (tokens, top_k) = (ids.shape()[0], ids.shape()[1]);
    let source = Source::read(&reader, &arguments.routing, tokens, top_k, slots)?;
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
    let (reader, topk_ids) = Reader::first("topk_ids", call.topk_ids)?;
    topk_ids.expect_type(&[Type::I32])?;
    topk_ids.expect_shape(&[Dim::Named("T"), Dim::Named("k")])?;
    topk_ids.expect_contiguous()?;
    let &Align { experts, slots, shape, .. } = call;
    let (tokens, top_k) = (topk_ids.shape()[0], topk_ids.shape()[1]);
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
                topk_ids: TopkIds::I32(topk_ids.view()),
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
