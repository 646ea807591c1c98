//! The weights of a call, and where the columns of its slices are.

use crate::check::check_view;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::out_dims::OutDims;
use crate::projection::Projection;
use crate::table::Adapters;
use crate::tensor::{Space, View};
use bytemuck::Pod;
use serde::{Deserialize, Serialize};

/// `a` and `b` of a whole call.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a, S: Space, T> {
    /// All slots in one allocation a slice.
    Stacked {
        /// S tensors `[L, E or 1, R, K]`.
        a: &'a [View<'a, S, T>],
        /// S tensors `[L, E or 1, N_s, R]`.
        b: &'a [View<'a, S, T>],
    },
    /// Allocations of each slot's own, by their addresses.
    Table(Adapters<'a, S>),
}

/// `a` of a [`Shrink`](crate::Shrink), or `b` of an [`Expand`](crate::Expand).
#[derive(Clone, Copy, Debug)]
pub enum Factor<'a, S: Space, T> {
    /// All slots in one allocation a slice: S tensors `[L, E or 1, R, K]` of `a`, `[L, E or 1, N_s, R]` of
    /// `b`.
    Stacked(&'a [View<'a, S, T>]),
    /// Allocations of each slot's own, by their addresses.
    Table(Adapters<'a, S>),
}

impl<'a, S: Space, T> Weights<'a, S, T> {
    /// The first factor.
    pub fn a(&self) -> Factor<'a, S, T> {
        match *self {
            Weights::Stacked { a, .. } => Factor::Stacked(a),
            Weights::Table(adapters) => Factor::Table(adapters),
        }
    }

    /// The second factor.
    pub fn b(&self) -> Factor<'a, S, T> {
        match *self {
            Weights::Stacked { b, .. } => Factor::Stacked(b),
            Weights::Table(adapters) => Factor::Table(adapters),
        }
    }

    /// Whether they are named by address.
    pub fn is_table(&self) -> bool {
        matches!(self, Weights::Table(_))
    }
}

impl<'a, S: Space, T: Pod> Factor<'a, S, T> {
    /// The stacked tensors; none where weights are named by address.
    pub fn stacked(&self) -> &'a [View<'a, S, T>] {
        match *self {
            Factor::Stacked(slices) => slices,
            Factor::Table(_) => &[],
        }
    }

    /// Whether the weights are named by address.
    pub fn is_table(&self) -> bool {
        matches!(self, Factor::Table(_))
    }

    /// Refuses what is no `a` of the projection.
    pub(crate) fn check_a(&self, projection: &Projection) -> Result<()>
    where
        T: Element,
    {
        let s = projection.sizes();
        self.check("a", projection, |_| [s.slots, projection.a_experts(), s.max_rank, s.in_dim])
    }

    /// Refuses what is no `b` of the projection.
    pub(crate) fn check_b(&self, projection: &Projection) -> Result<()>
    where
        T: Element,
    {
        let s = projection.sizes();
        self.check("b", projection, |slice| {
            [s.slots, projection.b_experts(), s.out_dims.get(slice), s.max_rank]
        })
    }

    fn check(
        &self,
        tensor: &'static str,
        projection: &Projection,
        shape: impl Fn(usize) -> [usize; 4],
    ) -> Result<()> {
        let slices = match self {
            Factor::Stacked(slices) => slices,
            Factor::Table(adapters) => return adapters.check(projection),
        };
        let expected = projection.slices();
        if slices.len() != expected {
            return Err(Error::SliceCount { tensor, expected, got: slices.len() });
        }
        slices.iter().enumerate().try_for_each(|(s, slice)| check_view(tensor, slice, &shape(s)))
    }
}

impl<'a, S: Space, T> From<&'a [View<'a, S, T>]> for Factor<'a, S, T> {
    fn from(slices: &'a [View<'a, S, T>]) -> Self {
        Factor::Stacked(slices)
    }
}

impl<'a, S: Space, T> From<Adapters<'a, S>> for Factor<'a, S, T> {
    fn from(adapters: Adapters<'a, S>) -> Self {
        Factor::Table(adapters)
    }
}

impl<'a, S: Space, T> From<Adapters<'a, S>> for Weights<'a, S, T> {
    fn from(adapters: Adapters<'a, S>) -> Self {
        Weights::Table(adapters)
    }
}

/// Where the columns of the slices are in a row of `out`, from the call's offset on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SliceOrder {
    /// One slice behind another: slice s begins at Σ_{i<s} N_i.
    #[default]
    InOrder,
    /// The same from the last slice to the first: up before gate.
    Reversed,
    /// Column by column: column n of slice s is at S·n + s. All slices have one width.
    Interleaved,
}

impl SliceOrder {
    /// The place of the first column of slice `s`.
    pub fn first_column(self, out_dims: &OutDims, s: usize) -> usize {
        match self {
            SliceOrder::InOrder => out_dims.first_column(s),
            SliceOrder::Reversed => out_dims.total() - out_dims.first_column(s + 1),
            SliceOrder::Interleaved => s,
        }
    }

    /// From one column of a slice to its next.
    pub fn column_step(self, out_dims: &OutDims) -> usize {
        match self {
            SliceOrder::InOrder | SliceOrder::Reversed => 1,
            SliceOrder::Interleaved => out_dims.len(),
        }
    }

    /// Checks that slices of these widths can be in this order.
    ///
    /// # Errors
    /// [`Error::UnequalSlices`] when slices of several widths are to be interleaved.
    pub fn check(self, out_dims: &OutDims) -> Result<()> {
        if self == SliceOrder::Interleaved && !out_dims.is_uniform() {
            return Err(Error::UnequalSlices { out_dims: out_dims.to_string() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_order_has_every_column_once() {
        let orders = [SliceOrder::InOrder, SliceOrder::Reversed, SliceOrder::Interleaved];
        let widths = [&[3, 3, 3][..], &[4, 1, 2], &[5]];
        for (order, widths) in orders.into_iter().flat_map(|order| widths.map(|widths| (order, widths))) {
            let dims = OutDims::new(widths).unwrap();
            if order.check(&dims).is_err() {
                assert!(order == SliceOrder::Interleaved && !dims.is_uniform());
                continue;
            }
            let columns = |s| {
                let (first, step) = (order.first_column(&dims, s), order.column_step(&dims));
                (0..dims.get(s)).map(move |n| first + n * step)
            };
            let mut all: Vec<_> = (0..dims.len()).flat_map(columns).collect();
            all.sort_unstable();
            assert_eq!(all, (0..dims.total()).collect::<Vec<_>>(), "{order:?} {dims:?}");
        }
    }

    #[test]
    fn up_may_come_before_gate() {
        let dims = OutDims::new(&[4, 1, 2]).unwrap();
        assert_eq!([0, 1, 2].map(|s| SliceOrder::Reversed.first_column(&dims, s)), [3, 2, 0]);
    }
}
