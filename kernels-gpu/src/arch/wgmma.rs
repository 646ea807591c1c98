//! Tensor cores of a warpgroup, on 16-bit floats (PTX ISA 9.7.14, `wgmma`).
//!
//! Four warps in succession, the first a multiple of four, together compute D = A·B + D with A 64×16, B 16×N
//! and D 64×N in f32. B lies in shared memory, A there or in registers; both are named by a [`Matrix`]. Warp
//! w of the four has rows 16w .. 16w + 16. With g = lane / 4 and c = lane % 4, a thread holds
//!
//! | | in succession |
//! |---|---|
//! | A, in registers | row g, k 2c, 2c+1; row g+8, the same; row g, k 2c+8, 2c+9; row g+8, the same |
//! | D, of every eight columns | row g, columns 2c, 2c+1; row g+8, the same |
//!
//! so D of 16 columns, rounded and packed, is A of 16 k.
//!
//! Products are asynchronous: [`fence`], products, [`commit`], and [`Sums::wait`] before anybody looks at the
//! sums, changes A's registers, or writes where the matrices lie.

use super::mma::Element;
use super::shared::Shared;
#[cfg(feature = "emulate")]
use crate::emulate;
#[cfg(target_arch = "nvptx64")]
use crate::entry::ElementType;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// Threads of a warpgroup.
pub const THREADS: u32 = 128;

/// Bytes from one 8-row group of a swizzled matrix to the next: eight rows of 128 bytes.
const GROUP_BYTES: u64 = 1024;
/// The descriptor's field for a 128-byte swizzle.
const SWIZZLE_128: u64 = 1 << 62;
/// The step along k is fixed where rows are swizzled: the manual asks for 1.
const LEADING: u64 = 1 << 16;

/// A matrix in shared memory: rows of 64 elements (128 bytes), 16 of which one product takes. Chunk c of row
/// r lies at place c ^ (r % 8) of its row (PTX ISA 9.7.14.5.1, "128-byte swizzle").
#[derive(Clone, Copy)]
pub struct Matrix(u64);

impl Matrix {
    /// The matrix whose first row begins here, at a multiple of 1024 bytes.
    #[inline(always)]
    pub fn swizzled(start: Shared) -> Self {
        let address = (start.address() & 0x3_ffff) as u64 >> 4;
        Matrix(address | LEADING | (GROUP_BYTES >> 4) << 32 | SWIZZLE_128)
    }

    /// Elements 16·`step` .. + 16 of the rows.
    #[inline(always)]
    pub fn step(self, step: u32) -> Self {
        // The swizzle is taken of the whole address, so 32 bytes on is 32 bytes on.
        Matrix(self.0 + 2 * step as u64)
    }
}

/// Before the first product, and before any product whose sums or A's registers were changed since.
#[inline(always)]
pub fn fence() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only.
    unsafe {
        asm!("wgmma.fence.sync.aligned;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::fence_warpgroup();
}

/// Closes the products since the last call into one group. The whole warpgroup must come here.
#[inline(always)]
#[track_caller]
pub fn commit() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: bookkeeping only.
    unsafe {
        asm!("wgmma.commit_group.sync.aligned;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::commit_products();
}

/// How many registers a thread of a role has.
pub trait Registers {
    /// A multiple of eight, 24 ..= 256.
    const COUNT: u32;
}

/// `setmaxnreg.dec`: this warpgroup's threads go on with `R::COUNT` registers, and leave the block the rest
/// of what they were launched with (PTX ISA 9.7.17.5). The whole warpgroup must come here.
#[inline(always)]
#[track_caller]
pub fn decrease_registers<R: Registers>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the compiler sees to it that what is left is enough.
    unsafe {
        asm!("setmaxnreg.dec.sync.aligned.u32 {};", const R::COUNT, options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::set_registers();
}

/// `setmaxnreg.inc`: waits for registers that others of the block [leave](decrease_registers), and goes on
/// with `R::COUNT` a thread. The whole warpgroup must come here.
#[inline(always)]
#[track_caller]
pub fn increase_registers<R: Registers>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: registers that were left.
    unsafe {
        asm!("setmaxnreg.inc.sync.aligned.u32 {};", const R::COUNT, options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::set_registers();
}

/// D, as one thread holds it: N / 2 sums.
pub trait Sums {
    /// N.
    const COLUMNS: u32;

    /// All zeros, written here: the compiler would write what it knows to be zero where it is first added to,
    /// after [`fence`].
    fn zero() -> Self;

    /// Adds A·B. The whole warpgroup must come here.
    ///
    /// # Safety
    /// The matrices must be written, by threads that fenced the async proxy and came to a barrier since, and
    /// stay as they are until the product was waited for.
    unsafe fn multiply<E: Element>(&mut self, a: Matrix, b: Matrix);

    /// Adds A·B, where A is this thread's registers, which must stay as they are until the product was waited
    /// for.
    ///
    /// # Safety
    /// As for [`Sums::multiply`].
    unsafe fn multiply_registers<E: Element>(&mut self, a: [u32; 4], b: Matrix);

    /// Waits until at most `NEWEST` groups of products are under way; the sums of the others may be used. The
    /// whole warpgroup must come here. Of products with fewer columns these are the first of the sums.
    fn wait<const NEWEST: u32>(&mut self);
}

macro_rules! sums {
    ($sums:literal, $columns:literal, $first:literal $($rest:literal)*) => {
        impl Sums for [f32; $sums] {
            const COLUMNS: u32 = $columns;

            #[inline(always)]
            fn zero() -> Self {
                #[cfg_attr(feature = "emulate", expect(unused_mut))]
                let mut sums = [0.0; $sums];
                #[cfg(target_arch = "nvptx64")]
                // SAFETY: registers only.
                unsafe {
                    asm!(concat!("mov.b32 {", $first, "}, 0;" $(, " mov.b32 {", $rest, "}, 0;")*),
                        out(reg32) sums[$first], $(out(reg32) sums[$rest],)* options(nomem, nostack));
                }
                sums
            }

            #[inline(always)]
            #[track_caller]
            unsafe fn multiply<E: Element>(&mut self, a: Matrix, b: Matrix) {
                #[cfg(target_arch = "nvptx64")]
                macro_rules! multiply {
                    ($type:literal) => {
                        // SAFETY: as the caller promises.
                        unsafe {
                            asm!(concat!("{{ .reg .pred add; setp.eq.u32 add, 0, 0; ",
                                    "wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.",
                                    $type, ".", $type,
                                    " {{{", $first, "}" $(, ", {", $rest, "}")*,
                                    "}}, {a}, {b}, add, 1, 1, 0, 0; }}"),
                                inout(reg32) self[$first], $(inout(reg32) self[$rest],)*
                                a = in(reg64) a.0, b = in(reg64) b.0, options(nostack));
                        }
                    };
                }
                #[cfg(target_arch = "nvptx64")]
                match E::TYPE {
                    ElementType::Bf16 => multiply!("bf16"),
                    ElementType::F16 => multiply!("f16"),
                }
                #[cfg(feature = "emulate")]
                emulate::multiply_warpgroup(E::TYPE, self, emulate::Rows::Matrix(a.0), b.0);
            }

            #[inline(always)]
            #[track_caller]
            unsafe fn multiply_registers<E: Element>(&mut self, a: [u32; 4], b: Matrix) {
                #[cfg(target_arch = "nvptx64")]
                macro_rules! multiply {
                    ($type:literal) => {
                        // SAFETY: as the caller promises.
                        unsafe {
                            asm!(concat!("{{ .reg .pred add; setp.eq.u32 add, 0, 0; ",
                                    "wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.",
                                    $type, ".", $type,
                                    " {{{", $first, "}" $(, ", {", $rest, "}")*,
                                    "}}, {{{a0}, {a1}, {a2}, {a3}}}, {b}, add, 1, 1, 0; }}"),
                                inout(reg32) self[$first], $(inout(reg32) self[$rest],)*
                                a0 = in(reg32) a[0], a1 = in(reg32) a[1],
                                a2 = in(reg32) a[2], a3 = in(reg32) a[3],
                                b = in(reg64) b.0, options(nostack));
                        }
                    };
                }
                #[cfg(target_arch = "nvptx64")]
                match E::TYPE {
                    ElementType::Bf16 => multiply!("bf16"),
                    ElementType::F16 => multiply!("f16"),
                }
                #[cfg(feature = "emulate")]
                emulate::multiply_warpgroup(E::TYPE, self, emulate::Rows::Registers(a), b.0);
            }

            #[inline(always)]
            #[track_caller]
            fn wait<const NEWEST: u32>(&mut self) {
                // The sums go through the instruction, so that nothing is made of them before it.
                #[cfg(target_arch = "nvptx64")]
                // SAFETY: ordering only.
                unsafe {
                    asm!(concat!("wgmma.wait_group.sync.aligned {newest}; // {", $first, "}"
                            $(, " {", $rest, "}")*),
                        inout(reg32) self[$first], $(inout(reg32) self[$rest],)* newest = const NEWEST,
                        options(nostack))
                }
                #[cfg(feature = "emulate")]
                emulate::wait_for_products(NEWEST, self);
            }
        }
    };
}
sums!(16, 32, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
sums!(32, 64, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
sums!(64, 128, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63);
