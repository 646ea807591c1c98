//! Calls that must be refused: each with the error that names what was wrong, and with nothing written.

use bytemuck::Pod;
use half::bf16;
use moe_lora::{
    AdapterEntry, Adapters, Backend, Buffer, DType, Enabled, Error, Expand, ExpertWeights, Forward, OutDims,
    Projection, ProjectionSizes, Result, Route, Routing, RoutingTensors, Rows, RowsMut, Shrink, SliceOrder,
    Space, TopkIds, View, ViewMut, Weights, XRows,
};

/// Which call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The routing alone.
    Route,
    /// The whole operator.
    Forward,
    /// Its first half.
    Shrink,
    /// Its second half.
    Expand,
}

const ALL: &[Stage] = &[Stage::Route, Stage::Forward, Stage::Shrink, Stage::Expand];
const WRITES: &[Stage] = &[Stage::Forward, Stage::Shrink, Stage::Expand];
const READS_X: &[Stage] = &[Stage::Forward, Stage::Shrink];
const WRITES_OUT: &[Stage] = &[Stage::Forward, Stage::Expand];
const HALVES: &[Stage] = &[Stage::Shrink, Stage::Expand];

/// The tensors of a call, as indices into [`Call::memory`].
#[derive(Clone, Copy, Debug)]
enum Tensor {
    TopkIds,
    TokenLora,
    FlagsU8,
    FlagsI32,
    Ranks,
    ExpertMap,
    X,
    A,
    B,
    TopkWeights,
    H,
    Out,
    TopkIds64,
    XIndex,
    OutIndex,
    Adapters,
}

/// What [`GOOD`] demands of a tensor.
struct Demand {
    tensor: Tensor,
    name: &'static str,
    shape: &'static str,
    elements: usize,
    align: usize,
    stages: &'static [Stage],
}

/// T of the call that is spoiled.
const TOKENS: usize = 3;
/// Its offset.
const OFFSET: usize = 1;
/// Sizes of a projection that nothing is wrong with: that of the call that is spoiled.
pub const GOOD: ProjectionSizes = ProjectionSizes {
    dtype: DType::Bf16,
    top_k: 2,
    experts: 4,
    slots: 2,
    max_rank: 8,
    in_dim: 16,
    out_dims: OutDims::uniform(8, 2),
    x_rows: XRows::Token,
    a_experts: ExpertWeights::PerExpert,
    b_experts: ExpertWeights::PerExpert,
};

#[rustfmt::skip]
const DEMANDS: [Demand; 16] = {
    use Tensor::*;
    type Text = &'static str;
    type Stages = &'static [Stage];
    const fn row(
        tensor: Tensor, name: Text, shape: Text, elements: usize, align: usize, stages: Stages,
    ) -> Demand {
        Demand { tensor, name, shape, elements, align, stages }
    }
    [
        row(TopkIds,     "topk_ids",        "[3, 2]",                             6,    4, ALL),
        row(TokenLora,   "token_lora",      "[3]",                                3,    4, ALL),
        row(FlagsU8,     "adapter_enabled", "[2]",                                2,    1, ALL),
        row(FlagsI32,    "adapter_enabled", "[2]",                                2,    4, ALL),
        row(Ranks,       "ranks",           "[2]",                                2,    4, ALL),
        row(ExpertMap,   "expert_map",      "[7]",                                7,    4, ALL),
        row(X,           "x",               "[3, 16] with a row stride of 16",    48,   2, READS_X),
        row(A,           "a",               "[2, 4, 8, 16]",                      1024, 2, READS_X),
        row(B,           "b",               "[2, 4, 8, 8]",                       512,  2, WRITES_OUT),
        row(TopkWeights, "topk_weights",    "[3, 2]",                             6,    4, WRITES_OUT),
        row(H,           "h",               "[2, 6, 8]",                          96,   2, HALVES),
        row(Out,         "out",             "[6, 17] with a row stride of 17",    102,  2, WRITES_OUT),
        row(TopkIds64,   "topk_ids",        "[3, 2]",                             6,    8, ALL),
        row(XIndex,      "x_index",         "[6]",                                6,    4, READS_X),
        row(OutIndex,    "out_index",       "[6]",                                6,    4, WRITES_OUT),
        row(Adapters,    "adapters",        "[2, 2]",                             4,    8, WRITES),
    ]
};

/// Address and elements of a tensor.
#[derive(Clone, Copy, Debug)]
struct Memory {
    address: u64,
    len: usize,
}

/// A call in pieces, each of which can be spoiled.
#[derive(Clone, Debug)]
struct Call {
    sizes: ProjectionSizes,
    tokens: usize,
    /// A route to be made on, in place of the tensors.
    on: Option<Route>,
    /// Of the tensors that take the place of others, or that are not in every call, the one that it has.
    form: Tensor,
    no_ids: bool,
    order: SliceOrder,
    memory: [Memory; DEMANDS.len()],
    slices_a: usize,
    slices_b: usize,
    x_stride: Option<usize>,
    out_stride: Option<usize>,
    offset: usize,
    /// k and T that the workspace is made for.
    room: (usize, usize),
}

/// A call that must be refused.
struct Refusal {
    name: String,
    stages: &'static [Stage],
    call: Call,
    expected: Error,
}

impl Call {
    fn view<S: Space, T: Pod>(&self, tensor: Tensor) -> View<'_, S, T> {
        let Memory { address, len } = self.memory[tensor as usize];
        // SAFETY: a call that is not spoiled names live buffers; one that is must be refused unread.
        unsafe { View::from_raw(address, len) }
    }

    fn view_mut<S: Space>(&self, tensor: Tensor) -> ViewMut<'_, S, bf16> {
        let Memory { address, len } = self.memory[tensor as usize];
        // SAFETY: as in `view`, and one call uses the buffer at a time.
        unsafe { ViewMut::from_raw(address, len) }
    }

    /// The index, when the call has it.
    fn index<S: Space>(&self, tensor: Tensor) -> Option<View<'_, S, i32>> {
        (self.form as usize == tensor as usize).then(|| self.view(tensor))
    }

    fn run<B: Backend>(&self, backend: &B, workspace: &mut B::Workspace, stage: Stage) -> Result<Route> {
        let projection = Projection::new(self.sizes)?;
        let tensors = RoutingTensors {
            topk_ids: match self.form {
                _ if self.no_ids => TopkIds::None,
                Tensor::TopkIds64 => TopkIds::I64(self.view(Tensor::TopkIds64)),
                _ => TopkIds::I32(self.view(Tensor::TopkIds)),
            },
            token_lora: self.view(Tensor::TokenLora),
            adapter_enabled: match self.form {
                Tensor::FlagsU8 => Enabled::U8(self.view(Tensor::FlagsU8)),
                _ => Enabled::I32(self.view(Tensor::FlagsI32)),
            },
            ranks: Some(self.view(Tensor::Ranks)),
            expert_map: Some(self.view(Tensor::ExpertMap)),
        };
        let routing = self.on.map_or(Routing::Tokens(tensors), Routing::On);
        let x = Rows { data: self.view(Tensor::X), stride: self.x_stride, index: self.index(Tensor::XIndex) };
        let a = vec![self.view(Tensor::A); self.slices_a];
        let b = vec![self.view(Tensor::B); self.slices_b];
        let topk_weights = Some(self.view(Tensor::TopkWeights));
        let (tokens, offset) = (self.tokens, self.offset);
        let index = self.index(Tensor::OutIndex);
        let out = RowsMut { data: self.view_mut(Tensor::Out), stride: self.out_stride, index };
        // SAFETY: the entries are of no adapter.
        let adapters = unsafe { Adapters::new(self.view(Tensor::Adapters)) };
        let by_address = matches!(self.form, Tensor::Adapters);
        let weights = if by_address { Weights::Table(adapters) } else { Weights::Stacked { a: &a, b: &b } };
        let order = self.order;
        match stage {
            Stage::Route => backend.route(workspace, &projection, tokens, tensors),
            Stage::Forward => {
                let call = Forward {
                    tokens,
                    routing,
                    x,
                    weights,
                    topk_weights,
                    out,
                    offset,
                    order,
                    accumulate: true,
                };
                backend.forward(workspace, &projection, call)
            }
            Stage::Shrink => {
                let h = self.view_mut(Tensor::H);
                backend.shrink(workspace, &projection, Shrink { tokens, routing, x, a: weights.a(), h })
            }
            Stage::Expand => {
                let h = self.view(Tensor::H);
                let call = Expand {
                    tokens,
                    routing,
                    h,
                    b: weights.b(),
                    topk_weights,
                    out,
                    offset,
                    order,
                    accumulate: true,
                };
                backend.expand(workspace, &projection, call)
            }
        }
    }
}

/// Ranks of which one is over R.
static RANKS_OVER: [i32; 2] = [3, 9];

/// Every way to spoil `good`.
fn refusals(good: &Call, ranks_on_host: bool) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    for &Demand { tensor, name, shape, elements, align, stages } in &DEMANDS {
        let mut refused = |how: &str, spoil: fn(&mut Memory), expected| {
            let mut call = Call { form: tensor, ..good.clone() };
            spoil(&mut call.memory[tensor as usize]);
            refusals.push(Refusal { name: format!("{name} is {how}"), stages, call, expected });
        };
        match tensor {
            // Any length of the map will do, but none.
            Tensor::ExpertMap => refused("empty", |map| map.len = 0, Error::ZeroSize { what: name }),
            _ => {
                let (shape, got) = (shape.to_owned(), elements - 1);
                let short = Error::TooShort { tensor: name, shape, expected: elements, got };
                refused("one short", |memory| memory.len -= 1, short);
            }
        }
        let null = Error::NullPointer { tensor: name, expected: elements };
        refused("null", |memory| memory.address = 0, null);
        if align > 1 {
            let address = good.memory[tensor as usize].address + 1;
            let odd = Error::Misaligned { tensor: name, expected: align, address };
            refused("at an odd address", |memory| memory.address += 1, odd);
        }
    }

    const MOST: usize = i32::MAX as usize;
    let dtype = |tensor| Error::DTypeMismatch { tensor, expected: DType::F16, got: DType::Bf16 };
    let slices = |tensor, got| Error::SliceCount { tensor, expected: 2, got };
    let overlap = |tensor, expected| Error::RowStride { tensor, expected, got: expected - 1 };
    let overflow = |tensor, shape: String| Error::SizeOverflow { tensor, shape };
    let tokens = |limit| Error::SizeTooLarge { what: "tokens", limit, got: limit + 1 };
    let (stride, offset) = (format!("[2, {}]", usize::MAX), format!("[.., {} + Σ N_s]", usize::MAX));
    let no_row = |tensor, width| {
        let shape = format!("[1, {width}] with a row stride of {width}");
        Error::TooShort { tensor, shape, expected: width, got: width - 1 }
    };
    let room = |limit| Error::WorkspaceTooSmall { what: "pairs", limit, got: 6 };
    type Row = (&'static str, &'static [Stage], fn(&mut Call), Error);
    #[rustfmt::skip]
    let rows: [Row; 17] = [
        ("x of another type", READS_X, |call| call.sizes.dtype = DType::F16, dtype("x")),
        ("h of another type", &[Stage::Expand], |call| call.sizes.dtype = DType::F16, dtype("h")),
        ("too few slices of a", READS_X, |call| call.slices_a = 1, slices("a", 1)),
        ("too many slices of b", WRITES_OUT, |call| call.slices_b = 3, slices("b", 3)),
        ("overlapping rows of x", READS_X, |call| call.x_stride = Some(15), overlap("x", 16)),
        ("overlapping rows of out", WRITES_OUT, |call| call.out_stride = Some(16), overlap("out", 17)),
        ("a stride that overflows", READS_X, |call| call.x_stride = Some(usize::MAX), overflow("x", stride)),
        ("an offset that overflows", WRITES_OUT, |call| call.offset = usize::MAX, overflow("out", offset)),
        ("an x without a row for its index", READS_X, |call| {
            call.form = Tensor::XIndex;
            call.memory[Tensor::X as usize].len = 15;
        }, no_row("x", 16)),
        ("an out without a row for its index", WRITES_OUT, |call| {
            call.form = Tensor::OutIndex;
            call.memory[Tensor::Out as usize].len = 16;
        }, no_row("out", 17)),
        ("interleaved slices of two widths", WRITES_OUT, |call| {
            call.sizes.out_dims = OutDims::new(&[8, 4]).expect("two slices");
            call.order = SliceOrder::Interleaved;
        }, Error::UnequalSlices { out_dims: "8+4".to_owned() }),
        ("no ids to choose by", ALL, |call| call.no_ids = true, Error::NoTopkIds { experts: 4, top_k: 2 }),
        ("a map of no ids", ALL, |call| {
            call.no_ids = true;
            (call.sizes.experts, call.sizes.top_k) = (1, 1);
        }, Error::NothingToMap),
        ("tokens over 31 bits", ALL, |call| call.tokens = MOST + 1, tokens(MOST)),
        ("pairs over 31 bits", ALL, |call| call.tokens = MOST / 2 + 1, tokens(MOST / 2)),
        ("a workspace for fewer tokens", ALL, |call| call.room = (2, 2), room(4)),
        ("a workspace for fewer choices", ALL, |call| call.room = (1, 3), room(3)),
    ];
    let over: Row = (
        "a rank over R",
        ALL,
        |call| call.memory[Tensor::Ranks as usize].address = RANKS_OVER.as_ptr() as u64,
        Error::RankTooLarge { slot: 1, rank: 9, max_rank: 8 },
    );
    for (name, stages, spoil, expected) in rows.into_iter().chain(ranks_on_host.then_some(over)) {
        let mut call = good.clone();
        spoil(&mut call);
        refusals.push(Refusal { name: name.to_owned(), stages, call, expected });
    }
    refusals
}

/// Makes `backend` do a call, and then the same call spoiled in every way there is. Ranks are known to it
/// beforehand only when they are on the host.
///
/// # Panics
/// When the back end does anything but return the error that says what was spoiled and leave its outputs
/// as they were.
pub fn check_refusals<B: Backend>(backend: &B, ranks_on_host: bool) {
    let ids = backend.upload(&[1i32; 7]).expect("room for ids");
    let flags = backend.upload(&[1u8; 2]).expect("room for flags");
    let weights = backend.upload(&[1f32; 6]).expect("room for weights");
    let values = backend.upload(&[bf16::ONE; 1024]).expect("room for weights");
    let wide_ids = backend.upload(&[1i64; 6]).expect("room for ids");
    let entries = backend.upload(&[AdapterEntry::default(); 4]).expect("room for a table");
    let mut h = backend.upload(&[bf16::ZERO; 96]).expect("room for h");
    let mut out = backend.upload(&[bf16::ZERO; 102]).expect("room for out");
    let memory = DEMANDS.map(|Demand { tensor, elements: len, .. }| {
        let address = match tensor {
            Tensor::FlagsU8 => flags.view().address(),
            Tensor::X | Tensor::A | Tensor::B => values.view().address(),
            Tensor::TopkWeights => weights.view().address(),
            Tensor::TopkIds64 => wide_ids.view().address(),
            Tensor::Adapters => entries.view().address(),
            Tensor::H => h.view_mut().address(),
            Tensor::Out => out.view_mut().address(),
            _ => ids.view().address(),
        };
        Memory { address, len }
    });
    let good = Call {
        sizes: GOOD,
        tokens: TOKENS,
        on: None,
        form: Tensor::FlagsI32,
        no_ids: false,
        order: SliceOrder::InOrder,
        memory,
        slices_a: GOOD.out_dims.len(),
        slices_b: GOOD.out_dims.len(),
        x_stride: None,
        out_stride: None,
        offset: OFFSET,
        room: (GOOD.top_k, TOKENS),
    };
    let workspace = |(top_k, tokens)| {
        let projection = Projection::new(ProjectionSizes { top_k, ..GOOD }).expect("a projection");
        backend.workspace(&[projection], tokens).expect("room for a workspace")
    };
    let outputs = || {
        let read = |buffer| backend.download(buffer).expect("what was written");
        bytemuck::allocation::cast_vec::<_, u16>([read(&h), read(&out)].concat())
    };

    for &stage in WRITES {
        let before = outputs();
        let result = good.run(backend, &mut workspace(good.room), stage);
        assert!(result.is_ok(), "{stage:?} of a good call: {result:?}");
        assert_ne!(outputs(), before, "{stage:?} of a good call writes");
    }
    let before = outputs();
    for Refusal { name, stages, call, expected } in refusals(&good, ranks_on_host) {
        for &stage in stages {
            let result = call.run(backend, &mut workspace(call.room), stage);
            assert_eq!(result, Err(expected.clone()), "{stage:?} of a call where {name}");
            assert_eq!(outputs(), before, "{stage:?} of a call where {name} wrote something");
        }
    }
    for &stage in WRITES {
        let (mut held, mut other) = (workspace(good.room), workspace(good.room));
        let find = |workspace: &mut B::Workspace, tokens| {
            let call = Call { tokens, ..good.clone() };
            call.run(backend, workspace, Stage::Route).expect("a good call")
        };
        let is_refused = |workspace: &mut B::Workspace, route, what| {
            let result = Call { on: Some(route), ..good.clone() }.run(backend, workspace, stage);
            assert!(matches!(result, Err(Error::StaleRoute { .. })), "{stage:?} on {what}: {result:?}");
            assert_eq!(outputs(), before, "{stage:?} on {what} wrote something");
        };
        let route = find(&mut held, TOKENS);
        is_refused(&mut other, route, "the route of another workspace");
        is_refused(&mut held, find(&mut other, TOKENS - 1), "the route of fewer tokens");
        // What is refused leaves the route as it is.
        let mut short = Call { on: Some(route), ..good.clone() };
        short.memory[Tensor::A as usize].len = 0;
        short.memory[Tensor::B as usize].len = 0;
        assert!(short.run(backend, &mut held, stage).is_err());
        find(&mut held, TOKENS);
        is_refused(&mut held, route, "a route that another was found after");
    }
}
