//! Memory of a device, and the order in which streams use it.

use crate::cuda::context::Relaxed;
use crate::cuda::device::Device;
use crate::cuda::driver::{Allocation, api};
use crate::cuda::raw_stream::RawStream;
use crate::error::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What queued work does with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// An allocation of a device, which it keeps alive, and the streams that use it.
///
/// Work on one stream runs in order. Where memory is used on a second one, that stream first waits for what
/// the first has queued; only reads may go on side by side.
pub struct Memory {
    owner: Owner,
    device: Device,
    bytes: usize,
}

/// Whose memory it is.
enum Owner {
    /// This library's; the allocation is `None` only while it is dropped.
    This(Option<Allocation>, Mutex<Uses>),
    /// Another's, at this address, who lends it to work on one stream that is queued before the loan ends.
    #[cfg(feature = "cudarc-unversioned")]
    Other(u64, Arc<RawStream>),
}

/// The streams whose queued work uses a piece of memory.
#[derive(Default)]
struct Uses {
    /// The last that wrote.
    writer: Option<Arc<RawStream>>,
    /// Those that read since.
    readers: Vec<Arc<RawStream>>,
}

fn lock(uses: &Mutex<Uses>) -> MutexGuard<'_, Uses> {
    // A panic leaves the list as it was, or with one use more than there is.
    uses.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    /// Bytes on a device, unwritten.
    pub(super) fn new(device: &Device, bytes: usize) -> Result<Self> {
        let _bound = device.bind()?;
        let _relaxed = Relaxed::begin(api()?)?;
        // An empty buffer has an address too.
        let owner = Owner::This(Some(Allocation::new(bytes.max(1))?), Mutex::default());
        Ok(Memory { owner, device: device.clone(), bytes })
    }

    /// Memory of another's that `stream` may use.
    #[cfg(feature = "cudarc-unversioned")]
    pub(super) fn lent(stream: Arc<RawStream>, address: u64, bytes: usize) -> Self {
        let device = stream.device().clone();
        Memory { owner: Owner::Other(address, stream), device, bytes }
    }

    /// Whether a recording may keep it.
    pub(super) fn can_be_kept(&self) -> bool {
        matches!(self.owner, Owner::This(..))
    }

    pub(super) fn address(&self) -> u64 {
        match &self.owner {
            Owner::This(allocation, _) => {
                allocation.as_ref().expect("it is let go of when this is dropped").address()
            }
            #[cfg(feature = "cudarc-unversioned")]
            Owner::Other(address, _) => *address,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Refuses memory of another device than the call runs on.
    pub(super) fn check_device(&self, what: &'static str, device: &Device) -> Result<()> {
        if self.device == *device {
            return Ok(());
        }
        Err(Error::OtherDevice { what, expected: device.name(), got: self.device.name() })
    }

    /// What `stream` queues next may use the memory so: it waits for the other streams' uses that come
    /// before.
    pub(super) fn order(&self, stream: &Arc<RawStream>, access: Access) -> Result<()> {
        let uses = match &self.owner {
            Owner::This(_, uses) => &mut *lock(uses),
            #[cfg(feature = "cudarc-unversioned")]
            Owner::Other(_, lent_to) if lent_to.is(stream) => return Ok(()),
            #[cfg(feature = "cudarc-unversioned")]
            Owner::Other(_, lent_to) => {
                let (expected, got) = (stream.name(), lent_to.name());
                return Err(Error::OtherDevice { what: "a slice that is lent", expected, got });
            }
        };
        let others = |streams: &[Arc<RawStream>]| -> Result<()> {
            let mut others = streams.iter().filter(|other| !other.is(stream));
            others.try_for_each(|other| stream.wait_for(other))
        };
        others(uses.writer.as_slice())?;
        let is_writer = uses.writer.as_ref().is_some_and(|writer| writer.is(stream));
        match access {
            Access::Write => {
                others(&uses.readers)?;
                uses.readers.clear();
                if !is_writer {
                    uses.writer = Some(Arc::clone(stream));
                }
            }
            Access::Read => {
                if !is_writer && !uses.readers.iter().any(|reader| reader.is(stream)) {
                    uses.readers.push(Arc::clone(stream));
                }
            }
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        #[cfg_attr(not(feature = "cudarc-unversioned"), expect(irrefutable_let_patterns))]
        let Owner::This(allocation, uses) = &mut self.owner else { return };
        let (Ok(api), Ok(_bound)) = (api(), self.device.bind()) else { return };
        let _relaxed = Relaxed::begin(api);
        let Uses { writer, readers } = std::mem::take(&mut *lock(uses));
        // The driver may, but need not, wait before it frees. A stream of the caller's may be gone by now,
        // and so is its work then, as was promised. A failure has nobody to go to.
        for stream in writer.iter().chain(&readers).filter(|stream| stream.is_kept()) {
            let _ = stream.wait_unless_captured(api);
        }
        *allocation = None;
    }
}
