//! A mixture-of-experts layer on candle's tensors, for two LoRA adapters of ranks 4 and 8 at once: the base
//! model by candle, what the adapters add by moe-lora. It is compared with candle alone, on the CPU and, if
//! there is one, a GPU.

use anyhow::{Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use moe_lora::{ProjectionSizes, Route};
use moe_lora_candle_example::{Delta, MoeLora, Routing};
use rand::{Rng, SeedableRng, rngs::StdRng};

const TOKENS: usize = 24;
const TOP_K: usize = 2;
const EXPERTS: usize = 8;
const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 96;
const MAX_RANK: usize = 8;
/// Of the adapters. What their weights hold past it is not read.
const RANKS: [u32; 2] = [4, 8];
/// Most that what moe-lora adds, in bf16, may differ from candle's in f32.
const TOLERANCE: f32 = 3e-3;

/// The adapter of a token: the first, the second and none take turns.
fn adapter_of(token: usize) -> Option<usize> {
    [Some(0), Some(1), None][token % 3]
}

fn main() -> Result<()> {
    compare(&Device::Cpu)?;
    let device = Device::cuda_if_available(0)?;
    if device.is_cuda() { compare(&device) } else { Ok(()) }
}

fn compare(device: &Device) -> Result<()> {
    let (mut random, layer) = (random(2, device), Layer::new(device)?);
    let x = random(&[TOKENS, HIDDEN])?.to_dtype(DType::BF16)?;
    let whole = difference(&layer.forward(&x)?, &layer.by_candle(&x)?)?;

    // What is added alone: beside the base model's part it would be small.
    let (topk_ids, topk_weights) = layer.route(&x)?;
    let inner = random(&[TOKENS, TOP_K, INTERMEDIATE])?.to_dtype(DType::BF16)?;
    let added = |projection: &Projection, x| {
        let expected = projection.lora(x, &topk_ids)?.broadcast_mul(&topk_weights.unsqueeze(2)?)?;
        let out = expected.zeros_like()?.to_dtype(DType::BF16)?;
        projection.add(x, layer.routing(&topk_ids), Some(&topk_weights), &out)?;
        difference(&out, &expected)
    };
    let (gate_up, down) = (added(&layer.gate_up, &x)?, added(&layer.down, &inner)?);
    let place = device.location();
    println!("{place:?}: gate and up differ by {gate_up:.1e}, down by {down:.1e}, the layer by {whole:.1e}");
    ensure!(gate_up.max(down) < TOLERANCE, "what is added differs by more than {TOLERANCE:e}");
    Ok(())
}

/// Relative to all of `expected`.
fn difference(got: &Tensor, expected: &Tensor) -> Result<f32> {
    let norm = |x: &Tensor| x.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
    let (got, expected) = (got.to_dtype(DType::F32)?, expected.to_dtype(DType::F32)?);
    Ok(norm(&(got - &expected)?)? / norm(&expected)?)
}

/// Makes tensors of numbers that depend on the seed alone, smaller where rows are longer.
fn random(seed: u64, device: &Device) -> impl FnMut(&[usize]) -> candle_core::Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    move |shape| {
        let scale = (3.0 / shape[shape.len() - 1] as f32).sqrt();
        let numbers = (0..shape.iter().product()).map(|_| rng.random_range(-scale..scale));
        Tensor::from_vec(numbers.collect::<Vec<f32>>(), shape, device)
    }
}

/// One projection of the experts: the base model's weights, the adapters', and the operator.
struct Projection {
    /// `[E, S·N, K]` of f32: candle has no products of bf16 on the CPU.
    base: Tensor,
    a: Vec<Tensor>,
    b: Vec<Tensor>,
    operator: MoeLora,
}

impl Projection {
    fn new(
        operator: MoeLora,
        sizes: ProjectionSizes,
        random: &mut impl FnMut(&[usize]) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Self> {
        let ProjectionSizes { experts, slots, max_rank, in_dim, out_dims, .. } = sizes;
        let (slices, out_dim) = (out_dims.len(), out_dims.max());
        let base = random(&[experts, slices * out_dim, in_dim])?;
        let mut stack = |rows, columns| -> candle_core::Result<Vec<Tensor>> {
            (0..slices).map(|_| random(&[slots, experts, rows, columns])?.to_dtype(DType::BF16)).collect()
        };
        Ok(Projection { base, a: stack(max_rank, in_dim)?, b: stack(out_dim, max_rank)?, operator })
    }

    /// Adds the adapters' part to `out`, in place.
    fn add(&self, x: &Tensor, routing: Routing<'_>, weights: Option<&Tensor>, out: &Tensor) -> Result<Route> {
        let delta = Delta { x, a: &self.a, b: &self.b, routing, topk_weights: weights };
        Ok(self.operator.add(&delta, out)?)
    }

    /// The adapters' part by candle, in f32.
    fn lora(&self, x: &Tensor, topk_ids: &Tensor) -> candle_core::Result<Tensor> {
        let in_rank = |token, r| adapter_of(token).is_some_and(|adapter| r < RANKS[adapter]) as u8 as f32;
        let in_rank = (0..TOKENS).flat_map(|token| (0..MAX_RANK as u32).map(move |r| in_rank(token, r)));
        let in_rank = Tensor::from_iter(in_rank, x.device())?.reshape((TOKENS, 1, MAX_RANK))?;
        let first = (0..TOKENS).map(|token| (adapter_of(token).unwrap_or(0) * EXPERTS) as u32);
        let ids = topk_ids.broadcast_add(&Tensor::from_iter(first, x.device())?.unsqueeze(1)?)?;
        let slice = |(a, b): (&Tensor, &Tensor)| {
            let h = product(&a.flatten_to(1)?, x, &ids)?.broadcast_mul(&in_rank)?;
            product(&b.flatten_to(1)?, &h, &ids)
        };
        let slices = self.a.iter().zip(&self.b).map(slice).collect::<candle_core::Result<Vec<_>>>()?;
        Tensor::cat(&slices, D::Minus1)
    }
}

/// Each choice's row of x, `[T, K]` or `[T, k, K]`, times its matrix of `[_, N, K]`, in f32: `[T, k, N]`.
fn product(matrices: &Tensor, x: &Tensor, ids: &Tensor) -> candle_core::Result<Tensor> {
    let x = if x.rank() == 2 { x.unsqueeze(1)?.repeat((1, TOP_K, 1))? } else { x.clone() };
    let x = x.to_dtype(DType::F32)?.flatten_to(1)?.unsqueeze(2)?;
    let matrices = matrices.to_dtype(DType::F32)?.index_select(&ids.flatten_all()?, 0)?;
    matrices.matmul(&x)?.reshape((TOKENS, TOP_K, ()))
}

struct Layer {
    router: Tensor,
    gate_up: Projection,
    down: Projection,
    token_lora: Tensor,
    ranks: Tensor,
}

impl Layer {
    fn new(device: &Device) -> Result<Self> {
        let sizes =
            [ProjectionSizes::gate_up(HIDDEN, INTERMEDIATE), ProjectionSizes::down(HIDDEN, INTERMEDIATE)];
        let (top_k, experts, slots, max_rank) = (TOP_K, EXPERTS, RANKS.len(), MAX_RANK);
        let sizes = sizes.map(|sizes| ProjectionSizes { top_k, experts, slots, max_rank, ..sizes });
        let [gate_up, down] = MoeLora::new(device, TOKENS, sizes)?;
        let token_lora =
            (0..TOKENS).map(|token| adapter_of(token).map_or(u32::MAX, |adapter| adapter as u32));
        let mut random = random(1, device);
        Ok(Layer {
            router: random(&[HIDDEN, EXPERTS])?,
            gate_up: Projection::new(gate_up, sizes[0], &mut random)?,
            down: Projection::new(down, sizes[1], &mut random)?,
            token_lora: Tensor::from_iter(token_lora, device)?,
            ranks: Tensor::new(&RANKS, device)?,
        })
    }

    /// The experts that each token goes to, and their weights.
    fn route(&self, x: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let odds = x.to_dtype(DType::F32)?.matmul(&self.router)?.exp()?;
        let topk_ids = odds.arg_sort_last_dim(false)?.narrow(1, 0, TOP_K)?.contiguous()?;
        let odds = odds.gather(&topk_ids, 1)?;
        Ok((topk_ids, odds.broadcast_div(&odds.sum_keepdim(1)?)?))
    }

    fn routing<'a>(&'a self, topk_ids: &'a Tensor) -> Routing<'a> {
        Routing::Tokens { topk_ids, token_lora: &self.token_lora, ranks: Some(&self.ranks) }
    }

    /// The layer as an engine has it: what the adapters add goes on top of the base model's products, in
    /// place.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (topk_ids, topk_weights) = self.route(x)?;
        let h = product(&self.gate_up.base, x, &topk_ids)?.to_dtype(DType::BF16)?;
        let route = self.gate_up.add(x, self.routing(&topk_ids), None, &h)?;
        let x = silu_mul(&h)?;
        let y = product(&self.down.base, &x, &topk_ids)?.broadcast_mul(&topk_weights.unsqueeze(2)?)?;
        let y = y.to_dtype(DType::BF16)?;
        self.down.add(&x, Routing::On(route), Some(&topk_weights), &y)?;
        Ok(y.sum(1)?)
    }

    /// The same by candle alone, in f32.
    fn by_candle(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (topk_ids, topk_weights) = self.route(x)?;
        let both = |part: &Projection, x| product(&part.base, x, &topk_ids)? + part.lora(x, &topk_ids)?;
        let x = silu_mul(&both(&self.gate_up, x)?)?;
        both(&self.down, &x)?.broadcast_mul(&topk_weights.unsqueeze(2)?)?.sum(1)
    }
}

fn silu_mul(h: &Tensor) -> candle_core::Result<Tensor> {
    h.narrow(2, 0, INTERMEDIATE)?.silu()? * h.narrow(2, INTERMEDIATE, INTERMEDIATE)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_agrees_with_candle() {
        compare(&Device::Cpu).unwrap();
    }
}
