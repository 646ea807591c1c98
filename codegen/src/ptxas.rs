//! NVIDIA's assembler: whether it takes the PTX, and what each kernel costs in registers, spills,
//! stack and shared memory.
//!
//! The library does not need it, since the driver has its own. It is the judge of a build: it runs
//! on any machine, with or without a GPU.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::compile::Scratch;
use crate::kept::{Emitted, Kept};
use crate::{Arch, cuda_tools};

/// The oldest ptxas that knows every architecture in [`Arch::ALL`], as (major, minor).
pub const OLDEST_PTXAS: (u32, u32) = (12, 8);

/// Names the ptxas to use.
pub const PTXAS_VAR: &str = "PTXAS";

/// An installed ptxas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ptxas {
    /// The program.
    pub program: PathBuf,
    /// Its version, for example `13.0.88`.
    pub version: String,
}

/// What a kernel costs on one architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The entry point.
    pub kernel: String,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes of stack a thread.
    pub stack: u32,
    /// Bytes stored to local memory for want of registers.
    pub spill_stores: u32,
    /// Bytes loaded back.
    pub spill_loads: u32,
    /// Bytes of shared memory whose size is fixed at compile time.
    pub static_shared: u32,
}

impl Usage {
    /// Whether the kernel needs local memory, for spilled registers or for a stack frame.
    pub fn uses_local_memory(&self) -> bool {
        self.stack > 0 || self.spill_stores > 0 || self.spill_loads > 0
    }
}

/// What ptxas says of a module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Every entry point, in the order of ptxas's output.
    pub kernels: Vec<Usage>,
    /// Warnings and advice: that `wgmma` instructions had to be serialised, for example.
    pub remarks: Vec<String>,
}

/// Why ptxas gave no report.
#[derive(Debug, thiserror::Error)]
pub enum PtxasError {
    /// No usable ptxas is installed.
    #[error(
        "found no ptxas {}.{} or later. Looked at:{}",
        OLDEST_PTXAS.0, OLDEST_PTXAS.1, cuda_tools::list(looked)
    )]
    NotFound {
        /// What was looked at, and why it will not do.
        looked: Vec<(PathBuf, String)>,
    },
    /// It could not be started.
    #[error("cannot run {}", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file could not be written or read.
    #[error("{}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It rejected the module.
    #[error("ptxas {version} rejects {} for {arch}:\n{message}", ptx.display())]
    Rejected {
        /// The version of ptxas.
        version: String,
        /// The module.
        ptx: PathBuf,
        /// The architecture.
        arch: Arch,
        /// What it wrote.
        message: String,
    },
}

impl Ptxas {
    /// The first ptxas that is new enough: `$PTXAS`, the `PATH`, the CUDA toolkits, and then
    /// `target/cuda-tools` of this project.
    ///
    /// # Errors
    ///
    /// [`PtxasError::NotFound`], with everything that was looked at.
    pub fn find() -> Result<Self, PtxasError> {
        let mut looked = Vec::new();
        for program in cuda_tools::candidates(PTXAS_VAR, "ptxas") {
            match Self::probe(&program) {
                Ok(ptxas) => return Ok(ptxas),
                Err(reason) => looked.push((program, reason)),
            }
        }
        Err(PtxasError::NotFound { looked })
    }

    /// Looks at one ptxas; an error tells in words why it will not do.
    fn probe(program: &Path) -> Result<Self, String> {
        if !program.is_file() {
            return Err("no such file".to_owned());
        }
        let output = Command::new(program)
            .arg("--version")
            .output()
            .map_err(|error| format!("does not run: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = cuda_tools::parse_version(&text).ok_or("does not tell its version")?;
        let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
        if (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) < OLDEST_PTXAS {
            return Err(format!("is {version}"));
        }
        Ok(Self { program: program.to_owned(), version: version.to_owned() })
    }

    /// The machine code of `ptx` for `arch`. It is kept in `cache`, for the next build that assembles the
    /// same.
    ///
    /// # Errors
    ///
    /// As for [`Ptxas::assemble`], and [`PtxasError::Io`].
    pub fn cubin(&self, ptx: &str, arch: Arch, cache: &Path) -> Result<Vec<u8>, PtxasError> {
        let io = |source| PtxasError::Io { path: cache.to_owned(), source };
        let command = format!("ptxas {}", self.version);
        let kept = Kept::of_text(cache.join(format!("moe_lora_kernels-{arch}.cubin")), &command, ptx);
        if let Some(emitted) = kept.read() {
            return Ok(emitted.bytes);
        }
        let scratch = Scratch::new(cache).map_err(io)?;
        let (source, cubin) = (scratch.0.join("kernels.ptx"), scratch.0.join("kernels.cubin"));
        std::fs::write(&source, ptx).map_err(io)?;
        self.assemble(&source, arch, &cubin)?;
        let bytes = std::fs::read(&cubin).map_err(io)?;
        kept.write(&Emitted { bytes: bytes.clone(), warnings: String::new() }, &scratch.0);
        Ok(bytes)
    }

    /// Assembles `ptx` for `arch` into `cubin` and reports what every kernel costs.
    ///
    /// # Errors
    ///
    /// [`PtxasError::Rejected`] with its words when it finds fault with the module.
    pub fn assemble(&self, ptx: &Path, arch: Arch, cubin: &Path) -> Result<Report, PtxasError> {
        let output = Command::new(&self.program)
            .arg("--verbose")
            .arg(format!("--gpu-name={arch}"))
            .arg("--output-file")
            .arg(cubin)
            .arg(ptx)
            .output()
            .map_err(|source| PtxasError::Run { program: self.program.clone(), source })?;
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            Ok(parse_report(&text))
        } else {
            Err(PtxasError::Rejected {
                version: self.version.clone(),
                ptx: ptx.to_owned(),
                arch,
                message: text.trim_end().to_owned(),
            })
        }
    }
}

/// Reads what `ptxas --verbose` writes.
pub fn parse_report(text: &str) -> Report {
    let mut report = Report::default();
    for line in text.lines() {
        let info = line.strip_prefix("ptxas info").map(|rest| rest.trim_start_matches([' ', ':']));
        if let Some(rest) = info.and_then(|info| info.strip_prefix("Compiling entry function '")) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            report.kernels.push(Usage { kernel, ..Usage::default() });
        } else if line.trim_start().starts_with("ptxas warning")
            || info.is_some_and(|info| info.contains("Potential Performance Loss"))
        {
            report.remarks.push(line.trim().to_owned());
        } else if let Some(kernel) = report.kernels.last_mut() {
            if line.contains("bytes stack frame") {
                kernel.stack = number_before(line, "bytes stack frame");
                kernel.spill_stores = number_before(line, "bytes spill stores");
                kernel.spill_loads = number_before(line, "bytes spill loads");
            } else if info.is_some_and(|info| info.starts_with("Used ")) {
                kernel.registers = number_before(line, "registers");
                kernel.static_shared = number_before(line, "bytes smem");
            }
        }
    }
    report
}

/// The number that stands before `unit`; 0 when the unit is not there.
fn number_before(line: &str, unit: &str) -> u32 {
    line.split_once(unit)
        .and_then(|(before, _)| before.split_whitespace().next_back()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERBOSE: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'expand_bf16_i32' for 'sm_90a'
ptxas info    : Function properties for expand_bf16_i32
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compile time = 1.208 ms
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
    insufficient register resources for the wgmma pipeline in the function 'prefill_bf16_i32'
ptxas warning : Value of threads per SM for entry prefill_bf16_i32 is out of range. \
    .minnctapersm will be ignored
ptxas info    : Compiling entry function 'prefill_bf16_i32' for 'sm_90a'
ptxas info    : Function properties for prefill_bf16_i32
    128 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 128 bytes cumulative stack size, \
    4096 bytes smem, 384 bytes cmem[0]
";

    #[test]
    fn verbose_output_parses() {
        let report = parse_report(VERBOSE);
        assert_eq!(
            report.kernels,
            [
                Usage { kernel: "expand_bf16_i32".to_owned(), registers: 10, ..Usage::default() },
                Usage {
                    kernel: "prefill_bf16_i32".to_owned(),
                    registers: 255,
                    stack: 128,
                    spill_stores: 24,
                    spill_loads: 28,
                    static_shared: 4096,
                },
            ]
        );
        assert_eq!(report.kernels.iter().map(Usage::uses_local_memory).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn advice_and_warnings_are_kept() {
        let report = parse_report(VERBOSE);
        assert_eq!(report.remarks.len(), 2);
        assert!(report.remarks[0].contains("wgmma.mma_async instructions are serialized"));
        assert!(report.remarks[1].contains(".minnctapersm will be ignored"));
    }

    #[test]
    fn an_empty_module_has_no_kernels() {
        assert_eq!(parse_report("ptxas info    : 0 bytes gmem\n"), Report::default());
    }
}
