//! The warps that fill the rings.

use super::barriers::{begun, listed, unit_count};
use super::ring::{Ring, announce};
use super::units::{Columns, Context, Shares, Unit, each_chunk, log2};
use crate::arch::{async_copy, bulk, thread, warp};
use crate::decode::{B_STAGE, GROUP, LANES, old_row_bytes, row_bytes};
use crate::memory::{Global, Index};
use crate::params::Tile;
use crate::tile::select_slice;

/// Elements of b that a lane copies at a time, where ranks are not used whole.
const PIECE: u32 = 8;

/// Number of the first row of the matrix of a or b, of `rows` rows, that a unit uses.
#[inline(always)]
fn first_row<I: Index>(tile: &Tile, experts: u32, rows: u32) -> I {
    tile.matrix::<I>(experts).times(I::from_u32(rows))
}

/// Fills the ring for shrink with a: of `first`, the cluster's first unit if it has one, before pairs are listed.
///
/// # Safety
/// As for [`decode`](super::decode); the whole warp must come here.
#[inline(always)]
pub(super) unsafe fn fill_a<I: Index>(
    context: &Context<'_>,
    mut shares: Shares,
    mut ring: Ring,
    rows: u32,
    first: Unit,
) {
    let p = context.p;
    let (mut filled, stages) = (0, ring.stages);
    // The copies of b may follow.
    let begin = || {
        if thread::lane() == 0 {
            // SAFETY: the barrier is initialised.
            unsafe { begun().arrive() };
        }
    };
    let mut unit = first;
    let mut next = context.first_unit();
    loop {
        let Unit { tile, slice } = unit;
        if tile.rows > 0 {
            shares.change(context, tile.rank);
            let matrix = first_row::<I>(&tile, p.a_experts, p.route.max_rank);
            let a = select_slice(p.a, slice);
            each_chunk(context, &shares, |group, at, length| {
                let ranks = (tile.rank - GROUP * group).min(GROUP);
                let row = matrix.plus(I::from_u32(GROUP * group));
                let mut source = a.at(row.times(I::from_u32(p.in_dim))).at(at);
                // SAFETY: the rows are inside the tensor, and elements come in eights; as many bytes are announced as
                // are copied.
                unsafe {
                    let (mut target, full) = ring.claim();
                    announce(full, 2 * length * ranks);
                    if warp::elect() {
                        let end = target.offset(ranks * row_bytes(length));
                        while target != end {
                            bulk::copy(target, source, 2 * length, full);
                            source = source.at(p.in_dim);
                            target = target.offset(row_bytes(length));
                        }
                    }
                }
                filled += 1;
                if filled == stages {
                    begin();
                }
            });
        }
        next += p.clusters;
        // SAFETY: the barrier is initialised; after it the number of units can be read, and each of the cluster's.
        unsafe {
            listed().wait(0);
            if next >= unit_count().load() {
                break;
            }
            unit = context.unit(next, rows);
        }
    }
    if filled < stages {
        begin();
    }
}

/// Fills the ring for shrink with x, a row a lane.
///
/// # Safety
/// As for [`fill_a`].
#[inline(always)]
pub(super) unsafe fn fill_x<I: Index, const ROWS: u32>(context: &Context<'_>, mut ring: Ring) {
    let mut shares = Shares::NONE;
    let (p, row) = (context.p, thread::lane());
    let unit = |Unit { tile, .. }: Unit| {
        shares.change(context, tile.rank);
        let mut x = Global::<u16>::NULL;
        if tile.rank > 0 && row < tile.rows {
            // SAFETY: the tile has so many pairs.
            let pair = unsafe { context.pair(&tile, row) };
            x = p.x.at(I::from_u32(p.x_row.quotient(pair)).times(I::from_u64(p.x_stride)));
        }
        each_chunk(context, &shares, |_, at, length| {
            // SAFETY: as in `fill_a`.
            unsafe {
                let (stage, full) = ring.claim();
                announce(full, 2 * length * tile.rows);
                if row < tile.rows {
                    bulk::copy(stage.offset((GROUP + row) * row_bytes(length)), x.at(at), 2 * length, full);
                }
            }
        });
    };
    // SAFETY: as the caller promises.
    unsafe { context.each_unit(ROWS, unit) };
}

/// Fills the ring for expand: the old values of `out`, a row a lane; and b. Where ranks are
/// used whole, all columns of b are one copy; otherwise each lane copies [`PIECE`] of a column's ranks at a time, since a
/// bulk copy takes as long for the few ranks of a column as for many.
///
/// # Safety
/// As for [`fill_a`].
#[inline(always)]
pub(super) unsafe fn fill_expand<I: Index, const ROWS: u32>(context: &Context<'_>, mut ring: Ring) {
    let (p, lane) = (context.p, thread::lane());
    let max_rank = p.route.max_rank;
    let mut columns = Columns::new(context);
    // Whether stages were filled without the copy engine.
    let mut stored = false;
    // Expand has nothing to do before shrink has: the first copies of a must not wait for those of b.
    // SAFETY: the barrier is initialised.
    unsafe { begun().wait(0) };
    let unit = |unit: Unit| {
        let Unit { tile, slice } = unit;
        columns.change(tile.rank);
        let ranks = columns.rank;
        let is_whole = ranks == max_rank;
        let matrix = first_row::<I>(&tile, p.b_experts, p.out_dim);
        let b = select_slice(p.b, slice);
        let wants_old = p.accumulate != 0 && lane < tile.rows;
        let mut out = Global::<u16>::NULL;
        if wants_old {
            // SAFETY: the tile has so many pairs.
            out = context.out_row::<I>(&unit, unsafe { context.pair(&tile, lane) });
        }
        columns.each_step(|at, count| {
            let source = b.at(matrix.plus(I::from_u32(at)).times(I::from_u32(max_rank)));
            let b_bytes = if is_whole { 2 * count * max_rank } else { 0 };
            // SAFETY: as in `fill_a`.
            unsafe {
                let (stage, full) = ring.claim();
                if !is_whole {
                    // A power of two of lanes takes a column, so that no lane divides.
                    let shift = log2((ranks / PIECE).next_power_of_two());
                    let mut item = lane;
                    while item < count << shift {
                        let (column, first) = (item >> shift, PIECE * (item & ((1 << shift) - 1)));
                        if first < ranks {
                            let target = stage.offset(2 * (column * ranks + first));
                            async_copy::copy16_whole::<_, { async_copy::ALONE }>(
                                target,
                                source.at(column * max_rank + first),
                            );
                        }
                        item += LANES;
                    }
                    full.arrive_after_copies();
                    stored = true;
                } else if stored {
                    // The copy engine need not see what other copies have left here.
                    bulk::fence();
                }
                announce(full, 2 * count * warp::ballot(wants_old).count_ones() + b_bytes);
                if is_whole && lane == 0 {
                    full.arrive_for(LANES);
                    bulk::copy(stage, source, b_bytes, full);
                }
                if wants_old {
                    let target = stage.offset(B_STAGE + lane * old_row_bytes(count));
                    bulk::copy(target, out.at(at), 2 * count, full);
                }
            }
        });
    };
    // SAFETY: as the caller promises.
    unsafe { context.each_unit(ROWS, unit) };
}
