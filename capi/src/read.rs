//! From what a C caller wrote to what the library takes.

use crate::abi::{
    AdapterEntry, Dtype, Expand, ExpertWeights, Forward, MOE_LORA_ACCUMULATE, MOE_LORA_MAX_SLICES,
    Projection, Routing, Shrink, SliceOrder, Tensor, TensorMut, XRows,
};
use crate::fault::Fault;
use bytemuck::Pod;
use moe_lora::{
    Adapters, Element, Enabled, Error, Factor, OutDims, Route, RoutingTensors, Rows, RowsMut, Space, TopkIds,
    View, ViewMut, Weights,
};
use std::mem::{MaybeUninit, offset_of};
use std::ptr;

const _: () = assert!(MOE_LORA_MAX_SLICES == moe_lora::Projection::MAX_SLICES);

/// A caller's table is read as the library's own.
const _: () = {
    use moe_lora::AdapterEntry as Library;
    assert!(offset_of!(AdapterEntry, rank) == offset_of!(Library, rank));
    assert!(offset_of!(AdapterEntry, max_rank) == offset_of!(Library, max_rank));
    assert!(offset_of!(AdapterEntry, scaling) == offset_of!(Library, scaling));
    assert!(offset_of!(AdapterEntry, reserved) == offset_of!(Library, reserved));
    assert!(offset_of!(AdapterEntry, a) == offset_of!(Library, a));
    assert!(offset_of!(AdapterEntry, b) == offset_of!(Library, b));
    assert!(size_of::<AdapterEntry>() == size_of::<Library>());
    assert!(align_of::<AdapterEntry>() == align_of::<Library>());
};

/// A struct that may grow: later versions add fields at its end, and their zero means what was before them.
///
/// # Safety
/// `repr(C)`, without padding; the first field is `size: usize`; every bit pattern is a value. `FIRST` is at
/// most its size.
pub unsafe trait Versioned: Copy {
    /// Its size in the first version.
    const FIRST: usize;
}

// SAFETY: integers and pointers, of 8 bytes or in pairs of 4.
unsafe impl Versioned for Projection {
    const FIRST: usize = offset_of!(Projection, out_dims);
}
// SAFETY: as above.
unsafe impl Versioned for Routing {
    const FIRST: usize = offset_of!(Routing, topk_ids_bytes);
}
// SAFETY: as above.
unsafe impl Versioned for Forward {
    const FIRST: usize = offset_of!(Forward, x_index);
}
// SAFETY: as above.
unsafe impl Versioned for Shrink {
    const FIRST: usize = offset_of!(Shrink, x_index);
}
// SAFETY: as above.
unsafe impl Versioned for Expand {
    const FIRST: usize = offset_of!(Expand, out_index);
}

/// A copy of the struct at `pointer`: of this version, of an earlier one, or of a later one that says nothing
/// new.
///
/// # Safety
/// `pointer` is null or points at a `size`, and at as many bytes as it says.
pub unsafe fn read<T: Versioned>(pointer: *const T, what: &'static str) -> Result<T, Fault> {
    if pointer.is_null() {
        return Err(Fault::NullArgument { argument: what });
    }
    let known = size_of::<T>();
    // SAFETY: `size` is the first field.
    let got = unsafe { pointer.cast::<usize>().read_unaligned() };
    let unknown = |byte| {
        // SAFETY: within the struct.
        unsafe { pointer.cast::<u8>().add(byte).read() != 0 }
    };
    if got < T::FIRST || (known..got).any(unknown) {
        let expected = if got < T::FIRST { T::FIRST } else { known };
        return Err(Fault::StructSize { what, expected, got });
    }
    // Zero is what a field means that the caller's version does not have.
    let mut read = MaybeUninit::<T>::zeroed();
    // SAFETY: there are as many bytes, and whatever they are is a value.
    unsafe {
        ptr::copy_nonoverlapping(pointer.cast::<u8>(), read.as_mut_ptr().cast::<u8>(), got.min(known));
        Ok(read.assume_init())
    }
}

impl Projection {
    /// The projection, checked.
    pub fn checked(&self) -> Result<moe_lora::Projection, Fault> {
        let experts = |field, got: i32| match got {
            _ if got == ExpertWeights::PerExpert as i32 => Ok(moe_lora::ExpertWeights::PerExpert),
            _ if got == ExpertWeights::Shared as i32 => Ok(moe_lora::ExpertWeights::Shared),
            _ => {
                Err(Fault::InvalidValue { field, expected: "1 (per expert) or 2 (shared)", got: got as i128 })
            }
        };
        let sizes = moe_lora::ProjectionSizes {
            dtype: match self.dtype {
                got if got == Dtype::Bf16 as i32 => moe_lora::DType::Bf16,
                got if got == Dtype::F16 as i32 => moe_lora::DType::F16,
                got => {
                    let (tensor, got) = ("projection.dtype".to_owned(), got.to_string());
                    let expected = "1 (bf16) or 2 (f16)";
                    return Err(moe_lora::Error::UnsupportedDType { tensor, expected, got }.into());
                }
            },
            x_rows: match self.x_rows {
                got if got == XRows::Token as i32 => moe_lora::XRows::Token,
                got if got == XRows::Pair as i32 => moe_lora::XRows::Pair,
                got => {
                    let (field, expected) = ("projection.x_rows", "1 (token) or 2 (pair)");
                    return Err(Fault::InvalidValue { field, expected, got: got as i128 });
                }
            },
            a_experts: experts("projection.a_experts", self.a_experts)?,
            b_experts: experts("projection.b_experts", self.b_experts)?,
            top_k: self.top_k,
            experts: self.experts,
            slots: self.slots,
            max_rank: self.max_rank,
            in_dim: self.in_dim,
            out_dims: self.out_dims()?,
        };
        Ok(moe_lora::Projection::new(sizes)?)
    }

    /// N of each slice: its own, or the one of all.
    fn out_dims(&self) -> Result<OutDims, Fault> {
        let uniform = OutDims::uniform(self.out_dim, self.slices);
        // How many slices there are is checked with all other sizes.
        let Some((_, past)) = self.out_dims.split_at_checked(self.slices) else { return Ok(uniform) };
        if let Some(&got) = past.iter().find(|&&width| width != 0) {
            let (field, expected) = ("projection.out_dims", "0 past the last slice");
            return Err(Fault::InvalidValue { field, expected, got: got as i128 });
        }
        let mut own = self.out_dims.into_iter();
        Ok(uniform.map(|width| own.next().filter(|&own| own != 0).unwrap_or(width)))
    }
}

impl Tensor {
    fn is_left_out(&self) -> bool {
        self.data.is_null() && self.elements == 0
    }

    /// # Safety
    /// As for [`View::from_raw`].
    unsafe fn view<'a, S: Space, T: Pod>(&self) -> View<'a, S, T> {
        // SAFETY: as the caller promises.
        unsafe { View::from_raw(self.data as u64, self.elements) }
    }

    /// # Safety
    /// As for [`View::from_raw`].
    unsafe fn optional<'a, S: Space, T: Pod>(&self) -> Option<View<'a, S, T>> {
        // SAFETY: as the caller promises.
        (!self.is_left_out()).then(|| unsafe { self.view() })
    }
}

impl TensorMut {
    /// # Safety
    /// As for [`ViewMut::from_raw`].
    unsafe fn view<'a, S: Space, T: Pod>(&self) -> ViewMut<'a, S, T> {
        // SAFETY: as the caller promises.
        unsafe { ViewMut::from_raw(self.data as u64, self.elements) }
    }
}

/// The tensors of all slices, and how many of them are there.
///
/// # Safety
/// As for [`View::from_raw`].
unsafe fn slices<'a, S: Space, T: Pod>(
    tensors: &[Tensor; MOE_LORA_MAX_SLICES],
) -> ([View<'a, S, T>; MOE_LORA_MAX_SLICES], usize) {
    let count = tensors.iter().rposition(|tensor| !tensor.is_left_out()).map_or(0, |last| last + 1);
    // SAFETY: as the caller promises.
    (tensors.map(|tensor| unsafe { tensor.view() }), count)
}

/// The table of adapters, if there is one. Then there are no stacked tensors.
///
/// # Safety
/// As for [`Adapters::new`], and as for [`View::from_raw`] of the table.
unsafe fn table<'a, S: Space>(
    adapters: &Tensor,
    stacked: &[(&'static str, &[Tensor; MOE_LORA_MAX_SLICES])],
) -> Result<Option<Adapters<'a, S>>, Fault> {
    // SAFETY: as the caller promises.
    let Some(entries) = (unsafe { adapters.optional() }) else { return Ok(None) };
    match stacked.iter().find(|(_, tensors)| !tensors.iter().all(Tensor::is_left_out)) {
        Some(&(tensor, _)) => Err(Fault::WeightsTwice { tensor }),
        // SAFETY: as the caller promises.
        None => Ok(Some(unsafe { Adapters::new(entries) })),
    }
}

fn order(got: u64) -> Result<moe_lora::SliceOrder, Fault> {
    match got {
        _ if got == SliceOrder::InOrder as u64 => Ok(moe_lora::SliceOrder::InOrder),
        _ if got == SliceOrder::Reversed as u64 => Ok(moe_lora::SliceOrder::Reversed),
        _ if got == SliceOrder::Interleaved as u64 => Ok(moe_lora::SliceOrder::Interleaved),
        _ => {
            let (field, expected) = ("call.order", "0 (in order), 1 (reversed) or 2 (interleaved)");
            Err(Fault::InvalidValue { field, expected, got: got.into() })
        }
    }
}

fn stride(elements: usize) -> Option<usize> {
    (elements != 0).then_some(elements)
}

fn accumulate(field: &'static str, flags: u64) -> Result<bool, Fault> {
    match flags {
        0 => Ok(false),
        MOE_LORA_ACCUMULATE => Ok(true),
        got => Err(Fault::InvalidValue { field, expected: "0 or 1 (accumulate)", got: got.into() }),
    }
}

impl Routing {
    /// # Safety
    /// As for [`View::from_raw`].
    unsafe fn topk_ids<'a, S: Space>(&self, tokens: usize) -> Result<TopkIds<'a, S>, Fault> {
        // SAFETY: as the caller promises.
        unsafe {
            match self.topk_ids_bytes {
                // No token has no ids, in whatever layer.
                0 | 4 | 8 if self.topk_ids.is_left_out() && tokens > 0 => Ok(TopkIds::None),
                0 | 4 => Ok(TopkIds::I32(self.topk_ids.view())),
                8 => Ok(TopkIds::I64(self.topk_ids.view())),
                got => {
                    let (field, expected) = ("routing.topk_ids_bytes", "0, 4 or 8");
                    Err(Fault::InvalidValue { field, expected, got: got as i128 })
                }
            }
        }
    }

    /// The routing tensors of a call of `tokens` tokens.
    ///
    /// # Safety
    /// As for [`View::from_raw`], for each tensor.
    pub unsafe fn tensors<'a, S: Space>(&self, tokens: usize) -> Result<RoutingTensors<'a, S>, Fault> {
        let flags = &self.adapter_enabled;
        // SAFETY: as the caller promises.
        unsafe {
            Ok(RoutingTensors {
                topk_ids: self.topk_ids(tokens)?,
                token_lora: self.token_lora.view(),
                adapter_enabled: match (flags.is_left_out(), self.adapter_enabled_bytes) {
                    (true, 0) => Enabled::All,
                    (false, 1) => Enabled::U8(flags.view()),
                    (false, 4) => Enabled::I32(flags.view()),
                    (left_out, got) => {
                        let field = "routing.adapter_enabled_bytes";
                        let expected = if left_out { "0, as there is no tensor" } else { "1 or 4" };
                        return Err(Fault::InvalidValue { field, expected, got: got as i128 });
                    }
                },
                ranks: self.ranks.optional(),
                expert_map: self.expert_map.optional(),
            })
        }
    }

    /// The routing of a call: null stands for the route of the workspace's last call.
    ///
    /// # Safety
    /// As for [`read`] and [`Routing::tensors`].
    pub unsafe fn of<'a, S: Space>(
        routing: *const Routing,
        tokens: usize,
        last: Option<Route>,
    ) -> Result<moe_lora::Routing<'a, S>, Fault> {
        match (routing.is_null(), last) {
            (true, Some(route)) => Ok(route.into()),
            (true, None) => {
                let reason = "no call on this workspace has found one, or the last that was to has failed";
                Err(Error::StaleRoute { reason: reason.to_owned() }.into())
            }
            // SAFETY: as the caller promises.
            (false, _) => unsafe { Ok(read(routing, "routing")?.tensors(tokens)?.into()) },
        }
    }
}

impl Forward {
    /// Hands the call to `work`.
    ///
    /// # Safety
    /// As for [`read`] of `routing`, and as for [`View::from_raw`] and [`ViewMut::from_raw`] of each tensor.
    pub unsafe fn with<S: Space, T: Element, R>(
        &self,
        last: Option<Route>,
        work: impl FnOnce(moe_lora::Forward<'_, S, T>) -> Result<R, Fault>,
    ) -> Result<R, Fault> {
        // SAFETY: as the caller promises.
        unsafe {
            let (a, b) = (slices(&self.a), slices(&self.b));
            let table = table(&self.adapters, &[("a", &self.a), ("b", &self.b)])?;
            let stacked = Weights::Stacked { a: &a.0[..a.1], b: &b.0[..b.1] };
            work(moe_lora::Forward {
                tokens: self.tokens,
                routing: Routing::of(self.routing, self.tokens, last)?,
                x: Rows {
                    data: self.x.view(),
                    stride: stride(self.x_stride),
                    index: self.x_index.optional(),
                },
                weights: table.map_or(stacked, Weights::Table),
                topk_weights: self.topk_weights.optional(),
                out: RowsMut {
                    data: self.out.view(),
                    stride: stride(self.out_stride),
                    index: self.out_index.optional(),
                },
                offset: self.offset,
                order: order(self.order)?,
                accumulate: accumulate("call.flags", self.flags)?,
            })
        }
    }
}

impl Shrink {
    /// Hands the call to `work`.
    ///
    /// # Safety
    /// As for [`Forward::with`].
    pub unsafe fn with<S: Space, T: Element, R>(
        &self,
        last: Option<Route>,
        work: impl FnOnce(moe_lora::Shrink<'_, S, T>) -> Result<R, Fault>,
    ) -> Result<R, Fault> {
        // SAFETY: as the caller promises.
        unsafe {
            let a = slices(&self.a);
            let table = table(&self.adapters, &[("a", &self.a)])?;
            work(moe_lora::Shrink {
                tokens: self.tokens,
                routing: Routing::of(self.routing, self.tokens, last)?,
                x: Rows {
                    data: self.x.view(),
                    stride: stride(self.x_stride),
                    index: self.x_index.optional(),
                },
                a: table.map_or(Factor::Stacked(&a.0[..a.1]), Factor::Table),
                h: self.h.view(),
            })
        }
    }
}

impl Expand {
    /// Hands the call to `work`.
    ///
    /// # Safety
    /// As for [`Forward::with`].
    pub unsafe fn with<S: Space, T: Element, R>(
        &self,
        last: Option<Route>,
        work: impl FnOnce(moe_lora::Expand<'_, S, T>) -> Result<R, Fault>,
    ) -> Result<R, Fault> {
        // SAFETY: as the caller promises.
        unsafe {
            let b = slices(&self.b);
            let table = table(&self.adapters, &[("b", &self.b)])?;
            work(moe_lora::Expand {
                tokens: self.tokens,
                routing: Routing::of(self.routing, self.tokens, last)?,
                h: self.h.view(),
                b: table.map_or(Factor::Stacked(&b.0[..b.1]), Factor::Table),
                topk_weights: self.topk_weights.optional(),
                out: RowsMut {
                    data: self.out.view(),
                    stride: stride(self.out_stride),
                    index: self.out_index.optional(),
                },
                offset: self.offset,
                order: order(self.order)?,
                accumulate: accumulate("call.flags", self.flags)?,
            })
        }
    }
}
