//! A mixture-of-experts layer with LoRA adapters, as an inference engine calls it: on the GPU or, where there
//! is none, on the CPU. `cargo run --release --example layer -- [PEFT FOLDER]…`

use half::bf16;
use moe_lora::adapter::{Adapter, LayerProjection, Stack};
use moe_lora::cpu::Cpu;
use moe_lora::{Backend, Buffer, Enabled, Forward, Route, RoutingTensors};
use rand::{Rng, SeedableRng, rngs::StdRng};

const TOKENS: usize = 16;
const TOP_K: usize = 2;
/// A few roundings to bf16, each by 2⁻⁸ at most, of the largest value.
const TOLERANCE: f32 = 0.02;

fn main() -> anyhow::Result<()> {
    let on_cpu = layer(&Cpu)?;
    match moe_lora::cuda::Gpu::new(0) {
        Ok(gpu) => {
            let on_gpu = layer(&gpu.queue(Default::default())?)?;
            let largest = on_cpu.iter().fold(0.0, |largest, value| value.abs().max(largest));
            let apart = on_cpu.iter().zip(&on_gpu).map(|(c, g)| (c - g).abs()).fold(0.0, f32::max);
            println!("the two are at most {apart:.1e} apart, of {largest:.1}");
            anyhow::ensure!(apart <= TOLERANCE * largest, "the GPU disagrees with the CPU");
        }
        Err(reason) => println!("{reason}"),
    }
    Ok(())
}

fn layer<B: Backend>(backend: &B) -> anyhow::Result<Vec<f32>> {
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
    let topk_weights = backend.upload(&[1.0 / TOP_K as f32; TOKENS * TOP_K])?;
    let (topk_ids, token_lora) = (backend.upload(&topk_ids)?, backend.upload(&token_lora)?);
    let ranks = backend.upload(&w13.ranks)?;
    let route = Route::From(RoutingTensors {
        topk_ids: topk_ids.view(),
        token_lora: token_lora.view(),
        adapter_enabled: Enabled::All,
        ranks: Some(ranks.view()),
        expert_map: None,
    });

    // One projection: what the adapters add goes on top of `out`, where the engine's grouped GEMM left the
    // base model's result (random numbers, here). An engine uploads `a` and `b` once.
    let mut project = |stack: &Stack<bf16>, route, x: &[bf16], topk_weights| -> anyhow::Result<Vec<bf16>> {
        let x = backend.upload(x)?;
        let mut out = backend.upload(&random(TOKENS * TOP_K * stack.projection.out_width()))?;
        let a = stack.a.iter().map(|a| backend.upload(a)).collect::<Result<Vec<_>, _>>()?;
        let b = stack.b.iter().map(|b| backend.upload(b)).collect::<Result<Vec<_>, _>>()?;
        let call = Forward {
            tokens: TOKENS,
            route,
            x: x.view().into(),
            a: &a.iter().map(Buffer::view).collect::<Vec<_>>(),
            b: &b.iter().map(Buffer::view).collect::<Vec<_>>(),
            topk_weights,
            out: out.view_mut().into(),
            offset: 0,
            accumulate: true,
        };
        backend.forward(&mut workspace, &stack.projection, call)?;
        println!("{}: {}", backend.name(), stack.projection);
        Ok(backend.download(&out)?)
    };

    // Gate and up: one row of `x` a token. Finds the route, and keeps it.
    let gate_up = project(&w13, route, &random(TOKENS * w13.projection.sizes().in_dim), None)?;
    // The engine's activation, silu(gate) · up: one row a pair.
    let silu = |gate: f32| gate / (1.0 + (-gate).exp());
    let activate = |row: &[bf16]| {
        let (gate, up) = row.split_at(row.len() / 2);
        let pairs = gate.iter().zip(up).map(|(g, u)| bf16::from_f32(silu(g.to_f32()) * u.to_f32()));
        pairs.collect::<Vec<_>>()
    };
    let x: Vec<bf16> = gate_up.chunks(w13.projection.out_width()).flat_map(activate).collect();
    // Down: on the route of gate and up, times the router's weights.
    let y = project(&w2, Route::Kept, &x, Some(topk_weights.view()))?;
    Ok(y.into_iter().map(bf16::to_f32).collect())
}

fn random(len: usize) -> Vec<bf16> {
    let mut rng = StdRng::seed_from_u64(len as u64);
    (0..len).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0))).collect()
}
