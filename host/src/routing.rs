//! The tensors that routing reads: which expert and which adapter each token goes to.

use crate::check::{check_expert_map, check_limit, check_view};
use crate::error::{Error, Result};
use crate::projection::{MAX_SIZE, Projection};
use crate::tensor::{Host, Space, View};

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

/// `topk_ids`, `[T, k]`: the experts that each token has chosen.
#[derive(Clone, Copy, Debug)]
pub enum TopkIds<'a, S: Space> {
    /// A dense layer's, E = 1 and k = 1: every token goes to expert 0, and there is no tensor.
    None,
    /// 32-bit ids.
    I32(View<'a, S, i32>),
    /// 64-bit ids. One that does not fit 32 bits is out of range, as any other that is no expert's.
    I64(View<'a, S, i64>),
}

/// Who goes where: the tensors that routing reads. All ids are untrusted.
#[derive(Clone, Copy, Debug)]
pub struct RoutingTensors<'a, S: Space> {
    /// `[T, k]`: global expert ids.
    pub topk_ids: TopkIds<'a, S>,
    /// `[≥ T]`: adapter slot of each token, −1 for none.
    pub token_lora: View<'a, S, i32>,
    /// `[L]`: which slots are on.
    pub adapter_enabled: Enabled<'a, S>,
    /// `[L]`: rank in use per slot; `None`: `max_rank` for all. On a device a rank is clamped to
    /// 0 ..= `max_rank`; on the host one over `max_rank` is an error.
    pub ranks: Option<View<'a, S, i32>>,
    /// `[global experts]`: local id of a global expert, −1 when another device holds it. `None` where
    /// `topk_ids` is left out.
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

impl<S: Space> TopkIds<'_, S> {
    /// Refuses ids of another number than `tokens` tokens have, or none where there is a choice, and a map
    /// that is none or has nothing to map.
    pub(crate) fn check(
        &self,
        [tokens, top_k, experts]: [usize; 3],
        expert_map: Option<&View<'_, S, i32>>,
    ) -> Result<()> {
        match self {
            TopkIds::None if (top_k, experts) != (1, 1) => Err(Error::NoTopkIds { experts, top_k }),
            TopkIds::None => expert_map.map_or(Ok(()), |_| Err(Error::NothingToMap)),
            TopkIds::I32(ids) => check_view("topk_ids", ids, &[tokens, top_k]),
            TopkIds::I64(ids) => check_view("topk_ids", ids, &[tokens, top_k]),
        }?;
        expert_map.map_or(Ok(()), check_expert_map)
    }
}

impl<S: Space> TopkIds<'_, S> {
    /// Address of the first id; null where there is none.
    pub fn address(&self) -> u64 {
        match self {
            TopkIds::None => 0,
            TopkIds::I32(ids) => ids.address(),
            TopkIds::I64(ids) => ids.address(),
        }
    }
}

impl TopkIds<'_, Host> {
    /// The id of a pair of a checked call.
    pub(crate) fn id(&self, pair: usize) -> i64 {
        match self {
            TopkIds::None => 0,
            TopkIds::I32(ids) => ids.as_slice()[pair].into(),
            TopkIds::I64(ids) => ids.as_slice()[pair],
        }
    }
}

impl<'a, S: Space> From<View<'a, S, i32>> for TopkIds<'a, S> {
    fn from(ids: View<'a, S, i32>) -> Self {
        TopkIds::I32(ids)
    }
}

impl<'a, S: Space> From<View<'a, S, i64>> for TopkIds<'a, S> {
    fn from(ids: View<'a, S, i64>) -> Self {
        TopkIds::I64(ids)
    }
}

impl<'a> From<&'a [i32]> for TopkIds<'a, Host> {
    fn from(ids: &'a [i32]) -> Self {
        TopkIds::I32(ids.into())
    }
}

impl<'a> From<&'a [i64]> for TopkIds<'a, Host> {
    fn from(ids: &'a [i64]) -> Self {
        TopkIds::I64(ids.into())
    }
}

/// A buffer of ids as `topk_ids`. One impl a type, as a type that is a buffer of both would have two.
macro_rules! from_buffers {
    ($($(#[$when:meta])? $buffer:ty: $space:ty),* $(,)?) => {
        $($(#[$when])?
        impl<'a> From<&'a $buffer> for TopkIds<'a, $space> {
            fn from(ids: &'a $buffer) -> Self {
                crate::backend::Buffer::view(ids).into()
            }
        })*
    };
}

from_buffers! {
    crate::cpu::HostBuffer<i32>: Host,
    crate::cpu::HostBuffer<i64>: Host,
    #[cfg(feature = "cuda")]
    crate::cuda::Buffer<i32>: crate::tensor::Cuda,
    #[cfg(feature = "cuda")]
    crate::cuda::Buffer<i64>: crate::tensor::Cuda,
    #[cfg(feature = "emulate")]
    crate::emulated::EmulatedBuffer<i32>: crate::tensor::Emulated,
    #[cfg(feature = "emulate")]
    crate::emulated::EmulatedBuffer<i64>: crate::tensor::Emulated,
}

impl<'a, S: Space> RoutingTensors<'a, S> {
    /// Of `topk_ids` and `token_lora`: all slots are on and of the largest rank, and ids of experts are
    /// local.
    pub fn new(topk_ids: impl Into<TopkIds<'a, S>>, token_lora: View<'a, S, i32>) -> Self {
        let topk_ids = topk_ids.into();
        RoutingTensors { topk_ids, token_lora, adapter_enabled: Enabled::All, ranks: None, expert_map: None }
    }

    /// Of a dense layer's `token_lora`: there is one expert, which is no choice.
    pub fn dense(token_lora: View<'a, S, i32>) -> Self {
        Self::new(TopkIds::None, token_lora)
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
        self.topk_ids.check([tokens, sizes.top_k, sizes.experts], self.expert_map.as_ref())?;
        check_view("token_lora", &self.token_lora, &[tokens])?;
        self.adapter_enabled.check(sizes.slots)?;
        match &self.ranks {
            Some(ranks) => check_view("ranks", ranks, &[sizes.slots]),
            None => Ok(()),
        }
    }
}
