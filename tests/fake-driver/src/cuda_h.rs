//! What cuda.h calls them.

/// `CUresult`.
pub(crate) type Status = u32;
/// Any of the opaque pointers, as `CUstream`. Here a number that nothing in memory lies at.
pub(crate) type Handle = usize;
/// `CUdeviceptr`.
pub(crate) type Address = u64;

pub(crate) const SUCCESS: Status = 0;
pub(crate) const INVALID_VALUE: Status = 1;
pub(crate) const OUT_OF_MEMORY: Status = 2;
pub(crate) const NOT_INITIALIZED: Status = 3;
pub(crate) const NO_DEVICE: Status = 100;
pub(crate) const INVALID_DEVICE: Status = 101;
pub(crate) const INVALID_IMAGE: Status = 200;
pub(crate) const INVALID_CONTEXT: Status = 201;
pub(crate) const INVALID_PTX: Status = 218;
pub(crate) const UNSUPPORTED_PTX_VERSION: Status = 222;
pub(crate) const INVALID_HANDLE: Status = 400;
pub(crate) const ILLEGAL_STATE: Status = 401;
pub(crate) const NOT_FOUND: Status = 500;
pub(crate) const ILLEGAL_ADDRESS: Status = 700;
pub(crate) const CONTEXT_IS_DESTROYED: Status = 709;
pub(crate) const COOPERATIVE_LAUNCH_TOO_LARGE: Status = 720;
pub(crate) const CAPTURE_UNSUPPORTED: Status = 900;
pub(crate) const CAPTURE_INVALIDATED: Status = 901;
pub(crate) const CAPTURE_MERGE: Status = 902;
pub(crate) const CAPTURE_UNMATCHED: Status = 903;
pub(crate) const CAPTURE_UNJOINED: Status = 904;
pub(crate) const CAPTURE_ISOLATION: Status = 905;
pub(crate) const CAPTURE_IMPLICIT: Status = 906;
pub(crate) const CAPTURED_EVENT: Status = 907;
pub(crate) const CAPTURE_WRONG_THREAD: Status = 908;
pub(crate) const INVALID_CLUSTER_SIZE: Status = 912;

/// `CUstreamCaptureMode`.
pub(crate) const GLOBAL: u32 = 0;
pub(crate) const RELAXED: u32 = 2;

/// `CUstreamCaptureStatus`.
pub(crate) const NOT_CAPTURED: u32 = 0;
pub(crate) const CAPTURED: u32 = 1;
pub(crate) const CAPTURE_FAILED: u32 = 2;

/// `CUlaunchConfig`.
#[repr(C)]
pub(crate) struct LaunchConfig {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
    pub(crate) stream: Handle,
    pub(crate) attributes: *const LaunchAttribute,
    pub(crate) attribute_count: u32,
}

/// `CUlaunchAttribute`: an id and 64 bytes of value.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct LaunchAttribute {
    pub(crate) id: u32,
    pub(crate) padding: u32,
    pub(crate) value: [u32; 16],
}
