//! A mixture-of-experts layer with LoRA adapters, as an inference engine calls it: on the GPU or, where there
//! is none, on the CPU. `cargo run --release --example layer -- [PEFT FOLDER]…`

use half::bf16;
use moe_lora::{Backend, Buffer, Operator, adapter::Layer, cpu::Cpu, cuda::Device};

const TOKENS: usize = 16;
const TOP_K: usize = 2;
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/olmoe");

fn main() -> anyhow::Result<()> {
    match Device::new(0) {
        Ok(device) => layer(&device.new_stream()?),
        Err(reason) => layer(&Cpu).inspect(|()| println!("{reason}")),
    }
}

fn layer<B: Backend + Clone>(backend: &B) -> anyhow::Result<()> {
    // When the engine starts: adapter i goes to slot i, and scratch memory is made for the largest batch.
    let fixtures = ["r4", "r8_rslora"].map(|name| format!("{FIXTURES}/{name}"));
    let folders = std::env::args().nth(1).map_or(fixtures.to_vec(), |_| std::env::args().skip(1).collect());
    let Layer::<bf16> { w13, w2 } = Layer::load(&folders, 0, TOP_K, None)?;
    let operators = Operator::builder(backend).max_tokens(TOKENS);
    let [gate_up, down] = operators.build([w13.projection, w2.projection])?;
    let (w13, w2) = (w13.upload(backend)?, w2.upload(backend)?);
    let (sizes, width) = (gate_up.projection().sizes(), gate_up.projection().out_width());

    // For each batch: the router's choices and weights, and the slot of each token's adapter, −1 for none.
    let choices: Vec<_> = (0..TOKENS * TOP_K).map(|pair| (pair % sizes.experts) as i32).collect();
    let (topk_ids, topk_weights) = (backend.upload(&choices)?, backend.upload(&vec![0.5; choices.len()])?);
    let token_lora = backend.upload(&[0, 1, -1, 0].repeat(TOKENS / 4))?;

    // Gate and up: what the adapters add goes on top of the base model's product (waves, here).
    let x = backend.upload(&wave(TOKENS * sizes.in_dim))?;
    let mut h = backend.upload(&wave(choices.len() * width))?;
    let call = gate_up.call(&x, &w13.a, &w13.b, (topk_ids.view(), &token_lora), &mut h);
    let route = call.ranks(&w13.ranks).run()?;
    // The activation, silu(gate) · up; then down, on the same route, times the router's weights.
    let silu = |gate: f32| gate / (1.0 + (-gate).exp());
    let act = |(gate, up): (&bf16, &bf16)| bf16::from_f32(silu(gate.to_f32()) * up.to_f32());
    let h = backend.download(&h)?;
    let halves = h.chunks(width).flat_map(|row| row[..width / 2].iter().zip(&row[width / 2..]));
    let x = backend.upload(&halves.map(act).collect::<Vec<_>>())?;
    let mut y = backend.upload(&wave(choices.len() * down.projection().out_width()))?;
    down.call(&x, &w2.a, &w2.b, route, &mut y).topk_weights(&topk_weights).run()?;
    println!("{}: y = {:?}…", backend.name(), &backend.download(&y)?[..4]);
    Ok(())
}

fn wave(len: usize) -> Vec<bf16> {
    (0..len).map(|i| bf16::from_f32((i as f32).sin())).collect()
}
