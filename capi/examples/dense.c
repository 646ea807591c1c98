/*
 * q, k and v of an attention layer, whose slices have widths of their own, with adapters by address, on the
 * CPU. One adapter is exchanged between two calls. Both are checked against plain loops.
 *
 *     cc -std=c11 -I capi/include capi/examples/dense.c -L target/release -lmoe_lora -lm -o dense
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe_lora.h"

enum { T = 6, L = 2, S = 3, K = 24, R = 16, Q = 32, KV = 8, WIDTH = Q + 2 * KV };

static const size_t widths[S] = {Q, KV, KV};

/* A few roundings to bf16, each by 2^-8 at most, of values around 1. */
static const float TOLERANCE = 0.03f;

static uint16_t bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float widen(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static void fill(uint16_t *values, size_t count)
{
    static uint32_t state = 1;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = bf16((float)(state >> 8) / (1 << 23) - 1.0f);
    }
}

static void check(moe_lora_status status, const char *what)
{
    if (status != MOE_LORA_STATUS_OK) {
        fprintf(stderr, "%s: status %d: %s\n", what, (int)status, moe_lora_last_error());
        exit(1);
    }
}

/* An adapter, as it was loaded. Its matrices are allocated for its own rank, up to a multiple of 8. */
typedef struct {
    int32_t rank;
    uint32_t max_rank;
    float scaling;
    /* [max_rank, K] and [N, max_rank], a slice each. */
    uint16_t *a[S], *b[S];
} adapter;

static adapter load(int32_t rank, float scaling)
{
    adapter it = {.rank = rank, .max_rank = (uint32_t)(rank + 7) / 8 * 8, .scaling = scaling};
    for (int s = 0; s < S; s++) {
        /* K and N are multiples of 8, and so the bytes are of 16: aligned_alloc asks for that. */
        it.a[s] = aligned_alloc(16, it.max_rank * K * sizeof(uint16_t));
        it.b[s] = aligned_alloc(16, widths[s] * it.max_rank * sizeof(uint16_t));
        if (it.a[s] == NULL || it.b[s] == NULL)
            exit(1);
        fill(it.a[s], it.max_rank * K);
        fill(it.b[s], widths[s] * it.max_rank);
    }
    return it;
}

static void unload(adapter *it)
{
    for (int s = 0; s < S; s++) {
        free(it->a[s]);
        free(it->b[s]);
    }
}

/* The row of the table for an adapter; zeros would switch the slot off. On a GPU it is copied there, by an
 * ordinary copy on the stream of the calls. */
static void put(moe_lora_adapter_entry row[S], const adapter *it)
{
    for (int s = 0; s < S; s++) {
        row[s] = (moe_lora_adapter_entry){
            .rank = it->rank, .max_rank = it->max_rank, .scaling = it->scaling,
            .a = (uint64_t)(uintptr_t)it->a[s], .b = (uint64_t)(uintptr_t)it->b[s],
        };
    }
}

static uint16_t x[T][K], before[T][WIDTH], out[T][WIDTH];
/* The adapter of each token, -1 for none. */
static const int32_t token_lora[T] = {0, 1, -1, 1, 0, 0};

/* How far `out` is from `before` and what plain loops add to it. */
static float apart_from_loops(const adapter *adapters[L])
{
    float apart = 0;
    for (int t = 0; t < T; t++) {
        size_t column = 0;
        for (int s = 0; s < S; s++) {
            for (size_t n = 0; n < widths[s]; n++, column++) {
                float expected = widen(before[t][column]);
                const adapter *it = token_lora[t] < 0 ? NULL : adapters[token_lora[t]];
                for (int r = 0; it != NULL && r < it->rank; r++) {
                    float h = 0;
                    for (int c = 0; c < K; c++)
                        h += widen(x[t][c]) * widen(it->a[s][r * K + c]);
                    expected += it->scaling * h * widen(it->b[s][n * it->max_rank + r]);
                }
                const float error = fabsf(widen(out[t][column]) - expected) / fmaxf(1, fabsf(expected));
                /* Written so that NaN stays. */
                if (apart == apart && !(error <= apart))
                    apart = error;
            }
        }
    }
    return apart;
}

int main(void)
{
    fill(&x[0][0], sizeof x / sizeof(uint16_t));
    fill(&before[0][0], sizeof before / sizeof(uint16_t));
    adapter first = load(4, 0.5f), second = load(R, 0.125f), third = load(10, 0.25f);

    /* When the engine starts. A dense layer is one of one expert, which each token has chosen. */
    const moe_lora_projection qkv = {
        .size = sizeof qkv, .dtype = MOE_LORA_DTYPE_BF16, .x_rows = MOE_LORA_X_ROWS_TOKEN,
        .a_experts = MOE_LORA_EXPERT_WEIGHTS_PER_EXPERT, .b_experts = MOE_LORA_EXPERT_WEIGHTS_PER_EXPERT,
        .top_k = 1, .experts = 1, .slots = L, .max_rank = R, .slices = S, .in_dim = K,
        .out_dims = {Q, KV, KV},
    };
    const moe_lora_projection *projections[] = {&qkv};
    moe_lora_context *context;
    moe_lora_workspace *workspace;
    check(moe_lora_context_create_cpu(&context), "context");
    check(moe_lora_workspace_create(context, projections, 1, T, &workspace), "workspace");
    static moe_lora_adapter_entry table[L][S];
    put(table[0], &first);
    put(table[1], &second);

    /* For each batch. There are no `topk_ids`: there is no choice. */
    const moe_lora_routing routing = {.size = sizeof routing, .token_lora = {token_lora, T}};
    const moe_lora_forward_call call = {
        .size = sizeof call, .tokens = T, .routing = &routing, .x = {x, T * K}, .out = {out, T * WIDTH},
        .flags = MOE_LORA_ACCUMULATE, .adapters = {table, L * S},
    };
    memcpy(out, before, sizeof out);
    check(moe_lora_forward(workspace, NULL, &qkv, &call), "forward");
    const float apart = apart_from_loops((const adapter *[L]){&first, &second});

    /* Another adapter in the place of the second: the call itself stays as it is, and so would a graph. */
    put(table[1], &third);
    unload(&second);
    memcpy(out, before, sizeof out);
    check(moe_lora_forward(workspace, NULL, &qkv, &call), "forward");
    const float apart_after = apart_from_loops((const adapter *[L]){&first, &third});

    check(moe_lora_workspace_destroy(workspace), "workspace");
    check(moe_lora_context_destroy(context), "context");
    unload(&first);
    unload(&third);
    printf("moe-lora %s: at most %.1e apart from plain loops, %.1e after an exchange\n", moe_lora_version(),
           apart, apart_after);
    if (memcmp(out, before, sizeof out) == 0) {
        fprintf(stderr, "nothing was added\n");
        return 1;
    }
    return apart <= TOLERANCE && apart_after <= TOLERANCE ? 0 : 1;
}
