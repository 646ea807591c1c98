//! Any sizes: there is a plan or an error, and a plan keeps within its index width, its grid, its device and the
//! work to be done.

use arbitrary::{Arbitrary, Result, Unstructured};
use half::{bf16, f16};
use moe_lora::plan::{
    DecodeRows, DeviceLimits, Form, IndexWidth, Kernel, Launch, Options, Plan, PrefillPlan, PrefillTile,
    RouteSource, Stage, TileKind,
};
use moe_lora::{
    DType, Device, Element, ExpertWeights, Forward, Layout, Projection, ProjectionSizes, Route, Rows,
    RowsMut, View, ViewMut, XRows,
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
    Ok(ProjectionSizes {
        dtype: either(u, [DType::Bf16, DType::F16])?,
        x_rows: either(u, [XRows::Token, XRows::Pair])?,
        a_experts: either(u, [ExpertWeights::PerExpert, ExpertWeights::Shared])?,
        b_experts: either(u, [ExpertWeights::PerExpert, ExpertWeights::Shared])?,
        top_k: u.int_in_range(0..=65)?,
        slices: u.int_in_range(0..=5)?,
        max_rank: u.int_in_range(0..=1025)?,
        experts: size(u)?,
        slots: size(u)?,
        in_dim: size(u)?,
        out_dim: size(u)?,
    })
}

fn limits(u: &mut Unstructured<'_>) -> Result<DeviceLimits> {
    // The most shared memory of a block from sm_80 on: 99 KiB on consumers' devices, 163 on A100, 227 on H100.
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
    let slices = projection.sizes().slices;
    // Aligned for the fast kernels, or not.
    let address = either(u, [64, 66])?;
    // SAFETY: device memory, which planning neither reads nor writes.
    let (view, out) =
        unsafe { (View::<Device, T>::from_raw(address, MOST), ViewMut::from_raw(address, MOST)) };
    let weights = vec![view; slices];
    let call = Forward {
        tokens: size(u)?,
        route: Route::Kept,
        x: Rows { data: view, stride: Some(size(u)?).filter(|&stride| stride > 0) },
        a: &weights,
        b: &weights,
        topk_weights: None,
        out: RowsMut { data: out, stride: Some(size(u)?).filter(|&stride| stride > 0) },
        offset: size(u)?,
        accumulate: u.arbitrary()?,
    };
    Ok(call.check(projection).ok())
}

fn plan(u: &mut Unstructured<'_>) -> Result<()> {
    let Ok(projection) = Projection::new(sizes(u)?) else { return Ok(()) };
    let layout = match projection.sizes().dtype {
        DType::Bf16 => layout::<bf16>(u, &projection)?,
        DType::F16 => layout::<f16>(u, &projection)?,
    };
    let Some(layout) = layout else { return Ok(()) };
    let stage = *u.choose(&[Stage::Route, Stage::Forward, Stage::Shrink, Stage::Expand])?;
    let route = *u.choose(&[
        RouteSource::Made,
        RouteSource::Kept { tile_rows: 16 },
        RouteSource::Kept { tile_rows: 32 },
        RouteSource::Kept { tile_rows: 64 },
        RouteSource::Kept { tile_rows: 72 },
        RouteSource::Kept { tile_rows: 128 },
    ])?;
    let forced = bool::arbitrary(u)?;
    let options = Options {
        index: *u.choose(&[None, Some(IndexWidth::I32), Some(IndexWidth::I64)])?,
        tile: Some(*u.choose(&TileKind::ALL)?).filter(|_| forced),
        form: *u.choose(&[
            None,
            Some(Form::Decode),
            Some(Form::TwoLaunches),
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
    }
    Ok(())
}

/// What any plan promises.
fn hold(projection: &Projection, layout: &Layout, limits: &DeviceLimits, plan: &Plan) {
    let sizes = projection.sizes();
    let launches = [
        plan.route,
        plan.decode.map(|decode| decode.launch),
        plan.prefill.map(|prefill| prefill.launch),
        plan.shrink.map(|shrink| shrink.launch),
        plan.expand.map(|expand| expand.launch),
    ];
    for Launch { entry, blocks, cluster, cooperative, shared_bytes } in launches.into_iter().flatten() {
        assert!(blocks > 0 && blocks <= i32::MAX as u32 && blocks % cluster == 0, "{plan}");
        assert!(cluster <= entry.cluster && (entry.cluster == 1 || limits.has_clusters()), "{plan}");
        let at_a_time = if matches!(entry.kernel, Kernel::Prefill(_)) { entry.min_blocks } else { 1 };
        assert!(!cooperative || blocks <= limits.multiprocessors * at_a_time, "{plan}");
        assert!(shared_bytes <= limits.shared_bytes, "{plan}");
    }
    let wide = |sizes: &[usize]| sizes.iter().map(|&size| size as u128).product::<u128>();
    let pairs = layout.tokens * sizes.top_k;
    let rows = if sizes.x_rows == XRows::Pair { pairs } else { layout.tokens };
    let offsets = [
        wide(&[rows, layout.x_stride]),
        wide(&[pairs, layout.out_stride]),
        wide(&[sizes.slots, projection.a_experts(), sizes.max_rank, sizes.in_dim]),
        wide(&[sizes.slots, projection.b_experts(), sizes.out_dim, sizes.max_rank]),
        wide(&[plan.splits() as usize, sizes.slices, pairs, sizes.max_rank]),
    ];
    if plan.index == IndexWidth::I32 {
        assert!(offsets.iter().all(|&elements| elements <= i32::MAX as u128), "{offsets:?}: {plan}");
    }
    if let Some(PrefillPlan { launch: Launch { entry, .. }, ahead, .. }) = plan.prefill {
        assert!(limits.wgmma && plan.shrink.is_none() && plan.expand.is_none(), "{plan}");
        let Kernel::Prefill(variant) = entry.kernel else { panic!("{plan}") };
        assert!(variant.shape.width as usize >= sizes.max_rank, "{plan}");
        assert!(plan.tile_parts * variant.shape.rows >= plan.tile_rows, "{plan}");
        assert!(ahead as usize <= 2 * sizes.in_dim && ahead.is_multiple_of(16), "{plan}");
    }
    if let Some(PrefillPlan { launch, stages, under_way, shares: Some(shares), .. }) = plan.prefill {
        assert!(launch.cooperative && (1..=stages).contains(&under_way), "{plan}");
        // Of h and all sums there are 16 MiB at most.
        let depth = u64::from(shares.depth.count);
        let sums = if depth > 1 { 2 * depth * shares.h_words } else { 0 };
        assert!(shares.h_words + sums <= 4 << 20, "{plan}");
        for (shares, length) in [(shares.depth, sizes.in_dim), (shares.columns, sizes.out_dim)] {
            let (count, each) = (shares.count as usize, shares.each as usize);
            assert!(
                (1..=64).contains(&count) && each.is_multiple_of(128) && count * each >= length,
                "{plan}"
            );
            assert!((count - 1) * each < length, "{plan}");
        }
    }
    let columns = plan.tile.shape().columns();
    if let Some(shrink) = plan.shrink {
        let steps = sizes.in_dim.div_ceil(64);
        assert!(u64::from(shrink.splits) * u64::from(shrink.steps_per_split) >= steps as u64, "{plan}");
        assert!((shrink.column_blocks * columns) as usize >= sizes.slices * sizes.max_rank, "{plan}");
    }
    if let Some(expand) = plan.expand {
        let covered = u64::from(expand.blocks_per_slice) * u64::from(expand.columns_per_block);
        assert!(covered >= sizes.out_dim as u64 && expand.columns_per_block % columns == 0, "{plan}");
    }
}
