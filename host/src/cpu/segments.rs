//! The route of a call on the CPU: pairs grouped by segment (slot, expert), and segments cut into tiles.

use crate::blocks::{BlockShape, SortedTensors};
use crate::call::{Enabled, Routing, RoutingTensors};
use crate::error::{Error, Result};
use crate::projection::{ExpertWeights, Projection};
use crate::route::{HeldRoute, NOT_RECORDED, Route, RouteSizes};
use crate::tensor::{Host, View};
use rayon::prelude::*;

/// Pairs of a tile: enough that widening the weights is a small part of the work, few enough that a
/// tile's rows of `x` stay in a core's L2 cache.
const TILE_PAIRS: usize = 32;

/// What calls hand on to the next: the route of the last one that found one.
#[derive(Debug)]
pub struct Workspace {
    max_pairs: usize,
    held: HeldRoute,
    segments: Segments,
}

/// Pairs of one segment that are worked on together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    pub slot: usize,
    pub expert: usize,
    pub rank: usize,
    /// Its pairs are `pairs[first..first + count]` of the route.
    first: usize,
    count: usize,
}

impl Tile {
    /// Number of the segment's matrix among those of one slice of `a` or `b`.
    pub fn matrix(&self, experts: usize, weights: ExpertWeights) -> usize {
        match weights {
            ExpertWeights::PerExpert => self.slot * experts + self.expert,
            ExpertWeights::Shared => self.slot,
        }
    }
}

/// The active pairs of a call, segment by segment.
#[derive(Debug, Default)]
pub(super) struct Segments {
    pairs: Vec<usize>,
    tiles: Vec<Tile>,
    /// The route named the active pairs alone: all others are no part of the call.
    only_active: bool,
}

impl Workspace {
    /// Room for calls of `max_pairs` pairs.
    pub(super) fn new(max_pairs: usize) -> Self {
        Workspace { max_pairs, held: HeldRoute::default(), segments: Segments::default() }
    }

    /// The segments of a call whose tensors have been checked, and its route.
    pub(super) fn segments(
        &mut self,
        projection: &Projection,
        tokens: usize,
        routing: &Routing<'_, Host>,
    ) -> Result<(&Segments, Route)> {
        let pairs = projection.pairs(tokens)?;
        if pairs > self.max_pairs {
            return Err(Error::WorkspaceTooSmall { what: "pairs", limit: self.max_pairs, got: pairs });
        }
        let sizes = RouteSizes::new(projection, tokens);
        let found = match routing {
            Routing::Tokens(tensors) => Segments::find(projection, pairs, tensors)?,
            Routing::Sorted(sorted) => Segments::adopt(projection, pairs, sorted)?,
            Routing::On(route) => {
                self.held.check(route, sizes, NOT_RECORDED)?;
                return Ok((&self.segments, *route));
            }
        };
        self.segments = found;
        Ok((&self.segments, self.held.hold(sizes, TILE_PAIRS as u32, routing.is_ranked(), NOT_RECORDED)))
    }
}

impl Segments {
    fn find(projection: &Projection, pairs: usize, routing: &RoutingTensors<'_, Host>) -> Result<Self> {
        let sizes = projection.sizes();
        let ranks = routing.ranks.map(|ranks| ranks.as_slice());
        if let Some(ranks) = ranks {
            projection.check_ranks(ranks)?;
        }
        let enabled = on(&routing.adapter_enabled, sizes.slots);
        let (topk_ids, token_lora) = (routing.topk_ids.as_slice(), routing.token_lora.as_slice());
        let expert_map = routing.expert_map.map(|map| map.as_slice());
        let segment = |pair: usize| {
            let slot = usize::try_from(token_lora[pair / sizes.top_k]).ok()?;
            let id = match expert_map {
                None => topk_ids[pair],
                Some(map) => *map.get(usize::try_from(topk_ids[pair]).ok()?)?,
            };
            let expert = usize::try_from(id).ok()?;
            (slot < sizes.slots && enabled[slot] && expert < sizes.experts).then_some((slot, expert))
        };
        let active = (0..pairs).filter_map(|pair| Some((segment(pair)?, pair))).collect();
        Ok(Self::of(active, |slot| ranks.map_or(sizes.max_rank, |ranks| ranks[slot].max(0) as usize)))
    }

    /// The pairs in the blocks in use of a route in vLLM's form.
    fn adopt(projection: &Projection, pairs: usize, sorted: &SortedTensors<'_, Host>) -> Result<Self> {
        let sizes = projection.sizes();
        let BlockShape { block_size, max_padded, max_blocks } = sorted.shape;
        let ranks = sorted.ranks.map(|ranks| ranks.as_slice());
        if let Some(ranks) = ranks {
            projection.check_ranks(ranks)?;
        }
        let rank = |slot: usize| ranks.map_or(sizes.max_rank, |ranks| ranks[slot].max(0) as usize);
        let listed = listed(sorted.lora_ids, on(&sorted.adapter_enabled, sizes.slots));
        let mut segment_of = vec![None; pairs];
        for slot in (0..sizes.slots).filter(|&slot| listed[slot] && rank(slot) > 0) {
            let places = &sorted.sorted_token_ids.as_slice()[slot * max_padded..][..max_padded];
            let experts = &sorted.expert_ids.as_slice()[slot * max_blocks..][..max_blocks];
            let used = usize::try_from(sorted.num_tokens_post_padded.as_slice()[slot]).unwrap_or(0);
            let blocks = places.chunks_exact(block_size).zip(experts).take(used.div_ceil(block_size));
            for (places, &expert) in blocks {
                let Some(expert) = usize::try_from(expert).ok().filter(|&e| e < sizes.experts) else {
                    continue;
                };
                for pair in places.iter().filter_map(|&pair| usize::try_from(pair).ok()) {
                    // A pair has one row: of two blocks that hold it, the first gets it.
                    if let Some(segment) = segment_of.get_mut(pair) {
                        segment.get_or_insert((slot, expert));
                    }
                }
            }
        }
        let active = segment_of.into_iter().enumerate();
        let active = active.filter_map(|(pair, segment)| Some((segment?, pair))).collect();
        Ok(Segments { only_active: true, ..Self::of(active, rank) })
    }

    /// Pairs with their (slot, expert), cut into tiles.
    fn of(mut active: Vec<((usize, usize), usize)>, rank: impl Fn(usize) -> usize) -> Self {
        active.sort_unstable();
        let mut tiles = Vec::new();
        let mut first = 0;
        for run in active.chunk_by(|(one, _), (other, _)| one == other) {
            let (slot, expert) = run[0].0;
            let rank = rank(slot);
            for tile in run.chunks(TILE_PAIRS) {
                tiles.push(Tile { slot, expert, rank, first, count: tile.len() });
                first += tile.len();
            }
        }
        Segments { pairs: active.into_iter().map(|(_, pair)| pair).collect(), tiles, only_active: false }
    }

    /// Runs `work` on every tile, with the rows of `matrix` that belong to the tile's pairs, in parallel;
    /// each thread has an `S` of its own. Returns the rows of the inactive pairs, as far as they are part of
    /// the call.
    pub fn for_each_tile<'m, T: Send, S: Default>(
        &self,
        matrix: &'m mut [T],
        (rows, stride): (usize, usize),
        work: impl Fn(&mut S, &Tile, &[usize], &mut [&'m mut [T]]) + Sync,
    ) -> impl Iterator<Item = &'m mut [T]> {
        let mut by_pair: Vec<_> = matrix.chunks_mut(stride).take(rows).map(Some).collect();
        let mut by_segment: Vec<_> =
            self.pairs.iter().map(|&pair| by_pair[pair].take().expect("a pair is in one segment")).collect();
        let mut rest = by_segment.as_mut_slice();
        let mut jobs = Vec::with_capacity(self.tiles.len());
        for tile in &self.tiles {
            let (rows, others) = rest.split_at_mut(tile.count);
            jobs.push((tile, rows));
            rest = others;
        }
        jobs.into_par_iter().for_each_init(S::default, |scratch, (tile, rows)| {
            work(scratch, tile, &self.pairs[tile.first..][..tile.count], rows);
        });
        by_pair.into_iter().flatten().filter(|_| !self.only_active)
    }
}

/// Which slots are on.
pub(super) fn on(adapter_enabled: &Enabled<'_, Host>, slots: usize) -> Vec<bool> {
    match adapter_enabled {
        Enabled::All => vec![true; slots],
        Enabled::U8(flags) => flags.as_slice()[..slots].iter().map(|&flag| flag != 0).collect(),
        Enabled::I32(flags) => flags.as_slice()[..slots].iter().map(|&flag| flag != 0).collect(),
    }
}

/// Which slots are `on` and listed too.
pub(super) fn listed(lora_ids: View<'_, Host, i32>, on: Vec<bool>) -> Vec<bool> {
    let mut listed = vec![false; on.len()];
    for slot in lora_ids.as_slice().iter().filter_map(|&slot| usize::try_from(slot).ok()) {
        if let Some(listed) = listed.get_mut(slot) {
            *listed = on[slot];
        }
    }
    listed
}
