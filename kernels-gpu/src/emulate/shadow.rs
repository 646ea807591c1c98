//! Who touched what, and when: one cell a granule of memory.
//!
//! Time within a block is the number of barriers passed. Two accesses by different threads of a block are
//! in order when a barrier lies between them, two by different blocks of a launch never are. For each
//! granule the last write and the last read are kept; a read by several threads or blocks is kept as one
//! by [`Touch::MANY`], which is in order with nobody's access in the same stretch.

use std::fmt;
use std::ops::Range;
use std::panic::Location;

/// An access: by whom, when, and at which line.
#[derive(Clone, Copy, Debug)]
pub struct Touch {
    /// The block.
    pub block: u32,
    /// The thread, by its number in the block.
    pub thread: u32,
    /// Barriers passed before, counted from 1; 0: there was no access.
    pub(super) epoch: u32,
    pub(super) kind: Kind,
    /// The line.
    pub at: &'static Location<'static>,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Reads and writes at once: atomics are in order with one another.
    Atomic,
    /// An asynchronous copy is started: its target may not be touched.
    CopyStart,
    /// An asynchronous copy has landed, for the thread that started it.
    CopyEnd,
}

impl Kind {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Atomic => "atomic",
            Kind::CopyStart | Kind::CopyEnd => "asynchronous copy",
        }
    }
}

impl Touch {
    /// More threads, or blocks, than one.
    const MANY: u32 = u32::MAX;

    /// True when nothing puts `self` before `now`.
    fn races(&self, now: &Touch) -> bool {
        let apart = self.block != now.block;
        let unordered = self.epoch == now.epoch && self.thread != now.thread;
        self.epoch != 0 && (apart || unordered) && !(self.kind == Kind::Atomic && now.kind == Kind::Atomic)
    }

    /// Stands for both accesses. Of those of one block, the later stretch alone matters.
    fn merge(&mut self, now: &Touch) {
        let before = *self;
        *self = *now;
        if before.epoch != 0 && before.block != now.block {
            self.block = Self::MANY;
        } else if before.epoch == now.epoch && before.thread != now.thread {
            self.thread = Self::MANY;
        }
    }
}

impl fmt::Display for Touch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.kind.name();
        match (self.block, self.thread) {
            (Self::MANY, _) => write!(f, "{name} by several blocks"),
            (block, Self::MANY) => write!(f, "{name} by several threads of block {block}"),
            (block, thread) => write!(f, "{name} by thread {thread} of block {block}"),
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
        let none = Touch { block: 0, thread: 0, epoch: 0, kind: Kind::Read, at: Location::caller() };
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
    pub fn touch(&mut self, bytes: Range<usize>, now: &Touch) -> Result<(), Conflict> {
        self.dirty = true;
        for number in bytes.start / self.granule..bytes.end.div_ceil(self.granule) {
            let byte = number * self.granule;
            let Cell { write, read } = &mut self.cells[number];
            if write.kind == Kind::CopyStart && now.kind != Kind::CopyEnd {
                return Err(Conflict::CopyUnderWay(byte, *write));
            }
            let reads = matches!(now.kind, Kind::Read | Kind::Atomic);
            if reads && self.starts_unwritten && write.epoch == 0 {
                return Err(Conflict::Unwritten(byte));
            }
            // Where a copy lands, whoever came since it was started was refused above.
            if now.kind != Kind::CopyEnd {
                if write.races(now) {
                    return Err(Conflict::Race(byte, *write));
                }
                if now.kind != Kind::Read && read.races(now) {
                    return Err(Conflict::Race(byte, *read));
                }
            }
            match now.kind {
                Kind::Read => read.merge(now),
                Kind::Atomic if write.kind == Kind::Atomic => write.merge(now),
                _ => *write = *now,
            }
        }
        Ok(())
    }
}
