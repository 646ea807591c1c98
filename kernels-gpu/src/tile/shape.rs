//! The tile shapes that kernels are compiled for.

/// Columns that one warp takes at a time: four n8 tiles, so that a thread ends up with eight columns
/// side by side (see [`accumulator`](mod@super)).
pub const GROUP: u32 = 32;

/// How a block's warps divide a tile of pairs × columns.
///
/// A warp takes `row_fragments` m16 fragments of pairs by `groups` groups of 32 columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    /// m16 fragments a warp.
    pub row_fragments: u32,
    /// Warps along the pairs.
    pub row_warps: u32,
    /// Groups of 32 columns a warp.
    pub groups: u32,
    /// Warps along the columns.
    pub column_warps: u32,
}

impl TileShape {
    /// 16 pairs × 128 columns: few pairs a segment, every weight is read once.
    pub const M16: Self = TileShape { row_fragments: 1, row_warps: 1, groups: 1, column_warps: 4 };
    /// 32 pairs × 128 columns.
    pub const M32: Self = TileShape { row_fragments: 2, row_warps: 1, groups: 1, column_warps: 4 };
    /// 64 pairs × 128 columns: many pairs a segment.
    pub const M64: Self = TileShape { row_fragments: 2, row_warps: 2, groups: 2, column_warps: 2 };

    /// Elements of the innermost dimension (K or rank) that one step takes: a 128-byte row.
    pub const DEPTH: u32 = 64;
    /// Bytes of one row of a panel in shared memory.
    pub const ROW_BYTES: u32 = Self::DEPTH * 2;
    /// Threads of every block.
    pub const THREADS: u32 = 128;

    /// Pairs of a tile.
    pub const fn rows(self) -> u32 {
        16 * self.row_fragments * self.row_warps
    }

    /// Columns of a tile.
    pub const fn columns(self) -> u32 {
        GROUP * self.groups * self.column_warps
    }
}

const _: () = {
    let shapes = [TileShape::M16, TileShape::M32, TileShape::M64];
    let mut i = 0;
    while i < shapes.len() {
        assert!(shapes[i].row_warps * shapes[i].column_warps * 32 == TileShape::THREADS);
        i += 1;
    }
};
