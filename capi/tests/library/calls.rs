//! What calls compute: the same, bit for bit, as the Rust library's own.

use crate::abi::{
    Dtype, Expand, ExpertWeights, Forward, MOE_LORA_MAX_SLICES, Projection, Routing, Shrink, Tensor,
    TensorMut, XRows,
};
use crate::functions::{Context, Functions};
use half::bf16;
use libtest_mimic::Failed;
use moe_lora::cpu::Cpu;
use moe_lora::{
    Backend, Buffer, Enabled, Factor, OutDims, ProjectionSizes, RoutingTensors, SliceOrder, View, ViewMut,
    Weights,
};
use moe_lora_tests::refusals::GOOD;
use std::ffi::{CStr, c_void};
use std::ptr;

/// T.
pub const TOKENS: usize = 3;

/// A tensor that is left out.
pub const ABSENT: Tensor = Tensor { data: ptr::null(), elements: 0 };

/// k = 2, E = 4, L = 2, R = 8, S = 1, K = 16, N = 8.
pub const PROJECTION: Projection = Projection {
    size: size_of::<Projection>(),
    dtype: Dtype::Bf16 as i32,
    x_rows: XRows::Token as i32,
    a_experts: ExpertWeights::PerExpert as i32,
    b_experts: ExpertWeights::PerExpert as i32,
    top_k: SIZES.top_k,
    experts: SIZES.experts,
    slots: SIZES.slots,
    max_rank: SIZES.max_rank,
    slices: 1,
    in_dim: SIZES.in_dim,
    out_dim: 8,
    out_dims: [0; MOE_LORA_MAX_SLICES],
};

const SIZES: ProjectionSizes = ProjectionSizes { out_dims: OutDims::uniform(8, 1), ..GOOD };

/// Buffers of a call of [`TOKENS`] tokens on [`PROJECTION`].
pub struct Operands<B: Backend> {
    ids: B::Buffer<i32>,
    slots: B::Buffer<i32>,
    flags: B::Buffer<u8>,
    weights: B::Buffer<f32>,
    x: B::Buffer<bf16>,
    a: B::Buffer<bf16>,
    b: B::Buffer<bf16>,
    pub h: B::Buffer<bf16>,
    pub out: B::Buffer<bf16>,
}

pub fn values(count: usize) -> Vec<bf16> {
    (0..count).map(|i| bf16::from_f32((i * 37 % 101) as f32 / 50.0 - 1.0)).collect()
}

impl<B: Backend> Operands<B> {
    pub fn new(backend: &B) -> moe_lora::Result<Self> {
        Ok(Operands {
            ids: backend.upload(&[0, 3, 1, 0, 2, 1])?,
            slots: backend.upload(&[1, -1, 0])?,
            flags: backend.upload(&[1, 1])?,
            weights: backend.upload(&[0.5, 1.0, 2.0, 0.25, 1.0, 0.5])?,
            x: backend.upload(&values(TOKENS * 16))?,
            a: backend.upload(&values(2 * 4 * 8 * 16))?,
            b: backend.upload(&values(2 * 4 * 8 * 8))?,
            h: backend.upload(&[bf16::NAN; 6 * 8])?,
            out: backend.upload(&[bf16::NAN; 6 * 8])?,
        })
    }

    fn rust_routing(&self) -> RoutingTensors<'_, B::Space> {
        RoutingTensors {
            topk_ids: self.ids.view().into(),
            token_lora: self.slots.view(),
            adapter_enabled: Enabled::U8(self.flags.view()),
            ranks: None,
            expert_map: None,
        }
    }

    pub fn routing(&self) -> Routing {
        Routing {
            size: size_of::<Routing>(),
            topk_ids: tensor(self.ids.view()),
            token_lora: tensor(self.slots.view()),
            adapter_enabled: tensor(self.flags.view()),
            adapter_enabled_bytes: 1,
            ranks: ABSENT,
            expert_map: ABSENT,
            topk_ids_bytes: 0,
        }
    }

    pub fn forward(&mut self, routing: *const Routing) -> Forward {
        Forward {
            size: size_of::<Forward>(),
            tokens: TOKENS,
            routing,
            x: tensor(self.x.view()),
            x_stride: 0,
            a: one(self.a.view()),
            b: one(self.b.view()),
            topk_weights: tensor(self.weights.view()),
            out: tensor_mut(self.out.view_mut()),
            out_stride: 0,
            offset: 0,
            flags: 0,
            x_index: ABSENT,
            out_index: ABSENT,
            order: 0,
            adapters: ABSENT,
        }
    }

    pub fn shrink(&mut self, routing: *const Routing) -> Shrink {
        let whole = self.forward(routing);
        shrink_of(&whole, tensor_mut(self.h.view_mut()))
    }

    pub fn expand(&mut self, routing: *const Routing) -> Expand {
        let whole = self.forward(routing);
        expand_of(&whole, tensor(self.h.view()))
    }
}

/// The first half of a whole call.
pub fn shrink_of(whole: &Forward, h: TensorMut) -> Shrink {
    let Forward { tokens, routing, x, x_stride, a, x_index, adapters, .. } = *whole;
    Shrink { size: size_of::<Shrink>(), tokens, routing, x, x_stride, a, h, x_index, adapters }
}

/// The second half of a whole call.
pub fn expand_of(whole: &Forward, h: Tensor) -> Expand {
    let Forward { tokens, routing, b, topk_weights, out, out_stride, .. } = *whole;
    let Forward { offset, flags, out_index, order, adapters, .. } = *whole;
    Expand {
        size: size_of::<Expand>(),
        tokens,
        routing,
        h,
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

pub fn tensor<S: moe_lora::Space, T: bytemuck::Pod>(view: View<'_, S, T>) -> Tensor {
    Tensor { data: view.address() as *const c_void, elements: view.len() }
}

pub fn tensor_mut<S: moe_lora::Space, T: bytemuck::Pod>(view: ViewMut<'_, S, T>) -> TensorMut {
    TensorMut { data: view.address() as *mut c_void, elements: view.len() }
}

fn one<S: moe_lora::Space>(view: View<'_, S, bf16>) -> [Tensor; MOE_LORA_MAX_SLICES] {
    [tensor(view), ABSENT, ABSENT, ABSENT]
}

/// `out` and `h` in bits.
pub fn outputs<B: Backend>(backend: &B, operands: &Operands<B>) -> Vec<u16> {
    let read = |buffer| backend.download(buffer).expect("what was written");
    [read(&operands.out), read(&operands.h)].concat().into_iter().map(bf16::to_bits).collect()
}

/// What the Rust library makes of the whole call and of its halves.
fn expected<B: Backend>(backend: &B) -> moe_lora::Result<[Vec<u16>; 2]> {
    let projection = moe_lora::Projection::new(SIZES)?;
    let mut workspace = backend.workspace(&[projection], TOKENS)?;
    let (inputs, mut whole, mut halves) =
        (Operands::new(backend)?, Operands::new(backend)?, Operands::new(backend)?);
    let (a, b) = ([inputs.a.view()], [inputs.b.view()]);
    let (tokens, routing) = (TOKENS, moe_lora::Routing::Tokens(inputs.rust_routing()));
    let topk_weights = Some(inputs.weights.view());
    backend.forward(
        &mut workspace,
        &projection,
        moe_lora::Forward {
            tokens,
            routing,
            x: inputs.x.view().into(),
            weights: Weights::Stacked { a: &a, b: &b },
            topk_weights,
            out: whole.out.view_mut().into(),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate: false,
        },
    )?;
    let x = inputs.x.view().into();
    let shrink = moe_lora::Shrink { tokens, routing, x, a: Factor::Stacked(&a), h: halves.h.view_mut() };
    backend.shrink(&mut workspace, &projection, shrink)?;
    let out = halves.out.view_mut().into();
    let h = halves.h.view();
    let expand = moe_lora::Expand {
        tokens,
        routing,
        h,
        b: Factor::Stacked(&b),
        topk_weights,
        out,
        offset: 0,
        order: SliceOrder::InOrder,
        accumulate: false,
    };
    backend.expand(&mut workspace, &projection, expand)?;
    Ok([outputs(backend, &whole), outputs(backend, &halves)])
}

/// Makes every call on a context, each with its own routing and with one made alone.
fn agrees<B: Backend>(
    functions: &Functions,
    context: *mut Context,
    stream: *mut c_void,
    backend: &B,
) -> Result<(), Failed> {
    let [whole, halves] = expected(backend)?;
    for alone in [false, true] {
        let workspace = functions.workspace(context, &PROJECTION, TOKENS);
        let mut operands = Operands::new(backend)?;
        let routing = operands.routing();
        let given = if alone { ptr::null() } else { ptr::from_ref(&routing) };
        // SAFETY: handles and structs live here, buffers until `operands` is dropped; the stream is the
        // back end's, which `outputs` waits for.
        unsafe {
            if alone {
                functions.done((functions.route)(workspace, stream, &PROJECTION, TOKENS, &routing));
            }
            functions.done((functions.forward)(workspace, stream, &PROJECTION, &operands.forward(given)));
            assert_eq!(outputs(backend, &operands), whole, "forward, route made alone: {alone}");
            functions.done((functions.shrink)(workspace, stream, &PROJECTION, &operands.shrink(given)));
            functions.done((functions.expand)(workspace, stream, &PROJECTION, &operands.expand(given)));
            assert_eq!(outputs(backend, &operands), halves, "the halves, route made alone: {alone}");
            functions.done((functions.workspace_destroy)(workspace));
        }
    }
    // SAFETY: not used again.
    functions.done(unsafe { (functions.context_destroy)(context) });
    Ok(())
}

pub fn on_cpu(functions: &Functions) -> Result<(), Failed> {
    agrees(functions, functions.cpu(), ptr::null_mut(), &Cpu)
}

/// The library's own context and this program's share the device's primary context, as they would PyTorch's.
#[cfg(feature = "cuda")]
pub fn on_cuda(functions: &Functions, device: &moe_lora::cuda::Device) -> Result<(), Failed> {
    let stream = device.new_stream()?;
    agrees(functions, functions.cuda(), stream.as_raw(), &stream)
}

pub fn workspace_outlives_context(functions: &Functions) -> Result<(), Failed> {
    let context = functions.cpu();
    let workspace = functions.workspace(context, &PROJECTION, TOKENS);
    let mut operands = Operands::new(&Cpu)?;
    let routing = operands.routing();
    let before = outputs(&Cpu, &operands);
    // SAFETY: all of it lives here; the context is not used again.
    unsafe {
        functions.done((functions.context_destroy)(context));
        let call = operands.forward(&routing);
        functions.done((functions.forward)(workspace, ptr::null_mut(), &PROJECTION, &call));
        functions.done((functions.workspace_destroy)(workspace));
    }
    assert_ne!(outputs(&Cpu, &operands), before);
    Ok(())
}

pub fn plan_is_cut(functions: &Functions) -> Result<(), Failed> {
    let context = functions.cpu();
    let workspace = functions.workspace(context, &PROJECTION, TOKENS);
    let mut operands = Operands::new(&Cpu)?;
    let routing = operands.routing();
    let call = operands.forward(&routing);
    let plan = |text: &mut [u8]| {
        let mut length = 0;
        let (start, capacity) = (text.as_mut_ptr().cast(), text.len());
        // SAFETY: all of it lives here.
        functions
            .done(unsafe { (functions.plan)(workspace, &PROJECTION, &call, start, capacity, &mut length) });
        length
    };
    let mut whole = [1; 100];
    let length = plan(&mut whole);
    assert!(whole.starts_with(b"cpu: "));
    assert_eq!(CStr::from_bytes_until_nul(&whole)?.count_bytes(), length);
    let mut cut = [1; 6];
    assert_eq!(plan(&mut cut[..5]), length);
    assert_eq!(&cut, b"cpu:\0\x01");
    assert_eq!(plan(&mut []), length);
    functions.destroy(context, workspace);
    Ok(())
}

pub fn version(functions: &Functions) -> Result<(), Failed> {
    // SAFETY: a constant C string.
    assert_eq!(unsafe { CStr::from_ptr((functions.version)()) }.to_str()?, env!("CARGO_PKG_VERSION"));
    // SAFETY: it takes nothing.
    assert_eq!(unsafe { (functions.abi_version)() }, crate::abi::MOE_LORA_ABI_VERSION);
    Ok(())
}
