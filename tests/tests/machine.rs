//! The emulated machine does what the PTX manual says, and tells what a kernel does wrong: small kernels,
//! each broken in one way, and what the report says of it.

// Kernels here may do anything: the machine checks each access, and that is what is tested.
#![allow(clippy::undocumented_unsafe_blocks)]

use half::bf16;
use moe_lora_kernels::arch::mma::{Bf16, Element};
use moe_lora_kernels::arch::shared::Shared;
use moe_lora_kernels::arch::{async_copy, barrier, cluster, grid, thread, warp};
use moe_lora_kernels::emulate::{Buffer, Launch, Memory, Report, run};
use moe_lora_kernels::memory::{Global, Index};
use moe_lora_tests::faults::caught;

/// Words of the buffers that kernels here are given.
const WORDS: usize = 256;

/// Runs `body` with 64 threads a block, 1 KiB of shared memory, a buffer to read (word i is i) and one to
/// write. Returns what was written.
fn launch(
    blocks: u32,
    seed: u64,
    body: impl Fn(Global<u32>, Global<u32>) + 'static,
) -> Result<Vec<u32>, Box<Report>> {
    let mut memory = Memory::default();
    let input: Vec<u32> = (0..WORDS as u32).collect();
    let bytes = size_of_val(input.as_slice()) as u64;
    let [from, to] = [0, 1].map(|_| memory.allocate(bytemuck::cast_slice(&input)));
    let buffers = [("input", from, false), ("output", to, true)].map(|(name, address, writable)| Buffer {
        name: name.to_owned(),
        address,
        bytes,
        writable,
    });
    let launch = Launch {
        kernel: "kernel",
        blocks,
        cluster: 1,
        cooperative: false,
        threads: 64,
        shared_bytes: 1024,
        overlaps: true,
        seed,
    };
    run(&launch, &mut memory, &buffers, move || body(Global::new(from), Global::new(to)))?;
    Ok(bytemuck::pod_collect_to_vec(memory.bytes(to, bytes)))
}

/// As [`launch`], with blocks in clusters, or all at once where `cluster` is 0, whose threads are given the
/// buffer to write.
fn launch_clusters(
    blocks: u32,
    cluster: u32,
    seed: u64,
    body: impl Fn(Global<u32>) + 'static,
) -> Result<Vec<u32>, Box<Report>> {
    let mut memory = Memory::default();
    let bytes = 4 * WORDS as u64;
    let address = memory.allocate(&[0; 4 * WORDS]);
    let output = Buffer { name: "output".to_owned(), address, bytes, writable: true };
    let cooperative = cluster == 0;
    let launch = Launch {
        kernel: "kernel",
        blocks,
        cluster: cluster.max(1),
        cooperative,
        threads: 64,
        shared_bytes: 1024,
        overlaps: true,
        seed,
    };
    run(&launch, &mut memory, &[output], move || body(Global::new(address)))?;
    Ok(bytemuck::pod_collect_to_vec(memory.bytes(address, bytes)))
}

/// `body` must be reported, whatever the order of threads, in words that hold `expected` and this file.
#[track_caller]
fn reported(expected: &str, blocks: u32, body: impl Fn(Global<u32>, Global<u32>) + Copy + 'static) {
    reports(expected, |seed| launch(blocks, seed, body));
}

/// As [`reported`], for a cluster of four.
#[track_caller]
fn cluster_reported(expected: &str, body: impl Fn(Global<u32>) + Copy + 'static) {
    reports(expected, |seed| launch_clusters(4, 4, seed, body));
}

#[track_caller]
fn reports(expected: &str, launch: impl Fn(u64) -> Result<Vec<u32>, Box<Report>>) {
    for seed in 0..8 {
        let report = launch(seed).expect_err(expected).to_string();
        assert!(report.starts_with("kernel, block "), "{report}");
        assert!(report.contains(expected), "{expected:?} is not in: {report}");
        assert!(report.contains("tests/machine"), "{report}");
    }
    caught(expected);
}

fn word(number: u32) -> Shared {
    Shared::base().offset(4 * number)
}

#[test]
fn a_store_one_past_the_end_is_reported() {
    reported("write of 4 bytes", 1, |_, out| unsafe { out.at(thread::index() + 193).store(1) });
    reported("byte 1024 of output, which has 1024", 1, |_, out| unsafe {
        out.at(thread::index() + 193).store(1)
    });
}

#[test]
fn a_load_by_an_unchecked_id_is_reported() {
    reported("read of 4 bytes", 1, |input, _| unsafe {
        input.at(u32::MAX).load();
    });
}

#[test]
fn a_store_to_an_input_is_reported() {
    reported("write to input, which this launch only reads", 1, |input, _| unsafe {
        input.at(thread::index()).store(1)
    });
}

#[test]
fn a_misaligned_vector_load_is_reported() {
    reported("byte 4 of input is not aligned for an access of 16 bytes", 1, |input, _| unsafe {
        input.at(1u32).load16();
    });
}

#[test]
fn bytes_that_are_asked_for_must_be_there_and_are_not_read() {
    reported("prefetch of 1024 bytes", 1, |input, _| input.at(4u32).ask_for_bytes(1024));
    reported("1000 bytes from byte 0 of input on is not aligned for an access of 16 bytes", 1, |input, _| {
        input.ask_for_bytes(1000);
    });
    // No race with who writes them, nor with the launch before.
    let body = |_: Global<u32>, out: Global<u32>| unsafe {
        out.ask_for_bytes(1024);
        out.at(thread::index()).store(1);
    };
    assert!(launch(1, 1, body).is_ok());
}

#[test]
fn a_missing_barrier_is_a_race() {
    reported("of shared memory after", 1, |_, out| unsafe {
        let me = thread::index();
        word(me).store(me);
        word(64 + me).store(me);
        // A barrier is missing here. Either side may come first.
        word((me + 1) % 64).store(me);
        out.at(me).store(me);
    });
}

#[test]
fn a_read_after_another_threads_write_needs_a_barrier() {
    reported("race: ", 1, |_, _| unsafe {
        word(thread::index()).store(0);
        barrier::sync();
        if thread::index() == 0 {
            word(1).store(7);
        } else {
            word(1).load();
        }
    });
}

#[test]
fn an_atomic_and_a_plain_access_race() {
    reported("race: ", 1, |_, _| unsafe {
        if thread::index() == 0 {
            word(0).store(0);
        }
        barrier::sync();
        if thread::index() == 5 {
            word(0).load();
        } else {
            word(0).fetch_add(1);
        }
    });
}

#[test]
fn two_threads_that_write_one_element_of_device_memory_race() {
    reported("of output after write by thread", 1, |_, out| unsafe { out.at(thread::index() / 2).store(1) });
}

#[test]
fn two_blocks_that_write_one_element_race() {
    reported("race: write of byte", 2, |_, out| unsafe { out.at(thread::index()).store(1) });
}

#[test]
fn shared_memory_that_nobody_wrote_is_reported() {
    reported("of shared memory, which nobody wrote", 1, |_, _| unsafe {
        word(thread::index()).load();
    });
}

#[test]
fn shared_memory_past_the_blocks_is_reported() {
    reported("4 bytes from byte 1024 of shared memory, the block has 1024", 1, |_, _| unsafe {
        word(256).store(0)
    });
}

#[test]
fn a_wrong_swizzle_is_reported() {
    // Rows of four chunks, where the second half of the warp mixes up rows and so writes chunks twice.
    reported("race: write of byte", 1, |_, _| unsafe {
        let (row, chunk) = (thread::index() / 4, thread::index() % 4);
        word(4 * (row % 16 * 4 + (chunk | row & 3))).store16([0; 4]);
    });
}

#[test]
fn a_missing_wait_is_reported() {
    reported("where a copy is under way: started by asynchronous copy by thread", 1, |input, _| unsafe {
        let me = thread::index();
        async_copy::copy16::<_, { async_copy::AROUND }>(word(4 * me), input.at(4 * me), 16);
        async_copy::commit();
        async_copy::wait::<1>();
        barrier::sync();
        word(4 * me).load();
    });
}

#[test]
fn a_copy_is_seen_by_others_only_after_a_barrier() {
    reported("race: read of byte", 1, |input, _| unsafe {
        // Only thread 0 copies, so that no order of threads finds the copies under way.
        if thread::index() == 0 {
            async_copy::copy16::<_, { async_copy::AROUND }>(word(0), input, 16);
            async_copy::commit();
            async_copy::wait::<0>();
            word(4).store(0);
        }
        warp::shuffle_up(0, 1);
        if thread::index() == 1 {
            word(0).load();
        }
    });
}

#[test]
fn a_barrier_in_one_branch_is_reported_with_who_waits_where() {
    reported("threads 0-39 wait at bar.sync", 1, |_, _| {
        if thread::index() < 40 {
            barrier::sync();
        }
    });
    reported("threads 40-63 have ended", 1, |_, _| {
        if thread::index() < 40 {
            barrier::sync();
        }
    });
}

#[test]
fn a_shuffle_by_half_a_warp_is_reported() {
    reported("threads 0-15 wait at shfl.sync", 1, |_, _| {
        if thread::index() < 16 {
            warp::shuffle_up(0, 1);
        }
    });
}

#[test]
fn an_offset_past_32_bits_is_reported() {
    reported("offset 65536 * 65536 does not fit 32 bits", 1, |input, _| {
        input.at(65536u32.times(65536));
    });
    launch(1, 0, |_, _| assert_eq!(65536u64.times(65536), 1 << 32)).expect("64 bits are enough");
}

#[test]
fn a_trap_is_reported() {
    reported(": trap", 1, |_, _| thread::trap());
}

#[test]
fn warps_that_have_ended_are_not_waited_for() {
    let ended = launch(1, 0, |_, out| unsafe {
        if thread::warp() == 0 {
            word(thread::index()).store(thread::index());
            barrier::sync();
            out.at(thread::index()).store(word(31 - thread::index()).load());
        }
    });
    assert_eq!(ended.expect("no fault")[..3], [31, 30, 29]);
}

#[test]
fn a_shuffle_brings_the_value_of_the_lane_below() {
    let out = launch(1, 3, |_, out| unsafe {
        out.at(thread::index()).store(warp::shuffle_up(100 + thread::index(), 4));
    });
    let out = out.expect("no fault");
    // Lanes without one below keep their own, in each warp.
    assert_eq!(out[..6], [100, 101, 102, 103, 100, 101]);
    assert_eq!(out[31..38], [127, 132, 133, 134, 135, 132, 133]);
}

#[test]
fn a_copy_fills_up_with_zeros() {
    let out = launch(1, 3, |input, out| unsafe {
        if thread::index() < 3 {
            let me = thread::index();
            async_copy::copy16::<_, { async_copy::AHEAD }>(word(4 * me), input.at(4 * me + 4), 6 * me);
            async_copy::commit();
            async_copy::wait::<0>();
            for i in 0..4 {
                out.at(4 * me + i).store(word(4 * me + i).load());
            }
        }
    });
    assert_eq!(out.expect("no fault")[..12], [0, 0, 0, 0, 8, 9, 0, 0, 12, 13, 14, 0]);
}

#[test]
fn matrices_are_dealt_out_in_pairs_of_elements() {
    // Word w of row i of the 32 rows is 4·i + w.
    let out = launch(1, 3, |_, out| unsafe {
        let me = thread::index();
        if thread::warp() == 0 {
            word(4 * me).store16([0, 1, 2, 3].map(|w| 4 * me + w));
        }
        barrier::sync();
        if thread::warp() == 0 {
            out.at(4 * me).store16(word(4 * me).load_matrices());
        }
    });
    let out = out.expect("no fault");
    // Lane 0: word 0 of row 0 of each matrix. Lane 6: word 2 of row 1.
    assert_eq!(out[..4], [0, 32, 64, 96]);
    assert_eq!(out[24..28], [6, 38, 70, 102]);
}

#[test]
fn a_product_of_fragments_is_the_product_of_matrices() {
    // A[r][k] = r if k = r, else 0 (rows scaled), plus 1 at (3, 15); B[k][n] = 16·n + k; D starts at 1.
    fn a(row: u32, k: u32) -> f32 {
        if row == k { row as f32 } else { f32::from(row == 3 && k == 15) }
    }
    fn b(k: u32, column: u32) -> f32 {
        (16 * column + k) as f32
    }
    let out = launch(1, 3, |_, out| unsafe {
        let (g, c) = (thread::lane() / 4, thread::lane() % 4);
        let pair = |low: f32, high: f32| {
            u32::from(bf16::from_f32(low).to_bits()) | u32::from(bf16::from_f32(high).to_bits()) << 16
        };
        let a_pair = |row, k| pair(a(row, k), a(row, k + 1));
        let b_pair = |k| pair(b(k, g), b(k + 1, g));
        let fragment =
            [a_pair(g, 2 * c), a_pair(g + 8, 2 * c), a_pair(g, 2 * c + 8), a_pair(g + 8, 2 * c + 8)];
        let mut d = [1.0; 4];
        Bf16::mma(&mut d, fragment, [b_pair(2 * c), b_pair(2 * c + 8)]);
        if thread::warp() == 0 {
            for (i, value) in d.into_iter().enumerate() {
                let (row, column) = (g + i as u32 / 2 * 8, 2 * c + i as u32 % 2);
                out.at(8 * row + column).store(value.to_bits());
            }
        }
    });
    let out = out.expect("no fault");
    for (i, bits) in out[..128].iter().enumerate() {
        let (row, column) = (i as u32 / 8, i as u32 % 8);
        let extra = if row == 3 { b(15, column) } else { 0.0 };
        let expected = 1.0 + row as f32 * b(row, column) + extra;
        assert_eq!(f32::from_bits(*bits), expected, "row {row}, column {column}");
    }
}

#[test]
fn a_ballot_is_the_votes_of_a_warp() {
    let out = launch(1, 3, |_, out| unsafe {
        out.at(thread::index()).store(warp::ballot(thread::index().is_multiple_of(3)));
    });
    let out = out.expect("no fault");
    assert_eq!([out[0], out[31], out[32]], [0x4924_9249, 0x4924_9249, 0x9249_2492]);
}

#[test]
fn one_thread_of_each_warp_is_elected() {
    let out = launch(1, 3, |_, out| unsafe {
        out.at(thread::index()).store(warp::elect() as u32);
    });
    let out = out.expect("no fault");
    assert_eq!([&out[..32], &out[32..64]].map(|warp| warp.iter().sum::<u32>()), [1, 1]);
}

#[test]
fn a_match_names_the_lanes_of_the_same_value() {
    let out = launch(1, 3, |_, out| unsafe {
        out.at(thread::index()).store(warp::match_any(thread::index() % 3));
    });
    let out = out.expect("no fault");
    assert_eq!(out[..4], [0x4924_9249, 0x9249_2492, 0x2492_4924, 0x4924_9249]);
    // Thread 32, whose value is 2, and every third from it on.
    assert_eq!(out[32], 0x4924_9249);
}

#[test]
fn a_shuffle_brings_the_value_of_the_lane_that_is_named() {
    let out = launch(1, 3, |_, out| unsafe {
        let me = thread::index();
        out.at(me).store(warp::shuffle(100 + me, (5 * me + 3) % 32));
    });
    let out = out.expect("no fault");
    // 3, 8, 13 … 28, then 33 − 32; in the second warp from 132 on.
    assert_eq!(out[..7], [103, 108, 113, 118, 123, 128, 101]);
    assert_eq!(out[32..34], [135, 140]);
}

#[test]
fn lanes_that_meet_go_on_together() {
    for seed in 0..8 {
        let out = launch(1, seed, |_, out| unsafe {
            let me = thread::lane();
            if thread::index() == 0 {
                word(0).store(0);
            }
            barrier::sync();
            // The first warp counts: its upper half, after its lower.
            if thread::warp() == 0 {
                let mut place = 0;
                if me < 16 {
                    place = word(0).fetch_add(1);
                }
                warp::sync();
                if me >= 16 {
                    place = word(0).fetch_add(1);
                }
                out.at(me).store(place);
            }
        });
        let out = out.expect("no fault");
        assert!(out[..16].iter().all(|&place| place < 16) && out[16..32].iter().all(|&place| place >= 16));
    }
}

/// Each of `blocks` blocks stores a word, and adds up what all have stored.
unsafe fn add_up(out: Global<u32>, blocks: u32) {
    unsafe {
        if thread::index() == 0 {
            out.at(thread::block()).store_relaxed(thread::block() + 10);
            let mut sum = 0;
            for block in 0..blocks {
                loop {
                    let found = out.at(block).load_relaxed();
                    if found > 0 {
                        sum += found;
                        break;
                    }
                }
            }
            out.at(64 + thread::block()).store(sum);
        }
    }
}

#[test]
fn the_blocks_of_a_cooperative_launch_find_each_others_words() {
    for seed in 0..8 {
        let out = launch_clusters(5, 0, seed, |out| unsafe { add_up(out, 5) });
        assert_eq!(out.expect("no fault")[64..70], [60, 60, 60, 60, 60, 0]);
        // A cluster runs at once too.
        let out = launch_clusters(4, 4, seed, |out| unsafe { add_up(out, 4) });
        assert_eq!(out.expect("no fault")[64..69], [46, 46, 46, 46, 0]);
    }
}

#[test]
fn to_look_for_the_word_of_a_block_that_does_not_run_is_reported() {
    reports("nobody is left to store it", |seed| {
        launch_clusters(5, 1, seed, |out| unsafe { add_up(out, 5) })
    });
    // Nor does one come that nobody stores.
    reports("nobody is left to store it", |seed| {
        launch_clusters(4, 0, seed, |out| unsafe { add_up(out, 5) })
    });
}

#[test]
fn blocks_that_count_up_get_each_number_once_and_leave_what_was_there() {
    for seed in 0..8 {
        let out = launch_clusters(5, 1, seed, |out| unsafe {
            if thread::index() == 0 {
                let number = out.count_up(4);
                out.at(1 + thread::block()).store(number);
            }
        });
        let out = out.expect("no fault");
        let mut numbers = out[1..6].to_vec();
        numbers.sort_unstable();
        assert_eq!((out[0], &numbers[..]), (0, &[0, 1, 2, 3, 4][..]));
    }
}

#[test]
fn counting_up_and_a_plain_access_race() {
    reports("race: ", |seed| {
        launch_clusters(2, 1, seed, |out| unsafe {
            if thread::block() == 0 {
                out.at(thread::index()).count_up(9);
            } else {
                out.at(thread::index()).store(1);
            }
        })
    });
}

#[test]
fn a_relaxed_and_a_plain_access_race() {
    reports("race: ", |seed| {
        launch_clusters(2, 0, seed, |out| unsafe {
            if thread::block() == 0 {
                out.at(thread::index()).store_relaxed(1);
            } else {
                out.at(thread::index()).load();
            }
        })
    });
}

#[test]
fn a_word_that_has_come_says_nothing_of_others() {
    reports("race: ", |seed| {
        launch_clusters(2, 0, seed, |out| unsafe {
            if thread::index() == 0 && thread::block() == 0 {
                out.at(1u32).store(7);
                out.store_relaxed(1);
            } else if thread::index() == 0 {
                while out.load_relaxed() == 0 {}
                out.at(1u32).load();
            }
        })
    });
}

#[test]
fn a_cooperative_launch_is_no_cluster() {
    reports("its blocks are no cluster", |seed| launch_clusters(2, 0, seed, |_| cluster::sync()));
}

#[test]
fn a_cluster_reads_and_writes_its_blocks_memories() {
    for seed in 0..8 {
        let out = launch_clusters(4, 2, seed, |out| unsafe {
            assert_eq!((cluster::block(), cluster::blocks()), (thread::block() % 2, 2));
            let (me, other) = (thread::index(), 1 - cluster::block());
            word(me).store(100 * thread::block() + me);
            cluster::sync();
            let theirs = word(me).in_block(other).load();
            word(64 + me).in_block(other).store(theirs + 1000);
            cluster::sync();
            out.at(64 * thread::block() + me).store(word(64 + me).load());
        });
        // What a block's neighbour read of it.
        let expected: Vec<u32> =
            (0..4).flat_map(|block| (0..64).map(move |i| 1000 + 100 * block + i)).collect();
        assert_eq!(out.expect("no fault"), expected);
    }
}

#[test]
fn between_arriving_and_waiting_a_block_works_on() {
    let out = launch_clusters(4, 4, 3, |out| unsafe {
        let me = thread::index();
        word(me).store(me);
        cluster::arrive();
        word(64 + me).store(me + 1);
        cluster::wait();
        let theirs = word(me).in_block(3).load();
        // They are done with this block's memory.
        cluster::sync();
        out.at(64 * cluster::block() + me).store(theirs + word(64 + me).load());
    });
    assert_eq!(out.expect("no fault")[64..67], [1, 3, 5]);
}

#[test]
fn a_missing_cluster_barrier_is_a_race() {
    cluster_reported("race: ", |_| unsafe {
        word(thread::index()).store(0);
        cluster::sync();
        word(thread::index()).store(1);
        // A cluster barrier is missing here; one of the block is not enough.
        barrier::sync();
        word(thread::index()).in_block(0).load();
        cluster::sync();
    });
}

#[test]
fn what_is_stored_after_arriving_is_not_seen() {
    cluster_reported("race: ", |_| unsafe {
        word(thread::index()).store(0);
        cluster::sync();
        cluster::arrive();
        word(thread::index()).store(1);
        cluster::wait();
        word(thread::index()).in_block(1).load();
        cluster::sync();
    });
}

#[test]
fn two_clusters_that_write_one_element_race() {
    reports("race: write of byte", |seed| {
        launch_clusters(4, 2, seed, |out| unsafe {
            cluster::sync();
            if cluster::block() == 0 {
                out.at(thread::index()).store(1);
            }
        })
    });
}

#[test]
fn a_block_must_outlive_the_use_of_its_memory() {
    cluster_reported("read of block 1's shared memory, which may have ended by then", |_| unsafe {
        word(thread::index()).store(0);
        cluster::sync();
        // Block 1 ends at once: a cluster barrier is missing before.
        if cluster::block() == 2 {
            word(thread::index()).in_block(1).load();
        }
    });
}

#[test]
fn a_block_must_have_started_before_its_memory_is_used() {
    cluster_reported("shared memory, which may not have started yet", |_| unsafe {
        word(thread::index()).in_block((cluster::block() + 1) % 4).store(0);
        cluster::sync();
    });
}

#[test]
fn another_blocks_memory_ends_where_ones_own_does() {
    cluster_reported("4 bytes from byte 1024 of shared memory, the block has 1024", |_| unsafe {
        cluster::sync();
        word(256).in_block((cluster::block() + 1) % 4).load();
    });
    cluster_reported("of block 3's shared memory, which nobody wrote", |_| unsafe {
        cluster::sync();
        if cluster::block() != 3 {
            word(thread::index()).in_block(3).load();
        }
        cluster::sync();
    });
    cluster_reported("block 4 of a cluster that has 4", |_| {
        word(0).in_block(4);
    });
}

#[test]
fn a_cluster_barrier_in_one_block_is_reported_with_who_waits_where() {
    cluster_reported("threads 0-31 of block 2 wait at barrier.cluster.wait", |_| {
        // The others' second warps neither come nor end.
        if thread::warp() == 0 {
            cluster::sync();
        } else {
            barrier::sync();
        }
    });
    cluster_reported("threads 0-15 of block 1 wait at barrier.cluster.arrive", |_| {
        if thread::index() < 16 || cluster::block() != 1 {
            cluster::sync();
        }
    });
}

#[test]
fn arriving_twice_is_reported() {
    cluster_reported("a cluster barrier is arrived at once, then waited for once", |_| {
        cluster::arrive();
        cluster::arrive();
    });
    cluster_reported("a cluster barrier is arrived at once, then waited for once", |_| cluster::wait());
}

/// What one launch of a queue does.
type Body = fn(Global<u32>);

/// Launches `bodies` one after another on one buffer, which may overlap.
fn launch_queue(bodies: &[(&str, Body)]) -> Result<(), Box<Report>> {
    let mut memory = Memory::default();
    let bytes = 4 * WORDS as u64;
    let address = memory.allocate(&[0; 4 * WORDS]);
    let buffer = Buffer { name: "buffer".to_owned(), address, bytes, writable: true };
    memory.forget(address + bytes / 2, bytes / 2, 0x7f);
    for (kernel, body) in bodies {
        let launch = Launch {
            kernel,
            blocks: 1,
            cluster: 1,
            cooperative: false,
            threads: 64,
            shared_bytes: 0,
            overlaps: true,
            seed: 1,
        };
        let body = *body;
        run(&launch, &mut memory, std::slice::from_ref(&buffer), move || body(Global::new(address)))?;
    }
    Ok(())
}

#[track_caller]
fn queue_reported(expected: &str, bodies: &[(&str, Body)]) {
    let report = launch_queue(bodies).expect_err(expected).to_string();
    assert!(report.contains(expected), "{expected:?} is not in: {report}");
}

const WRITES_EARLY: (&str, Body) = ("writer", |buffer| unsafe {
    grid::launch_dependents();
    buffer.at(thread::index()).store(1);
});
const WRITES: (&str, Body) = ("writer", |buffer| unsafe {
    grid::wait();
    grid::launch_dependents();
    buffer.at(thread::index()).store(1);
});
const READS: (&str, Body) = ("reader", |buffer| unsafe {
    grid::wait();
    grid::launch_dependents();
    buffer.at(thread::index()).load();
});
const READS_EARLY: (&str, Body) = ("reader", |buffer| unsafe {
    grid::launch_dependents();
    buffer.at(thread::index()).load();
});
const WAITS: (&str, Body) = ("waiter", |_| {
    grid::wait();
    grid::launch_dependents();
});
const DOES_NOT_WAIT: (&str, Body) = ("hasty", |_| grid::launch_dependents());

#[test]
fn what_the_launch_before_writes_is_read_only_after_waiting_for_it() {
    launch_queue(&[WRITES, READS, WRITES, READS]).expect("all wait");
    queue_reported("read of byte", &[WRITES, READS_EARLY]);
    queue_reported(
        "of buffer, which writer uses: its launch before this one may still run",
        &[WRITES, READS_EARLY],
    );
}

#[test]
fn what_the_launch_before_reads_or_writes_is_written_only_after_waiting_for_it() {
    queue_reported("of buffer, which reader uses", &[READS, WRITES_EARLY]);
    queue_reported("of buffer, which writer uses", &[WRITES, WRITES_EARLY]);
}

#[test]
fn older_launches_have_ended_where_the_one_before_has_waited_for_them() {
    launch_queue(&[WRITES, WAITS, READS_EARLY]).expect("the second launch waits before the third starts");
    launch_queue(&[WRITES, WAITS, DOES_NOT_WAIT, READS]).expect("the third starts when the first has ended");
    queue_reported("of buffer, which writer uses", &[WRITES, DOES_NOT_WAIT, READS]);
}

#[test]
fn device_memory_that_nobody_wrote_is_reported() {
    queue_reported(
        "read of byte 512 of buffer, which nobody wrote",
        &[("reader", |buffer| unsafe {
            if thread::index() == 0 {
                buffer.at(128u32).load();
            }
        })],
    );
}

#[path = "machine/mbarrier.rs"]
mod mbarrier;

#[path = "machine/warpgroup.rs"]
mod warpgroup;
