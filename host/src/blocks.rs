//! Routes in vLLM's form: the pairs of each adapter slot, sorted into blocks of one expert each.
//!
//! vLLM 0.33.0 routes a layer with `moe_lora_align_block_size` ([`Align`] here), and hands what that leaves
//! to its operator `fused_moe_lora` ([`Routing::Sorted`](crate::Routing::Sorted) here). Names and shapes are
//! vLLM's.
//!
//! A slot has a row in each array. Its pairs are sorted by local expert, the *segment* of each expert filled
//! up to whole blocks of `block_size` places with P, which is no pair. Places past `num_tokens_post_padded`
//! hold P, and blocks past it the expert −1. The order of pairs within a segment is nobody's promise, neither
//! vLLM's nor ours.
//!
//! vLLM's *naive* form, for few tokens, has no sorted arrays: `sorted_token_ids` is `None`, `expert_ids` is
//! `topk_ids` flattened, the slot of a pair comes from `token_lora_mapping`, and `lora_ids` and
//! `num_active_loras` go unread. That is [`Routing::Tokens`](crate::Routing::Tokens) without an expert map.

use crate::check::{check_limit, check_list, check_view, check_view_mut};
use crate::error::{Error, Result};
use crate::projection::{MAX_SIZE, Projection};
use crate::routing::{Enabled, TopkIds};
use crate::tensor::{Space, View, ViewMut};
use moe_lora_kernels::tile::TileShape;
use moe_lora_kernels::{adopt, align};

/// The shape of pairs in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockShape {
    /// Places of a block. In a route [`BlockShape::MIN_BLOCK_SIZE`] ..= [`BlockShape::MAX_BLOCK_SIZE`], in
    /// [`Align`] anything from 1 on.
    pub block_size: usize,
    /// Places of a row of `sorted_token_ids` (vLLM's `max_num_tokens_padded`). It need not be a multiple of
    /// the block size: the places after the last whole block are never used.
    pub max_padded: usize,
    /// Blocks of a row of `expert_ids` (vLLM's `max_num_m_blocks`).
    pub max_blocks: usize,
}

impl BlockShape {
    /// Fewest places of a block that a route may have: those of the smallest tile.
    pub const MIN_BLOCK_SIZE: usize = TileShape::M16.rows() as usize;
    /// Most places of a block that a route may have.
    pub const MAX_BLOCK_SIZE: usize = adopt::MAX_BLOCK_SIZE as usize;

    /// Places that the pairs of one slot may need: each of min(P, E) segments begins a block of its own.
    pub fn padded(block_size: usize, pairs: usize, experts: usize) -> usize {
        let segments = pairs.min(experts);
        let full = (pairs - segments) / block_size.max(1);
        (segments + full).saturating_mul(block_size)
    }

    /// Whole blocks that both a row of places and a row of experts have.
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    pub(crate) fn usable_blocks(&self) -> usize {
        self.max_blocks.min(self.max_padded / self.block_size)
    }

    fn check(&self, slots: usize) -> Result<()> {
        let &BlockShape { block_size, max_padded, max_blocks } = self;
        // Kernels hold offsets into both arrays in 31 bits.
        for (what, got, limit) in [
            ("block_size", block_size, MAX_SIZE / 2),
            ("max_padded", max_padded, MAX_SIZE / slots),
            ("max_blocks", max_blocks, MAX_SIZE / slots),
        ] {
            if got == 0 {
                return Err(Error::ZeroSize { what });
            }
            if got > limit {
                return Err(Error::SizeTooLarge { what, limit, got });
            }
        }
        Ok(())
    }
}

/// A route that was made elsewhere, in vLLM's form. All ids are untrusted.
///
/// A pair is active when it is in a block in use and nothing about that block is out of range. A block is *in
/// use* when its slot is listed in `lora_ids`, below L, on in `adapter_enabled` and of a rank over 0, and the
/// block begins below the slot's `num_tokens_post_padded`. The block's expert must be below E, and the pair
/// below P. Ids are read as unsigned, so that −1 is out of range like any other. These are the conditions of
/// vLLM's kernels, with the upper bounds that they leave out.
///
/// A pair in no block *is no part of the call*: its row of `out` keeps what it holds even when the call
/// overwrites (vLLM with `add_inputs=False`), and so does its row of `h` in the split form (vLLM hands its
/// shrink an `h` of zeros). This differs from [`Routing::Tokens`](crate::Routing::Tokens), which knows all
/// pairs.
///
/// A pair in two blocks gets the delta of one or both of them. Blocks past those that P pairs in L · E
/// segments can fill are left out.
#[derive(Clone, Copy, Debug)]
pub struct SortedTensors<'a, S: Space> {
    /// Sizes of the arrays.
    pub shape: BlockShape,
    /// `[L, max_padded]`: pairs, and P or more where there is none.
    pub sorted_token_ids: View<'a, S, i32>,
    /// `[L, max_blocks]`: local expert of each block, −1 for none.
    pub expert_ids: View<'a, S, i32>,
    /// `[L]`: places in use, a multiple of the block size.
    pub num_tokens_post_padded: View<'a, S, i32>,
    /// `[any]`: the slots that take part, in any order, −1 for none. vLLM's operator reads the first
    /// `num_active_loras` of its array: pass those.
    pub lora_ids: View<'a, S, i32>,
    /// `[L]`: which slots are on.
    pub adapter_enabled: Enabled<'a, S>,
    /// `[L]`: rank in use per slot; `None`: `max_rank` for all, as in vLLM.
    pub ranks: Option<View<'a, S, i32>>,
}

impl<S: Space> SortedTensors<'_, S> {
    /// Checks everything that can be known without reading device memory.
    ///
    /// # Errors
    /// As for [`Forward::check`](crate::Forward::check).
    pub fn check(&self, projection: &Projection) -> Result<()> {
        let slots = projection.sizes().slots;
        check_limit("slots", slots, adopt::MAX_SLOTS as usize)?;
        self.shape.check(slots)?;
        let BlockShape { block_size, max_padded, max_blocks } = self.shape;
        if block_size < BlockShape::MIN_BLOCK_SIZE {
            let (what, limit) = ("block_size", BlockShape::MIN_BLOCK_SIZE);
            return Err(Error::SizeTooSmall { what, limit, got: block_size });
        }
        check_limit("block_size", block_size, BlockShape::MAX_BLOCK_SIZE)?;
        check_view("sorted_token_ids", &self.sorted_token_ids, &[slots, max_padded])?;
        check_view("expert_ids", &self.expert_ids, &[slots, max_blocks])?;
        check_view("num_tokens_post_padded", &self.num_tokens_post_padded, &[slots])?;
        check_list("lora_ids", &self.lora_ids)?;
        self.adapter_enabled.check(slots)?;
        match &self.ranks {
            Some(ranks) => check_view("ranks", ranks, &[slots]),
            None => Ok(()),
        }
    }
}

/// Sorts pairs into blocks, as vLLM 0.33.0's `moe_lora_align_block_size` does.
///
/// The rows of the slots that are listed in `lora_ids`, below L and on in `adapter_enabled` are written
/// whole; all other rows keep what they hold. A pair is in the row of its token's slot when its local expert
/// is below E. Ids are untrusted, and one out of range leaves its pair out.
///
/// vLLM's kernel reads past its arrays for a `topk_ids` below 0 and, for fewer than 1,024 pairs and at most
/// 64 experts, for one of E or more; for more pairs or experts it leaves out ids of E or more *before* it
/// looks them up in `expert_map`. Here an id is looked up when the map has it.
#[derive(Debug)]
pub struct Align<'a, S: Space> {
    /// T; 0 is legal, and leaves rows without a pair.
    pub tokens: usize,
    /// k, at most [`Projection::MAX_TOP_K`].
    pub top_k: usize,
    /// E: experts of this device.
    pub experts: usize,
    /// L.
    pub slots: usize,
    /// Sizes of the outputs. A row must have room for any routing: [`BlockShape::padded`].
    pub shape: BlockShape,
    /// `[T, k]`: global expert ids.
    pub topk_ids: TopkIds<'a, S>,
    /// `[≥ T]`: adapter slot of each token, −1 for none.
    pub token_lora: View<'a, S, i32>,
    /// `[L]`: which slots are on.
    pub adapter_enabled: Enabled<'a, S>,
    /// `[any]`: the slots whose rows are written, in any order, −1 for none. vLLM's kernel reads L + 1 ids.
    pub lora_ids: View<'a, S, i32>,
    /// `[global experts]`: local id of a global expert, −1 when another device holds it.
    pub expert_map: Option<View<'a, S, i32>>,
    /// `[L, max_padded]` out.
    pub sorted_token_ids: ViewMut<'a, S, i32>,
    /// `[L, max_blocks]` out.
    pub expert_ids: ViewMut<'a, S, i32>,
    /// `[L]` out.
    pub num_tokens_post_padded: ViewMut<'a, S, i32>,
}

impl<S: Space> Align<'_, S> {
    /// Checks everything that can be known without reading device memory.
    ///
    /// # Errors
    /// One [`Error`] variant for each rule, naming the tensor, what was expected and what came.
    pub fn check(&self) -> Result<()> {
        let &Align { tokens, top_k, experts, slots, shape, .. } = self;
        for (what, got, limit) in [
            ("top_k", top_k, Projection::MAX_TOP_K),
            ("experts", experts, align::MAX_EXPERTS as usize),
            ("slots", slots, MAX_SIZE),
        ] {
            if got == 0 {
                return Err(Error::ZeroSize { what });
            }
            check_limit(what, got, limit)?;
        }
        // A pair has a 31-bit number.
        check_limit("tokens", tokens, MAX_SIZE / top_k)?;
        shape.check(slots)?;
        let BlockShape { block_size, max_padded, max_blocks } = shape;
        let expected = BlockShape::padded(block_size, self.pairs(), experts);
        for (tensor, expected, got) in
            [("sorted_token_ids", expected, max_padded), ("expert_ids", expected / block_size, max_blocks)]
        {
            if got < expected {
                let shape =
                    format!("a row of {} pairs of {experts} experts in blocks of {block_size}", self.pairs());
                return Err(Error::TooShort { tensor, shape, expected, got });
            }
        }
        self.topk_ids.check([tokens, top_k, experts], self.expert_map.as_ref())?;
        check_view("token_lora", &self.token_lora, &[tokens])?;
        self.adapter_enabled.check(slots)?;
        check_list("lora_ids", &self.lora_ids)?;
        check_view_mut("sorted_token_ids", &self.sorted_token_ids, &[slots, max_padded])?;
        check_view_mut("expert_ids", &self.expert_ids, &[slots, max_blocks])?;
        check_view_mut("num_tokens_post_padded", &self.num_tokens_post_padded, &[slots])
    }

    /// P, of a checked call.
    pub(crate) fn pairs(&self) -> usize {
        self.tokens * self.top_k
    }
}
