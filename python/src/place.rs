//! Where a call runs: the device, the stream, and the workspace.

use crate::fault::{Fault, Outcome};
use crate::read::Reader;
use crate::tensor::unsaid;
use dlpack_ffi::DLDeviceType;
use moe_lora::cuda::{self, Device};
use moe_lora::{Backend, DType, Error, ExpertWeights, OutDims, Projection, ProjectionSizes, Route, XRows};
use pyo3::intern;
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A stream's address; 0 is the legacy default stream.
type Address = usize;

/// `CU_STREAM_PER_THREAD`: one address for the default streams of all threads.
const PER_THREAD: Address = 2;

/// The slices that the workspaces kept here have room for: w13 has two, and w2, whose one slice comes first
/// in some layers, shall not leave a workspace that w13 outgrows.
const SLICES: usize = 2;

/// Nothing that a panic could leave half done is kept behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device, with the kernels loaded, at its first use. It stays for the rest of the process, as there is
/// no moment at which the driver still answers and nobody calls any more.
fn device(ordinal: u32) -> Outcome<Device> {
    static DEVICES: Mutex<BTreeMap<u32, Device>> = Mutex::new(BTreeMap::new());
    let mut devices = lock(&DEVICES);
    if let Some(device) = devices.get(&ordinal) {
        return Ok(device.clone());
    }
    let device = Device::new(ordinal)?;
    devices.insert(ordinal, device.clone());
    Ok(device)
}

/// The stream at an address.
fn stream_at(device: &Device, address: Address) -> cuda::Stream {
    // SAFETY: the stream is the one that the caller named, or its library's current one: it is live, and its
    // library keeps it.
    unsafe { device.foreign_stream(address as *mut c_void) }
}

/// The stream that a call runs on: the given one, or the current one of the tensors' library.
pub fn stream(given: Option<&Bound<'_, PyAny>>, reader: &Reader<'_>) -> Outcome<Address> {
    let &Reader { ordinal, ref exchange } = reader;
    let py = exchange.py();
    if let Some(given) = given {
        // An address; a stream of PyTorch's; the protocol of cuda.core and others.
        if let Ok(address) = given.extract::<Address>() {
            return Ok(address);
        }
        if let Some(address) = given.getattr_opt(intern!(py, "cuda_stream"))? {
            return Ok(address.extract()?);
        }
        if given.hasattr(intern!(py, "__cuda_stream__"))? {
            let (_version, address) =
                given.call_method0(intern!(py, "__cuda_stream__"))?.extract::<(u32, Address)>()?;
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
        return Ok(stream as Address);
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
    pub stream: Address,
    /// The caller's workspace; without one, that of the stream.
    pub workspace: Option<&'a Bound<'py, Workspace>>,
}

/// What a call is given of its place, besides the workspace: the stream, and the route of the workspace's
/// call before.
pub type On<'a> = (&'a cuda::Stream, Option<Route>);

impl Place<'_, '_> {
    /// Runs `work`, which needs no workspace, on the stream.
    pub fn run_alone(&self, work: impl FnOnce(&cuda::Stream) -> moe_lora::Result<()>) -> Outcome<()> {
        let mut own = lock(&OWN);
        let own = own_of(&mut own, self.ordinal, self.stream)?;
        Ok(work(&own.stream)?)
    }

    /// Runs `work` on the stream, with a workspace that has room for `tokens` tokens on `projection`. `kept`:
    /// the call's route is the one of the workspace's call before.
    pub fn run(
        &self,
        projection: &Projection,
        tokens: usize,
        kept: bool,
        work: impl FnOnce(On<'_>, &mut cuda::Workspace) -> moe_lora::Result<Route>,
    ) -> Outcome<()> {
        let &Place { ordinal, stream, workspace } = self;
        if stream == PER_THREAD && workspace.is_none() {
            let got = "the per-thread default stream, which is another for each thread";
            return Err(Fault::Argument(format!("workspace: expected one, as the call runs on {got}")));
        }
        if let Some(workspace) = workspace {
            let workspace = workspace.get();
            if workspace.ordinal != ordinal {
                let (expected, got) =
                    (format!("one on cuda:{ordinal}"), format!("one on cuda:{}", workspace.ordinal));
                return Err(Fault::Argument(format!("workspace: expected {expected}, got {got}")));
            }
            let Kept { memory, stream: last_stream, last } = &mut *lock(&workspace.kept);
            if last_stream.as_raw() as Address != stream {
                *last_stream = stream_at(memory.device(), stream);
            }
            *last = Some(work((last_stream, *last), memory)?);
            return Ok(());
        }
        let mut own = lock(&OWN);
        let Own { stream, workspaces, last } = own_of(&mut own, ordinal, stream)?;
        let room = workspaces.last().map(|workspace| workspace.check_room(projection, tokens));
        match room {
            Some(Ok(())) => {}
            // A workspace that has just grown holds no route. The call is told that it does not fit.
            Some(Err(Error::WorkspaceTooSmall { .. })) if kept => {}
            None | Some(Err(Error::WorkspaceTooSmall { .. })) => {
                // Of its room N is no part.
                let out_dims = OutDims::uniform(1, projection.slices().max(SLICES));
                let projection = Projection::new(ProjectionSizes { out_dims, ..*projection.sizes() })?;
                let tokens = tokens.next_power_of_two();
                workspaces.push(match workspaces.last() {
                    Some(workspace) => workspace.grown(&projection, tokens)?,
                    None => stream.workspace(&[projection], tokens)?,
                });
            }
            Some(Err(error)) => return Err(error.into()),
        }
        *last = Some(work((stream, *last), workspaces.last_mut().expect("there is one by now"))?);
        Ok(())
    }
}

/// What calls on a stream use that name no workspace. The last workspace is the largest. A captured graph
/// names the memory of the workspace that it was captured with, so none is ever freed; as their tokens
/// double, those that were outgrown by larger batches take no more than the last.
struct Own {
    stream: cuda::Stream,
    workspaces: Vec<cuda::Workspace>,
    /// The route of the last call.
    last: Option<Route>,
}

/// By device and stream.
type OwnByStream = BTreeMap<(u32, Address), Own>;

static OWN: Mutex<OwnByStream> = Mutex::new(BTreeMap::new());

fn own_of(own: &mut OwnByStream, ordinal: u32, stream: Address) -> Outcome<&mut Own> {
    match own.entry((ordinal, stream)) {
        Entry::Occupied(own) => Ok(own.into_mut()),
        Entry::Vacant(place) => {
            let stream = stream_at(&device(ordinal)?, stream);
            Ok(place.insert(Own { stream, workspaces: Vec::new(), last: None }))
        }
    }
}

/// Scratch memory of calls, and the route of the last one.
#[pyclass(frozen, module = "moe_lora")]
pub struct Workspace {
    ordinal: u32,
    kept: Mutex<Kept>,
}

/// What a workspace holds from call to call.
struct Kept {
    memory: cuda::Workspace,
    /// Of the last call.
    stream: cuda::Stream,
    last: Option<Route>,
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
        let stream = stream_at(&self::device(device)?, 0);
        let memory = stream.workspace(&[projection], max_tokens)?;
        Ok(Workspace { ordinal: device, kept: Mutex::new(Kept { memory, stream, last: None }) })
    }

    #[getter]
    fn device(&self) -> u32 {
        self.ordinal
    }

    #[getter]
    fn nbytes(&self) -> usize {
        lock(&self.kept).memory.bytes()
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
        in_dim: 1,
        out_dims: OutDims::uniform(1, slices),
        x_rows: XRows::Token,
        a_experts: ExpertWeights::Shared,
        b_experts: ExpertWeights::Shared,
    })?)
}
