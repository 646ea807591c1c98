//! `route`: sorts pairs into segments and cuts these into tiles.
//!
//! A *bucket* is a (slot, expert): slot · E + expert; one more, the last, is for inactive pairs. It is a
//! stable counting sort: the pairs of a segment are in ascending order, whatever the order of threads.
//!
//! Pairs are dealt out in runs, one a *sorter*: a warp that has counters of its own, one a bucket, in shared
//! memory. It counts its run; sums over the sorters before it, and over the buckets before each bucket, turn
//! its counts into positions; then it walks its run again, 32 pairs at a time, and each pair takes the next
//! position of its bucket. Pairs of one bucket that meet in a row of 32 find one another by ballots. A run of
//! up to [`ROWS`] rows stays in registers from one walk to the next; of a longer one the buckets are stored
//! in between.
//!
//! | form | blocks | for |
//! |---|---|---|
//! | one block | 1 | few pairs |
//! | grid | several, all at once | more pairs |
//! | wide | several, all at once | all other calls |
//!
//! The first two take calls in which every run stays in registers, every bucket has a thread, and every
//! slot's rank has a place in shared memory. The wide form walks runs in parts. Where there are more buckets
//! than room for counters, it does so for one window of buckets after another.
//!
//! Blocks of a grid exchange counts: a block stores how many pairs of each bucket it has counted, one word a
//! bucket, where all others look for it. The word's top bit is its ready flag, so no barrier of the grid is
//! needed. Words of inactive pairs are not exchanged: these pairs are what is left. The words lie in two
//! tables, which launches use alternately: whoever uses one clears the other.
//!
//! Shared memory, in words, for H sorters and windows of W buckets:
//!
//! | words | what |
//! |---|---|
//! | (H \| 4) × W | counters, then positions: a bucket's side by side |
//! | W + 4 | pairs in all blocks, then the position of the first pair of a bucket |
//! | W + 4 | pairs in blocks before this one, then the number of the first tile of a bucket |
//! | 4 | how many segments have many tiles |
//! | 3 a warp | scan |
//! | [`STAGED`] | rank of a slot |
//! | 2 | number of the launch, words that the launch before has written |

/// Threads of the form of one block. What all of them do is issued once a warp, so fewer are faster.
pub const BLOCK_THREADS: u32 = 256;

/// Threads of a block of a grid.
pub const GRID_THREADS: u32 = 512;

/// Most blocks of a grid: they must all run at once, one a multiprocessor.
pub const MAX_BLOCKS: u32 = 128;

/// Rows of 32 pairs that a sorter keeps in registers. The code is unrolled over them, and a call of few pairs
/// waits for code as it does for data.
pub const ROWS: u32 = 4;

/// Slots whose ranks are kept in shared memory. Those of others are loaded pair by pair.
pub const STAGED: u32 = 256;

/// Words of shared memory beside the counters and the two arrays of [`WINDOW_WORDS`].
const SCRATCH: u32 = 8 + 4 + 3 * GRID_THREADS / 32 + STAGED + 2;

/// Words of shared memory a bucket beside its counters.
const WINDOW_WORDS: u32 = 2;

/// Words that come before the tables of the exchange.
pub const EXCHANGE_HEAD: u32 = 4;

/// Bytes of shared memory of a block of `sorters` sorters, a multiple of 4.
pub const fn shared_bytes(sorters: u32, window: u32) -> u32 {
    ((counter_stride(sorters) + WINDOW_WORDS) * window + SCRATCH) * 4
}

/// Words from a bucket's counters to the next bucket's: an odd number of fours, so that threads that take a
/// bucket each, four words at a time, meet in no bank.
const fn counter_stride(sorters: u32) -> u32 {
    sorters | 4
}

/// Whether a form of blocks of `threads` threads that is not wide will do: `pairs` pairs a block.
pub const fn is_narrow(threads: u32, pairs: u64, slots: u64, buckets: u64) -> bool {
    pairs <= (threads * ROWS) as u64 && slots <= STAGED as u64 && buckets <= threads as u64 + 1
}

/// Most counters of a window, a multiple of 4, for the `sorters` sorters of a block that may be given
/// `shared_bytes` bytes.
pub const fn max_window(sorters: u32, shared_bytes: u32) -> u32 {
    (shared_bytes / 4 - SCRATCH) / (counter_stride(sorters) + WINDOW_WORDS) / 4 * 4
}

/// The window that counts `buckets` buckets at once, the inactive one included: a multiple of 4 for the
/// others, and a counter more.
pub const fn window(buckets: u64) -> u64 {
    (buckets - 1).next_multiple_of(4) + 4
}

/// Words of a table in which `blocks` blocks exchange their counts of `buckets` buckets, the inactive one
/// included: it is left out, and the others are loaded four at a time.
pub const fn table_words(blocks: u64, buckets: u64) -> u64 {
    blocks * (buckets - 1).next_multiple_of(4)
}

/// Most tiles that `pairs` pairs in `buckets` buckets (the inactive one included) can be cut into.
pub const fn max_tiles(pairs: u64, buckets: u64, tile_rows: u64) -> u64 {
    let segments = if pairs < buckets { pairs } else { buckets };
    let tiles = segments + pairs / tile_rows;
    if tiles < pairs { tiles } else { pairs }
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::route;
