//! Which thread, which block (PTX ISA 10, special registers).

use core::arch::asm;

macro_rules! special {
    ($(#[$doc:meta])* $name:ident, $register:literal) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            let value: u32;
            // SAFETY: reads a register that does not change while the thread lives.
            unsafe { asm!(concat!("mov.u32 {}, %", $register, ";"), out(reg32) value, options(pure, nomem, nostack)) };
            value
        }
    };
}

special!(
    /// Number of this thread in its block.
    index, "tid.x");
special!(
    /// Number of this block in the grid.
    block, "ctaid.x");

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
pub fn trap() -> ! {
    // SAFETY: `trap` does not return (PTX ISA 9.7.16).
    unsafe { asm!("trap;", options(noreturn, nomem, nostack)) }
}
