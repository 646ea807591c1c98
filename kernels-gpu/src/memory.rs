//! Addresses of device memory, and the arithmetic of offsets in two widths.

use core::marker::PhantomData;

/// A device address of elements of type `T`. Null stands for a tensor that is absent.
#[repr(transparent)]
pub struct Global<T> {
    address: u64,
    element: PhantomData<*const T>,
}

impl<T> Clone for Global<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Global<T> {}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: transparent over a u64, for which every bit pattern is valid; the marker has no bytes.
unsafe impl<T> bytemuck::Zeroable for Global<T> {}
#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: as above.
unsafe impl<T: 'static> bytemuck::Pod for Global<T> {}

impl<T> core::fmt::Debug for Global<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:#x}", self.address)
    }
}

impl<T> Global<T> {
    /// The absent tensor.
    pub const NULL: Self = Self::new(0);

    /// Wraps a device address.
    #[inline(always)]
    pub const fn new(address: u64) -> Self {
        Global { address, element: PhantomData }
    }

    /// The address as a number.
    #[inline(always)]
    pub const fn address(self) -> u64 {
        self.address
    }

    /// True for the absent tensor.
    #[inline(always)]
    pub const fn is_null(self) -> bool {
        self.address == 0
    }

    /// The address of element `index`.
    #[inline(always)]
    pub fn at<I: Index>(self, index: I) -> Self {
        Self::new(self.address + index.wide() * size_of::<T>() as u64)
    }
}

/// An element offset within a tensor: `u32` in the i32 kernels, `u64` in the i64 kernels.
///
/// The host launches an i32 kernel only when the largest element offset over all tensors of the call
/// fits 31 bits, so the products below cannot wrap. Emulated, one that does is a fault.
pub trait Index: Copy {
    /// Narrows or keeps a size or stride that came as 64 bits.
    fn from_u64(value: u64) -> Self;
    /// Widens a 32-bit count.
    fn from_u32(value: u32) -> Self;
    /// Sum.
    fn plus(self, other: Self) -> Self;
    /// Product.
    fn times(self, other: Self) -> Self;
    /// The offset in 64 bits, for the address itself.
    fn wide(self) -> u64;
}

macro_rules! index {
    ($($int:ty),*) => {$(
        impl Index for $int {
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $int
            }
            #[inline(always)]
            fn from_u32(value: u32) -> Self {
                value as $int
            }
            #[inline(always)]
            #[track_caller]
            fn plus(self, other: Self) -> Self {
                #[cfg(feature = "emulate")]
                if self.checked_add(other).is_none() {
                    crate::emulate::overflow(format!("{self} + {other}"));
                }
                self.wrapping_add(other)
            }
            #[inline(always)]
            #[track_caller]
            fn times(self, other: Self) -> Self {
                #[cfg(feature = "emulate")]
                if self.checked_mul(other).is_none() {
                    crate::emulate::overflow(format!("{self} * {other}"));
                }
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn wide(self) -> u64 {
                self as u64
            }
        }
    )*};
}
index!(u32, u64);
