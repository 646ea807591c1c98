//! `align`: sorts the pairs of each adapter slot into blocks of one expert each, filled up with a number that
//! is no pair: what vLLM 0.33.0's `moe_lora_align_block_size` leaves, for kernels that take a route so.
//!
//! A *team* (one block, or from sm_90 on a cluster of eight) sorts the pairs of one slot, whose row of each
//! output it writes: a counting sort with one counter an expert, in shared memory. The segment of an expert
//! begins at a multiple of the block size. Within it, which pair comes first is up to the order of atomic
//! additions, as it is in vLLM.
//!
//! The row is filled with P while pairs are counted, and pairs are stored over that. The pair that comes
//! first in its block also stores the block's expert.
//!
//! Shared memory:
//!
//! | words | what |
//! |---|---|
//! | E | pairs that this block counted, one an expert |
//! | E | where this block's next pair of an expert goes |
//! | 2 a warp | scan |
//! | 1 | how often the slot is listed |

/// Threads of a block.
pub const THREADS: u32 = 1024;

/// Blocks of the clustered form: as many as every device with clusters allows.
pub const CLUSTER: u32 = 8;

/// Most experts: two words each are 64 KiB of shared memory, which every device since sm_80 has.
pub const MAX_EXPERTS: u32 = 8 * 1024;

/// Bytes of shared memory of a block.
pub const fn shared_bytes(experts: u32) -> u32 {
    (2 * experts + 2 * THREADS / 32 + 1) * 4
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::align;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::THREADS;
    #[cfg(any(feature = "sm_90", feature = "emulate"))]
    use crate::arch::cluster;
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, grid, thread};
    use crate::ids::ExpertId;
    use crate::memory::Global;
    use crate::params::AlignParams;
    use crate::scan::scan;
    use crate::slots::Slots;
    use crate::tile::{quotient, unroll};

    /// Pairs that a thread looks up at a time, so that their loads overlap.
    const BATCH: usize = 4;

    /// The blocks that sort the pairs of one slot: `SIZE` of them, a cluster where they are several.
    #[derive(Clone, Copy)]
    struct Team<const SIZE: u32>;

    impl<const SIZE: u32> Team<SIZE> {
        /// Number of this block.
        #[inline(always)]
        fn block(self) -> u32 {
            #[cfg(any(feature = "sm_90", feature = "emulate"))]
            if SIZE > 1 {
                return cluster::block();
            }
            0
        }

        /// All threads of all blocks meet.
        #[inline(always)]
        fn sync(self) {
            #[cfg(any(feature = "sm_90", feature = "emulate"))]
            if SIZE > 1 {
                return cluster::sync();
            }
            barrier::sync();
        }

        /// The word at `place` in the memory of block `block`.
        ///
        /// # Safety
        /// As for [`Shared::load`].
        #[inline(always)]
        unsafe fn load(self, place: Shared, block: u32) -> u32 {
            #[cfg(any(feature = "sm_90", feature = "emulate"))]
            if SIZE > 1 {
                // SAFETY: as the caller promises.
                return unsafe { place.in_block(block).load() };
            }
            // There is one block.
            let _ = block;
            // SAFETY: as the caller promises.
            unsafe { place.load() }
        }
    }

    /// The pairs that one thread handles: every so many, in batches whose loads overlap.
    #[derive(Clone, Copy)]
    struct Batches {
        first: u32,
        stride: u32,
        count: u32,
    }

    impl Batches {
        /// Calls `body` with each batch; a pair that does not exist is `None`.
        #[inline(always)]
        fn each(self, mut body: impl FnMut([Option<u32>; BATCH])) {
            let mut first = self.first;
            while first < self.count {
                let mut pairs = [None; BATCH];
                unroll::<BATCH>(|i| {
                    let pair = first + i as u32 * self.stride;
                    pairs[i] = (pair < self.count).then_some(pair);
                });
                body(pairs);
                first += BATCH as u32 * self.stride;
            }
        }
    }

    /// The local experts of those pairs that belong to `slot`; E for all others. One unsigned comparison a
    /// number catches −1 and everything else that is out of range.
    ///
    /// # Safety
    /// The pairs must be among P, and the tensors of `p` as their fields say.
    #[inline(always)]
    unsafe fn experts_of(p: &AlignParams, slot: u32, pairs: [Option<u32>; BATCH]) -> [u32; BATCH] {
        let (mut slots, mut ids, mut experts) = ([0; BATCH], [0; BATCH], [p.experts; BATCH]);
        unroll::<BATCH>(|i| {
            if let Some(pair) = pairs[i] {
                // SAFETY: the pair is one of P, its token one of T.
                unsafe {
                    slots[i] = p.token_lora.at(p.top_k.quotient(pair)).load();
                    ids[i] = ExpertId::of(p.topk_ids, p.ids_kind, pair).load_if(true);
                }
            }
        });
        unroll::<BATCH>(|i| {
            if pairs[i].is_some() && slots[i] == slot && ids[i] < p.global_experts {
                let local = if p.expert_map.is_null() {
                    ids[i]
                } else {
                    // SAFETY: the expert is one of `global_experts`.
                    unsafe { p.expert_map.at(ids[i]).load() }
                };
                experts[i] = local.min(p.experts);
            }
        });
        experts
    }

    /// Where things are in shared memory.
    #[derive(Clone, Copy)]
    struct Map {
        start: Shared,
        experts: u32,
    }

    impl Map {
        /// Pairs that this block counted of an expert.
        #[inline(always)]
        fn count(self, expert: u32) -> Shared {
            self.start.offset(4 * expert)
        }

        /// Where this block's next pair of an expert goes.
        #[inline(always)]
        fn place(self, expert: u32) -> Shared {
            self.count(self.experts + expert)
        }

        /// For a sum over the block.
        #[inline(always)]
        fn scan(self) -> Shared {
            self.count(2 * self.experts)
        }

        /// How often the slot is listed.
        #[inline(always)]
        fn listed(self) -> Shared {
            self.scan().offset(4 * 2 * THREADS / 32)
        }
    }

    /// A team, its slot, and what this thread takes of the slot's row.
    struct Row<'p, const SIZE: u32> {
        p: &'p AlignParams,
        team: Team<SIZE>,
        map: Map,
        slot: u32,
        /// Number of this thread in the team.
        member: u32,
        /// The row of `sorted`, and that of `block_experts`.
        sorted: Global<u32>,
        experts: Global<u32>,
    }

    /// The kernel: L teams of `SIZE` blocks of [`THREADS`].
    ///
    /// # Safety
    /// As for the entry point: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn align<const SIZE: u32>(p: AlignParams) {
        let row = Row::<SIZE>::new(&p);
        grid::wait();
        grid::launch_dependents();
        // SAFETY: the tensors are as their fields say. The team meets between counting and placing, and again
        // before pairs are stored: then the row is filled, and nobody reads another block's counters any
        // more.
        unsafe {
            // A slot that is off, or not listed, has no row: what its outputs hold stays.
            if !row.is_wanted() {
                return;
            }
            row.fill();
            row.count();
            row.team.sync();
            row.place();
            row.team.sync();
            row.store();
        }
    }

    impl<'p, const SIZE: u32> Row<'p, SIZE> {
        /// That of this block's team.
        #[inline(always)]
        fn new(p: &'p AlignParams) -> Self {
            let (team, map) = (Team::<SIZE>, Map { start: Shared::base(), experts: p.experts });
            let slot = thread::block() / SIZE;
            let member = team.block() * THREADS + thread::index();
            let sorted = p.sorted.at(slot * p.max_padded);
            let experts = p.block_experts.at(slot * p.max_blocks);
            Row { p, team, map, slot, member, sorted, experts }
        }

        /// Whether the slot is on, and listed. Zeroes the counters, too.
        ///
        /// # Safety
        /// The whole block must come here, and the tensors be as their fields say.
        #[inline(always)]
        unsafe fn is_wanted(&self) -> bool {
            let (p, map) = (self.p, self.map);
            let &AlignParams { adapter_enabled, enabled_kind, slots, .. } = p;
            let slots =
                Slots { adapter_enabled, enabled_kind, ranks: Global::NULL, count: slots, max_rank: 1 };
            // SAFETY: the flags are as their field says.
            let on = unsafe { slots.rank(self.slot) } > 0;
            let mut found = false;
            let mut i = thread::index();
            while i < p.lora_count {
                // SAFETY: one of `lora_count` ids.
                found |= unsafe { p.lora_ids.at(i).load() } == self.slot;
                i += THREADS;
            }
            let mut i = thread::index();
            while i < p.experts {
                // SAFETY: one counter an expert.
                unsafe { map.count(i).store(0) };
                i += THREADS;
            }
            if thread::index() == 0 {
                // SAFETY: one word.
                unsafe { map.listed().store(0) };
            }
            barrier::sync();
            if found {
                // SAFETY: one word.
                unsafe { map.listed().fetch_add(1) };
            }
            barrier::sync();
            // SAFETY: the word was written before the barrier.
            on && unsafe { map.listed().load() } != 0
        }

        /// Fills the row with P, which is no pair.
        ///
        /// # Safety
        /// The tensors must be as their fields say.
        #[inline(always)]
        unsafe fn fill(&self) {
            let mut i = self.member;
            while i < self.p.max_padded {
                // SAFETY: one of `max_padded` elements.
                unsafe { self.sorted.at(i).store(self.p.pair_count) };
                i += SIZE * THREADS;
            }
        }

        /// This thread's pairs.
        #[inline(always)]
        fn pairs(&self) -> Batches {
            Batches { first: self.member, stride: SIZE * THREADS, count: self.p.pair_count }
        }

        /// Counts the slot's pairs by expert.
        ///
        /// # Safety
        /// The counters must be zeros, and the tensors be as their fields say.
        #[inline(always)]
        unsafe fn count(&self) {
            self.pairs().each(|pairs| {
                // SAFETY: the pairs are among P.
                let experts = unsafe { experts_of(self.p, self.slot, pairs) };
                unroll::<BATCH>(|i| {
                    if experts[i] < self.p.experts {
                        // SAFETY: one counter an expert.
                        unsafe { self.map.count(experts[i]).fetch_add(1) };
                    }
                });
            });
        }

        /// Pairs of an expert that the blocks before this one have counted, and the whole segment with its
        /// padding.
        ///
        /// # Safety
        /// All blocks of the team must have counted.
        #[inline(always)]
        unsafe fn counted(&self, expert: u32) -> (u32, u32) {
            let (team, block_size) = (self.team, self.p.block_size);
            let (mut before, mut all) = (0, 0);
            unroll::<8>(|other| {
                if (other as u32) < SIZE {
                    // SAFETY: one counter an expert, in every block.
                    let pairs = unsafe { team.load(self.map.count(expert), other as u32) };
                    before += if (other as u32) < team.block() { pairs } else { 0 };
                    all += pairs;
                }
            });
            (before, quotient(all + block_size - 1, block_size) * block_size)
        }

        /// Turns the counts of all blocks into places of this one. Each thread takes a run of experts. This
        /// block's pairs come after those of the blocks before it. Also stores how long the row is, and ends
        /// the row of experts.
        ///
        /// # Safety
        /// All blocks of the team must have counted, and the whole block come here.
        #[inline(always)]
        unsafe fn place(&self) {
            let p = self.p;
            let run = p.experts.div_ceil(THREADS);
            let from = p.experts.min(thread::index() * run);
            let to = p.experts.min(from + run);
            let mut padded = 0;
            let mut i = from;
            while i < to {
                // SAFETY: as the caller promises.
                padded += unsafe { self.counted(i) }.1;
                i += 1;
            }
            let ([mut start, _], [total, _]) = scan::<THREADS, 2>(self.map.scan(), [padded, 0]);
            let mut i = from;
            while i < to {
                // SAFETY: as the caller promises; one place an expert.
                unsafe {
                    let (before, padded) = self.counted(i);
                    self.map.place(i).store(start + before);
                    start += padded;
                }
                i += 1;
            }
            if self.member == 0 {
                // SAFETY: one element a slot.
                unsafe { p.padded_counts.at(self.slot).store(total) };
            }
            let mut i = quotient(total, p.block_size) + self.member;
            while i < p.max_blocks {
                // SAFETY: one of `max_blocks` elements.
                unsafe { self.experts.at(i).store(u32::MAX) };
                i += SIZE * THREADS;
            }
        }

        /// Stores each pair at its place, and the expert of each block.
        ///
        /// # Safety
        /// The places must be there, and the row be filled.
        #[inline(always)]
        unsafe fn store(&self) {
            let p = self.p;
            self.pairs().each(|pairs| {
                // SAFETY: the pairs are among P.
                let experts = unsafe { experts_of(p, self.slot, pairs) };
                unroll::<BATCH>(|i| {
                    if let (Some(pair), true) = (pairs[i], experts[i] < p.experts) {
                        // SAFETY: one place an expert, which hands out each position once; a position past
                        // the row's end, which only ids that change meanwhile lead to, is not written.
                        unsafe {
                            let position = self.map.place(experts[i]).fetch_add(1);
                            let block = quotient(position, p.block_size);
                            if position < p.max_padded && block < p.max_blocks {
                                self.sorted.at(position).store(pair);
                                if position == block * p.block_size {
                                    self.experts.at(block).store(experts[i]);
                                }
                            }
                        }
                    }
                });
            });
        }
    }
}
