// score.cu - a linear score of every token (SViTE's selector).
//
// Maths:   score[n] = sum over c of x[n][c]*weight[c] + bias + noise[n], the sum in f32.
// Shapes:  x (B, N, C), last axis contiguous;  weight (C), bias (1);  noise (B, N) f32 or null;  scores (B, N) f32.
// Launch:  grid ceil(B*N/4), block 128: a warp a token. Any C.
// Cost:    reads x and the noise once and writes the scores, B*N*(C + 8 bytes); two operations a value: bound by memory.

#include <cstddef>

#include "element.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 128;

struct ScoreParams {
    const void* x;       // (B, N, C)
    const void* weight;  // (C)
    const void* bias;    // (1) or null
    const float* noise;  // (B, N) or null
    float* scores;       // (B, N)
    int64_t batch_stride, token_stride;
    int32_t rows;    // B*N
    int32_t tokens;  // N
    int32_t width;   // C
    int32_t reserved;
};
static_assert(sizeof(ScoreParams) == 72 && offsetof(ScoreParams, batch_stride) == 40 && offsetof(ScoreParams, rows) == 56,
              "the launcher's layout");

template <class E, bool kWide>
__device__ __forceinline__ void score_tokens(const ScoreParams& p) {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    const int row = static_cast<int>(blockIdx.x) * (kThreads / fv::kWarp) + fv::warp_id();  // [0, B*N)
    // Warps leave whole.
    if (row >= p.rows) {
        return;
    }
    const auto* x = static_cast<const Storage*>(p.x) + static_cast<int64_t>(row / p.tokens) * p.batch_stride +
                    static_cast<int64_t>(row % p.tokens) * p.token_stride;
    const auto* weight = static_cast<const Storage*>(p.weight);
    float sum = 0.0f;
#pragma unroll 4
    for (int column = fv::lane_id() * A::kElements; column < p.width; column += fv::kWarp * A::kElements) {
        float v[A::kElements], w[A::kElements];
        A::widen(A::load_constant(x + column), v);
        A::widen(A::load_constant(weight + column), w);
#pragma unroll
        for (int j = 0; j < A::kElements; ++j) {
            sum = __fmaf_rn(v[j], w[j], sum);
        }
    }
    sum = fv::warp_sum(sum);
    if (fv::lane_id() == 0) {
        sum += p.bias == nullptr ? 0.0f : E::widen(*static_cast<const Storage*>(p.bias));
        p.scores[row] = sum + (p.noise == nullptr ? 0.0f : p.noise[row]);
    }
}

}  // namespace

#define FV_SCORE(SUFFIX, E, WIDE)                                                                                            \
    extern "C" __global__ void __launch_bounds__(kThreads, 8) fv_token_score_##SUFFIX(const __grid_constant__ ScoreParams p) { \
        score_tokens<E, WIDE>(p);                                                                                            \
    }
FV_SCORE(f32, fv::F32, true)
FV_SCORE(f16, fv::F16, true)
FV_SCORE(bf16, fv::Bf16, true)
FV_SCORE(f32_narrow, fv::F32, false)
FV_SCORE(f16_narrow, fv::F16, false)
FV_SCORE(bf16_narrow, fv::Bf16, false)
