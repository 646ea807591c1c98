//! What an entry point of `decode` is compiled for.

use crate::arch::mma::Element;
use crate::memory::Index;
use core::marker::PhantomData;

/// Most fragments of a tile. Arrays have room for so many; what a tile does not have of them takes no
/// register.
pub(super) const MAX_FRAGMENTS: usize = 2;

/// What an entry point is compiled for.
pub trait Config {
    /// Type of activations and weights.
    type Element: Element;
    /// Width of offsets within a tensor.
    type Index: Index;
    /// Fragments of a tile, each of eight pairs: the columns of one mma. At most two.
    const FRAGMENTS: usize;
    /// Whether a call may be any, or is plain: see [`DecodeTile`](crate::DecodeTile).
    const GENERAL: bool;
    /// Pairs of a tile.
    const ROWS: u32 = 8 * Self::FRAGMENTS as u32;
}

/// Tiles of `ROWS` pairs, 8 or 16, for plain calls or for any.
pub struct Rows<E, I, const ROWS: u32, const GENERAL: bool>(PhantomData<(E, I)>);

impl<E: Element, I: Index, const ROWS: u32, const GENERAL: bool> Config for Rows<E, I, ROWS, GENERAL> {
    type Element = E;
    type Index = I;
    const FRAGMENTS: usize = {
        assert!(ROWS == 8 || ROWS == 8 * MAX_FRAGMENTS as u32);
        ROWS as usize / 8
    };
    const GENERAL: bool = GENERAL;
}

/// Tiles that so many pairs of one segment are cut into. Pairs are never near 2³².
#[inline(always)]
pub(super) fn tiles_of<C: Config>(pairs: u32) -> u32 {
    (pairs + (C::ROWS - 1)) >> C::ROWS.trailing_zeros()
}
