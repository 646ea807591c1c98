//! Each error comes from the input that it names, and then nothing is written.

use moe_lora::cpu::Cpu;
use moe_lora::{Backend, Error, Projection, ProjectionSizes};
use moe_lora_tests::refusals::{GOOD, check_refusals};

const MOST: usize = i32::MAX as usize;

#[test]
fn the_cpu_refuses_whatever_is_wrong_and_writes_nothing() {
    check_refusals(&Cpu, true);
}

#[test]
fn sizes_are_at_least_one_and_at_most_the_limit_that_the_error_names() {
    type Size = (&'static str, usize, fn(&mut ProjectionSizes) -> &mut usize);
    let sizes: [Size; 7] = [
        ("top_k", Projection::MAX_TOP_K, |sizes| &mut sizes.top_k),
        ("experts", MOST, |sizes| &mut sizes.experts),
        ("slots", MOST, |sizes| &mut sizes.slots),
        ("max_rank", Projection::MAX_RANK, |sizes| &mut sizes.max_rank),
        ("slices", Projection::MAX_SLICES, |sizes| &mut sizes.slices),
        ("in_dim", MOST, |sizes| &mut sizes.in_dim),
        ("out_dim", MOST, |sizes| &mut sizes.out_dim),
    ];
    for (what, limit, size) in sizes {
        let with = |value| {
            // One slot and one expert, so that no product is over its limit either.
            let mut sizes = ProjectionSizes { experts: 1, slots: 1, ..GOOD };
            *size(&mut sizes) = value;
            Projection::new(sizes).map(drop)
        };
        assert_eq!(with(0), Err(Error::ZeroSize { what }));
        assert_eq!(with(1), Ok(()), "{what}");
        assert_eq!(with(limit), Ok(()), "{what}");
        assert_eq!(with(limit + 1), Err(Error::SizeTooLarge { what, limit, got: limit + 1 }));
    }
}

#[test]
fn products_of_sizes_that_cannot_be_addressed_are_refused() {
    let overflow = |tensor, shape: &str| Err(Error::SizeOverflow { tensor, shape: shape.to_owned() });
    let many = ProjectionSizes { slots: 1 << 15, experts: 1 << 15, max_rank: 512, ..GOOD };
    let buckets = Error::SizeTooLarge { what: "slots · experts", limit: MOST, got: 1 << 31 };
    for (sizes, expected) in [
        (ProjectionSizes { slots: 1 << 16, ..many }, Err(buckets)),
        (ProjectionSizes { in_dim: MOST, ..many }, overflow("a", "[32768, 32768, 512, 2147483647]")),
        (ProjectionSizes { out_dim: MOST, ..many }, overflow("b", "[32768, 32768, 2147483647, 512]")),
    ] {
        assert_eq!(Projection::new(sizes).map(drop), expected);
    }
}

#[test]
fn a_workspace_for_more_pairs_than_31_bits_is_refused() {
    let projection = Projection::new(GOOD).expect("a projection");
    let (limit, got) = (MOST / 2, MOST / 2 + 1);
    assert_eq!(projection.pairs(limit), Ok(MOST - 1));
    let error = Cpu.workspace(&[projection], got).map(drop);
    assert_eq!(error, Err(Error::SizeTooLarge { what: "tokens", limit, got }));
}

#[test]
fn ranks_that_are_known_on_the_host_are_checked_there() {
    let projection = Projection::new(GOOD).expect("a projection");
    assert_eq!(projection.check_ranks(&[8, i32::MIN]), Ok(()));
    let over = Error::RankTooLarge { slot: 1, rank: 9, max_rank: 8 };
    assert_eq!(projection.check_ranks(&[0, 9]), Err(over));
    let short = Error::TooShort { tensor: "ranks", shape: "[2]".to_owned(), expected: 2, got: 1 };
    assert_eq!(projection.check_ranks(&[8]), Err(short));
}
