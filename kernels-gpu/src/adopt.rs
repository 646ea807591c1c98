//! `adopt`: makes a route of pairs that somebody else has sorted into blocks, as [`crate::align`] and vLLM's
//! `moe_lora_align_block_size` leave them.
//!
//! Each block in use becomes one tile, of as many rows as it holds pairs. One warp copies its pairs, without
//! the padding, to the place of the tile in the list of pairs: tile number times block size. The blocks in
//! use are counted slot by slot from `padded_counts`. Every thread block counts for itself, so none waits for
//! another. Ids are untrusted: whatever is no pair is left out, and whatever is no slot or expert leaves its
//! tile without rows.
//!
//! Shared memory:
//!
//! | words | what |
//! |---|---|
//! | L | how many blocks a slot has, then the number of its first |
//! | L | how often a slot is listed |
//! | 2 a warp | scan |

/// Threads of a block.
pub const THREADS: u32 = 128;

/// Tiles of a block: one a warp.
pub const TILES: u32 = THREADS / 32;

/// Most slots: two words each are 64 KiB of shared memory, which every device since sm_80 has.
pub const MAX_SLOTS: u32 = 8 * 1024;

/// Most pairs of a block: eight a lane.
pub const MAX_BLOCK_SIZE: u32 = 256;

/// Bytes of shared memory of a block.
pub const fn shared_bytes(slots: u32) -> u32 {
    (2 * slots + 2 * TILES) * 4
}

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
pub use kernel::adopt;

#[cfg(any(target_arch = "nvptx64", feature = "emulate"))]
mod kernel {
    use super::{THREADS, TILES};
    use crate::arch::shared::Shared;
    use crate::arch::{barrier, grid, thread};
    use crate::params::{AdoptParams, Tile, count};
    use crate::scan::{inclusive, scan};
    use crate::slots::Slots;
    use crate::tile::{quotient, unroll};

    /// Where things are in shared memory: two words a slot.
    #[derive(Clone, Copy)]
    struct Map {
        start: Shared,
        slots: u32,
    }

    impl Map {
        /// How many blocks a slot has, then the number of its first.
        #[inline(always)]
        fn word(self, slot: u32) -> Shared {
            self.start.offset(4 * slot)
        }

        /// How often a slot is listed.
        #[inline(always)]
        fn listed(self, slot: u32) -> Shared {
            self.word(self.slots + slot)
        }

        /// For a sum over the block.
        #[inline(always)]
        fn scan(self) -> Shared {
            self.word(2 * self.slots)
        }
    }

    /// The kernel.
    ///
    /// # Safety
    /// As for the entry point: every tensor of `p` must be as its field says.
    #[inline(always)]
    pub unsafe fn adopt(p: AdoptParams) {
        let &AdoptParams { adapter_enabled, enabled_kind, ranks, slots: count, max_rank, .. } = &p;
        let slots = Slots { adapter_enabled, enabled_kind, ranks, count, max_rank };
        let map = Map { start: Shared::base(), slots: p.slots };
        grid::wait();
        grid::launch_dependents();

        // SAFETY: the tensors are as their fields say.
        let total = unsafe { number_blocks(&p, map, slots) };
        // More blocks than P pairs can fill are a caller's mistake: those past the room are left out.
        let total = total.min(p.most_tiles);
        if thread::block() == 0 && thread::index() == 0 {
            // SAFETY: `counts` has `count::LEN` elements.
            unsafe {
                p.counts.at(count::ACTIVE).store(total);
                p.counts.at(count::ALL).store(total);
            }
        }
        let number = thread::block() * TILES + thread::warp();
        if number < total {
            // SAFETY: there is such a block, and room for its tile.
            unsafe { make_tile(&p, map, slots, number) };
        }
    }

    /// Counts the blocks of each slot, and numbers them slot by slot: leaves the number of each slot's first
    /// block, and returns how many there are. The whole block must come here.
    ///
    /// # Safety
    /// The tensors of `p` must be as their fields say.
    #[inline(always)]
    unsafe fn number_blocks(p: &AdoptParams, map: Map, slots: Slots) -> u32 {
        // How many blocks each slot has, listed or not. Each thread takes a run of slots. The first id of the
        // list is loaded meanwhile. SAFETY: one of `lora_count` ids.
        let listed = |i: u32| if i < p.lora_count { unsafe { p.lora_ids.at(i).load() } } else { u32::MAX };
        let mut id = listed(thread::index());
        let run = p.slots.div_ceil(THREADS);
        let from = p.slots.min(thread::index() * run);
        let to = p.slots.min(from + run);
        let mut slot = from;
        while slot < to {
            // SAFETY: two words a slot; the tensors are as their fields say.
            unsafe {
                let padded = (p.padded_counts.at(slot).load() as i32).max(0) as u32;
                let blocks = quotient(padded + p.block_size - 1, p.block_size).min(p.usable_blocks);
                map.word(slot).store(if slots.rank(slot) > 0 { blocks } else { 0 });
                map.listed(slot).store(0);
            }
            slot += 1;
        }
        barrier::sync();

        // Which slots are listed.
        let mut i = thread::index();
        while i < p.lora_count {
            if id < p.slots {
                // SAFETY: two words a slot.
                unsafe { map.listed(id).fetch_add(1) };
            }
            i += THREADS;
            id = listed(i);
        }
        barrier::sync();

        // Of those, the number of the first block.
        let blocks_of = |slot: u32| {
            // SAFETY: two words a slot.
            unsafe { if map.listed(slot).load() > 0 { map.word(slot).load() } else { 0 } }
        };
        let mut blocks = 0;
        let mut slot = from;
        while slot < to {
            blocks += blocks_of(slot);
            slot += 1;
        }
        let ([mut first, _], [total, _]) = scan::<THREADS, 2>(map.scan(), [blocks, 0]);
        let mut slot = from;
        while slot < to {
            let blocks = blocks_of(slot);
            // SAFETY: two words a slot.
            unsafe { map.word(slot).store(first) };
            first += blocks;
            slot += 1;
        }
        barrier::sync();
        total
    }

    /// The slot of a block: the last one that begins at its number or before.
    ///
    /// # Safety
    /// The blocks must be numbered.
    #[inline(always)]
    unsafe fn slot_of(map: Map, number: u32) -> u32 {
        let (mut slot, mut end) = (0, map.slots);
        while end - slot > 1 {
            let middle = (slot + end) / 2;
            // SAFETY: two words a slot.
            if unsafe { map.word(middle).load() } <= number {
                slot = middle;
            } else {
                end = middle;
            }
        }
        slot
    }

    /// Makes a tile of block `number`: copies its pairs, less what is no pair. The whole warp must come here.
    ///
    /// # Safety
    /// The blocks must be numbered, and there be such a block and room for its tile.
    #[inline(always)]
    unsafe fn make_tile(p: &AdoptParams, map: Map, slots: Slots, number: u32) {
        // SAFETY: one of L words; the block is one of the slot's `usable_blocks`; there is room for all
        // tiles.
        unsafe {
            let slot = slot_of(map, number);
            let block = number - map.word(slot).load();
            let expert = p.block_experts.at(slot * p.max_blocks + block).load();
            let rank = slots.rank(slot);

            // Each lane takes a run of at most eight places.
            let ids = p.sorted.at(slot * p.max_padded + block * p.block_size);
            let run = p.block_size.div_ceil(32);
            let from = thread::lane() * run;
            let mut pairs = [u32::MAX; 8];
            unroll::<8>(|i| {
                let place = from + i as u32;
                if (i as u32) < run && place < p.block_size {
                    pairs[i] = ids.at(place).load();
                }
            });
            let limit = if expert < p.experts { p.pair_count } else { 0 };
            let mut own = 0;
            unroll::<8>(|i| own += (pairs[i] < limit) as u32);
            let rows = inclusive(own);
            let first = number * p.block_size;
            let mut place = first + rows - own;
            unroll::<8>(|i| {
                if pairs[i] < limit {
                    p.pairs.at(place).store(pairs[i]);
                    place += 1;
                }
            });
            if thread::lane() == 31 {
                let tile = Tile { slot, expert, first, rows, rank, reserved: [0; 3] };
                p.tiles.at(number).store_tile(tile);
            }
        }
    }
}
