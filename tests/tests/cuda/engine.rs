//! What an engine does with the library: one struct without lifetimes owns a device, streams on three
//! threads, buffers, workspaces and graphs, and lets go of them in any order.

use half::bf16;
use libtest_mimic::Failed;
use moe_lora::cuda::{Buffer, Device, Graph, Stream};
use moe_lora::{Backend, Operator, OutDims, Projection};
use moe_lora_verify::{Case, CaseData, Loras};
use std::sync::Arc;
use std::thread;

/// A layer's call, with inactive pairs.
fn case() -> Case {
    Case {
        tokens: 24,
        top_k: 4,
        experts: 8,
        max_rank: 32,
        in_dim: 256,
        out_dims: OutDims::uniform(128, 2),
        loras: Loras::Random,
        accumulate: false,
        seed: 7,
        ..Case::default()
    }
}

/// Weights, which all streams read.
struct Weights {
    a: Vec<Buffer<bf16>>,
    b: Vec<Buffer<bf16>>,
}

/// What one thread of the engine works with.
struct Worker {
    operator: Operator<Stream>,
    weights: Arc<Weights>,
    topk_ids: Buffer<i32>,
    token_lora: Buffer<i32>,
    x: Buffer<bf16>,
    out: Buffer<bf16>,
    graph: Option<Graph>,
}

/// The engine. Fields are `Option` so that they can be dropped in any order.
struct Engine {
    device: Option<Device>,
    weights: Option<Arc<Weights>>,
    workers: Vec<Option<Worker>>,
}

impl Worker {
    fn new(
        device: &Device,
        weights: &Arc<Weights>,
        projection: Projection,
        data: &CaseData<bf16>,
    ) -> moe_lora::Result<Self> {
        let stream = device.new_stream()?;
        let [operator] = Operator::builder(&stream).max_tokens(case().tokens).build([projection])?;
        Ok(Worker {
            weights: Arc::clone(weights),
            topk_ids: stream.upload(data.topk_ids.elements())?,
            token_lora: stream.upload(data.token_lora.elements())?,
            x: stream.upload(data.x.elements())?,
            out: stream.zeros(projection.out_elements(case().tokens)?)?,
            graph: None,
            operator,
        })
    }

    fn stream(&self) -> &Stream {
        self.operator.backend()
    }

    /// The call, twice: on a route of its own, and on that route again.
    fn call(&mut self) -> moe_lora::Result<()> {
        let Worker { operator, weights, topk_ids, token_lora, x, out, .. } = self;
        let Weights { a, b } = &**weights;
        let route = operator.call(&*x, a, b, (&*topk_ids, &*token_lora), &mut *out).overwrite().run()?;
        operator.call(&*x, a, b, route, out).overwrite().run().map(drop)
    }

    /// Records the call, if that was not done, and replays it.
    fn step(&mut self) -> moe_lora::Result<Vec<bf16>> {
        if self.graph.is_none() {
            let stream = self.stream().clone();
            self.graph = Some(stream.capture(|_| self.call())?);
        }
        self.graph.as_ref().expect("made above").replay()?;
        self.stream().download(&self.out)
    }
}

impl Engine {
    fn new(device: Device) -> moe_lora::Result<Self> {
        let (case, data) = (case(), CaseData::<bf16>::new::<moe_lora::Cuda>(&case())?);
        let stream = device.new_stream()?;
        let upload = |tensors: &[moe_lora_verify::Tensor<bf16>]| {
            tensors.iter().map(|tensor| stream.upload(tensor.elements())).collect::<moe_lora::Result<_>>()
        };
        let weights = Arc::new(Weights { a: upload(&data.a)?, b: upload(&data.b)? });
        let worker = |_| Worker::new(&device, &weights, case.projection()?, &data).map(Some);
        let workers = (0..3).map(worker).collect::<moe_lora::Result<_>>()?;
        Ok(Engine { device: Some(device), weights: Some(weights), workers })
    }

    /// All workers at the same time, each on a thread of its own. Returns what each has in the end.
    fn run(&mut self, steps: usize) -> moe_lora::Result<Vec<Vec<bf16>>> {
        thread::scope(|scope| {
            let work = |worker: &mut Worker| {
                worker.call()?;
                (0..steps).map(|_| worker.step()).last().expect("at least one step")
            };
            let threads: Vec<_> =
                self.workers.iter_mut().flatten().map(|worker| scope.spawn(move || work(worker))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no worker panics")).collect()
        })
    }
}

/// Every order in which the parts of an engine can go: each a permutation of device, weights and workers.
fn orders() -> Vec<Vec<usize>> {
    let parts = [0, 1, 2, 3, 4];
    // Rotations, forwards and backwards: each part goes first and last once, and each before each other.
    let rotated = |by: usize| parts.iter().cycle().skip(by).take(parts.len()).copied().collect::<Vec<_>>();
    (0..parts.len()).flat_map(|by| [rotated(by), rotated(by).into_iter().rev().collect()]).collect()
}

/// An engine that owns all of it runs on three threads, computes the same everywhere, and goes in any order.
pub fn an_engine_owns_all_of_it_and_drops_it_in_any_order(device: &Device) -> Result<(), Failed> {
    let mut first = None;
    for order in orders() {
        let mut engine = Engine::new(device.clone())?;
        let results = engine.run(3)?;
        let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        for result in &results {
            assert!(result.iter().any(|value| value.to_f32() != 0.0), "something is computed");
            assert_eq!(bits(result), bits(&results[0]), "all workers have the same batch");
        }
        assert_eq!(*first.get_or_insert_with(|| bits(&results[0])), bits(&results[0]), "{order:?}");
        // A replay is under way when parts go.
        for worker in engine.workers.iter().flatten() {
            worker.graph.as_ref().expect("made in the first step").replay()?;
        }
        for part in order {
            match part {
                0 => drop(engine.device.take()),
                1 => drop(engine.weights.take()),
                worker => drop(engine.workers[worker - 2].take()),
            }
        }
    }
    Ok(())
}
