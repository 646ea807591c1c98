//! Binds the driver to `cust` at run time.
//!
//! `cust` calls driver functions by name and expects the linker to find them in libcuda, which only machines
//! with a GPU have. So each function is defined here, as one jump through a slot. The slots are filled when
//! the driver is first wanted; until then, and where there is no driver, a slot leads to a function that
//! returns `CUDA_ERROR_STUB_LIBRARY`.

use cust::sys::CUresult;
use libloading::Library;
use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Where a slot leads while there is no driver.
pub extern "C" fn no_driver() -> CUresult {
    CUresult::CUDA_ERROR_STUB_LIBRARY
}

macro_rules! jump {
    ($slot:path) => {{
        #[cfg(target_arch = "x86_64")]
        core::arch::naked_asm!("jmp qword ptr [rip + {slot}]", slot = sym $slot);
        #[cfg(target_arch = "aarch64")]
        core::arch::naked_asm!(
            "adrp x16, {slot}", "ldr x16, [x16, :lo12:{slot}]", "br x16", slot = sym $slot
        );
    }};
}

macro_rules! driver_functions {
    ($($name:ident)*) => {
        /// One slot a function; a slot holds the address that a call goes to.
        #[allow(non_upper_case_globals)]
        mod slots {
            use super::*;
            $(pub static $name: AtomicPtr<c_void> =
                AtomicPtr::new(no_driver as extern "C" fn() -> CUresult as *mut c_void);)*
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

        const SLOTS: &[(&str, &AtomicPtr<c_void>)] =
            &[$((concat!(stringify!($name), "\0"), &slots::$name),)*];
    };
}

// What cust 0.3.2 may call.
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
    cuImportExternalMemory cuLaunchHostFunc cuLaunchKernel cuLinkAddData_v2 cuLinkComplete
    cuLinkCreate_v2 cuLinkDestroy cuMemAdvise cuMemAllocAsync cuMemAllocHost_v2 cuMemAllocManaged
    cuMemAllocPitch_v2 cuMemAlloc_v2 cuMemFreeAsync cuMemFreeHost cuMemFree_v2 cuMemGetInfo_v2
    cuMemPrefetchAsync cuMemcpy2D_v2 cuMemcpyAtoH_v2 cuMemcpyDtoDAsync_v2 cuMemcpyDtoD_v2
    cuMemcpyDtoHAsync_v2 cuMemcpyDtoH_v2 cuMemcpyHtoA_v2 cuMemcpyHtoDAsync_v2 cuMemcpyHtoD_v2
    cuMemsetD16Async cuMemsetD16_v2 cuMemsetD32Async cuMemsetD32_v2 cuMemsetD8Async cuMemsetD8_v2
    cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleUnload
    cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxPotentialBlockSize cuStreamCreateWithPriority
    cuStreamDestroy_v2 cuStreamGetFlags cuStreamGetPriority cuStreamSynchronize
    cuStreamWaitEvent cuSurfObjectCreate cuSurfObjectDestroy cuSurfObjectGetResourceDesc cuTexObjectCreate
    cuTexObjectDestroy cuTexObjectGetResourceDesc cuTexObjectGetResourceViewDesc

}

/// Fills the slots from the driver's library. What it does not have stays unbound.
pub fn fill(library: &Library) {
    for (name, slot) in SLOTS {
        // SAFETY: only the address is taken here; the caller of the function knows its signature.
        if let Ok(function) = unsafe { library.get::<*mut c_void>(name.as_bytes()) } {
            slot.store(*function, Ordering::Release);
        }
    }
}
