//! Shared memory: its addresses and words.

/// Shared memory is read and written in whole words.
pub(super) const WORD: usize = 4;

/// Where the block's dynamic shared memory starts: past zero, as on the device, so that a stray zero is
/// no address.
pub(crate) const SHARED_BASE: u32 = 1024;

/// The first `N` words of `bytes`.
pub(super) fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let (words, _) = bytes.as_chunks::<WORD>();
    std::array::from_fn(|i| u32::from_le_bytes(words[i]))
}

/// Where the shared memory of the first block of a cluster begins in the addresses that `mapa` makes,
/// and how far on that of the next is. An address below is the block's own.
pub(super) const WINDOW: u32 = 1 << 24;
