//! The ways from Rust to PTX, by name, and what each needs.

use std::fmt;
use std::str::FromStr;

use crate::{Nvvm, NvvmError, RustCuda, RustCudaError, Search, Toolchain, ToolchainError};

/// Names the code generator that builds use, for whoever does not pass one: [`CodeGenerator::ALL`].
pub const CODEGEN_VAR: &str = "MOE_LORA_CODEGEN";

/// What turns the kernels' LLVM IR into PTX.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CodeGenerator {
    /// rustc's own NVPTX back end, which is LLVM's.
    #[default]
    Llvm,
    /// NVIDIA's libNVVM, on the IR that rustc has optimised ([`crate::nvvm`]).
    Nvvm,
    /// rust-cuda's back end for rustc ([`crate::rust_cuda`]).
    RustcCodegenNvvm,
}

impl CodeGenerator {
    /// Every code generator.
    pub const ALL: [Self; 3] = [Self::Llvm, Self::Nvvm, Self::RustcCodegenNvvm];

    /// Those that run wherever a rustc for the kernels does: what CI judges.
    pub const CHECKED: [Self; 2] = [Self::Llvm, Self::Nvvm];

    /// The name on the command line and in `MOE_LORA_CODEGEN`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llvm => "llvm",
            Self::Nvvm => "nvvm",
            Self::RustcCodegenNvvm => "rustc_codegen_nvvm",
        }
    }

    /// The one that `MOE_LORA_CODEGEN` names; [`CodeGenerator::Llvm`] where it names none.
    ///
    /// # Errors
    ///
    /// [`UnknownCodeGenerator`] when it names one that does not exist.
    pub fn from_env() -> Result<Self, UnknownCodeGenerator> {
        match std::env::var(CODEGEN_VAR) {
            Ok(name) if !name.is_empty() => name.parse(),
            _ => Ok(Self::default()),
        }
    }
}

impl fmt::Display for CodeGenerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for CodeGenerator {
    type Err = UnknownCodeGenerator;

    fn from_str(name: &str) -> Result<Self, UnknownCodeGenerator> {
        Self::ALL
            .into_iter()
            .find(|generator| generator.name() == name)
            .ok_or_else(|| UnknownCodeGenerator(name.to_owned()))
    }
}

/// A code generator with all that it needs.
#[derive(Clone, Debug)]
pub enum Generator {
    /// [`CodeGenerator::Llvm`].
    Llvm(Toolchain),
    /// [`CodeGenerator::Nvvm`].
    Nvvm(Toolchain, Nvvm),
    /// [`CodeGenerator::RustcCodegenNvvm`].
    RustCuda(RustCuda),
}

/// Why a code generator cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum GeneratorError {
    /// There is none of that name.
    #[error("{CODEGEN_VAR}: {0}")]
    Unknown(#[from] UnknownCodeGenerator),
    /// No rustc compiles the kernels.
    #[error(transparent)]
    Toolchain(#[from] ToolchainError),
    /// No libNVVM will do.
    #[error(transparent)]
    Nvvm(#[from] NvvmError),
    /// A piece of rust-cuda's is missing.
    #[error(transparent)]
    RustCuda(#[from] RustCudaError),
}

impl Generator {
    /// The one that `MOE_LORA_CODEGEN` names, with what it needs, from the places that the environment
    /// names.
    ///
    /// # Errors
    ///
    /// [`GeneratorError`], with the first thing that is missing.
    pub fn from_env() -> Result<Self, GeneratorError> {
        let toolchain = || Search::from_env()?.find();
        Ok(match CodeGenerator::from_env()? {
            CodeGenerator::Llvm => Self::Llvm(toolchain()?),
            CodeGenerator::Nvvm => {
                let toolchain = toolchain()?;
                let nvvm = Nvvm::find(toolchain.llvm_major())?;
                Self::Nvvm(toolchain, nvvm)
            }
            CodeGenerator::RustcCodegenNvvm => Self::RustCuda(RustCuda::from_env()?),
        })
    }

    /// Which one it is.
    pub fn name(&self) -> CodeGenerator {
        match self {
            Self::Llvm(_) => CodeGenerator::Llvm,
            Self::Nvvm(..) => CodeGenerator::Nvvm,
            Self::RustCuda(_) => CodeGenerator::RustcCodegenNvvm,
        }
    }

    /// The rustc that this project runs itself.
    pub fn toolchain(&self) -> Option<&Toolchain> {
        match self {
            Self::Llvm(toolchain) | Self::Nvvm(toolchain, _) => Some(toolchain),
            Self::RustCuda(_) => None,
        }
    }
}

impl fmt::Display for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Llvm(toolchain) => write!(f, "{toolchain}"),
            Self::Nvvm(toolchain, nvvm) => write!(f, "{toolchain}, libNVVM at {}", nvvm.path.display()),
            Self::RustCuda(rust_cuda) => write!(f, "{rust_cuda}"),
        }
    }
}

/// A name that is none of [`CodeGenerator::ALL`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown code generator `{0}`: known are {known}",
    known = CodeGenerator::ALL.map(CodeGenerator::name).join(", ")
)]
pub struct UnknownCodeGenerator(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_to_itself_and_no_other_does() {
        for generator in CodeGenerator::ALL {
            assert_eq!(generator.name().parse(), Ok(generator));
        }
        let error = "llc".parse::<CodeGenerator>().unwrap_err().to_string();
        assert_eq!(error, "unknown code generator `llc`: known are llvm, nvvm, rustc_codegen_nvvm");
    }
}
