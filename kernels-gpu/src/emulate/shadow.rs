//! Who touched what, and when: one cell a granule of memory.
//!
//! Three things put accesses in order. A block's barrier puts all that its threads did before it before all
//! that they do after it; time in a block is the number of barriers passed. A cluster's barrier puts what a
//! thread did before it *arrived* before what any thread of the cluster does once it has *waited*. And
//! whatever else threads of a cluster meet at or wait for: see [`super::order`]. Two blocks of no common
//! cluster are never in order.
//!
//! For each granule the last write and the last read are kept. Reads that nothing puts in order are kept as
//! one, by all who might have been last ([`By`], and exactly who of a cluster: [`Accesses`]).

use super::accesses::{Accesses, Before, Histories};
use super::order::{Actor, Knowledge};
use std::fmt;
use std::ops::Range;
use std::panic::Location;
use std::rc::Rc;

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
    /// Whose access it was in the order of the cluster, and its stamp there; of one alone.
    pub(super) actor: Actor,
    pub(super) stamp: u32,
    pub(super) kind: Kind,
    /// The line.
    pub at: &'static Location<'static>,
}

/// An access that is about to be made.
#[derive(Clone, Debug)]
pub(super) struct Now {
    pub touch: Touch,
    pub block: u32,
    pub thread: u16,
    /// Cluster barriers that the thread has waited for.
    pub passed: u16,
    /// Blocks of a cluster.
    pub cluster: u32,
    /// The thread in the order of the cluster.
    pub actor: Actor,
    /// What it knows to have happened before.
    pub known: Rc<Knowledge>,
    /// The stamp below which its own accesses lie behind a `fence.proxy.async`.
    pub fenced: u32,
}

impl Now {
    /// True when an access of the cluster comes before by way of a `fence.proxy.async`.
    fn has_fenced(&self, actor: Actor, stamp: u32) -> bool {
        if actor == self.actor { self.fenced > stamp } else { self.known.has_fenced(actor, stamp) }
    }
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
    /// A copy by the copy engine is started. It does not see what threads store, unless a fence shows it.
    BulkStart,
    /// An asynchronous copy has landed, for the thread that started it.
    CopyEnd,
    /// An asynchronous copy has landed, for who has waited for the phase that counts it; and one not by the
    /// copy engine, which need not see it.
    Landed,
    LandedStore,
    /// A copy that an mbarrier counts reads its source.
    Fetch,
    /// `mbarrier.init`: these bytes are a barrier from now on.
    Init,
    /// An operation on an mbarrier: these are in order with one another.
    Use,
}

impl Kind {
    /// Whether it leaves another value.
    pub fn writes(self) -> bool {
        !matches!(self, Kind::Read | Kind::RelaxedRead | Kind::Fetch | Kind::Use)
    }

    /// Whether it was by copies that an mbarrier counts.
    fn is_counted(self) -> bool {
        matches!(self, Kind::Landed | Kind::LandedStore | Kind::Fetch)
    }

    /// Whether a copy has been started here that has not landed.
    fn is_under_way(self) -> bool {
        matches!(self, Kind::CopyStart | Kind::BulkStart)
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
            Kind::CopyStart
            | Kind::BulkStart
            | Kind::CopyEnd
            | Kind::Landed
            | Kind::LandedStore
            | Kind::Fetch => "asynchronous copy",
            Kind::Init => "mbarrier.init",
            Kind::Use => "use of an mbarrier",
        }
    }
}

impl Touch {
    /// True when something puts `self` before `now`.
    pub(super) fn precedes(&self, now: &Now) -> bool {
        let (block, thread) = match self.by {
            By::Nobody => return true,
            By::Grid => return false,
            _ if self.kind.is_counted() => return self.is_seen(now),
            By::Cluster(cluster) => return cluster == now.block / now.cluster && self.arrived < now.passed,
            By::Block(block) => (block, None),
            By::Thread { block, thread } => (block, Some(thread)),
        };
        if block == now.block && (thread == Some(now.thread) || self.epoch < now.touch.epoch) {
            return true;
        }
        block / now.cluster == now.block / now.cluster && self.arrived < now.passed || self.is_seen(now)
    }

    /// True when `self` is an access of one, and the thread knows that it has happened.
    fn is_seen(&self, now: &Now) -> bool {
        match self.by {
            By::Thread { block, .. } if block / now.cluster == now.block / now.cluster => {
                now.known.has_seen(self.actor, self.stamp)
            }
            _ => false,
        }
    }

    fn is_like(&self, other: &Touch) -> bool {
        let key =
            |touch: &Touch| (touch.stamp, touch.actor, touch.by, touch.epoch, touch.arrived, touch.kind);
        key(self) == key(other) && std::ptr::eq(self.at, other.at)
    }

    /// Stands for both accesses: `now` alone where it comes after `self`.
    fn merge(&mut self, now: &Now) {
        let before = *self;
        *self = now.touch;
        if before.precedes(now) {
            return;
        }
        if before.kind.is_counted() {
            // The stricter of the two.
            self.kind = before.kind;
        } else if before.kind == Kind::Read {
            // As before.
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
    /// A copy by the copy engine over what a thread has stored, with no fence between.
    Unfenced(usize, Touch),
    /// Another access than an mbarrier's to a barrier.
    Mbarrier(usize, Touch),
    /// An mbarrier's access to what is none.
    NoMbarrier(usize),
}

/// The last accesses of a kind.
#[derive(Clone)]
struct Last {
    touch: Touch,
    /// Each of them, when they were by several of one cluster.
    all: Option<Rc<Accesses>>,
}

impl Last {
    fn is_like(&self, other: &Last) -> bool {
        let is_same = match (&self.all, &other.all) {
            (None, None) => true,
            (Some(all), Some(other)) => Rc::ptr_eq(all, other),
            _ => false,
        };
        is_same && self.touch.is_like(&other.touch)
    }

    /// True when something puts all of them before `now`.
    fn precedes(&self, now: &Now) -> bool {
        self.touch.precedes(now)
            || self.all.as_ref().is_some_and(|all| {
                let here = match self.touch.by {
                    By::Block(block) => block / now.cluster == now.block / now.cluster,
                    By::Cluster(cluster) => cluster == now.block / now.cluster,
                    _ => false,
                };
                here && all.all(|actor, stamp| actor == now.actor || now.known.has_seen(actor, stamp))
            })
    }

    /// True when nothing puts them before `now`, and that matters.
    fn race(&self, now: &Now) -> bool {
        let strong = self.touch.kind.is_strong() && now.touch.kind.is_strong();
        !strong && !self.precedes(now)
    }

    /// Takes in `now`.
    fn merge(&mut self, now: &Now, histories: &mut Histories) {
        if self.precedes(now) {
            *self = now.touch.into();
            return;
        }
        let before = match (&self.all, self.touch.by) {
            (Some(all), _) => Some(Before::Many(all.clone())),
            (None, By::Thread { .. }) => Some(Before::One(self.touch.actor, self.touch.stamp)),
            (None, _) => None,
        };
        self.touch.merge(now);
        self.all = match (self.touch.by, before) {
            (By::Block(_) | By::Cluster(_), Some(before)) => {
                Some(histories.add(before, now.touch.actor, now.touch.stamp, &now.known))
            }
            _ => None,
        };
    }

    /// True when they are stores of threads, of which the copy engine need not see all.
    fn is_unfenced(&self, now: &Now) -> bool {
        if !matches!(self.touch.kind, Kind::Write | Kind::Atomic | Kind::CopyEnd | Kind::LandedStore) {
            return false;
        }
        match &self.all {
            Some(all) => !all.all(|actor, stamp| now.has_fenced(actor, stamp)),
            None => self.touch.by != By::Nobody && !now.has_fenced(self.touch.actor, self.touch.stamp),
        }
    }
}

impl From<Touch> for Last {
    fn from(touch: Touch) -> Self {
        Last { touch, all: None }
    }
}

#[derive(Clone)]
struct Cell {
    write: Last,
    read: Last,
}

impl Cell {
    fn is_like(&self, other: &Cell) -> bool {
        self.write.is_like(&other.write) && self.read.is_like(&other.read)
    }
}

/// The cells of a stretch of memory.
pub(super) struct Shadow {
    cells: Vec<Cell>,
    granule: usize,
    /// Whether a read must find a write before it.
    starts_unwritten: bool,
    dirty: bool,
    histories: Histories,
}

impl Shadow {
    /// Cells for `bytes` bytes that nobody has touched.
    #[track_caller]
    pub fn new(bytes: usize, granule: usize, starts_unwritten: bool) -> Self {
        let cells = vec![Self::untouched(); bytes.div_ceil(granule)];
        Shadow { cells, granule, starts_unwritten, dirty: false, histories: Histories::default() }
    }

    #[track_caller]
    fn untouched() -> Cell {
        let none = Touch {
            by: By::Nobody,
            epoch: 0,
            arrived: 0,
            actor: Actor::default(),
            stamp: 0,
            kind: Kind::Read,
            at: Location::caller(),
        };
        Cell { write: none.into(), read: none.into() }
    }

    /// Forgets all accesses.
    pub fn clear(&mut self) {
        if self.dirty {
            self.cells.fill(Self::untouched());
            self.dirty = false;
        }
    }

    fn numbers(&self, bytes: &Range<usize>) -> Range<usize> {
        bytes.start / self.granule..bytes.end.div_ceil(self.granule)
    }

    /// The copies that were started to `bytes` are from now on those of an mbarrier's phase.
    pub fn hand_over(&mut self, bytes: &Range<usize>, actor: Actor, phase: u32) {
        let numbers = self.numbers(bytes);
        for cell in &mut self.cells[numbers] {
            (cell.write.touch.actor, cell.write.touch.stamp) = (actor, phase);
        }
    }

    /// The copies that were started to `bytes` have landed as `kind`, for who has waited for the phase that
    /// counts them.
    pub fn land(&mut self, bytes: &Range<usize>, kind: Kind) {
        let numbers = self.numbers(bytes);
        for cell in &mut self.cells[numbers] {
            cell.write.touch.kind = kind;
            // All reads so far were before the copy.
            cell.read = Self::untouched().read;
        }
    }

    /// A byte that a thread has stored, with no fence between that and `now`.
    pub fn unfenced(&self, bytes: &Range<usize>, now: &Now) -> Option<(usize, Touch)> {
        let number = self.numbers(bytes).find(|&number| self.cells[number].write.is_unfenced(now))?;
        Some((number * self.granule, self.cells[number].write.touch))
    }

    /// Takes in an access to `bytes`.
    pub fn touch(&mut self, bytes: Range<usize>, now: &Now) -> Result<(), Conflict> {
        self.dirty = true;
        let kind = now.touch.kind;
        let numbers = self.numbers(&bytes);
        // Whether the cell before was like this one: what came of that comes of this.
        let mut is_like_last = false;
        for number in numbers.clone() {
            let byte = number * self.granule;
            let was_like_last = is_like_last;
            is_like_last = number + 1 < numbers.end && self.cells[number].is_like(&self.cells[number + 1]);
            if was_like_last {
                self.cells[number] = self.cells[number - 1].clone();
                continue;
            }
            let Cell { write, read } = &mut self.cells[number];
            if write.touch.kind.is_under_way() && kind != Kind::CopyEnd {
                return Err(Conflict::CopyUnderWay(byte, write.touch));
            }
            match (kind == Kind::Use, write.touch.kind == Kind::Init) {
                (true, false) => return Err(Conflict::NoMbarrier(byte)),
                (false, true) => return Err(Conflict::Mbarrier(byte, write.touch)),
                _ => {}
            }
            let reads = !kind.writes() || kind == Kind::Atomic;
            if reads && self.starts_unwritten && write.touch.by == By::Nobody {
                return Err(Conflict::Unwritten(byte));
            }
            // Where a copy lands, whoever came since it was started was refused above.
            if kind != Kind::CopyEnd {
                if write.race(now) {
                    return Err(Conflict::Race(byte, write.touch));
                }
                if kind.writes() && read.race(now) {
                    return Err(Conflict::Race(byte, read.touch));
                }
            }
            if kind == Kind::BulkStart && write.is_unfenced(now) {
                return Err(Conflict::Unfenced(byte, write.touch));
            }
            match kind {
                Kind::Read | Kind::RelaxedRead | Kind::Fetch => read.merge(now, &mut self.histories),
                kind if kind.is_strong() && write.touch.kind.is_strong() => {
                    write.merge(now, &mut self.histories)
                }
                // It is the initialisation that others must come after.
                Kind::Use => {}
                _ => *write = now.touch.into(),
            }
        }
        Ok(())
    }
}
