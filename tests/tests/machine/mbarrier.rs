//! Barriers that count, the copies they count, and barriers of some threads.

use super::*;
use moe_lora_kernels::arch::bulk;
use moe_lora_kernels::arch::mbarrier::{self, Mbarrier};

/// As [`launch`], of a cluster of blocks of `threads` threads, with a word for each to write.
fn launch_threads(
    (blocks, threads): (u32, u32),
    seed: u64,
    body: impl Fn(Global<u32>, Global<u32>) + 'static,
) -> Result<Vec<u32>, Box<Report>> {
    let mut memory = Memory::default();
    let input: Vec<u32> = (0..WORDS as u32).collect();
    let output = vec![0u32; (blocks * threads) as usize];
    let [input, output] = [input, output].map(|words| bytemuck::cast_slice(&words).to_vec());
    let bytes = [&input, &output].map(|bytes: &Vec<u8>| bytes.len() as u64);
    let [from, to] = [input, output].map(|bytes| memory.allocate(&bytes));
    let buffers = [
        Buffer { name: "input".to_owned(), address: from, bytes: bytes[0], writable: false },
        Buffer { name: "output".to_owned(), address: to, bytes: bytes[1], writable: true },
    ];
    let shared_bytes = 1024;
    let launch =
        Launch { kernel: "kernel", blocks, cluster: blocks, threads, shared_bytes, overlaps: true, seed };
    run(&launch, &mut memory, &buffers, move || body(Global::new(from), Global::new(to)))?;
    Ok(bytemuck::pod_collect_to_vec(memory.bytes(to, bytes[1])))
}

/// Barrier number `number`, at the beginning of shared memory.
fn at(number: u32) -> Mbarrier {
    Mbarrier::at(word(2 * number))
}

/// Thread 0 makes barriers of so many arrivals each, and the block meets.
unsafe fn make(arrivals: &[u32]) {
    unsafe {
        if thread::index() == 0 {
            for (number, &arrivals) in arrivals.iter().enumerate() {
                at(number as u32).init(arrivals);
            }
            mbarrier::publish();
        }
        barrier::sync();
    }
}

/// Words of a stage.
const STAGE: u32 = 32;
/// Stages of a ring, whose barriers are `full` 0 and 1, `empty` 2 and 3.
const STAGES: u32 = 2;

fn stage(number: u32) -> Shared {
    word(STAGE * (1 + number))
}

/// What is wrong with a ring.
#[derive(Clone, Copy, PartialEq)]
enum Wrong {
    Nothing,
    /// The producer does not wait until stages are empty.
    Overtakes,
    /// The last consumer does not say that it has read a stage, and is not waited for.
    Silent,
    /// A consumer's first lane speaks for the others without having met them.
    Alone,
}

/// Thread 0 brings stages of the input by bulk copies, the warps after the first add up what a lane reads of each.
unsafe fn ring(input: Global<u32>, out: Global<u32>, warps: u32, rounds: u32, wrong: Wrong) {
    let (full, empty) = (at, |stage| at(STAGES + stage));
    let speakers = warps - 1 - u32::from(wrong == Wrong::Silent);
    unsafe {
        make(&[1, 1, speakers, speakers]);
        if thread::warp() > 0 {
            let mut sum = 0;
            for round in 0..rounds {
                let (number, parity) = (round % STAGES, round / STAGES % 2);
                full(number).wait(parity);
                sum += stage(number).offset(4 * thread::lane()).load();
                if wrong != Wrong::Alone {
                    warp::sync();
                }
                if thread::lane() == 0 && thread::warp() <= speakers {
                    empty(number).arrive();
                }
            }
            out.at(thread::index()).store(sum);
        } else if thread::index() == 0 {
            for round in 0..rounds {
                let (number, parity) = (round % STAGES, round / STAGES % 2);
                if wrong != Wrong::Overtakes {
                    empty(number).wait(parity ^ 1);
                }
                full(number).arrive_expecting(4 * STAGE);
                let source = input.at(STAGE * (round % 8));
                bulk::copy::<_, false>(stage(number), source, 4 * STAGE, full(number));
            }
        }
    }
}

#[test]
fn a_ring_of_stages_brings_all_of_them() {
    for seed in 0..16 {
        let out =
            launch_threads((1, 288), seed, |input, out| unsafe { ring(input, out, 9, 7, Wrong::Nothing) });
        let out = out.expect("no fault");
        // Lane l reads words l, l + 32, … l + 192 of the input.
        let expected: Vec<u32> = (32..288).map(|thread| 7 * (thread % 32) + 21 * 32).collect();
        assert_eq!(out[32..], expected);
    }
}

fn broken_ring(wrong: Wrong) -> impl Fn(u64) -> Result<Vec<u32>, Box<Report>> {
    move |seed| launch_threads((1, 96), seed, move |input, out| unsafe { ring(input, out, 3, 7, wrong) })
}

#[test]
fn a_stage_is_filled_again_only_after_the_wait_for_empty() {
    reports("race: asynchronous copy of byte 128 of shared memory after", broken_ring(Wrong::Overtakes));
}

#[test]
fn a_stage_is_filled_again_only_after_all_consumers_have_arrived() {
    reports("race: asynchronous copy of byte 128 of shared memory after read by", broken_ring(Wrong::Silent));
}

#[test]
fn who_arrives_for_a_warp_must_have_met_it() {
    reports("race: asynchronous copy of byte 1", broken_ring(Wrong::Alone));
}
