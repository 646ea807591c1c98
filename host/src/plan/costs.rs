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
    /// An H200: fitted to the calls of docs/bench/h200-candidates-fit.jsonl, each in every candidate.
    pub const H200: Self = Costs {
        decode_m8: DecodeCosts {
            memory: MemoryCosts { weights: 0.3991, x: 0.6173, out: 0.8897 },
            start: 1.5987,
            find: 1.8255,
            route: 3.3846,
            cluster: 1.3141,
            half_full: 0.5575,
            full: 0.3806,
            a_stage: 0.3799,
            a_bytes: 0.3144,
            k_share: 0.0188,
            b_stage: 0.4469,
            b_bytes: 0.2769,
            item: 1.1856,
            partial_wave: 0.6255,
            second_block: 0.1637,
            second_block_waves: 0.3273,
        },
        decode_m16: DecodeCosts {
            memory: MemoryCosts { weights: 0.1545, x: 0.6398, out: 0.6643 },
            start: 2.2355,
            find: 2.369,
            route: 6.3805,
            cluster: 0.7577,
            half_full: 1.145,
            full: 0.0,
            a_stage: 0.4489,
            a_bytes: 0.1517,
            k_share: 0.0,
            b_stage: 0.686,
            b_bytes: 0.1082,
            item: 1.9983,
            partial_wave: 0.8853,
            second_block: 0.0,
            second_block_waves: 0.0,
        },
        prefill_m64: PrefillCosts {
            memory: MemoryCosts { weights: 0.9943, x: 0.856, out: 1.3273 },
            start: 2.072,
            thousand_pairs: 0.1669,
            tile: 5.0855,
            k_step: 0.2694,
            n_step: 0.4408,
            x_bytes: 0.1211,
            shrink_products: 0.3674,
            expand_products: 0.4475,
            load: 0.5233,
        },
        prefill_m128: PrefillCosts {
            memory: MemoryCosts { weights: 0.8863, x: 0.3509, out: 1.2544 },
            start: 6.1295,
            thousand_pairs: 0.1695,
            tile: 2.4726,
            k_step: 0.416,
            n_step: 0.6609,
            x_bytes: 0.0851,
            shrink_products: 0.2552,
            expand_products: 0.2615,
            load: 0.0019,
        },
        shared_prefill_m64: PrefillCosts {
            memory: MemoryCosts { weights: 0.9756, x: 0.9275, out: 1.0 },
            start: 14.4155,
            thousand_pairs: 0.0062,
            tile: 0.013,
            k_step: 0.3204,
            n_step: 1.0979,
            x_bytes: 0.4014,
            shrink_products: 0.7522,
            expand_products: 0.916,
            load: 0.0,
        },
        shared_prefill_m128: PrefillCosts {
            memory: MemoryCosts { weights: 1.1379, x: 1.0849, out: 0.9329 },
            start: 15.5673,
            thousand_pairs: 0.0,
            tile: 5.4,
            k_step: 0.6161,
            n_step: 1.224,
            x_bytes: 0.0,
            shrink_products: 0.0,
            expand_products: 0.6731,
            load: 0.0,
        },
        generic_m16: GenericCosts {
            memory: MemoryCosts { weights: 1.1151, x: 0.2461, out: 2.0734 },
            start: 9.4932,
            thousand_pairs: 0.7114,
            k_step: 0.7133,
            n_step: 1.1474,
            a_bytes: 0.4112,
            b_bytes: 0.0,
            x_bytes: 0.4565,
        },
        generic_m32: GenericCosts {
            memory: MemoryCosts { weights: 1.2346, x: 0.3015, out: 2.1265 },
            start: 11.4011,
            thousand_pairs: 0.3741,
            k_step: 0.5978,
            n_step: 1.4195,
            a_bytes: 0.6697,
            b_bytes: 0.0594,
            x_bytes: 0.9152,
        },
        generic_m64: GenericCosts {
            memory: MemoryCosts { weights: 1.1675, x: 0.8922, out: 1.3945 },
            start: 12.2751,
            thousand_pairs: 0.1302,
            k_step: 1.803,
            n_step: 1.8901,
            a_bytes: 0.7609,
            b_bytes: 1.0886,
            x_bytes: 0.9727,
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
