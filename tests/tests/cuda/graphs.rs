//! Calls recorded in a CUDA graph.

use half::bf16;
use libtest_mimic::Failed;
use moe_lora::cuda::{self, Device, Stream};
use moe_lora::{Backend, Buffer, Cuda, OutDims, Projection, RoutingTensors};
use moe_lora_verify::{Case, CaseData, Loras, Operands};

/// A layer's call on few tokens, K shared between blocks, with inactive pairs.
fn case(seed: u64) -> Case {
    Case {
        tokens: 24,
        top_k: 4,
        experts: 8,
        max_rank: 32,
        in_dim: 1024,
        out_dims: OutDims::uniform(256, 2),
        loras: Loras::Random,
        routed_weight: true,
        accumulate: false,
        seed,
        ..Case::default()
    }
}

/// A case's tensors on the device.
struct Uploaded {
    topk_ids: cuda::Buffer<i32>,
    token_lora: cuda::Buffer<i32>,
    topk_weights: cuda::Buffer<f32>,
    x: cuda::Buffer<bf16>,
    a: Vec<cuda::Buffer<bf16>>,
    b: Vec<cuda::Buffer<bf16>>,
}

impl Uploaded {
    fn new(stream: &Stream, data: &CaseData<bf16>) -> moe_lora::Result<Self> {
        let weights = |tensors: &[moe_lora_verify::Tensor<bf16>]| {
            tensors
                .iter()
                .map(|tensor| stream.upload(tensor.elements()))
                .collect::<moe_lora::Result<Vec<_>>>()
        };
        Ok(Uploaded {
            topk_ids: stream.upload(data.topk_ids.elements())?,
            token_lora: stream.upload(data.token_lora.elements())?,
            topk_weights: stream
                .upload(data.topk_weights.as_ref().expect("the case is weighted").elements())?,
            x: stream.upload(data.x.elements())?,
            a: weights(&data.a)?,
            b: weights(&data.b)?,
        })
    }

    fn operands(&self) -> Operands<'_, Cuda, bf16> {
        Operands {
            routing: RoutingTensors::new(self.topk_ids.view(), self.token_lora.view()),
            x: self.x.view(),
            x_index: None,
            adapters: None,
            out_index: None,
            a: self.a.iter().map(Buffer::view).collect(),
            b: self.b.iter().map(Buffer::view).collect(),
            topk_weights: Some(self.topk_weights.view()),
        }
    }
}

/// What an unrecorded call makes of a case.
fn called(
    stream: &Stream,
    case: &Case,
    projection: &Projection,
    inputs: &Uploaded,
) -> moe_lora::Result<Vec<bf16>> {
    let mut out = poisoned(stream, case)?;
    let mut workspace = stream.workspace(&[*projection], case.tokens)?;
    stream.forward(&mut workspace, projection, inputs.operands().forward(case, out.view_mut()))?;
    stream.download(&out)
}

fn poisoned(stream: &Stream, case: &Case) -> moe_lora::Result<cuda::Buffer<bf16>> {
    stream.upload(&vec![bf16::NAN; case.tokens * case.top_k * case.out_stride()])
}

pub fn captured_calls_replay_with_other_routing(device: &Device) -> Result<(), Failed> {
    let stream = device.new_stream()?;
    let (first, second) = (case(1), case(2));
    let projection = first.projection()?;
    let [first_data, second_data] = [&first, &second].map(CaseData::<bf16>::new::<Cuda>);
    let mut inputs = Uploaded::new(&stream, &first_data?)?;
    let second_data = second_data?;

    let mut workspace = stream.workspace(&[projection], first.tokens)?;
    let mut out = poisoned(&stream, &first)?;
    let before = stream.download(&out)?;
    let graph = stream.capture(|stream| {
        let call = inputs.operands();
        stream.forward(&mut workspace, &projection, call.forward(&first, out.view_mut())).map(drop)
    })?;
    let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&stream.download(&out)?), bits(&before), "capture must not run the call");

    graph.replay()?;
    let replayed = stream.download(&out)?;
    assert_eq!(bits(&replayed), bits(&called(&stream, &first, &projection, &inputs)?), "first routing");

    // Other routing, in the buffers that the graph names.
    stream.write(&mut inputs.topk_ids, 0, second_data.topk_ids.elements())?;
    stream.write(&mut inputs.token_lora, 0, second_data.token_lora.elements())?;
    graph.replay()?;
    let rerouted = stream.download(&out)?;
    assert_eq!(bits(&rerouted), bits(&called(&stream, &first, &projection, &inputs)?), "second routing");
    assert_ne!(bits(&rerouted), bits(&replayed), "the two routings must differ");
    Ok(())
}
