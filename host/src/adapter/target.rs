//! The matrices of a gated expert, and the projections of a layer that they belong to.

use crate::projection::XRows;
use std::fmt;

/// One of the three matrices of a gated expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Module {
    Gate,
    Up,
    Down,
}

impl Module {
    /// Which slice of its projection this is.
    pub(super) fn slice(self) -> usize {
        match self {
            Module::Gate | Module::Down => 0,
            Module::Up => 1,
        }
    }

    /// Most models say what a matrix is for; Mixtral numbers them.
    pub(super) fn parse(name: &str) -> Option<Self> {
        match name {
            "gate_proj" | "w1" => Some(Module::Gate),
            "up_proj" | "w3" => Some(Module::Up),
            "down_proj" | "w2" => Some(Module::Down),
            _ => None,
        }
    }
}

/// The two projections of a gated expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerProjection {
    /// Gate and up side by side: two slices, one row of `x` a token.
    W13,
    /// Down: one slice, one row of `x` a pair; its result is multiplied by the routing weights.
    W2,
}

impl LayerProjection {
    /// What a row of `x` belongs to.
    pub fn x_rows(self) -> XRows {
        match self {
            LayerProjection::W13 => XRows::Token,
            LayerProjection::W2 => XRows::Pair,
        }
    }

    /// S.
    pub fn slices(self) -> usize {
        self.modules().len()
    }

    pub(super) fn modules(self) -> &'static [Module] {
        match self {
            LayerProjection::W13 => &[Module::Gate, Module::Up],
            LayerProjection::W2 => &[Module::Down],
        }
    }
}

impl fmt::Display for LayerProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LayerProjection::W13 => "w13",
            LayerProjection::W2 => "w2",
        })
    }
}

/// Whose LoRA a pair of matrices is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Target {
    pub layer: usize,
    pub expert: usize,
    pub module: Module,
}
