//! What a consumer thread keeps of a work tile through its products: in shared memory, since the products
//! need the registers.

use super::h::own_pairs;
use super::work_tile::{Pass, Slices, WorkTile};
use crate::arch::shared::Shared;
use crate::arch::{thread, warp};
use crate::params::{PrefillParams, Tile};
use crate::prefill::{BARRIERS_BYTES, KEPT_BYTES};

/// The place of this thread, which no other reads or writes.
#[inline(always)]
fn place() -> Shared {
    Shared::base().offset(BARRIERS_BYTES + KEPT_BYTES * thread::index_anew())
}

/// Keeps what the second product needs of a work tile, and the pairs of this thread's two rows if it has a
/// second product.
///
/// # Safety
/// The tile must be one of `p`'s; `row` must be the thread's first.
#[inline(always)]
pub(super) unsafe fn keep(p: &PrefillParams, work: &WorkTile, row: u32) {
    let &WorkTile { tile, pass_number, products, split, .. } = work;
    let Slices { next, end } = work.slices_to_expand();
    // A split of K needs no pairs, and does not wait for any.
    let rows = if work.gives_h(p) { 0 } else { tile.rows };
    // SAFETY: as the caller promises; there is room for each thread.
    unsafe {
        let [one, other] = own_pairs(p, &tile, rows, row);
        place().store16([one, other, tile.rank, split]);
        place().offset(16).store16([next, end, pass_number, products]);
    }
}

/// The pairs of this thread's two rows.
///
/// # Safety
/// They must be kept.
#[inline(always)]
pub(super) unsafe fn kept_pairs() -> [u32; 2] {
    // SAFETY: as the caller promises.
    let [one, other, ..] = unsafe { place().load16() };
    [one, other]
}

/// The work tile, as far as it is needed after the first product: of the tile its rank alone.
///
/// All threads of a warp have the same. It is one thread's that they take, so that ptxas sees that a warp's
/// threads come to the products together.
///
/// # Safety
/// It must be kept; the whole warp must come here.
#[inline(always)]
#[track_caller]
pub(super) unsafe fn kept_work() -> WorkTile {
    // SAFETY: as the caller promises.
    let ([_, _, rank, split], [_, _, pass_number, products]) =
        unsafe { (place().load16(), place().offset(16).load16()) };
    let [rank, split, pass_number, products] =
        [rank, split, pass_number, products].map(|word| warp::shuffle(word, 0));
    WorkTile { tile: Tile { rank, ..Tile::EMPTY }, pass: Pass::NONE, pass_number, products, split }
}

/// Its slices that are to be written.
///
/// # Safety
/// As for [`kept_work`].
#[inline(always)]
#[track_caller]
pub(super) unsafe fn kept_slices() -> Slices {
    // SAFETY: as the caller promises.
    let [next, end, ..] = unsafe { place().offset(16).load16() };
    Slices { next: warp::shuffle(next, 0), end: warp::shuffle(end, 0) }
}
