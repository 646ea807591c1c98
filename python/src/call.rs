//! From the tensors of a call to the library's call: every shape is checked against the others, and the sizes of
//! the projection follow from them.

use crate::fault::{Fault, Outcome};
use crate::place::{self, Place, Workspace};
use crate::tensor::{Dim, Name, Tensor, Type};
use half::{bf16, f16};
use moe_lora::cuda::{self, Queue};
use moe_lora::{
    Backend, DType, Device, Element, Enabled, Error, Expand, ExpertWeights, Forward, Projection,
    ProjectionSizes, Route, RoutingTensors, RowsMut, Shrink, View, XRows,
};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

/// An argument that may be left out.
pub type Optional<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// What all calls take: who goes where, and where it runs.
#[derive(Clone, Copy)]
pub struct Arguments<'a, 'py> {
    pub topk_ids: Optional<'a, 'py>,
    pub token_lora: Optional<'a, 'py>,
    pub adapter_enabled: Optional<'a, 'py>,
    pub ranks: Optional<'a, 'py>,
    pub expert_map: Optional<'a, 'py>,
    pub experts: Option<usize>,
    pub workspace: Option<&'a Bound<'py, Workspace>>,
    pub stream: Optional<'a, 'py>,
}

/// What calls take that write `out`.
pub struct Delta<'a, 'py> {
    pub out: &'a Bound<'py, PyAny>,
    pub topk_weights: Optional<'a, 'py>,
    pub mul_routed_weight: bool,
    pub accumulate: bool,
    pub offset: usize,
}

/// The device of a call, and where its first tensor came from.
struct Reader<'a, 'py> {
    ordinal: u32,
    first: &'a Bound<'py, PyAny>,
}

impl<'a, 'py> Reader<'a, 'py> {
    /// Reads the first tensor of a call, whose device is the call's.
    fn first(name: &'static str, object: &'a Bound<'py, PyAny>) -> Outcome<(Self, Tensor)> {
        let tensor = Tensor::read(Name::Whole(name), object)?;
        Ok((Reader { ordinal: tensor.cuda()?, first: object }, tensor))
    }

    fn read(&self, name: Name, object: &Bound<'_, PyAny>) -> Outcome<Tensor> {
        let tensor = Tensor::read(name, object)?;
        tensor.expect_on(self.ordinal)?;
        Ok(tensor)
    }

    fn whole(&self, name: &'static str, object: &Bound<'_, PyAny>) -> Outcome<Tensor> {
        self.read(Name::Whole(name), object)
    }

    /// A contiguous tensor of this type and shape.
    fn array(
        &self,
        name: &'static str,
        object: &Bound<'_, PyAny>,
        types: &[Type],
        shape: &[Dim],
    ) -> Outcome<Tensor> {
        let tensor = self.whole(name, object)?;
        tensor.expect_type(types)?;
        tensor.expect_shape(shape)?;
        tensor.expect_contiguous()?;
        Ok(tensor)
    }

    /// The weights of all slices, which have one shape of four dimensions: a tensor, or a list or tuple of them.
    fn slices(
        &self,
        name: &'static str,
        object: &Bound<'_, PyAny>,
        dtype: Type,
        shape: [Dim; 4],
    ) -> Outcome<Slices> {
        let tensors = if let Ok(list) = object.cast::<PyList>() {
            list.iter().enumerate().map(|(s, item)| self.read(Name::Slice(name, s), &item)).collect()
        } else if let Ok(tuple) = object.cast::<PyTuple>() {
            tuple.iter().enumerate().map(|(s, item)| self.read(Name::Slice(name, s), &item)).collect()
        } else {
            self.whole(name, object).map(|tensor| vec![tensor])
        };
        let tensors: Vec<Tensor> = tensors?;
        let (Some(first), 1..=Projection::MAX_SLICES) = (tensors.first(), tensors.len()) else {
            let (most, got) = (Projection::MAX_SLICES, tensors.len());
            return Err(Fault::Argument(format!("{name}: expected 1 to {most} slices, got {got}")));
        };
        first.expect_shape(&shape)?;
        let mut sizes = [0; 4];
        sizes.copy_from_slice(first.shape());
        for tensor in &tensors {
            tensor.expect_type(&[dtype])?;
            tensor.expect_shape(&sizes.map(Dim::Is))?;
            tensor.expect_contiguous()?;
        }
        Ok(Slices { tensors, sizes })
    }

    fn place<'p>(&self, arguments: &Arguments<'p, 'py>) -> Outcome<Place<'p, 'py>> {
        let stream = place::stream(arguments.stream, self.first, self.ordinal)?;
        Ok(Place { ordinal: self.ordinal, stream, workspace: arguments.workspace })
    }
}

/// The weights of a projection, `a` or `b`.
struct Slices {
    tensors: Vec<Tensor>,
    /// The shape of each.
    sizes: [usize; 4],
}

impl Slices {
    /// # Safety
    /// As for [`Tensor::view`].
    unsafe fn views<T: Element>(&self) -> Vec<View<'_, Device, T>> {
        // SAFETY: as the caller promises.
        self.tensors.iter().map(|tensor| unsafe { tensor.view() }).collect()
    }

    /// Refuses matrices of `got` experts where the layer has `experts`.
    fn experts(&self, experts: usize) -> Outcome<ExpertWeights> {
        match self.sizes[1] {
            got if got == experts => Ok(ExpertWeights::PerExpert),
            1 => Ok(ExpertWeights::Shared),
            _ => {
                let [slots, _, rows, columns] = self.sizes;
                Err(self.tensors[0].wrong_shape(format_args!("[{slots}, {experts} or 1, {rows}, {columns}]")))
            }
        }
    }
}

/// The type of `x` or `h`, which is the type of the call.
fn element(tensor: &Tensor) -> Outcome<DType> {
    tensor.expect_type(&[Type::BF16, Type::F16])?;
    Ok(if tensor.dtype() == Type::BF16 { DType::Bf16 } else { DType::F16 })
}

/// What a row of `x` belongs to, by their number.
fn x_rows(x: &Tensor, tokens: usize, top_k: usize, width: usize) -> Outcome<XRows> {
    match *x.shape() {
        [rows, columns] if columns == width && rows == tokens => Ok(XRows::Token),
        [rows, columns] if columns == width && rows == tokens * top_k => Ok(XRows::Pair),
        _ => Err(x.wrong_shape(format_args!(
            "[{tokens}, {width}] (a row a token) or [{}, {width}] (a row a pair)",
            tokens * top_k
        ))),
    }
}

/// The routing tensors of a call, or that it uses the route which the workspace keeps.
#[expect(clippy::large_enum_variant, reason = "one a call, on the stack")]
enum Source {
    Tensors {
        topk_ids: Tensor,
        token_lora: Tensor,
        adapter_enabled: Option<Tensor>,
        ranks: Option<Tensor>,
        expert_map: Option<Tensor>,
    },
    Kept,
}

impl Source {
    fn read(
        reader: &Reader<'_, '_>,
        arguments: &Arguments<'_, '_>,
        tokens: usize,
        top_k: usize,
        slots: usize,
    ) -> Outcome<Self> {
        let &Arguments { topk_ids, token_lora, adapter_enabled, ranks, expert_map, .. } = arguments;
        let (Some(topk_ids), Some(token_lora)) = (topk_ids, token_lora) else {
            let given = [
                ("topk_ids", topk_ids),
                ("token_lora", token_lora),
                ("adapter_enabled", adapter_enabled),
                ("ranks", ranks),
                ("expert_map", expert_map),
            ];
            return match given.into_iter().find(|(_, tensor)| tensor.is_some()) {
                None => Ok(Source::Kept),
                Some((name, _)) => Err(Fault::Argument(format!(
                    "{name}: expected with topk_ids and token_lora, or without both for the route that the workspace keeps"
                ))),
            };
        };
        let optional = |name, object: Optional<'_, '_>, types: &[Type], shape| {
            object.map(|object| reader.array(name, object, types, &[shape])).transpose()
        };
        Ok(Source::Tensors {
            topk_ids: reader.array("topk_ids", topk_ids, &[Type::I32], &[Dim::Is(tokens), Dim::Is(top_k)])?,
            token_lora: reader.array("token_lora", token_lora, &[Type::I32], &[Dim::Is(tokens)])?,
            adapter_enabled: optional(
                "adapter_enabled",
                adapter_enabled,
                &[Type::I32, Type::U8, Type::BOOL],
                Dim::AtLeast(slots),
            )?,
            ranks: optional("ranks", ranks, &[Type::I32], Dim::AtLeast(slots))?,
            expert_map: optional("expert_map", expert_map, &[Type::I32], Dim::AtLeast(1))?,
        })
    }

    fn is_kept(&self) -> bool {
        matches!(self, Source::Kept)
    }

    /// # Safety
    /// As for [`Tensor::view`].
    unsafe fn route(&self) -> Route<'_, Device> {
        // SAFETY: as the caller promises; the types were checked.
        unsafe {
            match self {
                Source::Kept => Route::Kept,
                Source::Tensors { topk_ids, token_lora, adapter_enabled, ranks, expert_map } => {
                    Route::From(RoutingTensors {
                        topk_ids: topk_ids.view(),
                        token_lora: token_lora.view(),
                        adapter_enabled: match adapter_enabled {
                            None => Enabled::All,
                            Some(flags) if flags.dtype() == Type::I32 => Enabled::I32(flags.view()),
                            Some(flags) => Enabled::U8(flags.view()),
                        },
                        ranks: ranks.as_ref().map(|ranks| ranks.view()),
                        expert_map: expert_map.as_ref().map(|map| map.view()),
                    })
                }
            }
        }
    }
}

/// `out`, `[T, k, ≥ offset + S·N]`, and how the delta comes to it.
struct Output {
    out: Tensor,
    stride: usize,
    topk_weights: Option<Tensor>,
    offset: usize,
    accumulate: bool,
}

impl Output {
    fn tokens(&self) -> usize {
        self.out.shape()[0]
    }

    fn top_k(&self) -> usize {
        self.out.shape()[1]
    }

    fn read(reader: &Reader<'_, '_>, delta: &Delta<'_, '_>) -> Outcome<Self> {
        let &Delta { topk_weights, mul_routed_weight, accumulate, offset, .. } = delta;
        let out = reader.whole("out", delta.out)?;
        out.expect_shape(&[Dim::Named("T"), Dim::Named("k"), Dim::Named("≥ offset + S·N")])?;
        let (tokens, top_k) = (out.shape()[0], out.shape()[1]);
        let topk_weights = match (mul_routed_weight, topk_weights) {
            (false, _) => None,
            (true, Some(weights)) => Some(reader.array(
                "topk_weights",
                weights,
                &[Type::F32],
                &[Dim::Is(tokens), Dim::Is(top_k)],
            )?),
            (true, None) => {
                return Err(Fault::Argument(format!(
                    "topk_weights: expected shape [{tokens}, {top_k}] with mul_routed_weight, got None"
                )));
            }
        };
        Ok(Output { stride: out.row_stride()?, out, topk_weights, offset, accumulate })
    }

    /// Checks what depends on the weights.
    fn check(&self, dtype: Type, slices: usize, out_dim: usize) -> Outcome<()> {
        self.out.expect_type(&[dtype])?;
        let width = slices.checked_mul(out_dim).and_then(|width| width.checked_add(self.offset));
        let width = width.ok_or_else(|| {
            Fault::Argument(format!("offset: expected a column of out, got {}", self.offset))
        })?;
        self.out.expect_shape(&[Dim::Is(self.tokens()), Dim::Is(self.top_k()), Dim::AtLeast(width)])
    }

    /// # Safety
    /// As for [`Tensor::view`].
    unsafe fn rows<T: Element>(&self) -> RowsMut<'_, Device, T> {
        // SAFETY: as the caller promises.
        unsafe { self.out.rows_mut(self.stride) }
    }

    /// # Safety
    /// As for [`Tensor::view`].
    unsafe fn weights(&self) -> Option<View<'_, Device, f32>> {
        // SAFETY: as the caller promises; the type was checked.
        self.topk_weights.as_ref().map(|weights| unsafe { weights.view() })
    }
}

/// Work that is queued for elements of a type.
trait Queued {
    /// # Safety
    /// `T` is the type of the call's tensors, which outlive what is queued.
    unsafe fn run<T: Element>(
        &self,
        queue: &Queue<'_>,
        workspace: &mut cuda::Workspace,
        projection: &Projection,
    ) -> moe_lora::Result<()>;
}

/// Finds the place, and queues the work there.
fn run(
    reader: &Reader<'_, '_>,
    arguments: &Arguments<'_, '_>,
    sizes: ProjectionSizes,
    tokens: usize,
    kept: bool,
    work: &impl Queued,
) -> Outcome<()> {
    let projection = Projection::new(sizes)?;
    reader.place(arguments)?.run(&projection, tokens, kept, |queue, workspace| {
        // SAFETY: the sizes' type is that of the tensors. The caller holds them, and whatever frees their memory
        // does so in the order of the stream, as for any work that is queued on it.
        unsafe {
            match sizes.dtype {
                DType::Bf16 => work.run::<bf16>(queue, workspace, &projection),
                DType::F16 => work.run::<f16>(queue, workspace, &projection),
            }
        }
    })
}

/// A whole call.
pub fn forward<'py>(
    x: &Bound<'py, PyAny>,
    a: &Bound<'py, PyAny>,
    b: &Bound<'py, PyAny>,
    delta: &Delta<'_, 'py>,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
    struct Call {
        x: Tensor,
        x_stride: usize,
        a: Slices,
        b: Slices,
        output: Output,
        source: Source,
    }
    impl Queued for Call {
        unsafe fn run<T: Element>(
            &self,
            queue: &Queue<'_>,
            workspace: &mut cuda::Workspace,
            projection: &Projection,
        ) -> moe_lora::Result<()> {
            let Call { x, x_stride, a, b, output, source } = self;
            // SAFETY: as the caller promises.
            unsafe {
                let call = Forward::<Device, T> {
                    tokens: output.tokens(),
                    route: source.route(),
                    x: x.rows(*x_stride),
                    a: &a.views(),
                    b: &b.views(),
                    topk_weights: output.weights(),
                    out: output.rows(),
                    offset: output.offset,
                    accumulate: output.accumulate,
                };
                queue.forward(workspace, projection, call)
            }
        }
    }
    let (reader, x) = Reader::first("x", x)?;
    let dtype = element(&x)?;
    let output = Output::read(&reader, delta)?;
    let (tokens, top_k) = (output.tokens(), output.top_k());
    let a = reader.slices(
        "a",
        a,
        x.dtype(),
        [Dim::Named("L"), Dim::Named("E or 1"), Dim::Named("R"), Dim::Named("K")],
    )?;
    let [slots, a_experts, max_rank, in_dim] = a.sizes;
    let b = reader.slices(
        "b",
        b,
        x.dtype(),
        [Dim::Is(slots), Dim::Named("E or 1"), Dim::Named("N"), Dim::Is(max_rank)],
    )?;
    let [_, b_experts, out_dim, _] = b.sizes;
    if a.tensors.len() != b.tensors.len() {
        return Err(Error::SliceCount { tensor: "b", expected: a.tensors.len(), got: b.tensors.len() }.into());
    }
    let slices = a.tensors.len();
    output.check(x.dtype(), slices, out_dim)?;
    let experts = arguments.experts.unwrap_or(a_experts.max(b_experts));
    let sizes = ProjectionSizes {
        dtype,
        top_k,
        experts,
        slots,
        max_rank,
        slices,
        in_dim,
        out_dim,
        x_rows: x_rows(&x, tokens, top_k, in_dim)?,
        a_experts: a.experts(experts)?,
        b_experts: b.experts(experts)?,
    };
    let source = Source::read(&reader, arguments, tokens, top_k, slots)?;
    let (kept, x_stride) = (source.is_kept(), x.row_stride()?);
    run(&reader, arguments, sizes, tokens, kept, &Call { x, x_stride, a, b, output, source })
}

/// The tokens and choices that the pairs of `h`, `[S, T, k, R]` or `[S, P, R]`, stand for. The shorter form says
/// only how many pairs there are, so `topk_ids` must say the rest.
fn tokens_of(h: &Tensor, arguments: &Arguments<'_, '_>) -> Outcome<(usize, usize)> {
    match *h.shape() {
        [_, tokens, top_k, _] => Ok((tokens, top_k)),
        [_, pairs, _] => {
            let Some(topk_ids) = arguments.topk_ids else {
                return Err(h.wrong_shape("[S, T, k, R], as there is no topk_ids to tell T from k"));
            };
            match *Tensor::read(Name::Whole("topk_ids"), topk_ids)?.shape() {
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

/// The first half of a call.
pub fn shrink<'py>(
    x: &Bound<'py, PyAny>,
    a: &Bound<'py, PyAny>,
    h: &Bound<'py, PyAny>,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
    struct Call {
        tokens: usize,
        x: Tensor,
        x_stride: usize,
        a: Slices,
        h: Tensor,
        source: Source,
    }
    impl Queued for Call {
        unsafe fn run<T: Element>(
            &self,
            queue: &Queue<'_>,
            workspace: &mut cuda::Workspace,
            projection: &Projection,
        ) -> moe_lora::Result<()> {
            let &Call { tokens, x_stride, .. } = self;
            // SAFETY: as the caller promises.
            unsafe {
                let (x, h) = (self.x.rows(x_stride), self.h.view_mut());
                let call =
                    Shrink::<Device, T> { tokens, route: self.source.route(), x, a: &self.a.views(), h };
                queue.shrink(workspace, projection, call)
            }
        }
    }
    let (reader, x) = Reader::first("x", x)?;
    let dtype = element(&x)?;
    let h = reader.whole("h", h)?;
    let (tokens, top_k) = tokens_of(&h, arguments)?;
    let a = reader.slices(
        "a",
        a,
        x.dtype(),
        [Dim::Named("L"), Dim::Named("E or 1"), Dim::Named("R"), Dim::Named("K")],
    )?;
    let [slots, a_experts, max_rank, in_dim] = a.sizes;
    let slices = a.tensors.len();
    check_h(&h, x.dtype(), slices, max_rank)?;
    let experts = arguments.experts.unwrap_or(a_experts);
    let sizes = ProjectionSizes {
        dtype,
        top_k,
        experts,
        slots,
        max_rank,
        slices,
        in_dim,
        out_dim: 1,
        x_rows: x_rows(&x, tokens, top_k, in_dim)?,
        a_experts: a.experts(experts)?,
        b_experts: ExpertWeights::Shared,
    };
    let source = Source::read(&reader, arguments, tokens, top_k, slots)?;
    let (kept, x_stride) = (source.is_kept(), x.row_stride()?);
    run(&reader, arguments, sizes, tokens, kept, &Call { tokens, x, x_stride, a, h, source })
}

/// The second half of a call.
pub fn expand<'py>(
    h: &Bound<'py, PyAny>,
    b: &Bound<'py, PyAny>,
    delta: &Delta<'_, 'py>,
    arguments: &Arguments<'_, 'py>,
) -> Outcome<()> {
    struct Call {
        h: Tensor,
        b: Slices,
        output: Output,
        source: Source,
    }
    impl Queued for Call {
        unsafe fn run<T: Element>(
            &self,
            queue: &Queue<'_>,
            workspace: &mut cuda::Workspace,
            projection: &Projection,
        ) -> moe_lora::Result<()> {
            let Call { h, b, output, source } = self;
            // SAFETY: as the caller promises.
            unsafe {
                let call = Expand::<Device, T> {
                    tokens: output.tokens(),
                    route: source.route(),
                    h: h.view(),
                    b: &b.views(),
                    topk_weights: output.weights(),
                    out: output.rows(),
                    offset: output.offset,
                    accumulate: output.accumulate,
                };
                queue.expand(workspace, projection, call)
            }
        }
    }
    let (reader, h) = Reader::first("h", h)?;
    let dtype = element(&h)?;
    let output = Output::read(&reader, delta)?;
    let (tokens, top_k) = (output.tokens(), output.top_k());
    let b = reader.slices(
        "b",
        b,
        h.dtype(),
        [Dim::Named("L"), Dim::Named("E or 1"), Dim::Named("N"), Dim::Named("R")],
    )?;
    let [slots, b_experts, out_dim, max_rank] = b.sizes;
    let slices = b.tensors.len();
    match *h.shape() {
        [_, t, k, _] if (t, k) == (tokens, top_k) => {}
        [_, pairs, _] if pairs == tokens * top_k => {}
        _ => {
            let pairs = tokens * top_k;
            return Err(h.wrong_shape(format_args!(
                "[{slices}, {tokens}, {top_k}, {max_rank}] or [{slices}, {pairs}, {max_rank}]"
            )));
        }
    }
    check_h(&h, h.dtype(), slices, max_rank)?;
    output.check(h.dtype(), slices, out_dim)?;
    let experts = arguments.experts.unwrap_or(b_experts);
    let sizes = ProjectionSizes {
        dtype,
        top_k,
        experts,
        slots,
        max_rank,
        slices,
        in_dim: 1,
        out_dim,
        x_rows: XRows::Token,
        a_experts: ExpertWeights::Shared,
        b_experts: b.experts(experts)?,
    };
    let source = Source::read(&reader, arguments, tokens, top_k, slots)?;
    let kept = source.is_kept();
    run(&reader, arguments, sizes, tokens, kept, &Call { h, b, output, source })
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
            queue: &Queue<'_>,
            workspace: &mut cuda::Workspace,
            projection: &Projection,
        ) -> moe_lora::Result<()> {
            // SAFETY: as the caller promises.
            match unsafe { self.source.route() } {
                Route::From(routing) => queue.route(workspace, projection, self.tokens, routing),
                Route::Kept => Ok(()),
            }
        }
    }
    let (reader, ids) = Reader::first("topk_ids", topk_ids)?;
    ids.expect_shape(&[Dim::Named("T"), Dim::Named("k")])?;
    let (tokens, top_k) = (ids.shape()[0], ids.shape()[1]);
    let source = Source::read(&reader, arguments, tokens, top_k, slots)?;
    let sizes = *place::layer(top_k, experts, slots, max_rank, 1)?.sizes();
    run(&reader, arguments, sizes, tokens, false, &Call { tokens, source })
}
