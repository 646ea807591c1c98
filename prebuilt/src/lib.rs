//! The GPU kernels of [moe-lora](https://docs.rs/moe-lora), compiled: [`KERNELS`] has a module for each
//! generation of devices, as PTX and, where the build had an assembler, as machine code.
//!
//! As it comes from crates.io this crate brings the kernels with it, and building it needs no compiler for
//! them. With the feature `from-source`, and always in moe-lora's own repository, the build compiles them
//! from `moe-lora-kernels`. That needs a rustc for `nvptx64-nvidia-cuda`; where none is found, the build says
//! what to do.
//!
//! | variable | what it does when the kernels are compiled |
//! |---|---|
//! | `MOE_LORA_KERNEL_RUSTC` | names the rustc |
//! | `MOE_LORA_PTX_DIR` | names a folder with `sm_80.ptx` and the others, to be embedded instead |
//! | `MOE_LORA_CUBINS` | machine code beside the PTX: `always`, `never`, or, unset, where a ptxas is found |

use std::fmt;

/// The kernels for one generation of devices.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// Least compute capability, times ten: 80, 90, 100, 120.
    pub sm: u32,
    /// The target as PTX names it. One that ends in `a` runs on that very capability alone.
    pub arch: &'static str,
    /// Which code generator and compiler made the PTX.
    pub made_by: &'static str,
    /// The PTX module.
    pub ptx: Packed,
    /// The same module as machine code, where the build found an assembler.
    pub cubin: Option<Cubin>,
}

/// Kernels that were assembled before the program was built: they load at once, while PTX is first compiled
/// by the driver.
#[derive(Clone, Copy, Debug)]
pub struct Cubin {
    /// The ELF image.
    pub image: Packed,
    /// Version of the ptxas that made it, for example `13.0.88`. A driver older than that CUDA release may
    /// refuse it.
    pub ptxas: &'static str,
}

/// A file that was built into the program, as an LZ4 block with its length before it: kernels are so much
/// alike that they take a third.
#[derive(Clone, Copy)]
pub struct Packed(&'static [u8]);

/// The kernels that were built into this program, oldest generation first.
pub static KERNELS: &[Kernels] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The newest generation whose kernels have run: no newer device has been at hand.
const NEWEST_RUN: u32 = 90;

impl Kernels {
    /// The newest of `kernels` that a device of this compute capability (times ten) can run.
    pub fn newest(kernels: &'static [Kernels], capability: u32) -> Option<&'static Kernels> {
        kernels.iter().filter(|kernels| kernels.runs_on(capability)).max_by_key(|kernels| kernels.sm)
    }

    /// True when a device of this compute capability (times ten) can run the module.
    pub fn runs_on(&self, capability: u32) -> bool {
        if self.arch.ends_with('a') { capability == self.sm } else { capability >= self.sm }
    }

    /// The cubin, if a device of this compute capability can run it: machine code is good for later minor
    /// versions, PTX for later major ones too (CUDA programming guide, "Binary Compatibility").
    pub fn cubin_for(&self, capability: u32) -> Option<Cubin> {
        self.cubin.filter(|_| self.runs_on(capability) && capability / 10 == self.sm / 10)
    }

    /// A name for exactly these kernels, of 16 digits: what was measured with others says nothing of them. It
    /// is made of the PTX, whatever assembles that, by FNV-1a (Fowler, Noll and Vo).
    pub fn fingerprint(&self) -> String {
        const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0100_0000_01b3;
        let hash = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
        format!("{:016x}", self.ptx.unpack().iter().fold(OFFSET, hash))
    }

    /// Whether moe-lora's tests have ever run these kernels on a device: those for `sm_80` and `sm_90a`, on
    /// an H100 and an H200. The others are compiled and assembled, and no more is known of them.
    pub fn have_run(&self) -> bool {
        self.sm <= NEWEST_RUN
    }
}

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
    /// If it is none, which [`KERNELS`] never has.
    pub fn unpack(self) -> Vec<u8> {
        lz4_flex::decompress_size_prepended(self.0).expect("a length and an LZ4 block")
    }
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_cubin_is_for_devices_of_its_major_version() {
        let cubin = Some(Cubin { image: Packed(&[]), ptxas: "13.0.88" });
        let kernels = |arch, sm| Kernels { sm, arch, ptx: Packed(&[]), cubin, made_by: "" };
        let (ampere, hopper) = (kernels("sm_80", 80), kernels("sm_90a", 90));
        let runs = |kernels: &Kernels, capability| {
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
        assert!(Kernels { cubin: None, ..ampere }.cubin_for(80).is_none());
    }

    #[test]
    fn each_device_gets_the_newest_generation_that_it_can_run() {
        // A100, RTX 3090, Orin, L40, H100, B200, B300, Thor, RTX 5090, GB10, and what may come.
        for (capability, expected) in [
            (75, None),
            (80, Some("sm_80")),
            (86, Some("sm_80")),
            (87, Some("sm_80")),
            (89, Some("sm_80")),
            (90, Some("sm_90a")),
            (100, Some("sm_100")),
            (103, Some("sm_100")),
            (110, Some("sm_100")),
            (120, Some("sm_120")),
            (121, Some("sm_120")),
            (130, Some("sm_120")),
        ] {
            let found = Kernels::newest(KERNELS, capability);
            assert_eq!(found.map(|kernels| kernels.arch), expected, "{capability}");
            let major_has_its_own = !matches!(capability, 110 | 130);
            let cubin = found.and_then(|kernels| Some((kernels.cubin?, kernels.cubin_for(capability))));
            assert!(cubin.is_none_or(|(_, cubin)| cubin.is_some() == major_has_its_own), "{capability}");
        }
        // Of some of them: an older generation's on a newer device.
        assert_eq!(Kernels::newest(&KERNELS[..1], 120).map(|kernels| kernels.sm), Some(80));
    }

    #[test]
    fn a_fingerprint_is_of_one_module() {
        // Of nothing, and of "foobar": the vectors that the algorithm's authors publish.
        let of = |ptx| {
            let packed = Packed::of(ptx);
            Kernels { sm: 80, arch: "sm_80", ptx: packed, cubin: None, made_by: "" }.fingerprint()
        };
        assert_eq!(of(b"\0\0\0\0\0"), "cbf29ce484222325");
        assert_eq!(of(b"\x06\0\0\0\x60foobar"), "85944171f73967e8");
        let all: BTreeSet<_> = KERNELS.iter().map(Kernels::fingerprint).collect();
        assert_eq!(all.len(), KERNELS.len());
    }

    #[test]
    fn every_generation_is_built_in() {
        assert_eq!(KERNELS.iter().map(|kernels| kernels.sm).collect::<Vec<_>>(), [80, 90, 100, 120]);
        for kernels in KERNELS {
            let ptx = String::from_utf8(kernels.ptx.unpack()).unwrap();
            assert!(ptx.contains(&format!("\n.target {}\n", kernels.arch)), "{}", kernels.arch);
            assert_eq!(ptx.len(), kernels.ptx.unpacked_len());
            if let Some(cubin) = kernels.cubin {
                assert!(cubin.image.unpack().starts_with(b"\x7fELF"), "{}", kernels.arch);
            }
        }
    }
}
