//! The tensors and modes of one call, and the checks that every back end makes before it starts.
//!
//! Names, shapes and types are those of the operator's contract; see the crate's front page.

use crate::blocks::SortedTensors;
use crate::check::{RowsLayout, check_extent, check_indexed, check_view};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::projection::{Projection, XRows, elements};
use crate::route::Route;
use crate::routing::check_tokens;
pub use crate::routing::{Enabled, RoutingTensors, TopkIds};
use crate::tensor::{Rows, RowsMut, Space, View, ViewMut};
pub use crate::weights::{Factor, SliceOrder, Weights};

/// Where a call's segments come from.
#[derive(Clone, Copy, Debug)]
pub enum Routing<'a, S: Space> {
    /// Found by this call.
    Tokens(RoutingTensors<'a, S>),
    /// Found elsewhere, in the form of vLLM's `moe_lora_align_block_size`. Pairs that it does not name are no
    /// part of the call: their rows stay as they are.
    Sorted(SortedTensors<'a, S>),
    /// Found by an earlier call on this workspace, or by [`Backend::route`](crate::Backend::route).
    On(Route),
}

impl<'a, S: Space> From<RoutingTensors<'a, S>> for Routing<'a, S> {
    fn from(tensors: RoutingTensors<'a, S>) -> Self {
        Routing::Tokens(tensors)
    }
}

impl<'a, S: Space> From<SortedTensors<'a, S>> for Routing<'a, S> {
    fn from(sorted: SortedTensors<'a, S>) -> Self {
        Routing::Sorted(sorted)
    }
}

impl<S: Space> From<Route> for Routing<'_, S> {
    fn from(route: Route) -> Self {
        Routing::On(route)
    }
}

/// A whole call: `out` (+)= routed weight · b · (a · x), for every active pair.
#[derive(Debug)]
pub struct Forward<'a, S: Space, T> {
    /// T; 0 is legal and does nothing.
    pub tokens: usize,
    /// Who goes where.
    pub routing: Routing<'a, S>,
    /// `[T, K]` or `[P, K]`, as the projection's `x_rows` says; any number of rows with an index.
    pub x: Rows<'a, S, T>,
    /// `a` and `b`.
    pub weights: Weights<'a, S, T>,
    /// `[T, k]`: multiplies each pair's delta; `None` for 1 (`mul_routed_weight` off).
    pub topk_weights: Option<View<'a, S, f32>>,
    /// `[T, k, ≥ offset + Σ N_s]`; any number of rows with an index.
    pub out: RowsMut<'a, S, T>,
    /// First column of `out` that this call writes.
    pub offset: usize,
    /// Where the columns of the slices are, from there on.
    pub order: SliceOrder,
    /// True: add to `out`. False: overwrite, with zeros where a pair is inactive (but see
    /// [`Routing::Sorted`]): then `out` is the delta alone, and adding it to what another kernel has made
    /// gives what adding in place does.
    pub accumulate: bool,
}

/// The first half of a call: `h = a · x`, zero for inactive pairs and above a slot's rank.
#[derive(Debug)]
pub struct Shrink<'a, S: Space, T> {
    /// T; 0 is legal and does nothing.
    pub tokens: usize,
    /// Who goes where.
    pub routing: Routing<'a, S>,
    /// `[T, K]` or `[P, K]`, as the projection's `x_rows` says; any number of rows with an index.
    pub x: Rows<'a, S, T>,
    /// The weights.
    pub a: Factor<'a, S, T>,
    /// `[S, P, R]`, written whole, except on a [`Routing::Sorted`]: then the rows of pairs that it names.
    pub h: ViewMut<'a, S, T>,
}

/// The second half of a call: `out` (+)= routed weight · b · h.
#[derive(Debug)]
pub struct Expand<'a, S: Space, T> {
    /// T; 0 is legal and does nothing.
    pub tokens: usize,
    /// Who goes where.
    pub routing: Routing<'a, S>,
    /// `[S, P, R]`, as [`Shrink`] leaves it.
    pub h: View<'a, S, T>,
    /// The weights.
    pub b: Factor<'a, S, T>,
    /// `[T, k]`: multiplies each pair's delta; `None` for 1.
    pub topk_weights: Option<View<'a, S, f32>>,
    /// `[T, k, ≥ offset + Σ N_s]`; any number of rows with an index.
    pub out: RowsMut<'a, S, T>,
    /// First column of `out` that this call writes.
    pub offset: usize,
    /// Where the columns of the slices are, from there on.
    pub order: SliceOrder,
    /// True: add to `out`. False: overwrite, with zeros where a pair is inactive (but see
    /// [`Routing::Sorted`]): then `out` is the delta alone, and adding it to what another kernel has made
    /// gives what adding in place does.
    pub accumulate: bool,
}

/// What a checked call adds to its projection: everything that a plan depends on beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Layout {
    /// T.
    pub tokens: usize,
    /// Elements from one row of `x` to the next.
    pub x_stride: usize,
    /// Rows of `x`: T or P or, with an index, as many as its memory holds.
    pub x_rows: usize,
    /// Whether an index names the rows of `x`.
    pub x_indexed: bool,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
    /// Rows of `out`: P or, with an index, as many as its memory holds.
    pub out_rows: usize,
    /// Whether an index names the rows of `out`.
    pub out_indexed: bool,
    /// First column of `out` that the call writes.
    pub offset: usize,
    /// Where the columns of the slices are, from there on.
    pub order: SliceOrder,
    /// Whether weights are named by address.
    pub table: bool,
    /// True when every 16-bit tensor of the call's own starts on a 16-byte boundary. What a table names does
    /// always.
    pub aligned: bool,
    /// True when the call's own routing names ranks of the slots' own, which may be smaller than the rank
    /// that weights are allocated for.
    pub ranked: bool,
}

impl Layout {
    /// Of a whole call of the plainest kind: rows are packed and in order, and all is aligned.
    pub fn packed(projection: &Projection, tokens: usize) -> Self {
        let sizes = projection.sizes();
        let pairs = tokens.saturating_mul(sizes.top_k);
        Layout {
            tokens,
            x_stride: sizes.in_dim,
            x_rows: if sizes.x_rows == XRows::Pair { pairs } else { tokens },
            out_stride: projection.out_width(),
            out_rows: pairs,
            aligned: true,
            ..Layout::default()
        }
    }
}

fn check_dtype<T: Element>(projection: &Projection, tensor: &'static str) -> Result<()> {
    let expected = projection.sizes().dtype;
    if T::DTYPE != expected {
        return Err(Error::DTypeMismatch { tensor, expected, got: T::DTYPE });
    }
    Ok(())
}

/// Bytes of the vector accesses of the fast kernels.
const VECTOR_BYTES: u64 = 16;

fn all_aligned(addresses: impl IntoIterator<Item = u64>) -> bool {
    addresses.into_iter().all(|address| address.is_multiple_of(VECTOR_BYTES))
}

impl<S: Space> Routing<'_, S> {
    fn check(&self, projection: &Projection, tokens: usize) -> Result<()> {
        match self {
            Routing::Tokens(tensors) => tensors.check(projection, tokens),
            Routing::Sorted(sorted) => sorted.check(projection),
            // Whether the workspace holds it is for the workspace to say.
            Routing::On(_) => Ok(()),
        }
    }

    /// Whether it names ranks of the slots' own.
    pub(crate) fn is_ranked(&self) -> bool {
        match self {
            Routing::Tokens(tensors) => tensors.ranks.is_some(),
            Routing::Sorted(sorted) => sorted.ranks.is_some(),
            Routing::On(_) => false,
        }
    }
}

fn check_x<S: Space, T: Element>(
    projection: &Projection,
    x: &Rows<'_, S, T>,
    tokens: usize,
) -> Result<RowsLayout> {
    let extent = (x.data.address(), align_of::<T>(), x.data.len());
    let rows = [projection.x_rows(tokens)?, projection.pairs(tokens)?, projection.sizes().in_dim];
    check_indexed(["x", "x_index"], extent, (x.stride, &x.index), rows)
}

fn check_out<S: Space, T: Element>(
    projection: &Projection,
    out: &RowsMut<'_, S, T>,
    (offset, order): (usize, SliceOrder),
    pairs: usize,
) -> Result<RowsLayout> {
    order.check(&projection.sizes().out_dims)?;
    let width = projection
        .out_width()
        .checked_add(offset)
        .ok_or_else(|| Error::SizeOverflow { tensor: "out", shape: format!("[.., {offset} + Σ N_s]") })?;
    let extent = (out.data.address(), align_of::<T>(), out.data.len());
    check_indexed(["out", "out_index"], extent, (out.stride, &out.index), [pairs, pairs, width])
}

fn check_weights<S: Space>(
    projection: &Projection,
    topk_weights: &Option<View<'_, S, f32>>,
    tokens: usize,
) -> Result<()> {
    match topk_weights {
        Some(weights) => check_view("topk_weights", weights, &[tokens, projection.sizes().top_k]),
        None => Ok(()),
    }
}

fn check_h(projection: &Projection, (address, len): (u64, usize), pairs: usize) -> Result<()> {
    let s = projection.sizes();
    let shape = [projection.slices(), pairs, s.max_rank];
    check_extent("h", address, 2, len, elements("h", &shape)?, || format!("{shape:?}"))
}

impl<S: Space, T: Element> Forward<'_, S, T> {
    /// Checks everything that can be known without reading device memory.
    ///
    /// # Errors
    /// One [`Error`] variant for each rule, naming the tensor, what was expected and what came.
    pub fn check(&self, projection: &Projection) -> Result<Layout> {
        check_dtype::<T>(projection, "x")?;
        let pairs = check_tokens(projection, self.tokens)?;
        self.routing.check(projection, self.tokens)?;
        let x = check_x(projection, &self.x, self.tokens)?;
        let (a, b) = (self.weights.a(), self.weights.b());
        a.check_a(projection)?;
        b.check_b(projection)?;
        check_weights(projection, &self.topk_weights, self.tokens)?;
        let out = check_out(projection, &self.out, (self.offset, self.order), pairs)?;
        let weights = a.stacked().iter().chain(b.stacked()).map(View::address);
        let aligned = all_aligned(weights.chain([self.x.data.address(), self.out.data.address()]));
        Ok(Layout {
            offset: self.offset,
            order: self.order,
            table: self.weights.is_table(),
            aligned,
            ranked: self.routing.is_ranked(),
            ..layout(self.tokens, x, out)
        })
    }
}

impl<S: Space, T: Element> Shrink<'_, S, T> {
    /// Checks everything that can be known without reading device memory.
    ///
    /// # Errors
    /// As for [`Forward::check`].
    pub fn check(&self, projection: &Projection) -> Result<Layout> {
        check_dtype::<T>(projection, "x")?;
        let pairs = check_tokens(projection, self.tokens)?;
        self.routing.check(projection, self.tokens)?;
        let x = check_x(projection, &self.x, self.tokens)?;
        self.a.check_a(projection)?;
        check_h(projection, (self.h.address(), self.h.len()), pairs)?;
        let addresses = self.a.stacked().iter().map(View::address);
        let aligned = all_aligned(addresses.chain([self.x.data.address(), self.h.address()]));
        Ok(Layout {
            table: self.a.is_table(),
            aligned,
            ranked: self.routing.is_ranked(),
            ..layout(self.tokens, x, RowsLayout::default())
        })
    }
}

impl<S: Space, T: Element> Expand<'_, S, T> {
    /// Checks everything that can be known without reading device memory.
    ///
    /// # Errors
    /// As for [`Forward::check`].
    pub fn check(&self, projection: &Projection) -> Result<Layout> {
        check_dtype::<T>(projection, "h")?;
        let pairs = check_tokens(projection, self.tokens)?;
        self.routing.check(projection, self.tokens)?;
        check_h(projection, (self.h.address(), self.h.len()), pairs)?;
        self.b.check_b(projection)?;
        check_weights(projection, &self.topk_weights, self.tokens)?;
        let out = check_out(projection, &self.out, (self.offset, self.order), pairs)?;
        let addresses = self.b.stacked().iter().map(View::address);
        let aligned = all_aligned(addresses.chain([self.h.address(), self.out.data.address()]));
        Ok(Layout {
            offset: self.offset,
            order: self.order,
            table: self.b.is_table(),
            aligned,
            ranked: self.routing.is_ranked(),
            ..layout(self.tokens, RowsLayout::default(), out)
        })
    }
}

/// The rows of a call.
fn layout(tokens: usize, x: RowsLayout, out: RowsLayout) -> Layout {
    Layout {
        tokens,
        x_stride: x.stride,
        x_rows: x.rows,
        x_indexed: x.indexed,
        out_stride: out.stride,
        out_rows: out.rows,
        out_indexed: out.indexed,
        ..Layout::default()
    }
}
