//! Barriers that count arrivals and bytes (PTX ISA 9.7.12.15), and the copies whose bytes they count.
//!
//! A copy lands when the phase that counts it completes, with what its source holds then: the latest moment
//! that the manual allows. Until then its target is under way.

use super::access::shared_place;
use super::machine::{Id, Machine, execute, running, suspend, with};
use super::order::{Actor, Gathering, Knowledge};
use super::report::Fault;
use super::shadow::{Kind, Touch};
use super::shared::SHARED_BASE;
use super::thread::{self, State};
use std::ops::Range;
use std::panic::Location;
use std::rc::Rc;

/// Bytes of a barrier.
const BYTES: u32 = 8;

/// Most arrivals of a phase, and most bytes that it waits for.
const MOST: u32 = (1 << 20) - 1;

/// The copy engine moves multiples of this, from and to multiples of this.
const UNIT: u32 = 16;

/// Where a thread waits for a phase.
const WAIT: &str = "mbarrier.try_wait";

/// The block of the cluster that a barrier is in, and its first byte there.
type Home = (u32, usize);

/// A barrier.
pub(super) struct Mbarrier {
    /// The copies that it counts.
    actor: Actor,
    /// The thread that initialised it, and the stamp of that.
    made: (Actor, u32),
    /// Whether that thread has shown it to the copy engine and the cluster.
    published: bool,
    /// Arrivals of each phase.
    arrivals: u32,
    /// Arrivals that this phase still waits for.
    pending: u32,
    /// Number of the current phase: its parity is the lowest bit.
    phase: u32,
    /// Bytes that were announced in this phase, and bytes of the copies started.
    announced: u32,
    started: u32,
    copies: Vec<Copy>,
    /// The last phase that copies landed with, and one of them.
    landed: Option<(u32, usize, Touch)>,
    /// What whoever has arrived lets others know, and what they had at the end of the last phase. Never
    /// forgotten: arrivals read and write the barrier one after another, so a later phase's wait is in order
    /// with all (PTX ISA 8.9.2, observation order).
    gathering: Gathering,
    completed: Rc<Knowledge>,
    waiting: Vec<Id>,
}

/// A copy under way.
struct Copy {
    target: Range<usize>,
    source: Source,
    /// What its landing is: of the copy engine's or of a thread's.
    landing: Kind,
    by: Touch,
}

enum Source {
    /// A part of device memory, and zeros up to the end of the target; or zeros alone.
    Global(Option<(usize, Range<usize>)>),
    /// The values of an `st.async`.
    Values([u32; 4]),
}

impl Mbarrier {
    /// Copies of `bytes` bytes are started.
    fn start(&mut self, bytes: u32, copy: Copy) {
        self.started += bytes;
        self.copies.push(copy);
    }

    /// What stands against the current phase, when it can never complete.
    fn excess(&self) -> Option<String> {
        let Mbarrier { phase, announced, started, .. } = self;
        (self.pending == 0 && started > announced)
            .then(|| format!("phase {phase} gets {started} bytes, and {announced} were announced"))
    }
}

impl Machine {
    /// Checks that an address is that of a barrier which the thread may use: the block it is in, and its
    /// first byte.
    fn mbarrier(&mut self, id: Id, address: u32, at: &'static Location<'static>) -> Result<Home, Fault> {
        let now = self.now(id, Kind::Use, at);
        let (owner, address) = self.owner(id, address);
        let range = self.shared(owner, address, BYTES, &now)?;
        Ok((owner, range.start))
    }

    /// The barrier that [`Machine::mbarrier`] found.
    fn found(&mut self, (owner, byte): Home) -> &mut Mbarrier {
        let barriers = &mut self.blocks[owner as usize].mbarriers;
        barriers.get_mut(&byte).expect("its bytes are marked as a barrier's")
    }

    fn misused(&self, id: Id, (owner, byte): Home, why: String) -> Fault {
        let [owner, block] = [owner, id.rank].map(|rank| self.blocks[rank as usize].number);
        Fault::Mbarrier { place: shared_place(byte, owner, block), why }
    }

    /// Other blocks and the copy engine see a barrier only once its initialisation was shown to them.
    fn check_published(&mut self, id: Id, barrier: Home) -> Result<(), Fault> {
        let place = self.thread(id).place.clone();
        let Mbarrier { published, made: (maker, stamp), .. } = *self.found(barrier);
        let own = Self::actor(id) == maker && place.fenced > stamp;
        if published || own || barrier.0 == id.rank && place.known.has_fenced(maker, stamp) {
            return Ok(());
        }
        let why = "it was not shown to other blocks and to copies (fence.mbarrier_init)".to_owned();
        Err(self.misused(id, barrier, why))
    }

    fn init_mbarrier(
        &mut self,
        id: Id,
        address: u32,
        arrivals: u32,
        at: &'static Location<'static>,
    ) -> Result<(), Fault> {
        let now = self.now(id, Kind::Init, at);
        let byte = self.shared(id.rank, address, BYTES, &now)?.start;
        if !(1..=MOST).contains(&arrivals) {
            return Err(self.misused(id, (id.rank, byte), format!("it cannot take {arrivals} arrivals")));
        }
        let block = self.block(id);
        let number = (block.threads.len() + block.mbarriers.len()) as u16;
        let barrier = Mbarrier {
            actor: Actor { rank: id.rank as u16, number },
            made: (now.actor, now.touch.stamp),
            published: false,
            arrivals,
            pending: arrivals,
            phase: 0,
            announced: 0,
            started: 0,
            copies: Vec::new(),
            landed: None,
            gathering: Gathering::default(),
            completed: Rc::default(),
            waiting: Vec::new(),
        };
        block.mbarriers.insert(byte, barrier);
        Ok(())
    }

    fn publish_mbarriers(&mut self, id: Id) {
        let maker = Self::actor(id);
        let made = self.block(id).mbarriers.values_mut().filter(|barrier| barrier.made.0 == maker);
        made.for_each(|barrier| barrier.published = true);
    }

    fn arrive_mbarrier(
        &mut self,
        id: Id,
        address: u32,
        (count, bytes): (u32, u32),
        at: &'static Location<'static>,
    ) -> Result<(), Fault> {
        let place = self.mbarrier(id, address, at)?;
        if place.0 != id.rank {
            self.check_published(id, place)?;
            let now = self.now(id, Kind::Use, at);
            self.blocks[place.0 as usize].note_visitor(&now);
        }
        let release = self.release(id);
        let barrier = self.found(place);
        let (phase, arrivals) = (barrier.phase, barrier.arrivals);
        if barrier.pending < count {
            let why = format!("phase {phase} takes {arrivals} arrivals, and one more comes");
            return Err(self.misused(id, place, why));
        }
        barrier.announced += bytes;
        if bytes > MOST || barrier.announced > MOST {
            return Err(self.misused(id, place, format!("phase {phase} cannot wait for so many bytes")));
        }
        barrier.pending -= count;
        barrier.gathering.add(&release);
        self.complete(id, place)
    }

    /// Completes a barrier's phase if nothing is missing: lands what it counts, and wakes who waits for it.
    fn complete(&mut self, id: Id, place: Home) -> Result<(), Fault> {
        let barrier = self.found(place);
        if let Some(why) = barrier.excess() {
            return Err(self.misused(id, place, why));
        }
        if barrier.pending > 0 || barrier.started < barrier.announced {
            return Ok(());
        }
        let copies = std::mem::take(&mut barrier.copies);
        if let Some(Copy { target, by, .. }) = copies.first() {
            barrier.landed = Some((barrier.phase, target.start, *by));
        }
        barrier.phase += 1;
        (barrier.pending, barrier.announced, barrier.started) = (barrier.arrivals, 0, 0);
        barrier.gathering.add_accesses(barrier.actor, barrier.phase);
        barrier.completed = barrier.gathering.knowledge();
        let (completed, waiting) = (barrier.completed.clone(), std::mem::take(&mut barrier.waiting));
        for Copy { target, source, landing, .. } in copies {
            let block = &mut self.blocks[place.0 as usize];
            block.shadow.land(&target, landing);
            match source {
                Source::Global(part) => {
                    let from: &[u8] = part.map_or(&[], |part| self.memory.part(part));
                    let (start, rest) = block.shared[target].split_at_mut(from.len());
                    start.copy_from_slice(from);
                    rest.fill(0);
                }
                Source::Values(values) => {
                    block.shared[target].copy_from_slice(values.map(u32::to_le_bytes).as_flattened());
                }
            }
        }
        for thread in waiting {
            self.acquire(thread, &completed);
            self.thread(thread).state = State::Ready;
            self.ready.push(thread);
        }
        Ok(())
    }

    /// The barrier and its phase, when the thread must wait for the end of that.
    fn wait_mbarrier(
        &mut self,
        id: Id,
        address: u32,
        parity: u32,
        at: &'static Location<'static>,
    ) -> Result<Option<(Home, u32)>, Fault> {
        let place = self.mbarrier(id, address, at)?;
        if place.0 != id.rank {
            return Err(self.misused(id, place, "only its own block can wait for it".to_owned()));
        }
        if parity > 1 {
            return Err(self.misused(id, place, format!("wait for parity {parity}")));
        }
        let barrier = self.found(place);
        if barrier.phase % 2 != parity {
            let completed = barrier.completed.clone();
            self.acquire(id, &completed);
            return Ok(None);
        }
        let phase = barrier.phase;
        barrier.waiting.push(id);
        self.thread(id).state = State::Waits(WAIT, at);
        Ok(Some((place, phase)))
    }

    /// A thread that looks again after a phase must find the next one: a parity says no more.
    fn check_phase(&mut self, id: Id, place: Home, waited_for: u32) -> Result<(), Fault> {
        let phase = self.found(place).phase;
        if phase == waited_for + 1 {
            return Ok(());
        }
        let why = format!("a thread that waits for phase {waited_for} may miss it: phase {phase} has begun");
        Err(self.misused(id, place, why))
    }

    /// Gives the copies that a thread has started to the current phase, and arrives: they land when it
    /// completes.
    fn arrive_after_copies(
        &mut self,
        id: Id,
        address: u32,
        at: &'static Location<'static>,
    ) -> Result<(), Fault> {
        let place = self.mbarrier(id, address, at)?;
        if place.0 != id.rank {
            return Err(self.misused(id, place, "only copies to its own block can be waited for".to_owned()));
        }
        let thread = self.thread(id);
        let started = std::mem::take(&mut thread.groups).into_iter().flatten();
        let started: Vec<_> = started.chain(std::mem::take(&mut thread.open)).collect();
        let Mbarrier { actor, phase, .. } = *self.found(place);
        for thread::Copy { target, source, bytes } in started {
            let mut reads = self.now(id, Kind::Fetch, at);
            (reads.touch.actor, reads.touch.stamp) = (actor, phase);
            let part = match bytes {
                0 => None,
                _ => Some(self.global(id, source, bytes.into(), UNIT.into(), &reads)?),
            };
            // Checked when the copy was started.
            let start = (target - SHARED_BASE) as usize;
            let range = start..start + UNIT as usize;
            self.block(id).shadow.hand_over(&range, actor, phase);
            let (source, landing) = (Source::Global(part), Kind::LandedStore);
            self.found(place).copies.push(Copy { target: range, source, landing, by: reads.touch });
        }
        self.arrive_mbarrier(id, address, (1, 0), at)
    }

    fn start_bulk_copy(
        &mut self,
        id: Id,
        (target, source, bytes): (u32, u64, u32),
        barrier: u32,
        at: &'static Location<'static>,
    ) -> Result<(), Fault> {
        if bytes == 0 || !bytes.is_multiple_of(UNIT) {
            return Err(Fault::CopyUnit { bytes });
        }
        let place = self.mbarrier(id, barrier, at)?;
        self.check_published(id, place)?;
        let Mbarrier { actor, phase, .. } = *self.found(place);
        let now = |machine: &Machine, kind| {
            let mut now = machine.now(id, kind, at);
            (now.touch.actor, now.touch.stamp) = (actor, phase);
            now
        };
        let reads = now(self, Kind::Fetch);
        let source = Source::Global(Some(self.global(id, source, bytes.into(), UNIT.into(), &reads)?));
        let writes = now(self, Kind::BulkStart);
        let target = self.shared_at(id.rank, target, bytes, UNIT, &writes)?;
        self.found(place).start(bytes, Copy { target, source, landing: Kind::Landed, by: writes.touch });
        self.complete(id, place)
    }

    fn start_store(
        &mut self,
        id: Id,
        (target, values): (u32, [u32; 4]),
        barrier: u32,
        at: &'static Location<'static>,
    ) -> Result<(), Fault> {
        let place = self.mbarrier(id, barrier, at)?;
        self.check_published(id, place)?;
        let (owner, target) = self.owner(id, target);
        if owner != place.0 {
            return Err(self.misused(id, place, "st.async to another block than its barrier's".to_owned()));
        }
        let Mbarrier { actor, phase, .. } = *self.found(place);
        let mut now = self.now(id, Kind::CopyStart, at);
        (now.touch.actor, now.touch.stamp) = (actor, phase);
        let bytes = size_of_val(&values) as u32;
        let target = self.shared(owner, target, bytes, &now)?;
        let (source, landing) = (Source::Values(values), Kind::Landed);
        self.found(place).start(bytes, Copy { target, source, landing, by: now.touch });
        self.complete(id, place)
    }

    /// A copy to the memory of a block whose threads have ended, and knew `known`, that need not have landed
    /// by then.
    pub(super) fn unfinished_copy(&self, id: Id, known: &Knowledge) -> Option<(String, Touch)> {
        let block = &self.blocks[id.rank as usize];
        let (byte, by) = block.mbarriers.values().find_map(|barrier| {
            let under_way = barrier.copies.first().map(|copy| (copy.target.start, copy.by));
            let landed = barrier.landed.filter(|(phase, ..)| !known.has_seen(barrier.actor, *phase));
            under_way.or(landed.map(|(_, byte, by)| (byte, by)))
        })?;
        Some((shared_place(byte, block.number, block.number), by))
    }

    /// What the phases are missing that threads wait for: a line each.
    pub(super) fn open_phases(&self) -> Vec<String> {
        let alone = self.blocks.len() == 1;
        let barriers = self.blocks.iter().flat_map(|block| {
            let of = if alone { String::new() } else { format!(" of block {}", block.number) };
            block.mbarriers.iter().filter(|(_, barrier)| !barrier.waiting.is_empty()).map(
                move |(byte, Mbarrier { phase, arrivals, pending, announced, started, .. })| {
                    format!(
                        "  the mbarrier at byte {byte}{of} in phase {phase} has {} of {arrivals} arrivals \
                         and {started} of {announced} bytes",
                        arrivals - pending
                    )
                },
            )
        });
        barriers.collect()
    }
}

/// `mbarrier.init`.
#[track_caller]
pub(crate) fn init_mbarrier(address: u32, arrivals: u32) {
    let at = Location::caller();
    execute(at, |machine, id| machine.init_mbarrier(id, address, arrivals, at));
}

/// `fence.mbarrier_init`.
pub(crate) fn publish_mbarriers() {
    let (id, _) = running();
    with(|machine| machine.publish_mbarriers(id));
}

/// `mbarrier.arrive` for `count` arrivals, after `mbarrier.expect_tx` of `bytes` bytes.
#[track_caller]
pub(crate) fn arrive_mbarrier(address: u32, count: u32, bytes: u32) {
    let at = Location::caller();
    execute(at, |machine, id| machine.arrive_mbarrier(id, address, (count, bytes), at));
}

/// `cp.async.mbarrier.arrive.noinc`.
#[track_caller]
pub(crate) fn arrive_after_copies(address: u32) {
    let at = Location::caller();
    execute(at, |machine, id| machine.arrive_after_copies(id, address, at));
}

/// `mbarrier.try_wait.parity` until it succeeds.
#[track_caller]
pub(crate) fn wait_mbarrier(address: u32, parity: u32) {
    let at = Location::caller();
    if let Some((place, phase)) = execute(at, |machine, id| machine.wait_mbarrier(id, address, parity, at)) {
        suspend();
        execute(at, |machine, id| machine.check_phase(id, place, phase));
    }
}

/// `cp.async.bulk` from device memory to shared memory.
#[track_caller]
pub(crate) fn start_bulk_copy(target: u32, source: u64, bytes: u32, barrier: u32) {
    let at = Location::caller();
    execute(at, |machine, id| machine.start_bulk_copy(id, (target, source, bytes), barrier, at));
}

/// `st.async` of 16 bytes.
#[track_caller]
pub(crate) fn start_store(target: u32, values: [u32; 4], barrier: u32) {
    let at = Location::caller();
    execute(at, |machine, id| machine.start_store(id, (target, values), barrier, at));
}
