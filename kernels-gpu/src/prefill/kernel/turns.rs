//! What a block takes, one after another: passes over tiles, or shares of them. Producer and consumers take the same.

use super::steps::rank_shift;
use crate::arch::mbarrier::{self, Mbarrier};
use crate::arch::shared::Shared;
use crate::arch::{thread, warp};
use crate::params::{PrefillParams, Tile, products};
use crate::prefill::{BARRIERS_BYTES, MIN_COLUMNS, Shape, WARPGROUP};

/// Words that a block is told its turns by: one while the other is read.
const TOLD: u32 = 2;

/// In place of a turn past the last.
const NO_TURN: u32 = u32::MAX;

/// Where their barriers begin, and then they: in what the ring's barriers leave.
const TURNS_OFFSET: u32 = BARRIERS_BYTES / 2;

/// What a block takes in one turn: a pass over the pairs of a tile, or a share of one.
pub(super) struct Turn {
    /// The tile; of no pairs when there are no more.
    pub tile: Tile,
    /// What is taken of its slices.
    pub pass: Pass,
    /// The pass's number in the launch.
    pub number_of_pass: u32,
    /// What is done: [`products`].
    pub does: u32,
    /// Which share of K, or of the columns.
    pub share: u32,
}

impl Turn {
    /// None.
    const NONE: Self = Turn { tile: Tile::EMPTY, pass: Pass::NONE, number_of_pass: 0, does: 0, share: 0 };

    /// Whether x and `a` are multiplied.
    #[inline(always)]
    pub fn shrinks(&self) -> bool {
        self.does & products::SHRINK != 0 && self.tile.rank > 0
    }

    /// Whether h comes from an earlier call.
    #[inline(always)]
    pub fn takes_h(&self, p: &PrefillParams) -> bool {
        p.products == products::EXPAND && self.tile.rank > 0
    }

    /// Elements of K that are shrunk: the first, and the end.
    ///
    /// # Safety
    /// The route must be written.
    #[inline(always)]
    pub unsafe fn depth(&self, p: &PrefillParams) -> (u32, u32) {
        if p.split_k.count == 0 {
            (0, p.in_dim)
        } else {
            // SAFETY: as the caller promises.
            let shares = unsafe { DepthShares::new(p) };
            part(self.share, p.split_k.each << shares.shift, p.in_dim)
        }
    }

    /// Columns of a slice that are expanded.
    #[inline(always)]
    pub fn columns(&self, p: &PrefillParams) -> (u32, u32) {
        part(self.share, p.split_n.each, p.out_dim)
    }
}

/// What share `share` has of `length` elements, `each` a share: the first, and the end.
#[inline(always)]
fn part(share: u32, each: u32, length: u32) -> (u32, u32) {
    let first = share * each;
    (first, length.min(first + each))
}

/// How many shares of K the passes of a launch have: as many as the planner wants, or so few that no block has more than one.
///
/// A block adds up h once all shares of its pass have left their sums, and its producer has taken a turn ahead by then: if that were another share
/// of the pass, it would wait for itself.
#[derive(Clone, Copy)]
pub(super) struct DepthShares {
    /// So many are as one, as a power of two.
    shift: u32,
}

impl DepthShares {
    /// Those of this launch. To be asked for where they are needed: they take no registers elsewhere.
    ///
    /// # Safety
    /// The route must be written.
    #[inline(always)]
    pub unsafe fn new(p: &PrefillParams) -> Self {
        // SAFETY: as the caller promises.
        let passes = unsafe { Turns::passes(p) };
        let mut these = DepthShares { shift: 0 };
        while passes * these.count(p) > p.blocks && these.count(p) > 1 {
            these.shift += 1;
        }
        these
    }

    /// Shares of a pass; 0 where blocks do not share.
    #[inline(always)]
    pub fn count(self, p: &PrefillParams) -> u32 {
        (p.split_k.count + (1 << self.shift) - 1) >> self.shift
    }
}

/// The turns of a block, one after another: the first by its number in the grid, then whichever comes next when the block has
/// room for it, so that who has small tiles takes more of them. The producer's first thread *calls* for a turn, from a counter that all
/// blocks share, and tells the block through one of [`TOLD`] words, each of which has two barriers, as a stage of the ring has.
///
/// For each turn that is taken there is one call: as many as the launch has turns, after which the counter is where it was.
pub(super) struct Turns {
    shape: Shape,
    /// Turns taken so far.
    taken: u32,
}

impl Turns {
    /// Makes the barriers ready, as those of the [`Ring`](super::ring::Ring).
    ///
    /// # Safety
    /// They must not be in use.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn init(shape: Shape) {
        for word in 0..TOLD {
            // SAFETY: as the caller promises.
            unsafe {
                Self::told(word).init(1);
                Self::heard(word).init(shape.threads() / 32);
            }
        }
    }

    /// Before the first turn.
    #[inline(always)]
    pub fn new(shape: Shape) -> Self {
        Turns { shape, taken: 0 }
    }

    #[inline(always)]
    fn told(word: u32) -> Mbarrier {
        Mbarrier::at(Shared::base().offset(TURNS_OFFSET + word * mbarrier::BYTES))
    }

    #[inline(always)]
    fn heard(word: u32) -> Mbarrier {
        Mbarrier::at(Shared::base().offset(TURNS_OFFSET + (TOLD + word) * mbarrier::BYTES))
    }

    #[inline(always)]
    fn number(word: u32) -> Shared {
        Shared::base().offset(TURNS_OFFSET + 2 * TOLD * mbarrier::BYTES + word * 4)
    }

    /// By which word the block is told the turn after those that were taken, and in which phase.
    #[inline(always)]
    fn word(&self) -> (u32, u32) {
        let told = self.taken - 1;
        (told % TOLD, told / TOLD % 2)
    }

    /// Passes of the launch.
    ///
    /// # Safety
    /// The route must be written.
    #[inline(always)]
    unsafe fn passes(p: &PrefillParams) -> u32 {
        // SAFETY: it is one element.
        unsafe { p.tile_count.load() * p.tile_parts * p.passes }
    }

    /// Turns of the launch.
    ///
    /// # Safety
    /// As for [`Turns::passes`].
    #[inline(always)]
    unsafe fn count(p: &PrefillParams) -> u32 {
        // SAFETY: as the caller promises.
        unsafe { Self::passes(p) * (DepthShares::new(p).count(p) + p.split_n.count) }
    }

    /// The next turn that has something to do. `CALLS`: in the producer, which must [call](Turns::call) before it comes here again.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say, the route be written, and the barriers be ready; the whole warp must come
    /// here.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn take<const CALLS: bool>(&mut self, p: &PrefillParams) -> Turn {
        let mut turn = Turn::NONE;
        loop {
            // SAFETY: as the caller promises.
            let number = unsafe { if self.taken == 0 { Self::first(p) } else { self.hear() } };
            self.taken += 1;
            if number == NO_TURN {
                break;
            }
            // SAFETY: as the caller promises; the number is below the launch's.
            turn = unsafe { self.turn(p, number) };
            if turn.tile.rows > 0 {
                break;
            }
            if CALLS {
                // SAFETY: as the caller promises.
                unsafe { self.call(p) };
            }
        }
        turn
    }

    /// The number of the block's first turn.
    ///
    /// # Safety
    /// As for [`Turns::count`].
    #[inline(always)]
    unsafe fn first(p: &PrefillParams) -> u32 {
        // SAFETY: as the caller promises.
        if thread::block() < unsafe { Self::count(p) } { thread::block() } else { NO_TURN }
    }

    /// The number that the block was told.
    ///
    /// # Safety
    /// As for [`Turns::take`].
    #[inline(always)]
    #[track_caller]
    unsafe fn hear(&self) -> u32 {
        let (word, parity) = self.word();
        // SAFETY: as the caller promises; who told it wrote it before.
        unsafe {
            Self::told(word).wait(parity);
            let number = Self::number(word).load();
            warp::sync();
            if thread::index_anew().is_multiple_of(32) {
                Self::heard(word).arrive();
            }
            number
        }
    }

    /// Calls for the turn after the one that was taken, and tells it. It takes the producer as long as a read of memory: best where the ring
    /// is full.
    ///
    /// # Safety
    /// As for [`Turns::take`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn call(&self, p: &PrefillParams) {
        if thread::index_anew().is_multiple_of(WARPGROUP) {
            let (word, parity) = self.word();
            // SAFETY: as the caller promises; who was told by the word before has heard it when it is written.
            unsafe {
                let count = Self::count(p);
                let number = p.blocks + p.scheduler.count_up(count - 1);
                Self::heard(word).wait(parity ^ 1);
                Self::number(word).store(if number < count { number } else { NO_TURN });
                Self::told(word).arrive();
            }
        }
    }

    /// What turn `number` is; of no pairs where a tile or its slices end before it.
    ///
    /// The passes over a tile are neighbours, so that blocks which take them at the same time find the tile's rows of x in L2. Where blocks share passes, the
    /// shares of K of all come before those of columns.
    ///
    /// # Safety
    /// As for [`Turns::take`]; the number must be below the launch's.
    #[inline(always)]
    unsafe fn turn(&self, p: &PrefillParams, number: u32) -> Turn {
        let (mut number, mut does, mut shares) = (number, p.products, p.split_n.count);
        if p.split_k.count > 0 {
            // SAFETY: as the caller promises.
            let (passes, of_depth) = unsafe { (Self::passes(p), DepthShares::new(p).count(p)) };
            does = products::EXPAND;
            if number < passes * of_depth {
                (does, shares) = (products::SHRINK, of_depth);
            } else {
                number -= passes * of_depth;
            }
        }
        let pass = number.checked_div(shares).unwrap_or(0);
        let share = number - pass * shares;
        let number_of_pass = pass;
        let part = p.over_passes.quotient(pass);
        let number_of_tile = p.over_parts.quotient(part);
        // SAFETY: the tile is one of those counted.
        let tile = unsafe { p.tiles.at(number_of_tile).load_tile() };
        let tile = tile.part(part - number_of_tile * p.tile_parts, self.shape.rows);
        let pass = Pass::of(p, tile.rank, pass - part * p.passes, self.shape.width);
        let mut turn = Turn { tile, pass, number_of_pass, does, share };
        if turn.pass.first >= p.slices {
            turn.tile.rows = 0;
        }
        turn
    }
}

/// What a pass takes of a tile.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    /// Its first slice.
    pub first: u32,
    /// The slice after its last.
    pub end: u32,
}

impl Pass {
    const NONE: Self = Pass { first: 0, end: 0 };

    /// Pass `number`, with columns of h for `width`; with no slices where the passes before it take all.
    #[inline(always)]
    fn of(p: &PrefillParams, rank: u32, number: u32, width: u32) -> Self {
        let shift = rank_shift(rank);
        let first = number * (width >> shift);
        let slices = (width >> shift).min(p.slices.saturating_sub(first));
        Pass { first, end: first + slices }
    }

    /// Columns of h that its products have for a tile of this rank: all ranks of its slices, and to the next size of a product.
    #[inline(always)]
    pub fn columns(&self, rank: u32) -> u32 {
        ((self.end - self.first) << rank_shift(rank)).next_power_of_two().max(MIN_COLUMNS)
    }
}
