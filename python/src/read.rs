//! The tensors of a call, read and checked one by one: weights, activations, `out` and `h`.

use crate::fault::{Fault, Outcome};
use crate::tensor::{Dim, Exchange, Name, Tensor, Type};
use moe_lora::{Cuda, DType, Element, ExpertWeights, Projection, RowsMut, View, XRows};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

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

    /// The weights of all slices, which have one shape of four dimensions: a tensor, or a list or tuple of
    /// them.
    pub fn slices(
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
}

/// The weights of a projection, `a` or `b`.
pub struct Slices {
    pub tensors: Vec<Tensor>,
    /// The shape of each.
    pub sizes: [usize; 4],
}

impl Slices {
    /// # Safety
    /// As for [`Tensor::view`].
    pub unsafe fn views<T: Element>(&self) -> Vec<View<'_, Cuda, T>> {
        // SAFETY: as the caller promises.
        self.tensors.iter().map(|tensor| unsafe { tensor.view() }).collect()
    }

    /// Refuses matrices of `got` experts where the layer has `experts`.
    pub fn experts(&self, experts: usize) -> Outcome<ExpertWeights> {
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
pub fn element(tensor: &Tensor) -> Outcome<DType> {
    tensor.expect_type(&[Type::BF16, Type::F16])?;
    Ok(if tensor.dtype() == Type::BF16 { DType::Bf16 } else { DType::F16 })
}

/// What a row of `x` belongs to, by their number.
pub fn x_rows(x: &Tensor, tokens: usize, top_k: usize, width: usize) -> Outcome<XRows> {
    match *x.shape() {
        [rows, columns] if columns == width && rows == tokens => Ok(XRows::Token),
        [rows, columns] if columns == width && rows == tokens * top_k => Ok(XRows::Pair),
        _ => Err(x.wrong_shape(format_args!(
            "[{tokens}, {width}] (a row a token) or [{}, {width}] (a row a pair)",
            tokens * top_k
        ))),
    }
}

/// What calls take that write `out`.
pub struct Delta<'a, 'py> {
    pub out: &'a Bound<'py, PyAny>,
    pub topk_weights: Optional<'a, 'py>,
    pub mul_routed_weight: bool,
    pub accumulate: bool,
    pub offset: usize,
}

/// `out`, `[T, k, ≥ offset + S·N]`, and how the delta comes to it.
pub struct Output {
    pub out: Tensor,
    pub stride: usize,
    pub topk_weights: Option<Tensor>,
    pub offset: usize,
    pub accumulate: bool,
}

impl Output {
    pub fn tokens(&self) -> usize {
        self.out.shape()[0]
    }

    pub fn top_k(&self) -> usize {
        self.out.shape()[1]
    }

    pub fn read(reader: &Reader<'_>, delta: &Delta<'_, '_>) -> Outcome<Self> {
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
    pub fn check(&self, dtype: Type, slices: usize, out_dim: usize) -> Outcome<()> {
        self.out.expect_type(&[dtype])?;
        let width = slices.checked_mul(out_dim).and_then(|width| width.checked_add(self.offset));
        let width = width.ok_or_else(|| {
            Fault::Argument(format!("offset: expected a column of out, got {}", self.offset))
        })?;
        self.out.expect_shape(&[Dim::Is(self.tokens()), Dim::Is(self.top_k()), Dim::AtLeast(width)])
    }

    /// # Safety
    /// As for [`Tensor::view`].
    pub unsafe fn rows<T: Element>(&self) -> RowsMut<'_, Cuda, T> {
        // SAFETY: as the caller promises.
        unsafe { self.out.rows_mut(self.stride) }
    }

    /// # Safety
    /// As for [`Tensor::view`].
    pub unsafe fn weights(&self) -> Option<View<'_, Cuda, f32>> {
        // SAFETY: as the caller promises; the type was checked.
        self.topk_weights.as_ref().map(|weights| unsafe { weights.view() })
    }
}
