//! A warpgroup that computes: 64 pairs of every tile, both products.

use super::exchange::Exchange;
use super::ring::{Precedence, Ring};
use super::steps::{K, MOST_PANELS, PANEL_COLUMNS, depth, expand_panels, rank_shift, shrink_panels, width};
use super::turns::{DepthShares, Pass, Turn, Turns};
use crate::arch::mma::Element;
use crate::arch::shared::Shared;
use crate::arch::thread;
use crate::arch::wgmma::{self, Matrix, Sums};
use crate::memory::{Global, Index};
use crate::params::{PrefillParams, Tile, products};
use crate::prefill::{PRODUCT_PANELS, WARP_ROWS};
use crate::tile::panel::{CHUNK, Panel};
use crate::tile::{TileShape, unroll};

/// Old values of a thread's columns of a panel: of either 32 columns, of its two rows.
type Old = [[[u32; 4]; 2]; 2];

/// In place of the pair of a row that is not there.
const NO_PAIR: u32 = u32::MAX;

/// A thread's sums of a panel of columns of `out`.
const PANEL_SUMS: usize = PANEL_COLUMNS as usize / 2;

/// Adds a step of shrink to the first `columns` columns of the sums of h, of which `more` are those from 128 on.
///
/// # Safety
/// As for [`Sums::multiply`], of the stage; `columns` must be those of a product.
#[inline(always)]
#[track_caller]
unsafe fn multiply_step<
    E: Element,
    const SUMS: usize,
    const MORE: usize,
    const BLOCKS: usize,
    const SWEEPS: usize,
>(
    sums: &mut [f32; SUMS],
    more: &mut [f32; MORE],
    stage: Shared,
    columns: u32,
    warpgroup_row: u32,
) {
    macro_rules! multiply {
        ($sums:ident $count:literal of $columns:literal, from $first:literal) => {
            if let Some(sums) = $sums.first_chunk_mut::<$count>() {
                let panels = shrink_panels(Ring::<BLOCKS, SWEEPS>::SHAPE, $columns);
                unroll::<MOST_PANELS>(|panel| {
                    if (panel as u32) < panels {
                        let x =
                            Ring::<BLOCKS, SWEEPS>::row_panel(stage, panel as u32).chunk(warpgroup_row, 0);
                        let a = Ring::<BLOCKS, SWEEPS>::a_panel(stage, panels, $columns, panel as u32)
                            .chunk($first, 0);
                        let (x, a) = (Matrix::swizzled(x), Matrix::swizzled(a));
                        unroll::<{ (TileShape::DEPTH / K) as usize }>(|k| {
                            // SAFETY: as the caller promises.
                            unsafe { sums.multiply::<E>(x.step(k as u32), a.step(k as u32)) };
                        });
                    }
                });
            }
        };
    }
    match columns.min(2 * (SUMS + MORE) as u32) {
        0..=32 => multiply!(sums 16 of 32, from 0),
        33..=64 => multiply!(sums 32 of 64, from 0),
        65..=128 => multiply!(sums 64 of 128, from 0),
        _ => {
            multiply!(sums 64 of 256, from 0);
            multiply!(more 64 of 256, from 128);
        }
    }
}

/// Adds h · `b`ᵀ of the ranks of a slice, whose fragments are the first of `h`, to the columns of
/// [`Shape::product_panels`](crate::prefill::Shape::product_panels) of a stage's `panels` panels, or of the only one, from panel `first` on.
///
/// # Safety
/// As for [`Sums::multiply_registers`].
#[inline(always)]
#[track_caller]
unsafe fn multiply_ranks<E: Element, const BLOCKS: usize, const SWEEPS: usize>(
    delta: &mut [f32; PRODUCT_PANELS * PANEL_SUMS],
    h: &[[u32; 4]; BLOCKS],
    stage: Shared,
    panels: u32,
    first: u32,
    rank: u32,
) {
    const STEPS: usize = (TileShape::DEPTH / K) as usize;
    macro_rules! multiply {
        ($delta:ident) => {
            multiply!($delta, 0);
            multiply!($delta, 1);
            multiply!($delta, 2);
            multiply!($delta, 3);
        };
        ($delta:ident, $group:literal) => {
            let ranks = rank.saturating_sub($group * TileShape::DEPTH);
            let b = Ring::<BLOCKS, SWEEPS>::b_panel(stage, panels, $group);
            let b = Matrix::swizzled(b.chunk(first * PANEL_COLUMNS, 0));
            // All at once, or as many as there are: a condition ahead of each takes as long as the product.
            if ranks > (STEPS as u32 - 1) * K {
                unroll::<STEPS>(|k| {
                    if let Some(h) = h.get($group * STEPS + k) {
                        // SAFETY: as the caller promises.
                        unsafe { $delta.multiply_registers::<E>(*h, b.step(k as u32)) };
                    }
                });
            } else {
                unroll::<{ STEPS - 1 }>(|k| {
                    if let Some(h) = h.get($group * STEPS + k)
                        && k as u32 * K < ranks
                    {
                        // SAFETY: as the caller promises.
                        unsafe { $delta.multiply_registers::<E>(*h, b.step(k as u32)) };
                    }
                });
            }
        };
    }
    if Ring::<BLOCKS, SWEEPS>::SHAPE.product_panels() > 1 && panels > 1 {
        multiply!(delta);
    } else if let Some(delta) = delta.first_chunk_mut::<PANEL_SUMS>() {
        multiply!(delta);
    }
}

/// The pairs of this thread's two rows, `own_row` and eight further on, among the first `rows` of the tile; [`NO_PAIR`] past them.
///
/// # Safety
/// The tile must be one of `p`'s, and have so many.
#[inline(always)]
unsafe fn own_pairs(p: &PrefillParams, tile: &Tile, rows: u32, own_row: u32) -> [u32; 2] {
    let mut pairs = [NO_PAIR; 2];
    unroll::<2>(|half| {
        let row = own_row + 8 * half as u32;
        if row < rows {
            // SAFETY: `first` + `rows` pairs are in the list.
            pairs[half] = unsafe { p.pairs.at(tile.first + row).load() };
        }
    });
    pairs
}

/// This thread's two rows of its warpgroup's pairs: where each begins in `out`, at its column of the first
/// slice, and its weight. A row past the tile's end is null.
struct OutRows {
    start: [Global<u16>; 2],
    weight: [f32; 2],
}

impl OutRows {
    /// # Safety
    /// The pairs must be those of a tile of `p`, of rank 0 or not as `is_active` says.
    #[inline(always)]
    unsafe fn new<I: Index>(p: &PrefillParams, pairs: [u32; 2], is_active: bool, own_column: u32) -> Self {
        let mut rows = OutRows { start: [Global::NULL; 2], weight: [1.0; 2] };
        unroll::<2>(|half| {
            let pair = pairs[half];
            if pair != NO_PAIR {
                let start = I::from_u32(pair).times(I::from_u64(p.out_stride));
                rows.start[half] = p.out.at(start.plus(I::from_u32(own_column)));
                // An inactive pair's weight may be anything; its zeros stay zeros.
                if !p.topk_weights.is_null() && is_active {
                    // SAFETY: pairs are below P.
                    rows.weight[half] = unsafe { p.topk_weights.at(pair).load() };
                }
            }
        });
        rows
    }

    /// Whether row `half` is there, and 16 bytes of its columns from `column` on.
    #[inline(always)]
    fn has(&self, p: &PrefillParams, half: usize, column: u32) -> bool {
        !self.start[half].is_null() && column < p.out_dim
    }

    /// These rows' old values of the columns of panel `old`, the first of which is `first`.
    ///
    /// # Safety
    /// If `p.accumulate`, the panel must hold the old values.
    #[inline(always)]
    #[track_caller]
    unsafe fn old(&self, p: &PrefillParams, old: Panel, first: u32, own_row: u32, own_chunk: u32) -> Old {
        let mut values = [[[0; 4]; 2]; 2];
        unroll::<2>(|group| {
            unroll::<2>(|half| {
                let chunk = 4 * group as u32 + own_chunk;
                let wanted = p.accumulate != 0 && self.has(p, half, first + chunk * CHUNK);
                // SAFETY: as the caller promises.
                values[group][half] =
                    unsafe { old.chunk(own_row + 8 * half as u32, chunk).load16_if(wanted) };
            });
        });
        values
    }

    /// Adds a product's columns, the first of which is `first`, to these rows' old values, and stores them.
    ///
    /// # Safety
    /// The rows must be of `p`.
    #[inline(always)]
    #[track_caller]
    unsafe fn add<E: Element>(
        &self,
        p: &PrefillParams,
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
                let wanted = self.has(p, half, at + own_chunk * CHUNK);
                // SAFETY: columns come in eights, so all of them are inside the row.
                unsafe { self.start[half].at(at).store16_if(packed, wanted) };
            });
        });
    }

    /// Goes on to the next slice.
    #[inline(always)]
    fn next_slice(&mut self, p: &PrefillParams) {
        unroll::<2>(|half| {
            if !self.start[half].is_null() {
                self.start[half] = self.start[half].at(p.out_dim);
            }
        });
    }
}

/// Stores a pass's h, slices `slices[0]` .. `slices[1]` of `1 << shift` columns each, and zeros above what it has of each.
///
/// # Safety
/// `p.h` must be as its field says, and the pairs those of a tile.
#[inline(always)]
unsafe fn store_h<I: Index, const BLOCKS: usize>(
    p: &PrefillParams,
    h: &[[u32; 4]; BLOCKS],
    pairs: [u32; 2],
    slices: [u32; 2],
    shift: u32,
) {
    let [first, end] = slices;
    let own_chunk = thread::index_anew() % 4;
    let rank_room = 1 << shift;
    let rows = pairs.map(|pair| {
        let pair = if pair == NO_PAIR { 0 } else { pair };
        let row = I::from_u32(first).times(I::from_u32(p.pair_count)).plus(I::from_u32(pair));
        p.h.at(row.times(I::from_u32(p.max_rank)))
    });
    let slice_stride = I::from_u32(p.pair_count).times(I::from_u32(p.max_rank)).wide();

    // The fragment's slice, and this thread's first rank of it.
    let (mut slice, mut rank) = (first, 2 * own_chunk);
    let mut places = rows.map(|row| row.at(2 * own_chunk));
    unroll::<BLOCKS>(|block| {
        unroll::<2>(|half| {
            unroll::<2>(|i| {
                // Registers 2i and 2i + 1 are two columns of either row (see [`wgmma`]).
                let further = 8 * i as u32;
                if slice < end && pairs[half] != NO_PAIR && rank + further < p.max_rank {
                    let place = Global::<u32>::new(places[half].at(further).address());
                    // SAFETY: R is even, so both ranks are inside the row.
                    unsafe { place.store(h[block][2 * i + half]) };
                }
            });
            places[half] = places[half].at(K);
        });
        rank += K;
        if rank >= rank_room {
            (slice, rank) = (slice + 1, rank - rank_room);
            places = places.map(|place| {
                let next = place.at(slice_stride).address();
                Global::new(next - (rank_room * 2) as u64)
            });
        }
    });

    let mut next = rows;
    for _ in first..end {
        unroll::<2>(|half| {
            let mut rank = rank_room + CHUNK * own_chunk;
            while pairs[half] != NO_PAIR && rank < p.max_rank {
                // SAFETY: R is a multiple of eight, so all of them are inside the row.
                unsafe { next[half].at(rank).store16([0; 4]) };
                rank += 4 * CHUNK;
            }
            next[half] = next[half].at(slice_stride);
        });
    }
}

/// Computes for this warpgroup's pairs of the block's tiles. `SUMS`, `MORE`, `BLOCKS`, `SWEEPS`: see [`super::prefill`].
///
/// # Safety
/// Every tensor of `p` must be as its field says; the whole warpgroup must come here, the ring's barriers be ready.
#[inline(always)]
pub(super) unsafe fn compute<
    E: Element,
    I: Index,
    const SUMS: usize,
    const MORE: usize,
    const BLOCKS: usize,
    const SWEEPS: usize,
>(
    p: &PrefillParams,
    mut turns: Turns,
) where
    [f32; SUMS]: Sums,
{
    let mut ring = Ring::<BLOCKS, SWEEPS>::new(p.stages);
    let warpgroup = thread::index() / wgmma::THREADS;
    let mut precedence = Precedence::new(warpgroup);
    let is_one_of_two = Ring::<BLOCKS, SWEEPS>::SHAPE.consumers() == 2;
    let warpgroup_row = warpgroup * 64;
    let warp_row = warpgroup_row + thread::warp() % 4 * WARP_ROWS;
    let own_row = warp_row + thread::lane() / 4;
    let own_chunk = thread::lane() % 4;
    loop {
        // SAFETY: as the caller promises.
        let turn = unsafe { turns.take::<false>(p) };
        let Turn { tile, pass, .. } = turn;
        if tile.rows == 0 {
            break;
        }

        let shift = rank_shift(tile.rank);
        let Pass { first, end } = pass;
        let columns = pass.columns(tile.rank);
        // A turn that does not expand goes on past the last slice, and not on to the next turn: of the products, ptxas then knows that all warps come to them.
        let mut slice = if turn.does & products::EXPAND != 0 { first } else { end };
        let exchanges = MORE == 0 && p.split_k.count > 0 && tile.rank > 0;

        // Shrink.
        let (mut sums, mut more) = (<[f32; SUMS]>::zero(), [0.0; MORE]);
        if let Some(more) = more.first_chunk_mut::<64>() {
            *more = Sums::zero();
        }
        // SAFETY: as the caller promises.
        let (begin, end_of_k) = unsafe { turn.depth(p) };
        let mut place = if turn.shrinks() { begin } else { end_of_k };
        while place < end_of_k {
            // SAFETY: the ring is ready, and this is a consumer.
            let stage = unsafe { ring.landed() };
            if is_one_of_two {
                // SAFETY: both take the same steps.
                unsafe { precedence.wait() };
            }
            wgmma::fence();
            // SAFETY: the step has landed, was shown, and is left alone until the warpgroup leaves it.
            unsafe {
                multiply_step::<E, SUMS, MORE, BLOCKS, SWEEPS>(
                    &mut sums,
                    &mut more,
                    stage,
                    columns,
                    warpgroup_row,
                );
            }
            wgmma::commit();
            if is_one_of_two {
                // SAFETY: as above.
                unsafe { precedence.pass() };
            }
            sums.wait::<0>();
            if let Some(more) = more.first_chunk_mut::<64>() {
                more.wait::<0>();
            }
            // SAFETY: its products are done.
            unsafe { ring.leave() };
            place += depth(shrink_panels(Ring::<BLOCKS, SWEEPS>::SHAPE, columns));
        }
        if exchanges && slice == end {
            let exchange = Exchange::new::<BLOCKS, SWEEPS>(p, &turn);
            // SAFETY: as the caller promises.
            let shares = unsafe { DepthShares::new(p) }.count(p);
            // SAFETY: what p has for the exchange is as its fields say.
            unsafe {
                if shares > 1 {
                    exchange.leave_sums::<SUMS, BLOCKS>(&sums, turn.share, shares, columns);
                    exchange.add_up::<E, BLOCKS>(turn.share, shares, columns);
                } else {
                    exchange.leave_h::<E, SUMS, BLOCKS>(&sums, columns);
                }
            }
        }
        // A share of K needs none, and does not wait for any.
        let rows = if exchanges && slice == end { 0 } else { tile.rows };
        // SAFETY: the tile is one of p's.
        let pairs = unsafe { own_pairs(p, &tile, rows, own_row) };
        let mut h = [[0u32; 4]; BLOCKS];
        unroll::<BLOCKS>(|block| {
            unroll::<4>(|i| {
                let at = 8 * block + 2 * i;
                h[block][i] = if at < SUMS {
                    E::pack(sums[at], sums[at + 1])
                } else {
                    E::pack(more[at - SUMS], more[at - SUMS + 1])
                };
            });
        });

        if exchanges && slice < end {
            // SAFETY: as above.
            h = unsafe { Exchange::new::<BLOCKS, SWEEPS>(p, &turn).h::<BLOCKS>(columns) };
        } else if turn.takes_h(p) {
            // SAFETY: as for shrink.
            let stage = unsafe { ring.landed() };
            unroll::<BLOCKS>(|block| {
                let panel = Ring::<BLOCKS, SWEEPS>::row_panel(stage, block as u32 / 4);
                if K * (block as u32) < columns {
                    // SAFETY: the step has landed; it has all columns of the pass.
                    h[block] = unsafe { panel.rows_fragment(warp_row, block as u32 % 4) };
                }
            });
            // SAFETY: it was read.
            unsafe { ring.leave() };
        }
        if p.products == products::SHRINK {
            // SAFETY: the pairs are of one of p's tiles, and the slices the pass's.
            unsafe { store_h::<I, BLOCKS>(p, &h, pairs, [first, end], shift) };
        }

        // Expand.
        let panels = expand_panels(Ring::<BLOCKS, SWEEPS>::SHAPE, tile.rank);
        let product_panels = Ring::<BLOCKS, SWEEPS>::SHAPE.product_panels();
        let first = slice * p.out_dim + own_chunk * CHUNK;
        // SAFETY: the pairs are of one of p's tiles.
        let mut out = unsafe { OutRows::new::<I>(p, pairs, tile.rank > 0, first) };
        while slice < end {
            let (mut column, end_of_columns) = turn.columns(p);
            while column < end_of_columns {
                // SAFETY: as for shrink.
                let stage = unsafe { ring.landed() };
                let mut first = 0;
                while first < panels && column + width(first) < p.out_dim {
                    let mut delta = <[f32; PRODUCT_PANELS * PANEL_SUMS]>::zero();
                    if is_one_of_two {
                        // SAFETY: as for shrink.
                        unsafe { precedence.wait() };
                    }
                    wgmma::fence();
                    // SAFETY: as for shrink; `b` is filled up to the end of the sixteen that hold the last rank.
                    unsafe {
                        multiply_ranks::<E, BLOCKS, SWEEPS>(&mut delta, &h, stage, panels, first, tile.rank);
                    }
                    wgmma::commit();
                    if is_one_of_two {
                        // SAFETY: as for shrink.
                        unsafe { precedence.pass() };
                    }
                    let place = |i: usize| {
                        let panel = first + i as u32;
                        let at = column + width(panel);
                        ((i as u32) < product_panels && panel < panels && at < p.out_dim)
                            .then_some((panel, at))
                    };
                    let old = |i: usize| match place(i) {
                        Some((panel, at)) => {
                            let panel = Ring::<BLOCKS, SWEEPS>::row_panel(stage, panel);
                            // SAFETY: where they are added to, old values were copied for every row that is stored.
                            unsafe { out.old(p, panel, at, own_row, own_chunk) }
                        }
                        None => Old::default(),
                    };
                    // The first panel's while the products run.
                    let first_old = old(0);
                    delta.wait::<0>();
                    unroll::<PRODUCT_PANELS>(|i| {
                        if let Some((_, at)) = place(i) {
                            let mut own = [0.0; PANEL_SUMS];
                            unroll::<16>(|j| {
                                own[2 * j] = delta[PANEL_SUMS * i + 2 * j];
                                own[2 * j + 1] = delta[PANEL_SUMS * i + 2 * j + 1];
                            });
                            let old = if i == 0 { first_old } else { old(i) };
                            // SAFETY: the rows are p's.
                            unsafe { out.add::<E>(p, &own, old, at, own_chunk) };
                        }
                    });
                    first += product_panels;
                }
                // SAFETY: its products are done, and its old values read.
                unsafe { ring.leave() };
                column += width(panels);
            }
            out.next_slice(p);
            drop_slice(&mut h, shift);
            slice += 1;
        }
        if exchanges && turn.does & products::EXPAND != 0 {
            // SAFETY: as above.
            unsafe { Exchange::new::<BLOCKS, SWEEPS>(p, &turn).forget_h::<BLOCKS>(p) };
        }
    }
}

/// Moves the fragments of the next slice to the front.
#[inline(always)]
fn drop_slice<const BLOCKS: usize>(h: &mut [[u32; 4]; BLOCKS], shift: u32) {
    macro_rules! shift {
        ($blocks:literal, $log:literal) => {
            if shift == $log {
                unroll::<BLOCKS>(|block| {
                    if block + $blocks < BLOCKS {
                        h[block] = h[block + $blocks];
                    }
                });
            }
        };
    }
    shift!(1, 4);
    shift!(2, 5);
    shift!(4, 6);
    shift!(8, 7);
}
