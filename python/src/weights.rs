//! The weights of a call: stacked tensors, or a table of each slot's own.

use crate::fault::{Fault, Outcome};
use crate::read::{Optional, Reader};
use crate::tensor::{Dim, Name, Tensor, Type};
use moe_lora::{
    AdapterEntry, Adapters, Cuda, DType, Element, Error, ExpertWeights, OutDims, Projection, ProjectionSizes,
    View, XRows,
};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

/// `a` or `b` of a projection: S tensors.
pub struct Slices {
    pub tensors: Vec<Tensor>,
    slots: usize,
    /// Size of the experts' dimension; 1 where there is none.
    experts: usize,
    /// Whether that dimension has a stride of 0: one matrix for all experts.
    is_shared: bool,
    /// Whether it was left out.
    is_flat: bool,
    /// Rows of each slice's matrix; zero past the last slice.
    rows: [usize; Projection::MAX_SLICES],
    columns: usize,
}

/// What the shapes of weights must be.
struct Shape {
    /// `[L, E or 1, rows, columns]`.
    dims: [Dim; 4],
    /// Whether each slice has a number of rows of its own.
    own_rows: bool,
    /// Whether the dimension of the experts may be left out.
    flat: bool,
}

impl Slices {
    /// Reads a tensor, or a list or tuple of them.
    fn read(
        reader: &Reader<'_>,
        name: &'static str,
        object: &Bound<'_, PyAny>,
        dtype: Type,
        shape: Shape,
    ) -> Outcome<Self> {
        let tensors = if let Ok(list) = object.cast::<PyList>() {
            list.iter().enumerate().map(|(s, item)| reader.read(Name::Slice(name, s), &item)).collect()
        } else if let Ok(tuple) = object.cast::<PyTuple>() {
            tuple.iter().enumerate().map(|(s, item)| reader.read(Name::Slice(name, s), &item)).collect()
        } else {
            reader.whole(name, object).map(|tensor| vec![tensor])
        };
        let tensors: Vec<Tensor> = tensors?;
        let (Some(first), 1..=Projection::MAX_SLICES) = (tensors.first(), tensors.len()) else {
            let (most, got) = (Projection::MAX_SLICES, tensors.len());
            return Err(Fault::Argument(format!("{name}: expected 1 to {most} slices, got {got}")));
        };
        let Shape { dims: [slots, experts, rows, columns], own_rows, flat } = shape;
        let is_flat = flat && first.shape().len() == 3;
        let (whole, without_experts) = ([slots, experts, rows, columns], [slots, rows, columns]);
        first.expect_shape(if is_flat { &without_experts } else { &whole })?;
        let is_shared = first.expect_matrices()?;
        let dims = first.shape().len();
        let mut alike = [rows; 4];
        for (alike, &size) in alike.iter_mut().zip(first.shape()) {
            *alike = Dim::Is(size);
        }
        if own_rows {
            alike[dims - 2] = rows;
        }
        for tensor in &tensors {
            tensor.expect_type(&[dtype])?;
            tensor.expect_shape(&alike[..dims])?;
            if tensor.expect_matrices()? != is_shared {
                let expected = format!(
                    "a matrix {} as {name}[0] has",
                    if is_shared { "for all experts" } else { "an expert" }
                );
                return Err(tensor.wrong_strides(expected));
            }
        }
        let (slots, experts, columns) = match *first.shape() {
            [slots, experts, _, columns] => (slots, experts, columns),
            [slots, _, columns] => (slots, 1, columns),
            _ => unreachable!("three dimensions or four were expected"),
        };
        let mut rows = [0; Projection::MAX_SLICES];
        for (rows, tensor) in rows.iter_mut().zip(&tensors) {
            *rows = tensor.shape()[dims - 2];
        }
        Ok(Slices { tensors, slots, experts, is_shared, is_flat, rows, columns })
    }

    /// # Safety
    /// As for [`Tensor::view`].
    pub unsafe fn views<T: Element>(&self) -> Vec<View<'_, Cuda, T>> {
        let matrices = self.slots * if self.is_shared { 1 } else { self.experts };
        let views = self.tensors.iter().zip(&self.rows);
        // SAFETY: as the caller promises. The matrices were found to be contiguous.
        views.map(|(tensor, rows)| unsafe { tensor.view_of(matrices * rows * self.columns) }).collect()
    }

    /// Refuses matrices of another number of experts than the layer's.
    fn experts(&self, experts: usize) -> Outcome<ExpertWeights> {
        match self.experts {
            got if got == experts && !self.is_shared => Ok(ExpertWeights::PerExpert),
            got if got == experts => Ok(ExpertWeights::Shared),
            1 if !self.is_flat => Ok(ExpertWeights::Shared),
            _ => {
                let (slots, rows, columns) = (self.slots, self.rows[0], self.columns);
                Err(self.tensors[0].wrong_shape(format_args!("[{slots}, {experts} or 1, {rows}, {columns}]")))
            }
        }
    }
}

/// The weights of a call; a half has one factor.
pub enum Weights {
    Stacked { a: Option<Slices>, b: Option<Slices> },
    Table { entries: Tensor, sizes: ProjectionSizes },
}

/// The weights as the caller gives them. The outer `None` is a factor that the call does not read.
#[derive(Clone, Copy)]
pub struct Given<'a, 'py> {
    pub a: Option<Optional<'a, 'py>>,
    pub b: Option<Optional<'a, 'py>>,
    pub table: Option<&'a Bound<'py, Table>>,
}

impl Weights {
    /// Reads what a call of k = `top_k` is given. `experts` is E, where the caller says it.
    pub fn read(
        reader: &Reader<'_>,
        given: &Given<'_, '_>,
        dtype: Type,
        top_k: usize,
        experts: Option<usize>,
    ) -> Outcome<Self> {
        let &Given { a, b, table } = given;
        if let Some(table) = table {
            return match (a.flatten(), b.flatten()) {
                (None, None) => table.get().read(reader, table, dtype, experts),
                (Some(_), _) => Err(Fault::Argument("a: expected without table, got both".to_owned())),
                (None, Some(_)) => Err(Fault::Argument("b: expected without table, got both".to_owned())),
            };
        }
        let present = |name: &str, factor: Optional<'_, '_>| match factor {
            Some(_) => Ok(()),
            None => {
                Err(Fault::Argument(format!("{name}: expected tensors where there is no table, got None")))
            }
        };
        a.map_or(Ok(()), |a| present("a", a))?;
        b.map_or(Ok(()), |b| present("b", b))?;
        // Only a layer without experts may leave their dimension out.
        let flat = top_k == 1 && experts.is_none_or(|experts| experts == 1);
        let read = |name, factor: Option<Optional<'_, '_>>, dims, own_rows| {
            let shape = Shape { dims, own_rows, flat };
            factor.flatten().map(|factor| Slices::read(reader, name, factor, dtype, shape)).transpose()
        };
        let [slots, experts, rank] = [Dim::Named("L"), Dim::Named("E or 1"), Dim::Named("R")];
        let a = read("a", a, [slots, experts, rank, Dim::Named("K")], false)?;
        let [slots, rank] = a.as_ref().map_or([slots, rank], |a| [Dim::Is(a.slots), Dim::Is(a.rows[0])]);
        let b = read("b", b, [slots, experts, Dim::Named("N"), rank], true)?;
        Ok(Weights::Stacked { a, b })
    }

    /// The sizes of the projection, on which all weights agree. A size that a half does not have is 1.
    pub fn sizes(&self, element: DType, top_k: usize, experts: Option<usize>) -> Outcome<ProjectionSizes> {
        let (a, b) = match self {
            Weights::Stacked { a, b } => (a.as_ref(), b.as_ref()),
            Weights::Table { sizes, .. } => return Ok(ProjectionSizes { top_k, ..*sizes }),
        };
        if let (Some(a), Some(b)) = (a, b)
            && a.tensors.len() != b.tensors.len()
        {
            let (expected, got) = (a.tensors.len(), b.tensors.len());
            return Err(Error::SliceCount { tensor: "b", expected, got }.into());
        }
        let (slots, max_rank) = match (a, b) {
            (Some(a), _) => (a.slots, a.rows[0]),
            (None, Some(b)) => (b.slots, b.columns),
            (None, None) => unreachable!("each half has weights"),
        };
        let of = |factor: Option<&Slices>| factor.map_or(0, |factor| factor.experts);
        let experts = experts.unwrap_or(of(a).max(of(b)));
        let weights = |slices: Option<&Slices>| match slices {
            Some(slices) => slices.experts(experts),
            None => Ok(ExpertWeights::Shared),
        };
        let out_dims = match (a, b) {
            (_, Some(b)) => OutDims::new(&b.rows[..b.tensors.len()])?,
            (Some(a), None) => OutDims::uniform(1, a.tensors.len()),
            (None, None) => unreachable!("each half has weights"),
        };
        Ok(ProjectionSizes {
            dtype: element,
            top_k,
            experts,
            slots,
            max_rank,
            in_dim: a.map_or(1, |a| a.columns),
            out_dims,
            x_rows: XRows::Token,
            a_experts: weights(a)?,
            b_experts: weights(b)?,
        })
    }

    /// Calls `work` with both factors; one that the call does not have is empty.
    ///
    /// # Safety
    /// As for [`Tensor::view`]. What a table names is there, as its maker promises.
    pub unsafe fn with<T: Element, R>(&self, work: impl FnOnce(moe_lora::Weights<'_, Cuda, T>) -> R) -> R {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Weights::Stacked { a, b } => {
                    let a = a.as_ref().map(|a| a.views()).unwrap_or_default();
                    let b = b.as_ref().map(|b| b.views()).unwrap_or_default();
                    work(moe_lora::Weights::Stacked { a: &a, b: &b })
                }
                Weights::Table { entries, sizes } => {
                    let entries = entries.view_of::<AdapterEntry>(sizes.slots * sizes.out_dims.len());
                    work(moe_lora::Weights::Table(Adapters::new(entries)))
                }
            }
        }
    }
}

/// A table of adapters as a call reads it: its entries, and the sizes that all adapters in it have.
/// `moe_lora.AdapterTable` fills it, and keeps what it names.
#[pyclass(frozen, subclass, module = "moe_lora")]
pub struct Table {
    entries: Py<PyAny>,
    sizes: ProjectionSizes,
}

#[pymethods]
impl Table {
    #[new]
    #[pyo3(signature = (
        entries, *, dtype, slots, experts, max_rank, in_dim, out_dims, shared_a=false, shared_b=false,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        entries: Py<PyAny>,
        dtype: &str,
        slots: usize,
        experts: usize,
        max_rank: usize,
        in_dim: usize,
        out_dims: Vec<usize>,
        shared_a: bool,
        shared_b: bool,
    ) -> Outcome<Self> {
        let dtype = match dtype {
            "bfloat16" => DType::Bf16,
            "float16" => DType::F16,
            got => {
                return Err(Fault::Argument(format!("dtype: expected bfloat16 or float16, got {got}")));
            }
        };
        let weights = |shared| if shared { ExpertWeights::Shared } else { ExpertWeights::PerExpert };
        let sizes = ProjectionSizes {
            dtype,
            top_k: 1,
            experts,
            slots,
            max_rank,
            in_dim,
            out_dims: OutDims::new(&out_dims)?,
            x_rows: XRows::Token,
            a_experts: weights(shared_a),
            b_experts: weights(shared_b),
        };
        Projection::new(sizes)?;
        Ok(Table { entries, sizes })
    }
}

impl Table {
    /// Bytes of an entry.
    const ENTRY: usize = size_of::<AdapterEntry>();

    fn read(
        &self,
        reader: &Reader<'_>,
        table: &Bound<'_, Self>,
        dtype: Type,
        experts: Option<usize>,
    ) -> Outcome<Weights> {
        let sizes = self.sizes;
        let expected = if sizes.dtype == DType::Bf16 { Type::BF16 } else { Type::F16 };
        if dtype != expected {
            return Err(Fault::Argument(format!("table: expected one of {dtype}, got one of {expected}")));
        }
        if let Some(got) = experts
            && got != sizes.experts
        {
            let expected = sizes.experts;
            return Err(Fault::Argument(format!("experts: expected {expected} as the table has, got {got}")));
        }
        let shape = [Dim::Is(sizes.slots), Dim::Is(sizes.out_dims.len()), Dim::Is(Self::ENTRY)];
        let entries = reader.array("table", self.entries.bind(table.py()), &[Type::U8], &shape)?;
        Ok(Weights::Table { entries, sizes })
    }
}
