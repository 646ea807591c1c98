//! The route of a call: which pairs belong to which segment. It lies in a workspace; [`Route`] is the proof
//! that it is there.

use crate::error::{Error, Result};
use crate::projection::{Projection, ProjectionSizes};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A route that a call has found, for later calls on the same workspace: all projections of a layer have one.
///
/// It is valid until the workspace's next call that finds a route, whether that succeeds or not. One that was
/// found while a CUDA graph was recorded is valid within that recording alone, and every replay of a graph
/// that finds routes ends those that were found outside it. A call on a route that is no longer valid is
/// refused with [`Error::StaleRoute`].
///
/// Of a graph that another library records and replays on a stream of its own, nothing is known here: there,
/// a route that was found while it was recorded may be used while it is recorded, and nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    sizes: RouteSizes,
    tile_rows: u32,
    ranked: bool,
    number: u64,
    recording: u64,
}

impl Route {
    /// T of the call that found it.
    pub fn tokens(&self) -> usize {
        self.sizes.tokens
    }

    /// Pairs of its largest tile.
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    pub(crate) fn tile_rows(&self) -> u32 {
        self.tile_rows
    }

    /// Whether the call that found it had ranks of the slots' own.
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    pub(crate) fn is_ranked(&self) -> bool {
        self.ranked
    }
}

/// What two calls must share for one to use the route of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RouteSizes {
    tokens: usize,
    top_k: usize,
    slots: usize,
    experts: usize,
    max_rank: usize,
}

impl RouteSizes {
    pub fn new(projection: &Projection, tokens: usize) -> Self {
        let &ProjectionSizes { top_k, slots, experts, max_rank, .. } = projection.sizes();
        RouteSizes { tokens, top_k, slots, experts, max_rank }
    }
}

impl fmt::Display for RouteSizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RouteSizes { tokens, top_k, slots, experts, max_rank } = self;
        write!(f, "T={tokens} k={top_k} L={slots} E={experts} R={max_rank}")
    }
}

/// Where a call is made: outside any recording of a graph.
pub(crate) const NOT_RECORDED: u64 = 0;

/// A number that nothing else in the process has: of routes, and of recordings.
pub(crate) fn unique() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// Which route a workspace holds.
#[derive(Debug, Default)]
pub(crate) struct HeldRoute {
    /// The number of the route; 0 when there is none.
    number: AtomicU64,
}

impl HeldRoute {
    /// From here on no route is held: one is about to be written over.
    #[cfg(any(feature = "cuda", feature = "emulate", test))]
    pub fn forget(&self) {
        self.number.store(0, Ordering::Release);
    }

    /// From here on the route that a call has found is held. `ranked`: that call had ranks of the slots' own.
    pub fn hold(&self, sizes: RouteSizes, tile_rows: u32, ranked: bool, recording: u64) -> Route {
        let number = unique();
        self.number.store(number, Ordering::Release);
        Route { sizes, tile_rows, ranked, number, recording }
    }

    /// Refuses a route that is not held, or not for a call of these sizes, made in this recording.
    pub fn check(&self, route: &Route, needed: RouteSizes, recording: u64) -> Result<()> {
        let stale = |reason: &str| Err(Error::StaleRoute { reason: reason.to_owned() });
        if route.sizes != needed {
            let reason = format!("it was found for {}, this call needs {needed}", route.sizes);
            return Err(Error::StaleRoute { reason });
        }
        if route.recording != recording {
            return stale(match route.recording {
                NOT_RECORDED => "it was found before this graph was recorded, and a replay may come later",
                _ => "it was found while a graph was recorded, and is valid within that recording alone",
            });
        }
        if self.number.load(Ordering::Acquire) != route.number {
            return stale("the workspace has been used to find another since, or it is of another workspace");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(tokens: usize) -> RouteSizes {
        RouteSizes { tokens, top_k: 2, slots: 2, experts: 8, max_rank: 16 }
    }

    #[test]
    fn a_route_is_valid_while_it_is_held() {
        let (held, other) = (HeldRoute::default(), HeldRoute::default());
        let route = held.hold(sizes(4), 16, false, NOT_RECORDED);
        let reason = |held: &HeldRoute, route, tokens, recording| {
            held.check(route, sizes(tokens), recording).err().map(|error| error.to_string())
        };
        assert_eq!(reason(&held, &route, 4, NOT_RECORDED), None);
        let recorded = other.hold(sizes(4), 16, false, 7);
        for (held, route, tokens, recording, expected) in [
            (&held, &route, 5, NOT_RECORDED, "found for T=4"),
            (&held, &route, 4, 7, "before this graph was recorded"),
            (&other, &route, 4, NOT_RECORDED, "another workspace"),
            (&other, &recorded, 4, NOT_RECORDED, "within that recording alone"),
            (&other, &recorded, 4, 8, "within that recording alone"),
        ] {
            let reason = reason(held, route, tokens, recording).expect("a refusal");
            assert!(reason.contains(expected), "{reason}");
        }
        assert_eq!(reason(&other, &recorded, 4, 7), None);
        held.forget();
        assert!(reason(&held, &route, 4, NOT_RECORDED).is_some());
        let next = held.hold(sizes(4), 16, false, NOT_RECORDED);
        assert!(reason(&held, &route, 4, NOT_RECORDED).is_some() && next != route);
    }
}
