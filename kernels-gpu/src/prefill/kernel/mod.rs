//! The kernel: its prologue, then the main loops of its two roles side by side. Each step is in a file of its
//! own.
//!
//! | step | file |
//! |---|---|
//! | which work tile comes next; what it is | `scheduler`, `work_tile` |
//! | stages in shared memory; the consumers' order | `pipeline` |
//! | panels of a step | `steps` |
//! | the producer's copies | `load` |
//! | first product, of x and `a` | `shrink` |
//! | h between the products, in registers | `h` |
//! | what is needed of the work tile after the first product | `kept` |
//! | h of work tiles that share a pass, through device memory | `split_k` |
//! | second product, of h and `b`, and the store to `out` | `expand` |

mod expand;
mod h;
mod kept;
mod load;
mod pipeline;
mod scheduler;
mod shrink;
mod split_k;
mod steps;
mod work_tile;

use super::config::{Accumulators, Config, ConsumerRegisters, ProducerRegisters};
use super::{WARP_ROWS, WARPGROUP};
use crate::arch::wgmma;
use crate::arch::{barrier, grid, thread};
use crate::params::{PrefillParams, products};
use expand::expand;
use h::{from_sums, read_h, store_h};
use kept::{keep, kept_pairs, kept_work};
use pipeline::{PingPong, Pipeline};
use scheduler::TileScheduler;
use shrink::shrink;
use split_k::SplitK;
use steps::rank_shift;

/// The kernel.
///
/// # Safety
/// As for the entry points: every tensor of `p` must be as its field says.
#[inline(always)]
pub unsafe fn prefill<C: Config>(p: PrefillParams) {
    // Prologue.
    if thread::index() == 0 {
        // SAFETY: nobody uses the barriers yet.
        unsafe {
            Pipeline::<C>::init(p.stages);
            PingPong::<C>::init();
            TileScheduler::init(C::SHAPE);
        }
    }
    barrier::sync();
    grid::launch_dependents();
    prefetch_x(&p, C::SHAPE.threads());
    grid::wait();

    let scheduler = TileScheduler::new(C::SHAPE);
    // SAFETY: as the caller promises; the launch before this one has ended, the barriers are ready, and each
    // warpgroup has one role.
    unsafe {
        if thread::index() < WARPGROUP * C::SHAPE.consumers() {
            wgmma::increase_registers::<ConsumerRegisters<C>>();
            consume::<C>(&p, scheduler);
        } else {
            wgmma::decrease_registers::<ProducerRegisters<C>>();
            produce::<C>(&p, scheduler);
        }
    }
}

/// The producer's main loop: loads what each work tile reads, step by step.
///
/// # Safety
/// Every tensor of `p` must be as its field says; the whole warpgroup must come here, the barriers be ready.
#[inline(always)]
unsafe fn produce<C: Config>(p: &PrefillParams, mut scheduler: TileScheduler) {
    let mut pipeline = Pipeline::<C>::new(p.stages);
    // SAFETY: as the caller promises; tiles are p's.
    unsafe {
        let mut work = scheduler.get_current::<true>(p);
        while work.tile.rows > 0 {
            if work.shrinks() {
                load::shrink(&mut pipeline, p, &work);
            } else if work.takes_h(p) {
                load::h(&mut pipeline, p, &work);
            }
            scheduler.fetch_next(p);
            load::expand(&mut pipeline, p, &work);
            work = scheduler.get_current::<true>(p);
        }
    }
}

/// A consumer's main loop: multiplies what the producer loads, for 64 of each tile's pairs.
///
/// # Safety
/// As for [`produce`].
#[inline(always)]
unsafe fn consume<C: Config>(p: &PrefillParams, mut scheduler: TileScheduler) {
    let mut consumer = Consumer::<C>::new(p);
    // SAFETY: as the caller promises; tiles, pairs and slices are p's.
    unsafe {
        loop {
            let work = scheduler.get_current::<false>(p);
            if work.tile.rows == 0 {
                break;
            }
            keep(p, &work, consumer.position.row);
            let columns = work.pass.columns(work.tile.rank);
            let shares_h = C::SHAPE.may_split() && p.shares_passes() && work.tile.rank > 0;

            // The first product.
            let mut sums = C::Accumulators::zero();
            shrink(&mut consumer, p, &work, columns, &mut sums);
            if shares_h && work.gives_h(p) {
                SplitK::new::<C>(p, &work).give::<C>(&sums, p, &work, columns);
            }

            // h, whoever computed it.
            let mut h = from_sums::<C>(&sums);
            if shares_h && !work.gives_h(p) {
                h = SplitK::new::<C>(p, &work).take::<C>(columns);
            } else if work.takes_h(p) {
                read_h(&mut consumer, &mut h, columns);
            }
            if p.computed() == products::SHRINK {
                store_h::<C>(p, &h, kept_pairs(), work.pass, rank_shift(work.tile.rank));
            }

            // The second product, and the store. A work tile that does not expand has no slices left here,
            // but goes on: ptxas must see that all warps come to the products.
            expand(&mut consumer, p, h);
            if C::SHAPE.may_split() && p.shares_passes() {
                let work = kept_work();
                if work.tile.rank > 0 && !work.gives_h(p) {
                    SplitK::new::<C>(p, &work).forget::<C>(p);
                }
            }
        }
    }
}

/// A consumer thread's place in the pipeline, in the order of the consumers, and in a tile.
struct Consumer<C> {
    pipeline: Pipeline<C>,
    order: PingPong<C>,
    position: Position,
}

impl<C: Config> Consumer<C> {
    /// Before the first work tile.
    #[inline(always)]
    fn new(p: &PrefillParams) -> Self {
        Consumer {
            pipeline: Pipeline::new(p.stages),
            order: PingPong::new(),
            position: Position::of_this_thread(),
        }
    }
}

/// Where a consumer thread's values are in a tile.
struct Position {
    /// The first row of the thread's warpgroup.
    warpgroup_row: u32,
    /// The first row of its warp.
    warp_row: u32,
    /// The first of its two rows: the other is eight further on.
    row: u32,
    /// Its chunk of 8 columns of every 32.
    chunk: u32,
}

impl Position {
    #[inline(always)]
    fn of_this_thread() -> Self {
        let warpgroup_row = thread::index() / wgmma::THREADS * 64;
        let warp_row = warpgroup_row + thread::warp() % 4 * WARP_ROWS;
        Position { warpgroup_row, warp_row, row: warp_row + thread::lane() / 4, chunk: thread::lane() % 4 }
    }
}

/// Prefetches the first bytes of every row of x to L2, while the route is made: whatever it says, most rows
/// will be read.
#[inline(always)]
fn prefetch_x(p: &PrefillParams, threads: u32) {
    let rows = p.rows.x_count;
    // Neighbouring rows by different blocks.
    let mut row = thread::index_anew() * p.blocks + thread::block();
    while p.ahead > 0 && row < rows {
        p.x.at(row as u64 * p.x_stride).ask_for_bytes(p.ahead);
        row += threads * p.blocks;
    }
}
