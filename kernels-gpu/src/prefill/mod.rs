//! `prefill`: a whole call of many pairs a segment in one launch, on warpgroups:
//! `h[s, p, q] = Σ_c x[row(p), c] · a[s][l, e, q, c]`, then
//! `out[p, offset + s·N + n] (+)= weight[p] · Σ_q h[s, p, q] · b[s][l, e, n, q]`.
//!
//! A tile of the route, of up to 64 or 128 pairs, is taken in *passes*, each of as many slices as the kernel has columns of h for, and the rank that
//! weights are allocated for asks for: a pass reads x, and keeps its h until its slices are written. The tile's own rank decides what it
//! costs, not the allocation's. A column of h is a (slice, rank): a slice has a power of two of them, so that 16 of a slice's
//! ranks are one fragment.
//!
//! As many blocks as the device runs at a time take one pass after another, their *turns* (`turns`), in the order of the route's list, so that tiles
//! of one segment run side by side and share its weights in L2: each block the next one when it has room for it. One of its
//! warpgroups copies (`producer`); each of the others computes for 64 of the pairs (`consumer`), whose h goes from the
//! sums of the first product to the rows of the second without leaving registers.
//!
//! Where passes are so few that many multiprocessors would have none, or half of them one more than others, blocks share them. A turn is then a share of K of a pass, or a share of a slice's
//! columns, and those of K come first. Blocks that have one leave their sums in f32 in device memory, add up a part of h each, in the order of K, and leave that, or h itself where a share is all of K; those
//! that expand wait for it (`exchange`). Meanwhile their producers copy what they expand, so the memory waits for none of this.
//!
//! All that a block reads passes through one `ring` of stages, as one succession of *steps*: 128 elements of K of x
//! and `a`; then, slice by slice, 128 columns of `out`'s old values and of `b`; then the next turn's.
//! The producer is ahead by as many steps as the ring has stages, across the ends of slices and turns, so the memory never
//! waits for a product.
//!
//! Shared memory, `stages` times, in panels of 128-byte rows:
//!
//! | panels | a step of shrink | a step of expand |
//! |---|---|---|
//! | one row a pair | x, 64 elements of K each | old values of `out`, 64 columns each |
//! | one row a column of h, or 64 rows | `a`, 64 elements of K each | `b`, 64 ranks of 64 columns each |
//!
//! There are two of each in a step, of `b` for every 64 ranks; one where a stage has no room for two, of 256 columns of h
//! or more than 128 ranks; and four of x and `a` where it has room for these.

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90a"), feature = "emulate"))]
mod kernel;

use crate::tile::TileShape;
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

/// Pairs of a warp of a computing warpgroup.
pub const WARP_ROWS: u32 = 16;

/// Counters of passes that blocks share, for which a workspace has room.
pub const MAX_COUNTERS: u32 = 16 << 10;

/// Words of the h that blocks leave for one another of a pass, of two elements each.
pub const fn h_words(shape: Shape) -> u64 {
    (shape.rows * shape.width / 2) as u64
}

/// Words of the sums in f32 that up to `shares` shares of K leave beside so many words of h: none where one has all of K.
pub const fn sums_words(h_words: u64, shares: u32) -> u64 {
    if shares > 1 { 2 * h_words * shares as u64 } else { 0 }
}

/// Bytes of what blocks tell one another of a pass with up to `shares` shares of K.
pub const fn workspace_bytes(shape: Shape, shares: u32) -> u64 {
    let h = h_words(shape);
    4 * (h + sums_words(h, shares))
}

/// Least columns of a slice in h: one fragment's.
const MIN_RANK_ROOM: u32 = 16;

/// Bytes of shared memory of a block that shares a multiprocessor of 228 KiB with another, and of one that has it
/// alone.
const SHARED_OF_TWO: u32 = 112 << 10;
const SHARED_OF_ONE: u32 = 224 << 10;

/// Threads of a warpgroup.
pub(crate) const WARPGROUP: u32 = 128;

/// Registers of a multiprocessor, and the most of a thread, in eights.
const REGISTERS: u32 = 64 << 10;
const MOST_REGISTERS: u32 = 248;

/// Most stages: more bytes than so many have under way do not come sooner.
const MAX_STAGES: u32 = 6;

/// Bytes of all barriers, at the beginning of shared memory; stages begin at multiples of 1024.
const BARRIERS_BYTES: u32 = 1024;

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

    /// Warpgroups of a block that compute.
    pub const fn consumers(self) -> u32 {
        self.rows / 64
    }

    /// Threads of a block: those that compute, then the warpgroup that copies.
    pub const fn threads(self) -> u32 {
        WARPGROUP * (self.consumers() + 1)
    }

    /// Blocks that share a multiprocessor: as many as it has registers for.
    pub const fn blocks_per_sm(self) -> u32 {
        if self.rows > 64 || self.width > 128 { 1 } else { 2 }
    }

    /// Registers of a thread that copies.
    pub const fn producer_registers(self) -> u32 {
        if self.blocks_per_sm() == 1 { 104 } else { 88 }
    }

    /// Registers of a thread that computes.
    pub const fn consumer_registers(self) -> u32 {
        // A launch gives all threads as many, in eights.
        let launched = REGISTERS / self.blocks_per_sm() / self.threads() / 8 * 8;
        let left = launched * (self.consumers() + 1) - self.producer_registers();
        let each = left / self.consumers() / 8 * 8;
        if each < MOST_REGISTERS { each } else { MOST_REGISTERS }
    }

    /// Rows of 128 bytes of a stage: so many that rows in device memory are read and written 256 bytes at a time.
    const fn stage_rows(self) -> u32 {
        let weights = match self.width {
            ..=64 => 64,
            _ => 128,
        };
        PRODUCT_PANELS as u32 * (self.rows + weights)
    }

    /// Most panels, of each kind, of a step whose weights have `weights` rows a panel: as many as a stage has room for.
    pub(crate) const fn panels(self, weights: u32) -> u32 {
        match self.stage_rows() / (self.rows + weights) {
            0..2 => 1,
            2..4 => 2,
            _ => MOST_PANELS as u32,
        }
    }

    /// Elements of K that shares of it are multiples of: a step takes no more, so none is of two shares.
    pub const fn split_k_unit(self) -> u32 {
        self.panels(MIN_COLUMNS) * TileShape::DEPTH
    }

    /// Columns that shares of a slice's are multiples of, likewise.
    pub const fn split_n_unit(self) -> u32 {
        self.panels(PANEL_COLUMNS) * PANEL_COLUMNS
    }

    /// Counters of a pass that blocks share: two for each of its warps.
    pub const fn counters(self) -> u32 {
        2 * self.rows / WARP_ROWS
    }

    /// Panels of `out` of a product. One, where so many columns of h take the registers of another's sums.
    pub const fn product_panels(self) -> u32 {
        if self.rows > 64 && self.width > 128 { 1 } else { PRODUCT_PANELS as u32 }
    }

    /// Bytes of a stage.
    pub const fn stage_bytes(self) -> u32 {
        self.stage_rows() * TileShape::ROW_BYTES
    }

    /// Most stages of the ring for which a block has shared memory.
    pub const fn max_stages(self) -> u32 {
        let bytes = if self.blocks_per_sm() == 1 { SHARED_OF_ONE } else { SHARED_OF_TWO };
        let stages = (bytes - BARRIERS_BYTES) / self.stage_bytes();
        if stages < MAX_STAGES { stages } else { MAX_STAGES }
    }

    /// Bytes of shared memory of a block with a ring of `stages` stages: their barriers, then they.
    pub const fn shared_bytes(self, stages: u32) -> u32 {
        BARRIERS_BYTES + stages * self.stage_bytes()
    }
}

/// Columns of h that a slice of this rank takes.
pub const fn rank_room(rank: u32) -> u32 {
    let room = rank.next_power_of_two();
    if room < MIN_RANK_ROOM { MIN_RANK_ROOM } else { room }
}
