use crate::DTypeArg;
use crate::backends::{Choice, Machine, Timed, with_backend};
use crate::print::say;
use half::{bf16, f16};
use indicatif::{ProgressBar, ProgressStyle};
use moe_lora::adapter::LayerProjection;
use moe_lora::{
    Buffer, DType, Element, ExpertWeights, Forward, OutDims, Projection, ProjectionSizes, RoutingTensors,
    SliceOrder, Space, View, ViewMut, reference,
};
use rand::rngs::StdRng;
use rand::seq::index;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use rayon::prelude::*;
use std::collections::HashSet;
use std::time::Duration;

#[derive(clap::Args)]
#[command(after_help = "\
error  distance of the result from the float64 reference, relative to what was added
time   of one call: routing, shrink and expand. On a GPU it is replayed from a graph, its weights not in cache
floor  least time of any implementation: the bytes that must move (weights in use and x once, out twice) over
       the memory's bandwidth

Examples:
  moe-lora demo
  moe-lora demo --tokens 1,256,4096 --rank 16 --backend cuda")]
pub struct Args {
    /// Tokens in the batch
    #[arg(long, value_delimiter = ',', default_value = "1,16,80")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Vec<u32>,
    /// Rank of both adapters
    #[arg(long, default_value_t = 64)]
    rank: usize,
    /// Type of activations and weights
    #[arg(long, default_value = "bf16")]
    dtype: DTypeArg,
    /// Where to run; auto: on whatever is here
    #[arg(long, default_value = "auto")]
    backend: Choice,
}

/// Qwen3-30B-A3B.
const MODEL: &str = "Qwen3-30B-A3B";
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 768;
const EXPERTS: usize = 128;
const TOP_K: usize = 8;
const ADAPTERS: usize = 2;
const OPS: [LayerProjection; 2] = [LayerProjection::W13, LayerProjection::W2];

/// A measurement goes through this many batches, each routed otherwise: with one token, the weights of so
/// many are more than any cache holds.
const BATCHES: usize = 16;
/// Standard deviation of the old values of `out`, in that of what is added.
const OLD_OUT: f32 = 0.25;

// Any seeds will do, as long as no two tensors share one.
const SEED_A: u64 = 100;
const SEED_B: u64 = 200;
const SEED_X: u64 = 300;
const SEED_OUT: u64 = 301;

/// Runs the layer on every back end.
pub fn demo(args: &Args) -> anyhow::Result<()> {
    match args.dtype.into() {
        DType::Bf16 => demo_as::<bf16>(args),
        DType::F16 => demo_as::<f16>(args),
    }
}

/// How many results there were, and how many of them were wrong.
#[derive(Default)]
struct Tally {
    results: usize,
    wrong: usize,
}

fn demo_as<T: Element>(args: &Args) -> anyhow::Result<()> {
    let (mut tally, tolerance) = (Tally::default(), T::DTYPE.tolerance());
    let done = measure_all::<T>(args, &mut tally);
    let Tally { results, wrong } = tally;
    // Whether somebody reads what is printed or not.
    anyhow::ensure!(wrong == 0, "{wrong} of {results} results are further than {tolerance:.0e} from float64");
    done?;
    Ok(say!("\nAll {results} results are within {tolerance:.0e} of float64.")?)
}

fn measure_all<T: Element>(args: &Args, tally: &mut Tally) -> anyhow::Result<()> {
    // Sizes that are refused are refused before anything is printed.
    for op in OPS {
        let projection = projection(op, args.rank, T::DTYPE)?;
        args.tokens.iter().try_for_each(|&tokens| projection.pairs(tokens as usize).map(drop))?;
    }
    let machine = Machine::find();
    let places = machine.each(args.backend)?;
    say!(
        "One MoE layer of {MODEL}: {EXPERTS} experts, {TOP_K} a token, {ADAPTERS} adapters of rank {}",
        args.rank
    )?;
    say!("{machine}")?;
    say!(
        "\n{:<4} {:>6} {:>8}  {:<10} {:>8} {:>10} {:>9} {:>6}",
        "op",
        "tokens",
        "back end",
        "kernel",
        "error",
        "time µs",
        "floor µs",
        "ratio"
    )?;
    let progress = ProgressBar::new((2 * args.tokens.len() * (1 + places.len())) as u64)
        .with_style(ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}").expect("a valid template"));
    for op in OPS {
        progress.set_message(format!("{op}: making weights"));
        let weights = Weights::<T>::random(op, args.rank)?;
        progress.set_message(format!("{op}: uploading weights"));
        let resident = places
            .iter()
            .map(|place| with_backend!(place, backend => Resident::upload(backend, &weights)))
            .collect::<moe_lora::Result<Vec<_>>>()?;
        for &tokens in &args.tokens {
            progress.set_message(format!("{op}, {tokens} tokens: reference in float64"));
            let batch = Batch::random(&weights, tokens as usize)?;
            progress.inc(1);
            for backend in &resident {
                progress.set_message(format!("{op}, {tokens} tokens: {}", backend.name()));
                let result = backend.measure(&batch)?;
                let right = result.error <= T::DTYPE.tolerance();
                tally.results += 1;
                tally.wrong += usize::from(!right);
                progress.suspend(|| say!("{op:<4} {tokens:>6} {:>8}  {result}", backend.name()))?;
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();

    if let (Some(_), Choice::Auto) = (machine.missing(), args.backend) {
        say!("\nThere is no GPU to use: these are the CPU's results alone.")?;
    }
    Ok(())
}

/// The sizes of a projection of the layer.
fn projection(op: LayerProjection, rank: usize, dtype: DType) -> moe_lora::Result<Projection> {
    let (in_dim, out_dim) = match op {
        LayerProjection::W13 => (HIDDEN, INTERMEDIATE),
        LayerProjection::W2 => (INTERMEDIATE, HIDDEN),
    };
    Projection::new(ProjectionSizes {
        dtype,
        top_k: TOP_K,
        experts: EXPERTS,
        slots: ADAPTERS,
        max_rank: rank,
        in_dim,
        out_dims: OutDims::uniform(out_dim, op.slices()),
        x_rows: op.x_rows(),
        a_experts: ExpertWeights::PerExpert,
        b_experts: ExpertWeights::PerExpert,
    })
}

/// The weights of one projection, one adapter a slot.
struct Weights<T> {
    op: LayerProjection,
    projection: Projection,
    a: Vec<Vec<T>>,
    b: Vec<Vec<T>>,
}

impl<T: Element> Weights<T> {
    fn random(op: LayerProjection, rank: usize) -> moe_lora::Result<Self> {
        let projection = projection(op, rank, T::DTYPE)?;
        let &ProjectionSizes { in_dim, out_dims, .. } = projection.sizes();
        // One over the root of what a sum runs over: then what is added has about the variance of x.
        let matrices = |elements: usize, width: usize, seed: u64| {
            let scale = 1.0 / (width as f32).sqrt();
            let slices = 0..op.slices() as u64;
            slices.map(|s| normal(ADAPTERS * EXPERTS * elements, scale, seed + s)).collect()
        };
        let a = matrices(rank * in_dim, in_dim, SEED_A);
        let b = matrices(out_dims.max() * rank, rank, SEED_B);
        Ok(Weights { op, projection, a, b })
    }
}

/// Normal numbers, the same on every machine.
fn normal<T: Element>(len: usize, scale: f32, seed: u64) -> Vec<T> {
    const CHUNK: usize = 1 << 16;
    let mut values = vec![T::zeroed(); len];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
        let mut rng = StdRng::seed_from_u64(seed << 32 | i as u64);
        chunk.fill_with(|| T::from_f32(scale * rng.sample::<f32, _>(StandardNormal)));
    });
    values
}

/// All of a call but its routing and its output, in some space.
struct Inputs<'a, S: Space, T> {
    tokens: usize,
    token_lora: View<'a, S, i32>,
    x: View<'a, S, T>,
    a: Vec<View<'a, S, T>>,
    b: Vec<View<'a, S, T>>,
    topk_weights: Option<View<'a, S, f32>>,
}

impl<S: Space, T: Element> Inputs<'_, S, T> {
    fn call<'c>(&'c self, topk_ids: View<'c, S, i32>, out: ViewMut<'c, S, T>) -> Forward<'c, S, T> {
        Forward {
            tokens: self.tokens,
            routing: RoutingTensors::new(topk_ids, self.token_lora).into(),
            x: self.x.into(),
            weights: moe_lora::Weights::Stacked { a: &self.a, b: &self.b },
            topk_weights: self.topk_weights,
            out: out.into(),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate: true,
        }
    }
}

/// Activations, some routings of them, and what the first must give.
struct Batch<T> {
    tokens: usize,
    x: Vec<T>,
    old: Vec<T>,
    topk_ids: Vec<Vec<i32>>,
    topk_weights: Option<Vec<f32>>,
    token_lora: Vec<i32>,
    /// `[P, S·N]`: what the first routing adds to `old`.
    delta: Vec<f64>,
    /// Bytes that a call must move, on the mean.
    bytes: f64,
}

impl<T: Element> Batch<T> {
    fn random(weights: &Weights<T>, tokens: usize) -> moe_lora::Result<Self> {
        let (projection, sizes) = (&weights.projection, weights.projection.sizes());
        let (pairs, rows) = (projection.pairs(tokens)?, projection.x_rows(tokens)?);
        let mut rng = StdRng::seed_from_u64(tokens as u64);
        let mut choose =
            || (0..tokens).flat_map(|_| index::sample(&mut rng, EXPERTS, TOP_K)).map(|e| e as i32).collect();
        let topk_ids: Vec<Vec<i32>> = (0..BATCHES).map(|_| choose()).collect();
        let weighted = weights.op == LayerProjection::W2;
        let batch = Batch {
            tokens,
            x: normal(rows * sizes.in_dim, 1.0, SEED_X),
            old: normal(
                pairs * projection.out_width(),
                OLD_OUT / if weighted { TOP_K as f32 } else { 1.0 },
                SEED_OUT,
            ),
            topk_ids,
            topk_weights: weighted
                .then(|| (0..pairs).map(|_| 2.0 * rng.random::<f32>() / TOP_K as f32).collect()),
            token_lora: (0..tokens).map(|_| rng.random_range(0..ADAPTERS as i32)).collect(),
            delta: Vec::new(),
            bytes: 0.0,
        };
        let inputs = Inputs {
            tokens,
            token_lora: batch.token_lora[..].into(),
            x: batch.x[..].into(),
            a: weights.a.iter().map(|a| a[..].into()).collect(),
            b: weights.b.iter().map(|b| b[..].into()).collect(),
            topk_weights: batch.topk_weights.as_deref().map(View::from),
        };
        let mut out = batch.old.clone();
        let mut segments = 0;
        for topk_ids in &batch.topk_ids {
            let routing = RoutingTensors::new(&topk_ids[..], inputs.token_lora);
            let targets = reference::targets(projection, tokens, &routing)?;
            segments += targets.iter().flatten().map(|at| (at.slot, at.expert)).collect::<HashSet<_>>().len();
        }
        let call = inputs.call(batch.topk_ids[0][..].into(), ViewMut::from(&mut out[..]));
        let delta = reference::forward(projection, &call)?.values;
        let matrices = sizes.max_rank * (sizes.out_dims.len() * sizes.in_dim + sizes.out_dims.total());
        let elements = segments * matrices / BATCHES + batch.x.len() + 2 * batch.old.len();
        Ok(Batch { delta, bytes: (elements * DType::SIZE) as f64, ..batch })
    }

    /// ‖out − old − delta‖ / ‖delta‖.
    fn error(&self, out: &[T]) -> f64 {
        let square = |(out, (old, delta)): (&T, (&T, &f64))| {
            (f64::from(out.to_f32()) - f64::from(old.to_f32()) - delta).powi(2)
        };
        let error: f64 = out.iter().zip(self.old.iter().zip(&self.delta)).map(square).sum();
        let norm: f64 = self.delta.iter().map(|delta| delta * delta).sum();
        (error / norm).sqrt()
    }
}

/// One row's numbers.
struct Measured {
    kernel: String,
    error: f64,
    time: Duration,
    floor: Option<Duration>,
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Measured { kernel, error, time, floor } = self;
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        write!(f, "{kernel:<10} {error:>8.1e} {:>10.1}", micros(*time))?;
        if let Some(floor) = floor {
            write!(f, " {:>9.1} {:>6.2}", micros(*floor), time.as_secs_f64() / floor.as_secs_f64())?;
        }
        Ok(())
    }
}

/// Weights on a back end, whatever its type.
trait Measure<T> {
    fn name(&self) -> &'static str;
    fn measure(&self, batch: &Batch<T>) -> moe_lora::Result<Measured>;
}

struct Resident<'b, B: Timed, T: Element> {
    backend: &'b B,
    projection: Projection,
    a: Vec<B::Buffer<T>>,
    b: Vec<B::Buffer<T>>,
}

impl<'b, B: Timed, T: Element> Resident<'b, B, T> {
    fn upload(backend: &'b B, weights: &Weights<T>) -> moe_lora::Result<Box<dyn Measure<T> + 'b>>
    where
        T: 'b,
    {
        let upload = |slice: &Vec<T>| backend.upload(slice);
        let a = weights.a.iter().map(upload).collect::<Result<_, _>>()?;
        let b = weights.b.iter().map(upload).collect::<Result<_, _>>()?;
        Ok(Box::new(Resident { backend, projection: weights.projection, a, b }))
    }
}

impl<B: Timed, T: Element> Measure<T> for Resident<'_, B, T> {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn measure(&self, batch: &Batch<T>) -> moe_lora::Result<Measured> {
        let Resident { backend, projection, .. } = self;
        let x = backend.upload(&batch.x)?;
        let mut out = backend.upload(&batch.old)?;
        let token_lora = backend.upload(&batch.token_lora)?;
        let topk_weights = batch.topk_weights.as_ref().map(|weights| backend.upload(weights)).transpose()?;
        let topk_ids = batch.topk_ids.iter().map(|ids| backend.upload(ids)).collect::<Result<Vec<_>, _>>()?;
        let inputs = Inputs {
            tokens: batch.tokens,
            token_lora: token_lora.view(),
            x: x.view(),
            a: self.a.iter().map(Buffer::view).collect(),
            b: self.b.iter().map(Buffer::view).collect(),
            topk_weights: topk_weights.as_ref().map(Buffer::view),
        };
        let mut workspace = backend.workspace(&[*projection], batch.tokens)?;
        let first = inputs.call(topk_ids[0].view(), out.view_mut());
        let kernel = backend.kernel(projection, &first)?;
        backend.forward(&mut workspace, projection, first)?;
        let error = batch.error(&backend.download(&out)?);

        let all = || {
            let mut call = |ids: &B::Buffer<i32>| {
                let call = inputs.call(ids.view(), out.view_mut());
                backend.forward(&mut workspace, projection, call).map(drop)
            };
            topk_ids.iter().try_for_each(&mut call)
        };
        let time = backend.time(topk_ids.len(), all)?;
        let floor = backend.bandwidth().map(|bandwidth| Duration::from_secs_f64(batch.bytes / bandwidth));
        Ok(Measured { kernel, error, time, floor })
    }
}
