//! What comes before what, in a cluster: vector clocks (as FastTrack has them: Flanagan and Freund, PLDI 2009).
//!
//! Whatever accesses memory is an [`Actor`]: a thread, or the copies that one mbarrier counts. An access carries its
//! actor's stamp. A thread that lets others know what it has done (by an arrival, or by meeting them) goes on under
//! a new stamp, so what it knows of another is one number: all accesses with a stamp below have happened
//! before. The copies' stamp is the phase that counts them, so only who has waited for the phase, or heard from
//! somebody who has, knows them done.
//!
//! [`Knowledge`] is shared: the threads of a warp know the same, mostly, and a new fact changes the numbers of one
//! block. What a thread knows of itself is not in it, so that threads can share it.

use super::block::Thread;
use super::machine::{Id, Machine};
use super::warp::LANES;
use std::collections::HashMap;
use std::rc::Rc;

/// One whose accesses follow one another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Actor {
    /// Its block's number in the cluster.
    pub rank: u16,
    /// The number of a thread in its block; after the last thread's come those of the mbarriers.
    pub number: u16,
}

/// For each actor, the stamp below which its accesses are meant. By blocks, whose numbers are shared until they
/// change.
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
    passed: u16,
    /// Whether somebody had waited for the launch before this one.
    has_waited: bool,
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
    actor: Actor,
    place: Place,
    passed: u16,
    has_waited: bool,
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
fn slot<const N: usize>(parts: [usize; N], slots: usize) -> usize {
    // As in Knuth's multiplicative hashing: the upper bits are the mixed ones.
    let mix = |key: u64, part| (key ^ part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    parts.into_iter().fold(0, mix) as usize % slots
}

/// The order of a launch.
pub(super) struct Order {
    /// The last stamp. Never the same again during the launch, since what is remembered of device memory outlives a
    /// cluster.
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

    fn join(&mut self, one: &Rc<Knowledge>, other: &Rc<Knowledge>) -> Rc<Knowledge> {
        if Rc::ptr_eq(one, other) {
            return one.clone();
        }
        self.remembered([one, other], |one, other| {
            let mut both = one.clone();
            both.join(other);
            both
        })
    }

    fn fence(&mut self, known: &Rc<Knowledge>) -> Rc<Knowledge> {
        // Asked for itself twice, which no join is.
        self.remembered([known, known], |known, _| Knowledge { fenced: known.seen.clone(), ..known.clone() })
    }
}

impl Machine {
    /// The thread as an actor.
    pub(super) fn actor(id: Id) -> Actor {
        Actor { rank: id.rank as u16, number: id.thread as u16 }
    }

    /// What a thread has done until now, and knows. What it does next is not part of it.
    pub(super) fn release(&mut self, id: Id) -> Release {
        let stamp = self.order.next_stamp();
        let Thread { place, passed, has_waited, .. } = self.thread(id);
        place.stamp = stamp;
        let (passed, has_waited) = (*passed, *has_waited);
        Release { actor: Self::actor(id), place: place.clone(), passed, has_waited }
    }

    /// The thread learns of `news`.
    pub(super) fn acquire(&mut self, id: Id, news: &Rc<Knowledge>) {
        let thread = &mut self.blocks[id.rank as usize].threads[id.thread as usize];
        thread.place.known = self.order.join(&thread.place.known, news);
        thread.passed = thread.passed.max(news.passed);
        thread.has_waited |= news.has_waited;
    }

    /// Threads of a block meet: each knows from now on what any of them has done and known.
    pub(super) fn unite(&mut self, rank: u32, threads: impl Iterator<Item = u32> + Clone) {
        let id = |thread| Id { rank, thread };
        let mut gathering = Gathering::default();
        for thread in threads.clone() {
            gathering.add(&self.release(id(thread)));
        }
        self.tell(rank, threads, &gathering);
    }

    /// As [`Machine::unite`], for a whole block; what threads did that have ended counts too.
    pub(super) fn unite_block(&mut self, rank: u32, waited: &[u32]) {
        let mut gathering = Gathering::default();
        for &thread in waited {
            gathering.add(&self.release(Id { rank, thread }));
        }
        let stamp = self.order.next_stamp();
        for thread in 0..self.blocks[rank as usize].threads.len() as u32 {
            if waited.binary_search(&thread).is_err() {
                gathering.add_accesses(Self::actor(Id { rank, thread }), stamp);
            }
        }
        self.tell(rank, waited.iter().copied(), &gathering);
    }

    fn tell(&mut self, rank: u32, threads: impl Iterator<Item = u32>, gathering: &Gathering) {
        let all = gathering.knowledge();
        for thread in threads {
            let thread = &mut self.blocks[rank as usize].threads[thread as usize];
            thread.place.known = all.clone();
            (thread.passed, thread.has_waited) = (all.passed, all.has_waited);
        }
    }

    /// `fence.proxy.async`: what the thread has done and knows until now lies behind it.
    pub(super) fn fence(&mut self, id: Id) {
        let stamp = self.order.next_stamp();
        let place = &mut self.blocks[id.rank as usize].threads[id.thread as usize].place;
        place.known = self.order.fence(&place.known);
        (place.stamp, place.fenced) = (stamp, stamp);
    }

    /// What all threads of a block know together.
    pub(super) fn block_knowledge(&mut self, rank: u32) -> Rc<Knowledge> {
        let mut gathering = Gathering::default();
        for thread in 0..self.blocks[rank as usize].threads.len() as u32 {
            gathering.add(&self.release(Id { rank, thread }));
        }
        gathering.knowledge()
    }
}

/// Some accesses of a cluster, the last first. What comes before is shared with others.
#[derive(Debug)]
pub(super) struct Accesses {
    last: Access,
    before: Option<Rc<Accesses>>,
    length: usize,
    /// The length at which it is looked through for what need not be kept.
    limit: usize,
}

/// Accesses of one stamp by lanes of one warp, or of the copies of mbarriers.
#[derive(Clone, Copy, Debug)]
struct Access {
    rank: u16,
    /// Number of the warp; past the last, 32 mbarriers.
    warp: u16,
    lanes: u32,
    stamp: u32,
}

/// Least [`Accesses::limit`].
const SHORT: usize = 32;

impl Access {
    fn by(actor: Actor, stamp: u32) -> Self {
        let (warp, lane) = (actor.number / LANES as u16, actor.number % LANES as u16);
        Access { rank: actor.rank, warp, lanes: 1 << lane, stamp }
    }

    /// True when `holds` for all whose access it was.
    fn all(self, mut holds: impl FnMut(Actor, u32) -> bool) -> bool {
        let mut lanes = self.lanes;
        while lanes != 0 {
            let number = LANES as u16 * self.warp + lanes.trailing_zeros() as u16;
            if !holds(Actor { rank: self.rank, number }, self.stamp) {
                return false;
            }
            lanes &= lanes - 1;
        }
        true
    }

    fn is_like(self, other: Access) -> bool {
        (self.rank, self.warp, self.stamp) == (other.rank, other.warp, other.stamp)
    }
}

impl Accesses {
    fn one(access: Access) -> Self {
        Accesses { last: access, before: None, length: 1, limit: SHORT }
    }

    fn iter(&self) -> impl Iterator<Item = Access> {
        std::iter::successors(Some(self), |accesses| accesses.before.as_deref()).map(|accesses| accesses.last)
    }

    /// True when `holds` for the actors and stamps of all.
    pub fn all(&self, mut holds: impl FnMut(Actor, u32) -> bool) -> bool {
        self.iter().all(|access| access.all(&mut holds))
    }

    /// `before`, and an access of somebody who knows `known`.
    fn after(before: &Rc<Accesses>, access: Access, known: &Knowledge) -> Rc<Accesses> {
        let last = before.last;
        if last.is_like(access) {
            if last.lanes & access.lanes != 0 {
                return before.clone();
            }
            let both = Access { lanes: last.lanes | access.lanes, ..access };
            let Accesses { before, length, limit, .. } = &**before;
            return Rc::new(Accesses { last: both, before: before.clone(), length: *length, limit: *limit });
        }
        let Accesses { length, limit, .. } = **before;
        if length < limit {
            return Rc::new(Accesses {
                last: access,
                before: Some(before.clone()),
                length: length + 1,
                limit,
            });
        }
        // Of each actor the last access is enough, and of those only what is not known to have happened.
        let mut kept: Vec<Access> = vec![access];
        let mut found: HashMap<(u16, u16), u32> = HashMap::from([((access.rank, access.warp), access.lanes)]);
        for mut old in before.iter() {
            let lanes = found.entry((old.rank, old.warp)).or_default();
            old.lanes &= !*lanes;
            *lanes |= old.lanes;
            if old.all(|actor, stamp| known.has_seen(actor, stamp)) {
                continue;
            }
            match kept.iter_mut().rev().find(|access| access.is_like(old)) {
                Some(access) => access.lanes |= old.lanes,
                None => kept.push(old),
            }
        }
        let limit = SHORT.max(2 * kept.len());
        let all = kept.into_iter().rev().fold(None, |before: Option<Rc<Accesses>>, last| {
            let length = before.as_ref().map_or(0, |before| before.length) + 1;
            Some(Rc::new(Accesses { last, before, length, limit }))
        });
        all.expect("the new access at least")
    }
}

impl Drop for Accesses {
    /// One after another: a thread's stack is not deep enough for all inside each other.
    fn drop(&mut self) {
        let mut next = self.before.take();
        while let Some(mut accesses) = next.and_then(Rc::into_inner) {
            next = accesses.before.take();
        }
    }
}

/// To what an access is added.
#[derive(Clone)]
pub(super) enum Before {
    One(Actor, u32),
    Many(Rc<Accesses>),
}

impl Before {
    fn key(&self) -> usize {
        match self {
            Before::One(actor, stamp) => usize::from(actor.number) << 32 | *stamp as usize,
            Before::Many(accesses) => Rc::as_ptr(accesses).addr(),
        }
    }

    fn is(&self, other: &Before) -> bool {
        match (self, other) {
            (Before::One(actor, stamp), Before::One(other, other_stamp)) => {
                (actor, stamp) == (other, other_stamp)
            }
            (Before::Many(accesses), Before::Many(other)) => Rc::ptr_eq(accesses, other),
            _ => false,
        }
    }
}

/// An addition: to what, whose access, and what came of it.
type Addition = (Before, (Actor, u32), Rc<Accesses>);

/// Additions that are remembered: neighbouring cells have the same history.
const ADDITIONS: usize = 256;

/// Histories of cells, each made once for many.
pub(super) struct Histories(Vec<Option<Addition>>);

impl Default for Histories {
    fn default() -> Self {
        Histories(vec![None; ADDITIONS])
    }
}

impl Histories {
    /// `before`, and an access of `actor`, who knows `known`.
    pub fn add(&mut self, before: Before, actor: Actor, stamp: u32, known: &Knowledge) -> Rc<Accesses> {
        let (key, actor_key) = (before.key(), usize::from(actor.rank) << 16 | usize::from(actor.number));
        let entry = &mut self.0[slot([key, actor_key, stamp as usize], ADDITIONS)];
        match entry {
            Some((old, new, all)) if old.is(&before) && *new == (actor, stamp) => all.clone(),
            _ => {
                let access = Access::by(actor, stamp);
                let all = match &before {
                    Before::One(one, old) => {
                        Accesses::after(&Rc::new(Accesses::one(Access::by(*one, *old))), access, known)
                    }
                    Before::Many(accesses) => Accesses::after(accesses, access, known),
                };
                *entry = Some((before, (actor, stamp), all.clone()));
                all
            }
        }
    }
}
