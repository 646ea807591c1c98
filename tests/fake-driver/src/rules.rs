//! Rules that many calls share.

use crate::answer::*;
use crate::cuda_h::*;
use crate::state::*;
use std::ffi::c_int;

impl Driver {
    pub(crate) fn device(&self, ordinal: c_int) -> Answer<usize> {
        let device = usize::try_from(ordinal).ok().filter(|device| *device < self.devices.len());
        device.ok_or(Refusal { code: INVALID_DEVICE, fault: None })
    }

    pub(crate) fn device_of_context(&self, context: Handle) -> Answer<usize> {
        match self.devices.iter().position(|device| device.context == context) {
            Some(device) => Ok(device),
            None => fault(INVALID_CONTEXT, format!("context {context:#x} is none")),
        }
    }

    /// The device whose context is current, "Context Management".
    pub(crate) fn current(&self) -> Answer<usize> {
        let Some(context) = self.thread.contexts.last() else {
            return fault(INVALID_CONTEXT, "no context is current");
        };
        let device = self.device_of_context(*context)?;
        let retained = self.devices[device].retained > 0;
        require(
            retained,
            CONTEXT_IS_DESTROYED,
            format!("the current context, of device {device}, was released"),
        )?;
        Ok(device)
    }

    /// Checks that something may be used while this context is current.
    pub(crate) fn check_context(&self, device: usize, what: &str) -> Answer {
        if self.lenient {
            return Ok(());
        }
        let current = self.current()?;
        let text = || format!("{what} is of device {device}, and the context of device {current} is current");
        if current == device { Ok(()) } else { fault(INVALID_CONTEXT, text()) }
    }

    /// The stream that a handle stands for: "Stream synchronization behavior".
    pub(crate) fn stream(&self, handle: Handle) -> Answer<Handle> {
        match handle {
            0 | 1 => Ok(self.devices[self.current()?].default_stream),
            2 => Ok(THREAD_STREAMS + self.thread.number * self.devices.len() + self.current()?),
            _ => {
                let device = self.streams.get(handle)?.device;
                self.check_context(device, "the stream")?;
                Ok(handle)
            }
        }
    }

    /// The allocation that holds `address`, freed or not.
    pub(crate) fn allocation(&self, address: Address) -> Option<(Address, &Allocation)> {
        let (start, allocation) = self.memory.range(..=address).next_back()?;
        (address - start < allocation.len).then_some((*start, allocation))
    }

    /// Checks that memory is within one allocation of a device; tells where that starts.
    pub(crate) fn check_range(&self, address: Address, len: u64, device: usize) -> Answer<Address> {
        let Some((start, allocation)) = self.allocation(address) else {
            return fault(INVALID_VALUE, format!("address {address:#x} is in no allocation"));
        };
        require(!allocation.freed, INVALID_VALUE, format!("the memory at {address:#x} was freed"))?;
        let left = allocation.len - (address - start);
        let what = format!("{len} bytes at {address:#x}, where the allocation has {left}");
        require(len <= left, INVALID_VALUE, what)?;
        let what =
            format!("the memory at {address:#x} is of device {}, the stream of {device}", allocation.device);
        require(allocation.device == device, INVALID_VALUE, what)?;
        Ok(start)
    }

    /// The bytes of memory that was checked.
    pub(crate) fn bytes_mut(&mut self, start: Address, address: Address, len: u64) -> &mut [u8] {
        let first = (address - start) as usize;
        &mut self.memory.get_mut(&start).expect("it was checked").bytes[first..first + len as usize]
    }

    /// Makes captures fail, for what the caller did meanwhile.
    pub(crate) fn invalidate(&mut self, which: impl Fn(&Capture) -> bool) -> bool {
        let mut any = false;
        for capture in self.captures.live.values_mut().filter(|capture| which(capture)) {
            capture.valid = false;
            any = true;
        }
        any
    }

    /// A call that allocates, frees or waits: `cuThreadExchangeStreamCaptureMode` calls it potentially
    /// unsafe, and says when captures forbid it.
    pub(crate) fn unsafe_call(&mut self) -> Answer {
        let Thread { number, capture_mode, .. } = self.thread;
        let forbids = |capture: &Capture| match capture.mode {
            RELAXED => false,
            _ if capture_mode == RELAXED => false,
            _ if capture.thread == number => true,
            mode => capture_mode == GLOBAL && mode == GLOBAL,
        };
        if self.invalidate(forbids) {
            return fault(CAPTURE_UNSUPPORTED, "a capture under way forbids it");
        }
        Ok(())
    }

    /// What the default stream must not do while a stream that waits for it is captured.
    pub(crate) fn check_default(&mut self, stream: Handle) -> Answer {
        let &Stream { device, default, .. } = self.streams.get(stream)?;
        if default && self.invalidate_blocking(device) {
            return fault(CAPTURE_IMPLICIT, "the default stream would wait for a stream that is captured");
        }
        Ok(())
    }

    /// Makes the captures fail that a blocking stream of this device is part of.
    pub(crate) fn invalidate_blocking(&mut self, device: usize) -> bool {
        let blocking = self.captures_blocking(device);
        for capture in &blocking {
            self.captures.live.get_mut(capture).expect("it lives").valid = false;
        }
        !blocking.is_empty()
    }

    pub(crate) fn captures_blocking(&self, device: usize) -> Vec<Handle> {
        let streams = self.streams.live.values();
        streams
            .filter(|stream| stream.device == device && stream.blocking)
            .filter_map(|stream| stream.capture)
            .collect()
    }

    /// The capture that what is queued on a stream becomes part of.
    pub(crate) fn capture_of(&self, stream: Handle) -> Answer<Option<Handle>> {
        let Some(capture) = self.streams.get(stream)?.capture else { return Ok(None) };
        require(self.captures.get(capture)?.valid, CAPTURE_INVALIDATED, "the capture failed before")?;
        Ok(Some(capture))
    }

    /// Queues work on a stream: it runs at once, or becomes a node of the graph that the stream is captured
    /// into. Returns whether it ran.
    pub(crate) fn queue(&mut self, stream: Handle, work: Work) -> Answer<bool> {
        if let Some(capture) = self.capture_of(stream)? {
            let nodes = &mut self.captures.get_mut(capture)?.nodes;
            nodes.push(work);
            let number = nodes.len();
            self.streams.get_mut(stream)?.captured.insert(stream, number);
            return Ok(false);
        }
        self.check_default(stream)?;
        self.run(stream, work)?;
        Ok(true)
    }

    /// Runs work on a stream that is not captured.
    pub(crate) fn run(&mut self, stream: Handle, work: Work) -> Answer {
        let &Stream { device, blocking, default, .. } = self.streams.get(stream)?;
        let mut clock = self.waited.clone();
        for (handle, other) in &self.streams.live {
            let waits = *handle == stream
                || other.device == device && blocking && other.blocking && (default || other.default);
            if waits {
                join(&mut clock, &other.clock);
            }
        }
        let after = clock.values().copied().collect();
        clock.insert(stream, self.log.len() + 1);
        self.streams.get_mut(stream)?.clock = clock;
        if let (Some(value), &[(address, len)]) = (work.fill, work.memory.as_slice()) {
            let start = self.check_range(address, len, device)?;
            self.bytes_mut(start, address, len).fill(value);
        }
        let stream = if default { 0 } else { stream };
        self.log.push(Entry { device, stream, thread: self.thread.number, work, after });
        Ok(())
    }

    /// Lets the streams of a capture go.
    pub(crate) fn end_capture(&mut self, capture: Handle) -> Answer<Capture> {
        let capture = self.captures.remove(capture)?;
        for stream in &capture.streams {
            if let Some(stream) = self.streams.live.get_mut(stream) {
                stream.capture = None;
            }
        }
        Ok(capture)
    }
}
