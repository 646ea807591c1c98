//! Who goes where: the ids of each token, or blocks of pairs in vLLM's form, or the route that a workspace
//! keeps.

use crate::fault::{Fault, Outcome};
use crate::read::{Optional, Reader};
use crate::tensor::{Dim, Tensor, Type};
use moe_lora::{BlockShape, Cuda, Enabled, Error, Route, RoutingTensors, SortedTensors, TopkIds};
use pyo3::prelude::*;

/// Who goes where, as the caller says it.
#[derive(Clone, Copy)]
pub enum Routing<'a, 'py> {
    /// The ids of each token; without both, the route that the workspace keeps.
    Tokens(Tokens<'a, 'py>),
    /// Pairs that were sorted into blocks, in vLLM's form.
    Blocks(Blocks<'a, 'py>),
}

/// [`Blocks`] as Python passes them: a tuple of its fields.
pub type BlocksArgument<'py> = (
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    Bound<'py, PyAny>,
    usize,
    Option<Bound<'py, PyAny>>,
    usize,
);

impl<'a, 'py> Routing<'a, 'py> {
    /// The blocks, where there are some, and then no tokens.
    pub fn new(tokens: Tokens<'a, 'py>, blocks: Option<&'a BlocksArgument<'py>>) -> Outcome<Self> {
        let Some((
            sorted_token_ids,
            expert_ids,
            num_tokens_post_padded,
            lora_ids,
            active,
            enabled,
            block_size,
        )) = blocks
        else {
            return Ok(Routing::Tokens(tokens));
        };
        if tokens.given().is_some() {
            return Err(Fault::Argument(
                "blocks: expected without topk_ids and what goes with it".to_owned(),
            ));
        }
        Ok(Routing::Blocks(Blocks {
            sorted_token_ids,
            expert_ids,
            num_tokens_post_padded,
            lora_ids,
            num_active_loras: *active,
            adapter_enabled: enabled.as_ref(),
            block_size: *block_size,
        }))
    }
}

impl Routing<'_, '_> {
    /// Whether there is no `topk_ids`: a dense layer, or the route that the workspace keeps, or blocks.
    pub fn is_without_ids(&self) -> bool {
        !matches!(self, Routing::Tokens(Tokens { topk_ids: Some(_), .. }))
    }

    /// Whether tokens choose among adapters alone.
    pub fn is_dense(&self) -> bool {
        matches!(self, Routing::Tokens(Tokens { topk_ids: None, token_lora: Some(_), .. }))
    }

    /// T and k, where `topk_ids` says them.
    pub fn size(&self, reader: &Reader<'_>) -> Outcome<Option<(usize, usize)>> {
        let &Routing::Tokens(Tokens { topk_ids: Some(topk_ids), .. }) = self else { return Ok(None) };
        let ids = reader.whole("topk_ids", topk_ids)?;
        ids.expect_shape(&[Dim::Named("T"), Dim::Named("k")])?;
        Ok(Some((ids.shape()[0], ids.shape()[1])))
    }
}

/// The ids of each token.
#[derive(Clone, Copy)]
pub struct Tokens<'a, 'py> {
    pub topk_ids: Optional<'a, 'py>,
    pub token_lora: Optional<'a, 'py>,
    pub adapter_enabled: Optional<'a, 'py>,
    pub ranks: Optional<'a, 'py>,
    pub expert_map: Optional<'a, 'py>,
}

impl Tokens<'_, '_> {
    /// The name of an argument that was given.
    fn given(&self) -> Option<&'static str> {
        let &Tokens { topk_ids, token_lora, adapter_enabled, ranks, expert_map } = self;
        let given = [
            ("topk_ids", topk_ids),
            ("token_lora", token_lora),
            ("adapter_enabled", adapter_enabled),
            ("ranks", ranks),
            ("expert_map", expert_map),
        ];
        given.into_iter().find(|(_, tensor)| tensor.is_some()).map(|(name, _)| name)
    }
}

/// Pairs that were sorted into blocks. Names and shapes are vLLM's.
#[derive(Clone, Copy)]
pub struct Blocks<'a, 'py> {
    pub sorted_token_ids: &'a Bound<'py, PyAny>,
    pub expert_ids: &'a Bound<'py, PyAny>,
    pub num_tokens_post_padded: &'a Bound<'py, PyAny>,
    pub lora_ids: &'a Bound<'py, PyAny>,
    /// Ids of `lora_ids` that count.
    pub num_active_loras: usize,
    pub adapter_enabled: Optional<'a, 'py>,
    pub block_size: usize,
}

/// Types of `topk_ids`.
pub const IDS: [Type; 2] = [Type::I32, Type::I64];

/// # Safety
/// As for [`Tensor::view`], of a tensor of one of [`IDS`].
pub unsafe fn topk_ids(ids: Option<&Tensor>) -> TopkIds<'_, Cuda> {
    // SAFETY: as the caller promises.
    unsafe {
        match ids {
            None => TopkIds::None,
            Some(ids) if ids.dtype() == Type::I64 => TopkIds::I64(ids.view()),
            Some(ids) => TopkIds::I32(ids.view()),
        }
    }
}

/// Types of `adapter_enabled`.
pub const FLAGS: [Type; 3] = [Type::I32, Type::U8, Type::BOOL];

/// # Safety
/// As for [`Tensor::view`], of a tensor of one of [`FLAGS`].
pub unsafe fn enabled(flags: Option<&Tensor>) -> Enabled<'_, Cuda> {
    // SAFETY: as the caller promises.
    unsafe {
        match flags {
            None => Enabled::All,
            Some(flags) if flags.dtype() == Type::I32 => Enabled::I32(flags.view()),
            Some(flags) => Enabled::U8(flags.view()),
        }
    }
}

/// The tensors of a [`Routing`], checked.
pub enum Source {
    Tokens {
        /// None of a dense layer.
        topk_ids: Option<Tensor>,
        token_lora: Tensor,
        adapter_enabled: Option<Tensor>,
        ranks: Option<Tensor>,
        expert_map: Option<Tensor>,
    },
    Blocks {
        sorted_token_ids: Tensor,
        expert_ids: Tensor,
        num_tokens_post_padded: Tensor,
        lora_ids: Tensor,
        adapter_enabled: Option<Tensor>,
        block_size: usize,
    },
    Kept,
}

impl Source {
    pub fn read(
        reader: &Reader<'_>,
        routing: &Routing<'_, '_>,
        tokens: usize,
        top_k: usize,
        [experts, slots]: [usize; 2],
    ) -> Outcome<Self> {
        let optional = |name, object: Optional<'_, '_>, types: &[Type], shape| {
            object.map(|object| reader.array(name, object, types, &[shape])).transpose()
        };
        let ids = |name, object, shape: &[Dim]| reader.array(name, object, &[Type::I32], shape);
        let flags = |object| optional("adapter_enabled", object, &FLAGS, Dim::AtLeast(slots));
        match *routing {
            Routing::Tokens(given) => {
                let Tokens { topk_ids, token_lora, adapter_enabled, ranks, expert_map } = given;
                let Some(token_lora) = token_lora else { return Self::kept(&given) };
                if topk_ids.is_none() {
                    Self::check_dense(tokens, top_k, experts, expert_map.is_some())?;
                }
                let shape = [Dim::Is(tokens), Dim::Is(top_k)];
                let topk_ids = topk_ids.map(|ids| reader.array("topk_ids", ids, &IDS, &shape)).transpose()?;
                Ok(Source::Tokens {
                    topk_ids,
                    token_lora: ids("token_lora", token_lora, &[Dim::AtLeast(tokens)])?,
                    adapter_enabled: flags(adapter_enabled)?,
                    ranks: optional("ranks", ranks, &[Type::I32], Dim::AtLeast(slots))?,
                    expert_map: optional("expert_map", expert_map, &[Type::I32], Dim::AtLeast(1))?,
                })
            }
            Routing::Blocks(Blocks {
                sorted_token_ids,
                expert_ids,
                num_tokens_post_padded,
                lora_ids,
                num_active_loras,
                adapter_enabled,
                block_size,
            }) => {
                let rows = |name, object| ids(name, object, &[Dim::Is(slots), Dim::AtLeast(1)]);
                Ok(Source::Blocks {
                    sorted_token_ids: rows("sorted_token_ids", sorted_token_ids)?,
                    expert_ids: rows("expert_ids", expert_ids)?,
                    num_tokens_post_padded: ids(
                        "num_tokens_post_padded",
                        num_tokens_post_padded,
                        &[Dim::Is(slots)],
                    )?,
                    lora_ids: ids("lora_ids", lora_ids, &[Dim::AtLeast(num_active_loras)])?
                        .first(num_active_loras),
                    adapter_enabled: flags(adapter_enabled)?,
                    block_size,
                })
            }
        }
    }

    /// The route that the workspace keeps, which comes with no tensor of its own.
    fn kept(tokens: &Tokens<'_, '_>) -> Outcome<Self> {
        match tokens.given() {
            None => Ok(Source::Kept),
            Some(name) => Err(Fault::Argument(format!(
                "{name}: expected with token_lora, or without it for the route that the workspace keeps"
            ))),
        }
    }

    /// Refuses a layer that needs `topk_ids`, and a map of experts that are no choice.
    fn check_dense(tokens: usize, top_k: usize, experts: usize, mapped: bool) -> Outcome<()> {
        if (experts, top_k) != (1, 1) {
            return Err(Fault::Argument(format!(
                "topk_ids: expected shape [{tokens}, {top_k}], got None: only a dense layer has none, \
                 with E = 1 and k = 1, and this one has E = {experts} and k = {top_k}"
            )));
        }
        if mapped {
            return Err(Fault::Argument("expert_map: expected with topk_ids, which it maps".to_owned()));
        }
        Ok(())
    }

    pub fn is_kept(&self) -> bool {
        matches!(self, Source::Kept)
    }

    /// The routing of a call on a workspace whose last call left the route `last`.
    ///
    /// # Safety
    /// As for [`Tensor::view`].
    pub unsafe fn routing(&self, last: Option<Route>) -> moe_lora::Result<moe_lora::Routing<'_, Cuda>> {
        // SAFETY: as the caller promises; the types were checked.
        Ok(unsafe {
            match self {
                Source::Tokens { topk_ids, token_lora, adapter_enabled, ranks, expert_map } => {
                    moe_lora::Routing::Tokens(RoutingTensors {
                        topk_ids: self::topk_ids(topk_ids.as_ref()),
                        token_lora: token_lora.view(),
                        adapter_enabled: enabled(adapter_enabled.as_ref()),
                        ranks: ranks.as_ref().map(|ranks| ranks.view()),
                        expert_map: expert_map.as_ref().map(|map| map.view()),
                    })
                }
                Source::Blocks {
                    sorted_token_ids,
                    expert_ids,
                    num_tokens_post_padded,
                    lora_ids,
                    adapter_enabled,
                    block_size,
                } => moe_lora::Routing::Sorted(SortedTensors {
                    shape: BlockShape {
                        block_size: *block_size,
                        max_padded: sorted_token_ids.shape()[1],
                        max_blocks: expert_ids.shape()[1],
                    },
                    sorted_token_ids: sorted_token_ids.view(),
                    expert_ids: expert_ids.view(),
                    num_tokens_post_padded: num_tokens_post_padded.view(),
                    lora_ids: lora_ids.view(),
                    adapter_enabled: enabled(adapter_enabled.as_ref()),
                    ranks: None,
                }),
                Source::Kept => last.ok_or_else(Self::no_route)?.into(),
            }
        })
    }

    fn no_route() -> Error {
        let reason = "no call on this workspace and stream has found one, or the last that was to has failed";
        Error::StaleRoute { reason: reason.to_owned() }
    }
}
