//! What a plan needs to know of a device.

use moe_lora_kernels::decode;

/// What a plan needs to know of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Most shared memory that a block may be given, in bytes.
    pub shared_bytes: u32,
    /// Clusters of 1, 2, 4 and 8 blocks of `decode` that it runs at a time, with [`decode::BLOCKS_PER_SM`]
    /// blocks a multiprocessor; zeros where its kernels have no clusters.
    pub decode_clusters: [u32; 4],
    /// Whether its kernels use `wgmma`: sm_90a's do.
    pub wgmma: bool,
    /// Bytes a microsecond that its memory's clock and width allow.
    pub memory_rate: u32,
}

impl DeviceLimits {
    /// An H100, for plans that are made where no device is.
    pub const H100: Self = DeviceLimits {
        multiprocessors: 132,
        shared_bytes: 232_448,
        memory_rate: 3_352_320,
        decode_clusters: [264, 132, 64, 32],
        wgmma: true,
    };

    /// An H200: an H100 with more, and faster, memory.
    pub const H200: Self = DeviceLimits { memory_rate: 4_814_304, ..Self::H100 };

    /// Bytes a microsecond that a stream gets from its memory: nine tenths of what clock and width allow.
    pub fn streamed(&self) -> f64 {
        0.9 * f64::from(self.memory_rate)
    }

    /// Whether memory is fast: an H200's, of 4.8 TB/s, and not an H100's, of 3.35.
    pub(crate) fn has_fast_memory(&self) -> bool {
        self.memory_rate >= 4_000_000
    }

    /// Most shared memory of a block of which a multiprocessor runs `blocks`, in bytes.
    pub fn shared_bytes_of(&self, blocks: u32) -> u32 {
        (self.shared_bytes.saturating_add(decode::RESERVED_BYTES) / blocks)
            .saturating_sub(decode::RESERVED_BYTES)
    }

    /// Whether its kernels may use clusters of blocks.
    pub fn has_clusters(&self) -> bool {
        self.decode_clusters[0] > 0
    }
}
