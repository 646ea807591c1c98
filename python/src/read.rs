//! The tensors of a call, read and checked one by one: `x`, `out`, and what goes with them.

use crate::fault::{Fault, Outcome};
use crate::routing::Routing;
use crate::tensor::{Dim, Exchange, List, Name, Tensor, Type};
use moe_lora::{Cuda, DType, Element, OutDims, Rows, RowsMut, SliceOrder, View, XRows};
use pyo3::prelude::*;

/// An argument that may be left out.
pub type Optional<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// What the first tensor of a call says of all: the device, and whose library's they are.
pub struct Reader<'py> {
    /// The CUDA device.
    pub ordinal: u32,
    /// How to read tensors of the first one's type.
    pub exchange: Exchange<'py>,
}

impl<'py> Reader<'py> {
    /// Reads the first tensor of a call, whose device is the call's.
    pub fn first(name: &'static str, object: &Bound<'py, PyAny>) -> Outcome<(Self, Tensor)> {
        let exchange = Exchange::new(object)?;
        let tensor = Tensor::read(Name::Whole(name), object, &exchange)?;
        Ok((Reader { ordinal: tensor.cuda()?, exchange }, tensor))
    }

    /// A tensor of the call, on the call's device.
    pub fn read(&self, name: Name, object: &Bound<'_, PyAny>) -> Outcome<Tensor> {
        let tensor = Tensor::read(name, object, &self.exchange)?;
        tensor.expect_on(self.ordinal)?;
        Ok(tensor)
    }

    /// As [`Reader::read`], for an argument that is one tensor.
    pub fn whole(&self, name: &'static str, object: &Bound<'_, PyAny>) -> Outcome<Tensor> {
        self.read(Name::Whole(name), object)
    }

    /// A contiguous tensor of this type, of any shape.
    pub fn packed(&self, name: &'static str, object: &Bound<'_, PyAny>, dtype: Type) -> Outcome<Tensor> {
        let tensor = self.whole(name, object)?;
        tensor.expect_type(&[dtype])?;
        tensor.expect_contiguous()?;
        Ok(tensor)
    }

    /// A contiguous tensor of one of these types, of this shape.
    pub fn array(
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

    /// The rows of pairs by their numbers, `[P]` or `[T, k]`.
    pub fn index(&self, name: &'static str, index: Optional<'_, '_>) -> Outcome<Option<Tensor>> {
        let index = index.map(|index| self.packed(name, index, Type::I32)).transpose()?;
        if let Some(index) = &index
            && !matches!(index.shape(), [_] | [_, _])
        {
            return Err(index.wrong_shape("[P] or [T, k]"));
        }
        Ok(index)
    }
}

/// The type of `x` or `h`, which is the type of the call.
pub fn element(tensor: &Tensor) -> Outcome<DType> {
    tensor.expect_type(&[Type::BF16, Type::F16])?;
    Ok(if tensor.dtype() == Type::BF16 { DType::Bf16 } else { DType::F16 })
}

/// `x`, as a call reads it.
pub struct Input {
    pub x: Tensor,
    stride: usize,
    index: Option<Tensor>,
}

impl Input {
    pub fn new(reader: &Reader<'_>, x: Tensor, index: Optional<'_, '_>) -> Outcome<Self> {
        Ok(Input { stride: 0, index: reader.index("x_index", index)?, x })
    }

    /// Checks it, and says what a row of `x` belongs to: by their number or, with an index, for what the
    /// planner makes of it alone.
    pub fn check(&mut self, tokens: usize, top_k: usize, width: usize) -> Outcome<XRows> {
        let pairs = tokens * top_k;
        let rows = match *self.x.shape() {
            [rows, columns] if columns == width => Some(rows),
            _ => None,
        };
        let x_rows = match (rows, &self.index) {
            (Some(rows), Some(index)) => {
                check_index(index, pairs)?;
                if rows < pairs || top_k == 1 { XRows::Token } else { XRows::Pair }
            }
            (Some(rows), None) if rows == tokens => XRows::Token,
            (Some(rows), None) if rows == pairs => XRows::Pair,
            (_, Some(_)) => return Err(self.x.wrong_shape(format_args!("[rows, {width}]"))),
            (_, None) => {
                return Err(self.x.wrong_shape(format_args!(
                    "[{tokens}, {width}] (a row a token) or [{pairs}, {width}] (a row a pair)"
                )));
            }
        };
        self.stride = self.x.row_stride()?;
        Ok(x_rows)
    }

    /// # Safety
    /// As for [`Tensor::view`].
    pub unsafe fn rows<T: Element>(&self) -> Rows<'_, Cuda, T> {
        // SAFETY: as the caller promises; the type of the index was checked.
        unsafe { self.x.rows(self.stride, self.index.as_ref()) }
    }
}

/// Refuses an index of another number of pairs.
fn check_index(index: &Tensor, pairs: usize) -> Outcome<()> {
    if index.shape().iter().product::<usize>() == pairs {
        return Ok(());
    }
    Err(index.wrong_shape(format_args!("[{pairs}]")))
}

/// What calls take that write `out`.
pub struct Delta<'a, 'py> {
    pub out: Optional<'a, 'py>,
    pub out_index: Optional<'a, 'py>,
    pub topk_weights: Optional<'a, 'py>,
    pub mul_routed_weight: bool,
    pub accumulate: bool,
    pub offset: usize,
    pub order: &'a str,
}

/// `out`, `[T, k, ≥ offset + Σ N]`, and how the delta comes to it.
pub struct Output {
    pub out: Tensor,
    index: Option<Tensor>,
    stride: usize,
    topk_weights: Option<Tensor>,
    pub offset: usize,
    pub order: SliceOrder,
    pub accumulate: bool,
}

/// What the operator's contract calls the shape of `out`.
const OUT: [Dim; 3] = [Dim::Named("T"), Dim::Named("k"), Dim::Named("≥ offset + Σ N")];

impl Output {
    /// Reads it, and says T and k, as far as tensors of the output tell.
    pub fn read(
        reader: &Reader<'_>,
        delta: &Delta<'_, '_>,
        routing: &Routing<'_, '_>,
    ) -> Outcome<(Self, (usize, usize))> {
        let &Delta { topk_weights, mul_routed_weight, accumulate, offset, order, .. } = delta;
        let Some(out) = delta.out else {
            return Err(Fault::Argument("out: expected a tensor, got None".to_owned()));
        };
        let out = reader.whole("out", out)?;
        let index = reader.index("out_index", delta.out_index)?;
        let size = Self::size(reader, &out, index.as_ref(), routing)?;
        let (tokens, top_k) = size;
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
        let order = match order {
            "in_order" => SliceOrder::InOrder,
            "reversed" => SliceOrder::Reversed,
            "interleaved" => SliceOrder::Interleaved,
            got => {
                let expected = "in_order, reversed or interleaved";
                return Err(Fault::Argument(format!("order: expected {expected}, got {got}")));
            }
        };
        let stride = out.row_stride()?;
        Ok((Output { out, index, stride, topk_weights, offset, order, accumulate }, size))
    }

    /// T and k: what `out` says or, where an index names its rows, whoever else does.
    fn size(
        reader: &Reader<'_>,
        out: &Tensor,
        index: Option<&Tensor>,
        routing: &Routing<'_, '_>,
    ) -> Outcome<(usize, usize)> {
        let Some(index) = index else {
            return match *out.shape() {
                [tokens, top_k, _] => Ok((tokens, top_k)),
                // A layer without experts needs no k.
                [tokens, _] if routing.is_without_ids() => Ok((tokens, 1)),
                _ => Err(out.wrong_shape(List(&OUT))),
            };
        };
        if !matches!(out.shape(), [_, _] | [_, _, _]) {
            return Err(out.wrong_shape("[rows, ≥ offset + Σ N]"));
        }
        if let Some(size) = routing.size(reader)? {
            check_index(index, size.0 * size.1)?;
            return Ok(size);
        }
        match *index.shape() {
            [tokens, top_k] => Ok((tokens, top_k)),
            [pairs] if routing.is_dense() => Ok((pairs, 1)),
            _ => Err(index.wrong_shape("[T, k], as there is no topk_ids to tell T from k")),
        }
    }

    /// Checks what depends on the weights.
    pub fn check(&self, dtype: Type, out_dims: &OutDims) -> Outcome<()> {
        self.out.expect_type(&[dtype])?;
        self.order.check(out_dims)?;
        let width = out_dims.total().checked_add(self.offset);
        let width = width.ok_or_else(|| {
            Fault::Argument(format!("offset: expected a column of out, got {}", self.offset))
        })?;
        match *self.out.shape() {
            [tokens, top_k, _] => {
                self.out.expect_shape(&[Dim::Is(tokens), Dim::Is(top_k), Dim::AtLeast(width)])
            }
            [rows, _] => self.out.expect_shape(&[Dim::Is(rows), Dim::AtLeast(width)]),
            _ => unreachable!("two dimensions or three were expected"),
        }
    }

    /// # Safety
    /// As for [`Tensor::view`].
    pub unsafe fn rows<T: Element>(&self) -> RowsMut<'_, Cuda, T> {
        // SAFETY: as the caller promises; the type of the index was checked.
        unsafe { self.out.rows_mut(self.stride, self.index.as_ref()) }
    }

    /// # Safety
    /// As for [`Tensor::view`].
    pub unsafe fn weights(&self) -> Option<View<'_, Cuda, f32>> {
        // SAFETY: as the caller promises; the type was checked.
        self.topk_weights.as_ref().map(|weights| unsafe { weights.view() })
    }
}
