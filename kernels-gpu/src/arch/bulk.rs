//! Copies and stores whose bytes an [`Mbarrier`] counts as they land (PTX ISA 9.7.9.25.4, `cp.async.bulk`,
//! and 9.7.9.12, `st.async`). One thread asks for a copy of many bytes, and no register takes part.

use super::cluster::Remote;
use super::mbarrier::{Mbarrier, RemoteMbarrier};
use super::shared::Shared;
#[cfg(feature = "emulate")]
use crate::emulate;
use crate::memory::Global;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// Bytes of a copy, and addresses, are multiples of this.
pub const UNIT: u32 = 16;

/// `cp.async.bulk.shared::cluster.global`: starts a copy of `bytes` bytes into this block's shared memory, of
/// which `barrier` counts the bytes in its current phase.
///
/// Its operands are uniform registers, so the threads of a warp that ask for copies at once are served one by
/// one.
///
/// # Safety
/// Both addresses and `bytes` must be multiples of [`UNIT`]; `source` must be valid for a read of `bytes`
/// bytes, and `target` be that many bytes of the block's allocation that nobody uses before the phase has
/// ended. What this block's threads have stored there before must lie behind a [`fence`] of theirs and a
/// barrier.
#[inline(always)]
#[track_caller]
pub unsafe fn copy<T>(target: Shared, source: Global<T>, bytes: u32, barrier: Mbarrier) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as the caller promises.
    unsafe {
        asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {}, [{}];",
            in(reg32) target.address(), in(reg64) source.address(), in(reg32) bytes,
            in(reg32) barrier.address(),
            options(nostack));
    }
    #[cfg(feature = "emulate")]
    emulate::start_bulk_copy(target.address(), source.address(), bytes, barrier.address());
}

/// `fence.proxy.async`: what this thread has stored to shared memory comes before the copies that are started
/// after the threads have met (PTX ISA 9.7.12.4).
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

impl Remote {
    /// `st.async.shared::cluster` of 16 bytes: starts the store, of which `barrier`, of the same block,
    /// counts the bytes in its current phase (PTX ISA 9.7.9.12). Whoever waits for the phase sees them.
    ///
    /// # Safety
    /// Sixteen bytes here must be inside that block's allocation, aligned, and used by nobody before the
    /// phase has ended.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store4_async(self, values: [f32; 4], barrier: RemoteMbarrier) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            let [a, b, c, d] = values;
            asm!(concat!("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 ",
                    "[{}], {{{}, {}, {}, {}}}, [{}];"),
                in(reg32) self.address(), in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d,
                in(reg32) barrier.address(),
                options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::start_store(self.address(), values.map(f32::to_bits), barrier.address());
    }
}
