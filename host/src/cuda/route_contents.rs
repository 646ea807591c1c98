//! What a workspace holds of a route, copied out for tests and measurements.

use crate::cuda::stream::Stream;
use crate::cuda::workspace::Workspace;
use crate::error::Result;
use bytemuck::Pod;
use moe_lora_kernels::params::{Tile, count};

/// What a workspace holds of a route, for tests and measurements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteContents {
    /// Pairs, segment by segment; inactive ones last.
    pub pairs: Vec<u32>,
    /// Segments cut into tiles.
    pub tiles: Vec<RouteTile>,
    /// Tiles of active pairs: the first ones.
    pub active_tiles: usize,
}

/// Pairs of one segment that a block works on together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteTile {
    /// Adapter slot.
    pub slot: u32,
    /// Local expert.
    pub expert: u32,
    /// Position of its first pair in [`RouteContents::pairs`].
    pub first: u32,
    /// Pairs.
    pub rows: u32,
    /// Rank in use; 0 where pairs are inactive.
    pub rank: u32,
}

impl Stream {
    /// Copies out the route of `pairs` pairs that a workspace holds, for tests and measurements: waits for
    /// queued work.
    ///
    /// # Errors
    /// [`Error::WorkspaceTooSmall`](crate::Error::WorkspaceTooSmall) for more pairs than it has room for,
    /// [`Error::Driver`](crate::Error::Driver) when the driver refuses, or queued work failed.
    pub fn download_route(&self, workspace: &mut Workspace, pairs: usize) -> Result<RouteContents> {
        workspace.check_pairs(pairs)?;
        let parts = workspace.parts();
        let counts = self.download_part::<u32>(workspace, parts.counts.address(), count::LEN)?;
        let tiles = counts[count::ALL as usize] as usize;
        workspace.check_tiles(tiles)?;
        let tiles = self.download_part::<Tile>(workspace, parts.tiles.address(), tiles)?;
        let tile = |&Tile { slot, expert, first, rows, rank, .. }: &Tile| RouteTile {
            slot,
            expert,
            first,
            rows,
            rank,
        };
        Ok(RouteContents {
            pairs: self.download_part(workspace, parts.pairs.address(), pairs)?,
            tiles: tiles.iter().map(tile).collect(),
            active_tiles: counts[count::ACTIVE as usize] as usize,
        })
    }

    fn download_part<T: Pod>(&self, workspace: &Workspace, address: u64, len: usize) -> Result<Vec<T>> {
        self.download_from(workspace.memory(), address, len)
    }
}
