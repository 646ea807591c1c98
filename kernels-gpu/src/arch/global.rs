//! Device memory: plain loads and stores, one element or 16 bytes (PTX ISA 9.7.9.8, 9.7.9.11).
//!
//! All are coherent accesses (never `.nc`): tiles and `h` are written by the launch just before.

#[cfg(feature = "emulate")]
use crate::emulate;
use crate::memory::Global;
use crate::params::Tile;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// A type that one instruction loads and stores.
pub trait Scalar: Copy {
    /// `ld.global`.
    ///
    /// # Safety
    /// `address` must be valid for a read of `Self`, and aligned to it.
    unsafe fn load(address: u64) -> Self;
    /// `@wanted ld.global`: `other` where it is not wanted.
    ///
    /// # Safety
    /// If wanted, as for [`load`](Self::load).
    unsafe fn load_or(address: u64, other: Self, wanted: bool) -> Self;
    /// `st.global`.
    ///
    /// # Safety
    /// `address` must be valid for a write of `Self`, and aligned to it.
    unsafe fn store(address: u64, value: Self);
    /// `@wanted st.global`.
    ///
    /// # Safety
    /// If wanted, as for [`store`](Self::store).
    unsafe fn store_if(address: u64, value: Self, wanted: bool);
}

macro_rules! scalar {
    ($type:ty, $class:ident, $via:ty, $load:literal, $store:literal) => {
        impl Scalar for $type {
            #[inline(always)]
            #[track_caller]
            unsafe fn load(address: u64) -> Self {
                #[cfg(target_arch = "nvptx64")]
                {
                    let value: $via;
                    // SAFETY: as the caller promises.
                    unsafe { asm!($load, out($class) value, in(reg64) address, options(nostack, readonly)) };
                    value as $type
                }
                #[cfg(feature = "emulate")]
                {
                    <$type>::from_le_bytes(emulate::load_global(address))
                }
            }
            #[inline(always)]
            #[track_caller]
            unsafe fn load_or(address: u64, other: Self, wanted: bool) -> Self {
                #[cfg(target_arch = "nvptx64")]
                {
                    let mut value = other as $via;
                    // SAFETY: as the caller promises.
                    unsafe {
                        asm!(concat!("{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; @wanted ", $load,
                                " }}"),
                            in(reg32) wanted as u32, inout($class) value, in(reg64) address,
                            options(nostack, readonly));
                    }
                    value as $type
                }
                #[cfg(feature = "emulate")]
                // SAFETY: as the caller promises.
                if wanted { unsafe { Self::load(address) } } else { other }
            }
            #[inline(always)]
            #[track_caller]
            unsafe fn store(address: u64, value: Self) {
                #[cfg(target_arch = "nvptx64")]
                // SAFETY: as the caller promises.
                unsafe {
                    asm!($store, in(reg64) address, in($class) value as $via, options(nostack))
                };
                #[cfg(feature = "emulate")]
                emulate::store_global(address, value.to_le_bytes());
            }
            #[inline(always)]
            #[track_caller]
            unsafe fn store_if(address: u64, value: Self, wanted: bool) {
                #[cfg(target_arch = "nvptx64")]
                // SAFETY: as the caller promises.
                unsafe {
                    asm!(concat!("{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; @wanted ", $store, " }}"),
                        in(reg32) wanted as u32, in(reg64) address, in($class) value as $via,
                        options(nostack))
                };
                #[cfg(feature = "emulate")]
                if wanted {
                    // SAFETY: as the caller promises.
                    unsafe { Self::store(address, value) }
                }
            }
        }
    };
}
scalar!(u8, reg16, u16, "ld.global.u8 {}, [{}];", "st.global.u8 [{}], {};");
scalar!(u16, reg16, u16, "ld.global.u16 {}, [{}];", "st.global.u16 [{}], {};");
scalar!(u32, reg32, u32, "ld.global.u32 {}, [{}];", "st.global.u32 [{}], {};");
scalar!(f32, reg32, f32, "ld.global.f32 {}, [{}];", "st.global.f32 [{}], {};");

impl<T> Global<T> {
    /// `prefetch.global.L2` (PTX ISA 9.7.9.15): asks for the line here to be in L2, and for the page's
    /// address. Nothing is read, so it may also be asked for what another launch still writes. The address
    /// may be any.
    #[inline(always)]
    pub fn ask_for(self) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: changes nothing that can be seen.
        unsafe {
            asm!("prefetch.global.L2 [{}];", in(reg64) self.address(), options(nostack))
        }
    }

    /// `cp.async.bulk.prefetch.L2` (PTX ISA 9.7.9.25.4; since sm_90): asks for `bytes` bytes from here on to
    /// be in L2. Both the address and `bytes` are multiples of 16. As for [`Global::ask_for`], nothing is
    /// read; but there must be so many bytes.
    #[inline(always)]
    #[track_caller]
    #[cfg(any(all(target_arch = "nvptx64", feature = "sm_90a"), feature = "emulate"))]
    pub fn ask_for_bytes(self, bytes: u32) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: changes nothing that can be seen.
        unsafe {
            asm!(
                "cp.async.bulk.prefetch.L2.global [{}], {};",
                in(reg64) self.address(), in(reg32) bytes, options(nostack)
            )
        }
        #[cfg(feature = "emulate")]
        emulate::ask_for_bytes(self.address(), bytes);
    }
}

impl<T: Scalar> Global<T> {
    /// Loads the element here.
    ///
    /// # Safety
    /// The address must be valid for a read of `T`, and aligned to it.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self) -> T {
        // SAFETY: as the caller promises.
        unsafe { T::load(self.address()) }
    }

    /// Loads the element here if it is `wanted`, otherwise gives `other`. A predicated instruction, not a
    /// branch: many such loads are under way at a time.
    ///
    /// # Safety
    /// If wanted, as for [`Global::load`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_or(self, other: T, wanted: bool) -> T {
        // SAFETY: as the caller promises.
        unsafe { T::load_or(self.address(), other, wanted) }
    }

    /// Stores an element here.
    ///
    /// # Safety
    /// The address must be valid for a write of `T`, and aligned to it.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store(self, value: T) {
        // SAFETY: as the caller promises.
        unsafe { T::store(self.address(), value) }
    }

    /// Stores an element here if it is `wanted`: a predicated instruction, not a branch.
    ///
    /// # Safety
    /// If wanted, as for [`Global::store`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store_if(self, value: T, wanted: bool) {
        // SAFETY: as the caller promises.
        unsafe { T::store_if(self.address(), value, wanted) }
    }
}

impl<T> Global<T> {
    /// Loads 16 bytes.
    ///
    /// # Safety
    /// The address must be valid for a read of 16 bytes, and 16-byte aligned.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load16(self) -> [u32; 4] {
        #[cfg(target_arch = "nvptx64")]
        {
            let [mut a, mut b, mut c, mut d] = [0u32; 4];
            // SAFETY: as the caller promises.
            unsafe {
                asm!("ld.global.v4.u32 {{{}, {}, {}, {}}}, [{}];",
                    out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) self.address(),
                    options(nostack, readonly));
            }
            [a, b, c, d]
        }
        #[cfg(feature = "emulate")]
        {
            bytemuck::cast(emulate::load_global::<16>(self.address()))
        }
    }

    /// Loads 16 bytes if they are `wanted`, zeros otherwise: a predicated instruction, not a branch. `ONCE`:
    /// nobody on this multiprocessor wants the line again, so it passes L1 by.
    ///
    /// # Safety
    /// If wanted, the address must be valid for a read of 16 bytes, and 16-byte aligned.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load16_if<const ONCE: bool>(self, wanted: bool) -> [u32; 4] {
        #[cfg(target_arch = "nvptx64")]
        {
            let [mut a, mut b, mut c, mut d] = [0u32; 4];
            macro_rules! load {
                ($modifier:literal) => {
                    // SAFETY: as the caller promises.
                    unsafe {
                        asm!(concat!("{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; ",
                                "@wanted ld.global", $modifier, ".v4.u32 {{{}, {}, {}, {}}}, [{}]; }}"),
                            in(reg32) wanted as u32, inout(reg32) a, inout(reg32) b, inout(reg32) c,
                            inout(reg32) d,
                            in(reg64) self.address(), options(nostack, readonly));
                    }
                };
            }
            if ONCE {
                load!(".L1::no_allocate");
            } else {
                load!("");
            }
            [a, b, c, d]
        }
        #[cfg(feature = "emulate")]
        if wanted { bytemuck::cast(emulate::load_global::<16>(self.address())) } else { [0; 4] }
    }

    /// Stores 16 bytes.
    ///
    /// # Safety
    /// The address must be valid for a write of 16 bytes, and 16-byte aligned.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store16(self, values: [u32; 4]) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            let [a, b, c, d] = values;
            asm!("st.global.v4.u32 [{}], {{{}, {}, {}, {}}};",
                in(reg64) self.address(), in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d,
                options(nostack));
        }
        #[cfg(feature = "emulate")]
        emulate::store_global::<16>(self.address(), bytemuck::cast(values));
    }

    /// Stores 16 bytes if they are `wanted`: a predicated instruction, not a branch.
    ///
    /// # Safety
    /// If wanted, as for [`Global::store16`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store16_if(self, values: [u32; 4], wanted: bool) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: as the caller promises.
        unsafe {
            let [a, b, c, d] = values;
            asm!(concat!("{{ .reg .pred wanted; setp.ne.u32 wanted, {}, 0; ",
                    "@wanted st.global.v4.u32 [{}], {{{}, {}, {}, {}}}; }}"),
                in(reg32) wanted as u32, in(reg64) self.address(), in(reg32) a, in(reg32) b, in(reg32) c,
                in(reg32) d,
                options(nostack));
        }
        #[cfg(feature = "emulate")]
        if wanted {
            emulate::store_global::<16>(self.address(), bytemuck::cast(values));
        }
    }
}

impl Global<Tile> {
    /// Loads a tile, in two pieces of 16 bytes.
    ///
    /// # Safety
    /// The address must be valid for a read of a [`Tile`], and 16-byte aligned.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load_tile(self) -> Tile {
        // SAFETY: as the caller promises.
        let ([slot, expert, first, rows], [rank, ..]) =
            unsafe { (self.load16(), Global::<u8>::new(self.address() + 16).load16()) };
        Tile { slot, expert, first, rows, rank, reserved: [0; 3] }
    }

    /// Stores a tile, in two pieces of 16 bytes.
    ///
    /// # Safety
    /// The address must be valid for a write of a [`Tile`], and 16-byte aligned.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn store_tile(self, tile: Tile) {
        // SAFETY: as the caller promises.
        unsafe {
            self.store16([tile.slot, tile.expert, tile.first, tile.rows]);
            Global::<u8>::new(self.address() + 16).store16([tile.rank, 0, 0, 0]);
        }
    }
}
