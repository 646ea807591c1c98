//! Forms of a call beside the plainest, which grew at the ends of the structs: the same, bit for bit, as the
//! Rust library's own; and structs that end before them.

use crate::abi::{
    Expand, Forward, MOE_LORA_ACCUMULATE, MOE_LORA_MAX_SLICES, Projection, Routing, Shrink, Tensor,
};
use crate::calls::{
    ABSENT, Operands, PROJECTION, TOKENS, expand_of, outputs, shrink_of, tensor, tensor_mut, values,
};
use crate::functions::{Context, Functions};
use half::bf16;
use libtest_mimic::Failed;
use moe_lora::cpu::Cpu;
use moe_lora::{
    AdapterEntry, Adapters, Backend, Buffer, Factor, OutDims, ProjectionSizes, RoutingTensors, Rows, RowsMut,
    SliceOrder, TopkIds, Weights,
};
use moe_lora_tests::refusals::GOOD;
use std::ffi::c_void;
use std::ptr;

/// A call of [`TOKENS`] tokens.
struct Form {
    name: &'static str,
    /// One expert, which is no choice.
    dense: bool,
    /// Bytes of an id; 0: there are none.
    id_bytes: usize,
    /// Rows of `x` and of `out` are named by an index.
    indexed: bool,
    order: SliceOrder,
    out_dims: &'static [usize],
    /// Weights are named by address.
    table: bool,
}

const PLAIN: Form = Form {
    name: "",
    dense: false,
    id_bytes: 4,
    indexed: false,
    order: SliceOrder::InOrder,
    out_dims: &[8, 8],
    table: false,
};

const FORMS: [Form; 8] = [
    Form { name: "widths of their own", out_dims: &[8, 24, 3], ..PLAIN },
    Form { name: "rows by index", indexed: true, ..PLAIN },
    Form { name: "reversed", order: SliceOrder::Reversed, out_dims: &[8, 24], ..PLAIN },
    Form { name: "interleaved, ids of 64 bits", order: SliceOrder::Interleaved, id_bytes: 8, ..PLAIN },
    Form { name: "adapters by address", table: true, ..PLAIN },
    Form { name: "dense", dense: true, id_bytes: 0, out_dims: &[32, 8, 8], ..PLAIN },
    Form { name: "dense, with ids", dense: true, id_bytes: 8, ..PLAIN },
    Form {
        name: "all at once",
        dense: true,
        id_bytes: 0,
        indexed: true,
        order: SliceOrder::Reversed,
        out_dims: &[32, 8, 16],
        table: true,
    },
];

/// First column of `out` that is written.
const OFFSET: usize = 1;
/// Ranks that the slots' own weights are allocated for.
const SLOT_RANKS: [usize; 2] = [8, 16];

impl Form {
    fn sizes(&self) -> ProjectionSizes {
        let out_dims = OutDims::new(self.out_dims).expect("one to four slices");
        let (experts, top_k) = if self.dense { (1, 1) } else { (GOOD.experts, GOOD.top_k) };
        ProjectionSizes { experts, top_k, max_rank: 16, out_dims, ..GOOD }
    }

    fn projection(&self) -> Projection {
        let sizes = self.sizes();
        let mut out_dims = [0; MOE_LORA_MAX_SLICES];
        out_dims[..self.out_dims.len()].copy_from_slice(self.out_dims);
        Projection {
            top_k: sizes.top_k,
            experts: sizes.experts,
            max_rank: sizes.max_rank,
            slices: self.out_dims.len(),
            out_dim: 0,
            out_dims,
            ..PROJECTION
        }
    }

    fn pairs(&self) -> usize {
        TOKENS * self.sizes().top_k
    }

    fn out_width(&self) -> usize {
        OFFSET + self.out_dims.iter().sum::<usize>()
    }
}

/// What a call reads.
struct Inputs<B: Backend> {
    ids: B::Buffer<i32>,
    wide_ids: B::Buffer<i64>,
    slots: B::Buffer<i32>,
    x: B::Buffer<bf16>,
    x_index: B::Buffer<i32>,
    out_index: B::Buffer<i32>,
    /// A slice each; by address: a slot and slice each.
    a: Vec<B::Buffer<bf16>>,
    b: Vec<B::Buffer<bf16>>,
    entries: B::Buffer<AdapterEntry>,
}

impl<B: Backend> Inputs<B> {
    fn new(backend: &B, form: &Form) -> moe_lora::Result<Self> {
        let (s, slices, pairs) = (form.sizes(), form.out_dims.len(), form.pairs());
        let ids: Vec<i64> = (0..pairs as i64).map(|pair| pair * 3 % s.experts as i64).collect();
        let (mut a, mut b, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        for slot in (0..s.slots).filter(|slot| form.table || *slot == 0) {
            for (slice, width) in form.out_dims.iter().enumerate() {
                let ranks = if form.table { SLOT_RANKS[slot] } else { s.slots * s.max_rank };
                let one_a = backend.upload(&values(s.experts * ranks * s.in_dim))?;
                let one_b = backend.upload(&values(s.experts * ranks * width))?;
                // One slice is off: its weights are nowhere.
                let off = (slot, slice) == (0, slices - 1);
                entries.push(AdapterEntry {
                    rank: if off { 0 } else { 5 + slot as i32 },
                    max_rank: ranks as u32,
                    scaling: 0.5 + slot as f32,
                    reserved: 0,
                    a: if off { 0 } else { one_a.view().address() },
                    b: if off { 0 } else { one_b.view().address() },
                });
                a.push(one_a);
                b.push(one_b);
            }
        }
        // From the last row to the first, but for one pair whose row is nowhere.
        let index: Vec<i32> = (0..pairs as i32).rev().map(|row| if row == 1 { -1 } else { row }).collect();
        Ok(Inputs {
            ids: backend.upload(&ids.iter().map(|&id| id as i32).collect::<Vec<_>>())?,
            wide_ids: backend.upload(&ids)?,
            slots: backend.upload(&[1, -1, 0])?,
            x: backend.upload(&values(pairs * s.in_dim))?,
            x_index: backend.upload(&index)?,
            out_index: backend.upload(&index)?,
            a,
            b,
            entries: backend.upload(&entries)?,
        })
    }

    /// `out` of the whole call, `h`, `out` of the halves.
    fn outputs(backend: &B, form: &Form) -> moe_lora::Result<[B::Buffer<bf16>; 3]> {
        let h = form.out_dims.len() * form.pairs() * form.sizes().max_rank;
        let out = values(form.pairs() * form.out_width());
        Ok([backend.upload(&out)?, backend.upload(&vec![bf16::NAN; h])?, backend.upload(&out)?])
    }
}

type Bits = Vec<Vec<u16>>;

fn bits<B: Backend>(backend: &B, outputs: &[B::Buffer<bf16>]) -> moe_lora::Result<Bits> {
    let bits = |buffer| Ok(backend.download(buffer)?.into_iter().map(bf16::to_bits).collect());
    outputs.iter().map(bits).collect()
}

/// What the Rust library makes of the whole call and of its halves.
fn expected<B: Backend>(backend: &B, form: &Form) -> moe_lora::Result<Bits> {
    let projection = moe_lora::Projection::new(form.sizes())?;
    let mut workspace = backend.workspace(&[projection], TOKENS)?;
    let (inputs, mut outputs) = (Inputs::new(backend, form)?, Inputs::outputs(backend, form)?);
    let a: Vec<_> = inputs.a.iter().map(Buffer::view).collect();
    let b: Vec<_> = inputs.b.iter().map(Buffer::view).collect();
    // SAFETY: the entries name `inputs`, of the sizes that they say.
    let adapters = unsafe { Adapters::new(inputs.entries.view()) };
    let (weights, half_a, half_b) = if form.table {
        (Weights::Table(adapters), Factor::Table(adapters), Factor::Table(adapters))
    } else {
        (Weights::Stacked { a: &a, b: &b }, Factor::Stacked(&a[..]), Factor::Stacked(&b[..]))
    };
    let ids = match form.id_bytes {
        0 => TopkIds::None,
        4 => inputs.ids.view().into(),
        _ => inputs.wide_ids.view().into(),
    };
    let routing = RoutingTensors::new(ids, inputs.slots.view()).into();
    let (tokens, offset, order, accumulate) = (TOKENS, OFFSET, form.order, true);
    let x = Rows { data: inputs.x.view(), stride: None, index: form.indexed.then(|| inputs.x_index.view()) };
    let [whole, h, halves] = &mut outputs;
    let index = form.indexed.then(|| inputs.out_index.view());
    let rows = |data| RowsMut { data, stride: None, index };
    let (topk_weights, out) = (None, rows(whole.view_mut()));
    let call =
        moe_lora::Forward { tokens, routing, x, weights, topk_weights, out, offset, order, accumulate };
    backend.forward(&mut workspace, &projection, call)?;
    let call = moe_lora::Shrink { tokens, routing, x, a: half_a, h: h.view_mut() };
    backend.shrink(&mut workspace, &projection, call)?;
    let (h, b, out) = (h.view(), half_b, rows(halves.view_mut()));
    let call = moe_lora::Expand { tokens, routing, h, b, topk_weights, out, offset, order, accumulate };
    backend.expand(&mut workspace, &projection, call)?;
    bits(backend, &outputs)
}

/// The same through the C interface; the second half is made on the route of the first.
fn through_c<B: Backend>(
    functions: &Functions,
    context: *mut Context,
    stream: *mut c_void,
    (backend, form): (&B, &Form),
) -> moe_lora::Result<Bits> {
    let (inputs, mut outputs) = (Inputs::<B>::new(backend, form)?, Inputs::outputs(backend, form)?);
    let projection = form.projection();
    let workspace = functions.workspace(context, &projection, TOKENS);
    let stacked = |buffers: &[B::Buffer<bf16>]| {
        let mut tensors = [ABSENT; MOE_LORA_MAX_SLICES];
        if !form.table {
            tensors.iter_mut().zip(buffers).for_each(|(one, buffer)| *one = tensor(buffer.view()));
        }
        tensors
    };
    let given = |is_given, tensor: Tensor| if is_given { tensor } else { ABSENT };
    let routing = Routing {
        size: size_of::<Routing>(),
        topk_ids: match form.id_bytes {
            0 => ABSENT,
            4 => tensor(inputs.ids.view()),
            _ => tensor(inputs.wide_ids.view()),
        },
        token_lora: tensor(inputs.slots.view()),
        adapter_enabled: ABSENT,
        adapter_enabled_bytes: 0,
        ranks: ABSENT,
        expert_map: ABSENT,
        topk_ids_bytes: form.id_bytes,
    };
    let [whole, h, halves] = &mut outputs;
    let call = Forward {
        size: size_of::<Forward>(),
        tokens: TOKENS,
        routing: &routing,
        x: tensor(inputs.x.view()),
        x_stride: 0,
        a: stacked(&inputs.a),
        b: stacked(&inputs.b),
        topk_weights: ABSENT,
        out: tensor_mut(whole.view_mut()),
        out_stride: 0,
        offset: OFFSET,
        flags: MOE_LORA_ACCUMULATE,
        x_index: given(form.indexed, tensor(inputs.x_index.view())),
        out_index: given(form.indexed, tensor(inputs.out_index.view())),
        order: form.order as u64,
        adapters: given(form.table, tensor(inputs.entries.view())),
    };
    let shrink = shrink_of(&call, tensor_mut(h.view_mut()));
    let out = tensor_mut(halves.view_mut());
    let expand = expand_of(&Forward { routing: ptr::null(), out, ..call }, tensor(h.view()));
    // SAFETY: structs and buffers live here until the stream's work has ended, which `bits` waits for.
    unsafe {
        functions.done((functions.forward)(workspace, stream, &projection, &call));
        functions.done((functions.shrink)(workspace, stream, &projection, &shrink));
        functions.done((functions.expand)(workspace, stream, &projection, &expand));
        let bits = bits(backend, &outputs);
        functions.done((functions.workspace_destroy)(workspace));
        bits
    }
}

fn agrees<B: Backend>(
    functions: &Functions,
    context: *mut Context,
    stream: *mut c_void,
    backend: &B,
) -> Result<(), Failed> {
    for form in &FORMS {
        let expected = expected(backend, form)?;
        let before = bits(backend, &Inputs::outputs(backend, form)?)?;
        assert!(expected.iter().zip(&before).all(|(after, before)| after != before), "{}", form.name);
        assert_eq!(through_c(functions, context, stream, (backend, form))?, expected, "{}", form.name);
    }
    functions.destroy(context, ptr::null_mut());
    Ok(())
}

pub fn on_cpu(functions: &Functions) -> Result<(), Failed> {
    agrees(functions, functions.cpu(), ptr::null_mut(), &Cpu)
}

#[cfg(feature = "cuda")]
pub fn on_cuda(functions: &Functions, device: &moe_lora::cuda::Device) -> Result<(), Failed> {
    let stream = device.new_stream()?;
    agrees(functions, functions.cuda(), stream.as_raw(), &stream)
}

/// Of structs as version 2 had them, what follows is not read.
pub fn earlier_structs(functions: &Functions) -> Result<(), Failed> {
    const NOISE: Tensor = Tensor { data: ptr::dangling(), elements: 7 };
    let context = functions.cpu();
    let run = |earlier: bool| -> Result<_, Failed> {
        let workspace = functions.workspace(context, &PROJECTION, TOKENS);
        let mut operands = Operands::new(&Cpu)?;
        let mut routing = operands.routing();
        if earlier {
            routing = Routing { size: 96, topk_ids_bytes: 5, ..routing };
        }
        let (mut forward, mut shrink, mut expand) =
            (operands.forward(&routing), operands.shrink(&routing), operands.expand(&routing));
        if earlier {
            let (x_index, out_index, adapters, order) = (NOISE, NOISE, NOISE, u64::MAX);
            forward = Forward { size: 232, x_index, out_index, order, adapters, ..forward };
            shrink = Shrink { size: 128, x_index, adapters, ..shrink };
            expand = Expand { size: 160, out_index, order, adapters, ..expand };
        }
        // SAFETY: all of it lives here.
        unsafe {
            functions.done((functions.forward)(workspace, ptr::null_mut(), &PROJECTION, &forward));
            let whole = outputs(&Cpu, &operands);
            functions.done((functions.shrink)(workspace, ptr::null_mut(), &PROJECTION, &shrink));
            functions.done((functions.expand)(workspace, ptr::null_mut(), &PROJECTION, &expand));
            functions.done((functions.workspace_destroy)(workspace));
            Ok((whole, outputs(&Cpu, &operands)))
        }
    };
    assert_eq!(run(true)?, run(false)?);
    functions.destroy(context, ptr::null_mut());
    Ok(())
}
