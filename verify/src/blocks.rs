use crate::case::Case;
use crate::data::CaseData;
use crate::fault::Fault;
use crate::placed::{Placed, check_guards};
use crate::tensor::Tensor;
use moe_lora::backend::Backend;
use moe_lora::blocks::{Align, BlockShape, SortedTensors};
use moe_lora::call::{Routing, RoutingTensors};
use moe_lora::reference::Target;
use moe_lora::tensor::View;
use std::ops::Range;

/// The arrays of a route in vLLM's form, before anybody wrote them.
pub(crate) struct Blank<'d> {
    case: &'d Case,
    lora_ids: &'d Tensor<i32>,
    shape: BlockShape,
    sorted_token_ids: Tensor<i32>,
    expert_ids: Tensor<i32>,
    num_tokens_post_padded: Tensor<i32>,
}

/// The same on a back end.
pub(crate) struct Blocks<'d, B: Backend> {
    blank: &'d Blank<'d>,
    lora_ids: Placed<'d, B, i32>,
    sorted_token_ids: Placed<'d, B, i32>,
    expert_ids: Placed<'d, B, i32>,
    num_tokens_post_padded: Placed<'d, B, i32>,
}

impl<'d> Blank<'d> {
    /// `None` when the case has no such route.
    pub fn new<T>(case: &'d Case, data: &'d CaseData<T>) -> Option<Self> {
        let (block_size, lora_ids) = (case.block_size?, data.lora_ids.as_ref()?);
        let needed = BlockShape::padded(block_size, case.tokens * case.top_k, case.experts);
        // Rows that end in the middle of a block, and arrays of different lengths.
        let max_padded = needed.max(1) + case.seed as usize % (block_size + 1);
        let max_blocks = max_padded.div_ceil(block_size) + case.seed as usize % 2;
        let tensor = |name, width| Tensor::poisoned(name, [case.slots, width, width], case.misaligned);
        Some(Blank {
            case,
            lora_ids,
            shape: BlockShape { block_size, max_padded, max_blocks },
            sorted_token_ids: tensor("sorted_token_ids", max_padded),
            expert_ids: tensor("expert_ids", max_blocks),
            num_tokens_post_padded: tensor("num_tokens_post_padded", 1),
        })
    }

    /// Whether pairs of this slot take part.
    pub fn lists(&self, slot: usize) -> bool {
        self.lora_ids.elements().contains(&(slot as i32))
    }

    /// Holds what a back end made of the arrays against `targets`. Which pair of a segment comes first is up
    /// to the back end.
    fn check(&self, targets: &[Option<Target>], on: &[bool], mut images: [Vec<i32>; 3]) -> Result<(), Fault> {
        let BlockShape { block_size, max_padded, max_blocks } = self.shape;
        let tensors = [&self.sorted_token_ids, &self.expert_ids, &self.num_tokens_post_padded];
        let mut expected = tensors.map(|tensor| tensor.image().to_vec());
        let starts = tensors.map(|tensor| tensor.range().start);
        let experts = self.case.experts;
        let mut segments = vec![Vec::new(); self.case.slots * experts];
        for (pair, target) in targets.iter().enumerate() {
            if let Some(Target { slot, expert, .. }) = *target {
                segments[slot * experts + expert].push(pair as i32);
            }
        }
        for slot in (0..self.case.slots).filter(|&slot| on[slot] && self.lists(slot)) {
            let row = |array: usize, width: usize| -> Range<usize> {
                let start = starts[array] + slot * width;
                start..start + width
            };
            expected[0][row(0, max_padded)].fill(targets.len() as i32);
            expected[1][row(1, max_blocks)].fill(-1);
            let mut first = 0;
            for (expert, pairs) in segments[slot * experts..][..experts].iter().enumerate() {
                let places = row(0, max_padded).start + first..row(0, max_padded).start + first + pairs.len();
                expected[0][places.clone()].copy_from_slice(pairs);
                images[0][places].sort_unstable();
                let blocks = pairs.len().div_ceil(block_size);
                expected[1][row(1, max_blocks)][first / block_size..][..blocks].fill(expert as i32);
                first += blocks * block_size;
            }
            expected[2][row(2, 1)].fill(first as i32);
        }
        for ((tensor, image), expected) in tensors.into_iter().zip(&images).zip(&expected) {
            check_guards(tensor, image)?;
            if let Some(index) = image.iter().zip(expected).position(|(got, expected)| got != expected) {
                let (place, got, expected) = (tensor.place(index), image[index], expected[index]);
                return Err(Fault::WrongId { tensor: tensor.name(), place, got, expected });
            }
        }
        Ok(())
    }
}

impl<'d, B: Backend> Blocks<'d, B> {
    /// Sorts the case's pairs into blocks on `backend`, and checks the result. `on`: which slots are.
    pub fn sorted(
        backend: &B,
        blank: &'d Blank<'d>,
        routing: RoutingTensors<'_, B::Space>,
        targets: &[Option<Target>],
        on: &[bool],
    ) -> Result<Self, Fault> {
        let mut blocks = Blocks {
            blank,
            lora_ids: Placed::new(backend, blank.lora_ids)?,
            sorted_token_ids: Placed::new(backend, &blank.sorted_token_ids)?,
            expert_ids: Placed::new(backend, &blank.expert_ids)?,
            num_tokens_post_padded: Placed::new(backend, &blank.num_tokens_post_padded)?,
        };
        let &Case { tokens, top_k, experts, slots, .. } = blank.case;
        let RoutingTensors { topk_ids, token_lora, adapter_enabled, expert_map, .. } = routing;
        backend.align(Align {
            tokens,
            top_k,
            experts,
            slots,
            shape: blank.shape,
            topk_ids,
            token_lora,
            adapter_enabled,
            lora_ids: blocks.lora_ids.view(),
            expert_map,
            sorted_token_ids: blocks.sorted_token_ids.view_mut(),
            expert_ids: blocks.expert_ids.view_mut(),
            num_tokens_post_padded: blocks.num_tokens_post_padded.view_mut(),
        })?;
        let Blocks { sorted_token_ids, expert_ids, num_tokens_post_padded, .. } = &blocks;
        let images = [sorted_token_ids, expert_ids, num_tokens_post_padded];
        let [places, experts, counts] = images.map(|array| array.download(backend));
        blank.check(targets, on, [places?, experts?, counts?])?;
        Ok(blocks)
    }

    /// The blocks as a route, unless they are too small to be one; flags and ranks are the case's own.
    pub fn routing<'b>(&'b self, routing: RoutingTensors<'b, B::Space>) -> Option<Routing<'b, B::Space>> {
        if self.blank.shape.block_size < BlockShape::MIN_BLOCK_SIZE {
            return None;
        }
        let view = |array: &'b Placed<'d, B, i32>| -> View<'b, B::Space, i32> { array.view() };
        Some(Routing::Sorted(SortedTensors {
            shape: self.blank.shape,
            sorted_token_ids: view(&self.sorted_token_ids),
            expert_ids: view(&self.expert_ids),
            num_tokens_post_padded: view(&self.num_tokens_post_padded),
            lora_ids: view(&self.lora_ids),
            adapter_enabled: routing.adapter_enabled,
            ranks: routing.ranks,
        }))
    }
}
