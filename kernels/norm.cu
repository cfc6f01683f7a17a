// norm.cu - residual addition and LayerNorm in one pass over memory.
//
// Maths:   s = x + residual (rounded to the storage type);  sum = s;  out = (s - mean(s))/sqrt(var(s) + eps)*weight + bias.
//          Without a residual s = x. Sums in f32; mean first, then squared distances from it.
// Shapes:  x, residual, sum, out (B, N, C), last axis contiguous, other strides in elements;  weight, bias (C).
//          x, residual and sum of one type; weight, bias and out of one type: the same, or 16 bits beside f32.
//          `sum` may be `x` or `residual` itself: a lane writes only what it has read before.
// Launch:  grid ceil(B*N / rows a block), block as row.cuh says: one warp a row to C = 256 (4 rows a block of 128), a
//          block a row beyond and where rows are not aligned to 16 bytes. C from 1 to 4,096.
// Cost:    moves each of x, residual, sum, out once: 2*B*N*C elements, 4*B*N*C with a residual that is written back, and
//          weight and bias once from memory (the rows after the first find them in cache). About 8 f32 operations an
//          element: bound by memory on every card.

#include <cstddef>

#include "row.cuh"

namespace {

struct NormParams {
    const void* x;         // (B, N, C)
    const void* residual;  // (B, N, C) or null
    const void* weight;    // (C)
    const void* bias;      // (C) or null
    void* sum;             // (B, N, C) or null
    void* out;             // (B, N, C)
    int64_t x_batch_stride, x_token_stride;
    int64_t residual_batch_stride, residual_token_stride;
    int64_t sum_batch_stride, sum_token_stride;
    int64_t out_batch_stride, out_token_stride;
    int32_t rows;    // B*N
    int32_t tokens;  // N
    int32_t width;   // C
    float eps;
};
// src/cuda/norm.rs asserts the same numbers.
static_assert(sizeof(NormParams) == 128 && offsetof(NormParams, x_batch_stride) == 48 && offsetof(NormParams, rows) == 112,
              "the launcher's layout");

template <class E, class O, int kWarps, bool kWide>
__device__ __forceinline__ void norm_rows(const NormParams& p) {
    using R = fv::Row<E, kWarps, kWide>;
    using Storage = typename E::Storage;
    __shared__ fv::NormScratch<kWarps> scratch;

    const int row = static_cast<int>(blockIdx.x) * R::kTeams + R::team();  // [0, B*N)
    // Teams leave whole: of a team that is the block no warp waits for another.
    if (row >= p.rows) {
        return;
    }
    const int64_t image = row / p.tokens;
    const int64_t token = row % p.tokens;
    const auto* x = static_cast<const Storage*>(p.x) + image * p.x_batch_stride + token * p.x_token_stride;
    R r;
    r.load(x, p.width);
    if (p.residual != nullptr) {
        const auto* residual = static_cast<const Storage*>(p.residual) + image * p.residual_batch_stride +
                               token * p.residual_token_stride;
        r.add(residual, p.width);
        r.round();
    }
    if (p.sum != nullptr) {
        r.store(static_cast<Storage*>(p.sum) + image * p.sum_batch_stride + token * p.sum_token_stride, p.width);
    }
    using Normed = typename O::Storage;
    r.template store_normalised<false, O>(static_cast<Normed*>(p.out) + image * p.out_batch_stride + token * p.out_token_stride,
                                          static_cast<const Normed*>(p.weight), static_cast<const Normed*>(p.bias), p.eps,
                                          p.width, scratch);
}

}  // namespace

#define FV_NORM(NAME, E, O, WARPS, WIDE)                                            \
    extern "C" __global__ void __launch_bounds__(fv::kRowThreads<WARPS>, fv::kRowBlocks<WARPS>) \
        NAME(const __grid_constant__ NormParams p) {                                     \
        norm_rows<E, O, WARPS, WIDE>(p);                                            \
    }
FV_FOR_EACH_ROW(FV_NORM, fv_layer_norm)
FV_FOR_EACH_MIXED_ROW(FV_NORM, fv_layer_norm)
