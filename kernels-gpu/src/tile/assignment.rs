//! How the blocks of a launch divide the tiles of a route.

use super::quotient;
use crate::arch::thread;
use crate::memory::Global;
use crate::params::Tile;

/// Which part of which tile a block takes: blocks come in runs, one for each part of each tile.
#[derive(Clone, Copy)]
pub struct Assignment {
    tile: u32,
    part: u32,
    /// Number of the block in its run.
    pub number: u32,
}

impl Assignment {
    /// That of this block, when runs are `blocks` long and every tile is taken in `parts` parts.
    #[inline(always)]
    pub fn of_this_block(blocks: u32, parts: u32) -> Self {
        let run = quotient(thread::block(), blocks);
        let tile = quotient(run, parts);
        Assignment { tile, part: run - tile * parts, number: thread::block() - run * blocks }
    }

    /// The pairs of this part, at most `rows` of them. `None` when there are none; block 0 has some wherever
    /// any block has.
    ///
    /// # Safety
    /// `count` must be an element with the number of `tiles`, and `route` have written both.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn load(self, tiles: Global<Tile>, count: Global<u32>, rows: u32) -> Option<Tile> {
        // SAFETY: as the caller promises.
        if self.tile >= unsafe { count.load() } {
            return None;
        }
        // SAFETY: as above; there is such a tile.
        let tile = unsafe { tiles.at(self.tile).load_tile() }.part(self.part, rows);
        (tile.rows > 0).then_some(tile)
    }
}
