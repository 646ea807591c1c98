//! What threads let one another know, and when: see [`super::order`].

use super::machine::{Id, Machine};
use super::order::{Actor, Gathering, Knowledge, Release};
use super::thread::Thread;
use std::rc::Rc;

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
