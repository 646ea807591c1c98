//! `decode`: shrink and expand of few pairs in one launch,
//! `out[p, offset + s·N + n] (+)= weight[p] · Σ_q (Σ_c x[row(p), c] · a[s][l, e, q, c]) · b[s][l, e, n, q]`.
//!
//! A call of few pairs reads every weight of the adapters in use once and does hardly any arithmetic. What it
//! costs beyond that read is waiting: for launches, for ids, for one another. So there is one launch. A *unit* of
//! work is one tile of up to 8 pairs and one slice; a cluster takes one unit after another. Its blocks
//!
//! 1. shrink: each takes a share of K, and all ranks: a part of h, in shared memory;
//! 2. meet, and add up each other's parts, all in the same order: h;
//! 3. expand: each takes a share of the columns.
//!
//! Weights go from device memory straight into mma fragments, sixteen bytes a thread. They are the operand with
//! sixteen rows, pairs are the eight columns. A thread of number c in its quad holds elements 8c … 8c + 7 of a
//! run of 32, which mma would have it hold as 2c, 2c + 1, 2c + 8, 2c + 9 of two steps: since both operands are
//! permuted alike, the sum is the same. Rows of b are permuted so that a thread's two rows are neighbouring
//! columns of the output.
//!
//! Each block finds the segments itself ([`segments`]): no launch comes before this one.
//!
//! Shared memory:
//!
//! | bytes | what |
//! |---|---|
//! | [`segments::shared_bytes`] | the segments |
//! | 2 × 32 | pairs of a tile, in turns |
//! | 8 × (128 + 4) × 4 | parts of h of the warps that share K |
//! | 2 × 8 × (R′ + 4) × 4 | part of h of this block, in turns |
//! | 8 × `h_row_bytes` | h |
//!
//! with R′ the rank rounded up to 16.

use crate::segments;

/// Threads of a block.
pub const THREADS: u32 = segments::THREADS;
/// Pairs of a full tile: the columns of one mma.
pub const ROWS: u32 = 8;
/// Largest R that the parts of h are laid out for.
pub const MAX_RANK: u32 = 256;
/// Most blocks of a cluster that every device with clusters allows.
pub const MAX_CLUSTER: u32 = 8;

/// Elements that a quad of threads loads of a row at a time, sixteen bytes each.
const RUN: u32 = 32;
/// Rows of a matrix of weights that a warp takes at a time.
const GROUP: u32 = 16;
/// Words after a row of parts, so that a warp's stores of one fragment meet 32 different banks.
const PAD: u32 = 4;
/// Columns of parts that the warps of a block write between them.
const WARP_COLUMNS: u32 = THREADS / 32 * GROUP;

/// Bytes from one row of h to the next: an odd multiple of 64, so that the quads of a warp read different banks.
const fn h_row_bytes(max_rank: u32) -> u32 {
    let bytes = max_rank.next_multiple_of(RUN) * 2;
    if bytes.is_multiple_of(128) { bytes + 64 } else { bytes }
}

/// Bytes of shared memory of a block, with room for `room` pairs (see [`segments::room`]).
pub const fn shared_bytes(max_rank: u32, room: u32) -> u32 {
    segments::shared_bytes(room)
        + 2 * ROWS * 4
        + ROWS * (WARP_COLUMNS + PAD) * 4
        + 2 * ROWS * (max_rank.next_multiple_of(GROUP) + PAD) * 4
        + ROWS * h_row_bytes(max_rank)
}

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90"), feature = "emulate"))]
pub use kernel::decode;

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90"), feature = "emulate"))]
mod kernel {
    use super::{GROUP, MAX_CLUSTER, PAD, ROWS, RUN, THREADS, WARP_COLUMNS, h_row_bytes};
    use crate::arch::mma::Element;
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, cluster, grid, thread};
    use crate::memory::{Global, Index};
    use crate::params::{DecodeParams, Tile};
    use crate::segments::{self, Segments};
    use crate::tile::{quotient, select_slice, unroll};

    const WARPS: u32 = THREADS / 32;
    /// Runs of two rows that a thread requests at a time.
    const BATCH: usize = 4;
    /// Of these, in the expand, runs of ranks and groups of columns.
    const RUNS: usize = 2;
    const GROUPS: usize = BATCH / RUNS;
    /// Elements of a line of L2.
    const LINE: u32 = 64;

    /// This thread's elements of one run: sixteen bytes of two rows of weights.
    type Rows = [[u32; 4]; 2];

    /// Adds one run's product with `columns`, this thread's elements of the run of its pair.
    #[inline(always)]
    fn multiply<E: Element>(sum: &mut [f32; 4], [low, high]: Rows, columns: [u32; 4]) {
        E::mma(sum, [low[0], high[0], low[1], high[1]], [columns[0], columns[1]]);
        E::mma(sum, [low[2], high[2], low[3], high[3]], [columns[2], columns[3]]);
    }

    /// The share of `length` things that block `block` of `blocks` takes: the first, and the end.
    #[inline(always)]
    fn share_of(length: u32, block: u32, blocks: u32) -> (u32, u32) {
        let each = quotient(length, blocks);
        let more = length - each * blocks;
        let first = block * each + block.min(more);
        (first, first + each + (block < more) as u32)
    }

    /// Calls `body` with this thread's share of `rows` × `width` items. A power of two of threads takes a row,
    /// so that no thread divides.
    #[inline(always)]
    fn each_item(rows: u32, width: u32, mut body: impl FnMut(u32, u32)) {
        let room = width.next_power_of_two();
        let (shift, mask) = (room.trailing_zeros(), room - 1);
        let mut item = thread::index();
        while item < rows << shift {
            if item & mask < width {
                body(item >> shift, item & mask);
            }
            item += THREADS;
        }
    }

    /// The first `count` of eight elements, zeros after them.
    #[inline(always)]
    fn keep_first(elements: [u32; 4], count: u32) -> [u32; 4] {
        let mut kept = elements;
        unroll::<4>(|i| {
            let mask = match count.saturating_sub(2 * i as u32) {
                0 => 0,
                1 => 0xffff,
                _ => u32::MAX,
            };
            kept[i] &= mask;
        });
        kept
    }

    /// How the warps of a block share the ranks and the block's part of K.
    #[derive(Clone, Copy)]
    struct Shares {
        /// Groups of 16 ranks.
        groups: u32,
        /// Warps that share K for one group: a power of two.
        k_shares: u32,
    }

    impl Shares {
        #[inline(always)]
        fn of(rank: u32) -> Self {
            let groups = rank.div_ceil(GROUP);
            let k_shares = match groups {
                0 | 1 => 8,
                2 => 4,
                3 | 4 => 2,
                _ => 1,
            };
            Shares { groups, k_shares }
        }
    }

    /// The matrix of a or b that a unit uses: the first of the matrix's `rows` rows in its slice's tensor.
    #[inline(always)]
    fn first_row<I: Index>(slot: u32, expert: u32, experts: u32, rows: u32) -> I {
        let expert = if experts == 1 { 0 } else { expert };
        let matrix = I::from_u32(slot).times(I::from_u32(experts)).plus(I::from_u32(expert));
        matrix.times(I::from_u32(rows))
    }

    /// What is left of a unit once each block has its part of h.
    struct Tail<'p, I> {
        p: &'p DecodeParams,
        slice: u32,
        rows: u32,
        rank: u32,
        /// This block's columns, in groups of 16: the first, and the end.
        groups: (u32, u32),
        b: Global<u16>,
        /// First row of the unit's matrix in `b`.
        b_matrix: I,
        /// The pair of each row.
        list: Shared,
        /// This block's part of h, and bytes from one pair's to the next.
        part: Shared,
        part_row: u32,
        /// h, and bytes from one pair's to the next.
        h: Shared,
        h_row: u32,
    }

    impl<I: Index> Tail<'_, I> {
        /// Asks L2 for this block's share of b.
        ///
        /// # Safety
        /// The matrix must be one of b's.
        #[inline(always)]
        unsafe fn prefetch(&self) {
            let max_rank = self.p.route.max_rank;
            let first = GROUP * self.groups.0;
            let columns = self.p.out_dim.min(GROUP * self.groups.1).saturating_sub(first);
            let start = self.b.at(self.b_matrix.plus(I::from_u32(first)).times(I::from_u32(max_rank)));
            // Where ranks are used whole, rows follow one another: a line each. Otherwise a row each.
            let step = if self.rank == max_rank { LINE } else { max_rank };
            let end = if self.rank == 0 { 0 } else { columns * max_rank };
            let mut at = thread::index() * step;
            while at < end {
                // SAFETY: inside the matrix.
                unsafe { start.at(at).prefetch() };
                at += THREADS * step;
            }
        }

        /// Meets the other blocks, adds up h, and expands it. The first weights are requested before they meet.
        ///
        /// # Safety
        /// This thread's share of the block's part must be written; the whole cluster must come here.
        #[inline(always)]
        unsafe fn finish<E: Element>(&self) {
            let Tail { p, rows, rank, .. } = *self;
            let (g, c) = (thread::lane() / 4, thread::lane() % 4);
            let accumulate = p.accumulate != 0;
            let (mut group, end) = (self.groups.0 + thread::warp(), self.groups.1);
            // The two pairs whose sums this thread ends up with: where they begin in `out`, at the slice's column 0.
            let mut start = [Global::<u16>::NULL; 2];
            let mut weight = [1.0; 2];
            unroll::<2>(|i| {
                // Past the last pair: never stored.
                let row = (2 * c + i as u32).min(rows - 1);
                // SAFETY: the list holds a pair for each row.
                let pair = unsafe { self.list.offset(4 * row).load() };
                let column = I::from_u32(self.slice).times(I::from_u32(p.out_dim));
                start[i] = p.out.at(I::from_u32(pair).times(I::from_u64(p.out_stride)).plus(column));
                // An inactive pair's weight may be anything; its zeros stay zeros.
                if !p.topk_weights.is_null() && rank > 0 {
                    // SAFETY: the pair is one of P.
                    weight[i] = unsafe { p.topk_weights.at(pair).load() };
                }
            });
            let request = |group: u32, first_run: u32| {
                let mut batch = [[[[0u32; 4]; 2]; RUNS]; GROUPS];
                unroll::<GROUPS>(|t| {
                    unroll::<2>(|half| {
                        let column = GROUP * (group + WARPS * t as u32) + 2 * g + half as u32;
                        let row =
                            self.b_matrix.plus(I::from_u32(column)).times(I::from_u32(p.route.max_rank));
                        let first = RUN * first_run + 8 * c;
                        let at = self.b.at(row.plus(I::from_u32(first)));
                        let exists = group + WARPS * (t as u32) < end && column < p.out_dim;
                        unroll::<RUNS>(|r| {
                            let ahead = RUN * r as u32;
                            let wanted = exists && first + ahead < rank;
                            // SAFETY: eight elements are inside the row, and aligned.
                            let elements = unsafe { at.at(ahead).load16_if::<true>(wanted) };
                            batch[t][r][half] = if rank % 8 == 0 {
                                elements
                            } else {
                                // Above the rank the row may hold anything, NaN too.
                                keep_first(elements, rank.saturating_sub(first + ahead))
                            };
                        });
                    });
                });
                batch
            };
            let old_of = |group| {
                let mut old = [[0u32; 2]; GROUPS];
                if accumulate {
                    // SAFETY: two columns are inside the row; offset and N are multiples of 8.
                    self.each_output(start, group, |t, i, at| old[t][i] = unsafe { at.load() });
                }
                old
            };
            let mut batch = request(group, 0);
            let mut old = old_of(group);

            cluster::sync_blocks();
            // SAFETY: all parts are written; nobody reads h any more.
            unsafe { self.add_up::<E>() };
            barrier::sync();

            let runs = rank.div_ceil(RUN);
            // Rows past the last pair make columns that are never stored.
            let h = self.h.offset(g.min(rows - 1) * self.h_row + 16 * c);
            while group < end {
                let mut sum = [[0.0f32; 4]; GROUPS];
                let mut run = 0;
                loop {
                    unroll::<RUNS>(|r| {
                        let run = run + r as u32;
                        if run < runs {
                            // SAFETY: h is written up to the end of the run.
                            let columns = unsafe { h.offset(2 * RUN * run).load16() };
                            unroll::<GROUPS>(|t| multiply::<E>(&mut sum[t], batch[t][r], columns));
                        }
                    });
                    run += RUNS as u32;
                    if run >= runs {
                        break;
                    }
                    batch = request(group, run);
                }
                self.each_output(start, group, |t, i, at| {
                    let [first, second] = E::unpack(old[t][i]);
                    let packed = E::pack(sum[t][i] * weight[i] + first, sum[t][i + 2] * weight[i] + second);
                    // SAFETY: as above.
                    unsafe { at.store(packed) };
                });
                group += WARPS * GROUPS as u32;
                if group < end {
                    batch = request(group, 0);
                    old = old_of(group);
                }
            }
        }

        /// Calls `body` with each two columns that this thread stores, of groups `group`, `group` + 8, …: which group
        /// of these, which of the thread's two pairs, and where they go.
        #[inline(always)]
        fn each_output(
            &self,
            start: [Global<u16>; 2],
            group: u32,
            mut body: impl FnMut(usize, usize, Global<u32>),
        ) {
            let (g, c) = (thread::lane() / 4, thread::lane() % 4);
            unroll::<GROUPS>(|t| {
                let group = group + WARPS * t as u32;
                let column = GROUP * group + 2 * g;
                unroll::<2>(|i| {
                    let exists = group < self.groups.1 && column < self.p.out_dim;
                    if exists && 2 * c + (i as u32) < self.rows {
                        body(t, i, Global::new(start[i].at(column).address()));
                    }
                });
            });
        }

        /// h: the sum of all blocks' parts, in the order of the blocks. Two ranks of a pair a thread.
        ///
        /// # Safety
        /// All blocks must have written their parts, and met since.
        #[inline(always)]
        unsafe fn add_up<E: Element>(&self) {
            let blocks = cluster::blocks();
            each_item(self.rows, self.rank.max(1).next_multiple_of(RUN) / 2, |row, two| {
                let mut sum = [0.0f32; 2];
                if 2 * two < self.rank {
                    let place = self.part.offset(row * self.part_row + 8 * two);
                    let mut values = [[0.0f32; 2]; MAX_CLUSTER as usize];
                    unroll::<{ MAX_CLUSTER as usize }>(|other| {
                        if (other as u32) < blocks {
                            // SAFETY: that block wrote its part before the barrier.
                            values[other] = unsafe { place.in_block(other as u32).load2() };
                        }
                    });
                    unroll::<{ MAX_CLUSTER as usize }>(|other| unroll::<2>(|i| sum[i] += values[other][i]));
                    // The rank above an odd one is zero, whatever the part holds.
                    if 2 * two + 1 == self.rank {
                        sum[1] = 0.0;
                    }
                }
                // SAFETY: there is room for every pair and every run of ranks.
                unsafe { self.h.offset(row * self.h_row + 4 * two).store(E::pack(sum[0], sum[1])) };
            });
        }
    }

    /// The kernel, launched in clusters of up to [`MAX_CLUSTER`] blocks.
    ///
    /// # Safety
    /// As for the entry points: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn decode<E: Element, I: Index>(p: DecodeParams) {
        let max_rank = p.route.max_rank;
        let (g, c) = (thread::lane() / 4, thread::lane() % 4);
        let (block, blocks) = (cluster::block(), cluster::blocks());
        let accumulate = p.accumulate != 0;

        // The map of shared memory.
        let lists = Shared::base().offset(segments::shared_bytes(p.room));
        let warp_parts = lists.offset(2 * ROWS * 4);
        let warp_part_row = 4 * (WARP_COLUMNS + PAD);
        let block_parts = warp_parts.offset(ROWS * warp_part_row);
        let part_row = 4 * (max_rank.next_multiple_of(GROUP) + PAD);
        let h = block_parts.offset(2 * ROWS * part_row);

        grid::wait_for_previous();
        grid::let_next_start();
        // SAFETY: as the caller promises.
        let segments = unsafe { Segments::find(&p.route, Shared::base(), p.room) };
        let units = segments.tiles * p.slices;
        // This block's share of K, in runs, and of the columns, in groups.
        let k_share = share_of(p.in_dim.div_ceil(RUN), block, blocks);
        let groups = share_of(p.out_dim.div_ceil(GROUP), block, blocks);

        let mut turn = 0;
        let mut unit = quotient(thread::block(), blocks);
        while unit < units {
            let number = quotient(unit, p.slices);
            let slice = unit - number * p.slices;
            unit += p.clusters;
            // SAFETY: the tile is one of `tiles`.
            let found = unsafe { segments.tile(&p.route, number) };
            let Tile { slot, expert, rows, rank, .. } = found.tile;
            let list = lists.offset(turn * ROWS * 4);
            let part = block_parts.offset(turn * ROWS * part_row);

            // The first weights are requested before anybody knows the pairs.
            let shares = Shares::of(rank);
            let warp_k_share = thread::warp() & (shares.k_shares - 1);
            let runs = {
                let (first, end) = k_share;
                let each = (end - first).div_ceil(shares.k_shares);
                let first = end.min(first + warp_k_share * each);
                (first, end.min(first + each))
            };
            let (mut group, mut run) = (thread::warp() / shares.k_shares, runs.0);
            let a = select_slice(p.a, slice);
            let a_matrix = first_row::<I>(slot, expert, p.a_experts, max_rank);
            let request = |group: u32, run: u32| {
                let mut batch = [[[0; 4]; 2]; BATCH];
                unroll::<2>(|half| {
                    // Ranks above the last are computed from it, and never read.
                    let row = (GROUP * group + 8 * half as u32 + g).min(rank.saturating_sub(1));
                    let row = a_matrix.plus(I::from_u32(row)).times(I::from_u32(p.in_dim));
                    let at = a.at(row.plus(I::from_u32(RUN * run + 8 * c)));
                    unroll::<BATCH>(|i| {
                        let ahead = RUN * i as u32;
                        let wanted = group < shares.groups
                            && run + (i as u32) < runs.1
                            && RUN * run + 8 * c + ahead < p.in_dim;
                        // SAFETY: eight elements are inside the row, and aligned.
                        batch[i][half] = unsafe { at.at(ahead).load16_if::<true>(wanted) };
                    });
                });
                batch
            };
            let mut batch = request(group, run);
            let b = select_slice(p.b, slice);
            let b_matrix = first_row::<I>(slot, expert, p.b_experts, p.out_dim);
            let h_row = h_row_bytes(max_rank);
            let tail = Tail { p: &p, slice, rows, rank, groups, b, b_matrix, list, part, part_row, h, h_row };
            // SAFETY: the matrix is one of b's.
            unsafe { tail.prefetch() };

            // The pairs.
            // SAFETY: a list has room for every tile's rows; who read this one before has met the others since.
            unsafe { segments.pairs(&p.route, found, list) };
            barrier::sync();
            if block == 0 && slice == 0 {
                // SAFETY: the list holds the tile's pairs.
                unsafe { segments.keep(&p.route, number, found, list) };
            }
            if rank == 0 && accumulate {
                // Nobody may write the list of the next unit before all have read this one.
                barrier::sync();
                continue;
            }
            // Columns past the last pair are computed from it, and never read.
            // SAFETY: the list holds a pair for each row.
            let pair = unsafe { list.offset(4 * g.min(rows - 1)).load() };
            let x = I::from_u32(p.x_row.quotient(pair)).times(I::from_u64(p.x_stride));
            let x = x.plus(I::from_u32(8 * c));

            // 1. Shrink.
            let (store_at, store_row) = if shares.k_shares > 1 {
                (warp_parts.offset(4 * warp_k_share * shares.groups * GROUP), warp_part_row)
            } else {
                (part, part_row)
            };
            let mut sum = [0.0f32; 4];
            while group < shares.groups {
                let mut columns = [[0u32; 4]; BATCH];
                unroll::<BATCH>(|i| {
                    let depth = RUN * (run + i as u32);
                    let wanted = run + (i as u32) < runs.1 && depth + 8 * c < p.in_dim;
                    // SAFETY: eight elements from there are inside the row, and aligned.
                    columns[i] = unsafe { p.x.at(x.plus(I::from_u32(depth))).load16_if::<false>(wanted) };
                });
                unroll::<BATCH>(|i| multiply::<E>(&mut sum, batch[i], columns[i]));
                run += BATCH as u32;
                if run >= runs.1 {
                    unroll::<4>(|i| {
                        let (row, rank) = (2 * c + (i as u32 & 1), GROUP * group + 8 * (i as u32 >> 1) + g);
                        // SAFETY: there is room for every pair and every group of ranks.
                        unsafe { store_at.offset(row * store_row + 4 * rank).store(sum[i].to_bits()) };
                    });
                    sum = [0.0; 4];
                    run = runs.0;
                    group += WARPS / shares.k_shares;
                }
                if group < shares.groups {
                    batch = request(group, run);
                }
            }
            if shares.k_shares > 1 {
                barrier::sync();
                let fours = shares.groups * GROUP / 4;
                each_item(rows, fours, |row, four| {
                    let mut sum = [0.0f32; 4];
                    let mut share = 0;
                    while share < shares.k_shares {
                        let place = warp_parts.offset(row * warp_part_row + 16 * (share * fours + four));
                        // SAFETY: every warp wrote its columns.
                        let values = unsafe { place.load16() };
                        unroll::<4>(|i| sum[i] += f32::from_bits(values[i]));
                        share += 1;
                    }
                    // SAFETY: there is room for every pair and every rank.
                    unsafe { part.offset(row * part_row + 16 * four).store16(sum.map(f32::to_bits)) };
                });
            }

            // 2 and 3: add up, expand.
            // SAFETY: the block's part is written.
            unsafe { tail.finish::<E>() };
            turn ^= 1;
        }
        // No block may end while another reads its part.
        cluster::sync_blocks();
    }
}
