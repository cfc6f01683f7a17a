// grid_norm.cu - norms of feature maps: over a whole image, over the channels of a position, or none but a scale and a shift.
//
// Maths:   image: out = (x - mean)/sqrt(var + eps)*weight[c] + bias[c] with mean and variance over all N*C values of an
//          image;  position: (x - mean)/(sqrt(var) + eps)*weight[c] + bias[c] over the C values of a row;  affine:
//          x*weight[c] + bias[c]. f32; moments of 16 values a thread from registers (mean first, then squared distances from
//          it), merged pairwise in a fixed order (Chan, Golub and LeVeque): no cancellation, whatever the mean.
// Shapes:  x, out (B, N, C), last axis contiguous, other strides in elements;  weight, bias (C);  moments (B, chunks, 2) f32:
//          mean and sum of squared distances of 4,096 values each.
// Launch:  image: moments, then apply, both grid B*chunks, block 256, chunks = ceil(N*C/4096).  affine: apply alone.
//          position: as norm.cu. Where a row is not aligned to 16 bytes, a narrow variant of each.
// Cost:    image reads x twice (the second time from L2 up to a few MB an image) and writes out once, and the moments of an
//          image in each of its blocks: 8*chunks bytes, 0.2 % of a chunk at 32 chunks. The others move x and out once.
//          About 6 operations a value: bound by memory.

#include <cstddef>

#include "divide.cuh"
#include "row.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / fv::kWarp;
constexpr int kValues = 16;
constexpr int kChunk = kThreads * kValues;

struct GridNormParams {
    const void* x;       // (B, N, C)
    const void* weight;  // (C)
    const void* bias;    // (C) or null
    float* moments;      // (B, chunks, 2), null for a scale and a shift alone
    void* out;           // (B, N, C)
    int64_t x_batch_stride, x_token_stride;
    int64_t out_batch_stride, out_token_stride;
    fv::Divisor units;   // accesses a row
    fv::Divisor chunks;  // of an image
    int32_t accesses;    // of an image
    int32_t rows;        // B*N, of positions
    int32_t tokens;      // N
    int32_t width;       // C
    float eps;
    int32_t reserved;
};
static_assert(sizeof(GridNormParams) == 120 && offsetof(GridNormParams, x_batch_stride) == 40 &&
                  offsetof(GridNormParams, units) == 72 && offsetof(GridNormParams, accesses) == 96,
              "the launcher's layout");

// How many values, their mean and the sum of their squared distances from it.
struct Moments {
    float count, mean, squares;

    // The moments of both, `this` first.
    __device__ __forceinline__ void merge(const Moments& other) {
        const float total = count + other.count;
        const float share = total > 0.0f ? __fdiv_rn(other.count, total) : 0.0f;
        const float distance = other.mean - mean;
        squares = squares + other.squares + distance * distance * count * share;
        mean = __fmaf_rn(distance, share, mean);
        count = total;
    }
};

// Over the block, in a fixed order; known to all threads.
__device__ __forceinline__ Moments merge_block(Moments mine, Moments (&partial)[kWarps]) {
#pragma unroll
    for (int offset = 1; offset < fv::kWarp; offset *= 2) {
        const Moments other = {__shfl_xor_sync(fv::kFullWarp, mine.count, offset),
                               __shfl_xor_sync(fv::kFullWarp, mine.mean, offset),
                               __shfl_xor_sync(fv::kFullWarp, mine.squares, offset)};
        // Both lanes merge in the same order.
        Moments first = (fv::lane_id() & offset) == 0 ? mine : other;
        first.merge((fv::lane_id() & offset) == 0 ? other : mine);
        mine = first;
    }
    if (fv::lane_id() == 0) {
        partial[fv::warp_id()] = mine;
    }
    __syncthreads();
    Moments all = partial[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) {
        all.merge(partial[warp]);
    }
    return all;
}

// A thread's accesses of a chunk: access i is kThreads accesses further than access i - 1.
template <class E, bool kWide>
struct Chunk {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    static constexpr int kStep = A::kElements;
    static constexpr int kAccesses = kValues / kStep;

    int64_t image;
    int first;

    __device__ __forceinline__ explicit Chunk(const GridNormParams& p) {
        const int which = p.chunks.quotient(static_cast<int>(blockIdx.x));
        image = which;
        first = p.chunks.remainder(static_cast<int>(blockIdx.x), which) * (kThreads * kAccesses) +
                static_cast<int>(threadIdx.x);
    }
    __device__ __forceinline__ bool within(const GridNormParams& p, int i) const { return first + i * kThreads < p.accesses; }
    // Row and column of access i.
    __device__ __forceinline__ void place(const GridNormParams& p, int i, int& row, int& column) const {
        const int access = first + i * kThreads;
        row = p.units.quotient(access);
        column = p.units.remainder(access, row) * kStep;
    }
};

template <class E, bool kWide>
__device__ __forceinline__ void image_moments(const GridNormParams& p) {
    using C = Chunk<E, kWide>;
    __shared__ Moments partial[kWarps];
    const C chunk(p);
    const auto* x = static_cast<const typename E::Storage*>(p.x) + chunk.image * p.x_batch_stride;
    float v[kValues];
    Moments mine = {0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < C::kAccesses; ++i) {
        if (chunk.within(p, i)) {
            int row, column;
            chunk.place(p, i, row, column);
            C::A::widen(C::A::load_constant(x + row * p.x_token_stride + column), v + i * C::kStep);
            mine.count += static_cast<float>(C::kStep);
#pragma unroll
            for (int j = 0; j < C::kStep; ++j) {
                mine.mean += v[i * C::kStep + j];
            }
        }
    }
    mine.mean = mine.count > 0.0f ? __fdiv_rn(mine.mean, mine.count) : 0.0f;
#pragma unroll
    for (int i = 0; i < C::kAccesses; ++i) {
        if (chunk.within(p, i)) {
#pragma unroll
            for (int j = 0; j < C::kStep; ++j) {
                const float distance = v[i * C::kStep + j] - mine.mean;
                mine.squares = __fmaf_rn(distance, distance, mine.squares);
            }
        }
    }
    const Moments all = merge_block(mine, partial);
    if (threadIdx.x == 0) {
        reinterpret_cast<float2*>(p.moments)[blockIdx.x] = make_float2(all.mean, all.squares);
    }
}

template <class E, bool kWide>
__device__ __forceinline__ void image_norm(const GridNormParams& p) {
    using C = Chunk<E, kWide>;
    __shared__ Moments partial[kWarps];
    const C chunk(p);
    float mean = 0.0f, scale = 1.0f;
    if (p.moments != nullptr) {
        const int chunks = p.chunks.divisor;
        const auto* moments = reinterpret_cast<const float2*>(p.moments) + chunk.image * chunks;
        const int values = p.accesses * C::kStep;
        Moments mine = {0.0f, 0.0f, 0.0f};
        for (int i = static_cast<int>(threadIdx.x); i < chunks; i += kThreads) {
            const float2 of_chunk = __ldg(moments + i);
            mine.merge({static_cast<float>(min(kChunk, values - i * kChunk)), of_chunk.x, of_chunk.y});
        }
        const Moments all = merge_block(mine, partial);
        mean = all.mean;
        scale = __frcp_rn(__fsqrt_rn(__fdiv_rn(all.squares, all.count) + p.eps));
    }
    const auto* x = static_cast<const typename E::Storage*>(p.x) + chunk.image * p.x_batch_stride;
    auto* out = static_cast<typename E::Storage*>(p.out) + chunk.image * p.out_batch_stride;
    const auto* weight = static_cast<const typename E::Storage*>(p.weight);
    const auto* bias = static_cast<const typename E::Storage*>(p.bias);
#pragma unroll
    for (int i = 0; i < C::kAccesses; ++i) {
        if (chunk.within(p, i)) {
            int row, column;
            chunk.place(p, i, row, column);
            float v[C::kStep], w[C::kStep], b[C::kStep];
            C::A::widen(C::A::load_constant(x + row * p.x_token_stride + column), v);
            C::A::widen(C::A::load_constant(weight + column), w);
#pragma unroll
            for (int j = 0; j < C::kStep; ++j) {
                b[j] = 0.0f;
            }
            if (bias != nullptr) {
                C::A::widen(C::A::load_constant(bias + column), b);
            }
#pragma unroll
            for (int j = 0; j < C::kStep; ++j) {
                v[j] = __fmaf_rn((v[j] - mean) * scale, w[j], b[j]);
            }
            C::A::store(out + row * p.out_token_stride + column, C::A::narrow(v));
        }
    }
}

template <class E, int kWarps, bool kWide>
__device__ __forceinline__ void position_norm(const GridNormParams& p) {
    using R = fv::Row<E, kWarps, kWide>;
    using Storage = typename E::Storage;
    __shared__ fv::NormScratch<kWarps> scratch;
    const int row = static_cast<int>(blockIdx.x) * R::kTeams + R::team();  // [0, B*N)
    // Teams leave whole.
    if (row >= p.rows) {
        return;
    }
    const int64_t image = row / p.tokens;
    const int64_t token = row % p.tokens;
    R r;
    r.load(static_cast<const Storage*>(p.x) + image * p.x_batch_stride + token * p.x_token_stride, p.width);
    r.template store_normalised<true>(static_cast<Storage*>(p.out) + image * p.out_batch_stride + token * p.out_token_stride,
                                      static_cast<const Storage*>(p.weight), static_cast<const Storage*>(p.bias), p.eps,
                                      p.width, scratch);
}

}  // namespace

#define FV_GRID_NORM(NAME, BODY, E, WIDE)                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads, 4) NAME(const __grid_constant__ GridNormParams p) { \
        BODY<E, WIDE>(p);                                                                                   \
    }
#define FV_GRID_NORMS(TYPE, E)                                                 \
    FV_GRID_NORM(fv_image_moments_##TYPE, image_moments, E, true)              \
    FV_GRID_NORM(fv_image_moments_##TYPE##_narrow, image_moments, E, false)    \
    FV_GRID_NORM(fv_image_norm_##TYPE, image_norm, E, true)                    \
    FV_GRID_NORM(fv_image_norm_##TYPE##_narrow, image_norm, E, false)
FV_GRID_NORMS(f32, fv::F32)
FV_GRID_NORMS(f16, fv::F16)
FV_GRID_NORMS(bf16, fv::Bf16)

#define FV_POSITION_NORM(NAME, E, O, WARPS, WIDE)                                \
    extern "C" __global__ void __launch_bounds__(fv::kRowThreads<WARPS>, fv::kRowBlocks<WARPS>) \
        NAME(const __grid_constant__ GridNormParams p) {                                 \
        position_norm<E, WARPS, WIDE>(p);                                        \
    }
FV_FOR_EACH_ROW(FV_POSITION_NORM, fv_position_norm)
