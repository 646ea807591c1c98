//! `expand`: `out[p, offset + s·N + n] (+)= weight[p] · Σ_q h[s, p, q] · b[s][l, e, n, q]`, for the pairs of
//! one tile.
//!
//! One block takes a tile of pairs and a run of columns of one slice. The tile's h stays in shared memory.
//! b passes through a pipeline of stages, one panel of 64 ranks of one tile of columns a step. The old values
//! of `out` are loaded before the product that they are added to.
//!
//! Shared memory:
//!
//! | bytes | what |
//! |---|---|
//! | ⌈R / 64⌉ × rows × 128 | panels of h, one row a pair |
//! | `STAGES` × columns × 128 | panels of b, one row a column |

use crate::tile::TileShape;

/// Stages of the pipeline: one step is multiplied while two are under way.
pub const STAGES: u32 = 3;

/// Panels of h that hold `rank` ranks.
pub const fn panels(rank: u32) -> u32 {
    rank.div_ceil(TileShape::DEPTH)
}

/// Bytes of shared memory of a block.
pub const fn shared_bytes(shape: TileShape, max_rank: u32) -> u32 {
    (panels(max_rank) * shape.rows() + STAGES * shape.columns()) * TileShape::ROW_BYTES
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod rows;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::expand;
