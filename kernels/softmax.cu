// softmax.cu - softmax of rows, with the logarithm of token sizes added first.
//
// Maths:   s[n] = scale*x[n] + log(size[n]);  out[n] = exp(s[n] - max s)/sum of exp(s - max s), in f32, sums in an order that
//          depends on the row's length and alignment alone. A row of nothing but -inf becomes 0; NaN or +inf anywhere makes
//          the row NaN.
// Shapes:  x, out (B, R, N), last axis contiguous, other strides in elements;  sizes (B, N) f32. `out` may be `x` itself with
//          the same strides: a lane writes only what it alone reads.
// Launch:  N up to 4,096: grid ceil(B*R / rows a block), block 128 (a warp a row to 256, the block to 1,024) or 512; longer
//          rows: grid B*R, block 512. Rows that are not aligned to 16 bytes, as those of 197 tokens, take narrow accesses.
// Cost:    reads and writes each value once, 2*B*R*N elements, and the sizes of an image once from memory. About 10 operations
//          an element, 25 more with sizes. Rows longer than 4,096 are read three times, the second and third time from cache.
//          ex2.approx is within 2 units in the last place of f32.

#include <cstddef>

#include "row.cuh"

namespace {

struct SoftmaxParams {
    const void* x;       // (B, R, N)
    const float* sizes;  // (B, N) or null
    void* out;           // (B, R, N)
    int64_t x_batch_stride, x_row_stride;
    int64_t out_batch_stride, out_row_stride;
    int32_t rows;           // B*R
    int32_t rows_an_image;  // R
    int32_t width;          // N
    float scale;
};
static_assert(sizeof(SoftmaxParams) == 72 && offsetof(SoftmaxParams, x_batch_stride) == 24 &&
                  offsetof(SoftmaxParams, rows) == 56,
              "the launcher's layout");

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kLongWarps = 16;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

template <class E, bool kWide>
struct Scores {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    static constexpr int kStep = A::kElements;

    const Storage* x;
    const float* sizes;  // of the row's image, or null
    Storage* out;
    float scale;

    __device__ __forceinline__ Scores(const SoftmaxParams& p, int row) : scale(p.scale) {
        const int64_t image = row / p.rows_an_image;
        const int64_t line = row % p.rows_an_image;
        x = static_cast<const Storage*>(p.x) + image * p.x_batch_stride + line * p.x_row_stride;
        out = static_cast<Storage*>(p.out) + image * p.out_batch_stride + line * p.out_row_stride;
        sizes = p.sizes == nullptr ? nullptr : p.sizes + image * p.width;
    }

    // What goes into the exponential, from column `at` on.
    __device__ __forceinline__ void load(int at, float* s) const {
        A::widen(A::load(x + at), s);
        float bias[kStep];
        if (sizes != nullptr) {
            if constexpr (kStep == 1) {
                bias[0] = __ldg(sizes + at);
            } else {
#pragma unroll
                for (int i = 0; i < kStep; i += 4) {
                    const float4 four = __ldg(reinterpret_cast<const float4*>(sizes + at + i));
                    bias[i] = four.x;
                    bias[i + 1] = four.y;
                    bias[i + 2] = four.z;
                    bias[i + 3] = four.w;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            s[i] *= scale;
            if (sizes != nullptr) {
                s[i] += logf(bias[i]);
            }
        }
    }
};

__device__ __forceinline__ float shift(float max) { return max == minus_infinity() ? 0.0f : max; }
__device__ __forceinline__ float power(float s, float max) { return exp2f((s - max) * kLog2E); }
__device__ __forceinline__ float reciprocal(float sum) { return sum == 0.0f ? 0.0f : __frcp_rn(sum); }

template <class E, int kWarps, bool kWide>
__device__ __forceinline__ void softmax_rows(const SoftmaxParams& p) {
    using R = fv::Row<E, kWarps, kWide>;
    __shared__ float maxima[kWarps];
    __shared__ float sums[kWarps];
    const int row = static_cast<int>(blockIdx.x) * R::kTeams + R::team();  // [0, B*R)
    // Teams leave whole.
    if (row >= p.rows) {
        return;
    }
    const Scores<E, kWide> scores(p, row);
    R r;
    float max = minus_infinity();
#pragma unroll
    for (int i = 0; i < R::kAccesses; ++i) {
#pragma unroll
        for (int j = 0; j < R::kStep; ++j) {
            r.v[i * R::kStep + j] = minus_infinity();
        }
        if (R::within(i, p.width)) {
            scores.load(R::first() + R::offset(i), r.v + i * R::kStep);
        }
#pragma unroll
        for (int j = 0; j < R::kStep; ++j) {
            max = fmaxf(max, r.v[i * R::kStep + j]);
        }
    }
    max = shift(fv::team_max<kWarps>(max, maxima));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < fv::kValues; ++i) {
        r.v[i] = power(r.v[i], max);
        sum += r.v[i];
    }
    const float factor = reciprocal(fv::team_sum<kWarps>(sum, sums));
#pragma unroll
    for (int i = 0; i < fv::kValues; ++i) {
        r.v[i] *= factor;
    }
    r.store(scores.out, p.width);
}

// Rows that registers do not hold: maximum, sum and result in three passes.
template <class E, bool kWide>
__device__ __forceinline__ void softmax_long(const SoftmaxParams& p) {
    using S = Scores<E, kWide>;
    using A = typename S::A;
    constexpr int kStride = kLongWarps * fv::kWarp * S::kStep;
    __shared__ float maxima[kLongWarps];
    __shared__ float sums[kLongWarps];
    const S scores(p, static_cast<int>(blockIdx.x));
    const int first = static_cast<int>(threadIdx.x) * S::kStep;
    float max = minus_infinity();
#pragma unroll 2
    for (int at = first; at < p.width; at += kStride) {
        float s[S::kStep];
        scores.load(at, s);
#pragma unroll
        for (int i = 0; i < S::kStep; ++i) {
            max = fmaxf(max, s[i]);
        }
    }
    max = shift(fv::team_max<kLongWarps>(max, maxima));
    float sum = 0.0f;
#pragma unroll 2
    for (int at = first; at < p.width; at += kStride) {
        float s[S::kStep];
        scores.load(at, s);
#pragma unroll
        for (int i = 0; i < S::kStep; ++i) {
            sum += power(s[i], max);
        }
    }
    const float factor = reciprocal(fv::team_sum<kLongWarps>(sum, sums));
    for (int at = first; at < p.width; at += kStride) {
        float s[S::kStep];
        scores.load(at, s);
#pragma unroll
        for (int i = 0; i < S::kStep; ++i) {
            s[i] = power(s[i], max) * factor;
        }
        A::store(scores.out + at, A::narrow(s));
    }
}

}  // namespace

#define FV_SOFTMAX(NAME, E, WARPS, WIDE)                                                            \
    extern "C" __global__ void __launch_bounds__(fv::kRowThreads<WARPS>, fv::kRowBlocks<WARPS>)     \
        NAME(const __grid_constant__ SoftmaxParams p) {                                             \
        softmax_rows<E, WARPS, WIDE>(p);                                                            \
    }
#define FV_SOFTMAX_LONG(NAME, E, WIDE)                                                               \
    extern "C" __global__ void __launch_bounds__(kLongWarps * fv::kWarp, 2) NAME(const __grid_constant__ SoftmaxParams p) { \
        softmax_long<E, WIDE>(p);                                                                    \
    }
#define FV_SOFTMAX_OF(TYPE, E)                             \
    FV_SOFTMAX(fv_softmax_##TYPE##_256, E, 1, true)        \
    FV_SOFTMAX(fv_softmax_##TYPE##_1024, E, 4, true)       \
    FV_SOFTMAX(fv_softmax_##TYPE##_4096, E, 16, true)      \
    FV_SOFTMAX_LONG(fv_softmax_##TYPE##_long, E, true)     \
    FV_SOFTMAX(fv_softmax_##TYPE##_256_narrow, E, 1, false)   \
    FV_SOFTMAX(fv_softmax_##TYPE##_1024_narrow, E, 4, false)  \
    FV_SOFTMAX(fv_softmax_##TYPE##_4096_narrow, E, 16, false) \
    FV_SOFTMAX_LONG(fv_softmax_##TYPE##_long_narrow, E, false)
FV_SOFTMAX_OF(f32, fv::F32)
FV_SOFTMAX_OF(f16, fv::F16)
FV_SOFTMAX_OF(bf16, fv::Bf16)
