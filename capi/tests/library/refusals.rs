//! What the library refuses: with which status and message, and with nothing written.

use crate::abi::{AdapterEntry, Forward, Projection, Routing, Status, Tensor};
use crate::calls::{ABSENT, Operands, PROJECTION, TOKENS, outputs};
use crate::functions::Functions;
use libtest_mimic::Failed;
use moe_lora::cpu::Cpu;
use std::ptr;

/// The structs of a call, each of which can be spoiled. `routed`: the call names the routing.
struct Call {
    projection: Projection,
    routing: Routing,
    forward: Forward,
    routed: bool,
}

/// What spoils a call, and how it is refused.
type Row = (fn(&mut Call), Status, &'static str);

fn plain_calls() -> Vec<Row> {
    use Status::*;
    vec![
        (|call| call.projection.max_rank = 0, ZeroSize, "max_rank is 0, expected at least 1"),
        (|call| call.projection.top_k = 65, SizeTooLarge, "top_k is 65, expected at most 64"),
        (|call| call.projection.slices = 0, ZeroSize, "slices is 0, expected at least 1"),
        (|call| call.projection.slices = 5, SizeTooLarge, "slices is 5, expected at most 4"),
        (
            |call| call.forward.offset = usize::MAX,
            SizeOverflow,
            "out of [.., 18446744073709551615 + Σ N_s] has more elements than can be addressed",
        ),
        (|call| call.forward.a[1] = call.forward.a[0], SliceCount, "a has 2 slices, expected 1"),
        (|call| call.forward.b[0] = ABSENT, SliceCount, "b has 0 slices, expected 1"),
        (
            |call| call.forward.out.elements = 47,
            TooShort,
            "out holds 47 elements, expected at least 48 for [6, 8] with a row stride of 8",
        ),
        (
            |call| call.forward.x_stride = 15,
            RowStride,
            "x has a row stride of 15 elements, expected at least 16",
        ),
        (
            |call| call.routing.topk_ids.data = ptr::null(),
            NullPointer,
            "topk_ids is a null pointer, expected 6 elements",
        ),
        (|call| call.routing.ranks.elements = 2, NullPointer, "ranks is a null pointer, expected 2 elements"),
        (
            |call| call.forward.x.data = call.forward.x.data.wrapping_byte_add(1),
            Misaligned,
            " is not aligned to its 2-byte elements",
        ),
        (
            |call| call.projection.dtype = 3,
            UnsupportedDtype,
            "projection.dtype is 3, expected 1 (bf16) or 2 (f16)",
        ),
        (
            |call| call.routing.ranks = Tensor { data: (&raw const RANKS).cast(), elements: 2 },
            RankTooLarge,
            "ranks[1] is 9, expected at most max_rank = 8",
        ),
        (
            |call| {
                call.projection.top_k = 3;
                call.routing.topk_ids = call.forward.x;
                call.routing.topk_ids.elements = 9;
                call.forward.topk_weights = ABSENT;
                call.forward.out.elements = 72
            },
            WorkspaceTooSmall,
            "workspace has room for pairs = 6, this call needs 9",
        ),
        (
            |call| call.routed = false,
            RouteNotKept,
            "the route is not valid: no call on this workspace has found one, or the last that was to has \
             failed",
        ),
        (|call| call.projection.size = 79, StructSize, "projection.size is 79, expected 80"),
        (
            |call| call.projection.out_dims[1] = 8,
            InvalidValue,
            "projection.out_dims is 8, expected 0 past the last slice",
        ),
        (
            |call| call.projection.out_dims[0] = 9,
            TooShort,
            "b holds 512 elements, expected at least 576 for [2, 4, 9, 8]",
        ),
        (|call| call.routing.size = 0, StructSize, "routing.size is 0, expected 96"),
        (|call| call.forward.size = 8, StructSize, "call.size is 8, expected 232"),
        (|call| call.forward.flags = 2, InvalidValue, "call.flags is 2, expected 0 or 1 (accumulate)"),
        (
            |call| call.projection.x_rows = -1,
            InvalidValue,
            "projection.x_rows is -1, expected 1 (token) or 2 (pair)",
        ),
        (
            |call| call.projection.b_experts = 0,
            InvalidValue,
            "projection.b_experts is 0, expected 1 (per expert) or 2 (shared)",
        ),
        (
            |call| call.routing.adapter_enabled_bytes = 2,
            InvalidValue,
            "routing.adapter_enabled_bytes is 2, expected 1 or 4",
        ),
    ]
}

/// Of what a call may say beside the plainest.
fn other_forms() -> Vec<Row> {
    use Status::*;
    vec![
        (
            |call| call.forward.order = 3,
            InvalidValue,
            "call.order is 3, expected 0 (in order), 1 (reversed) or 2 (interleaved)",
        ),
        (
            |call| {
                let Call { projection, forward, .. } = call;
                (projection.slices, projection.out_dims[1], forward.order) = (2, 16, 2);
                forward.a[1] = forward.a[0];
                // Refused before anything of it is read.
                forward.b[1] = Tensor { elements: 1024, ..forward.b[0] };
            },
            UnequalSlices,
            "interleaved slices have the widths 8+16, expected one width",
        ),
        (
            |call| call.routing.topk_ids = ABSENT,
            NoTopkIds,
            "topk_ids may be left out of a dense layer alone (E = 1, k = 1), this one has E = 4, k = 2",
        ),
        (
            |call| {
                (call.projection.experts, call.projection.top_k) = (1, 1);
                call.routing.topk_ids = ABSENT;
                call.routing.expert_map = call.routing.token_lora;
            },
            NothingToMap,
            "expert_map has nothing to map, as topk_ids is left out",
        ),
        (
            |call| call.routing.topk_ids_bytes = 2,
            InvalidValue,
            "routing.topk_ids_bytes is 2, expected 0, 4 or 8",
        ),
        (
            |call| {
                call.routing.topk_ids = Tensor { data: (&raw const WIDE_IDS).cast(), elements: 5 };
                call.routing.topk_ids_bytes = 8;
            },
            TooShort,
            "topk_ids holds 5 elements, expected at least 6 for [3, 2]",
        ),
        (
            |call| call.forward.x_index = Tensor { elements: 5, ..call.routing.topk_ids },
            TooShort,
            "x_index holds 5 elements, expected at least 6 for [6]",
        ),
        (
            |call| call.forward.out_index.elements = 6,
            NullPointer,
            "out_index is a null pointer, expected 6 elements",
        ),
        (
            |call| call.forward.adapters = adapters(2),
            WeightsTwice,
            "a is given beside adapters, expected one of the two",
        ),
        (
            |call| {
                call.forward.adapters = adapters(2);
                call.forward.a[0] = ABSENT;
            },
            WeightsTwice,
            "b is given beside adapters, expected one of the two",
        ),
        (
            |call| by_address(call, adapters(1)),
            TooShort,
            "adapters holds 1 elements, expected at least 2 for [2, 1]",
        ),
        (
            |call| by_address(call, Tensor { data: ptr::null(), elements: 2 }),
            NullPointer,
            "adapters is a null pointer, expected 2 elements",
        ),
        (
            |call| {
                let Tensor { data, elements } = adapters(2);
                by_address(call, Tensor { data: data.wrapping_byte_add(4), elements });
            },
            Misaligned,
            " is not aligned to its 8-byte elements",
        ),
    ]
}

/// Ids of 64 bits, one too few.
static WIDE_IDS: [i64; 5] = [0; 5];

/// A table in which every slot is off.
fn adapters(elements: usize) -> Tensor {
    const OFF: AdapterEntry = AdapterEntry { rank: 0, max_rank: 0, scaling: 0.0, reserved: 0, a: 0, b: 0 };
    static TABLE: [AdapterEntry; 2] = [OFF; 2];
    Tensor { data: (&raw const TABLE).cast(), elements }
}

fn by_address(call: &mut Call, adapters: Tensor) {
    call.forward.adapters = adapters;
    (call.forward.a[0], call.forward.b[0]) = (ABSENT, ABSENT);
}

pub fn bad_calls(functions: &Functions) -> Result<(), Failed> {
    let context = functions.cpu();
    for (spoil, status, message) in plain_calls().into_iter().chain(other_forms()) {
        // A workspace of its own: none keeps the route of another row.
        let workspace = functions.workspace(context, &PROJECTION, TOKENS);
        let mut operands = Operands::new(&Cpu)?;
        let before = outputs(&Cpu, &operands);
        let (routing, forward) = (operands.routing(), operands.forward(ptr::null()));
        let mut call = Call { projection: PROJECTION, routing, forward, routed: true };
        spoil(&mut call);
        if call.routed {
            call.forward.routing = &call.routing;
        }
        // SAFETY: structs and buffers live here; what is not so must be refused unread.
        let got = unsafe { (functions.forward)(workspace, ptr::null_mut(), &call.projection, &call.forward) };
        assert_eq!(got, status, "{message}: {}", functions.message());
        let said = functions.message();
        assert!(said.ends_with(message), "{said:?} is not {message:?}");
        assert_eq!(outputs(&Cpu, &operands), before, "{message}: something was written");
        // SAFETY: not used again.
        functions.done(unsafe { (functions.workspace_destroy)(workspace) });
    }
    functions.destroy(context, ptr::null_mut());
    Ok(())
}

/// Ranks of which one is over R.
static RANKS: [i32; 2] = [3, 9];

pub fn null_arguments(functions: &Functions) -> Result<(), Failed> {
    let context = functions.cpu();
    let workspace = functions.workspace(context, &PROJECTION, TOKENS);
    let mut operands = Operands::new(&Cpu)?;
    let routing = operands.routing();
    let (forward, shrink, expand) =
        (operands.forward(&routing), operands.shrink(&routing), operands.expand(&routing));
    let before = outputs(&Cpu, &operands);
    let (f, none, stream) = (functions, ptr::null_mut(), ptr::null_mut());
    let mut made = ptr::null_mut();
    let made_at = &raw mut made;
    let one = [ptr::from_ref(&PROJECTION)];
    let null_projection = [ptr::null()];
    let text = ptr::null_mut();
    // SAFETY: what is not null lives here.
    unsafe {
        type Row<'a> = (&'a str, &'a dyn Fn() -> Status);
        #[rustfmt::skip]
        let table: [Row<'_>; 15] = [
            ("context", &|| (f.context_create_cpu)(ptr::null_mut())),
            ("context", &|| (f.context_create_cuda)(0, ptr::null_mut())),
            ("projections", &|| (f.workspace_create)(context, ptr::null(), 1, 1, made_at)),
            ("projection", &|| (f.workspace_create)(context, null_projection.as_ptr(), 1, 1, made_at)),
            ("context", &|| (f.workspace_create)(ptr::null(), one.as_ptr(), 1, 1, made_at)),
            ("workspace", &|| (f.workspace_create)(context, one.as_ptr(), 1, 1, ptr::null_mut())),
            ("workspace", &|| (f.forward)(none, stream, &PROJECTION, &forward)),
            ("projection", &|| (f.forward)(workspace, stream, ptr::null(), &forward)),
            ("call", &|| (f.forward)(workspace, stream, &PROJECTION, ptr::null())),
            ("workspace", &|| (f.shrink)(none, stream, &PROJECTION, &shrink)),
            ("workspace", &|| (f.expand)(none, stream, &PROJECTION, &expand)),
            ("workspace", &|| (f.route)(none, stream, &PROJECTION, TOKENS, &routing)),
            ("routing", &|| (f.route)(workspace, stream, &PROJECTION, TOKENS, ptr::null())),
            ("workspace", &|| (f.plan)(none, &PROJECTION, &forward, text, 0, ptr::null_mut())),
            ("text", &|| (f.plan)(workspace, &PROJECTION, &forward, text, 1, ptr::null_mut())),
        ];
        for (argument, call) in table {
            assert_eq!(call(), Status::NullArgument, "{argument}");
            assert_eq!(functions.message(), format!("{argument} is a null pointer"));
        }
        assert_eq!((f.workspace_create)(context, one.as_ptr(), 0, 1, made_at), Status::ZeroSize);
        assert!(made.is_null(), "a handle was written");
    }
    assert_eq!(outputs(&Cpu, &operands), before, "something was written");
    functions.destroy(context, workspace);
    functions.destroy(ptr::null_mut(), ptr::null_mut());
    Ok(())
}

pub fn later_structs(functions: &Functions) -> Result<(), Failed> {
    /// A projection of a version that has one more field.
    #[repr(C)]
    struct Later(Projection, usize);
    let context = functions.cpu();
    let create = |field| {
        let size = size_of::<Later>();
        let later = Later(Projection { size, ..PROJECTION }, field);
        let projections = [ptr::from_ref(&later).cast::<Projection>()];
        let mut workspace = ptr::null_mut();
        // SAFETY: all of it lives here; the workspace is not used again.
        unsafe {
            let status =
                (functions.workspace_create)(context, projections.as_ptr(), 1, TOKENS, &mut workspace);
            functions.done((functions.workspace_destroy)(workspace));
            status
        }
    };
    assert_eq!(create(0), Status::Ok);
    assert_eq!(create(1 << 56), Status::StructSize);
    assert_eq!(functions.message(), "projection.size is 120, expected 112");
    // Of a struct as version 2 had it, what follows is not read.
    let earlier = Projection { size: 80, out_dims: [usize::MAX; 4], ..PROJECTION };
    let (projections, mut workspace) = ([ptr::from_ref(&earlier)], ptr::null_mut());
    // SAFETY: as above.
    unsafe {
        functions.done((functions.workspace_create)(
            context,
            projections.as_ptr(),
            1,
            TOKENS,
            &mut workspace,
        ));
        functions.done((functions.workspace_destroy)(workspace));
    }
    functions.destroy(context, ptr::null_mut());
    Ok(())
}

pub fn no_device(functions: &Functions) -> Result<(), Failed> {
    let mut context = ptr::null_mut();
    // SAFETY: written here.
    let status = unsafe { (functions.context_create_cuda)(u32::MAX >> 1, &mut context) };
    assert_eq!(status, Status::NoDevice);
    assert!(functions.message().starts_with("no CUDA device: "), "{}", functions.message());
    assert!(context.is_null(), "a handle was written");
    Ok(())
}
