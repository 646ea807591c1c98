//! How a call finds the driver and its thread, and gives its answer.

use crate::answer::{Answer, Refusal, fault, refuse, require};
use crate::cuda_h::{INVALID_VALUE, NOT_INITIALIZED, SUCCESS, Status};
use crate::state::{Driver, Stream, THREAD_STREAMS, Thread};
use std::cell::RefCell;
use std::ffi::{CStr, c_char};
use std::mem;
use std::ptr;
use std::slice;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

pub(crate) static DRIVER: LazyLock<Mutex<Driver>> = LazyLock::new(|| Mutex::new(Driver::new(1)));

thread_local! {
    static THREAD: RefCell<Thread> = RefCell::default();
}

pub(crate) fn driver() -> MutexGuard<'static, Driver> {
    DRIVER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call of a driver that `cuInit` must have started.
pub(crate) fn call(name: &str, body: impl FnOnce(&mut Driver) -> Answer) -> Status {
    early_call(name, |driver| match driver.started {
        true => body(driver),
        // Whoever keeps the caller's context asks before anything else.
        false if name.starts_with("cuCtx") && name.ends_with("Current") => refuse(NOT_INITIALIZED),
        false => fault(NOT_INITIALIZED, "cuInit was not called"),
    })
}

/// A call that may come before `cuInit`.
pub(crate) fn early_call(name: &str, body: impl FnOnce(&mut Driver) -> Answer) -> Status {
    let mut driver = driver();
    // A thread that ends may have let its own go before.
    driver.thread = THREAD.try_with(RefCell::take).unwrap_or_default();
    if driver.thread.driver != driver.number {
        driver.threads += 1;
        driver.thread = Thread { number: driver.threads, driver: driver.number, ..Thread::default() };
        let thread = Some(driver.threads);
        for device in 0..driver.devices.len() {
            let handle = THREAD_STREAMS + driver.threads * driver.devices.len() + device;
            driver.streams.add(handle, Stream { thread, ..Stream::new(device, true, false) });
        }
    }
    let answer = match driver.failure(name) {
        Some(code) => refuse(code),
        None => body(&mut driver),
    };
    let thread = mem::take(&mut driver.thread);
    let _ = THREAD.try_with(|kept| kept.replace(thread));
    match answer {
        Ok(()) => SUCCESS,
        Err(Refusal { code, fault }) => {
            driver.faults.extend(fault.map(|what| format!("{name}: {what}")));
            code
        }
    }
}

/// Gives the caller a value.
pub(crate) fn put<T>(out: *mut T, value: T) -> Answer {
    require(!out.is_null(), INVALID_VALUE, "there is nowhere to write the answer")?;
    // SAFETY: a caller of the driver promises that a pointer is null or valid.
    unsafe { out.write(value) };
    Ok(())
}

/// As [`put`], where the caller need not want it.
pub(crate) fn put_if<T>(out: *mut T, value: T) -> Answer {
    if out.is_null() { Ok(()) } else { put(out, value) }
}

/// A name that the caller gives.
pub(crate) fn name_of<'a>(text: *const c_char) -> Answer<&'a str> {
    require(!text.is_null(), INVALID_VALUE, "there is no name")?;
    // SAFETY: as above; names end with NUL.
    Ok(unsafe { CStr::from_ptr(text) }.to_str().unwrap_or(""))
}

/// Elements that the caller gives.
pub(crate) fn elements<'a, T>(first: *const T, count: usize) -> Answer<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    require(!first.is_null(), INVALID_VALUE, "a pointer is null")?;
    // SAFETY: as above.
    Ok(unsafe { slice::from_raw_parts(first, count) })
}

/// Writes `text`, and NUL, as far as it fits into `len` bytes; tells how many it has.
pub(crate) fn put_text(text: &str, out: *mut c_char, len: usize) -> usize {
    if !out.is_null() && len > 0 {
        let fits = text.len().min(len - 1);
        // SAFETY: the caller has room for `len` bytes.
        unsafe {
            ptr::copy_nonoverlapping(text.as_ptr().cast(), out, fits);
            out.add(fits).write(0);
        }
    }
    text.len()
}
