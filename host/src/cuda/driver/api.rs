//! The driver's functions, called by address.

use crate::error::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

#[cfg(windows)]
const LIBRARY: &str = "nvcuda.dll";
#[cfg(not(windows))]
const LIBRARY: &str = "libcuda.so.1";

/// The oldest CUDA version whose driver has all that is called here, as `cuDriverGetVersion` writes it.
const OLDEST: i32 = 12_000;

/// A context, stream, module, function, event or graph of the driver's.
pub type Handle = *mut c_void;

/// `CUresult`. A number, since newer drivers return values that no enum of today knows.
type Status = u32;
const SUCCESS: Status = 0;
const NOT_FOUND: Status = 500;

/// `CUlaunchAttribute`: an id and 64 bytes of value.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct LaunchAttribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

impl LaunchAttribute {
    /// `CU_LAUNCH_ATTRIBUTE_COOPERATIVE`: all blocks run at once, or the launch is refused.
    pub const COOPERATIVE: u32 = 2;
    /// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`.
    pub const CLUSTER_DIMENSION: u32 = 4;
    /// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`.
    pub const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

    pub fn new(id: u32, words: [u32; 3]) -> Self {
        let mut value = [0; 16];
        value[..3].copy_from_slice(&words);
        LaunchAttribute { id, padding: 0, value }
    }
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct LaunchConfig {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub stream: Handle,
    pub attributes: *const LaunchAttribute,
    pub attribute_count: u32,
}

/// `CUstreamCaptureMode`.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum CaptureMode {
    /// Other threads may do what a capture forbids.
    ThreadLocal = 1,
    /// This thread may, too.
    Relaxed = 2,
}

/// `CUstreamCaptureStatus`.
pub mod capture_status {
    /// Nothing is captured on the stream.
    pub const NONE: u32 = 0;
}

/// Numbers of attributes: `CUdevice_attribute`, `CUfunction_attribute`, `CUpointer_attribute`.
pub mod attribute {
    pub const MULTIPROCESSORS: u32 = 16;
    pub const MEMORY_CLOCK_KHZ: u32 = 36;
    pub const MEMORY_BITS: u32 = 37;
    pub const L2_BYTES: u32 = 38;
    pub const CAPABILITY_MAJOR: u32 = 75;
    pub const CAPABILITY_MINOR: u32 = 76;
    pub const MOST_SHARED_BYTES: u32 = 97;
    pub const FUNCTION_MOST_DYNAMIC_SHARED_BYTES: u32 = 8;
    pub const POINTER_DEVICE_ORDINAL: u32 = 9;
}

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {
        /// The functions. One that the driver lacks fails with `CUDA_ERROR_NOT_FOUND` when it is called.
        ///
        /// # Safety
        /// Of each: as the driver's documentation asks. Handles are live, and pointers valid for what is read
        /// and written there.
        #[allow(non_snake_case)]
        pub struct Api {
            $($name: Option<unsafe extern "C" fn($($type),*) -> Status>,)*
        }

        // Of the two that explain a status only the addresses are used.
        #[allow(non_snake_case, dead_code, clippy::missing_safety_doc)]
        impl Api {
            fn find(library: &Library) -> Self {
                Api {
                    $($name: {
                        // SAFETY: the name is the driver's own, and the signature is the one it has there.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($type),*) -> Status>(
                                concat!(stringify!($name), "\0").as_bytes(),
                            )
                        };
                        symbol.ok().map(|symbol| *symbol)
                    },)*
                }
            }

            $(
                $(#[$doc])*
                #[inline]
                pub unsafe fn $name(&self, $($argument: $type),*) -> Result<()> {
                    let status = match self.$name {
                        // SAFETY: as the caller promises.
                        Some(function) => unsafe { function($($argument),*) },
                        None => NOT_FOUND,
                    };
                    if status == SUCCESS { Ok(()) } else { Err(self.error(stringify!($name), status)) }
                }
            )*
        }
    };
}

functions! {
    cuInit(flags: u32);
    cuDriverGetVersion(version: *mut i32);
    cuDeviceGet(device: *mut i32, ordinal: i32);
    cuDeviceGetName(name: *mut c_char, len: i32, device: i32);
    cuDeviceGetAttribute(value: *mut i32, attribute: u32, device: i32);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: i32);
    cuCtxGetCurrent(context: *mut Handle);
    cuCtxSetCurrent(context: Handle);
    cuCtxPushCurrent_v2(context: Handle);
    cuCtxPopCurrent_v2(context: *mut Handle);
    cuCtxSynchronize();
    cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const c_void,
        option_count: u32,
        options: *mut u32,
        values: *mut *mut c_void,
    );
    cuModuleUnload(module: Handle);
    cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char);
    cuFuncSetAttribute(function: Handle, attribute: u32, value: i32);
    cuOccupancyMaxActiveClusters(clusters: *mut i32, function: Handle, config: *const LaunchConfig);
    cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: Handle,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    );
    cuMemsetD8Async(address: u64, value: u8, bytes: usize, stream: Handle);
    cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle);
    cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle);
    cuPointerGetAttribute(value: *mut c_void, attribute: u32, address: u64);
    cuStreamCreate(stream: *mut Handle, flags: u32);
    cuStreamDestroy_v2(stream: Handle);
    cuStreamSynchronize(stream: Handle);
    cuStreamWaitEvent(stream: Handle, event: Handle, flags: u32);
    cuStreamIsCapturing(stream: Handle, status: *mut u32);
    cuStreamBeginCapture_v2(stream: Handle, mode: u32);
    cuStreamEndCapture(stream: Handle, graph: *mut Handle);
    cuThreadExchangeStreamCaptureMode(mode: *mut u32);
    cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64);
    cuGraphDestroy(graph: Handle);
    cuGraphLaunch(executable: Handle, stream: Handle);
    cuGraphExecDestroy(executable: Handle);
    cuEventCreate(event: *mut Handle, flags: u32);
    cuEventDestroy_v2(event: Handle);
    cuEventRecord(event: Handle, stream: Handle);
    cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle);
    cuGetErrorName(status: Status, name: *mut *const c_char);
    cuGetErrorString(status: Status, text: *mut *const c_char);
}

impl Api {
    /// What a status says, in the driver's words.
    pub fn error(&self, call: &'static str, code: Status) -> Error {
        let text = |function: Option<unsafe extern "C" fn(Status, *mut *const c_char) -> Status>| {
            let mut text = std::ptr::null();
            // SAFETY: writes one pointer: to a text that stays, or null.
            let status = unsafe { function?(code, &mut text) };
            // SAFETY: as above.
            (status == SUCCESS && !text.is_null())
                .then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let missing = code == NOT_FOUND && call != "cuModuleGetFunction";
        let reason = match missing {
            true => "the driver does not have this function".to_owned(),
            false => text(self.cuGetErrorString).unwrap_or_else(|| "the driver does not say why".to_owned()),
        };
        let name = text(self.cuGetErrorName).unwrap_or_else(|| "an unknown CUresult".to_owned());
        Error::Driver { call, code, name, reason }
    }

    /// Refuses a driver that lacks what the kernels are launched with.
    fn check_age(&self) -> Result<()> {
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { self.cuDriverGetVersion(&mut version)? };
        if version >= OLDEST && self.cuLaunchKernelEx.is_some() {
            return Ok(());
        }
        Err(Error::DriverTooOld {
            version: format!("{}.{}", version / 1000, version % 1000 / 10),
            needed: "12.0",
        })
    }
}

/// Opens the driver's library and starts the driver, once.
///
/// # Errors
/// [`Error::NoDevice`] where there is no driver or it does not start, [`Error::DriverTooOld`].
pub fn api() -> Result<&'static Api> {
    static API: OnceLock<Result<Api>> = OnceLock::new();
    let started = API.get_or_init(|| {
        // SAFETY: libcuda's initialisers have no preconditions.
        let library = unsafe { Library::new(LIBRARY) };
        let library =
            library.map_err(|error| Error::NoDevice { reason: format!("no CUDA driver ({error})") })?;
        // Never closed: the driver does not bear it.
        let library: &'static Library = Box::leak(Box::new(library));
        #[cfg(feature = "cust")]
        super::bind::fill(library);
        let api = Api::find(library);
        api.check_age()?;
        // SAFETY: any flags are allowed; wrong ones are an error.
        unsafe { api.cuInit(0) }.map_err(|error| match error {
            Error::Driver { code, name, reason, .. } => {
                Error::NoDevice { reason: format!("{name} ({code}): {reason}") }
            }
            other => other,
        })?;
        Ok(api)
    });
    started.as_ref().map_err(Error::clone)
}

/// How `cust` starts the driver. Another user of cust may be the first; flags must be 0 to this day.
// SAFETY: the name is the driver's own, and the signature is the driver's.
#[cfg(feature = "cust")]
#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: u32) -> cust::sys::CUresult {
    match api() {
        Ok(_) => cust::sys::CUresult::CUDA_SUCCESS,
        Err(_) => super::bind::no_driver(),
    }
}
