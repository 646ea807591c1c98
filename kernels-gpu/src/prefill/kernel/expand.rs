//! The second product: `out (+)= weight · h · bᵀ` of a work tile's pairs, and the store to `out`.

use super::h::{H, drop_slice};
use super::kept::{kept_pairs, kept_slices, kept_work};
use super::pipeline::{PingPong, Stage};
use super::steps::{PANEL_COLUMNS, PRODUCT_K, expand_panels, panels_n, rank_shift};
use super::work_tile::Slice;
use super::{Consumer, Position};
use crate::arch::mma::Element;
use crate::arch::wgmma::{self, Matrix, Sums};
use crate::memory::{Global, Index};
use crate::params::{NO_PAIR, PrefillParams};
use crate::prefill::PRODUCT_PANELS;
use crate::prefill::config::Config;
use crate::tile::panel::{CHUNK, Panel};
use crate::tile::{TileShape, unroll};

/// A thread's sums of a panel of columns of `out`.
const PANEL_SUMS: usize = PANEL_COLUMNS as usize / 2;

/// A thread's sums of a product.
type Delta = [f32; PRODUCT_PANELS * PANEL_SUMS];

/// Old values of a thread's columns of a panel: of either 32 columns, of its two rows.
type Old = [[[u32; 4]; 2]; 2];

/// Writes the columns of the kept work tile's slices, one slice after another, if it expands.
///
/// # Safety
/// The route must be written, the barriers be ready, and the work tile be kept; the whole consumer must come
/// here.
#[inline(always)]
#[track_caller]
pub(super) unsafe fn expand<C: Config>(consumer: &mut Consumer<C>, p: &PrefillParams, mut h: H) {
    let Consumer { pipeline, order, position } = consumer;
    // SAFETY: as the caller promises.
    let mut slices = unsafe { kept_slices() };
    while slices.next < slices.end {
        // SAFETY: as the caller promises.
        let Part { slice, out } = unsafe { Part::new::<C>(p, slices.next, position) };
        let panels = expand_panels::<C>(slice.rank);
        let mut column = slice.first;
        while column < slice.end {
            // SAFETY: as the caller promises.
            let stage = unsafe { pipeline.consumer_wait() };
            let mut first = 0;
            while first < panels && column + panels_n(first) < slice.end {
                let product = Product { column, first, panels, slice };
                // SAFETY: the step has landed and is left alone until it is released.
                unsafe { product.run(&h, order, &stage, p, &out, position) };
                first += C::SHAPE.product_panels();
            }
            // SAFETY: its products are done, and its old values read.
            unsafe { pipeline.consumer_release() };
            column += panels_n(panels);
        }
        // SAFETY: as the caller promises.
        drop_slice::<C>(&mut h, rank_shift(unsafe { kept_work() }.tile.rank));
        slices.next += 1;
    }
}

/// What the kept work tile writes of a slice, and where this thread's rows of it are.
struct Part {
    slice: Slice,
    out: OutRows,
}

impl Part {
    /// That of a slice. Clears the rows of pairs that have no row of x, where they are to be overwritten.
    ///
    /// # Safety
    /// The work tile must be kept, one of `p`'s with that slice.
    #[inline(always)]
    unsafe fn new<C: Config>(p: &PrefillParams, number: u32, position: &Position) -> Self {
        // SAFETY: as the caller promises.
        let (work, pairs) = unsafe { (kept_work(), kept_pairs()) };
        // SAFETY: as the caller promises.
        let slice = unsafe { work.slice(p, number) };
        let is_active = work.tile.rank > 0;
        let first = p.weights.first_column(number) + position.chunk * CHUNK;
        if p.rows.may_clear(p.accumulate) {
            // SAFETY: as the caller promises.
            unsafe { OutRows::new::<C>(p, pairs, false, false, first) }.clear(&slice, position);
        }
        // SAFETY: as the caller promises.
        let mut out = unsafe { OutRows::new::<C>(p, pairs, true, is_active, first) };
        if let Some(scaling) = slice.scaling {
            out.weight = out.weight.map(|weight| weight * scaling);
        }
        Part { slice, out }
    }
}

/// One product of a step: the panels that its sums have registers for.
struct Product {
    /// The first column of the step.
    column: u32,
    /// The first panel.
    first: u32,
    /// Panels of the step.
    panels: u32,
    /// The slice.
    slice: Slice,
}

impl Product {
    /// Multiplies, adds the old values, and stores.
    ///
    /// # Safety
    /// The stage must be full; the whole consumer must come here, and the other as often.
    #[inline(always)]
    #[track_caller]
    unsafe fn run<C: Config>(
        &self,
        h: &H,
        order: &mut PingPong<C>,
        stage: &Stage<C>,
        p: &PrefillParams,
        out: &OutRows,
        position: &Position,
    ) {
        let mut delta = Delta::zero();
        // SAFETY: as the caller promises; `b` is loaded up to the end of the sixteen that hold the last rank.
        unsafe {
            order.wait();
            wgmma::fence();
            self.multiply(&mut delta, h, stage);
            wgmma::commit();
            order.arrive();
        }
        let old = |i: usize| match self.place::<C>(i) {
            // SAFETY: where they are added to, old values were loaded for every row that is stored.
            Some((panel, at)) => unsafe { out.old(p, self.slice.end, stage.row_panel(panel), at, position) },
            None => Old::default(),
        };
        // The first panel's while the products run.
        let first_old = old(0);
        delta.wait::<0>();
        unroll::<PRODUCT_PANELS>(|i| {
            if let Some((_, at)) = self.place::<C>(i) {
                let mut own = [0.0; PANEL_SUMS];
                unroll::<16>(|j| {
                    own[2 * j] = delta[PANEL_SUMS * i + 2 * j];
                    own[2 * j + 1] = delta[PANEL_SUMS * i + 2 * j + 1];
                });
                let old = if i == 0 { first_old } else { old(i) };
                // SAFETY: the rows are p's.
                unsafe { out.add::<C::Element>(self.slice.end, &own, old, at, position.chunk) };
            }
        });
    }

    /// Panel `i` of the product, if it has columns: its number in the step, and its first column.
    #[inline(always)]
    fn place<C: Config>(&self, i: usize) -> Option<(u32, u32)> {
        let panel = self.first + i as u32;
        let at = self.column + panels_n(panel);
        ((i as u32) < C::SHAPE.product_panels() && panel < self.panels && at < self.slice.end)
            .then_some((panel, at))
    }

    /// Adds h · `b`ᵀ of the ranks of a slice, whose fragments are the first of `h`.
    ///
    /// # Safety
    /// As for [`Sums::multiply_registers`].
    #[inline(always)]
    #[track_caller]
    unsafe fn multiply<C: Config>(&self, delta: &mut Delta, h: &H, stage: &Stage<C>) {
        const STEPS: usize = (TileShape::DEPTH / PRODUCT_K) as usize;
        macro_rules! multiply {
            ($delta:ident) => {
                multiply!($delta, 0);
                multiply!($delta, 1);
                multiply!($delta, 2);
                multiply!($delta, 3);
            };
            ($delta:ident, $group:literal) => {
                let ranks = self.slice.rank.saturating_sub($group * TileShape::DEPTH);
                let b = stage.b_panel(self.panels, $group);
                let b = Matrix::swizzled(b.chunk(self.first * PANEL_COLUMNS, 0));
                // All at once, or as many as there are: a condition ahead of each takes as long as the
                // product.
                if ranks > (STEPS as u32 - 1) * PRODUCT_K {
                    unroll::<STEPS>(|k| {
                        if $group * STEPS + k < C::FRAGMENTS {
                            let h = h[$group * STEPS + k];
                            // SAFETY: as the caller promises.
                            unsafe { $delta.multiply_registers::<C::Element>(h, b.step(k as u32)) };
                        }
                    });
                } else {
                    unroll::<{ STEPS - 1 }>(|k| {
                        if $group * STEPS + k < C::FRAGMENTS && k as u32 * PRODUCT_K < ranks {
                            let h = h[$group * STEPS + k];
                            // SAFETY: as the caller promises.
                            unsafe { $delta.multiply_registers::<C::Element>(h, b.step(k as u32)) };
                        }
                    });
                }
            };
        }
        if C::SHAPE.product_panels() > 1 && self.panels > 1 {
            multiply!(delta);
        } else if let Some(delta) = delta.first_chunk_mut::<PANEL_SUMS>() {
            multiply!(delta);
        }
    }
}

/// This thread's two rows of its warpgroup's pairs: where each begins in `out`, at its column of a slice, and
/// its weight. A row that is not there is null.
struct OutRows {
    start: [Global<u16>; 2],
    weight: [f32; 2],
}

impl OutRows {
    /// Those of pairs that have a row of x, or of those that have none, as is `wanted`.
    ///
    /// # Safety
    /// The pairs must be those of a tile of `p`, of rank 0 or not as `is_active` says.
    #[inline(always)]
    unsafe fn new<C: Config>(
        p: &PrefillParams,
        pairs: [u32; 2],
        wanted: bool,
        is_active: bool,
        first_column: u32,
    ) -> Self {
        let mut out = OutRows { start: [Global::NULL; 2], weight: [1.0; 2] };
        // An inactive pair's weight may be anything; its zeros stay zeros.
        if !p.topk_weights.is_null() && is_active {
            // SAFETY: pairs are below P.
            out.weight = pairs.map(|pair| unsafe { p.topk_weights.at(pair).load_or(1.0, pair != NO_PAIR) });
        }
        let mut rows = pairs;
        // SAFETY: as above.
        unsafe { p.rows.pairs_to_out(&mut rows, wanted) };
        unroll::<2>(|half| {
            if rows[half] != NO_PAIR {
                let start = C::Index::from_u32(rows[half]).times(C::Index::from_u64(p.out_stride));
                out.start[half] = p.out.at(start.plus(C::Index::from_u32(first_column)));
            }
        });
        out
    }

    /// Whether row `half` is there, and `column` before the `end` of those to be written.
    #[inline(always)]
    fn has(&self, end: u32, half: usize, column: u32) -> bool {
        !self.start[half].is_null() && column < end
    }

    /// Stores zeros in a work tile's columns of a slice.
    #[inline(always)]
    fn clear(&self, slice: &Slice, position: &Position) {
        let mut column = slice.first;
        while column < slice.end {
            unroll::<2>(|half| {
                let wanted = self.has(slice.end, half, column + position.chunk * CHUNK);
                // SAFETY: columns come in eights, so all of them are inside the row.
                unsafe { self.start[half].at(column).store16_if([0; 4], wanted) };
            });
            column += 4 * CHUNK;
        }
    }

    /// These rows' old values of the columns of panel `old`, the first of which is `first`, before `end`.
    ///
    /// # Safety
    /// If `p.accumulate`, the panel must hold the old values.
    #[inline(always)]
    #[track_caller]
    unsafe fn old(&self, p: &PrefillParams, end: u32, old: Panel, first: u32, position: &Position) -> Old {
        let mut values = [[[0; 4]; 2]; 2];
        unroll::<2>(|group| {
            unroll::<2>(|half| {
                let chunk = 4 * group as u32 + position.chunk;
                let wanted = p.accumulate != 0 && self.has(end, half, first + chunk * CHUNK);
                // SAFETY: as the caller promises.
                values[group][half] =
                    unsafe { old.chunk(position.row + 8 * half as u32, chunk).load16_if(wanted) };
            });
        });
        values
    }

    /// Adds a product's columns, the first of which is `first`, to these rows' old values, and stores those
    /// before `end`.
    ///
    /// # Safety
    /// The rows must be of `p`.
    #[inline(always)]
    #[track_caller]
    unsafe fn add<E: Element>(
        &self,
        end: u32,
        delta: &[f32; PANEL_SUMS],
        old: Old,
        first: u32,
        own_chunk: u32,
    ) {
        unroll::<2>(|group| {
            unroll::<2>(|half| {
                let at = first + 32 * group as u32;
                let mut packed = [0u32; 4];
                unroll::<4>(|i| {
                    // Eight neighbouring columns are two each of four n8 tiles (see `panel`).
                    let place = 4 * (4 * group + i) + 2 * half;
                    let [low, high] = E::unpack(old[group][half][i]);
                    let weight = self.weight[half];
                    packed[i] = E::pack(delta[place] * weight + low, delta[place + 1] * weight + high);
                });
                let wanted = self.has(end, half, at + own_chunk * CHUNK);
                // SAFETY: columns come in eights, so all of them are inside the row.
                unsafe { self.start[half].at(at).store16_if(packed, wanted) };
            });
        });
    }
}
