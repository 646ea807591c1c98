//! The producers' steps: where a work item's operands are, and the copies of a stage.

use super::barriers::a_started;
use super::context::Context;
use super::pipeline::{Pipeline, expect_bytes};
use super::work::log2;
use crate::arch::mbarrier::Mbarrier;
use crate::arch::shared::Shared;
use crate::arch::{async_copy, bulk, thread, warp};
use crate::decode::config::Config;
use crate::decode::{B_STAGE, GROUP, LANES, old_row_bytes, row_bytes};
use crate::memory::{Global, Index};
use crate::params::Tile;

/// Elements of b that a lane copies at a time, where ranks are not used whole.
const PIECE: u32 = 8;

/// Says that the B loader may start.
#[inline(always)]
pub(super) fn say_a_started() {
    if thread::lane() == 0 {
        // SAFETY: the barrier is initialised.
        unsafe { a_started().arrive() };
    }
}

/// Loads a stage's a: `ranks` rows, `in_dim` apart, of which `length` elements from `source` on.
///
/// # Safety
/// The whole warp must come here. The rows must be inside the tensor, and elements come in eights.
#[inline(always)]
pub(super) unsafe fn load_a_stage(
    pipeline: &mut Pipeline,
    mut source: Global<u16>,
    in_dim: u32,
    ranks: u32,
    length: u32,
) {
    // SAFETY: as the caller promises; as many bytes are expected as are copied.
    unsafe {
        let (mut target, full) = pipeline.acquire();
        expect_bytes(full, 2 * length * ranks);
        if warp::elect() {
            let end = target.offset(ranks * row_bytes(length));
            while target != end {
                bulk::copy(target, source, 2 * length, full);
                source = source.at(in_dim);
                target = target.offset(row_bytes(length));
            }
        }
    }
}

/// Where this lane's row of x begins, if the tile has ranks and so many pairs.
///
/// # Safety
/// The segments must be ready.
#[inline(always)]
pub(super) unsafe fn x_row<C: Config>(context: &Context<'_>, tile: &Tile) -> Global<u16> {
    let (p, row) = (context.p, thread::lane());
    if tile.rank == 0 || row >= tile.rows {
        return Global::NULL;
    }
    // SAFETY: the tile has so many pairs.
    let pair = unsafe { context.pair(tile, row) };
    // SAFETY: it is one of P.
    let row = if C::GENERAL { unsafe { p.rows.x(pair) } } else { p.rows.x_over.quotient(pair) };
    p.x.at(C::Index::from_u32(row).times(C::Index::from_u64(p.x_stride)))
}

/// Loads a stage's x: `rows` rows of `length` elements, this lane's from `source` on.
///
/// # Safety
/// As for [`load_a_stage`].
#[inline(always)]
pub(super) unsafe fn load_x_stage(pipeline: &mut Pipeline, source: Global<u16>, rows: u32, length: u32) {
    let row = thread::lane();
    // SAFETY: as the caller promises; as many bytes are expected as are copied.
    unsafe {
        let (stage, full) = pipeline.acquire();
        expect_bytes(full, 2 * length * rows);
        if row < rows {
            bulk::copy(stage.offset((GROUP + row) * row_bytes(length)), source, 2 * length, full);
        }
    }
}

/// Loads a stage's b: `count` columns from `source` on, `max_rank` apart, of which `ranks` ranks. Ranks that
/// are used whole are one copy. Otherwise each lane copies [`PIECE`] of a column's ranks at a time: a bulk
/// copy takes as long for the few ranks of a column as for many.
///
/// And the old values of these columns: of this lane's row from `old` on, unless that is null.
///
/// `stored`: whether stages were filled without the copy engine.
///
/// # Safety
/// As for [`load_a_stage`].
#[inline(always)]
pub(super) unsafe fn load_b_stage(
    pipeline: &mut Pipeline,
    stored: &mut bool,
    (source, max_rank): (Global<u16>, u32),
    old: Option<Global<u16>>,
    ranks: u32,
    count: u32,
) {
    let (lane, is_whole) = (thread::lane(), ranks == max_rank);
    let b_bytes = if is_whole { 2 * count * max_rank } else { 0 };
    // SAFETY: as the caller promises; as many bytes are expected as are copied.
    unsafe {
        let (stage, full) = pipeline.acquire();
        if !is_whole {
            load_pieces(stage, full, source, max_rank, ranks, count);
            *stored = true;
        } else if *stored {
            // The copy engine need not see what other copies have left here.
            bulk::fence();
        }
        expect_bytes(full, 2 * count * warp::ballot(old.is_some()).count_ones() + b_bytes);
        if is_whole && lane == 0 {
            full.arrive_for(LANES);
            bulk::copy(stage, source, b_bytes, full);
        }
        if let Some(old) = old {
            bulk::copy(stage.offset(B_STAGE + lane * old_row_bytes(count)), old, 2 * count, full);
        }
    }
}

/// Copies `ranks` ranks of each of `count` columns, [`PIECE`] a lane at a time, and arrives at `full` for
/// each lane.
///
/// # Safety
/// As for [`load_b_stage`].
#[inline(always)]
unsafe fn load_pieces(
    stage: Shared,
    full: Mbarrier,
    source: Global<u16>,
    max_rank: u32,
    ranks: u32,
    count: u32,
) {
    // A power of two of lanes takes a column, so that no lane divides.
    let shift = log2((ranks / PIECE).next_power_of_two());
    let mut piece = thread::lane();
    // SAFETY: as the caller promises.
    unsafe {
        while piece < count << shift {
            let (column, first) = (piece >> shift, PIECE * (piece & ((1 << shift) - 1)));
            if first < ranks {
                let target = stage.offset(2 * (column * ranks + first));
                async_copy::copy16_whole::<_, { async_copy::ALONE }>(
                    target,
                    source.at(column * max_rank + first),
                );
            }
            piece += LANES;
        }
        full.arrive_after_copies();
    }
}
