//! Calls recorded in a CUDA graph.

use half::bf16;
use libtest_mimic::Failed;
use moe_lora::cuda::{DeviceBuffer, Gpu, Options, Queue};
use moe_lora::{Backend, Buffer, Device, Enabled, Projection, RoutingTensors};
use moe_lora_verify::{Case, CaseData, Loras, Operands};

/// A layer's call on few tokens, K shared between blocks, with inactive pairs.
fn case(seed: u64) -> Case {
    Case {
        tokens: 24,
        top_k: 4,
        experts: 8,
        max_rank: 32,
        slices: 2,
        in_dim: 1024,
        out_dim: 256,
        loras: Loras::Random,
        routed_weight: true,
        accumulate: false,
        seed,
        ..Case::default()
    }
}

/// A case's tensors on the device.
struct Uploaded {
    topk_ids: DeviceBuffer<i32>,
    token_lora: DeviceBuffer<i32>,
    topk_weights: DeviceBuffer<f32>,
    x: DeviceBuffer<bf16>,
    a: Vec<DeviceBuffer<bf16>>,
    b: Vec<DeviceBuffer<bf16>>,
}

impl Uploaded {
    fn new(queue: &Queue<'_>, data: &CaseData<bf16>) -> moe_lora::Result<Self> {
        let weights = |tensors: &[moe_lora_verify::Tensor<bf16>]| {
            tensors.iter().map(|tensor| queue.upload(tensor.elements())).collect::<moe_lora::Result<Vec<_>>>()
        };
        Ok(Uploaded {
            topk_ids: queue.upload(data.topk_ids.elements())?,
            token_lora: queue.upload(data.token_lora.elements())?,
            topk_weights: queue
                .upload(data.topk_weights.as_ref().expect("the case is weighted").elements())?,
            x: queue.upload(data.x.elements())?,
            a: weights(&data.a)?,
            b: weights(&data.b)?,
        })
    }

    fn operands(&self) -> Operands<'_, Device, bf16> {
        Operands {
            routing: RoutingTensors {
                topk_ids: self.topk_ids.view(),
                token_lora: self.token_lora.view(),
                adapter_enabled: Enabled::All,
                ranks: None,
                expert_map: None,
            },
            x: self.x.view(),
            a: self.a.iter().map(Buffer::view).collect(),
            b: self.b.iter().map(Buffer::view).collect(),
            topk_weights: Some(self.topk_weights.view()),
        }
    }
}

/// What an unrecorded call makes of a case.
fn called(
    queue: &Queue<'_>,
    case: &Case,
    projection: &Projection,
    inputs: &Uploaded,
) -> moe_lora::Result<Vec<bf16>> {
    let mut out = poisoned(queue, case)?;
    let mut workspace = queue.workspace(&[*projection], case.tokens)?;
    queue.forward(&mut workspace, projection, inputs.operands().forward(case, false, out.view_mut()))?;
    queue.download(&out)
}

fn poisoned(queue: &Queue<'_>, case: &Case) -> moe_lora::Result<DeviceBuffer<bf16>> {
    queue.upload(&vec![bf16::NAN; case.tokens * case.top_k * case.out_stride()])
}

pub fn captured_calls_replay_with_other_routing(gpu: &Gpu) -> Result<(), Failed> {
    let queue = gpu.queue(Options::default())?;
    let (first, second) = (case(1), case(2));
    let projection = first.projection()?;
    let [first_data, second_data] = [&first, &second].map(CaseData::<bf16>::new::<Device>);
    let mut inputs = Uploaded::new(&queue, &first_data?)?;
    let second_data = second_data?;

    let mut workspace = queue.workspace(&[projection], first.tokens)?;
    let mut out = poisoned(&queue, &first)?;
    let before = queue.download(&out)?;
    // SAFETY: inputs, workspace and out outlive the graph.
    let graph = unsafe {
        queue.capture(|queue| {
            queue.forward(
                &mut workspace,
                &projection,
                inputs.operands().forward(&first, false, out.view_mut()),
            )
        })?
    };
    let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&queue.download(&out)?), bits(&before), "capture must not run the call");

    queue.replay(&graph)?;
    let replayed = queue.download(&out)?;
    assert_eq!(bits(&replayed), bits(&called(&queue, &first, &projection, &inputs)?), "first routing");

    // Other routing, in the buffers that the graph names.
    queue.write(&mut inputs.topk_ids, 0, second_data.topk_ids.elements())?;
    queue.write(&mut inputs.token_lora, 0, second_data.token_lora.elements())?;
    queue.replay(&graph)?;
    let rerouted = queue.download(&out)?;
    assert_eq!(bits(&rerouted), bits(&called(&queue, &first, &projection, &inputs)?), "second routing");
    assert_ne!(bits(&rerouted), bits(&replayed), "the two routings must differ");
    Ok(())
}
