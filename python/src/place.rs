//! Where a call runs: the device, the stream, and the workspace.

use crate::fault::{Fault, Outcome};
use crate::read::Reader;
use crate::tensor::unsaid;
use dlpack_ffi::DLDeviceType;
use moe_lora::cuda::{self, AllowAllocation, CallersContext, Gpu, Options, Queue};
use moe_lora::{Backend, DType, Error, ExpertWeights, Projection, ProjectionSizes, XRows};
use pyo3::intern;
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A stream's address; 0 is the legacy default stream.
type Stream = usize;

/// `CU_STREAM_PER_THREAD`: one address for the default streams of all threads.
const PER_THREAD: Stream = 2;

/// The slices that the workspaces kept here have room for: w13 has two, and w2, whose one slice comes first in
/// some layers, shall not leave a workspace that w13 outgrows.
const SLICES: usize = 2;

/// Nothing that a panic could leave half done is kept behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device, with the kernels loaded, at its first use. It stays for the rest of the process, as there is no
/// moment at which the driver still answers and nobody calls any more.
fn gpu(ordinal: u32) -> Outcome<&'static Gpu> {
    static GPUS: Mutex<BTreeMap<u32, &'static Gpu>> = Mutex::new(BTreeMap::new());
    let mut gpus = lock(&GPUS);
    if let Some(gpu) = gpus.get(&ordinal) {
        return Ok(gpu);
    }
    let _allow = AllowAllocation::begin()?;
    let gpu: &Gpu = Box::leak(Box::new(Gpu::new(ordinal)?));
    gpus.insert(ordinal, gpu);
    Ok(gpu)
}

/// The stream that a call runs on: the given one, or the current one of the tensors' library.
pub fn stream(given: Option<&Bound<'_, PyAny>>, reader: &Reader<'_>) -> Outcome<Stream> {
    let &Reader { ordinal, ref exchange } = reader;
    let py = exchange.py();
    if let Some(given) = given {
        // An address; a stream of PyTorch's; the protocol of cuda.core and others.
        if let Ok(address) = given.extract::<Stream>() {
            return Ok(address);
        }
        if let Some(address) = given.getattr_opt(intern!(py, "cuda_stream"))? {
            return Ok(address.extract()?);
        }
        if given.hasattr(intern!(py, "__cuda_stream__"))? {
            let (_version, address) =
                given.call_method0(intern!(py, "__cuda_stream__"))?.extract::<(u32, Stream)>()?;
            return Ok(address);
        }
        let got = given.get_type().name()?;
        let expected = "an address, a torch.cuda.Stream or an object with __cuda_stream__";
        return Err(Fault::Argument(format!("stream: expected {expected}, got {got}")));
    }
    if let Some(current) = exchange.api.and_then(|api| api.current_work_stream) {
        let mut stream = std::ptr::null_mut::<c_void>();
        // SAFETY: writes one address, or raises.
        if unsafe { current(DLDeviceType::kDLCUDA, ordinal as i32, &mut stream) } != 0 {
            return Err(PyErr::take(py).map_or_else(unsaid, Fault::Raised));
        }
        return Ok(stream as Stream);
    }
    // Tensors of another library, or of a PyTorch before 2.10, where PyTorch is in use.
    let modules = py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))?;
    let torch = modules.call_method1(intern!(py, "get"), (intern!(py, "torch"),))?;
    if torch.is_none() {
        return Ok(0);
    }
    let cuda = torch.getattr(intern!(py, "cuda"))?;
    if !cuda.call_method0(intern!(py, "is_initialized"))?.extract::<bool>()? {
        return Ok(0);
    }
    let current = cuda.call_method1(intern!(py, "current_stream"), (ordinal,))?;
    Ok(current.getattr(intern!(py, "cuda_stream"))?.extract()?)
}

/// Where a call runs.
pub struct Place<'a, 'py> {
    /// The CUDA device.
    pub ordinal: u32,
    /// A stream of the device.
    pub stream: Stream,
    /// The caller's workspace; without one, that of the stream.
    pub workspace: Option<&'a Bound<'py, Workspace>>,
}

impl Place<'_, '_> {
    /// Runs `work`, which needs no workspace, on the stream.
    pub fn run_alone(&self, work: impl FnOnce(&Queue<'_>) -> moe_lora::Result<()>) -> Outcome<()> {
        let _caller = CallersContext::remember();
        Ok(work(&self.queue()?)?)
    }

    fn queue(&self) -> Outcome<Queue<'static>> {
        // SAFETY: the stream is the one that the caller named, or its library's current one, and so is live.
        Ok(unsafe { gpu(self.ordinal)?.queue_raw(self.stream as *mut _, Options::default())? })
    }

    /// Runs `work` on the stream, with a workspace that has room for `tokens` tokens on `projection`. `kept`:
    /// the call's route is the one that the workspace keeps.
    pub fn run(
        &self,
        projection: &Projection,
        tokens: usize,
        kept: bool,
        work: impl FnOnce(&Queue<'_>, &mut cuda::Workspace) -> moe_lora::Result<()>,
    ) -> Outcome<()> {
        let &Place { ordinal, stream, workspace } = self;
        if stream == PER_THREAD && workspace.is_none() {
            let got = "the per-thread default stream, which is another for each thread";
            return Err(Fault::Argument(format!("workspace: expected one, as the call runs on {got}")));
        }
        let _caller = CallersContext::remember();
        let queue = self.queue()?;
        if let Some(workspace) = workspace {
            let workspace = workspace.get();
            if workspace.gpu.0 != ordinal {
                let (expected, got) =
                    (format!("one on cuda:{ordinal}"), format!("one on cuda:{}", workspace.gpu.0));
                return Err(Fault::Argument(format!("workspace: expected {expected}, got {got}")));
            }
            let mut memory = lock(&workspace.memory);
            return Ok(work(&queue, memory.as_mut().expect("it is let go of when nobody has it"))?);
        }
        let mut workspaces = lock(&WORKSPACES);
        let workspaces = workspaces.entry((ordinal, stream)).or_default();
        let room = workspaces.last().map(|workspace| workspace.check_room(projection, tokens));
        match room {
            Some(Ok(())) => {}
            // A workspace that has just grown keeps no route. The call is told that it does not fit.
            Some(Err(Error::WorkspaceTooSmall { .. })) if kept => {}
            None | Some(Err(Error::WorkspaceTooSmall { .. })) => {
                let slices = projection.sizes().slices.max(SLICES);
                let projection = Projection::new(ProjectionSizes { slices, ..*projection.sizes() })?;
                let tokens = tokens.next_power_of_two();
                let _allow = AllowAllocation::begin()?;
                workspaces.push(match workspaces.last() {
                    Some(workspace) => workspace.grown(&projection, tokens)?,
                    None => queue.workspace(&[projection], tokens)?,
                });
            }
            Some(Err(error)) => return Err(error.into()),
        }
        Ok(work(&queue, workspaces.last_mut().expect("there is one by now"))?)
    }
}

/// Workspaces of calls that name none, by device and stream; the last is the largest. A captured graph names the
/// memory of the workspace that it was captured with, so none is ever freed; as their tokens double, those that were
/// outgrown by larger batches take no more than the last.
static WORKSPACES: Mutex<BTreeMap<(u32, Stream), Vec<cuda::Workspace>>> = Mutex::new(BTreeMap::new());

/// Scratch memory of calls, and the route of the last one.
#[pyclass(frozen, module = "moe_lora")]
pub struct Workspace {
    /// `None` from its end on.
    memory: Mutex<Option<cuda::Workspace>>,
    gpu: (u32, &'static Gpu),
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // Python lets go of things at any time, while a stream is captured too. What fails has nobody to go to.
        let _caller = CallersContext::remember();
        let _allow = AllowAllocation::begin();
        let _ = self.gpu.1.make_current();
        lock(&self.memory).take();
    }
}

#[pymethods]
impl Workspace {
    #[new]
    #[pyo3(signature = (max_tokens, *, top_k, experts, slots, max_rank, slices=SLICES, device=0))]
    fn new(
        max_tokens: usize,
        top_k: usize,
        experts: usize,
        slots: usize,
        max_rank: usize,
        slices: usize,
        device: u32,
    ) -> Outcome<Self> {
        let projection = layer(top_k, experts, slots, max_rank, slices)?;
        let _caller = CallersContext::remember();
        let gpu = gpu(device)?;
        // SAFETY: null is the default stream, and nothing is queued.
        let queue = unsafe { gpu.queue_raw(std::ptr::null_mut(), Options::default())? };
        let _allow = AllowAllocation::begin()?;
        let memory = Mutex::new(Some(queue.workspace(&[projection], max_tokens)?));
        Ok(Workspace { memory, gpu: (device, gpu) })
    }

    #[getter]
    fn device(&self) -> u32 {
        self.gpu.0
    }

    #[getter]
    fn nbytes(&self) -> usize {
        lock(&self.memory).as_ref().map_or(0, cuda::Workspace::bytes)
    }
}

/// A projection of which the sizes matter that a route and a workspace depend on.
pub fn layer(
    top_k: usize,
    experts: usize,
    slots: usize,
    max_rank: usize,
    slices: usize,
) -> Outcome<Projection> {
    Ok(Projection::new(ProjectionSizes {
        dtype: DType::Bf16,
        top_k,
        experts,
        slots,
        max_rank,
        slices,
        in_dim: 1,
        out_dim: 1,
        x_rows: XRows::Token,
        a_experts: ExpertWeights::Shared,
        b_experts: ExpertWeights::Shared,
    })?)
}
