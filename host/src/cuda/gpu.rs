//! A device with the kernels loaded.

use crate::cuda::{bind, failed, launch, queue::Queue, status};
use crate::error::{Error, Result};
use crate::plan::{DeviceLimits, Launch, Options};
use crate::tuning::{TUNING_VAR, Tuning};
use cust::context::Context;
use cust::device::{Device, DeviceAttribute};
use cust::module::Module;
use cust::stream::{Stream, StreamFlags};
use cust::sys::{self, CUcontext, CUfunction, CUfunction_attribute, CUpointer_attribute, CUstream};
use moe_lora_kernels::entry::{CLUSTERS_SINCE, WGMMA_ON};
use moe_lora_kernels::{ENTRIES, Entry, Kernel, decode};
use moe_lora_prebuilt::{KERNELS, Kernels};
use std::path::Path;
use std::{env, fmt, ptr};

/// What the kernels that a [`Gpu`] runs were loaded from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadedFrom {
    /// The cubin.
    Cubin,
    /// The PTX, compiled by the driver.
    Ptx {
        /// What the driver said of the cubin, where there is one for the device.
        cubin_refused: Option<String>,
    },
}

/// Loads a module into the current context: from its cubin where that will do, otherwise from PTX.
fn load(kernels: &Kernels, capability: u32) -> Result<(Module, LoadedFrom)> {
    let mut cubin_refused = None;
    if let Some(cubin) = kernels.cubin_for(capability) {
        match Module::from_cubin(cubin.image.unpack(), &[]) {
            Ok(module) => return Ok((module, LoadedFrom::Cubin)),
            Err(error) => cubin_refused = Some(format!("{error:?}")),
        }
    }
    let ptx = String::from_utf8(kernels.ptx.unpack()).expect("PTX is ASCII");
    let module = Module::from_ptx(ptx, &[]).map_err(failed("cuModuleLoadDataEx"))?;
    Ok((module, LoadedFrom::Ptx { cubin_refused }))
}

/// What the driver says of a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Compute capability: major, minor.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of L2 cache.
    pub l2_bytes: usize,
    /// Bytes of memory.
    pub memory_bytes: usize,
    /// Bytes a microsecond that its memory's clock and width allow.
    pub memory_rate: u32,
    /// Most shared memory that a block may be given, in bytes.
    pub shared_bytes: u32,
    /// Newest CUDA version that the driver knows: major, minor.
    pub driver: (u32, u32),
}

impl DeviceInfo {
    fn new(device: Device) -> Result<Self> {
        let attribute = |attribute| {
            let value = device.get_attribute(attribute).map_err(failed("cuDeviceGetAttribute"))?;
            Ok::<_, Error>(value as u32)
        };
        // cust 0.3.2 has no name for this attribute.
        let most_shared = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let mut shared_bytes = 0;
        // SAFETY: writes one integer.
        status("cuDeviceGetAttribute", unsafe {
            sys::cuDeviceGetAttribute(&mut shared_bytes, most_shared, device.as_raw())
        })?;
        let mut version = 0;
        // SAFETY: writes one integer.
        status("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
        Ok(DeviceInfo {
            name: device.name().map_err(failed("cuDeviceGetName"))?,
            capability: (
                attribute(DeviceAttribute::ComputeCapabilityMajor)?,
                attribute(DeviceAttribute::ComputeCapabilityMinor)?,
            ),
            multiprocessors: attribute(DeviceAttribute::MultiprocessorCount)?,
            l2_bytes: attribute(DeviceAttribute::L2CacheSize)? as usize,
            memory_rate: memory_rate(
                attribute(DeviceAttribute::MemoryClockRate)?,
                attribute(DeviceAttribute::GlobalMemoryBusWidth)?,
            ),
            memory_bytes: device.total_memory().map_err(failed("cuDeviceTotalMem"))?,
            shared_bytes: shared_bytes as u32,
            driver: (version as u32 / 1000, version as u32 % 1000 / 10),
        })
    }
}

/// Bytes a microsecond of a memory with this clock, in kHz, and so many bits, which come twice a cycle. Where the driver keeps either to itself, as in
/// a virtual machine it may, an H100's.
fn memory_rate(clock: u32, bits: u32) -> u32 {
    let rate = u64::from(clock) * u64::from(bits) / 8 * 2 / 1000;
    u32::try_from(rate).ok().filter(|rate| *rate > 0).unwrap_or(DeviceLimits::H100.memory_rate)
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        write!(
            f,
            "{}, compute capability {major}.{minor}, {} multiprocessors, {} GiB, driver for CUDA {}.{}",
            self.name,
            self.multiprocessors,
            self.memory_bytes >> 30,
            self.driver.0,
            self.driver.1
        )
    }
}

/// A device with the kernels loaded, in the device's primary context: the one that CUDA's runtime, and so
/// most other libraries in the process, use.
pub struct Gpu {
    // Dropped in this order: the module before its context.
    /// One an entry of the table; `None` where the module has none.
    functions: Vec<Option<CUfunction>>,
    _module: Module,
    context: Context,
    embedded: &'static Kernels,
    loaded_from: LoadedFrom,
    info: DeviceInfo,
    decode_clusters: [u32; 4],
    tuning: Option<Tuning>,
}

// SAFETY: contexts, modules and functions may be used from any thread on which the context is current;
// `make_current` sees to that.
unsafe impl Send for Gpu {}
// SAFETY: as above; nothing here changes after `new`.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Opens device `ordinal` and loads the newest kernels that it can run, and the tuning that the environment
    /// names ([`TUNING_VAR`]), if it names one. The device's context becomes current on this thread.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver or device, [`Error::UnsupportedDevice`] when no embedded module
    /// fits, [`Error::Driver`] when the driver refuses something; for the tuning [`Error::Tuning`], or as for
    /// [`Gpu::tuned`].
    pub fn new(ordinal: u32) -> Result<Self> {
        let gpu = Self::with_kernels(ordinal, KERNELS)?;
        match env::var_os(TUNING_VAR).filter(|path| !path.is_empty()) {
            Some(path) => gpu.tuned(Tuning::load(Path::new(&path))?),
            None => Ok(gpu),
        }
    }

    /// This device, whose queues plan calls as they were measured to be fastest, where nothing is forced on them.
    ///
    /// # Errors
    /// [`Error::TunedElsewhere`] when that was on a device of another name.
    pub fn tuned(self, tuning: Tuning) -> Result<Self> {
        if tuning.device() != self.info.name {
            let (tuned, device) = (tuning.device().to_owned(), self.info.name.clone());
            return Err(Error::TunedElsewhere { tuned, device });
        }
        Ok(Gpu { tuning: Some(tuning), ..self })
    }

    /// Opens device `ordinal` and loads the newest of `kernels` that it can run: part of [`KERNELS`], to run
    /// an older generation's kernels on a newer device.
    ///
    /// # Errors
    /// As for [`Gpu::new`].
    pub fn with_kernels(ordinal: u32, kernels: &'static [Kernels]) -> Result<Self> {
        start_driver()?;
        let device = Device::get_device(ordinal).map_err(no_device)?;
        let info = DeviceInfo::new(device)?;
        if !bind::has_launch_kernel_ex() {
            let reason = "the driver is older than CUDA 12.0".to_owned();
            return Err(Error::Driver { call: "cuLaunchKernelEx", reason });
        }
        let capability = info.capability.0 * 10 + info.capability.1;
        let embedded = Kernels::newest(kernels, capability).ok_or_else(|| Error::UnsupportedDevice {
            device: info.name.clone(),
            capability: format!("{}.{}", info.capability.0, info.capability.1),
            needed: "8.0",
        })?;
        let context = Context::new(device).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let (module, loaded_from) = load(embedded, capability)?;
        let functions = ENTRIES
            .iter()
            .map(|entry| {
                if !entry.is_on(embedded.sm) {
                    return Ok(None);
                }
                let function =
                    module.get_function(entry.name).map_err(failed("cuModuleGetFunction"))?.to_raw();
                let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function is of a live module. The limit is the device's own.
                status("cuFuncSetAttribute", unsafe {
                    sys::cuFuncSetAttribute(function, most, info.shared_bytes as i32)
                })?;
                Ok(Some(function))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut gpu = Gpu {
            functions,
            _module: module,
            context,
            embedded,
            loaded_from,
            info,
            decode_clusters: [0; 4],
            tuning: None,
        };
        if embedded.sm >= CLUSTERS_SINCE {
            let decode = |entry: &&Entry| matches!(entry.kernel, Kernel::Decode { .. });
            let entry = ENTRIES.iter().find(decode).expect("the table has decode");
            let function = gpu.functions[number(entry)].expect("sm_90 has it");
            // With all the shared memory that a block can have: `decode` takes nearly all. From sm_120 on a
            // multiprocessor has registers for one, and is counted as if it ran more, as plans expect.
            let each = entry.min_blocks_on(embedded.sm);
            let shared_bytes = gpu.limits().shared_bytes_of(each);
            for (i, most) in gpu.decode_clusters.iter_mut().enumerate() {
                let (blocks, cluster) = (1 << i, 1 << i);
                let launch = Launch { entry, blocks, cluster, cooperative: false, shared_bytes };
                *most = launch::most_clusters(function, &launch)? * decode::BLOCKS / each;
            }
        }
        Ok(gpu)
    }

    /// What the driver says of the device.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The module that was loaded.
    pub fn embedded(&self) -> &'static Kernels {
        self.embedded
    }

    /// Whether that was its cubin or its PTX.
    pub fn loaded_from(&self) -> &LoadedFrom {
        &self.loaded_from
    }

    /// What plans need to know of the device.
    pub fn limits(&self) -> DeviceLimits {
        DeviceLimits {
            multiprocessors: self.info.multiprocessors,
            shared_bytes: self.info.shared_bytes,
            decode_clusters: self.decode_clusters,
            wgmma: self.embedded.sm == WGMMA_ON,
            memory_rate: self.info.memory_rate,
        }
    }

    /// What was measured on such a device, if it was given.
    pub fn tuning(&self) -> Option<&Tuning> {
        self.tuning.as_ref()
    }

    /// A queue on a stream of its own.
    ///
    /// # Errors
    /// [`Error::Driver`] when no stream can be made.
    pub fn queue(&self, options: Options) -> Result<Queue<'_>> {
        self.make_current()?;
        let stream = Stream::new(StreamFlags::NON_BLOCKING, None).map_err(failed("cuStreamCreate"))?;
        Ok(Queue::owned(self, stream, options))
    }

    /// A queue on a stream of the caller's.
    ///
    /// # Errors
    /// [`Error::Driver`] when the context cannot be made current.
    pub fn queue_on<'a>(&'a self, stream: &'a Stream, options: Options) -> Result<Queue<'a>> {
        self.make_current()?;
        Ok(Queue::borrowed(self, stream.as_inner(), options))
    }

    /// A queue on a stream that another library made.
    ///
    /// # Safety
    /// `stream` must be a live stream of this device's primary context (or null, its default stream) for as
    /// long as the queue and its work live.
    ///
    /// # Errors
    /// [`Error::Driver`] when the context cannot be made current.
    pub unsafe fn queue_raw(&self, stream: CUstream, options: Options) -> Result<Queue<'_>> {
        self.make_current()?;
        Ok(Queue::borrowed(self, stream, options))
    }

    /// Makes the device's context current on this thread.
    ///
    /// # Errors
    /// [`Error::Driver`] when the driver refuses.
    pub fn make_current(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        status("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context.as_raw()) })
    }

    /// The loaded function of an entry of the table.
    pub(super) fn function(&self, entry: &'static Entry) -> CUfunction {
        self.functions[number(entry)].expect("plans hold entries that the device has")
    }

    /// True when the loaded kernels wait for the launch before them on their own.
    pub(super) fn overlaps_launches(&self) -> bool {
        self.embedded.sm >= 90
    }
}

/// Place of an entry in the table.
fn number(entry: &Entry) -> usize {
    ENTRIES.iter().position(|other| other.kernel == entry.kernel).expect("entries come from the table")
}

/// Why a device cannot be had.
fn no_device(error: cust::error::CudaError) -> Error {
    Error::NoDevice { reason: format!("{error:?}") }
}

/// Starts the driver, as must be done before anything else is asked of it.
pub(super) fn start_driver() -> Result<()> {
    bind::require()?;
    cust::init(cust::CudaFlags::empty()).map_err(no_device)
}

/// The number of the device that the memory at `address` belongs to.
///
/// # Errors
/// [`Error::NoDevice`] without a driver, [`Error::Driver`] for an address that the driver does not know.
pub fn device_of(address: u64) -> Result<u32> {
    start_driver()?;
    let mut ordinal = 0u32;
    // SAFETY: writes one integer.
    status("cuPointerGetAttribute", unsafe {
        let ordinal = ptr::from_mut(&mut ordinal).cast();
        sys::cuPointerGetAttribute(ordinal, CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
    })?;
    Ok(ordinal)
}

/// The context that was current on this thread, made current again when this is dropped: for a library that
/// must not leave its caller another context than it found.
pub struct CallersContext(CUcontext);

impl CallersContext {
    /// Remembers the current context, or that there is none.
    pub fn remember() -> Self {
        let mut context = ptr::null_mut();
        if bind::require().is_ok() {
            // SAFETY: writes one handle. It fails where nothing has started the driver: nothing is current then.
            let _ = unsafe { sys::cuCtxGetCurrent(&mut context) };
        }
        CallersContext(context)
    }
}

impl Drop for CallersContext {
    fn drop(&mut self) {
        // SAFETY: null stands for none; a context that was destroyed meanwhile is refused. A failure here has
        // nobody to go to.
        let _ = unsafe { sys::cuCtxSetCurrent(self.0) };
    }
}
