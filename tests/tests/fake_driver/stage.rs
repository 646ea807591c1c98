//! The driver API as cases call it: on a stage where there is one of everything, with a note of each call's
//! code.

use libloading::Library;
use moe_lora_tests::fake::Control;
use std::ffi::CString;
use std::path::Path;
use std::sync::Mutex;
use std::{mem, ptr, thread};

pub const GLOBAL: u32 = 0;
pub const THREAD_LOCAL: u32 = 1;
pub const RELAXED: u32 = 2;

/// Flags of a stream.
pub const BLOCKING: u32 = 0;
pub const NON_BLOCKING: u32 = 1;

/// A kernel with a parameter that takes up to 64 threads.
pub const PTX: &str = "\
.version 7.0
.target sm_80
.address_size 64
// .visible .entry in_a_comment(
.visible .entry kernel(
	.param .u64 kernel_param_0
)
.maxntid 64, 1, 1
{
	ret;
}
";

/// A driver, and what its calls returned: the code, with `?` behind one that is no fault.
pub struct Cuda {
    library: Library,
    /// None of a real driver.
    pub control: Option<Control>,
    codes: Mutex<Vec<String>>,
}

macro_rules! calls {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        #[allow(non_snake_case)]
        impl Cuda {
            $(
                pub fn $name(&self $(, $argument: $type)*) {
                    let name = concat!(stringify!($name), "\0").as_bytes();
                    // SAFETY: the signature is the one of cuda.h, as the calling convention sees it; pointers
                    // that cases pass are null or valid.
                    let call = unsafe { self.library.get::<unsafe extern "C" fn($($type),*) -> u32>(name) };
                    let faults = self.faults().len();
                    // SAFETY: as above.
                    let code = unsafe { call.expect("the driver has the function")($($argument),*) };
                    let no_fault = code != 0 && self.faults().len() == faults;
                    self.note(format!("{code}{}", if no_fault { "?" } else { "" }));
                }
            )*
        }
    };
}

calls! {
    cuInit(flags: u32);
    cuDriverGetVersion(version: *mut i32);
    cuGetErrorName(code: u32, name: *mut *const i8);
    cuGetErrorString(code: u32, text: *mut *const i8);
    cuDeviceGet(device: *mut i32, ordinal: i32);
    cuDeviceGetCount(count: *mut i32);
    cuDeviceGetName(name: *mut u8, len: i32, device: i32);
    cuDeviceGetAttribute(value: *mut i32, attribute: u32, device: i32);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: i32);
    cuDevicePrimaryCtxRetain(context: *mut usize, device: i32);
    cuDevicePrimaryCtxRelease_v2(device: i32);
    cuDevicePrimaryCtxGetState(device: i32, flags: *mut u32, active: *mut i32);
    cuDevicePrimaryCtxSetFlags_v2(device: i32, flags: u32);
    cuCtxGetCurrent(context: *mut usize);
    cuCtxSetCurrent(context: usize);
    cuCtxPushCurrent_v2(context: usize);
    cuCtxPopCurrent_v2(context: *mut usize);
    cuCtxGetDevice(device: *mut i32);
    cuCtxSynchronize();
    cuModuleLoadData(module: *mut usize, image: *const u8);
    cuModuleLoadDataEx(
        module: *mut usize, image: *const u8, count: u32, options: *const u32, values: *mut usize
    );
    cuModuleUnload(module: usize);
    cuModuleGetFunction(function: *mut usize, module: usize, name: *const i8);
    cuFuncSetAttribute(function: usize, attribute: u32, value: i32);
    cuFuncGetAttribute(value: *mut i32, attribute: u32, function: usize);
    cuOccupancyMaxActiveClusters(count: *mut i32, function: usize, config: *const Config);
    cuLaunchKernelEx(config: *const Config, function: usize, parameters: *const *const u64, extra: *const u8);
    cuMemAlloc_v2(address: *mut u64, bytes: usize);
    cuMemFree_v2(address: u64);
    cuMemsetD8Async(address: u64, value: u8, bytes: usize, stream: usize);
    cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: usize);
    cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: usize);
    cuPointerGetAttribute(out: *mut i32, attribute: u32, address: u64);
    cuStreamCreate(stream: *mut usize, flags: u32);
    cuStreamCreateWithPriority(stream: *mut usize, flags: u32, priority: i32);
    cuStreamDestroy_v2(stream: usize);
    cuStreamSynchronize(stream: usize);
    cuStreamQuery(stream: usize);
    cuStreamGetCtx(stream: usize, context: *mut usize);
    cuStreamWaitEvent(stream: usize, event: usize, flags: u32);
    cuStreamBeginCapture_v2(stream: usize, mode: u32);
    cuStreamEndCapture(stream: usize, graph: *mut usize);
    cuStreamIsCapturing(stream: usize, status: *mut u32);
    cuThreadExchangeStreamCaptureMode(mode: *mut u32);
    cuEventCreate(event: *mut usize, flags: u32);
    cuEventDestroy_v2(event: usize);
    cuEventRecord(event: usize, stream: usize);
    cuEventSynchronize(event: usize);
    cuEventQuery(event: usize);
    cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize);
    cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, flags: u64);
    cuGraphLaunch(executable: usize, stream: usize);
    cuGraphDestroy(graph: usize);
    cuGraphExecDestroy(executable: usize);
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    stream: usize,
    attributes: *const Attribute,
    attribute_count: u32,
}

/// `CUlaunchAttribute`.
#[repr(C, align(8))]
struct Attribute {
    id: u32,
    padding: u32,
    value: [u32; 16],
}

/// A launch of [`PTX`]'s kernel.
#[derive(Clone, Copy)]
pub struct Launch {
    pub blocks: u32,
    pub threads: u32,
    pub shared: u32,
    /// Id, and the first word of the value; the next two are 1.
    pub attribute: Option<(u32, u32)>,
    /// `None`: no parameters are passed.
    pub parameter: Option<u64>,
}

pub const LAUNCH: Launch = Launch { blocks: 1, threads: 32, shared: 0, attribute: None, parameter: Some(0) };

impl Cuda {
    /// A driver.
    ///
    /// # Errors
    /// Why it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, libloading::Error> {
        // SAFETY: a driver's initialisers have no preconditions.
        let open = || unsafe { Library::new(path) };
        let library = open()?;
        // SAFETY: only the address is taken.
        let fake = unsafe { library.get::<*const ()>(b"fake_reset\0") }.is_ok();
        let control = if fake { Some(Control::of(open()?)) } else { None };
        Ok(Cuda { library, control, codes: Mutex::default() })
    }

    pub fn faults(&self) -> Vec<String> {
        self.control.as_ref().map_or_else(Vec::new, Control::faults)
    }

    fn note(&self, code: String) {
        self.codes.lock().expect("no case panics").push(code);
    }

    /// The codes of the calls since this was last asked.
    pub fn codes(&self) -> String {
        let codes = mem::take(&mut *self.codes.lock().expect("no case panics")).join(" ");
        if self.control.is_some() { codes } else { codes.replace('?', "") }
    }

    pub fn retain(&self, device: i32) -> usize {
        out(|context| self.cuDevicePrimaryCtxRetain(context, device))
    }

    pub fn current(&self) -> usize {
        out(|context| self.cuCtxGetCurrent(context))
    }

    pub fn stream(&self, flags: u32) -> usize {
        out(|stream| self.cuStreamCreate(stream, flags))
    }

    pub fn event(&self) -> usize {
        out(|event| self.cuEventCreate(event, 0))
    }

    pub fn memory(&self) -> u64 {
        self.allocate(4096)
    }

    pub fn allocate(&self, bytes: usize) -> u64 {
        out(|address| self.cuMemAlloc_v2(address, bytes))
    }

    pub fn load(&self, image: &str) -> usize {
        let image = CString::new(image).expect("images have no NUL");
        out(|module| self.cuModuleLoadData(module, image.as_ptr().cast()))
    }

    pub fn function(&self, module: usize, name: &str) -> usize {
        let name = CString::new(name).expect("names have no NUL");
        out(|function| self.cuModuleGetFunction(function, module, name.as_ptr().cast()))
    }

    pub fn fill(&self, address: u64, stream: usize) {
        self.cuMemsetD8Async(address, 7, 64, stream);
    }

    /// Copies 64 bytes to a device.
    pub fn write(&self, address: u64, stream: usize) {
        self.cuMemcpyHtoDAsync_v2(address, [5; 64].as_ptr(), 64, stream);
    }

    /// The 64 bytes at an address.
    pub fn read(&self, address: u64, stream: usize) -> [u8; 64] {
        let mut bytes = [0; 64];
        self.cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr(), address, 64, stream);
        bytes
    }

    pub fn is_capturing(&self, stream: usize) -> u32 {
        out(|status| self.cuStreamIsCapturing(stream, status))
    }

    pub fn end(&self, stream: usize) -> usize {
        out(|graph| self.cuStreamEndCapture(stream, graph))
    }

    pub fn instantiate(&self, graph: usize) -> usize {
        out(|executable| self.cuGraphInstantiateWithFlags(executable, graph, 0))
    }

    pub fn exchange(&self, mode: u32) -> u32 {
        let mut mode = mode;
        self.cuThreadExchangeStreamCaptureMode(&mut mode);
        mode
    }

    pub fn elapsed(&self, start: usize, end: usize) {
        out(|milliseconds| self.cuEventElapsedTime(milliseconds, start, end));
    }

    pub fn device_of(&self, address: u64) -> i32 {
        const DEVICE_ORDINAL: u32 = 9;
        out(|device| self.cuPointerGetAttribute(device, DEVICE_ORDINAL, address))
    }

    pub fn launch(&self, function: usize, stream: usize, launch: Launch) {
        let parameter = launch.parameter.unwrap_or(0);
        let parameters = [ptr::from_ref(&parameter)];
        let given = if launch.parameter.is_some() { parameters.as_ptr() } else { ptr::null() };
        with_config(launch, stream, |config| {
            self.cuLaunchKernelEx(config, function, given, ptr::null());
        });
    }

    pub fn most_clusters(&self, function: usize, launch: Launch) -> i32 {
        let mut count = 0;
        with_config(launch, 0, |config| {
            self.cuOccupancyMaxActiveClusters(&mut count, function, config);
        });
        count
    }

    /// Runs calls on another thread, where the same context is current.
    pub fn elsewhere(&self, calls: impl FnOnce() + Send) {
        let context = self.quiet(|| self.current());
        thread::scope(|scope| {
            scope.spawn(|| {
                self.quiet(|| self.cuCtxSetCurrent(context));
                calls();
            });
        });
    }

    /// Makes calls whose codes are not noted.
    pub fn quiet<T>(&self, calls: impl FnOnce() -> T) -> T {
        let before = mem::take(&mut *self.codes.lock().expect("no case panics"));
        let done = calls();
        *self.codes.lock().expect("no case panics") = before;
        done
    }
}

/// What a call writes through its pointer.
fn out<T: Default>(call: impl FnOnce(*mut T)) -> T {
    let mut value = T::default();
    call(&mut value);
    value
}

fn with_config(launch: Launch, stream: usize, call: impl FnOnce(*const Config)) {
    let (id, first) = launch.attribute.unwrap_or_default();
    let mut value = [0; 16];
    value[..3].copy_from_slice(&[first, 1, 1]);
    let attribute = Attribute { id, padding: 0, value };
    call(&Config {
        grid: [launch.blocks, 1, 1],
        block: [launch.threads, 1, 1],
        shared: launch.shared,
        stream,
        attributes: &attribute,
        attribute_count: launch.attribute.is_some().into(),
    });
}

/// One of everything, on device 0, whose context is current.
pub struct Stage<'c> {
    pub cuda: &'c Cuda,
    /// The stream that is captured, one that is not, and one that may become part of the capture.
    pub stream: usize,
    pub other: usize,
    pub fork: usize,
    /// An event that was recorded on `other`, and one that never was.
    pub event: usize,
    pub fresh: usize,
    pub memory: u64,
    /// Memory, a module, a graph and an executable one to let go of.
    pub spare_memory: u64,
    pub spare_module: usize,
    pub graph: usize,
    pub executable: usize,
    pub spare_executable: usize,
    pub module: usize,
    pub function: usize,
}

impl<'c> Stage<'c> {
    /// `flags`: those of `stream`. The context must be current.
    pub fn new(cuda: &'c Cuda, flags: u32) -> Self {
        let other = cuda.stream(NON_BLOCKING);
        let [event, fresh] = [cuda.event(), cuda.event()];
        let [module, spare_module] = [cuda.load(PTX), cuda.load(PTX)];
        let [memory, spare_memory] = [cuda.memory(), cuda.memory()];
        cuda.cuEventRecord(event, other);
        cuda.cuStreamBeginCapture_v2(other, RELAXED);
        cuda.fill(memory, other);
        let graph = cuda.end(other);
        let [executable, spare_executable] = [cuda.instantiate(graph), cuda.instantiate(graph)];
        let stage = Stage {
            cuda,
            stream: cuda.stream(flags),
            other,
            fork: cuda.stream(NON_BLOCKING),
            event,
            fresh,
            memory,
            spare_memory,
            spare_module,
            graph,
            executable,
            spare_executable,
            module,
            function: cuda.function(module, "kernel"),
        };
        let codes = cuda.codes();
        assert!(codes.split_whitespace().all(|code| code == "0"), "{codes}: {:#?}", cuda.faults());
        stage
    }
}
