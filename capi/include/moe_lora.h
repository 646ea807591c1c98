/*
 * moe-lora: the fused MoE-LoRA operator, from C.
 *
 *     out[p] (+)= topk_weights[p] * b[l, e] * (a[l, e] * x[row(p)])
 *
 * T tokens, k experts a token, P = T*k (token, choice) pairs, L adapter slots, E experts, rank R, S slices.
 * A row of x has K elements, a slice of the output N. Tensors are row-major with the innermost dimension
 * contiguous. Every shape, stride, offset and count is in elements.
 *
 * A program makes a context, then a workspace for its largest batch, and calls moe_lora_forward() once per
 * projection and batch. Every function returns a moe_lora_status, and moe_lora_last_error() says more.
 *
 * A struct that may grow begins with its size, `= {.size = sizeof(...)}`. Leave other fields zero where you
 * have nothing to say: a later version may add fields, and zero means what was before.
 *
 * The library cannot check these; they are the caller's part:
 * - A pointer that is not NULL points at what its field says.
 * - What an entry of a table of adapters names is as moe_lora_adapter_entry says.
 * - A handle was not destroyed.
 * - Memory is of the context's kind. During a call nothing else writes it, or reads what the call writes.
 * - A stream is of the device's primary context. It stays until the workspaces that were used on it are
 *   freed, or were used on another stream.
 *
 * A context may be used by several threads at a time, a workspace by one call at a time. A call on another
 * stream than the workspace's last waits for that one's work.
 *
 * Written by `cargo xtask header`: change capi/src instead.
 */

#ifndef MOE_LORA_H
#define MOE_LORA_H

#include <stddef.h>
#include <stdint.h>

/**
 * Version of this interface. It grows with each function, status or field that is added; nothing is taken
 * away or changes its meaning.
 */
#define MOE_LORA_ABI_VERSION 3

/**
 * Length of the arrays of per-slice tensors: no projection has more slices.
 */
#define MOE_LORA_MAX_SLICES 4

/**
 * Bit of `flags`: add to `out`. Without it `out` is overwritten, with zeros where a pair is inactive.
 */
#define MOE_LORA_ACCUMULATE 1

/**
 * What a function returns. After INTERNAL and DRIVER part of the call may have been launched or written.
 * After any other status but OK nothing was. moe_lora_last_error() names the argument, what was expected and
 * what came. A value keeps its meaning in all versions; later versions may add values.
 */
enum moe_lora_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * Done; on a GPU: queued.
     */
    MOE_LORA_STATUS_OK = 0,
    /**
     * A size that must be at least one is zero.
     */
    MOE_LORA_STATUS_ZERO_SIZE = 1,
    /**
     * A size is over what the operator supports.
     */
    MOE_LORA_STATUS_SIZE_TOO_LARGE = 2,
    /**
     * The sizes of a tensor multiply to more elements than can be addressed.
     */
    MOE_LORA_STATUS_SIZE_OVERFLOW = 3,
    /**
     * `a` or `b` has another number of tensors than the projection has slices.
     */
    MOE_LORA_STATUS_SLICE_COUNT = 4,
    /**
     * A buffer holds fewer elements than its shape says.
     */
    MOE_LORA_STATUS_TOO_SHORT = 5,
    /**
     * Rows overlap: the stride between them is less than their width.
     */
    MOE_LORA_STATUS_ROW_STRIDE = 6,
    /**
     * The data of a tensor is NULL although the tensor has elements.
     */
    MOE_LORA_STATUS_NULL_POINTER = 7,
    /**
     * The data of a tensor is not aligned to its elements.
     */
    MOE_LORA_STATUS_MISALIGNED = 8,
    /**
     * `dtype` is none of moe_lora_dtype.
     */
    MOE_LORA_STATUS_UNSUPPORTED_DTYPE = 9,
    /**
     * A slot's rank is over `max_rank` (CPU back end; a GPU clamps it).
     */
    MOE_LORA_STATUS_RANK_TOO_LARGE = 10,
    /**
     * The call is larger than the workspace was made for.
     */
    MOE_LORA_STATUS_WORKSPACE_TOO_SMALL = 11,
    /**
     * `routing` is NULL, and the workspace holds no route that fits the call.
     */
    MOE_LORA_STATUS_ROUTE_NOT_KEPT = 12,
    /**
     * There is no CUDA driver or no such device, or the library was built without the GPU back end.
     */
    MOE_LORA_STATUS_NO_DEVICE = 13,
    /**
     * The device is older than the kernels support.
     */
    MOE_LORA_STATUS_UNSUPPORTED_DEVICE = 14,
    /**
     * A driver function failed. Part of a call may have been queued.
     */
    MOE_LORA_STATUS_DRIVER = 15,
    /**
     * An argument that must not be NULL is.
     */
    MOE_LORA_STATUS_NULL_ARGUMENT = 16,
    /**
     * The `size` of a struct is less than this library needs. Or the struct is of a later version and uses a
     * field that this library does not know.
     */
    MOE_LORA_STATUS_STRUCT_SIZE = 17,
    /**
     * A field has a value that it does not allow.
     */
    MOE_LORA_STATUS_INVALID_VALUE = 18,
    /**
     * A bug in the library. The call may have written part of its output.
     */
    MOE_LORA_STATUS_INTERNAL = 19,
    /**
     * A size is under what the operator supports.
     */
    MOE_LORA_STATUS_SIZE_TOO_SMALL = 20,
    /**
     * The tensors are of another type than the projection. Not returned by this version: only the projection
     * has a type here.
     */
    MOE_LORA_STATUS_DTYPE_MISMATCH = 21,
    /**
     * The file that `MOE_LORA_TUNING` names cannot be read, or is no tuning. (INVALID_VALUE before version
     * 2.)
     */
    MOE_LORA_STATUS_TUNING = 22,
    /**
     * The file that `MOE_LORA_TUNING` names was measured on another kind of device. (INVALID_VALUE before
     * version 2.)
     */
    MOE_LORA_STATUS_TUNED_ELSEWHERE = 23,
    /**
     * The CUDA driver is older than the kernels need. (DRIVER before version 2.)
     */
    MOE_LORA_STATUS_DRIVER_TOO_OLD = 24,
    /**
     * Memory or a workspace is of another device. Not returned by this version, which does not look up what
     * an address belongs to.
     */
    MOE_LORA_STATUS_OTHER_DEVICE = 25,
    /**
     * A call on a kept route names what belongs to the call that finds it. Not returned by this version.
     */
    MOE_LORA_STATUS_PART_OF_ROUTE = 26,
    /**
     * An operation that no graph can hold was asked for during a capture. Not returned by this version.
     */
    MOE_LORA_STATUS_NOT_RECORDABLE = 27,
    /**
     * A size is no multiple of what it must be one of. Not returned by this version, which does not look
     * into tables of adapters.
     */
    MOE_LORA_STATUS_NOT_MULTIPLE = 28,
    /**
     * A number is infinite or none. Not returned by this version, which does not look into tables of
     * adapters.
     */
    MOE_LORA_STATUS_NOT_FINITE = 29,
    /**
     * Weights by address do not begin on a boundary of 16 bytes. Not returned by this version, which does
     * not look into tables of adapters.
     */
    MOE_LORA_STATUS_OFF_BOUNDARY = 30,
    /**
     * Slices of different widths cannot be interleaved.
     */
    MOE_LORA_STATUS_UNEQUAL_SLICES = 31,
    /**
     * `topk_ids` is left out where tokens choose among experts.
     */
    MOE_LORA_STATUS_NO_TOPK_IDS = 32,
    /**
     * `expert_map` is given where `topk_ids` is left out.
     */
    MOE_LORA_STATUS_NOTHING_TO_MAP = 33,
    /**
     * A table of adapters is of matrices of other sizes than the call's. Not returned by this version.
     */
    MOE_LORA_STATUS_OTHER_TABLE = 34,
    /**
     * `a` or `b` is given where `adapters` is.
     */
    MOE_LORA_STATUS_WEIGHTS_TWICE = 35,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum moe_lora_status moe_lora_status;
#else
typedef int32_t moe_lora_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Type of `x`, `a`, `b`, `h` and `out`. Zero is no type, so that a forgotten field is refused.
 */
enum moe_lora_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * bfloat16.
     */
    MOE_LORA_DTYPE_BF16 = 1,
    /**
     * IEEE half precision.
     */
    MOE_LORA_DTYPE_F16 = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum moe_lora_dtype moe_lora_dtype;
#else
typedef int32_t moe_lora_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What a row of `x` belongs to.
 */
enum moe_lora_x_rows
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * One row a token, [T, K]: gate and up projections.
     */
    MOE_LORA_X_ROWS_TOKEN = 1,
    /**
     * One row a (token, choice) pair, [P, K]: the down projection.
     */
    MOE_LORA_X_ROWS_PAIR = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum moe_lora_x_rows moe_lora_x_rows;
#else
typedef int32_t moe_lora_x_rows;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Whether the experts of a slot have a matrix each or share one.
 */
enum moe_lora_expert_weights
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * One matrix an expert: [L, E, ...].
     */
    MOE_LORA_EXPERT_WEIGHTS_PER_EXPERT = 1,
    /**
     * One matrix for all experts of a slot: [L, 1, ...].
     */
    MOE_LORA_EXPERT_WEIGHTS_SHARED = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum moe_lora_expert_weights moe_lora_expert_weights;
#else
typedef int32_t moe_lora_expert_weights;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Where the columns of the slices are in a row of `out`, from `offset` on.
 */
enum moe_lora_slice_order
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * One slice behind another, the first one first.
     */
    MOE_LORA_SLICE_ORDER_IN_ORDER = 0,
    /**
     * One slice behind another, the last one first: up before gate.
     */
    MOE_LORA_SLICE_ORDER_REVERSED = 1,
    /**
     * Column by column: column n of slice s is at S*n + s. All slices must have one width.
     */
    MOE_LORA_SLICE_ORDER_INTERLEAVED = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum moe_lora_slice_order moe_lora_slice_order;
#else
typedef int32_t moe_lora_slice_order;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Where calls run: the CPU, or a CUDA device. May be used by several threads at a time.
 */
typedef struct moe_lora_context moe_lora_context;

/**
 * Scratch memory and the last route of calls on one context. May be used by one call at a time.
 */
typedef struct moe_lora_workspace moe_lora_workspace;

/**
 * The sizes of one LoRA'd projection of a mixture-of-experts layer, or of a dense one, where E and k are 1.
 * All are counts of elements.
 */
typedef struct {
    /**
     * sizeof(moe_lora_projection).
     */
    size_t size;
    /**
     * A moe_lora_dtype: type of activations and weights.
     */
    int32_t dtype;
    /**
     * A moe_lora_x_rows: what a row of `x` belongs to.
     */
    int32_t x_rows;
    /**
     * A moe_lora_expert_weights: whether `a` has a matrix an expert.
     */
    int32_t a_experts;
    /**
     * A moe_lora_expert_weights: whether `b` has a matrix an expert.
     */
    int32_t b_experts;
    /**
     * k: experts chosen per token, 1 to 64.
     */
    size_t top_k;
    /**
     * E: experts whose adapters this device holds, at least 1.
     */
    size_t experts;
    /**
     * L: adapter slots resident on the device, at least 1. L times E must be below 2^31.
     */
    size_t slots;
    /**
     * R: rank that the stacked weights are allocated for, 1 to 1024.
     */
    size_t max_rank;
    /**
     * S: slices of the projection, 1 to MOE_LORA_MAX_SLICES; 2 for gate and up, 1 for down.
     */
    size_t slices;
    /**
     * K: width of a row of `x`, at least 1.
     */
    size_t in_dim;
    /**
     * N: width of one slice of the output, at least 1.
     */
    size_t out_dim;
    /**
     * N of each slice, where slices have widths of their own; 0: `out_dim`. Zero past the last slice. (From
     * version 3 on.)
     */
    size_t out_dims[MOE_LORA_MAX_SLICES];
} moe_lora_projection;

/**
 * Memory that a call reads: host memory for the CPU back end, memory of the device for CUDA. {NULL, 0}
 * leaves a tensor out, where that is allowed.
 */
typedef struct {
    /**
     * The first element, aligned to its type. On a GPU, 16-byte alignment is faster.
     */
    const void *data;
    /**
     * Elements, not bytes, that may be read from there.
     */
    size_t elements;
} moe_lora_tensor;

/**
 * Who goes where: the tensors that routing reads. All ids are untrusted: a pair with one that is out of
 * range is inactive.
 */
typedef struct {
    /**
     * sizeof(moe_lora_routing).
     */
    size_t size;
    /**
     * [T, k] int32_t, or int64_t by `topk_ids_bytes`: global expert ids. May be left out of a dense layer,
     * where k and E are 1 (from version 3 on): all tokens go to its one expert.
     */
    moe_lora_tensor topk_ids;
    /**
     * [T or more] int32_t: adapter slot of each token, -1 for none.
     */
    moe_lora_tensor token_lora;
    /**
     * [L] uint8_t or int32_t: 0 switches a slot off for this layer. May be left out: all slots are on.
     */
    moe_lora_tensor adapter_enabled;
    /**
     * Bytes of one element of `adapter_enabled`: 1 for uint8_t, 4 for int32_t; 0 when it is left out.
     */
    size_t adapter_enabled_bytes;
    /**
     * [L] int32_t: rank in use per slot, 0 to R. May be left out: R for all. The CPU refuses a larger rank;
     * a GPU, which reads ranks only when it runs, clamps it.
     */
    moe_lora_tensor ranks;
    /**
     * [global experts] int32_t: local id of a global expert, -1 when another device holds it. May be left
     * out: global ids are local. It is left out where `topk_ids` is.
     */
    moe_lora_tensor expert_map;
    /**
     * Bytes of one element of `topk_ids`: 4 for int32_t, 8 for int64_t; 0: 4. (From version 3 on.)
     */
    size_t topk_ids_bytes;
} moe_lora_routing;

/**
 * Memory that a call writes; see moe_lora_tensor.
 */
typedef struct {
    /**
     * The first element, aligned to its type. On a GPU, 16-byte alignment is faster.
     */
    void *data;
    /**
     * Elements, not bytes, that may be written from there.
     */
    size_t elements;
} moe_lora_tensor_mut;

/**
 * A whole call: `out` (+)= topk_weights * b * (a * x), for every active pair.
 */
typedef struct {
    /**
     * sizeof(moe_lora_forward_call).
     */
    size_t size;
    /**
     * T; 0 is legal and does nothing.
     */
    size_t tokens;
    /**
     * Who goes where. NULL: the route that the workspace keeps from its last call that returned OK, or from
     * moe_lora_route(). In a graph that call must have been captured too: a replay of the graph may
     * overwrite what a call outside of it has found.
     */
    const moe_lora_routing *routing;
    /**
     * [T, K] or [P, K] dtype, as the projection's `x_rows` says, or rows that `x_index` names.
     */
    moe_lora_tensor x;
    /**
     * Elements from one row of `x` to the next, at least K; 0: K.
     */
    size_t x_stride;
    /**
     * The first S: [L, E or 1, R, K] dtype, a slice each. The others: {NULL, 0}.
     */
    moe_lora_tensor a[MOE_LORA_MAX_SLICES];
    /**
     * The first S: [L, E or 1, N, R] dtype, a slice each. The others: {NULL, 0}.
     */
    moe_lora_tensor b[MOE_LORA_MAX_SLICES];
    /**
     * [T, k] float: multiplies what is added for each pair. May be left out: 1.
     */
    moe_lora_tensor topk_weights;
    /**
     * [T, k, at least `offset` + the N of all slices] dtype, or rows that `out_index` names. May overlap
     * nothing that the call reads.
     */
    moe_lora_tensor_mut out;
    /**
     * Elements from one row of `out`, a pair's, to the next, at least `offset` + the N of all slices; 0: as
     * many.
     */
    size_t out_stride;
    /**
     * First column of `out` that the call writes.
     */
    size_t offset;
    /**
     * MOE_LORA_ACCUMULATE or 0.
     */
    uint64_t flags;
    /**
     * [P] int32_t: the row of `x` of each pair. `x` has then as many rows as its elements make, and a pair
     * whose number is none of them is inactive. May be left out: rows are in the order that `x_rows` says.
     * (From version 3 on.)
     */
    moe_lora_tensor x_index;
    /**
     * [P] int32_t: the row of `out` of each pair. `out` has then as many rows as its elements make. For a
     * pair whose number is none of them nothing is written, nor is a row that no pair names. Of two pairs
     * that name one row, it is not defined whose values the row has afterwards. May be left out: rows are in
     * the order of pairs. (From version 3 on.)
     */
    moe_lora_tensor out_index;
    /**
     * A moe_lora_slice_order: where the columns of the slices are. (From version 3 on.)
     */
    uint64_t order;
    /**
     * [L, S] moe_lora_adapter_entry, on a boundary of 8 bytes: weights of each slot's own, by address. Then
     * `a` and `b` are {NULL, 0}. May be left out: weights are stacked. (From version 3 on.)
     */
    moe_lora_tensor adapters;
} moe_lora_forward_call;

/**
 * The first half of a call: `h` = a * x, zero for inactive pairs and above a slot's rank.
 */
typedef struct {
    /**
     * sizeof(moe_lora_shrink_call).
     */
    size_t size;
    /**
     * T; 0 is legal and does nothing.
     */
    size_t tokens;
    /**
     * Who goes where. NULL: the route that the workspace keeps from its last call that returned OK, or from
     * moe_lora_route(). In a graph that call must have been captured too: a replay of the graph may
     * overwrite what a call outside of it has found.
     */
    const moe_lora_routing *routing;
    /**
     * [T, K] or [P, K] dtype, as the projection's `x_rows` says, or rows that `x_index` names.
     */
    moe_lora_tensor x;
    /**
     * Elements from one row of `x` to the next, at least K; 0: K.
     */
    size_t x_stride;
    /**
     * The first S: [L, E or 1, R, K] dtype, a slice each. The others: {NULL, 0}.
     */
    moe_lora_tensor a[MOE_LORA_MAX_SLICES];
    /**
     * [S, P, R] dtype, written whole. May overlap nothing that the call reads.
     */
    moe_lora_tensor_mut h;
    /**
     * [P] int32_t: the row of `x` of each pair. `x` has then as many rows as its elements make, and a pair
     * whose number is none of them is inactive. May be left out: rows are in the order that `x_rows` says.
     * (From version 3 on.)
     */
    moe_lora_tensor x_index;
    /**
     * [L, S] moe_lora_adapter_entry, on a boundary of 8 bytes: weights of each slot's own, by address. Then
     * `a` is {NULL, 0}. May be left out: weights are stacked. (From version 3 on.)
     */
    moe_lora_tensor adapters;
} moe_lora_shrink_call;

/**
 * The second half of a call: `out` (+)= topk_weights * b * h.
 */
typedef struct {
    /**
     * sizeof(moe_lora_expand_call).
     */
    size_t size;
    /**
     * T; 0 is legal and does nothing.
     */
    size_t tokens;
    /**
     * Who goes where. NULL: the route that the workspace keeps from its last call that returned OK, or from
     * moe_lora_route(). In a graph that call must have been captured too: a replay of the graph may
     * overwrite what a call outside of it has found.
     */
    const moe_lora_routing *routing;
    /**
     * [S, P, R] dtype, as moe_lora_shrink() leaves it.
     */
    moe_lora_tensor h;
    /**
     * The first S: [L, E or 1, N, R] dtype, a slice each. The others: {NULL, 0}.
     */
    moe_lora_tensor b[MOE_LORA_MAX_SLICES];
    /**
     * [T, k] float: multiplies what is added for each pair. May be left out: 1.
     */
    moe_lora_tensor topk_weights;
    /**
     * [T, k, at least `offset` + the N of all slices] dtype, or rows that `out_index` names. May overlap
     * nothing that the call reads.
     */
    moe_lora_tensor_mut out;
    /**
     * Elements from one row of `out`, a pair's, to the next, at least `offset` + the N of all slices; 0: as
     * many.
     */
    size_t out_stride;
    /**
     * First column of `out` that the call writes.
     */
    size_t offset;
    /**
     * MOE_LORA_ACCUMULATE or 0.
     */
    uint64_t flags;
    /**
     * [P] int32_t: the row of `out` of each pair. `out` has then as many rows as its elements make. For a
     * pair whose number is none of them nothing is written, nor is a row that no pair names. Of two pairs
     * that name one row, it is not defined whose values the row has afterwards. May be left out: rows are in
     * the order of pairs. (From version 3 on.)
     */
    moe_lora_tensor out_index;
    /**
     * A moe_lora_slice_order: where the columns of the slices are. (From version 3 on.)
     */
    uint64_t order;
    /**
     * [L, S] moe_lora_adapter_entry, on a boundary of 8 bytes: weights of each slot's own, by address. Then
     * `b` is {NULL, 0}. May be left out: weights are stacked. (From version 3 on.)
     */
    moe_lora_tensor adapters;
} moe_lora_expand_call;

/**
 * An entry of a table of adapters: the weights of one slot and slice. All zeros is no adapter.
 *
 * It is 32 bytes, without padding, and lies in memory of the context's kind, as the weights do. The slice
 * adds scaling * b * (a * x), with as many ranks as the least of `rank`, `max_rank`, R and the slot's of
 * `ranks`. A slice of rank 0 adds nothing; its pairs are active for their other slices.
 *
 * The library reads entries when the call runs, and checks none of them. Of each one with a `rank` over 0 it
 * is the caller's promise that
 * - `a` and `b` are addresses of as many elements as they say, of the projection's `dtype`;
 * - both are on boundaries of 16 bytes;
 * - `max_rank` is a multiple of 8, and at most R rounded up to a multiple of 8;
 * - nobody writes the weights while a call that was given the table may read them.
 *
 * All of it holds for each replay of a graph with such a call too. Between two calls, or two replays, an
 * adapter is exchanged by an ordinary copy of its slot's S entries, on the same stream. What the old entries
 * named may be freed when the work that was queued before the copy has ended.
 */
typedef struct {
    /**
     * Rank in use. At 0 or less the slice is off.
     */
    int32_t rank;
    /**
     * r: the rank that `a` and `b` are allocated for.
     */
    uint32_t max_rank;
    /**
     * Multiplies what the slice adds: a factor, finite.
     */
    float scaling;
    /**
     * 0.
     */
    uint32_t reserved;
    /**
     * Address of [E or 1, r, K] dtype. What is above `rank` may be anything.
     */
    uint64_t a;
    /**
     * Address of [E or 1, N, r] dtype. What is above `rank` may be anything.
     */
    uint64_t b;
} moe_lora_adapter_entry;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of this library, for example "0.2.0".
 */
const char *moe_lora_version(void);

/**
 * The version of this library's interface: MOE_LORA_ABI_VERSION of its header. A program can use a library
 * of the same or a later version.
 */
uint32_t moe_lora_abi_version(void);

/**
 * The message of this thread's last error: the argument, what was expected, what came. UTF-8, never NULL. It
 * is valid until this thread's next call that fails.
 */
const char *moe_lora_last_error(void);

/**
 * Makes a context for calls on the CPU. They use host memory and all cores, and are done when they return.
 *
 * `context`: where the handle is written, on success alone.
 */
moe_lora_status moe_lora_context_create_cpu(moe_lora_context **context);

/**
 * Makes a context for calls on CUDA device `ordinal`, in its primary context, which CUDA's runtime and so
 * PyTorch use too. Loads the kernels; the thread's current CUDA context stays what it was.
 *
 * `context`: where the handle is written, on success alone.
 */
moe_lora_status moe_lora_context_create_cuda(uint32_t ordinal, moe_lora_context **context);

/**
 * Lets go of a context; NULL is allowed. Workspaces made on it stay usable.
 */
moe_lora_status moe_lora_context_destroy(moe_lora_context *context);

/**
 * Makes the scratch memory for calls of up to `max_tokens` tokens on any of `projection_count` projections.
 * Calls themselves allocate nothing on a device.
 *
 * `projections`: pointers to the projections, read here and not kept.
 * `workspace`: where the handle is written, on success alone.
 */
moe_lora_status moe_lora_workspace_create(const moe_lora_context *context,
                                          const moe_lora_projection *const *projections,
                                          size_t projection_count,
                                          size_t max_tokens,
                                          moe_lora_workspace **workspace);

/**
 * Frees a workspace; NULL is allowed. Work that was queued with it must have ended. A graph that names it
 * must not be replayed again.
 */
moe_lora_status moe_lora_workspace_destroy(moe_lora_workspace *workspace);

/**
 * Finds the route of a layer and keeps it in the workspace. Later calls with the same number of tokens use
 * it by a `routing` of NULL. Their projections must have the same `top_k`, `experts`, `slots` and
 * `max_rank`.
 *
 * `stream`: a CUstream (a cudaStream_t) of the device; NULL: its default stream. The CPU ignores it.
 * `tokens`: T; 0 is legal and does nothing.
 */
moe_lora_status moe_lora_route(moe_lora_workspace *workspace,
                               void *stream,
                               const moe_lora_projection *projection,
                               size_t tokens,
                               const moe_lora_routing *routing);

/**
 * A whole call. On a GPU it is queued on `stream`. It allocates nothing, waits for nothing and can be
 * captured into a graph. All memory that it names must stay until it has run.
 *
 * `stream`: a CUstream (a cudaStream_t) of the device; NULL: its default stream. The CPU ignores it.
 */
moe_lora_status moe_lora_forward(moe_lora_workspace *workspace,
                                 void *stream,
                                 const moe_lora_projection *projection,
                                 const moe_lora_forward_call *call);

/**
 * The first half of a call alone. For tensor parallelism, where `h` is reduced or gathered between the
 * halves. Queued as moe_lora_forward() is.
 *
 * `stream`: a CUstream (a cudaStream_t) of the device; NULL: its default stream. The CPU ignores it.
 */
moe_lora_status moe_lora_shrink(moe_lora_workspace *workspace,
                                void *stream,
                                const moe_lora_projection *projection,
                                const moe_lora_shrink_call *call);

/**
 * The second half of a call alone. Queued as moe_lora_forward() is.
 *
 * `stream`: a CUstream (a cudaStream_t) of the device; NULL: its default stream. The CPU ignores it.
 */
moe_lora_status moe_lora_expand(moe_lora_workspace *workspace,
                                void *stream,
                                const moe_lora_projection *projection,
                                const moe_lora_expand_call *call);

/**
 * Describes in words what moe_lora_forward() would launch: kernels, tiles, grids, width of offsets. It
 * checks the call and reads no tensor.
 *
 * `text`: where the description is written, cut to `capacity` bytes, of which the last is a NUL; may be NULL
 * when `capacity` is 0.
 * `length`: where the bytes of the whole description are written, without the NUL; may be NULL.
 */
moe_lora_status moe_lora_plan(const moe_lora_workspace *workspace,
                              const moe_lora_projection *projection,
                              const moe_lora_forward_call *call,
                              char *text,
                              size_t capacity,
                              size_t *length);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MOE_LORA_H */
