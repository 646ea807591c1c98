//! Segments found by one block on its own: what `route` does, for calls of so few pairs that a launch would
//! take longer.
//!
//! Every block finds the same tiles in the same order: that of buckets, as `route` has it, with inactive
//! pairs last. So blocks agree on who takes what without meeting, and a cluster lists only its own work
//! items.
//!
//! | step | who | what |
//! |---|---|---|
//! | count | each thread its pairs | Adds each pair to the count of its segment. |
//! | sum | each warp | Adds up all counts, which tells it in which segment a tile lies. |
//! | list | each warp every so many work items | Looks through all pairs for those of the tile. |
//!
//! All threads run through the code once, so its time is that of its instructions: what is done for every
//! pair is little, and what takes more is done for few work items.
//!
//! Where there are few (slot, expert), a segment is counted at its bucket's number ([`MAX_DIRECT`]).
//! Otherwise a hash table gives it a place. All blocks must give it the same one, whatever the order of
//! threads: a place keeps the smallest key that has come to it, and larger ones go on to the next (Shun and
//! Blelloch, "Phase-concurrent hash tables for determinism", 2014).
//!
//! The A loader needs a tile, but no pairs. So it lists nothing: it takes the tile of the cluster's first
//! work item as soon as pairs are counted, and starts to load while the other warps list.
//!
//! Up to [`WARP_PAIRS`] pairs a warp finds the segments in registers (`WarpSegments`). Two warps do: one
//! lists all of them, and the A loader takes its first tile.
//!
//! Shared memory that stays, for as many pairs and tiles as [`Room`] says:
//!
//! | bytes | what |
//! |---|---|
//! | pairs × 4 | the pairs, tile after tile |
//! | tiles × 8 | tiles: slot and expert, first pair, rows and rank |
//!
//! and that is free again once they are found ([`Room::scratch_bytes`]), none for few pairs:
//!
//! | bytes | what |
//! |---|---|
//! | (places, in multiples of 256, + 4) × 4 | pairs of each segment, then the inactive ones |
//! | places × 4 | the bucket of each place, unless it is the place's number |
//! | pairs × 4, in multiples of 128 | the place of each pair's segment |

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::{Segments, WarpSegments};

/// Most pairs.
pub const MAX_PAIRS: u32 = 1024;
/// Pairs up to which one warp finds the segments on its own, a lane each.
pub const WARP_PAIRS: u32 = 32;
/// Most buckets of active pairs that are counted at their own number.
pub const MAX_DIRECT: u32 = 1024;
/// Counts that a warp adds up at a time.
const SWEEP: u32 = 256;
/// Pairs that a warp looks through at a time.
const LOOK: u32 = 128;

/// Most slots, and most experts: a number of each, and one more, must fit half a word.
pub const MAX_NUMBER: u32 = (1 << 16) - 1;

/// What shared memory has room for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(bytemuck::Pod, bytemuck::Zeroable))]
pub struct Room {
    /// Pairs: a multiple of 4.
    pub pairs: u32,
    /// Tiles: a multiple of 2.
    pub tiles: u32,
    /// Segments that are counted, without that of inactive pairs: as many as buckets, or a power of two.
    pub places: u32,
}

impl Room {
    /// Nothing.
    pub const NONE: Self = Room { pairs: 0, tiles: 0, places: 0 };

    /// For `pairs` pairs of `buckets` buckets in at most `tiles` tiles of `rows` pairs, of which a cluster
    /// takes at most `own`.
    pub const fn new(pairs: u32, buckets: u64, tiles: u32, rows: u32, own: u32) -> Self {
        if pairs <= WARP_PAIRS {
            return Self::of(pairs, tiles, 0);
        }
        let places = if buckets <= MAX_DIRECT as u64 {
            buckets as u32
        } else {
            // At most two thirds of them are used.
            (pairs + pairs / 2).next_power_of_two()
        };
        Self::of(own * rows, own, places)
    }

    const fn of(pairs: u32, tiles: u32, places: u32) -> Self {
        Room { pairs: pairs.next_multiple_of(4), tiles: tiles.next_multiple_of(2), places }
    }

    /// Whether all tiles are listed, as those of few pairs are, or what one cluster takes.
    pub const fn lists_all(self) -> bool {
        self.places == 0
    }

    /// Bytes that stay.
    pub const fn shared_bytes(self) -> u32 {
        self.pairs * 4 + self.tiles * 8
    }

    /// Bytes that are free again once the segments of `pairs` pairs of `buckets` buckets are found.
    pub const fn scratch_bytes(self, pairs: u32, buckets: u64) -> u32 {
        if self.lists_all() {
            0
        } else {
            4 * (places_at(self.places, buckets) + pairs.next_multiple_of(LOOK))
        }
    }
}

/// The place of inactive pairs, after all others.
const fn inactive_place(places: u32) -> u32 {
    places.next_multiple_of(SWEEP)
}

/// Words of the counts of pairs.
const fn counts(places: u32) -> u32 {
    inactive_place(places) + 4
}

/// Word of the place of the first pair, after the counts and, where places are not buckets' numbers, the
/// bucket of each.
const fn places_at(places: u32, buckets: u64) -> u32 {
    counts(places) + if places as u64 == buckets { 0 } else { places }
}
