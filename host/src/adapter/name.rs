//! What a weight's name says it is.

use super::target::{Module, Target};

/// The names understood, for messages.
pub(super) const EXPECTED: &str =
    "….layers.N.….experts.J.{gate_proj,up_proj,down_proj or w1,w3,w2}.lora_{A,B}.weight";

/// Which factor of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    A,
    B,
}

impl Side {
    pub(super) fn other(self) -> Self {
        match self {
            Side::A => Side::B,
            Side::B => Side::A,
        }
    }
}

/// A weight's name, understood or not.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// A matrix of one expert.
    Expert(Target, Side),
    /// Not of the experts.
    Elsewhere,
    /// Of the experts, but not a matrix of one of them: leaving it out would change the result.
    Unknown,
}

impl Name {
    pub(super) fn parse(name: &str) -> Self {
        let parts: Vec<&str> = name.split('.').collect();
        if !parts.contains(&"experts") {
            return Name::Elsewhere;
        }
        Self::expert(&parts).unwrap_or(Name::Unknown)
    }

    fn expert(parts: &[&str]) -> Option<Self> {
        let [outer @ .., "experts", expert, module, lora, "weight"] = parts else { return None };
        let layers = outer.iter().rposition(|&part| part == "layers")?;
        let side = match *lora {
            "lora_A" => Side::A,
            "lora_B" => Side::B,
            _ => return None,
        };
        let (layer, expert) = (number(outer.get(layers + 1)?)?, number(expert)?);
        Some(Name::Expert(Target { layer, expert, module: Module::parse(module)? }, side))
    }

    /// The module that a LoRA matrix belongs to: its name without `.lora_A.weight`.
    pub(super) fn module(name: &str) -> &str {
        let mut parts = name.rsplitn(3, '.');
        parts.nth(2).unwrap_or(name)
    }
}

/// Digits only: `parse` alone would take a sign.
fn number(text: &str) -> Option<usize> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}
