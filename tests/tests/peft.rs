//! PEFT's own results, reproduced: its adapters are loaded from disk and applied by every back end.
//!
//! What is compared with is in `fixtures/README.md`. Fixtures are found beside this package, or where
//! `MOE_LORA_FIXTURES` says.
//!
//! # Tolerances
//!
//! With u the largest relative error of one rounding (2⁻⁸ for bf16, 2⁻¹¹ for f16), a delta sees four of
//! them: of x, of b times its scaling, of h and of the result; a is exact in both types. They are
//! independent, so their squares add up: a delta is within √4·u = 2u ([`Tolerance::delta`]). In a whole block
//! a delta is on top of an exact base, so that holds for its gate, up and down too; the first two are
//! multiplied and the third is added, which makes √3·2u < 4u ([`Tolerance::block`]).

use half::{bf16, f16};
use libtest_mimic::{Arguments, Failed, Trial};
use moe_lora::adapter::{Adapter, LayerProjection, Stack};
use moe_lora::cpu::Cpu;
#[cfg(feature = "cuda")]
use moe_lora::cuda::Device;
use moe_lora::tensor_file::{FileError, TensorFile};
use moe_lora::{
    Backend, Buffer, DType, Element, Enabled, Forward, Route, Routing, RoutingTensors, SliceOrder, View,
    Weights,
};
use moe_lora_cli::files::{Run, RunError};
#[cfg(feature = "cuda")]
use moe_lora_tests::skip::skipped;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
#[cfg(feature = "cuda")]
use std::sync::OnceLock;
use tempfile::TempDir;

const MODELS: [&str; 2] = ["olmoe", "qwen3_moe"];
/// In the order of `token_lora`.
const ADAPTERS: [&str; 2] = ["r4", "r8_rslora"];
const RUNS: [(&str, LayerProjection); 2] =
    [("run_w13.safetensors", LayerProjection::W13), ("run_w2.safetensors", LayerProjection::W2)];
/// All that was recorded is of this layer.
const LAYER: usize = 0;

/// Without adapters a block must be off by this many tolerances, or the comparison says nothing.
const ADAPTERS_MATTER: f64 = 10.0;

type Outcome = Result<(), Failed>;

struct Tolerance {
    delta: f64,
    block: f64,
}

impl Tolerance {
    fn of(dtype: DType) -> Self {
        let u = match dtype {
            DType::Bf16 => 2f64.powi(-8),
            DType::F16 => 2f64.powi(-11),
        };
        Tolerance { delta: 2.0 * u, block: 4.0 * u }
    }
}

fn fixtures() -> PathBuf {
    std::env::var_os("MOE_LORA_FIXTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures"), PathBuf::from)
}

fn adapter_folders(model: &str) -> Vec<PathBuf> {
    ADAPTERS.iter().map(|adapter| fixtures().join(model).join(adapter)).collect()
}

/// ‖got − expected‖ / ‖expected‖; NaN when anything is.
fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let square = |value: f64| value * value;
    let error: f64 = got.iter().zip(expected).map(|(&g, &e)| square(f64::from(g) - f64::from(e))).sum();
    let norm: f64 = expected.iter().map(|&e| square(f64::from(e))).sum();
    (error / norm).sqrt()
}

fn expect_within(what: &str, error: f64, tolerance: f64) -> Outcome {
    // NaN is not within.
    if approx::abs_diff_eq!(error, 0.0, epsilon = tolerance) {
        Ok(())
    } else {
        Err(format!("{what} is off by {error:.2e}, tolerance {tolerance:.2e}").into())
    }
}

/// What one MoE block is made of, from `block.safetensors`.
struct Block {
    tokens: usize,
    top_k: usize,
    hidden: usize,
    intermediate: usize,
    x: Vec<f32>,
    y: Vec<f32>,
    topk_ids: Vec<i32>,
    topk_weights: Vec<f32>,
    token_lora: Vec<i32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

impl Block {
    fn read(model: &str) -> Result<Self, FileError> {
        let file = TensorFile::open(fixtures().join(model).join("block.safetensors"))?;
        let [tokens, top_k] = file.matrix("topk_ids", "[T, k]")?;
        let [_, hidden] = file.matrix("x", "[T, H]")?;
        Ok(Block {
            tokens,
            top_k,
            hidden,
            intermediate: file.shape("gate_proj")?[1],
            x: file.floats("x")?,
            y: file.floats("y")?,
            topk_ids: file.ints("topk_ids")?,
            topk_weights: file.floats("topk_weights")?,
            token_lora: file.ints("token_lora")?,
            gate: file.floats("gate_proj")?,
            up: file.floats("up_proj")?,
            down: file.floats("down_proj")?,
        })
    }

    /// `[P, I]`: silu(gate) · up, with the deltas of gate and up, `[P, 2·I]`.
    fn activations(&self, deltas: &[f32]) -> Vec<f32> {
        let Block { top_k, hidden, intermediate, .. } = *self;
        let pair = |(pair, delta): (usize, &[f32])| {
            let x = &self.x[pair / top_k * hidden..][..hidden];
            let gate = add(self.base(&self.gate, pair, x), &delta[..intermediate]);
            let up = add(self.base(&self.up, pair, x), &delta[intermediate..]);
            gate.into_iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect::<Vec<_>>()
        };
        deltas.chunks(2 * intermediate).enumerate().flat_map(pair).collect()
    }

    /// `[T, H]`: what leaves the block, with the weighted deltas of down, `[P, H]`.
    fn output(&self, activations: &[f32], deltas: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; self.tokens * self.hidden];
        let rows = activations.chunks(self.intermediate).zip(deltas.chunks(self.hidden));
        for (pair, (activations, delta)) in rows.enumerate() {
            let base =
                self.base(&self.down, pair, activations).into_iter().map(|b| b * self.topk_weights[pair]);
            let y = &mut y[pair / self.top_k * self.hidden..][..self.hidden];
            y.iter_mut().zip(add(base.collect(), delta)).for_each(|(y, choice)| *y += choice);
        }
        y
    }

    /// The base matrix of a pair's expert, times `x`.
    fn base(&self, weights: &[f32], pair: usize, x: &[f32]) -> Vec<f32> {
        let matrix = self.hidden * self.intermediate;
        let weights = &weights[self.topk_ids[pair] as usize * matrix..][..matrix];
        weights.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }
}

fn add(mut base: Vec<f32>, delta: &[f32]) -> Vec<f32> {
    base.iter_mut().zip(delta).for_each(|(base, delta)| *base += delta);
    base
}

/// A layer's routing tensors and scratch memory on a back end.
struct OnBackend<'b, B: Backend> {
    backend: &'b B,
    tokens: usize,
    workspace: B::Workspace,
}

impl<B: Backend> OnBackend<'_, B> {
    /// The operator's result on `x`, `[P, S·N]`, written over NaN.
    fn deltas<T: Element>(
        &mut self,
        stack: &Stack<T>,
        routing: Routing<'_, B::Space>,
        x: &[f32],
        topk_weights: Option<View<'_, B::Space, f32>>,
    ) -> moe_lora::Result<(Vec<f32>, Route)> {
        let OnBackend { backend, tokens, workspace } = self;
        let projection = &stack.projection;
        let upload = |slice: &Vec<T>| backend.upload(slice);
        let a = stack.a.iter().map(upload).collect::<Result<Vec<_>, _>>()?;
        let b = stack.b.iter().map(upload).collect::<Result<Vec<_>, _>>()?;
        let x = backend.upload(&x.iter().map(|&x| T::from_f32(x)).collect::<Vec<_>>())?;
        let unwritten = vec![T::from_f32(f32::NAN); projection.pairs(*tokens)? * projection.out_width()];
        let mut out = backend.upload(&unwritten)?;
        let call = Forward {
            tokens: *tokens,
            routing,
            x: x.view().into(),
            weights: Weights::Stacked {
                a: &a.iter().map(Buffer::view).collect::<Vec<_>>(),
                b: &b.iter().map(Buffer::view).collect::<Vec<_>>(),
            },
            topk_weights,
            out: out.view_mut().into(),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate: false,
        };
        let route = backend.forward(workspace, projection, call)?;
        Ok((backend.download(&out)?.into_iter().map(T::to_f32).collect(), route))
    }
}

/// A whole MoE block: base matrices in f32 here, deltas by the operator, down on the route of gate and up.
fn a_block_gives_what_peft_gives<T: Element, B: Backend>(backend: &B, model: &str) -> Outcome {
    let block = Block::read(model)?;
    let adapters = adapter_folders(model).iter().map(Adapter::open).collect::<Result<Vec<_>, _>>()?;
    let stack = |projection| Stack::<T>::load(&adapters, LAYER, projection, block.top_k, None);
    let (w13, w2) = (stack(LayerProjection::W13)?, stack(LayerProjection::W2)?);

    let topk_ids = backend.upload(&block.topk_ids)?;
    let token_lora = backend.upload(&block.token_lora)?;
    let topk_weights = backend.upload(&block.topk_weights)?;
    let ranks = backend.upload(&w13.ranks)?;
    let routing = RoutingTensors {
        topk_ids: topk_ids.view().into(),
        token_lora: token_lora.view(),
        adapter_enabled: Enabled::All,
        ranks: Some(ranks.view()),
        expert_map: None,
    };
    let workspace = backend.workspace(&[w13.projection, w2.projection], block.tokens)?;
    let mut layer = OnBackend { backend, tokens: block.tokens, workspace };
    let (gate_up, route) = layer.deltas(&w13, routing.into(), &block.x, None)?;
    let activations = block.activations(&gate_up);
    let (down, _) = layer.deltas(&w2, route.into(), &activations, Some(topk_weights.view()))?;
    let tolerance = Tolerance::of(T::DTYPE).block;
    expect_within("y", relative_error(&block.output(&activations, &down), &block.y), tolerance)?;

    let base = block.activations(&vec![0.0; gate_up.len()]);
    let without = relative_error(&block.output(&base, &vec![0.0; down.len()]), &block.y);
    assert!(
        without > ADAPTERS_MATTER * tolerance,
        "without adapters, y is off by no more than {without:.1e}"
    );
    Ok(())
}

/// `moe-lora run`, from files to a file.
fn a_run_on_files_gives_what_peft_gives<T: Element, B: Backend>(backend: &B, model: &str) -> Outcome {
    let folder = TempDir::new()?;
    for (name, projection) in RUNS {
        let input = fixtures().join(model).join(name);
        let output = folder.path().join(name);
        run(model, &input, projection, T::DTYPE).on(backend)?.save(&output, false)?;

        let (recorded, written) = (TensorFile::open(&input)?, TensorFile::open(&output)?);
        written.expect_shape("out", recorded.shape("expected")?, "[T, k, S·N]")?;
        let (got, expected) = (written.floats("out")?, recorded.floats("expected")?);
        expect_within(name, relative_error(&got, &expected), Tolerance::of(T::DTYPE).delta)?;
        let untouched = |(got, expected): (&f32, &f32)| *expected != 0.0 || *got == 0.0;
        assert!(got.iter().zip(&expected).all(untouched), "{name}: a token without an adapter has a delta");
    }
    Ok(())
}

/// `out` in the input is what the result is added to.
fn a_run_adds_to_the_inputs_out<T: Element, B: Backend>(backend: &B, model: &str) -> Outcome {
    const OLD: f32 = 1.0;
    let folder = TempDir::new()?;
    let (name, projection) = RUNS[0];
    let mut tensors = Tensors::read(&fixtures().join(model).join(name))?;
    let recorded = TensorFile::open(fixtures().join(model).join(name))?;
    let expected: Vec<f32> = recorded.floats("expected")?.into_iter().map(|delta| OLD + delta).collect();
    let old = vec![OLD; expected.len()];
    tensors.set("out", Dtype::F32, recorded.shape("expected")?, bytemuck::cast_slice(&old));
    let (input, output) = (folder.path().join("input"), folder.path().join("output"));
    tensors.write(&input)?;
    run(model, &input, projection, T::DTYPE).on(backend)?.save(&output, false)?;
    let got = TensorFile::open(&output)?.floats("out")?;
    expect_within("out", relative_error(&got, &expected), Tolerance::of(T::DTYPE).delta)
}

fn run(model: &str, input: &Path, projection: LayerProjection, dtype: DType) -> Run {
    Run {
        adapters: adapter_folders(model),
        layer: LAYER,
        projection,
        input: input.into(),
        dtype: Some(dtype),
        mul_routed_weight: projection == LayerProjection::W2,
    }
}

/// The tensors of a file, to be changed and written again: type, shape and bytes by name.
struct Tensors(BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn read(path: &Path) -> Result<Self, Failed> {
        let bytes = std::fs::read(path)?;
        let tensors = SafeTensors::deserialize(&bytes)?.tensors();
        let parts = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        Ok(Tensors(tensors.into_iter().map(|(name, view)| (name, parts(view))).collect()))
    }

    fn set(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: &[u8]) {
        self.0.insert(name.into(), (dtype, shape.into(), bytes.into()));
    }

    fn write(&self, path: &Path) -> Outcome {
        let mut views = BTreeMap::new();
        for (name, (dtype, shape, bytes)) in &self.0 {
            views.insert(name, TensorView::new(*dtype, shape.clone(), bytes)?);
        }
        Ok(serialize_to_file(views, None, path)?)
    }
}

/// Inputs that a run must refuse: the message names the tensor, what was expected and what came.
fn a_wrong_input_is_refused_by_name() -> Outcome {
    let (model, (name, w13)) = (MODELS[0], RUNS[0]);
    let folder = TempDir::new()?;
    let (input, output) = (folder.path().join("input.safetensors"), folder.path().join("output.safetensors"));
    // T = 24, k = 2, H = 32, I = 24, two adapters.
    let zeros = [0u8; 8 * 24 * 96];
    for (tensor, dtype, shape, message) in [
        ("x", Dtype::I32, &[24, 32][..], "x is I32, expected F32, F16 or BF16"),
        ("x", Dtype::BF16, &[24, 31], "x is [24, 31], expected [24, 32] = [T, K]"),
        ("x", Dtype::BF16, &[48, 32], "x is [48, 32], expected [24, 32] = [T, K]"),
        ("x", Dtype::BF16, &[24 * 32], "x is [768], expected [24, 32] = [T, K]"),
        ("topk_ids", Dtype::I64, &[24, 2], "topk_ids is I64, expected I32"),
        ("topk_ids", Dtype::I32, &[48], "topk_ids is [48], expected [T, k]"),
        ("topk_ids", Dtype::I32, &[24, 0], "top_k is 0, expected at least 1"),
        ("topk_ids", Dtype::I32, &[24, 65], "top_k is 65, expected at most 64"),
        ("token_lora", Dtype::I32, &[23], "token_lora is [23], expected [24] = [T]"),
        ("token_lora", Dtype::F32, &[24], "token_lora is F32, expected I32"),
        ("topk_weights", Dtype::F32, &[24], "topk_weights is [24], expected [24, 2] = [T, k]"),
        ("out", Dtype::F32, &[24, 2, 24], "out is [24, 2, 24], expected [24, 2, 48] = [T, k, S·N]"),
    ] {
        let mut tensors = Tensors::read(&fixtures().join(model).join(name))?;
        let bits = shape.iter().product::<usize>() * dtype.bitsize();
        tensors.set(tensor, dtype, shape, &zeros[..bits / 8]);
        tensors.write(&input)?;
        let run = Run { mul_routed_weight: true, ..run(model, &input, w13, DType::Bf16) };
        let error = run.on(&Cpu).expect_err(message).to_string();
        assert!(error.contains(message), "{error:?} does not say {message:?}");
    }

    let recorded = fixtures().join(model).join(name);
    let mut one = run(model, &recorded, w13, DType::Bf16);
    one.adapters.pop();
    let error = one.on(&Cpu).expect_err("token_lora names adapter 1");
    assert!(matches!(error, RunError::NoSuchAdapter { got: 1, adapters: 1, .. }), "{error}");
    let untyped =
        Run { dtype: None, ..run(model, &fixtures().join(model).join("block.safetensors"), w13, DType::F16) };
    let error = untyped.on(&Cpu).expect_err("x is F32");
    assert!(matches!(error, RunError::File(FileError::DType { got: Dtype::F32, .. })), "{error}");

    let result = run(model, &recorded, w13, DType::Bf16).on(&Cpu)?;
    std::fs::write(&output, "precious")?;
    let error = result.save(&output, false).expect_err("the output exists");
    assert!(matches!(error, RunError::OutputExists { .. }), "{error}");
    assert_eq!(std::fs::read(&output)?, b"precious");
    result.save(&output, true)?;
    TensorFile::open(&output)?.floats("out")?;
    Ok(())
}

/// What is compared with PEFT on every back end, in every type.
#[derive(Clone, Copy)]
enum Promise {
    Block,
    Run,
    RunAdds,
}

impl Promise {
    fn name(self) -> &'static str {
        match self {
            Promise::Block => "a_block_gives_what_peft_gives",
            Promise::Run => "a_run_on_files_gives_what_peft_gives",
            Promise::RunAdds => "a_run_adds_to_the_inputs_out",
        }
    }

    fn keep<B: Backend>(self, backend: &B, model: &str, dtype: DType) -> Outcome {
        match dtype {
            DType::Bf16 => self.keep_as::<bf16, B>(backend, model),
            DType::F16 => self.keep_as::<f16, B>(backend, model),
        }
    }

    fn keep_as<T: Element, B: Backend>(self, backend: &B, model: &str) -> Outcome {
        match self {
            Promise::Block => a_block_gives_what_peft_gives::<T, B>(backend, model),
            Promise::Run => a_run_on_files_gives_what_peft_gives::<T, B>(backend, model),
            Promise::RunAdds => a_run_adds_to_the_inputs_out::<T, B>(backend, model),
        }
    }
}

/// The GPU, opened once.
#[cfg(feature = "cuda")]
fn gpu() -> &'static moe_lora::Result<Device> {
    static GPU: OnceLock<moe_lora::Result<Device>> = OnceLock::new();
    GPU.get_or_init(|| Device::new(0))
}

/// A test on the GPU, skipped where there is none.
#[cfg(feature = "cuda")]
fn on_gpu(arguments: &Arguments, name: &str, promise: Promise, model: &'static str, dtype: DType) -> Trial {
    match gpu() {
        Ok(gpu) => Trial::test(name, move || promise.keep(&gpu.new_stream()?, model, dtype)),
        Err(why) => skipped(arguments, name, &why.to_string()),
    }
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = vec![Trial::test("a_wrong_input_is_refused_by_name", a_wrong_input_is_refused_by_name)];
    for promise in [Promise::Block, Promise::Run, Promise::RunAdds] {
        for model in MODELS {
            for dtype in [DType::Bf16, DType::F16] {
                let name = format!("{}::{model}::{dtype}", promise.name());
                #[cfg(feature = "cuda")]
                trials.push(on_gpu(&arguments, &format!("{name}::cuda"), promise, model, dtype));
                trials.push(Trial::test(format!("{name}::cpu"), move || promise.keep(&Cpu, model, dtype)));
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
}
