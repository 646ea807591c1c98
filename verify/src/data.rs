use crate::case::{Case, Form, IdsKind};
use crate::draw::{self, Normals};
use crate::own::OwnWeights;
use crate::tensor::{Tensor, poison};
use moe_lora::call::{Enabled, Expand, Factor, Forward, RoutingTensors, Shrink, TopkIds, Weights};
use moe_lora::dtype::Element;
use moe_lora::error::Result;
use moe_lora::projection::{Projection, XRows};
use moe_lora::reference::{self, Target};
use moe_lora::table::Adapters;
use moe_lora::tensor::{Host, Rows, RowsMut, Space, View, ViewMut};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use rayon::prelude::*;

/// Old values of `out` are this much smaller than what is added to them.
///
/// Rounding the sum to 16 bits is part of the error that is measured over the delta; so small, the
/// old values add only 3% to it, and the tolerance means what it means when overwriting.
const OLD_OUT: f32 = 0.25;

/// The guards and padding of `out` when accumulating: adding to a NaN would not show.
const UNADDED: f32 = 1.0 / 1024.0;

/// Rows of `x` and of `out` that there are beside those that a call needs, where an index names them.
const SPARE_ROWS: usize = 3;

/// `adapter_enabled`.
#[derive(Clone, Debug)]
pub(crate) enum FlagTensor {
    All,
    U8(Tensor<u8>),
    I32(Tensor<i32>),
}

/// All tensors of a [`Case`], generated from its seed.
///
/// `x` is normal(0, 1); `a` and `b` are scaled by 1/√K and 1/√rank, so deltas have about unit
/// variance (times the router weight and the scaling, when there are any). Whatever a call has no business to
/// read is NaN: rows of `a` and columns of `b` above the rank in use, the weights of segments without a pair,
/// activations and router weights of inactive pairs, the padding of rows, the guards. So is `out` when it is
/// overwritten.
#[derive(Clone, Debug)]
pub struct CaseData<T> {
    /// `[T, k]`, of 32 bits whatever the call's are.
    pub topk_ids: Tensor<i32>,
    /// The same of 64 bits, and ids that 32 bits do not hold, when the call's are.
    pub(crate) wide_ids: Option<Tensor<i64>>,
    /// `[T]`, and what follows.
    pub token_lora: Tensor<i32>,
    pub(crate) enabled: FlagTensor,
    pub(crate) ranks: Option<Tensor<i32>>,
    pub(crate) expert_map: Option<Tensor<i32>>,
    /// The slots that a route in vLLM's form lists, when the case has one.
    pub(crate) lora_ids: Option<Tensor<i32>>,
    /// `[T or P, K]`, rows apart by the stride; some more where an index names them.
    pub x: Tensor<T>,
    pub(crate) x_index: Option<Tensor<i32>>,
    /// S of `[L, E or 1, R, K]`; none where weights are named by address.
    pub a: Vec<Tensor<T>>,
    /// S of `[L, E or 1, N_s, R]`; none where weights are named by address.
    pub b: Vec<Tensor<T>>,
    /// The weights of each slot and slice, where they are named by address.
    pub(crate) own: Option<OwnWeights<T>>,
    /// `[T, k]`, when deltas are multiplied by them.
    pub topk_weights: Option<Tensor<f32>>,
    pub(crate) h: Tensor<T>,
    pub(crate) out: Tensor<T>,
    pub(crate) out_index: Option<Tensor<i32>>,
    has_ids: bool,
}

impl<T: Element> CaseData<T> {
    /// Generates the tensors of `case` for a back end whose ranks lie in space `S`.
    ///
    /// # Errors
    /// As [`moe_lora::Projection::new`] and [`moe_lora::Projection::pairs`], when there is no such call.
    pub fn new<S: Space>(case: &Case) -> Result<Self> {
        let projection = case.projection()?;
        let pairs = projection.pairs(case.tokens)?;
        let rng = &mut StdRng::seed_from_u64(case.seed);
        let normals = Normals::new(rng);
        let odd = case.misaligned;

        let ranks = draw::rank_values::<S>(case, rng);
        let topk_weights: Option<Vec<f32>> = case
            .routed_weight
            .then(|| (0..pairs).map(|_| rng.random_range(0.25..1.0) / case.top_k as f32).collect());
        let topk_ids = draw::expert_ids(case, rng);
        let ids = |name, ids: Vec<i32>| Tensor::new(name, &ids, odd);
        let mut data = CaseData {
            wide_ids: (case.ids == IdsKind::I64)
                .then(|| Tensor::new("topk_ids", &draw::wide_ids(case, &topk_ids), odd)),
            topk_ids: ids("topk_ids", topk_ids),
            token_lora: ids("token_lora", draw::lora_slots(case, rng)),
            enabled: draw::flags(case, rng),
            ranks: ranks.map(|ranks| Tensor::new("ranks", &ranks, odd)),
            expert_map: draw::expert_map(case, rng).map(|map| ids("expert_map", map)),
            lora_ids: case.block_size.map(|_| ids("lora_ids", draw::listed_slots(case))),
            x: Tensor::poisoned("x", [0; 3], odd),
            x_index: None,
            a: Vec::new(),
            b: Vec::new(),
            own: None,
            topk_weights: topk_weights.map(|weights| Tensor::new("topk_weights", &weights, odd)),
            h: Tensor::poisoned("h", [case.out_dims.len() * pairs, case.max_rank, case.max_rank], odd),
            out: Tensor::poisoned("out", [0; 3], odd),
            out_index: None,
            has_ids: case.ids != IdsKind::None,
        };
        data.make_x(case, &projection, &normals, rng.next_u64())?;
        data.make_out(case, pairs, &normals, rng);
        let targets = reference::targets(&projection, case.tokens, &data.routing())?;
        if case.table {
            data.own = Some(OwnWeights::new(case, &targets, &normals, rng));
        } else {
            for &out_dim in case.out_dims.as_slice() {
                data.a.push(draw::weights_a(case, &targets, &normals, rng.next_u64()));
                data.b.push(draw::weights_b(case, out_dim, &targets, &normals, rng.next_u64()));
            }
        }
        data.poison_inactive(case, &targets);
        Ok(data)
    }

    fn make_x(&mut self, case: &Case, projection: &Projection, normals: &Normals, seed: u64) -> Result<()> {
        let needed = projection.x_rows(case.tokens)?;
        let rows = draw::index(case, case.x_index, needed + SPARE_ROWS, b'x').map(|mut places| {
            let pairs_a_row = pairs_a_row(case);
            let pairs = case.tokens * case.top_k;
            let mut index: Vec<i32> = (0..pairs).map(|pair| places.row(pair / pairs_a_row)).collect();
            // Pairs may share a row.
            places.repeat(&mut index);
            places.spoil(&mut index);
            self.x_index = Some(Tensor::new("x_index", &index, case.misaligned));
            needed + SPARE_ROWS
        });
        let shape = [rows.unwrap_or(needed), case.x_stride(), case.in_dim];
        self.x = Tensor::poisoned("x", shape, case.misaligned);
        let x_rows = self.x.elements_mut().par_chunks_mut(case.x_stride()).enumerate();
        x_rows.for_each(|(i, row)| normals.fill(&mut row[..case.in_dim], 1.0, seed ^ i as u64));
        Ok(())
    }

    fn make_out(&mut self, case: &Case, pairs: usize, normals: &Normals, rng: &mut StdRng) {
        let rows = draw::index(case, case.out_index, pairs + SPARE_ROWS, b'o').map(|mut places| {
            let mut index: Vec<i32> = (0..pairs).map(|pair| places.row(pair)).collect();
            places.spoil(&mut index);
            self.out_index = Some(Tensor::new("out_index", &index, case.misaligned));
            pairs + SPARE_ROWS
        });
        let fill = if case.accumulate { T::from_f32(UNADDED) } else { poison() };
        let shape = [rows.unwrap_or(pairs), case.out_stride(), case.out_width()];
        self.out = Tensor::filled("out", shape, fill, case.misaligned);
        if !case.accumulate {
            return;
        }
        let (seed, pair_of_row) = (rng.next_u64(), self.pair_of_row());
        let weights = self.topk_weights.as_ref().map(Tensor::elements);
        let out_rows = self.out.elements_mut().par_chunks_mut(case.out_stride()).zip(pair_of_row).enumerate();
        out_rows.for_each(|(row, (values, pair))| {
            let weight = pair.zip(weights).map_or(1.0, |(pair, weights)| weights[pair]);
            normals.fill(&mut values[case.offset..case.out_width()], OLD_OUT * weight, seed ^ row as u64);
        });
    }

    /// The pair of each row of `out`, where it has one.
    pub(crate) fn pair_of_row(&self) -> Vec<Option<usize>> {
        let rows = self.out.rows();
        let Some(index) = &self.out_index else { return (0..rows).map(Some).collect() };
        let mut pairs = vec![None; rows];
        for (pair, &row) in index.elements().iter().enumerate() {
            if let Some(of_row) = usize::try_from(row).ok().and_then(|row| pairs.get_mut(row)) {
                *of_row = Some(pair);
            }
        }
        pairs
    }

    /// The row of `x` of a pair, when it has one.
    fn x_row(&self, case: &Case, pair: usize) -> Option<usize> {
        match &self.x_index {
            None => Some(pair / pairs_a_row(case)),
            Some(index) => usize::try_from(index.elements()[pair]).ok().filter(|&row| row < self.x.rows()),
        }
    }

    /// Makes NaN of the router weights of inactive pairs, and of rows of `x` that no active pair has.
    fn poison_inactive(&mut self, case: &Case, targets: &[Option<Target>]) {
        let row = |pair: usize| targets[pair].and_then(|_| self.x_row(case, pair));
        let rows: Vec<_> = (0..targets.len()).map(row).collect();
        if let Some(weights) = &mut self.topk_weights {
            // The second half alone does not know which pairs have a row of `x`.
            let is_read = |pair: usize| match case.form {
                Form::Forward => rows[pair].is_some(),
                Form::Split => targets[pair].is_some(),
            };
            let pairs = weights.elements_mut().iter_mut().enumerate();
            pairs.filter(|(pair, _)| !is_read(*pair)).for_each(|(_, weight)| *weight = poison());
        }
        let mut used = vec![false; self.x.rows()];
        rows.into_iter().flatten().for_each(|row| used[row] = true);
        let x_rows = self.x.elements_mut().chunks_mut(case.x_stride()).zip(used);
        x_rows.filter(|(_, used)| !used).for_each(|(row, _)| row.fill(poison()));
    }

    pub(crate) fn routing(&self) -> RoutingTensors<'_, Host> {
        RoutingTensors {
            topk_ids: match &self.wide_ids {
                _ if !self.has_ids => TopkIds::None,
                Some(ids) => TopkIds::I64(ids.view()),
                None => TopkIds::I32(self.topk_ids.view()),
            },
            token_lora: self.token_lora.view(),
            adapter_enabled: match &self.enabled {
                FlagTensor::All => Enabled::All,
                FlagTensor::U8(flags) => Enabled::U8(flags.view()),
                FlagTensor::I32(flags) => Enabled::I32(flags.view()),
            },
            ranks: self.ranks.as_ref().map(Tensor::view),
            expert_map: self.expert_map.as_ref().map(Tensor::view),
        }
    }

    /// Whether the call has `topk_ids`.
    pub(crate) fn has_ids(&self) -> bool {
        self.has_ids
    }

    /// The inputs, on the host; `adapters` are those of a case with weights by address.
    pub fn operands<'a>(&'a self, adapters: Option<Adapters<'a, Host>>) -> Operands<'a, Host, T> {
        Operands {
            routing: self.routing(),
            x: self.x.view(),
            x_index: self.x_index.as_ref().map(Tensor::view),
            a: self.a.iter().map(Tensor::view).collect(),
            b: self.b.iter().map(Tensor::view).collect(),
            adapters,
            topk_weights: self.topk_weights.as_ref().map(Tensor::view),
            out_index: self.out_index.as_ref().map(Tensor::view),
        }
    }
}

/// Pairs that share a row of `x`, where no index says so.
fn pairs_a_row(case: &Case) -> usize {
    match case.x_rows {
        XRows::Token => case.top_k,
        XRows::Pair => 1,
    }
}

/// The inputs of a case's calls, in some space.
#[derive(Clone, Debug)]
pub struct Operands<'a, S: Space, T> {
    /// Who goes where.
    pub routing: RoutingTensors<'a, S>,
    /// `x`, with the case's row stride.
    pub x: View<'a, S, T>,
    /// The row of `x` of each pair, when the case has an index.
    pub x_index: Option<View<'a, S, i32>>,
    /// S tensors; none where weights are named by address.
    pub a: Vec<View<'a, S, T>>,
    /// S tensors; none where weights are named by address.
    pub b: Vec<View<'a, S, T>>,
    /// Weights by address.
    pub adapters: Option<Adapters<'a, S>>,
    /// Router weights, when the case has them.
    pub topk_weights: Option<View<'a, S, f32>>,
    /// The row of `out` of each pair, when the case has an index.
    pub out_index: Option<View<'a, S, i32>>,
}

impl<S: Space, T: Element> Operands<'_, S, T> {
    /// The whole call, on the operands' own routing.
    pub fn forward<'c>(&'c self, case: &Case, out: ViewMut<'c, S, T>) -> Forward<'c, S, T> {
        Forward {
            tokens: case.tokens,
            routing: self.routing.into(),
            x: self.x_rows(case),
            weights: match self.adapters {
                Some(adapters) => Weights::Table(adapters),
                None => Weights::Stacked { a: &self.a, b: &self.b },
            },
            topk_weights: self.topk_weights,
            out: self.out_rows(case, out),
            offset: case.offset,
            order: case.order,
            accumulate: case.accumulate,
        }
    }

    /// The first half of the call.
    pub fn shrink<'c>(&'c self, case: &Case, h: ViewMut<'c, S, T>) -> Shrink<'c, S, T> {
        Shrink {
            tokens: case.tokens,
            routing: self.routing.into(),
            x: self.x_rows(case),
            a: self.adapters.map_or(Factor::Stacked(&self.a), Factor::Table),
            h,
        }
    }

    /// The second half of the call.
    pub fn expand<'c>(&'c self, case: &Case, h: View<'c, S, T>, out: ViewMut<'c, S, T>) -> Expand<'c, S, T> {
        Expand {
            tokens: case.tokens,
            routing: self.routing.into(),
            h,
            b: self.adapters.map_or(Factor::Stacked(&self.b), Factor::Table),
            topk_weights: self.topk_weights,
            out: self.out_rows(case, out),
            offset: case.offset,
            order: case.order,
            accumulate: case.accumulate,
        }
    }

    fn x_rows(&self, case: &Case) -> Rows<'_, S, T> {
        Rows { data: self.x, stride: Some(case.x_stride()), index: self.x_index }
    }

    fn out_rows<'c>(&'c self, case: &Case, data: ViewMut<'c, S, T>) -> RowsMut<'c, S, T> {
        RowsMut { data, stride: Some(case.out_stride()), index: self.out_index }
    }
}
