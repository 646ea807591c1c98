//! What any plan promises, for tests and fuzzing.

use crate::call::Layout;
use crate::plan::{DeviceLimits, Launch, Plan, PrefillPlan};
use crate::projection::{Projection, XRows};
use moe_lora_kernels::{self as kernels, Kernel};

/// Holds a plan against them.
///
/// # Panics
/// When it breaks one.
pub fn hold(projection: &Projection, layout: &Layout, limits: &DeviceLimits, plan: &Plan) {
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
    if plan.index == kernels::IndexWidth::I32 {
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
