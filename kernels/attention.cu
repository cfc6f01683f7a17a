// attention.cu - softmax(Q Kᵀ scale + log size) V of one head and up to 272 tokens, all keys resident, with its scores.
//
// Maths:   s = q·k scale + log(size of the key); p = exp(s - max)/sum; out = p V. Softmax in f32, exact: no running maximum, the whole
//          row of scores is in registers. Probabilities are rounded to the storage type as the left side of P V, as every tensor-core
//          attention does; sums, class row and received attention use them unrounded.
// Shapes:  q, k, v (B, N, H, D) with any batch and token strides, heads side by side (packed qkv needs no copy), rows 16-byte aligned;
//          out (B, N, H, D) likewise; sizes (B, N) f32 or null; class_row, received (B, H, N) f32 or null; D = 64 here.
// Launch:  grid (query blocks, H, B); a warp has 16 queries; kWarps warps a block, fewer when the launcher wants more blocks.
//          Dynamic shared memory: Q tile of each warp, then K and V of the head, rounded up to 16 rows: 77,824 bytes at N = 197.
//          Received attention needs all queries of a head in one block: the launcher sees to it (N <= 208), or gives each block a slice
//          of `received` with `received_stride` between slices and adds them up in order.
// Cost:    at N = 197, D = 64, a head: matrix instructions 13 query tiles x (25 key tiles x 4 + 13 key pairs x 8) = 2,652, the least
//          that tiles of 16x8x16 allow; bytes: q, k, v read once, out written once a block, 4 x 197 x 128 = 100,864 with one block a
//          head. Per score one multiply-add, one exponential, one maximum, one addition and half a conversion: 4.5 x 6,400 a tile of
//          queries = 900 warp instructions beside 204 matrix instructions. A card does both at once; so the floor is near 5 warp
//          instructions for each matrix instruction, and this kernel is written against that number.
//          Occupancy: 104 registers of scores, 16 of queries; one block of 13 warps a multiprocessor (20 %), on purpose: nothing waits
//          for memory after the first 50 KB have arrived, and more warps would mean scores in shared memory.

#include <cmath>
#include <cstddef>

#include "mma.cuh"
#include "reduce.cuh"

namespace {

struct AttentionParams {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const float* sizes;   // (B, N) or null
    float* class_row;     // (B, H, N) or null
    float* received;      // (B, H, N) or null: sums over the block's queries, divided by N
    float* log_sum_exp;   // (B, H, N) or null, natural logarithm
    int64_t q_batch_stride, q_token_stride;
    int64_t k_batch_stride, k_token_stride;
    int64_t v_batch_stride, v_token_stride;
    int64_t out_batch_stride, out_token_stride;
    int64_t received_stride;  // between the slices of query blocks
    int32_t tokens;           // N
    int32_t heads;            // H
    float scale;              // multiplies q·k
    int32_t reserved;
};
static_assert(sizeof(AttentionParams) == 152 && offsetof(AttentionParams, q_batch_stride) == 64 &&
                  offsetof(AttentionParams, tokens) == 136,
              "the launcher's layout");

constexpr int kHeadDim = 64;
constexpr int kRowBytes = kHeadDim * 2;
constexpr int kTileRows = 16;
constexpr int kTileBytes = kTileRows * kRowBytes;
constexpr int kDepthSteps = kHeadDim / 16;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Rows of 128 bytes; the 16-byte chunk c of row r lies at chunk c ^ (r % 8), so that eight rows of one chunk are in eight different
// groups of banks, for the copies in, for ldmatrix and for the results.
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
    return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row & 7)) << 4));
}

// Copies rows from global to shared memory, eight at a time for a warp: lanes 0-7 take the chunks of the first row, and so on, twice.
struct RowCopy {
    const char* from;  // this lane's chunk of the warp's next row
    int64_t second;    // bytes to the row four further on
    uint32_t to;
    int row;  // this lane's row of the tensor

    __device__ __forceinline__ RowCopy(uint32_t shared, const void* base, int64_t batch_bytes, int64_t stride_bytes, int first_row, int shared_row) {
        row = first_row + fv::lane_id() / 8;
        from = static_cast<const char*>(base) + batch_bytes + row * stride_bytes + fv::lane_id() % 8 * 16;
        second = 4 * stride_bytes;
        to = shared + chunk_offset(shared_row + fv::lane_id() / 8, fv::lane_id() % 8);
    }

    // Starts the copy of eight rows; rows from `n` on become zero. Row r + 4 has its chunks where those of r are, with bit 6 turned.
    __device__ __forceinline__ void start(int n) const {
        const uint32_t to_second = (to ^ 64u) + 4 * kRowBytes;
        if (row - fv::lane_id() / 8 + 8 <= n) {
            fv::copy_async(to, from);
            fv::copy_async(to_second, from + second);
        } else {
            fv::copy_async(to, from, row < n ? 16u : 0u);
            fv::copy_async(to_second, from + second, row + 4 < n ? 16u : 0u);
        }
    }
};

// The maximum over the four lanes that share a row, and the sum.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(fv::kFullWarp, x, 1));
    return fmaxf(x, __shfl_xor_sync(fv::kFullWarp, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(fv::kFullWarp, x, 1);
    return x + __shfl_xor_sync(fv::kFullWarp, x, 2);
}

// kPairs: tiles of 16 keys that fit; the first kSure of them are full for every N that comes here.
template <class E, int kPairs, int kSure, int kWarps>
__device__ __forceinline__ void attention(const AttentionParams& p) {
    extern __shared__ __align__(128) char shared[];
    const int warps = static_cast<int>(blockDim.x) / fv::kWarp;
    const int warp = fv::warp_id();
    const int lane = fv::lane_id();
    const int g = lane / 4;
    const int t = lane % 4;
    const int n = p.tokens;
    const int head = static_cast<int>(blockIdx.y);
    const int64_t image = blockIdx.z;
    const int key_rows = (n + kTileRows - 1) / kTileRows * kTileRows;
    const uint32_t shared_q = fv::shared_address(shared) + warp * kTileBytes;
    const uint32_t shared_k = fv::shared_address(shared) + warps * kTileBytes;
    const uint32_t shared_v = shared_k + key_rows * kRowBytes;

    // ---- everything the block needs is under way before anything is waited for
    const int first_query = (static_cast<int>(blockIdx.x) * warps + warp) * kTileRows;
    const int64_t head_offset = static_cast<int64_t>(head) * kRowBytes;
    const auto copy = [&](uint32_t to, const void* base, int64_t batch_stride, int64_t token_stride) {
        RowCopy rows(to, base, image * batch_stride * 2 + head_offset, token_stride * 2, warp * 8, warp * 8);
        const int64_t advance = token_stride * 2 * 8 * warps;
        const int rounds = (key_rows - warp * 8 + warps * 8 - 1) / (warps * 8);
#pragma unroll 1
        for (int round = 0; round < rounds; ++round) {
            rows.start(n);
            rows.from += advance;
            rows.to += warps * 8 * kRowBytes;
            rows.row += warps * 8;
        }
    };
    {
        const int64_t batch = image * p.q_batch_stride * 2 + head_offset;
        RowCopy(shared_q, p.q, batch, p.q_token_stride * 2, first_query, 0).start(n);
        RowCopy(shared_q, p.q, batch, p.q_token_stride * 2, first_query + 8, 8).start(n);
    }
    copy(shared_k, p.k, p.k_batch_stride, p.k_token_stride);
    fv::commit_copies();
    copy(shared_v, p.v, p.v_batch_stride, p.v_token_stride);
    fv::commit_copies();
    fv::wait_copies<1>();
    __syncthreads();

    // ---- scores: S (16, N) = Q Kᵀ
    float s[kPairs * 2][4];
    const float scale = p.scale * kLog2E;
    {
        uint32_t q[kDepthSteps][4];
#pragma unroll
        for (int step = 0; step < kDepthSteps; ++step) {
            // Matrices: rows 0-7 and 8-15 of the first eight columns, then of the next eight.
            fv::load_matrices(q[step], shared_q + chunk_offset(lane & 15, 2 * step + lane / 16));
        }
        uint32_t k_lane[kDepthSteps];
#pragma unroll
        for (int step = 0; step < kDepthSteps; ++step) {
            // Matrices: keys 0-7 with both halves of the depth step, then keys 8-15.
            k_lane[step] = shared_k + chunk_offset(lane / 16 * 8 + (lane & 7), 2 * step + (lane / 8 & 1));
        }
        fv::unroll<kPairs>([&](auto index) {
            constexpr int pair = decltype(index)::value;
            float(&left)[4] = s[2 * pair];
            float(&right)[4] = s[2 * pair + 1];
            if (pair < kSure || pair * 16 + 8 < n) {
                fv::unroll<kDepthSteps>([&](auto depth) {
                    constexpr int step = decltype(depth)::value;
                    uint32_t b[4];
                    fv::load_matrices<pair * kTileBytes>(b, k_lane[step]);
                    if constexpr (step == 0) {
                        fv::mma_first<E>(left, q[step], b[0], b[1]);
                        fv::mma_first<E>(right, q[step], b[2], b[3]);
                    } else {
                        fv::mma<E>(left, q[step], b[0], b[1]);
                        fv::mma<E>(right, q[step], b[2], b[3]);
                    }
                });
            } else if (pair * 16 < n) {
                fv::unroll<kDepthSteps>([&](auto depth) {
                    constexpr int step = decltype(depth)::value;
                    uint32_t b[4];
                    fv::load_matrices<pair * kTileBytes>(b, k_lane[step]);
                    if constexpr (step == 0) {
                        fv::mma_first<E>(left, q[step], b[0], b[1]);
                    } else {
                        fv::mma<E>(left, q[step], b[0], b[1]);
                    }
                });
            }
        });
    }

    // ---- softmax over the rows g and g + 8; scores in units of log 2
    float top0 = -INFINITY;
    float top1 = -INFINITY;
    const bool biased = p.sizes != nullptr;
    const float* sizes = biased ? p.sizes + image * n : nullptr;
#pragma unroll
    for (int tile = 0; tile < kPairs * 2; ++tile) {
        const int column = tile * 8 + 2 * t;
        if (tile < 2 * kSure || tile * 8 < n) {
            if (biased) {
                const float b0 = tile < 2 * kSure || column < n ? fv::log2_approx(sizes[column]) : -INFINITY;
                const float b1 = tile < 2 * kSure || column + 1 < n ? fv::log2_approx(sizes[column + 1]) : -INFINITY;
                s[tile][0] = fmaf(s[tile][0], scale, b0);
                s[tile][1] = fmaf(s[tile][1], scale, b1);
                s[tile][2] = fmaf(s[tile][2], scale, b0);
                s[tile][3] = fmaf(s[tile][3], scale, b1);
            } else if (tile >= 2 * kSure && tile * 8 + 8 > n) {
                // The last tile: keys that do not exist.
                if (column >= n) s[tile][0] = s[tile][2] = -INFINITY;
                if (column + 1 >= n) s[tile][1] = s[tile][3] = -INFINITY;
            }
            top0 = fmaxf(top0, fmaxf(s[tile][0], s[tile][1]));
            top1 = fmaxf(top1, fmaxf(s[tile][2], s[tile][3]));
        }
    }
    top0 = row_max(top0);
    top1 = row_max(top1);
    const float factor = biased ? 1.0f : scale;
    const float shift0 = top0 * factor;
    const float shift1 = top1 * factor;
    float sum0 = 0.0f;
    float sum1 = 0.0f;
#pragma unroll
    for (int tile = 0; tile < kPairs * 2; ++tile) {
        if (tile < 2 * kSure || tile * 8 < n) {
            s[tile][0] = fv::exp2_approx(fmaf(s[tile][0], factor, -shift0));
            s[tile][1] = fv::exp2_approx(fmaf(s[tile][1], factor, -shift0));
            s[tile][2] = fv::exp2_approx(fmaf(s[tile][2], factor, -shift1));
            s[tile][3] = fv::exp2_approx(fmaf(s[tile][3], factor, -shift1));
            sum0 += s[tile][0] + s[tile][1];
            sum1 += s[tile][2] + s[tile][3];
        }
    }
    sum0 = row_sum(sum0);
    sum1 = row_sum(sum1);
    const float inverse0 = fv::reciprocal_approx(sum0);
    const float inverse1 = fv::reciprocal_approx(sum1);

    // ---- scores that fall out on the way
    const int64_t map_row = (image * p.heads + head) * n;
    if (p.class_row != nullptr && first_query == 0 && g == 0) {
#pragma unroll
        for (int tile = 0; tile < kPairs * 2; ++tile) {
            const int column = tile * 8 + 2 * t;
            if (tile < 2 * kSure || column < n) p.class_row[map_row + column] = s[tile][0] * inverse0;
            if (tile < 2 * kSure || column + 1 < n) p.class_row[map_row + column + 1] = s[tile][1] * inverse0;
        }
    }
    if (p.log_sum_exp != nullptr && t == 0) {
        if (first_query + g < n) p.log_sum_exp[map_row + first_query + g] = (shift0 + log2f(sum0)) * kLn2;
        if (first_query + g + 8 < n) p.log_sum_exp[map_row + first_query + g + 8] = (shift1 + log2f(sum1)) * kLn2;
    }
    fv::wait_copies<0>();
    __syncthreads();
    // From here on nobody reads K: the sums over queries may lie there.
    if (p.received != nullptr) {
        float* sums = reinterpret_cast<float*>(shared + warps * kTileBytes);  // (warps, N)
        const float share = 1.0f / static_cast<float>(n);
        // Queries that do not exist attend to nothing.
        const float weight0 = first_query + g < n ? inverse0 * share : 0.0f;
        const float weight1 = first_query + g + 8 < n ? inverse1 * share : 0.0f;
        // Columns are added up over the eight lanes that hold them in three steps; at each a lane hands half of its columns to its
        // partner and takes over the partner's share of the other half, so that the third step leaves one column in each lane.
#pragma unroll
        for (int tile = 0; tile < kPairs * 2; tile += 4) {
            float c[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool there = tile + i < kPairs * 2;
                c[2 * i] = there ? fmaf(s[there ? tile + i : 0][0], weight0, s[there ? tile + i : 0][2] * weight1) : 0.0f;
                c[2 * i + 1] = there ? fmaf(s[there ? tile + i : 0][1], weight0, s[there ? tile + i : 0][3] * weight1) : 0.0f;
            }
            if (tile >= 2 * kSure && tile * 8 >= n) {
                continue;
            }
#pragma unroll
            for (int half = 4; half >= 1; half /= 2) {
                // Lane bits 4, 3, 2: g's bits from the highest.
                const bool upper = (lane & (half * 4)) != 0;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (i < half) {
                        const float give = upper ? c[i] : c[i + half];
                        const float keep = upper ? c[i + half] : c[i];
                        c[i] = keep + __shfl_xor_sync(fv::kFullWarp, give, half * 4);
                    }
                }
            }
            // Lane (g, t) now has value g of the eight: column g%2 of tile g/2.
            const int column = (tile + g / 2) * 8 + 2 * t + g % 2;
            if (column < n) sums[warp * n + column] = c[0];
        }
        __syncthreads();
        float* received = p.received + static_cast<int64_t>(blockIdx.x) * p.received_stride + map_row;
        for (int column = static_cast<int>(threadIdx.x); column < n; column += static_cast<int>(blockDim.x)) {
            float sum = 0.0f;
            for (int w = 0; w < warps; ++w) {
                sum += sums[w * n + column];
            }
            received[column] = sum;
        }
    }

    // ---- O (16, 64) = P V
    float o[kHeadDim / 8][4];
    {
        uint32_t v_lane[kDepthSteps];
#pragma unroll
        for (int step = 0; step < kDepthSteps; ++step) {
            // Transposed on the way: keys 0-7 and 8-15 of the first eight columns, then of the next eight.
            v_lane[step] = shared_v + chunk_offset(lane & 15, 2 * step + lane / 16);
        }
        fv::unroll<kPairs>([&](auto index) {
            constexpr int pair = decltype(index)::value;
            if (pair >= kSure && pair * 16 >= n) {
                return;
            }
            const bool both = pair < kSure || pair * 16 + 8 < n;
            uint32_t a[4];
            a[0] = E::narrow_word(s[2 * pair]);
            a[1] = E::narrow_word(s[2 * pair] + 2);
            a[2] = both ? E::narrow_word(s[2 * pair + 1]) : 0u;
            a[3] = both ? E::narrow_word(s[2 * pair + 1] + 2) : 0u;
            fv::unroll<kDepthSteps>([&](auto depth) {
                constexpr int step = decltype(depth)::value;
                uint32_t b[4];
                fv::load_matrices_transposed<pair * kTileBytes>(b, v_lane[step]);
                if constexpr (pair == 0) {
                    fv::mma_first<E>(o[2 * step], a, b[0], b[1]);
                    fv::mma_first<E>(o[2 * step + 1], a, b[2], b[3]);
                } else {
                    fv::mma<E>(o[2 * step], a, b[0], b[1]);
                    fv::mma<E>(o[2 * step + 1], a, b[2], b[3]);
                }
            });
        });
    }

    // ---- out, through the warp's own query tile so that rows leave in 16-byte pieces
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
        const float low[2] = {o[i][0] * inverse0, o[i][1] * inverse0};
        const float high[2] = {o[i][2] * inverse1, o[i][3] * inverse1};
        char* tile = shared + warp * kTileBytes + t * 4;
        *reinterpret_cast<uint32_t*>(tile + chunk_offset(g, i)) = E::narrow_word(low);
        *reinterpret_cast<uint32_t*>(tile + chunk_offset(g + 8, i)) = E::narrow_word(high);
    }
    __syncwarp();
    const int64_t out_stride = p.out_token_stride * 2;
    char* out = static_cast<char*>(p.out) + image * p.out_batch_stride * 2 + head_offset + first_query * out_stride;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i * 4 + lane / 8;
        const int chunk = lane % 8;
        if (first_query + row < n) {
            *reinterpret_cast<uint4*>(out + row * out_stride + chunk * 16) =
                *reinterpret_cast<const uint4*>(shared + warp * kTileBytes + chunk_offset(row, chunk));
        }
    }
}

}  // namespace

// Name, type, tiles of 16 keys, of these always full, warps a block.
#define FV_ATTENTION(NAME, E, PAIRS, SURE, WARPS)                                                                      \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) NAME(const __grid_constant__ AttentionParams p) { \
        attention<fv::E, PAIRS, SURE, WARPS>(p);                                                                            \
    }

FV_ATTENTION(fv_attention_f16_64_4, F16, 4, 0, 4)
FV_ATTENTION(fv_attention_f16_64_8, F16, 8, 4, 8)
FV_ATTENTION(fv_attention_f16_64_12, F16, 12, 8, 12)
FV_ATTENTION(fv_attention_f16_64_13, F16, 13, 12, 13)
FV_ATTENTION(fv_attention_f16_64_17, F16, 17, 13, 9)
FV_ATTENTION(fv_attention_bf16_64_4, Bf16, 4, 0, 4)
FV_ATTENTION(fv_attention_bf16_64_8, Bf16, 8, 4, 8)
FV_ATTENTION(fv_attention_bf16_64_12, Bf16, 12, 8, 12)
FV_ATTENTION(fv_attention_bf16_64_13, Bf16, 13, 12, 13)
FV_ATTENTION(fv_attention_bf16_64_17, Bf16, 17, 13, 9)
