//! The plain float64 form of every call: what any back end must compute, written as the contract's
//! formula and as slow as that is.
//!
//! Host ranks over `max_rank` are clamped here, as ranks on a device are, and `h` is never rounded.

use crate::blocks::{BlockShape, SortedTensors};
use crate::call::{Enabled, Expand, Forward, Routing, RoutingTensors, Shrink};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::projection::{ExpertWeights, Projection, XRows};
use crate::tensor::{Host, View};
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
    /// For each pair its weights; `None` when the pair is inactive.
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
    let (topk_ids, token_lora) = (routing.topk_ids.as_slice(), routing.token_lora.as_slice());
    let rank = |slot| rank_of(slot, sizes.max_rank, &routing.ranks);
    let local_expert = |global: i32| match &routing.expert_map {
        None => Some(global),
        Some(map) => map.as_slice().get(usize::try_from(global).ok()?).copied(),
    };
    let target = |pair: usize| {
        let slot = index_below(token_lora[pair / sizes.top_k], sizes.slots)?;
        let expert = index_below(local_expert(topk_ids[pair])?, sizes.experts)?;
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

/// `[P, Σ N_s]`: weight · b · (a · x).
///
/// # Errors
/// As [`Forward::check`]; [`Error::StaleRoute`] for a call without routing tensors.
pub fn forward<T: Element>(projection: &Projection, call: &Forward<'_, Host, T>) -> Result<Expected> {
    let layout = call.check(projection)?;
    let targets = route_targets(projection, call.tokens, &call.routing)?;
    let x = X { projection, data: call.x.data, stride: layout.x_stride };
    let weights = call.topk_weights;
    let values =
        delta(projection, &targets, call.b, weights, |s, pair, target| x.shrink(call.a[s], pair, target));
    Ok(Expected { targets, values })
}

/// `[S, P, R]`: a · x, zero above a slot's rank.
///
/// # Errors
/// As [`Shrink::check`]; [`Error::StaleRoute`] for a call without routing tensors.
pub fn shrink<T: Element>(projection: &Projection, call: &Shrink<'_, Host, T>) -> Result<Expected> {
    let layout = call.check(projection)?;
    let targets = route_targets(projection, call.tokens, &call.routing)?;
    let x = X { projection, data: call.x.data, stride: layout.x_stride };
    let mut values = vec![0.0; projection.h_elements(call.tokens)?];
    values.par_chunks_mut(projection.sizes().max_rank).enumerate().for_each(|(row, h)| {
        let (s, pair) = (row / targets.len(), row % targets.len());
        if let Some(target) = targets[pair] {
            h[..target.rank].copy_from_slice(&x.shrink(call.a[s], pair, target));
        }
    });
    Ok(Expected { targets, values })
}

/// `[P, Σ N_s]`: weight · b · h.
///
/// # Errors
/// As [`Expand::check`]; [`Error::StaleRoute`] for a call without routing tensors.
pub fn expand<T: Element>(projection: &Projection, call: &Expand<'_, Host, T>) -> Result<Expected> {
    call.check(projection)?;
    let max_rank = projection.sizes().max_rank;
    let targets = route_targets(projection, call.tokens, &call.routing)?;
    let values = delta(projection, &targets, call.b, call.topk_weights, |s, pair, target| {
        let row = (s * targets.len() + pair) * max_rank;
        widened(&call.h.as_slice()[row..][..target.rank]).collect()
    });
    Ok(Expected { targets, values })
}

/// `delta[p, Σ_{i<s} N_i + n]` = weight\[p\] · Σ_q h\[q\] · b\[s\]\[l, e, n, q\], with h as `hidden(s, p, …)` gives
/// it.
fn delta<T: Element>(
    projection: &Projection,
    targets: &[Option<Target>],
    b: &[View<'_, Host, T>],
    topk_weights: Option<View<'_, Host, f32>>,
    hidden: impl Fn(usize, usize, Target) -> Vec<f64> + Sync,
) -> Vec<f64> {
    let sizes = projection.sizes();
    let width = projection.out_width();
    let mut delta = vec![0.0; targets.len() * width];
    delta.par_chunks_mut(width).zip(targets).enumerate().for_each(|(pair, (delta, target))| {
        let Some(target) = *target else { return };
        let weight = topk_weights.map_or(1.0, |weights| f64::from(weights.as_slice()[pair]));
        let mut rest = delta;
        for (s, &out_dim) in sizes.out_dims.as_slice().iter().enumerate() {
            let (delta, next) = rest.split_at_mut(out_dim);
            rest = next;
            let h = hidden(s, pair, target);
            let first_row = target.matrix(sizes.experts, sizes.b_experts) * out_dim;
            for (n, delta) in delta.iter_mut().enumerate() {
                *delta =
                    weight * dot(&b[s].as_slice()[(first_row + n) * sizes.max_rank..][..target.rank], &h);
            }
        }
    });
    delta
}

/// The activations of a call.
struct X<'a, T> {
    projection: &'a Projection,
    data: View<'a, Host, T>,
    stride: usize,
}

impl<T: Element> X<'_, T> {
    /// `h[q]` = Σ_c x\[row(p), c\] · a\[l, e, q, c\], q < rank.
    fn shrink(&self, a: View<'_, Host, T>, pair: usize, target: Target) -> Vec<f64> {
        let sizes = self.projection.sizes();
        let row = match sizes.x_rows {
            XRows::Token => pair / sizes.top_k,
            XRows::Pair => pair,
        };
        let x: Vec<f64> = widened(&self.data.as_slice()[row * self.stride..][..sizes.in_dim]).collect();
        let first_row = target.matrix(sizes.experts, sizes.a_experts) * sizes.max_rank;
        let a_row = |q| &a.as_slice()[(first_row + q) * sizes.in_dim..][..sizes.in_dim];
        (0..target.rank).map(|q| dot(a_row(q), &x)).collect()
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
