// attention_stream.cu - softmax(Q Kᵀ scale + log size) V for any number of tokens and heads of 32 to 128 values, keys streamed.
//
// Maths:   as attention.cu, with a running maximum m and sum l of each query's row (Dao 2023): tiles of 64 keys, and what has been
//          added up so far is scaled whenever the maximum rises. Class rows and received attention need every row's final sum: a second
//          kernel, fv_attention_scores_*, computes the scores again, keys by queries, and adds them up where they are. The N x N map
//          is never written. A plan's pooling of the rows of out: include/attention.cuh.
// Shapes:  include/attention.cuh; f16 and bf16; rows 16-byte aligned. A width that is no multiple of 16 is filled up with zeros in
//          shared memory.
// Launch:  both: block 128, a warp has 16 queries (16 keys). fv_attention_stream_*: grid (N/64 up, H, B). fv_attention_scores_*: the same,
//          over keys; needs log_sum_exp. Dynamic shared memory: 3 tiles (2 tiles) of 64 rows of D (rounded up to 16) values + 16 bytes
//          or more: 27,648 bytes at D = 64.
// Cost:    matrix instructions a head 2 x ceil(N/16)^2 x D/16 x 2 at most (tiles of 16 keys behind the last are left out); q read once,
//          k and v once for each block of 64 queries, out written once. The second kernel: half the matrix instructions, q read once for each
//          block of 64 keys, or only its first tile where nothing but class rows is asked for.

#include "attention.cuh"

namespace {

using fv::AttentionParams;

constexpr int kBlockRows = 64;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * fv::kWarp;

// A tile of 64 rows in shared memory. Rows are an odd number of 16-byte chunks apart, so that eight rows of one chunk are in eight
// different groups of banks.
template <int kHeadDim>
struct Layout {
    static constexpr int kChunks = kHeadDim / 8;
    static constexpr int kSteps = (kHeadDim + 15) / 16;
    static constexpr int kPitch = (2 * kSteps | 1) * 16;  // bytes
    static constexpr int kBytes = kBlockRows * kPitch;
};

// Starts the copy of rows first to first + 63 of a tensor into a tile; rows from n on become zero.
template <int kHeadDim>
__device__ __forceinline__ void copy_tile(uint32_t tile, const char* base, int64_t stride, int first, int n) {
    using L = Layout<kHeadDim>;
#pragma unroll 4
    for (int i = threadIdx.x; i < kBlockRows * L::kChunks; i += kThreads) {
        const int row = i / L::kChunks;
        const int chunk = i % L::kChunks;
        const bool there = first + row < n;
        fv::copy_async(tile + row * L::kPitch + chunk * 16, base + (there ? (first + row) * stride : 0) + chunk * 16, there ? 16u : 0u);
    }
}

// The same for values that are looked up: the row of a key is that of its group.
template <int kHeadDim>
__device__ __forceinline__ void gather_tile(uint32_t tile, const char* base, int64_t stride, const int32_t* groups, int first, int n) {
    using L = Layout<kHeadDim>;
    for (int i = threadIdx.x; i < kBlockRows * L::kChunks; i += kThreads) {
        const int row = i / L::kChunks;
        const int chunk = i % L::kChunks;
        const int group = first + row < n ? __ldg(groups + first + row) : -1;
        fv::copy_async(tile + row * L::kPitch + chunk * 16, base + (group < 0 ? 0 : group) * stride + chunk * 16, group < 0 ? 0u : 16u);
    }
}

// Zero in the columns that fill a width up to a multiple of 16. Nothing else ever writes there.
template <int kHeadDim>
__device__ __forceinline__ void clear_padding(char* tiles, int rows) {
    using L = Layout<kHeadDim>;
    if constexpr (2 * L::kSteps > L::kChunks) {
        for (int row = threadIdx.x; row < rows; row += kThreads) {
            *reinterpret_cast<uint4*>(tiles + row * L::kPitch + L::kChunks * 16) = uint4{0, 0, 0, 0};
        }
    }
}

// The A fragments of 16 rows of a tile: rows 0-7 and 8-15 of the first eight columns, then of the next eight.
template <int kHeadDim>
__device__ __forceinline__ void load_rows(uint32_t (&a)[Layout<kHeadDim>::kSteps][4], uint32_t rows) {
    const int lane = fv::lane_id();
    const uint32_t at = rows + (lane & 15) * Layout<kHeadDim>::kPitch + lane / 16 * 16;
    fv::unroll<Layout<kHeadDim>::kSteps>([&](auto depth) {
        constexpr int step = decltype(depth)::value;
        fv::load_matrices<step * 32>(a[step], at);
    });
}

// c[2j], c[2j + 1] = 16 rows times rows 16j to 16j + 15 of a tile, for the pairs j that begin before `limit`.
template <class E, int kHeadDim>
__device__ __forceinline__ void multiply_rows(float (&c)[8][4], const uint32_t (&a)[Layout<kHeadDim>::kSteps][4], uint32_t tile, int limit) {
    using L = Layout<kHeadDim>;
    const int lane = fv::lane_id();
    // Matrices: rows 0-7 with both halves of the depth step, then rows 8-15.
    const uint32_t at = tile + (lane / 16 * 8 + (lane & 7)) * L::kPitch + (lane / 8 & 1) * 16;
    fv::unroll<4>([&](auto index) {
        constexpr int pair = decltype(index)::value;
        if (pair * 16 < limit) {
            fv::unroll<L::kSteps>([&](auto depth) {
                constexpr int step = decltype(depth)::value;
                uint32_t b[4];
                fv::load_matrices<pair * 16 * L::kPitch + step * 32>(b, at);
                if constexpr (step == 0) {
                    fv::mma_first<E>(c[2 * pair], a[step], b[0], b[1]);
                    fv::mma_first<E>(c[2 * pair + 1], a[step], b[2], b[3]);
                } else {
                    fv::mma<E>(c[2 * pair], a[step], b[0], b[1]);
                    fv::mma<E>(c[2 * pair + 1], a[step], b[2], b[3]);
                }
            });
        }
    });
}

template <class E, int kHeadDim>
__device__ __forceinline__ void stream(const AttentionParams& p) {
    using L = Layout<kHeadDim>;
    extern __shared__ __align__(128) char shared[];
    const int n = p.tokens;
    const int lane = fv::lane_id();
    const int g = lane / 4;
    const int t = lane % 4;
    const int64_t image = blockIdx.z;
    const int64_t head_offset = static_cast<int64_t>(blockIdx.y) * (kHeadDim * 2);
    const int first_query = blockIdx.x * kBlockRows;
    const int warp_rows = fv::warp_id() * 16;
    const uint32_t shared_q = fv::shared_address(shared);
    const uint32_t shared_k = shared_q + L::kBytes;
    const uint32_t shared_v = shared_k + L::kBytes;
    const char* keys = static_cast<const char*>(p.k) + image * p.k_batch_stride * 2 + head_offset;
    const char* values = static_cast<const char*>(p.v) + image * p.v_batch_stride * 2 + head_offset;
    const bool has_values = p.v != nullptr;
    const float* sizes = p.sizes == nullptr ? nullptr : p.sizes + image * n;
    const int32_t* groups = p.groups == nullptr ? nullptr : p.groups + image * n;
    const auto copy_values = [&](int first) {
        if (groups != nullptr) {
            gather_tile<kHeadDim>(shared_v, values, p.v_token_stride * 2, groups, first, n);
        } else if (has_values) {
            copy_tile<kHeadDim>(shared_v, values, p.v_token_stride * 2, first, n);
        }
        fv::commit_copies();
    };

    clear_padding<kHeadDim>(shared, 3 * kBlockRows);
    copy_tile<kHeadDim>(shared_q, static_cast<const char*>(p.q) + image * p.q_batch_stride * 2 + head_offset, p.q_token_stride * 2, first_query, n);
    copy_tile<kHeadDim>(shared_k, keys, p.k_token_stride * 2, 0, n);
    fv::commit_copies();
    copy_values(0);

    uint32_t q[L::kSteps][4];
    float o[2 * L::kSteps][4] = {};
    float2 top = {-INFINITY, -INFINITY};
    float2 sum = {0.0f, 0.0f};
    const float scale = p.scale * fv::kLog2E;
    const float factor = sizes == nullptr ? scale : 1.0f;
#pragma unroll 1
    for (int first = 0; first < n; first += kBlockRows) {
        const int limit = n - first;
        fv::wait_copies<1>();
        __syncthreads();
        if (first == 0) {
            load_rows<kHeadDim>(q, shared_q + warp_rows * L::kPitch);
        }
        float s[8][4] = {};
        multiply_rows<E, kHeadDim>(s, q, shared_k, limit);
        __syncthreads();
        if (first + kBlockRows < n) {
            copy_tile<kHeadDim>(shared_k, keys, p.k_token_stride * 2, first + kBlockRows, n);
        }
        fv::commit_copies();

        // The running softmax of the rows g and g + 8, in units of log 2.
        float2 high = top;
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {
            const int key = tile * 8 + 2 * t;
            if (sizes != nullptr) {
                const float b0 = key < limit ? fv::log2_approx(__ldg(sizes + first + key)) : 0.0f;
                const float b1 = key + 1 < limit ? fv::log2_approx(__ldg(sizes + first + key + 1)) : 0.0f;
                s[tile][0] = fmaf(s[tile][0], scale, b0);
                s[tile][1] = fmaf(s[tile][1], scale, b1);
                s[tile][2] = fmaf(s[tile][2], scale, b0);
                s[tile][3] = fmaf(s[tile][3], scale, b1);
            }
            if (limit < kBlockRows) {
                if (key >= limit) s[tile][0] = s[tile][2] = -INFINITY;
                if (key + 1 >= limit) s[tile][1] = s[tile][3] = -INFINITY;
            }
            high.x = fmaxf(high.x, fmaxf(s[tile][0], s[tile][1]));
            high.y = fmaxf(high.y, fmaxf(s[tile][2], s[tile][3]));
        }
        high = {fv::quad_max(high.x), fv::quad_max(high.y)};
        const float2 shift = {fv::finite_top(high.x) * factor, fv::finite_top(high.y) * factor};
        // 0 for the first tile, whose maximum was -inf.
        const float2 shrink = {fv::exp2_approx(fmaf(top.x, factor, -shift.x)), fv::exp2_approx(fmaf(top.y, factor, -shift.y))};
        top = high;
        sum = {sum.x * shrink.x, sum.y * shrink.y};
#pragma unroll
        for (int tile = 0; tile < 8; ++tile) {
            s[tile][0] = fv::exp2_approx(fmaf(s[tile][0], factor, -shift.x));
            s[tile][1] = fv::exp2_approx(fmaf(s[tile][1], factor, -shift.x));
            s[tile][2] = fv::exp2_approx(fmaf(s[tile][2], factor, -shift.y));
            s[tile][3] = fv::exp2_approx(fmaf(s[tile][3], factor, -shift.y));
            sum.x += s[tile][0] + s[tile][1];
            sum.y += s[tile][2] + s[tile][3];
        }
#pragma unroll
        for (int i = 0; i < 2 * L::kSteps; ++i) {
            o[i][0] *= shrink.x;
            o[i][1] *= shrink.x;
            o[i][2] *= shrink.y;
            o[i][3] *= shrink.y;
        }

        // O += P V. Matrices of V are transposed on the way: keys 0-7 and 8-15 of the first eight columns, then of the next eight.
        fv::wait_copies<1>();
        __syncthreads();
        if (has_values) {
            const uint32_t at = shared_v + (lane & 15) * L::kPitch + lane / 16 * 16;
            fv::unroll<4>([&](auto index) {
                constexpr int pair = decltype(index)::value;
                if (pair * 16 < limit) {
                    const uint32_t a[4] = {E::narrow_word(s[2 * pair]), E::narrow_word(s[2 * pair] + 2), E::narrow_word(s[2 * pair + 1]),
                                           E::narrow_word(s[2 * pair + 1] + 2)};
                    fv::unroll<L::kSteps>([&](auto depth) {
                        constexpr int step = decltype(depth)::value;
                        uint32_t b[4];
                        fv::load_matrices_transposed<pair * 16 * L::kPitch + step * 32>(b, at);
                        fv::mma<E>(o[2 * step], a, b[0], b[1]);
                        fv::mma<E>(o[2 * step + 1], a, b[2], b[3]);
                    });
                }
            });
        }
        __syncthreads();
        if (first + kBlockRows < n) {
            copy_values(first + kBlockRows);
        } else {
            fv::commit_copies();
        }
    }
    fv::wait_copies<0>();

    sum = {fv::quad_sum(sum.x), fv::quad_sum(sum.y)};
    const float2 inverse = {fv::inverse_sum(sum.x), fv::inverse_sum(sum.y)};
    const int query = first_query + warp_rows + g;
    if (p.log_sum_exp != nullptr && t == 0) {
        float* lse = p.log_sum_exp + (image * p.heads + blockIdx.y) * n + query;
        if (query < n) lse[0] = (fv::finite_top(top.x) * factor + log2f(sum.x)) * fv::kLn2;
        if (query + 8 < n) lse[8] = (fv::finite_top(top.y) * factor + log2f(sum.y)) * fv::kLn2;
    }
    if (!has_values) {
        return;
    }
    // Out through the warp's own queries' rows, so that it leaves in 16-byte pieces.
    char* rows = shared + warp_rows * L::kPitch;
#pragma unroll
    for (int i = 0; i < L::kChunks; ++i) {
        const float upper[2] = {o[i][0] * inverse.x, o[i][1] * inverse.x};
        const float lower[2] = {o[i][2] * inverse.y, o[i][3] * inverse.y};
        *reinterpret_cast<uint32_t*>(rows + g * L::kPitch + i * 16 + t * 4) = E::narrow_word(upper);
        *reinterpret_cast<uint32_t*>(rows + (g + 8) * L::kPitch + i * 16 + t * 4) = E::narrow_word(lower);
    }
    __syncwarp();
    char* out = static_cast<char*>(p.out) + image * p.out_batch_stride * 2 + head_offset;
    for (int i = lane; i < 16 * L::kChunks; i += fv::kWarp) {
        const int row = i / L::kChunks;
        const int chunk = i % L::kChunks;
        const int token = first_query + warp_rows + row;
        if (token < n) {
            *reinterpret_cast<uint4*>(out + token * (p.out_token_stride * 2) + chunk * 16) =
                *reinterpret_cast<const uint4*>(rows + row * L::kPitch + chunk * 16);
        }
    }
    fv::pool_rows<E>(p);
}

// Products of two keys and a block of queries become the queries' exponentials, and what the keys receive of them is added up. Of a
// block that is not full only the queries that exist: what an infinite key made of rows of zeros is no number.
template <bool kPartial>
__device__ __forceinline__ void softmax_columns(float (&s)[8][4], const float* normaliser, float scale, float2 bias, int t, int queries, float2& received) {
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
        if (kPartial && tile * 8 >= queries) break;
        const int column = tile * 8 + 2 * t;
        const float2 less = *reinterpret_cast<const float2*>(normaliser + column);
        s[tile][0] = fv::exp2_approx(fmaf(s[tile][0], scale, bias.x) - less.x);
        s[tile][1] = fv::exp2_approx(fmaf(s[tile][1], scale, bias.x) - less.y);
        s[tile][2] = fv::exp2_approx(fmaf(s[tile][2], scale, bias.y) - less.x);
        s[tile][3] = fv::exp2_approx(fmaf(s[tile][3], scale, bias.y) - less.y);
        if (kPartial && column >= queries) s[tile][0] = s[tile][2] = 0.0f;
        if (kPartial && column + 1 >= queries) s[tile][1] = s[tile][3] = 0.0f;
        received.x += s[tile][0] + s[tile][1];
        received.y += s[tile][2] + s[tile][3];
    }
}

// Keys are the rows here: a warp adds up what its 16 keys receive from every query, in the order of the queries.
template <class E, int kHeadDim>
__device__ __forceinline__ void scores(const AttentionParams& p) {
    using L = Layout<kHeadDim>;
    extern __shared__ __align__(128) char shared[];
    __shared__ float normaliser[kBlockRows];
    const int n = p.tokens;
    const int lane = fv::lane_id();
    const int t = lane % 4;
    const int64_t image = blockIdx.z;
    const int64_t map = image * p.heads + blockIdx.y;
    const int64_t head_offset = static_cast<int64_t>(blockIdx.y) * (kHeadDim * 2);
    const int first_key = blockIdx.x * kBlockRows;
    const int warp_rows = fv::warp_id() * 16;
    const uint32_t shared_k = fv::shared_address(shared);
    const uint32_t shared_q = shared_k + L::kBytes;
    const char* queries = static_cast<const char*>(p.q) + image * p.q_batch_stride * 2 + head_offset;
    const int key = first_key + warp_rows + lane / 4;

    clear_padding<kHeadDim>(shared, 2 * kBlockRows);
    copy_tile<kHeadDim>(shared_k, static_cast<const char*>(p.k) + image * p.k_batch_stride * 2 + head_offset, p.k_token_stride * 2, first_key, n);
    uint32_t k[L::kSteps][4];
    const float scale = p.scale * fv::kLog2E;
    float2 bias = {0.0f, 0.0f};
    if (p.sizes != nullptr) {
        bias.x = key < n ? fv::log2_approx(p.sizes[image * n + key]) : 0.0f;
        bias.y = key + 8 < n ? fv::log2_approx(p.sizes[image * n + key + 8]) : 0.0f;
    }
    float2 received = {0.0f, 0.0f};
    const int last = p.received != nullptr ? n : p.class_count;
#pragma unroll 1
    for (int first = 0; first < last; first += kBlockRows) {
        copy_tile<kHeadDim>(shared_q, queries, p.q_token_stride * 2, first, n);
        fv::commit_copies();
        if (threadIdx.x < kBlockRows) {
            const int query = first + static_cast<int>(threadIdx.x);
            const float lse = query < n ? p.log_sum_exp[map * n + query] * fv::kLog2E : INFINITY;
            // A query that attends to nothing, or does not exist: its exponentials become zero.
            normaliser[threadIdx.x] = lse == -INFINITY ? INFINITY : lse;
        }
        fv::wait_copies<0>();
        __syncthreads();
        if (first == 0) {
            load_rows<kHeadDim>(k, shared_k + warp_rows * L::kPitch);
        }
        float s[8][4] = {};
        multiply_rows<E, kHeadDim>(s, k, shared_q, n - first);
        if (first + kBlockRows <= n) {
            softmax_columns<false>(s, normaliser, scale, bias, t, kBlockRows, received);
        } else {
            softmax_columns<true>(s, normaliser, scale, bias, t, n - first, received);
        }
        // At most eight rows are handed out: those of the first tile.
        if (p.class_rows != nullptr && first == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (2 * t + i < p.class_count) {
                    float* row = p.class_rows + (map * p.class_count + 2 * t + i) * n;
                    if (key < n) row[key] = s[0][i];
                    if (key + 8 < n) row[key + 8] = s[0][i + 2];
                }
            }
        }
        __syncthreads();
    }
    if (p.received != nullptr) {
        received = {fv::quad_sum(received.x), fv::quad_sum(received.y)};
        const float share = 1.0f / static_cast<float>(n);
        if (t == 0) {
            if (key < n) p.received[map * n + key] = received.x * share;
            if (key + 8 < n) p.received[map * n + key + 8] = received.y * share;
        }
    }
}

}  // namespace

#define FV_STREAM(TYPE, E, DIM)                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads, DIM <= 48 ? 4 : DIM <= 80 ? 3 : 2) \
        fv_attention_stream_##TYPE##_##DIM(const __grid_constant__ AttentionParams p) { \
        stream<fv::E, DIM>(p);                                                         \
    }                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 4)                          \
        fv_attention_scores_##TYPE##_##DIM(const __grid_constant__ AttentionParams p) { \
        scores<fv::E, DIM>(p);                                                         \
    }
#define FV_STREAM_OF(TYPE, E) \
    FV_STREAM(TYPE, E, 32)    \
    FV_STREAM(TYPE, E, 40)    \
    FV_STREAM(TYPE, E, 48)    \
    FV_STREAM(TYPE, E, 64)    \
    FV_STREAM(TYPE, E, 72)    \
    FV_STREAM(TYPE, E, 80)    \
    FV_STREAM(TYPE, E, 96)    \
    FV_STREAM(TYPE, E, 128)

FV_STREAM_OF(f16, F16)
FV_STREAM_OF(bf16, Bf16)
