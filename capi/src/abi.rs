//! The types of the C interface: plain data that is checked before it is used. The comments are the header's,
//! and speak C.

use std::ffi::c_void;

/// Version of this interface. It grows with each function, status or field that is added; nothing is taken
/// away or changes its meaning.
pub const MOE_LORA_ABI_VERSION: u32 = 3;

/// Length of the arrays of per-slice tensors: no projection has more slices.
pub const MOE_LORA_MAX_SLICES: usize = 4;

/// Bit of `flags`: add to `out`. Without it `out` is overwritten, with zeros where a pair is inactive.
pub const MOE_LORA_ACCUMULATE: u64 = 1;

/// What a function returns. After INTERNAL and DRIVER part of the call may have been launched or written.
/// After any other status but OK nothing was. moe_lora_last_error() names the argument, what was expected and
/// what came. A value keeps its meaning in all versions; later versions may add values.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done; on a GPU: queued.
    Ok = 0,
    /// A size that must be at least one is zero.
    ZeroSize = 1,
    /// A size is over what the operator supports.
    SizeTooLarge = 2,
    /// The sizes of a tensor multiply to more elements than can be addressed.
    SizeOverflow = 3,
    /// `a` or `b` has another number of tensors than the projection has slices.
    SliceCount = 4,
    /// A buffer holds fewer elements than its shape says.
    TooShort = 5,
    /// Rows overlap: the stride between them is less than their width.
    RowStride = 6,
    /// The data of a tensor is NULL although the tensor has elements.
    NullPointer = 7,
    /// The data of a tensor is not aligned to its elements.
    Misaligned = 8,
    /// `dtype` is none of moe_lora_dtype.
    UnsupportedDtype = 9,
    /// A slot's rank is over `max_rank` (CPU back end; a GPU clamps it).
    RankTooLarge = 10,
    /// The call is larger than the workspace was made for.
    WorkspaceTooSmall = 11,
    /// `routing` is NULL, and the workspace holds no route that fits the call.
    RouteNotKept = 12,
    /// There is no CUDA driver or no such device, or the library was built without the GPU back end.
    NoDevice = 13,
    /// The device is older than the kernels support.
    UnsupportedDevice = 14,
    /// A driver function failed. Part of a call may have been queued.
    Driver = 15,
    /// An argument that must not be NULL is.
    NullArgument = 16,
    /// The `size` of a struct is less than this library needs. Or the struct is of a later version and uses a
    /// field that this library does not know.
    StructSize = 17,
    /// A field has a value that it does not allow.
    InvalidValue = 18,
    /// A bug in the library. The call may have written part of its output.
    Internal = 19,
    /// A size is under what the operator supports.
    SizeTooSmall = 20,
    /// The tensors are of another type than the projection. Not returned by this version: only the projection
    /// has a type here.
    DtypeMismatch = 21,
    /// The file that `MOE_LORA_TUNING` names cannot be read, or is no tuning. (INVALID_VALUE before version
    /// 2.)
    Tuning = 22,
    /// The file that `MOE_LORA_TUNING` names was measured on another kind of device. (INVALID_VALUE before
    /// version 2.)
    TunedElsewhere = 23,
    /// The CUDA driver is older than the kernels need. (DRIVER before version 2.)
    DriverTooOld = 24,
    /// Memory or a workspace is of another device. Not returned by this version, which does not look up what
    /// an address belongs to.
    OtherDevice = 25,
    /// A call on a kept route names what belongs to the call that finds it. Not returned by this version.
    PartOfRoute = 26,
    /// An operation that no graph can hold was asked for during a capture. Not returned by this version.
    NotRecordable = 27,
    /// A size is no multiple of what it must be one of. Not returned by this version, which does not look
    /// into tables of adapters.
    NotMultiple = 28,
    /// A number is infinite or none. Not returned by this version, which does not look into tables of
    /// adapters.
    NotFinite = 29,
    /// Weights by address do not begin on a boundary of 16 bytes. Not returned by this version, which does
    /// not look into tables of adapters.
    OffBoundary = 30,
    /// Slices of different widths cannot be interleaved.
    UnequalSlices = 31,
    /// `topk_ids` is left out where tokens choose among experts.
    NoTopkIds = 32,
    /// `expert_map` is given where `topk_ids` is left out.
    NothingToMap = 33,
    /// A table of adapters is of matrices of other sizes than the call's. Not returned by this version.
    OtherTable = 34,
    /// `a` or `b` is given where `adapters` is.
    WeightsTwice = 35,
}

/// Type of `x`, `a`, `b`, `h` and `out`. Zero is no type, so that a forgotten field is refused.
#[repr(i32)]
#[derive(Clone, Copy, Debug)]
pub enum Dtype {
    /// bfloat16.
    Bf16 = 1,
    /// IEEE half precision.
    F16 = 2,
}

/// What a row of `x` belongs to.
#[repr(i32)]
#[derive(Clone, Copy, Debug)]
pub enum XRows {
    /// One row a token, [T, K]: gate and up projections.
    Token = 1,
    /// One row a (token, choice) pair, [P, K]: the down projection.
    Pair = 2,
}

/// Whether the experts of a slot have a matrix each or share one.
#[repr(i32)]
#[derive(Clone, Copy, Debug)]
pub enum ExpertWeights {
    /// One matrix an expert: [L, E, ...].
    PerExpert = 1,
    /// One matrix for all experts of a slot: [L, 1, ...].
    Shared = 2,
}

/// Where the columns of the slices are in a row of `out`, from `offset` on.
#[repr(i32)]
#[derive(Clone, Copy, Debug)]
pub enum SliceOrder {
    /// One slice behind another, the first one first.
    InOrder = 0,
    /// One slice behind another, the last one first: up before gate.
    Reversed = 1,
    /// Column by column: column n of slice s is at S*n + s. All slices must have one width.
    Interleaved = 2,
}

/// Memory that a call reads: host memory for the CPU back end, memory of the device for CUDA. {NULL, 0}
/// leaves a tensor out, where that is allowed.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    /// The first element, aligned to its type. On a GPU, 16-byte alignment is faster.
    pub data: *const c_void,
    /// Elements, not bytes, that may be read from there.
    pub elements: usize,
}

/// Memory that a call writes; see moe_lora_tensor.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TensorMut {
    /// The first element, aligned to its type. On a GPU, 16-byte alignment is faster.
    pub data: *mut c_void,
    /// Elements, not bytes, that may be written from there.
    pub elements: usize,
}

/// An entry of a table of adapters: the weights of one slot and slice. All zeros is no adapter.
///
/// It is 32 bytes, without padding, and lies in memory of the context's kind, as the weights do. The slice
/// adds scaling * b * (a * x), with as many ranks as the least of `rank`, `max_rank`, R and the slot's of
/// `ranks`. A slice of rank 0 adds nothing; its pairs are active for their other slices.
///
/// The library reads entries when the call runs, and checks none of them. Of each one with a `rank` over 0 it
/// is the caller's promise that
/// - `a` and `b` are addresses of as many elements as they say, of the projection's `dtype`;
/// - both are on boundaries of 16 bytes;
/// - `max_rank` is a multiple of 8, and at most R rounded up to a multiple of 8;
/// - nobody writes the weights while a call that was given the table may read them.
///
/// All of it holds for each replay of a graph with such a call too. Between two calls, or two replays, an
/// adapter is exchanged by an ordinary copy of its slot's S entries, on the same stream. What the old entries
/// named may be freed when the work that was queued before the copy has ended.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AdapterEntry {
    /// Rank in use. At 0 or less the slice is off.
    pub rank: i32,
    /// r: the rank that `a` and `b` are allocated for.
    pub max_rank: u32,
    /// Multiplies what the slice adds: a factor, finite.
    pub scaling: f32,
    /// 0.
    pub reserved: u32,
    /// Address of [E or 1, r, K] dtype. What is above `rank` may be anything.
    pub a: u64,
    /// Address of [E or 1, N, r] dtype. What is above `rank` may be anything.
    pub b: u64,
}

/// The sizes of one LoRA'd projection of a mixture-of-experts layer, or of a dense one, where E and k are 1.
/// All are counts of elements.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Projection {
    /// sizeof(moe_lora_projection).
    pub size: usize,
    /// A moe_lora_dtype: type of activations and weights.
    pub dtype: i32,
    /// A moe_lora_x_rows: what a row of `x` belongs to.
    pub x_rows: i32,
    /// A moe_lora_expert_weights: whether `a` has a matrix an expert.
    pub a_experts: i32,
    /// A moe_lora_expert_weights: whether `b` has a matrix an expert.
    pub b_experts: i32,
    /// k: experts chosen per token, 1 to 64.
    pub top_k: usize,
    /// E: experts whose adapters this device holds, at least 1.
    pub experts: usize,
    /// L: adapter slots resident on the device, at least 1. L times E must be below 2^31.
    pub slots: usize,
    /// R: rank that the stacked weights are allocated for, 1 to 1024.
    pub max_rank: usize,
    /// S: slices of the projection, 1 to MOE_LORA_MAX_SLICES; 2 for gate and up, 1 for down.
    pub slices: usize,
    /// K: width of a row of `x`, at least 1.
    pub in_dim: usize,
    /// N: width of one slice of the output, at least 1.
    pub out_dim: usize,
    /// N of each slice, where slices have widths of their own; 0: `out_dim`. Zero past the last slice. (From
    /// version 3 on.)
    pub out_dims: [usize; MOE_LORA_MAX_SLICES],
}

/// Who goes where: the tensors that routing reads. All ids are untrusted: a pair with one that is out of
/// range is inactive.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Routing {
    /// sizeof(moe_lora_routing).
    pub size: usize,
    /// [T, k] int32_t, or int64_t by `topk_ids_bytes`: global expert ids. May be left out of a dense layer,
    /// where k and E are 1 (from version 3 on): all tokens go to its one expert.
    pub topk_ids: Tensor,
    /// [T or more] int32_t: adapter slot of each token, -1 for none.
    pub token_lora: Tensor,
    /// [L] uint8_t or int32_t: 0 switches a slot off for this layer. May be left out: all slots are on.
    pub adapter_enabled: Tensor,
    /// Bytes of one element of `adapter_enabled`: 1 for uint8_t, 4 for int32_t; 0 when it is left out.
    pub adapter_enabled_bytes: usize,
    /// [L] int32_t: rank in use per slot, 0 to R. May be left out: R for all. The CPU refuses a larger rank;
    /// a GPU, which reads ranks only when it runs, clamps it.
    pub ranks: Tensor,
    /// [global experts] int32_t: local id of a global expert, -1 when another device holds it. May be left
    /// out: global ids are local. It is left out where `topk_ids` is.
    pub expert_map: Tensor,
    /// Bytes of one element of `topk_ids`: 4 for int32_t, 8 for int64_t; 0: 4. (From version 3 on.)
    pub topk_ids_bytes: usize,
}

/// A whole call: `out` (+)= topk_weights * b * (a * x), for every active pair.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Forward {
    /// sizeof(moe_lora_forward_call).
    pub size: usize,
    /// T; 0 is legal and does nothing.
    pub tokens: usize,
    /// Who goes where. NULL: the route that the workspace keeps from its last call that returned OK, or from
    /// moe_lora_route(). In a graph that call must have been captured too: a replay of the graph may
    /// overwrite what a call outside of it has found.
    pub routing: *const Routing,
    /// [T, K] or [P, K] dtype, as the projection's `x_rows` says, or rows that `x_index` names.
    pub x: Tensor,
    /// Elements from one row of `x` to the next, at least K; 0: K.
    pub x_stride: usize,
    /// The first S: [L, E or 1, R, K] dtype, a slice each. The others: {NULL, 0}.
    pub a: [Tensor; MOE_LORA_MAX_SLICES],
    /// The first S: [L, E or 1, N, R] dtype, a slice each. The others: {NULL, 0}.
    pub b: [Tensor; MOE_LORA_MAX_SLICES],
    /// [T, k] float: multiplies what is added for each pair. May be left out: 1.
    pub topk_weights: Tensor,
    /// [T, k, at least `offset` + the N of all slices] dtype, or rows that `out_index` names. May overlap
    /// nothing that the call reads.
    pub out: TensorMut,
    /// Elements from one row of `out`, a pair's, to the next, at least `offset` + the N of all slices; 0: as
    /// many.
    pub out_stride: usize,
    /// First column of `out` that the call writes.
    pub offset: usize,
    /// MOE_LORA_ACCUMULATE or 0.
    pub flags: u64,
    /// [P] int32_t: the row of `x` of each pair. `x` has then as many rows as its elements make, and a pair
    /// whose number is none of them is inactive. May be left out: rows are in the order that `x_rows` says.
    /// (From version 3 on.)
    pub x_index: Tensor,
    /// [P] int32_t: the row of `out` of each pair. `out` has then as many rows as its elements make. For a
    /// pair whose number is none of them nothing is written, nor is a row that no pair names. Of two pairs
    /// that name one row, it is not defined whose values the row has afterwards. May be left out: rows are in
    /// the order of pairs. (From version 3 on.)
    pub out_index: Tensor,
    /// A moe_lora_slice_order: where the columns of the slices are. (From version 3 on.)
    pub order: u64,
    /// [L, S] moe_lora_adapter_entry, on a boundary of 8 bytes: weights of each slot's own, by address. Then
    /// `a` and `b` are {NULL, 0}. May be left out: weights are stacked. (From version 3 on.)
    pub adapters: Tensor,
}

/// The first half of a call: `h` = a * x, zero for inactive pairs and above a slot's rank.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Shrink {
    /// sizeof(moe_lora_shrink_call).
    pub size: usize,
    /// T; 0 is legal and does nothing.
    pub tokens: usize,
    /// Who goes where. NULL: the route that the workspace keeps from its last call that returned OK, or from
    /// moe_lora_route(). In a graph that call must have been captured too: a replay of the graph may
    /// overwrite what a call outside of it has found.
    pub routing: *const Routing,
    /// [T, K] or [P, K] dtype, as the projection's `x_rows` says, or rows that `x_index` names.
    pub x: Tensor,
    /// Elements from one row of `x` to the next, at least K; 0: K.
    pub x_stride: usize,
    /// The first S: [L, E or 1, R, K] dtype, a slice each. The others: {NULL, 0}.
    pub a: [Tensor; MOE_LORA_MAX_SLICES],
    /// [S, P, R] dtype, written whole. May overlap nothing that the call reads.
    pub h: TensorMut,
    /// [P] int32_t: the row of `x` of each pair. `x` has then as many rows as its elements make, and a pair
    /// whose number is none of them is inactive. May be left out: rows are in the order that `x_rows` says.
    /// (From version 3 on.)
    pub x_index: Tensor,
    /// [L, S] moe_lora_adapter_entry, on a boundary of 8 bytes: weights of each slot's own, by address. Then
    /// `a` is {NULL, 0}. May be left out: weights are stacked. (From version 3 on.)
    pub adapters: Tensor,
}

/// The second half of a call: `out` (+)= topk_weights * b * h.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Expand {
    /// sizeof(moe_lora_expand_call).
    pub size: usize,
    /// T; 0 is legal and does nothing.
    pub tokens: usize,
    /// Who goes where. NULL: the route that the workspace keeps from its last call that returned OK, or from
    /// moe_lora_route(). In a graph that call must have been captured too: a replay of the graph may
    /// overwrite what a call outside of it has found.
    pub routing: *const Routing,
    /// [S, P, R] dtype, as moe_lora_shrink() leaves it.
    pub h: Tensor,
    /// The first S: [L, E or 1, N, R] dtype, a slice each. The others: {NULL, 0}.
    pub b: [Tensor; MOE_LORA_MAX_SLICES],
    /// [T, k] float: multiplies what is added for each pair. May be left out: 1.
    pub topk_weights: Tensor,
    /// [T, k, at least `offset` + the N of all slices] dtype, or rows that `out_index` names. May overlap
    /// nothing that the call reads.
    pub out: TensorMut,
    /// Elements from one row of `out`, a pair's, to the next, at least `offset` + the N of all slices; 0: as
    /// many.
    pub out_stride: usize,
    /// First column of `out` that the call writes.
    pub offset: usize,
    /// MOE_LORA_ACCUMULATE or 0.
    pub flags: u64,
    /// [P] int32_t: the row of `out` of each pair. `out` has then as many rows as its elements make. For a
    /// pair whose number is none of them nothing is written, nor is a row that no pair names. Of two pairs
    /// that name one row, it is not defined whose values the row has afterwards. May be left out: rows are in
    /// the order of pairs. (From version 3 on.)
    pub out_index: Tensor,
    /// A moe_lora_slice_order: where the columns of the slices are. (From version 3 on.)
    pub order: u64,
    /// [L, S] moe_lora_adapter_entry, on a boundary of 8 bytes: weights of each slot's own, by address. Then
    /// `b` is {NULL, 0}. May be left out: weights are stacked. (From version 3 on.)
    pub adapters: Tensor,
}
