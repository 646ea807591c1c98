//! The kernel: its roles, and what both walk through.

mod consumer;
mod exchange;
mod producer;
mod ring;
mod steps;
mod turns;

use super::WARPGROUP;
use crate::arch::mma::Element;
use crate::arch::wgmma::{self, Sums};
use crate::arch::{barrier, grid, thread};
use crate::memory::Index;
use crate::params::PrefillParams;
use ring::Ring;
use turns::Turns;

/// The kernel. `SUMS`: half the columns of h, up to 128; `MORE`: half of those from 128 on; `BLOCKS`: fragments of 16
/// of all; `SWEEPS`: sixteens of pairs of a tile; `COPYING`, `COMPUTING`: registers of a thread of either role.
///
/// # Safety
/// As for the entry points: every tensor of `p` must be as its field says.
#[inline(always)]
pub unsafe fn prefill<
    E: Element,
    I: Index,
    const SUMS: usize,
    const MORE: usize,
    const BLOCKS: usize,
    const SWEEPS: usize,
    const COPYING: u32,
    const COMPUTING: u32,
>(
    p: PrefillParams,
) where
    [f32; SUMS]: Sums,
{
    let shape = Ring::<BLOCKS, SWEEPS>::SHAPE;
    if thread::index() == 0 {
        // SAFETY: nobody uses the barriers yet.
        unsafe {
            Ring::<BLOCKS, SWEEPS>::init(p.stages);
            Turns::init(shape);
        }
    }
    barrier::sync();
    grid::launch_dependents();
    ask_for_x(&p, shape.threads());
    grid::wait();
    let turns = Turns::new(shape);
    // SAFETY: as the caller promises; the launch before this one has ended, the barriers are ready, and each warpgroup has one role.
    unsafe {
        if thread::index() < WARPGROUP * shape.consumers() {
            wgmma::take_registers::<COMPUTING>();
            consumer::compute::<E, I, SUMS, MORE, BLOCKS, SWEEPS>(&p, turns);
        } else {
            wgmma::give_registers::<COPYING>();
            producer::copy::<I, BLOCKS, SWEEPS>(&p, turns);
        }
    }
}

/// Asks for the first bytes of every row of x to be in L2, while the route is made: whatever it says, most rows will be read.
#[inline(always)]
fn ask_for_x(p: &PrefillParams, threads: u32) {
    let rows = p.x_row.quotient(p.pair_count - 1) + 1;
    // Neighbouring rows by different blocks.
    let mut row = thread::index_anew() * p.blocks + thread::block();
    while p.ahead > 0 && row < rows {
        p.x.at(row as u64 * p.x_stride).ask_for_bytes(p.ahead);
        row += threads * p.blocks;
    }
}
