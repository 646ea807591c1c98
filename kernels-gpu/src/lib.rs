//! The GPU kernels of the fused MoE-LoRA operator: [`route`], [`shrink`], [`expand`], all three at once for
//! few pairs [`decode`], the last two for many [`prefill`], and for routes in vLLM's form [`align`] and
//! [`adopt`].
//!
//! The crate is compiled twice. For `nvptx64-nvidia-cuda` it is the kernels, and its product is PTX;
//! for the host it is what both sides must agree on: parameter blocks ([`params`]), tile shapes
//! ([`tile::TileShape`]), shared-memory maps, and the table of entry points ([`ENTRIES`]).
//!
//! With the feature `emulate` the kernels themselves are compiled for the host too, where `emulate` runs
//! them with every access checked.
//!
//! Data walks in one direction: entry point ([`mod@entry`]) → kernel → [`tile`] → `arch`. Nothing but
//! `arch` knows an instruction.
#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch))]
#![cfg_attr(target_arch = "nvptx64", allow(clippy::missing_safety_doc))]
// rust-cuda's back end looks for attributes of a tool of this name; every other one skips over them.
#![cfg_attr(all(target_arch = "nvptx64", feature = "rust_cuda"), feature(register_tool))]
#![cfg_attr(all(target_arch = "nvptx64", feature = "rust_cuda"), register_tool(nvvm_internal))]

pub mod adopt;
pub mod align;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod arch;
pub mod decode;
#[cfg(feature = "emulate")]
pub mod emulate;
pub mod entry;
pub mod expand;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod ids;
pub mod memory;
pub mod params;
pub mod prefill;
pub mod route;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod scan;
pub mod shrink;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod slots;
pub mod tile;

pub use entry::{
    DecodeRows, DecodeTile, ENTRIES, ElementType, Entry, IndexWidth, Kernel, PrefillVariant, TileKind,
    Variant,
};

/// The folder of this crate's sources, for `moe-lora-codegen`, which hands them to rustc for the device: in
/// the workspace, or where Cargo has unpacked the crate.
#[cfg(not(target_arch = "nvptx64"))]
pub const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src");

/// A kernel cannot unwind and has nobody to tell: it stops the launch, and the host sees an error.
/// No shipped kernel reaches this; the build refuses PTX in which formatting code is left.
#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    arch::thread::trap()
}
