// attention.cu - softmax(Q Kᵀ scale + log size) V of one head of up to 272 tokens of width 64, all keys resident, with its scores.
//
// Maths:   s = q·k scale + log(size of the key); p = exp(s - max)/sum; out = p V. Softmax in f32, exact: no running maximum, the whole
//          row of scores is in registers. Probabilities are rounded to the storage type as the left side of P V, as every tensor-core
//          attention does; sums, class rows and received attention use them unrounded.
// Shapes:  include/attention.cuh; heads side by side in a row (packed qkv needs no copy), rows 16-byte aligned; f16 and bf16. D = 64:
//          other widths, longer sequences and f32 are for attention_stream.cu and attention_f32.cu.
// Launch:  grid (query blocks, H, B); a block has `block_tiles` tiles of 16 queries, its warp w those at w, w + warps, ...; up to 8 warps.
//          Dynamic shared memory: the block's Q tiles, then K and V of the head, rounded up to 16 rows: 79,872 bytes at N = 197.
//          Received attention needs all queries of a head in one block.
// Cost:    at N = 197, D = 64, a head: matrix instructions 13 query tiles x (25 key tiles x 4 + 13 key pairs x 8) = 2,652, the least
//          that tiles of 16x8x16 allow; bytes: q, k, v read once, out written once a block, 4 x 197 x 128 = 100,864 with one block a
//          head. Per score one multiply-add, one exponential, one maximum, one addition and half a conversion: 4.5 x 6,400 a tile of
//          queries = 900 warp instructions beside 204 matrix instructions. A card does both at once; so the floor is near 5 warp
//          instructions for each matrix instruction, and this kernel is written against that number.
//          Occupancy: the scores of a tile take 104 registers at N = 197, so a partition of a multiprocessor holds two warps; 7 warps
//          with two tiles each (11 %) are one block. On purpose: nothing waits for memory after the first 50 KB have arrived, and
//          more warps would mean scores in shared memory. 13 warps with a tile each, tried first, leave 128 registers and spill.

#include "attention.cuh"

namespace {

using fv::AttentionParams;

constexpr int kHeadDim = 64;
constexpr int kRowBytes = kHeadDim * 2;
constexpr int kTileRows = 16;
constexpr int kTileBytes = kTileRows * kRowBytes;
constexpr int kDepthSteps = kHeadDim / 16;
constexpr int kColumnPairs = 13;

// Rows of 128 bytes; the 16-byte chunk c of row r lies at chunk c ^ (r % 8), so that eight rows of one chunk are in eight different
// groups of banks, for the copies in, for ldmatrix and for the results.
__device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// Starts the copy of eight rows from row `first` on by a warp: lanes 0-7 take the chunks of the first row, and so on, twice. Rows from `n` on
// become zero. Row r + 4 has its chunks where those of r are, with bit 6 turned. `to` and `from` are this lane's of the first four
// rows.
__device__ __forceinline__ void copy_rows(uint32_t to, const char* from, int64_t four_rows, uint32_t first, uint32_t n) {
    const uint32_t to_second = (to ^ 64u) + 4 * kRowBytes;
    if (first + 8 <= n) {
        fv::copy_async(to, from);
        fv::copy_async(to_second, from + four_rows);
    } else {
        const uint32_t row = first + (threadIdx.x & 31) / 8;
        fv::copy_async(to, from, row < n ? 16u : 0u);
        fv::copy_async(to_second, from + four_rows, row + 4 < n ? 16u : 0u);
    }
}

// c += a b, or c = a b.
template <class E, bool kFirst>
__device__ __forceinline__ void add_product(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kFirst) {
        fv::mma_first<E>(c, a, b0, b1);
    } else {
        fv::mma<E>(c, a, b0, b1);
    }
}

// The scores of a tile of 16 queries: s[2j] and s[2j + 1] hold keys 16j to 16j + 15. kPairs such pairs fit; the first kSure of them are
// full for every N that comes here, so that nothing asks for them.
template <class E, int kPairs, int kSure>
struct Tile {
    float s[kPairs * 2][4];

    static __device__ __forceinline__ bool has_pair(int pair, int n) { return pair < kSure || pair * 16 < n; }
    static __device__ __forceinline__ bool has_tile(int tile, int n) { return tile < 2 * kSure || tile * 8 < n; }
    static __device__ __forceinline__ bool has_key(int tile, int key, int n) { return tile < 2 * kSure || key < n; }

    // S = Q Kᵀ. Matrices of Q: rows 0-7 and 8-15 of the first eight columns, then of the next eight. Of K: keys 0-7 with both halves of the
    // depth step, then keys 8-15. The next depth step is two chunks further: bits 5 and 6 of the address, turned. Depth is the
    // outer loop: only one step of Q is in registers beside the scores, and no product waits for the one before it.
    __device__ __forceinline__ void score(uint32_t q_lane, uint32_t k_lane, int n) {
        fv::unroll<kDepthSteps>([&](auto depth) {
            constexpr uint32_t step = decltype(depth)::value;
            const uint32_t k_step = k_lane ^ (step * 32);
            uint32_t q[4];
            fv::load_matrices(q, q_lane ^ (step * 32));
            fv::unroll<kPairs>([&](auto index) {
                constexpr int pair = decltype(index)::value;
                if (has_pair(pair, n)) {
                    uint32_t b[4];
                    fv::load_matrices<pair * kTileBytes>(b, k_step);
                    add_product<E, step == 0>(s[2 * pair], q, b[0], b[1]);
                    if (has_tile(2 * pair + 1, n)) {
                        add_product<E, step == 0>(s[2 * pair + 1], q, b[2], b[3]);
                    }
                }
            });
        });
    }

    // Scores in units of log 2, with the bias of each key.
    __device__ __forceinline__ void bias(const float* sizes, float scale, int t, int n) {
#pragma unroll
        for (int tile = 0; tile < kPairs * 2; ++tile) {
            const int key = tile * 8 + 2 * t;
            if (has_tile(tile, n)) {
                const float b0 = has_key(tile, key, n) ? fv::log2_approx(__ldg(sizes + key)) : 0.0f;
                const float b1 = has_key(tile, key + 1, n) ? fv::log2_approx(__ldg(sizes + key + 1)) : 0.0f;
                s[tile][0] = fmaf(s[tile][0], scale, b0);
                s[tile][1] = fmaf(s[tile][1], scale, b1);
                s[tile][2] = fmaf(s[tile][2], scale, b0);
                s[tile][3] = fmaf(s[tile][3], scale, b1);
            }
        }
    }

    // The largest score of the rows g and g + 8. Keys that do not exist get -inf.
    __device__ __forceinline__ float2 top(int t, int n) {
        float2 top = {-INFINITY, -INFINITY};
#pragma unroll
        for (int tile = 0; tile < kPairs * 2; ++tile) {
            if (has_tile(tile, n)) {
                const int key = tile * 8 + 2 * t;
                if (tile >= 2 * kSure && tile * 8 + 8 > n) {
                    if (key >= n) s[tile][0] = s[tile][2] = -INFINITY;
                    if (key + 1 >= n) s[tile][1] = s[tile][3] = -INFINITY;
                }
                top.x = fmaxf(top.x, fmaxf(s[tile][0], s[tile][1]));
                top.y = fmaxf(top.y, fmaxf(s[tile][2], s[tile][3]));
            }
        }
        return {fv::quad_max(top.x), fv::quad_max(top.y)};
    }

    // Scores become exponentials of themselves times `factor` less `shift`; gives the sums of the rows.
    __device__ __forceinline__ float2 exponentiate(float factor, float2 shift, int n) {
        float2 sum = {0.0f, 0.0f};
#pragma unroll
        for (int tile = 0; tile < kPairs * 2; ++tile) {
            if (has_tile(tile, n)) {
                s[tile][0] = fv::exp2_approx(fmaf(s[tile][0], factor, -shift.x));
                s[tile][1] = fv::exp2_approx(fmaf(s[tile][1], factor, -shift.x));
                s[tile][2] = fv::exp2_approx(fmaf(s[tile][2], factor, -shift.y));
                s[tile][3] = fv::exp2_approx(fmaf(s[tile][3], factor, -shift.y));
                sum.x += s[tile][0] + s[tile][1];
                sum.y += s[tile][2] + s[tile][3];
            }
        }
        return {fv::quad_sum(sum.x), fv::quad_sum(sum.y)};
    }

    // The row g, for the few queries whose row is handed out.
    __device__ __forceinline__ void write_row(float* row, float inverse, int t, int n) const {
#pragma unroll
        for (int tile = 0; tile < kPairs * 2; ++tile) {
            const int key = tile * 8 + 2 * t;
            if (has_key(tile, key, n)) row[key] = s[tile][0] * inverse;
            if (has_key(tile, key + 1, n)) row[key + 1] = s[tile][1] * inverse;
        }
    }

    // Queries that do not exist attend to nothing; what an infinite key made of their rows of zeros is no number.
    __device__ __forceinline__ void clear_rows(bool first, bool second, int n) {
#pragma unroll
        for (int tile = 0; tile < kPairs * 2; ++tile) {
            if (has_tile(tile, n)) {
                if (!first) s[tile][0] = s[tile][1] = 0.0f;
                if (!second) s[tile][2] = s[tile][3] = 0.0f;
            }
        }
    }

    // Adds the rows g and g + 8, weighted, to what this lane has of each key's column.
    __device__ __forceinline__ void add_columns(float (&columns)[kPairs * 2][2], float2 weight, int n) const {
#pragma unroll
        for (int tile = 0; tile < kPairs * 2; ++tile) {
            if (has_tile(tile, n)) {
                columns[tile][0] = fmaf(s[tile][0], weight.x, fmaf(s[tile][2], weight.y, columns[tile][0]));
                columns[tile][1] = fmaf(s[tile][1], weight.x, fmaf(s[tile][3], weight.y, columns[tile][1]));
            }
        }
    }

    // O (16, 64) = P V. Matrices of V are transposed on the way: keys 0-7 and 8-15 of the first eight columns, then of the next eight.
    __device__ __forceinline__ void attend(float (&o)[kHeadDim / 8][4], uint32_t v_lane, int n) const {
        fv::unroll<kPairs>([&](auto index) {
            constexpr int pair = decltype(index)::value;
            if (has_pair(pair, n)) {
                const bool both = has_tile(2 * pair + 1, n);
                uint32_t a[4];
                a[0] = E::narrow_word(s[2 * pair]);
                a[1] = E::narrow_word(s[2 * pair] + 2);
                a[2] = both ? E::narrow_word(s[2 * pair + 1]) : 0u;
                a[3] = both ? E::narrow_word(s[2 * pair + 1] + 2) : 0u;
                fv::unroll<kDepthSteps>([&](auto depth) {
                    constexpr uint32_t step = decltype(depth)::value;
                    uint32_t b[4];
                    fv::load_matrices_transposed<pair * kTileBytes>(b, v_lane ^ (step * 32));
                    add_product<E, pair == 0>(o[2 * step], a, b[0], b[1]);
                    add_product<E, pair == 0>(o[2 * step + 1], a, b[2], b[3]);
                });
            }
        });
    }
};

// Adds up the columns over the eight lanes that hold each and writes the warp's sums (N). In three steps a lane hands half of its columns to
// its partner and takes over the partner's share of the other half, which leaves one column of four tiles in each lane.
template <int kTiles>
__device__ __forceinline__ void write_columns(float* sums, const float (&columns)[kTiles][2], int lane, int n) {
    const int g = lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 4) {
        if (tile * 8 >= n) {
            break;
        }
        float c[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            c[j] = tile + j / 2 < kTiles ? columns[tile + j / 2 < kTiles ? tile + j / 2 : 0][j % 2] : 0.0f;
        }
#pragma unroll
        for (int half = 4; half >= 1; half /= 2) {
            // Lane bits 4, 3, 2: g's bits from the highest.
            const bool upper = (lane & (half * 4)) != 0;
#pragma unroll
            for (int j = 0; j < half; ++j) {
                const float give = upper ? c[j] : c[j + half];
                const float keep = upper ? c[j + half] : c[j];
                c[j] = keep + __shfl_xor_sync(fv::kFullWarp, give, half * 4);
            }
        }
        // Lane (g, t) now has value g of the eight: column g%2 of tile g/2.
        const int key = (tile + g / 2) * 8 + lane % 4 * 2 + g % 2;
        if (key < n) sums[key] = c[0];
    }
}

// Starts the copies of the block's queries, keys and values: keys and queries are one group, values the next.
__device__ __forceinline__ void start_copies(const AttentionParams& p, uint32_t shared_q, uint32_t shared_k, uint32_t shared_v, uint32_t key_rows) {
    const uint32_t warps = blockDim.x / fv::kWarp;
    const uint32_t warp = threadIdx.x / fv::kWarp;
    const uint32_t lane = threadIdx.x % fv::kWarp;
    const uint32_t n = static_cast<uint32_t>(p.tokens);
    const int64_t image = blockIdx.z;
    // This lane's place in the first four of eight rows.
    const uint32_t lane_to = chunk_offset(lane / 8, lane % 8);
    const int64_t lane_from = static_cast<int64_t>(blockIdx.y) * kRowBytes + lane % 8 * 16;
    const auto copy = [&](uint32_t to, const void* base, int64_t batch_stride, int64_t token_stride, uint32_t first, uint32_t end) {
        const int64_t stride = token_stride * 2;
        first += warp * 8;
        const char* from = static_cast<const char*>(base) + (image * batch_stride * 2 + lane_from) + (first + lane / 8) * stride;
        const int64_t advance = stride * 8 * warps;
        to += warp * 8 * kRowBytes + lane_to;
#pragma unroll 1
        for (uint32_t row = first; row < end; row += warps * 8) {
            copy_rows(to, from, 4 * stride, row, n);
            from += advance;
            to += warps * 8 * kRowBytes;
        }
    };
    const uint32_t queries = static_cast<uint32_t>(p.block_tiles) * kTileRows;
    copy(shared_q, p.q, p.q_batch_stride, p.q_token_stride, blockIdx.x * queries, blockIdx.x * queries + queries);
    copy(shared_k, p.k, p.k_batch_stride, p.k_token_stride, 0, key_rows);
    fv::commit_copies();
    if (p.groups != nullptr) {
        // Every key has the values of its group.
        const char* values = static_cast<const char*>(p.v) + image * p.v_batch_stride * 2 + lane_from;
#pragma unroll 1
        for (uint32_t row = warp * 4 + lane / 8; row < key_rows; row += warps * 4) {
            const int32_t group = row < n ? p.groups[image * n + row] : -1;
            const char* from = values + (group < 0 ? 0 : group) * (p.v_token_stride * 2);
            fv::copy_async(shared_v + chunk_offset(row, lane % 8), from, group < 0 ? 0u : 16u);
        }
    } else if (p.v != nullptr) {
        copy(shared_v, p.v, p.v_batch_stride, p.v_token_stride, 0, key_rows);
    }
    fv::commit_copies();
}

// Rows first_query to first_query + 15 of the output, through the warp's own query tile so that rows leave in 16-byte pieces.
template <class E>
__device__ __forceinline__ void write_out(const AttentionParams& p, char* tile, const float (&o)[kHeadDim / 8][4], float2 inverse, uint32_t first_query) {
    const uint32_t lane = threadIdx.x % fv::kWarp;
    const uint32_t g = lane / 4;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
        const float low[2] = {o[i][0] * inverse.x, o[i][1] * inverse.x};
        const float high[2] = {o[i][2] * inverse.y, o[i][3] * inverse.y};
        *reinterpret_cast<uint32_t*>(tile + lane % 4 * 4 + chunk_offset(g, i)) = E::narrow_word(low);
        *reinterpret_cast<uint32_t*>(tile + lane % 4 * 4 + chunk_offset(g + 8, i)) = E::narrow_word(high);
    }
    __syncwarp();
    const int64_t stride = p.out_token_stride * 2;
    char* out = static_cast<char*>(p.out) + blockIdx.z * p.out_batch_stride * 2 + blockIdx.y * static_cast<int64_t>(kRowBytes) + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = i * 4 + lane / 8;
        if (first_query + row < static_cast<uint32_t>(p.tokens)) {
            *reinterpret_cast<uint4*>(out + (first_query + row) * stride) = *reinterpret_cast<const uint4*>(tile + chunk_offset(row, lane % 8));
        }
    }
}

template <class E, int kPairs, int kSure>
__device__ __forceinline__ void attention(const AttentionParams& p) {
    using Scores = Tile<E, kPairs, kSure>;
    extern __shared__ __align__(128) char shared[];
    const uint32_t warps = blockDim.x / fv::kWarp;
    const uint32_t warp = threadIdx.x / fv::kWarp;
    const uint32_t lane = threadIdx.x % fv::kWarp;
    const uint32_t g = lane / 4;
    const uint32_t t = lane % 4;
    const uint32_t n = static_cast<uint32_t>(p.tokens);
    const int64_t map = static_cast<int64_t>(blockIdx.z) * p.heads + blockIdx.y;
    const uint32_t key_rows = (n + kTileRows - 1) / kTileRows * kTileRows;
    const uint32_t shared_q = fv::shared_address(shared);
    const uint32_t shared_k = shared_q + p.block_tiles * kTileBytes;
    const uint32_t shared_v = shared_k + key_rows * kRowBytes;

    // Everything the block needs is under way before anything is waited for.
    start_copies(p, shared_q, shared_k, shared_v, key_rows);
    fv::wait_copies<1>();
    __syncthreads();

    const bool biased = p.sizes != nullptr;
    const float scale = p.scale * fv::kLog2E;
    const float factor = biased ? 1.0f : scale;
    // Beyond kColumnPairs they would not fit beside the scores, and the launcher does not ask for them.
    constexpr bool kColumns = kPairs <= kColumnPairs;
    float columns[kColumns ? kPairs * 2 : 1][2] = {};
    bool values_wait = true;
#pragma unroll 1
    for (uint32_t place = warp; place < static_cast<uint32_t>(p.block_tiles); place += warps) {
        const uint32_t first_query = (blockIdx.x * p.block_tiles + place) * kTileRows;
        const uint32_t lane_row = chunk_offset(lane % 16, lane / 16);
        // The last block may have tiles behind the last query.
        const bool some = first_query < n;
        Scores tile;
        float2 inverse;
        if (some) {
            tile.score(shared_q + place * kTileBytes + lane_row, shared_k + chunk_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2), n);
            if (biased) {
                tile.bias(p.sizes + static_cast<int64_t>(blockIdx.z) * n, scale, t, n);
            }
            const float2 top = tile.top(t, n);
            const float2 shift = {fv::finite_top(top.x) * factor, fv::finite_top(top.y) * factor};
            const float2 sum = tile.exponentiate(factor, shift, n);
            inverse = {fv::inverse_sum(sum.x), fv::inverse_sum(sum.y)};

            // Scores that fall out on the way; at most eight rows are handed out, those of the upper half.
            if (p.class_rows != nullptr && first_query == 0 && g < static_cast<uint32_t>(p.class_count)) {
                tile.write_row(p.class_rows + (map * p.class_count + g) * n, inverse.x, t, n);
            }
            const bool first = first_query + g < n;
            const bool second = first_query + g + 8 < n;
            if (p.log_sum_exp != nullptr && t == 0) {
                float* lse = p.log_sum_exp + map * n + first_query + g;
                if (first) lse[0] = (shift.x + log2f(sum.x)) * fv::kLn2;
                if (second) lse[8] = (shift.y + log2f(sum.y)) * fv::kLn2;
            }
            if constexpr (kColumns) {
                if (p.received != nullptr) {
                    if (first_query + kTileRows > n) tile.clear_rows(first, second, n);
                    tile.add_columns(columns, {first ? inverse.x : 0.0f, second ? inverse.y : 0.0f}, n);
                }
            }
        }
        if (values_wait) {
            // Every warp comes here once: each has a first tile.
            fv::wait_copies<0>();
            __syncthreads();
            values_wait = false;
        }
        if (some && p.v != nullptr) {
            float o[kHeadDim / 8][4];
            tile.attend(o, shared_v + lane_row, n);
            write_out<E>(p, shared + place * kTileBytes, o, inverse, first_query);
        }
    }

    if constexpr (kColumns) {
        if (p.received != nullptr) {
            // Nobody reads K any more: the sums of the warps may lie there, (warps, N).
            __syncthreads();
            float* sums = reinterpret_cast<float*>(shared + p.block_tiles * kTileBytes);
            write_columns(sums + warp * n, columns, lane, n);
            __syncthreads();
            const float share = 1.0f / static_cast<float>(n);
            for (uint32_t key = threadIdx.x; key < n; key += blockDim.x) {
                float sum = 0.0f;
                for (uint32_t w = 0; w < warps; ++w) {
                    sum += sums[w * n + key];
                }
                p.received[map * n + key] = sum * share;
            }
        }
    }
    fv::pool_rows<E>(p);
}

}  // namespace

// Type, tiles of 16 keys, of these always full, most warps a block.
#define FV_ATTENTION(TYPE, E, PAIRS, SURE, WARPS)                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)                            \
        fv_attention_resident_##TYPE##_##PAIRS(const __grid_constant__ AttentionParams p) { \
        attention<fv::E, PAIRS, SURE>(p);                                                  \
    }
#define FV_ATTENTION_OF(TYPE, E)      \
    FV_ATTENTION(TYPE, E, 4, 0, 4)    \
    FV_ATTENTION(TYPE, E, 8, 4, 4)    \
    FV_ATTENTION(TYPE, E, 10, 8, 5)   \
    FV_ATTENTION(TYPE, E, 12, 10, 6)  \
    FV_ATTENTION(TYPE, E, 13, 12, 7)  \
    FV_ATTENTION(TYPE, E, 17, 13, 6)

FV_ATTENTION_OF(f16, F16)
FV_ATTENTION_OF(bf16, Bf16)
