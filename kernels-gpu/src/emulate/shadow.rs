//! Who touched what, and when: one cell a granule of memory.
//!
//! Two things put accesses in order. A block's barrier puts all that its threads did before it before all
//! that they do after it; time in a block is the number of barriers passed. A cluster's barrier puts what a
//! thread did before it *arrived* before what any thread of the cluster does once it has *waited*. Two blocks
//! of no common cluster are never in order.
//!
//! For each granule the last write and the last read are kept. Reads that nothing puts in order are kept as one,
//! by all who might have been last ([`By`]).

use std::fmt;
use std::ops::Range;
use std::panic::Location;

/// Whose an access was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// There was none.
    Nobody,
    /// A thread, by its number in the block.
    Thread { block: u32, thread: u16 },
    /// Several threads of a block.
    Block(u32),
    /// Several blocks of a cluster.
    Cluster(u32),
    /// Several clusters.
    Grid,
}

/// An access: by whom, when, and at which line.
#[derive(Clone, Copy, Debug)]
pub struct Touch {
    pub(super) by: By,
    /// Barriers that the block had passed.
    pub(super) epoch: u32,
    /// Cluster barriers that the thread had arrived at.
    pub(super) arrived: u16,
    pub(super) kind: Kind,
    /// The line.
    pub at: &'static Location<'static>,
}

/// An access that is about to be made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub touch: Touch,
    pub block: u32,
    pub thread: u16,
    /// Cluster barriers that the thread has waited for.
    pub passed: u16,
    /// Blocks of a cluster.
    pub cluster: u32,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Reads and writes at once: atomics are in order with one another.
    Atomic,
    /// Relaxed loads and stores are in order with one another, and with atomics.
    RelaxedRead,
    RelaxedWrite,
    /// An asynchronous copy is started: its target may not be touched.
    CopyStart,
    /// An asynchronous copy has landed, for the thread that started it.
    CopyEnd,
}

impl Kind {
    /// Whether it leaves another value.
    pub fn writes(self) -> bool {
        !matches!(self, Kind::Read | Kind::RelaxedRead)
    }

    /// Whether accesses of several threads at once are what it is for.
    fn is_strong(self) -> bool {
        matches!(self, Kind::Atomic | Kind::RelaxedRead | Kind::RelaxedWrite)
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Atomic => "atomic",
            Kind::RelaxedRead => "relaxed read",
            Kind::RelaxedWrite => "relaxed write",
            Kind::CopyStart | Kind::CopyEnd => "asynchronous copy",
        }
    }
}

impl Touch {
    /// True when something puts `self` before `now`.
    pub(super) fn precedes(&self, now: &Now) -> bool {
        let (block, thread) = match self.by {
            By::Nobody => return true,
            By::Grid => return false,
            By::Cluster(cluster) => return cluster == now.block / now.cluster && self.arrived < now.passed,
            By::Block(block) => (block, None),
            By::Thread { block, thread } => (block, Some(thread)),
        };
        if block == now.block && (thread == Some(now.thread) || self.epoch < now.touch.epoch) {
            return true;
        }
        block / now.cluster == now.block / now.cluster && self.arrived < now.passed
    }

    /// True when nothing puts `self` before `now`, and that matters.
    fn races(&self, now: &Now) -> bool {
        let strong = self.kind.is_strong() && now.touch.kind.is_strong();
        !strong && !self.precedes(now)
    }

    /// Stands for both accesses: `now` alone where it comes after `self`.
    fn merge(&mut self, now: &Now) {
        let before = *self;
        *self = now.touch;
        if before.precedes(now) {
            return;
        }
        if before.kind == Kind::Read {
            // The stricter of the two.
            self.kind = Kind::Read;
        }
        let (cluster, size) = (now.block / now.cluster, now.cluster);
        self.by = match before.by {
            By::Thread { block, .. } | By::Block(block) if block == now.block => By::Block(block),
            By::Thread { block, .. } | By::Block(block) if block / size == cluster => By::Cluster(cluster),
            By::Cluster(other) if other == cluster => By::Cluster(cluster),
            _ => By::Grid,
        };
        self.epoch = before.epoch.max(now.touch.epoch);
        self.arrived = before.arrived.max(now.touch.arrived);
    }
}

impl fmt::Display for Touch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.kind.name();
        match self.by {
            By::Nobody => write!(f, "{name} by nobody"),
            By::Thread { block, thread } => write!(f, "{name} by thread {thread} of block {block}"),
            By::Block(block) => write!(f, "{name} by several threads of block {block}"),
            By::Cluster(cluster) => write!(f, "{name} by several blocks of cluster {cluster}"),
            By::Grid => write!(f, "{name} by several blocks"),
        }?;
        write!(f, " ({}:{})", self.at.file(), self.at.line())
    }
}

/// What stands against an access, and the byte that shows it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Conflict {
    Race(usize, Touch),
    CopyUnderWay(usize, Touch),
    Unwritten(usize),
}

#[derive(Clone, Copy)]
struct Cell {
    write: Touch,
    read: Touch,
}

/// The cells of a stretch of memory.
pub(super) struct Shadow {
    cells: Vec<Cell>,
    granule: usize,
    /// Whether a read must find a write before it.
    starts_unwritten: bool,
    dirty: bool,
}

impl Shadow {
    /// Cells for `bytes` bytes that nobody has touched.
    #[track_caller]
    pub fn new(bytes: usize, granule: usize, starts_unwritten: bool) -> Self {
        let cells = vec![Self::untouched(); bytes.div_ceil(granule)];
        Shadow { cells, granule, starts_unwritten, dirty: false }
    }

    #[track_caller]
    fn untouched() -> Cell {
        let none = Touch { by: By::Nobody, epoch: 0, arrived: 0, kind: Kind::Read, at: Location::caller() };
        Cell { write: none, read: none }
    }

    /// Forgets all accesses.
    pub fn clear(&mut self) {
        if self.dirty {
            self.cells.fill(Self::untouched());
            self.dirty = false;
        }
    }

    /// Takes in an access to `bytes`.
    pub fn touch(&mut self, bytes: Range<usize>, now: &Now) -> Result<(), Conflict> {
        self.dirty = true;
        let kind = now.touch.kind;
        for number in bytes.start / self.granule..bytes.end.div_ceil(self.granule) {
            let byte = number * self.granule;
            let Cell { write, read } = &mut self.cells[number];
            if write.kind == Kind::CopyStart && kind != Kind::CopyEnd {
                return Err(Conflict::CopyUnderWay(byte, *write));
            }
            let reads = !kind.writes() || kind == Kind::Atomic;
            if reads && self.starts_unwritten && write.by == By::Nobody {
                return Err(Conflict::Unwritten(byte));
            }
            // Where a copy lands, whoever came since it was started was refused above.
            if kind != Kind::CopyEnd {
                if write.races(now) {
                    return Err(Conflict::Race(byte, *write));
                }
                if kind.writes() && read.races(now) {
                    return Err(Conflict::Race(byte, *read));
                }
            }
            match kind {
                Kind::Read | Kind::RelaxedRead => read.merge(now),
                kind if kind.is_strong() && write.kind.is_strong() => write.merge(now),
                _ => *write = now.touch,
            }
        }
        Ok(())
    }
}
