//! The route of a call on the CPU: pairs grouped by segment (slot, expert), and segments cut into tiles.

use crate::blocks::{BlockShape, SortedTensors};
use crate::call::{Enabled, Routing, RoutingTensors, TopkIds};
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
        let token_lora = routing.token_lora.as_slice();
        let segment = |pair: usize| {
            let slot = usize::try_from(token_lora[pair / sizes.top_k]).ok()?;
            let expert = local_expert(&routing.topk_ids, &routing.expert_map, pair, sizes.experts)?;
            (slot < sizes.slots && enabled[slot]).then_some((slot, expert))
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

    /// Runs `work` on every tile, in parallel: with its pairs that are `active` in this call and have a row,
    /// and with those rows. Each thread has an `S` of its own. Returns the rows of inactive pairs, as far as
    /// they are part of the call.
    pub fn for_each_tile<'m, T: Send, S: Default>(
        &self,
        mut by_pair: Vec<Option<&'m mut [T]>>,
        active: impl Fn(usize) -> bool,
        work: impl Fn(&mut S, &Tile, &[usize], &mut [&'m mut [T]]) + Sync,
    ) -> impl Iterator<Item = &'m mut [T]> {
        let (mut pairs, mut rows, mut inactive) = (Vec::new(), Vec::new(), Vec::new());
        let mut counts = Vec::with_capacity(self.tiles.len());
        for tile in &self.tiles {
            let before = pairs.len();
            for &pair in &self.pairs[tile.first..][..tile.count] {
                match by_pair[pair].take() {
                    Some(row) if active(pair) => {
                        pairs.push(pair);
                        rows.push(row);
                    }
                    // The route names it all the same.
                    Some(row) => inactive.push(row),
                    None => {}
                }
            }
            counts.push(pairs.len() - before);
        }
        let (mut pairs, mut rows) = (pairs.as_slice(), rows.as_mut_slice());
        let mut jobs = Vec::with_capacity(self.tiles.len());
        for (tile, count) in self.tiles.iter().zip(counts) {
            let (own_pairs, other_pairs) = pairs.split_at(count);
            let (own_rows, other_rows) = rows.split_at_mut(count);
            jobs.push((tile, own_pairs, own_rows));
            (pairs, rows) = (other_pairs, other_rows);
        }
        jobs.into_par_iter().for_each_init(S::default, |scratch, (tile, pairs, rows)| {
            work(scratch, tile, pairs, rows);
        });
        inactive.extend(by_pair.into_iter().flatten().filter(|_| !self.only_active));
        inactive.into_iter()
    }
}

/// The first `rows` rows of a matrix, in the order of pairs.
pub(super) fn in_order<T>(matrix: &mut [T], stride: usize, rows: usize) -> Vec<Option<&mut [T]>> {
    matrix.chunks_mut(stride).take(rows).map(Some).collect()
}

/// The rows that an index names, of the first `rows` rows of a matrix: `None` for a pair that it gives none.
/// Of pairs with one row, the last has it.
pub(super) fn by_index<'m, T>(
    matrix: &'m mut [T],
    stride: usize,
    rows: usize,
    index: &[i32],
) -> Vec<Option<&'m mut [T]>> {
    let mut all = in_order(matrix, stride, rows);
    let mut take = |&row: &i32| all.get_mut(usize::try_from(row).ok()?)?.take();
    let mut by_pair: Vec<_> = index.iter().rev().map(&mut take).collect();
    by_pair.reverse();
    by_pair
}

/// The local expert of a pair, when it is below E.
pub(super) fn local_expert(
    topk_ids: &TopkIds<'_, Host>,
    expert_map: &Option<View<'_, Host, i32>>,
    pair: usize,
    experts: usize,
) -> Option<usize> {
    let id = topk_ids.id(pair);
    let local = match expert_map {
        None => id,
        Some(map) => i64::from(*map.as_slice().get(usize::try_from(id).ok()?)?),
    };
    usize::try_from(local).ok().filter(|&expert| expert < experts)
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
