//! Scratch memory of calls: made once, so that a call allocates nothing.

use crate::call::Route;
use crate::cuda::failed;
use crate::error::{Error, Result};
use crate::plan::{self, Plan};
use crate::projection::Projection;
use crate::tensor::Space;
use cust::memory::DeviceBuffer;
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{Tile, count};
use std::fmt;

/// Alignment of each part.
const ALIGNMENT: usize = 256;

/// What a kept route was made for: a call with another of these cannot use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RouteKey {
    tokens: usize,
    top_k: usize,
    slots: usize,
    experts: usize,
    max_rank: usize,
    tile_rows: u32,
}

impl fmt::Display for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RouteKey { tokens, top_k, slots, experts, max_rank, tile_rows } = self;
        write!(f, "a route of T={tokens} k={top_k} L={slots} E={experts} R={max_rank} in tiles of {tile_rows}")
    }
}

/// Scratch memory on the device. One call at a time may use it, on one stream.
pub struct Workspace {
    memory: DeviceBuffer<u8>,
    room: Room,
    kept: Option<RouteKey>,
}

/// What a workspace has room for, or a call needs.
#[derive(Clone, Copy, Default)]
struct Room {
    pairs: usize,
    tiles: usize,
    scratch_bytes: usize,
}

/// Where the parts of a workspace are.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    pub pairs: Global<u32>,
    pub buckets: Global<u32>,
    pub tiles: Global<Tile>,
    pub counts: Global<u32>,
    /// `h`, or its parts in f32.
    pub scratch: u64,
}

impl Room {
    /// What calls of up to `tokens` tokens need.
    fn of(projection: &Projection, tokens: usize) -> Result<Self> {
        Ok(Room {
            pairs: projection.pairs(tokens)?,
            tiles: plan::max_tiles(projection, tokens)? as usize,
            scratch_bytes: plan::scratch_bytes(projection, tokens)?,
        })
    }

    /// The parts from `base` on, and the bytes of all of them.
    fn parts(&self, base: u64) -> (Parts, usize) {
        let mut end = 0;
        let mut part = |bytes: usize| {
            let start = end;
            end += bytes.next_multiple_of(ALIGNMENT);
            base + start as u64
        };
        let parts = Parts {
            counts: Global::new(part(count::LEN * size_of::<u32>())),
            pairs: Global::new(part(self.pairs * size_of::<u32>())),
            buckets: Global::new(part(self.pairs * size_of::<u32>())),
            tiles: Global::new(part(self.tiles * size_of::<Tile>())),
            scratch: part(self.scratch_bytes),
        };
        (parts, end)
    }

    fn bytes(&self) -> usize {
        self.parts(0).1
    }
}

impl Workspace {
    pub(super) fn new(projections: &[Projection], max_tokens: usize) -> Result<Self> {
        let mut room = Room::default();
        for projection in projections {
            let Room { pairs, tiles, scratch_bytes } = Room::of(projection, max_tokens)?;
            room.pairs = room.pairs.max(pairs);
            room.tiles = room.tiles.max(tiles);
            room.scratch_bytes = room.scratch_bytes.max(scratch_bytes);
        }
        // SAFETY: every part is written by the kernel that comes before its reader.
        let memory = unsafe { DeviceBuffer::uninitialized(room.bytes()) }.map_err(failed("cuMemAlloc"))?;
        Ok(Workspace { memory, room, kept: None })
    }

    /// Bytes of device memory that this workspace takes.
    pub fn bytes(&self) -> usize {
        self.room.bytes()
    }

    /// Checks that a planned call fits, and that a kept route is there when it wants one; from here on the
    /// workspace keeps the call's route.
    pub(super) fn prepare<S: Space>(
        &mut self,
        projection: &Projection,
        plan: &Plan,
        tokens: usize,
        route: &Route<'_, S>,
    ) -> Result<Parts> {
        let s = projection.sizes();
        let Room { pairs, tiles, scratch_bytes } = Room::of(projection, tokens)?;
        for (what, limit, got) in [
            ("pairs", self.room.pairs, pairs),
            ("tiles", self.room.tiles, tiles),
            ("bytes of h", self.room.scratch_bytes, scratch_bytes),
        ] {
            if got > limit {
                return Err(Error::WorkspaceTooSmall { what, limit, got });
            }
        }
        let needed = RouteKey {
            tokens,
            top_k: s.top_k,
            slots: s.slots,
            experts: s.experts,
            max_rank: s.max_rank,
            tile_rows: plan.tile.shape().rows(),
        };
        match route {
            Route::From(_) => self.kept = Some(needed),
            Route::Kept if self.kept == Some(needed) => {}
            Route::Kept => {
                let kept = self.kept.map_or_else(|| "no route".to_owned(), |kept| kept.to_string());
                return Err(Error::RouteNotKept { kept, needed: needed.to_string() });
            }
        }
        Ok(self.room.parts(self.memory.as_device_ptr().as_raw()).0)
    }
}
