//! What comes before what, in a cluster: vector clocks (as FastTrack has them: Flanagan and Freund, PLDI
//! 2009).
//!
//! Whatever accesses memory is an [`Actor`]: a thread, or the copies that one mbarrier counts. An access
//! carries its actor's stamp. A thread that lets others know what it has done (by an arrival, or by meeting
//! them) goes on under a new stamp, so what it knows of another is one number: all accesses with a stamp
//! below have happened before. The copies' stamp is the phase that counts them, so only who has waited for
//! the phase, or heard from somebody who has, knows them done.
//!
//! [`Knowledge`] is shared: the threads of a warp know the same, mostly, and a new fact changes the numbers
//! of one block. What a thread knows of itself is not in it, so that threads can share it.

use super::warp::LANES;
use std::rc::Rc;

/// One whose accesses follow one another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Actor {
    /// Its block's number in the cluster.
    pub rank: u16,
    /// The number of a thread in its block; after the last thread's come those of the mbarriers.
    pub number: u16,
}

/// For each actor, the stamp below which its accesses are meant. By blocks, whose numbers are shared until
/// they change.
#[derive(Clone, Debug, Default)]
struct Clock(Vec<Option<Rc<Vec<u32>>>>);

impl Clock {
    fn of(&self, actor: Actor) -> u32 {
        let stamps = self.0.get(usize::from(actor.rank)).and_then(Option::as_ref);
        stamps.and_then(|stamps| stamps.get(usize::from(actor.number))).copied().unwrap_or(0)
    }

    fn raise(&mut self, actor: Actor, stamp: u32) {
        if self.of(actor) >= stamp {
            return;
        }
        let (rank, number) = (usize::from(actor.rank), usize::from(actor.number));
        if self.0.len() <= rank {
            self.0.resize(rank + 1, None);
        }
        let stamps = Rc::make_mut(self.0[rank].get_or_insert_default());
        if stamps.len() <= number {
            stamps.resize((number + 1).next_multiple_of(LANES), 0);
        }
        stamps[number] = stamp;
    }

    fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), None);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            match (mine, theirs) {
                (_, None) => {}
                (Some(mine), Some(theirs)) => join_stamps(mine, theirs),
                (mine, Some(theirs)) => *mine = Some(theirs.clone()),
            }
        }
    }
}

/// The larger of two stamps for each actor; shared with `theirs` where these are the larger ones.
fn join_stamps(mine: &mut Rc<Vec<u32>>, theirs: &Rc<Vec<u32>>) {
    if Rc::ptr_eq(mine, theirs) {
        return;
    }
    let past = |one: &[u32], other: &[u32]| {
        one.iter().zip(other).any(|(one, other)| one > other) || one.len() > other.len()
    };
    if !past(theirs, mine) {
        return;
    }
    if !past(mine, theirs) {
        *mine = theirs.clone();
        return;
    }
    let mine = Rc::make_mut(mine);
    if mine.len() < theirs.len() {
        mine.resize(theirs.len(), 0);
    }
    for (mine, &theirs) in mine.iter_mut().zip(theirs.iter()) {
        *mine = theirs.max(*mine);
    }
}

/// What a thread knows to have happened before what it does now, itself apart.
#[derive(Clone, Debug, Default)]
pub(super) struct Knowledge {
    seen: Clock,
    /// Of this, what a `fence.proxy.async` has come after.
    fenced: Clock,
    /// Cluster barriers that somebody had waited for.
    pub passed: u16,
    /// Whether somebody had waited for the launch before this one.
    pub has_waited: bool,
}

impl Knowledge {
    /// True when an access has happened before.
    pub fn has_seen(&self, actor: Actor, stamp: u32) -> bool {
        self.seen.of(actor) > stamp
    }

    /// True when an access, and then a `fence.proxy.async`, have happened before.
    pub fn has_fenced(&self, actor: Actor, stamp: u32) -> bool {
        self.fenced.of(actor) > stamp
    }

    fn join(&mut self, other: &Knowledge) {
        self.seen.join(&other.seen);
        self.fenced.join(&other.fenced);
        self.passed = self.passed.max(other.passed);
        self.has_waited |= other.has_waited;
    }
}

/// Where a thread stands in the order.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub known: Rc<Knowledge>,
    /// The stamp of what it does now.
    pub stamp: u32,
    /// The stamp below which its own accesses lie behind a `fence.proxy.async`.
    pub fenced: u32,
}

/// What a thread lets others know.
pub(super) struct Release {
    pub actor: Actor,
    pub place: Place,
    pub passed: u16,
    pub has_waited: bool,
}

/// What several threads let others know.
#[derive(Default)]
pub(super) struct Gathering {
    knowledge: Knowledge,
    /// What was joined last: the next thread mostly knows the same.
    last: Option<Rc<Knowledge>>,
}

impl Gathering {
    pub fn add(&mut self, release: &Release) {
        let Release { actor, place: Place { known, stamp, fenced }, passed, has_waited } = release;
        if !self.last.as_ref().is_some_and(|last| Rc::ptr_eq(last, known)) {
            self.knowledge.join(known);
            self.last = Some(known.clone());
        }
        self.knowledge.seen.raise(*actor, *stamp);
        self.knowledge.fenced.raise(*actor, *fenced);
        self.knowledge.passed = self.knowledge.passed.max(*passed);
        self.knowledge.has_waited |= has_waited;
    }

    /// Accesses of `actor` below `stamp` have happened.
    pub fn add_accesses(&mut self, actor: Actor, stamp: u32) {
        self.knowledge.seen.raise(actor, stamp);
    }

    pub fn knowledge(&self) -> Rc<Knowledge> {
        Rc::new(self.knowledge.clone())
    }
}

/// Two and what they know together.
type Join = (Rc<Knowledge>, Rc<Knowledge>, Rc<Knowledge>);

/// Joins that are remembered: the lanes of a warp make the same one after another.
const JOINS: usize = 64;

/// One of `slots` slots for what has a key of these parts.
pub(super) fn slot<const N: usize>(parts: [usize; N], slots: usize) -> usize {
    // As in Knuth's multiplicative hashing: the upper bits are the mixed ones.
    let mix = |key: u64, part| (key ^ part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    parts.into_iter().fold(0, mix) as usize % slots
}

/// The order of a launch.
pub(super) struct Order {
    /// The last stamp. Never the same again during the launch, since what is remembered of device memory
    /// outlives a cluster.
    last: u32,
    joins: Vec<Option<Join>>,
}

impl Default for Order {
    fn default() -> Self {
        Order { last: 0, joins: vec![None; JOINS] }
    }
}

impl Order {
    pub fn next_stamp(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    /// The result of `make` on two, or what it was when it was asked for the same two.
    fn remembered(
        &mut self,
        [one, other]: [&Rc<Knowledge>; 2],
        make: impl FnOnce(&Knowledge, &Knowledge) -> Knowledge,
    ) -> Rc<Knowledge> {
        let entry = &mut self.joins[slot([one, other].map(|known| Rc::as_ptr(known).addr()), JOINS)];
        match entry {
            Some((a, b, made)) if Rc::ptr_eq(a, one) && Rc::ptr_eq(b, other) => made.clone(),
            _ => {
                let made = Rc::new(make(one, other));
                *entry = Some((one.clone(), other.clone(), made.clone()));
                made
            }
        }
    }

    pub fn join(&mut self, one: &Rc<Knowledge>, other: &Rc<Knowledge>) -> Rc<Knowledge> {
        if Rc::ptr_eq(one, other) {
            return one.clone();
        }
        self.remembered([one, other], |one, other| {
            let mut both = one.clone();
            both.join(other);
            both
        })
    }

    pub fn fence(&mut self, known: &Rc<Knowledge>) -> Rc<Knowledge> {
        // Asked for itself twice, which no join is.
        self.remembered([known, known], |known, _| Knowledge { fenced: known.seen.clone(), ..known.clone() })
    }
}
