//! The C interface of moe-lora: `libmoe_lora.so`, and `include/moe_lora.h`, which `cargo xtask header` writes
//! from this file and `abi.rs`.
//!
//! Every function checks its arguments as far as it can, returns a status, and lets no panic out. The
//! caller's part is in the header's first comment, which stands in `cbindgen.toml`.

#![allow(clippy::missing_safety_doc)]

mod abi;
mod device;
mod fault;
mod read;

use crate::abi::{Expand, Forward, Projection, Routing, Shrink, Status};
use crate::device::{Call, Context, RouteAlone, Workspace};
use crate::fault::{Fault, run};
use crate::read::{Versioned, read};
use std::ffi::{c_char, c_void};
use std::ptr;

/// What is behind a handle or an out parameter.
///
/// # Safety
/// `pointer` is null or points at a live `T` that nothing else uses.
unsafe fn pointee<'a, T>(pointer: *mut T, argument: &'static str) -> Result<&'a mut T, Fault> {
    // SAFETY: as the caller promises.
    unsafe { pointer.as_mut() }.ok_or(Fault::NullArgument { argument })
}

/// The version of this library, for example "0.2.0".
#[unsafe(no_mangle)]
pub extern "C" fn moe_lora_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The version of this library's interface: MOE_LORA_ABI_VERSION of its header. A program can use a library
/// of the same or a later version.
#[unsafe(no_mangle)]
pub extern "C" fn moe_lora_abi_version() -> u32 {
    abi::MOE_LORA_ABI_VERSION
}

/// The message of this thread's last error: the argument, what was expected, what came. UTF-8, never NULL. It
/// is valid until this thread's next call that fails.
#[unsafe(no_mangle)]
pub extern "C" fn moe_lora_last_error() -> *const c_char {
    fault::message()
}

/// Makes a context for calls on the CPU. They use host memory and all cores, and are done when they return.
///
/// `context`: where the handle is written, on success alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_context_create_cpu(context: *mut *mut Context) -> Status {
    run(|| {
        // SAFETY: as the caller promises.
        *unsafe { pointee(context, "context")? } = Box::into_raw(Box::new(Context::Cpu));
        Ok(())
    })
}

/// Makes a context for calls on CUDA device `ordinal`, in its primary context, which CUDA's runtime and so
/// PyTorch use too. Loads the kernels; the thread's current CUDA context stays what it was.
///
/// `context`: where the handle is written, on success alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_context_create_cuda(ordinal: u32, context: *mut *mut Context) -> Status {
    run(|| {
        // SAFETY: as the caller promises.
        let context = unsafe { pointee(context, "context")? };
        *context = Box::into_raw(Box::new(Context::cuda(ordinal)?));
        Ok(())
    })
}

/// Lets go of a context; NULL is allowed. Workspaces made on it stay usable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_context_destroy(context: *mut Context) -> Status {
    run(|| {
        if context.is_null() {
            return Ok(());
        }
        // SAFETY: as the caller promises.
        drop(unsafe { Box::from_raw(context) });
        Ok(())
    })
}

/// Makes the scratch memory for calls of up to `max_tokens` tokens on any of `projection_count` projections.
/// Calls themselves allocate nothing on a device.
///
/// `projections`: pointers to the projections, read here and not kept.
/// `workspace`: where the handle is written, on success alone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_workspace_create(
    context: *const Context,
    projections: *const *const Projection,
    projection_count: usize,
    max_tokens: usize,
    workspace: *mut *mut Workspace,
) -> Status {
    run(|| {
        // SAFETY: as the caller promises; a context is never written.
        let (context, workspace) = unsafe { (context.as_ref(), pointee(workspace, "workspace")?) };
        let context = context.ok_or(Fault::NullArgument { argument: "context" })?;
        if projections.is_null() {
            return Err(Fault::NullArgument { argument: "projections" });
        }
        if projection_count == 0 {
            return Err(moe_lora::Error::ZeroSize { what: "projection_count" }.into());
        }
        let projections = (0..projection_count)
            // SAFETY: as the caller promises.
            .map(|i| unsafe { read(projections.add(i).read(), "projection")? }.checked())
            .collect::<Result<Vec<_>, _>>()?;
        *workspace = Box::into_raw(Box::new(context.workspace(&projections, max_tokens)?));
        Ok(())
    })
}

/// Frees a workspace; NULL is allowed. Work that was queued with it must have ended. A graph that names it
/// must not be replayed again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_workspace_destroy(workspace: *mut Workspace) -> Status {
    run(|| {
        if workspace.is_null() {
            return Ok(());
        }
        // SAFETY: as the caller promises.
        drop(unsafe { Box::from_raw(workspace) });
        Ok(())
    })
}

/// Finds the route of a layer and keeps it in the workspace. Later calls with the same number of tokens use
/// it by a `routing` of NULL. Their projections must have the same `top_k`, `experts`, `slots` and
/// `max_rank`.
///
/// `stream`: a CUstream (a cudaStream_t) of the device; NULL: its default stream. The CPU ignores it.
/// `tokens`: T; 0 is legal and does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_route(
    workspace: *mut Workspace,
    stream: *mut c_void,
    projection: *const Projection,
    tokens: usize,
    routing: *const Routing,
) -> Status {
    run(|| {
        // SAFETY: as the caller promises.
        unsafe {
            let workspace = pointee(workspace, "workspace")?;
            let projection = read(projection, "projection")?.checked()?;
            let call = RouteAlone { tokens, routing: read(routing, "routing")? };
            workspace.run(stream, &projection, &call)
        }
    })
}

/// A whole call. On a GPU it is queued on `stream`. It allocates nothing, waits for nothing and can be
/// captured into a graph. All memory that it names must stay until it has run.
///
/// `stream`: a CUstream (a cudaStream_t) of the device; NULL: its default stream. The CPU ignores it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_forward(
    workspace: *mut Workspace,
    stream: *mut c_void,
    projection: *const Projection,
    call: *const Forward,
) -> Status {
    // SAFETY: as the caller promises.
    unsafe { run_call(workspace, stream, projection, call) }
}

/// The first half of a call alone. For tensor parallelism, where `h` is reduced or gathered between the
/// halves. Queued as moe_lora_forward() is.
///
/// `stream`: a CUstream (a cudaStream_t) of the device; NULL: its default stream. The CPU ignores it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_shrink(
    workspace: *mut Workspace,
    stream: *mut c_void,
    projection: *const Projection,
    call: *const Shrink,
) -> Status {
    // SAFETY: as the caller promises.
    unsafe { run_call(workspace, stream, projection, call) }
}

/// The second half of a call alone. Queued as moe_lora_forward() is.
///
/// `stream`: a CUstream (a cudaStream_t) of the device; NULL: its default stream. The CPU ignores it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_expand(
    workspace: *mut Workspace,
    stream: *mut c_void,
    projection: *const Projection,
    call: *const Expand,
) -> Status {
    // SAFETY: as the caller promises.
    unsafe { run_call(workspace, stream, projection, call) }
}

/// # Safety
/// As for the functions that call it.
unsafe fn run_call<C: Call + Versioned>(
    workspace: *mut Workspace,
    stream: *mut c_void,
    projection: *const Projection,
    call: *const C,
) -> Status {
    run(|| {
        // SAFETY: as the caller promises.
        unsafe {
            let workspace = pointee(workspace, "workspace")?;
            let projection = read(projection, "projection")?.checked()?;
            workspace.run(stream, &projection, &read(call, "call")?)
        }
    })
}

/// Describes in words what moe_lora_forward() would launch: kernels, tiles, grids, width of offsets. It
/// checks the call and reads no tensor.
///
/// `text`: where the description is written, cut to `capacity` bytes, of which the last is a NUL; may be NULL
/// when `capacity` is 0.
/// `length`: where the bytes of the whole description are written, without the NUL; may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn moe_lora_plan(
    workspace: *const Workspace,
    projection: *const Projection,
    call: *const Forward,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> Status {
    run(|| {
        // SAFETY: as the caller promises.
        let plan = unsafe {
            let workspace = workspace.as_ref().ok_or(Fault::NullArgument { argument: "workspace" })?;
            let projection = read(projection, "projection")?.checked()?;
            workspace.plan(&projection, &read(call, "call")?)?
        };
        if text.is_null() && capacity > 0 {
            return Err(Fault::NullArgument { argument: "text" });
        }
        if let Some(end) = capacity.checked_sub(1) {
            let written = plan.floor_char_boundary(end);
            // SAFETY: as the caller promises, there are `capacity` bytes.
            unsafe {
                ptr::copy_nonoverlapping(plan.as_ptr(), text.cast(), written);
                text.add(written).write(0);
            }
        }
        // SAFETY: as the caller promises.
        if let Some(length) = unsafe { length.as_mut() } {
            *length = plan.len();
        }
        Ok(())
    })
}
