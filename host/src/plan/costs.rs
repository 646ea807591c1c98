//! The cost model's table: what the parts of a call take on a device, as they were fitted to measured calls.

use crate::plan::DeviceLimits;
use serde::{Deserialize, Serialize};

/// Bytes to which `..._bytes` of a table are times.
pub(crate) const COPIED: f64 = 32e3;

/// What calls take on a device. Times are microseconds; "per 32 KB" is per 32,000 bytes, about what one
/// multiprocessor copies in a microsecond.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Costs {
    /// `decode` in tiles of 8 pairs.
    pub decode_m8: DecodeCosts,
    /// `decode` in tiles of 16 pairs.
    pub decode_m16: DecodeCosts,
    /// `prefill` in tiles of 64 pairs.
    pub prefill_m64: PrefillCosts,
    /// `prefill` in tiles of 128 pairs.
    pub prefill_m128: PrefillCosts,
    /// `prefill` in tiles of 64 pairs, whose passes blocks share.
    pub shared_prefill_m64: PrefillCosts,
    /// `prefill` in tiles of 128 pairs, whose passes blocks share.
    pub shared_prefill_m128: PrefillCosts,
    /// `shrink` and `expand` in tiles of 16 pairs.
    pub generic_m16: GenericCosts,
    /// `shrink` and `expand` in tiles of 32 pairs.
    pub generic_m32: GenericCosts,
    /// `shrink` and `expand` in tiles of 64 pairs.
    pub generic_m64: GenericCosts,
}

/// Parts of the time that a call's bytes take at the rate of [`DeviceLimits::streamed`] by which they
/// lengthen it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryCosts {
    /// Weights of the segments that have pairs.
    pub weights: f64,
    /// Rows of x, once.
    pub x: f64,
    /// Rows of `out`, read and written.
    pub out: f64,
}

/// A call in `decode`. A work item is a (tile, slice), which a cluster takes; a wave is an item of each
/// cluster.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecodeCosts {
    /// Bytes.
    pub memory: MemoryCosts,
    /// The launch, and the first copy's latency.
    pub start: f64,
    /// Segments that each block finds on its own, but for the few pairs that one warp lists.
    pub find: f64,
    /// The launch of `route` before it.
    pub route: f64,
    /// Blocks in clusters of more than one.
    pub cluster: f64,
    /// More blocks than half of the multiprocessors.
    pub half_full: f64,
    /// More blocks than multiprocessors.
    pub full: f64,
    /// A stage of `a`.
    pub a_stage: f64,
    /// 32 KB of a block's part of `a`.
    pub a_bytes: f64,
    /// A part of K, where blocks of a cluster share K.
    pub k_share: f64,
    /// A stage of `b`.
    pub b_stage: f64,
    /// 32 KB of a block's part of `b`.
    pub b_bytes: f64,
    /// Least time from one item of a cluster to its next.
    pub item: f64,
    /// Part of a wave that one in which some clusters have no item takes: 0 is in proportion, 1 a whole one.
    pub partial_wave: f64,
    /// Part by which a second block on the multiprocessor lengthens the first item.
    pub second_block: f64,
    /// Part by which it lengthens the later ones.
    pub second_block_waves: f64,
}

/// A call in `prefill`. A work tile is a pass over a tile: one of a block, or shared.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefillCosts {
    /// Bytes.
    pub memory: MemoryCosts,
    /// The launches of `route` and of `prefill`, and the first copy's latency.
    pub start: f64,
    /// Routing of 1,000 pairs.
    pub thousand_pairs: f64,
    /// A work tile, beside its steps.
    pub tile: f64,
    /// A step of 128 elements of K.
    pub k_step: f64,
    /// A step of 128 columns of `out`.
    pub n_step: f64,
    /// 32 KB of a work tile's rows of x.
    pub x_bytes: f64,
    /// 1,000,000 multiplications and additions of a x.
    pub shrink_products: f64,
    /// 1,000,000 multiplications and additions of b h.
    pub expand_products: f64,
    /// Work tiles by which a block's first one is longer than the others; 0 where blocks share passes.
    pub load: f64,
}

/// A call in `shrink` and `expand`. An item is a tile, of all slices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenericCosts {
    /// Bytes.
    pub memory: MemoryCosts,
    /// The launches, and the first copies' latencies.
    pub start: f64,
    /// Routing of 1,000 pairs.
    pub thousand_pairs: f64,
    /// 512 elements of K of an item.
    pub k_step: f64,
    /// 512 columns of `out` of an item.
    pub n_step: f64,
    /// 32 KB of an item's `a`.
    pub a_bytes: f64,
    /// 32 KB of an item's `b`.
    pub b_bytes: f64,
    /// 32 KB of an item's rows of x, for each block that shares its columns of h.
    pub x_bytes: f64,
}

impl Costs {
    /// An H200: fitted to the calls of docs/bench/h200-candidates-fit.jsonl, each in every candidate. Those
    /// of models, the first 63, count six times.
    pub const H200: Self = Costs {
        decode_m8: DecodeCosts {
            memory: MemoryCosts { weights: 0.3967, x: 0.5572, out: 0.8408 },
            start: 1.4185,
            find: 1.8218,
            route: 3.9273,
            cluster: 1.4205,
            half_full: 0.5668,
            full: 0.4935,
            a_stage: 0.3731,
            a_bytes: 0.3901,
            k_share: 0.0278,
            b_stage: 0.4834,
            b_bytes: 0.2113,
            item: 1.1582,
            partial_wave: 0.6211,
            second_block: 0.1417,
            second_block_waves: 0.3297,
        },
        decode_m16: DecodeCosts {
            memory: MemoryCosts { weights: 0.122, x: 0.6852, out: 0.6448 },
            start: 2.1532,
            find: 2.5439,
            route: 7.2825,
            cluster: 1.0145,
            half_full: 1.3828,
            full: 0.0,
            a_stage: 0.4704,
            a_bytes: 0.3335,
            k_share: 0.008,
            b_stage: 0.8276,
            b_bytes: 0.0,
            item: 2.2523,
            partial_wave: 0.8886,
            second_block: 0.0,
            second_block_waves: 0.0,
        },
        prefill_m64: PrefillCosts {
            memory: MemoryCosts { weights: 1.076, x: 0.9335, out: 1.4311 },
            start: 1.3866,
            thousand_pairs: 0.2029,
            tile: 7.0204,
            k_step: 0.2772,
            n_step: 0.4792,
            x_bytes: 0.0241,
            shrink_products: 0.4267,
            expand_products: 0.3826,
            load: 0.4608,
        },
        prefill_m128: PrefillCosts {
            memory: MemoryCosts { weights: 0.8946, x: 0.3421, out: 1.228 },
            start: 6.1566,
            thousand_pairs: 0.165,
            tile: 2.5105,
            k_step: 0.4011,
            n_step: 0.6611,
            x_bytes: 0.0361,
            shrink_products: 0.2608,
            expand_products: 0.2311,
            load: 0.0,
        },
        shared_prefill_m64: PrefillCosts {
            memory: MemoryCosts { weights: 0.9649, x: 0.9211, out: 1.0638 },
            start: 14.895,
            thousand_pairs: 0.0,
            tile: 0.0,
            k_step: 0.3537,
            n_step: 1.0977,
            x_bytes: 0.4411,
            shrink_products: 0.7258,
            expand_products: 0.9943,
            load: 0.0,
        },
        shared_prefill_m128: PrefillCosts {
            memory: MemoryCosts { weights: 1.0492, x: 1.1011, out: 0.9826 },
            start: 15.3742,
            thousand_pairs: 0.0,
            tile: 7.4923,
            k_step: 0.5988,
            n_step: 1.1357,
            x_bytes: 0.0,
            shrink_products: 0.0,
            expand_products: 0.6401,
            load: 0.0,
        },
        generic_m16: GenericCosts {
            memory: MemoryCosts { weights: 1.1308, x: 0.1149, out: 1.9734 },
            start: 9.2976,
            thousand_pairs: 0.753,
            k_step: 0.7402,
            n_step: 1.079,
            a_bytes: 0.339,
            b_bytes: 0.0,
            x_bytes: 0.326,
        },
        generic_m32: GenericCosts {
            memory: MemoryCosts { weights: 1.1477, x: 0.4195, out: 1.8845 },
            start: 10.6856,
            thousand_pairs: 0.4274,
            k_step: 0.5509,
            n_step: 1.3296,
            a_bytes: 0.542,
            b_bytes: 0.055,
            x_bytes: 0.9506,
        },
        generic_m64: GenericCosts {
            memory: MemoryCosts { weights: 1.0774, x: 0.8358, out: 1.4249 },
            start: 12.1994,
            thousand_pairs: 0.0,
            k_step: 1.9355,
            n_step: 1.8602,
            a_bytes: 0.6297,
            b_bytes: 1.1722,
            x_bytes: 0.8923,
        },
    };

    /// An H100: an H200's, with steps of `decode` that take longer by as much as memory is slower, since it
    /// is memory that they wait for. Nothing but the planned forms was measured there
    /// (docs/bench/h100-80gb-hbm3.jsonl), so nothing is fitted.
    pub const H100: Self = {
        let slower = DeviceLimits::H200.memory_rate as f64 / DeviceLimits::H100.memory_rate as f64;
        Costs {
            decode_m8: Self::H200.decode_m8.with_longer_steps(slower),
            decode_m16: Self::H200.decode_m16.with_longer_steps(slower),
            ..Self::H200
        }
    };

    /// The table for a device: an H100's where memory is as slow as there, and an H200's, with the device's
    /// own rate of memory and number of multiprocessors, for all others.
    pub fn of(limits: &DeviceLimits) -> &'static Self {
        const H100: Costs = Costs::H100;
        const H200: Costs = Costs::H200;
        if limits.has_fast_memory() { &H200 } else { &H100 }
    }
}

impl DecodeCosts {
    const fn with_longer_steps(self, factor: f64) -> Self {
        DecodeCosts {
            a_stage: factor * self.a_stage,
            a_bytes: factor * self.a_bytes,
            b_stage: factor * self.b_stage,
            b_bytes: factor * self.b_bytes,
            item: factor * self.item,
            ..self
        }
    }
}
