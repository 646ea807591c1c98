//! A good call of any form, and the memory that it names.

use super::layout::{
    AdapterEntry, Dtype, Expand, ExpertWeights, Forward, MOE_LORA_MAX_SLICES, Projection, Routing, Shrink,
    Tensor, TensorMut, XRows,
};
use arbitrary::{Result, Unstructured};
use std::ptr;

/// T.
pub(super) const TOKENS: usize = 3;
/// Words of a buffer: more than any tensor here says that it has, whatever its type and wherever it starts.
const BUFFER: usize = 1 << 13;
/// Most elements that a tensor says it has: of 8 bytes at most, but for entries of adapters.
pub(super) const MOST: usize = BUFFER / 4;
/// 16-bit elements of `values` that no matrix of an adapter goes past.
const MATRICES: usize = 2 * BUFFER;

const ABSENT: Tensor = Tensor { data: ptr::null(), elements: 0 };

/// A form of a call.
#[derive(Clone, Copy)]
pub(super) struct Form {
    /// One expert, which is no choice.
    dense: bool,
    /// Of `topk_ids`; 0: there are none.
    id_bytes: usize,
    /// Slices of widths of their own.
    own_widths: bool,
    x_index: bool,
    out_index: bool,
    order: u64,
    /// Weights are named by address.
    pub table: bool,
    /// The tensors of the routing that may be left out are there.
    full: bool,
}

impl Form {
    pub fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let dense = u.arbitrary()?;
        let own_widths: bool = u.arbitrary()?;
        Ok(Form {
            dense,
            id_bytes: *u.choose(if dense { &[0, 4, 8] } else { &[4, 8] })?,
            own_widths,
            x_index: u.arbitrary()?,
            out_index: u.arbitrary()?,
            // What is interleaved has one width.
            order: u.int_in_range(0..=if own_widths { 1 } else { 2 })?,
            table: u.arbitrary()?,
            full: u.arbitrary()?,
        })
    }

    fn slices(self) -> usize {
        if self.own_widths { 3 } else { 2 }
    }

    pub fn projection(self) -> Projection {
        let choices = if self.dense { 1 } else { 2 };
        Projection {
            size: size_of::<Projection>(),
            dtype: Dtype::Bf16 as i32,
            x_rows: XRows::Token as i32,
            a_experts: ExpertWeights::PerExpert as i32,
            b_experts: ExpertWeights::PerExpert as i32,
            top_k: choices,
            experts: choices,
            slots: 2,
            max_rank: 4,
            slices: self.slices(),
            in_dim: 16,
            out_dim: 8,
            out_dims: if self.own_widths { [8, 3, 0, 0] } else { [0; MOE_LORA_MAX_SLICES] },
        }
    }
}

/// The memory that calls name.
pub(super) struct Memory {
    ids: Vec<i32>,
    wide_ids: Vec<i64>,
    weights: Vec<u32>,
    values: Vec<u128>,
    table: Vec<AdapterEntry>,
    pub h: Vec<u32>,
    pub out: Vec<u32>,
}

fn given(is_given: bool, tensor: Tensor) -> Tensor {
    if is_given { tensor } else { ABSENT }
}

impl Memory {
    pub fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let ids: [i8; 16] = u.arbitrary()?;
        let ids = ids.into_iter().cycle().take(BUFFER);
        let off = AdapterEntry { rank: 0, max_rank: 0, scaling: 1.0, reserved: 0, a: 0, b: 0 };
        Ok(Memory {
            wide_ids: ids.clone().map(i64::from).collect(),
            ids: ids.map(i32::from).collect(),
            weights: vec![1.0f32.to_bits(); BUFFER],
            // Ones in bf16.
            values: vec![0x3f80_3f80_3f80_3f80_3f80_3f80_3f80_3f80; BUFFER / 4],
            // Wherever it starts.
            table: vec![off; MOST + 1],
            h: vec![0; BUFFER],
            out: vec![0; BUFFER],
        })
    }

    /// Puts adapters into the table, of any sizes that a projection's own allow.
    pub fn fill(&mut self, u: &mut Unstructured<'_>, projection: &Projection) -> Result<()> {
        let widest = projection.out_dims.into_iter().fold(projection.out_dim, usize::max);
        let start = self.values.as_ptr() as u64;
        for entry in self.table.iter_mut().take(8) {
            let ranks = 8 * u.int_in_range(0..=(projection.max_rank.min(64) as u64).div_ceil(8))?;
            // Or one matrix for all experts: then this is more than enough.
            let elements = |width: usize| {
                (projection.experts.max(1) as u64).checked_mul(ranks)?.checked_mul(width as u64)
            };
            let mut matrix = |width| -> Result<Option<u64>> {
                match elements(width).and_then(|elements| (MATRICES as u64).checked_sub(elements)) {
                    // On a boundary of 16 bytes.
                    Some(room) => Ok(Some(start + 16 * u.int_in_range(0..=room / 8)?)),
                    None => Ok(None),
                }
            };
            let (a, b) = (matrix(projection.in_dim)?, matrix(widest)?);
            *entry = match (a, b) {
                (Some(a), Some(b)) => AdapterEntry {
                    rank: u.arbitrary()?,
                    max_rank: ranks as u32,
                    scaling: f32::from_bits(u.arbitrary()?),
                    reserved: 0,
                    a,
                    b,
                },
                // Of no rank, whose addresses nobody follows.
                _ => AdapterEntry {
                    rank: -u.int_in_range(0..=i32::MAX)?,
                    max_rank: u.arbitrary()?,
                    scaling: 1.0,
                    reserved: 0,
                    a: u.arbitrary()?,
                    b: u.arbitrary()?,
                },
            };
        }
        Ok(())
    }

    pub fn routing(&self, form: Form) -> Routing {
        let ids = |elements| Tensor { data: self.ids.as_ptr().cast(), elements };
        Routing {
            size: size_of::<Routing>(),
            topk_ids: match form.id_bytes {
                0 => ABSENT,
                4 => ids(MOST),
                _ => Tensor { data: self.wide_ids.as_ptr().cast(), elements: MOST },
            },
            token_lora: ids(MOST),
            adapter_enabled: ids(MOST),
            adapter_enabled_bytes: 4,
            ranks: given(form.full, ids(MOST)),
            expert_map: given(form.full && form.id_bytes > 0, ids(MOST)),
            topk_ids_bytes: form.id_bytes,
        }
    }

    pub fn forward(&mut self, form: Form, routing: *const Routing) -> Forward {
        let values = Tensor { data: self.values.as_ptr().cast(), elements: MOST };
        let slices = std::array::from_fn(|slice| given(!form.table && slice < form.slices(), values));
        let index = Tensor { data: self.ids.as_ptr().cast(), elements: MOST };
        Forward {
            size: size_of::<Forward>(),
            tokens: TOKENS,
            routing,
            x: values,
            x_stride: 0,
            a: slices,
            b: slices,
            topk_weights: Tensor { data: self.weights.as_ptr().cast(), elements: MOST },
            out: TensorMut { data: self.out.as_mut_ptr().cast(), elements: MOST },
            out_stride: 0,
            offset: 0,
            flags: 0,
            x_index: given(form.x_index, index),
            out_index: given(form.out_index, index),
            order: form.order,
            adapters: given(form.table, Tensor { data: self.table.as_ptr().cast(), elements: MOST }),
        }
    }

    pub fn shrink(&mut self, form: Form, routing: *const Routing) -> Shrink {
        let Forward { tokens, x, x_stride, a, x_index, adapters, .. } = self.forward(form, routing);
        let h = TensorMut { data: self.h.as_mut_ptr().cast(), elements: MOST };
        Shrink { size: size_of::<Shrink>(), tokens, routing, x, x_stride, a, h, x_index, adapters }
    }

    pub fn expand(&mut self, form: Form, routing: *const Routing) -> Expand {
        let whole = self.forward(form, routing);
        let Forward { tokens, x, b, topk_weights, out, out_stride, offset, flags, .. } = whole;
        let Forward { out_index, order, adapters, .. } = whole;
        Expand {
            size: size_of::<Expand>(),
            tokens,
            routing,
            h: x,
            b,
            topk_weights,
            out,
            out_stride,
            offset,
            flags,
            out_index,
            order,
            adapters,
        }
    }
}
