// predictor.cu - DynamicViT's predictor: the logarithm of the probability of keeping each token.
//
// Maths:   h = gelu(LN(x) Wh^T + bh);  m = mean over an image's tokens of h[C/2:];  a = gelu([h[:C/2], m] W1^T + b1);
//          z = gelu(a W2^T + b2);  u = z W3^T + b3;  score = u0 - log(e^u0 + e^u1). GELU is the exact one. Sums, means and
//          all from z on in f32; LN(x), h, m and a are rounded to the storage type.
//          With a plan, an image's last block to arrive selects by the scores as select.cu does: the special tokens, then the
//          `keep` best in descending order. The counter of arrivals is atomic, what that block computes does not depend on
//          who it is.
// Shapes:  x (B, N, C), last axis contiguous, special tokens already left out;  Wh (C, C), W1 (C/2, C), W2 (C/4, C/2),
//          W3 (2, C/4), halves rounded down;  local (B, N, C/2);  partial (B, tiles, C - C/2) f32: the sums of h[C/2:] over
//          64 tokens each;  scores (B, special + N) f32;  the plan as src/plan.rs. C from 4 to 1,024; with a plan,
//          special + N to 512.
// Launch:  hidden: grid (B*ceil(N/64), ceil(C/64)), block 128, static shared memory. score: grid B*ceil(N/32), block 128,
//          dynamic shared memory for a tile of a, the means and two steps of the products: 27 KiB + 2C + 16(C + 80) bytes in
//          halves, twice the last in f32. The half of h that only its mean is wanted of is never written.
// Cost:    2*B*N*(C^2 + C^2/2 + C^2/8) operations (the mean's product is made for every token: its weights are read anyway).
//          Reads x and the weights once from memory and writes and reads local: B*N*C*(1 + 1) elements; the second level
//          cache serves the tiles of 64 columns, which read x and 64 rows of Wh each. Matrix units for halves, f32 as f32.

#include <cstddef>

#include "activation.cuh"
#include "order.cuh"
#include "sort.cuh"
#include "tile.cuh"

namespace {

struct HiddenParams {
    const void* x;            // (B, N, C)
    const void* norm_weight;  // (C)
    const void* norm_bias;    // (C) or null
    const void* weight;       // (C, C)
    const void* bias;         // (C) or null
    void* local;              // (B, N, C/2)
    float* partial;           // (B, tiles, C - C/2)
    int64_t batch_stride, token_stride;
    int32_t tokens;  // N
    int32_t width;   // C
    int32_t tiles;   // ceil(N/64)
    float eps;
};
static_assert(sizeof(HiddenParams) == 88 && offsetof(HiddenParams, batch_stride) == 56 && offsetof(HiddenParams, tokens) == 72,
              "the launcher's layout");

struct ScoreParams {
    const void* local;          // (B, N, C/2)
    const float* partial;       // (B, tiles, C - C/2)
    const void* first_weight;   // (C/2, C)
    const void* first_bias;     // (C/2) or null
    const void* second_weight;  // (C/4, C/2)
    const void* second_bias;    // (C/4) or null
    const void* last_weight;    // (2, C/4)
    const void* last_bias;      // (2) or null
    float* scores;              // (B, special + N)
    int32_t* offsets;           // (B, M+1), the plan of who is kept, M = special + keep; null: only scores
    int32_t* members;           // (B, special + N)
    float* weights;             // (B, special + N)
    int32_t* groups;            // (B, special + N)
    uint32_t* arrived;          // (B): 0 before and after every launch; null without a plan
    int32_t tokens;   // N
    int32_t width;    // C
    int32_t tiles;    // of partial
    int32_t special;
    int32_t keep;     // tokens beside the special ones that the plan keeps
    int32_t reserved;
};
static_assert(sizeof(ScoreParams) == 136 && offsetof(ScoreParams, scores) == 64 && offsetof(ScoreParams, tokens) == 112,
              "the launcher's layout");

constexpr int kHiddenRows = 64;
constexpr int kScoreRows = 32;
constexpr int kSelectTokens = 512;

template <class E>
struct GeluFor {
    using Type = fv::GeluOfHalves;
};
template <>
struct GeluFor<fv::F32> {
    using Type = fv::Gelu;
};
template <class E>
__device__ __forceinline__ float gelu(float x) {
    return GeluFor<E>::Type::of(x);
}

// A value, or 0 where there is no such tensor.
template <class E>
__device__ __forceinline__ float value_or_zero(const void* from, int at) {
    return from == nullptr ? 0.0f : E::widen(__ldg(static_cast<const typename E::Storage*>(from) + at));
}

// Rows of x, normalised on their way to shared memory.
template <class E, bool kWide>
struct NormalisedRows {
    using Storage = typename E::Storage;
    using A = fv::Access<E, kWide>;
    static constexpr int kEach = A::kElements;
    static constexpr int kAccesses = fv::kStepValues<E> / kEach;         // of a row's step
    static constexpr int kAtOnce = fv::kTileThreads / kAccesses;         // rows
    static constexpr int kHeld = kWide ? kHiddenRows / kAtOnce : 1;
    const Storage* x;
    int64_t token_stride;
    const void* weight;
    const void* bias;
    int rows;
    int width;
    const float* mean;   // [kHiddenRows]
    const float* scale;  // [kHiddenRows]
    typename A::Raw held[kHeld];

    static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kAccesses; }
    static __device__ __forceinline__ int first(int step) {
        return step * fv::kStepValues<E> + static_cast<int>(threadIdx.x) % kAccesses * kEach;
    }
    __device__ __forceinline__ typename A::Raw load(int row, int column) const {
        return A::load_constant(x + row * token_stride + column);
    }
    __device__ __forceinline__ void fetch(int step, unsigned char*) {
        if constexpr (kWide) {
            const int column = first(step);
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                // What is not there is not used either.
                const bool there = row() + i * kAtOnce < rows && column < width;
                held[i] = load(there ? row() + i * kAtOnce : 0, there ? column : 0);
            }
        }
    }
    __device__ __forceinline__ void put(int step, unsigned char* to) const {
        const int column = first(step);
        float w[kEach], b[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            w[j] = b[j] = 0.0f;
        }
        if (column < width) {
            A::widen(A::load_constant(static_cast<const Storage*>(weight) + column), w);
            if (bias != nullptr) {
                A::widen(A::load_constant(static_cast<const Storage*>(bias) + column), b);
            }
        }
        const auto write = [&](int row, typename A::Raw raw) {
            float v[kEach];
            A::widen(raw, v);
            const bool there = row < rows && column < width;
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
                v[j] = there ? __fmaf_rn((v[j] - mean[row]) * scale[row], w[j], b[j]) : 0.0f;
            }
            auto* at = reinterpret_cast<Storage*>(to + row * fv::kStepStride) + column - step * fv::kStepValues<E>;
            A::store(at, A::narrow(v));
        };
        if constexpr (kWide) {
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                write(row() + i * kAtOnce, held[i]);
            }
        } else {
#pragma unroll 4
            for (int r = row(); r < kHiddenRows; r += kAtOnce) {
                const bool there = r < rows && column < width;
                write(r, load(there ? r : 0, there ? column : 0));
            }
        }
    }
    static __device__ __forceinline__ const unsigned char* at(int, const unsigned char* buffer) { return buffer; }
    static __device__ __forceinline__ int stride() { return fv::kStepStride; }
};

// The mean of each row and what its distances are multiplied by: eight lanes a row, four rows a warp at once.
template <class E, bool kWide>
__device__ __forceinline__ void row_statistics(const HiddenParams& p, const typename E::Storage* x, int rows, float* mean,
                                               float* scale) {
    using A = fv::Access<E, kWide>;
    constexpr int kLanes = 8;
    const int lane = fv::lane_id() % kLanes;
    const float count = static_cast<float>(p.width);
    for (int base = fv::warp_id() * 4; base < kHiddenRows; base += fv::kTileThreads / kLanes) {
        const int row = base + fv::lane_id() / kLanes;
        const auto* at = x + (row < rows ? row : 0) * p.token_stride;
        const auto over_row = [&](auto&& term) {
            float sum = 0.0f;
#pragma unroll 4
            for (int column = lane * A::kElements; column < p.width; column += kLanes * A::kElements) {
                float v[A::kElements];
                A::widen(A::load_constant(at + column), v);
#pragma unroll
                for (int j = 0; j < A::kElements; ++j) {
                    sum = term(sum, v[j]);
                }
            }
            return fv::group_sum<kLanes>(sum);
        };
        const float of_row = __fdiv_rn(over_row([](float sum, float v) { return sum + v; }), count);
        const float squares = over_row([&](float sum, float v) { return __fmaf_rn(v - of_row, v - of_row, sum); });
        if (lane == 0) {
            mean[row] = of_row;
            scale[row] = __frcp_rn(__fsqrt_rn(__fdiv_rn(squares, count) + p.eps));
        }
    }
}

template <class E, bool kWide>
__device__ __forceinline__ void hidden_tile(const HiddenParams& p) {
    using Storage = typename E::Storage;
    union Shared {
        fv::TileBuffers<kHiddenRows> buffers;
        float sums[kHiddenRows * fv::kSumStride];
    };
    __shared__ Shared shared;
    __shared__ float mean[kHiddenRows];
    __shared__ float scale[kHiddenRows];
    __shared__ float column_sums[fv::kTileThreads];

    const int tile = static_cast<int>(blockIdx.x) % p.tiles;
    const int64_t image = static_cast<int>(blockIdx.x) / p.tiles;
    const int token = tile * kHiddenRows;
    const int rows = min(p.tokens - token, kHiddenRows);
    const int column = static_cast<int>(blockIdx.y) * fv::kTileColumns;
    const int half = p.width / 2;
    const auto* x = static_cast<const Storage*>(p.x) + image * p.batch_stride + token * p.token_stride;

    row_statistics<E, kWide>(p, x, rows, mean, scale);
    __syncthreads();
    NormalisedRows<E, kWide> normalised{x, p.token_stride, p.norm_weight, p.norm_bias, rows, p.width, mean, scale, {}};
    fv::TileSums<E, kHiddenRows> sums;
    sums.clear();
    const auto* weight = static_cast<const Storage*>(p.weight) + static_cast<int64_t>(column) * p.width;
    fv::multiply_tile<E, kWide>(sums, normalised, weight, p.width, p.width - column, p.width, shared.buffers);
    sums.lay_down(shared.sums);
    __syncthreads();

    // A thread has every other row of one column.
    const int mine = column + static_cast<int>(threadIdx.x) % fv::kTileColumns;
    const bool is_local = mine < half;
    float sum = 0.0f;
    if (mine < p.width) {
        const float bias = value_or_zero<E>(p.bias, mine);
        auto* local = static_cast<Storage*>(p.local) + (image * p.tokens + token) * half + mine;
#pragma unroll 4
        for (int row = static_cast<int>(threadIdx.x) / fv::kTileColumns; row < rows; row += fv::kTileThreads / fv::kTileColumns) {
            const float h = gelu<E>(shared.sums[row * fv::kSumStride + mine - column] + bias);
            if (is_local) {
                local[static_cast<int64_t>(row) * half] = E::narrow(h);
            } else {
                sum += h;
            }
        }
    }
    column_sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < fv::kTileColumns && mine < p.width && !is_local) {
        p.partial[(image * p.tiles + tile) * (p.width - half) + mine - half] = sum + column_sums[threadIdx.x + fv::kTileColumns];
    }
}

// Rows of h: a token's own half, then the mean of the other.
template <class E, bool kWide>
struct LocalAndMean {
    using Storage = typename E::Storage;
    using A = fv::Access<E, kWide>;
    static constexpr int kEach = A::kElements;
    static constexpr int kAccesses = fv::kStepValues<E> / kEach;
    const Storage* local;
    int rows;
    int half;
    int width;
    const float* mean;  // [width - half]

    __device__ __forceinline__ void fetch(int step, unsigned char* to) const {
        const int base = step * fv::kStepValues<E>;
        const int column = base + static_cast<int>(threadIdx.x) % kAccesses * kEach;
        float v[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            v[j] = column >= half && column + j < width ? mean[column + j - half] : 0.0f;
        }
        const typename A::Raw rest = A::narrow(v);
#pragma unroll
        for (int row = static_cast<int>(threadIdx.x) / kAccesses; row < kScoreRows; row += fv::kTileThreads / kAccesses) {
            auto* at = reinterpret_cast<Storage*>(to + row * fv::kStepStride) + column - base;
            const bool there = row < rows;
            if (column >= half) {
                A::store(at, rest);
            } else if constexpr (kWide) {
                fv::copy_async(fv::shared_address(at), local + (there ? static_cast<int64_t>(row) * half + column : 0),
                               there ? fv::kWideBytes : 0);
            } else {
                *at = there ? local[static_cast<int64_t>(row) * half + column] : static_cast<Storage>(0);
            }
        }
    }
    static __device__ __forceinline__ void put(int, unsigned char*) {}
    static __device__ __forceinline__ const unsigned char* at(int, const unsigned char* buffer) { return buffer; }
    static __device__ __forceinline__ int stride() { return fv::kStepStride; }
};

// Rows that lie in shared memory already.
struct ResidentRows {
    const unsigned char* rows;
    int bytes;  // from row to row
    static __device__ __forceinline__ void fetch(int, unsigned char*) {}
    static __device__ __forceinline__ void put(int, unsigned char*) {}
    __device__ __forceinline__ const unsigned char* at(int step, const unsigned char*) const { return rows + step * fv::kStepBytes; }
    __device__ __forceinline__ int stride() const { return bytes; }
};

// The plan of one image, select.cu's with nobody fused. `keys`: 16-byte aligned, room for kSelectTokens and a bit for each. By all
// threads of a block.
__device__ __forceinline__ void select_kept(const ScoreParams& p, int64_t image, uint32_t* keys) {
    const int thread = static_cast<int>(threadIdx.x);
    const int all = p.special + p.tokens;
    const int padded = (all + fv::kWarp - 1) / fv::kWarp * fv::kWarp;
    const int kept = p.special + p.keep;
    const float* scores = p.scores + image * all;
    int32_t* offsets = p.offsets + image * (kept + 1);
    int32_t* members = p.members + image * all;
    float* weights = p.weights + image * all;
    int32_t* groups = p.groups + image * all;
    uint32_t* leaves = keys + kSelectTokens;  // a bit a token

    for (int token = thread; token < padded; token += fv::kTileThreads) {
        // Other blocks wrote these scores during this launch.
        keys[token] = token >= p.special && token < all ? fv::order_key(__ldcg(scores + token)) : fv::kAbsent;
    }
    for (int i = thread; i <= kept; i += fv::kTileThreads) {
        offsets[i] = i;
    }
    __syncthreads();
    for (int first = fv::warp_id() * fv::kWarp; first < padded; first += fv::kTileThreads) {
        const int token = first + fv::lane_id();
        const int rank = fv::rank_among(keys, padded, first, keys[token]);
        const bool goes = token >= p.special && token < all && rank >= p.keep;
        const uint32_t word = __ballot_sync(fv::kFullWarp, goes);
        if (fv::lane_id() == 0) {
            leaves[first / fv::kWarp] = word;
        }
        if (token < all && !goes) {
            const int place = token < p.special ? token : p.special + rank;
            members[place] = token;
            weights[place] = 1.0f;
            groups[token] = place;
        }
    }
    __syncthreads();
    for (int token = thread; token < padded; token += fv::kTileThreads) {
        const uint32_t word = leaves[token / fv::kWarp];
        if ((word >> fv::lane_id() & 1u) != 0) {
            int place = kept + __popc(word & fv::lanes_below());
            for (int below = 0; below < token / fv::kWarp; ++below) {
                place += __popc(leaves[below]);
            }
            members[place] = -1;
            weights[place] = 0.0f;
            groups[token] = -1;
        }
    }
}

template <class E, bool kWide>
__device__ __forceinline__ void score_tile(const ScoreParams& p) {
    using Storage = typename E::Storage;
    union Shared {
        fv::TileBuffers<kScoreRows> buffers;
        float sums[kScoreRows * fv::kSumStride];
    };
    // Steps or sums, the means, and a tile of a: (kScoreRows, C/2 rounded up to whole tiles) and 16 bytes a row.
    extern __shared__ __align__(16) unsigned char score_shared[];
    auto& shared = *reinterpret_cast<Shared*>(score_shared);
    const int half = p.width / 2;
    const int quarter = p.width / 4;
    const int others = p.width - half;
    auto* mean = reinterpret_cast<float*>(score_shared + sizeof(Shared));
    unsigned char* a = score_shared + sizeof(Shared) + (others + 3) / 4 * 16;
    const int a_stride = (half + fv::kTileColumns - 1) / fv::kTileColumns * fv::kTileColumns * static_cast<int>(sizeof(Storage)) + 16;

    const int tiles = (p.tokens + kScoreRows - 1) / kScoreRows;
    const int tile = static_cast<int>(blockIdx.x) % tiles;
    const int64_t image = static_cast<int>(blockIdx.x) / tiles;
    const int token = tile * kScoreRows;
    const int rows = min(p.tokens - token, kScoreRows);
    float* scores = p.scores + image * (p.special + p.tokens);
    for (int i = static_cast<int>(threadIdx.x); tile == 0 && i < p.special; i += fv::kTileThreads) {
        scores[i] = 0.0f;
    }
    for (int i = static_cast<int>(threadIdx.x); i < others; i += fv::kTileThreads) {
        const float* at = p.partial + image * p.tiles * others + i;
        float sum = 0.0f;
        for (int t = 0; t < p.tiles; ++t) {
            sum += __ldg(at + static_cast<int64_t>(t) * others);
        }
        mean[i] = __fdiv_rn(sum, static_cast<float>(p.tokens));
    }
    __syncthreads();

    LocalAndMean<E, kWide> h{static_cast<const Storage*>(p.local) + (image * p.tokens + token) * half, rows, half, p.width, mean};
    fv::TileSums<E, kScoreRows> sums;
    const int row = static_cast<int>(threadIdx.x) / 4;  // [0, 32): four neighbouring lanes share a row of sums
    for (int column = 0; column < half; column += fv::kTileColumns) {
        sums.clear();
        const auto* weight = static_cast<const Storage*>(p.first_weight) + static_cast<int64_t>(column) * p.width;
        fv::multiply_tile<E, kWide>(sums, h, weight, p.width, half - column, p.width, shared.buffers);
        sums.lay_down(shared.sums);
        __syncthreads();
        const int mine = static_cast<int>(threadIdx.x) % fv::kTileColumns;
        const bool there = column + mine < half;
        const float bias = there ? value_or_zero<E>(p.first_bias, column + mine) : 0.0f;
#pragma unroll 4
        for (int r = static_cast<int>(threadIdx.x) / fv::kTileColumns; r < kScoreRows; r += fv::kTileThreads / fv::kTileColumns) {
            const float v = there ? gelu<E>(shared.sums[r * fv::kSumStride + mine] + bias) : 0.0f;
            reinterpret_cast<Storage*>(a + r * a_stride)[column + mine] = E::narrow(v);
        }
        __syncthreads();
    }

    ResidentRows resident{a, a_stride};
    float keep = 0.0f;
    float drop = 0.0f;
    for (int column = 0; column < quarter; column += fv::kTileColumns) {
        sums.clear();
        const auto* weight = static_cast<const Storage*>(p.second_weight) + static_cast<int64_t>(column) * half;
        fv::multiply_tile<E, kWide>(sums, resident, weight, half, quarter - column, half, shared.buffers);
        sums.lay_down(shared.sums);
        __syncthreads();
#pragma unroll 4
        for (int c = static_cast<int>(threadIdx.x) % 4; c < fv::kTileColumns; c += 4) {
            if (column + c < quarter) {
                const float z = gelu<E>(shared.sums[row * fv::kSumStride + c] + value_or_zero<E>(p.second_bias, column + c));
                keep = __fmaf_rn(z, value_or_zero<E>(p.last_weight, column + c), keep);
                drop = __fmaf_rn(z, value_or_zero<E>(p.last_weight, quarter + column + c), drop);
            }
        }
        __syncthreads();
    }
    keep = fv::group_sum<4>(keep) + value_or_zero<E>(p.last_bias, 0);
    drop = fv::group_sum<4>(drop) + value_or_zero<E>(p.last_bias, 1);
    if (threadIdx.x % 4 == 0 && row < rows) {
        // The logarithm of a softmax of two. As the logarithm of a quotient, all confident keeps would be 0.
        const float behind = drop - keep;
        scores[p.special + token + row] = -(fmaxf(behind, 0.0f) + log1pf(expf(-fabsf(behind))));
    }
    if (p.offsets == nullptr) {
        return;
    }
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(p.arrived + image, 1u) + 1 == static_cast<uint32_t>(tiles);
    }
    __syncthreads();
    if (!is_last) {
        return;
    }
    __threadfence();
    if (threadIdx.x == 0) {
        p.arrived[image] = 0;
    }
    select_kept(p, image, reinterpret_cast<uint32_t*>(score_shared));
}

}  // namespace

// 128 registers in halves: the products' sums, a step of x and fragments on their way. f32 spills below 136.
#define FV_PREDICTOR(SUFFIX, E, WIDE, BLOCKS)                                    \
    extern "C" __global__ void __launch_bounds__(fv::kTileThreads, BLOCKS)       \
        fv_predictor_hidden_##SUFFIX(const __grid_constant__ HiddenParams p) {   \
        hidden_tile<E, WIDE>(p);                                                 \
    }                                                                            \
    extern "C" __global__ void __launch_bounds__(fv::kTileThreads, BLOCKS)       \
        fv_predictor_score_##SUFFIX(const __grid_constant__ ScoreParams p) {     \
        score_tile<E, WIDE>(p);                                                  \
    }
FV_PREDICTOR(f32, fv::F32, true, 3)
FV_PREDICTOR(f16, fv::F16, true, 4)
FV_PREDICTOR(bf16, fv::Bf16, true, 4)
FV_PREDICTOR(f32_narrow, fv::F32, false, 3)
FV_PREDICTOR(f16_narrow, fv::F16, false, 4)
FV_PREDICTOR(bf16_narrow, fv::Bf16, false, 4)
