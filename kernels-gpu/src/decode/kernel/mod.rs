//! The kernel: prologue, main loops of the five roles, epilogue. What a step does lies in a file of its own.

mod barriers;
mod consumer;
mod context;
mod expand;
mod load;
mod pipeline;
mod shrink;
mod start;
mod work;

use super::config::Config;
use super::{A_LOADER, EXPAND, GROUP, STAGE_K, X_LOADER};
use crate::arch::{barrier, cluster, thread};
use crate::memory::{Global, Index};
use crate::params::DecodeParams;
use barriers::{a_started, item_count, segments_ready};
use consumer::{NO_SUMS, Position};
use context::Context;
use expand::{Columns, OutRows, receive};
use load::{load_a_stage, load_b_stage, load_x_stage, say_a_started, x_row};
use pipeline::Pipeline;
use shrink::{multiply_stage, send, store_sums};
use start::{Search, Start};
use work::{ExpandPart, ShrinkPart, WorkItem};

/// The kernel, launched in clusters of a power of two of blocks.
///
/// # Safety
/// As for the entry points: every tensor of `p` must be as its field says.
#[inline(always)]
pub unsafe fn decode<C: Config>(p: DecodeParams) {
    const { assert!(GROUP + C::ROWS <= 32) };

    // Prologue: barriers, and the search for segments.
    let context = Context::new::<C>(&p);
    let shrink_pipeline = context.shrink_pipeline::<C>();
    let expand_pipeline = context.expand_pipeline::<C>(&shrink_pipeline);
    if thread::index() == 0 {
        // SAFETY: nobody uses them yet.
        unsafe { barriers::init(&shrink_pipeline, &expand_pipeline, context.blocks) };
    }
    // No block may be sent anything before it has its barriers.
    cluster::arrive_relaxed();
    // SAFETY: the stages are not in use yet.
    let search = unsafe { Search::prepare(&context, expand_pipeline.start) };
    barrier::sync();
    // SAFETY: as the caller promises.
    let start = unsafe { search.run::<C>() };

    // Main loops.
    let warp = thread::warp();
    // SAFETY: the launch before this one has ended; the warps of each role are whole, and all but the A
    // loader wait until the segments are ready.
    unsafe {
        if warp == A_LOADER {
            load_a::<C>(&context, shrink_pipeline, start);
        } else {
            segments_ready().wait(0);
            if warp < EXPAND {
                cluster::wait();
                shrink::<C>(&context, shrink_pipeline);
            } else if warp < A_LOADER {
                cluster::wait();
                expand::<C>(&context, expand_pipeline);
            } else if warp == X_LOADER {
                load_x::<C>(&context, shrink_pipeline);
            } else {
                load_b::<C>(&context, expand_pipeline);
            }
        }
    }

    // Epilogue.
    if warp >= A_LOADER {
        // Stores to device memory come last, so that no role waits for them.
        if p.finds != 0 && thread::block() == 0 && warp == X_LOADER {
            // SAFETY: this warp waited until the segments were ready.
            unsafe { start::keep(&context) };
        }
        cluster::wait();
    }
    // No block may end while another may still send to it.
    cluster::arrive_relaxed();
    cluster::wait();
}

/// The A loader: shrink's stages with a. It starts with `start`, and waits for the list of pairs only before
/// its second work item.
///
/// # Safety
/// As for [`decode`]; the whole warp must come here.
#[inline(always)]
unsafe fn load_a<C: Config>(context: &Context<'_>, mut pipeline: Pipeline, start: Start) {
    let p = context.p;
    let Start { mut item, mut part } = start;
    let mut next = context.first_item();
    let (mut loaded, stages) = (0, pipeline.stages);
    loop {
        let WorkItem { tile, slice } = item;
        if tile.rows > 0 && tile.rank > 0 {
            part.change(context, tile.rank);
            let in_dim = p.weights.in_dim;
            // SAFETY: the tile has ranks.
            let a = unsafe { context.a::<C>(&tile, slice) };
            part.each_stage(context, |group, k, length| {
                let ranks = (tile.rank - GROUP * group).min(GROUP);
                let row = C::Index::from_u32(GROUP * group).times(C::Index::from_u32(in_dim));
                let source = a.start.at(row).at(k);
                // SAFETY: the rows are inside the matrix, and elements come in eights.
                unsafe { load_a_stage(&mut pipeline, source, in_dim, ranks, length) };
                loaded += 1;
                if loaded == stages {
                    say_a_started();
                }
            });
        }
        next += p.clusters;
        // SAFETY: once segments are ready, the number of work items can be read, and each of the cluster's.
        unsafe {
            segments_ready().wait(0);
            if next >= item_count().load() {
                break;
            }
            item = context.item::<C>(next);
        }
    }
    if loaded < stages {
        say_a_started();
    }
}

/// The X loader: shrink's stages with x, a row a lane.
///
/// # Safety
/// As for [`load_a`]; the segments must be ready.
#[inline(always)]
unsafe fn load_x<C: Config>(context: &Context<'_>, mut pipeline: Pipeline) {
    let mut part = ShrinkPart::NONE;
    let load = |WorkItem { tile, .. }: WorkItem| {
        part.change(context, tile.rank);
        // SAFETY: the segments are ready.
        let x = unsafe { x_row::<C>(context, &tile) };
        part.each_stage(context, |_, k, length| {
            // SAFETY: stages are of groups of ranks, so the tile has some.
            unsafe { load_x_stage(&mut pipeline, x.at(k), tile.rows, length) };
        });
    };
    // SAFETY: as the caller promises.
    unsafe { context.each_item::<C>(load) };
}

/// The warps that shrink: each work item's groups of ranks, whose sums go to all blocks of the cluster.
///
/// # Safety
/// As for [`decode`]; all threads of the role must come here, and the segments be ready.
#[inline(always)]
unsafe fn shrink<C: Config>(context: &Context<'_>, mut pipeline: Pipeline) {
    let mut part = ShrinkPart::NONE;
    // Work items whose h was sent.
    let mut sent = 0;
    let shrink = |WorkItem { tile, .. }: WorkItem| {
        if tile.rank == 0 {
            return;
        }
        part.change(context, tile.rank);
        let mut group = part.first_group(context);
        while group < part.sent_groups() {
            let ranks = part.rank.saturating_sub(GROUP * group).min(GROUP);
            let me = Position::anew();
            let mut sums = NO_SUMS;
            let (mut k, end) = if ranks > 0 { part.k } else { (0, 0) };
            while k < end {
                // SAFETY: the producers come to the same stages.
                unsafe {
                    let stage = pipeline.wait();
                    multiply_stage::<C>(&mut sums, &me, stage, tile.rows, ranks, STAGE_K.min(end - k));
                    pipeline.release();
                }
                k += STAGE_K;
            }
            // SAFETY: all threads of the role come here.
            unsafe {
                store_sums::<C>(context, &me, &sums);
                send::<C>(context, &part, tile.rows, group, sent);
            }
            group += part.group_stride;
        }
        // SAFETY: as above.
        unsafe { shrink::finish(context, sent) };
        sent += 1;
    };
    // SAFETY: as the caller promises.
    unsafe {
        context.each_item::<C>(shrink);
        shrink::drain(context, sent);
    }
}

/// The B loader: expand's stages with b, and with the old values of `out`, a row a lane.
///
/// # Safety
/// As for [`load_x`].
#[inline(always)]
unsafe fn load_b<C: Config>(context: &Context<'_>, mut pipeline: Pipeline) {
    let p = context.p;
    // Whether stages were filled without the copy engine.
    let mut stored = false;
    // Expand has nothing to do before shrink has: the first copies of a must not wait for those of b.
    // SAFETY: the barrier is initialised.
    unsafe { a_started().wait(0) };
    let load = |item: WorkItem| {
        let WorkItem { tile, slice } = item;
        if tile.rank == 0 {
            return;
        }
        let part = ExpandPart::new::<C>(context, &item);
        let ranks = part.rank;
        // SAFETY: the tile has ranks.
        let b = unsafe { context.b::<C>(&tile, slice) };
        let mut out = Global::<u16>::NULL;
        if p.accumulate != 0 && thread::lane() < tile.rows {
            // SAFETY: the tile has so many pairs.
            let pair = unsafe { context.pair(&tile, thread::lane()) };
            // SAFETY: it is one of P.
            let row = if C::GENERAL { unsafe { p.rows.out(pair, true) } } else { Some(pair) };
            out = row.map_or(out, |row| context.out_row::<C>(&item, row));
        }
        part.each_stage(|at, count| {
            let row = C::Index::from_u32(at).times(C::Index::from_u32(b.max_rank));
            let source = (b.start.at(row), b.max_rank);
            let old = (!out.is_null()).then_some(out.at(at));
            // SAFETY: the columns are the slice's, and elements come in eights.
            unsafe { load_b_stage(&mut pipeline, &mut stored, source, old, ranks, count) };
        });
    };
    // SAFETY: as the caller promises.
    unsafe { context.each_item::<C>(load) };
}

/// The warps that expand: each work item's h, once it has come, times the block's columns of b.
///
/// # Safety
/// As for [`decode`]; all threads of the role must come here, and the segments be ready.
#[inline(always)]
unsafe fn expand<C: Config>(context: &Context<'_>, mut pipeline: Pipeline) {
    let mut sent = ShrinkPart::NONE;
    // Work items whose h was received.
    let mut received = 0;
    let expand = |item: WorkItem| {
        let tile = item.tile;
        let part = ExpandPart::new::<C>(context, &item);
        if C::GENERAL && context.p.rows.may_clear(context.p.accumulate) {
            // SAFETY: the segments are ready.
            unsafe { OutRows::new::<C>(context, &item, false) }.clear::<C>(&part);
        }
        // SAFETY: the segments are ready.
        let out = unsafe { OutRows::new::<C>(context, &item, true) };
        if tile.rank == 0 {
            // Inactive pairs: untouched, or overwritten by zeros.
            if context.p.accumulate == 0 {
                out.clear::<C>(&part);
            }
            return;
        }
        sent.change(context, tile.rank);
        // SAFETY: all blocks of the cluster send their parts.
        let h = unsafe { receive::<C>(context, &sent, tile.rows, received) };
        received += 1;
        part.each_stage(|at, count| {
            let me = Position::anew();
            // SAFETY: the producer comes to the same stages.
            unsafe {
                let stage = pipeline.wait();
                Columns::each_group(&me, count, |columns| {
                    let old = columns.load_old::<C>(stage, &out, context.p.accumulate != 0);
                    let sums = columns.multiply::<C>(stage, &h, tile.rows, sent.rank, part.rank);
                    columns.add_and_store::<C>(&out, at, &sums, &old);
                });
                pipeline.release();
            }
        });
    };
    // SAFETY: as the caller promises.
    unsafe { context.each_item::<C>(expand) };
}
