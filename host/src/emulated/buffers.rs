//! What a launch may touch: the tensors of a call, and what the kernels before it have left.

use crate::call::{Enabled, Factor, Routing, TopkIds};
use crate::projection::Projection;
use crate::table::AdapterEntry;
use crate::tensor::{self, Rows, RowsMut, View};
use bytemuck::Pod;
use moe_lora_kernels::emulate::{self, Memory};
use moe_lora_kernels::memory::Global;
use moe_lora_kernels::params::{PrefillParams, RouteParams, Tile, count};
use moe_lora_kernels::prefill::{MAX_COUNTERS, sums_words};
use moe_lora_kernels::route;
use moe_lora_kernels::tile::TileShape;

pub(super) fn buffer<T>(name: impl Into<String>, start: Global<T>, elements: u64) -> emulate::Buffer {
    let bytes = elements * size_of::<T>() as u64;
    emulate::Buffer { name: name.into(), address: start.address(), bytes, writable: false }
}

pub(super) fn tensor<T: Pod>(
    name: impl Into<String>,
    view: View<'_, tensor::Emulated, T>,
) -> emulate::Buffer {
    buffer(name, Global::<T>::new(view.address()), view.len() as u64)
}

/// h, or its parts.
pub(super) fn h_buffer(h: Global<u16>, partial: Global<f32>, sizes: [u32; 4]) -> emulate::Buffer {
    let elements = sizes.map(u64::from).iter().product();
    if sizes[0] == 1 { buffer("h", h, elements) } else { buffer("parts of h", partial, elements) }
}

/// The split-K workspace of `prefill`: h, partial sums, and counters.
pub(super) fn split_k_workspace(p: &PrefillParams) -> [emulate::Buffer; 3] {
    let h = (p.sums.address() - p.fragments.address()) / size_of::<u32>() as u64;
    [
        buffer("fragments", p.fragments, h),
        buffer("sums", p.sums, sums_words(h, p.split_k.count)),
        buffer("counters", p.counters, MAX_COUNTERS.into()),
    ]
}

/// The tile counts that `route` leaves.
pub(super) fn counts(counts: Global<u32>) -> emulate::Buffer {
    buffer("counts", counts, count::LEN as u64)
}

/// `tensors`, and what `route` left.
pub(super) fn routed(
    tensors: &[emulate::Buffer],
    (pairs, listed): (Global<u32>, usize),
    tiles: Global<Tile>,
    counts: emulate::Buffer,
    pair_count: u32,
) -> Vec<emulate::Buffer> {
    // A pair a bucket: as many tiles as the smallest tile can make of any route.
    let pair_count = u64::from(pair_count);
    let most = route::max_tiles(pair_count, pair_count, TileShape::M16.rows().into());
    let mut buffers = tensors.to_vec();
    buffers.extend([buffer("pairs", pairs, listed as u64), buffer("tiles", tiles, most), counts]);
    buffers
}

/// What a kernel that makes a route leaves of it.
pub(super) fn made_route(p: &RouteParams) -> [emulate::Buffer; 3] {
    let buckets = (p.slots * p.experts + 1).into();
    let tiles = route::max_tiles(p.pair_count.into(), buckets, p.tile_rows.into());
    [buffer("pairs", p.pairs, p.pair_count.into()), buffer("tiles", p.tiles, tiles), counts(p.counts)]
}

pub(super) fn routing_tensors(routing: &Routing<'_, tensor::Emulated>) -> Vec<emulate::Buffer> {
    let (mut buffers, adapter_enabled, ranks) = match routing {
        Routing::Tokens(tensors) => {
            let ids = ids(&tensors.topk_ids).into_iter().chain([tensor("token_lora", tensors.token_lora)]);
            let map = tensors.expert_map.map(|map| tensor("expert_map", map));
            (ids.chain(map).collect(), tensors.adapter_enabled, tensors.ranks)
        }
        Routing::Sorted(sorted) => {
            let blocks = vec![
                tensor("sorted_token_ids", sorted.sorted_token_ids),
                tensor("expert_ids", sorted.expert_ids),
                tensor("num_tokens_post_padded", sorted.num_tokens_post_padded),
                tensor("lora_ids", sorted.lora_ids),
            ];
            (blocks, sorted.adapter_enabled, sorted.ranks)
        }
        Routing::On(_) => return Vec::new(),
    };
    buffers.extend(flags(adapter_enabled));
    buffers.extend(ranks.map(|ranks| tensor("ranks", ranks)));
    buffers
}

pub(super) fn ids(topk_ids: &TopkIds<'_, tensor::Emulated>) -> Option<emulate::Buffer> {
    match topk_ids {
        TopkIds::None => None,
        TopkIds::I32(ids) => Some(tensor("topk_ids", *ids)),
        TopkIds::I64(ids) => Some(tensor("topk_ids", *ids)),
    }
}

pub(super) fn flags(adapter_enabled: Enabled<'_, tensor::Emulated>) -> Option<emulate::Buffer> {
    match adapter_enabled {
        Enabled::All => None,
        Enabled::U8(flags) => Some(tensor("adapter_enabled", flags)),
        Enabled::I32(flags) => Some(tensor("adapter_enabled", flags)),
    }
}

/// x, and the index of its rows.
pub(super) fn x<T: Pod>(x: &Rows<'_, tensor::Emulated, T>) -> impl Iterator<Item = emulate::Buffer> {
    let index = x.index.map(|index| tensor("x_index", index));
    [tensor("x", x.data)].into_iter().chain(index)
}

/// The index of the rows of `out`, and `out`, which comes last.
pub(super) fn out<T: Pod>(out: &RowsMut<'_, tensor::Emulated, T>) -> impl Iterator<Item = emulate::Buffer> {
    let index = out.index.map(|index| tensor("out_index", index));
    index.into_iter().chain([tensor("out", out.data.as_view())])
}

/// One of the two factors, stacked or by address.
pub(super) enum Which {
    A,
    B,
}

/// The weights of a call: the stacked tensors, or the table and what it names.
pub(super) fn weights<T: Pod>(
    memory: &Memory,
    projection: &Projection,
    which: Which,
    factor: &Factor<'_, tensor::Emulated, T>,
) -> Vec<emulate::Buffer> {
    let name = match which {
        Which::A => "a",
        Which::B => "b",
    };
    let entries = match factor {
        Factor::Stacked(slices) => {
            let slices = slices.iter().enumerate();
            return slices.map(|(slice, view)| tensor(format!("{name}[{slice}]"), *view)).collect();
        }
        Factor::Table(adapters) => adapters.entries(),
    };
    let bytes = memory.bytes(entries.address(), (entries.len() * size_of::<AdapterEntry>()) as u64);
    let named = bytes.chunks_exact(size_of::<AdapterEntry>()).enumerate().filter_map(|(number, entry)| {
        let entry: AdapterEntry = bytemuck::pod_read_unaligned(entry);
        let slice = number % projection.slices();
        let (address, matrices, width) = match which {
            Which::A => (entry.a, projection.a_experts(), projection.sizes().in_dim),
            Which::B => (entry.b, projection.b_experts(), projection.sizes().out_dims.get(slice)),
        };
        let elements = matrices as u64 * u64::from(entry.max_rank) * width as u64;
        let name = format!("{name} of entry {number}");
        (entry.rank > 0).then(|| buffer(name, Global::<u16>::new(address), elements))
    });
    [tensor("adapters", entries)].into_iter().chain(named).collect()
}
