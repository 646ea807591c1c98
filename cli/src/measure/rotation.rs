//! Which weights one call of a graph after another touches, so that no cache holds them.

use moe_lora::{DType, Projection};

/// Bytes of weights that calls touch before any is touched again: several times an H100's 50 MB of L2, or an
/// H200's 60.
const BYTES: usize = 200_000_000;
/// Most bytes of all sets of weights.
const MAX_BYTES: usize = 8_000_000_000;
/// Calls of a graph, at least.
const MIN_CALLS: usize = 8;
/// Most groups of experts.
const MAX_GROUPS: usize = 32;

/// Calls of one routing on other weights each: of other experts of a set, as far as there are some, and of
/// other sets.
pub struct Rotation {
    /// Sets of weights.
    pub sets: usize,
    /// Groups of experts of a set that have none in common.
    pub groups: usize,
    /// Experts: those of the routing in order, then all others.
    order: Vec<i32>,
    /// How many the routing has.
    used: usize,
}

impl Rotation {
    /// For a routing that touches `touched` bytes of weights, those of `used` experts, in order.
    pub fn new(projection: &Projection, touched: usize, used: &[i32]) -> Self {
        let s = projection.sizes();
        let groups = (s.experts / used.len()).clamp(1, MAX_GROUPS);
        let set_bytes = s.slots
            * s.experts
            * s.max_rank
            * (s.out_dims.len() * s.in_dim + s.out_dims.total())
            * DType::SIZE;
        let wanted = BYTES / (touched * groups) + 1;
        let sets = wanted.min(MAX_BYTES / set_bytes).max(1);
        let others = (0..s.experts as i32).filter(|expert| used.binary_search(expert).is_err());
        let order = used.iter().copied().chain(others).collect();
        Rotation { sets, groups, order, used: used.len() }
    }

    /// Calls until all was touched, as often as makes a graph of [`MIN_CALLS`].
    pub fn calls(&self) -> usize {
        let all = self.sets * self.groups;
        MIN_CALLS.div_ceil(all) * all
    }

    /// Set and group of call `number`.
    pub fn of(&self, number: usize) -> [usize; 2] {
        [number % self.sets, number / self.sets % self.groups]
    }

    /// The ids of a group: each expert of the routing has become another.
    pub fn ids(&self, ids: &[i32], group: usize) -> Vec<i32> {
        let place = |id: &i32| self.order[..self.used].binary_search(id).expect("an expert of the routing");
        ids.iter().map(|id| self.order[group * self.used + place(id)]).collect()
    }
}
