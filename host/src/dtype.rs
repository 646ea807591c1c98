//! The element types of activations and weights.

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Type of `x`, `a`, `b`, `h` and `out`: one for the whole call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// bfloat16: 8 exponent bits, 8 significant bits.
    Bf16,
    /// IEEE half precision: 5 exponent bits, 11 significant bits.
    F16,
}

impl DType {
    /// Bytes of one element.
    pub const SIZE: usize = 2;

    /// Largest ‖out − ref‖ / ‖ref‖ (Frobenius, over the delta) that a back end may show against the
    /// float64 reference.
    pub fn tolerance(self) -> f64 {
        match self {
            DType::Bf16 => 3e-3,
            DType::F16 => 6e-4,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// A 16-bit float that the kernels exist for: [`bf16`] or [`struct@f16`].
pub trait Element: sealed::Sealed + Pod + Send + Sync + PartialEq + fmt::Debug {
    /// The run-time name of this type.
    const DTYPE: DType;
    /// Widens exactly.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Widens a whole slice, exactly.
    ///
    /// # Panics
    /// When the two slices differ in length.
    fn widen(from: &[Self], to: &mut [f32]);
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}
