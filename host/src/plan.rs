//! Which kernels a call will run, on which tiles, in how many blocks: decided from shapes and the device
//! alone, before anything is launched. Nothing here touches a device.

#[cfg(test)]
mod blackwell;
mod heuristics;
mod options;
#[doc(hidden)]
pub mod promises;

pub use options::{DecodeRows, Form, IndexWidth, Options, PrefillTile, TileKind};

use crate::call::Layout;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::projection::{Projection, XRows};
#[cfg(any(feature = "cuda", feature = "emulate"))]
use moe_lora_kernels::align;
use moe_lora_kernels::decode::segments::{self, Room};
use moe_lora_kernels::params::Split;
use moe_lora_kernels::tile::TileShape;
use moe_lora_kernels::{
    self as kernels, ENTRIES, ElementType, Entry, Kernel, PrefillVariant, Variant, adopt, decode, expand,
    prefill, route, shrink,
};
use std::fmt;

/// What a plan needs to know of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Most shared memory that a block may be given, in bytes.
    pub shared_bytes: u32,
    /// Clusters of 1, 2, 4 and 8 blocks of `decode` that it runs at a time, with [`decode::BLOCKS`] blocks a
    /// multiprocessor; zeros where its kernels have no clusters.
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

    /// Bytes a microsecond that a stream gets from its memory: nine tenths of what clock and width allow, 3.0 TB/s on an H100, where reads alone
    /// get 3.2 and a copy 3.0, and 4.3 on an H200, where a copy gets that.
    pub fn streamed(&self) -> f64 {
        0.9 * f64::from(self.memory_rate)
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

/// Where a call's route comes from, as far as a plan must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteSource {
    /// This call makes it.
    Made,
    /// The caller made it, in blocks of this many places: each becomes a tile.
    Sorted {
        /// Pairs a tile.
        tile_rows: u32,
    },
    /// An earlier call made it, in tiles of this many pairs.
    Kept {
        /// Pairs a tile.
        tile_rows: u32,
    },
}

impl RouteSource {
    /// Pairs a tile of a route that is there already; `None` where this call makes it.
    fn tile_rows(self) -> Option<u32> {
        match self {
            RouteSource::Made => None,
            RouteSource::Sorted { tile_rows } | RouteSource::Kept { tile_rows } => Some(tile_rows),
        }
    }
}

/// Which part of the operator a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Neither: the routing alone.
    Route,
    /// Shrink and expand.
    Forward,
    /// Shrink alone.
    Shrink,
    /// Expand alone.
    Expand,
}

/// One launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// The kernel.
    pub entry: &'static Entry,
    /// Blocks: a multiple of `cluster`.
    pub blocks: u32,
    /// Blocks of a cluster; 1: no clusters.
    pub cluster: u32,
    /// Whether all blocks must run at once.
    pub cooperative: bool,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// How `route` divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sorting {
    /// The form.
    pub kernel: Kernel,
    /// Blocks.
    pub blocks: u32,
    /// Pairs that each warp takes.
    pub run: u32,
    /// Buckets that are counted at a time.
    pub window: u32,
}

/// How `decode` divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DecodePlan {
    /// The launch.
    pub launch: Launch,
    /// Whether each block finds the segments itself.
    pub finds: bool,
    /// What the blocks have room for; nothing when they find no segments.
    pub room: Room,
    /// Stages of the rings for shrink and for expand.
    pub stages: [u32; 2],
}

/// How `shrink` divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShrinkPlan {
    /// The launch.
    pub launch: Launch,
    /// Blocks that share a tile's columns.
    pub column_blocks: u32,
    /// Columns that a stage has room for.
    pub column_room: u32,
    /// Blocks that share K.
    pub splits: u32,
    /// Steps of K that each of them takes.
    pub steps_per_split: u32,
}

/// How `expand` divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExpandPlan {
    /// The launch.
    pub launch: Launch,
    /// Blocks that share a slice's columns.
    pub blocks_per_slice: u32,
    /// Columns that each of them takes.
    pub columns_per_block: u32,
}

/// How `prefill` runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PrefillPlan {
    /// The launch.
    pub launch: Launch,
    /// Passes that a tile of the largest rank is taken in.
    pub passes: u32,
    /// Stages of its ring.
    pub stages: u32,
    /// Steps of expand that may be under way in it at a time.
    pub under_way: u32,
    /// Bytes of each row of x that it asks for before it waits for the route.
    pub ahead: u32,
    /// How blocks share a pass, where they do.
    pub shares: Option<PassShares>,
}

/// How blocks share a pass of `prefill`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PassShares {
    /// Split of K.
    pub depth: Split,
    /// Split of a slice's columns.
    pub columns: Split,
    /// Words of the h of all passes that may be left in the workspace; after it come the sums of shares of K.
    pub h_words: u64,
}

/// Up to `most` shares of `length` elements, in multiples of `unit`.
fn shares_of(length: usize, most: u32, unit: u32) -> Split {
    let length = length as u32;
    let each = length.div_ceil(most.clamp(1, Split::MAX)).next_multiple_of(unit);
    Split { count: length.div_ceil(each), each }
}

/// Everything that a call will launch. Prints as one line a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Width of element offsets.
    pub(crate) index: kernels::IndexWidth,
    /// Tile of `shrink` and `expand`.
    pub(crate) tile: kernels::TileKind,
    /// Pairs a tile of the route: as many as the kernel takes or, for `prefill`, fewer; or as many as the route came with.
    pub(crate) tile_rows: u32,
    /// Most tiles that the route can have.
    pub(crate) route_tiles: u64,
    /// Parts that a tile of the route is taken in.
    pub(crate) tile_parts: u32,
    /// Largest element offset over all tensors of the call.
    pub(crate) largest_offset: u64,
    /// The launch that makes or takes over the route; `None` when it is kept from an earlier call, or found by
    /// `decode`.
    pub(crate) route: Option<Launch>,
    /// How that launch divides its work, if it makes the route.
    pub(crate) sorting: Sorting,
    /// The launch that shrinks and expands, in place of the two.
    pub(crate) decode: Option<DecodePlan>,
    /// The launch that does so for many pairs.
    pub(crate) prefill: Option<PrefillPlan>,
    /// The shrink launch; `None` in [`Stage::Route`] and [`Stage::Expand`].
    pub(crate) shrink: Option<ShrinkPlan>,
    /// The expand launch; `None` in [`Stage::Route`] and [`Stage::Shrink`].
    pub(crate) expand: Option<ExpandPlan>,
}

/// One launch of a [`Plan`], as the driver is asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedLaunch {
    /// Name of the kernel's entry point.
    pub kernel: &'static str,
    /// Blocks: a multiple of `cluster`.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Blocks of a cluster; 1: no clusters.
    pub cluster: u32,
    /// Whether all blocks must run at once.
    pub cooperative: bool,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// Elements of f32 that partial sums of `h` may take: 16 MiB. Beyond, a call has blocks enough without
/// sharing K.
const MAX_PARTIAL: u64 = 4 << 20;

/// Multiprocessors whose blocks of `prefill` have room to share passes, at least.
const MOST_SHARING: u64 = 144;

/// Pairs of a block of `route` below which more blocks are never worth it.
const MIN_BLOCK_PAIRS: usize = 256;

/// Blocks of `route` that any workspace has room for, when buckets are not too many.
const MIN_ROUTE_BLOCKS: usize = 4;

/// Most words of a table in which blocks of `route` tell one another their counts: 2 MiB.
const MAX_EXCHANGE: u64 = 1 << 19;

/// Threads of a warp.
const WARP: u32 = 32;

/// Most blocks of one launch: the grid's x dimension.
const MAX_BLOCKS: u64 = i32::MAX as u64;

/// Elements are 16-byte aligned when counts of them are multiples of this.
const VECTOR: usize = 8;

/// Columns of shared memory that hold a stage come in whole groups of a warp.
const COLUMN_GROUP: usize = moe_lora_kernels::tile::GROUP as usize;

fn entry(kernel: Kernel) -> &'static Entry {
    ENTRIES.iter().find(|entry| entry.kernel == kernel).expect("every variant is in the table")
}

/// Bytes of scratch memory that any call of up to `tokens` tokens needs for `h` and its parts.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) fn scratch_bytes(projection: &Projection, tokens: usize) -> Result<usize> {
    let h = projection.h_elements(tokens)?;
    let partial = (h as u64).saturating_mul(u64::from(heuristics::MAX_SPLITS)).min(MAX_PARTIAL);
    Ok((h * DType::SIZE).max(partial as usize * size_of::<f32>()))
}

/// Bytes of memory that any call of up to `tokens` tokens needs for what blocks of `prefill` that share passes leave for one another.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) fn shared_pass_bytes(projection: &Projection, tokens: usize) -> Result<u64> {
    Ok(shared_pass_room(projection, projection.pairs(tokens)?))
}

/// Bytes of memory in which blocks of `prefill` that share passes leave sums and h for one another, in any call of so many pairs: enough for
/// a share of K a block if there are twice as many passes as is likely, up to as much as parts of h may take. As all that a workspace has room
/// for, it does not depend on K and N, and is not less for larger ranks.
fn shared_pass_room(projection: &Projection, pairs: usize) -> u64 {
    let of = |tile: PrefillTile| {
        let widest = prefill::Shape { rows: tile.rows(), width: prefill::MAX_WIDTH };
        let shape = prefill_shape(projection, tile).unwrap_or(widest);
        let passes = projection.sizes().slices as u64 * tiles(projection, pairs, shape.rows);
        let shares =
            (2 * MOST_SHARING * u64::from(shape.blocks_per_sm())).min(passes * u64::from(Split::MAX));
        // Of a share the sums are twice as many bytes as h of a pass.
        shares.max(passes) * 3 * prefill::workspace_bytes(shape, 1)
    };
    PrefillTile::ALL.map(of).into_iter().fold(0, u64::max).min(MAX_PARTIAL * size_of::<f32>() as u64)
}

/// Words of each table in which the blocks of any route of up to `tokens` tokens tell one another their counts.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) fn exchange_words(projection: &Projection, tokens: usize) -> Result<u64> {
    let buckets = buckets(projection);
    let blocks = most_route_blocks(projection.pairs(tokens)?, buckets);
    Ok(route::table_words(blocks.into(), buckets))
}

/// Most tiles that any call of up to `tokens` tokens can have, whatever the tile.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) fn max_tiles(projection: &Projection, tokens: usize) -> Result<u64> {
    Ok(tiles(projection, projection.pairs(tokens)?, kernels::DecodeRows::M8.count()))
}

/// One launch of `kernel`, in clusters of `cluster` blocks.
fn launch(kernel: Kernel, blocks: u64, cluster: u32, shared_bytes: u32) -> Result<Launch> {
    if blocks > MAX_BLOCKS {
        let (what, limit) = ("blocks of a launch", MAX_BLOCKS as usize);
        return Err(Error::SizeTooLarge { what, limit, got: blocks as usize });
    }
    let cooperative = matches!(kernel, Kernel::RouteGrid | Kernel::RouteWide);
    Ok(Launch { entry: entry(kernel), blocks: blocks as u32, cluster, cooperative, shared_bytes })
}

/// The launch that sorts `pairs` pairs of `experts` experts into blocks, slot by slot.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) fn align(pairs: usize, experts: usize, slots: usize, limits: &DeviceLimits) -> Result<Launch> {
    let clustered = limits.has_clusters() && pairs >= heuristics::ALIGN_CLUSTER_PAIRS;
    let kernel = if clustered { Kernel::AlignCluster } else { Kernel::Align };
    let cluster = entry(kernel).cluster;
    launch(kernel, slots as u64 * u64::from(cluster), cluster, align::shared_bytes(experts as u32))
}

/// Elements of the list of pairs that any route of up to `tokens` tokens needs: in blocks of the largest size,
/// each segment ends in one that may hold a single pair.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub(crate) fn max_listed(projection: &Projection, tokens: usize) -> Result<u64> {
    let (pairs, most) = (projection.pairs(tokens)? as u64, u64::from(adopt::MAX_BLOCK_SIZE));
    Ok(pairs + buckets(projection).min(pairs) * most)
}

/// Buckets of `route`, the one for inactive pairs included.
fn buckets(projection: &Projection) -> u64 {
    (projection.sizes().slots * projection.sizes().experts) as u64 + 1
}

fn tiles(projection: &Projection, pairs: usize, tile_rows: u32) -> u64 {
    route::max_tiles(pairs as u64, buckets(projection), u64::from(tile_rows))
}

impl Plan {
    /// Plans a call whose inputs were checked. `None` when there is nothing to do (T = 0).
    ///
    /// # Errors
    /// [`Error::SizeTooLarge`] when a launch would need more blocks than a grid has.
    pub fn new(
        projection: &Projection,
        layout: &Layout,
        stage: Stage,
        route: RouteSource,
        limits: &DeviceLimits,
        options: &Options,
    ) -> Result<Option<Self>> {
        if layout.tokens == 0 {
            return Ok(None);
        }
        let sizes = projection.sizes();
        let pairs = projection.pairs(layout.tokens)?;
        let h = projection.h_elements(layout.tokens)? as u64;

        let multiples =
            [sizes.in_dim, sizes.out_dim, sizes.max_rank, layout.x_stride, layout.out_stride, layout.offset];
        // A route made alone suits any call: those that cannot take its tiles whole take them in parts.
        let aligned = layout.aligned && multiples.iter().all(|size| size % VECTOR == 0);
        let fast = aligned || stage == Stage::Route;
        let fits = |tile: &kernels::TileKind| {
            let shape = tile.shape();
            let room = column_room(projection, shape);
            let bytes =
                shrink::shared_bytes(shape, room).max(expand::shared_bytes(shape, sizes.max_rank as u32));
            let in_route = route.tile_rows().is_none_or(|rows| shape.rows() <= rows);
            in_route && bytes <= limits.shared_bytes
        };
        let tile = match options.tile.map(kernels::TileKind::from) {
            _ if !fast => kernels::TileKind::Any,
            Some(tile) if fits(&tile) => tile,
            _ => heuristics::tile(pairs, buckets(projection), fits),
        };
        let shape = tile.shape();
        let decode_shape = match stage {
            Stage::Forward if fast => DecodeShape::new(projection, pairs, route, limits, options),
            _ => None,
        };
        // A route made alone is made for the calls that will use it.
        let decodes = decode_shape.is_some() || stage != Stage::Forward;
        // A call before that found its route as `decode` does had ranks that said so.
        let ranked = layout.ranked || route.tile_rows() == Some(kernels::DecodeRows::M8.count());
        let least = heuristics::prefill_least(sizes, decodes, ranked, limits);
        let prefill =
            PrefillChoice::new(projection, pairs, stage, route, limits, options, least).filter(|_| fast);
        let decode_shape = decode_shape.filter(|_| prefill.is_none());
        let rows = match (&decode_shape, prefill) {
            (Some(shape), _) => shape.rows.count(),
            (None, Some(choice)) => choice.tile.rows(),
            (None, None) => shape.rows(),
        };
        let made_rows = prefill.map_or(rows, |choice| choice.route_rows);
        let prefill = prefill.filter(|_| stage != Stage::Route);
        let one_launch = decode_shape.is_some() || prefill.is_some();
        let RouteTiles { tile_rows, route_tiles, tile_parts } =
            RouteTiles::new(projection, pairs, route.tile_rows().unwrap_or(made_rows), rows);
        let tiles = route_tiles * u64::from(tile_parts);
        // Most of a given route's parts are empty where segments are short. Those with pairs are as many as the
        // tiles of a route of this call's own: these are what can fill the device.
        let busy = tiles.min(self::tiles(projection, pairs, shape.rows()));

        // How the launches divide their work.
        let columns = sizes.slices * sizes.max_rank;
        let column_blocks = (columns as u32).div_ceil(shape.columns());
        let steps = (sizes.in_dim as u32).div_ceil(TileShape::DEPTH);
        let splits = match (stage, tile) {
            // The split form's h is whole, and only the fast kernels store parts.
            (Stage::Forward, kernels::TileKind::M16 | kernels::TileKind::M32 | kernels::TileKind::M64)
                if !one_launch =>
            {
                let most_parts = (MAX_PARTIAL / h).min(u64::from(heuristics::MAX_SPLITS)) as u32;
                heuristics::splits(busy * u64::from(column_blocks), steps, most_parts, limits)
            }
            _ => 1,
        };
        let steps_per_split = steps.div_ceil(splits);
        let splits = steps.div_ceil(steps_per_split);
        let slices = sizes.slices as u64;
        let columns_per_block =
            heuristics::expand_columns(busy * slices, sizes.out_dim as u32, shape, limits);
        let blocks_per_slice = (sizes.out_dim as u32).div_ceil(columns_per_block);

        // The largest element offset decides the index width.
        let x = match sizes.x_rows {
            XRows::Token => layout.tokens,
            XRows::Pair => pairs,
        } as u64;
        let weights = |part: Result<usize>| part.map(|elements| elements as u64);
        let largest_offset = [
            x.saturating_mul(layout.x_stride as u64),
            (pairs as u64).saturating_mul(layout.out_stride as u64),
            weights(projection.a_elements())?,
            weights(projection.b_elements())?,
            h * u64::from(splits),
        ]
        .into_iter()
        .fold(0, u64::max);
        let index = match options.index.map(kernels::IndexWidth::from) {
            _ if largest_offset > i32::MAX as u64 => kernels::IndexWidth::I64,
            Some(index) => index,
            None => kernels::IndexWidth::I32,
        };

        let element = match sizes.dtype {
            DType::Bf16 => ElementType::Bf16,
            DType::F16 => ElementType::F16,
        };
        let variant = Variant { element, index, tile };
        let decode = decode_shape.map(|shape| shape.plan(projection, tiles * slices, element, index, limits));
        let decode = decode.transpose()?;
        let finds = decode.is_some_and(|decode| decode.finds);
        let prefill_plan = |PrefillChoice { tile, most_shares, .. }: PrefillChoice| {
            let shape = prefill_shape(projection, tile).expect("chosen where it can be");
            let kernel = Kernel::Prefill(PrefillVariant { element, index, shape });
            let passes = prefill_passes(projection, shape);
            let shares = (most_shares > 0).then(|| {
                let [depth, columns] = heuristics::prefill_shares(pairs, sizes, shape, passes, limits);
                let depth = shares_of(sizes.in_dim, depth.min(most_shares), shape.split_k_unit());
                let columns = shares_of(sizes.out_dim, columns, shape.split_n_unit());
                let h_words = tiles * u64::from(passes) * prefill::h_words(shape);
                PassShares { depth, columns, h_words }
            });
            let turns = shares.map_or(1, |shares| shares.depth.count.max(shares.columns.count));
            let most = u64::from(limits.multiprocessors * shape.blocks_per_sm());
            let blocks = (tiles * u64::from(passes) * u64::from(turns)).min(most);
            let is_full = heuristics::prefill_is_full(shape, pairs, buckets(projection), tile_rows);
            let stages = heuristics::prefill_stages(shape, passes, is_full, limits);
            let launch = launch(kernel, blocks, 1, shape.shared_bytes(stages))?;
            // Blocks that share a pass wait for one another.
            let launch = Launch { cooperative: shares.is_some(), ..launch };
            let under_way = heuristics::prefill_under_way(shape, stages, shares.is_some(), is_full, limits);
            let ahead = if stage == Stage::Expand { 0 } else { heuristics::prefill_ahead(x, sizes.in_dim) };
            Ok(PrefillPlan { launch, passes, stages, under_way, ahead, shares })
        };
        let prefill = prefill.map(prefill_plan).transpose()?;
        let sorting = sorting(projection, pairs, limits, options);
        let column_room = column_room(projection, shape);
        Ok(Some(Plan {
            index,
            tile,
            tile_rows,
            route_tiles,
            tile_parts,
            largest_offset,
            decode,
            prefill,
            route: match route {
                RouteSource::Made if finds => None,
                RouteSource::Made => {
                    let Sorting { kernel, blocks, window, .. } = sorting;
                    let sorters = entry(kernel).threads / WARP;
                    Some(launch(kernel, blocks.into(), 1, route::shared_bytes(sorters, window))?)
                }
                RouteSource::Sorted { .. } => {
                    let blocks = route_tiles.div_ceil(u64::from(adopt::TILES));
                    Some(launch(Kernel::Adopt, blocks, 1, adopt::shared_bytes(sizes.slots as u32))?)
                }
                RouteSource::Kept { .. } => None,
            },
            sorting,
            shrink: match stage {
                _ if one_launch => None,
                Stage::Route | Stage::Expand => None,
                Stage::Forward | Stage::Shrink => Some(ShrinkPlan {
                    launch: launch(
                        Kernel::Shrink(variant),
                        tiles * u64::from(column_blocks) * u64::from(splits),
                        1,
                        shrink::shared_bytes(shape, column_room),
                    )?,
                    column_blocks,
                    column_room,
                    splits,
                    steps_per_split,
                }),
            },
            expand: match stage {
                _ if one_launch => None,
                Stage::Route | Stage::Shrink => None,
                Stage::Forward | Stage::Expand => Some(ExpandPlan {
                    launch: launch(
                        Kernel::Expand(variant),
                        tiles * slices * u64::from(blocks_per_slice),
                        1,
                        expand::shared_bytes(shape, sizes.max_rank as u32),
                    )?,
                    blocks_per_slice,
                    columns_per_block,
                }),
            },
        }))
    }

    /// Parts that `h` is summed from.
    pub(crate) fn splits(&self) -> u32 {
        self.shrink.map_or(1, |shrink| shrink.splits)
    }

    /// Width of element offsets.
    pub fn index_width(&self) -> IndexWidth {
        self.index.into()
    }

    /// Largest element offset over all tensors of the call, which decides the width.
    pub fn largest_offset(&self) -> u64 {
        self.largest_offset
    }

    /// Which kernels shrink and expand; [`Form::TwoLaunches`] also where the plan is of one of the two, or of the
    /// route alone.
    pub fn form(&self) -> Form {
        match (&self.decode, &self.prefill) {
            (Some(_), _) => Form::Decode,
            (None, Some(PrefillPlan { launch, shares, .. })) => {
                let rows = match launch.entry.kernel {
                    Kernel::Prefill(variant) => variant.shape.rows,
                    _ => unreachable!("a plan of prefill launches it"),
                };
                let of_rows = |tile: &PrefillTile| tile.rows() == rows;
                let tile = PrefillTile::ALL.into_iter().find(of_rows).expect("prefill has these tiles alone");
                if shares.is_some() { Form::SharedPrefill(tile) } else { Form::Prefill(tile) }
            }
            (None, None) => Form::TwoLaunches,
        }
    }

    /// Tile of `shrink` and `expand`, where these run.
    pub fn tile(&self) -> TileKind {
        self.tile.into()
    }

    /// Pairs of the route's largest tile.
    pub fn tile_rows(&self) -> u32 {
        self.tile_rows
    }

    /// What is launched, in order.
    pub fn launches(&self) -> impl Iterator<Item = PlannedLaunch> {
        let launches = [
            self.route,
            self.decode.map(|decode| decode.launch),
            self.prefill.map(|prefill| prefill.launch),
            self.shrink.map(|shrink| shrink.launch),
            self.expand.map(|expand| expand.launch),
        ];
        launches.into_iter().flatten().map(|launch| {
            let Launch { entry, blocks, cluster, cooperative, shared_bytes } = launch;
            let (kernel, threads) = (entry.name, entry.threads);
            PlannedLaunch { kernel, blocks, threads, cluster, cooperative, shared_bytes }
        })
    }
}

/// Most blocks of `route` on `pairs` pairs: a workspace has room for what so many tell one another.
pub fn most_route_blocks(pairs: usize, buckets: u64) -> u32 {
    let most = (pairs / MIN_BLOCK_PAIRS).clamp(MIN_ROUTE_BLOCKS, route::MAX_BLOCKS as usize) as u64;
    most.min(MAX_EXCHANGE / buckets).max(1) as u32
}

/// How `route` sorts `pairs` pairs.
fn sorting(projection: &Projection, pairs: usize, limits: &DeviceLimits, options: &Options) -> Sorting {
    let (slots, buckets) = (projection.sizes().slots as u64, buckets(projection));
    let most = most_route_blocks(pairs, buckets).min(limits.multiprocessors);
    let blocks = options.route_blocks.unwrap_or(heuristics::route_blocks(pairs)).clamp(1, most);
    let run = |kernel| {
        pairs.div_ceil((blocks * entry(kernel).threads / WARP) as usize).next_multiple_of(WARP as usize)
    };
    let room = |kernel| route::max_window(entry(kernel).threads / WARP, limits.shared_bytes);
    let narrow = |kernel: &Kernel| {
        let threads = entry(*kernel).threads;
        let block_pairs = run(*kernel) as u64 * u64::from(threads / WARP);
        (*kernel == Kernel::RouteGrid || blocks == 1)
            && route::is_narrow(threads, block_pairs, slots, buckets)
            && route::window(buckets) <= room(*kernel).into()
    };
    let kernel = [Kernel::Route, Kernel::RouteGrid].into_iter().find(narrow).unwrap_or(Kernel::RouteWide);
    let window = route::window(buckets).min(room(kernel).into()) as u32;
    Sorting { kernel, blocks, run: run(kernel) as u32, window }
}

/// How `decode` will be used for a call.
struct DecodeShape {
    rows: kernels::DecodeRows,
    cluster: u32,
    finds: bool,
    room: Room,
    stages: [u32; 2],
    /// Blocks that a multiprocessor runs at a time.
    blocks: u32,
}

impl DecodeShape {
    /// For a whole call with sizes and addresses in multiples of 8 elements. `None` where `decode` cannot be, or
    /// should not be, what runs.
    fn new(
        projection: &Projection,
        pairs: usize,
        route: RouteSource,
        limits: &DeviceLimits,
        options: &Options,
    ) -> Option<Self> {
        let sizes = projection.sizes();
        let wanted = match (options.form, options.tile) {
            (Some(form), _) => form == Form::Decode,
            (None, Some(_)) => false,
            (None, None) => {
                heuristics::wants_decode(pairs, buckets(projection), sizes, route.tile_rows(), limits)
            }
        };
        let possible = limits.has_clusters()
            && sizes.max_rank <= decode::MAX_RANK as usize
            // Elements of one matrix of b are counted in 32 bits, whatever the index width.
            && sizes.out_dim.saturating_mul(sizes.max_rank) <= i32::MAX as usize;
        if !(wanted && possible) {
            return None;
        }
        let finds = route == RouteSource::Made
            && pairs <= segments::MAX_PAIRS as usize
            && sizes.slots.max(sizes.experts) <= segments::MAX_NUMBER as usize;
        let most_rows = route.tile_rows().unwrap_or(u32::MAX);
        let wanted = options
            .rows
            .map(kernels::DecodeRows::from)
            .unwrap_or_else(|| heuristics::decode_rows(pairs, buckets(projection)));
        // From the wanted size downwards: a large rank may leave no room for a large tile, and a route may have
        // small ones.
        kernels::DecodeRows::ALL.into_iter().rev().skip_while(|rows| *rows > wanted).find_map(|rows| {
            let count = rows.count();
            if count > most_rows.max(kernels::DecodeRows::M8.count()) {
                return None;
            }
            let tiles = tiles(projection, pairs, count);
            let most_blocks = decode_blocks(rows);
            let cluster =
                heuristics::decode_cluster(pairs, count, most_blocks, sizes, limits, options.cluster);
            // Where segments and h leave too little room for several blocks, one takes all.
            (1..=most_blocks).rev().find_map(|blocks| {
                let (mut room, mut scratch) = (Room::NONE, 0);
                if finds {
                    let units = tiles * sizes.slices as u64;
                    let own = units.div_ceil(heuristics::decode_clusters(units, cluster, blocks, limits));
                    let (pairs, buckets) = (pairs as u32, buckets(projection) - 1);
                    room = Room::new(pairs, buckets, tiles as u32, count, own as u32);
                    scratch = room.scratch_bytes(pairs, buckets);
                }
                let fixed = decode::fixed_bytes(count, sizes.max_rank as u32, cluster, room);
                let left = limits.shared_bytes_of(blocks).checked_sub(fixed)?;
                let stages = decode_stages(projection, count, left)?;
                let has_scratch = stages[1] * decode::expand_stage_bytes(count) >= scratch;
                has_scratch.then_some(DecodeShape { rows, cluster, finds, room, stages, blocks })
            })
        })
    }

    fn plan(
        self,
        projection: &Projection,
        units: u64,
        element: ElementType,
        index: kernels::IndexWidth,
        limits: &DeviceLimits,
    ) -> Result<DecodePlan> {
        let DecodeShape { rows, cluster, finds, room, stages, blocks } = self;
        let max_rank = projection.sizes().max_rank as u32;
        let shared_bytes =
            decode::fixed_bytes(rows.count(), max_rank, cluster, room) + ring_bytes(rows.count(), stages);
        let clusters = heuristics::decode_clusters(units, cluster, blocks, limits);
        let kernel = Kernel::Decode { element, index, rows };
        let launch = launch(kernel, clusters * u64::from(cluster), cluster, shared_bytes)?;
        Ok(DecodePlan { launch, finds, room, stages })
    }
}

/// Blocks of `decode` with tiles of so many pairs for which a multiprocessor has registers.
fn decode_blocks(rows: kernels::DecodeRows) -> u32 {
    let (element, index) = (ElementType::Bf16, kernels::IndexWidth::I32);
    entry(Kernel::Decode { element, index, rows }).min_blocks
}

/// Bytes of both rings of `decode`.
fn ring_bytes(rows: u32, [shrink, expand]: [u32; 2]) -> u32 {
    shrink * decode::shrink_stage_bytes(rows) + expand * decode::expand_stage_bytes(rows)
}

/// Stages of the rings of `decode` for which `bytes` bytes have room: as many of each as its share of the weights'
/// bytes is. `None` when there is not even room for the fewest.
fn decode_stages(projection: &Projection, rows: u32, bytes: u32) -> Option<[u32; 2]> {
    let sizes = projection.sizes();
    let fits = |stages: [u32; 2]| {
        ring_bytes(rows, stages) <= bytes && stages.iter().all(|stages| *stages <= decode::MAX_STAGES)
    };
    let mut stages = Some([decode::MIN_STAGES; 2]).filter(|stages| fits(*stages))?;
    loop {
        let [shrink, expand] = stages;
        let more = [[shrink + 1, expand], [shrink, expand + 1]];
        let wanted = usize::from(
            (shrink * decode::A_STAGE) as usize * sizes.out_dim
                > (expand * decode::B_STAGE) as usize * sizes.in_dim,
        );
        match [more[wanted], more[1 - wanted]].into_iter().find(|stages| fits(*stages)) {
            Some(more) => stages = more,
            None => return Some(stages),
        }
    }
}

/// The kernel of `prefill` for a projection: the narrowest whose passes take as many slices as they are to, or the widest. `None` where
/// not even that has room for the ranks of a slice.
fn prefill_shape(projection: &Projection, tile: PrefillTile) -> Option<prefill::Shape> {
    let sizes = projection.sizes();
    if sizes.max_rank > prefill::MAX_WIDTH as usize {
        return None;
    }
    let columns = heuristics::prefill_columns(tile, sizes);
    let width = prefill::Shape::WIDTHS.into_iter().find(|&width| columns <= width);
    Some(prefill::Shape { rows: tile.rows(), width: width.unwrap_or(prefill::MAX_WIDTH) })
}

/// Passes over a tile of the largest rank.
fn prefill_passes(projection: &Projection, shape: prefill::Shape) -> u32 {
    let sizes = projection.sizes();
    shape.passes(sizes.slices as u32, sizes.max_rank as u32)
}

/// How `prefill` will be used for a call.
#[derive(Clone, Copy)]
struct PrefillChoice {
    tile: PrefillTile,
    /// Pairs of the tiles of a route that the call makes: as many, or fewer.
    route_rows: u32,
    /// Where blocks share passes, most shares of K of each; else 0.
    most_shares: u32,
}

impl PrefillChoice {
    /// For a call with sizes and addresses in multiples of 8 elements; `None` where the call is not `prefill`'s.
    /// `least`: pairs a segment from which on it is the faster form.
    fn new(
        projection: &Projection,
        pairs: usize,
        stage: Stage,
        route: RouteSource,
        limits: &DeviceLimits,
        options: &Options,
        least: u64,
    ) -> Option<Self> {
        let sizes = projection.sizes();
        // Elements of one matrix are counted in 32 bits, whatever the index width.
        let matrix = sizes.in_dim.max(sizes.out_dim).saturating_mul(sizes.max_rank);
        let multiples = [sizes.in_dim, sizes.out_dim, sizes.max_rank];
        let possible =
            limits.wgmma && matrix <= i32::MAX as usize && multiples.iter().all(|size| size % VECTOR == 0);
        // The halves of the split form have a launch each.
        let can_share = !matches!(stage, Stage::Shrink | Stage::Expand);
        let most_shares = |tile| if can_share { most_shares(projection, pairs, route, tile) } else { 0 };
        let passes =
            |tile| prefill_shape(projection, tile).map_or(1, |shape| prefill_passes(projection, shape));
        let (tile, is_shared) = match (options.form, options.tile) {
            (Some(Form::Prefill(tile)), _) => Some((tile, false)),
            (Some(Form::SharedPrefill(tile)), _) => Some((tile, true)),
            (Some(_), _) | (None, Some(_)) => None,
            (None, None) => {
                let shares = |tile| most_shares(tile) > 0;
                heuristics::prefill_tile(pairs, sizes, least, shares, passes, limits)
            }
        }
        .filter(|_| possible)?;
        let fits = |tile: &PrefillTile| {
            // Tiles of a route may have been made somewhat smaller than the larger tile.
            let in_route = route.tile_rows().is_none_or(|rows| tile.rows() < rows + PrefillTile::M64.rows());
            let shape = prefill_shape(projection, *tile);
            in_route
                && shape.is_some_and(|shape| shape.shared_bytes(shape.max_stages()) <= limits.shared_bytes)
        };
        // A given route's tiles may be too small for the larger tile, and not for the smaller.
        let tile = [tile, PrefillTile::M64].into_iter().find(fits)?;
        let most_shares = if is_shared { Some(most_shares(tile)).filter(|most| *most > 0)? } else { 0 };
        let route_rows = match most_shares {
            0 => heuristics::prefill_rows(pairs, sizes, tile, passes(tile), limits),
            _ => tile.rows(),
        };
        Some(PrefillChoice { tile, route_rows, most_shares })
    }
}

/// Most shares of K that blocks may take of a pass over tiles of this size, for what they tell one another to have room; 0 where they cannot share.
fn most_shares(projection: &Projection, pairs: usize, route: RouteSource, tile: PrefillTile) -> u32 {
    let Some(shape) =
        prefill_shape(projection, tile).filter(|shape| shape.width <= prefill::MAX_SHARED_WIDTH)
    else {
        return 0;
    };
    let tile_rows = route.tile_rows().unwrap_or(shape.rows);
    let RouteTiles { route_tiles, tile_parts, .. } =
        RouteTiles::new(projection, pairs, tile_rows, shape.rows);
    let passes = route_tiles * u64::from(tile_parts * prefill_passes(projection, shape));
    if passes > u64::from(prefill::MAX_COUNTERS / shape.counters()) {
        return 0;
    }
    let room = shared_pass_room(projection, pairs);
    let fits = |shares: &u32| passes * prefill::workspace_bytes(shape, *shares) <= room;
    (1..=Split::MAX).rev().find(fits).unwrap_or(0)
}

/// The tiles of a call's route, and the parts that a kernel with tiles of its own takes them in.
struct RouteTiles {
    /// Pairs a tile of the route.
    tile_rows: u32,
    /// Most tiles that it can have.
    route_tiles: u64,
    /// Parts of each.
    tile_parts: u32,
}

impl RouteTiles {
    /// Of `tile_rows` pairs, for a kernel with tiles of `rows`.
    fn new(projection: &Projection, pairs: usize, tile_rows: u32, rows: u32) -> Self {
        // Every tile is taken in as many parts as a full one needs.
        let tile_parts = tile_rows.div_ceil(rows);
        RouteTiles { tile_rows, route_tiles: tiles(projection, pairs, tile_rows), tile_parts }
    }
}

/// Columns that a stage of `shrink` must have room for.
fn column_room(projection: &Projection, shape: TileShape) -> u32 {
    let columns = (projection.sizes().slices * projection.sizes().max_rank).next_multiple_of(COLUMN_GROUP);
    shape.columns().min(columns as u32)
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Launch { entry, blocks, cluster, cooperative, shared_bytes } = self;
        let Entry { name, threads, .. } = entry;
        write!(f, "{name:<20} {blocks} blocks of {threads} threads, {shared_bytes} bytes shared")?;
        if *cooperative {
            f.write_str(", all at once")?;
        }
        if *cluster > 1 { write!(f, ", clusters of {cluster}") } else { Ok(()) }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "offsets {:?} (largest {})", self.index, self.largest_offset)?;
        if self.decode.is_none() && self.prefill.is_none() {
            let shape = self.tile.shape();
            write!(f, ", tile {} pairs × {} columns", shape.rows(), shape.columns())?;
        }
        if let Some(launch) = self.route {
            write!(f, "\n  {launch}")?;
        }
        if let Some(plan) = self.decode {
            let [shrink, expand] = plan.stages;
            write!(f, "\n  {}, {shrink} + {expand} stages", plan.launch)?;
        }
        if let Some(PrefillPlan { launch, shares, .. }) = self.prefill {
            write!(f, "\n  {launch}")?;
            if let Some(PassShares { depth, columns, .. }) = shares {
                write!(f, ", K in {} shares of {}", depth.count, depth.each)?;
                write!(f, ", columns in {} of {}", columns.count, columns.each)?;
            }
        }
        if let Some(plan) = self.shrink {
            write!(f, "\n  {}, K in {} parts of {} steps", plan.launch, plan.splits, plan.steps_per_split)?;
        }
        if let Some(plan) = self.expand {
            write!(f, "\n  {}, {} columns a block", plan.launch, plan.columns_per_block)?;
        }
        Ok(())
    }
}
