//! A barrier in shared memory that counts arrivals and bytes (PTX ISA 9.7.12.15, `mbarrier`).
//!
//! It goes through phases. A phase ends when as many arrivals have come as [`Mbarrier::init`] said, and all
//! bytes that were announced ([`Mbarrier::arrive_expecting`]) have been copied in by the copies that name the
//! barrier ([`super::bulk`], [`super::cluster::Remote::store4_async`]). Who [waits](Mbarrier::wait) gives the
//! phase's parity: 0 for the first, third, … phase and 1 for the others.
//!
//! ```text
//! producer (one thread)                     consumers (a warp each)
//! wait(empty, parity ^ 1)                   wait(full, parity)
//! arrive_expecting(full, bytes)             … read the stage …
//! copy(stage, source, bytes, full)          warp::sync(); one lane: arrive(empty)
//! ```
//!
//! A wait for the parity of the phase *before* the first returns at once: that is how a producer finds a ring
//! of empty stages.

use super::cluster::Remote;
use super::shared::Shared;
#[cfg(feature = "emulate")]
use crate::emulate;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// Bytes of a barrier.
pub const BYTES: u32 = 8;

/// A barrier in this block's shared memory.
#[derive(Clone, Copy)]
pub struct Mbarrier(Shared);

impl Mbarrier {
    /// The barrier at a multiple of 8 bytes.
    #[inline(always)]
    pub fn at(place: Shared) -> Self {
        Mbarrier(place)
    }

    /// The address as the instructions take it.
    #[inline(always)]
    pub(super) fn address(self) -> u32 {
        self.0.address()
    }

    /// `mbarrier.init`: the barrier is in its first phase, and each phase takes `arrivals` arrivals. Others
    /// may use it once they have met the thread that did this, after [`publish`].
    ///
    /// # Safety
    /// The place must be 8 aligned bytes of the block's allocation that serve for nothing else.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn init(self, arrivals: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            asm!("mbarrier.init.shared::cta.b64 [{}], {};",
                in(reg32) self.address(), in(reg32) arrivals, options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::init_mbarrier(self.address(), arrivals);
    }

    /// `mbarrier.arrive`, with release: what this thread has done before, and its warp before the last
    /// [`super::warp::sync`], is visible to whoever waits for the phase.
    ///
    /// # Safety
    /// The barrier must be initialised.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn arrive(self) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            asm!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(reg32) self.address(), options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::arrive_mbarrier(self.address(), 1, 0);
    }

    /// As [`Mbarrier::arrive`], for `count` arrivals.
    ///
    /// # Safety
    /// As for [`Mbarrier::arrive`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn arrive_for(self, count: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            asm!("mbarrier.arrive.shared::cta.b64 _, [{}], {};",
                in(reg32) self.address(), in(reg32) count, options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::arrive_mbarrier(self.address(), count, 0);
    }

    /// `mbarrier.arrive.expect_tx`: announces that `bytes` bytes will be copied in during this phase, and
    /// arrives.
    ///
    /// # Safety
    /// As for [`Mbarrier::arrive`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn arrive_expecting(self, bytes: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {};",
                in(reg32) self.address(), in(reg32) bytes, options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::arrive_mbarrier(self.address(), 1, bytes);
    }

    /// `cp.async.mbarrier.arrive.noinc`: arrives once the copies that this thread has started
    /// ([`super::async_copy`]) have landed.
    ///
    /// # Safety
    /// As for [`Mbarrier::arrive`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn arrive_after_copies(self) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            asm!("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [{}];",
                in(reg32) self.address(), options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::arrive_after_copies(self.address());
    }

    /// `mbarrier.try_wait.parity`, until it succeeds: waits for the end of the phase of this parity (0 or 1),
    /// with acquire. The barrier must be in that phase or the one after it.
    ///
    /// # Safety
    /// As for [`Mbarrier::arrive`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn wait(self, parity: u32) {
        #[cfg(target_arch = "nvptx64")]
        loop {
            let done: u32;
            // SAFETY: as the caller promises.
            unsafe {
                asm!(concat!("{{ .reg .pred done; ",
                        "mbarrier.try_wait.parity.shared::cta.b64 done, [{}], {}; ",
                        "selp.u32 {}, 1, 0, done; }}"),
                    in(reg32) self.address(), in(reg32) parity, out(reg32) done, options(nostack));
            }
            if done != 0 {
                break;
            }
        }
        #[cfg(feature = "emulate")]
        emulate::wait_mbarrier(self.address(), parity);
    }

    /// The same barrier in block `block` of the cluster.
    #[inline(always)]
    #[track_caller]
    pub fn in_block(self, block: u32) -> RemoteMbarrier {
        RemoteMbarrier(self.0.in_block(block))
    }
}

/// A barrier in another block's shared memory.
#[derive(Clone, Copy)]
pub struct RemoteMbarrier(Remote);

impl RemoteMbarrier {
    /// The address as the instructions take it.
    #[inline(always)]
    pub(super) fn address(self) -> u32 {
        self.0.address()
    }

    /// `mbarrier.arrive.shared::cluster`: says that this thread, and what [met](super::barrier) before it,
    /// has read what it had to read, so that whoever waits may have it overwritten. It shows nobody any
    /// *writes*: its release is for this block alone, since for a cluster ptxas makes it wait until all
    /// accesses are visible to the whole device (`MEMBAR.ALL.GPU`).
    ///
    /// # Safety
    /// The barrier must be initialised, and its block must not have ended.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn arrive(self) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            asm!("mbarrier.arrive.shared::cluster.b64 _, [{}];", in(reg32) self.address(), options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::arrive_mbarrier(self.address(), 1, 0);
    }
}

/// `fence.mbarrier_init.release.cluster`: shows this thread's [`Mbarrier::init`]s to the cluster, whose
/// threads must then meet (PTX ISA 9.7.12.4, `fence`).
#[inline(always)]
#[track_caller]
pub fn publish() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only.
    unsafe {
        asm!("fence.mbarrier_init.release.cluster;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::publish_mbarriers();
}
