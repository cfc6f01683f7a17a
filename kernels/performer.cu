// performer.cu - attention that is linear in the number of tokens, by positive random features (T2T-ViT's performer).
//
// Maths:   phi(a) = exp(w a - |a|^2/2)/sqrt(m);  S = sum over tokens s of phi(k_s) v_s^T, z = sum of phi(k_s);
//          out_t = phi(q_t) S / (phi(q_t) z + 1e-8).  Everything in f32: |a|^2/2 can be large. So is w: an exponential takes over what
//          its argument has lost, and w is read from cache but for the first time.
// Shapes:  packed (B, N, 3D): keys, queries, values, last axis contiguous, other strides in elements;  w (m, D) f32;  out (B, N, D);
//          partial (B, chunks, m, D + 1) f32: S and z of 256 tokens each, z last. D up to 64, m up to 32.
// Launch:  sums: grid (chunks, B), out: grid (ceil(N/64), B); block 256, 35,456 bytes of static shared memory.
// Cost:    4*N*m*D + 2*N*(m + D) multiply-adds and 2*N*m exponentials an image. Reads packed once (keys and values, then queries),
//          writes out; each block of the second kernel reads the partial sums, ceil(N/256)*m*(D + 1) values from cache. Bound by
//          multiply-adds: 16 for two accesses of shared memory in the products with w and S, 8 in the sums. The sums run in
//          the tokens' order within a chunk, then in the chunks' order.

#include <cstddef>

#include "element.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;        // tokens at a time
constexpr int kChunk = 256;      // tokens of a partial sum
constexpr int kWidth = 64;       // D at most
constexpr int kFeatures = 32;    // m at most
constexpr int kStride = kWidth + 4;  // of a row in shared memory: neighbouring rows begin in other banks
constexpr float kEpsilon = 1e-8f;

struct PerformerParams {
    const void* packed;   // (B, N, 3D)
    const float* weight;  // (m, D)
    float* partial;       // (B, chunks, m, D + 1)
    void* out;            // (B, N, D)
    int64_t packed_batch_stride, packed_token_stride;
    int64_t out_batch_stride, out_token_stride;
    int32_t tokens;    // N
    int32_t width;     // D
    int32_t features;  // m
    int32_t chunks;    // ceil(N/256)
    float scale;       // 1/sqrt(m)
    int32_t reserved;
};
static_assert(sizeof(PerformerParams) == 88 && offsetof(PerformerParams, packed_batch_stride) == 32 &&
                  offsetof(PerformerParams, tokens) == 64,
              "the launcher's layout");

struct Shared {
    float weight[kFeatures][kStride];
    float rows[kTile][kStride];      // keys, then values; queries, then S and z
    float phi[kTile][kFeatures + 4];
    float total[kFeatures];  // z so far
};

// Rows of `width` values, zeros beyond them and beyond `count` rows.
template <class E, int kRows>
__device__ __forceinline__ void load_rows(float (&to)[kRows][kStride], const typename E::Storage* from, int64_t stride, int count,
                                          int width) {
#pragma unroll 4
    for (int at = static_cast<int>(threadIdx.x); at < kRows * kWidth; at += kThreads) {
        const int row = at / kWidth;
        const int column = at % kWidth;
        to[row][column] = row < count && column < width ? E::widen(__ldg(from + row * stride + column)) : 0.0f;
    }
}

__device__ __forceinline__ void multiply(float& sum, float4 a, float4 b) {
    sum = __fmaf_rn(a.x, b.x, sum);
    sum = __fmaf_rn(a.y, b.y, sum);
    sum = __fmaf_rn(a.z, b.z, sum);
    sum = __fmaf_rn(a.w, b.w, sum);
}

// The features of the tile's rows; zeros for features and tokens that are not there. A thread has 4 tokens (16 apart) and 2
// features (16 apart): lanes next to each other share their tokens.
__device__ __forceinline__ void features_of(Shared& shared, int count, int features, float scale) {
    const int token = static_cast<int>(threadIdx.x) / 16;
    const int feature = static_cast<int>(threadIdx.x) % 16;
    float product[4][2] = {};
    float square[4] = {};
#pragma unroll 1
    for (int column = 0; column < kWidth; column += 4) {
        float4 w[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            w[j] = *reinterpret_cast<const float4*>(&shared.weight[feature + 16 * j][column]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 a = *reinterpret_cast<const float4*>(&shared.rows[token + 16 * i][column]);
            multiply(square[i], a, a);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                multiply(product[i][j], a, w[j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const bool there = token + 16 * i < count && feature + 16 * j < features;
            shared.phi[token + 16 * i][feature + 16 * j] =
                there ? expf(product[i][j] - 0.5f * square[i]) * scale : 0.0f;
        }
    }
}

template <class E>
__device__ __forceinline__ void performer_sums(const PerformerParams& p) {
    using Storage = typename E::Storage;
    __shared__ alignas(16) Shared shared;
    const int chunk = static_cast<int>(blockIdx.x);
    const int64_t image = blockIdx.y;
    const auto* packed = static_cast<const Storage*>(p.packed) + image * p.packed_batch_stride;
    load_rows<fv::F32>(shared.weight, p.weight, p.width, p.features, p.width);
    // A thread has 4 features next to each other and 2 columns (32 apart) of S; the first 32 threads a feature of z too.
    const int feature = static_cast<int>(threadIdx.x) / 32 * 4;
    const int column = static_cast<int>(threadIdx.x) % 32;
    float sums[4][2] = {};
    if (static_cast<int>(threadIdx.x) < kFeatures) {
        shared.total[threadIdx.x] = 0.0f;
    }
    const int end = min(p.tokens, (chunk + 1) * kChunk);
    for (int first = chunk * kChunk; first < end; first += kTile) {
        const int count = min(kTile, end - first);
        const auto* rows = packed + first * p.packed_token_stride;
        load_rows<E>(shared.rows, rows, p.packed_token_stride, count, p.width);
        __syncthreads();
        features_of(shared, count, p.features, p.scale);
        __syncthreads();
        load_rows<E>(shared.rows, rows + 2 * p.width, p.packed_token_stride, count, p.width);
        __syncthreads();
#pragma unroll 4
        for (int token = 0; token < kTile; ++token) {
            const float4 phi = *reinterpret_cast<const float4*>(&shared.phi[token][feature]);
            const float of[4] = {phi.x, phi.y, phi.z, phi.w};
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float v = shared.rows[token][column + 32 * j];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[i][j] = __fmaf_rn(of[i], v, sums[i][j]);
                }
            }
        }
        if (static_cast<int>(threadIdx.x) < kFeatures) {
            float total = shared.total[threadIdx.x];
#pragma unroll 4
            for (int token = 0; token < kTile; ++token) {
                total += shared.phi[token][threadIdx.x];
            }
            shared.total[threadIdx.x] = total;
        }
        __syncthreads();
    }
    float* partial = p.partial + (image * p.chunks + chunk) * p.features * (p.width + 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (feature + i < p.features && column + 32 * j < p.width) {
                partial[(feature + i) * (p.width + 1) + column + 32 * j] = sums[i][j];
            }
        }
    }
    if (static_cast<int>(threadIdx.x) < p.features) {
        partial[static_cast<int>(threadIdx.x) * (p.width + 1) + p.width] = shared.total[threadIdx.x];
    }
}

template <class E>
__device__ __forceinline__ void performer_out(const PerformerParams& p) {
    using Storage = typename E::Storage;
    __shared__ alignas(16) Shared shared;
    const int first = static_cast<int>(blockIdx.x) * kTile;
    const int count = min(kTile, p.tokens - first);
    const int64_t image = blockIdx.y;
    const auto* rows = static_cast<const Storage*>(p.packed) + image * p.packed_batch_stride + first * p.packed_token_stride;
    load_rows<fv::F32>(shared.weight, p.weight, p.width, p.features, p.width);
    load_rows<E>(shared.rows, rows + p.width, p.packed_token_stride, count, p.width);
    __syncthreads();
    features_of(shared, count, p.features, p.scale);
    __syncthreads();
    // S in the first rows, z behind their columns.
    const int values = p.features * (p.width + 1);
    const float* partial = p.partial + image * p.chunks * values;
    for (int at = static_cast<int>(threadIdx.x); at < kFeatures * (kWidth + 1); at += kThreads) {
        const int feature = at / (kWidth + 1);
        const int column = at % (kWidth + 1);
        const bool last = column == kWidth;
        float sum = 0.0f;
        if (feature < p.features && (last || column < p.width)) {
            const float* from = partial + feature * (p.width + 1) + (last ? p.width : column);
#pragma unroll 4
            for (int chunk = 0; chunk < p.chunks; ++chunk) {
                sum += __ldg(from + static_cast<int64_t>(chunk) * values);
            }
        }
        shared.rows[feature][column] = sum;
    }
    __syncthreads();
    // A thread has 4 tokens (16 apart) and 4 columns next to each other.
    const int token = static_cast<int>(threadIdx.x) / 16;
    const int column = static_cast<int>(threadIdx.x) % 16 * 4;
    float sums[4][4] = {};
    float below[4] = {};
#pragma unroll 4
    for (int feature = 0; feature < kFeatures; ++feature) {
        const float4 s = *reinterpret_cast<const float4*>(&shared.rows[feature][column]);
        const float z = shared.rows[feature][kWidth];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float phi = shared.phi[token + 16 * i][feature];
            sums[i][0] = __fmaf_rn(phi, s.x, sums[i][0]);
            sums[i][1] = __fmaf_rn(phi, s.y, sums[i][1]);
            sums[i][2] = __fmaf_rn(phi, s.z, sums[i][2]);
            sums[i][3] = __fmaf_rn(phi, s.w, sums[i][3]);
            below[i] = __fmaf_rn(phi, z, below[i]);
        }
    }
    auto* out = static_cast<Storage*>(p.out) + image * p.out_batch_stride + first * p.out_token_stride + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (token + 16 * i < count) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (column + j < p.width) {
                    out[(token + 16 * i) * p.out_token_stride + j] = E::narrow(__fdiv_rn(sums[i][j], below[i] + kEpsilon));
                }
            }
        }
    }
}

}  // namespace

#define FV_PERFORMER(NAME, BLOCKS, BODY)                                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) NAME(const __grid_constant__ PerformerParams p) { \
        BODY(p);                                                                                                     \
    }
#define FV_PERFORMERS(TYPE, E)                                   \
    FV_PERFORMER(fv_performer_sums_##TYPE, 3, performer_sums<E>) \
    FV_PERFORMER(fv_performer_out_##TYPE, 4, performer_out<E>)
FV_PERFORMERS(f32, fv::F32)
FV_PERFORMERS(f16, fv::F16)
FV_PERFORMERS(bf16, fv::Bf16)
