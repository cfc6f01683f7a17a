// attention.cuh - what the attention kernels share: their parameters, tiles of rows in shared memory, sums over a row's lanes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "mma.cuh"
#include "reduce.cuh"

namespace fv {

struct AttentionParams {
    const void* q;           // (B, N, H, D)
    const void* k;           // (B, N, H, D)
    const void* v;           // (B, N, H, D), with `groups` (B, M, H, D); null: scores only
    void* out;               // (B, N, H, D), null without v
    const float* sizes;      // (B, N) or null
    const int32_t* groups;   // (B, N) or null: the row of v that each key has, none where negative
    float* class_rows;       // (B, H, class_count, N) or null
    float* received;         // (B, H, N) or null: column means
    float* log_sum_exp;      // (B, H, N) or null, natural logarithm; -inf where no key counts
    int64_t q_batch_stride, q_token_stride;
    int64_t k_batch_stride, k_token_stride;
    int64_t v_batch_stride, v_token_stride;
    int64_t out_batch_stride, out_token_stride;
    int32_t tokens;       // N
    int32_t heads;        // H
    int32_t class_count;  // softmax rows that are handed out: those of the first queries
    int32_t head_dim;     // D
    float scale;          // multiplies q·k; positive
    int32_t block_tiles;  // attention.cu: tiles of 16 queries a block
};
static_assert(sizeof(AttentionParams) == 160 && offsetof(AttentionParams, q_batch_stride) == 72 &&
                  offsetof(AttentionParams, tokens) == 136,
              "the launcher's layout");

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The maximum and the sum over the four lanes that share a row of a fragment.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
    return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 1);
    return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// One over the sum of a row of exponentials; a row in which no key counts attends to nothing.
__device__ __forceinline__ float inverse_sum(float sum) { return sum == 0.0f ? 0.0f : reciprocal_approx(sum); }

// What is subtracted from a row's scores: any number will do for a row in which no key counts.
__device__ __forceinline__ float finite_top(float top) { return top == -INFINITY ? 0.0f : top; }

}  // namespace fv
