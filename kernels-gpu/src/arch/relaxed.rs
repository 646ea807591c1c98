//! Words of device memory that blocks of one running grid tell one another (PTX ISA 8.7.1, `.relaxed` at
//! `.gpu`).
//!
//! A relaxed access is never torn and is seen in time, but says nothing about other words: each word that is
//! looked for must be its own ready flag.

#[cfg(feature = "emulate")]
use crate::emulate;
use crate::memory::Global;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

impl Global<u32> {
    /// `ld.relaxed.gpu` (PTX ISA 9.7.9.8): what some block of the grid stored here with
    /// [`store_relaxed`](Self::store_relaxed), perhaps the newest. It says nothing about other words. A
    /// thread may come here again and again until a word has come, if the block that stores it runs at the
    /// same time.
    ///
    /// # Safety
    /// As for [`Global::load`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_relaxed(self) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let value: u32;
            // SAFETY: as the caller promises.
            unsafe {
                asm!("ld.relaxed.gpu.global.u32 {}, [{}];",
                    out(reg32) value, in(reg64) self.address(), options(nostack));
            }
            value
        }
        #[cfg(feature = "emulate")]
        {
            let [value] = emulate::load_relaxed(self.address());
            value
        }
    }

    /// As [`load_relaxed`](Self::load_relaxed), of four words, each on its own.
    ///
    /// # Safety
    /// As for [`Global::load16`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load16_relaxed(self) -> [u32; 4] {
        #[cfg(target_arch = "nvptx64")]
        {
            let (a, b, c, d);
            // SAFETY: as the caller promises.
            unsafe {
                asm!("ld.relaxed.gpu.global.v4.u32 {{{}, {}, {}, {}}}, [{}];",
                    out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) self.address(),
                    options(nostack));
            }
            [a, b, c, d]
        }
        #[cfg(feature = "emulate")]
        {
            emulate::load_relaxed(self.address())
        }
    }

    /// `atom.relaxed.gpu.inc` (PTX ISA 9.7.13.5): counts from 0 to `last` and then from 0 again, and returns
    /// the number before. It says nothing about other words.
    ///
    /// # Safety
    /// As for [`Global::store`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn count_up(self, last: u32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let before: u32;
            // SAFETY: as the caller promises.
            unsafe {
                asm!("atom.relaxed.gpu.global.inc.u32 {}, [{}], {};",
                    out(reg32) before, in(reg64) self.address(), in(reg32) last, options(nostack));
            }
            before
        }
        #[cfg(feature = "emulate")]
        emulate::update_global(self.address(), |before| if before >= last { 0 } else { before + 1 })
    }

    /// As [`count_up`](Self::count_up), if it is `wanted`: a predicated instruction. Otherwise `u32::MAX`.
    ///
    /// # Safety
    /// If wanted, as for [`Global::store`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn count_up_if(self, last: u32, wanted: bool) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let mut before = u32::MAX;
            // SAFETY: as the caller promises.
            unsafe {
                asm!(concat!("{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; ",
                        "@wanted atom.relaxed.gpu.global.inc.u32 {}, [{}], {}; }}"),
                    in(reg32) wanted as u32, inout(reg32) before, in(reg64) self.address(), in(reg32) last,
                    options(nostack));
            }
            before
        }
        #[cfg(feature = "emulate")]
        // SAFETY: as the caller promises.
        if wanted { unsafe { self.count_up(last) } } else { u32::MAX }
    }

    /// `st.relaxed.gpu` (PTX ISA 9.7.9.11): a store that blocks of the grid may look for while they run.
    ///
    /// # Safety
    /// As for [`Global::store`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store_relaxed(self, value: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            asm!("st.relaxed.gpu.global.u32 [{}], {};",
                in(reg64) self.address(), in(reg32) value, options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::store_relaxed(self.address(), [value]);
    }

    /// Loads 16 bytes as [`load16_relaxed`](Self::load16_relaxed) if they are `wanted`, zeros otherwise: a
    /// predicated instruction, not a branch.
    ///
    /// # Safety
    /// If wanted, as for [`Global::load16`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load16_relaxed_if(self, wanted: bool) -> [u32; 4] {
        #[cfg(target_arch = "nvptx64")]
        {
            let [mut a, mut b, mut c, mut d] = [0u32; 4];
            // SAFETY: as the caller promises.
            unsafe {
                asm!(concat!("{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; ",
                        "@wanted ld.relaxed.gpu.global.v4.u32 {{{}, {}, {}, {}}}, [{}]; }}"),
                    in(reg32) wanted as u32, inout(reg32) a, inout(reg32) b, inout(reg32) c, inout(reg32) d,
                    in(reg64) self.address(), options(nostack));
            }
            [a, b, c, d]
        }
        #[cfg(feature = "emulate")]
        if wanted { emulate::load_relaxed(self.address()) } else { [0; 4] }
    }

    /// Stores 16 bytes as [`store_relaxed`](Self::store_relaxed), each word on its own, if they are `wanted`.
    ///
    /// # Safety
    /// If wanted, as for [`Global::store16`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store16_relaxed_if(self, values: [u32; 4], wanted: bool) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            let [a, b, c, d] = values;
            asm!(concat!("{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; ",
                    "@wanted st.relaxed.gpu.global.v4.u32 [{}], {{{}, {}, {}, {}}}; }}"),
                in(reg32) wanted as u32, in(reg64) self.address(), in(reg32) a, in(reg32) b, in(reg32) c,
                in(reg32) d,
                options(nostack));
        }
        #[cfg(feature = "emulate")]
        if wanted {
            emulate::store_relaxed(self.address(), values);
        }
    }

    /// As [`store16_relaxed_if`](Self::store16_relaxed_if), 8 bytes.
    ///
    /// # Safety
    /// The address must be valid for a write of 8 bytes, and 8-byte aligned.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store8_relaxed(self, values: [u32; 2]) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            let [a, b] = values;
            asm!("st.relaxed.gpu.global.v2.u32 [{}], {{{}, {}}};",
                in(reg64) self.address(), in(reg32) a, in(reg32) b, options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::store_relaxed(self.address(), values);
    }
}
