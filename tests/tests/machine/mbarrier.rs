//! Barriers that count, the copies they count, and barriers of some threads.

use super::*;
use moe_lora_kernels::arch::bulk;
use moe_lora_kernels::arch::mbarrier::{self, Mbarrier};
use moe_lora_kernels::emulate::Fault;

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
    let launch = Launch {
        kernel: "kernel",
        blocks,
        cluster: blocks,
        threads,
        shared_bytes,
        overlaps: true,
        cooperative: false,
        seed,
    };
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

/// Thread 0 brings stages of the input by bulk copies, the warps after the first add up what a lane reads of
/// each.
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
                bulk::copy(stage(number), source, 4 * STAGE, full(number));
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

#[test]
fn a_wait_ends_with_the_phase_of_its_parity() {
    for seed in 0..8 {
        let out = launch(1, seed, |_, out| unsafe {
            make(&[2, 2]);
            let (written, read, me) = (at(0), at(1), thread::index());
            if me < 2 {
                for phase in 0..6 {
                    // At first, for the phase before the first.
                    read.wait((phase + 1) % 2);
                    word(64 + me).store(10 * phase + me);
                    written.arrive();
                    written.wait(phase % 2);
                    out.at(2 * phase + me).store(word(65 - me).load());
                    read.arrive();
                }
            }
        });
        let expected: Vec<u32> = (0..6).flat_map(|phase| [10 * phase + 1, 10 * phase]).collect();
        assert_eq!(out.expect("no fault")[..12], expected);
    }
}

#[test]
fn a_barrier_orders_only_what_came_before_the_arrival() {
    reported("race: ", 1, |_, _| unsafe {
        make(&[1]);
        if thread::index() == 0 {
            at(0).arrive();
            word(64).store(1);
        } else if thread::index() == 32 {
            at(0).wait(0);
            word(64).store(2);
        }
    });
    reported("race: ", 1, |_, _| unsafe {
        word(64 + thread::index()).store(0);
        make(&[2]);
        if thread::index() == 0 {
            word(64).store(1);
            at(0).arrive();
        } else if thread::index() == 32 {
            // The phase of two arrivals is not waited for, but the one before it.
            at(0).wait(1);
            word(64).load();
            at(0).arrive();
        }
    });
}

#[test]
fn what_one_has_heard_of_by_a_barrier_others_hear_of_by_the_next() {
    for seed in 0..8 {
        let out = launch_threads((1, 128), seed, |_, out| unsafe {
            make(&[1, 1]);
            match thread::index() {
                0 => {
                    word(64).store(7);
                    at(0).arrive();
                }
                32 => {
                    at(0).wait(0);
                    at(1).arrive();
                }
                64..96 => {
                    if thread::lane() == 0 {
                        at(1).wait(0);
                    }
                    warp::sync();
                    out.at(thread::index()).store(word(64).load());
                }
                _ => {}
            }
        });
        assert_eq!(out.expect("no fault")[64..96], [7; 32]);
    }
}

#[test]
fn lanes_that_meet_see_each_others_stores() {
    let meet = |meets: bool| {
        move |seed| {
            launch(1, seed, move |_, out| unsafe {
                word(thread::index()).store(thread::index());
                if meets {
                    warp::sync();
                } else {
                    warp::ballot(true);
                }
                out.at(thread::index()).store(word(thread::index() ^ 1).load());
            })
        }
    };
    for seed in 0..8 {
        let expected: Vec<u32> = (0..64).map(|thread| thread ^ 1).collect();
        assert_eq!(meet(true)(seed).expect("no fault")[..64], expected);
    }
    reports("race: read of byte", meet(false));
}

/// Copies a stage and waits, all by thread 0, which then reads it; `what` is done at a step.
unsafe fn copy_alone(input: Global<u32>, what: impl Fn(u32)) {
    unsafe {
        make(&[2]);
        if thread::index() == 0 {
            what(0);
            at(0).arrive_expecting(4 * STAGE);
            bulk::copy(stage(0), input, 4 * STAGE, at(0));
            what(1);
            at(0).arrive();
            what(2);
            at(0).wait(0);
            what(3);
        }
    }
}

#[test]
fn a_copy_lands_with_its_phase() {
    for seed in 0..8 {
        let out = launch(1, seed, |input, out| unsafe {
            copy_alone(input, |step| {
                if step == 3 {
                    out.store(stage(0).offset(4 * 31).load());
                }
            });
        });
        assert_eq!(out.expect("no fault")[0], 31);
    }
    // The phase has one more arrival to come; then it has completed, but nobody has waited for it.
    reported("access to byte 140 of shared memory, where a copy is under way", 1, |input, _| unsafe {
        copy_alone(input, |step| {
            if step == 1 {
                stage(0).offset(12).load();
            }
        });
    });
    reported(
        "race: read of byte 140 of shared memory after asynchronous copy by thread 0",
        1,
        |input, _| unsafe {
            copy_alone(input, |step| {
                if step == 2 {
                    stage(0).offset(12).load();
                }
            });
        },
    );
    // Another, who has not waited, though the block has met.
    reported(
        "race: read of byte 128 of shared memory after asynchronous copy by thread 0",
        1,
        |input, _| unsafe {
            make(&[1]);
            if thread::index() == 0 {
                at(0).arrive_expecting(4 * STAGE);
                bulk::copy(stage(0), input, 4 * STAGE, at(0));
            }
            barrier::sync();
            if thread::index() == 40 {
                stage(0).load();
            }
            at(0).wait(0);
        },
    );
}

#[test]
fn a_copy_takes_what_its_source_holds_in_the_end() {
    // Nobody may write there before the phase has ended.
    reported("race: write of byte 0 of output after asynchronous copy by thread 0", 1, |_, out| unsafe {
        copy_alone(out, |step| {
            if step == 1 {
                out.store(1);
            }
        });
    });
    launch(1, 0, |_, out| unsafe {
        copy_alone(out, |step| {
            if step == 3 {
                out.store(1);
            }
        });
    })
    .expect("it has ended");
}

#[test]
fn a_block_waits_for_its_copies_before_it_ends() {
    reported(
        "the block may end before a copy to byte 128 of shared memory has landed",
        1,
        |input, _| unsafe {
            make(&[1]);
            if thread::index() == 0 {
                at(0).arrive_expecting(4 * STAGE);
                bulk::copy(stage(0), input, 4 * STAGE, at(0));
            }
        },
    );
}

#[test]
fn copies_are_in_units_of_16_bytes_and_in_bounds() {
    unsafe fn copy(target: Shared, source: Global<u32>, bytes: u32) {
        unsafe {
            make(&[1]);
            if thread::index() == 0 {
                at(0).arrive_expecting(bytes);
                bulk::copy(target, source, bytes, at(0));
            }
        }
    }
    reported("byte 4 of input is not aligned for an access of 16 bytes", 1, |input, _| unsafe {
        copy(stage(0), input.at(1u32), 64);
    });
    reported("byte 136 of shared memory is not aligned for an access of 16 bytes", 1, |input, _| unsafe {
        copy(stage(0).offset(8), input, 64);
    });
    reported("bulk copy of 24 bytes, which is not in units of 16", 1, |input, _| unsafe {
        copy(stage(0), input, 24);
    });
    reported("read", 1, |input, _| unsafe { copy(stage(0), input.at(252u32), 32) });
    reported("byte 1008 of input, which has 1024", 1, |input, _| unsafe {
        copy(stage(0), input.at(252u32), 32);
    });
    reported("32 bytes from byte 1008 of shared memory, the block has 1024", 1, |input, _| unsafe {
        copy(word(252), input, 32);
    });
    reported("mbarrier at byte 0 of shared memory: asynchronous copy of a barrier", 1, |input, _| unsafe {
        copy(word(0), input, 32);
    });
}

#[test]
fn a_phase_gets_the_bytes_that_were_announced() {
    let copy = |announced: u32| {
        move |seed| {
            launch(1, seed, move |input, _| unsafe {
                make(&[1]);
                if thread::index() == 0 {
                    at(0).arrive_expecting(announced);
                    bulk::copy(stage(0), input, 128, at(0));
                }
                at(0).wait(0);
            })
        }
    };
    for seed in 0..8 {
        copy(128)(seed).expect("no fault");
    }
    reports("mbarrier at byte 0 of shared memory: phase 0 gets 128 bytes, and 112 were announced", copy(112));
    reports("the mbarrier at byte 0 in phase 0 has 1 of 1 arrivals and 128 of 144 bytes", copy(144));
    reports("threads 0-63 wait at mbarrier.try_wait (tests/tests/machine/mbarrier.rs", copy(144));
}

#[test]
fn a_barrier_that_nobody_completes_is_reported_with_who_waits_where() {
    reported("threads 32-63 wait at mbarrier.try_wait", 1, |_, _| unsafe {
        make(&[3]);
        if thread::index() < 2 {
            at(0).arrive();
        } else if thread::warp() == 1 {
            at(0).wait(0);
        }
    });
    cluster_reported(
        "the mbarrier at byte 0 of block 2 in phase 0 has 1 of 2 arrivals and 0 of 0 bytes",
        |_| unsafe {
            make(&[2]);
            if thread::index() == 0 {
                at(0).arrive();
                if cluster::block() == 2 {
                    at(0).wait(0);
                }
            }
            barrier::sync();
        },
    );
}

#[test]
fn a_barrier_is_initialised_once_and_before_its_use() {
    reported("mbarrier at byte 8 of shared memory: use of what was not initialised", 1, |_, _| unsafe {
        make(&[1]);
        at(1).arrive();
    });
    reported("mbarrier at byte 8 of shared memory: use of what was not initialised", 1, |_, _| unsafe {
        make(&[1]);
        if thread::index() == 0 {
            word(2).store(1);
            word(3).store(0);
        }
        barrier::sync();
        at(1).wait(1);
    });
    reported("mbarrier.init of a barrier, after mbarrier.init by thread 0", 1, |_, _| unsafe {
        make(&[1]);
        if thread::index() == 1 {
            at(0).init(1);
        }
    });
    reported("it cannot take 0 arrivals", 1, |_, _| unsafe { make(&[0]) });
    // Thread 0 has made it, and a meeting is missing.
    for thread in [1, 40] {
        reports("mbarrier at byte 0 of shared memory", |seed| {
            let launched = launch(1, seed, move |_, _| unsafe {
                if thread::index() == 0 {
                    at(0).init(1);
                    mbarrier::publish();
                } else if thread::index() == thread {
                    at(0).arrive();
                }
            });
            // Where the other comes later that is a race, which says less of what it is.
            launched.map_err(|mut report| {
                if matches!(report.fault, Fault::Race { .. }) {
                    let why = report.fault.to_string();
                    let expected =
                        "race: use of an mbarrier of byte 0 of shared memory after mbarrier.init by thread 0";
                    assert!(why.contains(expected), "{why}");
                    report.fault = Fault::Mbarrier { place: "byte 0 of shared memory".to_owned(), why };
                }
                report
            })
        });
    }
}

#[test]
fn nothing_else_touches_a_barrier() {
    reported(
        "mbarrier at byte 4 of shared memory: read of a barrier, after mbarrier.init",
        1,
        |_, _| unsafe {
            make(&[1]);
            word(1).load();
        },
    );
    reported(
        "mbarrier at byte 0 of shared memory: write of a barrier, after mbarrier.init",
        1,
        |_, _| unsafe {
            make(&[1]);
            word(0).store16([0; 4]);
        },
    );
    reported("byte 4 of shared memory is not aligned for an access of 8 bytes", 1, |_, _| unsafe {
        Mbarrier::at(word(1)).init(1);
    });
    reported("8 bytes from byte 1024 of shared memory", 1, |_, _| unsafe { at(128).init(1) });
}

#[test]
fn a_phase_takes_so_many_arrivals() {
    reported("phase 0 takes 1 arrivals, and one more comes", 1, |_, _| unsafe {
        make(&[1]);
        if thread::index() < 2 {
            at(0).arrive_expecting(16);
        }
    });
}

#[test]
fn who_looks_too_late_may_miss_a_phase() {
    reported("a thread that waits for phase", 1, |_, _| unsafe {
        make(&[1]);
        if thread::index() == 0 {
            // Once the other waits, it is not asked whether it has seen the first of two phases.
            at(0).arrive();
            at(0).arrive();
        } else {
            at(0).wait(0);
        }
    });
}

#[test]
fn a_parity_is_0_or_1() {
    reported("wait for parity 2", 1, |_, _| unsafe {
        make(&[1]);
        at(0).wait(2);
    });
}

#[test]
fn stores_lie_behind_a_fence_before_a_copy_overwrites_them() {
    unsafe fn overwrite(input: Global<u32>, writer_fences: bool, copier_fences: bool) {
        unsafe {
            make(&[1]);
            if thread::warp() == 1 {
                stage(0).offset(4 * thread::lane()).store(1);
                if writer_fences {
                    bulk::fence();
                }
            }
            barrier::sync();
            if thread::index() == 0 {
                if copier_fences {
                    bulk::fence();
                }
                at(0).arrive_expecting(4 * STAGE);
                bulk::copy(stage(0), input, 4 * STAGE, at(0));
            }
            at(0).wait(0);
        }
    }
    for (writer_fences, copier_fences) in [(true, false), (false, true)] {
        launch(1, 1, move |input, _| unsafe { overwrite(input, writer_fences, copier_fences) })
            .expect("a fence lies between");
    }
    reported(
        "bulk copy to byte 128 of shared memory without a fence.proxy.async between it and write by \
         thread 32",
        1,
        |input, _| unsafe { overwrite(input, false, false) },
    );
    // Before the store a fence shows nothing.
    reported("without a fence.proxy.async", 1, |input, _| unsafe {
        copy_alone(input, |step| {
            if step == 0 {
                stage(0).store(0);
                bulk::fence();
                stage(0).store(1);
            }
        });
    });
}

#[test]
fn copies_that_an_arrival_waits_for_land_with_its_phase() {
    /// Each lane copies 16 bytes, `bytes` of which it brings, and arrives after them or at once; who reads
    /// waits for the phase.
    unsafe fn copy(input: Global<u32>, out: Global<u32>, bytes: u32, after: bool) {
        unsafe {
            make(&[34]);
            if thread::warp() == 0 {
                let lane = thread::lane();
                async_copy::copy16::<_, { async_copy::AROUND }>(
                    word(32 + 4 * lane),
                    input.at(4 * lane),
                    bytes,
                );
                if after {
                    at(0).arrive_after_copies();
                } else {
                    at(0).arrive();
                }
                if lane == 0 {
                    at(0).arrive_for(2);
                }
            } else {
                at(0).wait(0);
                out.at(thread::index()).store(word(32 + 4 * (thread::index() % 32) + 1).load());
            }
        }
    }
    for (seed, bytes, word_one) in [(1, 16, 1), (2, 8, 1), (3, 4, 0), (4, 0, 0)] {
        let out = launch_threads((1, 64), seed, move |input, out| unsafe { copy(input, out, bytes, true) });
        let expected: Vec<u32> = (0..32).map(|lane| word_one * (4 * lane + 1)).collect();
        assert_eq!(out.expect("no fault")[32..], expected, "{bytes} bytes");
    }
    reported("asynchronous copy", 1, |input, out| unsafe { copy(input, out, 16, false) });
}

#[test]
fn the_copy_engine_need_not_see_what_other_copies_have_brought() {
    unsafe fn overwrite(input: Global<u32>, fences: bool) {
        unsafe {
            make(&[1, 1]);
            if thread::index() == 0 {
                async_copy::copy16_whole::<_, { async_copy::ALONE }>(word(32), input);
                at(0).arrive_after_copies();
                at(0).wait(0);
                if fences {
                    bulk::fence();
                }
                at(1).arrive_expecting(16);
                bulk::copy(word(32), input, 16, at(1));
                at(1).wait(0);
            }
        }
    }
    launch(1, 1, |input, _| unsafe { overwrite(input, true) }).expect("a fence lies between");
    reported("without a fence.proxy.async", 1, |input, _| unsafe { overwrite(input, false) });
}

#[test]
fn a_barrier_is_shown_to_copies_before_it_counts_them() {
    unsafe fn copy(input: Global<u32>, show: impl Fn()) {
        unsafe {
            if thread::index() == 0 {
                at(0).init(1);
                show();
                at(0).arrive_expecting(4 * STAGE);
                bulk::copy(stage(0), input, 4 * STAGE, at(0));
                at(0).wait(0);
            }
        }
    }
    reported("it was not shown to other blocks and to copies (fence.mbarrier_init)", 1, |input, _| unsafe {
        copy(input, || {});
    });
    launch(1, 1, |input, _| unsafe { copy(input, mbarrier::publish) }).expect("it was shown");
    launch(1, 1, |input, _| unsafe { copy(input, bulk::fence) }).expect("it was shown");
}

/// Bytes that a warp sends.
const SENT: u32 = 32 * 16;

/// Each block of a cluster sends 32 × 16 bytes to the next, once that has read what came before.
unsafe fn send_on(out: Global<u32>, rounds: u32, waits_for_empty: bool) {
    unsafe {
        make(&[1, 1]);
        let (me, block, blocks) = (thread::index(), cluster::block(), cluster::blocks());
        let (next, before) = ((block + 1) % blocks, (block + blocks - 1) % blocks);
        let (full, empty) = (at(0), at(1));
        if me == 0 {
            full.arrive_expecting(SENT);
        }
        cluster::sync();
        let mut sum = 0;
        for round in 0..rounds {
            if thread::warp() == 0 {
                let value = (1000 * round + 100 * block + me) as f32;
                let target = stage(0).offset(16 * me).in_block(next);
                target.store4_async([value, 0.0, 0.0, 1.0], full.in_block(next));
            }
            full.wait(round % 2);
            let place = stage(0).offset(16 * (me % 32));
            sum += f32::from_bits(place.load()) as u32 + f32::from_bits(place.offset(12).load()) as u32;
            if round + 1 < rounds {
                barrier::sync();
                if me == 0 {
                    full.arrive_expecting(SENT);
                    empty.in_block(before).arrive();
                }
                // Only those that send: the others might miss a phase.
                if waits_for_empty && thread::warp() == 0 {
                    empty.wait(round % 2);
                }
            }
        }
        // Nobody uses this block's memory any more, as it has waited for everything that comes.
        out.at(64 * block + me).store(sum);
    }
}

#[test]
fn a_store_to_another_block_lands_with_the_phase_of_its_barrier() {
    for seed in 0..16 {
        let out = launch_clusters(4, 4, seed, |out| unsafe { send_on(out, 3, true) }).expect("no fault");
        // Three rounds of the block before, and a 1 each.
        let sum = |block: u32, thread: u32| 3000 + 3 * (100 * ((block + 3) % 4) + thread % 32) + 3;
        let expected: Vec<u32> = (0..4).flat_map(|block| (0..64).map(move |i| sum(block, i))).collect();
        assert_eq!(out, expected);
    }
    cluster_reported("shared memory", |out| unsafe { send_on(out, 3, false) });
}

#[test]
fn a_store_to_another_block_is_waited_for_there() {
    unsafe fn send(read: impl Fn()) {
        unsafe {
            make(&[2]);
            cluster::sync();
            if cluster::block() == 0 && thread::warp() == 0 {
                stage(0).offset(16 * thread::lane()).in_block(1).store4_async([1.0; 4], at(0).in_block(1));
            }
            if cluster::block() == 1 && thread::index() == 0 {
                at(0).arrive_expecting(SENT);
            }
            cluster::sync();
            if cluster::block() == 1 && thread::index() == 0 {
                read();
                at(0).arrive();
                at(0).wait(0);
            }
        }
    }
    cluster_reported(
        "access to byte 128 of shared memory, where a copy is under way: started by",
        |_| unsafe {
            send(|| {
                stage(0).load();
            });
        },
    );
    for seed in 0..8 {
        launch_clusters(4, 4, seed, |_| unsafe { send(|| {}) }).expect("nobody reads");
    }
    // Nobody of block 1 waits.
    cluster_reported("the block may end before a copy to byte 128 of shared memory has landed", |_| unsafe {
        make(&[1]);
        if thread::index() == 0 {
            at(0).arrive_expecting(16);
        }
        cluster::sync();
        if cluster::block() == 0 && thread::index() == 0 {
            stage(0).in_block(1).store4_async([1.0; 4], at(0).in_block(1));
        }
    });
}

#[test]
fn a_barrier_of_another_block_is_used_once_the_cluster_has_met() {
    cluster_reported("shared memory, which may not have started yet", |_| unsafe {
        make(&[1]);
        at(0).in_block((cluster::block() + 1) % 4).arrive();
    });
    cluster_reported("shared memory, which may not have started yet", |_| unsafe {
        make(&[1]);
        let next = (cluster::block() + 1) % 4;
        stage(0).in_block(next).store4_async([0.0; 4], at(0).in_block(next));
    });
    cluster_reported("it was not shown to other blocks and to copies (fence.mbarrier_init)", |_| unsafe {
        if thread::index() == 0 {
            at(0).init(1);
        }
        cluster::sync();
        at(0).in_block((cluster::block() + 1) % 4).arrive();
        cluster::sync();
    });
    cluster_reported("st.async to another block than its barrier's", |_| unsafe {
        make(&[1]);
        cluster::sync();
        stage(0).in_block(1).store4_async([0.0; 4], at(0).in_block(2));
    });
}

#[test]
fn an_arrival_from_another_block_orders_what_came_before_it() {
    let collect = |waits: bool| {
        move |seed| {
            launch_clusters(4, 4, seed, move |out| unsafe {
                make(&[4]);
                cluster::sync();
                let (me, block) = (thread::index(), cluster::block());
                if thread::warp() == 0 {
                    word(32 * (1 + block) + me).in_block(0).store(10 * block + me);
                    warp::sync();
                    if me == 0 {
                        at(0).in_block(0).arrive();
                    }
                }
                if block == 0 {
                    if waits {
                        at(0).wait(0);
                    }
                    for i in 0..2 {
                        out.at(64 * i + me).store(word(32 + 64 * i + me).load());
                    }
                }
            })
        }
    };
    for seed in 0..8 {
        let out = collect(true)(seed).expect("no fault");
        let expected: Vec<u32> = (0..4).flat_map(|block| (0..32).map(move |i| 10 * block + i)).collect();
        assert_eq!(out[..128], expected);
    }
    for seed in 0..8 {
        collect(false)(seed).expect_err("nothing is waited for");
    }
}

#[test]
fn a_block_must_outlive_arrivals_at_its_barriers() {
    cluster_reported(
        "use of an mbarrier of block 1's shared memory, which may have ended by then",
        |_| unsafe {
            make(&[1]);
            cluster::sync();
            if cluster::block() == 0 && thread::index() == 0 {
                at(0).in_block(1).arrive();
            }
        },
    );
}

#[test]
fn what_was_stored_after_arriving_is_seen_by_way_of_the_block() {
    for seed in 0..8 {
        let out = launch_clusters(4, 4, seed, |out| unsafe {
            let me = thread::index();
            if thread::warp() == 0 {
                cluster::arrive();
                word(me).store(me);
            }
            barrier::sync();
            if thread::warp() == 1 {
                cluster::arrive();
            }
            cluster::wait();
            let theirs = word(me % 32).in_block((cluster::block() + 1) % 4).load();
            cluster::sync();
            out.at(64 * cluster::block() + me).store(theirs);
        });
        assert_eq!(out.expect("no fault")[64..67], [0, 1, 2]);
    }
}

/// Halves of a block of 128 threads pass words on among themselves.
unsafe fn halves(out: Global<u32>, partner: u32) {
    unsafe {
        let me = thread::index();
        word(me).store(0);
        word(128 + me).store(0);
        barrier::sync();
        let mut value = me;
        for round in 0..4 {
            let words = word(128 * (round % 2));
            words.offset(4 * me).store(value);
            if me < 64 {
                barrier::sync_some::<1, 64>();
            } else {
                barrier::sync_some::<2, 64>();
            }
            value = words.offset(4 * (me ^ partner)).load() + 1;
        }
        out.at(me).store(value);
    }
}

#[test]
fn some_threads_meet_while_the_others_go_on() {
    for seed in 0..8 {
        let out = launch_threads((1, 128), seed, |_, out| unsafe { halves(out, 63) });
        let expected: Vec<u32> = (0..128).map(|thread| thread + 4).collect();
        assert_eq!(out.expect("no fault"), expected);
        // The second half waits for a word of the first, which does not wait for it.
        let out = launch_threads((1, 128), seed, |_, out| unsafe {
            make(&[1]);
            if thread::index() < 64 {
                barrier::sync_some::<3, 64>();
                if thread::index() == 0 {
                    at(0).arrive();
                }
            } else {
                at(0).wait(0);
                barrier::sync_some::<3, 64>();
            }
            out.at(thread::index()).store(1);
        });
        assert_eq!(out.expect("no fault"), [1; 128]);
    }
}

#[test]
fn a_barrier_of_some_threads_orders_theirs_alone() {
    reports("race: ", |seed| launch_threads((1, 128), seed, |_, out| unsafe { halves(out, 127) }));
    // Half a block is too little where a warp is missing.
    reports("threads 0-31 wait at bar.sync 1", |seed| {
        launch_threads((1, 128), seed, |_, _| {
            if thread::warp() == 0 {
                barrier::sync_some::<1, 64>();
            }
        })
    });
    reports("wait at bar.sync 1", |seed| {
        launch_threads((1, 128), seed, |_, _| {
            if thread::lane() < 16 {
                barrier::sync_some::<1, 64>();
            }
        })
    });
    reports("barrier 1 of ", |seed| {
        launch_threads((1, 128), seed, |_, _| {
            if thread::index() < 64 {
                barrier::sync_some::<1, 64>();
            } else {
                barrier::sync_some::<1, 96>();
            }
        })
    });
}

#[test]
fn a_cluster_of_rings_comes_to_its_end() {
    // As many threads as any cluster of a kernel here has.
    let out = launch_threads((8, 288), 1, |input, out| unsafe {
        ring(input, out.at(288 * cluster::block()), 9, 50, Wrong::Nothing);
    });
    let out = out.expect("no fault");
    let sums = |block: usize| &out[288 * block + 32..][..256];
    assert!((0..8).all(|block| sums(block) == sums(0)));
}
