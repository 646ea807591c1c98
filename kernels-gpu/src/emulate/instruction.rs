//! What each instruction of one thread does: the functions that `arch` calls.

use super::machine::{Id, Machine, execute, running, stop, suspend, with};
use super::report::Fault;
use super::shadow::{Kind, Now};
use super::shared::{WINDOW, WORD, words};
use super::thread::{Copy, State};
use std::ops::Range;
use std::panic::Location;

impl Machine {
    /// Lands a copy: its bytes are now the thread's that started it.
    fn land(&mut self, id: Id, copy: &Copy, at: &'static Location<'static>) -> Result<(), Fault> {
        let mut data = [0; 16];
        if copy.bytes > 0 {
            let now = self.now(id, Kind::Read, at);
            let part = self.global(id, copy.source, copy.bytes.into(), 16, &now)?;
            data[..copy.bytes as usize].copy_from_slice(self.memory.part(part));
        }
        let now = self.now(id, Kind::CopyEnd, at);
        let range = self.shared(id.rank, copy.target, 16, &now)?;
        self.block(id).shared[range].copy_from_slice(&data);
        Ok(())
    }

    /// The block of the cluster that an address of the cluster's shared memory is in, and the address there.
    pub(super) fn owner(&self, id: Id, address: u32) -> (u32, u32) {
        match (address / WINDOW).checked_sub(1) {
            Some(owner) => (owner, address % WINDOW),
            None => (id.rank, address),
        }
    }

    /// The bytes of an access to the shared memory of the cluster, once it is checked.
    fn cluster(&mut self, id: Id, address: u32, bytes: usize, now: &Now) -> Result<&mut [u8], Fault> {
        let (owner, address) = self.owner(id, address);
        let range: Range<usize> = self.shared(owner, address, bytes as u32, now)?;
        Ok(&mut self.blocks[owner as usize].shared[range])
    }
}

/// `%tid.x`.
pub(crate) fn thread() -> u32 {
    running().0.thread
}

/// `%ctaid.x`.
pub(crate) fn block() -> u32 {
    running().1
}

/// `%cluster_ctarank`.
pub(crate) fn cluster_rank() -> u32 {
    running().0.rank
}

/// `%cluster_nctarank`.
pub(crate) fn cluster_blocks() -> u32 {
    with(|machine| machine.cluster)
}

/// `trap`.
#[track_caller]
pub(crate) fn trap() -> ! {
    stop(Location::caller(), Fault::Trap)
}

/// An offset that does not fit its width.
#[track_caller]
pub(crate) fn overflow(expression: String) -> ! {
    stop(Location::caller(), Fault::Overflow { expression })
}

/// `bar.sync`.
#[track_caller]
pub(crate) fn sync_block() {
    let at = Location::caller();
    let (id, _) = running();
    with(|machine| {
        machine.thread(id).state = State::Waits("bar.sync", at);
        machine.block(id).at_barrier += 1;
        machine.release_barrier(id.rank);
    });
    suspend();
}

/// `griddepcontrol.wait`.
pub(crate) fn wait_for_launch() {
    let (id, _) = running();
    with(|machine| machine.thread(id).has_waited = true);
}

/// `griddepcontrol.launch_dependents`.
pub(crate) fn launch_dependents() {
    let (id, _) = running();
    with(|machine| {
        let has_waited = machine.thread(id).has_waited;
        let all = &mut machine.block(id).launch_dependents;
        *all = Some(all.unwrap_or(true) && has_waited);
    });
}

/// `mapa.shared::cluster`: the place `address` in block `rank` of the cluster.
#[track_caller]
pub(crate) fn map_shared(address: u32, rank: u32) -> u32 {
    let at = Location::caller();
    execute(at, |machine, _| match machine.cluster {
        blocks if rank >= blocks => Err(Fault::NoBlock { block: rank, blocks }),
        _ => machine.check_cluster().map(|()| (rank + 1) * WINDOW + address % WINDOW),
    })
}

/// `ld.shared` or `ld.shared::cluster` of `N` words.
#[track_caller]
pub(crate) fn load_shared<const N: usize>(address: u32) -> [u32; N] {
    let at = Location::caller();
    execute(at, |machine, id| {
        let now = machine.now(id, Kind::Read, at);
        Ok(words(machine.cluster(id, address, N * WORD, &now)?))
    })
}

/// `st.shared` or `st.shared::cluster` of `N` words.
#[track_caller]
pub(crate) fn store_shared<const N: usize>(address: u32, values: [u32; N]) {
    let at = Location::caller();
    execute(at, |machine, id| {
        let now = machine.now(id, Kind::Write, at);
        let bytes = machine.cluster(id, address, N * WORD, &now)?;
        bytes.copy_from_slice(values.map(u32::to_le_bytes).as_flattened());
        Ok(())
    })
}

/// `atom.shared`: replaces a word by what `operation` makes of it, and returns what was there.
#[track_caller]
pub(crate) fn update_shared(address: u32, operation: impl FnOnce(u32) -> u32) -> u32 {
    let at = Location::caller();
    execute(at, |machine, id| {
        let now = machine.now(id, Kind::Atomic, at);
        let bytes = machine.cluster(id, address, WORD, &now)?;
        let [before] = words(bytes);
        bytes.copy_from_slice(&operation(before).to_le_bytes());
        Ok(before)
    })
}

/// `atom.global`: as [`update_shared`].
#[track_caller]
pub(crate) fn update_global(address: u64, operation: impl FnOnce(u32) -> u32) -> u32 {
    let at = Location::caller();
    execute(at, |machine, id| {
        machine.looks = 0;
        let now = machine.now(id, Kind::Atomic, at);
        let part = machine.global(id, address, WORD as u64, WORD as u64, &now)?;
        let part = machine.memory.part(part);
        let [before] = words(part);
        part.copy_from_slice(&operation(before).to_le_bytes());
        Ok(before)
    })
}

/// `ld.global` of `N` bytes.
#[track_caller]
pub(crate) fn load_global<const N: usize>(address: u64) -> [u8; N] {
    let at = Location::caller();
    execute(at, |machine, id| {
        let now = machine.now(id, Kind::Read, at);
        let part = machine.global(id, address, N as u64, N as u64, &now)?;
        Ok(machine.memory.part(part).try_into().expect("a range of N bytes"))
    })
}

/// `cp.async.bulk.prefetch.L2`: nothing is read, so nobody is raced with; but the bytes must be there.
#[track_caller]
pub(crate) fn ask_for_bytes(address: u64, bytes: u32) {
    execute(Location::caller(), |machine, _| machine.asked_for(address, bytes.into(), 16));
}

/// `st.global` of `N` bytes.
#[track_caller]
pub(crate) fn store_global<const N: usize>(address: u64, bytes: [u8; N]) {
    let at = Location::caller();
    execute(at, |machine, id| {
        let now = machine.now(id, Kind::Write, at);
        let part = machine.global(id, address, N as u64, N as u64, &now)?;
        machine.memory.part(part).copy_from_slice(&bytes);
        Ok(())
    })
}

/// Relaxed loads with nobody doing anything else, after which nobody will: far more than a launch has words.
const MOST_LOOKS: u32 = 1 << 20;

/// `ld.relaxed.gpu` of `N` words. Others run first, as the thread may be looking for what one of them stores.
#[track_caller]
pub(crate) fn load_relaxed<const N: usize>(address: u64) -> [u32; N] {
    let at = Location::caller();
    execute(at, |machine, id| {
        machine.looks += 1;
        machine.ready.push(id);
        if machine.looks > MOST_LOOKS { Err(Fault::NeverCame) } else { Ok(()) }
    });
    suspend();
    execute(at, |machine, id| {
        let now = machine.now(id, Kind::RelaxedRead, at);
        let bytes = (N * WORD) as u64;
        let part = machine.global(id, address, bytes, bytes, &now)?;
        Ok(words(machine.memory.part(part)))
    })
}

/// `st.relaxed.gpu` of `N` words.
#[track_caller]
pub(crate) fn store_relaxed<const N: usize>(address: u64, values: [u32; N]) {
    let at = Location::caller();
    execute(at, |machine, id| {
        machine.looks = 0;
        let now = machine.now(id, Kind::RelaxedWrite, at);
        let bytes = (N * WORD) as u64;
        let part = machine.global(id, address, bytes, bytes, &now)?;
        let words = machine.memory.part(part).chunks_exact_mut(WORD);
        words.zip(values).for_each(|(word, value)| word.copy_from_slice(&value.to_le_bytes()));
        Ok(())
    });
}

/// `cp.async` of 16 bytes, the first `bytes` of which come from `source`. Both ends are checked now; the
/// data is read, and written, when it is waited for: the latest moment that the manual allows. A copy of no
/// bytes reads nothing, so its source may be anything.
#[track_caller]
pub(crate) fn start_copy(target: u32, source: u64, bytes: u32) {
    let at = Location::caller();
    assert!(bytes <= 16, "cp.async of {bytes} bytes");
    execute(at, |machine, id| {
        let now = machine.now(id, Kind::Read, at);
        if bytes > 0 {
            machine.global(id, source, bytes.into(), 16, &now)?;
        }
        let now = machine.now(id, Kind::CopyStart, at);
        machine.shared(id.rank, target, 16, &now)?;
        machine.thread(id).open.push(Copy { target, source, bytes });
        Ok(())
    });
}

/// `fence.proxy.async`.
pub(crate) fn fence_copies() {
    let (id, _) = running();
    with(|machine| machine.fence(id));
}

/// `cp.async.commit_group`.
pub(crate) fn commit_copies() {
    with(|machine| {
        let thread = machine.thread(running().0);
        thread.groups.push_back(std::mem::take(&mut thread.open));
    });
}

/// `cp.async.wait_group`: lands all groups but the `newest` newest.
#[track_caller]
pub(crate) fn wait_for_copies(newest: u32) {
    let at = Location::caller();
    execute(at, |machine, id| {
        while machine.thread(id).groups.len() > newest as usize {
            let group = machine.thread(id).groups.pop_front();
            for copy in group.into_iter().flatten() {
                machine.land(id, &copy, at)?;
            }
        }
        Ok(())
    });
}
