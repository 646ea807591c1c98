//! What a workspace has room for, and where its parts are. The memory itself is the back end's.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::plan::generic::{MAX_PARTIAL, MAX_SPLITS};
use crate::plan::{Plan, prefill, route};
use crate::projection::Projection;
use moe_lora_kernels::DecodeRows;
use moe_lora_kernels::adopt::MAX_BLOCK_SIZE;
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{Tile, count};
use moe_lora_kernels::prefill::MAX_COUNTERS;
use moe_lora_kernels::route::{self as kernel, EXCHANGE_HEAD};

/// Alignment of each part.
const ALIGNMENT: usize = 256;

/// A workspace without its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scratch {
    room: Room,
}

/// What a workspace has room for, or a call needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Room {
    pairs: usize,
    /// Elements of the list of pairs: more than there are pairs when it is in blocks.
    listed: usize,
    tiles: usize,
    scratch_bytes: usize,
    /// Words of a table of route's exchange.
    exchange: usize,
    /// Bytes in which blocks of prefill that share passes leave h and sums.
    shared_pass_bytes: usize,
}

/// Where the parts of a workspace are.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    pub pairs: Global<u32>,
    pub buckets: Global<u32>,
    pub tiles: Global<Tile>,
    pub counts: Global<u32>,
    /// Where the blocks of route tell one another their counts, and the words of each of its two tables.
    pub exchange: Global<u32>,
    pub exchange_room: u32,
    /// Where the tile scheduler of prefill counts work tiles.
    pub scheduler: Global<u32>,
    /// Where its warps that share a pass count one another.
    pub counters: Global<u32>,
    /// Where they leave h for one another, and sums after it.
    pub shared_passes: Global<u32>,
    /// `h`, or its parts in f32.
    pub scratch: u64,
}

impl Room {
    /// What any call of up to `tokens` tokens needs.
    fn of(projection: &Projection, tokens: usize) -> Result<Self> {
        let sizes = projection.sizes();
        // That of inactive pairs too.
        let buckets = (sizes.slots * sizes.experts) as u64 + 1;
        let pairs = projection.pairs(tokens)?;
        let wide = pairs as u64;
        // In blocks of the largest size, each segment ends in one that may hold a single pair.
        let listed = wide + buckets.min(wide) * u64::from(MAX_BLOCK_SIZE);
        let smallest = DecodeRows::M8.count();
        let h = projection.h_elements(tokens)?;
        let partial = (h as u64).saturating_mul(u64::from(MAX_SPLITS)).min(MAX_PARTIAL);
        let route_blocks = route::most_route_blocks(pairs, buckets);
        Ok(Room {
            pairs,
            listed: listed as usize,
            tiles: kernel::max_tiles(wide, buckets, u64::from(smallest)) as usize,
            scratch_bytes: (h * DType::SIZE).max(partial as usize * size_of::<f32>()),
            exchange: kernel::table_words(route_blocks.into(), buckets) as usize,
            shared_pass_bytes: prefill::shared_pass_room(projection, pairs) as usize,
        })
    }

    /// Room for whatever fits either.
    fn max(self, other: Self) -> Self {
        Room {
            pairs: self.pairs.max(other.pairs),
            listed: self.listed.max(other.listed),
            tiles: self.tiles.max(other.tiles),
            scratch_bytes: self.scratch_bytes.max(other.scratch_bytes),
            exchange: self.exchange.max(other.exchange),
            shared_pass_bytes: self.shared_pass_bytes.max(other.shared_pass_bytes),
        }
    }

    /// Refuses what needs more.
    fn check(&self, needed: &Room) -> Result<()> {
        for (what, limit, got) in [
            ("pairs", self.pairs, needed.pairs),
            ("listed pairs", self.listed, needed.listed),
            ("tiles", self.tiles, needed.tiles),
            ("bytes of h", self.scratch_bytes, needed.scratch_bytes),
            ("words of route's exchange", self.exchange, needed.exchange),
            ("bytes of shared passes", self.shared_pass_bytes, needed.shared_pass_bytes),
        ] {
            if got > limit {
                return Err(Error::WorkspaceTooSmall { what, limit, got });
            }
        }
        Ok(())
    }

    /// Bytes of the exchange.
    fn exchange_bytes(&self) -> usize {
        (EXCHANGE_HEAD as usize + 2 * self.exchange) * size_of::<u32>()
    }

    /// Bytes of the parts that must be zero at first, which come first.
    fn zero_bytes(&self) -> usize {
        let (parts, _) = self.parts(0);
        parts.shared_passes.address() as usize + self.shared_pass_bytes
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
            // What must be zero at first.
            exchange: Global::new(part(self.exchange_bytes())),
            exchange_room: self.exchange as u32,
            scheduler: Global::new(part(size_of::<u32>())),
            counters: Global::new(part(MAX_COUNTERS as usize * size_of::<u32>())),
            shared_passes: Global::new(part(self.shared_pass_bytes)),
            counts: Global::new(part(count::LEN * size_of::<u32>())),
            pairs: Global::new(part(self.listed * size_of::<u32>())),
            buckets: Global::new(part(self.pairs * size_of::<u32>())),
            tiles: Global::new(part(self.tiles * size_of::<Tile>())),
            scratch: part(self.scratch_bytes),
        };
        (parts, end)
    }
}

impl Scratch {
    /// Room for calls of up to `max_tokens` tokens on any of `projections`.
    pub fn new(projections: &[Projection], max_tokens: usize) -> Result<Self> {
        let mut room = Room::default();
        for projection in projections {
            room = room.max(Room::of(projection, max_tokens)?);
        }
        Ok(Scratch { room })
    }

    /// Room for what fits here, and for calls of up to `max_tokens` tokens on `projection`.
    #[cfg(feature = "cuda")]
    pub fn grown(&self, projection: &Projection, max_tokens: usize) -> Result<Self> {
        Ok(Scratch { room: self.room.max(Room::of(projection, max_tokens)?) })
    }

    /// Checks that a call of `tokens` tokens fits.
    #[cfg(feature = "cuda")]
    pub fn check_room(&self, projection: &Projection, tokens: usize) -> Result<()> {
        self.room.check(&Room::of(projection, tokens)?)
    }

    /// Refuses more pairs than there is room for.
    #[cfg(feature = "cuda")]
    pub fn check_pairs(&self, pairs: usize) -> Result<()> {
        self.room.check(&Room { pairs, ..Room::default() })
    }

    /// Refuses more tiles than there is room for.
    #[cfg(feature = "cuda")]
    pub fn check_tiles(&self, tiles: usize) -> Result<()> {
        self.room.check(&Room { tiles, ..Room::default() })
    }

    /// Bytes of memory that the parts take.
    pub fn bytes(&self) -> usize {
        self.room.parts(0).1
    }

    /// Bytes at the beginning of the memory that must be zero before the first call.
    pub fn zero_bytes(&self) -> usize {
        self.room.zero_bytes()
    }

    /// Elements that the list of pairs has room for.
    #[cfg(feature = "emulate")]
    pub fn listed(&self) -> usize {
        self.room.listed
    }

    /// The parts of the memory at `base`.
    #[cfg(feature = "cuda")]
    pub fn parts(&self, base: u64) -> Parts {
        self.room.parts(base).0
    }

    /// Checks that a planned call fits.
    pub fn parts_of(&self, projection: &Projection, tokens: usize, plan: &Plan, base: u64) -> Result<Parts> {
        let mut needed = Room::of(projection, tokens)?;
        // Blocks smaller than any tile make more tiles than any other route.
        needed.tiles = needed.tiles.max(plan.route.tiles.most as usize);
        self.room.check(&needed)?;
        Ok(self.room.parts(base).0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::projection::{ExpertWeights, OutDims, ProjectionSizes, XRows};

    fn projection(max_rank: usize, slices: usize, in_dim: usize, out_dim: usize) -> Projection {
        let weights = ExpertWeights::PerExpert;
        Projection::new(ProjectionSizes {
            dtype: DType::Bf16,
            top_k: 2,
            experts: 8,
            slots: 2,
            max_rank,
            in_dim,
            out_dims: OutDims::uniform(out_dim, slices),
            x_rows: XRows::Token,
            a_experts: weights,
            b_experts: weights,
        })
        .expect("a legal projection")
    }

    /// Whoever makes a workspace may not know K and N yet.
    #[test]
    fn a_workspace_has_room_for_any_input_and_output_width() {
        for (tokens, max_rank, slices) in [(1, 64, 2), (80, 16, 1), (512, 128, 2), (4096, 512, 1)] {
            let room = |in_dim, out_dim| Room::of(&projection(max_rank, slices, in_dim, out_dim), tokens);
            let smallest = room(1, 1).expect("a legal size");
            for (in_dim, out_dim) in [(8, 14_336), (4096, 14_336), (14_336, 4096), (100_000, 8)] {
                let room = room(in_dim, out_dim).expect("a legal size");
                assert_eq!(room, smallest, "T={tokens} R={max_rank} S={slices} K={in_dim} N={out_dim}");
            }
        }
    }

    /// A workspace for a large rank, for many tokens or for several slices serves calls of less.
    #[test]
    fn a_workspace_has_room_for_less() {
        for large in [16, 64, 128, 256, 512] {
            for small in [8, 16, 32, 64, 128, 256].into_iter().filter(|small| *small <= large) {
                for tokens in [1, 7, 80, 4096] {
                    let room = Room::of(&projection(large, 2, 1, 1), 4096).expect("a legal size");
                    let needed = Room::of(&projection(small, 1, 4096, 14_336), tokens).expect("a legal size");
                    assert!(room.check(&needed).is_ok(), "T={tokens} R={small} in R={large}");
                }
            }
        }
    }
}
