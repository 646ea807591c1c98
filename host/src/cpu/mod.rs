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
use crate::call::{Expand, Forward, Routing, RoutingTensors, Shrink};
use crate::dtype::Element;
use crate::error::Result;
use crate::projection::{Projection, ProjectionSizes};
use crate::route::Route;
use crate::tensor::Host;
use bytemuck::Pod;
use product::{Epilogue, Matrix, Scratch, X, multiply};

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
        let x = X::new(projection, call.x.data, layout.x_stride);
        let epilogue = Epilogue::new(call.topk_weights, call.offset, call.accumulate);
        let out_dims = projection.sizes().out_dims;
        let out_rows = (projection.pairs(call.tokens)?, layout.out_stride);
        let inactive = segments.for_each_tile(
            call.out.data.into_slice(),
            out_rows,
            |scratch: &mut Scratch, tile, pairs, out| {
                let Scratch { x: x_rows, h, weights } = scratch;
                x.load(pairs, x_rows);
                for (s, (&a, &b)) in call.a.iter().zip(call.b).enumerate() {
                    h.clear(pairs.len(), tile.rank);
                    multiply(x_rows, Matrix::a(tile, projection, a), weights, |i, q, sum| {
                        h.row_mut(i)[q] = sum;
                    });
                    multiply(h, Matrix::b(tile, projection, s, b), weights, |i, n, d| {
                        epilogue.write(pairs[i], out[i], out_dims.first_column(s) + n, d);
                    });
                }
            },
        );
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
            let inactive =
                segments.for_each_tile(h, (pairs, max_rank), |scratch: &mut Scratch, tile, pairs, h| {
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
        let epilogue = Epilogue::new(call.topk_weights, call.offset, call.accumulate);
        let &ProjectionSizes { out_dims, max_rank, .. } = projection.sizes();
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
                    multiply(h, Matrix::b(tile, projection, s, b), weights, |i, n, d| {
                        epilogue.write(pairs[i], out[i], out_dims.first_column(s) + n, d);
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
