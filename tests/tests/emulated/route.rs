//! `route` on its own, in one block and in a grid, with so few counters that it goes over its pairs in many
//! windows, and with runs that do not stay in registers: what it leaves, to the bit, against the same done
//! plainly.

use super::seeds;
use moe_lora_kernels::emulate::{self, Buffer, Grid, Memory};
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{Divider, RouteParams, Tile, count, enabled, expert_ids};
use moe_lora_kernels::route::{self, EXCHANGE_HEAD};
use moe_lora_kernels::{ENTRIES, Kernel};
use rayon::prelude::*;

const TOP_K: u32 = 3;
const SLOTS: u32 = 3;
const EXPERTS: u32 = 5;
const MAX_RANK: u32 = 16;
const RANKS: [i32; SLOTS as usize] = [8, 0, 99];
/// Number of the bucket of inactive pairs.
const INACTIVE: u32 = SLOTS * EXPERTS;

/// A call's routing: `tokens` tokens that go anywhere, ids that are none included.
struct Call {
    token_lora: Vec<i32>,
    topk_ids: Vec<i32>,
}

impl Call {
    fn new(tokens: u32, seed: u64) -> Self {
        // Squares of odd numbers, from some place on: scattered enough.
        let id = |i: u32, limit: u32| {
            let n = (u64::from(i) * 2 + seed * 1_000_003 + 1).pow(2) >> 5;
            (n % u64::from(limit + 2)) as i32 - 1
        };
        Call {
            token_lora: (0..tokens).map(|i| id(i, SLOTS)).collect(),
            topk_ids: (0..tokens * TOP_K).map(|i| id(i + 7, EXPERTS)).collect(),
        }
    }

    /// Each pair's bucket.
    fn buckets(&self) -> Vec<u32> {
        let bucket = |(pair, &expert): (usize, &i32)| {
            let slot = self.token_lora[pair / TOP_K as usize];
            let active = (0..SLOTS as i32).contains(&slot)
                && (0..EXPERTS as i32).contains(&expert)
                && RANKS[slot as usize] > 0;
            if active { slot as u32 * EXPERTS + expert as u32 } else { INACTIVE }
        };
        self.topk_ids.iter().enumerate().map(bucket).collect()
    }
}

/// How a call is sorted.
#[derive(Clone, Copy, Debug)]
struct Shape {
    kernel: Kernel,
    blocks: u32,
    /// Active buckets that are counted at a time, a multiple of 4.
    window: u32,
}

/// What `route` leaves: pairs, tiles, and how many of these are of active pairs.
type Left = (Vec<u32>, Vec<Tile>, u32);

/// What `route` leaves of each of `calls`, as many pairs each, one after another on one exchange.
fn run(shapes: &[Shape], calls: &[Call], tile_rows: u32, seed: u64) -> Vec<Left> {
    let pairs = calls[0].topk_ids.len();
    let most = route::max_tiles(pairs as u64, u64::from(INACTIVE) + 1, tile_rows.into()) as usize;
    let most_blocks = shapes.iter().map(|shape| shape.blocks).max().unwrap_or(0);
    let exchange_room = route::table_words(most_blocks.into(), u64::from(INACTIVE) + 1) as u32;
    let mut memory = Memory::default();
    let mut exchange = None;
    let mut left = Vec::new();
    for (shape, call) in shapes.iter().zip(calls) {
        let mut buffers = Vec::new();
        let mut buffer = |memory: &mut Memory, name: &str, bytes: &[u8], writable| {
            let address = memory.allocate(bytes);
            if writable {
                memory.forget(address, bytes.len() as u64, 0x7f);
            }
            buffers.push(Buffer { name: name.to_owned(), address, bytes: bytes.len() as u64, writable });
            address
        };
        let memory = &mut memory;
        let (topk_ids, token_lora) =
            (bytemuck::cast_slice(&call.topk_ids), bytemuck::cast_slice(&call.token_lora));
        let entry = ENTRIES.iter().find(|entry| entry.kernel == shape.kernel).expect("in the table");
        let sorters = entry.threads / 32;
        let mut parameters = RouteParams {
            topk_ids: Global::new(buffer(memory, "topk_ids", topk_ids, false)),
            token_lora: Global::new(buffer(memory, "token_lora", token_lora, false)),
            adapter_enabled: Global::NULL,
            ranks: Global::new(buffer(memory, "ranks", bytemuck::cast_slice(&RANKS), false)),
            expert_map: Global::NULL,
            pairs: Global::new(buffer(memory, "pairs", &vec![0; 4 * pairs], true)),
            tiles: Global::new(buffer(memory, "tiles", &vec![0; size_of::<Tile>() * most], true)),
            counts: Global::new(buffer(memory, "counts", &[0; 4 * count::LEN], true)),
            buckets: Global::new(buffer(memory, "buckets", &vec![0; 4 * pairs], true)),
            exchange: Global::NULL,
            pair_count: pairs as u32,
            top_k: Divider::new(TOP_K),
            slots: SLOTS,
            experts: EXPERTS,
            over_experts: Divider::new(EXPERTS),
            global_experts: EXPERTS,
            max_rank: MAX_RANK,
            tile_rows,
            over_tile_rows: Divider::new(tile_rows),
            enabled_kind: enabled::ALL,
            blocks: shape.blocks,
            run: (pairs as u32).div_ceil(shape.blocks * sorters).next_multiple_of(32),
            window: shape.window + 4,
            exchange_room,
            ids_kind: expert_ids::I32,
        };
        let bytes = 4 * u64::from(EXCHANGE_HEAD + 2 * exchange_room);
        let address = *exchange.get_or_insert_with(|| memory.allocate(&vec![0; bytes as usize]));
        parameters.exchange = Global::new(address);
        buffers.push(Buffer { name: "exchange".to_owned(), address, bytes, writable: true });
        let shared_bytes = route::shared_bytes(sorters, parameters.window);
        let grid = Grid { blocks: shape.blocks, cluster: 1, cooperative: shape.kernel != Kernel::Route };
        emulate::launch(entry, grid, shared_bytes, &parameters, memory, &buffers, seed)
            .unwrap_or_else(|report| panic!("{shape:?}: {report}"));
        let words = |address, len: usize| -> Vec<u32> {
            bytemuck::pod_collect_to_vec(memory.bytes(address, 4 * len as u64))
        };
        let counts = words(parameters.counts.address(), count::LEN);
        let bytes = size_of::<Tile>() as u64 * u64::from(counts[count::ALL as usize]);
        let tiles = bytemuck::pod_collect_to_vec(memory.bytes(parameters.tiles.address(), bytes));
        left.push((words(parameters.pairs.address(), pairs), tiles, counts[count::ACTIVE as usize]));
    }
    left
}

/// What `route` must leave: the pairs of each segment in ascending order.
fn expected(call: &Call, tile_rows: u32) -> Left {
    let buckets = call.buckets();
    let (mut pairs, mut tiles) = (Vec::new(), Vec::new());
    for bucket in 0..=INACTIVE {
        let first = pairs.len() as u32;
        pairs.extend((0..).zip(&buckets).filter(|&(_, &other)| other == bucket).map(|(pair, _)| pair));
        let count = pairs.len() as u32 - first;
        let (slot, expert) = (bucket / EXPERTS, bucket % EXPERTS);
        let rank = RANKS.get(slot as usize).map_or(0, |&rank| (rank as u32).min(MAX_RANK));
        for skipped in (0..count).step_by(tile_rows as usize) {
            let rows = (count - skipped).min(tile_rows);
            tiles.push(Tile { slot, expert, first: first + skipped, rows, rank, reserved: [0; 3] });
        }
    }
    let active = tiles.iter().filter(|tile: &&Tile| tile.slot < SLOTS).count() as u32;
    (pairs, tiles, active)
}

/// Routes calls of `tokens` tokens, each sorted in the next of `shapes`, and holds them against the plain
/// one.
fn check(tokens: u32, tile_rows: u32, shapes: &[Shape], seed: u64) {
    let calls: Vec<_> = (0..).zip(shapes).map(|(i, _)| Call::new(tokens, seed + 1000 * i)).collect();
    for ((left, call), shape) in run(shapes, &calls, tile_rows, seed).iter().zip(&calls).zip(shapes) {
        assert!(*left == expected(call, tile_rows), "{shape:?}, T = {tokens}, seed {seed}");
    }
}

#[test]
fn pairs_are_sorted_whatever_the_order_of_threads() {
    (0..seeds()).into_par_iter().for_each(|seed| {
        let shape = |kernel, blocks, window| Shape { kernel, blocks, window };
        let all = INACTIVE + 1;
        // Grids of any size follow one another on one exchange; several windows, with the last cut short.
        let shapes = [
            shape(Kernel::RouteGrid, 1 + seed as u32 % 3, all),
            shape(Kernel::RouteWide, 2, [4, 8][seed as usize % 2]),
            shape(Kernel::RouteGrid, 3, all),
            shape(Kernel::RouteWide, 1, all),
            shape(Kernel::Route, 1, all),
        ];
        check(1 + (3 * seed) as u32 % 300, [4, 3, 7][seed as usize % 3], &shapes, seed);
    });
}

#[test]
fn runs_longer_than_registers_are_sorted_too() {
    (0..4u64).into_par_iter().for_each(|seed| {
        let window = [INACTIVE + 1, 8][seed as usize % 2];
        let shape = |blocks| Shape { kernel: Kernel::RouteWide, blocks, window };
        // Up to 4,000 pairs for 16 or 32 sorters.
        check(1333 - 500 * (seed as u32 / 2), 16, &[1, 2].map(shape), seed);
    });
}
