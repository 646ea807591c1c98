//! Threads of a block meet (PTX ISA 9.7.12.1).

#[cfg(feature = "emulate")]
use crate::emulate;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// `bar.sync 0`: waits for all threads of the block; their accesses to shared and global memory before
/// it are visible to all of them after it. Every thread of the block must come here.
#[inline(always)]
#[track_caller]
pub fn sync() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only; the compiler keeps memory accesses on their side of it.
    unsafe {
        asm!("bar.sync 0;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::sync_block();
}

/// `bar.sync` with a number and a count: as [`sync`], for some of the block's threads, `THREADS` of them,
/// whole warps. `NUMBER` (1 ..= 15) is the barrier; [`sync`] is number 0.
#[inline(always)]
#[track_caller]
pub fn sync_some<const NUMBER: u32, const THREADS: u32>() {
    const { assert!(NUMBER >= 1 && NUMBER <= 15 && THREADS.is_multiple_of(32)) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only; the compiler keeps memory accesses on their side of it.
    unsafe {
        asm!("bar.sync {}, {};", const NUMBER, const THREADS, options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::sync_some(NUMBER, THREADS);
}
