// cluster.cu - decoupled tokens: the attentive ones stay or pair up, the others join them or form clusters (BAT, MSTM).
//
// Maths:   a selection (select.cu) has put the K attentive tokens in order of score and the b others behind them; score a[n] is
//          the mean over heads. Cosines and distances are those of the rows of x, sums in f32.
//          Join (MSTM): each of the others joins the attentive token of the highest cosine.
//          Peaks (BAT): attentive tokens of odd rank propose to the even one of the highest cosine, the `pairs` best proposals
//          merge. Of the others: D[i][j] = |x_i - x_j|/sqrt(C); density[i] = exp(-mean over j of D[i][j]^2), over all j or the
//          `neighbours` nearest; delta[i] = min of D[i][j] over denser j, or max over all where none is denser; centres: the
//          `clusters` highest density*delta, descending; every other one joins its nearest centre.
//          Weights: a over the group's sum of a, in order of index; equal where that sum is not a positive number.
//          order.cuh's rule decides all ties; equal distances go to the lower rank.
// Shapes:  x (B, N, C), last axis contiguous;  scores (B, H, N) f32;  order (B, N), the members of the selection's plan;  density
//          (B, N), best, far, who (B, tiles, N) in between;  the plan as src/plan.rs, M = special + K - pairs + clusters.
// Launch:  density: a block of 256 an image, or, for the nearest, a block of 128 for 4 tokens, 16*b bytes of dynamic shared
//          memory. pairs: grid (B, tiles of 64 x 64, 2 for peaks), block 128. plan: a block of 256 an image, 20 bytes of dynamic
//          shared memory a token. N to 4,096, C to 4,096.
// Cost:    density over all in O(bC) by the mean: mean over j of |x_i - x_j|^2 = |x_i - m|^2 + mean over j of |x_j - m|^2. pairs:
//          b*K (join) or K^2/4 + b^2 (peaks) products of C values, as f32 multiply-adds; a distance takes two instructions a
//          value. It is computed as it is written: the form by lengths and products cancels where tokens are alike. No
//          similarity or distance goes to memory: a tile leaves one candidate a row. plan: clusters*b distances and counting.

#include <cstddef>

#include "element.cuh"
#include "order.cuh"
#include "reduce.cuh"

namespace {

struct ClusterParams {
    const void* x;         // (B, N, C)
    const float* scores;   // (B, H, N)
    const int32_t* order;  // (B, N)
    float* density;        // (B, N), by place in the order
    float* best;           // (B, tiles, N): the highest cosine, or the least squared distance to a denser one
    float* far;            // (B, tiles, N): the largest squared distance
    int32_t* who;          // (B, tiles, N): whose cosine that is
    int32_t* offsets;      // (B, M+1)
    int32_t* members;      // (B, N)
    float* weights;        // (B, N)
    int32_t* groups;       // (B, N)
    int64_t x_batch_stride, x_token_stride;
    int64_t score_batch_stride, score_head_stride;
    int32_t heads;
    int32_t tokens;  // N
    int32_t width;   // C
    int32_t special;
    int32_t keep;  // K
    int32_t pairs;
    int32_t clusters;
    int32_t neighbours;  // 0: all
    int32_t peaks;       // 0: join
    int32_t tiles;       // of destinations, at most
    int32_t rows;        // tiles of sources, at most
    int32_t reserved;
};
static_assert(sizeof(ClusterParams) == 168 && offsetof(ClusterParams, x_batch_stride) == 88 && offsetof(ClusterParams, heads) == 120,
              "the launcher's layout");

constexpr int kPlanThreads = 256;
constexpr int kPairThreads = 128;
constexpr int kNearRows = 4;
constexpr int kMostWidth = 4096;
constexpr int kTile = 64;
// Values of a row a step, and from row to row in shared memory, in floats.
constexpr int kStep = 32;
constexpr int kStride = kStep + 4;
constexpr int kSumStride = kTile + 8;

// Four values of a row, without gaps: 16 bytes of f32, 8 of halves.
template <class E, bool kWide>
__device__ __forceinline__ float4 load_four(const typename E::Storage* row, int column, int width) {
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if constexpr (kWide && E::kPerWord == 1) {
        if (column < width) {
            const uint4 raw = __ldg(reinterpret_cast<const uint4*>(row + column));
            E::widen_word(raw.x, v);
            E::widen_word(raw.y, v + 1);
            E::widen_word(raw.z, v + 2);
            E::widen_word(raw.w, v + 3);
        }
    } else if constexpr (kWide) {
        if (column < width) {
            const uint2 raw = __ldg(reinterpret_cast<const uint2*>(row + column));
            E::widen_word(raw.x, v);
            E::widen_word(raw.y, v + 2);
        }
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            v[j] = column + j < width ? E::widen(__ldg(row + column + j)) : 0.0f;
        }
    }
    return make_float4(v[0], v[1], v[2], v[3]);
}

// An image's tokens by place in the order, special ones left out.
template <class E>
struct Placed {
    const typename E::Storage* x;
    const int32_t* order;
    int64_t token_stride;

    __device__ __forceinline__ Placed(const ClusterParams& p, int64_t image)
        : x(static_cast<const typename E::Storage*>(p.x) + image * p.x_batch_stride),
          order(p.order + image * p.tokens + p.special),
          token_stride(p.x_token_stride) {}
    __device__ __forceinline__ const typename E::Storage* row(int place) const { return x + __ldg(order + place) * token_stride; }
};

// The squared distance of two rows, by a warp: the same bits in every lane.
template <class E, bool kWide>
__device__ __forceinline__ float squared_distance(const typename E::Storage* a, const typename E::Storage* b, int width) {
    float sum = 0.0f;
#pragma unroll 4
    for (int column = fv::lane_id() * 4; column < width; column += fv::kWarp * 4) {
        const float4 u = load_four<E, kWide>(a, column, width);
        const float4 v = load_four<E, kWide>(b, column, width);
        sum = __fmaf_rn(u.x - v.x, u.x - v.x, sum);
        sum = __fmaf_rn(u.y - v.y, u.y - v.y, sum);
        sum = __fmaf_rn(u.z - v.z, u.z - v.z, sum);
        sum = __fmaf_rn(u.w - v.w, u.w - v.w, sum);
    }
    return fv::warp_sum(sum);
}

// Density over all others: a block an image.
template <class E, bool kWide>
__device__ __forceinline__ void density_of_all(const ClusterParams& p) {
    __shared__ float mean[kMostWidth];
    __shared__ float partial[kPlanThreads / fv::kWarp];
    const int64_t image = blockIdx.x;
    const Placed<E> placed(p, image);
    const int first = p.keep;
    const int last = p.tokens - p.special;
    const float count = static_cast<float>(last - first);
    for (int column = static_cast<int>(threadIdx.x); column < p.width; column += kPlanThreads) {
        float sum = 0.0f;
#pragma unroll 8
        for (int place = first; place < last; ++place) {
            sum += E::widen(__ldg(placed.row(place) + column));
        }
        mean[column] = __fdiv_rn(sum, count);
    }
    __syncthreads();
    float* density = p.density + image * p.tokens;
    float total = 0.0f;  // of this warp's tokens
    for (int place = first + fv::warp_id(); place < last; place += kPlanThreads / fv::kWarp) {
        const auto* row = placed.row(place);
        float sum = 0.0f;
#pragma unroll 4
        for (int column = fv::lane_id() * 4; column < p.width; column += fv::kWarp * 4) {
            const float4 v = load_four<E, kWide>(row, column, p.width);
            const float part[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float distance = column + j < p.width ? part[j] - mean[column + j] : 0.0f;
                sum = __fmaf_rn(distance, distance, sum);
            }
        }
        sum = __fdiv_rn(fv::warp_sum(sum), static_cast<float>(p.width));
        total += sum;
        if (fv::lane_id() == 0) {
            density[place] = sum;
        }
    }
    if (fv::lane_id() == 0) {
        partial[fv::warp_id()] = total;
    }
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < kPlanThreads / fv::kWarp; ++warp) {
        sum += partial[warp];
    }
    const float spread = __fdiv_rn(sum, count);
    for (int place = first + static_cast<int>(threadIdx.x); place < last; place += kPlanThreads) {
        // Among tokens that are no numbers, or infinite, all are infinitely far from the others.
        const float mean_square = density[place] + spread;
        density[place] = mean_square < INFINITY ? expf(-mean_square) : 0.0f;
    }
}

// Density over the nearest: a warp a token, its distances in shared memory.
template <class E, bool kWide>
__device__ __forceinline__ void density_of_nearest(const ClusterParams& p) {
    extern __shared__ float near_distances[];  // [kNearRows][b]
    const int first = p.keep;
    const int b = p.tokens - p.special - first;
    const int blocks = (b + kNearRows - 1) / kNearRows;
    const int64_t image = static_cast<int>(blockIdx.x) / blocks;
    const int mine = static_cast<int>(blockIdx.x) % blocks * kNearRows + fv::warp_id();
    // Warps leave whole, and there is no barrier.
    if (mine >= b) {
        return;
    }
    const Placed<E> placed(p, image);
    float* distances = near_distances + fv::warp_id() * b;
    const auto* row = placed.row(first + mine);
    for (int other = 0; other < b; ++other) {
        const float distance = __fdiv_rn(squared_distance<E, kWide>(row, placed.row(first + other), p.width),
                                         static_cast<float>(p.width));
        if (fv::lane_id() == other % fv::kWarp) {
            distances[other] = distance;
        }
    }
    // Lane l reads what it has written: places l, l + 32, ...
    const int k = min(p.neighbours, b);
    float sum = 0.0f;
    for (int taken = 0; taken < k; ++taken) {
        float least = INFINITY;
        int at = -1;
        for (int other = fv::lane_id(); other < b; other += fv::kWarp) {
            if (distances[other] < least) {
                least = distances[other];
                at = other;
            }
        }
        const float nearest = -fv::warp_max(-least);
        const unsigned who = __ballot_sync(fv::kFullWarp, at >= 0 && least == nearest);
        if (who == 0) {
            // Nothing but numbers that are none, or infinite ones.
            sum = INFINITY;
            break;
        }
        if (fv::lane_id() == __ffs(static_cast<int>(who)) - 1) {
            distances[at] = INFINITY;
        }
        sum += nearest;
    }
    if (fv::lane_id() == 0) {
        p.density[image * p.tokens + first + mine] = expf(-__fdiv_rn(sum, static_cast<float>(k)));
    }
}

// Places base, base + step, ...
struct Places {
    int base;
    int step;
    int count;
    __device__ __forceinline__ int at(int i) const { return base + i * step; }
};

// One tile of 64 sources and 64 destinations; kDistance: squared distances instead of products.
template <class E, bool kWide, bool kDistance>
__device__ __forceinline__ void pair_tile(const ClusterParams& p, int64_t image, const Places& sources, const Places& others, int from,
                                          int to, float* tile_memory, float* lengths) {
    constexpr int kLanes = kStep / 4;                  // of a row's step
    constexpr int kAtOnce = kPairThreads / kLanes;     // rows
    constexpr int kHeld = kTile / kAtOnce;
    float* a_rows = tile_memory;
    float* b_rows = tile_memory + kTile * kStride;
    const Placed<E> placed(p, image);
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int first = static_cast<int>(threadIdx.x) / kLanes;
    const typename E::Storage* a_at[kHeld];
    const typename E::Storage* b_at[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        // Rows past the end repeat the last one; nobody asks for their sums.
        a_at[i] = placed.row(sources.at(min(from + first + i * kAtOnce, sources.count - 1)));
        b_at[i] = placed.row(others.at(min(to + first + i * kAtOnce, others.count - 1)));
    }
    float4 a_held[kHeld], b_held[kHeld];
    float a_square[kHeld], b_square[kHeld];
    const auto fetch = [&](int column) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            a_held[i] = load_four<E, kWide>(a_at[i], column + lane * 4, p.width);
            b_held[i] = load_four<E, kWide>(b_at[i], column + lane * 4, p.width);
        }
    };
    const auto square = [](float4 v, float sum) {
        return __fmaf_rn(v.x, v.x, __fmaf_rn(v.y, v.y, __fmaf_rn(v.z, v.z, __fmaf_rn(v.w, v.w, sum))));
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        a_square[i] = b_square[i] = 0.0f;
    }
    // A thread has every eighth source and every sixteenth destination.
    const int row = static_cast<int>(threadIdx.x) / 16;
    const int other = static_cast<int>(threadIdx.x) % 16;
    float c[8][4];
#pragma unroll
    for (auto& line : c) {
        line[0] = line[1] = line[2] = line[3] = 0.0f;
    }
    const auto term = [](float u, float v, float sum) {
        return kDistance ? __fmaf_rn(u - v, u - v, sum) : __fmaf_rn(u, v, sum);
    };
    fetch(0);
    for (int column = 0; column < p.width; column += kStep) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const int at = (first + i * kAtOnce) * kStride + lane * 4;
            *reinterpret_cast<float4*>(a_rows + at) = a_held[i];
            *reinterpret_cast<float4*>(b_rows + at) = b_held[i];
            if constexpr (!kDistance) {
                a_square[i] = square(a_held[i], a_square[i]);
                b_square[i] = square(b_held[i], b_square[i]);
            }
        }
        __syncthreads();
        if (column + kStep < p.width) {
            fetch(column + kStep);
        }
#pragma unroll 2
        for (int k = 0; k < kStep; k += 4) {
            float4 v[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v[j] = *reinterpret_cast<const float4*>(b_rows + (other + 16 * j) * kStride + k);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float4 u = *reinterpret_cast<const float4*>(a_rows + (row + 8 * i) * kStride + k);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    c[i][j] = term(u.w, v[j].w, term(u.z, v[j].z, term(u.y, v[j].y, term(u.x, v[j].x, c[i][j]))));
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            tile_memory[(row + 8 * i) * kSumStride + other + 16 * j] = c[i][j];
        }
    }
    if constexpr (!kDistance) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const float a_length = fmaxf(__fsqrt_rn(fv::group_sum<kLanes>(a_square[i])), 1e-12f);
            const float b_length = fmaxf(__fsqrt_rn(fv::group_sum<kLanes>(b_square[i])), 1e-12f);
            if (lane == 0) {
                lengths[first + i * kAtOnce] = a_length;
                lengths[kTile + first + i * kAtOnce] = b_length;
            }
        }
    }
    __syncthreads();

    // Two neighbouring lanes a source, each half of the destinations.
    const int mine = static_cast<int>(threadIdx.x) / 2;
    const int half = static_cast<int>(threadIdx.x) % 2 * (kTile / 2);
    const float* sums = tile_memory + mine * kSumStride + half;
    const int there = min(max(others.count - to - half, 0), kTile / 2);
    const int place = sources.at(min(from + mine, sources.count - 1));
    const int64_t out = (image * p.tiles + to / kTile) * p.tokens + place;
    const bool writes = half == 0 && from + mine < sources.count;
    if constexpr (kDistance) {
        const float* density = p.density + image * p.tokens;
        const float own = density[place];
        float near = INFINITY;
        float far = 0.0f;
        for (int j = 0; j < there; ++j) {
            const float distance = sums[j];
            // Who is infinitely far is nobody's farthest.
            far = distance < INFINITY ? fmaxf(far, distance) : far;
            near = density[others.at(to + half + j)] > own ? fminf(near, distance) : near;
        }
        near = fminf(near, __shfl_xor_sync(fv::kFullWarp, near, 1));
        far = fmaxf(far, __shfl_xor_sync(fv::kFullWarp, far, 1));
        if (writes) {
            p.best[out] = near;
            p.far[out] = far;
        }
    } else {
        uint32_t best = fv::kAbsent;
        int who = 0;
        for (int j = 0; j < there; ++j) {
            const float cosine = __fdiv_rn(sums[j], lengths[mine] * lengths[kTile + half + j]);
            const uint32_t key = fv::order_key(cosine);
            if (key > best) {
                best = key;
                who = to + half + j;
            }
        }
        // The upper half has the higher ranks: it wins by more only.
        const uint32_t upper = __shfl_down_sync(fv::kFullWarp, best, 1);
        const int upper_who = __shfl_down_sync(fv::kFullWarp, who, 1);
        if (writes) {
            p.best[out] = fv::score_of_key(max(best, upper));
            p.who[out] = upper > best ? upper_who : who;
        }
    }
}

template <class E, bool kWide>
__device__ __forceinline__ void pair_tiles(const ClusterParams& p) {
    __shared__ alignas(16) float tile_memory[2 * kTile * kStride];
    __shared__ float lengths[2 * kTile];
    static_assert(kTile * kSumStride <= 2 * kTile * kStride, "sums lie where rows have lain");
    const int64_t image = blockIdx.x;
    const int from = static_cast<int>(blockIdx.y) / p.tiles * kTile;
    const int to = static_cast<int>(blockIdx.y) % p.tiles * kTile;
    const int rest = p.tokens - p.special - p.keep;
    // Blocks leave whole.
    if (blockIdx.z == 1) {
        const Places places{p.keep, 1, rest};
        if (from < rest && to < rest) {
            pair_tile<E, kWide, true>(p, image, places, places, from, to, tile_memory, lengths);
        }
        return;
    }
    const Places sources = p.peaks != 0 ? Places{1, 2, p.keep / 2} : Places{p.keep, 1, rest};
    const Places others = p.peaks != 0 ? Places{0, 2, (p.keep + 1) / 2} : Places{0, 1, p.keep};
    if (from < sources.count && to < others.count) {
        pair_tile<E, kWide, false>(p, image, sources, others, from, to, tile_memory, lengths);
    }
}

// The plan of an image.
template <class E, bool kWide>
__device__ __forceinline__ void write_plan(const ClusterParams& p) {
    extern __shared__ unsigned char plan_shared[];
    __shared__ int totals[fv::kWarp];
    const int64_t image = blockIdx.x;
    const int thread = static_cast<int>(threadIdx.x);
    const int places = p.tokens - p.special;
    const int rest = places - p.keep;
    const int out = p.special + p.keep - p.pairs + p.clusters;  // M
    auto* score = reinterpret_cast<float*>(plan_shared);        // [places]
    auto* key = reinterpret_cast<uint32_t*>(score + places);    // [places]; later the places in order of groups
    auto* group = reinterpret_cast<int*>(key + places);         // [places]
    auto* start = group + places;                               // [M + 1]
    auto* centre = start + out + 1;                             // [clusters]
    const int32_t* order = p.order + image * p.tokens + p.special;
    const int destinations = (p.peaks != 0 ? (p.keep + 1) / 2 : p.keep);
    const auto tiles = [](int count) { return (count + kTile - 1) / kTile; };

    for (int place = thread; place < places; place += kPlanThreads) {
        const float* at = p.scores + image * p.score_batch_stride + order[place];
        float sum = 0.0f;
        for (int head = 0; head < p.heads; ++head) {
            sum = __fadd_rn(sum, __ldg(at + head * p.score_head_stride));
        }
        score[place] = __fdiv_rn(sum, static_cast<float>(p.heads));
        key[place] = fv::kAbsent;
        group[place] = place < p.keep ? place : -1;
    }
    for (int i = thread; i <= out; i += kPlanThreads) {
        start[i] = 0;
    }
    __syncthreads();

    // The best destination over all tiles; lower tiles have lower ranks.
    const auto best_of = [&](int place, int& who) {
        uint32_t best = fv::kAbsent;
        for (int tile = 0; tile < tiles(destinations); ++tile) {
            const int64_t at = (image * p.tiles + tile) * p.tokens + place;
            const uint32_t candidate = fv::order_key(p.best[at]);
            if (candidate > best) {
                best = candidate;
                who = p.who[at];
            }
        }
        return best;
    };
    if (p.peaks == 0) {
        for (int place = p.keep + thread; place < places; place += kPlanThreads) {
            int who = 0;
            best_of(place, who);
            group[place] = who;
        }
        __syncthreads();
    } else {
        for (int place = 1 + 2 * thread; p.pairs > 0 && place < p.keep; place += 2 * kPlanThreads) {
            int who = 0;
            key[place] = best_of(place, who);
            // Whom a merged one joins, until ranks become places.
            group[place] = -2 - 2 * who;
        }
        for (int place = p.keep + thread; p.clusters > 0 && place < places; place += kPlanThreads) {
            float near = INFINITY;
            float far = 0.0f;
            for (int tile = 0; tile < tiles(rest); ++tile) {
                const int64_t at = (image * p.tiles + tile) * p.tokens + place;
                near = fminf(near, p.best[at]);
                far = fmaxf(far, p.far[at]);
            }
            const float square = near < INFINITY ? near : far;
            const float delta = __fsqrt_rn(__fdiv_rn(square, static_cast<float>(p.width)));
            key[place] = fv::order_key(p.density[image * p.tokens + place] * delta);
        }
        __syncthreads();
        // Ranks among the proposals, and among the peaks.
        for (int place = 1 + 2 * thread; p.pairs > 0 && place < p.keep; place += 2 * kPlanThreads) {
            int rank = 0;
            for (int other = 1; other < p.keep; other += 2) {
                rank += key[other] > key[place] || (key[other] == key[place] && other < place);
            }
            if (rank >= p.pairs) {
                group[place] = place;
            }
        }
        for (int place = p.keep + thread; p.clusters > 0 && place < places; place += kPlanThreads) {
            int rank = 0;
            for (int other = p.keep; other < places; ++other) {
                rank += key[other] > key[place] || (key[other] == key[place] && other < place);
            }
            if (rank < p.clusters) {
                centre[rank] = place;
                group[place] = rank;
            }
        }
        __syncthreads();
        const Placed<E> placed(p, image);
        for (int place = p.keep + fv::warp_id(); p.clusters > 0 && place < places; place += kPlanThreads / fv::kWarp) {
            if (group[place] >= 0) {
                continue;
            }
            float least = INFINITY;
            int nearest = 0;
            for (int rank = 0; rank < p.clusters; ++rank) {
                const float distance = squared_distance<E, kWide>(placed.row(place), placed.row(centre[rank]), p.width);
                if (distance < least) {
                    least = distance;
                    nearest = rank;
                }
            }
            if (fv::lane_id() == 0) {
                key[place] = static_cast<uint32_t>(nearest);
            }
        }
        __syncthreads();
        for (int place = p.keep + thread; p.clusters > 0 && place < places; place += kPlanThreads) {
            group[place] = p.keep - p.pairs + (group[place] >= 0 ? group[place] : static_cast<int>(key[place]));
        }
        // Attentive ones close up behind those that have merged: by now `key` of an odd place is not wanted any more.
        for (int place = thread; place < p.keep; place += kPlanThreads) {
            int before = 0;
            for (int other = 1; other < place; other += 2) {
                before += group[other] < 0;
            }
            key[place] = static_cast<uint32_t>(before);
        }
        __syncthreads();
        for (int place = thread; place < p.keep; place += kPlanThreads) {
            const int to = group[place] < 0 ? -2 - group[place] : place;
            group[place] = to - static_cast<int>(key[to]);
        }
        __syncthreads();
    }

    // How many are in each group; integers: the order of these additions does not show.
    for (int place = thread; place < places; place += kPlanThreads) {
        if (group[place] >= 0) {
            atomicAdd(start + p.special + group[place], 1);
        }
    }
    for (int token = thread; token < p.special; token += kPlanThreads) {
        start[token] = 1;
    }
    __syncthreads();
    int below = 0;
    for (int base = 0; base < out; base += kPlanThreads) {
        const int i = base + thread;
        const int mine = i < out ? start[i] : 0;
        const fv::Scan scan = fv::block_exclusive_scan(mine, totals);
        if (i < out) {
            start[i] = below + scan.before;
        }
        below += scan.total;
    }
    if (thread == 0) {
        start[out] = below;
    }
    __syncthreads();

    int32_t* offsets = p.offsets + image * (out + 1);
    int32_t* members = p.members + image * p.tokens;
    float* weights = p.weights + image * p.tokens;
    int32_t* groups = p.groups + image * p.tokens;
    for (int i = thread; i <= out; i += kPlanThreads) {
        offsets[i] = start[i];
    }
    for (int token = thread; token < p.special; token += kPlanThreads) {
        members[token] = token;
        weights[token] = 1.0f;
        groups[token] = token;
    }
    for (int i = below + thread; i < p.tokens; i += kPlanThreads) {
        members[i] = -1;
        weights[i] = 0.0f;
    }
    for (int place = thread; place < places; place += kPlanThreads) {
        const int token = order[place];
        const int mine = group[place];
        groups[token] = mine < 0 ? -1 : p.special + mine;
        if (mine < 0) {
            continue;
        }
        const int first = start[p.special + mine];
        int before = 0;
        if (start[p.special + mine + 1] - first > 1) {
            for (int other = 0; other < places; ++other) {
                before += group[other] == mine && order[other] < token;
            }
        }
        members[first + before] = token;
        key[first + before - p.special] = static_cast<uint32_t>(place);
    }
    __syncthreads();
    for (int i = p.special + thread; i < out; i += kPlanThreads) {
        const int first = start[i];
        const int count = start[i + 1] - first;
        float total = 0.0f;
        for (int j = first; j < first + count; ++j) {
            total = __fadd_rn(total, score[key[j - p.special]]);
        }
        const bool usable = total > 0.0f && total < INFINITY;
        for (int j = first; j < first + count; ++j) {
            const float share = usable ? __fdiv_rn(score[key[j - p.special]], total) : __fdiv_rn(1.0f, static_cast<float>(count));
            weights[j] = count == 1 ? 1.0f : share;
        }
    }
}

}  // namespace

#define FV_CLUSTER(SUFFIX, E, WIDE)                                                                                              \
    extern "C" __global__ void __launch_bounds__(kPlanThreads, 4) fv_cluster_density_##SUFFIX(const __grid_constant__ ClusterParams p) { \
        density_of_all<E, WIDE>(p);                                                                                              \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(kPairThreads, 8) fv_cluster_nearest_##SUFFIX(const __grid_constant__ ClusterParams p) { \
        density_of_nearest<E, WIDE>(p);                                                                                          \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(kPairThreads, 3) fv_cluster_pairs_##SUFFIX(const __grid_constant__ ClusterParams p) {   \
        pair_tiles<E, WIDE>(p);                                                                                                  \
    }                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(kPlanThreads, 3) fv_cluster_plan_##SUFFIX(const __grid_constant__ ClusterParams p) {    \
        write_plan<E, WIDE>(p);                                                                                                  \
    }
FV_CLUSTER(f32, fv::F32, true)
FV_CLUSTER(f16, fv::F16, true)
FV_CLUSTER(bf16, fv::Bf16, true)
FV_CLUSTER(f32_narrow, fv::F32, false)
FV_CLUSTER(f16_narrow, fv::F16, false)
FV_CLUSTER(bf16_narrow, fv::Bf16, false)
