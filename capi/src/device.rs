//! The handles: where calls run, and what they keep there.

use crate::abi::{Expand, Forward, Routing, Shrink};
use crate::fault::Fault;
use half::{bf16, f16};
#[cfg(feature = "cuda")]
use moe_lora::cuda;
use moe_lora::{Backend, DType, Element, Host, Projection, Route, cpu};
use std::ffi::c_void;
#[cfg(feature = "cuda")]
use std::ptr;

/// Where calls run: the CPU, or a CUDA device. May be used by several threads at a time.
pub enum Context {
    /// The CPU.
    Cpu,
    /// A device, which its workspaces keep alive.
    #[cfg(feature = "cuda")]
    Cuda(cuda::Device),
}

/// Scratch memory and the last route of calls on one context. May be used by one call at a time.
pub struct Workspace {
    memory: Memory,
    /// Of the last call that ended well: what a call without routing is made on.
    last: Option<Route>,
}

enum Memory {
    /// For the CPU.
    Cpu(cpu::Workspace),
    /// For a device, and the stream of the last call.
    #[cfg(feature = "cuda")]
    Cuda(cuda::Workspace, cuda::Stream),
}

impl Context {
    /// The device with this number.
    pub fn cuda(ordinal: u32) -> Result<Self, Fault> {
        #[cfg(feature = "cuda")]
        {
            Ok(Context::Cuda(cuda::Device::new(ordinal)?))
        }
        #[cfg(not(feature = "cuda"))]
        {
            let reason = format!("this library was built without the GPU back end (device {ordinal})");
            Err(moe_lora::Error::NoDevice { reason }.into())
        }
    }

    /// Scratch memory for calls of up to `max_tokens` tokens on any of `projections`.
    pub fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Workspace, Fault> {
        let memory = match self {
            Context::Cpu => Memory::Cpu(cpu::Cpu.workspace(projections, max_tokens)?),
            #[cfg(feature = "cuda")]
            Context::Cuda(device) => {
                // SAFETY: null is the default stream.
                let stream = unsafe { device.foreign_stream(ptr::null_mut()) };
                Memory::Cuda(stream.workspace(projections, max_tokens)?, stream)
            }
        };
        Ok(Workspace { memory, last: None })
    }
}

impl Workspace {
    /// Runs a call: on `stream`, where there are streams.
    ///
    /// # Safety
    /// As for [`Call::run`]; and `stream` is a live stream of the device's primary context, or null. The
    /// stream of the workspace's call before is live too.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "the CPU has no streams"))]
    pub unsafe fn run(
        &mut self,
        stream: *mut c_void,
        projection: &Projection,
        call: &impl Call,
    ) -> Result<(), Fault> {
        // SAFETY: as the caller promises.
        let route = unsafe {
            match &mut self.memory {
                Memory::Cpu(memory) => run_typed(&cpu::Cpu, memory, projection, self.last, call)?,
                #[cfg(feature = "cuda")]
                Memory::Cuda(memory, last_stream) => {
                    if last_stream.as_raw() != stream {
                        *last_stream = memory.device().foreign_stream(stream);
                    }
                    run_typed(last_stream, memory, projection, self.last, call)?
                }
            }
        };
        self.last = Some(route);
        Ok(())
    }

    /// What a call would launch.
    ///
    /// # Safety
    /// As for [`Forward::with`].
    pub unsafe fn plan(&self, projection: &Projection, call: &Forward) -> Result<String, Fault> {
        // SAFETY: as the caller promises.
        unsafe {
            match projection.sizes().dtype {
                DType::Bf16 => self.plan_typed::<bf16>(projection, call),
                DType::F16 => self.plan_typed::<f16>(projection, call),
            }
        }
    }

    /// # Safety
    /// As for [`Forward::with`].
    unsafe fn plan_typed<T: Element>(
        &self,
        projection: &Projection,
        call: &Forward,
    ) -> Result<String, Fault> {
        // SAFETY: as the caller promises.
        unsafe {
            match &self.memory {
                Memory::Cpu(_) => call.with::<Host, T, _>(self.last, |call| {
                    call.check(projection)?;
                    Ok(format!("cpu: {} threads", rayon::current_num_threads()))
                }),
                #[cfg(feature = "cuda")]
                Memory::Cuda(memory, stream) => call.with::<moe_lora::Cuda, T, _>(self.last, |call| {
                    let plan = stream.plan_forward(memory, projection, &call)?;
                    Ok(plan.map_or_else(|| "nothing to launch".to_owned(), |plan| plan.to_string()))
                }),
            }
        }
    }
}

/// A call that any back end can run, on elements of any type.
pub trait Call {
    /// Runs it, on the route `last` where it has no routing, and returns its route.
    ///
    /// # Safety
    /// As for [`Forward::with`], in the back end's space.
    unsafe fn run<B: Backend, T: Element>(
        &self,
        backend: &B,
        workspace: &mut B::Workspace,
        projection: &Projection,
        last: Option<Route>,
    ) -> Result<Route, Fault>;
}

/// # Safety
/// As for [`Call::run`].
unsafe fn run_typed<B: Backend>(
    backend: &B,
    workspace: &mut B::Workspace,
    projection: &Projection,
    last: Option<Route>,
    call: &impl Call,
) -> Result<Route, Fault> {
    // SAFETY: as the caller promises.
    unsafe {
        match projection.sizes().dtype {
            DType::Bf16 => call.run::<B, bf16>(backend, workspace, projection, last),
            DType::F16 => call.run::<B, f16>(backend, workspace, projection, last),
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
        _last: Option<Route>,
    ) -> Result<Route, Fault> {
        // SAFETY: as the caller promises.
        let routing = unsafe { self.routing.tensors(self.tokens)? };
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
                last: Option<Route>,
            ) -> Result<Route, Fault> {
                // SAFETY: as the caller promises.
                unsafe {
                    self.with::<B::Space, T, Route>(last, |call| {
                        Ok(backend.$function(workspace, projection, call)?)
                    })
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
