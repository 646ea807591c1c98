//! `align`: sorts the pairs of each adapter slot into blocks of one expert each, filled up with a number that
//! is no pair: what vLLM 0.33.0's `moe_lora_align_block_size` leaves, for kernels that take a route so.
//!
//! A *team* (one block, or from sm_90 on a cluster of eight) sorts the pairs of one slot, whose row of each
//! output it writes: a counting sort with one counter an expert, in shared memory. The segment of an expert
//! begins at a multiple of the block size. Within it, which pair comes first is up to the order of atomic
//! additions, as it is in vLLM.
//!
//! The row is filled with P while pairs are counted, and pairs are stored over that. The pair that comes first
//! in its block also stores the block's expert.
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
    use crate::memory::Global;
    use crate::params::AlignParams;
    use crate::scan::scan;
    use crate::slots::Slots;
    use crate::tile::{quotient, unroll};

    /// Pairs that a thread looks up at a time, so that their loads overlap.
    const BATCH: usize = 4;

    /// The blocks that sort together.
    #[derive(Clone, Copy)]
    struct Team<const BLOCKS: u32>;

    impl<const BLOCKS: u32> Team<BLOCKS> {
        /// Number of this block.
        #[inline(always)]
        fn block(self) -> u32 {
            #[cfg(any(feature = "sm_90", feature = "emulate"))]
            if BLOCKS > 1 {
                return cluster::block();
            }
            0
        }

        /// All threads of all blocks meet.
        #[inline(always)]
        fn sync(self) {
            #[cfg(any(feature = "sm_90", feature = "emulate"))]
            if BLOCKS > 1 {
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
            if BLOCKS > 1 {
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
                    ids[i] = p.topk_ids.at(pair).load();
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

    /// The kernel: L teams of `BLOCKS` blocks of [`THREADS`].
    ///
    /// # Safety
    /// As for the entry point: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn align<const BLOCKS: u32>(p: AlignParams) {
        let team = Team::<BLOCKS>;
        let slot = thread::block() / BLOCKS;
        let member = team.block() * THREADS + thread::index();
        let count = |expert: u32| Shared::base().offset(4 * expert);
        let place = |expert: u32| count(p.experts + expert);
        let scratch = count(2 * p.experts);
        let listed = scratch.offset(4 * 2 * THREADS / 32);

        grid::wait();
        grid::launch_dependents();

        // 1. A slot that is off, or not listed, has no row: what its outputs hold stays.
        let AlignParams { adapter_enabled, enabled_kind, slots, .. } = p;
        let slots = Slots { adapter_enabled, enabled_kind, ranks: Global::NULL, count: slots, max_rank: 1 };
        // SAFETY: the flags are as their field says.
        let on = unsafe { slots.rank(slot) } > 0;
        let mut found = false;
        let mut i = thread::index();
        while i < p.lora_count {
            // SAFETY: one of `lora_count` ids.
            found |= unsafe { p.lora_ids.at(i).load() } == slot;
            i += THREADS;
        }
        let mut i = thread::index();
        while i < p.experts {
            // SAFETY: one counter an expert.
            unsafe { count(i).store(0) };
            i += THREADS;
        }
        if thread::index() == 0 {
            // SAFETY: one word.
            unsafe { listed.store(0) };
        }
        barrier::sync();
        if found {
            // SAFETY: one word.
            unsafe { listed.fetch_add(1) };
        }
        barrier::sync();
        // SAFETY: the word was written before the barrier.
        if !on || unsafe { listed.load() } == 0 {
            return;
        }

        // 2. Fill the row, and count the slot's pairs.
        let row = p.sorted.at(slot * p.max_padded);
        let blocks = p.block_experts.at(slot * p.max_blocks);
        let mut i = member;
        while i < p.max_padded {
            // SAFETY: one of `max_padded` elements.
            unsafe { row.at(i).store(p.pair_count) };
            i += BLOCKS * THREADS;
        }
        let mine = Batches { first: member, stride: BLOCKS * THREADS, count: p.pair_count };
        mine.each(|pairs| {
            // SAFETY: the pairs are among P.
            let experts = unsafe { experts_of(&p, slot, pairs) };
            unroll::<BATCH>(|i| {
                if experts[i] < p.experts {
                    // SAFETY: one counter an expert.
                    unsafe { count(experts[i]).fetch_add(1) };
                }
            });
        });
        team.sync();

        // 3. Each thread takes a run of experts: counts of all blocks become places of this one.
        let run = p.experts.div_ceil(THREADS);
        let from = p.experts.min(thread::index() * run);
        let to = p.experts.min(from + run);
        // This block's pairs come after those of the blocks before it.
        let counted = |expert: u32| {
            let (mut before, mut all) = (0, 0);
            unroll::<8>(|other| {
                if (other as u32) < BLOCKS {
                    // SAFETY: one counter an expert, in every block.
                    let pairs = unsafe { team.load(count(expert), other as u32) };
                    before += if (other as u32) < team.block() { pairs } else { 0 };
                    all += pairs;
                }
            });
            (before, quotient(all + p.block_size - 1, p.block_size) * p.block_size)
        };
        let mut padded = 0;
        let mut i = from;
        while i < to {
            padded += counted(i).1;
            i += 1;
        }
        let ([mut start, _], [total, _]) = scan::<THREADS, 2>(scratch, [padded, 0]);
        let mut i = from;
        while i < to {
            let (before, padded) = counted(i);
            // SAFETY: one place an expert.
            unsafe { place(i).store(start + before) };
            start += padded;
            i += 1;
        }
        if member == 0 {
            // SAFETY: one element a slot.
            unsafe { p.padded_counts.at(slot).store(total) };
        }
        let mut i = quotient(total, p.block_size) + member;
        while i < p.max_blocks {
            // SAFETY: one of `max_blocks` elements.
            unsafe { blocks.at(i).store(u32::MAX) };
            i += BLOCKS * THREADS;
        }
        // The row is filled, the places are there, and nobody reads another block's counters any more.
        team.sync();

        // 4. Each pair to its place.
        mine.each(|pairs| {
            // SAFETY: the pairs are among P.
            let experts = unsafe { experts_of(&p, slot, pairs) };
            unroll::<BATCH>(|i| {
                if let (Some(pair), true) = (pairs[i], experts[i] < p.experts) {
                    // SAFETY: one place an expert, which hands out each position once; a position past the
                    // row's end, which only ids that change meanwhile lead to, is not written.
                    unsafe {
                        let position = place(experts[i]).fetch_add(1);
                        let block = quotient(position, p.block_size);
                        if position < p.max_padded && block < p.max_blocks {
                            row.at(position).store(pair);
                            if position == block * p.block_size {
                                blocks.at(block).store(experts[i]);
                            }
                        }
                    }
                }
            });
        });
    }
}
