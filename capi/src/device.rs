//! The handles: where calls run, and what they keep there.

use crate::abi::{Expand, Forward, Routing, Shrink};
use crate::fault::Fault;
use half::{bf16, f16};
#[cfg(feature = "cuda")]
use moe_lora::cuda::{self, CallersContext, Gpu, Options};
#[cfg(feature = "cuda")]
use moe_lora::plan::Stage;
use moe_lora::{Backend, DType, Element, Host, Layout, Projection, Space, cpu};
use std::ffi::c_void;
#[cfg(feature = "cuda")]
use std::{ptr, sync::Arc};

/// Where calls run: the CPU, or a CUDA device. May be used by several threads at a time.
pub enum Context {
    /// The CPU.
    Cpu,
    /// A device, which its workspaces keep alive.
    #[cfg(feature = "cuda")]
    Cuda(Arc<Gpu>),
}

/// Scratch memory and the last route of calls on one context. May be used by one call at a time, on one
/// stream at a time.
pub enum Workspace {
    /// For the CPU.
    Cpu(cpu::Workspace),
    /// For a device. The memory is freed before the device is let go.
    #[cfg(feature = "cuda")]
    Cuda(cuda::Workspace, Arc<Gpu>),
}

impl Context {
    /// The device with this number.
    pub fn cuda(ordinal: u32) -> Result<Self, Fault> {
        #[cfg(feature = "cuda")]
        {
            let _caller = CallersContext::remember();
            Ok(Context::Cuda(Arc::new(Gpu::new(ordinal)?)))
        }
        #[cfg(not(feature = "cuda"))]
        {
            let reason = format!("this library was built without the GPU back end (device {ordinal})");
            Err(moe_lora::Error::NoDevice { reason }.into())
        }
    }

    /// Scratch memory for calls of up to `max_tokens` tokens on any of `projections`.
    pub fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Workspace, Fault> {
        match self {
            Context::Cpu => Ok(Workspace::Cpu(cpu::Cpu.workspace(projections, max_tokens)?)),
            #[cfg(feature = "cuda")]
            Context::Cuda(gpu) => {
                let _caller = CallersContext::remember();
                // SAFETY: null is the default stream, and nothing is queued.
                let queue = unsafe { gpu.queue_raw(ptr::null_mut(), Options::default())? };
                Ok(Workspace::Cuda(queue.workspace(projections, max_tokens)?, Arc::clone(gpu)))
            }
        }
    }

    /// Lets go of the context.
    pub fn destroy(self) -> Result<(), Fault> {
        match self {
            Context::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Context::Cuda(gpu) => {
                // The last to let go of a device unloads the kernels from it.
                let _caller = CallersContext::remember();
                Ok(gpu.make_current()?)
            }
        }
    }
}

impl Workspace {
    /// Runs a call: on `stream`, where there are streams.
    ///
    /// # Safety
    /// As for [`Call::run`]; and `stream` is a live stream of the device's primary context, or null.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "the CPU has no streams"))]
    pub unsafe fn run(
        &mut self,
        stream: *mut c_void,
        projection: &Projection,
        call: &impl Call,
    ) -> Result<(), Fault> {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Workspace::Cpu(memory) => run_typed(&cpu::Cpu, memory, projection, call),
                #[cfg(feature = "cuda")]
                Workspace::Cuda(memory, gpu) => {
                    let _caller = CallersContext::remember();
                    let queue = gpu.queue_raw(stream.cast(), Options::default())?;
                    run_typed(&queue, memory, projection, call)
                }
            }
        }
    }

    /// What a call would launch.
    ///
    /// # Safety
    /// As for [`Forward::with`].
    pub unsafe fn plan(&self, projection: &Projection, call: &Forward) -> Result<String, Fault> {
        match self {
            Workspace::Cpu(_) => {
                // SAFETY: as the caller promises.
                unsafe { layout::<Host>(projection, call)? };
                Ok(format!("cpu: {} threads", rayon::current_num_threads()))
            }
            #[cfg(feature = "cuda")]
            Workspace::Cuda(memory, gpu) => {
                // SAFETY: as the caller promises.
                let (layout, route) = unsafe {
                    let layout = layout::<moe_lora::Device>(projection, call)?;
                    (layout, Routing::route::<moe_lora::Device>(call.routing)?)
                };
                let source = memory.route_source(projection, layout.tokens, &route)?;
                let plan = moe_lora::plan::Plan::new(
                    projection,
                    &layout,
                    Stage::Forward,
                    source,
                    &gpu.limits(),
                    &Options::default(),
                )?;
                Ok(plan.map_or_else(|| "nothing to launch".to_owned(), |plan| plan.to_string()))
            }
        }
    }

    /// Frees the memory. Work that was queued with it must have ended.
    pub fn destroy(self) -> Result<(), Fault> {
        match self {
            Workspace::Cpu(_) => Ok(()),
            #[cfg(feature = "cuda")]
            Workspace::Cuda(memory, gpu) => {
                let _caller = CallersContext::remember();
                let current = gpu.make_current();
                drop((memory, gpu));
                Ok(current?)
            }
        }
    }
}

/// Checks a call as the library will.
///
/// # Safety
/// As for [`Forward::with`].
unsafe fn layout<S: Space>(projection: &Projection, call: &Forward) -> Result<Layout, Fault> {
    // SAFETY: as the caller promises.
    unsafe {
        match projection.sizes().dtype {
            DType::Bf16 => call.with::<S, bf16, _>(|call| Ok(call.check(projection)?)),
            DType::F16 => call.with::<S, f16, _>(|call| Ok(call.check(projection)?)),
        }
    }
}

/// A call that any back end can run, on elements of any type.
pub trait Call {
    /// Runs it.
    ///
    /// # Safety
    /// As for [`Forward::with`], in the back end's space.
    unsafe fn run<B: Backend, T: Element>(
        &self,
        backend: &B,
        workspace: &mut B::Workspace,
        projection: &Projection,
    ) -> Result<(), Fault>;
}

/// # Safety
/// As for [`Call::run`].
unsafe fn run_typed<B: Backend>(
    backend: &B,
    workspace: &mut B::Workspace,
    projection: &Projection,
    call: &impl Call,
) -> Result<(), Fault> {
    // SAFETY: as the caller promises.
    unsafe {
        match projection.sizes().dtype {
            DType::Bf16 => call.run::<B, bf16>(backend, workspace, projection),
            DType::F16 => call.run::<B, f16>(backend, workspace, projection),
        }
    }
}

/// The routing alone.
pub struct RouteAlone {
    /// T.
    pub tokens: usize,
    /// Who goes where.
    pub routing: Routing,
}

impl Call for RouteAlone {
    unsafe fn run<B: Backend, T: Element>(
        &self,
        backend: &B,
        workspace: &mut B::Workspace,
        projection: &Projection,
    ) -> Result<(), Fault> {
        // SAFETY: as the caller promises.
        let routing = unsafe { self.routing.tensors()? };
        Ok(backend.route(workspace, projection, self.tokens, routing)?)
    }
}

macro_rules! calls {
    ($($call:ident: $function:ident,)*) => {
        $(impl Call for $call {
            unsafe fn run<B: Backend, T: Element>(
                &self,
                backend: &B,
                workspace: &mut B::Workspace,
                projection: &Projection,
            ) -> Result<(), Fault> {
                // SAFETY: as the caller promises.
                unsafe {
                    self.with::<B::Space, T, ()>(|call| Ok(backend.$function(workspace, projection, call)?))
                }
            }
        })*
    };
}

calls! {
    Forward: forward,
    Shrink: shrink,
    Expand: expand,
}
