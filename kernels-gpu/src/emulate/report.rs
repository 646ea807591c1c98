//! What was wrong, and where.

use super::shadow::Touch;
use std::fmt;
use std::panic::Location;

/// A fault of a kernel.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the kernel.
    pub kernel: String,
    /// The block.
    pub block: u32,
    /// The thread, by its number in the block; of a divergence, the first that waits.
    pub thread: u32,
    /// The line that asked for what could not be done; a panic has told its own.
    pub at: Option<&'static Location<'static>>,
    /// What was wrong.
    pub fault: Fault,
}

/// What was wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A device address inside no buffer of the launch.
    OutOfBounds {
        /// `read` or `write`.
        what: &'static str,
        /// The address.
        address: u64,
        /// Bytes asked for.
        bytes: u64,
        /// The nearest buffer, and how far it is.
        near: String,
    },
    /// A write to a buffer that the launch only reads.
    ReadOnly {
        /// The buffer.
        buffer: String,
    },
    /// An address that is no multiple of the access's size.
    Misaligned {
        /// The address, and what it is in.
        place: String,
        /// Bytes asked for.
        bytes: u64,
    },
    /// Shared memory past the block's allocation.
    SharedOutOfBounds {
        /// First byte, from the start of the allocation.
        byte: i64,
        /// Bytes asked for.
        bytes: u32,
        /// Bytes that the block was given.
        allocated: u32,
    },
    /// A read of memory that nobody wrote.
    Unwritten {
        /// Which byte of what.
        place: String,
    },
    /// An access to the target of a copy that nobody has waited for.
    CopyUnderWay {
        /// Which byte of what.
        place: String,
        /// Who started the copy.
        by: Touch,
    },
    /// A copy by the copy engine to where a thread has stored, or a `wgmma` of it, and nobody has shown that
    /// to the async proxy.
    Unfenced {
        /// `bulk copy to` or `wgmma of`.
        what: &'static str,
        /// Which byte of what.
        place: String,
        /// The store.
        by: Touch,
    },
    /// A copy of bytes that the copy engine does not take.
    CopyUnit {
        /// Bytes asked for.
        bytes: u32,
    },
    /// A block that need not wait for a copy to its shared memory before it ends.
    EndsBeforeCopy {
        /// Which byte of what.
        place: String,
        /// Who started the copy.
        by: Touch,
    },
    /// What an mbarrier is not for.
    Mbarrier {
        /// Its first byte, or the first that is concerned.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// A barrier of some threads that two of them count differently.
    BarrierCount {
        /// Its number.
        number: u32,
        /// Threads, as they say.
        threads: [u32; 2],
    },
    /// Two accesses, one of them a write, that nothing puts in order.
    Race {
        /// `read`, `write` or `atomic`.
        what: &'static str,
        /// Which byte of what.
        place: String,
        /// The access before.
        other: Touch,
    },
    /// An access to what a launch before this one writes or reads, and may not have done yet.
    Overlap {
        /// `read` or `write`.
        what: &'static str,
        /// Which byte of what.
        place: String,
        /// The other launch's kernel.
        kernel: String,
    },
    /// An access to the shared memory of another block of the cluster that may not run then.
    Absent {
        /// `read` or `write`.
        what: &'static str,
        /// The other block.
        block: u32,
        /// Why it may not run.
        why: &'static str,
    },
    /// A block of the cluster that there is not.
    NoBlock {
        /// Its number in the cluster.
        block: u32,
        /// Blocks of the cluster.
        blocks: u32,
    },
    /// Something for clusters in a launch that has none.
    NoCluster,
    /// A thread looks for a word of device memory that nobody is left to store.
    NeverCame,
    /// A cluster barrier that is arrived at twice, or waited for before it was arrived at.
    BarrierOrder,
    /// A `wgmma` on registers that no `wgmma.fence` has shown it.
    RegisterFence,
    /// Some threads wait for others that will not come.
    Divergence {
        /// Who waits where: a line for all threads that share a fate.
        threads: String,
    },
    /// A 32-bit offset that does not fit.
    Overflow {
        /// The sum or product.
        expression: String,
    },
    /// `trap` was reached.
    Trap,
    /// The kernel panicked, as checked arithmetic does.
    Panic {
        /// Its message.
        message: String,
    },
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { kernel, block, thread, at, fault } = self;
        write!(f, "{kernel}, block {block}, thread {thread}")?;
        if let Some(at) = at {
            write!(f, ", {}:{}", at.file(), at.line())?;
        }
        write!(f, ": {fault}")
    }
}

impl std::error::Error for Report {}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::OutOfBounds { what, address, bytes, near } => {
                write!(f, "{what} of {bytes} bytes at {address:#x}, {near}")
            }
            Fault::ReadOnly { buffer } => write!(f, "write to {buffer}, which this launch only reads"),
            Fault::Misaligned { place, bytes } => {
                write!(f, "{place} is not aligned for an access of {bytes} bytes")
            }
            Fault::SharedOutOfBounds { byte, bytes, allocated } => {
                write!(f, "{bytes} bytes from byte {byte} of shared memory, the block has {allocated}")
            }
            Fault::Unwritten { place } => write!(f, "read of {place}, which nobody wrote"),
            Fault::CopyUnderWay { place, by } => {
                write!(f, "access to {place}, where a copy is under way: started by {by}")
            }
            Fault::Unfenced { what, place, by } => {
                write!(f, "{what} {place} without a fence.proxy.async between it and {by}")
            }
            Fault::CopyUnit { bytes } => write!(f, "bulk copy of {bytes} bytes, which is not in units of 16"),
            Fault::EndsBeforeCopy { place, by } => {
                write!(f, "the block may end before a copy to {place} has landed: started by {by}")
            }
            Fault::Mbarrier { place, why } => write!(f, "mbarrier at {place}: {why}"),
            Fault::BarrierCount { number, threads: [one, other] } => {
                write!(f, "barrier {number} of {one} threads, and of {other}")
            }
            Fault::Race { what, place, other } => write!(f, "race: {what} of {place} after {other}"),
            Fault::Overlap { what, place, kernel } => {
                write!(f, "{what} of {place}, which {kernel} uses: its launch before this one may still run")
            }
            Fault::Absent { what, block, why } => {
                write!(f, "{what} of block {block}'s shared memory, which {why}")
            }
            Fault::NoBlock { block, blocks } => {
                write!(f, "block {block} of a cluster that has {blocks}")
            }
            Fault::NoCluster => f.write_str("the launch is cooperative: its blocks are no cluster"),
            Fault::NeverCame => {
                f.write_str("a thread looks for a word again and again, and nobody is left to store it")
            }
            Fault::BarrierOrder => {
                f.write_str("a cluster barrier is arrived at once, then waited for once, and so on")
            }
            Fault::RegisterFence => {
                f.write_str("wgmma on registers, without a wgmma.fence since the last wait")
            }
            Fault::Divergence { threads } => write!(f, "threads wait for others that do not come\n{threads}"),
            Fault::Overflow { expression } => write!(f, "offset {expression} does not fit 32 bits"),
            Fault::Trap => f.write_str("trap"),
            Fault::Panic { message } => write!(f, "panic: {message}"),
        }
    }
}
