//! The entry points: one macro stamps a kernel out over element type, index width and tile shape, and
//! keeps the table that the build and the host read.
//!
//! Names are `kernel_dtype_index_tile`, for example `shrink_bf16_i32_m16`. The tile `any` takes shapes and
//! addresses that are not multiples of 8 elements. The tile of `prefill` says how many columns of h it takes, too:
//! `prefill_bf16_i32_m64_w128`.

use crate::tile::TileShape;
use crate::{adopt, align, decode, prefill, route};

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
        /// Pairs of a tile.
        rows: DecodeRows,
    },
    /// [`crate::prefill`].
    Prefill(PrefillVariant),
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

/// The compute capability, times ten, from which on a multiprocessor has 100 KiB of shared memory, not 228 as before: what
/// one block of `decode` takes.
const LESS_SHARED_SINCE: u32 = 120;

impl Entry {
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

/// A function as an entry point: by its calling convention, or, for rust-cuda's back end, by an attribute.
#[cfg(target_arch = "nvptx64")]
macro_rules! entry_point {
    (#[$symbol:meta] fn $name:ident($p:ident: $Params:ty) $body:block) => {
        #[$symbol]
        #[cfg(not(feature = "rust_cuda"))]
        unsafe extern "ptx-kernel" fn $name($p: $Params) $body

        #[$symbol]
        #[cfg(feature = "rust_cuda")]
        #[nvvm_internal::kernel]
        unsafe extern "C" fn $name($p: $Params) $body
    };
}

macro_rules! entries {
    (
        $($kernel:ident $Kernel:ident $Params:ident [$($tile:literal $Tile:ident $min_blocks:literal,)*])*;
        decode [$($decode_tile:literal $Rows:ident $decode_min_blocks:literal,)*];
        prefill [$($prefill:literal $rows:literal $width:literal,)*]
    ) => {
        /// Every entry point of the module.
        pub const ENTRIES: &[Entry] = &[
            Entry {
                name: "route",
                kernel: Kernel::Route,
                threads: route::BLOCK_THREADS,
                min_blocks: 1,
                cluster: 1,
            },
            Entry {
                name: "route_grid",
                kernel: Kernel::RouteGrid,
                threads: route::GRID_THREADS,
                min_blocks: 1,
                cluster: 1,
            },
            Entry {
                name: "route_wide",
                kernel: Kernel::RouteWide,
                threads: route::GRID_THREADS,
                min_blocks: 1,
                cluster: 1,
            },
            Entry { name: "align", kernel: Kernel::Align, threads: align::THREADS, min_blocks: 1, cluster: 1 },
            Entry {
                name: "align_cluster",
                kernel: Kernel::AlignCluster,
                threads: align::THREADS,
                min_blocks: 1,
                cluster: align::CLUSTER,
            },
            Entry { name: "adopt", kernel: Kernel::Adopt, threads: adopt::THREADS, min_blocks: 1, cluster: 1 },
            $($(
                entries!(@row $kernel $Kernel "bf16" Bf16 "i32" I32 $tile $Tile $min_blocks),
                entries!(@row $kernel $Kernel "bf16" Bf16 "i64" I64 $tile $Tile $min_blocks),
                entries!(@row $kernel $Kernel "f16" F16 "i32" I32 $tile $Tile $min_blocks),
                entries!(@row $kernel $Kernel "f16" F16 "i64" I64 $tile $Tile $min_blocks),
            )*)*
            $(
                entries!(@decode_row "bf16" Bf16 "i32" I32 $decode_tile $Rows $decode_min_blocks),
                entries!(@decode_row "bf16" Bf16 "i64" I64 $decode_tile $Rows $decode_min_blocks),
                entries!(@decode_row "f16" F16 "i32" I32 $decode_tile $Rows $decode_min_blocks),
                entries!(@decode_row "f16" F16 "i64" I64 $decode_tile $Rows $decode_min_blocks),
            )*
            $(
                entries!(@prefill_row "bf16" Bf16 "i32" I32 $prefill $rows $width),
                entries!(@prefill_row "bf16" Bf16 "i64" I64 $prefill $rows $width),
                entries!(@prefill_row "f16" F16 "i32" I32 $prefill $rows $width),
                entries!(@prefill_row "f16" F16 "i64" I64 $prefill $rows $width),
            )*
        ];

        /// The entry point `name`, as the emulated machine calls it: on the bytes of its parameter block.
        #[cfg(feature = "emulate")]
        pub(crate) fn emulated(name: &str) -> Option<fn(&[u8])> {
            use crate::arch::mma::{Bf16, F16};

            $($(
                entries!(@emulate name $kernel $Params "bf16" Bf16 "i32" u32 $tile $Tile);
                entries!(@emulate name $kernel $Params "bf16" Bf16 "i64" u64 $tile $Tile);
                entries!(@emulate name $kernel $Params "f16" F16 "i32" u32 $tile $Tile);
                entries!(@emulate name $kernel $Params "f16" F16 "i64" u64 $tile $Tile);
            )*)*
            $(
                entries!(@emulate_decode name "bf16" Bf16 "i32" u32 $decode_tile $Rows);
                entries!(@emulate_decode name "bf16" Bf16 "i64" u64 $decode_tile $Rows);
                entries!(@emulate_decode name "f16" F16 "i32" u32 $decode_tile $Rows);
                entries!(@emulate_decode name "f16" F16 "i64" u64 $decode_tile $Rows);
            )*
            $(
                entries!(@emulate_prefill name "bf16" Bf16 "i32" u32 $prefill $rows $width);
                entries!(@emulate_prefill name "bf16" Bf16 "i64" u64 $prefill $rows $width);
                entries!(@emulate_prefill name "f16" F16 "i32" u32 $prefill $rows $width);
                entries!(@emulate_prefill name "f16" F16 "i64" u64 $prefill $rows $width);
            )*
            // SAFETY: what a caller must promise, the emulated machine checks.
            unsafe {
                match name {
                    "route" => Some(|bytes| {
                        crate::route::route::<{ crate::route::BLOCK_THREADS }, false, false>(bytemuck::pod_read_unaligned(bytes));
                    }),
                    "route_grid" => Some(|bytes| {
                        crate::route::route::<{ crate::route::GRID_THREADS }, true, false>(bytemuck::pod_read_unaligned(bytes));
                    }),
                    "route_wide" => Some(|bytes| {
                        crate::route::route::<{ crate::route::GRID_THREADS }, true, true>(bytemuck::pod_read_unaligned(bytes));
                    }),
                    "align" => Some(|bytes| crate::align::align::<1>(bytemuck::pod_read_unaligned(bytes))),
                    "align_cluster" => Some(|bytes| {
                        crate::align::align::<{ align::CLUSTER }>(bytemuck::pod_read_unaligned(bytes));
                    }),
                    "adopt" => Some(|bytes| crate::adopt::adopt(bytemuck::pod_read_unaligned(bytes))),
                    _ => None,
                }
            }
        }

        /// The entry points themselves.
        ///
        /// # Safety
        /// Every tensor of the parameter block must be as its field says, and the launch as the host plans
        /// it; ids within the tensors may be anything.
        #[cfg(target_arch = "nvptx64")]
        mod stamped {
            #[cfg(feature = "sm_90")]
            use super::DecodeRows;
            use super::TileKind;
            use crate::arch::mma::{Bf16, F16};

            entry_point! {
                #[unsafe(no_mangle)]
                fn route(p: crate::params::RouteParams) {
                    // SAFETY: as the entry point's caller promises.
                    unsafe { crate::route::route::<{ crate::route::BLOCK_THREADS }, false, false>(p) }
                }
            }

            entry_point! {
                #[unsafe(no_mangle)]
                fn route_grid(p: crate::params::RouteParams) {
                    // SAFETY: as the entry point's caller promises.
                    unsafe { crate::route::route::<{ crate::route::GRID_THREADS }, true, false>(p) }
                }
            }

            entry_point! {
                #[unsafe(no_mangle)]
                fn route_wide(p: crate::params::RouteParams) {
                    // SAFETY: as the entry point's caller promises.
                    unsafe { crate::route::route::<{ crate::route::GRID_THREADS }, true, true>(p) }
                }
            }

            entry_point! {
                #[unsafe(no_mangle)]
                fn align(p: crate::params::AlignParams) {
                    // SAFETY: as the entry point's caller promises.
                    unsafe { crate::align::align::<1>(p) }
                }
            }

            #[cfg(feature = "sm_90")]
            entry_point! {
                #[unsafe(no_mangle)]
                fn align_cluster(p: crate::params::AlignParams) {
                    // SAFETY: as the entry point's caller promises.
                    unsafe { crate::align::align::<{ crate::align::CLUSTER }>(p) }
                }
            }

            entry_point! {
                #[unsafe(no_mangle)]
                fn adopt(p: crate::params::AdoptParams) {
                    // SAFETY: as the entry point's caller promises.
                    unsafe { crate::adopt::adopt(p) }
                }
            }

            $($(
                entries!(@stamp $kernel $Params "bf16" Bf16 "i32" u32 $tile $Tile);
                entries!(@stamp $kernel $Params "bf16" Bf16 "i64" u64 $tile $Tile);
                entries!(@stamp $kernel $Params "f16" F16 "i32" u32 $tile $Tile);
                entries!(@stamp $kernel $Params "f16" F16 "i64" u64 $tile $Tile);
            )*)*
            $(
                entries!(@stamp_decode "bf16" Bf16 "i32" u32 $decode_tile $Rows);
                entries!(@stamp_decode "bf16" Bf16 "i64" u64 $decode_tile $Rows);
                entries!(@stamp_decode "f16" F16 "i32" u32 $decode_tile $Rows);
                entries!(@stamp_decode "f16" F16 "i64" u64 $decode_tile $Rows);
            )*
            $(
                entries!(@stamp_prefill "bf16" Bf16 "i32" u32 $prefill $rows $width);
                entries!(@stamp_prefill "bf16" Bf16 "i64" u64 $prefill $rows $width);
                entries!(@stamp_prefill "f16" F16 "i32" u32 $prefill $rows $width);
                entries!(@stamp_prefill "f16" F16 "i64" u64 $prefill $rows $width);
            )*
        }
    };
    (@decode_row $dtype:literal $E:ident $index:literal $I:ident $tile:literal $Rows:ident $min_blocks:literal) => {
        Entry {
            name: concat!("decode_", $dtype, "_", $index, "_", $tile),
            kernel: Kernel::Decode {
                element: ElementType::$E,
                index: IndexWidth::$I,
                rows: DecodeRows::$Rows,
            },
            threads: decode::THREADS,
            min_blocks: $min_blocks,
            cluster: decode::MAX_CLUSTER,
        }
    };
    (@emulate_decode $name:ident $dtype:literal $E:ident $index:literal $I:ident $tile:literal $Rows:ident) => {
        if $name == concat!("decode_", $dtype, "_", $index, "_", $tile) {
            return Some(|parameters| {
                let parameters: crate::params::DecodeParams = bytemuck::pod_read_unaligned(parameters);
                // SAFETY: what a caller must promise, the emulated machine checks.
                unsafe { entries!(@call_decode $E $I $Rows parameters) }
            });
        }
    };
    (@call_decode $E:ident $I:ident $Rows:ident $parameters:ident) => {
        crate::decode::decode::<
            $E,
            $I,
            { DecodeRows::$Rows.count() as usize / 8 },
            { DecodeRows::$Rows.count() },
        >($parameters)
    };
    (@stamp_decode $dtype:literal $E:ident $index:literal $I:ident $tile:literal $Rows:ident) => {
        #[cfg(feature = "sm_90")]
        const _: () = {
            entry_point! {
                #[unsafe(export_name = concat!("decode_", $dtype, "_", $index, "_", $tile))]
                fn entry(p: crate::params::DecodeParams) {
                    // SAFETY: as the entry point's caller promises.
                    unsafe { entries!(@call_decode $E $I $Rows p) }
                }
            }
        };
    };
    (@prefill_row $dtype:literal $E:ident $index:literal $I:ident $name:literal $rows:literal $width:literal) => {
        Entry {
            name: concat!("prefill_", $dtype, "_", $index, "_", $name),
            kernel: Kernel::Prefill(PrefillVariant {
                element: ElementType::$E,
                index: IndexWidth::$I,
                shape: prefill::Shape { rows: $rows, width: $width },
            }),
            threads: prefill::Shape { rows: $rows, width: $width }.threads(),
            min_blocks: prefill::Shape { rows: $rows, width: $width }.blocks(),
            cluster: 1,
        }
    };
    (@emulate_prefill $name:ident $dtype:literal $E:ident $index:literal $I:ident $prefill:literal $rows:literal $width:literal) => {
        if $name == concat!("prefill_", $dtype, "_", $index, "_", $prefill) {
            return Some(|parameters| {
                let parameters: crate::params::PrefillParams = bytemuck::pod_read_unaligned(parameters);
                // SAFETY: what a caller must promise, the emulated machine checks.
                unsafe { entries!(@call_prefill $E $I $rows $width parameters) }
            });
        }
    };
    (@call_prefill $E:ident $I:ident $rows:literal $width:literal $parameters:ident) => {
        crate::prefill::prefill::<
            $E,
            $I,
            { if $width < 128 { $width / 2 } else { 64 } },
            { if $width < 128 { 0 } else { ($width - 128) / 2 } },
            { $width / 16 },
            { $rows / 16 },
            { crate::prefill::Shape { rows: $rows, width: $width }.copying_registers() },
            { crate::prefill::Shape { rows: $rows, width: $width }.computing_registers() },
        >($parameters)
    };
    (@stamp_prefill $dtype:literal $E:ident $index:literal $I:ident $prefill:literal $rows:literal $width:literal) => {
        #[cfg(feature = "sm_90a")]
        const _: () = {
            entry_point! {
                #[unsafe(export_name = concat!("prefill_", $dtype, "_", $index, "_", $prefill))]
                fn entry(p: crate::params::PrefillParams) {
                    // SAFETY: as the entry point's caller promises.
                    unsafe { entries!(@call_prefill $E $I $rows $width p) }
                }
            }
        };
    };
    (@row $kernel:ident $Kernel:ident $dtype:literal $E:ident $index:literal $I:ident $tile:literal $Tile:ident $min_blocks:literal) => {
        Entry {
            name: concat!(stringify!($kernel), "_", $dtype, "_", $index, "_", $tile),
            kernel: Kernel::$Kernel(Variant {
                element: ElementType::$E,
                index: IndexWidth::$I,
                tile: TileKind::$Tile,
            }),
            threads: TileShape::THREADS,
            min_blocks: $min_blocks,
            cluster: 1,
        }
    };
    (@emulate $name:ident $kernel:ident $Params:ident $dtype:literal $E:ident $index:literal $I:ident $tile:literal $Tile:ident) => {
        if $name == concat!(stringify!($kernel), "_", $dtype, "_", $index, "_", $tile) {
            return Some(|parameters| {
                let parameters: crate::params::$Params = bytemuck::pod_read_unaligned(parameters);
                // SAFETY: what a caller must promise, the emulated machine checks.
                unsafe { entries!(@call $kernel $E $I $Tile parameters) }
            });
        }
    };
    (@call $kernel:ident $E:ident $I:ident $Tile:ident $parameters:ident) => {
        crate::$kernel::$kernel::<
            $E,
            $I,
            { TileKind::$Tile.shape().row_fragments as usize },
            { TileKind::$Tile.shape().groups as usize },
            { TileKind::$Tile.shape().column_warps },
            { !matches!(TileKind::$Tile, TileKind::Any) },
        >($parameters)
    };
    (@stamp $kernel:ident $Params:ident $dtype:literal $E:ident $index:literal $I:ident $tile:literal $Tile:ident) => {
        const _: () = {
            entry_point! {
                #[unsafe(export_name = concat!(stringify!($kernel), "_", $dtype, "_", $index, "_", $tile))]
                fn entry(p: crate::params::$Params) {
                    // SAFETY: as the entry point's caller promises.
                    unsafe { entries!(@call $kernel $E $I $Tile p) }
                }
            }
        };
    };
}

// Blocks a multiprocessor: what the tile's shared memory allows at R = 64, so that registers are not what
// limits the loads in flight.
entries! {
shrink Shrink ShrinkParams [
    "m16" M16 4,
    "m32" M32 4,
    "m64" M64 3,
    "any" Any 2,
]
expand Expand ExpandParams [
    "m16" M16 4,
    "m32" M32 4,
    "m64" M64 3,
    "any" Any 2,
];
// Tiles of 16 pairs have twice the sums, and no room for them among the registers of a second block.
decode [
    "m8" M8 2,
    "m16" M16 1,
];
prefill [
    "m64_w32" 64 32,
    "m64_w64" 64 64,
    "m64_w128" 64 128,
    "m64_w256" 64 256,
    "m128_w32" 128 32,
    "m128_w64" 128 64,
    "m128_w128" 128 128,
    "m128_w256" 128 256,
]}
