//! `prefill`: a whole call of many pairs a segment in one launch, on warpgroups:
//! `h[s, p, q] = Σ_c x[row(p), c] · a[s][l, e, q, c]`, then
//! `out[p, offset + s·N + n] (+)= weight[p] · Σ_q h[s, p, q] · b[s][l, e, n, q]`.
//!
//! As many blocks as the device runs at a time take the tiles of the route in turns, so that tiles of one
//! segment, neighbours in the list, run side by side and share its weights in L2. A block takes a tile of 64 or
//! 128 pairs with the ranks of all slices at once, so that x is read once; each of its warpgroups has 64 of the
//! pairs, and their h goes from the sums of the first product to the rows of the second without leaving registers.
//!
//! A tile's own rank decides what it costs, not the rank that the weights are allocated for. It is taken in *passes*, each
//! of as many slices as the kernel has columns of h for (mostly one pass): a pass reads x, and keeps its h until its
//! slices are written. A column of h is a (slice, rank): a slice has a power of two of them, so that 16 of a slice's ranks
//! are one fragment.
//!
//! All that a block reads passes through one ring of stages, as one succession of *steps*: 128 elements of K of x
//! and `a`; then, slice by slice, 128 columns of `out`'s old values and of `b`; then the next pass's, or the next tile's.
//! Steps are requested `stages` − 1 ahead, across the ends of slices and tiles, so the memory never waits for a product.
//!
//! Shared memory, `stages` times, in panels of 128-byte rows:
//!
//! | panels | a step of shrink | a step of expand |
//! |---|---|---|
//! | one row a pair | x, 64 elements of K each | old values of `out`, 64 columns each |
//! | one row a column of h, or 64 rows | `a`, 64 elements of K each | `b`, 64 ranks of 64 columns each |
//!
//! There are two of each in a step, of `b` for every 64 ranks; one where a stage has no room for two, of 256 columns of h
//! or more than 128 ranks; and four of x and `a` where it has room for these.

use crate::tile::TileShape;

/// Columns of `out` of a row of a panel.
const PANEL_COLUMNS: u32 = 64;

/// Panels of old values of a step, and of `b` for every 64 ranks. Two, so that rows in device memory are read and written
/// 256 bytes at a time.
const PANELS: u32 = 2;

/// Most columns of h, and so most ranks of a slice.
pub const MAX_WIDTH: u32 = 256;

/// Columns of h, or ranks, for which a stage has room beside two panels of rows; with more, a step has one.
const STAGE_COLUMNS: u32 = 128;

/// Least columns of a slice in h: one fragment's.
const MIN_RANK_ROOM: u32 = 16;

/// Bytes of shared memory of a block that shares a multiprocessor of 228 KiB with another, and of one that has it
/// alone.
const SHARED_OF_TWO: u32 = 112 << 10;
const SHARED_OF_ONE: u32 = 224 << 10;

/// Most stages: more bytes than so many have under way do not come sooner.
const MAX_STAGES: u32 = 6;

/// The shape of a block's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Pairs of a tile: 64 a warpgroup.
    pub rows: u32,
    /// Columns of h.
    pub width: u32,
}

impl Shape {
    /// Columns of h that kernels are compiled for.
    pub const WIDTHS: [u32; 4] = [32, 64, 128, MAX_WIDTH];

    /// Warpgroups of a block.
    pub const fn warpgroups(self) -> u32 {
        self.rows / 64
    }

    /// Threads of a block.
    pub const fn threads(self) -> u32 {
        128 * self.warpgroups()
    }

    /// Blocks that share a multiprocessor. Of 128 pairs one does better, with a deeper ring: 128 pairs a segment
    /// take w13 173 µs in place of 194. With 32 columns of h, where steps are small, it does not.
    pub const fn blocks(self) -> u32 {
        if self.rows > 64 && self.width > 32 { 1 } else { 2 }
    }

    /// Bytes of a stage.
    pub const fn stage_bytes(self) -> u32 {
        stage_rows(self.rows, self.width) * TileShape::ROW_BYTES
    }

    /// Stages of the ring.
    pub const fn stages(self) -> u32 {
        let stages = if self.blocks() == 1 { SHARED_OF_ONE } else { SHARED_OF_TWO } / self.stage_bytes();
        if stages < MAX_STAGES { stages } else { MAX_STAGES }
    }

    /// Bytes of shared memory of a block.
    pub const fn shared_bytes(self) -> u32 {
        self.stages() * self.stage_bytes()
    }
}

/// Rows of 128 bytes of a stage.
const fn stage_rows(rows: u32, width: u32) -> u32 {
    let weights = match width {
        0..PANEL_COLUMNS => PANEL_COLUMNS,
        PANEL_COLUMNS..STAGE_COLUMNS => width,
        _ => STAGE_COLUMNS,
    };
    PANELS * (rows + weights)
}

/// Columns of h that a slice of this rank takes.
pub const fn rank_room(rank: u32) -> u32 {
    let room = rank.next_power_of_two();
    if room < MIN_RANK_ROOM { MIN_RANK_ROOM } else { room }
}

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90a"), feature = "emulate"))]
pub use kernel::prefill;

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90a"), feature = "emulate"))]
mod kernel {
    use super::{PANEL_COLUMNS, PANELS, STAGE_COLUMNS, rank_room, stage_rows};
    use crate::arch::async_copy;
    use crate::arch::mma::Element;
    use crate::arch::shared::Shared;
    use crate::arch::wgmma::{self, Matrix, Sums};
    use crate::arch::{barrier, bulk, grid, thread};
    use crate::memory::{Global, Index};
    use crate::params::{PrefillParams, Tile, count};
    use crate::tile::panel::{CHUNK, CHUNKS, Panel, weight_row};
    use crate::tile::{TileShape, quotient, select_slice, unroll};

    /// Rows of a tile, by the sweep of the block's threads that copies them: eight threads a row.
    const SWEEPS: usize = 4;

    /// Elements of a product's k.
    const K: u32 = 16;

    /// Least columns of h of a product.
    const MIN_COLUMNS: u32 = 32;

    /// Most panels of x in a step.
    const MOST_PANELS: usize = 4;

    /// A thread's sums of a panel of columns of `out`.
    const PANEL_SUMS: usize = PANEL_COLUMNS as usize / 2;

    /// Ranks that a row of `b` has past a tile's: with so many, L2 is not to fetch them.
    const UNWANTED: u32 = 32;

    /// The tiles that a block takes, one after another.
    #[derive(Clone, Copy)]
    struct Turns {
        next: u32,
        end: u32,
        /// Pairs that one turn takes.
        rows: u32,
    }

    impl Turns {
        const NO_TILE: Tile = Tile { slot: 0, expert: 0, first: 0, rows: 0, rank: 0, reserved: [0; 3] };

        /// # Safety
        /// The tensors of `p` must be as their fields say, and the route be written.
        #[inline(always)]
        unsafe fn of_this_block(p: &PrefillParams, rows: u32) -> Self {
            let count = p.counts.at(if p.accumulate != 0 { count::ACTIVE } else { count::ALL });
            // SAFETY: `counts` has `count::LEN` elements.
            let end = unsafe { count.load() } * p.tile_parts;
            Turns { next: thread::block(), end, rows }
        }

        /// The next tile, or part of one, that has pairs; none of no pairs when there are no more.
        ///
        /// # Safety
        /// As for [`Turns::of_this_block`].
        #[inline(always)]
        unsafe fn take(&mut self, p: &PrefillParams) -> Tile {
            let mut taken = Self::NO_TILE;
            while self.next < self.end && taken.rows == 0 {
                let tile = quotient(self.next, p.tile_parts);
                let part = self.next - tile * p.tile_parts;
                // SAFETY: the tile is one of those counted.
                taken = unsafe { p.tiles.at(tile).load_tile() }.part(part, self.rows);
                self.next += p.blocks;
            }
            taken
        }
    }

    /// What a pass takes of a tile.
    struct Pass {
        /// The slice after its last.
        end: u32,
        /// Columns of h that its products have: all ranks of its slices, and to the next size of a product.
        columns: u32,
    }

    impl Pass {
        /// The pass that begins with slice `first`, with columns of h for `width`.
        #[inline(always)]
        fn of(p: &PrefillParams, rank: u32, first: u32, width: u32) -> Self {
            let shift = rank_shift(rank);
            let slices = (width >> shift).min(p.slices - first);
            Pass { end: first + slices, columns: (slices << shift).next_power_of_two().max(MIN_COLUMNS) }
        }
    }

    /// Columns of h that a slice of this rank takes, as a power of two.
    #[inline(always)]
    fn rank_shift(rank: u32) -> u32 {
        rank_room(rank).trailing_zeros()
    }

    /// Panels of x, and of `a`, of a step of products with so many columns.
    #[inline(always)]
    fn shrink_panels<const BLOCKS: usize, const WARPGROUPS: u32>(columns: u32) -> u32 {
        let panels = |columns: u32| match stage_rows(64 * WARPGROUPS, 16 * BLOCKS as u32)
            / (64 * WARPGROUPS + columns)
        {
            0..2 => 1,
            2..4 => 2,
            _ => 4,
        };
        match columns {
            0..=32 => panels(32),
            33..=64 => panels(64),
            65..=128 => panels(128),
            _ => panels(256),
        }
    }

    /// Panels of old values of a step, for a tile of this rank.
    #[inline(always)]
    fn expand_panels<const BLOCKS: usize>(rank: u32) -> u32 {
        if 16 * BLOCKS as u32 > STAGE_COLUMNS && rank > STAGE_COLUMNS { 1 } else { PANELS }
    }

    /// What the next step copies.
    #[derive(Clone, Copy, PartialEq)]
    enum Phase {
        Shrink,
        Expand,
        Ended,
    }

    /// What one thread copies in each step: a chunk of every row that its sweeps come to. Rows past the tile's end and
    /// past the rank are left out, or filled with zeros where they are multiplied.
    struct Feed<I: Index, const BLOCKS: usize> {
        turns: Turns,
        phase: Phase,
        first: u32,
        count: u32,
        rank: u32,
        /// Where this thread's chunks of the rows of x begin, then those of `out`.
        rows: [I; SWEEPS],
        /// Where this thread's chunk of the first row of `a` begins, in every slice.
        a: I,
        /// Where this thread's chunk of its first row of `b` begins, in every slice.
        b: I,
        /// Where the next step begins: an element of K, or a column of a slice.
        place: u32,
        slice: u32,
        pass: Pass,
    }

    /// Which chunk of which rows a thread copies.
    #[derive(Clone, Copy)]
    struct Copier(u32);

    impl Copier {
        /// This thread.
        #[inline(always)]
        fn new() -> Self {
            Copier(thread::index_anew())
        }

        #[inline(always)]
        fn chunk(self) -> u32 {
            self.0 % CHUNKS
        }

        /// Its row in a sweep of `16 * WARPGROUPS` rows.
        #[inline(always)]
        fn row<const WARPGROUPS: u32>(self, sweep: usize) -> u32 {
            sweep as u32 * 16 * WARPGROUPS + self.0 / CHUNKS
        }
    }

    impl<I: Index, const BLOCKS: usize> Feed<I, BLOCKS> {
        /// At the end of a tile, before the first.
        #[inline(always)]
        fn new(p: &PrefillParams, turns: Turns) -> Self {
            Feed {
                turns,
                phase: Phase::Expand,
                first: 0,
                count: 0,
                rank: 0,
                rows: [I::from_u32(0); SWEEPS],
                a: I::from_u32(0),
                b: I::from_u32(0),
                place: 0,
                slice: p.slices,
                pass: Pass { end: p.slices, columns: 0 },
            }
        }

        /// Goes on to the next tile.
        ///
        /// # Safety
        /// As for [`Turns::take`].
        #[inline(always)]
        unsafe fn begin_tile<const WARPGROUPS: u32>(&mut self, p: &PrefillParams) {
            let me = Copier::new();
            // SAFETY: as the caller promises.
            let tile = unsafe { self.turns.take(p) };
            (self.first, self.count, self.rank) = (tile.first, tile.rows, tile.rank);
            self.slice = 0;
            if tile.rows == 0 {
                self.phase = Phase::Ended;
                return;
            }
            let column = I::from_u32(me.chunk() * CHUNK);
            let first = matrix::<I>(&tile, p.a_experts).times(I::from_u32(p.max_rank));
            self.a = first.times(I::from_u32(p.in_dim)).plus(column);
            let first = matrix::<I>(&tile, p.b_experts).times(I::from_u32(p.out_dim));
            let first = first.plus(I::from_u32(me.row::<WARPGROUPS>(0)));
            self.b = first.times(I::from_u32(p.max_rank)).plus(column);
        }

        /// Goes on to the tile's next pass.
        ///
        /// # Safety
        /// As for [`Turns::take`].
        #[inline(always)]
        unsafe fn begin_pass<const WARPGROUPS: u32>(&mut self, p: &PrefillParams) {
            let me = Copier::new();
            self.pass = Pass::of(p, self.rank, self.slice, 16 * BLOCKS as u32);
            if self.rank == 0 {
                // SAFETY: as the caller promises.
                return unsafe { self.begin_expand::<WARPGROUPS>(p) };
            }
            (self.phase, self.place) = (Phase::Shrink, 0);
            unroll::<SWEEPS>(|i| {
                let row = me.row::<WARPGROUPS>(i);
                self.rows[i] = I::from_u32(0);
                if row < self.count {
                    // SAFETY: `first` + `rows` pairs are in the list.
                    let pair = unsafe { p.pairs.at(self.first + row).load() };
                    let start = I::from_u32(p.x_row.quotient(pair)).times(I::from_u64(p.x_stride));
                    self.rows[i] = start.plus(I::from_u32(me.chunk() * CHUNK));
                }
            });
        }

        /// Goes on to the pass's columns.
        ///
        /// # Safety
        /// As for [`Turns::take`].
        #[inline(always)]
        unsafe fn begin_expand<const WARPGROUPS: u32>(&mut self, p: &PrefillParams) {
            let me = Copier::new();
            (self.phase, self.place) = (Phase::Expand, 0);
            let column = I::from_u32(self.slice * p.out_dim + me.chunk() * CHUNK);
            unroll::<SWEEPS>(|i| {
                let row = me.row::<WARPGROUPS>(i);
                self.rows[i] = I::from_u32(0);
                if p.accumulate != 0 && row < self.count {
                    // SAFETY: `first` + `rows` pairs are in the list.
                    let pair = unsafe { p.pairs.at(self.first + row).load() };
                    let start = I::from_u32(pair).times(I::from_u64(p.out_stride));
                    self.rows[i] = start.plus(column);
                }
            });
        }

        /// Goes on where a pass ends: to the tile's next, or to the next tile's first.
        ///
        /// # Safety
        /// As for [`Turns::take`].
        #[inline(always)]
        unsafe fn end_pass<const WARPGROUPS: u32>(&mut self, p: &PrefillParams) {
            // SAFETY: as the caller promises.
            unsafe {
                if self.slice == p.slices {
                    self.begin_tile::<WARPGROUPS>(p);
                }
                if self.phase != Phase::Ended {
                    self.begin_pass::<WARPGROUPS>(p);
                }
            }
        }

        /// Starts the copies of the next step, if there is one.
        ///
        /// # Safety
        /// Nobody may read the stage before the copies were waited for and a barrier passed.
        #[inline(always)]
        unsafe fn copy_next<const WARPGROUPS: u32>(&mut self, p: &PrefillParams, stage: Shared) {
            // SAFETY: as the caller promises; tiles are p's.
            unsafe {
                match self.phase {
                    Phase::Shrink => {
                        self.copy_shrink::<WARPGROUPS>(p, stage);
                        let panels = shrink_panels::<BLOCKS, WARPGROUPS>(self.pass.columns);
                        self.place += panels * TileShape::DEPTH;
                        if self.place >= p.in_dim {
                            self.begin_expand::<WARPGROUPS>(p);
                        }
                    }
                    Phase::Expand => {
                        self.copy_expand::<WARPGROUPS>(p, stage);
                        self.place += expand_panels::<BLOCKS>(self.rank) * PANEL_COLUMNS;
                        if self.place >= p.out_dim {
                            (self.slice, self.place) = (self.slice + 1, 0);
                            unroll::<SWEEPS>(|i| self.rows[i] = self.rows[i].plus(I::from_u32(p.out_dim)));
                            if self.slice == self.pass.end {
                                self.end_pass::<WARPGROUPS>(p);
                            }
                        }
                    }
                    Phase::Ended => {}
                }
            }
        }

        /// Copies elements `place` .. of the rows of x and `a`.
        ///
        /// # Safety
        /// As for [`Feed::copy_next`].
        #[inline(always)]
        unsafe fn copy_shrink<const WARPGROUPS: u32>(&self, p: &PrefillParams, stage: Shared) {
            let me = Copier::new();
            let x = |i: usize, panel: u32| {
                let row = me.row::<WARPGROUPS>(i);
                let place = self.place + panel * TileShape::DEPTH;
                let left = p.in_dim.saturating_sub(place + me.chunk() * CHUNK).min(CHUNK);
                let elements = if row < self.count { left } else { 0 };
                let source = p.x.at(self.rows[i].plus(I::from_u32(place)));
                let x_panel = row_panel::<WARPGROUPS>(stage, panel);
                // SAFETY: `left` elements are left in the row; an empty copy reads nothing.
                unsafe {
                    x_panel.copy_chunk::<true, { async_copy::AROUND }>(row, me.chunk(), source, elements)
                };
            };
            let shift = rank_shift(self.rank);
            let a = |column: u32| {
                let slice = column >> shift;
                let rank = column - (slice << shift);
                let slice = self.slice + slice;
                let is_used = slice < self.pass.end && rank < self.rank;
                let start = if is_used { rank * p.in_dim } else { 0 };
                let row = select_slice(p.a, slice).at(self.a.plus(I::from_u32(start)));
                move |panel: u32, panels: u32, columns: u32| {
                    let place = self.place + panel * TileShape::DEPTH;
                    let left = p.in_dim.saturating_sub(place + me.chunk() * CHUNK).min(CHUNK);
                    let elements = if is_used { left } else { 0 };
                    let a_panel = a_panel::<WARPGROUPS>(stage, panels, columns, panel);
                    let source = row.at(place);
                    // SAFETY: as above.
                    unsafe {
                        a_panel.copy_chunk::<true, { async_copy::AHEAD }>(
                            column,
                            me.chunk(),
                            source,
                            elements,
                        );
                    }
                }
            };
            let width = 16 * BLOCKS as u32;
            let columns = self.pass.columns;
            if width == MIN_COLUMNS || columns == width {
                // Without a branch between the copies, so that addresses are formed side by side.
                let panels = shrink_panels::<BLOCKS, WARPGROUPS>(width);
                unroll::<SWEEPS>(|i| {
                    unroll::<{ PANELS as usize }>(|panel| {
                        if (panel as u32) < panels {
                            x(i, panel as u32);
                        }
                    });
                });
                unroll::<BLOCKS>(|i| {
                    if i < BLOCKS / WARPGROUPS as usize {
                        let copy = a(me.row::<WARPGROUPS>(i));
                        unroll::<{ PANELS as usize }>(|panel| {
                            if (panel as u32) < panels {
                                copy(panel as u32, panels, width);
                            }
                        });
                    }
                });
            } else {
                let panels = shrink_panels::<BLOCKS, WARPGROUPS>(columns);
                let mut panel = 0;
                while panel < panels {
                    unroll::<SWEEPS>(|i| x(i, panel));
                    panel += 1;
                }
                let mut column = me.row::<WARPGROUPS>(0);
                while column < columns {
                    let copy = a(column);
                    let mut panel = 0;
                    while panel < panels {
                        copy(panel, panels, columns);
                        panel += 1;
                    }
                    column += 16 * WARPGROUPS;
                }
            }
        }

        /// Copies columns `place` .. of the rows of `out`, and of `b` as many ranks as are multiplied.
        ///
        /// A row of `b` that goes on after the tile's rank is fetched alone: what is around is not wanted.
        ///
        /// # Safety
        /// As for [`Feed::copy_next`].
        #[inline(always)]
        unsafe fn copy_expand<const WARPGROUPS: u32>(&self, p: &PrefillParams, stage: Shared) {
            let me = Copier::new();
            let panels = expand_panels::<BLOCKS>(self.rank);
            if p.accumulate != 0 {
                unroll::<SWEEPS>(|i| {
                    let row = me.row::<WARPGROUPS>(i);
                    unroll::<{ PANELS as usize }>(|panel| {
                        let column = self.place + panel as u32 * PANEL_COLUMNS;
                        let is_inside = (panel as u32) < panels && column + me.chunk() * CHUNK < p.out_dim;
                        if row < self.count && is_inside {
                            let old = row_panel::<WARPGROUPS>(stage, panel as u32).chunk(row, me.chunk());
                            let source = p.out.at(self.rows[i].plus(I::from_u32(column)));
                            // SAFETY: columns come in eights, so the chunk is inside the row.
                            unsafe { async_copy::copy16_whole::<_, { async_copy::AROUND }>(old, source) };
                        }
                    });
                });
            }
            let b = select_slice(p.b, self.slice);
            let is_whole = self.rank + UNWANTED > p.max_rank;
            let mut first = me.chunk() * CHUNK;
            let mut group = 0;
            while first < self.rank.next_multiple_of(K) {
                let left = self.rank.saturating_sub(first).min(CHUNK);
                let panel = b_panel::<WARPGROUPS>(stage, panels, group);
                let source = |begins: u32| {
                    let on = (self.place + begins) * p.max_rank + group * TileShape::DEPTH;
                    b.at(self.b.plus(I::from_u32(on)))
                };
                let row = |begins: u32| begins + me.row::<WARPGROUPS>(0);
                let elements = |row: u32| if self.place + row < p.out_dim { left } else { 0 };
                if is_whole {
                    unroll::<{ PANELS as usize }>(|half| {
                        if (half as u32) < panels {
                            unroll::<SWEEPS>(|i| {
                                if i < SWEEPS / WARPGROUPS as usize {
                                    let begins = half as u32 * PANEL_COLUMNS + i as u32 * 16 * WARPGROUPS;
                                    let row = row(begins);
                                    let (place, elements) = (weight_row(row), elements(row));
                                    let source = source(begins);
                                    // SAFETY: `elements` ranks are left in the row.
                                    unsafe {
                                        panel.copy_chunk::<true, { async_copy::AHEAD }>(
                                            place,
                                            me.chunk(),
                                            source,
                                            elements,
                                        );
                                    }
                                }
                            });
                        }
                    });
                } else {
                    let mut begins = 0;
                    while begins < panels * PANEL_COLUMNS {
                        let row = row(begins);
                        let (place, elements) = (weight_row(row), elements(row));
                        let source = source(begins);
                        // SAFETY: as above.
                        unsafe {
                            panel.copy_chunk::<true, { async_copy::ALONE }>(
                                place,
                                me.chunk(),
                                source,
                                elements,
                            );
                        }
                        begins += 16 * WARPGROUPS;
                    }
                }
                (first, group) = (first + TileShape::DEPTH, group + 1);
                if 16 * BLOCKS as u32 <= TileShape::DEPTH {
                    break;
                }
            }
        }
    }

    /// Number of a tile's matrix among those of `experts` experts, or one, a slot.
    #[inline(always)]
    fn matrix<I: Index>(tile: &Tile, experts: u32) -> I {
        let expert = if experts == 1 { 0 } else { tile.expert };
        I::from_u32(tile.slot).times(I::from_u32(experts)).plus(I::from_u32(expert))
    }

    /// A stage's panel of x, or of old values.
    #[inline(always)]
    fn row_panel<const WARPGROUPS: u32>(stage: Shared, panel: u32) -> Panel {
        Panel::at(stage.offset(panel * 64 * WARPGROUPS * TileShape::ROW_BYTES))
    }

    /// A stage's panel of `a`, of `columns` rows, after `panels` of x.
    #[inline(always)]
    fn a_panel<const WARPGROUPS: u32>(stage: Shared, panels: u32, columns: u32, panel: u32) -> Panel {
        Panel::at(stage.offset((panels * 64 * WARPGROUPS + panel * columns) * TileShape::ROW_BYTES))
    }

    /// The first of a stage's `panels` panels of 64 ranks of `b`, which lie one after another, after those of `out`.
    #[inline(always)]
    fn b_panel<const WARPGROUPS: u32>(stage: Shared, panels: u32, group: u32) -> Panel {
        let rows = panels * (64 * WARPGROUPS + group * PANEL_COLUMNS);
        Panel::at(stage.offset(rows * TileShape::ROW_BYTES))
    }

    /// The ring of stages, with what fills it.
    struct Ring<I: Index, const BLOCKS: usize, const WARPGROUPS: u32, const OLDER: u32> {
        feed: Feed<I, BLOCKS>,
        /// The stage of the next step, and the one that is filled next.
        next: u32,
        filled: u32,
    }

    impl<I: Index, const BLOCKS: usize, const WARPGROUPS: u32, const OLDER: u32>
        Ring<I, BLOCKS, WARPGROUPS, OLDER>
    {
        const STAGES: u32 = OLDER + 2;
        const STAGE_BYTES: u32 = stage_rows(64 * WARPGROUPS, 16 * BLOCKS as u32) * TileShape::ROW_BYTES;

        #[inline(always)]
        fn stage(number: u32) -> Shared {
            Shared::base().offset(number * Self::STAGE_BYTES)
        }

        /// A ring whose first steps are under way.
        ///
        /// # Safety
        /// As for [`Turns::take`].
        #[inline(always)]
        unsafe fn fill(p: &PrefillParams, turns: Turns) -> Self {
            let mut ring = Ring { feed: Feed::new(p, turns), next: 0, filled: 0 };
            // SAFETY: as the caller promises; nobody reads the ring yet.
            unsafe {
                ring.feed.end_pass::<WARPGROUPS>(p);
                while ring.filled < Self::STAGES - 1 {
                    ring.feed.copy_next::<WARPGROUPS>(p, Self::stage(ring.filled));
                    async_copy::commit();
                    ring.filled += 1;
                }
            }
            ring
        }

        /// The next step's stage, once its copies have landed for all and were shown to the tensor cores. A later
        /// step's are started, into the stage that all have left.
        ///
        /// # Safety
        /// Nobody may use the stage of the call before this one any more.
        #[inline(always)]
        #[track_caller]
        unsafe fn next_stage(&mut self, p: &PrefillParams) -> Shared {
            async_copy::wait::<OLDER>();
            bulk::fence();
            barrier::sync();
            // SAFETY: the barrier was passed by all who used this stage.
            unsafe { self.feed.copy_next::<WARPGROUPS>(p, Self::stage(self.filled)) };
            async_copy::commit();
            let landed = Self::stage(self.next);
            let after = |stage: u32| if stage + 1 == Self::STAGES { 0 } else { stage + 1 };
            (self.next, self.filled) = (after(self.next), after(self.filled));
            landed
        }
    }

    /// Adds a step of shrink to the first `columns` columns of the sums of h, of which `more` are those from 128 on.
    ///
    /// # Safety
    /// As for [`Sums::multiply`], of the stage; `columns` must be those of a product.
    #[inline(always)]
    #[track_caller]
    unsafe fn multiply_step<
        E: Element,
        const SUMS: usize,
        const MORE: usize,
        const BLOCKS: usize,
        const WARPGROUPS: u32,
    >(
        sums: &mut [f32; SUMS],
        more: &mut [f32; MORE],
        stage: Shared,
        columns: u32,
        warpgroup_row: u32,
    ) {
        macro_rules! multiply {
            ($sums:ident $count:literal of $columns:literal, from $first:literal) => {
                if let Some(sums) = $sums.first_chunk_mut::<$count>() {
                    let panels = shrink_panels::<BLOCKS, WARPGROUPS>($columns);
                    unroll::<MOST_PANELS>(|panel| {
                        if (panel as u32) < panels {
                            let x = row_panel::<WARPGROUPS>(stage, panel as u32).chunk(warpgroup_row, 0);
                            let a =
                                a_panel::<WARPGROUPS>(stage, panels, $columns, panel as u32).chunk($first, 0);
                            let (x, a) = (Matrix::swizzled(x), Matrix::swizzled(a));
                            unroll::<{ (TileShape::DEPTH / K) as usize }>(|k| {
                                // SAFETY: as the caller promises.
                                unsafe { sums.multiply::<E>(x.step(k as u32), a.step(k as u32)) };
                            });
                        }
                    });
                }
            };
        }
        match columns.min(2 * (SUMS + MORE) as u32) {
            0..=32 => multiply!(sums 16 of 32, from 0),
            33..=64 => multiply!(sums 32 of 64, from 0),
            65..=128 => multiply!(sums 64 of 128, from 0),
            _ => {
                multiply!(sums 64 of 256, from 0);
                multiply!(more 64 of 256, from 128);
            }
        }
    }

    /// Adds h · `b`ᵀ of the ranks of a slice, whose fragments are the first of `h`, to `panels` panels of columns.
    ///
    /// # Safety
    /// As for [`Sums::multiply_registers`].
    #[inline(always)]
    #[track_caller]
    unsafe fn multiply_ranks<E: Element, const BLOCKS: usize, const WARPGROUPS: u32>(
        delta: &mut [f32; PANELS as usize * PANEL_SUMS],
        h: &[[u32; 4]; BLOCKS],
        stage: Shared,
        panels: u32,
        rank: u32,
    ) {
        const STEPS: usize = (TileShape::DEPTH / K) as usize;
        let matrix = |panels: u32, k: usize| {
            let b = b_panel::<WARPGROUPS>(stage, panels, (k / STEPS) as u32).chunk(0, 0);
            Matrix::swizzled(b).step((k % STEPS) as u32)
        };
        if panels == PANELS {
            unroll::<BLOCKS>(|k| {
                if (k as u32 * K) < rank.min(STAGE_COLUMNS) {
                    // SAFETY: as the caller promises.
                    unsafe { delta.multiply_registers::<E>(h[k], matrix(PANELS, k)) };
                }
            });
        } else if let Some(delta) = delta.first_chunk_mut::<PANEL_SUMS>() {
            unroll::<BLOCKS>(|k| {
                if k as u32 * K < rank {
                    // SAFETY: as the caller promises.
                    unsafe { delta.multiply_registers::<E>(h[k], matrix(1, k)) };
                }
            });
        }
    }

    /// This thread's two rows of its warpgroup's pairs: where each begins in `out`, at its column of the first
    /// slice, and its weight. A row past the tile's end is null.
    struct OutRows {
        start: [Global<u16>; 2],
        weight: [f32; 2],
    }

    impl OutRows {
        /// # Safety
        /// The tile must be one of `p`'s.
        #[inline(always)]
        unsafe fn new<I: Index>(p: &PrefillParams, tile: &Tile, own_row: u32, own_column: u32) -> Self {
            let mut rows = OutRows { start: [Global::NULL; 2], weight: [1.0; 2] };
            unroll::<2>(|half| {
                let row = own_row + 8 * half as u32;
                if row < tile.rows {
                    // SAFETY: `first` + `rows` pairs are in the list, and each is below P.
                    let pair = unsafe { p.pairs.at(tile.first + row).load() };
                    let start = I::from_u32(pair).times(I::from_u64(p.out_stride));
                    rows.start[half] = p.out.at(start.plus(I::from_u32(own_column)));
                    // An inactive pair's weight may be anything; its zeros stay zeros.
                    if !p.topk_weights.is_null() && tile.rank > 0 {
                        // SAFETY: as above.
                        rows.weight[half] = unsafe { p.topk_weights.at(pair).load() };
                    }
                }
            });
            rows
        }

        /// Adds a product's columns, the first of which is `first`, to these rows' old values, and stores them.
        ///
        /// # Safety
        /// If `p.accumulate`, the panel `old` must hold the old values.
        #[inline(always)]
        #[track_caller]
        unsafe fn add<E: Element>(
            &self,
            p: &PrefillParams,
            delta: &[f32; PANEL_SUMS],
            old: Panel,
            first: u32,
            own_row: u32,
            own_chunk: u32,
        ) {
            unroll::<2>(|group| {
                unroll::<2>(|half| {
                    let at = first + 32 * group as u32;
                    if !self.start[half].is_null() && at + own_chunk * CHUNK < p.out_dim {
                        let old = old.chunk(own_row + 8 * half as u32, 4 * group as u32 + own_chunk);
                        // SAFETY: as the caller promises.
                        let old = if p.accumulate != 0 { unsafe { old.load16() } } else { [0; 4] };
                        let mut packed = [0u32; 4];
                        unroll::<4>(|i| {
                            // Eight neighbouring columns are two each of four n8 tiles (see `panel`).
                            let place = 4 * (4 * group + i) + 2 * half;
                            let [low, high] = E::unpack(old[i]);
                            let weight = self.weight[half];
                            packed[i] =
                                E::pack(delta[place] * weight + low, delta[place + 1] * weight + high);
                        });
                        // SAFETY: columns come in eights, so all of them are inside the row.
                        unsafe { self.start[half].at(at).store16(packed) };
                    }
                });
            });
        }

        /// Goes on to the next slice.
        #[inline(always)]
        fn next_slice(&mut self, p: &PrefillParams) {
            unroll::<2>(|half| {
                if !self.start[half].is_null() {
                    self.start[half] = self.start[half].at(p.out_dim);
                }
            });
        }
    }

    /// The kernel. `SUMS`: half the columns of h, up to 128; `MORE`: half of those from 128 on; `BLOCKS`: fragments of 16
    /// of all; `OLDER`: stages less two.
    ///
    /// # Safety
    /// As for the entry points: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn prefill<
        E: Element,
        I: Index,
        const SUMS: usize,
        const MORE: usize,
        const BLOCKS: usize,
        const WARPGROUPS: u32,
        const OLDER: u32,
    >(
        p: PrefillParams,
    ) where
        [f32; SUMS]: Sums,
    {
        grid::let_next_start();
        grid::wait_for_previous();
        // SAFETY: as the caller promises; the launch before this one has ended.
        let mut turns = unsafe { Turns::of_this_block(&p, 64 * WARPGROUPS) };
        // SAFETY: as above.
        let mut ring = unsafe { Ring::<I, BLOCKS, WARPGROUPS, OLDER>::fill(&p, turns) };

        let warpgroup_row = thread::index() / wgmma::THREADS * 64;
        let own_row = warpgroup_row + thread::warp() % 4 * 16 + thread::lane() / 4;
        let own_chunk = thread::lane() % 4;
        loop {
            // SAFETY: as the caller promises.
            let tile = unsafe { turns.take(&p) };
            if tile.rows == 0 {
                break;
            }

            let shift = rank_shift(tile.rank);
            let mut slice = 0;
            while slice < p.slices {
                let Pass { end, columns } = Pass::of(&p, tile.rank, slice, 16 * BLOCKS as u32);

                // Shrink.
                let (mut sums, mut more) = (<[f32; SUMS]>::zero(), [0.0; MORE]);
                if let Some(more) = more.first_chunk_mut::<64>() {
                    *more = Sums::zero();
                }
                let mut depth = if tile.rank == 0 { p.in_dim } else { 0 };
                while depth < p.in_dim {
                    // SAFETY: the block has left all stages but the last one.
                    let stage = unsafe { ring.next_stage(&p) };
                    wgmma::fence();
                    // SAFETY: the step has landed, was shown, and is left alone until the next barrier.
                    unsafe {
                        multiply_step::<E, SUMS, MORE, BLOCKS, WARPGROUPS>(
                            &mut sums,
                            &mut more,
                            stage,
                            columns,
                            warpgroup_row,
                        );
                    }
                    wgmma::commit();
                    sums.wait::<0>();
                    if let Some(more) = more.first_chunk_mut::<64>() {
                        more.wait::<0>();
                    }
                    depth += shrink_panels::<BLOCKS, WARPGROUPS>(columns) * TileShape::DEPTH;
                }
                let mut h = [[0u32; 4]; BLOCKS];
                unroll::<BLOCKS>(|block| {
                    unroll::<4>(|i| {
                        let at = 8 * block + 2 * i;
                        h[block][i] = if at < SUMS {
                            E::pack(sums[at], sums[at + 1])
                        } else {
                            E::pack(more[at - SUMS], more[at - SUMS + 1])
                        };
                    });
                });

                // Expand.
                let panels = expand_panels::<BLOCKS>(tile.rank);
                let first = slice * p.out_dim + own_chunk * CHUNK;
                // SAFETY: the tile is one of p's.
                let mut out = unsafe { OutRows::new::<I>(&p, &tile, own_row, first) };
                while slice < end {
                    let mut column = 0;
                    while column < p.out_dim {
                        // SAFETY: as for shrink.
                        let stage = unsafe { ring.next_stage(&p) };
                        let mut delta = <[f32; PANELS as usize * PANEL_SUMS]>::zero();
                        wgmma::fence();
                        // SAFETY: as for shrink; `b` is filled up to the end of the sixteen that hold the last rank.
                        unsafe {
                            multiply_ranks::<E, BLOCKS, WARPGROUPS>(&mut delta, &h, stage, panels, tile.rank);
                        }
                        wgmma::commit();
                        delta.wait::<0>();
                        unroll::<{ PANELS as usize }>(|panel| {
                            let at = column + panel as u32 * PANEL_COLUMNS;
                            if (panel as u32) < panels && at < p.out_dim {
                                let mut own = [0.0; PANEL_SUMS];
                                unroll::<16>(|i| {
                                    own[2 * i] = delta[PANEL_SUMS * panel + 2 * i];
                                    own[2 * i + 1] = delta[PANEL_SUMS * panel + 2 * i + 1];
                                });
                                let old = row_panel::<WARPGROUPS>(stage, panel as u32);
                                // SAFETY: where they are added to, old values were copied for every row that is stored.
                                unsafe { out.add::<E>(&p, &own, old, at, own_row, own_chunk) };
                            }
                        });
                        column += panels * PANEL_COLUMNS;
                    }
                    out.next_slice(&p);
                    drop_slice(&mut h, shift);
                    slice += 1;
                }
            }
        }
    }

    /// Moves the fragments of the next slice to the front.
    #[inline(always)]
    fn drop_slice<const BLOCKS: usize>(h: &mut [[u32; 4]; BLOCKS], shift: u32) {
        macro_rules! shift {
            ($blocks:literal, $log:literal) => {
                if shift == $log {
                    unroll::<BLOCKS>(|block| {
                        if block + $blocks < BLOCKS {
                            h[block] = h[block + $blocks];
                        }
                    });
                }
            };
        }
        shift!(1, 4);
        shift!(2, 5);
        shift!(4, 6);
        shift!(8, 7);
    }
}
