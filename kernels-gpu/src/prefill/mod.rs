//! `prefill`: a whole call of many pairs a segment in one launch, on warpgroups:
//! `h[s, p, q] = Σ_c x[row(p), c] · a[s][l, e, q, c]`, then
//! `out[p, offset + s·N + n] (+)= weight[p] · Σ_q h[s, p, q] · b[s][l, e, n, q]`.
//!
//! # The work
//!
//! | | is |
//! |---|---|
//! | tile | up to 64 or 128 pairs of one segment, from the route's list |
//! | column of h | a (slice, rank); slices take powers of two of them, so that 16 ranks are a fragment |
//! | pass | a tile, and as many of its slices as the kernel has columns of h for: it reads x once |
//! | step | what a stage holds: 128 elements of K of x and `a`, or 128 columns of `out` and `b` |
//! | work tile | what a block takes at a time: a pass, or a split of one |
//!
//! The tile's own rank decides what it costs, not the rank that weights are allocated for.
//!
//! # Who does it
//!
//! The blocks are persistent: as many as the device runs at a time. The dynamic tile scheduler hands out work
//! tiles in the order of the route's list, so that tiles of one segment run side by side and share its
//! weights in L2.
//!
//! The kernel is warp-specialised. One warpgroup, the producer, loads; each of the others, the consumers,
//! multiplies for 64 of the pairs. All that a block reads passes through one pipeline of stages as one
//! succession of steps: those of the first product, then slice by slice those of the second, then the next
//! work tile's. The producer is ahead by as many steps as there are stages, across the ends of slices and
//! work tiles, so that the memory never waits for a product.
//!
//! # Split-K and split-N
//!
//! Where passes are so few that many multiprocessors would have none, or half of them one more than the
//! others, blocks share them. A work tile is then a split of K of a pass, or a split of a slice's columns;
//! all splits of K come first. Those leave partial sums in the split-K workspace, each adds up a part of h,
//! in the order of K, and the splits of columns wait for h. Their producers load meanwhile, so that the
//! memory waits for none of this.
//!
//! # Shared memory
//!
//! Barriers, then what consumers keep of a work tile, then the stages at multiples of 1024, each of panels of
//! 128-byte rows:
//!
//! | panels | a step of shrink | a step of expand |
//! |---|---|---|
//! | one row a pair | x, 64 elements of K each | old values of `out`, 64 columns each |
//! | one row a column of h, or 64 rows | `a`, 64 elements of K each | `b`, 64 ranks of 64 columns each |
//!
//! A step has two panels of each kind, of `b` for every 64 ranks. It has one where a stage has no room for
//! two (256 columns of h, or more than 128 ranks), and four where it has room for them.

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90a"), feature = "emulate"))]
mod config;
#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90a"), feature = "emulate"))]
mod kernel;

use crate::tile::TileShape;
#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90a"), feature = "emulate"))]
pub use config::{Config, Shaped};
#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90a"), feature = "emulate"))]
pub use kernel::prefill;

/// Most panels of `out` of a product: 128 columns.
const PRODUCT_PANELS: usize = 2;

/// Most panels, of each kind, of a step.
const MOST_PANELS: usize = 4;

/// Columns of `out` of a row of a panel.
const PANEL_COLUMNS: u32 = 64;

/// Least columns of h of a product.
const MIN_COLUMNS: u32 = 32;

/// Most columns of h, and so most ranks of a slice.
pub const MAX_WIDTH: u32 = 256;

/// Most columns of h of passes that blocks share.
pub const MAX_SHARED_WIDTH: u32 = 128;

/// Pairs of a warp of a consumer.
pub const WARP_ROWS: u32 = 16;

/// Counters of passes that blocks share: a workspace has room for so many.
pub const MAX_COUNTERS: u32 = 16 << 10;

/// Words of the split-K workspace that a pass's h takes, of two elements each.
pub const fn h_words(shape: Shape) -> u64 {
    (shape.rows * shape.width / 2) as u64
}

/// Words of the split-K workspace that partial sums in f32 take, beside so many words of h, of up to `splits`
/// splits of K: none where K is not split.
pub const fn sums_words(h_words: u64, splits: u32) -> u64 {
    if splits > 1 { 2 * h_words * splits as u64 } else { 0 }
}

/// Bytes of the split-K workspace of a pass with up to `splits` splits of K.
pub const fn workspace_bytes(shape: Shape, splits: u32) -> u64 {
    let h = h_words(shape);
    4 * (h + sums_words(h, splits))
}

/// Least columns of h of a slice: one fragment's.
const MIN_RANK_ROOM: u32 = 16;

/// Bytes of shared memory of a block that shares a multiprocessor of 228 KiB with another, and of one that
/// has it alone.
const SHARED_OF_TWO: u32 = 112 << 10;
const SHARED_OF_ONE: u32 = 224 << 10;

/// Threads of a warpgroup.
pub(crate) const WARPGROUP: u32 = 128;

/// Registers of a multiprocessor, and the most of a thread, in eights.
const REGISTERS: u32 = 64 << 10;
const MOST_REGISTERS: u32 = 248;

/// Most stages: more bytes in flight than theirs do not come sooner.
const MAX_STAGES: u32 = 6;

/// Bytes of all barriers, at the beginning of shared memory.
const BARRIERS_BYTES: u32 = 1024;

/// Bytes that a consumer thread keeps of a work tile.
const KEPT_BYTES: u32 = 32;

/// Bytes before the stages: the barriers, and what the consumers keep.
const HEAD_BYTES: u32 = BARRIERS_BYTES + KEPT_BYTES * WARPGROUP * MAX_CONSUMERS;

/// Most consumers of a block.
const MAX_CONSUMERS: u32 = 2;

/// The shape of a block's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Pairs of a tile: 64 a warpgroup.
    pub rows: u32,
    /// Columns of h.
    pub width: u32,
}

impl Shape {
    /// Columns of h that kernels are compiled for.
    pub const WIDTHS: [u32; 4] = [32, 64, 128, MAX_WIDTH];

    /// Passes over a tile of this rank, with that many slices.
    pub const fn passes(self, slices: u32, rank: u32) -> u32 {
        slices.div_ceil(self.width / rank_room(rank))
    }

    /// Consumers of a block: warpgroups that multiply.
    pub const fn consumers(self) -> u32 {
        self.rows / 64
    }

    /// Threads of a block: the consumers', then the producer's.
    pub const fn threads(self) -> u32 {
        WARPGROUP * (self.consumers() + 1)
    }

    /// Blocks that share a multiprocessor: as many as it has registers for.
    pub const fn blocks_per_sm(self) -> u32 {
        if self.rows > 64 || self.width > 128 { 1 } else { 2 }
    }

    /// Registers of a thread of the producer.
    pub const fn producer_registers(self) -> u32 {
        if self.blocks_per_sm() == 1 { 104 } else { 88 }
    }

    /// Registers of a thread of a consumer.
    pub const fn consumer_registers(self) -> u32 {
        // A launch gives all threads the same number, in eights.
        let launched = REGISTERS / self.blocks_per_sm() / self.threads() / 8 * 8;
        let left = launched * (self.consumers() + 1) - self.producer_registers();
        let each = left / self.consumers() / 8 * 8;
        if each < MOST_REGISTERS { each } else { MOST_REGISTERS }
    }

    /// Rows of 128 bytes of a stage: so many that rows in device memory are read and written 256 bytes at a
    /// time.
    const fn stage_rows(self) -> u32 {
        let weights = match self.width {
            ..=64 => 64,
            _ => 128,
        };
        PRODUCT_PANELS as u32 * (self.rows + weights)
    }

    /// Panels, of each kind, of a step whose weights have `weights` rows a panel: as many as a stage has room
    /// for.
    pub(crate) const fn panels(self, weights: u32) -> u32 {
        match self.stage_rows() / (self.rows + weights) {
            0..2 => 1,
            2..4 => 2,
            _ => MOST_PANELS as u32,
        }
    }

    /// Splits of K are multiples of so many elements: a step takes no more, so no step is of two splits.
    pub const fn split_k_unit(self) -> u32 {
        self.panels(MIN_COLUMNS) * TileShape::DEPTH
    }

    /// Splits of a slice's columns are multiples of so many, likewise.
    pub const fn split_n_unit(self) -> u32 {
        self.panels(PANEL_COLUMNS) * PANEL_COLUMNS
    }

    /// Counters of a pass that blocks share: two for each of its warps.
    pub const fn counters(self) -> u32 {
        2 * self.rows / WARP_ROWS
    }

    /// Panels of `out` of a product: one where h takes the registers that another's sums would need.
    pub const fn product_panels(self) -> u32 {
        if self.rows > 64 && self.width > 128 { 1 } else { PRODUCT_PANELS as u32 }
    }

    /// Whether blocks may share passes with so many columns of h.
    #[cfg(any(all(target_arch = "nvptx64", feature = "sm_90a"), feature = "emulate"))]
    const fn may_split(self) -> bool {
        self.width <= MAX_SHARED_WIDTH
    }

    /// Bytes of a stage.
    pub const fn stage_bytes(self) -> u32 {
        self.stage_rows() * TileShape::ROW_BYTES
    }

    /// Most stages for which a block has shared memory.
    pub const fn max_stages(self) -> u32 {
        let bytes = if self.blocks_per_sm() == 1 { SHARED_OF_ONE } else { SHARED_OF_TWO };
        let stages = (bytes - HEAD_BYTES) / self.stage_bytes();
        if stages < MAX_STAGES { stages } else { MAX_STAGES }
    }

    /// Bytes of shared memory of a block with `stages` stages.
    pub const fn shared_bytes(self, stages: u32) -> u32 {
        HEAD_BYTES + stages * self.stage_bytes()
    }
}

/// Columns of h that a slice of this rank takes.
pub const fn rank_room(rank: u32) -> u32 {
    let room = rank.next_power_of_two();
    if room < MIN_RANK_ROOM { MIN_RANK_ROOM } else { room }
}
