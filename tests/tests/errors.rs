//! Each error comes from the input that it names, and then nothing is written.

use moe_lora::cpu::Cpu;
use moe_lora::{Backend, Error, OutDims, Projection, ProjectionSizes, TopkIds};
use moe_lora_tests::refusals::{GOOD, check_refusals};

const MOST: usize = i32::MAX as usize;

#[test]
fn the_cpu_refuses_whatever_is_wrong_and_writes_nothing() {
    check_refusals(&Cpu, true);
}

#[test]
fn sizes_are_at_least_one_and_at_most_the_limit_that_the_error_names() {
    type Size = (&'static str, usize, fn(&mut ProjectionSizes) -> &mut usize);
    let sizes: [Size; 5] = [
        ("top_k", Projection::MAX_TOP_K, |sizes| &mut sizes.top_k),
        ("experts", MOST, |sizes| &mut sizes.experts),
        ("slots", MOST, |sizes| &mut sizes.slots),
        ("max_rank", Projection::MAX_RANK, |sizes| &mut sizes.max_rank),
        ("in_dim", MOST, |sizes| &mut sizes.in_dim),
    ];
    type With = Box<dyn Fn(usize) -> ProjectionSizes>;
    // One slot and one expert, so that no product is over its limit either.
    let small = ProjectionSizes { experts: 1, slots: 1, ..GOOD };
    let each = sizes.map(|(what, limit, size)| -> (&str, usize, With) {
        let with = move |value| {
            let mut sizes = small;
            *size(&mut sizes) = value;
            sizes
        };
        (what, limit, Box::new(with))
    });
    let out_dims: [(&str, usize, With); 2] = [
        ("slices", Projection::MAX_SLICES, {
            Box::new(move |slices| ProjectionSizes { out_dims: OutDims::uniform(8, slices), ..small })
        }),
        ("out_dim", MOST, {
            let widths = |width| OutDims::new(&[8, width, 8]).expect("three slices");
            Box::new(move |width| ProjectionSizes { out_dims: widths(width), ..small })
        }),
    ];
    for (what, limit, with) in each.into_iter().chain(out_dims) {
        let with = |value| Projection::new(with(value)).map(drop);
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
        (
            ProjectionSizes { out_dims: OutDims::uniform(MOST, 1), ..many },
            overflow("b", "[32768, 32768, 2147483647, 512]"),
        ),
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

/// A back end makes slices of all that a view names, also where a call of no tokens needs none of it.
#[test]
fn what_a_view_names_is_checked_where_nothing_is_needed_too() {
    use moe_lora::{Align, BlockShape, Enabled, Host, View};
    let (mut places, mut experts, mut counts) = ([0; 2 * 16], [0; 2], [0; 2]);
    let mut align = |topk_ids| {
        Cpu.align(Align {
            tokens: 0,
            top_k: 1,
            experts: 1,
            slots: 2,
            shape: BlockShape { block_size: 16, max_padded: 16, max_blocks: 1 },
            topk_ids: TopkIds::I32(topk_ids),
            token_lora: [][..].into(),
            adapter_enabled: Enabled::All,
            lora_ids: [0][..].into(),
            expert_map: None,
            sorted_token_ids: (&mut places[..]).into(),
            expert_ids: (&mut experts[..]).into(),
            num_tokens_post_padded: (&mut counts[..]).into(),
        })
    };
    // SAFETY: neither is read: a null or odd address must be refused.
    let [null, odd] = [0, 0x1001].map(|address| unsafe { View::<Host, i32>::from_raw(address, 4) });
    assert_eq!(align(null), Err(Error::NullPointer { tensor: "topk_ids", expected: 4 }));
    assert_eq!(align(odd), Err(Error::Misaligned { tensor: "topk_ids", expected: 4, address: 0x1001 }));
    assert_eq!(align([][..].into()), Ok(()));
}

/// The reference is public: it checks what it is given, as every back end does.
#[test]
fn the_reference_refuses_tensors_that_are_too_short() {
    use moe_lora::{BlockShape, Enabled, RoutingTensors, SortedTensors, reference};
    let projection = Projection::new(ProjectionSizes { top_k: 2, slots: 2, ..GOOD }).expect("legal sizes");
    let (ids, lora) = ([0; 5], [0; 3]);
    let routing = RoutingTensors::new(&ids[..], lora[..].into());
    let too_short =
        |tensor| move |error: &Error| matches!(error, Error::TooShort { tensor: t, .. } if *t == tensor);
    assert!(reference::targets(&projection, 3, &routing).is_err_and(|error| too_short("topk_ids")(&error)));
    let ranks = [8];
    let ranked = RoutingTensors {
        ranks: Some(ranks[..].into()),
        ..RoutingTensors::new(&[0i32; 6][..], lora[..].into())
    };
    assert!(reference::targets(&projection, 3, &ranked).is_err_and(|error| too_short("ranks")(&error)));
    let sorted = SortedTensors {
        shape: BlockShape { block_size: 16, max_padded: 16, max_blocks: 1 },
        sorted_token_ids: [0; 16][..].into(),
        expert_ids: [0; 2][..].into(),
        num_tokens_post_padded: [16; 2][..].into(),
        lora_ids: [0][..].into(),
        adapter_enabled: Enabled::All,
        ranks: None,
    };
    let refused = reference::sorted_targets(&projection, 3, &sorted);
    assert!(refused.is_err_and(|error| too_short("sorted_token_ids")(&error)));
    assert!(
        reference::slots_on(2, &Enabled::U8([1][..].into()))
            .is_err_and(|error| too_short("adapter_enabled")(&error))
    );
}
