//! "Primary Context Management", "Context Management".

use crate::answer::*;
use crate::calls::*;
use crate::cuda_h::*;
use crate::state::*;
use std::ffi::c_int;

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> Status {
    call("cuDevicePrimaryCtxRetain", |driver| {
        let device = driver.device(device)?;
        let device = &mut driver.devices[device];
        put(context, device.context)?;
        device.retained += 1;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Status {
    call("cuDevicePrimaryCtxRelease_v2", |driver| driver.release(device))
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease(device: c_int) -> Status {
    call("cuDevicePrimaryCtxRelease", |driver| driver.release(device))
}

impl Driver {
    fn release(&mut self, device: c_int) -> Answer {
        let ordinal = self.device(device)?;
        let device = &mut self.devices[ordinal];
        require(device.retained > 0, INVALID_CONTEXT, format!("device {ordinal}'s context is not retained"))?;
        device.retained -= 1;
        if device.retained > 0 {
            return Ok(());
        }
        let default_stream = device.default_stream;
        let mut freed = 0;
        for memory in self.memory.values_mut().filter(|memory| memory.device == ordinal && !memory.freed) {
            memory.free();
            freed += 1;
        }
        self.captures.remove_all(|capture| capture.device == ordinal);
        let lost = [
            ("allocations", freed),
            ("streams", self.streams.remove_all(|stream| stream.device == ordinal && stream.is_made())),
            ("events", self.events.remove_all(|event| event.device == ordinal)),
            ("modules", self.modules.remove_all(|module| module.device == ordinal)),
            ("graphs", self.graphs.remove_all(|graph| graph.device == ordinal)),
            ("executable graphs", self.executables.remove_all(|graph| graph.device == ordinal)),
        ];
        self.functions.remove_all(|function| function.device == ordinal);
        *self.streams.get_mut(default_stream)? = Stream::new(ordinal, true, true);
        let lost: Vec<String> = lost
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(what, count)| format!("{count} {what}"))
            .collect();
        if !lost.is_empty() {
            // The call succeeds all the same, as the driver's does.
            let lost = lost.join(", ");
            self.faults.push(format!("context of device {ordinal} released with {lost} alive"));
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut u32, active: *mut c_int) -> Status {
    call("cuDevicePrimaryCtxGetState", |driver| {
        let device = driver.device(device)?;
        put(flags, driver.devices[device].flags)?;
        put(active, c_int::from(driver.devices[device].retained > 0))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, flags: u32) -> Status {
    call("cuDevicePrimaryCtxSetFlags_v2", |driver| {
        let device = driver.device(device)?;
        require(flags <= 0xff, INVALID_VALUE, format!("flags {flags:#x} mean nothing"))?;
        driver.devices[device].flags = flags;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> Status {
    call("cuCtxGetCurrent", |driver| put(context, driver.thread.contexts.last().copied().unwrap_or(0)))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Handle) -> Status {
    call("cuCtxSetCurrent", |driver| {
        if context != 0 {
            driver.device_of_context(context)?;
        }
        // It takes the place of the topmost; null takes that away.
        driver.thread.contexts.pop();
        driver.thread.contexts.extend((context != 0).then_some(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> Status {
    call("cuCtxPushCurrent_v2", |driver| {
        require(context != 0, INVALID_VALUE, "there is no context")?;
        driver.device_of_context(context)?;
        driver.thread.contexts.push(context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPopCurrent_v2(context: *mut Handle) -> Status {
    call("cuCtxPopCurrent_v2", |driver| match driver.thread.contexts.pop() {
        Some(top) => put_if(context, top),
        None => fault(INVALID_CONTEXT, "no context is current"),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: *mut c_int) -> Status {
    call("cuCtxGetDevice", |driver| match driver.thread.contexts.last() {
        Some(context) => put(device, driver.device_of_context(*context)? as c_int),
        // How a program finds out whether there is one.
        None => refuse(INVALID_CONTEXT),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> Status {
    call("cuCtxSynchronize", |driver| {
        let device = driver.current()?;
        if driver.invalidate(|capture| capture.device == device) {
            return fault(CAPTURE_UNSUPPORTED, "a stream of the context is captured");
        }
        driver.unsafe_call()?;
        for stream in driver.streams.live.values().filter(|stream| stream.device == device) {
            join(&mut driver.waited, &stream.clock);
        }
        let stream = driver.devices[device].default_stream;
        driver.run(stream, Work::new("synchronize_context", String::new()))
    })
}
