//! The CPU back end: the same operator on host memory, on all threads of the current rayon pool.
//!
//! Pairs are grouped by segment (slot, expert) and segments are cut into tiles of at most
//! `TILE_PAIRS` pairs, so a weight row is widened to f32 once for a whole tile. Each pair is in one
//! tile and each sum has one order, so results do not depend on the number of threads.

use crate::backend::{Backend, Buffer};
use crate::blocks::{Align, BlockShape, SortedTensors};
use crate::call::{Enabled, Expand, Forward, Routing, RoutingTensors, Shrink};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::projection::{ExpertWeights, Projection, ProjectionSizes, XRows};
use crate::route::{HeldRoute, NOT_RECORDED, Route, RouteSizes};
use crate::tensor::{Host, View, ViewMut};
use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;
use std::marker::PhantomData;

/// Pairs of a tile: enough that widening the weights is a small part of the work, few enough that a
/// tile's rows of `x` stay in a core's L2 cache.
const TILE_PAIRS: usize = 32;
/// Weight rows widened at a time: each load of an input then serves this many sums.
const BLOCK_ROWS: usize = 4;
/// Partial sums of one dot product: a whole number of vector registers on every machine.
const LANES: usize = 8;

/// The CPU as a place where calls run; every call is done when it returns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

/// Host memory that starts on a cache line.
#[derive(Clone, Debug)]
pub struct HostBuffer<T> {
    lines: Vec<CacheLine>,
    len: usize,
    element: PhantomData<T>,
}

#[derive(Clone, Copy, Debug, Zeroable, Pod)]
#[repr(C, align(64))]
struct CacheLine([u8; 64]);

impl<T: Pod> HostBuffer<T> {
    fn new(elements: &[T]) -> Self {
        let lines = vec![CacheLine::zeroed(); size_of_val(elements).div_ceil(size_of::<CacheLine>())];
        let mut buffer = HostBuffer { lines, len: elements.len(), element: PhantomData };
        buffer.as_mut_slice().copy_from_slice(elements);
        buffer
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        let bytes: &[u8] = bytemuck::cast_slice(&self.lines);
        bytemuck::cast_slice(&bytes[..self.len * size_of::<T>()])
    }

    /// The elements, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.lines);
        bytemuck::cast_slice_mut(&mut bytes[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> Buffer<T> for HostBuffer<T> {
    type Space = Host;

    fn view(&self) -> View<'_, Host, T> {
        self.as_slice().into()
    }

    fn view_mut(&mut self) -> ViewMut<'_, Host, T> {
        self.as_mut_slice().into()
    }
}

/// What calls hand on to the next: the route of the last one that found one.
#[derive(Debug)]
pub struct Workspace {
    max_pairs: usize,
    held: HeldRoute,
    segments: Segments,
}

/// Pairs of one segment that are worked on together.
#[derive(Clone, Copy, Debug)]
struct Tile {
    slot: usize,
    expert: usize,
    rank: usize,
    /// Its pairs are `pairs[first..first + count]` of the route.
    first: usize,
    count: usize,
}

impl Tile {
    /// Number of the segment's matrix among those of one slice of `a` or `b`.
    fn matrix(&self, experts: usize, weights: ExpertWeights) -> usize {
        match weights {
            ExpertWeights::PerExpert => self.slot * experts + self.expert,
            ExpertWeights::Shared => self.slot,
        }
    }
}

/// The active pairs of a call, segment by segment.
#[derive(Debug, Default)]
struct Segments {
    pairs: Vec<usize>,
    tiles: Vec<Tile>,
    /// The route named the active pairs alone: all others are no part of the call.
    only_active: bool,
}

impl Workspace {
    /// The segments of a call whose tensors have been checked, and its route.
    fn segments(
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
        Ok((&self.segments, self.held.hold(sizes, TILE_PAIRS as u32, NOT_RECORDED)))
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

    /// Runs `work` on every tile, with the rows of `matrix` that belong to the tile's pairs, in
    /// parallel. Returns the rows of the inactive pairs, as far as they are part of the call.
    fn for_each_tile<'m, T: Send>(
        &self,
        matrix: &'m mut [T],
        (rows, stride): (usize, usize),
        work: impl Fn(&mut Scratch, &Tile, &[usize], &mut [&'m mut [T]]) + Sync,
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
        jobs.into_par_iter().for_each_init(Scratch::default, |scratch, (tile, rows)| {
            work(scratch, tile, &self.pairs[tile.first..][..tile.count], rows);
        });
        by_pair.into_iter().flatten().filter(|_| !self.only_active)
    }
}

/// Which slots are on.
fn on(adapter_enabled: &Enabled<'_, Host>, slots: usize) -> Vec<bool> {
    match adapter_enabled {
        Enabled::All => vec![true; slots],
        Enabled::U8(flags) => flags.as_slice()[..slots].iter().map(|&flag| flag != 0).collect(),
        Enabled::I32(flags) => flags.as_slice()[..slots].iter().map(|&flag| flag != 0).collect(),
    }
}

/// Which slots are `on` and listed too.
fn listed(lora_ids: View<'_, Host, i32>, on: Vec<bool>) -> Vec<bool> {
    let mut listed = vec![false; on.len()];
    for slot in lora_ids.as_slice().iter().filter_map(|&slot| usize::try_from(slot).ok()) {
        if let Some(listed) = listed.get_mut(slot) {
            *listed = on[slot];
        }
    }
    listed
}

/// Rows of f32, each filled up with zeros to whole lanes.
#[derive(Debug, Default)]
struct LaneRows {
    lanes: Vec<[f32; LANES]>,
    rows: usize,
    width: usize,
}

impl LaneRows {
    fn clear(&mut self, rows: usize, width: usize) {
        (self.rows, self.width) = (rows, width);
        self.lanes.clear();
        self.lanes.resize(rows * width.div_ceil(LANES), [0.0; LANES]);
    }

    fn row(&self, row: usize) -> &[[f32; LANES]] {
        let stride = self.width.div_ceil(LANES);
        &self.lanes[row * stride..][..stride]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let stride = self.width.div_ceil(LANES);
        &mut self.lanes[row * stride..][..stride].as_flattened_mut()[..self.width]
    }
}

/// What one thread needs for a tile.
#[derive(Debug, Default)]
struct Scratch {
    /// Rows of `x`, one a pair.
    x: LaneRows,
    /// Rows of `h`, one a pair.
    h: LaneRows,
    /// The weight rows at hand.
    weights: LaneRows,
}

/// `emit(i, r, inputs[i] · weights[r])` for every input row and every weight row; `widened` is scratch.
fn multiply<T: Element>(
    inputs: &LaneRows,
    weights: Matrix<'_, T>,
    widened: &mut LaneRows,
    mut emit: impl FnMut(usize, usize, f32),
) {
    widened.clear(BLOCK_ROWS, inputs.width);
    for first in (0..weights.rows).step_by(BLOCK_ROWS) {
        let count = BLOCK_ROWS.min(weights.rows - first);
        for row in 0..count {
            T::widen(&weights.row(first + row)[..inputs.width], widened.row_mut(row));
        }
        let block: [_; BLOCK_ROWS] = std::array::from_fn(|row| widened.row(row));
        for i in 0..inputs.rows {
            let sums = dot(block, inputs.row(i));
            for (row, &sum) in sums[..count].iter().enumerate() {
                emit(i, first + row, sum);
            }
        }
    }
}

fn dot(rows: [&[[f32; LANES]]; BLOCK_ROWS], input: &[[f32; LANES]]) -> [f32; BLOCK_ROWS] {
    let rows = rows.map(|row| &row[..input.len()]);
    let mut sums = [[0.0; LANES]; BLOCK_ROWS];
    for (i, input) in input.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for lane in 0..LANES {
                sums[lane] += row[i][lane] * input[lane];
            }
        }
    }
    sums.map(|lanes| lanes.iter().sum())
}

/// The weights of one segment and slice.
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    stride: usize,
}

impl<'a, T: Element> Matrix<'a, T> {
    fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.stride..][..self.stride]
    }

    /// `[rank, K]`: the rows of the segment's `a` that are in use.
    fn a(tile: &Tile, projection: &Projection, a: View<'a, Host, T>) -> Self {
        let s = projection.sizes();
        let first = tile.matrix(s.experts, s.a_experts) * s.max_rank * s.in_dim;
        let data = &a.as_slice()[first..][..tile.rank * s.in_dim];
        Matrix { data, rows: tile.rank, stride: s.in_dim }
    }

    /// `[N, R]`: the segment's `b`, of whose rows the first `rank` columns are in use.
    fn b(tile: &Tile, projection: &Projection, b: View<'a, Host, T>) -> Self {
        let s = projection.sizes();
        let first = tile.matrix(s.experts, s.b_experts) * s.out_dim * s.max_rank;
        let data = &b.as_slice()[first..][..s.out_dim * s.max_rank];
        Matrix { data, rows: s.out_dim, stride: s.max_rank }
    }
}

/// The activations of a call.
struct X<'a, T> {
    data: &'a [T],
    stride: usize,
    width: usize,
    /// Pairs that share a row.
    pairs_a_row: usize,
}

impl<'a, T: Element> X<'a, T> {
    fn new(projection: &Projection, data: View<'a, Host, T>, stride: usize) -> Self {
        let sizes = projection.sizes();
        let pairs_a_row = match sizes.x_rows {
            XRows::Token => sizes.top_k,
            XRows::Pair => 1,
        };
        X { data: data.as_slice(), stride, width: sizes.in_dim, pairs_a_row }
    }

    fn load(&self, pairs: &[usize], rows: &mut LaneRows) {
        rows.clear(pairs.len(), self.width);
        for (i, pair) in pairs.iter().enumerate() {
            T::widen(&self.data[pair / self.pairs_a_row * self.stride..][..self.width], rows.row_mut(i));
        }
    }
}

/// What becomes of a pair's delta.
struct Epilogue<'a> {
    topk_weights: Option<&'a [f32]>,
    offset: usize,
    accumulate: bool,
}

impl Epilogue<'_> {
    fn write<T: Element>(&self, pair: usize, row: &mut [T], column: usize, d: f32) {
        let delta = self.topk_weights.map_or(d, |weights| d * weights[pair]);
        let out = &mut row[self.offset + column];
        *out = T::from_f32(if self.accumulate { out.to_f32() + delta } else { delta });
    }

    /// Writes the rows of pairs that no segment has.
    fn write_inactive<'m, T: Element>(&self, rows: impl Iterator<Item = &'m mut [T]>, width: usize) {
        if !self.accumulate {
            rows.for_each(|row| row[self.offset..][..width].fill(T::zeroed()));
        }
    }
}

impl Backend for Cpu {
    type Space = Host;
    type Buffer<T: Pod> = HostBuffer<T>;
    type Workspace = Workspace;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn upload<T: Pod>(&self, elements: &[T]) -> Result<HostBuffer<T>> {
        Ok(HostBuffer::new(elements))
    }

    fn download<T: Pod>(&self, buffer: &HostBuffer<T>) -> Result<Vec<T>> {
        Ok(buffer.as_slice().to_vec())
    }

    fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Workspace> {
        let mut max_pairs = 0;
        for projection in projections {
            max_pairs = max_pairs.max(projection.pairs(max_tokens)?);
        }
        Ok(Workspace { max_pairs, held: HeldRoute::default(), segments: Segments::default() })
    }

    fn route(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        tokens: usize,
        routing: RoutingTensors<'_, Host>,
    ) -> Result<Route> {
        routing.check(projection, tokens)?;
        let (_, route) = workspace.segments(projection, tokens, &Routing::Tokens(routing))?;
        Ok(route)
    }

    fn align(&self, call: Align<'_, Host>) -> Result<()> {
        call.check()?;
        let BlockShape { block_size, max_padded, max_blocks } = call.shape;
        let pairs = call.pairs();
        let (topk_ids, token_lora) = (call.topk_ids.as_slice(), call.token_lora.as_slice());
        let expert_map = call.expert_map.map(|map| map.as_slice());
        let expert = |pair: usize| {
            let id = match expert_map {
                None => topk_ids[pair],
                Some(map) => *map.get(usize::try_from(topk_ids[pair]).ok()?)?,
            };
            usize::try_from(id).ok().filter(|&expert| expert < call.experts)
        };
        let mut segments = vec![Vec::new(); call.slots * call.experts];
        for pair in 0..pairs {
            let slot = usize::try_from(token_lora[pair / call.top_k]).ok().filter(|&slot| slot < call.slots);
            if let (Some(slot), Some(expert)) = (slot, expert(pair)) {
                segments[slot * call.experts + expert].push(pair as i32);
            }
        }
        let listed = listed(call.lora_ids, on(&call.adapter_enabled, call.slots));
        let padded_counts = call.num_tokens_post_padded.into_slice();
        let rows = call.sorted_token_ids.into_slice().chunks_exact_mut(max_padded);
        let rows = rows.zip(call.expert_ids.into_slice().chunks_exact_mut(max_blocks));
        let rows = rows.zip(segments.chunks_exact(call.experts)).zip(padded_counts).zip(listed);
        for ((((places, experts), segments), padded), _) in rows.filter(|(_, listed)| *listed) {
            places.fill(pairs as i32);
            experts.fill(-1);
            let mut first = 0;
            for (expert, segment) in segments.iter().enumerate() {
                places[first..][..segment.len()].copy_from_slice(segment);
                let blocks = segment.len().div_ceil(block_size);
                experts[first / block_size..][..blocks].fill(expert as i32);
                first += blocks * block_size;
            }
            *padded = first as i32;
        }
        Ok(())
    }

    fn forward<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Forward<'_, Host, T>,
    ) -> Result<Route> {
        let layout = call.check(projection)?;
        let (segments, route) = workspace.segments(projection, call.tokens, &call.routing)?;
        if call.tokens == 0 {
            return Ok(route);
        }
        let x = X::new(projection, call.x.data, layout.x_stride);
        let epilogue = Epilogue {
            topk_weights: call.topk_weights.map(|weights| weights.as_slice()),
            offset: call.offset,
            accumulate: call.accumulate,
        };
        let out_dim = projection.sizes().out_dim;
        let out_rows = (projection.pairs(call.tokens)?, layout.out_stride);
        let inactive =
            segments.for_each_tile(call.out.data.into_slice(), out_rows, |scratch, tile, pairs, out| {
                let Scratch { x: x_rows, h, weights } = scratch;
                x.load(pairs, x_rows);
                for (s, (&a, &b)) in call.a.iter().zip(call.b).enumerate() {
                    h.clear(pairs.len(), tile.rank);
                    multiply(x_rows, Matrix::a(tile, projection, a), weights, |i, q, sum| {
                        h.row_mut(i)[q] = sum;
                    });
                    multiply(h, Matrix::b(tile, projection, b), weights, |i, n, d| {
                        epilogue.write(pairs[i], out[i], s * out_dim + n, d);
                    });
                }
            });
        epilogue.write_inactive(inactive, projection.out_width());
        Ok(route)
    }

    fn shrink<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Shrink<'_, Host, T>,
    ) -> Result<Route> {
        let layout = call.check(projection)?;
        let (segments, route) = workspace.segments(projection, call.tokens, &call.routing)?;
        if call.tokens == 0 {
            return Ok(route);
        }
        let x = X::new(projection, call.x.data, layout.x_stride);
        let (pairs, max_rank) = (projection.pairs(call.tokens)?, projection.sizes().max_rank);
        let slices = call.h.into_slice().chunks_mut(pairs * max_rank);
        for (&a, h) in call.a.iter().zip(slices) {
            let inactive = segments.for_each_tile(h, (pairs, max_rank), |scratch, tile, pairs, h| {
                x.load(pairs, &mut scratch.x);
                h.iter_mut().for_each(|row| row[tile.rank..].fill(T::zeroed()));
                let a = Matrix::a(tile, projection, a);
                multiply(&scratch.x, a, &mut scratch.weights, |i, q, sum| {
                    h[i][q] = T::from_f32(sum);
                });
            });
            inactive.for_each(|row| row.fill(T::zeroed()));
        }
        Ok(route)
    }

    fn expand<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Expand<'_, Host, T>,
    ) -> Result<Route> {
        let layout = call.check(projection)?;
        let (segments, route) = workspace.segments(projection, call.tokens, &call.routing)?;
        if call.tokens == 0 {
            return Ok(route);
        }
        let epilogue = Epilogue {
            topk_weights: call.topk_weights.map(|weights| weights.as_slice()),
            offset: call.offset,
            accumulate: call.accumulate,
        };
        let &ProjectionSizes { out_dim, max_rank, .. } = projection.sizes();
        let rows = projection.pairs(call.tokens)?;
        let hidden = call.h.as_slice();
        let inactive = segments.for_each_tile(
            call.out.data.into_slice(),
            (rows, layout.out_stride),
            |Scratch { h, weights, .. }, tile, pairs, out| {
                for (s, &b) in call.b.iter().enumerate() {
                    h.clear(pairs.len(), tile.rank);
                    for (i, pair) in pairs.iter().enumerate() {
                        T::widen(&hidden[(s * rows + pair) * max_rank..][..tile.rank], h.row_mut(i));
                    }
                    multiply(h, Matrix::b(tile, projection, b), weights, |i, n, d| {
                        epilogue.write(pairs[i], out[i], s * out_dim + n, d);
                    });
                }
            },
        );
        epilogue.write_inactive(inactive, projection.out_width());
        Ok(route)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
