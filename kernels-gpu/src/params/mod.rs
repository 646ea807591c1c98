//! What the host hands to a kernel: one `repr(C)` block a launch, passed by value.
//!
//! 16-bit floats are `u16` here: a block is the same for bf16 and f16, the entry point knows which.

mod decode;
mod generic;
mod prefill;
mod route;
mod rows;
mod weights;

#[cfg(not(target_arch = "nvptx64"))]
use bytemuck::{Pod, Zeroable};

pub use decode::DecodeParams;
pub use generic::{ExpandParams, ShrinkParams};
pub use prefill::{PrefillParams, products};
pub use route::{AdoptParams, AlignParams, RouteParams};
pub use rows::{NO_PAIR, PairRows, indexed};
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use weights::Matrix;
pub use weights::{AdapterEntry, WeightParams};

/// Most slices of a projection.
pub const MAX_SLICES: usize = 4;

/// Division of 31-bit numbers by a 31-bit divisor that is known when the block is made: a
/// multiplication and a shift.
///
/// With `shift = ⌈log2 d⌉` and `magic = ⌈2^(31+shift) / d⌉`, `magic·d − 2^(31+shift) < 2^shift`, so
/// the error of `n·magic / 2^(31+shift)` stays below 1/d for every n < 2³¹ (Granlund and Montgomery,
/// "Division by invariant integers using multiplication", 1994).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct Divider {
    magic: u32,
    shift: u32,
}

impl Divider {
    /// Largest divisor.
    pub const MAX: u32 = i32::MAX as u32;

    /// Division by `divisor`, which must be 1 ..= [`Divider::MAX`].
    ///
    /// # Panics
    /// For any other divisor.
    pub const fn new(divisor: u32) -> Self {
        assert!(divisor >= 1 && divisor <= Self::MAX);
        let shift = divisor.next_power_of_two().trailing_zeros();
        let magic = (1u64 << (31 + shift)).div_ceil(divisor as u64);
        // For powers of two the quotient is exactly 2^31: it fits, as every quotient does.
        Divider { magic: magic as u32, shift }
    }

    /// `n / divisor`, for `n` below 2³¹.
    #[inline(always)]
    pub const fn quotient(self, n: u32) -> u32 {
        ((n as u64 * self.magic as u64) >> (31 + self.shift)) as u32
    }
}

/// How K (split-K), or the columns of a slice (split-N), is split over blocks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct Split {
    /// Splits.
    pub count: u32,
    /// Elements of each but the last, which may have fewer: a multiple of what a step takes, or all of them.
    pub each: u32,
}

impl Split {
    /// Most splits.
    pub const MAX: u32 = 64;

    /// Blocks do not share.
    pub const NONE: Self = Split { count: 0, each: 0 };
}

/// One tile of work: up to `tile_rows` pairs of one segment. Written by `route` or `adopt`, read by the
/// others.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "nvptx64"), derive(Pod, Zeroable))]
pub struct Tile {
    /// Adapter slot.
    pub slot: u32,
    /// Local expert.
    pub expert: u32,
    /// Position of the tile's first pair in the sorted pair list.
    pub first: u32,
    /// Pairs in the tile, 0 ..= `tile_rows`; none when `adopt` found a block without any.
    pub rows: u32,
    /// Rank in use, 0 ..= R. 0 marks pairs that are inactive and must be zeroed.
    pub rank: u32,
    /// To 32 bytes, so that a tile is two 16-byte loads.
    pub reserved: [u32; 3],
}

impl Tile {
    /// No pairs.
    pub const EMPTY: Self = Tile { slot: 0, expert: 0, first: 0, rows: 0, rank: 0, reserved: [0; 3] };

    /// Part `part` of the tile, `rows` pairs at most; no pairs when the tile ends before it. A route may be
    /// used by kernels of smaller tiles than it was cut into.
    #[inline(always)]
    pub fn part(self, part: u32, rows: u32) -> Self {
        let skipped = part * rows;
        Tile { first: self.first + skipped, rows: self.rows.saturating_sub(skipped).min(rows), ..self }
    }
}

/// How `topk_ids` is stored.
pub mod expert_ids {
    /// No tensor: every pair is of expert 0.
    pub const NONE: u32 = 0;
    /// One 32-bit integer a pair.
    pub const I32: u32 = 1;
    /// One 64-bit integer a pair.
    pub const I64: u32 = 2;
}

/// How `adapter_enabled` is stored.
pub mod enabled {
    /// No tensor: every slot is on.
    pub const ALL: u32 = 0;
    /// One byte a slot.
    pub const U8: u32 = 1;
    /// One 32-bit integer a slot.
    pub const I32: u32 = 2;
}

/// Index into the tile counts that `route` leaves.
pub mod count {
    /// Tiles of active pairs: these come first in the list.
    pub const ACTIVE: u32 = 0;
    /// All tiles, those of inactive pairs included.
    pub const ALL: u32 = 1;
    /// How many counts there are.
    pub const LEN: usize = 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divider_divides_like_the_processor() {
        let numbers = (0..10_000).chain((0..10_000).map(|i| i32::MAX as u32 - i));
        for n in numbers {
            for d in (1..=64).chain([127, 128, 129, 264, 40_000, 65_535, 65_537, 1 << 30, Divider::MAX]) {
                assert_eq!(Divider::new(d).quotient(n), n / d, "{n} / {d}");
            }
        }
    }
}
