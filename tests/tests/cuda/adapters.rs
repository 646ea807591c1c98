//! Adapters by address, exchanged while a graph replays.

use half::bf16;
use libtest_mimic::Failed;
use moe_lora::cuda::{self, Device, Stream};
use moe_lora::table::{AdapterSlice, AdapterTable};
use moe_lora::tensor::{Rows, RowsMut};
use moe_lora::{
    Backend, Buffer, Forward, OutDims, Projection, ProjectionSizes, RoutingTensors, SliceOrder, Weights,
};

const TOKENS: usize = 24;
const SLOTS: usize = 3;
const EXPERTS: usize = 4;
const EXCHANGES: usize = 1000;
/// The slot whose adapter is exchanged.
const EXCHANGED: usize = 1;

/// Numbers that differ from place to place and from seed to seed, of about the size of 1/√width.
fn values(len: usize, width: usize, seed: usize) -> Vec<bf16> {
    let scale = 2.0 / (width as f32).sqrt();
    let value = |place: usize| {
        let hash = (place as u32 ^ (seed as u32).wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
        scale * ((hash >> 16) as f32 / 65536.0 - 0.5)
    };
    (0..len).map(|place| bf16::from_f32(value(place))).collect()
}

/// An adapter of a rank of its own.
fn adapter(
    stream: &Stream,
    projection: &Projection,
    rank: usize,
    seed: usize,
) -> moe_lora::Result<Vec<Option<AdapterSlice<Stream, bf16>>>> {
    let sizes = projection.sizes();
    let max_rank = rank.next_multiple_of(8);
    let slice = |(s, &out_dim): (usize, &usize)| {
        let a = values(EXPERTS * max_rank * sizes.in_dim, sizes.in_dim, 31 * seed + 2 * s);
        let b = values(EXPERTS * out_dim * max_rank, rank, 31 * seed + 2 * s + 1);
        let (a, b) = (stream.upload(&a)?, stream.upload(&b)?);
        Ok(Some(AdapterSlice { a, b, rank, max_rank, scaling: 0.5 + seed as f32 % 3.0 }))
    };
    sizes.out_dims.as_slice().iter().enumerate().map(slice).collect()
}

/// A graph of one call is replayed after each exchange of one slot's adapter: the rows of the other slots
/// stay bitwise the same, and those of the slot are what a call with that adapter alone makes of them.
pub fn adapters_are_exchanged_between_replays(device: &Device) -> Result<(), Failed> {
    let stream = device.new_stream()?;
    let projection = Projection::new(ProjectionSizes {
        top_k: 2,
        experts: EXPERTS,
        slots: SLOTS,
        max_rank: 32,
        out_dims: OutDims::new(&[96, 32])?,
        ..ProjectionSizes::gate_up(128, 96)
    })?;
    let width = projection.out_width();
    let ids: Vec<i32> = (0..2 * TOKENS).map(|pair| (pair * 7 % EXPERTS) as i32).collect();
    let loras: Vec<i32> = (0..TOKENS).map(|token| token as i32 % (SLOTS as i32 + 1) - 1).collect();
    let x = stream.upload(&values(TOKENS * 128, 4, 0))?;
    let (topk_ids, token_lora) = (stream.upload(&ids)?, stream.upload(&loras)?);
    let mut workspace = stream.workspace(&[projection], TOKENS)?;
    let mut call = |table: &AdapterTable<Stream, bf16>, out: &mut cuda::Buffer<bf16>, stream: &Stream| {
        let call = Forward {
            tokens: TOKENS,
            routing: RoutingTensors::new(topk_ids.view(), token_lora.view()).into(),
            x: Rows::from(x.view()),
            weights: Weights::Table(table.adapters()),
            topk_weights: None,
            out: RowsMut::from(out.view_mut()),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate: false,
        };
        stream.forward(&mut workspace, &projection, call).map(drop)
    };
    let poison = vec![bf16::NAN; 2 * TOKENS * width];

    let mut table = AdapterTable::new(&stream, &projection)?;
    for slot in 0..SLOTS {
        table.set(slot, adapter(&stream, &projection, 8 + 8 * slot, slot)?)?;
    }
    let mut out = stream.upload(&poison)?;
    let graph = stream.capture(|stream| call(&table, &mut out, stream))?;
    graph.replay()?;
    let first = stream.download(&out)?;
    let ranks = [4, 8, 12, 24, 32, 0];
    for exchange in 0..EXCHANGES {
        let rank = ranks[exchange % ranks.len()];
        match rank {
            0 => table.remove(EXCHANGED)?,
            _ => table.set(EXCHANGED, adapter(&stream, &projection, rank, 3 + exchange % 11)?)?,
        }
        stream.write(&mut out, 0, &poison)?;
        graph.replay()?;
        let now = stream.download(&out)?;
        for (pair, (now, first)) in now.chunks(width).zip(first.chunks(width)).enumerate() {
            let slot = loras[pair / 2];
            let same = now.iter().zip(first).all(|(now, first)| now.to_bits() == first.to_bits());
            match (slot == EXCHANGED as i32, rank) {
                (false, _) => assert!(same, "exchange {exchange}: pair {pair} of slot {slot} has changed"),
                (true, 0) => assert!(now.iter().all(|value| value.to_bits() == 0), "pair {pair} is not zero"),
                (true, _) => assert!(!same, "exchange {exchange}: pair {pair} is as before"),
            }
        }
        if exchange % 50 == 0 {
            let mut alone = stream.upload(&poison)?;
            call(&table, &mut alone, &stream)?;
            let alone = stream.download(&alone)?;
            let bits = |values: &[bf16]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&now), bits(&alone), "exchange {exchange}: a replay is no call");
        }
    }
    Ok(())
}
