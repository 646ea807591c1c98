//! `decode`: shrink and expand of few pairs a segment in one launch,
//! `out[p, offset + s·N + n] (+)= weight[p] · Σ_q (Σ_c x[row(p), c] · a[s][l, e, q, c]) · b[s][l, e, n, q]`.
//!
//! Such a call reads every weight of the adapters in use once and does hardly any arithmetic: it costs what the
//! weights' bytes cost, if nothing ever waits with no bytes under way. So the warps of a block have roles, and each
//! role goes through the units of work at its own pace. A *unit* is a tile of pairs and a slice; a cluster takes one
//! unit after another, and shares it.
//!
//! | warps | role |
//! |---|---|
//! | 4 | shrink: the block takes some of the ranks, in groups of 16, and where there are fewer groups than blocks a share of K; it sends its part of h to all blocks of the cluster |
//! | 4 | expand: adds up the parts of h that have come, always in the same order, and takes a share of the columns |
//! | 2 | fill a ring of stages for shrink: one with a, as soon as it knows the first tile, one with x, once pairs are listed |
//! | 1 | fills a ring for expand, with b and the old values of `out` |
//!
//! Who fills a ring does nothing but ask for the next stage, and needs no h.
//!
//! A block takes half of a multiprocessor ([`BLOCKS`]): the chain of waits of one unit runs beside that of another, and the
//! next launch makes itself ready beside the last units.
//!
//! Weights are mma's operand with sixteen rows, pairs its eight columns. Both come as sixteen bytes a thread: a
//! thread of number c in its quad holds elements 8c … 8c + 7 of a run of 32, which mma would have it hold as 2c,
//! 2c + 1, 2c + 8, 2c + 9 of two steps; since both operands are permuted alike, the sum is the same. Rows of b are
//! permuted so that a thread's two rows are neighbouring columns of the output.
//!
//! Segments come from [`segments`], found by each block itself, or from `route`.
//!
//! Shared memory, with `ROWS` pairs a tile:
//!
//! | bytes | what |
//! |---|---|
//! | 384 | barriers, and the number of units |
//! | [`Room::shared_bytes`] | the segments |
//! | 2 × ROWS × `row_bytes(R)` | h, in turns |
//! | 4 × ROWS × 80 | the shrink warps' sums of 16 ranks |
//! | 2 × `landing_bytes` | parts of h as they come from the blocks of the cluster, in turns |
//! | stages × [`shrink_stage_bytes`] | ring for shrink: 16 ranks of a and the tile's rows of x, `CHUNK` elements of K |
//! | stages × [`expand_stage_bytes`] | ring for expand: rows of b, and the old values of those columns |
//!
//! Before the ring for expand is used, it is the scratch of [`segments`].

use crate::segments::{self, Room};

/// Warps that shrink; as many expand.
const WORKERS: u32 = 4;
/// Warps that fill the ring for shrink, one with a and one with x; one fills that for expand.
const FILLERS: u32 = 2;
/// The first of them, with a: it needs no pairs, only a tile.
const FILL: u32 = 2 * WORKERS;
const _: () = assert!(FILL == segments::AHEAD);
/// Threads of a block.
pub const THREADS: u32 = 32 * (2 * WORKERS + FILLERS + 1);
const _: () = assert!(THREADS == segments::THREADS);
/// Largest R.
pub const MAX_RANK: u32 = 512;
/// Most blocks of a cluster that every device with clusters allows.
pub const MAX_CLUSTER: u32 = 8;
/// Most stages of a ring.
pub const MAX_STAGES: u32 = 8;
/// Fewest stages of a ring: with one being multiplied, one is under way.
pub const MIN_STAGES: u32 = 2;
/// Blocks that a multiprocessor runs at a time, with tiles of 8 pairs and where their shared memory allows.
pub const BLOCKS: u32 = 2;
/// Bytes of shared memory that the device takes of each block for itself.
pub const RESERVED_BYTES: u32 = 1024;

/// Elements of K of a stage. In stages of 256 one token takes 1.1 µs more, and 80 tokens 3 to 6: a row is a copy, however
/// short.
const CHUNK: u32 = 512;
/// Most columns of a stage.
const MAX_COLUMNS: u32 = 256;
/// Elements that a quad of threads loads of a row at a time, sixteen bytes each.
const RUN: u32 = 32;
/// Rows of a matrix of weights that a warp multiplies at a time.
const GROUP: u32 = 16;

/// Bytes of the barriers: two a stage of each ring, two for each turn of h, one for the first stages of shrink, and one for the
/// segments; and of the numbers of tiles and of units.
const BARRIER_BYTES: u32 = 384;
const _: () = assert!(BARRIER_BYTES >= 8 * (4 * MAX_STAGES + 6) + 12);

/// Bytes from one row of `elements` elements of K or of ranks to the next: an odd multiple of 64, so that two quads
/// that read two rows at once meet different banks.
const fn row_bytes(elements: u32) -> u32 {
    (2 * elements).next_multiple_of(64) | 64
}

/// Bytes from one row of old values of `columns` columns to the next: such that a warp's reads of two columns of
/// eight rows meet different banks.
const fn old_row_bytes(columns: u32) -> u32 {
    2 * columns + 16
}

/// Bytes of a of a stage for shrink, without what keeps its rows apart.
pub const A_STAGE: u32 = 2 * GROUP * CHUNK;
/// Bytes of b of a stage for expand.
pub const B_STAGE: u32 = 16 << 10;
const _: () = assert!(B_STAGE / 2 / MAX_RANK >= GROUP);

/// Bytes of a stage for shrink, with `rows` pairs a tile.
pub const fn shrink_stage_bytes(rows: u32) -> u32 {
    (GROUP + rows) * row_bytes(CHUNK)
}

/// Bytes of a stage for expand, with `rows` pairs a tile.
pub const fn expand_stage_bytes(rows: u32) -> u32 {
    B_STAGE + rows * old_row_bytes(MAX_COLUMNS)
}

/// Bytes from one row to the next of a warp's sums: 16 floats, and a distance that keeps a warp's stores apart.
const SUM_ROW: u32 = 4 * (GROUP + 4);

/// Bytes that the parts of h of one unit take, sent by `cluster` blocks, a power of two.
const fn landing_bytes(rows: u32, max_rank: u32, cluster: u32) -> u32 {
    let groups = max_rank.div_ceil(GROUP);
    rows * 4 * GROUP * ((groups + cluster - 1) & !(cluster - 1))
}

/// Bytes of shared memory of a block beside its rings, with `rows` pairs a tile and room for the segments (none
/// when these come from `route`).
pub const fn fixed_bytes(rows: u32, max_rank: u32, cluster: u32, room: Room) -> u32 {
    let bytes = BARRIER_BYTES
        + room.shared_bytes()
        + 2 * rows * row_bytes(max_rank.next_multiple_of(RUN))
        + WORKERS * rows * SUM_ROW
        + 2 * landing_bytes(rows, max_rank, cluster);
    bytes.next_multiple_of(128)
}

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90"), feature = "emulate"))]
pub use kernel::decode;

#[cfg(any(all(target_arch = "nvptx64", feature = "sm_90"), feature = "emulate"))]
mod kernel {
    use super::{
        B_STAGE, BARRIER_BYTES, CHUNK, FILL, FILLERS, GROUP, MAX_COLUMNS, MAX_STAGES, RUN, SUM_ROW, THREADS,
        WORKERS, expand_stage_bytes, fixed_bytes, landing_bytes, old_row_bytes, row_bytes,
        shrink_stage_bytes,
    };
    use crate::arch::mbarrier::{self, Mbarrier};
    use crate::arch::mma::Element;
    use crate::arch::shared::Shared;
    use crate::arch::{async_copy, barrier, bulk, cluster, grid, thread, warp};
    use crate::memory::{Global, Index};
    use crate::params::{DecodeParams, Tile, count};
    use crate::segments::{Few, Ids, Segments};
    use crate::tile::{select_slice, unroll};

    /// The first warp that expands.
    const EXPAND: u32 = WORKERS;
    /// The warp that fills the ring for shrink with x: it also lists few pairs, and knows how many tiles there are.
    const LIST: u32 = FILL + 1;
    /// Threads that shrink, or that expand.
    const ROLE_THREADS: u32 = 32 * WORKERS;
    /// The barriers at which they meet among themselves.
    const SHRINK_MEETS: u32 = 1;
    const EXPAND_MEETS: u32 = 2;
    /// Runs of K, or groups of columns, that a warp multiplies at a time, with sums of their own: each is a chain of loads
    /// and products that wait for one another.
    const CHAINS: usize = 2;
    /// Rows of a that are asked for at a time: their addresses are formed together.
    const TOGETHER: usize = 8;
    /// Elements of b that a lane copies at a time, where ranks are not used whole.
    const PIECE: u32 = 8;
    /// Lanes of a warp: each comes to a stage for expand, with its copies, besides the warp.
    const LANES: u32 = 32;

    /// Number of this thread among those of its role.
    #[inline(always)]
    fn worker() -> u32 {
        thread::index() % ROLE_THREADS
    }

    /// Adds one run's product with `columns`, this thread's elements of the run of its pair.
    #[inline(always)]
    fn multiply<E: Element>(sum: &mut [f32; 4], [low, high]: [[u32; 4]; 2], columns: [u32; 4]) {
        E::mma(sum, [low[0], high[0], low[1], high[1]], [columns[0], columns[1]]);
        E::mma(sum, [low[2], high[2], low[3], high[3]], [columns[2], columns[3]]);
    }

    /// The logarithm of a power of two. (Of no other number, so that nothing has to be said of zero.)
    #[inline(always)]
    fn log2(power: u32) -> u32 {
        31 - power.leading_zeros()
    }

    /// The share of `length` things that block `block` of `blocks`, a power of two, takes: the first, and the end.
    #[inline(always)]
    fn share_of(length: u32, block: u32, blocks: u32) -> (u32, u32) {
        let each = length >> log2(blocks);
        let more = length & (blocks - 1);
        let first = block * each + block.min(more);
        (first, first + each + (block < more) as u32)
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

    /// Number of the first row of the matrix of a or b, of `rows` rows, that a unit uses.
    #[inline(always)]
    fn first_row<I: Index>(tile: &Tile, experts: u32, rows: u32) -> I {
        tile.matrix::<I>(experts).times(I::from_u32(rows))
    }

    /// Where the number of units of the launch is.
    #[inline(always)]
    fn unit_count() -> Shared {
        Shared::base().offset(BARRIER_BYTES - 4)
    }

    /// Where the number of tiles of active pairs is, and then that of all.
    #[inline(always)]
    fn tile_counts() -> Shared {
        Shared::base().offset(BARRIER_BYTES - 12)
    }

    /// The barrier of this number.
    #[inline(always)]
    fn mbarrier(number: u32) -> Mbarrier {
        Mbarrier::at(Shared::base().offset(8 * number))
    }

    /// Makes the barriers ready. One thread does: those of several would be served one by one, at a fence each.
    ///
    /// # Safety
    /// One thread must come here, before anybody uses them.
    #[inline(always)]
    unsafe fn init_barriers(shrink: &Ring, expand: &Ring, blocks: u32) {
        // SAFETY: the first bytes of shared memory are the barriers'.
        unsafe {
            shrink.init(FILLERS);
            expand.init(1 + LANES);
            unroll::<2>(|turn| {
                // One thread that expands; and the warps that shrink, unless they send what the barrier counts.
                landed(turn as u32).init(if blocks == 1 { 1 + WORKERS } else { 1 });
                read(turn as u32).init(blocks);
            });
            begun().init(1);
            listed().init(THREADS / LANES);
        }
        mbarrier::publish();
    }

    /// Ends when all parts of h of a turn have landed.
    #[inline(always)]
    fn landed(turn: u32) -> Mbarrier {
        mbarrier(4 * MAX_STAGES + turn)
    }

    /// Ends when all blocks of the cluster have read what had landed in a turn.
    #[inline(always)]
    fn read(turn: u32) -> Mbarrier {
        mbarrier(4 * MAX_STAGES + 2 + turn)
    }

    /// Ends when the first stages of shrink were asked for.
    #[inline(always)]
    fn begun() -> Mbarrier {
        mbarrier(4 * MAX_STAGES + 4)
    }

    /// Ends when all warps have done their part of the search: pairs, tiles and the number of units can be read, and the scratch is
    /// free.
    #[inline(always)]
    fn listed() -> Mbarrier {
        mbarrier(4 * MAX_STAGES + 5)
    }

    /// A ring of stages, and where in it a warp is: each warp keeps that for itself.
    #[derive(Clone, Copy)]
    struct Ring {
        start: Shared,
        stages: u32,
        stage_bytes: u32,
        /// Number of the first of its barriers: a stage's *full* ends when the warps that fill it have come, and all
        /// that they asked for has; its *empty* when all warps that work on it have left it.
        barriers: u32,
        stage: u32,
        /// Parity of the phase of the stage's barriers.
        parity: u32,
    }

    impl Ring {
        /// Makes the barriers ready, for `arrivals` arrivals at a full stage.
        ///
        /// # Safety
        /// As for [`init_barriers`].
        #[inline(always)]
        unsafe fn init(&self, arrivals: u32) {
            let mut stage = 0;
            while stage < self.stages {
                // SAFETY: as the caller promises.
                unsafe {
                    self.full(stage).init(arrivals);
                    self.empty(stage).init(WORKERS);
                }
                stage += 1;
            }
        }

        #[inline(always)]
        fn full(&self, stage: u32) -> Mbarrier {
            mbarrier(self.barriers + stage)
        }

        #[inline(always)]
        fn empty(&self, stage: u32) -> Mbarrier {
            mbarrier(self.barriers + MAX_STAGES + stage)
        }

        #[inline(always)]
        fn step(&mut self) {
            self.stage += 1;
            if self.stage == self.stages {
                self.stage = 0;
                self.parity ^= 1;
            }
        }

        /// Waits until the next stage is empty. Returns it, and the barrier that counts what comes.
        ///
        /// # Safety
        /// The whole warp must come here, and then to [`announce`].
        #[inline(always)]
        unsafe fn claim(&mut self) -> (Shared, Mbarrier) {
            let full = self.full(self.stage);
            let stage = self.start.offset(self.stage * self.stage_bytes);
            // SAFETY: the barrier is initialised.
            unsafe { self.empty(self.stage).wait(self.parity ^ 1) };
            self.step();
            (stage, full)
        }

        /// Waits for the next stage.
        ///
        /// # Safety
        /// The whole warp must come here, and then to [`Ring::leave`].
        #[inline(always)]
        unsafe fn enter(&self) -> Shared {
            // SAFETY: the barrier is initialised.
            unsafe { self.full(self.stage).wait(self.parity) };
            self.start.offset(self.stage * self.stage_bytes)
        }

        /// Gives the stage back.
        ///
        /// # Safety
        /// As for [`Ring::enter`].
        #[inline(always)]
        unsafe fn leave(&mut self) {
            warp::sync();
            if thread::lane() == 0 {
                // SAFETY: the barrier is initialised.
                unsafe { self.empty(self.stage).arrive() };
            }
            self.step();
        }
    }

    /// Comes to a claimed stage's barrier for this warp, whose bulk copies of `bytes` bytes follow.
    ///
    /// # Safety
    /// The whole warp must come here, once for each stage, and then start copies of so many bytes.
    #[inline(always)]
    unsafe fn announce(full: Mbarrier, bytes: u32) {
        if thread::lane() == 0 {
            // SAFETY: the barrier is initialised.
            unsafe { full.arrive_expecting(bytes) };
        }
        warp::sync();
    }

    /// What all roles know of the launch.
    #[derive(Clone, Copy)]
    struct Context<'p> {
        p: &'p DecodeParams,
        found: Segments,
        block: u32,
        blocks: u32,
        h: Shared,
        sums: Shared,
        landings: Shared,
    }

    /// A tile of pairs and a slice.
    #[derive(Clone, Copy)]
    struct Unit {
        tile: Tile,
        slice: u32,
    }

    impl Context<'_> {
        /// Calls `body` with the units of this block's cluster that have pairs, one after another.
        ///
        /// # Safety
        /// Where the segments come from `route`, it must have ended.
        #[inline(always)]
        unsafe fn each_unit(&self, rows: u32, mut body: impl FnMut(Unit)) {
            let p = self.p;
            let mut next = self.first_unit();
            // SAFETY: the number was stored before a barrier. Read anew each time, it takes no register.
            while next < unsafe { unit_count().load() } {
                // SAFETY: as the caller promises; the unit is one of the cluster's.
                let unit = unsafe { self.unit(next, rows) };
                next += p.clusters;
                if unit.tile.rows > 0 {
                    body(unit);
                }
            }
        }

        /// The number of the first unit of the block's cluster.
        #[inline(always)]
        fn first_unit(&self) -> u32 {
            thread::block() >> log2(self.blocks)
        }

        /// Unit `number`.
        ///
        /// # Safety
        /// There must be such a unit, of the block's cluster, and where the block finds the segments, it must be listed.
        #[inline(always)]
        unsafe fn unit(&self, number: u32, rows: u32) -> Unit {
            let p = self.p;
            let [part, slice] = p.tile_and_slice(number);
            // SAFETY: as the caller promises.
            let tile = unsafe {
                if p.finds != 0 {
                    self.found.tile(&p.room, p.over_listed.quotient(number))
                } else {
                    let whole = p.over_parts.quotient(part);
                    let tile = p.route.tiles.at(whole).load_tile();
                    tile.part(part - whole * p.tile_parts, rows)
                }
            };
            Unit { tile, slice }
        }

        /// Pair `row` of a tile.
        ///
        /// # Safety
        /// The tile must have so many.
        #[inline(always)]
        unsafe fn pair(&self, tile: &Tile, row: u32) -> u32 {
            // SAFETY: as the caller promises.
            unsafe {
                if self.p.finds != 0 {
                    self.found.pair_at(tile.first + row).load()
                } else {
                    self.p.route.pairs.at(tile.first + row).load()
                }
            }
        }

        /// Where the slice's columns of a pair begin in `out`.
        #[inline(always)]
        fn out_row<I: Index>(&self, unit: &Unit, pair: u32) -> Global<u16> {
            let row = I::from_u32(pair).times(I::from_u64(self.p.out_stride));
            self.p.out.at(row.plus(I::from_u32(unit.slice).times(I::from_u32(self.p.out_dim))))
        }

        /// Where the parts of h of a turn land.
        #[inline(always)]
        fn landing<const ROWS: u32>(&self, turn: u32) -> Shared {
            // Blocks of a cluster are a power of two.
            self.landings.offset(turn * landing_bytes(ROWS, self.p.route.max_rank, self.blocks))
        }
    }

    /// How the blocks of a cluster share the shrink of units of one rank.
    #[derive(Clone, Copy)]
    struct Shares {
        rank: u32,
        /// Blocks among which groups are shared: a power of two. Groups of a block are so many apart.
        group_shares: u32,
        /// This block's share of K: its first element, and its end.
        k: (u32, u32),
    }

    impl Shares {
        /// For units of no rank.
        const NONE: Self = Shares { rank: 0, group_shares: 1, k: (0, 0) };

        #[inline(always)]
        fn new(context: &Context<'_>, rank: u32) -> Self {
            let &Context { p, block, blocks, .. } = context;
            let groups = rank.div_ceil(GROUP);
            let group_shares = groups.next_power_of_two().min(blocks);
            let shift = log2(group_shares);
            let (first, end) = share_of(p.in_dim.div_ceil(RUN), block >> shift, blocks >> shift);
            let k = (RUN * first, p.in_dim.min(RUN * end));
            Shares { rank, group_shares, k }
        }

        /// Groups of 16 ranks.
        #[inline(always)]
        fn groups(&self) -> u32 {
            self.rank.div_ceil(GROUP)
        }

        /// This block's first group.
        #[inline(always)]
        fn group(&self, context: &Context<'_>) -> u32 {
            context.block & (self.group_shares - 1)
        }

        /// Of `blocks` blocks, those among which K is shared; of block `blocks`, its number among them.
        #[inline(always)]
        fn k_shares(&self, blocks: u32) -> u32 {
            blocks >> log2(self.group_shares)
        }

        /// The shares for units of another rank: most have the one before.
        #[inline(always)]
        fn change(&mut self, context: &Context<'_>, rank: u32) {
            if rank != self.rank {
                *self = Self::new(context, rank);
            }
        }

        /// Groups of ranks that a part of h has: as many of each block, the last ones zeros. A block that sent nothing would
        /// not wait either, and be ahead of the others by more than parities tell.
        #[inline(always)]
        fn landing_groups(&self) -> u32 {
            (self.groups() + self.group_shares - 1) & !(self.group_shares - 1)
        }
    }

    /// This block's share of the columns, for units of one rank.
    #[derive(Clone, Copy)]
    struct Columns {
        first: u32,
        end: u32,
        /// Ranks in use, rounded up to whole sixteen bytes.
        rank: u32,
        /// Columns of a stage: a power of two.
        step: u32,
    }

    impl Columns {
        /// Of no rank.
        #[inline(always)]
        fn new(context: &Context<'_>) -> Self {
            let &Context { p, block, blocks, .. } = context;
            let (first, end) = share_of(p.out_dim.div_ceil(GROUP), block, blocks);
            Columns { first: GROUP * first, end: p.out_dim.min(GROUP * end), rank: 0, step: MAX_COLUMNS }
        }

        #[inline(always)]
        fn change(&mut self, rank: u32) {
            self.rank = rank.next_multiple_of(8);
            self.step = ((B_STAGE / 2) >> log2(self.rank.next_power_of_two())).min(MAX_COLUMNS);
        }

        /// Calls `body` with each stage that they take: the first column, and how many. Without ranks there are none.
        #[inline(always)]
        fn each_step(&self, mut body: impl FnMut(u32, u32)) {
            let mut at = self.first;
            while at < self.end && self.rank > 0 {
                body(at, self.step.min(self.end - at));
                at += self.step;
            }
        }
    }

    /// Calls `body` with each stage that the block's share of a unit's shrink takes: the group of ranks, the first
    /// element of K, and how many.
    #[inline(always)]
    fn each_chunk(context: &Context<'_>, shares: &Shares, mut body: impl FnMut(u32, u32, u32)) {
        let mut group = shares.group(context);
        while group < shares.groups() {
            let (mut at, end) = shares.k;
            while at < end {
                body(group, at, CHUNK.min(end - at));
                at += CHUNK;
            }
            group += shares.group_shares;
        }
    }

    /// Fills the ring for shrink with a: of `first`, the cluster's first unit if it has one, before pairs are listed.
    ///
    /// # Safety
    /// As for [`decode`]; the whole warp must come here.
    #[inline(always)]
    unsafe fn fill_a<I: Index>(
        context: &Context<'_>,
        mut shares: Shares,
        mut ring: Ring,
        rows: u32,
        first: Unit,
    ) {
        let p = context.p;
        let (mut filled, stages) = (0, ring.stages);
        // The copies of b may follow.
        let begin = || {
            if thread::lane() == 0 {
                // SAFETY: the barrier is initialised.
                unsafe { begun().arrive() };
            }
        };
        let mut unit = first;
        let mut next = context.first_unit();
        loop {
            let Unit { tile, slice } = unit;
            if tile.rows > 0 {
                shares.change(context, tile.rank);
                let matrix = first_row::<I>(&tile, p.a_experts, p.route.max_rank);
                let a = select_slice(p.a, slice);
                each_chunk(context, &shares, |group, at, length| {
                    let ranks = (tile.rank - GROUP * group).min(GROUP);
                    let row = matrix.plus(I::from_u32(GROUP * group));
                    let mut source = a.at(row.times(I::from_u32(p.in_dim))).at(at);
                    // SAFETY: the rows are inside the tensor, and elements come in eights; as many bytes are announced as
                    // are copied.
                    unsafe {
                        let (mut target, full) = ring.claim();
                        announce(full, 2 * length * ranks);
                        if warp::elect() {
                            let mut copy = || {
                                bulk::copy(target, source, 2 * length, full);
                                source = source.at(p.in_dim);
                                target = target.offset(row_bytes(length));
                            };
                            let mut left = ranks;
                            while left >= TOGETHER as u32 {
                                unroll::<TOGETHER>(|_| copy());
                                left -= TOGETHER as u32;
                            }
                            while left > 0 {
                                copy();
                                left -= 1;
                            }
                        }
                    }
                    filled += 1;
                    if filled == stages {
                        begin();
                    }
                });
            }
            next += p.clusters;
            // SAFETY: the barrier is initialised; after it the number of units can be read, and each of the cluster's.
            unsafe {
                listed().wait(0);
                if next >= unit_count().load() {
                    break;
                }
                unit = context.unit(next, rows);
            }
        }
        if filled < stages {
            begin();
        }
    }

    /// Fills the ring for shrink with x, a row a lane.
    ///
    /// # Safety
    /// As for [`fill_a`].
    #[inline(always)]
    unsafe fn fill_x<I: Index, const ROWS: u32>(context: &Context<'_>, mut ring: Ring) {
        let mut shares = Shares::NONE;
        let (p, row) = (context.p, thread::lane());
        let unit = |Unit { tile, .. }: Unit| {
            shares.change(context, tile.rank);
            let mut x = Global::<u16>::NULL;
            if tile.rank > 0 && row < tile.rows {
                // SAFETY: the tile has so many pairs.
                let pair = unsafe { context.pair(&tile, row) };
                x = p.x.at(I::from_u32(p.x_row.quotient(pair)).times(I::from_u64(p.x_stride)));
            }
            each_chunk(context, &shares, |_, at, length| {
                // SAFETY: as in `fill_a`.
                unsafe {
                    let (stage, full) = ring.claim();
                    announce(full, 2 * length * tile.rows);
                    if row < tile.rows {
                        bulk::copy(
                            stage.offset((GROUP + row) * row_bytes(length)),
                            x.at(at),
                            2 * length,
                            full,
                        );
                    }
                }
            });
        };
        // SAFETY: as the caller promises.
        unsafe { context.each_unit(ROWS, unit) };
    }

    /// Fills the ring for expand: the old values of `out`, a row a lane; and b. Where ranks are
    /// used whole, all columns of b are one copy; otherwise each lane copies [`PIECE`] of a column's ranks at a time, since a
    /// bulk copy takes as long for the few ranks of a column as for many.
    ///
    /// # Safety
    /// As for [`fill_a`].
    #[inline(always)]
    unsafe fn fill_expand<I: Index, const ROWS: u32>(context: &Context<'_>, mut ring: Ring) {
        let (p, lane) = (context.p, thread::lane());
        let max_rank = p.route.max_rank;
        let mut columns = Columns::new(context);
        // Whether stages were filled without the copy engine.
        let mut stored = false;
        // Expand has nothing to do before shrink has: the first copies of a must not wait for those of b.
        // SAFETY: the barrier is initialised.
        unsafe { begun().wait(0) };
        let unit = |unit: Unit| {
            let Unit { tile, slice } = unit;
            columns.change(tile.rank);
            let ranks = columns.rank;
            let is_whole = ranks == max_rank;
            let matrix = first_row::<I>(&tile, p.b_experts, p.out_dim);
            let b = select_slice(p.b, slice);
            let wants_old = p.accumulate != 0 && lane < tile.rows;
            let mut out = Global::<u16>::NULL;
            if wants_old {
                // SAFETY: the tile has so many pairs.
                out = context.out_row::<I>(&unit, unsafe { context.pair(&tile, lane) });
            }
            columns.each_step(|at, count| {
                let source = b.at(matrix.plus(I::from_u32(at)).times(I::from_u32(max_rank)));
                let b_bytes = if is_whole { 2 * count * max_rank } else { 0 };
                // SAFETY: as in `fill_a`.
                unsafe {
                    let (stage, full) = ring.claim();
                    if !is_whole {
                        // A power of two of lanes takes a column, so that no lane divides.
                        let shift = log2((ranks / PIECE).next_power_of_two());
                        let mut item = lane;
                        while item < count << shift {
                            let (column, first) = (item >> shift, PIECE * (item & ((1 << shift) - 1)));
                            if first < ranks {
                                let target = stage.offset(2 * (column * ranks + first));
                                async_copy::copy16_whole::<_, { async_copy::ALONE }>(
                                    target,
                                    source.at(column * max_rank + first),
                                );
                            }
                            item += LANES;
                        }
                        full.arrive_after_copies();
                        stored = true;
                    } else if stored {
                        // The copy engine need not see what other copies have left here.
                        bulk::fence();
                    }
                    announce(full, 2 * count * warp::ballot(wants_old).count_ones() + b_bytes);
                    if is_whole && lane == 0 {
                        full.arrive_for(LANES);
                        bulk::copy(stage, source, b_bytes, full);
                    }
                    if wants_old {
                        let target = stage.offset(B_STAGE + lane * old_row_bytes(count));
                        bulk::copy(target, out.at(at), 2 * count, full);
                    }
                }
            });
        };
        // SAFETY: as the caller promises.
        unsafe { context.each_unit(ROWS, unit) };
    }

    /// Shrinks, and sends this block's parts of h to all blocks of the cluster.
    ///
    /// # Safety
    /// As for [`decode`]; all threads of the role must come here.
    #[inline(always)]
    unsafe fn shrink<E: Element, const FRAGMENTS: usize, const ROWS: u32>(
        context: &Context<'_>,
        mut ring: Ring,
    ) {
        let mut shares = Shares::NONE;
        // Units whose h was sent.
        let mut sent = 0;
        let unit = |Unit { tile, .. }: Unit| {
            if tile.rank == 0 {
                return;
            }
            shares.change(context, tile.rank);
            let mut group = shares.group(context);
            while group < shares.landing_groups() {
                let ranks = shares.rank.saturating_sub(GROUP * group).min(GROUP);
                let me = thread::index_anew();
                let (warp, g, c) = (me % ROLE_THREADS / 32, me % 32 / 4, me % 4);
                let mut sum = [[[0.0f32; 4]; FRAGMENTS]; CHAINS];
                let (mut at, end) = if ranks > 0 { shares.k } else { (0, 0) };
                while at < end {
                    let length = CHUNK.min(end - at);
                    let row_bytes = row_bytes(length);
                    // SAFETY: who fills the ring comes to the same stages.
                    let stage = unsafe { ring.enter() }.offset(16 * c);
                    // Ranks and pairs past the last are computed from it, and never read.
                    let weights = [0, 8].map(|half| stage.offset((g + half).min(ranks - 1) * row_bytes));
                    let mut run = warp;
                    while RUN * run < length {
                        unroll::<CHAINS>(|i| {
                            let run = run + i as u32 * WORKERS;
                            let here = 2 * RUN * run;
                            let exists = RUN * run + 8 * c < length;
                            // SAFETY: the stage holds these rows up to `length`.
                            unsafe {
                                let rows = weights.map(|weights| weights.offset(here).load16_if(exists));
                                unroll::<FRAGMENTS>(|f| {
                                    if f == 0 || 8 * (f as u32) < tile.rows {
                                        let row = (8 * f as u32 + g).min(tile.rows - 1);
                                        let x = stage.offset((GROUP + row) * row_bytes + here);
                                        multiply::<E>(&mut sum[i][f], rows, x.load16_if(exists));
                                    }
                                });
                            }
                        });
                        run += CHAINS as u32 * WORKERS;
                    }
                    // SAFETY: as above.
                    unsafe { ring.leave() };
                    at += CHUNK;
                }

                // The warps' sums meet. Nobody may still read those before.
                barrier::sync_some::<SHRINK_MEETS, ROLE_THREADS>();
                unroll::<FRAGMENTS>(|f| {
                    unroll::<4>(|i| {
                        let row = warp * ROWS + 8 * f as u32 + 2 * c + (i as u32 & 1);
                        let place = context.sums.offset(row * SUM_ROW + 4 * (g + 8 * (i as u32 >> 1)));
                        let mut all = sum[0][f][i];
                        unroll::<{ CHAINS - 1 }>(|chain| all += sum[chain + 1][f][i]);
                        // SAFETY: there is room for every warp, pair and rank of the group.
                        unsafe { place.store(all.to_bits()) };
                    });
                });
                barrier::sync_some::<SHRINK_MEETS, ROLE_THREADS>();
                // SAFETY: all sums are there.
                unsafe { send::<ROWS>(context, &shares, tile.rows, group, sent) };
                group += shares.group_shares;
            }
            if context.blocks == 1 {
                // SAFETY: the barriers are initialised. Who had nothing to send waits as well: a phase of what has landed
                // takes all warps, and must not get those of a later one.
                unsafe {
                    read(sent & 1).wait(sent >> 1 & 1 ^ 1);
                    warp::sync();
                    if thread::lane() == 0 {
                        landed(sent & 1).arrive();
                    }
                }
            }
            sent += 1;
        };
        // SAFETY: as the caller promises.
        unsafe { context.each_unit(ROWS, unit) };
    }

    /// Adds up the warps' sums of a group of ranks, and sends them to all blocks, as of unit `sent` of this launch: four ranks of
    /// one pair to one block a thread. A block without others stores them.
    ///
    /// # Safety
    /// The sums must be written, and all threads of the role come here.
    #[inline(always)]
    unsafe fn send<const ROWS: u32>(
        context: &Context<'_>,
        shares: &Shares,
        rows: u32,
        group: u32,
        sent: u32,
    ) {
        const FOURS: u32 = GROUP / 4;
        let (turn, parity) = (sent & 1, sent >> 1 & 1);
        let shift = log2(context.blocks);
        let mut item = worker();
        while item < (rows * FOURS) << shift {
            let (four, block, row) =
                (item % FOURS, (item / FOURS) & (context.blocks - 1), (item / FOURS) >> shift);
            item += ROLE_THREADS;
            let mut sum = [0.0f32; 4];
            unroll::<{ WORKERS as usize }>(|w| {
                let place = context.sums.offset((w as u32 * ROWS + row) * SUM_ROW + 16 * four);
                // SAFETY: as the caller promises.
                let values = unsafe { place.load16() };
                unroll::<4>(|i| sum[i] += f32::from_bits(values[i]));
            });
            let part = (shares.k_shares(context.block) * ROWS + row) * shares.landing_groups() + group;
            let place = context.landing::<ROWS>(turn).offset(4 * (part * GROUP + 4 * four));
            // SAFETY: the barrier is initialised: what was sent in this turn before was read by all. There is room
            // for every part; nobody reads there before the phase has ended. (Only who sends may wait here: for others
            // nobody waits, and the barrier may be two phases on when they come.)
            unsafe {
                read(turn).wait(parity ^ 1);
                if context.blocks == 1 {
                    place.store16(sum.map(f32::to_bits));
                } else {
                    place.in_block(block).store4_async(sum, landed(turn).in_block(block));
                }
            }
        }
    }

    /// h of a unit: waits for all parts and adds them up, in the order of the shares of K. Returns h and the bytes
    /// from one row to the next.
    ///
    /// # Safety
    /// All blocks of the cluster must send their parts, and all threads of the role come here.
    #[inline(always)]
    unsafe fn receive<E: Element, const ROWS: u32>(
        context: &Context<'_>,
        shares: &Shares,
        rows: u32,
        received: u32,
    ) -> (Shared, u32) {
        let (turn, parity) = (received & 1, received >> 1 & 1);
        let rank = shares.rank;
        let row_bytes = row_bytes(context.p.route.max_rank.next_multiple_of(RUN));
        let h = context.h.offset(turn * ROWS * row_bytes);
        let landing = context.landing::<ROWS>(turn);
        let part_row = 4 * GROUP * shares.landing_groups();
        let k_shares = shares.k_shares(context.blocks);
        // SAFETY: the barrier is initialised.
        unsafe {
            if worker() == 0 {
                let bytes = k_shares * shares.landing_groups() * GROUP * rows * 4;
                landed(turn).arrive_expecting(if context.blocks == 1 { 0 } else { bytes });
            }
            landed(turn).wait(parity);
        }
        // Four ranks of a pair a thread; a power of two of threads takes a row, so that no thread divides.
        let width = rank.next_multiple_of(RUN) / 4;
        let room = width.next_power_of_two();
        let (shift, mask) = (log2(room), room - 1);
        let mut item = worker();
        while item < rows << shift {
            let (row, four) = (item >> shift, item & mask);
            item += ROLE_THREADS;
            if four >= width {
                continue;
            }
            let mut sum = [0.0f32; 4];
            if 4 * four < rank {
                let mut place = landing.offset(row * part_row + 16 * four);
                let mut share = 0;
                while share < k_shares {
                    // SAFETY: the part has landed.
                    let values = unsafe { place.load16() };
                    unroll::<4>(|i| sum[i] += f32::from_bits(values[i]));
                    place = place.offset(ROWS * part_row);
                    share += 1;
                }
                // Ranks above the last are zero, whatever the part holds.
                unroll::<4>(|i| sum[i] = if 4 * four + (i as u32) < rank { sum[i] } else { 0.0 });
            }
            let place = h.offset(row * row_bytes + 8 * four);
            // SAFETY: there is room for every pair and every run of ranks.
            unsafe {
                place.store(E::pack(sum[0], sum[1]));
                place.offset(4).store(E::pack(sum[2], sum[3]));
            }
        }
        barrier::sync_some::<EXPAND_MEETS, ROLE_THREADS>();
        if worker() < context.blocks {
            // SAFETY: no block ends before all have met at the end.
            unsafe { read(turn).in_block(worker()).arrive() };
        }
        (h, row_bytes)
    }

    /// Expands.
    ///
    /// # Safety
    /// As for [`decode`]; all threads of the role must come here.
    #[inline(always)]
    unsafe fn expand<E: Element, I: Index, const FRAGMENTS: usize, const ROWS: u32>(
        context: &Context<'_>,
        mut ring: Ring,
    ) {
        let mut shares = Shares::NONE;
        let p = context.p;
        let accumulate = p.accumulate != 0;
        let c = thread::lane() % 4;
        let mut columns = Columns::new(context);
        // Units whose h was received.
        let mut received = 0;
        let unit = |unit: Unit| {
            let tile = unit.tile;
            // The two pairs of each fragment whose sums this thread ends up with.
            let mut out = [[Global::<u16>::NULL; 2]; FRAGMENTS];
            let mut weight = [[1.0; 2]; FRAGMENTS];
            unroll::<FRAGMENTS>(|f| {
                unroll::<2>(|i| {
                    let row = 8 * f as u32 + 2 * c + i as u32;
                    if row < tile.rows {
                        // SAFETY: the tile has so many pairs, and each is below P.
                        unsafe {
                            let pair = context.pair(&tile, row);
                            out[f][i] = context.out_row::<I>(&unit, pair);
                            // An inactive pair's weight may be anything; its zeros stay zeros.
                            if !p.topk_weights.is_null() && tile.rank > 0 {
                                weight[f][i] = p.topk_weights.at(pair).load();
                            }
                        }
                    }
                });
            });
            // Stores two columns of a pair, if it exists.
            let store = |f: usize, i: usize, column: u32, values: u32| {
                if !out[f][i].is_null() {
                    let place = Global::<u32>::new(out[f][i].at(column).address());
                    // SAFETY: two columns are inside the row; sizes are multiples of 8.
                    unsafe { place.store(values) };
                }
            };
            if tile.rank == 0 {
                // Inactive pairs: untouched, or overwritten by zeros.
                let me = thread::index_anew() % ROLE_THREADS;
                let mut column = columns.first + GROUP * (me / 32) + 2 * (me % 32 / 4);
                while column < columns.end && !accumulate {
                    unroll::<FRAGMENTS>(|f| unroll::<2>(|i| store(f, i, column, 0)));
                    column += GROUP * WORKERS;
                }
                return;
            }
            shares.change(context, tile.rank);
            columns.change(tile.rank);
            // SAFETY: as the caller promises.
            let (h, h_row) = unsafe { receive::<E, ROWS>(context, &shares, tile.rows, received) };
            received += 1;
            columns.each_step(|at, count| {
                let me = thread::index_anew();
                let (warp, g, c) = (me % ROLE_THREADS / 32, me % 32 / 4, me % 4);
                // SAFETY: who fills the ring comes to the same stages.
                let stage = unsafe { ring.enter() };
                let mut group = GROUP * warp;
                while group < count {
                    let column_of = |i: usize| group + i as u32 * GROUP * WORKERS + 2 * g;
                    let mut sum = [[[0.0f32; 4]; FRAGMENTS]; CHAINS];
                    let mut rank = 0;
                    while rank < shares.rank {
                        let mut rows = [[[0; 4]; 2]; CHAINS];
                        unroll::<CHAINS>(|i| {
                            let column = column_of(i);
                            let exists = column < count && rank + 8 * c < columns.rank;
                            unroll::<2>(|row| {
                                let place =
                                    stage.offset(2 * ((column + row as u32) * columns.rank + rank) + 16 * c);
                                // SAFETY: the stage holds these columns up to the rank.
                                let elements = unsafe { place.load16_if(exists) };
                                // Above the rank the row may hold anything, NaN too.
                                rows[i][row] = if shares.rank.is_multiple_of(8) {
                                    elements
                                } else {
                                    keep_first(elements, shares.rank.saturating_sub(rank + 8 * c))
                                };
                            });
                        });
                        unroll::<FRAGMENTS>(|f| {
                            if f == 0 || 8 * (f as u32) < tile.rows {
                                // Pairs past the last are computed from it, and never stored.
                                let row = (8 * f as u32 + g).min(tile.rows - 1);
                                // SAFETY: h holds all runs of these ranks.
                                let h = unsafe { h.offset(row * h_row + 2 * rank + 16 * c).load16() };
                                unroll::<CHAINS>(|i| multiply::<E>(&mut sum[i][f], rows[i], h));
                            }
                        });
                        rank += RUN;
                    }
                    unroll::<CHAINS>(|chain| {
                        let column = column_of(chain);
                        if column < count {
                            unroll::<FRAGMENTS>(|f| {
                                unroll::<2>(|i| {
                                    let mut old = 0;
                                    let row = 8 * f as u32 + 2 * c + i as u32;
                                    if accumulate && row < tile.rows {
                                        let row = stage.offset(B_STAGE + row * old_row_bytes(count));
                                        // SAFETY: the stage holds the old values of these columns.
                                        old = unsafe { row.offset(2 * column).load() };
                                    }
                                    let [low, high] = E::unpack(old);
                                    let (sum, weight) = (sum[chain][f], weight[f][i]);
                                    let values = E::pack(sum[i] * weight + low, sum[i + 2] * weight + high);
                                    store(f, i, at + column, values);
                                });
                            });
                        }
                    });
                    group += CHAINS as u32 * GROUP * WORKERS;
                }
                // SAFETY: as above.
                unsafe { ring.leave() };
            });
        };
        // SAFETY: as the caller promises.
        unsafe { context.each_unit(ROWS, unit) };
    }

    /// The kernel, launched in clusters of a power of two of blocks. `FRAGMENTS`: of eight pairs each, of a tile of
    /// `ROWS`.
    ///
    /// # Safety
    /// As for the entry points: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn decode<E: Element, I: Index, const FRAGMENTS: usize, const ROWS: u32>(p: DecodeParams) {
        const { assert!(ROWS == 8 * FRAGMENTS as u32 && GROUP + ROWS <= 32) };
        let (block, blocks) = (cluster::block(), cluster::blocks());

        // The map of shared memory.
        let max_rank = p.route.max_rank;
        let found_at = Shared::base().offset(BARRIER_BYTES);
        let h = found_at.offset(p.room.shared_bytes());
        let sums = h.offset(2 * ROWS * row_bytes(max_rank.next_multiple_of(RUN)));
        let landings = sums.offset(WORKERS * ROWS * SUM_ROW);
        let start = Shared::base().offset(fixed_bytes(ROWS, max_rank, blocks, p.room));
        let shrink_ring = Ring {
            start,
            stages: p.shrink_stages,
            stage_bytes: const { shrink_stage_bytes(ROWS) },
            barriers: 0,
            stage: 0,
            parity: 0,
        };
        let expand_ring = Ring {
            start: start.offset(p.shrink_stages * const { shrink_stage_bytes(ROWS) }),
            stages: p.expand_stages,
            stage_bytes: const { expand_stage_bytes(ROWS) },
            barriers: 2 * MAX_STAGES,
            ..shrink_ring
        };

        if thread::index() == 0 {
            // SAFETY: nobody uses them yet.
            unsafe { init_barriers(&shrink_ring, &expand_ring, blocks) };
        }
        // No block may be sent anything before it has its barriers.
        cluster::arrive_relaxed();
        let context = Context { p: &p, found: Segments::at(found_at), block, blocks, h, sums, landings };
        let searches = p.finds != 0 && !p.room.lists_all();
        if searches {
            // SAFETY: the rings are not in use yet.
            unsafe { Segments::prepare(&p.route, expand_ring.start, &p.room) };
        }
        if p.finds != 0 && thread::index_anew() / 32 == LIST {
            Segments::ask_for_ids(&p.route);
        }
        barrier::sync();
        let warp = thread::warp();
        let ids = Ids::of(&p.route, if searches { thread::index() } else { thread::lane() });
        let mut shares = Shares::NONE;
        // What the search need not keep meanwhile.
        if !searches && warp == FILL {
            shares = Shares::new(&context, max_rank);
        }
        grid::wait_for_previous();
        grid::let_next_start();

        let first = context.first_unit();
        let [first_tile, first_slice] = p.tile_and_slice(first);
        // The number of tiles, and the tile of the cluster's first unit, whose pairs may not be listed yet.
        let (mut counts, mut tile) = ([0; 2], Tile::EMPTY);
        // SAFETY: as the caller promises; the rings are not in use yet.
        unsafe {
            if searches {
                let own = |entry| p.tile_and_slice(first + entry * p.clusters);
                (counts, tile) =
                    context.found.find::<ROWS>(&p.route, ids, own, block == 0, expand_ring.start, &p.room);
            } else if warp == FILL || warp == LIST {
                if p.finds != 0 {
                    let few = Few::find::<ROWS>(&p.route, ids);
                    if warp == FILL {
                        tile = few.tile::<ROWS>(&p.route, first_tile);
                    } else {
                        counts = context.found.list_few::<ROWS>(&p.route, &few, &p.room);
                    }
                } else {
                    counts = [count::ACTIVE, count::ALL].map(|count| p.route.counts.at(count).load());
                    if warp == FILL && first < p.units(counts) {
                        tile = context.unit(first, ROWS).tile;
                    }
                }
            }
        }
        if warp == LIST && thread::lane() == 0 {
            // SAFETY: the words are nobody else's.
            unsafe {
                unit_count().store(p.units(counts));
                (0..2).for_each(|i| tile_counts().offset(4 * i).store(counts[i as usize]));
            }
        }
        if searches {
            // The ring for expand held the scratch.
            bulk::fence();
        }
        warp::sync();
        if thread::lane() == 0 {
            // SAFETY: the barrier is initialised.
            unsafe { listed().arrive() };
        }

        // SAFETY: the launch before this one has ended; the warps of each role are whole, and come to `listed` before they read what is.
        unsafe {
            if warp == FILL {
                fill_a::<I>(&context, shares, shrink_ring, ROWS, Unit { tile, slice: first_slice });
            } else {
                listed().wait(0);
                if warp < EXPAND {
                    cluster::wait();
                    shrink::<E, FRAGMENTS, ROWS>(&context, shrink_ring);
                } else if warp < FILL {
                    cluster::wait();
                    expand::<E, I, FRAGMENTS, ROWS>(&context, expand_ring);
                } else if warp == LIST {
                    fill_x::<I, ROWS>(&context, shrink_ring);
                } else {
                    fill_expand::<I, ROWS>(&context, expand_ring);
                }
            }
            if warp >= FILL {
                // Not earlier: a store to device memory before the block meets costs 0.2 µs.
                if p.finds != 0 && thread::block() == 0 && warp == LIST {
                    let counts = [0, 4].map(|word| tile_counts().offset(word).load());
                    context.found.keep(&p.route, &p.room, counts);
                }
                cluster::wait();
            }
        }
        // No block may end while another may still send to it.
        cluster::arrive_relaxed();
        cluster::wait();
    }
}
