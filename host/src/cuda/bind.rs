//! Binds the driver at run time.
//!
//! `cust` calls driver functions by name and expects the linker to find them in libcuda, which only
//! machines with a GPU have. So each function is defined here, as one jump through a slot. `cuInit`, which
//! every program must call first, opens libcuda and fills the slots; until then, and where there is no
//! driver, a slot leads to a function that returns `CUDA_ERROR_STUB_LIBRARY`.

use crate::error::{Error, Result};
use cust::sys::CUresult;
use libloading::Library;
use std::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

#[cfg(windows)]
const LIBRARY: &str = "nvcuda.dll";
#[cfg(not(windows))]
const LIBRARY: &str = "libcuda.so.1";

/// Where a slot leads while there is no driver.
extern "C" fn no_driver() -> CUresult {
    CUresult::CUDA_ERROR_STUB_LIBRARY
}

macro_rules! jump {
    ($slot:path) => {{
        #[cfg(target_arch = "x86_64")]
        core::arch::naked_asm!("jmp qword ptr [rip + {slot}]", slot = sym $slot);
        #[cfg(target_arch = "aarch64")]
        core::arch::naked_asm!("adrp x16, {slot}", "ldr x16, [x16, :lo12:{slot}]", "br x16", slot = sym $slot);
    }};
}

macro_rules! driver_functions {
    ($($name:ident)*) => {
        /// One slot a function; a slot holds the address that a call goes to.
        #[allow(non_upper_case_globals)]
        mod slots {
            use super::*;
            $(pub static $name: AtomicPtr<c_void> = AtomicPtr::new(no_driver as extern "C" fn() -> CUresult as *mut c_void);)*
        }

        $(
            // SAFETY: the arguments pass through untouched, to a function of the same name (or to
            // `no_driver`, which reads none). The name is the driver's own: nothing else may define it.
            #[unsafe(no_mangle)]
            #[unsafe(naked)]
            unsafe extern "C" fn $name() -> CUresult {
                jump!(slots::$name)
            }
        )*

        const SLOTS: &[(&str, &AtomicPtr<c_void>)] = &[$((concat!(stringify!($name), "\0"), &slots::$name),)*];
    };
}

// What cust 0.3.2 may call, and what this crate calls beside it.
driver_functions! {
    cuArray3DCreate_v2 cuArray3DGetDescriptor_v2 cuArrayDestroy cuCtxCreate_v2 cuCtxDestroy_v2
    cuCtxGetApiVersion cuCtxGetCacheConfig cuCtxGetCurrent cuCtxGetDevice cuCtxGetFlags cuCtxGetLimit
    cuCtxGetSharedMemConfig cuCtxGetStreamPriorityRange cuCtxPopCurrent_v2 cuCtxPushCurrent_v2
    cuCtxSetCacheConfig cuCtxSetCurrent cuCtxSetLimit cuCtxSetSharedMemConfig cuCtxSynchronize
    cuDestroyExternalMemory cuDeviceGet cuDeviceGetAttribute cuDeviceGetCount cuDeviceGetName
    cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxReset_v2 cuDevicePrimaryCtxRetain
    cuDevicePrimaryCtxSetFlags_v2 cuDeviceTotalMem_v2 cuDriverGetVersion cuEventCreate cuEventDestroy_v2
    cuEventElapsedTime cuEventQuery cuEventRecord cuEventSynchronize cuExternalMemoryGetMappedBuffer
    cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig cuFuncSetSharedMemConfig cuGetErrorString
    cuGraphAddKernelNode cuGraphCreate cuGraphDebugDotPrint cuGraphDestroy cuGraphExecDestroy cuGraphGetEdges
    cuGraphGetNodes cuGraphInstantiateWithFlags cuGraphKernelNodeGetParams cuGraphLaunch cuGraphNodeGetType
    cuImportExternalMemory cuLaunchHostFunc cuLaunchKernel cuLaunchKernelEx cuLinkAddData_v2 cuLinkComplete
    cuLinkCreate_v2 cuLinkDestroy cuMemAdvise cuMemAllocAsync cuMemAllocHost_v2 cuMemAllocManaged
    cuMemAllocPitch_v2 cuMemAlloc_v2 cuMemFreeAsync cuMemFreeHost cuMemFree_v2 cuMemGetInfo_v2
    cuMemPrefetchAsync cuMemcpy2D_v2 cuMemcpyAtoH_v2 cuMemcpyDtoDAsync_v2 cuMemcpyDtoD_v2
    cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2 cuMemcpyHtoA_v2 cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2
    cuMemsetD16Async cuMemsetD16_v2 cuMemsetD32Async cuMemsetD32_v2 cuMemsetD8Async cuMemsetD8_v2
    cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxActiveClusters cuOccupancyMaxPotentialBlockSize cuPointerGetAttribute cuStreamBeginCapture_v2 cuStreamCreateWithPriority
    cuStreamDestroy_v2 cuStreamEndCapture cuStreamGetFlags cuStreamGetPriority cuStreamSynchronize
    cuStreamWaitEvent cuSurfObjectCreate cuSurfObjectDestroy cuSurfObjectGetResourceDesc cuTexObjectCreate
    cuTexObjectDestroy cuTexObjectGetResourceDesc cuTexObjectGetResourceViewDesc
    cuThreadExchangeStreamCaptureMode
}

/// Opens the driver library and fills the slots, once. What a driver does not have stays unbound.
fn driver() -> Result<&'static Library, &'static str> {
    static DRIVER: OnceLock<Result<Library, String>> = OnceLock::new();
    let driver = DRIVER.get_or_init(|| {
        // SAFETY: libcuda's initialisers have no preconditions.
        let library = unsafe { Library::new(LIBRARY) }.map_err(|error| error.to_string())?;
        for (name, slot) in SLOTS {
            // SAFETY: only the address is taken here; the caller of the function knows its signature.
            if let Ok(function) = unsafe { library.get::<*mut c_void>(name.as_bytes()) } {
                slot.store(*function, Ordering::Release);
            }
        }
        Ok(library)
    });
    driver.as_ref().map_err(String::as_str)
}

// SAFETY: the name is the driver's own, and the signature is the driver's.
#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: u32) -> CUresult {
    let Ok(library) = driver() else { return no_driver() };
    // SAFETY: the signature is the driver's.
    match unsafe { library.get::<unsafe extern "C" fn(u32) -> CUresult>(b"cuInit\0") } {
        // SAFETY: any flags are allowed; wrong ones are an error.
        Ok(init) => unsafe { init(flags) },
        Err(_) => no_driver(),
    }
}

/// Makes sure that there is a driver, and says why when there is none.
pub(super) fn require() -> Result<()> {
    match driver() {
        Ok(_) => Ok(()),
        Err(reason) => Err(Error::NoDevice { reason: format!("no CUDA driver ({reason})") }),
    }
}

/// True when the driver has the function that `slot` names.
pub(super) fn has_launch_kernel_ex() -> bool {
    slots::cuLaunchKernelEx.load(Ordering::Acquire) != no_driver as extern "C" fn() -> CUresult as *mut c_void
}
