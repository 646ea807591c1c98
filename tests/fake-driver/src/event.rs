//! "Event Management".

use crate::answer::*;
use crate::calls::*;
use crate::cuda_h::*;
use crate::state::*;

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: *mut Handle, flags: u32) -> Status {
    call("cuEventCreate", |driver| {
        const DISABLE_TIMING: u32 = 2;
        let device = driver.current()?;
        require(flags < 8, INVALID_VALUE, format!("flags {flags:#x} mean nothing"))?;
        let handle = driver.handle();
        put(event, handle)?;
        let timed = flags & DISABLE_TIMING == 0;
        driver.events.add(handle, Event { device, timed, recorded: Recorded::Never });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> Status {
    call("cuEventDestroy_v2", |driver| {
        driver.check_context(driver.events.get(event)?.device, "the event")?;
        driver.events.remove(event).map(drop)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> Status {
    call("cuEventRecord", |driver| {
        let of_event = driver.events.get(event)?.device;
        let stream = driver.stream(stream)?;
        let device = driver.streams.get(stream)?.device;
        let what = format!("the event is of device {of_event}, the stream of {device}");
        require(of_event == device, INVALID_HANDLE, what)?;
        let recorded = match driver.capture_of(stream)? {
            Some(capture) => Recorded::InCapture(capture, driver.streams.get(stream)?.captured.clone()),
            None => {
                driver.check_default(stream)?;
                driver.run(stream, Work::new("record", format!("event={event:#x}")))?;
                Recorded::Ran(driver.log.len(), driver.streams.get(stream)?.clock.clone())
            }
        };
        driver.events.get_mut(event)?.recorded = recorded;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> Status {
    call("cuEventSynchronize", |driver| driver.wait_for_event(event))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Handle) -> Status {
    call("cuEventQuery", |driver| driver.wait_for_event(event))
}

impl Driver {
    /// The caller learns that the work before an event has ended.
    fn wait_for_event(&mut self, event: Handle) -> Answer {
        let event = self.events.get(event)?;
        self.check_context(event.device, "the event")?;
        let recorded = event.recorded.clone();
        if let Recorded::InCapture(capture, _) = &recorded {
            let Ok(capture) = self.captures.get_mut(*capture) else {
                return fault(INVALID_VALUE, "the event was recorded in a capture that has ended");
            };
            capture.valid = false;
            return fault(CAPTURED_EVENT, "the event was recorded in a capture");
        }
        self.unsafe_call()?;
        if let Recorded::Ran(_, clock) = &recorded {
            join(&mut self.waited, clock);
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) -> Status {
    call("cuEventElapsedTime", |driver| {
        let mut times = [0.0; 2];
        for (time, event) in times.iter_mut().zip([start, end]) {
            let event = driver.events.get(event)?;
            driver.check_context(event.device, "the event")?;
            require(event.timed, INVALID_HANDLE, "the event is not timed")?;
            *time = match &event.recorded {
                Recorded::Never => return fault(INVALID_HANDLE, "the event was never recorded"),
                Recorded::InCapture(..) => {
                    return fault(CAPTURED_EVENT, "the event was recorded in a capture");
                }
                // A microsecond an entry of the log.
                Recorded::Ran(number, _) => *number as f32 * 1e-3,
            };
        }
        put(milliseconds, times[1] - times[0])
    })
}
