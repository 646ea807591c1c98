//! A cluster: up to eight blocks that run at once on neighbouring multiprocessors, and read and write each
//! other's shared memory (PTX ISA 5.1.7.1 and 9.7.12.4, `.shared::cluster`, `barrier.cluster`, `mapa`). The
//! launch says how many blocks it has. Below sm_90 there are no clusters: no entry point there uses one.

use super::shared::Shared;
#[cfg(feature = "emulate")]
use crate::emulate;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// Number of this block in its cluster.
#[inline(always)]
pub fn block() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let value: u32;
        // SAFETY: reads a register that does not change while the block lives.
        unsafe { asm!("mov.u32 {}, %cluster_ctarank;", out(reg32) value, options(pure, nomem, nostack)) };
        value
    }
    #[cfg(feature = "emulate")]
    {
        emulate::cluster_rank()
    }
}

/// Blocks of the cluster.
#[inline(always)]
pub fn blocks() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let value: u32;
        // SAFETY: as above.
        unsafe { asm!("mov.u32 {}, %cluster_nctarank;", out(reg32) value, options(pure, nomem, nostack)) };
        value
    }
    #[cfg(feature = "emulate")]
    {
        emulate::cluster_blocks()
    }
}

/// The first half of [`sync`]: says that this thread has come. What it has done before is visible to whoever
/// [waits](wait), what it does from here on need not be. The whole warp must come here, and then to [`wait`],
/// before it arrives again.
#[inline(always)]
#[track_caller]
pub fn arrive() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only.
    unsafe {
        asm!("barrier.cluster.arrive.release.aligned;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::arrive_cluster();
}

/// As [`arrive`], but shows nobody what this thread has done before: for barriers that only say where threads
/// are, and for [`super::mbarrier::publish`], which is a release of its own. A release waits until all
/// accesses before it are visible to the whole device (`MEMBAR.ALL.GPU`), long after stores to
/// device memory.
#[inline(always)]
#[track_caller]
pub fn arrive_relaxed() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only.
    unsafe {
        asm!("barrier.cluster.arrive.relaxed.aligned;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::arrive_cluster();
}

/// The second half of [`sync`]: waits until all threads of the cluster have arrived. The whole warp must come
/// here.
#[inline(always)]
#[track_caller]
pub fn wait() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only.
    unsafe {
        asm!("barrier.cluster.wait.acquire.aligned;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::wait_cluster();
}

/// All threads of all blocks of the cluster meet; their accesses to shared memory before it are visible to
/// all of them after it. Every thread of the cluster must come here, and none may end while another may
/// still use its block's memory.
#[inline(always)]
#[track_caller]
pub fn sync() {
    arrive();
    wait();
}

/// An address in another block's shared memory.
#[derive(Clone, Copy)]
pub struct Remote(u32);

impl Shared {
    /// The same place in block `block` of the cluster.
    #[inline(always)]
    #[track_caller]
    pub fn in_block(self, block: u32) -> Remote {
        #[cfg(target_arch = "nvptx64")]
        {
            let address: u32;
            // SAFETY: computes an address.
            unsafe {
                asm!("mapa.shared::cluster.u32 {}, {}, {};",
                    out(reg32) address, in(reg32) self.address(), in(reg32) block, options(pure, nomem,
                    nostack));
            }
            Remote(address)
        }
        #[cfg(feature = "emulate")]
        {
            Remote(emulate::map_shared(self.address(), block))
        }
    }
}

impl Remote {
    /// `ld.shared::cluster.u32`.
    ///
    /// # Safety
    /// Four bytes here must be inside that block's allocation, aligned, and written before.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let value: u32;
            // SAFETY: as the caller promises.
            unsafe {
                asm!("ld.shared::cluster.u32 {}, [{}];",
                    out(reg32) value, in(reg32) self.0, options(nostack, readonly));
            }
            value
        }
        #[cfg(feature = "emulate")]
        {
            let [value] = emulate::load_shared(self.0);
            value
        }
    }

    /// `ld.shared::cluster.v2.f32`.
    ///
    /// # Safety
    /// Eight bytes here must be inside that block's allocation, aligned, and written before.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load2(self) -> [f32; 2] {
        #[cfg(target_arch = "nvptx64")]
        {
            let (first, second): (f32, f32);
            // SAFETY: as the caller promises.
            unsafe {
                asm!("ld.shared::cluster.v2.f32 {{{}, {}}}, [{}];",
                    out(reg32) first, out(reg32) second, in(reg32) self.0, options(nostack, readonly));
            }
            [first, second]
        }
        #[cfg(feature = "emulate")]
        {
            emulate::load_shared::<2>(self.0).map(f32::from_bits)
        }
    }

    /// `st.shared::cluster.u32`.
    ///
    /// # Safety
    /// Four bytes here must be inside that block's allocation, and aligned.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store(self, value: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            asm!("st.shared::cluster.u32 [{}], {};", in(reg32) self.0, in(reg32) value, options(nostack))
        };
        #[cfg(feature = "emulate")]
        emulate::store_shared(self.0, [value]);
    }

    /// The address as the instructions take it.
    #[inline(always)]
    pub(super) fn address(self) -> u32 {
        self.0
    }
}
