//! A block's shared memory. All of it is dynamic: the host gives its size at launch, the kernel's map
//! gives its meaning.

#[cfg(feature = "emulate")]
use crate::emulate;
#[cfg(target_arch = "nvptx64")]
use core::arch::{asm, global_asm};

#[cfg(target_arch = "nvptx64")]
global_asm!(".extern .shared .align 1024 .b8 dynamic_shared[];");

/// A byte address in shared memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shared(u32);

impl Shared {
    /// Start of the block's dynamic shared memory, aligned to 1024 bytes.
    #[inline(always)]
    pub fn base() -> Self {
        #[cfg(target_arch = "nvptx64")]
        {
            let address: u32;
            // SAFETY: the address of a symbol is a constant.
            unsafe { asm!("mov.u32 {}, dynamic_shared;", out(reg32) address, options(pure, nomem, nostack)) };
            Shared(address)
        }
        #[cfg(feature = "emulate")]
        {
            Shared(emulate::SHARED_BASE)
        }
    }

    /// The address `bytes` further on.
    #[inline(always)]
    pub fn offset(self, bytes: u32) -> Self {
        Shared(self.0 + bytes)
    }

    /// The address as the instructions take it.
    #[inline(always)]
    pub(super) fn address(self) -> u32 {
        self.0
    }

    /// `ld.shared.u32`.
    ///
    /// # Safety
    /// Four bytes here must be inside the block's allocation, aligned, and written before.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let value: u32;
            // SAFETY: as the caller promises.
            unsafe {
                asm!("ld.shared.u32 {}, [{}];",
                    out(reg32) value, in(reg32) self.0, options(nostack, readonly))
            };
            value
        }
        #[cfg(feature = "emulate")]
        {
            let [value] = emulate::load_shared(self.0);
            value
        }
    }

    /// Loads four bytes if they are `wanted`, zeros otherwise: a predicated instruction, so that many stand
    /// in a row.
    ///
    /// # Safety
    /// If wanted, as for [`Shared::load`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_if(self, wanted: bool) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let mut value = 0u32;
            // SAFETY: as the caller promises.
            unsafe {
                asm!("{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; @wanted ld.shared.u32 {}, [{}]; }}",
                    in(reg32) wanted as u32, inout(reg32) value, in(reg32) self.0, options(nostack,
                    readonly));
            }
            value
        }
        #[cfg(feature = "emulate")]
        // SAFETY: as the caller promises.
        if wanted { unsafe { self.load() } } else { 0 }
    }

    /// `st.shared.u32`.
    ///
    /// # Safety
    /// Four bytes here must be inside the block's allocation, and aligned.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store(self, value: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            asm!("st.shared.u32 [{}], {};", in(reg32) self.0, in(reg32) value, options(nostack))
        };
        #[cfg(feature = "emulate")]
        emulate::store_shared(self.0, [value]);
    }

    /// `st.shared.v4.u32`.
    ///
    /// # Safety
    /// Sixteen bytes here must be inside the block's allocation, and aligned.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store16(self, values: [u32; 4]) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            let [a, b, c, d] = values;
            asm!("st.shared.v4.u32 [{}], {{{}, {}, {}, {}}};",
                in(reg32) self.0, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::store_shared(self.0, values);
    }

    /// `ld.shared.v4.u32`.
    ///
    /// # Safety
    /// Sixteen bytes here must be inside the block's allocation, aligned, and written before.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load16(self) -> [u32; 4] {
        #[cfg(target_arch = "nvptx64")]
        {
            let [mut a, mut b, mut c, mut d] = [0u32; 4];
            // SAFETY: as the caller promises.
            unsafe {
                asm!("ld.shared.v4.u32 {{{}, {}, {}, {}}}, [{}];",
                    out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.0,
                    options(nostack, readonly));
            }
            [a, b, c, d]
        }
        #[cfg(feature = "emulate")]
        {
            emulate::load_shared(self.0)
        }
    }

    /// Loads 16 bytes if they are `wanted`, zeros otherwise: a predicated instruction, so that many stand in
    /// a row.
    ///
    /// # Safety
    /// If wanted, as for [`Shared::load16`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load16_if(self, wanted: bool) -> [u32; 4] {
        #[cfg(target_arch = "nvptx64")]
        {
            let [mut a, mut b, mut c, mut d] = [0u32; 4];
            // SAFETY: as the caller promises.
            unsafe {
                asm!(concat!("{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; ",
                        "@wanted ld.shared.v4.u32 {{{}, {}, {}, {}}}, [{}]; }}"),
                    in(reg32) wanted as u32, inout(reg32) a, inout(reg32) b, inout(reg32) c, inout(reg32) d,
                    in(reg32) self.0, options(nostack, readonly));
            }
            [a, b, c, d]
        }
        #[cfg(feature = "emulate")]
        if wanted { emulate::load_shared(self.0) } else { [0; 4] }
    }

    /// `atom.shared.min.u32`: stores the smaller of both numbers, and returns what was there (PTX ISA
    /// 9.7.12.4).
    ///
    /// # Safety
    /// As for [`Shared::load`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn fetch_min(self, value: u32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let before: u32;
            // SAFETY: as the caller promises.
            unsafe {
                asm!("atom.shared.min.u32 {}, [{}], {};",
                    out(reg32) before, in(reg32) self.0, in(reg32) value, options(nostack));
            }
            before
        }
        #[cfg(feature = "emulate")]
        {
            emulate::update_shared(self.0, |before| before.min(value))
        }
    }

    /// `atom.shared.add.u32`: adds, and returns what was there (PTX ISA 9.7.12.4).
    ///
    /// # Safety
    /// As for [`Shared::load`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn fetch_add(self, value: u32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let before: u32;
            // SAFETY: as the caller promises.
            unsafe {
                asm!("atom.shared.add.u32 {}, [{}], {};",
                    out(reg32) before, in(reg32) self.0, in(reg32) value, options(nostack));
            }
            before
        }
        #[cfg(feature = "emulate")]
        {
            emulate::update_shared(self.0, |before| before.wrapping_add(value))
        }
    }

    /// `ldmatrix.x4`: four 8×8 matrices of 16-bit elements (PTX ISA 9.7.13.4.15). Thread i gives the
    /// address of row i % 8 of matrix i / 8, and receives from matrix m, in register m, the elements
    /// 2·(i % 4) and 2·(i % 4) + 1 of row i / 4. The whole warp must come here.
    ///
    /// # Safety
    /// Sixteen bytes here must be inside the block's allocation, aligned, and written before.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_matrices(self) -> [u32; 4] {
        #[cfg(target_arch = "nvptx64")]
        {
            let [mut a, mut b, mut c, mut d] = [0u32; 4];
            // SAFETY: as the caller promises.
            unsafe {
                asm!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{}, {}, {}, {}}}, [{}];",
                    out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) self.0,
                    options(nostack, readonly));
            }
            [a, b, c, d]
        }
        #[cfg(feature = "emulate")]
        {
            emulate::load_matrices(self.0)
        }
    }
}
