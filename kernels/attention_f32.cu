// attention_f32.cu - softmax(Q Kᵀ scale + log size) V in f32 for any number of tokens and heads of up to 128 values.
//
// Maths:   as attention_stream.cu, with fused multiply-adds: tensor cores would round the factors.
// Shapes:  include/attention.cuh; f32; D a multiple of 8, rows 16-byte aligned. kWidth, the next of 32, 64, 96 and 128, is filled up with
//          zeros in shared memory.
// Launch:  both: block 256, 16 by 16. fv_attention_stream_f32_*: grid (N/64 up, H, B), tiles of 64 queries by 32 keys.
//          fv_attention_scores_f32_*: the same over keys, tiles of 64 keys by 32 queries; needs log_sum_exp. Dynamic shared memory of the
//          first: (64 + 32 + 32) rows of kWidth + 4 values and 64 of 36, 44,032 bytes at D = 64; of the second 96 rows.
// Cost:    4 x N² x D operations a head, a fused multiply-add for every 4/3 words from shared memory; q read once, k and v once for each block
//          of 64 queries. Occupancy: 25 to 50 %, registers for a thread's 4 x 2 scores and 4 x 8 sums; this path is for exactness.

#include "attention.cuh"

namespace {

using fv::AttentionParams;

constexpr int kRows = 64;  // of the tile that stays
constexpr int kColumns = 32;  // of the tiles that pass
constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
constexpr int kProbabilityPitch = kColumns + 4;

// Floats from row to row: an odd number of 16-byte chunks, so that neighbouring rows begin in different groups of banks.
template <int kWidth>
constexpr int kPitch = kWidth + 4;

// Starts the copy of `kCount` rows from `first` on; what is behind row n - 1 or value d - 1 becomes zero. With `groups`, the row of a token is
// that of its group.
template <int kWidth, int kCount>
__device__ __forceinline__ void copy_rows(float* tile, const float* base, int64_t stride, const int32_t* groups, int first, int n, int d) {
    constexpr int kChunks = kWidth / 4;
    for (int i = threadIdx.x; i < kCount * kChunks; i += kThreads) {
        const int row = i / kChunks;
        const int column = i % kChunks * 4;
        int from = first + row < n && column < d ? first + row : -1;
        if (groups != nullptr && from >= 0) {
            from = __ldg(groups + from);
        }
        fv::copy_async(fv::shared_address(tile + row * kPitch<kWidth> + column), base + (from < 0 ? 0 : from) * stride + (column < d ? column : 0),
                       from < 0 ? 0u : 16u);
    }
}

// s[i][j] = row 4y + i of one tile times row x + 16j of the other.
template <int kWidth>
__device__ __forceinline__ void multiply_rows(float (&s)[4][2], const float* rows, const float* columns, int x, int y) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        s[i][0] = s[i][1] = 0.0f;
    }
#pragma unroll 4
    for (int c = 0; c < kWidth; c += 4) {
        float4 b[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            b[j] = *reinterpret_cast<const float4*>(columns + (x + kSide * j) * kPitch<kWidth> + c);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 a = *reinterpret_cast<const float4*>(rows + (4 * y + i) * kPitch<kWidth> + c);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                s[i][j] = fmaf(a.x, b[j].x, s[i][j]);
                s[i][j] = fmaf(a.y, b[j].y, s[i][j]);
                s[i][j] = fmaf(a.z, b[j].z, s[i][j]);
                s[i][j] = fmaf(a.w, b[j].w, s[i][j]);
            }
        }
    }
}

// Over the sixteen lanes that share rows.
__device__ __forceinline__ float row_max(float value) {
#pragma unroll
    for (int step = kSide / 2; step > 0; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(fv::kFullWarp, value, step));
    }
    return value;
}
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
    for (int step = kSide / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(fv::kFullWarp, value, step);
    }
    return value;
}

template <int kWidth>
__device__ __forceinline__ void stream(const AttentionParams& p) {
    // Columns of the output: four neighbouring ones in every 64.
    constexpr int kParts = (kWidth + 63) / 64;
    extern __shared__ __align__(16) float memory[];
    float* queries = memory;
    float* keys = queries + kRows * kPitch<kWidth>;
    float* values = keys + kColumns * kPitch<kWidth>;
    float* probabilities = values + kColumns * kPitch<kWidth>;
    const int x = threadIdx.x % kSide;
    const int y = threadIdx.x / kSide;
    const int n = p.tokens;
    const int d = p.head_dim;
    const int64_t image = blockIdx.z;
    const int64_t head_offset = static_cast<int64_t>(blockIdx.y) * d;
    const int first_query = blockIdx.x * kRows;
    const float* all_keys = static_cast<const float*>(p.k) + image * p.k_batch_stride + head_offset;
    const float* all_values = static_cast<const float*>(p.v) + image * p.v_batch_stride + head_offset;
    const bool has_values = p.v != nullptr;
    const int32_t* groups = p.groups == nullptr ? nullptr : p.groups + image * n;
    const float* sizes = p.sizes == nullptr ? nullptr : p.sizes + image * n;
    const auto copy_values = [&](int first) {
        if (has_values && first < n) {
            copy_rows<kWidth, kColumns>(values, all_values, p.v_token_stride, groups, first, n, d);
        }
        fv::commit_copies();
    };

    copy_rows<kWidth, kRows>(queries, static_cast<const float*>(p.q) + image * p.q_batch_stride + head_offset, p.q_token_stride, nullptr, first_query, n, d);
    copy_rows<kWidth, kColumns>(keys, all_keys, p.k_token_stride, nullptr, 0, n, d);
    fv::commit_copies();
    copy_values(0);

    float o[4][4 * kParts] = {};
    float top[4];
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        top[i] = -INFINITY;
    }
    const float scale = p.scale * fv::kLog2E;
#pragma unroll 1
    for (int first = 0; first < n; first += kColumns) {
        fv::wait_copies<1>();
        __syncthreads();
        float s[4][2];
        multiply_rows<kWidth>(s, queries, keys, x, y);
        __syncthreads();
        if (first + kColumns < n) {
            copy_rows<kWidth, kColumns>(keys, all_keys, p.k_token_stride, nullptr, first + kColumns, n, d);
        }
        fv::commit_copies();
        float bias[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int key = first + x + kSide * j;
            bias[j] = key >= n ? -INFINITY : sizes != nullptr ? fv::log2_approx(__ldg(sizes + key)) : 0.0f;
        }
        float shrink[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[i][0] = fmaf(s[i][0], scale, bias[0]);
            s[i][1] = fmaf(s[i][1], scale, bias[1]);
            const float high = fmaxf(top[i], row_max(fmaxf(s[i][0], s[i][1])));
            const float shift = fv::finite_top(high);
            shrink[i] = fv::exp2_approx(top[i] - shift);
            top[i] = high;
            s[i][0] = fv::exp2_approx(s[i][0] - shift);
            s[i][1] = fv::exp2_approx(s[i][1] - shift);
            sum[i] = fmaf(sum[i], shrink[i], s[i][0] + s[i][1]);
            probabilities[(4 * y + i) * kProbabilityPitch + x] = s[i][0];
            probabilities[(4 * y + i) * kProbabilityPitch + x + kSide] = s[i][1];
        }
        fv::wait_copies<1>();
        __syncthreads();
        if (has_values) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int c = 0; c < 4 * kParts; ++c) {
                    o[i][c] *= shrink[i];
                }
            }
#pragma unroll 2
            for (int key = 0; key < kColumns; key += 4) {
                float4 weight[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    weight[i] = *reinterpret_cast<const float4*>(probabilities + (4 * y + i) * kProbabilityPitch + key);
                }
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    if (part * 64 + 4 * x < kWidth) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const float4 v = *reinterpret_cast<const float4*>(values + (key + j) * kPitch<kWidth> + part * 64 + 4 * x);
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                const float w = j == 0 ? weight[i].x : j == 1 ? weight[i].y : j == 2 ? weight[i].z : weight[i].w;
                                o[i][4 * part] = fmaf(w, v.x, o[i][4 * part]);
                                o[i][4 * part + 1] = fmaf(w, v.y, o[i][4 * part + 1]);
                                o[i][4 * part + 2] = fmaf(w, v.z, o[i][4 * part + 2]);
                                o[i][4 * part + 3] = fmaf(w, v.w, o[i][4 * part + 3]);
                            }
                        }
                    }
                }
            }
        }
        __syncthreads();
        copy_values(first + kColumns);
    }
    fv::wait_copies<0>();

    float* lse = p.log_sum_exp == nullptr ? nullptr : p.log_sum_exp + (image * p.heads + blockIdx.y) * n;
    float* out = static_cast<float*>(p.out) + image * p.out_batch_stride + head_offset;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int query = first_query + 4 * y + i;
        const float total = row_sum(sum[i]);
        const float inverse = total == 0.0f ? 0.0f : __frcp_rn(total);
        if (query < n) {
            if (lse != nullptr && x == 0) {
                lse[query] = (fv::finite_top(top[i]) + log2f(total)) * fv::kLn2;
            }
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int column = part * 64 + 4 * x;
                if (has_values && column < d) {
                    const float4 row = {o[i][4 * part] * inverse, o[i][4 * part + 1] * inverse, o[i][4 * part + 2] * inverse, o[i][4 * part + 3] * inverse};
                    *reinterpret_cast<float4*>(out + query * p.out_token_stride + column) = row;
                }
            }
        }
    }
    fv::pool_rows<fv::F32>(p);
}

// Keys are the rows here: each is added up over the queries, in their order within a lane, then over the lanes.
template <int kWidth>
__device__ __forceinline__ void scores(const AttentionParams& p) {
    extern __shared__ __align__(16) float memory[];
    float* keys = memory;
    float* queries = keys + kRows * kPitch<kWidth>;
    const int x = threadIdx.x % kSide;
    const int y = threadIdx.x / kSide;
    const int n = p.tokens;
    const int d = p.head_dim;
    const int64_t image = blockIdx.z;
    const int64_t map = image * p.heads + blockIdx.y;
    const int64_t head_offset = static_cast<int64_t>(blockIdx.y) * d;
    const int first_key = blockIdx.x * kRows + 4 * y;
    const float* all_queries = static_cast<const float*>(p.q) + image * p.q_batch_stride + head_offset;

    copy_rows<kWidth, kRows>(keys, static_cast<const float*>(p.k) + image * p.k_batch_stride + head_offset, p.k_token_stride, nullptr, blockIdx.x * kRows, n, d);
    const float scale = p.scale * fv::kLog2E;
    float bias[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (p.sizes != nullptr && first_key + i < n) {
            bias[i] = fv::log2_approx(p.sizes[image * n + first_key + i]);
        }
    }
    float received[4] = {};
    const int last = p.received != nullptr ? n : p.class_count;
#pragma unroll 1
    for (int first = 0; first < last; first += kColumns) {
        copy_rows<kWidth, kColumns>(queries, all_queries, p.q_token_stride, nullptr, first, n, d);
        fv::commit_copies();
        fv::wait_copies<0>();
        __syncthreads();
        float s[4][2];
        multiply_rows<kWidth>(s, keys, queries, x, y);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int query = first + x + kSide * j;
            float less = query < n ? p.log_sum_exp[map * n + query] * fv::kLog2E : INFINITY;
            // A query that attends to nothing, or does not exist: its exponentials become zero, where keys are infinite, too.
            less = less == -INFINITY ? INFINITY : less;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[i][j] = query < n ? fv::exp2_approx(fmaf(s[i][j], scale, bias[i]) - less) : 0.0f;
                received[i] += s[i][j];
            }
            if (p.class_rows != nullptr && query < p.class_count) {
                float* row = p.class_rows + (map * p.class_count + query) * n;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (first_key + i < n) row[first_key + i] = s[i][j];
                }
            }
        }
        __syncthreads();
    }
    if (p.received != nullptr) {
        const float share = 1.0f / static_cast<float>(n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float total = row_sum(received[i]);
            if (x == 0 && first_key + i < n) p.received[map * n + first_key + i] = total * share;
        }
    }
}

}  // namespace

#define FV_ATTENTION_F32(WIDTH)                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads, WIDTH <= 64 ? 2 : 1)     \
        fv_attention_stream_f32_##WIDTH(const __grid_constant__ AttentionParams p) { \
        stream<WIDTH>(p);                                                           \
    }                                                                               \
    extern "C" __global__ void __launch_bounds__(kThreads, WIDTH <= 64 ? 4 : 2)     \
        fv_attention_scores_f32_##WIDTH(const __grid_constant__ AttentionParams p) { \
        scores<WIDTH>(p);                                                           \
    }
FV_ATTENTION_F32(32)
FV_ATTENTION_F32(64)
FV_ATTENTION_F32(96)
FV_ATTENTION_F32(128)
