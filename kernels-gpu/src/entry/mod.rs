//! The entry points: what each computes, how it is launched, and the table of all of them.
//!
//! `table.rs` has one row a kernel and tile. `stamp.rs` makes three things of each row: the [`Entry`] that
//! the build and the host read, the function in the device's module, and the same function for the emulated
//! machine.
//!
//! Names are `kernel_dtype_index_tile`, for example `shrink_bf16_i32_m16`. The tile `any` takes shapes and
//! addresses that are not multiples of 8 elements. The tile of `prefill` also says how many columns of h it
//! takes: `prefill_bf16_i32_m64_w128`.

#[macro_use]
mod stamp;
mod table;

use crate::tile::TileShape;
use crate::{adopt, align, decode, prefill, route};

pub use table::ENTRIES;
#[cfg(feature = "emulate")]
pub(crate) use table::emulated;

/// Element type that an entry point is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// Width of element offsets within a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IndexWidth {
    /// For calls whose largest element offset over all tensors fits 31 bits.
    I32,
    /// For all others.
    I64,
}

/// The kernels' tile shapes, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TileKind {
    /// [`TileShape::M16`].
    M16,
    /// [`TileShape::M32`].
    M32,
    /// [`TileShape::M64`].
    M64,
    /// [`TileShape::M16`], for sizes and addresses that are not multiples of 8 elements.
    Any,
}

impl TileKind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::M16, Self::M32, Self::M64, Self::Any];

    /// The shape behind the name.
    pub const fn shape(self) -> TileShape {
        match self {
            TileKind::M16 | TileKind::Any => TileShape::M16,
            TileKind::M32 => TileShape::M32,
            TileKind::M64 => TileShape::M64,
        }
    }

    /// Whether sizes and addresses must be multiples of 8 elements.
    #[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
    const fn is_aligned(self) -> bool {
        !matches!(self, TileKind::Any)
    }

    /// Blocks of `shrink` or `expand` that must fit on one multiprocessor: as many as the tile's shared
    /// memory allows at R = 64, so that registers do not limit the loads in flight.
    const fn min_blocks(self) -> u32 {
        match self {
            TileKind::M16 | TileKind::M32 => 4,
            TileKind::M64 => 3,
            TileKind::Any => 2,
        }
    }
}

/// Pairs of a tile of `decode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DecodeRows {
    /// 8.
    M8,
    /// 16.
    M16,
}

impl DecodeRows {
    /// All of them, the smallest first.
    pub const ALL: [Self; 2] = [Self::M8, Self::M16];

    /// How many.
    pub const fn count(self) -> u32 {
        match self {
            DecodeRows::M8 => 8,
            DecodeRows::M16 => 16,
        }
    }

    /// Blocks that must fit on one multiprocessor. A tile of 16 pairs has twice the sums of one of 8, and a
    /// second block's registers have no room for them.
    const fn min_blocks(self) -> u32 {
        match self {
            DecodeRows::M8 => 2,
            DecodeRows::M16 => 1,
        }
    }
}

/// What [`crate::decode`] is stamped out over, beside type and index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DecodeTile {
    /// Pairs of a tile.
    pub rows: DecodeRows,
    /// Whether a call may be any. If not it is plain: weights are stacked, slices in order and of one width,
    /// and no rows are indexed. What other calls need is asked for in every work item, and lengthens it.
    pub is_general: bool,
}

/// What an entry point computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// [`crate::route`] in one block. Its offsets are below 2³¹ whatever the call, and it reads no
    /// activations: it has no variants.
    Route,
    /// [`crate::route`] in a grid whose blocks all run at once.
    RouteGrid,
    /// [`crate::route`] in such a grid, of anything.
    RouteWide,
    /// [`crate::align`], a block a slot. No variants either.
    Align,
    /// [`crate::align`], a cluster a slot.
    AlignCluster,
    /// [`crate::adopt`]. No variants either.
    Adopt,
    /// [`crate::shrink`].
    Shrink(Variant),
    /// [`crate::expand`].
    Expand(Variant),
    /// [`crate::decode`].
    Decode {
        /// Type of activations and weights.
        element: ElementType,
        /// Width of offsets.
        index: IndexWidth,
        /// Pairs of a tile, and for which calls.
        tile: DecodeTile,
    },
    /// [`crate::prefill`].
    Prefill(PrefillVariant),
}

impl Kernel {
    /// Threads a block.
    const fn threads(self) -> u32 {
        match self {
            Kernel::Route => route::BLOCK_THREADS,
            Kernel::RouteGrid | Kernel::RouteWide => route::GRID_THREADS,
            Kernel::Align | Kernel::AlignCluster => align::THREADS,
            Kernel::Adopt => adopt::THREADS,
            Kernel::Shrink(_) | Kernel::Expand(_) => TileShape::THREADS,
            Kernel::Decode { .. } => decode::THREADS,
            Kernel::Prefill(variant) => variant.shape.threads(),
        }
    }

    /// Blocks that must fit on one multiprocessor at a time.
    const fn min_blocks(self) -> u32 {
        match self {
            Kernel::Route | Kernel::RouteGrid | Kernel::RouteWide => 1,
            Kernel::Align | Kernel::AlignCluster | Kernel::Adopt => 1,
            Kernel::Shrink(variant) | Kernel::Expand(variant) => variant.tile.min_blocks(),
            Kernel::Decode { tile, .. } => tile.rows.min_blocks(),
            Kernel::Prefill(variant) => variant.shape.blocks_per_sm(),
        }
    }

    /// Most blocks of a cluster; 1: no clusters.
    const fn cluster(self) -> u32 {
        match self {
            Kernel::AlignCluster => align::CLUSTER,
            Kernel::Decode { .. } => decode::MAX_CLUSTER,
            _ => 1,
        }
    }
}

/// What [`crate::prefill`] is stamped out over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PrefillVariant {
    /// Type of activations and weights.
    pub element: ElementType,
    /// Width of offsets.
    pub index: IndexWidth,
    /// Pairs a tile, and columns of h.
    pub shape: prefill::Shape,
}

/// What a kernel is stamped out over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    /// Type of activations and weights.
    pub element: ElementType,
    /// Width of offsets.
    pub index: IndexWidth,
    /// Tile shape.
    pub tile: TileKind,
}

/// One kernel entry point as it stands in the PTX module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Symbol in the module, for example `shrink_bf16_i32_m16`.
    pub name: &'static str,
    /// What it computes.
    pub kernel: Kernel,
    /// Threads a block (`.maxntid`): the launch must use exactly this many.
    pub threads: u32,
    /// Blocks that must fit on one multiprocessor at a time (`.minnctapersm`); bounds the registers.
    pub min_blocks: u32,
    /// Most blocks of a cluster; 1: no clusters. The launch says how many.
    pub cluster: u32,
}

/// Least compute capability, times ten, that has clusters.
pub const CLUSTERS_SINCE: u32 = 90;

/// The compute capability, times ten, whose module (for `sm_90a`) has wgmma: no other has.
pub const WGMMA_ON: u32 = 90;

/// The compute capability, times ten, from which on a multiprocessor has 100 KiB of shared memory in place of
/// 228: enough for one block of `decode`.
const LESS_SHARED_SINCE: u32 = 120;

impl Entry {
    /// The entry point `name`, with the launch bounds of its kernel.
    const fn new(name: &'static str, kernel: Kernel) -> Self {
        Entry {
            name,
            kernel,
            threads: kernel.threads(),
            min_blocks: kernel.min_blocks(),
            cluster: kernel.cluster(),
        }
    }

    /// [`Entry::min_blocks`] in a module for this compute capability (times ten).
    pub const fn min_blocks_on(&self, capability: u32) -> u32 {
        let alone = matches!(self.kernel, Kernel::Decode { .. }) && capability >= LESS_SHARED_SINCE;
        if alone { 1 } else { self.min_blocks }
    }

    /// True when a module for this compute capability (times ten) has the entry point.
    pub const fn is_on(&self, capability: u32) -> bool {
        let has_clusters = self.cluster == 1 || capability >= CLUSTERS_SINCE;
        let has_wgmma = !matches!(self.kernel, Kernel::Prefill(_)) || capability == WGMMA_ON;
        has_clusters && has_wgmma
    }
}
