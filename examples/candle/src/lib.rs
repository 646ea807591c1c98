//! The operator on candle's tensors, in place and without copies: on candle's CPU and, with the feature
//! `cuda`, on candle's CUDA devices, on their streams. Made to be copied into an engine; `main.rs` is a layer
//! that uses it.

use bytemuck::Pod;
use candle_core::{
    CpuStorage, DType, Device, DeviceLocation, InplaceOp1, Layout, Storage, Tensor, WithDType,
};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendStorage, cuda::CudaDType};
#[cfg(feature = "cuda")]
use moe_lora::cuda::{self, CudarcRead, CudarcStream, Stream};
use moe_lora::{Backend, Element, Host, Operator, Projection, ProjectionSizes, Route, RoutingTensors};
use moe_lora::{View, ViewMut, XRows, cpu::Cpu};
use std::{cell::Cell, collections::HashMap, ops::Range, ptr};

/// Why nothing was added.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor, by its name in [`Delta`], is not of the type and shape that the operator's sizes ask for, or
    /// not contiguous: `Tensor::contiguous` makes a copy that is.
    #[error("{0} is {2}, expected {1}")]
    Tensor(&'static str, String, String),
    /// The output lies in the storage of this input.
    #[error("out and {0} share a storage, expected one for out alone")]
    SharedStorage(&'static str),
    /// A tensor is on a device of another kind than the operator, or the operator cannot run there: see the
    /// feature `cuda`.
    #[error("not for memory on {0:?}")]
    Device(DeviceLocation),
    /// The operator's own.
    #[error(transparent)]
    MoeLora(#[from] moe_lora::Error),
    /// candle's own.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

type Result<T, E = Error> = std::result::Result<T, E>;

/// The operator of one projection, where candle's tensors are.
pub enum MoeLora {
    /// On the CPU.
    Cpu(Operator<Cpu>),
    /// On a stream of candle's.
    #[cfg(feature = "cuda")]
    Cuda(Operator<Stream>, CudarcStream),
}

/// What a call adds: `b · (a · x)` for every (token, choice) whose token has an adapter. For T tokens, k
/// choices each, S slices, L adapters of rank R at most, and E experts; the operator's sizes say how many.
pub struct Delta<'a> {
    /// `[T, K]`, or `[T, k, K]` where rows belong to choices, as for down.
    pub x: &'a Tensor,
    /// S of `[L, E, R, K]`.
    pub a: &'a [Tensor],
    /// S of `[L, E, N, R]`.
    pub b: &'a [Tensor],
    /// Who goes where.
    pub routing: Routing<'a>,
    /// `[T, k]` of f32: multiplies what is added. Otherwise 1.
    pub topk_weights: Option<&'a Tensor>,
}

/// Who goes where. Ids are u32, as candle's sorts return them.
#[derive(Clone, Copy)]
pub enum Routing<'a> {
    /// Found by this call.
    Tokens {
        /// `[T, k]`: the experts that the router chose.
        topk_ids: &'a Tensor,
        /// `[T]`: the adapter of each token, `u32::MAX` for none.
        token_lora: &'a Tensor,
        /// `[L]`: the ranks in use. Otherwise R for all.
        ranks: Option<&'a Tensor>,
    },
    /// As in another call of the layer.
    On(Route),
}

impl MoeLora {
    /// Operators for calls of up to `max_tokens` tokens, which share scratch memory and route: make them
    /// once, for all layers of the same sizes.
    pub fn new<const N: usize>(
        device: &Device,
        max_tokens: usize,
        sizes: [ProjectionSizes; N],
    ) -> Result<[Self; N]> {
        match device {
            Device::Cpu => Ok(Operator::builder(&Cpu).max_tokens(max_tokens).build(sizes)?.map(MoeLora::Cpu)),
            #[cfg(feature = "cuda")]
            Device::Cuda(candle) => {
                let stream = candle.cuda_stream();
                let device = cuda::Device::new(stream.context().ordinal() as u32)?;
                let stream = CudarcStream::new(&device, stream)?;
                let operators = Operator::builder(stream.stream()).max_tokens(max_tokens).build(sizes)?;
                Ok(operators.map(|operator| MoeLora::Cuda(operator, stream.clone())))
            }
            other => Err(Error::Device(other.location())),
        }
    }

    /// Adds to `out`, `[T, k, S·N]`, in its own memory. On a GPU the work is queued on candle's stream.
    /// Returns the route, for other calls of the layer.
    pub fn add(&self, delta: &Delta<'_>, out: &Tensor) -> Result<Route> {
        let inputs = delta.inputs(self.projection(), out)?;
        let address = |tensor: &Tensor| ptr::from_ref(&*tensor.storage_and_layout().0);
        let addresses: Vec<_> = inputs.iter().map(|(_, tensor)| address(tensor)).collect();
        if let Some(shared) = addresses.iter().position(|other| *other == address(out)) {
            return Err(Error::SharedStorage(inputs[shared].0));
        }
        // Each storage is locked once: a second reader would wait for a writer that waits for the first.
        let mut locks = HashMap::new();
        for ((_, tensor), address) in inputs.iter().zip(&addresses) {
            locks.entry(*address).or_insert_with(|| tensor.storage_and_layout().0);
        }
        let inputs = inputs.iter().zip(&addresses).map(|((_, tensor), at)| (&*locks[at], tensor.layout()));
        let call = Call { operator: self, delta, inputs: inputs.collect(), route: Cell::new(None) };
        out.inplace_op1(&call)?;
        call.route.take().unwrap_or_else(|| Err(Error::Device(out.device().location())))
    }

    fn projection(&self) -> &Projection {
        match self {
            MoeLora::Cpu(operator) => operator.projection(),
            #[cfg(feature = "cuda")]
            MoeLora::Cuda(operator, _) => operator.projection(),
        }
    }
}

impl<'a> Delta<'a> {
    /// The tensors that a call reads, checked: x, a and b, then ids, then the router's weights.
    fn inputs(&self, projection: &Projection, out: &Tensor) -> Result<Vec<(&'static str, &'a Tensor)>> {
        let ProjectionSizes { dtype, top_k, slots, max_rank, in_dim, out_dims, x_rows, .. } =
            *projection.sizes();
        let half = if dtype == moe_lora::DType::Bf16 { DType::BF16 } else { DType::F16 };
        let tokens = out.dims().first().copied().unwrap_or(0);
        let mut inputs = Vec::new();
        let mut input = |name, tensor, dtype, shape: &[usize]| -> Result<()> {
            inputs.push((name, tensor));
            check(name, tensor, dtype, shape)
        };
        check("out", out, half, &[tokens, top_k, projection.out_width()])?;
        match x_rows {
            XRows::Token => input("x", self.x, half, &[tokens, in_dim])?,
            XRows::Pair => input("x", self.x, half, &[tokens, top_k, in_dim])?,
        }
        let (mut a, b) = (self.a.iter(), self.b.iter());
        a.try_for_each(|a| input("a", a, half, &[slots, projection.a_experts(), max_rank, in_dim]))?;
        // How many there are is checked with the call.
        let width = |s| out_dims.as_slice().get(s).copied().unwrap_or(out_dims.max());
        b.enumerate().try_for_each(|(s, b)| {
            input("b", b, half, &[slots, projection.b_experts(), width(s), max_rank])
        })?;
        if let Routing::Tokens { topk_ids, token_lora, ranks } = self.routing {
            input("topk_ids", topk_ids, DType::U32, &[tokens, top_k])?;
            input("token_lora", token_lora, DType::U32, &[tokens])?;
            ranks.map_or(Ok(()), |ranks| input("ranks", ranks, DType::U32, &[slots]))?;
        }
        let mut weights = self.topk_weights.iter();
        weights.try_for_each(|weights| input("topk_weights", weights, DType::F32, &[tokens, top_k]))?;
        Ok(inputs)
    }

    /// Where in these the 16-bit tensors are, the ids, and the router's weights.
    fn places(&self, inputs: usize) -> [Range<usize>; 3] {
        let (halves, ids) = (1 + self.a.len() + self.b.len(), inputs - self.topk_weights.iter().len());
        [0..halves, halves..ids, ids..inputs]
    }
}

fn check(name: &'static str, tensor: &Tensor, dtype: DType, shape: &[usize]) -> Result<()> {
    if (tensor.dtype(), tensor.dims(), tensor.is_contiguous()) == (dtype, shape, true) {
        return Ok(());
    }
    let expected = format!("{dtype:?} {shape:?}, contiguous");
    let got = format!("{:?} {:?} with strides {:?}", tensor.dtype(), tensor.dims(), tensor.stride());
    Err(Error::Tensor(name, expected, got))
}

/// A call whose inputs are checked and locked.
struct Call<'a> {
    operator: &'a MoeLora,
    delta: &'a Delta<'a>,
    inputs: Vec<(&'a Storage, &'a Layout)>,
    route: Cell<Option<Result<Route>>>,
}

impl InplaceOp1 for Call<'_> {
    fn name(&self) -> &'static str {
        "moe-lora"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        self.route.set(match (self.operator, out) {
            (MoeLora::Cpu(operator), CpuStorage::BF16(out)) => Some(self.on_cpu(operator, out, layout)),
            (MoeLora::Cpu(operator), CpuStorage::F16(out)) => Some(self.on_cpu(operator, out, layout)),
            _ => None,
        });
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, out: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let MoeLora::Cuda(operator, stream) = self.operator else { return Ok(()) };
        self.route.set(Some(match out.dtype() {
            DType::BF16 => self.on_cuda::<half::bf16>(operator, stream, out, layout),
            _ => self.on_cuda::<half::f16>(operator, stream, out, layout),
        }));
        Ok(())
    }
}

impl Call<'_> {
    fn on_cpu<T>(&self, operator: &Operator<Cpu>, out: &mut [T], layout: &Layout) -> Result<Route>
    where
        T: Element + WithDType,
    {
        let [halves, ids, weights] = self.delta.places(self.inputs.len());
        let halves = halves.map(|i| self.on_host::<T>(i)).collect::<Result<Vec<_>>>()?;
        let ids = ids.map(|i| Ok(self.on_host::<u32>(i)?.cast())).collect::<Result<Vec<_>>>()?;
        let weights = weights.map(|i| self.on_host(i)).collect::<Result<Vec<_>>>()?;
        self.run(operator, &halves, &ids, &weights, (&mut out[elements(layout)]).into())
    }

    fn on_host<T: WithDType + Pod>(&self, i: usize) -> Result<View<'_, Host, T>> {
        match self.inputs[i] {
            (Storage::Cpu(storage), layout) => Ok(storage.as_slice::<T>()?[elements(layout)].into()),
            (other, _) => Err(Error::Device(other.device().location())),
        }
    }

    #[cfg(feature = "cuda")]
    fn on_cuda<T: Element + CudaDType>(
        &self,
        operator: &Operator<Stream>,
        stream: &CudarcStream,
        out: &mut CudaStorage,
        layout: &Layout,
    ) -> Result<Route> {
        // What is lent is held until the call is queued, so that cudarc keeps it in order with other streams.
        let [halves, ids, weights] = self.delta.places(self.inputs.len());
        let halves = halves.map(|i| self.on_device::<T>(stream, i)).collect::<Result<Vec<_>>>()?;
        let ids = ids.map(|i| self.on_device::<u32>(stream, i)).collect::<Result<Vec<_>>>()?;
        let weights = weights.map(|i| self.on_device(stream, i)).collect::<Result<Vec<_>>>()?;
        let mut out = stream.write(out.as_cuda_slice_mut::<T>()?.slice_mut(elements(layout)))?;
        let halves: Vec<_> = halves.iter().map(CudarcRead::view).collect();
        let ids: Vec<_> = ids.iter().map(|ids| ids.view().cast()).collect();
        let weights: Vec<_> = weights.iter().map(CudarcRead::view).collect();
        self.run(operator, &halves, &ids, &weights, out.view_mut())
    }

    #[cfg(feature = "cuda")]
    fn on_device<'a, T>(&'a self, stream: &'a CudarcStream, i: usize) -> Result<CudarcRead<'a, T>>
    where
        T: CudaDType + Pod,
    {
        match self.inputs[i] {
            (Storage::Cuda(held), layout) => {
                Ok(stream.read(held.as_cuda_slice::<T>()?.slice(elements(layout)))?)
            }
            (other, _) => Err(Error::Device(other.device().location())),
        }
    }

    fn run<B: Backend, T: Element>(
        &self,
        operator: &Operator<B>,
        halves: &[View<'_, B::Space, T>],
        ids: &[View<'_, B::Space, i32>],
        weights: &[View<'_, B::Space, f32>],
        out: ViewMut<'_, B::Space, T>,
    ) -> Result<Route> {
        let (a, b) = halves[1..].split_at(self.delta.a.len());
        let routing = match (self.delta.routing, ids) {
            (Routing::Tokens { .. }, [topk_ids, token_lora, ranks @ ..]) => {
                let tensors = RoutingTensors::new(*topk_ids, *token_lora);
                moe_lora::Routing::Tokens(RoutingTensors { ranks: ranks.first().copied(), ..tensors })
            }
            (Routing::On(route), _) => moe_lora::Routing::On(route),
            _ => unreachable!("`Delta::inputs` lists them"),
        };
        let call = operator.call(halves[0], a.iter().copied(), b.iter().copied(), routing, out);
        Ok(weights.iter().fold(call, |call, weights| call.topk_weights(*weights)).run()?)
    }
}

/// Where the elements of a contiguous tensor lie in its storage.
fn elements(layout: &Layout) -> Range<usize> {
    layout.start_offset()..layout.start_offset() + layout.shape().elem_count()
}
