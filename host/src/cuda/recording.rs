//! What the calls of a graph's recording use.

use crate::cuda::memory::{Access, Memory};
use crate::error::{Error, Result};
use crate::route::{HeldRoute, NOT_RECORDED, unique};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What the calls of a recording use.
#[derive(Default)]
pub(super) struct Recorded {
    pub memories: Vec<(Arc<Memory>, Access)>,
    /// The routes of workspaces that they find anew.
    pub routes: Vec<Arc<HeldRoute>>,
}

/// The recording of a stream's calls: under way, or not.
#[derive(Default)]
pub(super) struct Recording {
    /// The number of the recording that is under way, or [`NOT_RECORDED`].
    number: AtomicU64,
    recorded: Mutex<Recorded>,
}

impl Recording {
    /// From here on, calls are recorded.
    pub fn begin(&self) {
        self.number.store(unique(), Ordering::Release);
    }

    /// Ends it, and returns what was used.
    pub fn end(&self) -> Recorded {
        let recorded = self.note(std::mem::take);
        self.number.store(NOT_RECORDED, Ordering::Release);
        recorded
    }

    /// Its number, or [`NOT_RECORDED`].
    pub fn number(&self) -> u64 {
        self.number.load(Ordering::Acquire)
    }

    /// A call that is recorded uses `memory`.
    pub fn add_memory(&self, memory: &Arc<Memory>, access: Access) -> Result<()> {
        if !memory.can_be_kept() {
            return Err(Error::NotRecordable { what: "memory that is lent for one call" });
        }
        self.note(|recorded| recorded.memories.push((Arc::clone(memory), access)));
        Ok(())
    }

    /// A call that is recorded finds the routes of these workspaces anew.
    pub fn add_routes<'r>(&self, routes: impl IntoIterator<Item = &'r Arc<HeldRoute>>) {
        self.note(|recorded| recorded.routes.extend(routes.into_iter().cloned()));
    }

    fn note<R>(&self, note: impl FnOnce(&mut Recorded) -> R) -> R {
        // A panic leaves the lists as they were, or with one thing more.
        note(&mut self.recorded.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
