//! `decode`: shrink and expand of few pairs a segment in one launch,
//! `out[p, offset + s·N + n] (+)= weight[p] · Σ_q (Σ_c x[row(p), c] · a[s][l, e, q, c]) · b[s][l, e, n, q]`.
//!
//! Such a call reads every weight of the adapters in use once and does hardly any arithmetic. Its time is
//! that of the weights' bytes, as long as bytes are always under way. So the kernel is warp-specialised: each
//! role goes through the work items at its own pace. A *work item* is a tile of pairs and a slice. A cluster
//! takes one work item after another, and its blocks share each.
//!
//! | warps | role | what it does with a work item |
//! |---|---|---|
//! | 4 | shrink (consumers) | Multiplies x by the block's part of a; sends its part of h to the cluster. |
//! | 4 | expand (consumers) | Adds up the parts of h in a fixed order; multiplies by its columns of b. |
//! | 1 | A loader (producer) | Fills shrink's stages with a. Starts once it knows the first tile. |
//! | 1 | X loader (producer) | Fills shrink's stages with x. Starts once pairs are listed. |
//! | 1 | B loader (producer) | Fills expand's stages with b and the old values of `out`. |
//!
//! A block takes some of the ranks, in groups of 16. Where there are fewer groups than blocks, it takes a
//! split of K too. It expands some of the columns. No producer needs h, so none waits for a consumer but for
//! an empty stage.
//!
//! Two blocks share a multiprocessor ([`BLOCKS_PER_SM`]): while one waits, the other works.
//!
//! Weights are mma's operand with sixteen rows, pairs its eight columns. Both come as sixteen bytes a thread:
//! a thread of number c in its quad holds elements 8c … 8c + 7 of a run of 32, which mma would have it hold
//! as 2c, 2c + 1, 2c + 8, 2c + 9 of two steps. Both operands are permuted alike, so the sum is the same. Rows
//! of b are permuted so that a thread's two rows are neighbouring columns of the output.
//!
//! Segments come from [`segments`], found by each block itself, or from `route`.
//!
//! Shared memory, with `ROWS` pairs a tile:
//!
//! | bytes | what |
//! |---|---|
//! | 384 | barriers, the numbers of tiles, and that of work items |
//! | [`Room::shared_bytes`] | the segments |
//! | 2 × ROWS × `row_bytes(R)` | h, in two buffers |
//! | 4 × ROWS × 80 | the shrink warps' sums of 16 ranks |
//! | 2 × `receive_bytes` | two receive buffers: the parts of h that the blocks of the cluster send |
//! | stages × [`shrink_stage_bytes`] | shrink's stages: `STAGE_K` elements of 16 rows of a and ROWS of x |
//! | stages × [`expand_stage_bytes`] | expand's stages: rows of b, and the old values of those columns |
//!
//! Before expand's stages are used, they are the scratch of [`segments`].

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod config;
#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90"), feature = "emulate"))]
mod kernel;
pub mod segments;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use config::{Config, Rows};
#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90"), feature = "emulate"))]
pub use kernel::decode;
use segments::Room;

/// Warps that shrink. As many expand.
const CONSUMER_WARPS: u32 = 4;
/// The first warp that expands.
const EXPAND: u32 = CONSUMER_WARPS;
/// The warp that loads a, the first of the producers.
const A_LOADER: u32 = EXPAND + CONSUMER_WARPS;
/// The warp that loads x. It also lists few pairs, and knows how many tiles there are.
const X_LOADER: u32 = A_LOADER + 1;
/// The warp that loads b.
const B_LOADER: u32 = X_LOADER + 1;
/// Lanes of a warp.
const LANES: u32 = 32;
/// Threads of a block.
pub const THREADS: u32 = LANES * (B_LOADER + 1);
/// Largest R.
pub const MAX_RANK: u32 = 512;
/// Most blocks of a cluster that every device with clusters allows.
pub const MAX_CLUSTER: u32 = 8;
/// Most stages of a pipeline.
pub const MAX_STAGES: u32 = 8;
/// Fewest stages of a pipeline: with one being multiplied, one is under way.
pub const MIN_STAGES: u32 = 2;
/// Blocks that a multiprocessor runs at a time, with tiles of 8 pairs and where their shared memory allows.
pub const BLOCKS_PER_SM: u32 = 2;
/// Bytes of shared memory that the device takes of each block for itself.
pub const RESERVED_BYTES: u32 = 1024;

/// Elements of K of a stage. A row of a stage is one copy, which takes as long if it is short: so rows are
/// long.
const STAGE_K: u32 = 512;
/// Most columns of a stage.
const MAX_COLUMNS: u32 = 256;
/// Elements that a quad of threads loads of a row at a time, sixteen bytes each.
const RUN: u32 = 32;
/// Rows of a matrix of weights that a warp multiplies at a time.
const GROUP: u32 = 16;

/// Bytes of the barriers: two a stage of each pipeline, two for each buffer of h, and two more; then of the
/// numbers of tiles and of work items.
const BARRIER_BYTES: u32 = 384;
const _: () = assert!(BARRIER_BYTES >= 8 * (4 * MAX_STAGES + 6) + 12);

/// Bytes from one row of `elements` elements of K or of ranks to the next: an odd multiple of 64, so that two
/// quads that read two rows at once meet different banks.
const fn row_bytes(elements: u32) -> u32 {
    (2 * elements).next_multiple_of(64) | 64
}

/// Bytes from one row of old values of `columns` columns to the next: such that a warp's reads of two columns
/// of eight rows meet different banks.
const fn old_row_bytes(columns: u32) -> u32 {
    2 * columns + 16
}

/// Bytes of a of a stage for shrink, without what keeps its rows apart.
pub const A_STAGE: u32 = 2 * GROUP * STAGE_K;
/// Bytes of b of a stage for expand.
pub const B_STAGE: u32 = 16 << 10;
const _: () = assert!(B_STAGE / 2 / MAX_RANK >= GROUP);

/// Bytes of a stage for shrink, with `rows` pairs a tile.
pub const fn shrink_stage_bytes(rows: u32) -> u32 {
    (GROUP + rows) * row_bytes(STAGE_K)
}

/// Bytes of a stage for expand, with `rows` pairs a tile.
pub const fn expand_stage_bytes(rows: u32) -> u32 {
    B_STAGE + rows * old_row_bytes(MAX_COLUMNS)
}

/// Bytes from one row to the next of a warp's sums: 16 floats, and a distance that keeps a warp's stores
/// apart.
const SUM_ROW: u32 = 4 * (GROUP + 4);

/// Bytes of a receive buffer: the parts of h of one work item, sent by `cluster` blocks, a power of two.
const fn receive_bytes(rows: u32, max_rank: u32, cluster: u32) -> u32 {
    let groups = max_rank.div_ceil(GROUP);
    rows * 4 * GROUP * ((groups + cluster - 1) & !(cluster - 1))
}

/// Whether each block of a cluster of `cluster`, a power of two, has at least a whole stage's elements of K
/// of work items of the largest rank. The blocks share its groups of ranks; where there are fewer groups than
/// blocks, they split K as well.
pub const fn has_whole_stages(in_dim: u32, max_rank: u32, cluster: u32) -> bool {
    let groups = max_rank.div_ceil(GROUP).next_power_of_two();
    cluster <= groups || in_dim / (cluster / groups) >= STAGE_K
}

/// Bytes of shared memory of a block beside its stages, with `rows` pairs a tile and room for the segments
/// (none when these come from `route`).
pub const fn fixed_bytes(rows: u32, max_rank: u32, cluster: u32, room: Room) -> u32 {
    let bytes = BARRIER_BYTES
        + room.shared_bytes()
        + 2 * rows * row_bytes(max_rank.next_multiple_of(RUN))
        + CONSUMER_WARPS * rows * SUM_ROW
        + 2 * receive_bytes(rows, max_rank, cluster);
    bytes.next_multiple_of(128)
}
