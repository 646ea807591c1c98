//! `wgmma`: one warpgroup, matrices in swizzled panels, and what goes wrong without its fences and waits.

use super::*;
use moe_lora_kernels::arch::bulk;
use moe_lora_kernels::arch::mbarrier::{self, Mbarrier};
use moe_lora_kernels::arch::mma::F16;
use moe_lora_kernels::arch::wgmma::{self, Matrix, Sums};

/// Columns of the product here.
const COLUMNS: u32 = 32;
/// Sums of a thread.
const SUMS: usize = COLUMNS as usize / 2;
/// Where B's panel begins: after 64 rows of A.
const B: u32 = 64 * 128;
/// Where a barrier lies: after B.
const BARRIER: u32 = B + COLUMNS * 128;

/// Runs `body` with one warpgroup, panels of 64 rows of A and `COLUMNS` rows of B, and a [64, `COLUMNS`]
/// buffer to write. Returns what was written.
fn launch_warpgroup(seed: u64, body: impl Fn(Global<f32>) + 'static) -> Result<Vec<f32>, Box<Report>> {
    let mut memory = Memory::default();
    let bytes = u64::from(4 * 64 * COLUMNS);
    let address = memory.allocate(&vec![0; bytes as usize]);
    let output = Buffer { name: "output".to_owned(), address, bytes, writable: true };
    let launch = Launch {
        kernel: "kernel",
        blocks: 1,
        cluster: 1,
        threads: 128,
        shared_bytes: BARRIER + mbarrier::BYTES,
        overlaps: true,
        cooperative: false,
        seed,
    };
    run(&launch, &mut memory, &[output], move || body(Global::new(address)))?;
    Ok(bytemuck::pod_collect_to_vec(memory.bytes(address, bytes)))
}

#[track_caller]
fn warpgroup_reported(expected: &str, body: impl Fn(Global<f32>) + Copy + 'static) {
    reports(expected, |seed| launch_warpgroup(seed, body).map(|_| Vec::new()));
}

/// A[row, k] and B[k, column]: small integers, exact in either type, no two rows or columns alike.
fn a(row: u32, k: u32) -> f32 {
    (row % 13) as f32 - (3 * k % 7) as f32
}
fn b(k: u32, column: u32) -> f32 {
    (k % 5) as f32 + (column % 11) as f32 - 6.0
}

/// Where a chunk of a row lies in a panel.
fn place(panel: u32, row: u32, chunk: u32) -> Shared {
    Shared::base().offset(panel + row * 128 + ((chunk ^ (row % 8)) << 4))
}

/// Fills both panels, chunks where `place` says.
unsafe fn fill<E: Element>(place: impl Fn(u32, u32, u32) -> Shared) {
    let chunk = |at: Shared, value: &dyn Fn(u32) -> f32| {
        let pair = |i: u32| E::pack(value(2 * i), value(2 * i + 1));
        unsafe { at.store16([pair(0), pair(1), pair(2), pair(3)]) };
    };
    for chunk_number in 0..8 {
        let me = thread::index();
        let k = |i: u32| 8 * chunk_number + i;
        if me < 64 {
            chunk(place(0, me, chunk_number), &|i| a(me, k(i)));
        } else if me < 64 + COLUMNS {
            chunk(place(B, me - 64, chunk_number), &|i| b(k(i), me - 64));
        }
    }
}

fn matrices() -> (Matrix, Matrix) {
    (Matrix::swizzled(Shared::base()), Matrix::swizzled(Shared::base().offset(B)))
}

/// Both matrices, filled and shown to the tensor cores.
unsafe fn shown_matrices<E: Element>() -> (Matrix, Matrix) {
    unsafe { fill::<E>(place) };
    bulk::fence();
    barrier::sync();
    matrices()
}

/// Stores a thread's sums where D's fragment has them.
unsafe fn store(out: Global<f32>, sums: &[f32; SUMS]) {
    let (warp, lane) = (thread::warp(), thread::lane());
    for (i, &sum) in (0..).zip(sums) {
        let row = 16 * warp + lane / 4 + 8 * (i / 2 % 2);
        let column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
        unsafe { out.at(row * COLUMNS + column).store(sum) };
    }
}

/// The product over `ks`, and once more, since sums are added to.
fn product(ks: std::ops::Range<u32>, times: f32) -> Vec<f32> {
    let sum = |row, column| ks.clone().map(|k| a(row, k) * b(k, column)).sum::<f32>() * times;
    (0..64).flat_map(|row| (0..COLUMNS).map(move |column| (row, column))).map(|(r, c)| sum(r, c)).collect()
}

#[test]
fn a_product_of_swizzled_matrices_is_the_product() {
    fn kernel<E: Element>(out: Global<f32>) {
        unsafe {
            let (a, b) = shown_matrices::<E>();
            let mut sums = [0.0f32; SUMS];
            wgmma::fence();
            for step in 0..4 {
                sums.multiply::<E>(a.step(step), b.step(step));
            }
            wgmma::commit();
            sums.wait::<0>();
            store(out, &sums);
        }
    }
    for seed in 0..4 {
        assert_eq!(launch_warpgroup(seed, kernel::<Bf16>).expect("no fault"), product(0..64, 1.0));
        assert_eq!(launch_warpgroup(seed, kernel::<F16>).expect("no fault"), product(0..64, 1.0));
    }
}

#[test]
fn sums_are_added_to_and_older_groups_end_first() {
    let out = launch_warpgroup(1, |out| unsafe {
        let (a, b) = shown_matrices::<Bf16>();
        let (mut first, mut second) = ([0.0f32; SUMS], [1000.0f32; SUMS]);
        wgmma::fence();
        first.multiply::<Bf16>(a, b);
        first.multiply::<Bf16>(a, b);
        wgmma::commit();
        second.multiply::<Bf16>(a.step(1), b.step(1));
        wgmma::commit();
        first.wait::<1>();
        store(out, &first);
        assert!(second[0].is_nan(), "under way");
        second.wait::<0>();
        assert!((second[0] - 1000.0).abs() < 1000.0, "what was there is added to");
    });
    assert_eq!(out.expect("no fault"), product(0..16, 2.0));
}

#[test]
fn a_narrow_product_leaves_the_sums_after_its_own() {
    let out = launch_warpgroup(1, |out| unsafe {
        let (a, b) = shown_matrices::<Bf16>();
        let mut sums = [7.0f32; 2 * SUMS];
        sums[..SUMS].fill(0.0);
        wgmma::fence();
        sums.first_chunk_mut::<SUMS>().expect("twice as many").multiply::<Bf16>(a, b);
        wgmma::commit();
        sums.wait::<0>();
        assert_eq!(sums[SUMS..], [7.0; SUMS]);
        store(out, sums.first_chunk().expect("twice as many"));
    });
    assert_eq!(out.expect("no fault"), product(0..16, 1.0));
}

#[test]
fn sums_of_one_product_are_the_rows_of_the_next() {
    // D's columns 0 .. 16 as A of 16 k, whose B is the second step of the panel: integers stay exact in f16.
    let out = launch_warpgroup(1, |out| unsafe {
        let (a, b) = shown_matrices::<F16>();
        let mut h = [0.0f32; SUMS];
        wgmma::fence();
        h.multiply::<F16>(a, b);
        wgmma::commit();
        h.wait::<0>();
        let rows = [0, 2, 4, 6].map(|i| F16::pack(h[i], h[i + 1]));
        let mut sums = [0.0f32; SUMS];
        wgmma::fence();
        sums.multiply_registers::<F16>(rows, b.step(1));
        wgmma::commit();
        sums.wait::<0>();
        store(out, &sums);
    });
    let h = product(0..16, 1.0);
    let expected: Vec<f32> = (0..64 * COLUMNS)
        .map(|i| {
            let (row, column) = (i / COLUMNS, i % COLUMNS);
            (0..16).map(|q| h[(row * COLUMNS + q) as usize] * b(16 + q, column)).sum()
        })
        .collect();
    assert!(h.iter().all(|sum| sum.abs() < 2048.0), "exact in f16");
    assert_eq!(out.expect("no fault"), expected);
}

#[test]
fn a_hand_checked_product() {
    // A's only row with elements is row 9: 1 at k = 3. B's row 3 then is D's row 9; thread 7 of warp 0 has
    // columns 6 and 7 of its rows 1 and 9.
    launch_warpgroup(1, |_| unsafe {
        let me = thread::index();
        for chunk in 0..8 {
            if me < 64 {
                let ones = if me == 9 && chunk == 0 { [0, Bf16::pack(0.0, 1.0), 0, 0] } else { [0; 4] };
                place(0, me, chunk).store16(ones);
            } else if me < 96 {
                let column = (me - 64) as f32;
                place(B, me - 64, chunk).store16([Bf16::pack(0.0, 0.0), Bf16::pack(0.0, column), 0, 0]);
            }
        }
        bulk::fence();
        barrier::sync();
        let (a, b) = matrices();
        let mut sums = [0.0f32; SUMS];
        wgmma::fence();
        sums.multiply::<Bf16>(a, b);
        wgmma::commit();
        sums.wait::<0>();
        if me == 7 {
            assert_eq!(sums[..4], [0.0, 0.0, 6.0, 7.0]);
            assert_eq!(sums[4..8], [0.0, 0.0, 14.0, 15.0]);
        }
    })
    .expect("no fault");
}

#[test]
fn a_panel_without_the_swizzle_is_another_matrix() {
    let out = launch_warpgroup(1, |out| unsafe {
        fill::<Bf16>(|panel, row, chunk| Shared::base().offset(panel + row * 128 + chunk * 16));
        bulk::fence();
        barrier::sync();
        let (a, b) = matrices();
        let mut sums = [0.0f32; SUMS];
        wgmma::fence();
        sums.multiply::<Bf16>(a, b);
        wgmma::commit();
        sums.wait::<0>();
        store(out, &sums);
    });
    assert_ne!(out.expect("no fault"), product(0..16, 1.0));
}

#[test]
fn sums_that_were_not_waited_for_are_no_numbers() {
    launch_warpgroup(1, |_| unsafe {
        let (a, b) = shown_matrices::<Bf16>();
        let mut sums = [0.0f32; SUMS];
        wgmma::fence();
        sums.multiply::<Bf16>(a, b);
        wgmma::commit();
        sums.wait::<1>();
        assert!(sums.iter().all(|sum| sum.is_nan()));
        sums.wait::<0>();
        assert!(sums.iter().all(|sum| !sum.is_nan()));
    })
    .expect("no fault");
}

#[test]
fn a_missing_proxy_fence_is_reported() {
    let kernel = |fenced: fn(), late: fn()| {
        move |_| unsafe {
            fill::<Bf16>(place);
            fenced();
            barrier::sync();
            late();
            let (a, b) = matrices();
            let mut sums = [0.0f32; SUMS];
            wgmma::fence();
            sums.multiply::<Bf16>(a, b);
            wgmma::commit();
            sums.wait::<0>();
        }
    };
    warpgroup_reported("without a fence.proxy.async between it and write by thread", kernel(|| {}, || {}));
    // One thread's fence shows what others wrote before the barrier, but only to its own warp.
    warpgroup_reported(
        "without a fence.proxy.async",
        kernel(
            || {},
            || {
                if thread::index() == 0 {
                    bulk::fence();
                }
            },
        ),
    );
    launch_warpgroup(1, kernel(bulk::fence, || {})).expect("no fault");
}

#[test]
fn a_missing_register_fence_is_reported() {
    warpgroup_reported("without a wgmma.fence since the last wait", |_| unsafe {
        let (a, b) = shown_matrices::<Bf16>();
        let mut sums = [0.0f32; SUMS];
        wgmma::fence();
        sums.multiply::<Bf16>(a, b);
        wgmma::commit();
        sums.wait::<0>();
        sums.multiply::<Bf16>(a, b);
    });
}

#[test]
fn a_matrix_that_is_written_over_before_the_wait_is_a_race() {
    warpgroup_reported("of shared memory after", |_| unsafe {
        let (a, b) = shown_matrices::<Bf16>();
        let mut sums = [0.0f32; SUMS];
        wgmma::fence();
        sums.multiply::<Bf16>(a, b);
        wgmma::commit();
        fill::<Bf16>(place);
        sums.wait::<0>();
    });
}

/// A product, whose matrix thread 0 writes over once the first `warps` warps have arrived at a barrier.
unsafe fn write_over_after(warps: u32) {
    unsafe {
        let read = Mbarrier::at(Shared::base().offset(BARRIER));
        if thread::index() == 0 {
            read.init(warps);
        }
        let (a, b) = shown_matrices::<Bf16>();
        let mut sums = [0.0f32; SUMS];
        wgmma::fence();
        sums.multiply::<Bf16>(a, b);
        wgmma::commit();
        sums.wait::<0>();
        warp::sync();
        if thread::lane() == 0 && thread::warp() < warps {
            read.arrive();
        }
        if thread::index() == 0 {
            read.wait(0);
            Shared::base().offset(B).store(0);
        }
    }
}

#[test]
fn a_matrix_may_be_written_over_once_every_warp_has_said_that_it_waited() {
    launch_warpgroup(3, |_| unsafe { write_over_after(4) }).expect("no fault");
}

#[test]
fn a_matrix_that_is_written_over_before_every_warp_has_said_so_is_a_race() {
    warpgroup_reported("race: write of byte 8192 of shared memory after read", |_| unsafe {
        write_over_after(3)
    });
}

#[test]
fn a_product_by_three_warps_is_reported_with_who_waits_where() {
    warpgroup_reported("threads 0-95 wait at wgmma.mma_async", |_| unsafe {
        fill::<Bf16>(place);
        bulk::fence();
        barrier::sync();
        if thread::warp() < 3 {
            let (a, b) = matrices();
            wgmma::fence();
            [0.0f32; SUMS].multiply::<Bf16>(a, b);
        }
    });
}
