//! Copies of many bytes by the copy engine (PTX ISA 9.7.9.25.4, `cp.async.bulk`): one thread asks, no register and
//! no other thread takes part, and an [`Mbarrier`] counts the bytes as they land.

use super::mbarrier::Mbarrier;
use super::shared::Shared;
#[cfg(feature = "emulate")]
use crate::emulate;
use crate::memory::Global;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// Bytes of a copy, and addresses, are multiples of this.
pub const UNIT: u32 = 16;

/// `cp.async.bulk.shared::cluster.global`: starts a copy of `bytes` bytes into this block's shared memory, of which
/// `barrier` counts the bytes in its current phase.
///
/// Its operands are uniform registers, so the threads of a warp that ask for copies at once are served one by one, at
/// some 50 cycles each.
///
/// # Safety
/// Both addresses and `bytes` must be multiples of [`UNIT`]; `source` must be valid for a read of `bytes` bytes, and
/// `target` be that many bytes of the block's allocation that nobody uses before the phase has ended. What
/// this block's threads have stored there before must lie behind a [`fence`] of theirs and a barrier.
#[inline(always)]
#[track_caller]
pub unsafe fn copy<T>(target: Shared, source: Global<T>, bytes: u32, barrier: Mbarrier) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as the caller promises.
    unsafe {
        asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {}, [{}];",
            in(reg32) target.address(), in(reg64) source.address(), in(reg32) bytes, in(reg32) barrier.address(),
            options(nostack));
    }
    #[cfg(feature = "emulate")]
    emulate::start_bulk_copy(target.address(), source.address(), bytes, barrier.address());
}

/// `fence.proxy.async`: what this thread has stored to shared memory comes before the copies that are started after
/// the threads have met (PTX ISA 9.7.12.4).
#[inline(always)]
#[track_caller]
pub fn fence() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only.
    unsafe {
        asm!("fence.proxy.async.shared::cta;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::fence_copies();
}
