//! The plain float64 form of every call: what any back end must compute, written as the contract's
//! formula and as slow as that is.
//!
//! Host ranks over `max_rank` are clamped here, as ranks on a device are, and `h` is never rounded.

use crate::blocks::{BlockShape, SortedTensors};
use crate::call::{Enabled, Expand, Factor, Forward, Layout, Routing, RoutingTensors, Shrink, SliceOrder};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::projection::{ExpertWeights, Projection, XRows};
use crate::table::AdapterEntry;
use crate::tensor::{Host, Rows, View};
use rayon::prelude::*;

/// Where the weights of an active pair are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// l: the adapter slot, below L.
    pub slot: usize,
    /// e: the local expert, below E.
    pub expert: usize,
    /// Rank in use, 0 ..= R.
    pub rank: usize,
}

impl Target {
    /// Number of the matrix among those of one slice of `a` or `b`, `[L, E or 1, …]`.
    fn matrix(self, experts: usize, weights: ExpertWeights) -> usize {
        match weights {
            ExpertWeights::PerExpert => self.slot * experts + self.expert,
            ExpertWeights::Shared => self.slot,
        }
    }
}

/// What a call must compute, before it is rounded or added to anything.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    /// For each pair its weights; `None` when the pair is inactive, also where an index gives it no row of
    /// `x`. A slice of an adapter by address may be of a smaller rank.
    pub targets: Vec<Option<Target>>,
    /// `[P, Σ N_s]` what is added to `out`, or `[S, P, R]` what `h` becomes; zero for inactive pairs.
    pub values: Vec<f64>,
}

/// The weights of each of the P pairs; `None` where a pair is inactive. Any id may have any value.
///
/// # Errors
/// As [`RoutingTensors::check`].
pub fn targets(
    projection: &Projection,
    tokens: usize,
    routing: &RoutingTensors<'_, Host>,
) -> Result<Vec<Option<Target>>> {
    routing.check(projection, tokens)?;
    let sizes = projection.sizes();
    let token_lora = routing.token_lora.as_slice();
    let rank = |slot| rank_of(slot, sizes.max_rank, &routing.ranks);
    let local_expert = |global: i64| match &routing.expert_map {
        None => i32::try_from(global).ok(),
        Some(map) => map.as_slice().get(usize::try_from(global).ok()?).copied(),
    };
    let target = |pair: usize| {
        let slot = index_below(token_lora[pair / sizes.top_k], sizes.slots)?;
        let expert = index_below(local_expert(routing.topk_ids.id(pair))?, sizes.experts)?;
        is_on(slot, &routing.adapter_enabled).then(|| Target { slot, expert, rank: rank(slot) })
    };
    Ok((0..projection.pairs(tokens)?).map(target).collect())
}

/// The weights of each of the P pairs on a route in vLLM's form; `None` where a pair is in no block. Of two
/// blocks that hold a pair, the first counts. Any id may have any value.
///
/// # Errors
/// As [`SortedTensors::check`].
pub fn sorted_targets(
    projection: &Projection,
    tokens: usize,
    sorted: &SortedTensors<'_, Host>,
) -> Result<Vec<Option<Target>>> {
    sorted.check(projection)?;
    let sizes = projection.sizes();
    let BlockShape { block_size, max_padded, max_blocks } = sorted.shape;
    let mut targets = vec![None; projection.pairs(tokens)?];
    for slot in 0..sizes.slots {
        let listed = sorted.lora_ids.as_slice().contains(&(slot as i32));
        let rank = rank_of(slot, sizes.max_rank, &sorted.ranks);
        if !listed || rank == 0 || !is_on(slot, &sorted.adapter_enabled) {
            continue;
        }
        let places = &sorted.sorted_token_ids.as_slice()[slot * max_padded..][..max_padded];
        let experts = &sorted.expert_ids.as_slice()[slot * max_blocks..][..max_blocks];
        let used = sorted.num_tokens_post_padded.as_slice()[slot].max(0) as usize;
        let blocks = places.chunks_exact(block_size).zip(experts).take(used.div_ceil(block_size));
        for (pairs, &expert) in blocks {
            let Some(expert) = index_below(expert, sizes.experts) else { continue };
            for &pair in pairs {
                if let Some(pair) = index_below(pair, targets.len()) {
                    targets[pair].get_or_insert(Target { slot, expert, rank });
                }
            }
        }
    }
    Ok(targets)
}

/// Which of the slots are on.
///
/// # Errors
/// As [`RoutingTensors::check`] for `adapter_enabled`.
pub fn slots_on(slots: usize, adapter_enabled: &Enabled<'_, Host>) -> Result<Vec<bool>> {
    adapter_enabled.check(slots)?;
    Ok((0..slots).map(|slot| is_on(slot, adapter_enabled)).collect())
}

fn is_on(slot: usize, adapter_enabled: &Enabled<'_, Host>) -> bool {
    match adapter_enabled {
        Enabled::All => true,
        Enabled::U8(flags) => flags.as_slice()[slot] != 0,
        Enabled::I32(flags) => flags.as_slice()[slot] != 0,
    }
}

/// The rank in use of a slot below L.
fn rank_of(slot: usize, max_rank: usize, ranks: &Option<View<'_, Host, i32>>) -> usize {
    match ranks {
        None => max_rank,
        Some(ranks) => ranks.as_slice()[slot].clamp(0, max_rank as i32) as usize,
    }
}

/// `id` as an index, when it is one.
fn index_below(id: i32, limit: usize) -> Option<usize> {
    usize::try_from(id).ok().filter(|&index| index < limit)
}

/// `[P, Σ N_s]`: weight · scaling · b · (a · x), with the columns in the call's order.
///
/// # Errors
/// As [`Forward::check`]; [`Error::StaleRoute`] for a call without routing tensors.
pub fn forward<T: Element>(projection: &Projection, call: &Forward<'_, Host, T>) -> Result<Expected> {
    let layout = call.check(projection)?;
    let x = X { projection, rows: call.x, layout: &layout };
    let targets = x.active(route_targets(projection, call.tokens, &call.routing)?);
    let (a, b) = (Factors { projection, factor: call.weights.a() }, call.weights.b());
    let b = Factors { projection, factor: b };
    let values =
        b.delta(&targets, call.topk_weights, call.order, |s, pair, target| x.shrink(&a, s, pair, target));
    Ok(Expected { targets, values })
}

/// `[S, P, R]`: a · x, zero above a slot's rank.
///
/// # Errors
/// As [`Shrink::check`]; [`Error::StaleRoute`] for a call without routing tensors.
pub fn shrink<T: Element>(projection: &Projection, call: &Shrink<'_, Host, T>) -> Result<Expected> {
    let layout = call.check(projection)?;
    let x = X { projection, rows: call.x, layout: &layout };
    let targets = x.active(route_targets(projection, call.tokens, &call.routing)?);
    let a = Factors { projection, factor: call.a };
    let mut values = vec![0.0; projection.h_elements(call.tokens)?];
    values.par_chunks_mut(projection.sizes().max_rank).enumerate().for_each(|(row, h)| {
        let (s, pair) = (row / targets.len(), row % targets.len());
        if let Some(target) = targets[pair] {
            let used = x.shrink(&a, s, pair, target);
            h[..used.len()].copy_from_slice(&used);
        }
    });
    Ok(Expected { targets, values })
}

/// `[P, Σ N_s]`: weight · scaling · b · h, with the columns in the call's order.
///
/// # Errors
/// As [`Expand::check`]; [`Error::StaleRoute`] for a call without routing tensors.
pub fn expand<T: Element>(projection: &Projection, call: &Expand<'_, Host, T>) -> Result<Expected> {
    call.check(projection)?;
    let max_rank = projection.sizes().max_rank;
    let targets = route_targets(projection, call.tokens, &call.routing)?;
    let b = Factors { projection, factor: call.b };
    let values = b.delta(&targets, call.topk_weights, call.order, |s, pair, target| {
        let row = (s * targets.len() + pair) * max_rank;
        widened(&call.h.as_slice()[row..][..b.rank(s, target)]).collect()
    });
    Ok(Expected { targets, values })
}

/// `a` or `b` of a call.
struct Factors<'a, T> {
    projection: &'a Projection,
    factor: Factor<'a, Host, T>,
}

impl<'a, T: Element> Factors<'a, T> {
    /// The entry of a table.
    fn entry(&self, s: usize, target: Target) -> Option<AdapterEntry> {
        match self.factor {
            Factor::Stacked(_) => None,
            Factor::Table(adapters) => Some(adapters.entry(self.projection, target.slot, s)),
        }
    }

    /// Rank in use of a slice.
    fn rank(&self, s: usize, target: Target) -> usize {
        self.entry(s, target).map_or(target.rank, |entry| entry.rank_in_use(target.rank))
    }

    /// Row q of `a`, for a rank in use.
    fn a_row(&self, s: usize, target: Target, q: usize) -> &'a [T] {
        let sizes = self.projection.sizes();
        let (matrices, row) = match (self.factor, self.entry(s, target)) {
            (Factor::Table(adapters), Some(entry)) => (adapters.a(self.projection, &entry, target.expert), q),
            (factor, _) => {
                let matrix = target.matrix(sizes.experts, sizes.a_experts);
                (factor.stacked()[s].as_slice(), matrix * sizes.max_rank + q)
            }
        };
        &matrices[row * sizes.in_dim..][..sizes.in_dim]
    }

    /// The first `rank` columns of row n of `b`.
    fn b_row(&self, s: usize, target: Target, n: usize, rank: usize) -> &'a [T] {
        let sizes = self.projection.sizes();
        let (matrices, row, stride) = match (self.factor, self.entry(s, target)) {
            (Factor::Table(adapters), Some(entry)) => {
                (adapters.b(self.projection, s, &entry, target.expert), n, entry.max_rank as usize)
            }
            (factor, _) => {
                let matrix = target.matrix(sizes.experts, sizes.b_experts);
                (factor.stacked()[s].as_slice(), matrix * sizes.out_dims.get(s) + n, sizes.max_rank)
            }
        };
        &matrices[row * stride..][..rank]
    }

    /// `delta[p, column of (s, n)]` = weight\[p\] · scaling · Σ_q h\[q\] · b\[s\]\[l, e, n, q\], with h as
    /// `hidden(s, p, …)` gives it.
    fn delta(
        &self,
        targets: &[Option<Target>],
        topk_weights: Option<View<'_, Host, f32>>,
        order: SliceOrder,
        hidden: impl Fn(usize, usize, Target) -> Vec<f64> + Sync,
    ) -> Vec<f64> {
        let (out_dims, width) = (self.projection.sizes().out_dims, self.projection.out_width());
        let mut delta = vec![0.0; targets.len() * width];
        delta.par_chunks_mut(width).zip(targets).enumerate().for_each(|(pair, (delta, target))| {
            let Some(target) = *target else { return };
            let weight = topk_weights.map_or(1.0, |weights| f64::from(weights.as_slice()[pair]));
            for (s, &out_dim) in out_dims.as_slice().iter().enumerate() {
                let rank = self.rank(s, target);
                // Of rank 0 there may be no weights.
                if rank == 0 {
                    continue;
                }
                let scaling = self.entry(s, target).map_or(1.0, |entry| f64::from(entry.scaling));
                let h = hidden(s, pair, target);
                let (first, step) = (order.first_column(&out_dims, s), order.column_step(&out_dims));
                for n in 0..out_dim {
                    let d = dot(self.b_row(s, target, n, rank), &h);
                    delta[first + n * step] = weight * scaling * d;
                }
            }
        });
        delta
    }
}

/// The activations of a call.
struct X<'a, T> {
    projection: &'a Projection,
    rows: Rows<'a, Host, T>,
    layout: &'a Layout,
}

impl<T: Element> X<'_, T> {
    /// The row of a pair, when it has one.
    fn row(&self, pair: usize) -> Option<usize> {
        let sizes = self.projection.sizes();
        match (self.rows.index, sizes.x_rows) {
            (Some(index), _) => {
                let row = usize::try_from(index.as_slice()[pair]).ok()?;
                (row < self.layout.x_rows).then_some(row)
            }
            (None, XRows::Token) => Some(pair / sizes.top_k),
            (None, XRows::Pair) => Some(pair),
        }
    }

    /// Those of the routed pairs that have a row.
    fn active(&self, targets: Vec<Option<Target>>) -> Vec<Option<Target>> {
        let pairs = targets.into_iter().enumerate();
        pairs.map(|(pair, target)| target.filter(|_| self.row(pair).is_some())).collect()
    }

    /// `h[q]` = Σ_c x\[row(p), c\] · a\[l, e, q, c\], q < the slice's rank, for an active pair.
    fn shrink(&self, a: &Factors<'_, T>, s: usize, pair: usize, target: Target) -> Vec<f64> {
        let row = self.row(pair).expect("an active pair has a row") * self.layout.x_stride;
        let x: Vec<f64> =
            widened(&self.rows.data.as_slice()[row..][..self.projection.sizes().in_dim]).collect();
        (0..a.rank(s, target)).map(|q| dot(a.a_row(s, target, q), &x)).collect()
    }
}

fn widened<T: Element>(row: &[T]) -> impl Iterator<Item = f64> {
    let mut values = vec![0.0; row.len()];
    T::widen(row, &mut values);
    values.into_iter().map(f64::from)
}

fn dot<T: Element>(weights: &[T], values: &[f64]) -> f64 {
    widened(weights).zip(values).map(|(weight, value)| weight * value).sum()
}

fn route_targets(
    projection: &Projection,
    tokens: usize,
    routing: &Routing<'_, Host>,
) -> Result<Vec<Option<Target>>> {
    match routing {
        Routing::Tokens(tensors) => targets(projection, tokens, tensors),
        Routing::Sorted(sorted) => sorted_targets(projection, tokens, sorted),
        Routing::On(_) => {
            Err(Error::StaleRoute { reason: "the reference holds none: pass routing tensors".to_owned() })
        }
    }
}
