use crate::blocks::{Blank, Blocks};
use crate::case::{Case, Form};
use crate::data::CaseData;
use crate::fault::{Failure, Fault, Outcome};
use crate::own::PlacedTable;
use crate::placed::{Outputs, Uploaded, Written, check_guards, check_same, check_unchanged};
use crate::tensor::Tensor;
use half::{bf16, f16};
use moe_lora::backend::Backend;
use moe_lora::call::{Expand, Forward, Routing, Shrink};
use moe_lora::cpu::Cpu;
use moe_lora::dtype::{DType, Element};
use moe_lora::projection::Projection;
use moe_lora::reference::{self, Expected, Target};
use moe_lora::route::Route;
use std::hash::{DefaultHasher, Hash, Hasher};

/// One element may be off by this many times the tolerance, of its own size plus that of others like it: the
/// deviation that deltas have by construction, or the mean size of its row's, whichever is larger. It is far
/// above what rounding `h` and `out` can do, and far below the effect of one wrong operand.
const ELEMENT_SLACK: f64 = 10.0;

/// The tolerance bounds a mean over many roundings. Fewer roundings of `h`, or of `out`, than this
/// are only checked one by one, as a single rounding to bf16 may be off by 4e-3.
const MEASURED_ROUNDINGS: usize = 1024;

/// How often a case's calls are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runs {
    /// On the case's own routing and, where it has one, on the route in blocks: once each.
    Once,
    /// Some ten times: on used memory too, on routes that were kept or made alone, one behind another. Equal
    /// calls must give equal bits.
    Repeated,
}

/// Checks `case` on `backend`, with its calls repeated.
///
/// # Errors
/// The first [`Fault`] found, with the case and the command that runs it again.
pub fn check<B: Backend>(backend: &B, case: &Case) -> Result<Outcome, Box<Failure>> {
    check_each([backend], case).map(|outcomes| outcomes[0])
}

/// Checks `case` on several back ends, say on all variants of one, and computes what is expected only once.
///
/// # Errors
/// As [`check`], for the first back end that does not pass.
pub fn check_each<'b, B: Backend + 'b>(
    backends: impl IntoIterator<Item = &'b B>,
    case: &Case,
) -> Result<Vec<Outcome>, Box<Failure>> {
    check_runs(backends.into_iter().map(|backend| (backend, Runs::Repeated)), case)
}

/// As [`check_each`], where each back end makes the case's calls as often as it is said to.
///
/// # Errors
/// As [`check`], for the first back end that does not pass.
pub fn check_runs<'b, B: Backend + 'b>(
    backends: impl IntoIterator<Item = (&'b B, Runs)>,
    case: &Case,
) -> Result<Vec<Outcome>, Box<Failure>> {
    match case.dtype {
        DType::Bf16 => check_typed::<B, bf16>(backends, case),
        DType::F16 => check_typed::<B, f16>(backends, case),
    }
}

fn check_typed<'b, B: Backend + 'b, T: Element>(
    backends: impl IntoIterator<Item = (&'b B, Runs)>,
    case: &Case,
) -> Result<Vec<Outcome>, Box<Failure>> {
    let failure =
        |backend: &str, fault| Box::new(Failure { backend: backend.to_owned(), case: case.clone(), fault });
    let data = CaseData::<T>::new::<B::Space>(case).map_err(|error| failure("case", error.into()))?;
    let trial = Trial::new(case, &data).map_err(|error| failure("reference", error.into()))?;
    let outcome = |(backend, runs): (&'b B, Runs)| {
        trial.run(backend, runs).map_err(|fault| failure(&backend.variant(), fault))
    };
    backends.into_iter().map(outcome).collect()
}

/// A case with its tensors and what must come of them.
struct Trial<'d, T> {
    case: &'d Case,
    projection: Projection,
    data: &'d CaseData<T>,
    /// Where the routing leads each pair, whether or not it has a row of `x`.
    routed: Vec<Option<Target>>,
    /// What is added to `out`.
    delta: Expected,
    /// What `h` becomes, in the split form.
    h: Option<Expected>,
    /// The route in vLLM's form, when the case has one.
    blank: Option<Blank<'d>>,
}

/// Which form of a route a call was made on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Named {
    /// It names all pairs.
    All,
    /// It names the pairs in blocks; others are no part of the call.
    InBlocks,
}

/// What becomes of a pair.
#[derive(Clone, Copy)]
enum Fate {
    /// It is no part of the call: its rows stay as they are.
    LeftAlone,
    /// Nothing is added for it, and zeros are written where a call overwrites.
    Inactive,
    /// Its delta is added.
    Active(Target),
}

impl<'d, T: Element> Trial<'d, T> {
    fn new(case: &'d Case, data: &'d CaseData<T>) -> moe_lora::Result<Self> {
        let projection = case.projection()?;
        let table = data.own.as_ref().map(|own| PlacedTable::new(&Cpu, own)).transpose()?;
        let operands = data.operands(table.as_ref().map(PlacedTable::adapters));
        let routed = reference::targets(&projection, case.tokens, &operands.routing)?;
        // The reference only reads: these stand in for what the call would write.
        let (mut h, mut out) = (data.h.elements().to_vec(), data.out.elements().to_vec());
        let delta = reference::forward(&projection, &operands.forward(case, out.as_mut_slice().into()))?;
        let h = match case.form {
            Form::Forward => None,
            Form::Split => {
                Some(reference::shrink(&projection, &operands.shrink(case, h.as_mut_slice().into()))?)
            }
        };
        Ok(Trial { case, projection, data, routed, delta, h, blank: Blank::new(case, data) })
    }

    fn run<B: Backend>(&self, backend: &B, runs: Runs) -> Result<Outcome, Fault> {
        let inputs = Uploaded::new(backend, self.data)?;
        let mut workspace = backend.workspace(&[self.projection], self.case.tokens)?;
        let (first, _) = self.call(backend, &mut workspace, &inputs, inputs.routing().into())?;
        self.check_h(&first.h, Named::All)?;
        let error = self.check_out(&first.out, Named::All)?;
        if runs == Runs::Repeated {
            self.repeat(backend, &mut workspace, &inputs, &first)?;
        }
        if let Some(blank) = &self.blank {
            self.run_in_blocks(backend, &mut workspace, &inputs, blank, runs)?;
        }
        inputs.check_unchanged(backend)?;

        let mut hasher = DefaultHasher::new();
        bytemuck::cast_slice::<T, u8>(&first.out).hash(&mut hasher);
        let active = self.delta.targets.iter().flatten().count();
        Ok(Outcome { error, active, pairs: self.delta.targets.len(), digest: hasher.finish() })
    }

    /// Runs the case's calls again, in other ways, one behind another with no wait between.
    fn repeat<B: Backend>(
        &self,
        backend: &B,
        used: &mut B::Workspace,
        inputs: &Uploaded<'_, B, T>,
        first: &Outputs<T>,
    ) -> Result<(), Fault> {
        let routing = inputs.routing();
        let own = Routing::Tokens(routing);
        let mut routed = backend.workspace(&[self.projection], self.case.tokens)?;
        let new = || Written::new(backend, self.data);
        let (mut fresh, mut kept, mut kept_again) = (new()?, new()?, new()?);
        let (mut alone, mut behind) = (new()?, new()?);
        let route = self.queue(backend, used, inputs, own, &mut fresh)?;
        self.queue(backend, used, inputs, route.into(), &mut kept)?;
        self.queue(backend, used, inputs, route.into(), &mut kept_again)?;
        let route = backend.route(&mut routed, &self.projection, self.case.tokens, routing)?;
        self.queue(backend, &mut routed, inputs, route.into(), &mut alone)?;
        self.queue(backend, &mut routed, inputs, own, &mut behind)?;
        let same = |one: &Outputs<T>, written: &Written<'_, B, T>, run| {
            let other = written.download(backend)?;
            check_same(&self.data.h, &one.h, &other.h, run)?;
            check_same(&self.data.out, &one.out, &other.out, run)
        };
        same(first, &fresh, "run again")?;
        same(first, &behind, "run again behind others")?;
        // On a given route, other kernels may run, that add in another order.
        let kept = kept.download(backend)?;
        for outputs in [&kept, &alone.download(backend)?] {
            self.check_h(&outputs.h, Named::All)?;
            self.check_out(&outputs.out, Named::All)?;
        }
        same(&kept, &kept_again, "run again on the kept route")
    }

    /// Runs the case's calls on a route in vLLM's form, which the back end makes first.
    fn run_in_blocks<B: Backend>(
        &self,
        backend: &B,
        workspace: &mut B::Workspace,
        inputs: &Uploaded<'_, B, T>,
        blank: &Blank<'_>,
        runs: Runs,
    ) -> Result<(), Fault> {
        let on = reference::slots_on(self.case.slots, &self.data.routing().adapter_enabled)?;
        let blocks = Blocks::sorted(backend, blank, inputs.routing(), &self.routed, &on)?;
        let Some(routing) = blocks.routing(inputs.routing()) else { return Ok(()) };
        let (sorted, route) = self.call(backend, workspace, inputs, routing)?;
        self.check_h(&sorted.h, Named::InBlocks)?;
        self.check_out(&sorted.out, Named::InBlocks)?;
        if runs == Runs::Repeated {
            let (again, _) = self.call(backend, workspace, inputs, route.into())?;
            check_same(&self.data.h, &sorted.h, &again.h, "run again on the kept blocks")?;
            check_same(&self.data.out, &sorted.out, &again.out, "run again on the kept blocks")?;
        }
        Ok(())
    }

    /// Runs the case's calls on fresh outputs.
    fn call<B: Backend>(
        &self,
        backend: &B,
        workspace: &mut B::Workspace,
        inputs: &Uploaded<'_, B, T>,
        routing: Routing<'_, B::Space>,
    ) -> Result<(Outputs<T>, Route), Fault> {
        let mut written = Written::new(backend, self.data)?;
        let route = self.queue(backend, workspace, inputs, routing, &mut written)?;
        Ok((written.download(backend)?, route))
    }

    /// Queues the case's calls, and returns their route.
    fn queue<B: Backend>(
        &self,
        backend: &B,
        workspace: &mut B::Workspace,
        inputs: &Uploaded<'_, B, T>,
        routing: Routing<'_, B::Space>,
        Written { h, out }: &mut Written<'_, B, T>,
    ) -> Result<Route, Fault> {
        let operands = inputs.operands();
        match self.case.form {
            Form::Forward => {
                let call = operands.forward(self.case, out.view_mut());
                Ok(backend.forward(workspace, &self.projection, Forward { routing, ..call })?)
            }
            Form::Split => {
                let call = operands.shrink(self.case, h.view_mut());
                backend.shrink(workspace, &self.projection, Shrink { routing, ..call })?;
                let call = operands.expand(self.case, h.view(), out.view_mut());
                Ok(backend.expand(workspace, &self.projection, Expand { routing, ..call })?)
            }
        }
    }

    /// What becomes of a pair on a route.
    fn fate(&self, pair: usize, named: Named) -> Fate {
        let in_block = |target: &Target| {
            target.rank > 0 && self.blank.as_ref().is_some_and(|blank| blank.lists(target.slot))
        };
        let is_named = named == Named::All || self.routed[pair].as_ref().is_some_and(in_block);
        match self.delta.targets[pair] {
            _ if !is_named => Fate::LeftAlone,
            Some(target) => Fate::Active(target),
            None => Fate::Inactive,
        }
    }

    /// Rank in use of a slice.
    fn rank(&self, s: usize, target: Target) -> usize {
        self.data.own.as_ref().map_or(target.rank, |own| own.rank(s, target))
    }

    /// Standard deviation of a slice's deltas, but for the router weight.
    fn deviation(&self, s: usize, target: Target) -> f64 {
        match (self.rank(s, target), &self.data.own) {
            // Nothing is added: not even a rounding may show.
            (0, _) => 0.0,
            (_, Some(own)) => own.scaling(s, target).abs().into(),
            (_, None) => 1.0,
        }
    }

    /// Holds `h` against the reference, or against what it was when the form has none.
    fn check_h(&self, image: &[T], named: Named) -> Result<(), Fault> {
        let tensor = &self.data.h;
        let Some(expected) = &self.h else { return check_unchanged(tensor, image, 0..image.len()) };
        check_guards(tensor, image)?;
        let mut meter = Meter::new(tensor, self.case.dtype.tolerance());
        for (row, values) in expected.values.chunks(self.case.max_rank).enumerate() {
            let (s, pair) = (row / expected.targets.len(), row % expected.targets.len());
            let first = tensor.range().start + row * self.case.max_rank;
            // Inactive rows, and columns above the rank, are exactly zero.
            let rank = match self.fate(pair, named) {
                Fate::LeftAlone => {
                    check_unchanged(tensor, image, first..first + self.case.max_rank)?;
                    continue;
                }
                Fate::Inactive => 0,
                Fate::Active(target) => self.rank(s, target),
            };
            let size = mean_size(values[..rank].iter().copied()).max(1.0);
            for (q, &h) in values.iter().enumerate() {
                let deviation = if q < rank { size } else { 0.0 };
                meter.add(first + q, image[first + q], 0.0, h, deviation)?;
            }
        }
        self.relative_error(&meter, named).map(drop)
    }

    /// The slice of each column that is written.
    fn slice_of_column(&self) -> Vec<usize> {
        let (dims, order) = (&self.case.out_dims, self.case.order);
        let mut slices = vec![0; dims.total()];
        for (s, &width) in dims.as_slice().iter().enumerate() {
            let columns = slices[order.first_column(dims, s)..].iter_mut().step_by(order.column_step(dims));
            columns.take(width).for_each(|slice| *slice = s);
        }
        slices
    }

    /// Holds `out` against the reference, and against what it was where the call must leave it alone.
    fn check_out(&self, image: &[T], named: Named) -> Result<f64, Fault> {
        let (case, tensor) = (self.case, &self.data.out);
        check_guards(tensor, image)?;
        let weights = self.data.topk_weights.as_ref().map(Tensor::elements);
        let mut meter = Meter::new(tensor, case.dtype.tolerance());
        let (stride, width) = (case.out_stride(), self.projection.out_width());
        let slices = self.slice_of_column();
        for (row, pair) in self.data.pair_of_row().into_iter().enumerate() {
            let fate = pair.map_or(Fate::LeftAlone, |pair| self.fate(pair, named));
            let row = tensor.range().start + row * stride;
            let written = row + case.offset..row + case.out_width();
            check_unchanged(tensor, image, row..written.start)?;
            check_unchanged(tensor, image, written.end..(row + stride).min(tensor.range().end))?;
            let (Some(pair), Fate::Active(_) | Fate::Inactive) = (pair, fate) else {
                check_unchanged(tensor, image, written)?;
                continue;
            };
            // The second half alone does not know which pairs have a row of `x`: it adds zeros.
            let adds_zeros = case.form == Form::Split && self.routed[pair].is_some();
            if matches!(fate, Fate::Inactive) && case.accumulate && !adds_zeros {
                check_unchanged(tensor, image, written)?;
                continue;
            }
            let weight = weights.map_or(1.0, |weights| f64::from(weights[pair]));
            let deviation = |s| match fate {
                Fate::Active(target) => weight * self.deviation(s, target),
                Fate::Inactive | Fate::LeftAlone => 0.0,
            };
            let deltas = self.delta.values[pair * width..][..width].iter().zip(&slices);
            let of_slice = |s| deltas.clone().filter(move |&(_, &own)| own == s).map(|(&delta, _)| delta);
            // With few elements of K, the size of a row's deltas is that of its own few values of `x`.
            let size = |s| mean_size(of_slice(s)).max(deviation(s));
            let sizes: Vec<_> = (0..case.out_dims.len()).map(size).collect();
            for (index, (&delta, &s)) in written.zip(deltas) {
                let old = if case.accumulate { f64::from(tensor.image()[index].to_f32()) } else { 0.0 };
                meter.add(index, image[index], old, delta, sizes[s])?;
            }
        }
        self.relative_error(&meter, named)
    }

    /// What the meter shows; refused when it is over the tolerance and enough roundings went into it.
    fn relative_error(&self, meter: &Meter<'_, T>, named: Named) -> Result<f64, Fault> {
        let error = meter.relative_error();
        // Choices of one token may share their row of `x` and their weights: they count once. Of fewer
        // elements of K, or fewer columns, than ranks the values are products of few numbers, whose roundings
        // are no more independent than these.
        let dims = &self.case.out_dims;
        let roundings = |pair| match self.fate(pair, named) {
            Fate::Active(target) => {
                let of_slice = |s| self.rank(s, target).min(self.case.in_dim).min(dims.max());
                (0..dims.len()).map(of_slice).sum()
            }
            Fate::Inactive | Fate::LeftAlone => 0usize,
        };
        let pairs: Vec<_> = (0..self.delta.targets.len()).map(roundings).collect();
        let most = |choices: &[usize]| choices.iter().copied().max().unwrap_or(0);
        let roundings = pairs.chunks(self.case.top_k).map(most).sum::<usize>();
        if roundings >= MEASURED_ROUNDINGS && error > meter.tolerance {
            return Err(Fault::Inaccurate { tensor: meter.tensor.name(), error, tolerance: meter.tolerance });
        }
        Ok(error)
    }
}

/// Root of the mean square; 0 of none.
fn mean_size(values: impl Iterator<Item = f64>) -> f64 {
    let (count, squares) = values.fold((0.0, 0.0), |(count, sum), value| (count + 1.0, sum + value * value));
    if count == 0.0 { 0.0 } else { f64::sqrt(squares / count) }
}

/// Compares a result with the reference, element by element and as a whole.
struct Meter<'t, T> {
    tensor: &'t Tensor<T>,
    tolerance: f64,
    /// Σ (got − expected)².
    error: f64,
    /// Σ delta².
    norm: f64,
}

impl<'t, T: Element> Meter<'t, T> {
    fn new(tensor: &'t Tensor<T>, tolerance: f64) -> Self {
        Meter { tensor, tolerance, error: 0.0, norm: 0.0 }
    }

    /// Takes in the image's element `index`, expected to be `old + delta` where deltas like it are of the
    /// size `size`; 0 for one that must be exact.
    fn add(&mut self, index: usize, got: T, old: f64, delta: f64, size: f64) -> Result<(), Fault> {
        let (got, expected) = (got.to_f32(), old + delta);
        let error = f64::from(got) - expected;
        // Written so that NaN is never within.
        let within = error.abs() <= ELEMENT_SLACK * self.tolerance * (size + delta.abs());
        if !within {
            let place = self.tensor.place(index);
            return Err(Fault::WrongElement { tensor: self.tensor.name(), place, got, expected });
        }
        self.error += error * error;
        self.norm += delta * delta;
        Ok(())
    }

    fn relative_error(&self) -> f64 {
        if self.norm == 0.0 { 0.0 } else { (self.error / self.norm).sqrt() }
    }
}
