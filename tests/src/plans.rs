//! Which options make a difference to a case.

use bytemuck::Pod;
use moe_lora::emulated::Emulated;
use moe_lora::plan::{Options, Plan, RouteSource, Stage};
use moe_lora::{
    Adapters, BlockShape, DType, Element, Enabled, Layout, RoutingTensors, TopkIds, View, ViewMut,
};
use moe_lora_verify::{Case, Form, IdsKind, Indexed, Operands, Ranks};
use std::collections::BTreeSet;

/// Those of `options` for which the calls of `case` are planned in another way than for any before. Equal
/// plans in the same order of threads would only run the same again.
///
/// # Panics
/// When the case is of no legal call.
pub fn distinct(options: &[Options], case: &Case) -> Vec<Options> {
    let mut known: Vec<Vec<Planned>> = Vec::new();
    let is_new = |options: &&Options| {
        let plans = plans_of(**options, case);
        let is_new = !known.contains(&plans);
        known.extend(is_new.then_some(plans));
        is_new
    };
    options.iter().filter(is_new).copied().collect()
}

/// The kernels that a check of `case` launches which makes its calls once.
///
/// # Panics
/// When the case is of no legal call.
pub fn kernels(options: Options, case: &Case) -> BTreeSet<&'static str> {
    let once = plans_of(options, case).into_iter().filter(|(calls, _)| *calls == Calls::Once);
    let plans = once.filter_map(|(_, plan)| plan);
    plans.flat_map(|plan| plan.launches().map(|launch| launch.kernel).collect::<Vec<_>>()).collect()
}

/// Whether blocks share K in each call that a check of `case` makes once: split-K of the generic form.
///
/// # Panics
/// When the case is of no legal call.
pub fn splits_k(options: Options, case: &Case) -> bool {
    let once = plans_of(options, case).into_iter().filter(|(calls, _)| *calls == Calls::Once);
    let texts: Vec<_> = once.filter_map(|(_, plan)| plan).map(|plan| plan.to_string()).collect();
    let splits = |text: &String| text.contains("K in ") && !text.contains("K in 1 splits");
    !texts.is_empty() && texts.iter().all(splits)
}

/// Which checks make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Calls {
    /// All.
    Once,
    /// Those that repeat calls.
    Repeated,
}

type Planned = (Calls, Option<Plan>);

fn plans_of(options: Options, case: &Case) -> Vec<Planned> {
    let machine = Emulated::new(options, case.seed);
    match case.dtype {
        DType::Bf16 => plans::<half::bf16>(&machine, case),
        DType::F16 => plans::<half::f16>(&machine, case),
    }
}

/// The plans of all calls that a check of the case may make.
fn plans<T: Element>(machine: &Emulated, case: &Case) -> Vec<Planned> {
    let projection = case.projection().expect("a legal case");
    let layout = layout::<T>(case);
    let stages: &[Stage] = match case.form {
        Form::Forward => &[Stage::Forward],
        Form::Split => &[Stage::Shrink, Stage::Expand],
    };
    let plan =
        |stage, route| machine.plan(&projection, &layout, stage, route).expect("a case's plans are legal");
    let ranked = case.ranks != Ranks::Max;
    let alone = plan(Stage::Route, RouteSource::Made);
    let mut plans = vec![(Calls::Repeated, alone)];
    for &stage in stages {
        let made = plan(stage, RouteSource::Made);
        plans.push((Calls::Once, made));
        let kept = [made, alone].into_iter().flatten().map(|plan| plan.tile_rows());
        let kept = kept.map(|tile_rows| plan(stage, RouteSource::Kept { tile_rows, ranked }));
        plans.extend(kept.map(|plan| (Calls::Repeated, plan)));
        let blocks = case.block_size.filter(|rows| *rows >= BlockShape::MIN_BLOCK_SIZE);
        let blocks = blocks.map(|rows| RouteSource::Sorted { tile_rows: rows as u32 });
        plans.extend(blocks.map(|route| (Calls::Once, plan(stage, route))));
    }
    plans
}

/// The layout of the case's call, on memory that nobody looks at.
fn layout<T: Element>(case: &Case) -> Layout {
    fn view<'a, T: Pod>(misaligned: bool) -> View<'a, moe_lora::tensor::Emulated, T> {
        let address = if misaligned { 64 + size_of::<T>() as u64 } else { 64 };
        // SAFETY: planning reads no memory.
        unsafe { View::from_raw(address, isize::MAX as usize / size_of::<T>()) }
    }
    let ids = || view::<i32>(case.misaligned);
    let weights = || vec![view::<T>(case.misaligned); case.out_dims.len()];
    let routing = RoutingTensors {
        topk_ids: match case.ids {
            IdsKind::None => TopkIds::None,
            IdsKind::I32 => TopkIds::I32(ids()),
            IdsKind::I64 => TopkIds::I64(view(case.misaligned)),
        },
        token_lora: ids(),
        adapter_enabled: Enabled::All,
        ranks: (case.ranks != Ranks::Max).then(ids),
        expert_map: None,
    };
    let x = view::<T>(case.misaligned);
    // SAFETY: as above.
    let adapters = case.table.then(|| unsafe { Adapters::new(view(false)) });
    let topk_weights = None;
    let index = |kind| (kind != Indexed::None).then(ids);
    let (x_index, out_index) = (index(case.x_index), index(case.out_index));
    let operands =
        Operands { routing, x, x_index, a: weights(), b: weights(), adapters, topk_weights, out_index };
    // SAFETY: as above.
    let out = unsafe { ViewMut::from_raw(x.address(), x.len()) };
    let projection = case.projection().expect("a legal case");
    operands.forward(case, out).check(&projection).expect("a case's call is legal")
}
