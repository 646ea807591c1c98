//! Routes in vLLM's form on the GPU: sorted by one block a slot, and by a cluster.

use libtest_mimic::Failed;
use moe_lora::cuda::{self, Device, Options, TileKind};
use moe_lora::{
    Align, Backend, BlockShape, Buffer, Cuda, Enabled, OutDims, RoutingTensors, SliceOrder, SortedTensors,
    Weights,
};
use moe_lora_verify::{Case, CaseData, Experts, Flags, Form, Loras, Ranks, check_each};

/// Narrow matrices: what counts is who goes where.
fn narrow() -> Case {
    Case { in_dim: 8, out_dims: OutDims::uniform(8, 1), max_rank: 8, loras: Loras::Random, ..Case::default() }
}

fn check(device: &Device, case: &Case) -> Result<(), Failed> {
    let tiles = [None, Some(TileKind::M16), Some(TileKind::M64)];
    let streams: Result<Vec<_>, _> = tiles
        .into_iter()
        .map(|tile| device.new_stream_with(Options { tile, ..Options::default() }))
        .collect();
    check_each(&streams?, case)?;
    Ok(())
}

/// The sizes of vLLM's tests/lora/test_moe_lora_align_sum.py.
pub fn vllms_own_grid_of_blocks_passes(device: &Device) -> Result<(), Failed> {
    for tokens in [100, 200, 1024, 4096] {
        for experts in [64, 128, 256, 512] {
            for slots in [2, 32] {
                let case = Case { tokens, top_k: 6, experts, slots, block_size: Some(16), ..narrow() };
                check(device, &case)?;
            }
        }
    }
    Ok(())
}

/// From none to 131,072 pairs, from one expert and slot to many, with every kind of id that is none.
pub fn blocks_of_every_size_pass(device: &Device) -> Result<(), Failed> {
    let sizes = [
        (0, 1, 1, 1, 16),
        (1, 1, 1, 1, 1),
        (33, 8, 7, 3, 7),
        (80, 8, 128, 2, 32),
        (256, 8, 128, 8, 64),
        (600, 8, 128, 8, 128),
        (1024, 8, 256, 8, 256),
        (1000, 5, 4096, 2, 16),
        (300, 2, 8, 3000, 16),
        (16_384, 8, 128, 2, 128),
        (16_384, 8, 128, 8, 16),
    ];
    for (tokens, top_k, experts, slots, block_size) in sizes {
        let case = Case { tokens, top_k, experts, slots, block_size: Some(block_size), ..narrow() };
        check(device, &case)?;
        let wild = Case {
            global_experts: Some(experts + 3),
            routing: Experts::OutOfRange,
            loras: Loras::OutOfRange,
            enabled: Flags::I32,
            ranks: Ranks::OutOfRange,
            accumulate: false,
            form: Form::Split,
            ..case.clone()
        };
        check(device, &wild)?;
        // One segment with all pairs, and the form without clusters at any size.
        let one = Case { routing: Experts::One, loras: Loras::One, enabled: Flags::U8, ..case };
        check(&Device::with_generation(0, 80)?, &one)?;
        check(device, &one)?;
    }
    Ok(())
}

/// One graph sorts into blocks and computes on them: it must follow the ids that the buffers hold when it is
/// replayed.
pub fn captured_blocks_replay_with_other_routing(device: &Device) -> Result<(), Failed> {
    let stream = device.new_stream()?;
    let case = |seed| Case { tokens: 700, top_k: 8, experts: 16, accumulate: false, seed, ..narrow() };
    let [first, second] = [case(1), case(2)];
    let projection = first.projection()?;
    let [data, other] = [&first, &second].map(CaseData::<half::bf16>::new::<Cuda>);
    let (data, other) = (data?, other?);
    let shape = BlockShape { block_size: 32, max_padded: 6144, max_blocks: 192 };

    let (mut topk_ids, mut token_lora) =
        (stream.upload(data.topk_ids.elements())?, stream.upload(data.token_lora.elements())?);
    let x = stream.upload(&vec![half::bf16::ONE; data.x.elements().len()])?;
    let [a, b] = [&data.a[0], &data.b[0]].map(|w| stream.upload(&vec![half::bf16::ONE; w.elements().len()]));
    let (a, b) = (a?, b?);
    let lora_ids = stream.upload(&[0, 1, -1])?;
    let ids = |len| stream.upload(&vec![-7i32; len]);
    let slots = first.slots;
    let mut sorted = ids(slots * shape.max_padded)?;
    let mut experts = ids(slots * shape.max_blocks)?;
    let mut counts = ids(slots)?;
    let mut workspace = stream.workspace(&[projection], first.tokens)?;
    let out = vec![half::bf16::ZERO; first.tokens * first.top_k * first.out_stride()];
    let mut blocks_out = stream.upload(&out)?;
    let mut own_out = stream.upload(&out)?;

    let graph = {
        stream.capture(|stream| {
            stream.align(Align {
                tokens: first.tokens,
                top_k: first.top_k,
                experts: first.experts,
                slots,
                shape,
                topk_ids: topk_ids.view().into(),
                token_lora: token_lora.view(),
                adapter_enabled: Enabled::All,
                lora_ids: lora_ids.view(),
                expert_map: None,
                sorted_token_ids: sorted.view_mut(),
                expert_ids: experts.view_mut(),
                num_tokens_post_padded: counts.view_mut(),
            })?;
            let routing = SortedTensors {
                shape,
                sorted_token_ids: sorted.view(),
                expert_ids: experts.view(),
                num_tokens_post_padded: counts.view(),
                lora_ids: lora_ids.view(),
                adapter_enabled: Enabled::All,
                ranks: None,
            };
            let out = blocks_out.view_mut().into();
            let (a, b) = ([a.view()], [b.view()]);
            let call = moe_lora::Forward {
                tokens: first.tokens,
                routing: routing.into(),
                x: x.view().into(),
                weights: Weights::Stacked { a: &a, b: &b },
                topk_weights: None,
                out,
                offset: 0,
                order: SliceOrder::InOrder,
                accumulate: false,
            };
            stream.forward(&mut workspace, &projection, call).map(drop)
        })?
    };
    let bits = |buffer: &cuda::Buffer<half::bf16>| -> moe_lora::Result<Vec<u16>> {
        Ok(stream.download(buffer)?.iter().map(|value| value.to_bits()).collect())
    };
    let mut results = Vec::new();
    for data in [&data, &other] {
        stream.write(&mut topk_ids, 0, data.topk_ids.elements())?;
        stream.write(&mut token_lora, 0, data.token_lora.elements())?;
        // A pair that is in no block keeps its row: it must be zero, as the other form leaves it.
        stream.write(&mut blocks_out, 0, &out)?;
        graph.replay()?;
        let (a, b) = ([a.view()], [b.view()]);
        let call = moe_lora::Forward {
            tokens: first.tokens,
            routing: RoutingTensors::new(topk_ids.view(), token_lora.view()).into(),
            x: x.view().into(),
            weights: Weights::Stacked { a: &a, b: &b },
            topk_weights: None,
            out: own_out.view_mut().into(),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate: false,
        };
        let mut workspace = stream.workspace(&[projection], first.tokens)?;
        stream.forward(&mut workspace, &projection, call)?;
        let (blocks, own) = (bits(&blocks_out)?, bits(&own_out)?);
        assert!(own.iter().any(|&value| value != 0), "something is computed");
        assert_eq!(blocks, own, "of ones, whatever the tile, the sums are exact");
        results.push(blocks);
    }
    assert_ne!(results[0], results[1], "the two routings must differ");
    Ok(())
}
