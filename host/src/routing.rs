//! The tensors that routing reads: which expert and which adapter each token goes to.

use crate::check::{check_expert_map, check_limit, check_view};
use crate::error::Result;
use crate::projection::{MAX_SIZE, Projection};
use crate::tensor::{Space, View};

/// `adapter_enabled`, `[L]`: 0 switches a slot off for this layer.
#[derive(Clone, Copy, Debug)]
pub enum Enabled<'a, S: Space> {
    /// Every slot is on; there is no tensor.
    All,
    /// One byte a slot.
    U8(View<'a, S, u8>),
    /// One 32-bit integer a slot.
    I32(View<'a, S, i32>),
}

/// Who goes where: the tensors that routing reads. All ids are untrusted.
#[derive(Clone, Copy, Debug)]
pub struct RoutingTensors<'a, S: Space> {
    /// `[T, k]`: global expert ids.
    pub topk_ids: View<'a, S, i32>,
    /// `[T]`: adapter slot of each token, −1 for none.
    pub token_lora: View<'a, S, i32>,
    /// `[L]`: which slots are on.
    pub adapter_enabled: Enabled<'a, S>,
    /// `[L]`: rank in use per slot; `None`: `max_rank` for all. On a device a rank is clamped to
    /// 0 ..= `max_rank`; on the host one over `max_rank` is an error.
    pub ranks: Option<View<'a, S, i32>>,
    /// `[global experts]`: local id of a global expert, −1 when another device holds it.
    pub expert_map: Option<View<'a, S, i32>>,
}

impl<S: Space> Enabled<'_, S> {
    pub(crate) fn check(&self, slots: usize) -> Result<()> {
        match self {
            Enabled::All => Ok(()),
            Enabled::U8(view) => check_view("adapter_enabled", view, &[slots]),
            Enabled::I32(view) => check_view("adapter_enabled", view, &[slots]),
        }
    }
}

/// P of a call of `tokens` tokens, unless they are too many.
pub(crate) fn check_tokens(projection: &Projection, tokens: usize) -> Result<usize> {
    check_limit("tokens", tokens, MAX_SIZE)?;
    projection.pairs(tokens)
}

impl<S: Space> RoutingTensors<'_, S> {
    /// Checks everything that can be known without reading device memory.
    ///
    /// # Errors
    /// As for [`Forward::check`](crate::Forward::check).
    pub fn check(&self, projection: &Projection, tokens: usize) -> Result<()> {
        check_tokens(projection, tokens)?;
        let sizes = projection.sizes();
        check_view("topk_ids", &self.topk_ids, &[tokens, sizes.top_k])?;
        check_view("token_lora", &self.token_lora, &[tokens])?;
        self.adapter_enabled.check(sizes.slots)?;
        if let Some(ranks) = &self.ranks {
            check_view("ranks", ranks, &[sizes.slots])?;
        }
        self.expert_map.iter().try_for_each(check_expert_map)
    }
}
