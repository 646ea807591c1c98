//! The kernels that were built into this program.

use std::fmt;

/// A file that was built into the program, as an LZ4 block with its length before it: kernels are so much alike that
/// they take a third.
#[derive(Clone, Copy)]
pub struct Packed(&'static [u8]);

impl Packed {
    /// A file, of its length as four bytes, the lowest first, and an LZ4 block.
    pub const fn of(packed: &'static [u8]) -> Self {
        Packed(packed)
    }

    /// Bytes of the file.
    pub fn unpacked_len(self) -> usize {
        self.0.first_chunk().map_or(0, |len| u32::from_le_bytes(*len) as usize)
    }

    /// The file.
    ///
    /// # Panics
    /// If it is none, which [`EMBEDDED`] never is.
    pub fn unpack(self) -> Vec<u8> {
        lz4_flex::decompress_size_prepended(self.0).expect("a length and an LZ4 block")
    }
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({} bytes)", self.0.len())
    }
}

/// The kernels for one generation of devices.
#[derive(Clone, Copy, Debug)]
pub struct Embedded {
    /// Least compute capability, times ten: 80, 90.
    pub sm: u32,
    /// The target as PTX names it. One that ends in `a` runs on that very capability alone.
    pub arch: &'static str,
    /// The PTX module.
    pub ptx: Packed,
    /// The same module as machine code, where the build found an assembler.
    pub cubin: Option<Cubin>,
    /// Which code generator and compiler made the PTX.
    pub made_by: &'static str,
}

/// Kernels that were assembled when the program was built: they load at once, while PTX is first compiled by
/// the driver.
#[derive(Clone, Copy, Debug)]
pub struct Cubin {
    /// The ELF image.
    pub image: Packed,
    /// Version of the ptxas that made it, for example `13.0.88`. A driver older than that CUDA release may
    /// refuse it.
    pub ptxas: &'static str,
}

/// The kernels that were built into this program.
pub static EMBEDDED: &[Embedded] = include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

impl Embedded {
    /// True when a device of this compute capability can run the module.
    pub(super) fn runs_on(&self, capability: u32) -> bool {
        if self.arch.ends_with('a') { capability == self.sm } else { capability >= self.sm }
    }

    /// The cubin, if a device of this compute capability can run it: machine code is good for later minor
    /// versions, PTX for later major ones too (CUDA programming guide, "Binary Compatibility").
    pub(super) fn cubin_for(&self, capability: u32) -> Option<Cubin> {
        self.cubin.filter(|_| self.runs_on(capability) && capability / 10 == self.sm / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cubin_is_for_devices_of_its_major_version() {
        let cubin = Some(Cubin { image: Packed(&[]), ptxas: "13.0.88" });
        let kernels = |arch, sm| Embedded { sm, arch, ptx: Packed(&[]), cubin, made_by: "" };
        let (ampere, hopper) = (kernels("sm_80", 80), kernels("sm_90a", 90));
        let runs = |kernels: &Embedded, capability| {
            (kernels.runs_on(capability), kernels.cubin_for(capability).is_some())
        };
        for (capability, expected) in [(75, (false, false)), (80, (true, true)), (89, (true, true))] {
            assert_eq!(runs(&ampere, capability), expected, "{capability}");
            assert_eq!(runs(&hopper, capability), (false, false), "{capability}");
        }
        for (capability, expected) in [(90, (true, true)), (100, (false, false)), (120, (false, false))] {
            assert_eq!(runs(&ampere, capability), (true, false), "{capability}");
            assert_eq!(runs(&hopper, capability), expected, "{capability}");
        }
        assert!(Embedded { cubin: None, ..ampere }.cubin_for(80).is_none());
    }

    #[test]
    fn both_generations_are_built_in() {
        assert_eq!(EMBEDDED.iter().map(|kernels| kernels.sm).collect::<Vec<_>>(), [80, 90]);
        for kernels in EMBEDDED {
            let ptx = String::from_utf8(kernels.ptx.unpack()).unwrap();
            assert!(ptx.contains(&format!("\n.target {}\n", kernels.arch)));
            assert_eq!(ptx.len(), kernels.ptx.unpacked_len());
            if let Some(cubin) = kernels.cubin {
                assert!(cubin.image.unpack().starts_with(b"\x7fELF"), "{}", kernels.arch);
            }
        }
    }
}
