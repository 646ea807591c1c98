//! The CPU back end: the same operator on host memory, on all threads of the current rayon pool.
//!
//! Pairs are grouped by segment (slot, expert) and segments are cut into tiles of at most
//! `TILE_PAIRS` pairs, so a weight row is widened to f32 once for a whole tile. Each pair is in one
//! tile and each sum has one order, so results do not depend on the number of threads.

mod align;
mod buffer;
mod product;
mod segments;

pub use buffer::HostBuffer;
pub use segments::Workspace;

use crate::backend::Backend;
use crate::blocks::Align;
use crate::call::{Expand, Forward, Layout, Routing, RoutingTensors, Shrink};
use crate::check::check_room;
use crate::dtype::Element;
use crate::error::Result;
use crate::projection::Projection;
use crate::route::Route;
use crate::tensor::{Host, RowsMut};
use bytemuck::Pod;
use product::{Epilogue, InUse, Matrix, Scratch, X, multiply};
use segments::{by_index, in_order};

/// The CPU as a place where calls run; every call is done when it returns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

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

    fn write<T: Pod>(&self, buffer: &mut HostBuffer<T>, start: usize, elements: &[T]) -> Result<()> {
        let all = buffer.as_mut_slice();
        check_room(all.len(), start, elements.len())?;
        all[start..][..elements.len()].copy_from_slice(elements);
        Ok(())
    }

    fn check_own<T: Pod>(&self, _what: &'static str, _buffer: &HostBuffer<T>) -> Result<()> {
        Ok(())
    }

    fn download<T: Pod>(&self, buffer: &HostBuffer<T>) -> Result<Vec<T>> {
        Ok(buffer.as_slice().to_vec())
    }

    fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Workspace> {
        let mut max_pairs = 0;
        for projection in projections {
            max_pairs = max_pairs.max(projection.pairs(max_tokens)?);
        }
        Ok(Workspace::new(max_pairs))
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
        align::align(call)
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
        let x = X::new(projection, &call.x, &layout);
        let epilogue = Epilogue::new(projection, call.topk_weights, &layout, call.accumulate);
        let (a, b) = (call.weights.a(), call.weights.b());
        let inactive = segments.for_each_tile(
            out_rows(call.out, &layout, projection.pairs(call.tokens)?),
            |pair| x.has(pair),
            |scratch: &mut Scratch, tile, pairs, out| {
                let Scratch { x: x_rows, h, weights } = scratch;
                x.load(pairs, x_rows);
                for s in 0..projection.slices() {
                    let used = InUse::of(tile, projection, s, &a);
                    h.clear(pairs.len(), used.rank);
                    multiply(x_rows, Matrix::a(tile, projection, s, &used, &a), weights, |i, q, sum| {
                        h.row_mut(i)[q] = sum;
                    });
                    let b = Matrix::b(tile, projection, s, &used, &b);
                    epilogue.expand((h, b), weights, (s, &used), pairs, out);
                }
            },
        );
        epilogue.write_inactive(inactive);
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
        let x = X::new(projection, &call.x, &layout);
        let (pairs, max_rank) = (projection.pairs(call.tokens)?, projection.sizes().max_rank);
        let slices = call.h.into_slice().chunks_mut(pairs * max_rank).take(projection.slices());
        for (s, h) in slices.enumerate() {
            let inactive = segments.for_each_tile(
                in_order(h, max_rank, pairs),
                |pair| x.has(pair),
                |scratch: &mut Scratch, tile, pairs, h| {
                    let used = InUse::of(tile, projection, s, &call.a);
                    x.load(pairs, &mut scratch.x);
                    h.iter_mut().for_each(|row| row[used.rank..].fill(T::zeroed()));
                    let a = Matrix::a(tile, projection, s, &used, &call.a);
                    multiply(&scratch.x, a, &mut scratch.weights, |i, q, sum| {
                        h[i][q] = T::from_f32(sum);
                    });
                },
            );
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
        let epilogue = Epilogue::new(projection, call.topk_weights, &layout, call.accumulate);
        let (rows, max_rank) = (projection.pairs(call.tokens)?, projection.sizes().max_rank);
        let hidden = call.h.as_slice();
        let inactive = segments.for_each_tile(
            out_rows(call.out, &layout, projection.pairs(call.tokens)?),
            |_| true,
            |Scratch { h, weights, .. }, tile, pairs, out| {
                for s in 0..projection.slices() {
                    let used = InUse::of(tile, projection, s, &call.b);
                    h.clear(pairs.len(), used.rank);
                    for (i, pair) in pairs.iter().enumerate() {
                        T::widen(&hidden[(s * rows + pair) * max_rank..][..used.rank], h.row_mut(i));
                    }
                    let b = Matrix::b(tile, projection, s, &used, &call.b);
                    epilogue.expand((h, b), weights, (s, &used), pairs, out);
                }
            },
        );
        epilogue.write_inactive(inactive);
        Ok(route)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

/// The row of `out` of each pair, unless it has none.
fn out_rows<'a, T: Element>(
    out: RowsMut<'a, Host, T>,
    layout: &Layout,
    pairs: usize,
) -> Vec<Option<&'a mut [T]>> {
    let matrix = out.data.into_slice();
    match out.index {
        None => in_order(matrix, layout.out_stride, layout.out_rows),
        Some(index) => by_index(matrix, layout.out_stride, layout.out_rows, &index.as_slice()[..pairs]),
    }
}
