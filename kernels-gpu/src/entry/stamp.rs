//! The macros that make entry points of the rows of the table.

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

/// Stamps the rows of the table: those of kernels of one form as they are, those of kernels with tiles for
/// each element type and width of offsets.
///
/// A row reads `name cfg modules: kernel => code, parameter block`, where the `cfg` says which of the
/// device's modules have it. With tiles, its kernel may name the constants `ELEMENT`, `INDEX` and `TILE`, its
/// code the types `E` of elements and `I` of offsets, and `TILE`.
macro_rules! entries {
    (
        single {$(
            $name:literal cfg $on:tt: $kernel:expr => $code:expr, $Params:ty;
        )*}
        $(
            $family:literal cfg $family_on:tt: $family_kernel:expr => $family_code:expr, $FamilyParams:ty,
            $Tile:ty [$(
                $tile_name:literal: $tile:expr;
            )*]
        )*
    ) => {
        stamp! {
            $({ ($name) [] cfg $on: $kernel => $code, $Params })*
            $($(
                {
                    ($family "_bf16_i32_" $tile_name) [Bf16 u32 I32 $Tile, $tile]
                    cfg $family_on: $family_kernel => $family_code, $FamilyParams
                }
                {
                    ($family "_bf16_i64_" $tile_name) [Bf16 u64 I64 $Tile, $tile]
                    cfg $family_on: $family_kernel => $family_code, $FamilyParams
                }
                {
                    ($family "_f16_i32_" $tile_name) [F16 u32 I32 $Tile, $tile]
                    cfg $family_on: $family_kernel => $family_code, $FamilyParams
                }
                {
                    ($family "_f16_i64_" $tile_name) [F16 u64 I64 $Tile, $tile]
                    cfg $family_on: $family_kernel => $family_code, $FamilyParams
                }
            )*)*
        }
    };
}

/// Makes of each row its [`Entry`](super::Entry), the function that the emulated machine calls, and the entry
/// point.
macro_rules! stamp {
    ($({
        ($($name:literal)*) [$($E:ident $I:ident $Index:ident $Tile:ty, $tile:expr)?]
        cfg $on:tt: $kernel:expr => $code:expr, $Params:ty
    })*) => {
        /// Every entry point of the module.
        pub const ENTRIES: &[Entry] = &[$({
            $(
                const ELEMENT: ElementType = ElementType::$E;
                const INDEX: IndexWidth = IndexWidth::$Index;
                const TILE: $Tile = $tile;
            )?
            Entry::new(concat!($($name),*), $kernel)
        }),*];

        /// The entry point `name`, as the emulated machine calls it: on the bytes of its parameter block.
        #[cfg(feature = "emulate")]
        pub(crate) fn emulated(name: &str) -> Option<fn(&[u8])> {
            $(
                if name == concat!($($name),*) {
                    $(
                        type E = $E;
                        type I = $I;
                        const TILE: $Tile = $tile;
                    )?
                    return Some(|parameters| {
                        // SAFETY: what a caller must promise, the emulated machine checks.
                        unsafe { $code(bytemuck::pod_read_unaligned::<$Params>(parameters)) }
                    });
                }
            )*
            None
        }

        $(
            /// # Safety
            /// Every tensor of the parameter block must be as its field says, and the launch as the host
            /// plans it; ids within the tensors may be anything.
            #[cfg(target_arch = "nvptx64")]
            #[cfg $on]
            const _: () = {
                $(
                    type E = $E;
                    type I = $I;
                    const TILE: $Tile = $tile;
                )?
                entry_point! {
                    #[unsafe(export_name = concat!($($name),*))]
                    fn entry(p: $Params) {
                        // SAFETY: as the entry point's caller promises.
                        unsafe { $code(p) }
                    }
                }
            };
        )*
    };
}
