//! Tiles of pairs and columns: their shapes, their layout in shared memory, and the few operations on
//! them that `shrink` and `expand` share.
//!
//! Both kernels are the same product seen twice: rows gathered by pair, times the rows of a weight
//! matrix (of `a` or `b`), along an innermost dimension that both have (K or the rank).

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod accumulator;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod assignment;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub mod panel;
mod shape;
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod unroll;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use assignment::Assignment;
pub use shape::{GROUP, TileShape};
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use unroll::unroll;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
use core::hint::select_unpredictable;

/// The tensor of slice `slice`. A parameter block that is indexed at run time would be copied to local
/// memory; a choice among registers is not.
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
#[inline(always)]
pub fn select_slice<T: Copy>(tensors: [T; crate::params::MAX_SLICES], slice: u32) -> T {
    // Not branches: the compiler would choose among addresses, and load then.
    let [first, second, third, fourth] = tensors;
    let low = select_unpredictable(slice == 0, first, second);
    let high = select_unpredictable(slice == 2, third, fourth);
    select_unpredictable(slice < 2, low, high)
}

/// `n / divisor`. The host never sends a divisor of 0; saying so here keeps the check, and the panic that
/// it would need, out of the kernel.
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
#[inline(always)]
pub fn quotient(n: u32, divisor: u32) -> u32 {
    n.checked_div(divisor).unwrap_or(0)
}

/// `n / OF`, rounded up, of numbers that are never near 2³²: two instructions. `div_ceil`, which must not
/// wrap, is four.
#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
#[inline(always)]
pub fn pieces<const OF: u32>(n: u32) -> u32 {
    const { assert!(OF.is_power_of_two()) };
    (n + (OF - 1)) >> const { OF.trailing_zeros() }
}
