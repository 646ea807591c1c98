//! What any plan promises, for tests and fuzzing.

use crate::call::Layout;
use crate::plan::prefill::PrefillPlan;
use crate::plan::{DeviceLimits, Launch, Plan, Work};
use crate::projection::{Projection, XRows};
use moe_lora_kernels::{self as kernels, Kernel};

/// Holds a plan against them.
///
/// # Panics
/// When it breaks one.
pub fn hold(projection: &Projection, layout: &Layout, limits: &DeviceLimits, plan: &Plan) {
    let sizes = projection.sizes();
    for Launch { entry, blocks, cluster, cooperative, shared_bytes } in plan.each_launch() {
        assert!(blocks > 0 && blocks <= i32::MAX as u32 && blocks % cluster == 0, "{plan}");
        assert!(cluster <= entry.cluster && (entry.cluster == 1 || limits.has_clusters()), "{plan}");
        let at_a_time = if matches!(entry.kernel, Kernel::Prefill(_)) { entry.min_blocks } else { 1 };
        assert!(!cooperative || blocks <= limits.multiprocessors * at_a_time, "{plan}");
        assert!(shared_bytes <= limits.shared_bytes, "{plan}");
    }
    let wide = |sizes: &[usize]| sizes.iter().map(|&size| size as u128).product::<u128>();
    let pairs = layout.tokens * sizes.top_k;
    let rows = if sizes.x_rows == XRows::Pair { pairs } else { layout.tokens };
    let slots = if layout.table { 1 } else { sizes.slots };
    let offsets = [
        wide(&[if layout.x_indexed { layout.x_rows } else { rows }, layout.x_stride]),
        wide(&[if layout.out_indexed { layout.out_rows } else { pairs }, layout.out_stride]),
        wide(&[slots, projection.a_experts(), sizes.max_rank, sizes.in_dim]),
        wide(&[slots, projection.b_experts(), sizes.out_dims.max(), sizes.max_rank]),
        wide(&[plan.splits() as usize, sizes.out_dims.len(), pairs, sizes.max_rank]),
    ];
    if plan.index == kernels::IndexWidth::I32 {
        assert!(offsets.iter().all(|&elements| elements <= i32::MAX as u128), "{offsets:?}: {plan}");
    }
    match plan.work {
        Work::None => {}
        Work::Decode(decode) => {
            let Kernel::Decode { tile, .. } = decode.launch.entry.kernel else { panic!("{plan}") };
            assert!(decode.tile_parts * tile.rows.count() >= plan.tile_rows(), "{plan}");
        }
        Work::Prefill(prefill) => hold_prefill(projection, limits, plan, &prefill),
        Work::Generic(generic) => {
            let columns = generic.tile.shape().columns();
            assert!(generic.tile_parts * generic.tile.shape().rows() >= plan.tile_rows(), "{plan}");
            if let Some(shrink) = generic.shrink {
                let steps = sizes.in_dim.div_ceil(64);
                assert!(
                    u64::from(generic.splits) * u64::from(shrink.steps_per_split) >= steps as u64,
                    "{plan}"
                );
                assert!(
                    (shrink.column_blocks * columns) as usize >= sizes.out_dims.len() * sizes.max_rank,
                    "{plan}"
                );
            }
            if let Some(expand) = generic.expand {
                let ends = expand.first_blocks[1..].iter().chain([&expand.column_blocks]);
                for ((first, end), out_dim) in
                    expand.first_blocks.iter().zip(ends).zip(sizes.out_dims.as_slice())
                {
                    let blocks = u64::from(*end.min(&expand.column_blocks) - first);
                    let covered = blocks * u64::from(expand.columns_per_block);
                    assert!(covered >= *out_dim as u64, "{plan}");
                }
                assert!(expand.columns_per_block % columns == 0, "{plan}");
            }
        }
    }
}

fn hold_prefill(projection: &Projection, limits: &DeviceLimits, plan: &Plan, prefill: &PrefillPlan) {
    let sizes = projection.sizes();
    let &PrefillPlan { launch, tile_parts, stages, under_way, ahead, splits, .. } = prefill;
    let Kernel::Prefill(variant) = launch.entry.kernel else { panic!("{plan}") };
    assert!(limits.wgmma && variant.shape.width as usize >= sizes.max_rank, "{plan}");
    assert!(tile_parts * variant.shape.rows >= plan.tile_rows(), "{plan}");
    assert!(ahead as usize <= 2 * sizes.in_dim && ahead.is_multiple_of(16), "{plan}");
    assert!((1..=stages).contains(&under_way), "{plan}");
    let Some(splits) = splits else { return };
    assert!(launch.cooperative, "{plan}");
    // Of h and all sums there are 16 MiB at most.
    let depth = u64::from(splits.split_k.count);
    let sums = if depth > 1 { 2 * depth * splits.h_words } else { 0 };
    assert!(splits.h_words + sums <= 4 << 20, "{plan}");
    for (split, length) in [(splits.split_k, sizes.in_dim), (splits.split_n, sizes.out_dims.max())] {
        let (count, each) = (split.count as usize, split.each as usize);
        assert!((1..=64).contains(&count) && each.is_multiple_of(128) && count * each >= length, "{plan}");
        assert!((count - 1) * each < length, "{plan}");
    }
}
