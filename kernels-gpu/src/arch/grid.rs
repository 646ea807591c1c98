//! Programmatic dependent launch: a launch may start while the one before it still runs
//! (PTX ISA 9.7.12.13, `griddepcontrol`). Below sm_90 launches simply follow one another, and both
//! functions do nothing.

#[cfg(feature = "emulate")]
use crate::emulate;
#[cfg(all(target_arch = "nvptx64", feature = "sm_90"))]
use core::arch::asm;

/// `griddepcontrol.wait`: waits until the launch before this one has ended and its writes are visible.
/// Nothing that an earlier launch writes may be read, and nothing that it reads may be written, before this.
#[inline(always)]
pub fn wait() {
    #[cfg(all(target_arch = "nvptx64", feature = "sm_90"))]
    // SAFETY: ordering only.
    unsafe {
        asm!("griddepcontrol.wait;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::wait_for_launch();
}

/// `griddepcontrol.launch_dependents`: lets the next launch start as soon as every block of this one has said
/// so, or has ended.
#[inline(always)]
pub fn launch_dependents() {
    #[cfg(all(target_arch = "nvptx64", feature = "sm_90"))]
    // SAFETY: ordering only.
    unsafe {
        asm!("griddepcontrol.launch_dependents;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::launch_dependents();
}
