//! What the machine code of a kernel must look like: NVIDIA's disassembler, and checks on what it writes.
//!
//! A kernel that lost its tensor cores, its 16-byte loads or its 32-bit offsets still gives right results,
//! only later. So every cubin is read again:
//!
//! - *Tensor cores*: the kernel has `HMMA` or `HGMMA`.
//! - *Wide loads*: it reads global memory in pieces of 16 bytes or more, by `LDG`, `LDGSTS` (`cp.async`), or
//!   in bulk.
//! - *Narrow offsets*: the main loops of an i32 kernel form no 64-bit offsets. A main loop is the innermost
//!   one around a tensor-core instruction; a loop over tiles around that may find a tile's base in 64 bits.
//!   An address has 64 bits whatever the index width, so one `IMAD.WIDE` with a constant, or one `LEA` and
//!   `LEA.HI.X` whose high half is zero, scales a 32-bit offset and adds it to a base. A 64-bit *offset*
//!   costs more, and shows as a product of two values of which neither is constant (`IMAD.WIDE`), or as
//!   a 64-bit shift (`LEA.HI.X` of a high half, `SHF.L.U64.HI`).

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;

use moe_lora_kernels::{Entry, IndexWidth, Kernel, TileKind};

use crate::cuda_tools;

/// Names the nvdisasm to use.
pub const NVDISASM_VAR: &str = "NVDISASM";

/// An installed nvdisasm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nvdisasm {
    /// The program.
    pub program: PathBuf,
}

/// Why there is no disassembly.
#[derive(Debug, thiserror::Error)]
pub enum NvdisasmError {
    /// No nvdisasm is installed.
    #[error("found no nvdisasm. Looked at:{}", cuda_tools::list(looked))]
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
    /// It rejected the cubin.
    #[error("nvdisasm rejects {}:\n{message}", cubin.display())]
    Rejected {
        /// The cubin.
        cubin: PathBuf,
        /// What it wrote.
        message: String,
    },
}

impl Nvdisasm {
    /// The first nvdisasm: `$NVDISASM`, the `PATH`, the CUDA toolkits, and then `target/cuda-tools` of this
    /// project.
    ///
    /// # Errors
    ///
    /// [`NvdisasmError::NotFound`], with everything that was looked at.
    pub fn find() -> Result<Self, NvdisasmError> {
        let mut looked = Vec::new();
        for program in cuda_tools::candidates(NVDISASM_VAR, "nvdisasm") {
            if program.is_file() {
                return Ok(Self { program });
            }
            looked.push((program, "no such file".to_owned()));
        }
        Err(NvdisasmError::NotFound { looked })
    }

    /// The machine code of a cubin as text.
    ///
    /// # Errors
    ///
    /// [`NvdisasmError::Run`], or [`NvdisasmError::Rejected`] for a file that is none or is for a later
    /// architecture than it knows.
    pub fn disassemble(&self, cubin: &Path) -> Result<String, NvdisasmError> {
        let output = Command::new(&self.program)
            .arg("--print-code")
            .arg(cubin)
            .output()
            .map_err(|source| NvdisasmError::Run { program: self.program.clone(), source })?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            let message = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
            Err(NvdisasmError::Rejected { cubin: cubin.to_owned(), message })
        }
    }
}

/// What the machine code of a kernel must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expectation {
    /// Instructions for tensor cores.
    pub tensor_cores: bool,
    /// Loads of 16 bytes or more from global memory.
    pub wide_loads: bool,
    /// No 64-bit offsets in the main loops.
    pub narrow_offsets: bool,
}

/// The table: one row a kernel. A new kernel does not compile without one.
pub fn expectation(kernel: Kernel) -> Expectation {
    match kernel {
        // They count and scatter numbers of pairs, four bytes each.
        Kernel::Route
        | Kernel::RouteGrid
        | Kernel::RouteWide
        | Kernel::Align
        | Kernel::AlignCluster
        | Kernel::Adopt => Expectation { tensor_cores: false, wide_loads: false, narrow_offsets: false },
        Kernel::Decode { index, .. } => {
            Expectation { tensor_cores: true, wide_loads: true, narrow_offsets: index == IndexWidth::I32 }
        }
        Kernel::Prefill(_) => Expectation {
            tensor_cores: true,
            wide_loads: true,
            // Its main loops begin the next tile too, whose rows of x are found by a division: a 64-bit
            // product.
            narrow_offsets: false,
        },
        Kernel::Shrink(variant) | Kernel::Expand(variant) => Expectation {
            tensor_cores: true,
            // `any` is for addresses that are not multiples of 16.
            wide_loads: variant.tile != TileKind::Any,
            narrow_offsets: variant.index == IndexWidth::I32,
        },
    }
}

/// What is wrong with the machine code of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is none.
    Missing,
    /// No tensor-core instruction.
    NoTensorCores,
    /// No load of 16 bytes.
    NoWideLoads,
    /// No loop has a tensor-core instruction: nothing would be checked.
    NoMainLoop,
    /// A main loop has this instruction, which forms a 64-bit offset.
    WideOffset {
        /// Where it stands, as nvdisasm prints it.
        address: String,
        /// The instruction.
        instruction: String,
    },
}

/// One fault, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The entry point.
    pub kernel: String,
    /// What is wrong.
    pub fault: Fault,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.kernel)?;
        match &self.fault {
            Fault::Missing => f.write_str("has no machine code"),
            Fault::NoTensorCores => f.write_str("has no HMMA or HGMMA"),
            Fault::NoWideLoads => f.write_str("reads global memory in less than 16 bytes at a time"),
            Fault::NoMainLoop => {
                f.write_str("has no loop with HMMA or HGMMA in which offsets could be checked")
            }
            Fault::WideOffset { address, instruction } => {
                write!(f, "forms a 64-bit offset in a main loop, at {address}: {instruction}")
            }
        }
    }
}

/// A kernel's machine code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Code<'a> {
    /// The entry point.
    pub kernel: &'a str,
    /// Its instructions.
    pub instructions: Vec<Instruction<'a>>,
    /// Labels, and the number of the instruction that each stands before.
    labels: Vec<(&'a str, usize)>,
}

/// An instruction of machine code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction<'a> {
    /// Its offset in the kernel, in hexadecimal.
    pub address: &'a str,
    /// All of it, less the predicate: `LDG.E.128 R4, desc[UR8][R2.64]`.
    pub text: &'a str,
}

impl<'a> Instruction<'a> {
    /// `LDG.E.128`.
    fn opcode(&self) -> &'a str {
        self.text.split_whitespace().next().unwrap_or_default()
    }

    /// The opcode's parts: `LDG`, `E`, `128`.
    fn parts(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.opcode().split('.')
    }

    /// The operand at a place, less what says how it is read: `R4` for `R4.reuse`.
    fn operand(&self, place: usize) -> &'a str {
        let (_, operands) = self.text.split_once(char::is_whitespace).unwrap_or_default();
        let operand = operands.split(',').nth(place).unwrap_or_default().trim();
        operand.strip_suffix(".reuse").unwrap_or(operand)
    }

    fn is_tensor_core(&self) -> bool {
        matches!(self.parts().next(), Some("HMMA" | "HGMMA" | "UTCHMMA"))
    }

    fn is_wide_load(&self) -> bool {
        match self.parts().next() {
            Some("LDG" | "LDGSTS") => self.parts().any(|part| part == "128" || part == "256"),
            // Bulk and tensor copies.
            Some("UBLKCP" | "UTMALDG") => true,
            _ => false,
        }
    }

    /// The label that a branch leads to: `BRA `(.L_x_3)`.
    fn target(&self) -> Option<&'a str> {
        self.opcode().starts_with("BRA").then_some(())?;
        let (_, label) = self.text.split_once("`(")?;
        label.split(')').next()
    }

    /// Whether it gives a register a constant: `MOV R4, 0x2`, or `HFMA2.MMA R4, -RZ, RZ, 0, 1.19e-07`, the
    /// same by way of another unit.
    fn is_constant(&self) -> bool {
        let is_literal = |operand: &str| operand.starts_with(|c: char| c.is_ascii_digit() || c == '-');
        match self.parts().next() {
            Some("MOV" | "UMOV") => is_literal(self.operand(1)),
            Some("IMAD" | "HFMA2") => {
                self.operand(1).trim_start_matches('-') == "RZ" && is_literal(self.operand(3))
            }
            _ => false,
        }
    }
}

/// The kernels in what nvdisasm wrote.
pub fn parse(sass: &str) -> Vec<Code<'_>> {
    let mut kernels: Vec<Code<'_>> = Vec::new();
    let mut inside = false;
    for line in sass.lines() {
        if let Some(kernel) = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
            kernels.push(Code { kernel, ..Code::default() });
            inside = true;
        } else if line.trim_start().starts_with(".section") {
            inside = false;
        } else if let Some(code) = kernels.last_mut().filter(|_| inside) {
            if let Some(label) = line.strip_suffix(':').filter(|label| label.starts_with(".L")) {
                code.labels.push((label, code.instructions.len()));
            } else if let Some(instruction) = instruction(line) {
                code.instructions.push(instruction);
            }
        }
    }
    kernels
}

/// The instruction in `        /*0a40*/  @!P4 BRA `(.L_x_3) ;`.
fn instruction(line: &str) -> Option<Instruction<'_>> {
    let (address, text) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
    let text = text.split(';').next()?.trim();
    let text = match text.starts_with('@') {
        true => text.split_once(char::is_whitespace)?.1.trim_start(),
        false => text,
    };
    (!text.is_empty()).then_some(Instruction { address, text })
}

impl Code<'_> {
    /// The main loops, as ranges of instructions: from the target of a branch backwards to the branch, with
    /// a tensor-core instruction between and no such loop within.
    fn main_loops(&self) -> Vec<RangeInclusive<usize>> {
        let start = |label| Some(self.labels.iter().find(|(other, _)| *other == label)?.1);
        let loops: Vec<_> = self
            .instructions
            .iter()
            .enumerate()
            .filter_map(|(end, branch)| Some(start(branch.target()?)?..=end))
            .filter(|range| !range.is_empty())
            .filter(|range| self.instructions[range.clone()].iter().any(Instruction::is_tensor_core))
            .collect();
        let holds = |outer: &RangeInclusive<usize>, inner: &RangeInclusive<usize>| {
            outer != inner && outer.contains(inner.start()) && outer.contains(inner.end())
        };
        loops.iter().filter(|outer| !loops.iter().any(|inner| holds(outer, inner))).cloned().collect()
    }

    /// Whether an operand is a constant there: written so, or in a register that was last given one.
    fn is_constant(&self, operand: &str, at: usize) -> bool {
        let operand = operand.trim_start_matches('-');
        if matches!(operand, "RZ" | "URZ") {
            return true;
        }
        if !operand.trim_start_matches('U').starts_with('R') {
            // Not a register: a literal. Constant banks (`c[0x0][0x210]`) hold parameters.
            return !operand.starts_with("c[");
        }
        let before = self.instructions[..at].iter().rev();
        before.into_iter().find(|other| other.operand(0) == operand).is_some_and(Instruction::is_constant)
    }

    /// Whether the instruction forms a 64-bit offset.
    fn is_wide_offset(&self, at: usize) -> bool {
        let instruction = &self.instructions[at];
        let is_zero = |operand: &str| matches!(operand, "RZ" | "URZ");
        let parts: Vec<_> = instruction.parts().collect();
        match parts[..] {
            ["LEA" | "ULEA", "HI", "X", ..] => !is_zero(instruction.operand(3)),
            ["SHF" | "USHF", "L", "U64", "HI", ..] => true,
            ["IMAD" | "UIMAD", "WIDE", ..] => {
                ![1, 2].iter().any(|&factor| self.is_constant(instruction.operand(factor), at))
            }
            _ => false,
        }
    }

    fn findings(&self, expectation: Expectation) -> Vec<Fault> {
        let mut faults = Vec::new();
        let Expectation { tensor_cores, wide_loads, narrow_offsets } = expectation;
        if tensor_cores && !self.instructions.iter().any(Instruction::is_tensor_core) {
            faults.push(Fault::NoTensorCores);
        }
        if wide_loads && !self.instructions.iter().any(Instruction::is_wide_load) {
            faults.push(Fault::NoWideLoads);
        }
        if narrow_offsets {
            let loops = self.main_loops();
            if loops.is_empty() {
                faults.push(Fault::NoMainLoop);
            }
            let wide = loops.into_iter().flatten().filter(|&at| self.is_wide_offset(at));
            faults.extend(wide.map(|at| Fault::WideOffset {
                address: self.instructions[at].address.to_owned(),
                instruction: self.instructions[at].text.to_owned(),
            }));
        }
        faults
    }
}

/// Checks the machine code of a module against the table.
pub fn check(kernels: &[Code<'_>], entries: &[Entry]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for entry in entries {
        let faults = match kernels.iter().find(|code| code.kernel == entry.name) {
            Some(code) => code.findings(expectation(entry.kernel)),
            None => vec![Fault::Missing],
        };
        findings.extend(faults.into_iter().map(|fault| Finding { kernel: entry.name.to_owned(), fault }));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_lora_kernels::{ElementType, Variant};

    /// A kernel as nvdisasm prints it, with `body` in its main loop.
    fn sass(body: &str) -> String {
        format!(
            "\t.section\t.nv.info,\"\",@\"SHT_CUDA_INFO\"\n\
             \t.section\t.text.shrink_bf16_i32_m16,\"ax\",@progbits\n\
             \t.global         shrink_bf16_i32_m16\n\
             .text.shrink_bf16_i32_m16:\n\
             \x20       /*0000*/                   LDC R1, c[0x0][0x28] ;\n\
             \x20       /*0010*/                   UIMAD.WIDE.U32 UR4, UR5, UR6, URZ ;\n\
             .L_x_1:\n\
             {body}\n\
             \x20       /*0f00*/                   HMMA.16816.F32.BF16 R20, R116.reuse, R124, R20 ;\n\
             \x20       /*0f10*/              @!P4 BRA `(.L_x_1) ;\n\
             .L_x_2:\n\
             \x20       /*0f20*/                   BRA `(.L_x_2);\n\
             \x20       /*0f30*/                   NOP;\n\
             \t.section\t.nv.shared.reserved.0,\"aw\",@nobits\n"
        )
    }

    const LOAD: &str = "        /*0100*/                   LDGSTS.E.BYPASS.LTC256B.128.ZFILL [R59+0x800], desc[UR8][R30.64], P6 ;";

    fn findings(sass: &str, tile: TileKind) -> Vec<String> {
        let index = IndexWidth::I32;
        let kernel = Kernel::Shrink(Variant { element: ElementType::Bf16, index, tile });
        let entry = Entry { kernel, ..crate::test_entry("shrink_bf16_i32_m16", 128, 4) };
        check(&parse(sass), &[entry]).iter().map(Finding::to_string).collect()
    }

    #[track_caller]
    fn assert_one(sass: &str, part: &str) {
        let found = findings(sass, TileKind::M16);
        assert!(found.len() == 1 && found[0].contains(part), "{part:?}: {found:?}");
    }

    #[test]
    fn code_as_it_should_be_passes() {
        assert_eq!(findings(&sass(LOAD), TileKind::M16), [""; 0]);
    }

    #[test]
    fn addresses_are_no_offsets() {
        for address in [
            "IMAD.WIDE.U32 R20, R14, 0x2, R90 ;",
            "@P0 IMAD.WIDE R20, R14.reuse, 0x2, R90 ;",
            "MOV R122, 0x2 ;\n /*0120*/ IMAD.WIDE.U32 R112, R113, R122, UR8 ;",
            "HFMA2.MMA R9, -RZ, RZ, 0, 1.1920928955078125e-07 ;\n /*0120*/ IMAD.WIDE.U32 R2, R13, R9, UR8 ;",
            "IADD3 R20, P6, R20, R23, RZ ;\n /*0120*/ IMAD.X R21, RZ, RZ, R21, P6 ;",
            "LEA.HI.X R37, R36, R3, RZ, 0x1, P5 ;",
        ] {
            assert_eq!(findings(&sass(&format!("{LOAD}\n /*0110*/ {address}")), TileKind::M16), [""; 0]);
        }
    }

    #[test]
    fn offsets_of_64_bits_are_found() {
        for offset in [
            "IMAD.WIDE.U32 R36, R43, UR4, R36 ;",
            "IMAD.WIDE.U32 R36, R43, c[0x0][0x230], R36 ;",
            "MOV R7, R9 ;\n /*0120*/ IMAD.WIDE.U32 R36, R43, R7, R36 ;",
            "LEA.HI.X R37, R36, R3, R37, 0x1, P5 ;",
            "SHF.L.U64.HI R5, R4, 0x1, R5 ;",
        ] {
            let sass = sass(&format!("{LOAD}\n        /*0110*/                   {offset}"));
            assert_one(&sass, "forms a 64-bit offset in a main loop, at 01");
        }
    }

    #[test]
    fn a_loop_over_tiles_may_find_their_bases() {
        let around = "        /*0f10*/              @!P4 BRA `(.L_x_1) ;\n\
                              /*0f14*/                   IMAD.WIDE.U32 R36, R43, UR4, R36 ;\n\
                              /*0f18*/              @!P5 BRA `(.L_x_0) ;";
        let sass = sass(LOAD)
            .replace(".L_x_1:", ".L_x_0:\n /*0020*/ LDC R2, c[0x0][0x210] ;\n.L_x_1:")
            .replace("        /*0f10*/              @!P4 BRA `(.L_x_1) ;", around);
        assert_eq!(parse(&sass)[0].main_loops().len(), 1);
        assert_eq!(findings(&sass, TileKind::M16), [""; 0]);
    }

    #[test]
    fn tensor_cores_and_wide_loads_are_missed() {
        let narrow = sass(&LOAD.replace(".128", ".U16"));
        assert_one(&narrow, "less than 16 bytes");
        assert_eq!(findings(&narrow, TileKind::Any), [""; 0]);
        // HFMA2.MMA moves constants.
        let scalar = sass(LOAD).replace("HMMA.16816.F32.BF16", "HFMA2.MMA");
        let found = findings(&scalar, TileKind::M16);
        assert!(found[0].contains("no HMMA or HGMMA") && found[1].contains("no loop"), "{found:?}");
    }

    #[test]
    fn a_kernel_without_code_or_loop_is_not_passed_over() {
        assert_one("", "has no machine code");
        assert_one(&sass(LOAD).replace("BRA `(.L_x_1)", "NOP"), "has no loop");
    }
}
