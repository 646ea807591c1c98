//! The table of entry points. A new tile of a kernel is one row more.

use super::{
    DecodeRows, DecodeTile, ElementType, Entry, IndexWidth, Kernel, PrefillVariant, TileKind, Variant,
};
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::arch::mma::{Bf16, F16};
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::params::{AdoptParams, AlignParams, ExpandParams, RouteParams, ShrinkParams};
use crate::prefill::Shape;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use crate::{adopt, align, expand, route, shrink};

entries! {
    single {
        "route" cfg(true): Kernel::Route =>
            route::route::<{ route::BLOCK_THREADS }, false, false>, RouteParams;
        "route_grid" cfg(true): Kernel::RouteGrid =>
            route::route::<{ route::GRID_THREADS }, true, false>, RouteParams;
        "route_wide" cfg(true): Kernel::RouteWide =>
            route::route::<{ route::GRID_THREADS }, true, true>, RouteParams;
        "align" cfg(true): Kernel::Align => align::align::<1>, AlignParams;
        "align_cluster" cfg(feature = "sm_90"): Kernel::AlignCluster =>
            align::align::<{ align::CLUSTER }>, AlignParams;
        "adopt" cfg(true): Kernel::Adopt => adopt::adopt, AdoptParams;
    }

    "shrink" cfg(true): Kernel::Shrink(Variant { element: ELEMENT, index: INDEX, tile: TILE }) =>
        shrink::shrink::<
            E,
            I,
            { TILE.shape().row_fragments as usize },
            { TILE.shape().groups as usize },
            { TILE.shape().column_warps },
            { TILE.is_aligned() },
        >, ShrinkParams, TileKind [
            "m16": TileKind::M16;
            "m32": TileKind::M32;
            "m64": TileKind::M64;
            "any": TileKind::Any;
        ]

    "expand" cfg(true): Kernel::Expand(Variant { element: ELEMENT, index: INDEX, tile: TILE }) =>
        expand::expand::<
            E,
            I,
            { TILE.shape().row_fragments as usize },
            { TILE.shape().groups as usize },
            { TILE.shape().column_warps },
            { TILE.is_aligned() },
        >, ExpandParams, TileKind [
            "m16": TileKind::M16;
            "m32": TileKind::M32;
            "m64": TileKind::M64;
            "any": TileKind::Any;
        ]

    "decode" cfg(feature = "sm_90"):
        Kernel::Decode { element: ELEMENT, index: INDEX, tile: TILE } =>
        crate::decode::decode::<crate::decode::Rows<E, I, { TILE.rows.count() }, { TILE.is_general }>>,
        crate::params::DecodeParams, DecodeTile [
            "m8": DecodeTile { rows: DecodeRows::M8, is_general: false };
            "m16": DecodeTile { rows: DecodeRows::M16, is_general: false };
            "m8_general": DecodeTile { rows: DecodeRows::M8, is_general: true };
            "m16_general": DecodeTile { rows: DecodeRows::M16, is_general: true };
        ]

    "prefill" cfg(feature = "sm_90a"):
        Kernel::Prefill(PrefillVariant { element: ELEMENT, index: INDEX, shape: TILE }) =>
        crate::prefill::prefill::<crate::prefill::Shaped<E, I, { TILE.rows }, { TILE.width }>>,
        crate::params::PrefillParams, Shape [
            "m64_w32": Shape { rows: 64, width: 32 };
            "m64_w64": Shape { rows: 64, width: 64 };
            "m64_w128": Shape { rows: 64, width: 128 };
            "m64_w256": Shape { rows: 64, width: 256 };
            "m128_w32": Shape { rows: 128, width: 32 };
            "m128_w64": Shape { rows: 128, width: 64 };
            "m128_w128": Shape { rows: 128, width: 128 };
            "m128_w256": Shape { rows: 128, width: 256 };
        ]
}
