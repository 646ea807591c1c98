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
mod sources;
pub mod stamp;
pub mod toolchain;

pub use arch::{Arch, UnknownArch};
pub use budget::{Budget, BudgetError, Cost};
pub use compile::{CompileError, Compiler, Module};
pub use generator::{CodeGenerator, Generator, GeneratorError};
pub use nvvm::{Nvvm, NvvmError};
pub use ptxas::{Ptxas, PtxasError};
pub use rust_cuda::{RustCuda, RustCudaError};
pub use sass::{Nvdisasm, NvdisasmError};
pub use sources::{entries, kernel_sources, target_dir_around, workspace};
pub use toolchain::{Search, Toolchain, ToolchainError};

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
