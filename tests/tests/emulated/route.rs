//! `route` on its own, in one block and in a cluster, with so few counters that it goes over its pairs in many
//! windows: what it leaves, against the same done plainly.

use super::SEEDS;
use moe_lora_kernels::emulate::{self, Buffer, Memory};
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{Divider, RouteParams, Tile, count, enabled};
use moe_lora_kernels::{ENTRIES, Kernel, route};
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

/// What `route` leaves: pairs, tiles, and how many of these are of active pairs.
fn run(kernel: Kernel, call: &Call, tile_rows: u32, window: u32, seed: u64) -> (Vec<u32>, Vec<Tile>, u32) {
    let entry = ENTRIES.iter().find(|entry| entry.kernel == kernel).expect("in the table");
    let pairs = call.topk_ids.len();
    let most = route::max_tiles(pairs as u64, u64::from(INACTIVE) + 1, tile_rows.into()) as usize;
    let mut memory = Memory::default();
    let mut buffers = Vec::new();
    let mut buffer = |name: &str, bytes: &[u8], writable| {
        let address = memory.allocate(bytes);
        if writable {
            memory.forget(address, bytes.len() as u64, 0x7f);
        }
        buffers.push(Buffer { name: name.to_owned(), address, bytes: bytes.len() as u64, writable });
        address
    };
    let parameters = RouteParams {
        topk_ids: Global::new(buffer("topk_ids", bytemuck::cast_slice(&call.topk_ids), false)),
        token_lora: Global::new(buffer("token_lora", bytemuck::cast_slice(&call.token_lora), false)),
        adapter_enabled: Global::NULL,
        ranks: Global::new(buffer("ranks", bytemuck::cast_slice(&RANKS), false)),
        expert_map: Global::NULL,
        pairs: Global::new(buffer("pairs", &vec![0; 4 * pairs], true)),
        tiles: Global::new(buffer("tiles", &vec![0; size_of::<Tile>() * most], true)),
        counts: Global::new(buffer("counts", &[0; 4 * count::LEN], true)),
        buckets: Global::new(buffer("buckets", &vec![0; 4 * pairs], true)),
        pair_count: pairs as u32,
        top_k: Divider::new(TOP_K),
        slots: SLOTS,
        experts: EXPERTS,
        global_experts: EXPERTS,
        max_rank: MAX_RANK,
        tile_rows,
        enabled_kind: enabled::ALL,
        window,
    };
    let shared_bytes = route::shared_bytes(window);
    emulate::launch(
        entry,
        (entry.cluster, entry.cluster),
        shared_bytes,
        &parameters,
        &mut memory,
        &buffers,
        seed,
    )
    .unwrap_or_else(|report| panic!("{report}"));
    let words = |address, len: usize| -> Vec<u32> {
        bytemuck::pod_collect_to_vec(memory.bytes(address, 4 * len as u64))
    };
    let counts = words(parameters.counts.address(), count::LEN);
    let bytes = size_of::<Tile>() as u64 * u64::from(counts[count::ALL as usize]);
    let tiles = bytemuck::pod_collect_to_vec(memory.bytes(parameters.tiles.address(), bytes));
    (words(parameters.pairs.address(), pairs), tiles, counts[count::ACTIVE as usize])
}

/// Routes a call in every form and holds it against the plain one.
fn check(tokens: u32, tile_rows: u32, window: u32, seed: u64) {
    let call = Call::new(tokens, seed);
    let buckets = call.buckets();
    let mut expected = Vec::new();
    let mut first = 0;
    for bucket in 0..=INACTIVE {
        let pairs = buckets.iter().filter(|&&other| other == bucket).count() as u32;
        let (slot, expert) = (bucket / EXPERTS, bucket % EXPERTS);
        let rank = RANKS.get(slot as usize).map_or(0, |&rank| (rank as u32).min(MAX_RANK));
        for skipped in (0..pairs).step_by(tile_rows as usize) {
            let rows = (pairs - skipped).min(tile_rows);
            expected.push(Tile { slot, expert, first: first + skipped, rows, rank, reserved: [0; 3] });
        }
        first += pairs;
    }
    let expected_active = expected.iter().filter(|tile| tile.slot < SLOTS).count() as u32;
    for kernel in [Kernel::Route, Kernel::RouteCluster] {
        let (mut pairs, tiles, active) = run(kernel, &call, tile_rows, window, seed);
        assert_eq!((&tiles, active), (&expected, expected_active), "{kernel:?}, T = {tokens}, seed {seed}");
        for tile in &tiles {
            let bucket = tile.slot * EXPERTS + tile.expert;
            let here = &pairs[tile.first as usize..][..tile.rows as usize];
            assert!(here.iter().all(|&pair| buckets[pair as usize] == bucket), "{kernel:?}: {tile:?}");
        }
        pairs.sort_unstable();
        assert!(pairs.into_iter().eq(0..tokens * TOP_K), "{kernel:?} lists every pair once");
    }
}

#[test]
fn pairs_are_sorted_whatever_the_order_of_threads() {
    (0..SEEDS).into_par_iter().for_each(|seed| {
        // One window; several, with the last cut short; a window a bucket.
        let window = match seed % 10 {
            0 => 1,
            1 | 2 => 6,
            _ => INACTIVE + 1,
        };
        check(1 + seed as u32 % 40, 4, window, seed);
    });
}
