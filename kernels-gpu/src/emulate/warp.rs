//! The warp-wide operations, and what they compute on the operands of all 32 lanes.

use crate::ElementType;
use half::{bf16, f16};

/// Threads of a warp.
pub(super) const LANES: usize = 32;

/// `shfl.sync.up` with a clamp of 0 (PTX ISA 9.7.8.6): lane i receives from lane i − distance, or keeps
/// its own value where there is none. Only the low five bits of the distance count.
pub(super) fn shuffle_up(operands: [(u32, u32); LANES]) -> [u32; LANES] {
    std::array::from_fn(|lane| {
        let (own, distance) = operands[lane];
        lane.checked_sub((distance & 31) as usize).map_or(own, |source| operands[source].0)
    })
}

/// `shfl.sync.idx` with a clamp of 31 (PTX ISA 9.7.8.6): lane i receives from the lane that it names. Only
/// the low five bits of that count.
pub(super) fn shuffle(operands: [(u32, u32); LANES]) -> [u32; LANES] {
    operands.map(|(_, lane)| operands[(lane & 31) as usize].0)
}

/// `vote.sync.ballot` (PTX ISA 9.7.12.9): bit i is what lane i says.
pub(super) fn ballot(votes: [bool; LANES]) -> u32 {
    votes.iter().enumerate().fold(0, |bits, (lane, &vote)| bits | u32::from(vote) << lane)
}

/// `match.any.sync` (PTX ISA 9.7.12.10): of each lane, the lanes that have its value.
pub(super) fn match_any(values: [u32; LANES]) -> [u32; LANES] {
    values.map(|value| ballot(values.map(|other| other == value)))
}

/// `ldmatrix.x4` (PTX ISA 9.7.13.4.15): `rows[i]`, the 16 bytes at lane i's address, is row i % 8 of matrix
/// i / 8. Lane i receives, of each matrix, the elements 2·(i % 4) and 2·(i % 4) + 1 of row i / 4.
pub(super) fn distribute_matrices(rows: [[u32; 4]; LANES]) -> [[u32; 4]; LANES] {
    std::array::from_fn(|lane| std::array::from_fn(|matrix| rows[8 * matrix + lane / 4][lane % 4]))
}

/// One lane's fragments of D, A and B.
pub(super) type Fragments = ([f32; 4], [u32; 4], [u32; 2]);

/// `mma.sync.m16n8k16` (PTX ISA 9.7.13.4.8), D = A·B + D. Products of two 16-bit floats are exact in f32; the
/// sum over k is taken in f32, from 0 upwards, which is one of the orders that the manual allows.
pub(super) fn mma(element: ElementType, fragments: &[Fragments; LANES]) -> [[f32; 4]; LANES] {
    let widen = |pair: u32| {
        [pair as u16, (pair >> 16) as u16].map(|bits| match element {
            ElementType::Bf16 => bf16::from_bits(bits).to_f32(),
            ElementType::F16 => f16::from_bits(bits).to_f32(),
        })
    };
    let (mut a, mut b, mut d) = ([[0.0f32; 16]; 16], [[0.0f32; 8]; 16], [[0.0f32; 8]; 16]);
    for (lane, (d_part, a_part, b_part)) in fragments.iter().enumerate() {
        let (group, place) = (lane / 4, lane % 4);
        for (register, &pair) in a_part.iter().enumerate() {
            let (row, k) = (group + register % 2 * 8, 2 * place + register / 2 * 8);
            a[row][k..k + 2].copy_from_slice(&widen(pair));
        }
        for (register, &pair) in b_part.iter().enumerate() {
            let k = 2 * place + register * 8;
            [b[k][group], b[k + 1][group]] = widen(pair);
        }
        for half in 0..2 {
            d[group + 8 * half][2 * place..][..2].copy_from_slice(&d_part[2 * half..][..2]);
        }
    }
    for (d, a) in d.iter_mut().zip(&a) {
        for (a, b) in a.iter().zip(&b) {
            for (d, b) in d.iter_mut().zip(b) {
                *d += a * b;
            }
        }
    }
    std::array::from_fn(|lane| {
        let (group, place) = (lane / 4, lane % 4);
        std::array::from_fn(|i| d[group + i / 2 * 8][2 * place + i % 2])
    })
}

/// Where a thread waits for its warp, before the warp waits for its cluster.
const CLUSTER_WAIT_WARP: &str = "barrier.cluster.wait, as a warp";

/// A warp-wide operation, as one lane asks for it.
#[derive(Clone, Copy)]
pub(super) enum Operation {
    None,
    ShuffleUp(u32, u32),
    Shuffle(u32, u32),
    Sync,
    Ballot(bool),
    MatchAny(u32),
    LoadMatrices(u32),
    Mma(ElementType, Fragments),
    ArriveCluster,
    WaitCluster,
}

impl Operation {
    pub fn name(&self) -> &'static str {
        match self {
            Operation::None => "nothing",
            Operation::ShuffleUp(..) | Operation::Shuffle(..) => "shfl.sync",
            Operation::Sync => "bar.warp.sync",
            Operation::Ballot(_) => "vote.sync",
            Operation::MatchAny(_) => "match.any.sync",
            Operation::LoadMatrices(_) => "ldmatrix",
            Operation::Mma(..) => "mma.sync",
            Operation::ArriveCluster => "barrier.cluster.arrive",
            Operation::WaitCluster => CLUSTER_WAIT_WARP,
        }
    }
}
