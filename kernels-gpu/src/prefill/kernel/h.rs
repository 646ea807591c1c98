//! h between the two products, in a consumer's registers: 16-bit fragments, as the second product takes them.

use super::Consumer;
use super::steps::{MAX_FRAGMENTS, PRODUCT_K, each_fragment};
use super::work_tile::Pass;
use crate::arch::mma::Element;
use crate::arch::thread;
use crate::memory::{Global, Index};
use crate::params::{NO_PAIR, PrefillParams, Tile};
use crate::prefill::config::{Accumulators, Config};
use crate::tile::panel::CHUNK;
use crate::tile::unroll;

/// A thread's registers of each fragment of h.
pub(super) type H = [[u32; 4]; MAX_FRAGMENTS];

/// The pairs of this thread's two rows, `row` and eight further on, among the first `rows` of the tile;
/// [`NO_PAIR`] past them.
///
/// # Safety
/// The tile must be one of `p`'s, and have so many.
#[inline(always)]
pub(super) unsafe fn own_pairs(p: &PrefillParams, tile: &Tile, rows: u32, row: u32) -> [u32; 2] {
    let mut pairs = [NO_PAIR; 2];
    unroll::<2>(|half| {
        let row = row + 8 * half as u32;
        if row < rows {
            // SAFETY: `first` + `rows` pairs are in the list.
            pairs[half] = unsafe { p.pairs.at(tile.first + row).load() };
        }
    });
    pairs
}

/// The sums of the first product, rounded: of D of 16 columns they are A of 16 ranks (see
/// [`crate::arch::wgmma`]).
#[inline(always)]
pub(super) fn from_sums<C: Config>(sums: &C::Accumulators) -> H {
    let mut h = [[0; 4]; MAX_FRAGMENTS];
    each_fragment::<C>(|fragment| {
        unroll::<4>(|i| {
            let at = 8 * fragment + 2 * i;
            h[fragment][i] = C::Element::pack(sums.sum(at), sums.sum(at + 1));
        });
    });
    h
}

/// Reads h of an earlier call, its first `columns` columns, from the next stage.
///
/// # Safety
/// The barriers must be ready; the whole consumer must come here.
#[inline(always)]
#[track_caller]
pub(super) unsafe fn read_h<C: Config>(consumer: &mut Consumer<C>, h: &mut H, columns: u32) {
    // SAFETY: as the caller promises.
    let stage = unsafe { consumer.pipeline.consumer_wait() };
    each_fragment::<C>(|fragment| {
        let panel = stage.row_panel(fragment as u32 / 4);
        if PRODUCT_K * (fragment as u32) < columns {
            // SAFETY: the step has landed; it has all columns of the pass.
            h[fragment] = unsafe { panel.rows_fragment(consumer.position.warp_row, fragment as u32 % 4) };
        }
    });
    // SAFETY: it was read.
    unsafe { consumer.pipeline.consumer_release() };
}

/// Moves the fragments of the next slice, each of `1 << shift` columns, to the front.
#[inline(always)]
pub(super) fn drop_slice<C: Config>(h: &mut H, shift: u32) {
    macro_rules! shift {
        ($fragments:literal, $log:literal) => {
            if shift == $log {
                each_fragment::<C>(|fragment| {
                    if fragment + $fragments < C::FRAGMENTS {
                        h[fragment] = h[fragment + $fragments];
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

/// Stores a pass's h, of `1 << shift` columns a slice, and zeros above them.
///
/// # Safety
/// `p.h` must be as its field says, and the pairs those of a tile, the pass one of it.
#[inline(always)]
pub(super) unsafe fn store_h<C: Config>(p: &PrefillParams, h: &H, pairs: [u32; 2], pass: Pass, shift: u32) {
    let Pass { first, end } = pass;
    let max_rank = p.weights.max_rank;
    let own_chunk = thread::index_anew() % 4;
    let rank_room = 1 << shift;
    let index = C::Index::from_u32;
    let rows = pairs.map(|pair| {
        let pair = if pair == NO_PAIR { 0 } else { pair };
        let row = index(first).times(index(p.pair_count)).plus(index(pair));
        p.h.at(row.times(index(max_rank)))
    });
    // SAFETY: pairs are below P.
    let is_active = pairs.map(|pair| pair != NO_PAIR && unsafe { p.rows.has_x(pair) });
    let slice_stride = index(p.pair_count).times(index(max_rank)).wide();

    // The fragment's slice, and this thread's first rank of it.
    let (mut slice, mut rank) = (first, 2 * own_chunk);
    let mut places = rows.map(|row| row.at(2 * own_chunk));
    each_fragment::<C>(|fragment| {
        unroll::<2>(|half| {
            unroll::<2>(|i| {
                // Registers 2i and 2i + 1 are two columns of either row (see `wgmma`).
                let further = 8 * i as u32;
                if slice < end && pairs[half] != NO_PAIR && rank + further < max_rank {
                    let place = Global::<u32>::new(places[half].at(further).address());
                    // SAFETY: R is even, so both ranks are inside the row.
                    unsafe { place.store(if is_active[half] { h[fragment][2 * i + half] } else { 0 }) };
                }
            });
            places[half] = places[half].at(PRODUCT_K);
        });
        rank += PRODUCT_K;
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
            while pairs[half] != NO_PAIR && rank < max_rank {
                // SAFETY: R is a multiple of eight, so all of them are inside the row.
                unsafe { next[half].at(rank).store16([0; 4]) };
                rank += 4 * CHUNK;
            }
            next[half] = next[half].at(slice_stride);
        });
    }
}
