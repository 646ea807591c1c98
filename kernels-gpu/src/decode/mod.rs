//! `decode`: shrink and expand of few pairs a segment in one launch,
//! `out[p, offset + s·N + n] (+)= weight[p] · Σ_q (Σ_c x[row(p), c] · a[s][l, e, q, c]) · b[s][l, e, n, q]`.
//!
//! Such a call reads every weight of the adapters in use once and does hardly any arithmetic: it costs what the
//! weights' bytes cost, if nothing ever waits with no bytes under way. So the warps of a block have roles, and each
//! role goes through the units of work at its own pace. A *unit* is a tile of pairs and a slice; a cluster takes one
//! unit after another, and shares it.
//!
//! | warps | role |
//! |---|---|
//! | 4 | shrink: the block takes some of the ranks, in groups of 16, and where there are fewer groups than blocks a share of K; it sends its part of h to all blocks of the cluster |
//! | 4 | expand: adds up the parts of h that have come, always in the same order, and takes a share of the columns |
//! | 2 | fill a ring of stages for shrink: one with a, as soon as it knows the first tile, one with x, once pairs are listed |
//! | 1 | fills a ring for expand, with b and the old values of `out` |
//!
//! Who fills a ring does nothing but ask for the next stage, and needs no h.
//!
//! A block takes half of a multiprocessor ([`BLOCKS`]): the chain of waits of one unit runs beside that of another, and the
//! next launch makes itself ready beside the last units.
//!
//! Weights are mma's operand with sixteen rows, pairs its eight columns. Both come as sixteen bytes a thread: a
//! thread of number c in its quad holds elements 8c … 8c + 7 of a run of 32, which mma would have it hold as 2c,
//! 2c + 1, 2c + 8, 2c + 9 of two steps; since both operands are permuted alike, the sum is the same. Rows of b are
//! permuted so that a thread's two rows are neighbouring columns of the output.
//!
//! Segments come from [`segments`], found by each block itself, or from `route`.
//!
//! Shared memory, with `ROWS` pairs a tile:
//!
//! | bytes | what |
//! |---|---|
//! | 384 | barriers, and the number of units |
//! | [`Room::shared_bytes`] | the segments |
//! | 2 × ROWS × `row_bytes(R)` | h, in turns |
//! | 4 × ROWS × 80 | the shrink warps' sums of 16 ranks |
//! | 2 × `landing_bytes` | parts of h as they come from the blocks of the cluster, in turns |
//! | stages × [`shrink_stage_bytes`] | ring for shrink: 16 ranks of a and the tile's rows of x, `CHUNK` elements of K |
//! | stages × [`expand_stage_bytes`] | ring for expand: rows of b, and the old values of those columns |
//!
//! Before the ring for expand is used, it is the scratch of [`segments`].

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90"), feature = "emulate"))]
mod kernel;
pub mod segments;

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90"), feature = "emulate"))]
pub use kernel::decode;
use segments::Room;

/// Warps that shrink; as many expand.
const WORKERS: u32 = 4;
/// Warps that fill the ring for shrink, one with a and one with x; one fills that for expand.
const FILLERS: u32 = 2;
/// The first of them, with a: it needs no pairs, only a tile.
const FILL: u32 = 2 * WORKERS;
/// Lanes of a warp.
const LANES: u32 = 32;
/// Threads of a block.
pub const THREADS: u32 = LANES * (2 * WORKERS + FILLERS + 1);
/// Largest R.
pub const MAX_RANK: u32 = 512;
/// Most blocks of a cluster that every device with clusters allows.
pub const MAX_CLUSTER: u32 = 8;
/// Most stages of a ring.
pub const MAX_STAGES: u32 = 8;
/// Fewest stages of a ring: with one being multiplied, one is under way.
pub const MIN_STAGES: u32 = 2;
/// Blocks that a multiprocessor runs at a time, with tiles of 8 pairs and where their shared memory allows.
pub const BLOCKS: u32 = 2;
/// Bytes of shared memory that the device takes of each block for itself.
pub const RESERVED_BYTES: u32 = 1024;

/// Elements of K of a stage. In stages of 256 one token takes 1.1 µs more, and 80 tokens 3 to 6: a row is a copy, however
/// short.
const CHUNK: u32 = 512;
/// Most columns of a stage.
const MAX_COLUMNS: u32 = 256;
/// Elements that a quad of threads loads of a row at a time, sixteen bytes each.
const RUN: u32 = 32;
/// Rows of a matrix of weights that a warp multiplies at a time.
const GROUP: u32 = 16;

/// Bytes of the barriers: two a stage of each ring, two for each turn of h, one for the first stages of shrink, and one for the
/// segments; and of the numbers of tiles and of units.
const BARRIER_BYTES: u32 = 384;
const _: () = assert!(BARRIER_BYTES >= 8 * (4 * MAX_STAGES + 6) + 12);

/// Bytes from one row of `elements` elements of K or of ranks to the next: an odd multiple of 64, so that two quads
/// that read two rows at once meet different banks.
const fn row_bytes(elements: u32) -> u32 {
    (2 * elements).next_multiple_of(64) | 64
}

/// Bytes from one row of old values of `columns` columns to the next: such that a warp's reads of two columns of
/// eight rows meet different banks.
const fn old_row_bytes(columns: u32) -> u32 {
    2 * columns + 16
}

/// Bytes of a of a stage for shrink, without what keeps its rows apart.
pub const A_STAGE: u32 = 2 * GROUP * CHUNK;
/// Bytes of b of a stage for expand.
pub const B_STAGE: u32 = 16 << 10;
const _: () = assert!(B_STAGE / 2 / MAX_RANK >= GROUP);

/// Bytes of a stage for shrink, with `rows` pairs a tile.
pub const fn shrink_stage_bytes(rows: u32) -> u32 {
    (GROUP + rows) * row_bytes(CHUNK)
}

/// Bytes of a stage for expand, with `rows` pairs a tile.
pub const fn expand_stage_bytes(rows: u32) -> u32 {
    B_STAGE + rows * old_row_bytes(MAX_COLUMNS)
}

/// Bytes from one row to the next of a warp's sums: 16 floats, and a distance that keeps a warp's stores apart.
const SUM_ROW: u32 = 4 * (GROUP + 4);

/// Bytes that the parts of h of one unit take, sent by `cluster` blocks, a power of two.
const fn landing_bytes(rows: u32, max_rank: u32, cluster: u32) -> u32 {
    let groups = max_rank.div_ceil(GROUP);
    rows * 4 * GROUP * ((groups + cluster - 1) & !(cluster - 1))
}

/// Whether blocks of a cluster of `cluster`, a power of two, have a stage's elements of K or more of units of the largest rank: they share its groups of ranks, and where
/// there are fewer groups than blocks K as well.
pub const fn has_whole_stages(in_dim: u32, max_rank: u32, cluster: u32) -> bool {
    let groups = max_rank.div_ceil(GROUP).next_power_of_two();
    cluster <= groups || in_dim / (cluster / groups) >= CHUNK
}

/// Bytes of shared memory of a block beside its rings, with `rows` pairs a tile and room for the segments (none
/// when these come from `route`).
pub const fn fixed_bytes(rows: u32, max_rank: u32, cluster: u32, room: Room) -> u32 {
    let bytes = BARRIER_BYTES
        + room.shared_bytes()
        + 2 * rows * row_bytes(max_rank.next_multiple_of(RUN))
        + WORKERS * rows * SUM_ROW
        + 2 * landing_bytes(rows, max_rank, cluster);
    bytes.next_multiple_of(128)
}
