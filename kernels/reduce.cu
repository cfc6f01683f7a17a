// reduce.cu - sums and maxima of rows, means of columns.
//
// Maths:   sum: out[b, n] = sum of x[b, n, c] over c;  max: the largest x[b, n, c], NaN only where all are NaN;  columns:
//          out[b, c] = mean of x[b, n, c] over n. In f32, in an order that depends on the shape of one image and on alignment
//          alone.
// Shapes:  x (B, N, C), last axis contiguous, other strides in elements;  out (B, N) or (B, C) f32.
// Launch:  rows: a warp a row to C = 1,024 (grid ceil(B*N/8)), a block a row beyond (grid B*N), block 256.  columns: grid
//          B*ceil(C/columns of a block), block 256 (column.cuh).
// Cost:    reads B*N*C elements once, one operation each: bound by memory.

#include <cstddef>

#include "column.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kLongWarps = kThreads / fv::kWarp;

struct ReduceParams {
    const void* x;  // (B, N, C)
    float* out;     // (B, N) or (B, C)
    int64_t batch_stride, token_stride;
    int32_t rows;      // B*N
    int32_t tokens;    // N
    int32_t width;     // C
    int32_t segments;  // blocks an image, of columns
};
static_assert(sizeof(ReduceParams) == 48 && offsetof(ReduceParams, batch_stride) == 16 && offsetof(ReduceParams, rows) == 32,
              "the launcher's layout");

struct Sum {
    static __device__ __forceinline__ float start() { return 0.0f; }
    static __device__ __forceinline__ float combine(float a, float b) { return a + b; }
    template <int kWarps>
    static __device__ __forceinline__ float team(float x, float (&partial)[kWarps]) {
        return fv::team_sum<kWarps>(x, partial);
    }
};

struct Max {
    // The maximum of NaN and a number is the number.
    static __device__ __forceinline__ float start() { return __uint_as_float(0x7fffffffu); }
    static __device__ __forceinline__ float combine(float a, float b) { return fmaxf(a, b); }
    template <int kWarps>
    static __device__ __forceinline__ float team(float x, float (&partial)[kWarps]) {
        return fv::team_max<kWarps>(x, partial);
    }
};

template <class E, class Operation, int kWarps, bool kWide>
__device__ __forceinline__ void reduce_rows(const ReduceParams& p) {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    constexpr int kTeam = kWarps * fv::kWarp;
    __shared__ float partial[kWarps];
    const int lane = static_cast<int>(threadIdx.x) % kTeam;
    const int row = static_cast<int>(blockIdx.x) * (kThreads / kTeam) + static_cast<int>(threadIdx.x) / kTeam;  // [0, B*N)
    // Teams leave whole.
    if (row >= p.rows) {
        return;
    }
    const int64_t image = row / p.tokens;
    const int64_t token = row % p.tokens;
    const auto* x = static_cast<const Storage*>(p.x) + image * p.batch_stride + token * p.token_stride;
    float each[A::kElements];
#pragma unroll
    for (int j = 0; j < A::kElements; ++j) {
        each[j] = Operation::start();
    }
#pragma unroll 4
    for (int at = lane * A::kElements; at < p.width; at += kTeam * A::kElements) {
        float v[A::kElements];
        A::widen(A::load_constant(x + at), v);
#pragma unroll
        for (int j = 0; j < A::kElements; ++j) {
            each[j] = Operation::combine(each[j], v[j]);
        }
    }
    float all = each[0];
#pragma unroll
    for (int j = 1; j < A::kElements; ++j) {
        all = Operation::combine(all, each[j]);
    }
    all = Operation::template team<kWarps>(all, partial);
    if (lane == 0) {
        p.out[row] = all;
    }
}

template <class E, bool kWide>
__device__ __forceinline__ void column_means(const ReduceParams& p) {
    using C = fv::Columns<E, kWide>;
    __shared__ typename C::Scratch scratch;
    const int64_t image = static_cast<int>(blockIdx.x) / p.segments;
    const int first = static_cast<int>(blockIdx.x) % p.segments * C::kColumns;  // [0, C)
    const auto* x = static_cast<const typename E::Storage*>(p.x) + image * p.batch_stride + first;
    const auto sum = C::sum(x, p.token_stride, p.tokens, p.width - first, nullptr, scratch);
    const int column = static_cast<int>(threadIdx.x);
    if (column < C::kColumns && first + column < p.width) {
        p.out[image * p.width + first + column] = __fdiv_rn(sum.values, sum.weights);
    }
}

}  // namespace

#define FV_ROWS(NAME, E, OPERATION, WARPS, WIDE)                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads) NAME(const __grid_constant__ ReduceParams p) { \
        reduce_rows<E, OPERATION, WARPS, WIDE>(p);                                                           \
    }
#define FV_COLUMNS(NAME, E, WIDE)                                                                         \
    extern "C" __global__ void __launch_bounds__(fv::kColumnThreads) NAME(const __grid_constant__ ReduceParams p) { \
        column_means<E, WIDE>(p);                                                                         \
    }
#define FV_ROWS_OF(OP, OPERATION, TYPE, E)                                          \
    FV_ROWS(fv_reduce_##OP##_##TYPE, E, OPERATION, 1, true)                         \
    FV_ROWS(fv_reduce_##OP##_##TYPE##_long, E, OPERATION, kLongWarps, true)         \
    FV_ROWS(fv_reduce_##OP##_##TYPE##_narrow, E, OPERATION, 1, false)               \
    FV_ROWS(fv_reduce_##OP##_##TYPE##_long_narrow, E, OPERATION, kLongWarps, false)
#define FV_REDUCE(TYPE, E)                           \
    FV_ROWS_OF(sum, Sum, TYPE, E)                    \
    FV_ROWS_OF(max, Max, TYPE, E)                    \
    FV_COLUMNS(fv_reduce_columns_##TYPE, E, true)    \
    FV_COLUMNS(fv_reduce_columns_##TYPE##_narrow, E, false)
FV_REDUCE(f32, fv::F32)
FV_REDUCE(f16, fv::F16)
FV_REDUCE(bf16, fv::Bf16)
