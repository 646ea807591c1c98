//! The emulated machine does what the PTX manual says, and tells what a kernel does wrong: small kernels, each
//! broken in one way, and what the report says of it.

// Kernels here may do anything: the machine checks each access, and that is what is tested.
#![allow(clippy::undocumented_unsafe_blocks)]

use half::bf16;
use moe_lora_kernels::arch::mma::{Bf16, Element};
use moe_lora_kernels::arch::shared::Shared;
use moe_lora_kernels::arch::{async_copy, barrier, thread, warp};
use moe_lora_kernels::emulate::{Buffer, Launch, Memory, Report, run};
use moe_lora_kernels::memory::{Global, Index};

/// Words of the buffers that kernels here are given.
const WORDS: usize = 256;

/// Runs `body` with 64 threads a block, 1 KiB of shared memory, a buffer to read (word i is i) and one to write.
/// Returns what was written.
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
    let launch = Launch { kernel: "kernel", blocks, threads: 64, shared_bytes: 1024, seed };
    run(&launch, &mut memory, &buffers, move || body(Global::new(from), Global::new(to)))?;
    Ok(bytemuck::pod_collect_to_vec(memory.bytes(to, bytes)))
}

/// `body` must be reported, whatever the order of threads, in words that hold `expected` and this file.
#[track_caller]
fn reported(expected: &str, blocks: u32, body: impl Fn(Global<u32>, Global<u32>) + Copy + 'static) {
    for seed in 0..8 {
        let report = launch(blocks, seed, body).expect_err(expected).to_string();
        assert!(report.starts_with("kernel, block "), "{report}");
        assert!(report.contains(expected), "{expected:?} is not in: {report}");
        assert!(report.contains("machine.rs:"), "{report}");
    }
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
        async_copy::copy16::<_, false>(word(4 * me), input.at(4 * me), 16);
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
            async_copy::copy16::<_, false>(word(0), input, 16);
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
            async_copy::copy16::<_, true>(word(4 * me), input.at(4 * me + 4), 6 * me);
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
