//! `moe-lora bench --route`: the route alone.

use super::cases::of_routes;
use crate::measure::{REPLAYS, WARM_UP, host_time, median};
use crate::print::say;
use anyhow::Context;
use moe_lora::cuda::{Device, Options, Stream, Workspace};
use moe_lora::{Backend, Buffer, Projection, RoutingTensors};
use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};

/// Numbers of tokens whose routes are timed: 640, 8,192, 131,072 and 1,048,576 pairs.
const TOKENS: [usize; 4] = [80, 1024, 16_384, 131_072];
/// Routes in a graph.
const ROUTES: usize = 20;

/// Times the route of so many tokens, in the planner's number of blocks and in `blocks`.
pub fn bench_routes(device: &Device, tokens: &[usize], blocks: &[u32]) -> anyhow::Result<()> {
    let mut options = vec![Options::default()];
    options.extend(blocks.iter().map(|&blocks| Options { route_blocks: Some(blocks), ..Options::default() }));
    let tokens = if tokens.is_empty() { &TOKENS } else { tokens };
    say!("| pairs | forced | µs | host µs |\n|---|---|---|---|")?;
    for (seed, &tokens) in (0..).zip(tokens) {
        let projection = of_routes()?;
        for option in &options {
            let stream = device.new_stream_with(*option)?;
            let (time, host) = time_route(&stream, &projection, tokens, seed)
                .with_context(|| format!("T={tokens}, {option:?}"))?;
            let pairs = tokens * projection.sizes().top_k;
            say!("| {pairs} | {} | {time:.2} | {host:.2} |", stream.variant())?;
        }
    }
    Ok(())
}

/// Microseconds of a route on the device, and of the thread that asks for it.
fn time_route(
    stream: &Stream,
    projection: &Projection,
    tokens: usize,
    seed: u64,
) -> anyhow::Result<(f64, f64)> {
    let s = *projection.sizes();
    let mut workspace = stream.workspace(&[*projection], tokens)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut draw = || -> (Vec<i32>, Vec<i32>) {
        let experts = (0..tokens).flat_map(|_| sample(&mut rng, s.experts, s.top_k));
        let topk_ids = experts.map(|e| e as i32).collect();
        // One token in nine has no adapter.
        (
            topk_ids,
            (0..tokens).map(|_| rng.random_range(-1..8)).map(|l| if l < 0 { l } else { l % 2 }).collect(),
        )
    };
    let (topk_ids, token_lora) = draw();
    let (mut ids_on_device, mut lora_on_device) = (stream.upload(&topk_ids)?, stream.upload(&token_lora)?);
    macro_rules! routing {
        () => {
            RoutingTensors::new(ids_on_device.view(), lora_on_device.view())
        };
    }
    check_route(stream, projection, &mut workspace, (&topk_ids, &token_lora), |workspace| {
        stream.route(workspace, projection, tokens, routing!()).map(drop)
    })?;
    let graph = stream.capture(|stream| {
        (0..ROUTES).try_for_each(|_| stream.route(&mut workspace, projection, tokens, routing!()).map(drop))
    })?;
    // Other routing in the buffers that the graph names.
    for _ in 0..3 {
        let (topk_ids, token_lora) = draw();
        stream.write(&mut ids_on_device, 0, &topk_ids)?;
        stream.write(&mut lora_on_device, 0, &token_lora)?;
        check_route(stream, projection, &mut workspace, (&topk_ids, &token_lora), |_| graph.replay())?;
    }
    graph.time(WARM_UP)?;
    let time = median(graph.time(REPLAYS)?) / ROUTES as f64;
    let host = host_time(stream, || stream.route(&mut workspace, projection, tokens, routing!()))?;
    Ok((time, host))
}

/// Lets `route` fill the workspace, and holds what it leaves against the same done plainly, to the bit.
fn check_route(
    stream: &Stream,
    projection: &Projection,
    workspace: &mut Workspace,
    (topk_ids, token_lora): (&[i32], &[i32]),
    route: impl FnOnce(&mut Workspace) -> moe_lora::Result<()>,
) -> anyhow::Result<()> {
    let s = projection.sizes();
    route(workspace)?;
    let got = stream.download_route(workspace, topk_ids.len())?;
    let inactive = s.slots * s.experts;
    let bucket = |pair: usize| match token_lora[pair / s.top_k] {
        -1 => inactive,
        slot => slot as usize * s.experts + topk_ids[pair] as usize,
    };
    let mut segments = vec![Vec::new(); inactive + 1];
    (0..topk_ids.len()).for_each(|pair| segments[bucket(pair)].push(pair as u32));
    let mut tiles = got.tiles.iter();
    let mut first = 0;
    for (bucket, segment) in segments.iter().enumerate() {
        if bucket == inactive {
            anyhow::ensure!(
                got.tiles.len() - tiles.len() == got.active_tiles,
                "wrong number of active tiles"
            );
        }
        anyhow::ensure!(got.pairs[first..][..segment.len()] == *segment, "wrong pairs in bucket {bucket}");
        let (mut at, end) = (first as u32, (first + segment.len()) as u32);
        while at < end {
            let tile = tiles.next().context("too few tiles")?;
            let rank = if bucket == inactive { 0 } else { s.max_rank as u32 };
            let place = (tile.slot as usize, tile.expert as usize, tile.first, tile.rank);
            anyhow::ensure!(
                place == (bucket / s.experts, bucket % s.experts, at, rank),
                "wrong tile: {tile:?}"
            );
            anyhow::ensure!(tile.rows > 0 && tile.rows <= end - at, "wrong rows: {tile:?}");
            at += tile.rows;
        }
        first += segment.len();
    }
    anyhow::ensure!(tiles.next().is_none(), "too many tiles");
    Ok(())
}
