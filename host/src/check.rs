//! What every tensor of a call must meet: not null, aligned, long enough.

use crate::error::{Error, Result};
use crate::projection::{MAX_SIZE, elements};
use crate::tensor::{Space, View, ViewMut};
use bytemuck::Pod;

/// Refuses a view that cannot hold `shape`.
pub(crate) fn check_view<S: Space, T: Pod>(
    tensor: &'static str,
    view: &View<'_, S, T>,
    shape: &[usize],
) -> Result<()> {
    let expected = elements(tensor, shape)?;
    check_extent(tensor, view.address(), align_of::<T>(), view.len(), expected, || format!("{shape:?}"))
}

/// Refuses a view to be written that cannot hold `shape`.
pub(crate) fn check_view_mut<S: Space, T: Pod>(
    tensor: &'static str,
    view: &ViewMut<'_, S, T>,
    shape: &[usize],
) -> Result<()> {
    check_view(tensor, &view.as_view(), shape)
}

/// Refuses memory at `address` that is null, unaligned, or shorter than `expected` elements.
pub(crate) fn check_extent(
    tensor: &'static str,
    address: u64,
    align: usize,
    got: usize,
    expected: usize,
    shape: impl Fn() -> String,
) -> Result<()> {
    // Also where nothing is expected: a back end may look at all that a view names.
    if expected == 0 && got == 0 {
        return Ok(());
    }
    if address == 0 {
        return Err(Error::NullPointer { tensor, expected: expected.max(got) });
    }
    if !address.is_multiple_of(align as u64) {
        return Err(Error::Misaligned { tensor, expected: align, address });
    }
    if got < expected {
        return Err(Error::TooShort { tensor, shape: shape(), expected, got });
    }
    Ok(())
}

/// Refuses rows that overlap or that the buffer cannot hold; returns the stride.
pub(crate) fn check_rows(
    tensor: &'static str,
    (address, align, len): (u64, usize, usize),
    stride: Option<usize>,
    rows: usize,
    width: usize,
) -> Result<usize> {
    let stride = stride.unwrap_or(width);
    if stride < width {
        return Err(Error::RowStride { tensor, expected: width, got: stride });
    }
    // The last row need not be followed by the padding of its stride.
    let extent = match rows.checked_sub(1) {
        None => 0,
        Some(before) => elements(tensor, &[before, stride])?
            .checked_add(width)
            .ok_or_else(|| Error::SizeOverflow { tensor, shape: format!("[{rows}, {width}]") })?,
    };
    let shape = || format!("[{rows}, {width}] with a row stride of {stride}");
    check_extent(tensor, address, align, len, extent, shape)?;
    Ok(stride)
}

/// Rows of a call, and what is known of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RowsLayout {
    /// Elements from one to the next.
    pub stride: usize,
    /// How many there are: those that the call needs or, with an index, those that the memory holds.
    pub rows: usize,
    /// Whether an index names them.
    pub indexed: bool,
}

/// As [`check_rows`], of a tensor and its index, for `pairs` pairs that need `rows` rows without an index.
pub(crate) fn check_indexed<S: Space>(
    [tensor, index_name]: [&'static str; 2],
    extent: (u64, usize, usize),
    (stride, index): (Option<usize>, &Option<View<'_, S, i32>>),
    [rows, pairs, width]: [usize; 3],
) -> Result<RowsLayout> {
    let Some(index) = index else {
        return Ok(RowsLayout {
            stride: check_rows(tensor, extent, stride, rows, width)?,
            rows,
            indexed: false,
        });
    };
    // An index without a row to name is a mistake, though all its pairs would be inactive.
    let stride = check_rows(tensor, extent, stride, pairs.min(1), width)?;
    check_view(index_name, index, &[pairs])?;
    let rows = extent.2.checked_sub(width).map_or(0, |rest| rest / stride + 1);
    Ok(RowsLayout { stride, rows, indexed: true })
}

/// Refuses `count` elements from element `start` on, where a buffer has `len`.
pub(crate) fn check_room(len: usize, start: usize, count: usize) -> Result<()> {
    let end = start.saturating_add(count);
    if end > len {
        let shape = format!("[{start}..{end}]");
        return Err(Error::TooShort { tensor: "buffer", shape, expected: end, got: len });
    }
    Ok(())
}

/// Refuses a size over its limit.
pub(crate) fn check_limit(what: &'static str, got: usize, limit: usize) -> Result<()> {
    if got > limit { Err(Error::SizeTooLarge { what, limit, got }) } else { Ok(()) }
}

/// Refuses a list of ids that is not there, or too long to be counted in 31 bits.
pub(crate) fn check_list<S: Space>(tensor: &'static str, list: &View<'_, S, i32>) -> Result<()> {
    check_limit(tensor, list.len(), MAX_SIZE)?;
    check_view(tensor, list, &[list.len()])
}

/// Refuses an expert map without entries, or too long.
pub(crate) fn check_expert_map<S: Space>(map: &View<'_, S, i32>) -> Result<()> {
    if map.is_empty() {
        return Err(Error::ZeroSize { what: "expert_map" });
    }
    check_list("expert_map", map)
}
