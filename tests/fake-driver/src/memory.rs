//! "Memory Management", "Unified Addressing".

use crate::answer::*;
use crate::calls::*;
use crate::cuda_h::*;
use crate::state::*;
use std::ffi::{c_int, c_void};
use std::ptr;

impl Allocation {
    pub(crate) fn free(&mut self) {
        self.freed = true;
        self.bytes = Vec::new();
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: *mut Address, bytes: usize) -> Status {
    call("cuMemAlloc_v2", |driver| {
        let device = driver.current()?;
        driver.unsafe_call()?;
        require(bytes > 0, INVALID_VALUE, "no bytes are asked for")?;
        let live = driver.memory.values().filter(|memory| memory.device == device && !memory.freed);
        let used: u64 = live.map(|memory| memory.len).sum();
        let len = bytes as u64;
        if len > MEMORY_BYTES - used {
            return refuse(OUT_OF_MEMORY);
        }
        let start = driver.next_address;
        put(address, start)?;
        driver.next_address = (start + len + GAP).next_multiple_of(GAP);
        driver.memory.insert(start, Allocation { device, bytes: vec![0; bytes], len, freed: false });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: Address) -> Status {
    call("cuMemFree_v2", |driver| {
        if address == 0 {
            return Ok(());
        }
        // That the context was released is told before anything of the memory.
        if driver.thread.contexts.last().is_some() {
            driver.current()?;
        }
        let device = match driver.memory.get(&address) {
            Some(memory) if memory.freed => {
                return fault(INVALID_VALUE, format!("{address:#x} was freed before"));
            }
            Some(memory) => memory.device,
            None => return fault(INVALID_VALUE, format!("no allocation starts at {address:#x}")),
        };
        driver.check_context(device, "the memory")?;
        driver.unsafe_call()?;
        driver.memory.get_mut(&address).expect("it was found").free();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(address: Address, value: u8, bytes: usize, stream: Handle) -> Status {
    call("cuMemsetD8Async", |driver| {
        let stream = driver.stream(stream)?;
        if bytes == 0 {
            return Ok(());
        }
        let len = bytes as u64;
        driver.check_range(address, len, driver.streams.get(stream)?.device)?;
        let words = format!("value={value}");
        let work = Work { memory: vec![(address, len)], fill: Some(value), ..Work::new("memset", words) };
        driver.queue(stream, work).map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: Address, from: *const u8, bytes: usize, stream: Handle) -> Status {
    call("cuMemcpyHtoDAsync_v2", |driver| {
        let from = elements(from, bytes)?;
        if let Some(start) = driver.queue_copy("copy_to_device", to, bytes, stream)? {
            driver.bytes_mut(start, to, bytes as u64).copy_from_slice(from);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: Address, bytes: usize, stream: Handle) -> Status {
    call("cuMemcpyDtoHAsync_v2", |driver| {
        require(bytes == 0 || !to.is_null(), INVALID_VALUE, "there is nowhere to copy to")?;
        if let Some(start) = driver.queue_copy("copy_to_host", from, bytes, stream)? {
            let from = driver.bytes_mut(start, from, bytes as u64).as_ptr();
            // SAFETY: the caller has room for as many bytes; they are its own.
            unsafe { ptr::copy_nonoverlapping(from, to, bytes) };
        }
        Ok(())
    })
}

impl Driver {
    /// Queues a copy between pageable host memory and a device; tells the start of the allocation if it is to
    /// be made now.
    fn queue_copy(
        &mut self,
        kind: &'static str,
        address: Address,
        bytes: usize,
        stream: Handle,
    ) -> Answer<Option<Address>> {
        let stream = self.stream(stream)?;
        if bytes == 0 {
            return Ok(None);
        }
        let start = self.check_range(address, bytes as u64, self.streams.get(stream)?.device)?;
        if let Some(capture) = self.capture_of(stream)?.filter(|_| !self.lenient) {
            self.captures.get_mut(capture)?.valid = false;
            return fault(CAPTURE_UNSUPPORTED, "a replay would use the host's pageable memory");
        }
        let memory = vec![(address, bytes as u64)];
        let ran = self.queue(stream, Work { memory, ..Work::new(kind, String::new()) })?;
        Ok(ran.then_some(start))
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuPointerGetAttribute(out: *mut c_void, attribute: u32, address: Address) -> Status {
    call("cuPointerGetAttribute", |driver| {
        // How a program finds out whether an address is a device's.
        let Some((start, memory)) = driver.allocation(address).filter(|(_, memory)| !memory.freed) else {
            return refuse(INVALID_VALUE);
        };
        match attribute {
            // CONTEXT; MEMORY_TYPE: a device's; DEVICE_POINTER; DEVICE_ORDINAL; RANGE_START_ADDR; RANGE_SIZE.
            1 => put(out.cast(), driver.devices[memory.device].context),
            2 => put(out.cast(), 2u32),
            3 => put(out.cast(), address),
            9 => put(out.cast(), memory.device as c_int),
            11 => put(out.cast(), start),
            12 => put(out.cast(), memory.len as usize),
            _ => fault(INVALID_VALUE, format!("attribute {attribute} is not modelled")),
        }
    })
}
