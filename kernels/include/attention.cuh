// attention.cuh - what the attention kernels share: their parameters, tiles of rows in shared memory, sums over a row's lanes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "element.cuh"
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
    const int32_t* pool_offsets;  // (B, M+1): a plan by which the rows of `out` are pooled; null without `pooled`
    const int32_t* pool_members;  // (B, N)
    const float* pool_weights;    // (B, N)
    void* pooled;                 // (B, M, H, D) or null
    uint32_t* arrived;            // (B, H): 0 before and after every launch; null without `pooled`
    int64_t q_batch_stride, q_token_stride;
    int64_t k_batch_stride, k_token_stride;
    int64_t v_batch_stride, v_token_stride;
    int64_t out_batch_stride, out_token_stride;
    int64_t pooled_batch_stride, pooled_token_stride;
    int32_t tokens;       // N
    int32_t heads;        // H
    int32_t class_count;  // softmax rows that are handed out: those of the first queries
    int32_t head_dim;     // D
    float scale;          // multiplies q·k; positive
    int32_t block_tiles;  // attention.cu: tiles of 16 queries a block
    int32_t pool_groups;  // M
    int32_t reserved;
};
static_assert(sizeof(AttentionParams) == 224 && offsetof(AttentionParams, q_batch_stride) == 112 &&
                  offsetof(AttentionParams, tokens) == 192,
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

// Where rows are to be pooled: a head's last block to arrive writes (M, D), the weighted sums of rows of `out`, as merge.cu would: in
// ascending order of the members and without fused multiply-add, a lone member of weight 1 as it is. The counter is atomic, what
// the last block computes does not depend on who it is. By all threads, at the end.
template <class E>
__device__ __forceinline__ void pool_rows(const AttentionParams& p) {
    using A = Access<E, true>;
    using Storage = typename E::Storage;
    __shared__ bool is_last;
    if (p.pooled == nullptr) {
        return;
    }
    const int64_t image = blockIdx.z;
    uint32_t* arrived = p.arrived + image * p.heads + blockIdx.y;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrived, 1u) + 1 == gridDim.x;
    }
    __syncthreads();
    if (!is_last) {
        return;
    }
    __threadfence();
    if (threadIdx.x == 0) {
        *arrived = 0;
    }
    const int32_t* offsets = p.pool_offsets + image * (p.pool_groups + 1);
    const int32_t* members = p.pool_members + image * p.tokens;
    const float* weights = p.pool_weights + image * p.tokens;
    const int64_t head = static_cast<int64_t>(blockIdx.y) * p.head_dim;
    const auto* rows = static_cast<const Storage*>(p.out) + image * p.out_batch_stride + head;
    auto* pooled = static_cast<Storage*>(p.pooled) + image * p.pooled_batch_stride + head;
    const int accesses = p.head_dim / A::kElements;
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < p.pool_groups * accesses; at += static_cast<int>(blockDim.x)) {
        const int group = at / accesses;
        const int column = at % accesses * A::kElements;
        const int from = __ldg(offsets + group);
        const int to = __ldg(offsets + group + 1);
        float sum[A::kElements] = {};
#pragma unroll 1
        for (int member = from; member < to; ++member) {
            const float weight = __ldg(weights + member);
            const int64_t row = __ldg(members + member);
            float value[A::kElements];
            // Other blocks wrote these rows during this launch.
            A::widen(__ldcg(reinterpret_cast<const uint4*>(rows + row * p.out_token_stride + column)), value);
            const bool copy = to - from == 1 && weight == 1.0f;
#pragma unroll
            for (int i = 0; i < A::kElements; ++i) {
                sum[i] = copy ? value[i] : __fadd_rn(sum[i], __fmul_rn(weight, value[i]));
            }
        }
        A::store(pooled + group * p.pooled_token_stride + column, A::narrow(sum));
    }
}

}  // namespace fv
