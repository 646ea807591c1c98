//! What the machine keeps of a thread, and of the lanes of a warp that wait for one another.

use super::order::Place;
use super::warp::{LANES, Operation};
use std::collections::VecDeque;
use std::panic::Location;

/// What the machine keeps of a thread.
pub(super) struct Thread {
    pub state: State,
    /// Cluster barriers that it has arrived at, and that it has waited for.
    pub arrived: u16,
    pub waited: u16,
    /// Cluster barriers that it, or somebody before a barrier of its block, has waited for.
    pub passed: u16,
    /// Whether the launch before this one was waited for, by it or by somebody before a barrier.
    pub has_waited: bool,
    pub place: Place,
    /// Whether its registers were shown to `wgmma` since the last products were waited for.
    pub may_multiply: bool,
    /// Copies that were started and belong to no group yet.
    pub open: Vec<Copy>,
    /// Groups of copies under way, the oldest first.
    pub groups: VecDeque<Vec<Copy>>,
    /// What the last warp-wide operation gave this thread.
    pub result: [u32; 4],
}

/// Why a thread does not run.
#[derive(Clone, Copy)]
pub(super) enum State {
    Ready,
    Waits(&'static str, &'static Location<'static>),
    Ended,
}

/// Sixteen bytes on their way to shared memory.
pub(super) struct Copy {
    pub target: u32,
    pub source: u64,
    pub bytes: u32,
}

/// The lanes of a warp that have come to a warp-wide operation.
pub(super) struct Rendezvous {
    pub operations: [Operation; LANES],
    pub came: usize,
}
