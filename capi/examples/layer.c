/*
 * One projection of a mixture-of-experts layer with two adapters, on the CPU, checked against plain loops.
 *
 *     cc -std=c11 -I capi/include capi/examples/layer.c -L target/release -lmoe_lora -lm -o layer
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moe_lora.h"

enum { T = 5, TOP_K = 2, E = 3, L = 2, R = 4, S = 2, K = 24, N = 8, P = T * TOP_K };

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

static uint16_t x[T][K], a[S][L][E][R][K], b[S][L][E][N][R], out[P][S * N], before[P][S * N];

int main(void)
{
    /* The router's choices; the adapter of each token, -1 for none; the ranks of the two adapters. */
    const int32_t topk_ids[T][TOP_K] = {{0, 1}, {2, 0}, {1, 2}, {0, 2}, {1, 0}};
    const float topk_weights[T][TOP_K] = {
        {0.75f, 0.25f}, {0.5f, 0.5f}, {1, 0.125f}, {0.5f, 1}, {0.25f, 0.75f},
    };
    const int32_t token_lora[T] = {0, 1, -1, 1, 0};
    const int32_t ranks[L] = {R, 2};
    fill(&x[0][0], sizeof x / sizeof(uint16_t));
    fill(&a[0][0][0][0][0], sizeof a / sizeof(uint16_t));
    fill(&b[0][0][0][0][0], sizeof b / sizeof(uint16_t));
    fill(&out[0][0], sizeof out / sizeof(uint16_t));
    memcpy(before, out, sizeof out);

    /* When the engine starts. */
    const moe_lora_projection w13 = {
        .size = sizeof w13, .dtype = MOE_LORA_DTYPE_BF16, .x_rows = MOE_LORA_X_ROWS_TOKEN,
        .a_experts = MOE_LORA_EXPERT_WEIGHTS_PER_EXPERT, .b_experts = MOE_LORA_EXPERT_WEIGHTS_PER_EXPERT,
        .top_k = TOP_K, .experts = E, .slots = L, .max_rank = R, .slices = S, .in_dim = K, .out_dim = N,
    };
    const moe_lora_projection *projections[] = {&w13};
    moe_lora_context *context;
    moe_lora_workspace *workspace;
    check(moe_lora_context_create_cpu(&context), "context");
    check(moe_lora_workspace_create(context, projections, 1, T, &workspace), "workspace");

    /* For each layer: the route; then, for each projection, what the adapters add to `out`. */
    const moe_lora_routing routing = {
        .size = sizeof routing, .topk_ids = {topk_ids, P}, .token_lora = {token_lora, T}, .ranks = {ranks, L},
    };
    moe_lora_forward_call call = {
        .size = sizeof call, .tokens = T, .routing = NULL, .x = {x, T * K}, .topk_weights = {topk_weights, P},
        .out = {out, P * S * N}, .flags = MOE_LORA_ACCUMULATE,
    };
    for (int s = 0; s < S; s++) {
        call.a[s] = (moe_lora_tensor){a[s], L * E * R * K};
        call.b[s] = (moe_lora_tensor){b[s], L * E * N * R};
    }
    check(moe_lora_route(workspace, NULL, &w13, T, &routing), "route");
    check(moe_lora_forward(workspace, NULL, &w13, &call), "forward");
    char plan[256];
    check(moe_lora_plan(workspace, &w13, &call, plan, sizeof plan, NULL), "plan");
    check(moe_lora_workspace_destroy(workspace), "workspace");
    check(moe_lora_context_destroy(context), "context");

    float apart = 0;
    int wrong = 0;
    for (int p = 0; p < P; p++) {
        const int t = p / TOP_K, l = token_lora[t], e = topk_ids[t][p % TOP_K];
        for (int s = 0; s < S; s++) {
            for (int n = 0; n < N; n++) {
                float expected = widen(before[p][s * N + n]);
                for (int r = 0; l >= 0 && r < ranks[l]; r++) {
                    float h = 0;
                    for (int c = 0; c < K; c++)
                        h += widen(x[t][c]) * widen(a[s][l][e][r][c]);
                    expected += topk_weights[t][p % TOP_K] * h * widen(b[s][l][e][n][r]);
                }
                const float got = widen(out[p][s * N + n]);
                const float error = fabsf(got - expected) / fmaxf(1, fabsf(expected));
                apart = fmaxf(apart, error);
                /* Written so that NaN is never within. */
                wrong += !(error <= TOLERANCE);
            }
        }
    }
    printf("moe-lora %s, %s: at most %.1e apart from plain loops\n", moe_lora_version(), plan, apart);
    if (memcmp(out, before, sizeof out) == 0) {
        fprintf(stderr, "nothing was added\n");
        return 1;
    }
    return wrong == 0 ? 0 : 1;
}
