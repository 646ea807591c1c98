//! The operator as an engine holds it: the sizes of a projection, where its calls run, and the scratch memory
//! that they share.

use crate::backend::{Backend, Buffer};
use crate::call::{Enabled, Forward, Routing, RoutingTensors, SliceOrder, TopkIds, Weights};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::projection::{Projection, ProjectionSizes, XRows};
use crate::route::Route;
use crate::table::Adapters;
use crate::tensor::{Rows, RowsMut, Space, View, ViewMut};
use bytemuck::Pod;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The fused MoE-LoRA operator of one projection, on one back end: the CPU or a stream of a GPU.
///
/// Operators that are built together share scratch memory and route: make them for all projections of a
/// layer, and use them for all layers of the same sizes. It owns all that it needs.
///
/// ```
/// use half::bf16;
/// use moe_lora::{Operator, ProjectionSizes, cpu::Cpu};
///
/// // Gate and up of 8 experts, two for each token, with 2 adapters of rank 4: what a call adds for 3 tokens.
/// let layer = ProjectionSizes::gate_up(16, 32);
/// let sizes = ProjectionSizes { experts: 8, top_k: 2, slots: 2, max_rank: 4, ..layer };
/// let [w13] = Operator::builder(&Cpu).max_tokens(3).build([sizes])?;
/// let x = vec![bf16::ONE; 3 * 16];
/// let a = [vec![bf16::ONE; 2 * 8 * 4 * 16], vec![bf16::ONE; 2 * 8 * 4 * 16]];
/// let b = [vec![bf16::ONE; 2 * 8 * 32 * 4], vec![bf16::ONE; 2 * 8 * 32 * 4]];
/// let (topk_ids, token_lora) = ([0, 1, 5, 2, 7, 7], [0, 1, -1]); // the last token has no adapter
/// let mut out = vec![bf16::ZERO; 3 * 2 * 64];
/// let (a, b) = (a.iter().map(|a| &a[..]), b.iter().map(|b| &b[..]));
/// w13.call(&x[..], a, b, (&topk_ids[..], &token_lora[..]), &mut out[..]).run()?;
/// assert_eq!([out[0], out[4 * 64]], [bf16::from_f32(64.0), bf16::ZERO]);
/// # Ok::<(), moe_lora::Error>(())
/// ```
pub struct Operator<B: Backend> {
    backend: B,
    projection: Projection,
    workspace: Arc<Mutex<B::Workspace>>,
}

/// Makes [`Operator`]s.
#[derive(Clone, Copy, Debug)]
pub struct OperatorBuilder<'b, B> {
    backend: &'b B,
    max_tokens: usize,
}

impl<B: Backend + Clone> Operator<B> {
    /// Begins with where calls run, and as many tokens a call as [`OperatorBuilder::max_tokens`] says.
    pub fn builder(backend: &B) -> OperatorBuilder<'_, B> {
        OperatorBuilder { backend, max_tokens: OperatorBuilder::<B>::MAX_TOKENS }
    }
}

impl<B: Backend + Clone> OperatorBuilder<'_, B> {
    /// Tokens of a call unless something else is asked for.
    const MAX_TOKENS: usize = 8192;

    /// Most tokens of a call; 8,192 unless this is called. Scratch memory grows with it.
    pub fn max_tokens(self, max_tokens: usize) -> Self {
        OperatorBuilder { max_tokens, ..self }
    }

    /// Operators of these sizes, in the same order, that share scratch memory and route.
    ///
    /// # Errors
    /// As for [`Projection::new`] and [`Backend::workspace`].
    pub fn build<const N: usize>(self, sizes: [impl Into<ProjectionSizes>; N]) -> Result<[Operator<B>; N]> {
        let projections: Vec<_> =
            sizes.into_iter().map(|sizes| Projection::new(sizes.into())).collect::<Result<_>>()?;
        let workspace = self.backend.workspace(&projections, self.max_tokens)?;
        // A workspace of the CPU's or of a GPU may go to another thread, and then its operators may.
        #[allow(clippy::arc_with_non_send_sync)]
        let workspace = Arc::new(Mutex::new(workspace));
        let operator = |i: usize| Operator {
            backend: self.backend.clone(),
            projection: projections[i],
            workspace: Arc::clone(&workspace),
        };
        Ok(std::array::from_fn(operator))
    }
}

impl<B: Backend> Operator<B> {
    /// Where calls run.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The sizes.
    pub fn projection(&self) -> &Projection {
        &self.projection
    }

    fn workspace(&self) -> MutexGuard<'_, B::Workspace> {
        // A panic leaves a workspace that holds some route or none, and the next call finds its own.
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds the route of a batch of as many tokens as `token_lora` has elements, for calls on it.
    ///
    /// # Errors
    /// As for [`Backend::route`].
    pub fn route(&self, routing: RoutingTensors<'_, B::Space>) -> Result<Route> {
        self.route_of(routing.token_lora.len(), routing)
    }

    /// Finds the route of a batch of `tokens` tokens, for calls on it. `token_lora` may be longer.
    ///
    /// # Errors
    /// As for [`Backend::route`].
    pub fn route_of(&self, tokens: usize, routing: RoutingTensors<'_, B::Space>) -> Result<Route> {
        self.backend.route(&mut self.workspace(), &self.projection, tokens, routing)
    }

    /// A call, to be [run](Call::run): `out += b · (a · x)` for every active pair.
    ///
    /// - `x`: `[T, K]` or `[P, K]`.
    /// - `a`, `b`: S tensors each, `[L, E or 1, R, K]` and `[L, E or 1, N_s, R]`.
    /// - `routing`: `(topk_ids, token_lora)`, `[T, k]` and `[T]`, or the [`Route`] that another call of the
    ///   layer has found, or [`Routing`] in any other form.
    /// - `out`: `[T, k, Σ N_s]`.
    pub fn call<'c, T: Element, A, C>(
        &'c self,
        x: impl Into<View<'c, B::Space, T>>,
        a: impl IntoIterator<Item = A>,
        b: impl IntoIterator<Item = C>,
        routing: impl Into<Routing<'c, B::Space>>,
        out: impl Into<ViewMut<'c, B::Space, T>>,
    ) -> Call<'c, B, T>
    where
        A: Into<View<'c, B::Space, T>>,
        C: Into<View<'c, B::Space, T>>,
    {
        let (a, b) = (a.into_iter().map(Into::into).collect(), b.into_iter().map(Into::into).collect());
        self.call_of(x.into(), Given::Stacked { a, b }, routing.into(), out.into())
    }

    /// As [`Operator::call`], on adapters by address: those of an [`AdapterTable`](crate::AdapterTable).
    pub fn call_adapters<'c, T: Element>(
        &'c self,
        x: impl Into<View<'c, B::Space, T>>,
        adapters: &Adapters<'c, B::Space>,
        routing: impl Into<Routing<'c, B::Space>>,
        out: impl Into<ViewMut<'c, B::Space, T>>,
    ) -> Call<'c, B, T> {
        self.call_of(x.into(), Given::Table(*adapters), routing.into(), out.into())
    }

    fn call_of<'c, T: Element>(
        &'c self,
        x: View<'c, B::Space, T>,
        weights: Given<'c, B::Space, T>,
        routing: Routing<'c, B::Space>,
        out: ViewMut<'c, B::Space, T>,
    ) -> Call<'c, B, T> {
        Call {
            operator: self,
            tokens: None,
            routing,
            unused: None,
            x: Rows::from(x),
            weights,
            topk_weights: None,
            out: RowsMut::from(out),
            offset: 0,
            order: SliceOrder::InOrder,
            accumulate: true,
        }
    }
}

/// The weights of a [`Call`].
enum Given<'c, S: Space, T> {
    Stacked { a: Vec<View<'c, S, T>>, b: Vec<View<'c, S, T>> },
    Table(Adapters<'c, S>),
}

/// A call that an [`Operator`] is about to make. What is not said is as most calls have it.
#[must_use = "nothing is launched before `run`"]
pub struct Call<'c, B: Backend, T> {
    operator: &'c Operator<B>,
    tokens: Option<usize>,
    routing: Routing<'c, B::Space>,
    /// What was said of a routing that is found already.
    unused: Option<&'static str>,
    x: Rows<'c, B::Space, T>,
    weights: Given<'c, B::Space, T>,
    topk_weights: Option<View<'c, B::Space, f32>>,
    out: RowsMut<'c, B::Space, T>,
    offset: usize,
    order: SliceOrder,
    accumulate: bool,
}

impl<'c, B: Backend, T: Element> Call<'c, B, T> {
    /// T. Otherwise as many as `token_lora` has elements, or as the route was found for, or as `x` has rows
    /// for.
    pub fn tokens(self, tokens: usize) -> Self {
        Call { tokens: Some(tokens), ..self }
    }

    /// `[L]`: the rank in use of each slot. Otherwise the largest for all.
    pub fn ranks(mut self, ranks: impl Into<View<'c, B::Space, i32>>) -> Self {
        match &mut self.routing {
            Routing::Tokens(tensors) => tensors.ranks = Some(ranks.into()),
            Routing::Sorted(sorted) => sorted.ranks = Some(ranks.into()),
            Routing::On(_) => self.unused = Some("ranks"),
        }
        self
    }

    /// `[L]`: which slots are on in this layer. Otherwise all.
    pub fn adapter_enabled(mut self, enabled: Enabled<'c, B::Space>) -> Self {
        match &mut self.routing {
            Routing::Tokens(tensors) => tensors.adapter_enabled = enabled,
            Routing::Sorted(sorted) => sorted.adapter_enabled = enabled,
            Routing::On(_) => self.unused = Some("adapter_enabled"),
        }
        self
    }

    /// `[global experts]`: the local id of each expert, −1 where another device holds it. Otherwise ids are
    /// local.
    pub fn expert_map(mut self, map: impl Into<View<'c, B::Space, i32>>) -> Self {
        match &mut self.routing {
            Routing::Tokens(tensors) => tensors.expert_map = Some(map.into()),
            Routing::Sorted(_) | Routing::On(_) => self.unused = Some("expert_map"),
        }
        self
    }

    /// `[T, k]`: multiplies what is added for each pair. Otherwise 1.
    pub fn topk_weights(self, weights: impl Into<View<'c, B::Space, f32>>) -> Self {
        Call { topk_weights: Some(weights.into()), ..self }
    }

    /// Elements from one row of `x` to the next. Otherwise rows are packed.
    pub fn x_stride(mut self, stride: usize) -> Self {
        self.x.stride = Some(stride);
        self
    }

    /// Elements from one row of `out` to the next. Otherwise rows are packed.
    pub fn out_stride(mut self, stride: usize) -> Self {
        self.out.stride = Some(stride);
        self
    }

    /// `[P]`: the row of `x` of each pair. Otherwise rows are in the order of tokens or pairs.
    pub fn x_index(mut self, index: impl Into<View<'c, B::Space, i32>>) -> Self {
        self.x.index = Some(index.into());
        self
    }

    /// `[P]`: the row of `out` of each pair. Otherwise rows are in the order of pairs.
    pub fn out_index(mut self, index: impl Into<View<'c, B::Space, i32>>) -> Self {
        self.out.index = Some(index.into());
        self
    }

    /// Where the columns of the slices are. Otherwise one slice is behind another.
    pub fn order(self, order: SliceOrder) -> Self {
        Call { order, ..self }
    }

    /// The first column of `out` that is written. Otherwise 0.
    pub fn offset(self, offset: usize) -> Self {
        Call { offset, ..self }
    }

    /// Overwrites `out`, with zeros where a pair is inactive, in place of adding to it.
    pub fn overwrite(self) -> Self {
        Call { accumulate: false, ..self }
    }

    /// Checks the call and queues it. Returns its route, for other calls of the layer.
    ///
    /// # Errors
    /// As for [`Backend::forward`]; [`Error::PartOfRoute`] for what a call on a [`Route`] says of its
    /// routing.
    pub fn run(self) -> Result<Route> {
        let Call { operator, routing, x, weights, topk_weights, out, offset, order, accumulate, .. } = self;
        if let Some(what) = self.unused {
            return Err(Error::PartOfRoute { what });
        }
        let sizes = operator.projection.sizes();
        let tokens = self.tokens.unwrap_or(match &routing {
            Routing::Tokens(tensors) => tensors.token_lora.len(),
            Routing::On(route) => route.tokens(),
            Routing::Sorted(_) => match &x.index {
                Some(index) => index.len() / sizes.top_k,
                None => {
                    let rows = x.data.len().div_ceil(x.stride.unwrap_or(sizes.in_dim).max(1));
                    if sizes.x_rows == XRows::Pair { rows / sizes.top_k } else { rows }
                }
            },
        });
        let weights = match &weights {
            Given::Stacked { a, b } => Weights::Stacked { a, b },
            Given::Table(adapters) => Weights::Table(*adapters),
        };
        let call = Forward { tokens, routing, x, weights, topk_weights, out, offset, order, accumulate };
        operator.backend.forward(&mut operator.workspace(), &operator.projection, call)
    }
}

impl<'a, T: Pod, B: Buffer<T>> From<&'a B> for View<'a, B::Space, T> {
    fn from(buffer: &'a B) -> Self {
        buffer.view()
    }
}

impl<'a, T: Pod, B: Buffer<T>> From<&'a mut B> for ViewMut<'a, B::Space, T> {
    fn from(buffer: &'a mut B) -> Self {
        buffer.view_mut()
    }
}

impl<'a, S: Space, I, J> From<(I, J)> for Routing<'a, S>
where
    I: Into<TopkIds<'a, S>>,
    J: Into<View<'a, S, i32>>,
{
    fn from((topk_ids, token_lora): (I, J)) -> Self {
        Routing::Tokens(RoutingTensors::new(topk_ids, token_lora.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use crate::projection::ExpertWeights;
    use half::bf16;

    /// Runs on the CPU: what a call says of its routing is refused where the routing is found already.
    #[test]
    fn a_route_is_taken_as_it_was_found() {
        let sizes =
            ProjectionSizes { top_k: 1, experts: 2, slots: 1, max_rank: 1, ..ProjectionSizes::down(1, 1) };
        assert_eq!(
            (sizes.out_dims.len(), sizes.x_rows, sizes.a_experts),
            (1, XRows::Pair, ExpertWeights::PerExpert)
        );
        let [operator] = Operator::builder(&Cpu).max_tokens(2).build([sizes]).unwrap();
        let (x, w, ids, loras) = ([bf16::ONE; 2], [bf16::ONE; 2], [0, 1], [0, -1]);
        let mut out = [bf16::ZERO; 2];
        let route =
            operator.call(&x[..], [&w[..]], [&w[..]], (&ids[..], &loras[..]), &mut out[..]).run().unwrap();
        assert_eq!(out, [bf16::ONE, bf16::ZERO]);
        operator.call(&x[..], [&w[..]], [&w[..]], route, &mut out[..]).overwrite().run().unwrap();
        assert_eq!(out, [bf16::ONE, bf16::ZERO]);
        let ranks = [1];
        let refused = operator.call(&x[..], [&w[..]], [&w[..]], route, &mut out[..]).ranks(&ranks[..]).run();
        assert_eq!(refused, Err(Error::PartOfRoute { what: "ranks" }));
    }
}
