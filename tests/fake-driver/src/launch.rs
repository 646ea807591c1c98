//! "Execution Control", and how many clusters fit.

use crate::answer::*;
use crate::calls::*;
use crate::cuda_h::*;
use crate::state::*;
use std::collections::BTreeSet;
use std::ffi::{c_int, c_void};
use std::fmt::Write;

/// How many a grid, a block or a cluster of these sides has.
pub(crate) fn volume(sides: [u32; 3]) -> u64 {
    sides.into_iter().map(u64::from).fold(1, u64::saturating_mul)
}

/// A launch as it was asked for, checked as far as both the launch and the question of how many clusters fit
/// need.
struct Launch<'a> {
    config: &'a LaunchConfig,
    /// Blocks of a cluster; `None` where none was asked for.
    cluster: Option<[u32; 3]>,
    cooperative: bool,
    overlaps: bool,
    /// Blocks that a multiprocessor holds.
    resident: u32,
}

impl Driver {
    fn launch<'a>(&self, config: *const LaunchConfig, function: &Function) -> Answer<Launch<'a>> {
        let config = &elements(config, 1)?[0];
        let kernel = &function.kernel;
        let (mut cluster, mut cooperative, mut overlaps) = (kernel.exact_cluster, false, false);
        for attribute in elements(config.attributes, config.attribute_count as usize)? {
            let [x, y, z] = [0, 1, 2].map(|i| attribute.value[i]);
            // IGNORE; COOPERATIVE; CLUSTER_DIMENSION, _SCHEDULING_POLICY_PREFERENCE;
            // PROGRAMMATIC_STREAM_SERIALIZATION, PRIORITY.
            match attribute.id {
                0 | 5 | 8 => {}
                2 => cooperative = x != 0,
                4 => {
                    let exact = kernel.exact_cluster.is_none_or(|exact| exact == [x, y, z]);
                    require(exact, INVALID_CLUSTER_SIZE, "the kernel is for clusters of another size")?;
                    cluster = Some([x, y, z]);
                }
                6 => overlaps = x != 0,
                id => return fault(INVALID_VALUE, format!("launch attribute {id} is not known")),
            }
        }
        let [blocks, threads] = [config.grid, config.block].map(volume);
        require(blocks > 0 && threads > 0, INVALID_VALUE, "the grid or the block is empty")?;
        let most = kernel.most_threads.map_or(1024, volume);
        let what = format!("{threads} threads, where {} takes {most}", kernel.name);
        require(threads <= most.min(1024), INVALID_VALUE, what)?;
        let exact = kernel.exact_threads.is_none_or(|exact| exact == config.block);
        require(exact, INVALID_VALUE, format!("{} is for {:?} threads", kernel.name, kernel.exact_threads))?;
        if let Some(sides) = cluster {
            let size = volume(sides);
            require(self.capability.0 >= 9, INVALID_CLUSTER_SIZE, "the device has no clusters")?;
            let most = if function.large_clusters { 16 } else { 8 };
            let what = format!("clusters of {size} blocks, where {most} are allowed");
            require((1..=most).contains(&size), INVALID_CLUSTER_SIZE, what)?;
            let fits = config.grid.iter().zip(sides).all(|(blocks, side)| blocks % side == 0);
            require(
                fits,
                INVALID_CLUSTER_SIZE,
                format!("a grid of {:?} in clusters of {sides:?}", config.grid),
            )?;
        }
        let warps = (threads as u32).div_ceil(32);
        let by_shared = self.shared_bytes().1 / config.shared_bytes.saturating_add(RESERVED_SHARED);
        let resident = (64 / warps).min(by_shared).min(if cluster.is_some() { 8 } else { 32 });
        Ok(Launch { config, cluster, cooperative, overlaps, resident })
    }
}

#[cfg(not(feature = "old"))]
#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernelEx(
    config: *const LaunchConfig,
    function: Handle,
    parameters: *const *const u8,
    extra: *const *const c_void,
) -> Status {
    call("cuLaunchKernelEx", |driver| {
        let found = driver.functions.get(function)?;
        let Launch { config, cluster, cooperative, overlaps, resident } = driver.launch(config, found)?;
        let stream = driver.stream(config.stream)?;
        let device = driver.streams.get(stream)?.device;
        let kernel = &found.kernel;
        let what = format!("{} is loaded on device {}, the stream is of {device}", kernel.name, found.device);
        require(found.device == device, INVALID_HANDLE, what)?;
        let (shared, most) = (config.shared_bytes, found.most_shared);
        let what = format!("{shared} bytes of shared memory, where {} may have {most}", kernel.name);
        require(shared <= most, INVALID_VALUE, what)?;
        let blocks = volume(config.grid);
        let fits = !cooperative || blocks <= u64::from(resident * MULTIPROCESSORS);
        require(fits, COOPERATIVE_LAUNCH_TOO_LARGE, format!("{blocks} blocks are more than run at a time"))?;
        require(extra.is_null(), INVALID_VALUE, "`extra` is not modelled")?;
        let memory = match &kernel.parameters {
            Some(sizes) => driver.named_memory(elements(parameters, sizes.len())?, sizes, device)?,
            None => Vec::new(),
        };
        let sides = |[x, y, z]: [u32; 3]| format!("{x},{y},{z}");
        let mut words =
            format!("kernel={} grid={} block={}", kernel.name, sides(config.grid), sides(config.block));
        write!(words, " shared={shared}").expect("strings grow");
        for (set, word) in [(cooperative, " cooperative=1"), (overlaps, " overlaps=1")] {
            words.push_str(if set { word } else { "" });
        }
        if let Some(cluster) = cluster {
            write!(words, " cluster={}", sides(cluster)).expect("strings grow");
        }
        let work = Work { memory, function: Some(function), ..Work::new("launch", words) };
        driver.queue(stream, work).map(drop)
    })
}

impl Driver {
    /// The allocations that a launch's parameters point into: every word of them that looks like an address
    /// is one.
    fn named_memory(
        &self,
        parameters: &[*const u8],
        sizes: &[usize],
        device: usize,
    ) -> Answer<Vec<(Address, u64)>> {
        let mut memory = BTreeSet::new();
        for (parameter, bytes) in parameters.iter().zip(sizes) {
            for word in elements(*parameter, *bytes)?.chunks_exact(8) {
                let address = u64::from_ne_bytes(word.try_into().expect("eight bytes"));
                let Some((start, allocation)) = self.allocation(address) else { continue };
                let what = format!("a parameter is the address {address:#x}, of memory that was freed");
                require(!allocation.freed, ILLEGAL_ADDRESS, what)?;
                let what =
                    format!("a parameter is the address {address:#x}, of device {}", allocation.device);
                require(allocation.device == device, ILLEGAL_ADDRESS, what)?;
                memory.insert((start, allocation.len));
            }
        }
        Ok(memory.into_iter().collect())
    }
}

#[cfg(not(feature = "old"))]
#[unsafe(no_mangle)]
extern "C" fn cuOccupancyMaxActiveClusters(
    count: *mut c_int,
    function: Handle,
    config: *const LaunchConfig,
) -> Status {
    call("cuOccupancyMaxActiveClusters", |driver| {
        let function = driver.functions.get(function)?;
        driver.check_context(function.device, "the function")?;
        let Launch { cluster, resident, config, .. } = driver.launch(config, function)?;
        let size = cluster.map_or(0, |sides| volume(sides) as u32);
        let clusters = if size == 0 || config.shared_bytes > function.most_shared {
            0
        } else {
            GPCS.iter().map(|multiprocessors| multiprocessors / size).sum::<u32>() * resident
        };
        put(count, clusters as c_int)
    })
}
