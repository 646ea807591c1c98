//! Which thread, which block (PTX ISA 10, special registers).

#[cfg(feature = "emulate")]
use crate::emulate;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

macro_rules! special {
    ($(#[$doc:meta])* $name:ident, $register:literal, $emulated:ident) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            #[cfg(target_arch = "nvptx64")]
            {
                let value: u32;
                // SAFETY: reads a register that does not change while the thread lives.
                unsafe {
                    asm!(concat!("mov.u32 {}, %", $register, ";"),
                        out(reg32) value, options(pure, nomem, nostack));
                };
                value
            }
            #[cfg(feature = "emulate")]
            {
                emulate::$emulated()
            }
        }
    };
}

special!(
    /// Number of this thread in its block.
    index, "tid.x", thread);
special!(
    /// Number of this block in the grid.
    block, "ctaid.x", block);

/// As [`index`], but read anew: what follows from it is not known before, so that loops do not keep addresses
/// in registers that are sooner made again.
#[inline(always)]
pub fn index_anew() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let value: u32;
        // SAFETY: reads a register.
        unsafe { asm!("mov.u32 {}, %tid.x;", out(reg32) value, options(nomem, nostack)) };
        value
    }
    #[cfg(feature = "emulate")]
    {
        emulate::thread()
    }
}

/// The same number, as if it were read anew: what follows from a parameter of a launch is then not computed
/// before a loop, and takes no register through it.
#[inline(always)]
pub fn anew(value: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let copy: u32;
        // SAFETY: copies a register.
        unsafe { asm!("mov.u32 {}, {};", out(reg32) copy, in(reg32) value, options(nomem, nostack)) };
        copy
    }
    #[cfg(feature = "emulate")]
    {
        value
    }
}

/// Number of this thread in its warp.
#[inline(always)]
pub fn lane() -> u32 {
    index() % 32
}

/// Number of this thread's warp in the block.
#[inline(always)]
pub fn warp() -> u32 {
    index() / 32
}

/// Ends the launch with an error.
#[track_caller]
pub fn trap() -> ! {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: `trap` does not return (PTX ISA 9.7.16).
    unsafe {
        asm!("trap;", options(noreturn, nomem, nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::trap()
}
