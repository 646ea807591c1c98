//! What each access is checked for.

use super::machine::{Id, Machine, Region};
use super::memory::{Buffer, Clash};
use super::report::Fault;
use super::shadow::{By, Conflict, Kind, Now, Touch};
use super::shared::SHARED_BASE;
use std::ops::Range;
use std::panic::Location;

impl Machine {
    /// An access that a thread is about to make.
    pub(super) fn now(&self, id: Id, kind: Kind, at: &'static Location<'static>) -> Now {
        let block = &self.blocks[id.rank as usize];
        let thread = &block.threads[id.thread as usize];
        let number = id.thread as u16;
        let by = By::Thread { block: block.number, thread: number };
        let (actor, stamp) = (Self::actor(id), thread.place.stamp);
        Now {
            touch: Touch { by, epoch: block.epoch, arrived: thread.arrived, actor, stamp, kind, at },
            block: block.number,
            thread: number,
            passed: thread.passed,
            cluster: self.blocks.len() as u32,
            actor,
            known: thread.place.known.clone(),
            fenced: thread.place.fenced,
        }
    }

    /// Checks an access to the shared memory of block `owner` of the cluster, and says which bytes it is.
    pub(super) fn shared(
        &mut self,
        owner: u32,
        address: u32,
        bytes: u32,
        now: &Now,
    ) -> Result<Range<usize>, Fault> {
        self.shared_at(owner, address, bytes, bytes, now)
    }

    /// As [`Machine::shared`], for an access at a multiple of `alignment`.
    pub(super) fn shared_at(
        &mut self,
        owner: u32,
        address: u32,
        bytes: u32,
        alignment: u32,
        now: &Now,
    ) -> Result<Range<usize>, Fault> {
        let block = &mut self.blocks[owner as usize];
        let byte = i64::from(address) - i64::from(SHARED_BASE);
        let allocated = block.shared.len() as u32;
        if byte < 0 || byte + i64::from(bytes) > i64::from(allocated) {
            return Err(Fault::SharedOutOfBounds { byte, bytes, allocated });
        }
        let number = block.number;
        let place = |byte: usize| shared_place(byte, number, now.block);
        if !address.is_multiple_of(alignment) {
            return Err(Fault::Misaligned { place: place(byte as usize), bytes: alignment.into() });
        }
        if number != now.block {
            if now.passed == 0 {
                return Err(absent(now.touch.kind, number, "may not have started yet"));
            }
            if block.has_ended() {
                return Err(absent(now.touch.kind, number, "may have ended by then"));
            }
            // A store that the owner's mbarrier counts must have landed by then: see `unfinished_copy`. An
            // arrival is noted by `arrive_mbarrier`.
            if !matches!(now.touch.kind, Kind::CopyStart | Kind::Use) {
                block.note_visitor(now);
            }
        }
        let range = byte as usize..(byte as usize + bytes as usize);
        match block.shadow.touch(range.clone(), now) {
            Ok(()) => Ok(range),
            Err(conflict) => Err(fault(conflict, now, place)),
        }
    }

    /// Checks an access to device memory, at a multiple of `alignment`, and says which bytes it is.
    pub(super) fn global(
        &mut self,
        id: Id,
        address: u64,
        bytes: u64,
        alignment: u64,
        now: &Now,
    ) -> Result<(usize, Range<usize>), Fault> {
        let has_waited = self.thread(id).has_waited;
        let what = now.touch.kind.name();
        let number = self.region(address, bytes, what)?;
        let Region { buffer, part, shadow } = &mut self.regions[number];
        let start = (address - buffer.address) as usize;
        let place = |byte: usize| format!("byte {byte} of {}", buffer.name);
        if !address.is_multiple_of(alignment) {
            return Err(Fault::Misaligned { place: place(start), bytes: alignment });
        }
        let (allocation, range) = (part.0, part.1.start + start..part.1.start + start + bytes as usize);
        let writes = now.touch.kind.writes();
        match shadow {
            Some(shadow) => shadow
                .touch(start..start + bytes as usize, now)
                .map_err(|conflict| fault(conflict, now, place))?,
            None if writes => return Err(Fault::ReadOnly { buffer: buffer.name.clone() }),
            None => {}
        }
        let place = |byte: usize| place(byte.saturating_sub(part.1.start));
        self.memory.touch((allocation, range.clone()), writes, has_waited).map_err(|clash| match clash {
            Clash::Unwritten(byte) => Fault::Unwritten { place: place(byte) },
            Clash::Overlap(byte, kernel) => Fault::Overlap { what, place: place(byte), kernel },
        })?;
        Ok((allocation, range))
    }

    /// The number of the buffer in which these bytes are.
    fn region(&self, address: u64, bytes: u64, what: &'static str) -> Result<usize, Fault> {
        let inside = |region: &Region| {
            let start = address.checked_sub(region.buffer.address);
            start.is_some_and(|start| start + bytes <= region.buffer.bytes)
        };
        let near = || Fault::OutOfBounds { what, address, bytes, near: self.near(address) };
        self.regions.iter().position(inside).ok_or_else(near)
    }

    /// Checks that bytes which are asked for, and not read, are there, at a multiple of `alignment`.
    pub(super) fn asked_for(&self, address: u64, bytes: u64, alignment: u64) -> Result<(), Fault> {
        let Buffer { name, address: start, .. } =
            &self.regions[self.region(address, bytes, "prefetch")?].buffer;
        match address.is_multiple_of(alignment) && bytes.is_multiple_of(alignment) {
            true => Ok(()),
            false => {
                let place = format!("{bytes} bytes from byte {} of {name} on", address - start);
                Err(Fault::Misaligned { place, bytes: alignment })
            }
        }
    }

    /// Where the buffer nearest to an address is.
    fn near(&self, address: u64) -> String {
        let distance = |region: &Region| {
            let Buffer { address: start, bytes, .. } = region.buffer;
            start.saturating_sub(address).max(address.saturating_sub(start + bytes))
        };
        let Some(Region { buffer, .. }) = self.regions.iter().min_by_key(|region| distance(region)) else {
            return "and the launch has no buffers".to_owned();
        };
        let Buffer { name, address: start, bytes, .. } = buffer;
        if address < *start {
            format!("{} bytes before {name}", start - address)
        } else {
            format!("byte {} of {name}, which has {bytes}", address - start)
        }
    }
}

/// A byte of the shared memory of block `owner`, as block `block` sees it.
pub(super) fn shared_place(byte: usize, owner: u32, block: u32) -> String {
    match owner == block {
        true => format!("byte {byte} of shared memory"),
        false => format!("byte {byte} of block {owner}'s shared memory"),
    }
}

/// A fault of an access to the shared memory of block `block`.
fn absent(kind: Kind, block: u32, why: &'static str) -> Fault {
    Fault::Absent { what: kind.name(), block, why }
}

fn fault(conflict: Conflict, now: &Now, place: impl Fn(usize) -> String) -> Fault {
    match conflict {
        Conflict::Race(byte, other) => Fault::Race { what: now.touch.kind.name(), place: place(byte), other },
        Conflict::CopyUnderWay(byte, by) => Fault::CopyUnderWay { place: place(byte), by },
        Conflict::Unwritten(byte) => Fault::Unwritten { place: place(byte) },
        Conflict::Unfenced(byte, by) => Fault::Unfenced { what: "bulk copy to", place: place(byte), by },
        Conflict::Mbarrier(byte, by) => {
            let what = now.touch.kind.name();
            Fault::Mbarrier { place: place(byte), why: format!("{what} of a barrier, after {by}") }
        }
        Conflict::NoMbarrier(byte) => {
            Fault::Mbarrier { place: place(byte), why: "use of what was not initialised".to_owned() }
        }
    }
}
