//! Copies from global to shared memory that pass no register (PTX ISA 9.7.9.24, `cp.async`).
//!
//! A thread starts copies, closes them into groups with [`commit`], and waits until all but the newest few
//! groups have landed. Only the thread that waited sees its bytes; a barrier shows them to the block. Or the
//! thread's arrival at an mbarrier waits for them ([`super::mbarrier::Mbarrier::arrive_after_copies`]), and
//! whoever waits for that phase sees them.

use super::shared::Shared;
#[cfg(feature = "emulate")]
use crate::emulate;
use crate::memory::Global;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// What L2 may fetch around a copy from a stream whose next step wants it: the 256 bytes.
pub const AHEAD: u32 = 256;
/// The 128 bytes around a copy.
pub const AROUND: u32 = 128;
/// No more than it must: of a row only this much is wanted.
pub const ALONE: u32 = 0;

/// The instruction of a copy of 16 bytes that lets L2 fetch `$fetch`; of a runtime number of bytes, where
/// that is given, or of none unless the source `is_there`.
///
/// An eviction policy (`.L2::cache_hint`) would say more, but with it ptxas 13.0 assembles the
/// zero-filling form for sm_90a into an instruction that the device calls illegal.
#[cfg(target_arch = "nvptx64")]
macro_rules! start {
    ($fetch:ident, $($operands:tt)*) => {
        match $fetch {
            AHEAD => start!(".L2::256B", $($operands)*),
            AROUND => start!(".L2::128B", $($operands)*),
            _ => start!("", $($operands)*),
        }
    };
    ($prefetch:literal, $target:ident, $source:ident, ignored = $is_there:ident) => {
        asm!(concat!("{{ .reg .pred ignored; setp.eq.u32 ignored, {}, 0; ",
                "cp.async.cg.shared.global", $prefetch, " [{}], [{}], 16, ignored; }}"),
            in(reg32) $is_there as u32, in(reg32) $target.address(), in(reg64) $source.address(),
            options(nostack))
    };
    ($prefetch:literal, $target:ident, $source:ident $(, $bytes:ident)?) => {
        asm!(concat!("cp.async.cg.shared.global", $prefetch, " [{}], [{}], 16" $(, start!(@size $bytes))?,
                ";"),
            in(reg32) $target.address(), in(reg64) $source.address() $(, in(reg32) $bytes)?, options(nostack))
    };
    (@size $bytes:ident) => { ", {}" };
}

/// Starts a copy of 16 bytes, of which the first `bytes` come from `source` and the rest are zeros.
/// `.cg`: the line is kept in L2 alone.
///
/// `FETCH`: what L2 may fetch with it: [`AHEAD`], [`AROUND`] or [`ALONE`].
///
/// # Safety
/// `target` must be 16 aligned bytes inside the block's allocation that nobody reads before the group is
/// waited for; `source` must be 16-byte aligned and valid for a read of `bytes` (0 ..= 16) bytes.
#[inline(always)]
#[track_caller]
pub unsafe fn copy16<T, const FETCH: u32>(target: Shared, source: Global<T>, bytes: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as the caller promises.
    unsafe {
        start!(FETCH, target, source, bytes)
    }
    #[cfg(feature = "emulate")]
    emulate::start_copy(target.address(), source.address(), bytes);
}

/// As [`copy16`], with all 16 bytes from `source`.
///
/// # Safety
/// As for [`copy16`], and `source` must be valid for a read of 16 bytes.
#[inline(always)]
#[track_caller]
pub unsafe fn copy16_whole<T, const FETCH: u32>(target: Shared, source: Global<T>) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as the caller promises.
    unsafe {
        start!(FETCH, target, source)
    }
    #[cfg(feature = "emulate")]
    emulate::start_copy(target.address(), source.address(), 16);
}

/// As [`copy16_whole`], or 16 zeros where `is_there` is false. This is the instruction alone, where
/// [`copy16`] with a runtime number of bytes is five or six.
///
/// # Safety
/// As for [`copy16`]; `source` is read only where `is_there`.
#[inline(always)]
#[track_caller]
pub unsafe fn copy16_or_zeros<T, const FETCH: u32>(target: Shared, source: Global<T>, is_there: bool) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as the caller promises.
    unsafe {
        start!(FETCH, target, source, ignored = is_there)
    }
    #[cfg(feature = "emulate")]
    emulate::start_copy(target.address(), source.address(), if is_there { 16 } else { 0 });
}

/// Closes the copies started since the last call into one group, which may be empty.
#[inline(always)]
pub fn commit() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: bookkeeping only.
    unsafe {
        asm!("cp.async.commit_group;", options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::commit_copies();
}

/// Waits until at most `NEWEST` of this thread's groups are still under way.
#[inline(always)]
#[track_caller]
pub fn wait<const NEWEST: u32>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only.
    unsafe {
        asm!("cp.async.wait_group {};", const NEWEST, options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::wait_for_copies(NEWEST);
}
