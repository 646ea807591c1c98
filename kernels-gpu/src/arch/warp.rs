//! Exchange between the 32 threads of a warp (PTX ISA 9.7.8.6, 9.7.12.2, 9.7.12.9, 9.7.12.10, 9.7.12.14).

#[cfg(feature = "emulate")]
use crate::emulate;
#[cfg(target_arch = "nvptx64")]
use core::arch::asm;

/// All threads take part.
#[cfg(target_arch = "nvptx64")]
const ALL: u32 = 0xffff_ffff;

/// `shfl.sync.up`: the value of the thread `distance` below. Threads without one keep theirs. The whole
/// warp must come here.
#[inline(always)]
#[track_caller]
pub fn shuffle_up(value: u32, distance: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: u32;
        // SAFETY: exchanges registers; touches no memory.
        unsafe {
            asm!("shfl.sync.up.b32 {}, {}, {}, 0, {};",
                out(reg32) result, in(reg32) value, in(reg32) distance, in(reg32) ALL, options(nostack));
        }
        result
    }
    #[cfg(feature = "emulate")]
    {
        emulate::shuffle_up(value, distance)
    }
}

/// `shfl.sync.idx`: the value of thread `lane` of the warp, 0 ..= 31. The whole warp must come here.
#[inline(always)]
#[track_caller]
pub fn shuffle(value: u32, lane: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: u32;
        // SAFETY: exchanges registers; touches no memory.
        unsafe {
            asm!("shfl.sync.idx.b32 {}, {}, {}, 31, {};",
                out(reg32) result, in(reg32) value, in(reg32) lane, in(reg32) ALL, options(nostack));
        }
        result
    }
    #[cfg(feature = "emulate")]
    {
        emulate::shuffle(value, lane)
    }
}

/// `vote.sync.ballot`: bit i is set where thread i of the warp says so. The whole warp must come here.
#[inline(always)]
#[track_caller]
pub fn ballot(vote: bool) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let votes: u32;
        // SAFETY: exchanges registers; touches no memory.
        unsafe {
            asm!("{{ .reg .pred vote; setp.ne.u32 vote, {}, 0; vote.sync.ballot.b32 {}, vote, {}; }}",
                in(reg32) vote as u32, out(reg32) votes, in(reg32) ALL, options(nostack));
        }
        votes
    }
    #[cfg(feature = "emulate")]
    {
        emulate::ballot(vote)
    }
}

/// `elect.sync` (PTX ISA 9.7.12.14): true in one thread of the warp, which may be any. The whole warp must
/// come here.
///
/// What only this thread does is known to be one thread's: an instruction whose operands are uniform
/// registers is not repeated until all threads have been served.
#[cfg(any(feature = "sm_90", feature = "emulate"))]
#[inline(always)]
#[track_caller]
pub fn elect() -> bool {
    #[cfg(target_arch = "nvptx64")]
    {
        let elected: u32;
        // SAFETY: exchanges registers; touches no memory.
        unsafe {
            asm!("{{ .reg .pred elected; elect.sync _|elected, {}; selp.u32 {}, 1, 0, elected; }}",
                in(reg32) ALL, out(reg32) elected, options(nostack));
        }
        elected != 0
    }
    #[cfg(feature = "emulate")]
    {
        emulate::ballot(true).trailing_zeros() == super::thread::lane()
    }
}

/// `match.any.sync`: bit i is set where thread i of the warp has this thread's value. The whole warp must
/// come here.
#[inline(always)]
#[track_caller]
pub fn match_any(value: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let peers: u32;
        // SAFETY: exchanges registers; touches no memory.
        unsafe {
            asm!("match.any.sync.b32 {}, {}, {};",
                out(reg32) peers, in(reg32) value, in(reg32) ALL, options(nostack));
        }
        peers
    }
    #[cfg(feature = "emulate")]
    {
        emulate::match_any(value)
    }
}

/// `bar.warp.sync`: the threads of a warp meet; their accesses to memory before it are visible to all of them
/// after it (PTX ISA 9.7.12.2). The whole warp must come here.
#[inline(always)]
#[track_caller]
pub fn sync() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: ordering only.
    unsafe {
        asm!("bar.warp.sync {};", const ALL, options(nostack))
    }
    #[cfg(feature = "emulate")]
    emulate::sync_warp();
}
