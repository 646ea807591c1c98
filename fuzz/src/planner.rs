//! Any sizes: there is a plan or an error, and a plan keeps within its index width, its grid, its device and
//! the work to be done.

use arbitrary::{Arbitrary, Result, Unstructured};
use half::{bf16, f16};
use moe_lora::plan::promises::hold;
use moe_lora::plan::{
    DecodeRows, DeviceLimits, Form, IndexWidth, Options, Plan, PrefillTile, RouteSource, Stage, TileKind,
};
use moe_lora::{
    AdapterEntry, Adapters, BlockShape, Cuda, DType, Element, Enabled, ExpertWeights, Forward, Layout,
    OutDims, Projection, ProjectionSizes, RoutingTensors, Rows, RowsMut, SliceOrder, TopkIds, View, ViewMut,
    Weights, XRows,
};

/// Plans for the call that `data` describes.
///
/// # Panics
/// When planning does, or a plan breaks a promise.
pub fn check(data: &[u8]) {
    // Too few bytes describe no call.
    let _ = plan(&mut Unstructured::new(data));
}

/// A size: small, around a power of two, or any.
fn size(u: &mut Unstructured<'_>) -> Result<usize> {
    Ok(match u.int_in_range(0..=3)? {
        0 => u.int_in_range(0..=16)?,
        1 => u.int_in_range(0..=4096)?,
        2 => (1usize << u.int_in_range(0..=63)?).wrapping_add_signed(u.int_in_range(-2..=2)?),
        _ => u.arbitrary()?,
    })
}

fn either<T>(u: &mut Unstructured<'_>, [one, other]: [T; 2]) -> Result<T> {
    Ok(if bool::arbitrary(u)? { one } else { other })
}

fn sizes(u: &mut Unstructured<'_>) -> Result<ProjectionSizes> {
    let dense = bool::arbitrary(u)?;
    let (top_k, experts) = if dense { (1, 1) } else { (u.int_in_range(0..=65)?, size(u)?) };
    Ok(ProjectionSizes {
        dtype: either(u, [DType::Bf16, DType::F16])?,
        x_rows: either(u, [XRows::Token, XRows::Pair])?,
        a_experts: either(u, [ExpertWeights::PerExpert, ExpertWeights::Shared])?,
        b_experts: either(u, [ExpertWeights::PerExpert, ExpertWeights::Shared])?,
        top_k,
        experts,
        max_rank: u.int_in_range(0..=1025)?,
        slots: size(u)?,
        in_dim: size(u)?,
        out_dims: out_dims(u)?,
    })
}

fn out_dims(u: &mut Unstructured<'_>) -> Result<OutDims> {
    if bool::arbitrary(u)? {
        return Ok(OutDims::uniform(size(u)?, u.int_in_range(0..=5)?));
    }
    let mut widths = [0; Projection::MAX_SLICES];
    let slices = u.int_in_range(1..=widths.len())?;
    for width in &mut widths[..slices] {
        *width = size(u)?;
    }
    Ok(OutDims::new(&widths[..slices]).expect("one to four slices"))
}

fn limits(u: &mut Unstructured<'_>) -> Result<DeviceLimits> {
    // The most shared memory of a block from sm_80 on: 99 KiB on consumers' devices, 163 on A100, 227 on
    // H100.
    let shared_bytes = *u.choose(&[99 << 10, 163 << 10, 227 << 10])?;
    let with_clusters = bool::arbitrary(u)?;
    let decode_clusters = if with_clusters { DeviceLimits::H100.decode_clusters } else { [0; 4] };
    let wgmma = with_clusters && bool::arbitrary(u)?;
    let (multiprocessors, memory_rate) = (u.int_in_range(1..=256)?, u.arbitrary()?);
    Ok(DeviceLimits { multiprocessors, shared_bytes, decode_clusters, wgmma, memory_rate })
}

/// A call of these sizes on memory that nobody looks at: as much as any call may need.
fn layout<T: Element>(u: &mut Unstructured<'_>, projection: &Projection) -> Result<Option<Layout>> {
    const MOST: usize = isize::MAX as usize / size_of::<u32>();
    let slices = projection.slices();
    // Aligned for the fast kernels, or not.
    let address = either(u, [64, 66])?;
    // SAFETY: device memory, which planning neither reads nor writes.
    let (view, out) = unsafe { (View::<Cuda, T>::from_raw(address, MOST), ViewMut::from_raw(address, MOST)) };
    // SAFETY: as above.
    let (ids, wide_ids) =
        unsafe { (View::<Cuda, i32>::from_raw(64, MOST), View::<Cuda, i64>::from_raw(64, MOST)) };
    // SAFETY: as above.
    let map = unsafe { View::from_raw(64, 128) };
    let stacked = vec![view; slices];
    let entries = if bool::arbitrary(u)? { MOST } else { size(u)? };
    // SAFETY: as above.
    let table = unsafe { Adapters::new(View::<Cuda, AdapterEntry>::from_raw(64, entries)) };
    let weights = either(u, [Weights::Stacked { a: &stacked, b: &stacked }, Weights::Table(table)])?;
    let topk_ids = *u.choose(&[ids.into(), wide_ids.into(), TopkIds::None])?;
    let routing = RoutingTensors {
        topk_ids,
        token_lora: ids,
        adapter_enabled: Enabled::All,
        ranks: either(u, [None, Some(ids)])?,
        // What is not there is not mapped.
        expert_map: either(u, [None, Some(map)])?.filter(|_| !matches!(topk_ids, TopkIds::None)),
    };
    let call = Forward {
        tokens: size(u)?,
        routing: routing.into(),
        x: Rows {
            data: view,
            stride: Some(size(u)?).filter(|&stride| stride > 0),
            index: either(u, [None, Some(ids)])?,
        },
        weights,
        topk_weights: None,
        out: RowsMut {
            data: out,
            stride: Some(size(u)?).filter(|&stride| stride > 0),
            index: either(u, [None, Some(ids)])?,
        },
        offset: size(u)?,
        order: *u.choose(&[SliceOrder::InOrder, SliceOrder::Reversed, SliceOrder::Interleaved])?,
        accumulate: u.arbitrary()?,
    };
    Ok(call.check(projection).ok())
}

/// Where a route comes from: tiles of a kernel's own, or blocks of any size that a caller may bring or keep.
fn source(u: &mut Unstructured<'_>) -> Result<RouteSource> {
    let tiles = [8, 16, 32, 64, 72, 128];
    let block =
        |u: &mut Unstructured<'_>| u.int_in_range(BlockShape::MIN_BLOCK_SIZE..=BlockShape::MAX_BLOCK_SIZE);
    Ok(match u.int_in_range(0..=3)? {
        0 => RouteSource::Made,
        1 => RouteSource::Kept { tile_rows: *u.choose(&tiles)?, ranked: u.arbitrary()? },
        2 => RouteSource::Kept { tile_rows: block(u)? as u32, ranked: u.arbitrary()? },
        _ => RouteSource::Sorted { tile_rows: block(u)? as u32 },
    })
}

/// A route that is there is taken as it is: its tiles, and no launch that would make another.
fn hold_route(route: RouteSource, plan: &Plan) {
    let first = plan.launches().next().map_or("", |launch| launch.kernel);
    match route {
        RouteSource::Made => assert_ne!(first, "adopt", "{plan}"),
        RouteSource::Sorted { tile_rows } => {
            assert_eq!((first, plan.tile_rows()), ("adopt", tile_rows), "{plan}");
        }
        RouteSource::Kept { tile_rows, .. } => {
            assert!(!first.starts_with("route") && first != "adopt", "{plan}");
            assert_eq!(plan.tile_rows(), tile_rows, "{plan}");
        }
    }
}

fn plan(u: &mut Unstructured<'_>) -> Result<()> {
    let Ok(projection) = Projection::new(sizes(u)?) else { return Ok(()) };
    let layout = match projection.sizes().dtype {
        DType::Bf16 => layout::<bf16>(u, &projection)?,
        DType::F16 => layout::<f16>(u, &projection)?,
    };
    let Some(layout) = layout else { return Ok(()) };
    let stage = *u.choose(&[Stage::Route, Stage::Forward, Stage::Shrink, Stage::Expand])?;
    let route = source(u)?;
    let forced = bool::arbitrary(u)?;
    let options = Options {
        index: *u.choose(&[None, Some(IndexWidth::I32), Some(IndexWidth::I64)])?,
        tile: Some(*u.choose(&TileKind::ALL)?).filter(|_| forced),
        form: *u.choose(&[
            None,
            Some(Form::Decode),
            Some(Form::Generic),
            Some(Form::Prefill(PrefillTile::M64)),
            Some(Form::Prefill(PrefillTile::M128)),
            Some(Form::SharedPrefill(PrefillTile::M64)),
            Some(Form::SharedPrefill(PrefillTile::M128)),
        ])?,
        rows: *u.choose(&[None, Some(DecodeRows::M8), Some(DecodeRows::M16)])?,
        cluster: u.arbitrary()?,
        route_blocks: u.arbitrary()?,
    };
    let limits = limits(u)?;
    if let Ok(Some(plan)) = Plan::new(&projection, &layout, stage, route, &limits, &options) {
        hold(&projection, &layout, &limits, &plan);
        hold_route(route, &plan);
    }
    Ok(())
}
