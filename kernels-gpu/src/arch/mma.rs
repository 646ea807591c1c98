//! Tensor cores on 16-bit floats, and the conversions around them.
//!
//! `mma.sync.m16n8k16` (PTX ISA 9.7.13.4.8): D = A·B + D with A 16×16, B 16×8, D 16×8 in f32. Thread i of
//! the warp, with g = i / 4 and c = i % 4, holds
//!
//! | | element 0, 1 | element 2, 3 | 4, 5 | 6, 7 |
//! |---|---|---|---|---|
//! | A | row g, k 2c, 2c+1 | row g+8 | row g, k 2c+8, 2c+9 | row g+8, k 2c+8, 2c+9 |
//! | B | k 2c, 2c+1, column g | k 2c+8, 2c+9, column g | | |
//! | D | row g, columns 2c, 2c+1 | row g+8, columns 2c, 2c+1 | | |

#[cfg(feature = "emulate")]
use crate::emulate;
use crate::entry::ElementType;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// A 16-bit float type of the tensor cores. Two are packed in a `u32`, the first in the low half.
pub trait Element: Copy {
    /// Which of the two it is.
    const TYPE: ElementType;
    /// `d += a · b` on one warp's fragments. The whole warp must come here.
    #[track_caller]
    fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]);
    /// Two f32 rounded to nearest even.
    fn pack(first: f32, second: f32) -> u32;
    /// Two elements widened exactly.
    fn unpack(pair: u32) -> [f32; 2];
}

/// bfloat16.
#[derive(Clone, Copy)]
pub enum Bf16 {}
/// IEEE half precision.
#[derive(Clone, Copy)]
pub enum F16 {}

#[cfg(target_arch = "nvptx64")]
macro_rules! mma {
    ($type:literal, $d:ident, $a:ident, $b:ident) => {
        // SAFETY: registers in, registers out.
        unsafe {
            asm!(concat!("mma.sync.aligned.m16n8k16.row.col.f32.", $type, ".", $type, ".f32 ",
                    "{{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};"),
                inout(reg32) $d[0], inout(reg32) $d[1], inout(reg32) $d[2], inout(reg32) $d[3],
                in(reg32) $a[0], in(reg32) $a[1], in(reg32) $a[2], in(reg32) $a[3],
                in(reg32) $b[0], in(reg32) $b[1], options(pure, nomem, nostack));
        }
    };
}

impl Element for Bf16 {
    const TYPE: ElementType = ElementType::Bf16;

    #[inline(always)]
    #[track_caller]
    fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        #[cfg(target_arch = "nvptx64")]
        mma!("bf16", d, a, b);
        #[cfg(feature = "emulate")]
        emulate::mma(ElementType::Bf16, d, a, b);
    }
    #[inline(always)]
    fn pack(first: f32, second: f32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let pair: u32;
            // SAFETY: registers in, register out.
            unsafe {
                asm!("cvt.rn.bf16x2.f32 {}, {}, {};",
                    out(reg32) pair, in(reg32) second, in(reg32) first, options(pure, nomem, nostack));
            }
            pair
        }
        #[cfg(feature = "emulate")]
        {
            bytemuck::cast([first, second].map(half::bf16::from_f32))
        }
    }
    #[inline(always)]
    fn unpack(pair: u32) -> [f32; 2] {
        [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
    }
}

impl Element for F16 {
    const TYPE: ElementType = ElementType::F16;

    #[inline(always)]
    #[track_caller]
    fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        #[cfg(target_arch = "nvptx64")]
        mma!("f16", d, a, b);
        #[cfg(feature = "emulate")]
        emulate::mma(ElementType::F16, d, a, b);
    }
    #[inline(always)]
    fn pack(first: f32, second: f32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let pair: u32;
            // SAFETY: registers in, register out.
            unsafe {
                asm!("cvt.rn.f16x2.f32 {}, {}, {};",
                    out(reg32) pair, in(reg32) second, in(reg32) first, options(pure, nomem, nostack));
            }
            pair
        }
        #[cfg(feature = "emulate")]
        {
            bytemuck::cast([first, second].map(half::f16::from_f32))
        }
    }
    #[inline(always)]
    fn unpack(pair: u32) -> [f32; 2] {
        #[cfg(target_arch = "nvptx64")]
        {
            let (first, second): (f32, f32);
            // SAFETY: registers in, registers out.
            unsafe {
                asm!("cvt.f32.f16 {}, {};",
                    out(reg32) first, in(reg16) pair as u16, options(pure, nomem, nostack));
                asm!("cvt.f32.f16 {}, {};",
                    out(reg32) second, in(reg16) (pair >> 16) as u16, options(pure, nomem, nostack));
            }
            [first, second]
        }
        #[cfg(feature = "emulate")]
        {
            bytemuck::cast::<u32, [half::f16; 2]>(pair).map(half::f16::to_f32)
        }
    }
}
