//! "Initialization", "Version Management", "Device Management".

use crate::answer::{fault, refuse, require};
use crate::calls::{call, early_call, put, put_text};
use crate::cuda_h::{INVALID_VALUE, NO_DEVICE, Status};
use crate::state::{MEMORY_BYTES, MULTIPROCESSORS, PORTABLE_SHARED, RESERVED_SHARED};
use std::ffi::{c_char, c_int};

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: u32) -> Status {
    early_call("cuInit", |driver| {
        require(flags == 0, INVALID_VALUE, format!("flags {flags} mean nothing"))?;
        if driver.devices.is_empty() {
            return refuse(NO_DEVICE);
        }
        driver.started = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    early_call("cuDriverGetVersion", |driver| put(version, driver.version))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    call("cuDeviceGet", |driver| put(device, driver.device(ordinal)? as c_int))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    call("cuDeviceGetCount", |driver| put(count, driver.devices.len() as c_int))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> Status {
    call("cuDeviceGetName", |driver| {
        driver.device(device)?;
        require(!name.is_null() && len > 0, INVALID_VALUE, "there is nowhere to write the name")?;
        put_text("Fake GPU", name, len as usize);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> Status {
    call("cuDeviceTotalMem_v2", |driver| {
        driver.device(device)?;
        put(bytes, MEMORY_BYTES as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: u32, device: c_int) -> Status {
    call("cuDeviceGetAttribute", |driver| {
        driver.device(device)?;
        let (major, minor) = driver.capability;
        let (most_shared, shared) = driver.shared_bytes();
        let answer = match attribute {
            // Threads of a block, and its sides.
            1..=3 => 1024,
            4 => 64,
            // The grid's sides.
            5 => i32::MAX,
            6 | 7 => 65535,
            // MAX_SHARED_MEMORY_PER_BLOCK, WARP_SIZE, MAX_REGISTERS_PER_BLOCK.
            8 => PORTABLE_SHARED as c_int,
            10 => 32,
            12 => 65536,
            // CLOCK_RATE, MULTIPROCESSOR_COUNT.
            13 => 1_980_000,
            16 => MULTIPROCESSORS as c_int,
            // MEMORY_CLOCK_RATE and GLOBAL_MEMORY_BUS_WIDTH: 3352 GB/s.
            36 => 2_619_000,
            37 => 5120,
            // L2_CACHE_SIZE, MAX_THREADS_PER_MULTIPROCESSOR, UNIFIED_ADDRESSING.
            38 => 50 << 20,
            39 => 2048,
            41 => 1,
            // COMPUTE_CAPABILITY_MAJOR and _MINOR.
            75 => major as c_int,
            76 => minor as c_int,
            // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            // RESERVED_SHARED_MEMORY_PER_BLOCK.
            81 => shared as c_int,
            97 => most_shared as c_int,
            111 => RESERVED_SHARED as c_int,
            // COOPERATIVE_LAUNCH, CLUSTER_LAUNCH.
            95 => 1,
            120 => c_int::from(major >= 9),
            // Whatever else there is in CUDA 13.0, the device has not.
            9..150 => 0,
            _ => return fault(INVALID_VALUE, format!("attribute {attribute} is none")),
        };
        put(value, answer)
    })
}
