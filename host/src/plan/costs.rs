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
    /// An H200, as `moe-lora tune --fit docs/bench/h200-candidates-fit.jsonl` has fitted it.
    pub const H200: Self = Costs {
        decode_m8: DecodeCosts {
            memory: MemoryCosts { weights: 0.3144, x: 0.3809, out: 1.1354 },
            start: 1.1828,
            find: 1.8218,
            route: 4.71,
            cluster: 1.507,
            half_full: 0.2195,
            full: 0.0738,
            a_stage: 0.3843,
            a_bytes: 0.5426,
            k_share: 0.0144,
            b_stage: 0.4979,
            b_bytes: 0.2702,
            item: 1.6594,
            partial_wave: 0.8143,
            second_block: 0.0301,
            second_block_waves: 0.1894,
        },
        decode_m16: DecodeCosts {
            memory: MemoryCosts { weights: 0.1464, x: 0.5759, out: 0.5109 },
            start: 1.6563,
            find: 2.722,
            route: 8.3749,
            cluster: 1.3189,
            half_full: 1.524,
            full: 0.0,
            a_stage: 0.4704,
            a_bytes: 0.1891,
            k_share: 0.0236,
            b_stage: 0.8276,
            b_bytes: 0.0048,
            item: 2.105,
            partial_wave: 0.8063,
            second_block: 0.0,
            second_block_waves: 0.0,
        },
        prefill_m64: PrefillCosts {
            memory: MemoryCosts { weights: 0.6813, x: 0.3821, out: 1.3894 },
            start: 0.5535,
            thousand_pairs: 0.1857,
            tile: 6.3966,
            k_step: 0.234,
            n_step: 0.3944,
            x_bytes: 0.0624,
            shrink_products: 0.5884,
            expand_products: 0.3683,
            load: 0.5145,
        },
        prefill_m128: PrefillCosts {
            memory: MemoryCosts { weights: 0.9859, x: 0.0583, out: 1.1922 },
            start: 5.2193,
            thousand_pairs: 0.023,
            tile: 2.8264,
            k_step: 0.5018,
            n_step: 0.6611,
            x_bytes: 0.005,
            shrink_products: 0.1821,
            expand_products: 0.2569,
            load: 0.0618,
        },
        shared_prefill_m64: PrefillCosts {
            memory: MemoryCosts { weights: 0.8642, x: 0.7025, out: 1.0328 },
            start: 14.895,
            thousand_pairs: 0.1431,
            tile: 0.1101,
            k_step: 0.321,
            n_step: 1.0657,
            x_bytes: 0.1688,
            shrink_products: 1.1269,
            expand_products: 0.8356,
            load: 0.0,
        },
        shared_prefill_m128: PrefillCosts {
            memory: MemoryCosts { weights: 1.0014, x: 1.219, out: 0.9262 },
            start: 16.4504,
            thousand_pairs: 0.0,
            tile: 8.5428,
            k_step: 0.5596,
            n_step: 1.1698,
            x_bytes: 0.0,
            shrink_products: 0.0,
            expand_products: 0.6791,
            load: 0.0,
        },
        generic_m16: GenericCosts {
            memory: MemoryCosts { weights: 1.0568, x: 0.0272, out: 2.0326 },
            start: 9.2976,
            thousand_pairs: 0.487,
            k_step: 0.8731,
            n_step: 1.3277,
            a_bytes: 0.3997,
            b_bytes: 0.0486,
            x_bytes: 0.172,
        },
        generic_m32: GenericCosts {
            memory: MemoryCosts { weights: 1.1143, x: 0.235, out: 1.8845 },
            start: 11.7766,
            thousand_pairs: 0.4712,
            k_step: 0.6693,
            n_step: 1.2799,
            a_bytes: 0.542,
            b_bytes: 0.1624,
            x_bytes: 0.8128,
        },
        generic_m64: GenericCosts {
            memory: MemoryCosts { weights: 1.2029, x: 0.6164, out: 1.4249 },
            start: 13.445,
            thousand_pairs: 0.0154,
            k_step: 1.8632,
            n_step: 1.7385,
            a_bytes: 0.5714,
            b_bytes: 1.0955,
            x_bytes: 1.0613,
        },
    };

    /// An H100: an H200's with three factors, fitted by hand to rows that are older than this table.
    ///
    /// They are 45 calls of models as they were planned then (docs/bench/h100-80gb-hbm3.jsonl), and 11 in
    /// `decode` and in `prefill` (docs/notes/064-planner-cost-model.md). A predicted time is 11 and 7 % off
    /// in the mean, too long by 0.4 and 1.7 %.
    pub const H100: Self = Costs {
        decode_m8: Self::H200.decode_m8.on_h100(),
        decode_m16: Self::H200.decode_m16.on_h100(),
        prefill_m64: Self::H200.prefill_m64.on_h100(),
        prefill_m128: Self::H200.prefill_m128.on_h100(),
        shared_prefill_m64: Self::H200.shared_prefill_m64.on_h100(),
        shared_prefill_m128: Self::H200.shared_prefill_m128.on_h100(),
        ..Self::H200
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
    /// Bytes lengthen a call by more than the slower memory does already.
    const fn on_h100(self) -> Self {
        let memory = MemoryCosts { weights: 1.8 * self.memory.weights, ..self.memory };
        DecodeCosts { memory, ..self }
    }
}

impl PrefillCosts {
    /// Steps take longer, and bytes a little.
    const fn on_h100(self) -> Self {
        let (step, byte) = (1.2, 1.1);
        let MemoryCosts { weights, x, out } = self.memory;
        PrefillCosts {
            memory: MemoryCosts { weights: byte * weights, x: byte * x, out: byte * out },
            tile: step * self.tile,
            k_step: step * self.k_step,
            n_step: step * self.n_step,
            x_bytes: step * self.x_bytes,
            shrink_products: step * self.shrink_products,
            expand_products: step * self.expand_products,
            ..self
        }
    }
}
