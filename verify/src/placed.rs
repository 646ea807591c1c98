//! Tensors on a back end, between guards that must stay as they are.

use crate::data::{CaseData, FlagTensor, Operands};
use crate::fault::Fault;
use crate::own::PlacedTable;
use crate::tensor::Tensor;
use bytemuck::Pod;
use moe_lora::backend::{Backend, Buffer};
use moe_lora::call::{Enabled, RoutingTensors, TopkIds};
use moe_lora::dtype::Element;
use moe_lora::tensor::{View, ViewMut};
use std::ops::Range;

pub(crate) fn check_guards<T: Pod>(tensor: &Tensor<T>, image: &[T]) -> Result<(), Fault> {
    check_unchanged(tensor, image, 0..tensor.range().start)?;
    check_unchanged(tensor, image, tensor.range().end..image.len())
}

/// `image` must hold what the tensor was made with at `range`, byte for byte.
pub(crate) fn check_unchanged<T: Pod>(
    tensor: &Tensor<T>,
    image: &[T],
    range: Range<usize>,
) -> Result<(), Fault> {
    match first_difference(&tensor.image()[range.clone()], &image[range.clone()]) {
        None => Ok(()),
        Some(i) => Err(Fault::Touched {
            tensor: tensor.name(),
            place: tensor.place(range.start + i),
            got: hex(&image[range.start + i]),
            expected: hex(&tensor.image()[range.start + i]),
        }),
    }
}

pub(crate) fn check_same<T: Pod>(
    tensor: &Tensor<T>,
    first: &[T],
    again: &[T],
    run: &'static str,
) -> Result<(), Fault> {
    match first_difference(first, again) {
        None => Ok(()),
        Some(index) => Err(Fault::NotRepeatable { tensor: tensor.name(), place: tensor.place(index), run }),
    }
}

/// Index of the first element that differs in any byte.
fn first_difference<T: Pod>(one: &[T], other: &[T]) -> Option<usize> {
    let (one, other): (&[u8], &[u8]) = (bytemuck::cast_slice(one), bytemuck::cast_slice(other));
    if one == other {
        return None;
    }
    one.iter().zip(other).position(|(one, other)| one != other).map(|byte| byte / size_of::<T>())
}

fn hex<T: Pod>(element: &T) -> String {
    let digits = bytemuck::bytes_of(element).iter().rev().map(|byte| format!("{byte:02x}"));
    format!("0x{}", digits.collect::<String>())
}

/// What one run left: images, guards and all.
#[derive(PartialEq)]
pub(crate) struct Outputs<T> {
    pub h: Vec<T>,
    pub out: Vec<T>,
}

/// A tensor on a back end, between its guards.
pub(crate) struct Placed<'d, B: Backend, T: Pod> {
    tensor: &'d Tensor<T>,
    buffer: B::Buffer<T>,
}

impl<'d, B: Backend, T: Pod> Placed<'d, B, T> {
    pub fn new(backend: &B, tensor: &'d Tensor<T>) -> moe_lora::Result<Self> {
        Ok(Placed { tensor, buffer: backend.upload(tensor.image())? })
    }

    fn optional(backend: &B, tensor: &'d Option<Tensor<T>>) -> moe_lora::Result<Option<Self>> {
        tensor.as_ref().map(|tensor| Placed::new(backend, tensor)).transpose()
    }

    pub fn view(&self) -> View<'_, B::Space, T> {
        self.buffer.view().slice(self.tensor.range())
    }

    pub fn view_mut(&mut self) -> ViewMut<'_, B::Space, T> {
        self.buffer.view_mut().slice(self.tensor.range())
    }

    /// The elements with their guards.
    pub fn download(&self, backend: &B) -> moe_lora::Result<Vec<T>> {
        backend.download(&self.buffer)
    }

    pub fn check_unchanged(&self, backend: &B) -> Result<(), Fault> {
        let image = self.download(backend)?;
        check_unchanged(self.tensor, &image, 0..image.len())
    }
}

/// What one run of a case writes, on a back end.
pub(crate) struct Written<'d, B: Backend, T: Pod> {
    pub h: Placed<'d, B, T>,
    pub out: Placed<'d, B, T>,
}

impl<'d, B: Backend, T: Element> Written<'d, B, T> {
    pub fn new(backend: &B, data: &'d CaseData<T>) -> moe_lora::Result<Self> {
        Ok(Written { h: Placed::new(backend, &data.h)?, out: Placed::new(backend, &data.out)? })
    }

    pub fn download(&self, backend: &B) -> moe_lora::Result<Outputs<T>> {
        Ok(Outputs { h: backend.download(&self.h.buffer)?, out: backend.download(&self.out.buffer)? })
    }
}

/// `adapter_enabled` on a back end.
enum PlacedFlags<'d, B: Backend> {
    All,
    U8(Placed<'d, B, u8>),
    I32(Placed<'d, B, i32>),
}

/// `topk_ids` on a back end.
enum PlacedIds<'d, B: Backend> {
    None,
    I32(Placed<'d, B, i32>),
    I64(Placed<'d, B, i64>),
}

/// The inputs of a case on a back end.
pub(crate) struct Uploaded<'d, B: Backend, T: Element> {
    topk_ids: PlacedIds<'d, B>,
    token_lora: Placed<'d, B, i32>,
    enabled: PlacedFlags<'d, B>,
    ranks: Option<Placed<'d, B, i32>>,
    expert_map: Option<Placed<'d, B, i32>>,
    x: Placed<'d, B, T>,
    x_index: Option<Placed<'d, B, i32>>,
    out_index: Option<Placed<'d, B, i32>>,
    table: Option<PlacedTable<'d, B, T>>,
    a: Vec<Placed<'d, B, T>>,
    b: Vec<Placed<'d, B, T>>,
    topk_weights: Option<Placed<'d, B, f32>>,
}

impl<'d, B: Backend, T: Element> Uploaded<'d, B, T> {
    pub fn new(backend: &B, data: &'d CaseData<T>) -> moe_lora::Result<Self> {
        let slices = |tensors: &'d [Tensor<T>]| -> moe_lora::Result<Vec<_>> {
            tensors.iter().map(|tensor| Placed::new(backend, tensor)).collect()
        };
        Ok(Uploaded {
            topk_ids: match &data.wide_ids {
                _ if !data.has_ids() => PlacedIds::None,
                Some(ids) => PlacedIds::I64(Placed::new(backend, ids)?),
                None => PlacedIds::I32(Placed::new(backend, &data.topk_ids)?),
            },
            token_lora: Placed::new(backend, &data.token_lora)?,
            enabled: match &data.enabled {
                FlagTensor::All => PlacedFlags::All,
                FlagTensor::U8(flags) => PlacedFlags::U8(Placed::new(backend, flags)?),
                FlagTensor::I32(flags) => PlacedFlags::I32(Placed::new(backend, flags)?),
            },
            ranks: Placed::optional(backend, &data.ranks)?,
            expert_map: Placed::optional(backend, &data.expert_map)?,
            x: Placed::new(backend, &data.x)?,
            x_index: Placed::optional(backend, &data.x_index)?,
            out_index: Placed::optional(backend, &data.out_index)?,
            table: data.own.as_ref().map(|own| PlacedTable::new(backend, own)).transpose()?,
            a: slices(&data.a)?,
            b: slices(&data.b)?,
            topk_weights: Placed::optional(backend, &data.topk_weights)?,
        })
    }

    pub fn routing(&self) -> RoutingTensors<'_, B::Space> {
        RoutingTensors {
            topk_ids: match &self.topk_ids {
                PlacedIds::None => TopkIds::None,
                PlacedIds::I32(ids) => TopkIds::I32(ids.view()),
                PlacedIds::I64(ids) => TopkIds::I64(ids.view()),
            },
            token_lora: self.token_lora.view(),
            adapter_enabled: match &self.enabled {
                PlacedFlags::All => Enabled::All,
                PlacedFlags::U8(flags) => Enabled::U8(flags.view()),
                PlacedFlags::I32(flags) => Enabled::I32(flags.view()),
            },
            ranks: self.ranks.as_ref().map(Placed::view),
            expert_map: self.expert_map.as_ref().map(Placed::view),
        }
    }

    pub fn operands(&self) -> Operands<'_, B::Space, T> {
        Operands {
            routing: self.routing(),
            x: self.x.view(),
            x_index: self.x_index.as_ref().map(Placed::view),
            adapters: self.table.as_ref().map(PlacedTable::adapters),
            out_index: self.out_index.as_ref().map(Placed::view),
            a: self.a.iter().map(Placed::view).collect(),
            b: self.b.iter().map(Placed::view).collect(),
            topk_weights: self.topk_weights.as_ref().map(Placed::view),
        }
    }

    pub fn check_unchanged(&self, backend: &B) -> Result<(), Fault> {
        match &self.topk_ids {
            PlacedIds::None => {}
            PlacedIds::I32(ids) => ids.check_unchanged(backend)?,
            PlacedIds::I64(ids) => ids.check_unchanged(backend)?,
        }
        [&self.token_lora]
            .into_iter()
            .chain(&self.ranks)
            .chain(&self.expert_map)
            .chain(&self.x_index)
            .chain(&self.out_index)
            .try_for_each(|tensor| tensor.check_unchanged(backend))?;
        match &self.enabled {
            PlacedFlags::All => {}
            PlacedFlags::U8(flags) => flags.check_unchanged(backend)?,
            PlacedFlags::I32(flags) => flags.check_unchanged(backend)?,
        }
        if let Some(weights) = &self.topk_weights {
            weights.check_unchanged(backend)?;
        }
        if let Some(table) = &self.table {
            table.check_unchanged(backend)?;
        }
        let values = [&self.x].into_iter().chain(&self.a).chain(&self.b);
        values.into_iter().try_for_each(|tensor| tensor.check_unchanged(backend))
    }
}
