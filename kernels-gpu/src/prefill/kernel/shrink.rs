//! The first product: h of a work tile's pairs, `x · aᵀ`, in f32.

use super::Consumer;
use super::pipeline::Stage;
use super::steps::{MOST_PANELS, PRODUCT_K, panels_k, shrink_panels};
use super::work_tile::WorkTile;
use crate::arch::wgmma::{self, Matrix, Sums};
use crate::params::PrefillParams;
use crate::prefill::config::{Accumulators, Config};
use crate::tile::{TileShape, unroll};

/// Adds the work tile's elements of K to the first `columns` columns of `sums`, if it shrinks.
///
/// # Safety
/// The route must be written and the barriers be ready; the whole consumer must come here.
#[inline(always)]
#[track_caller]
pub(super) unsafe fn shrink<C: Config>(
    consumer: &mut Consumer<C>,
    p: &PrefillParams,
    work: &WorkTile,
    columns: u32,
    sums: &mut C::Accumulators,
) {
    let Consumer { pipeline, order, position } = consumer;
    // SAFETY: as the caller promises.
    let (begin, end) = unsafe { work.k(p) };
    let mut place = if work.shrinks() { begin } else { end };
    while place < end {
        // SAFETY: as the caller promises; the step has landed, was shown, and is left alone until it is
        // released. Both consumers take the same steps.
        unsafe {
            let stage = pipeline.consumer_wait();
            order.wait();
            wgmma::fence();
            multiply::<C>(sums, &stage, columns, position.warpgroup_row);
            wgmma::commit();
            order.arrive();
            sums.wait();
            pipeline.consumer_release();
        }
        place += panels_k(shrink_panels::<C>(columns));
    }
}

/// Adds a step to the first `columns` columns of the sums.
///
/// # Safety
/// As for [`Sums::multiply`], of the stage; `columns` must be those of a product.
#[inline(always)]
#[track_caller]
unsafe fn multiply<C: Config>(
    sums: &mut C::Accumulators,
    stage: &Stage<C>,
    columns: u32,
    warpgroup_row: u32,
) {
    macro_rules! multiply {
        ($sums:expr, $count:literal of $columns:literal, from $first:literal) => {
            if let Some(sums) = $sums.first_chunk_mut::<$count>() {
                let panels = shrink_panels::<C>($columns);
                unroll::<MOST_PANELS>(|panel| {
                    if (panel as u32) < panels {
                        let x = stage.row_panel(panel as u32).chunk(warpgroup_row, 0);
                        let a = stage.a_panel(panels, $columns, panel as u32).chunk($first, 0);
                        let (x, a) = (Matrix::swizzled(x), Matrix::swizzled(a));
                        unroll::<{ (TileShape::DEPTH / PRODUCT_K) as usize }>(|k| {
                            // SAFETY: as the caller promises.
                            unsafe { sums.multiply::<C::Element>(x.step(k as u32), a.step(k as u32)) };
                        });
                    }
                });
            }
        };
    }
    match columns.min(C::SHAPE.width) {
        0..=32 => multiply!(sums.low(), 16 of 32, from 0),
        33..=64 => multiply!(sums.low(), 32 of 64, from 0),
        65..=128 => multiply!(sums.low(), 64 of 128, from 0),
        _ => {
            multiply!(sums.low(), 64 of 256, from 0);
            multiply!(sums.high(), 64 of 256, from 128);
        }
    }
}
