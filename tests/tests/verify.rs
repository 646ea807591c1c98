//! The check of a case finds what a back end can do wrong, and says where.

use bytemuck::Pod;
use moe_lora::cpu::{Cpu, HostBuffer, Workspace};
use moe_lora::reference;
use moe_lora::{
    AdapterEntry, Adapters, Align, Backend, Element, Enabled, Error, Expand, Forward, Host, OutDims,
    Projection, Result, Route, Routing, RoutingTensors, Shrink, SliceOrder, Weights, XRows,
};
use moe_lora_tests::faults::caught;
use moe_lora_verify::{Case, Fault, Flags, Form, Indexed, Loras, Ranks, check};
use std::cell::Cell;

/// What a back end does wrong.
#[derive(Clone, Copy, Debug)]
enum Mistake {
    Nothing,
    IgnoresRanks,
    IgnoresFlags,
    IgnoresExpertMap,
    IgnoresWeights,
    IgnoresOffset,
    SwapsSlices,
    IgnoresIndexOfX,
    IgnoresIndexOfOut,
    IgnoresOrder,
    IgnoresRanksOfEntries,
    IgnoresScaling,
    ConfusesModes,
    LeavesOneElementOut,
    IsOffInOneElement,
    IsOffEverywhere,
    WritesBeforeOut,
    WritesPastOut,
    WritesIntoPadding,
    WritesAnInactivePair,
    WritesItsInput,
    LeavesHOut,
    DiffersOnTheSecondCall,
    IsOffOnAKeptRoute,
    DiffersOnTheSecondKeptCall,
    RoutesAloneWithoutFlags,
    Refuses,
}
use Mistake::*;

/// The CPU back end with a mistake.
struct Faulty {
    mistake: Mistake,
    calls: Cell<usize>,
}

/// A call with all that can be ignored, and enough of it to be measured.
fn case() -> Case {
    Case {
        tokens: 200,
        global_experts: Some(9),
        slots: 5,
        out_dims: OutDims::uniform(64, 2),
        x_rows: XRows::Pair,
        routed_weight: true,
        enabled: Flags::U8,
        loras: Loras::Random,
        ranks: Ranks::Mixed,
        offset: 3,
        x_padding: 2,
        out_padding: 5,
        ..Case::default()
    }
}

#[test]
fn every_mistake_is_found() {
    let overwrite = || Case { accumulate: false, ..case() };
    let split = || Case { form: Form::Split, ..case() };
    type Row = (Mistake, Case, fn(&Fault) -> bool);
    let wrong = |fault: &Fault| matches!(fault, Fault::WrongElement { tensor: "out", .. });
    let touched = |fault: &Fault| matches!(fault, Fault::Touched { tensor: "out", .. });
    let differs = |fault: &Fault| matches!(fault, Fault::NotRepeatable { tensor: "out", .. });
    let indexed = || Case { x_index: Indexed::OutOfRange, out_index: Indexed::OutOfRange, ..case() };
    let interleaved = || Case { order: SliceOrder::Interleaved, ..case() };
    let by_address = || Case { table: true, ..case() };
    let table: [Row; 31] = [
        // A rank, flag or id that is ignored leads to weights that are NaN.
        (IgnoresRanks, case(), wrong),
        (IgnoresFlags, case(), touched),
        (IgnoresFlags, overwrite(), wrong),
        (IgnoresExpertMap, overwrite(), wrong),
        (IgnoresWeights, case(), wrong),
        (IgnoresOffset, case(), touched),
        (SwapsSlices, case(), wrong),
        (IgnoresIndexOfX, indexed(), wrong),
        (IgnoresIndexOfX, Case { x_index: Indexed::Permuted, ..case() }, wrong),
        (IgnoresIndexOfOut, indexed(), touched),
        (IgnoresIndexOfOut, Case { out_index: Indexed::Permuted, ..overwrite() }, wrong),
        (IgnoresOrder, interleaved(), wrong),
        (IgnoresRanksOfEntries, by_address(), wrong),
        (IgnoresScaling, by_address(), wrong),
        (ConfusesModes, case(), touched),
        (ConfusesModes, overwrite(), wrong),
        (LeavesOneElementOut, overwrite(), wrong),
        (IsOffInOneElement, overwrite(), wrong),
        (IsOffEverywhere, overwrite(), |fault| matches!(fault, Fault::Inaccurate { tensor: "out", .. })),
        (WritesBeforeOut, case(), touched),
        (WritesPastOut, case(), touched),
        (WritesIntoPadding, case(), touched),
        (WritesAnInactivePair, case(), touched),
        (WritesAnInactivePair, overwrite(), wrong),
        (WritesItsInput, case(), |fault| matches!(fault, Fault::Touched { tensor: "topk_ids", .. })),
        (LeavesHOut, split(), |fault| matches!(fault, Fault::WrongElement { tensor: "h", .. })),
        (DiffersOnTheSecondCall, case(), differs),
        (IsOffOnAKeptRoute, case(), touched),
        (DiffersOnTheSecondKeptCall, case(), differs),
        (RoutesAloneWithoutFlags, case(), touched),
        (Refuses, case(), |fault| matches!(fault, Fault::Refused(Error::NoDevice { .. }))),
    ];
    for (mistake, case, is_found) in table {
        let blameless = Faulty { mistake: Nothing, calls: Cell::new(0) };
        check(&blameless, &case).unwrap_or_else(|failure| panic!("{failure}"));
        let failure = check(&Faulty { mistake, calls: Cell::new(0) }, &case).expect_err("a mistake");
        assert!(is_found(&failure.fault), "{mistake:?} was taken for: {failure}");
        caught(&format!("{mistake:?}"));
    }
}

#[test]
fn a_failure_prints_the_command_that_reproduces_it() {
    let failure = check(&Faulty { mistake: Refuses, calls: Cell::new(0) }, &case()).expect_err("a mistake");
    let text = failure.to_string();
    let (_, command) = text.split_once("moe-lora verify --case '").expect("a command");
    let json = command.strip_suffix('\'').expect("a quoted case");
    assert_eq!(serde_json::from_str::<Case>(json).expect("a case"), case());
}

#[test]
fn a_case_in_json_may_leave_out_what_is_as_usual_but_not_misspell_it() {
    let case: Case = serde_json::from_str(r#"{"tokens": 3, "dtype": "f16"}"#).expect("a case");
    assert_eq!(case, Case { tokens: 3, dtype: moe_lora::DType::F16, ..Case::default() });
    assert!(serde_json::from_str::<Case>(r#"{"token": 3}"#).is_err());
}

/// Changes the element that is `index` elements from `address`.
fn change<T: Element>(address: u64, index: isize, new: impl Fn(f32) -> f32) {
    let element = (address as *mut T).wrapping_offset(index);
    // SAFETY: a case's elements and the guards around them are in one live buffer, which nobody else uses
    // during a call.
    unsafe { element.write(T::from_f32(new(element.read().to_f32()))) }
}

/// The entries of a table.
fn entries<'a>(adapters: &Adapters<'a, Host>) -> &'a [AdapterEntry] {
    let entries = adapters.entries();
    // SAFETY: a case's table is there, and nobody writes it.
    unsafe { std::slice::from_raw_parts(entries.address() as *const AdapterEntry, entries.len()) }
}

impl Faulty {
    fn mistaken(&self, entry: AdapterEntry) -> AdapterEntry {
        match self.mistake {
            IgnoresRanksOfEntries if entry.rank > 0 => AdapterEntry { rank: entry.max_rank as i32, ..entry },
            IgnoresScaling => AdapterEntry { scaling: 1.0, ..entry },
            _ => entry,
        }
    }
}

impl Backend for Faulty {
    type Space = Host;
    type Buffer<T: Pod> = HostBuffer<T>;
    type Workspace = Workspace;

    fn name(&self) -> &'static str {
        "faulty"
    }

    fn upload<T: Pod>(&self, elements: &[T]) -> Result<HostBuffer<T>> {
        Cpu.upload(elements)
    }

    fn write<T: Pod>(&self, buffer: &mut HostBuffer<T>, start: usize, elements: &[T]) -> Result<()> {
        Cpu.write(buffer, start, elements)
    }

    fn check_own<T: Pod>(&self, what: &'static str, buffer: &HostBuffer<T>) -> Result<()> {
        Cpu.check_own(what, buffer)
    }

    fn download<T: Pod>(&self, buffer: &HostBuffer<T>) -> Result<Vec<T>> {
        Cpu.download(buffer)
    }

    fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Workspace> {
        Cpu.workspace(projections, max_tokens)
    }

    fn route(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        tokens: usize,
        mut routing: RoutingTensors<'_, Host>,
    ) -> Result<Route> {
        if matches!(self.mistake, RoutesAloneWithoutFlags) {
            routing.adapter_enabled = Enabled::All;
        }
        Cpu.route(workspace, projection, tokens, routing)
    }

    fn align(&self, call: Align<'_, Host>) -> Result<()> {
        Cpu.align(call)
    }

    fn forward<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        mut call: Forward<'_, Host, T>,
    ) -> Result<Route> {
        self.calls.set(self.calls.get() + 1);
        let Routing::Tokens(mut routing) = call.routing else {
            let first = call.out.data.address();
            let route = Cpu.forward(workspace, projection, call)?;
            // The first call on a route that was found is the third of all.
            match self.mistake {
                IsOffOnAKeptRoute => change::<T>(first, 0, |out| out + 1.0),
                DiffersOnTheSecondKeptCall if self.calls.get() == 4 => change::<T>(first, 0, |out| out + 1.0),
                _ => {}
            }
            return Ok(route);
        };
        let targets = reference::targets(projection, call.tokens, &routing)?;
        let (ids, out, past) = (routing.topk_ids, call.out.data.address(), call.out.data.len() as isize);
        let width = projection.out_width() as isize;
        let stride = call.out.stride.expect("a case has strides") as isize;
        let offset = call.offset as isize;
        let first_where = |active| {
            let pair = targets.iter().position(|target| target.is_some() == active);
            pair.expect("pairs of both kinds") as isize * stride + offset
        };
        let (swapped, changed): (Vec<_>, Vec<_>);

        match self.mistake {
            IgnoresRanks => routing.ranks = None,
            IgnoresFlags => routing.adapter_enabled = Enabled::All,
            IgnoresExpertMap => routing.expert_map = None,
            IgnoresWeights => call.topk_weights = None,
            IgnoresOffset => call.offset = 0,
            IgnoresIndexOfX => call.x.index = None,
            IgnoresIndexOfOut => call.out.index = None,
            IgnoresOrder => call.order = SliceOrder::InOrder,
            ConfusesModes => call.accumulate = !call.accumulate,
            Refuses => return Err(Error::NoDevice { reason: "a mistake".to_owned() }),
            _ => {}
        }
        let weights = match call.weights {
            Weights::Stacked { a, b } if matches!(self.mistake, SwapsSlices) => {
                swapped = b.iter().rev().copied().collect();
                Weights::Stacked { a, b: &swapped }
            }
            Weights::Table(adapters) => {
                changed = entries(&adapters).iter().map(|entry| self.mistaken(*entry)).collect();
                // SAFETY: what the entries name is as large as before.
                Weights::Table(unsafe { Adapters::new(changed[..].into()) })
            }
            stacked => stacked,
        };
        let route =
            Cpu.forward(workspace, projection, Forward { routing: routing.into(), weights, ..call })?;
        match self.mistake {
            LeavesOneElementOut => change::<T>(out, first_where(true) + width - 1, |_| f32::NAN),
            IsOffInOneElement => change::<T>(out, first_where(true) + 1, |out| out + 0.1),
            IsOffEverywhere => {
                (0..past).for_each(|index| change::<T>(out, index, |out| out * 1.01));
            }
            WritesBeforeOut => change::<T>(out, -1, |_| 0.0),
            WritesPastOut => change::<T>(out, past, |_| 0.0),
            WritesIntoPadding => change::<T>(out, offset + width, |_| 0.0),
            WritesAnInactivePair => change::<T>(out, first_where(false), |out| out + 1.0),
            WritesItsInput => change::<T>(ids.address(), 0, |_| 1.0),
            DiffersOnTheSecondCall if self.calls.get() == 2 => change::<T>(out, 0, |_| 1.0),
            _ => {}
        }
        Ok(route)
    }

    fn shrink<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Shrink<'_, Host, T>,
    ) -> Result<Route> {
        let h = call.h.address();
        let route = Cpu.shrink(workspace, projection, call)?;
        if matches!(self.mistake, LeavesHOut) {
            change::<T>(h, 0, |_| f32::NAN);
        }
        Ok(route)
    }

    fn expand<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Expand<'_, Host, T>,
    ) -> Result<Route> {
        Cpu.expand(workspace, projection, call)
    }

    fn synchronize(&self) -> Result<()> {
        Cpu.synchronize()
    }
}
