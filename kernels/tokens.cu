// tokens.cu - some tokens of every image, the mean of the others, and their largest values.
//
// Maths:   tokens: out[b] = x[b, first .. first + M].  mean_tokens: out[b] = sum of size[n]*x[b, n] over n >= first, divided by
//          the sum of the sizes; sizes are 1 when absent. Sums in f32, in an order that depends on the number of tokens alone.
//          max_tokens: out[b] = max over n >= first with size[n] != 0 of x[b, n], by column; NaN where one is NaN, 0 where no
//          token counts.
// Shapes:  x (B, N, C), out (B, M, C) or (B, 1, C), last axis contiguous, other strides in elements;  sizes (B, N) f32.
// Launch:  tokens: grid ceil(B*M*accesses a row/256), block 256, fewer than 2^31 accesses.  mean_tokens, max_tokens: grid
//          B*ceil(C/columns of a block), block 256; column.cuh says how a block goes over its columns.
// Cost:    tokens moves 2*B*M*C elements. mean_tokens and max_tokens read (N - first)*C elements and as many sizes an image for each segment
//          of 128 bytes (from cache after the first) and write C: one operation an element, three for max_tokens, bound by memory.

#include <cstddef>

#include "column.cuh"
#include "divide.cuh"

namespace {

constexpr int kCopyThreads = 256;

// One type for rows of any element: a copy moves bytes.
struct CopyParams {
    const void* x;  // (B, M, C), from the first token on
    void* out;      // (B, M, C)
    int64_t x_batch_stride, x_token_stride;      // in units of the access
    int64_t out_batch_stride, out_token_stride;  // in units of the access
    fv::Divisor units;   // accesses a row
    fv::Divisor tokens;  // M
    int32_t items;
    int32_t reserved;
};
static_assert(sizeof(CopyParams) == 80 && offsetof(CopyParams, x_batch_stride) == 16 && offsetof(CopyParams, units) == 48 &&
                  offsetof(CopyParams, items) == 72,
              "the launcher's layout");

struct MeanParams {
    const void* x;       // (B, M, C), from the first token on
    const float* sizes;  // (B, N) from the first token on, or null
    void* out;           // (B, 1, C)
    int64_t x_batch_stride, x_token_stride;
    int64_t out_batch_stride;
    int64_t sizes_batch_stride;
    int32_t tokens;    // M
    int32_t width;     // C
    int32_t segments;  // blocks an image
    int32_t reserved;
};
static_assert(sizeof(MeanParams) == 72 && offsetof(MeanParams, x_batch_stride) == 24 && offsetof(MeanParams, tokens) == 56,
              "the launcher's layout");

template <class Unit>
__device__ __forceinline__ void copy_tokens(const CopyParams& p) {
    const int item = static_cast<int>(blockIdx.x) * kCopyThreads + static_cast<int>(threadIdx.x);
    if (item >= p.items) {
        return;
    }
    const int row = p.units.quotient(item);
    const int unit = p.units.remainder(item, row);
    const int image = p.tokens.quotient(row);
    const int token = p.tokens.remainder(row, image);
    static_cast<Unit*>(p.out)[image * p.out_batch_stride + token * p.out_token_stride + unit] =
        __ldg(static_cast<const Unit*>(p.x) + image * p.x_batch_stride + token * p.x_token_stride + unit);
}

template <class E, bool kWide>
__device__ __forceinline__ void mean_tokens(const MeanParams& p) {
    using C = fv::Columns<E, kWide>;
    using Storage = typename E::Storage;
    __shared__ typename C::Scratch scratch;
    const int64_t image = static_cast<int>(blockIdx.x) / p.segments;
    const int first = static_cast<int>(blockIdx.x) % p.segments * C::kColumns;  // [0, C)
    const auto* x = static_cast<const Storage*>(p.x) + image * p.x_batch_stride + first;
    const float* sizes = p.sizes == nullptr ? nullptr : p.sizes + image * p.sizes_batch_stride;
    const auto sum = C::sum(x, p.x_token_stride, p.tokens, p.width - first, sizes, scratch);
    const int column = static_cast<int>(threadIdx.x);
    if (column < C::kColumns && first + column < p.width) {
        static_cast<Storage*>(p.out)[image * p.out_batch_stride + first + column] =
            E::narrow(__fdiv_rn(sum.values, sum.weights));
    }
}

// NaN wins over everything.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

template <class E, bool kWide>
__device__ __forceinline__ void max_tokens(const MeanParams& p) {
    using C = fv::Columns<E, kWide>;
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    constexpr int kStep = A::kElements;
    __shared__ typename C::Scratch scratch;
    const int64_t image = static_cast<int>(blockIdx.x) / p.segments;
    const int first = static_cast<int>(blockIdx.x) % p.segments * C::kColumns;  // [0, C)
    const int width = p.width - first;
    const auto* x = static_cast<const Storage*>(p.x) + image * p.x_batch_stride + first;
    const float* sizes = p.sizes == nullptr ? nullptr : p.sizes + image * p.sizes_batch_stride;
    const int lane = static_cast<int>(threadIdx.x) % C::kLanes;
    float largest[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
        largest[j] = -INFINITY;
    }
    float counted = 0.0f;  // 1 where a token counts
    if (lane * kStep < width) {
        const Storage* at = x + lane * kStep;
#pragma unroll 4
        for (int row = static_cast<int>(threadIdx.x) / C::kLanes; row < p.tokens; row += C::kRows) {
            if (sizes != nullptr && __ldg(sizes + row) == 0.0f) {
                continue;
            }
            float v[kStep];
            A::widen(A::load_constant(at + row * p.x_token_stride), v);
#pragma unroll
            for (int j = 0; j < kStep; ++j) {
                largest[j] = larger(largest[j], v[j]);
            }
            counted = 1.0f;
        }
    }
#pragma unroll
    for (int offset = C::kLanes; offset < fv::kWarp; offset *= 2) {
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
            largest[j] = larger(largest[j], __shfl_xor_sync(fv::kFullWarp, largest[j], offset));
        }
        counted = fmaxf(counted, __shfl_xor_sync(fv::kFullWarp, counted, offset));
    }
    if (fv::lane_id() < C::kLanes) {
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
            scratch.sums[fv::warp_id()][C::place(lane * kStep + j)] = largest[j];
        }
    }
    // Lane 0 has a column whatever the width.
    if (fv::lane_id() == 0) {
        scratch.totals[fv::warp_id()] = counted;
    }
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x);
    if (column < C::kColumns && column < width) {
        float value = -INFINITY;
        float any = 0.0f;
#pragma unroll
        for (int warp = 0; warp < fv::kColumnWarps; ++warp) {
            value = larger(value, scratch.sums[warp][C::place(column)]);
            any = fmaxf(any, scratch.totals[warp]);
        }
        static_cast<Storage*>(p.out)[image * p.out_batch_stride + first + column] = E::narrow(any > 0.0f ? value : 0.0f);
    }
}

}  // namespace

// By the bytes of an access.
extern "C" __global__ void __launch_bounds__(kCopyThreads) fv_tokens_16(const __grid_constant__ CopyParams p) {
    copy_tokens<uint4>(p);
}
extern "C" __global__ void __launch_bounds__(kCopyThreads) fv_tokens_4(const __grid_constant__ CopyParams p) {
    copy_tokens<uint32_t>(p);
}
extern "C" __global__ void __launch_bounds__(kCopyThreads) fv_tokens_2(const __grid_constant__ CopyParams p) {
    copy_tokens<uint16_t>(p);
}
#define FV_MEAN(NAME, E, WIDE)                                                                             \
    extern "C" __global__ void __launch_bounds__(fv::kColumnThreads) NAME(const __grid_constant__ MeanParams p) { \
        mean_tokens<E, WIDE>(p);                                                                           \
    }
#define FV_MAX(NAME, E, WIDE)                                                                              \
    extern "C" __global__ void __launch_bounds__(fv::kColumnThreads) NAME(const __grid_constant__ MeanParams p) { \
        max_tokens<E, WIDE>(p);                                                                            \
    }
#define FV_MEAN_OF(TYPE, E)                           \
    FV_MEAN(fv_mean_tokens_##TYPE, E, true)           \
    FV_MEAN(fv_mean_tokens_##TYPE##_narrow, E, false) \
    FV_MAX(fv_max_tokens_##TYPE, E, true)             \
    FV_MAX(fv_max_tokens_##TYPE##_narrow, E, false)
FV_MEAN_OF(f32, fv::F32)
FV_MEAN_OF(f16, fv::F16)
FV_MEAN_OF(bf16, fv::Bf16)
