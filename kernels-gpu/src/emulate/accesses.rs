//! The accesses to a granule that nothing has put in order: lists that many granules share.

use super::order::{Actor, Knowledge, slot};
use super::warp::LANES;
use std::collections::HashMap;
use std::rc::Rc;

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
