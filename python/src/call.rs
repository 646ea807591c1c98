//! From the tensors of a call to the library's call: every shape is checked against the others, and the sizes
//! of the projection follow from them.

use crate::fault::{Fault, Outcome};
use crate::place::{self, On, Place, Workspace};
use crate::read::{Delta, Input, Optional, Output, Reader, element};
use crate::routing::{Routing, Source};
use crate::tensor::{Dim, Tensor, Type};
use crate::weights::{Given, Weights};
use half::{bf16, f16};
use moe_lora::cuda;
use moe_lora::{
    Backend, Cuda, DType, Element, Expand, Forward, Projection, ProjectionSizes, Route, Shrink, XRows,
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
pub trait Queued {
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
pub fn run(
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

/// The tensors of a call, whole or half, beside its weights. A half has `h`.
enum Part {
    Forward(Input, Output),
    Shrink(Input, Tensor),
    Expand(Tensor, Output),
}

/// A call whose tensors were read and checked.
struct Call {
    part: Part,
    weights: Weights,
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
        let &Call { ref part, ref weights, tokens, ref source } = self;
        // SAFETY: as the caller promises.
        unsafe {
            let routing = source.routing(on.1)?;
            weights.with(|weights: moe_lora::Weights<'_, Cuda, T>| match part {
                Part::Forward(input, output) => {
                    let call = Forward {
                        tokens,
                        routing,
                        x: input.rows(),
                        weights,
                        topk_weights: output.weights(),
                        out: output.rows(),
                        offset: output.offset,
                        order: output.order,
                        accumulate: output.accumulate,
                    };
                    on.0.forward(workspace, projection, call)
                }
                Part::Shrink(input, h) => {
                    let call = Shrink { tokens, routing, x: input.rows(), a: weights.a(), h: h.view_mut() };
                    on.0.shrink(workspace, projection, call)
                }
                Part::Expand(h, output) => {
                    let call = Expand {
                        tokens,
                        routing,
                        h: h.view(),
                        b: weights.b(),
                        topk_weights: output.weights(),
                        out: output.rows(),
                        offset: output.offset,
                        order: output.order,
                        accumulate: output.accumulate,
                    };
                    on.0.expand(workspace, projection, call)
                }
            })
        }
    }
}

impl Part {
    /// Checks the tensors against the sizes of the weights, and says what a row of `x` belongs to.
    fn check(
        &mut self,
        dtype: Type,
        (tokens, top_k): (usize, usize),
        sizes: &ProjectionSizes,
    ) -> Outcome<XRows> {
        let (input, h, output) = match self {
            Part::Forward(input, output) => (Some(input), None, Some(output)),
            Part::Shrink(input, h) => (Some(input), Some(h), None),
            Part::Expand(h, output) => (None, Some(h), Some(output)),
        };
        if let Some(h) = h {
            check_h(h, dtype, sizes.out_dims.len(), sizes.max_rank)?;
        }
        if let Some(output) = output {
            output.check(dtype, &sizes.out_dims)?;
        }
        input.map_or(Ok(XRows::Token), |input| input.check(tokens, top_k, sizes.in_dim))
    }
}

/// Checks the tensors of a call against one another, and queues it.
fn queue(
    reader: &Reader<'_>,
    mut part: Part,
    given: &Given<'_, '_>,
    (dtype, element): (Type, DType),
    (tokens, top_k): (usize, usize),
    arguments: &Arguments<'_, '_>,
) -> Outcome<()> {
    let weights = Weights::read(reader, given, dtype, top_k, arguments.experts)?;
    let sizes = weights.sizes(element, top_k, arguments.experts)?;
    let x_rows = part.check(dtype, (tokens, top_k), &sizes)?;
    let source = Source::read(reader, &arguments.routing, tokens, top_k, [sizes.experts, sizes.slots])?;
    let kept = source.is_kept();
    let sizes = ProjectionSizes { x_rows, ..sizes };
    run(reader, arguments, sizes, tokens, kept, &Call { part, weights, tokens, source })
}

/// The tokens and choices that the pairs of `h`, `[S, T, k, R]` or `[S, P, R]`, stand for. The shorter form
/// says only how many pairs there are, so the routing must say the rest.
fn tokens_of(reader: &Reader<'_>, h: &Tensor, routing: &Routing<'_, '_>) -> Outcome<(usize, usize)> {
    match *h.shape() {
        [_, tokens, top_k, _] => Ok((tokens, top_k)),
        [_, tokens, _] if routing.is_dense() => Ok((tokens, 1)),
        [_, pairs, _] => match routing.size(reader)? {
            None => Err(h.wrong_shape("[S, T, k, R], as there is no topk_ids to tell T from k")),
            Some((tokens, top_k)) if tokens * top_k == pairs => Ok((tokens, top_k)),
            Some((tokens, top_k)) => Err(h.wrong_shape(format_args!("[S, {}, R]", tokens * top_k))),
        },
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
    x_index: Optional<'_, 'py>,
    weights: &Given<'_, 'py>,
    delta: &Delta<'_, 'py>,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
    let (reader, x) = Reader::first("x", x)?;
    let types = (x.dtype(), element(&x)?);
    let (output, size) = Output::read(&reader, delta, &arguments.routing)?;
    let input = Input::new(&reader, x, x_index)?;
    queue(&reader, Part::Forward(input, output), weights, types, size, arguments)
}

/// The first half of a call.
pub fn shrink<'py>(
    x: &Bound<'py, PyAny>,
    x_index: Optional<'_, 'py>,
    weights: &Given<'_, 'py>,
    h: Optional<'_, 'py>,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
    let (reader, x) = Reader::first("x", x)?;
    let types = (x.dtype(), element(&x)?);
    let Some(h) = h else { return Err(Fault::Argument("h: expected a tensor, got None".to_owned())) };
    let h = reader.whole("h", h)?;
    let size = tokens_of(&reader, &h, &arguments.routing)?;
    let input = Input::new(&reader, x, x_index)?;
    queue(&reader, Part::Shrink(input, h), weights, types, size, arguments)
}

/// The second half of a call.
pub fn expand<'py>(
    h: &Bound<'py, PyAny>,
    weights: &Given<'_, 'py>,
    delta: &Delta<'_, 'py>,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
    let (reader, h) = Reader::first("h", h)?;
    let types = (h.dtype(), element(&h)?);
    let (output, (tokens, top_k)) = Output::read(&reader, delta, &arguments.routing)?;
    match *h.shape() {
        [_, t, k, _] if (t, k) == (tokens, top_k) => {}
        [_, pairs, _] if pairs == tokens * top_k => {}
        _ => {
            let pairs = tokens * top_k;
            return Err(h.wrong_shape(format_args!("[S, {tokens}, {top_k}, R] or [S, {pairs}, R]")));
        }
    }
    queue(&reader, Part::Expand(h, output), weights, types, (tokens, top_k), arguments)
}
