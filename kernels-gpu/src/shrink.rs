//! `shrink`: `h[s, p, q] = Σ_c x[row(p), c] · a[s][l, e, q, c]`, for the pairs of one tile.
//!
//! One block takes a tile of pairs, a block of columns and a part of K. A *column* is a (slice, rank)
//! pair: the ranks of all slices side by side, so that x is read once for all of them. Steps of 64
//! elements of K travel through a pipeline of stages in shared memory.
//!
//! Where there are fewer blocks than the device has room for, they split K (split-K): each writes its part of
//! the sum in f32, and `expand` adds the parts in a fixed order.
//!
//! Shared memory, `STAGES` times:
//!
//! | bytes | what |
//! |---|---|
//! | rows × 128 | panel of x, one row a pair |
//! | column_room × 128 | panel of a, one row a column |

use crate::tile::TileShape;

/// Stages of the pipeline: one step is multiplied while three are under way.
pub const STAGES: u32 = 4;

/// Bytes of shared memory of a block whose stages have room for `column_room` columns.
pub const fn shared_bytes(shape: TileShape, column_room: u32) -> u32 {
    STAGES * (shape.rows() + column_room) * TileShape::ROW_BYTES
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::shrink;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::STAGES;
    use crate::arch::async_copy;
    use crate::arch::mma::Element;
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, grid, thread};
    use crate::memory::{Global, Index};
    use crate::params::{NO_PAIR, ShrinkParams, Tile, count};
    use crate::tile::accumulator::{Accumulator, column_of, row_of};
    use crate::tile::panel::{CHUNK, CHUNKS, Panel, weight_row};
    use crate::tile::{Assignment, GROUP, TileShape, quotient, unroll};

    /// Rows that the block's threads copy in one sweep: eight threads a row.
    const SWEEP: u32 = TileShape::THREADS / CHUNKS;

    /// A column of the product: a rank of a slice.
    #[derive(Clone, Copy)]
    struct Column {
        slice: u32,
        rank: u32,
    }

    impl Column {
        /// Column `number`, with `ranks` columns a slice.
        #[inline(always)]
        fn new(number: u32, ranks: u32) -> Self {
            let past = |slices: u32| (number >= slices * ranks) as u32;
            let slice = past(1) + past(2) + past(3);
            Column { slice, rank: number - slice * ranks }
        }
    }

    /// The columns of one block.
    #[derive(Clone, Copy)]
    struct Columns {
        first: u32,
        count: u32,
        /// Columns a slice.
        ranks: u32,
    }

    impl Columns {
        /// Of a tile, at most `most` from `first` on. The slot's own rank decides how many there are. Fast
        /// stores are eight columns wide.
        #[inline(always)]
        fn new<const FAST: bool>(p: &ShrinkParams, tile: &Tile, first: u32, most: u32) -> Self {
            let ranks = match (p.write_all != 0, FAST) {
                (true, _) => p.weights.max_rank,
                (false, true) => tile.rank.next_multiple_of(CHUNK),
                (false, false) => tile.rank,
            };
            Columns { first, count: (p.weights.slices * ranks).saturating_sub(first).min(most), ranks }
        }
    }

    /// The stages in shared memory: `rows` rows of x and room for so many columns of a, each.
    #[derive(Clone, Copy)]
    struct Stages {
        rows: u32,
        column_room: u32,
    }

    impl Stages {
        #[inline(always)]
        fn start(self, stage: u32) -> Shared {
            Shared::base().offset(stage * ((self.rows + self.column_room) * TileShape::ROW_BYTES))
        }

        #[inline(always)]
        fn x(self, stage: u32) -> Panel {
            Panel::at(self.start(stage))
        }

        #[inline(always)]
        fn a(self, stage: u32) -> Panel {
            Panel::at(self.start(stage).offset(self.rows * TileShape::ROW_BYTES))
        }
    }

    /// What one thread loads in each step: one chunk of every `SWEEP`-th row of both panels. A row that
    /// is null is filled with zeros: pairs past the tile's, columns past the rank.
    struct Loader {
        x: [Global<u16>; 4],
        a: [Global<u16>; 8],
        in_dim: u32,
        rows: u32,
        tile_columns: u32,
        columns: u32,
        chunk: u32,
        sweep_row: u32,
    }

    impl Loader {
        /// # Safety
        /// The tile must be one of `p`'s.
        #[inline(always)]
        unsafe fn new<I: Index>(
            p: &ShrinkParams,
            tile: &Tile,
            rows: u32,
            tile_columns: u32,
            columns: &Columns,
        ) -> Self {
            let mut loader = Loader {
                x: [Global::NULL; 4],
                a: [Global::NULL; 8],
                in_dim: p.weights.in_dim,
                rows,
                tile_columns,
                columns: columns.count,
                chunk: thread::index() % CHUNKS,
                sweep_row: thread::index() / CHUNKS,
            };
            let mut pairs = [NO_PAIR; 4];
            unroll::<4>(|i| {
                let row = i as u32 * SWEEP + loader.sweep_row;
                if i as u32 * SWEEP < rows && row < tile.rows {
                    // SAFETY: `first` + `rows` pairs are in the list.
                    pairs[i] = unsafe { p.pairs.at(tile.first + row).load() };
                }
            });
            let exist = pairs.map(|pair| pair != NO_PAIR);
            // SAFETY: pairs are below P.
            unsafe { p.rows.pairs_to_x(&mut pairs) };
            unroll::<4>(|i| {
                if exist[i] {
                    let offset = I::from_u32(pairs[i]).times(I::from_u64(p.x_stride));
                    loader.x[i] = p.x.at(offset.plus(I::from_u32(loader.chunk * CHUNK)));
                }
            });
            unroll::<8>(|i| {
                let number = i as u32 * SWEEP + loader.sweep_row;
                if (i as u32 * SWEEP) < tile_columns && number < columns.count {
                    let Column { slice, rank } = Column::new(columns.first + number, columns.ranks);
                    // SAFETY: the tile is one of p's, and has ranks where it is read.
                    unsafe {
                        if rank < p.weights.rank(tile, slice) {
                            let offset = I::from_u32(rank).times(I::from_u32(p.weights.in_dim));
                            let chunk = I::from_u32(loader.chunk * CHUNK);
                            loader.a[i] = p.weights.a::<I>(tile, slice).start.at(offset.plus(chunk));
                        }
                    }
                }
            });
            loader
        }

        /// Starts the copies of one step of K.
        ///
        /// # Safety
        /// Nobody may read the stage before the copies were waited for and a barrier passed.
        #[inline(always)]
        unsafe fn load<const FAST: bool>(&self, stages: Stages, stage: u32, step: u32) {
            let (x_panel, a_panel) = (stages.x(stage), stages.a(stage));
            let depth = step * TileShape::DEPTH;
            let left = self.in_dim.saturating_sub(depth + self.chunk * CHUNK).min(CHUNK);
            unroll::<4>(|i| {
                let row = i as u32 * SWEEP + self.sweep_row;
                if i as u32 * SWEEP < self.rows {
                    let elements = if self.x[i].is_null() { 0 } else { left };
                    // SAFETY: `left` elements are left in the row; an empty copy reads nothing.
                    unsafe {
                        x_panel.copy_chunk::<FAST, { async_copy::AROUND }>(
                            row,
                            self.chunk,
                            self.x[i].at(depth),
                            elements,
                        )
                    };
                }
            });
            unroll::<8>(|i| {
                let column = i as u32 * SWEEP + self.sweep_row;
                // Groups of columns past the last one are left out: nobody multiplies them.
                if (i as u32 * SWEEP) < self.tile_columns
                    && (i as u32 * SWEEP) < self.columns.next_multiple_of(GROUP)
                {
                    let elements = if self.a[i].is_null() { 0 } else { left };
                    let row = weight_row(column);
                    // SAFETY: as above; a stage has room for every group that has a column.
                    unsafe {
                        a_panel.copy_chunk::<FAST, { async_copy::AHEAD }>(
                            row,
                            self.chunk,
                            self.a[i].at(depth),
                            elements,
                        )
                    };
                }
            });
        }
    }

    /// The kernel. `M` and `G`: fragments and groups a warp; `COLUMN_WARPS`: warps along the columns.
    ///
    /// # Safety
    /// As for the entry points: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn shrink<
        E: Element,
        I: Index,
        const M: usize,
        const G: usize,
        const COLUMN_WARPS: u32,
        const FAST: bool,
    >(
        p: ShrinkParams,
    ) {
        // Prologue: which columns and steps of which part of which tile.
        let rows = 16 * M as u32 * (TileShape::THREADS / 32 / COLUMN_WARPS);
        let tile_columns = 32 * G as u32 * COLUMN_WARPS;
        let assignment = Assignment::of_this_block(p.column_blocks * p.splits, p.tile_parts);
        let column_block = quotient(assignment.number, p.splits);
        let split = assignment.number - column_block * p.splits;
        grid::wait();
        grid::launch_dependents();
        let count = p.counts.at(if p.write_all != 0 { count::ALL } else { count::ACTIVE });
        // SAFETY: `counts` has `count::LEN` elements; the launch before this one has ended.
        let Some(mut tile) = (unsafe { assignment.load(p.tiles, count, rows) }) else { return };
        // SAFETY: the tile is one of p's.
        tile.rank = unsafe { p.weights.largest_rank(&tile) };
        let columns = Columns::new::<FAST>(&p, &tile, column_block * tile_columns, tile_columns);
        if columns.count == 0 {
            return;
        }
        // SAFETY: the tile is one of p's.
        let loader = unsafe { Loader::new::<I>(&p, &tile, rows, tile_columns, &columns) };
        let stages = Stages { rows, column_room: p.column_room };
        let first_step = split * p.steps_per_split;
        let all_steps = if tile.rank == 0 { 0 } else { p.weights.in_dim.div_ceil(TileShape::DEPTH) };
        let steps = all_steps.saturating_sub(first_step).min(p.steps_per_split);
        let warp_row = thread::warp() / COLUMN_WARPS * 16 * M as u32;
        let warp_column = thread::warp() % COLUMN_WARPS * 32 * G as u32;
        let groups = columns.count.saturating_sub(warp_column).div_ceil(GROUP);

        // Main loop: all stages but one are under way while that is multiplied.
        let mut sum = Accumulator::<M, G>::zero();
        let mut next = 0;
        while next < STAGES - 1 {
            if next < steps {
                // SAFETY: nobody reads the stages yet.
                unsafe { loader.load::<FAST>(stages, next, first_step + next) };
            }
            async_copy::commit();
            next += 1;
        }
        let mut step = 0;
        while step < steps {
            // The step's copies have come for all threads, and all have left the stage that is filled next.
            async_copy::wait::<{ STAGES - 2 }>();
            barrier::sync();
            if next < steps {
                // SAFETY: the barrier was passed by all readers of this stage.
                unsafe { loader.load::<FAST>(stages, next % STAGES, first_step + next) };
            }
            async_copy::commit();
            next += 1;
            if groups > 0 {
                let stage = step % STAGES;
                unroll::<{ (TileShape::DEPTH / 16) as usize }>(|k| {
                    let (x, a) = (stages.x(stage), stages.a(stage));
                    // SAFETY: all rows of both panels were filled, at least those whose sums are stored.
                    unsafe { sum.multiply::<E>(x, warp_row, a, warp_column, groups, k as u32) };
                });
            }
            step += 1;
        }
        async_copy::wait::<0>();

        // Epilogue.
        // SAFETY: the tile is one of p's, and the columns are its.
        unsafe { store::<E, I, M, G, FAST>(&p, &tile, &columns, split, (warp_row, warp_column), &sum) };
    }

    /// Stores the sums of this warp, whose first row and column are given: eight columns of a row at a time,
    /// as h, or as part `split` of it.
    ///
    /// # Safety
    /// The tile must be one of `p`'s, and the columns be the block's.
    #[inline(always)]
    unsafe fn store<E: Element, I: Index, const M: usize, const G: usize, const FAST: bool>(
        p: &ShrinkParams,
        tile: &Tile,
        columns: &Columns,
        split: u32,
        (warp_row, warp_column): (u32, u32),
        sum: &Accumulator<M, G>,
    ) {
        unroll::<M>(|m| {
            unroll::<2>(|half| {
                let row = warp_row + row_of(m, half);
                if row < tile.rows {
                    // SAFETY: `first` + `rows` pairs are in the list.
                    let pair = unsafe { p.pairs.at(tile.first + row).load() };
                    // SAFETY: the pair is one of P.
                    let is_active = unsafe { p.rows.has_x(pair) };
                    unroll::<G>(|g| {
                        let column = warp_column + 32 * g as u32 + column_of();
                        let values = if is_active { sum.columns(m, half, g) } else { [0.0; 8] };
                        // SAFETY: as the caller promises; the pair is one of P.
                        unsafe { store_eight::<E, I, FAST>(p, columns, split, pair, column, values) };
                    });
                }
            });
        });
    }

    /// Stores eight columns of a pair, from `column` of the block on, as far as there are so many.
    ///
    /// # Safety
    /// As for [`store`].
    #[inline(always)]
    unsafe fn store_eight<E: Element, I: Index, const FAST: bool>(
        p: &ShrinkParams,
        columns: &Columns,
        split: u32,
        pair: u32,
        column: u32,
        values: [f32; 8],
    ) {
        // h or part of it, [S, P, R]: where a column of this pair lies.
        let place = |number: u32| {
            let Column { slice, rank } = Column::new(columns.first + number, columns.ranks);
            let row = I::from_u32(slice).times(I::from_u32(p.pair_count)).plus(I::from_u32(pair));
            row.times(I::from_u32(p.weights.max_rank)).plus(I::from_u32(rank))
        };
        if FAST && column < columns.count {
            let [a, b, c, d, e, f, g, h] = values;
            // SAFETY: ranks are multiples of 8, so eight columns are of one slice and aligned.
            unsafe {
                if p.splits == 1 {
                    let packed = [E::pack(a, b), E::pack(c, d), E::pack(e, f), E::pack(g, h)];
                    p.h.at(place(column)).store16(packed);
                } else {
                    let rows = I::from_u32(p.weights.slices).times(I::from_u32(p.pair_count));
                    let part = I::from_u32(split).times(rows).times(I::from_u32(p.weights.max_rank));
                    let at = p.partial.at(part.plus(place(column)));
                    at.store16([a, b, c, d].map(f32::to_bits));
                    at.at(4u32).store16([e, f, g, h].map(f32::to_bits));
                }
            }
        }
        if !FAST {
            unroll::<8>(|i| {
                if column + (i as u32) < columns.count {
                    // SAFETY: the column is one of `columns`.
                    unsafe { p.h.at(place(column + i as u32)).store(E::pack(values[i], 0.0) as u16) };
                }
            });
        }
    }
}
