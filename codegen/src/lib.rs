//! Compiles `moe-lora-kernels` from Rust to PTX: finds a toolchain, builds, stamps launch bounds
//! onto the entry points, and refuses output that would be slow or would not load.
//!
//! ```text
//! toolchain   which rustc, and where `core` for nvptx64-nvidia-cuda comes from
//! generator   what turns LLVM IR into PTX: rustc's own LLVM, `nvvm`, or `rust_cuda`
//!    ↓
//! compile     rustc → LLVM IR → PTX, one architecture at a time; `core` is built once and kept, and so is
//!             what rustc made of the kernels, until they change
//!    ↓
//! stamp       `.maxntid` and `.minnctapersm` from `moe_lora_kernels::ENTRIES`
//!    ↓
//! lint        local memory, calls and unknown entry points are errors
//!    ↓
//! ptxas       machine code, and what every kernel costs, where NVIDIA's assembler is present
//!    ↓
//! budget      the costs are those that were agreed upon
//! sass        the machine code has what makes it fast
//! ```
//!
//! Build scripts and `cargo xtask` are its only callers; nothing here runs at run time. `docs/CODEGEN.md`
//! says what each step guards against.
//!
//! ```no_run
//! use moe_lora_codegen::{Arch, Compiler, Generator};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let compiler = Compiler::new(Generator::from_env()?, "target/kernel-core".as_ref())?;
//! let module = compiler.compile(Arch::Sm90a)?;
//! println!("{}", module.ptx);
//! # Ok(())
//! # }
//! ```

mod arch;
pub mod budget;
pub mod compile;
pub mod cuda_tools;
pub mod generator;
mod kept;
pub mod lint;
pub mod nvvm;
pub mod ptxas;
pub mod rust_cuda;
pub mod sass;
pub mod stamp;
pub mod toolchain;

use std::path::Path;

pub use arch::{Arch, UnknownArch};
pub use budget::{Budget, BudgetError, Cost};
pub use compile::{CompileError, Compiler, Module};
pub use generator::{CodeGenerator, Generator, GeneratorError};
pub use nvvm::{Nvvm, NvvmError};
pub use ptxas::{Ptxas, PtxasError};
pub use rust_cuda::{RustCuda, RustCudaError};
pub use sass::{Nvdisasm, NvdisasmError};
pub use toolchain::{Search, Toolchain, ToolchainError};

/// The entry points that a module for `arch` must have.
pub fn entries(arch: Arch) -> Vec<moe_lora_kernels::Entry> {
    let capability = arch.capability();
    let on = |entry: &&moe_lora_kernels::Entry| entry.is_on(capability);
    let of = |entry: &moe_lora_kernels::Entry| moe_lora_kernels::Entry {
        min_blocks: entry.min_blocks_on(capability),
        ..*entry
    };
    moe_lora_kernels::ENTRIES.iter().filter(on).map(of).collect()
}

/// The moe-lora workspace that this crate was compiled in, and `None` for a crate that Cargo has unpacked
/// from a registry: what `cargo xtask` puts below `target/` is looked for in the former alone.
pub fn workspace() -> Option<&'static Path> {
    let parent = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    // An unpacked crate has other crates beside it too, in folders named after them.
    parent.join("kernels-gpu/Cargo.toml").is_file().then_some(parent)
}

/// The sources of the kernels: a build script watches this folder.
pub fn kernel_sources() -> &'static Path {
    Path::new(moe_lora_kernels::SOURCES)
}

/// The Cargo target directory that `path` lies in: the nearest folder above it that Cargo has marked as a
/// cache, which it does where it makes the folder itself, or left what it knows of rustc in. Build scripts
/// ask for the one around `OUT_DIR`, programs for their own.
pub fn target_dir_around(path: &Path) -> Option<&Path> {
    let marks = ["CACHEDIR.TAG", ".rustc_info.json"];
    path.ancestors().find(|dir| marks.iter().any(|mark| dir.join(mark).is_file()))
}

/// An entry point as the tests need it: what it computes does not matter here.
#[cfg(test)]
pub(crate) const fn test_entry(name: &'static str, threads: u32, min_blocks: u32) -> moe_lora_kernels::Entry {
    moe_lora_kernels::Entry {
        name,
        kernel: moe_lora_kernels::entry::Kernel::Route,
        threads,
        min_blocks,
        cluster: 1,
    }
}
