//! The architectures that kernels are compiled for.

use std::fmt;
use std::str::FromStr;

/// An architecture that the kernels are compiled for.
///
/// A closed list, since each one is a promise that CI assembles every kernel for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// A100 and everything after it: the driver compiles this PTX for later chips too.
    Sm80,
    /// H100, H200, GH200, with the instructions that exist there alone (`wgmma`, `setmaxnreg`).
    Sm90a,
    /// B200, GB200, and B300 after them.
    Sm100,
    /// RTX 50 series, RTX PRO Blackwell, GB10.
    Sm120,
}

impl Arch {
    /// Every architecture, oldest first.
    pub const ALL: [Self; 4] = [Self::Sm80, Self::Sm90a, Self::Sm100, Self::Sm120];

    /// Those whose kernels the library carries: `sm_80` loads on every later chip, `sm_90a` has what
    /// is Hopper's own, and the others have clusters, which `sm_80` lacks.
    pub const EMBEDDED: [Self; 4] = Self::ALL;

    /// The name that rustc's `target-cpu`, PTX's `.target` and ptxas's `-arch` share.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
            Self::Sm100 => "sm_100",
            Self::Sm120 => "sm_120",
        }
    }

    /// The compute capability as ten times major plus minor: 90 for `sm_90a`.
    pub fn capability(self) -> u32 {
        match self {
            Self::Sm80 => 80,
            Self::Sm90a => 90,
            Self::Sm100 => 100,
            Self::Sm120 => 120,
        }
    }

    /// The PTX version to emit: the oldest that has every instruction in use (8.1 for `st.async`) and
    /// knows the architecture (8.7 for `sm_120`), so that the module loads on the oldest driver
    /// possible.
    pub fn ptx_version(self) -> &'static str {
        match self {
            Self::Sm80 => "8.0",
            Self::Sm90a => "8.1",
            Self::Sm100 | Self::Sm120 => "8.7",
        }
    }

    /// The same as rustc's target feature: `ptx80`.
    pub fn ptx_feature(self) -> String {
        format!("ptx{}", self.ptx_version().replace('.', ""))
    }

    /// The Cargo features of `moe-lora-kernels` that are switched on for this architecture.
    pub fn kernel_features(self) -> &'static [&'static str] {
        match self {
            Self::Sm80 => &[],
            Self::Sm90a => &["sm_90", "sm_90a"],
            Self::Sm100 | Self::Sm120 => &["sm_90"],
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Arch {
    type Err = UnknownArch;

    fn from_str(name: &str) -> Result<Self, UnknownArch> {
        Self::ALL.into_iter().find(|arch| arch.name() == name).ok_or_else(|| UnknownArch(name.to_owned()))
    }
}

/// A name that is none of [`Arch::ALL`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown architecture `{0}`: the kernels are compiled for {known}",
    known = Arch::ALL.map(Arch::name).join(", ")
)]
pub struct UnknownArch(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_to_itself() {
        for arch in Arch::ALL {
            assert_eq!(arch.name().parse(), Ok(arch));
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        for name in ["sm_90", "sm_75", "SM_80", "", "sm_80 "] {
            let error = name.parse::<Arch>().unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
            assert!(error.contains("sm_80, sm_90a, sm_100, sm_120"), "{error}");
        }
    }

    #[test]
    fn the_name_holds_the_capability() {
        for arch in Arch::ALL {
            let digits = arch.name().trim_start_matches("sm_").trim_end_matches('a');
            assert_eq!(digits.parse(), Ok(arch.capability()));
        }
    }
}
