//! Adapters by address: what an `AdapterTable` refuses, what it writes, and when it lets weights go.

use bytemuck::Pod;
use half::{bf16, f16};
use moe_lora::cpu::{Cpu, HostBuffer, Workspace};
use moe_lora::{
    AdapterEntry, AdapterSlice, AdapterTable, Align, Backend, Buffer, DType, Element, Error, Expand,
    ExpertWeights, Forward, Host, Operator, OutDims, Projection, ProjectionSizes, Result, Route,
    RoutingTensors, Shrink, View, ViewMut,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// The CPU, which counts the buffers that are alive, notes what is written to a table, and fails when told
/// to.
#[derive(Clone, Default)]
struct Watched(Rc<Seen>);

#[derive(Default)]
struct Seen {
    alive: Cell<isize>,
    /// The entries of each write, with how many buffers were alive then.
    writes: RefCell<Vec<(usize, Vec<AdapterEntry>, isize)>>,
    fails: Cell<Option<Failure>>,
}

/// How a write fails.
#[derive(Clone, Copy)]
enum Failure {
    /// Before anything is written.
    Refused,
    /// When something may have been.
    Driver,
}

struct WatchedBuffer<T> {
    buffer: HostBuffer<T>,
    /// Its first elements are not shown.
    hidden: usize,
    seen: Rc<Seen>,
}

impl<T> Drop for WatchedBuffer<T> {
    fn drop(&mut self) {
        self.seen.alive.set(self.seen.alive.get() - 1);
    }
}

impl<T: Pod> Buffer<T> for WatchedBuffer<T> {
    type Space = Host;

    fn view(&self) -> View<'_, Host, T> {
        self.buffer.view().slice(self.hidden..self.buffer.as_slice().len())
    }

    fn view_mut(&mut self) -> ViewMut<'_, Host, T> {
        self.buffer.view_mut()
    }
}

impl Watched {
    fn alive(&self) -> isize {
        self.0.alive.get()
    }

    fn last_write(&self) -> (usize, Vec<AdapterEntry>, isize) {
        self.0.writes.borrow().last().cloned().expect("a write")
    }
}

impl Backend for Watched {
    type Space = Host;
    type Buffer<T: Pod> = WatchedBuffer<T>;
    type Workspace = Workspace;

    fn name(&self) -> &'static str {
        "watched"
    }

    fn upload<T: Pod>(&self, elements: &[T]) -> Result<WatchedBuffer<T>> {
        self.0.alive.set(self.alive() + 1);
        Ok(WatchedBuffer { buffer: Cpu.upload(elements)?, hidden: 0, seen: self.0.clone() })
    }

    fn write<T: Pod>(&self, buffer: &mut WatchedBuffer<T>, start: usize, elements: &[T]) -> Result<()> {
        match self.0.fails.get() {
            Some(Failure::Refused) => return Err(Error::NotRecordable { what: "a copy" }),
            Some(Failure::Driver) => {
                let (name, reason) = ("A_FAILURE".to_owned(), "told to".to_owned());
                return Err(Error::Driver { call: "copy", code: 1, name, reason });
            }
            None => {}
        }
        let entries = bytemuck::cast_slice(elements).to_vec();
        self.0.writes.borrow_mut().push((start, entries, self.alive()));
        Cpu.write(&mut buffer.buffer, start, elements)
    }

    fn check_own<T: Pod>(&self, what: &'static str, buffer: &WatchedBuffer<T>) -> Result<()> {
        if Rc::ptr_eq(&self.0, &buffer.seen) {
            return Ok(());
        }
        Err(Error::OtherDevice { what, expected: "this".to_owned(), got: "another".to_owned() })
    }

    fn download<T: Pod>(&self, buffer: &WatchedBuffer<T>) -> Result<Vec<T>> {
        Cpu.download(&buffer.buffer)
    }

    fn workspace(&self, projections: &[Projection], max_tokens: usize) -> Result<Workspace> {
        Cpu.workspace(projections, max_tokens)
    }

    fn route(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        tokens: usize,
        routing: RoutingTensors<'_, Host>,
    ) -> Result<Route> {
        Cpu.route(workspace, projection, tokens, routing)
    }

    fn align(&self, call: Align<'_, Host>) -> Result<()> {
        Cpu.align(call)
    }

    fn forward<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Forward<'_, Host, T>,
    ) -> Result<Route> {
        Cpu.forward(workspace, projection, call)
    }

    fn shrink<T: Element>(
        &self,
        workspace: &mut Workspace,
        projection: &Projection,
        call: Shrink<'_, Host, T>,
    ) -> Result<Route> {
        Cpu.shrink(workspace, projection, call)
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
        Ok(())
    }
}

/// Two experts with an `a` in common, three slots, two slices of widths 3 and 2, R = 12, K = 4.
fn projection() -> Projection {
    let out_dims = OutDims::new(&[3, 2]).expect("two slices");
    let layer =
        ProjectionSizes { out_dims, a_experts: ExpertWeights::Shared, ..ProjectionSizes::gate_up(4, 3) };
    Projection::new(ProjectionSizes { experts: 2, slots: 3, max_rank: 12, ..layer }).expect("legal sizes")
}

/// The weights of slice `s`, all `value`, with the rank that they are allocated for.
fn slice(backend: &Watched, s: usize, rank: usize, value: f32) -> AdapterSlice<Watched, bf16> {
    let max_rank = rank.next_multiple_of(8).max(8);
    let ones = |len: usize| backend.upload(&vec![bf16::from_f32(value); len]).expect("room");
    let (a, b) = (ones(max_rank * 4), ones(2 * projection().sizes().out_dims.get(s) * max_rank));
    AdapterSlice { a, b, rank, max_rank, scaling: 1.0 }
}

#[test]
fn whatever_is_wrong_with_an_adapter_is_refused_and_nothing_changes() {
    let backend = Watched::default();
    let other = Watched::default();
    let mut table = AdapterTable::<Watched, bf16>::new(&backend, &projection()).expect("a table");
    table.set(1, vec![Some(slice(&backend, 0, 4, 1.0)), None]).expect("a good adapter");
    let (alive, writes) = (backend.alive(), backend.0.writes.borrow().len());

    let zeros = |backend: &Watched, len: usize| backend.upload(&vec![bf16::ZERO; len]).expect("room");
    let short = |tensor, shape: &str, expected, got| Error::TooShort {
        tensor,
        shape: shape.to_owned(),
        expected,
        got,
    };
    type Slice = AdapterSlice<Watched, bf16>;
    type Spoil<'a> = Box<dyn Fn(&mut Slice) + 'a>;
    let rows: Vec<(Spoil<'_>, Error)> = vec![
        (Box::new(|s| s.max_rank = 0), Error::ZeroSize { what: "max_rank" }),
        (Box::new(|s| s.max_rank = 12), Error::NotMultiple { what: "max_rank", of: 8, got: 12 }),
        (Box::new(|s| s.max_rank = 24), Error::SizeTooLarge { what: "max_rank", limit: 16, got: 24 }),
        (Box::new(|s| s.rank = 9), Error::RankTooLarge { slot: 1, rank: 9, max_rank: 8 }),
        (
            Box::new(|s| (s.rank, s.max_rank) = (13, 16)),
            Error::RankTooLarge { slot: 1, rank: 13, max_rank: 12 },
        ),
        (
            Box::new(|s| s.scaling = f32::INFINITY),
            Error::NotFinite { what: "scaling", got: "inf".to_owned() },
        ),
        (Box::new(|s| s.scaling = f32::NAN), Error::NotFinite { what: "scaling", got: "NaN".to_owned() }),
        (Box::new(|s| s.a = zeros(&backend, 31)), short("a", "[1, 8, 4]", 32, 31)),
        (Box::new(|s| s.b = zeros(&backend, 47)), short("b", "[2, 3, 8]", 48, 47)),
        (
            Box::new(|s| s.b = zeros(&other, 48)),
            Error::OtherDevice { what: "b", expected: "this".to_owned(), got: "another".to_owned() },
        ),
    ];
    for (spoil, expected) in rows {
        let mut spoiled = slice(&backend, 0, 4, 2.0);
        spoil(&mut spoiled);
        assert_eq!(table.set(1, vec![Some(spoiled), None]), Err(expected));
    }
    let mut off_boundary = slice(&backend, 0, 4, 2.0);
    off_boundary.a = zeros(&backend, 36);
    off_boundary.a.hidden = 4;
    let refused = table.set(1, vec![Some(off_boundary), None]);
    assert!(matches!(refused, Err(Error::OffBoundary { tensor: "a", expected: 16, .. })), "{refused:?}");
    let count = Error::SliceCount { tensor: "the adapter", expected: 2, got: 1 };
    assert_eq!(table.set(1, vec![Some(slice(&backend, 0, 4, 2.0))]), Err(count));
    let beyond = Error::SizeTooLarge { what: "slot", limit: 2, got: 3 };
    assert_eq!(table.set(3, vec![None, Some(slice(&backend, 1, 4, 2.0))]), Err(beyond.clone()));
    assert_eq!(table.remove(3), Err(beyond));
    let dtype = Error::DTypeMismatch { tensor: "adapters", expected: DType::Bf16, got: DType::F16 };
    assert_eq!(AdapterTable::<Watched, f16>::new(&backend, &projection()).map(drop), Err(dtype));
    assert_eq!((backend.alive(), backend.0.writes.borrow().len()), (alive, writes));
}

/// Sizes of matrices are the table's promise: a call of others would read past them.
#[test]
fn a_call_of_other_sizes_refuses_the_table() {
    let backend = Watched::default();
    let table = AdapterTable::<Watched, bf16>::new(&backend, &projection()).expect("a table");
    let good = *projection().sizes();
    let shared = ExpertWeights::Shared;
    let dims = |widths: &[usize]| OutDims::new(widths).expect("slices");
    let others = [
        (ProjectionSizes { in_dim: 5, ..good }, "bf16 K=5 N=3+2 S=2, 1 matrices of a and 2 of b"),
        (ProjectionSizes { out_dims: dims(&[3, 3]), ..good }, "bf16 K=4 N=3 S=2, 1 matrices of a and 2 of b"),
        (ProjectionSizes { out_dims: dims(&[3]), ..good }, "bf16 K=4 N=3 S=1, 1 matrices of a and 2 of b"),
        (ProjectionSizes { b_experts: shared, ..good }, "bf16 K=4 N=3+2 S=2, 1 matrices of a and 1 of b"),
        (ProjectionSizes { experts: 3, ..good }, "bf16 K=4 N=3+2 S=2, 1 matrices of a and 3 of b"),
    ];
    let (x, ids, loras) = (vec![bf16::ONE; 8], [0], [0]);
    for (sizes, call) in others {
        let [operator] = Operator::builder(&backend).max_tokens(1).build([sizes]).expect("an operator");
        let mut out = [bf16::ONE; 8];
        let routing = (&ids[..], &loras[..]);
        let refused = operator.call_adapters(&x[..], &table.adapters(), routing, &mut out[..]).run();
        let table = "bf16 K=4 N=3+2 S=2, 1 matrices of a and 2 of b".to_owned();
        assert_eq!(refused, Err(Error::OtherTable { table, call: call.to_owned() }));
    }
    // Of more slots than the table has.
    let more = ProjectionSizes { slots: 4, ..good };
    let [operator] = Operator::builder(&backend).max_tokens(1).build([more]).expect("an operator");
    let mut out = [bf16::ONE; 8];
    let refused =
        operator.call_adapters(&x[..], &table.adapters(), (&ids[..], &loras[..]), &mut out[..]).run();
    assert!(matches!(refused, Err(Error::TooShort { tensor: "adapters", expected: 8, got: 6, .. })));
}

#[test]
fn weights_are_let_go_of_when_no_entry_names_them() {
    let backend = Watched::default();
    let mut table = AdapterTable::<Watched, bf16>::new(&backend, &projection()).expect("a table");
    let off = AdapterEntry::default();
    let both = |value| vec![Some(slice(&backend, 0, 4, value)), Some(slice(&backend, 1, 9, value))];

    table.set(2, both(1.0)).expect("a good adapter");
    let (start, entries, _) = backend.last_write();
    let shown: Vec<_> = entries.iter().map(|e| (e.rank, e.max_rank, e.scaling, e.a != 0, e.b != 0)).collect();
    assert_eq!((start, shown), (4, vec![(4, 8, 1.0, true, true), (9, 16, 1.0, true, true)]));
    assert_eq!(backend.alive(), 5);

    // Old and new are alive while the entries are written, and the new ones afterwards.
    table.set(2, vec![None, Some(slice(&backend, 1, 4, 2.0))]).expect("a good adapter");
    let (_, entries, alive) = backend.last_write();
    assert_eq!((entries[0], alive, backend.alive()), (off, 7, 3));

    // What fails before a write changes nothing; what fails in one lets nothing go that may be named.
    backend.0.fails.set(Some(Failure::Refused));
    assert!(table.set(2, both(3.0)).is_err() && table.remove(2).is_err());
    assert_eq!(backend.alive(), 3);
    backend.0.fails.set(Some(Failure::Driver));
    assert!(table.set(2, both(3.0)).is_err());
    assert_eq!(backend.alive(), 7);
    backend.0.fails.set(None);

    table.remove(2).expect("a slot");
    assert_eq!((backend.last_write(), backend.alive()), ((4, vec![off; 2], 7), 5));

    table.set(0, both(1.0)).expect("a good adapter");
    drop(table);
    // Zeros are written while all is alive. Four buffers of the failed write are left for good.
    assert_eq!((backend.last_write(), backend.alive()), ((0, vec![off; 6], 9), 4));
}

#[test]
fn a_table_that_cannot_be_cleared_leaves_its_weights_alive() {
    let backend = Watched::default();
    let mut table = AdapterTable::<Watched, bf16>::new(&backend, &projection()).expect("a table");
    table.set(0, vec![Some(slice(&backend, 0, 4, 1.0)), None]).expect("a good adapter");
    backend.0.fails.set(Some(Failure::Refused));
    drop(table);
    assert_eq!(backend.alive(), 2);
}

/// K = 4, and weights of ones: rank r of slice s adds 4 r · scaling to each column.
#[test]
fn an_adapter_is_exchanged_between_two_calls() {
    let backend = Watched::default();
    let sizes = *projection().sizes();
    let [operator] = Operator::builder(&backend).max_tokens(2).build([sizes]).expect("an operator");
    let mut table = AdapterTable::<Watched, bf16>::new(&backend, operator.projection()).expect("a table");
    let (x, ids, loras) = ([bf16::ONE; 8], [1i64, 0], [2, 0]);
    let call = |table: &AdapterTable<Watched, bf16>| {
        let mut out = [bf16::from_f32(0.5); 10];
        let routing = (&ids[..], &loras[..]);
        operator.call_adapters(&x[..], &table.adapters(), routing, &mut out[..]).run().expect("a call");
        out.map(bf16::to_f32)
    };
    let rows = |slices: [[f32; 2]; 2]| {
        let mut rows = [0.5; 10];
        for (row, [first, second]) in rows.chunks_mut(5).zip(slices) {
            row[..3].iter_mut().for_each(|out| *out += first);
            row[3..].iter_mut().for_each(|out| *out += second);
        }
        rows
    };
    assert_eq!(call(&table), rows([[0.0; 2]; 2]));
    let halved = AdapterSlice { scaling: 0.5, ..slice(&backend, 1, 9, 1.0) };
    table.set(2, vec![Some(slice(&backend, 0, 4, 1.0)), Some(halved)]).expect("a good adapter");
    assert_eq!(call(&table), rows([[16.0, 18.0], [0.0; 2]]));
    table.set(2, vec![None, Some(slice(&backend, 1, 2, 1.0))]).expect("a good adapter");
    table.set(0, vec![Some(slice(&backend, 0, 1, 1.0)), None]).expect("a good adapter");
    assert_eq!(call(&table), rows([[0.0, 8.0], [4.0, 0.0]]));
    table.remove(2).expect("a slot");
    assert_eq!(call(&table), rows([[0.0; 2], [4.0, 0.0]]));
}
