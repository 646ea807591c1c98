//! The widths of a projection's slices.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

/// N of each slice of a projection: 1 ..= [`OutDims::MAX_SLICES`] widths.
///
/// Gate and up have one width; q, k and v of an attention layer have widths of their own. Its JSON form is a
/// list: `[768, 768]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<usize>", into = "Vec<usize>")]
pub struct OutDims {
    /// Zero past the last slice, so that equal widths are equal.
    widths: [usize; Self::MAX_SLICES],
    /// May be no legal number of slices, as any size may be illegal before a projection is made of it.
    count: usize,
}

impl OutDims {
    /// Most slices of one projection.
    pub const MAX_SLICES: usize = 4;

    /// A slice of each of these widths. Whether a width is legal is for
    /// [`Projection::new`](crate::Projection::new) to say.
    ///
    /// # Errors
    /// [`Error::ZeroSize`] for no slices, [`Error::SizeTooLarge`] for too many.
    pub fn new(widths: &[usize]) -> Result<Self> {
        check_count(widths.len())?;
        let mut all = [0; Self::MAX_SLICES];
        all[..widths.len()].copy_from_slice(widths);
        Ok(OutDims { widths: all, count: widths.len() })
    }

    /// `slices` slices of `out_dim` columns each. A number of slices that is not legal is refused by
    /// [`Projection::new`](crate::Projection::new).
    pub const fn uniform(out_dim: usize, slices: usize) -> Self {
        let mut widths = [0; Self::MAX_SLICES];
        let mut slice = 0;
        while slice < slices && slice < Self::MAX_SLICES {
            widths[slice] = out_dim;
            slice += 1;
        }
        OutDims { widths, count: slices }
    }

    pub(crate) fn check(&self) -> Result<()> {
        check_count(self.count)
    }

    /// S.
    #[expect(clippy::len_without_is_empty, reason = "a projection has a slice or more")]
    pub const fn len(&self) -> usize {
        self.count
    }

    /// The widths, one a slice.
    pub fn as_slice(&self) -> &[usize] {
        &self.widths[..self.count.min(Self::MAX_SLICES)]
    }

    /// The width of slice `s`.
    ///
    /// # Panics
    /// When there is no such slice.
    pub fn get(&self, s: usize) -> usize {
        self.as_slice()[s]
    }

    /// The largest width.
    pub fn max(&self) -> usize {
        self.widths.into_iter().fold(0, usize::max)
    }

    /// The mean width.
    pub fn mean(&self) -> f64 {
        self.total() as f64 / self.count.max(1) as f64
    }

    /// All widths together: the columns of `out` that a call writes.
    pub fn total(&self) -> usize {
        self.first_column(self.count)
    }

    /// The column at which slice `s` begins, where slices are in order: the widths before it.
    pub fn first_column(&self, s: usize) -> usize {
        self.as_slice().iter().take(s).fold(0, |sum, &width| sum.saturating_add(width))
    }

    /// As many slices, each of the width that `width` makes of its own.
    pub fn map(self, mut width: impl FnMut(usize) -> usize) -> Self {
        let mut mapped = self;
        mapped.widths.iter_mut().take(self.count).for_each(|own| *own = width(*own));
        mapped
    }

    /// Whether all slices are of one width.
    pub fn is_uniform(&self) -> bool {
        self.as_slice().iter().all(|&width| width == self.widths[0])
    }
}

fn check_count(count: usize) -> Result<()> {
    match count {
        0 => Err(Error::ZeroSize { what: "slices" }),
        1..=OutDims::MAX_SLICES => Ok(()),
        got => Err(Error::SizeTooLarge { what: "slices", limit: OutDims::MAX_SLICES, got }),
    }
}

impl TryFrom<Vec<usize>> for OutDims {
    type Error = Error;

    fn try_from(widths: Vec<usize>) -> Result<Self> {
        OutDims::new(&widths)
    }
}

impl From<OutDims> for Vec<usize> {
    fn from(dims: OutDims) -> Self {
        dims.as_slice().to_vec()
    }
}

impl fmt::Debug for OutDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().fmt(f)
    }
}

/// `768` where all slices have one width, else each: `4096+1024+1024`.
impl fmt::Display for OutDims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_uniform() {
            return write!(f, "{}", self.max());
        }
        let widths: Vec<_> = self.as_slice().iter().map(usize::to_string).collect();
        f.write_str(&widths.join("+"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_told_apart() {
        let dims = OutDims::new(&[4096, 1024, 512]).unwrap();
        assert_eq!((dims.len(), dims.max(), dims.total()), (3, 4096, 5632));
        assert_eq!([0, 1, 2, 3].map(|s| dims.first_column(s)), [0, 4096, 5120, 5632]);
        assert_eq!((dims.is_uniform(), dims.to_string()), (false, "4096+1024+512".to_owned()));
        let uniform = OutDims::uniform(768, 2);
        assert_eq!(uniform, OutDims::new(&[768, 768]).unwrap());
        assert_eq!((uniform.is_uniform(), uniform.to_string()), (true, "768".to_owned()));
    }

    #[test]
    fn a_list_is_read_and_written() {
        let dims: OutDims = serde_json::from_str("[8, 16]").unwrap();
        assert_eq!(dims, OutDims::new(&[8, 16]).unwrap());
        assert_eq!(serde_json::to_string(&dims).unwrap(), "[8,16]");
        for list in ["[]", "[1, 2, 3, 4, 5]", "[-1]", "8"] {
            assert!(serde_json::from_str::<OutDims>(list).is_err(), "{list}");
        }
    }

    #[test]
    fn numbers_of_slices_that_are_not_legal_are_told() {
        let too_many = Error::SizeTooLarge { what: "slices", limit: 4, got: 5 };
        assert_eq!(OutDims::new(&[]), Err(Error::ZeroSize { what: "slices" }));
        assert_eq!(OutDims::new(&[1; 5]), Err(too_many.clone()));
        assert_eq!(OutDims::uniform(8, 0).check(), Err(Error::ZeroSize { what: "slices" }));
        assert_eq!(OutDims::uniform(8, 5).check(), Err(too_many));
    }
}
