//! A mixture-of-experts layer with LoRA adapters, as an inference engine calls it: on the GPU or, where there
//! is none, on the CPU. `cargo run --release --example layer -- [PEFT FOLDER]…`

use half::bf16;
use moe_lora::adapter::{Adapter, LayerProjection, Stack};
use moe_lora::{Backend, Buffer, Enabled, Forward, Host, Route, RoutingTensors, Space, View, ViewMut};
use moe_lora::{cpu::Cpu, reference};
use rand::{Rng, SeedableRng, rngs::StdRng};

const TOKENS: usize = 16;
const TOP_K: usize = 2;
/// A few roundings to bf16, each by 2⁻⁸ at most, in the largest value that is added.
const TOLERANCE: f64 = 0.02;

fn main() -> anyhow::Result<()> {
    #[cfg(feature = "cuda")]
    match moe_lora::cuda::Gpu::new(0) {
        Ok(gpu) => return layer(&gpu.queue(Default::default())?),
        Err(reason) => println!("{reason}; running on the CPU"),
    }
    layer(&Cpu)
}

fn layer<B: Backend>(backend: &B) -> anyhow::Result<()> {
    // When the engine starts: adapter i goes to slot i, and scratch memory is made for the largest batch.
    let mut folders: Vec<String> = std::env::args().skip(1).collect();
    if folders.is_empty() {
        let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/olmoe");
        folders = ["r4", "r8_rslora"].map(|name| format!("{fixtures}/{name}")).into();
    }
    let adapters = folders.iter().map(Adapter::open).collect::<Result<Vec<_>, _>>()?;
    let w13 = Stack::load(&adapters, 0, LayerProjection::W13, TOP_K, None)?;
    let w2 = Stack::load(&adapters, 0, LayerProjection::W2, TOP_K, None)?;
    let mut workspace = backend.workspace(&[w13.projection, w2.projection], TOKENS)?;

    // For each batch: the router's choices, and the slot of each token's adapter, −1 for none.
    let (experts, slots) = (w13.projection.sizes().experts, adapters.len());
    let topk_ids: Vec<i32> = (0..TOKENS * TOP_K).map(|pair| (pair % experts) as i32).collect();
    let token_lora: Vec<i32> = (0..TOKENS).map(|token| (token % (slots + 1)) as i32 - 1).collect();
    let topk_weights = [1.0 / TOP_K as f32; TOKENS * TOP_K];
    let (device_ids, device_lora) = (backend.upload(&topk_ids)?, backend.upload(&token_lora)?);
    let device_ranks = backend.upload(&w13.ranks)?;
    let route = routing(device_ids.view(), device_lora.view(), device_ranks.view());
    let on_host = routing(topk_ids[..].into(), token_lora[..].into(), w13.ranks[..].into());

    // Gate and up: one row of `x` a token. Finds the route, and keeps it.
    let x = random(TOKENS * w13.projection.sizes().in_dim);
    let gate_up = project(backend, &mut workspace, &w13, (route, on_host), &x, None)?;

    // The engine's activation: silu(gate) · up.
    let activate = |row: &[bf16]| {
        let (gate, up) = row.split_at(row.len() / 2);
        let product = |(g, u): (&bf16, &bf16)| g.to_f32() / (1.0 + (-g.to_f32()).exp()) * u.to_f32();
        gate.iter().zip(up).map(product).map(bf16::from_f32).collect::<Vec<_>>()
    };
    let x: Vec<bf16> = gate_up.chunks(w13.projection.out_width()).flat_map(activate).collect();

    // Down: one row of `x` a pair, on the route of gate and up; times the router's weights.
    project(backend, &mut workspace, &w2, (Route::Kept, on_host), &x, Some(&topk_weights)).map(drop)
}

/// One projection: what the adapters add goes on top of the base model's result, and is held against float64.
fn project<B: Backend>(
    backend: &B,
    workspace: &mut B::Workspace,
    stack: &Stack<bf16>,
    (route, on_host): (Route<'_, B::Space>, Route<'_, Host>),
    x: &[bf16],
    topk_weights: Option<&[f32]>,
) -> anyhow::Result<Vec<bf16>> {
    // `out` is where the engine's grouped GEMM left its result: random numbers, here. `a` and `b` are
    // uploaded once in an engine.
    let base = random(TOKENS * TOP_K * stack.projection.out_width());
    let (x_there, mut out) = (backend.upload(x)?, backend.upload(&base)?);
    let weights = topk_weights.map(|weights| backend.upload(weights)).transpose()?;
    let a = stack.a.iter().map(|a| backend.upload(a)).collect::<Result<Vec<_>, _>>()?;
    let b = stack.b.iter().map(|b| backend.upload(b)).collect::<Result<Vec<_>, _>>()?;
    let (a, b): (Vec<_>, Vec<_>) =
        (a.iter().map(Buffer::view).collect(), b.iter().map(Buffer::view).collect());
    let call = add(route, x_there.view(), &a, &b, weights.as_ref().map(Buffer::view), out.view_mut());
    backend.forward(workspace, &stack.projection, call)?;
    let result = backend.download(&out)?;

    let mut old = base.clone();
    let a: Vec<_> = stack.a.iter().map(|a| View::from(&a[..])).collect();
    let b: Vec<_> = stack.b.iter().map(|b| View::from(&b[..])).collect();
    let call = add(on_host, x.into(), &a, &b, topk_weights.map(View::from), ViewMut::from(&mut old[..]));
    let delta = reference::forward(&stack.projection, &call)?.values;
    let expected = base.iter().zip(&delta).map(|(base, delta)| f64::from(base.to_f32()) + delta);
    let worst = expected.zip(&result).map(|(e, r)| (e - f64::from(r.to_f32())).abs()).fold(0.0, f64::max);
    let largest = delta.iter().fold(0.0, |largest, delta| delta.abs().max(largest));
    println!("{}: {}: off by {worst:.1e} at most, of {largest:.1}", backend.name(), stack.projection);
    anyhow::ensure!(worst <= TOLERANCE * largest, "not what the reference gives");
    Ok(result)
}

fn add<'a, S: Space>(
    route: Route<'a, S>,
    x: View<'a, S, bf16>,
    a: &'a [View<'a, S, bf16>],
    b: &'a [View<'a, S, bf16>],
    topk_weights: Option<View<'a, S, f32>>,
    out: ViewMut<'a, S, bf16>,
) -> Forward<'a, S, bf16> {
    let (x, out) = (x.into(), out.into());
    Forward { tokens: TOKENS, route, x, a, b, topk_weights, out, offset: 0, accumulate: true }
}

fn routing<'a, S: Space>(
    topk_ids: View<'a, S, i32>,
    token_lora: View<'a, S, i32>,
    ranks: View<'a, S, i32>,
) -> Route<'a, S> {
    let (adapter_enabled, ranks, expert_map) = (Enabled::All, Some(ranks), None);
    Route::From(RoutingTensors { topk_ids, token_lora, adapter_enabled, ranks, expert_map })
}

fn random(len: usize) -> Vec<bf16> {
    let mut rng = StdRng::seed_from_u64(len as u64);
    (0..len).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0))).collect()
}
