//! A device with the kernels loaded.

use crate::cuda::context::{Bound, Relaxed};
use crate::cuda::driver::{Api, Handle, LaunchAttribute, LaunchConfig, PrimaryContext, api, attribute};
use crate::cuda::info::DeviceInfo;
use crate::error::{Error, Result};
use crate::plan::DeviceLimits;
use crate::tuning::{TUNING_VAR, Tuning};
use moe_lora_kernels::entry::{CLUSTERS_SINCE, WGMMA_ON};
use moe_lora_kernels::{ENTRIES, Entry, Kernel, decode};
use moe_lora_prebuilt::{KERNELS, Kernels};
use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::{env, fmt, ptr};

/// What the kernels that a [`Device`] runs were loaded from.
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

/// A device with the kernels loaded, in the device's primary context: the one that CUDA's runtime, and so
/// most other libraries in the process, use.
///
/// A handle: clones are the same device, whose kernels stay loaded until the last of them, and the last of
/// its streams, buffers, workspaces and graphs, is gone. No function of these needs a current context, or
/// leaves another current than it found.
#[derive(Clone)]
pub struct Device {
    core: Arc<Core>,
    tuning: Option<Arc<Tuning>>,
}

/// What all handles of a device share.
struct Core {
    // Dropped in this order: the module before its context.
    module: Module,
    /// One an entry of the table; `None` where the module has none.
    functions: Vec<Option<Handle>>,
    kernels: &'static Kernels,
    loaded_from: LoadedFrom,
    info: DeviceInfo,
    decode_clusters: [u32; 4],
    /// Held for reading while a call is checked and queued, and for writing while a graph is queued or a
    /// recording begins or ends: a graph uses memory that others may hold views of, and what a call finds to
    /// be in order must stay so until it is queued.
    queueing: RwLock<()>,
}

/// A module in a primary context.
struct Module {
    handle: Handle,
    context: PrimaryContext,
}

// SAFETY: contexts, modules and functions may be used from any thread on which the context is current; `bind`
// sees to that.
unsafe impl Send for Core {}
// SAFETY: as above; nothing here changes after `open`.
unsafe impl Sync for Core {}

impl Drop for Module {
    fn drop(&mut self) {
        let Ok(_bound) = Bound::to(&self.context) else { return };
        let Ok(api) = api() else { return };
        let _relaxed = Relaxed::begin(api);
        // SAFETY: loaded once, and no stream, graph or function of it is left. A failure has nobody to go to.
        let _ = unsafe { api.cuModuleUnload(self.handle) };
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device(cuda:{}, {})", self.core.info.ordinal, self.core.info.name)
    }
}

/// Two handles are equal when they are of one device, whatever their tunings.
impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        self.core.module.context.handle() == other.core.module.context.handle()
    }
}

impl Eq for Device {}

impl Device {
    /// Opens device `ordinal` and loads the newest kernels that it can run, and the tuning that the
    /// environment names ([`TUNING_VAR`]), if it names one.
    ///
    /// # Errors
    /// [`Error::NoDevice`] without a driver or device, [`Error::DriverTooOld`], [`Error::UnsupportedDevice`]
    /// when no embedded module fits, [`Error::Driver`] when the driver refuses something; for the tuning
    /// [`Error::Tuning`], or as for [`Device::tuned`].
    pub fn new(ordinal: u32) -> Result<Self> {
        let device = Self::untuned(ordinal)?;
        match env::var_os(TUNING_VAR).filter(|path| !path.is_empty()) {
            Some(path) => device.tuned(Tuning::load(Path::new(&path))?),
            None => Ok(device),
        }
    }

    /// Opens device `ordinal`, whatever tuning the environment names.
    ///
    /// # Errors
    /// As for [`Device::new`].
    pub fn untuned(ordinal: u32) -> Result<Self> {
        // SAFETY: these are the kernels that this library was built with.
        unsafe { Self::with_kernels(ordinal, KERNELS) }
    }

    /// Opens device `ordinal` with the kernels of a generation, of compute capability `sm` / 10, to run an
    /// older generation's kernels on a newer device.
    ///
    /// # Errors
    /// As for [`Device::new`]; [`Error::UnsupportedDevice`] where there are none of that generation.
    pub fn with_generation(ordinal: u32, sm: u32) -> Result<Self> {
        let of = KERNELS.iter().position(|kernels| kernels.sm == sm);
        let kernels = of.map_or(&[][..], |place| &KERNELS[place..=place]);
        // SAFETY: as above.
        unsafe { Self::with_kernels(ordinal, kernels) }
    }

    /// This device, whose streams plan calls as they were measured to be fastest, where nothing is forced on
    /// them.
    ///
    /// # Errors
    /// [`Error::TunedElsewhere`] when that was on a device of another name; [`Error::Tuning`] when it was
    /// with other kernels than the ones that are loaded.
    pub fn tuned(&self, tuning: Tuning) -> Result<Self> {
        if tuning.device() != self.core.info.name {
            let (tuned, device) = (tuning.device().to_owned(), self.core.info.name.clone());
            return Err(Error::TunedElsewhere { tuned, device });
        }
        tuning.check_kernels(&self.core.kernels.fingerprint())?;
        Ok(Device { core: Arc::clone(&self.core), tuning: Some(Arc::new(tuning)) })
    }

    /// Opens device `ordinal` and loads the newest of `kernels` that it can run.
    ///
    /// # Safety
    /// Every module must be what its row says, made from this version's kernels: its entry points are
    /// launched with parameters and shared memory that only they understand.
    ///
    /// # Errors
    /// As for [`Device::new`].
    pub unsafe fn with_kernels(ordinal: u32, kernels: &'static [Kernels]) -> Result<Self> {
        let api = api()?;
        let info = DeviceInfo::of(api, ordinal)?;
        let capability = info.capability.0 * 10 + info.capability.1;
        let kernels = Kernels::newest(kernels, capability).ok_or_else(|| Error::UnsupportedDevice {
            device: info.name.clone(),
            capability: format!("{}.{}", info.capability.0, info.capability.1),
            needed: "8.0",
        })?;
        let context = PrimaryContext::retain(ordinal)?;
        let _bound = Bound::to(&context)?;
        let _relaxed = Relaxed::begin(api)?;
        let (handle, loaded_from) = load(api, kernels, capability)?;
        let module = Module { handle, context };
        let functions = ENTRIES
            .iter()
            .map(|entry| {
                if !entry.is_on(kernels.sm) {
                    return Ok(None);
                }
                let name = CString::new(entry.name).expect("a name has no zeros");
                let mut function = ptr::null_mut();
                let most = attribute::FUNCTION_MOST_DYNAMIC_SHARED_BYTES;
                // SAFETY: the module is live, and the limit is the device's own.
                unsafe {
                    api.cuModuleGetFunction(&mut function, module.handle, name.as_ptr())?;
                    api.cuFuncSetAttribute(function, most, info.shared_bytes as i32)?;
                }
                Ok(Some(function))
            })
            .collect::<Result<Vec<_>>>()?;
        let decode_clusters = match kernels.sm >= CLUSTERS_SINCE {
            true => decode_clusters(api, &functions, kernels.sm, info.shared_bytes)?,
            false => [0; 4],
        };
        let queueing = RwLock::new(());
        let core = Core { module, functions, kernels, loaded_from, info, decode_clusters, queueing };
        Ok(Device { core: Arc::new(core), tuning: None })
    }

    /// What the driver says of the device.
    pub fn info(&self) -> &DeviceInfo {
        &self.core.info
    }

    /// The kernels that were loaded.
    pub fn kernels(&self) -> &'static Kernels {
        self.core.kernels
    }

    /// Whether they came from their cubin or their PTX.
    pub fn loaded_from(&self) -> &LoadedFrom {
        &self.core.loaded_from
    }

    /// What plans need to know of the device.
    pub fn limits(&self) -> DeviceLimits {
        let Core { info, kernels, decode_clusters, .. } = &*self.core;
        DeviceLimits {
            multiprocessors: info.multiprocessors,
            shared_bytes: info.shared_bytes,
            decode_clusters: *decode_clusters,
            wgmma: kernels.sm == WGMMA_ON,
            memory_rate: info.memory_rate,
        }
    }

    /// What was measured on such a device, if it was given.
    pub fn tuning(&self) -> Option<&Tuning> {
        self.tuning.as_deref()
    }

    /// Its name in messages.
    pub(super) fn name(&self) -> String {
        format!("cuda:{}", self.core.info.ordinal)
    }

    /// Whether a `CUcontext` is the device's primary one.
    #[cfg(feature = "cudarc-unversioned")]
    pub(super) fn is_context(&self, context: Handle) -> bool {
        self.core.module.context.handle() == context
    }

    /// Makes the device's context current until the result is dropped.
    pub(super) fn bind(&self) -> Result<Bound> {
        Bound::to(&self.core.module.context)
    }

    /// The loaded function of an entry of the table.
    pub(super) fn function(&self, entry: &'static Entry) -> Handle {
        self.core.functions[number(entry)].expect("plans hold entries that the device has")
    }

    /// True when the loaded kernels wait for the launch before them on their own.
    pub(super) fn overlaps_launches(&self) -> bool {
        self.core.kernels.sm >= 90
    }

    /// Held while a call is checked and queued: no graph is queued meanwhile, and no recording begins or
    /// ends.
    pub(super) fn queueing(&self) -> RwLockReadGuard<'_, ()> {
        self.core.queueing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while a graph is queued, and while a recording begins or ends: no call is checked or queued
    /// meanwhile.
    pub(super) fn queueing_alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.core.queueing.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Loads a module into the current context: from its cubin where that will do, otherwise from PTX.
fn load(api: &Api, kernels: &Kernels, capability: u32) -> Result<(Handle, LoadedFrom)> {
    let mut cubin_refused = None;
    if let Some(cubin) = kernels.cubin_for(capability) {
        match load_image(api, &cubin.image.unpack()) {
            Ok(module) => return Ok((module, LoadedFrom::Cubin)),
            Err(error) => cubin_refused = Some(error.to_string()),
        }
    }
    let ptx = CString::new(kernels.ptx.unpack()).expect("PTX has no zeros");
    Ok((load_image(api, ptx.as_bytes_with_nul())?, LoadedFrom::Ptx { cubin_refused }))
}

/// Loads an ELF image, or PTX that ends in a zero. What the driver's compiler says is in the error.
fn load_image(api: &Api, image: &[u8]) -> Result<Handle> {
    /// `CU_JIT_ERROR_LOG_BUFFER` and `CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES`.
    const ERROR_LOG: [u32; 2] = [5, 6];
    let mut module = ptr::null_mut();
    let mut log = [0u8; 4096];
    let mut options = ERROR_LOG;
    let mut values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void];
    // SAFETY: an image that ends where it must; the log has as much room as is said, and a zero more.
    let loaded = unsafe {
        api.cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    loaded.map(|()| module).map_err(|error| {
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
        match error {
            Error::Driver { call, code, name, reason } if !log.trim().is_empty() => {
                Error::Driver { call, code, name, reason: format!("{reason}: {}", log.trim()) }
            }
            error => error,
        }
    })
}

/// Most clusters of 1, 2, 4 and 8 blocks of `decode` that the device runs at a time, with
/// [`decode::BLOCKS_PER_SM`] blocks a multiprocessor. From sm_120 on one has registers for one block, and is
/// counted as if it ran more, as plans expect.
fn decode_clusters(api: &Api, functions: &[Option<Handle>], sm: u32, shared_bytes: u32) -> Result<[u32; 4]> {
    let is_decode = |entry: &&Entry| matches!(entry.kernel, Kernel::Decode { .. });
    let entry = ENTRIES.iter().find(is_decode).expect("the table has decode");
    let function = functions[number(entry)].expect("kernels with clusters have decode");
    let limits = DeviceLimits { shared_bytes, ..DeviceLimits::H100 };
    let each = entry.min_blocks_on(sm);
    let mut most = [0; 4];
    for (i, most) in most.iter_mut().enumerate() {
        let cluster = LaunchAttribute::new(LaunchAttribute::CLUSTER_DIMENSION, [1 << i, 1, 1]);
        let config = LaunchConfig {
            grid: [1 << i, 1, 1],
            block: [entry.threads, 1, 1],
            // With all the shared memory that a block can have: `decode` takes nearly all.
            shared_bytes: limits.shared_bytes_of(each),
            stream: ptr::null_mut(),
            attributes: &cluster,
            attribute_count: 1,
        };
        let mut clusters = 0;
        // SAFETY: writes one integer; the configuration and its attribute live through the call.
        unsafe { api.cuOccupancyMaxActiveClusters(&mut clusters, function, &config)? };
        *most = clusters as u32 * decode::BLOCKS_PER_SM / each;
    }
    Ok(most)
}

/// Place of an entry in the table.
fn number(entry: &Entry) -> usize {
    ENTRIES.iter().position(|other| other.kernel == entry.kernel).expect("entries come from the table")
}

/// The number of the device that the memory at `address` belongs to.
///
/// # Errors
/// [`Error::NoDevice`] without a driver, [`Error::Driver`] for an address that the driver does not know.
pub fn device_of(address: u64) -> Result<u32> {
    let api = api()?;
    let mut ordinal = 0u32;
    // SAFETY: writes one integer.
    unsafe {
        let value = ptr::from_mut(&mut ordinal).cast();
        api.cuPointerGetAttribute(value, attribute::POINTER_DEVICE_ORDINAL, address)?;
    }
    Ok(ordinal)
}
