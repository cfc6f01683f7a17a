// matching.cu - bipartite soft matching (ToMe, section 3; MCTF, section 3.2) into a token plan. No similarity is written.
//
// Maths:   set A = tokens at even positions, B = tokens at odd ones, special tokens (the first) aside.
//          row[n] = metric[n], or the sum over heads of its keys;  cosine[i][j] = <a_i, b_j> / (|a_i| |b_j|), 0 for a row
//          of zeros;  score = cosine, or max((cosine+1)/2, 0)^e * c_i * c_j with a token's criteria c =
//          (1/received / max)^e' * (1/size / max)^e''.
//          A chooses its best partner in B; by descending score the first `forward` go into theirs. Both ways: B then
//          chooses among the A that stay, by the same scores, and the first merges - forward go there with what they
//          took in. Precedence is order.cuh's: ties to the lower index, NaN last. Output: special tokens, A that
//          stays (ascending, or by descending score without special tokens), B that stays (ascending; both ways by
//          descending score).
// Shapes:  metric (B, N, heads*D), last axis contiguous;  received, informativeness (B, H, N);  sizes (B, N);  the plan as
//          src/plan.rs: offsets (B, M+1), members, weights, groups (B, N), M = N - merges.
// Launch:  fv_match_resident_W_*: cosine, one way; one block of 512 an image; dynamic shared W+4 words a row, A rounded up
//          to 4, B to 8 rows. N to 512, D to W.
//          fv_match_tiles_* (cosine), fv_match_criteria_*: grid B * (A or B tokens / 32, rounded up), block 128; dynamic
//          shared a tile, or what the ordered part takes. N to 16,384, any D. One launch one way. Both ways are one launch, too,
//          by criteria, to N = 1,024 with a special token: the tiles also find whom each of B would choose among all of A,
//          which stands where that one stays; only those of B whose choice leaves are asked again, 32 at a time, by the image's last block.
//          Else two launches, forth and back.
//          The last block of an image to arrive orders it. The counter of arrivals is atomic, what the last block then
//          computes does not depend on who it is.
// Cost:    reads the metric once from memory, 4*H*N a score tensor, and writes 4*(3N + M+1) an image. |A|*|B|*D fused
//          multiply-adds an image and way (at once: way back only |B asked again|*|A that stays|*D, at worst all of B by one
//          block; no more than `forward` of A leave): for 197 tokens of 64 values 98*98*64/32 = 19,208 warp instructions. All in f32:
//          products of rounded rows, or of f16 and bf16 on matrix units, change who is chosen.
//          resident: 48 multiply-adds for 7 shared loads of 16 bytes, in whole groups of 4 x 8 pairs: 92 % of the
//          multiply-adds are wanted at N = 197. tiles: the same in groups of 8 x 16; rows come from L2, 19 multiply-adds
//          for each value loaded, and a row of zeros, or with squares out of f32's range, makes its step run twice.

#include "match_params.cuh"
#include "match_plan.cuh"
#include "match_similarity.cuh"

namespace {

using fv::MatchParams;

constexpr int kResidentTokens = 512;
constexpr int kResidentThreads = 512;
constexpr int kResidentWarps = kResidentThreads / fv::kWarp;
// Values a lane holds of a row while it is loaded: a team holds 128.
constexpr int kHeld = 16;
constexpr int kHeadsTogether = 3;
// Columns of a warp's step over B, and quads of the rows it unrolls.
constexpr int kColumns = 3;
constexpr int kResidentUnroll = 2;

constexpr int kTileThreads = 128;
// Rows of a tile: 2 warps of 4 lanes, 4 rows each, against 2 warps of 8 lanes, kColumns columns each.
constexpr int kTileA = 32;
constexpr int kTileB = 16 * kColumns;
// Columns of the rows that are in shared memory together, and from row to row: rows that follow each other start 4 banks apart.
constexpr int kChunk = 32;
constexpr int kChunkWords = kChunk + 4;

// Shares [0, count) into `parts` runs of nearly equal length; where run `part` starts.
__device__ __forceinline__ int share(int count, int parts, int part) { return part * count / parts; }

// The rows that are compared, of length 1, into shared memory: those of A in whole groups of 4, then those of B in whole
// groups of 8; what fills a group is 0.
template <class E, int kRowWords>
__device__ __forceinline__ void load_unit_rows(const MatchParams& p, const fv::Sides& sides, int rows_a, int rows_b,
                                               float* rows) {
    constexpr int kStep = 16 / sizeof(typename E::Storage);
    const fv::MetricRows<E> metric(p, blockIdx.x);
    const int lane = fv::lane_id() % fv::kTeam;
    for (int base = 0; base < rows_a + rows_b; base += kResidentThreads / fv::kTeam) {
        const int row = base + static_cast<int>(threadIdx.x) / fv::kTeam;
        const int of_b = row - rows_a;
        const int token = of_b < 0 ? sides.token_a(row) : sides.token_b(of_b);
        float v[kHeld] = {};
        if (of_b < 0 ? row < sides.a() : of_b < sides.b()) {
#pragma unroll
            for (int i = 0; i < kHeld / kStep; ++i) {
                metric.template add<kStep, kHeadsTogether>(p.wide != 0, token, (i * fv::kTeam + lane) * kStep, v + i * kStep);
            }
        }
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            squares = __fmaf_rn(v[i], v[i], squares);
        }
        squares = fv::team_add(squares);
        float scale = 1.0f;
        if (__any_sync(fv::kFullWarp, fv::needs_scale(squares))) {
            float largest = 0.0f;
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                largest = fmaxf(largest, fabsf(v[i]));
            }
            largest = fv::team_max(largest);
            scale = fv::needs_scale(squares) ? fv::scale_of(largest) : 1.0f;
            squares = 0.0f;
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                v[i] *= scale;
                squares = __fmaf_rn(v[i], v[i], squares);
            }
            squares = fv::team_add(squares);
        }
        const float factor = fv::inverse_length(squares, scale);
        if (row < rows_a + rows_b) {
            float* out = rows + row * kRowWords;
#pragma unroll
            for (int i = 0; i < kHeld / kStep; ++i) {
                const int column = (i * fv::kTeam + lane) * kStep;
#pragma unroll
                for (int quad = 0; quad < kStep; quad += 4) {
                    if (column < p.padded_width) {
                        const float* x = v + i * kStep + quad;
                        *reinterpret_cast<float4*>(out + column + quad) =
                            make_float4(x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor);
                    }
                }
            }
        }
    }
}

template <class E, int kWidest>
__device__ __forceinline__ void match_resident(const MatchParams& p) {
    // Rows that follow each other start 4 banks apart.
    constexpr int kRowWords = kWidest + 4;
    extern __shared__ float4 shared_quads[];
    auto* rows = reinterpret_cast<float*>(shared_quads);  // [A rounded up to 4, then B rounded up to 8][kRowWords]
    __shared__ unsigned long long best[kResidentTokens / 2];
    __shared__ alignas(16) uint32_t keys[kResidentTokens / 2];
    __shared__ int groups[kResidentTokens];
    __shared__ int members[kResidentTokens];
    __shared__ int counters[kResidentTokens];
    __shared__ fv::OrderScratch scratch;

    const int64_t image = blockIdx.x;
    const fv::Sides sides(p);
    const int count_a = sides.a();
    const int count_b = sides.b();
    const int a_groups = (count_a + 3) / 4;
    const int b_groups = (count_b + 7) / 8;
    for (int i = threadIdx.x; i < kResidentTokens / 2; i += kResidentThreads) {
        best[i] = 0;
    }
    load_unit_rows<E, kRowWords>(p, sides, 4 * a_groups, 8 * b_groups, rows);
    __syncthreads();

    // A warp takes up to 16 rows of A, four groups of four, and runs over B, or a part of it where there are more warps.
    const int pieces = (a_groups + 3) / 4;
    const int parts = pieces == 0 ? 0 : max(1, kResidentWarps / pieces);
    const int lane_a = fv::lane_id() / fv::kTeam;
    const int lane_b = fv::lane_id() % fv::kTeam;
    for (int unit = fv::warp_id(); unit < pieces * parts; unit += kResidentWarps) {
        const int a_group = share(a_groups, pieces, unit % pieces);
        const int a_here = share(a_groups, pieces, unit % pieces + 1) - a_group;
        const int b_group = share(b_groups, parts, unit / pieces);
        const int b_here = share(b_groups, parts, unit / pieces + 1) - b_group;
        const int first_a = 4 * a_group + lane_a;
        const int first_b = 8 * b_group + lane_b;
        const int steps = (b_here + kColumns - 1) / kColumns;
        fv::Best seen;
#pragma unroll 1
        for (int step = steps - 1; step >= 0; --step) {
            const int from = share(b_here, steps, step);
            const int groups_here = share(b_here, steps, step + 1) - from;
            const int at_b = first_b + 8 * from;
            float sums[4][kColumns] = {};
            fv::add_products_of<kResidentUnroll>(a_here, groups_here, rows + first_a * kRowWords, 4 * kRowWords,
                                                 rows + (4 * a_groups + at_b) * kRowWords, 8 * kRowWords,
                                                 p.padded_width / 4, sums);
#pragma unroll
            for (int j = kColumns - 1; j >= 0; --j) {
                if (j < groups_here && at_b + 8 * j < count_b) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        seen.see(i, sums[i][j], from + j);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // A lane without candidates has nothing to offer.
            const bool saw = b_here > 0 && first_b < count_b;
            const unsigned long long of_team = fv::team_best(saw ? seen.packed(i, first_b, 8) : 0ull);
            if (i < a_here && first_a + 4 * i < count_a && lane_b == 0) {
                // A maximum of integers: the order does not show.
                atomicMax(best + first_a + 4 * i, of_team);
            }
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < kResidentTokens / 2; i += kResidentThreads) {
        if (i < count_a && best[i] == 0) {
            best[i] = fv::kNobody;
        }
        keys[i] = i < count_a ? fv::key_of_packed(best[i]) : fv::kAbsent;
    }
    __syncthreads();
    fv::place_a(p, sides, keys, [&](int i) { return sides.special_b + fv::index_of_packed(best[i]); }, groups, nullptr,
                scratch);
    fv::write_plan(p, image, groups, members, counters, scratch.totals);
}

// The rows of a tile, those who choose and those who are chosen, while they pass through shared memory.
constexpr int kTileRows = kTileA + kTileB;
struct TileRows {
    int image;
    bool from_a;                // A chooses, or B
    int first_query;            // who of them
    int end_query;
    int token[kTileRows];       // -1: none, a row of zeros
    float scale[kTileRows];     // 1 until a row turns out to need another
    float squares[kTileRows];   // their sum after scaling
    float inverse[kTileRows];   // of the scaled row's length
    float criterion[kTileRows];
};

// Finds the scale of the rows that need one; rare. A row of zeros gets 0, which changes nothing and says that it has been
// looked at. By all threads; ends in a barrier.
template <class E>
__device__ __forceinline__ void scale_rows(const fv::MetricRows<E>& metric, bool wide, TileRows& tile) {
    const int column = static_cast<int>(threadIdx.x) % fv::kTeam * 4;
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x) / fv::kTeam; row < kTileRows; row += kTileThreads / fv::kTeam) {
        const int token = tile.token[row];
        float largest = 0.0f;
#pragma unroll 1
        for (int at = column; token >= 0 && at < metric.width; at += kChunk) {
            float v[4] = {};
            metric.template add<4, 1>(wide, token, at, v);
            largest = fmaxf(fmaxf(fmaxf(largest, fabsf(v[0])), fmaxf(fabsf(v[1]), fabsf(v[2]))), fabsf(v[3]));
        }
        largest = fv::team_max(largest);
        if (column == 0 && tile.scale[row] == 1.0f && fv::needs_scale(tile.squares[row])) {
            tile.scale[row] = fv::scale_of(largest);
        }
    }
    __syncthreads();
}

// The keys of everyone of a side, from where the tiles left them. By all threads; ends in a barrier.
__device__ __forceinline__ void load_keys(const fv::Sides& sides, const float* weights, bool of_a, int count, uint32_t* keys) {
    for (int i = static_cast<int>(threadIdx.x); i < (count + fv::kWarp - 1) / fv::kWarp * fv::kWarp; i += kTileThreads) {
        const int token = of_a ? sides.token_a(i) : sides.token_b(i);
        keys[i] = i < count ? __float_as_uint(__ldcg(weights + token)) : fv::kAbsent;
    }
    __syncthreads();
}

template <class E, bool kCriteria>
__device__ __forceinline__ void match_tiles(const MatchParams& p) {
    extern __shared__ float4 shared_quads[];
    auto* chunk = reinterpret_cast<float*>(shared_quads);  // [kTileRows][kChunkWords], later the ordered part's
    __shared__ TileRows tile;
    __shared__ unsigned long long best[kTileA];
    __shared__ fv::OrderScratch scratch;
    __shared__ uint32_t extremes[2];
    __shared__ bool is_last;
    __shared__ int asking;  // at once: tokens of B that choose again

    constexpr int kRowsAtOnce = kTileThreads / fv::kTeam;  // 16
    constexpr int kLoads = kTileRows / kRowsAtOnce;

    const int64_t image = static_cast<int>(blockIdx.x) / p.tiles;
    const int thread = static_cast<int>(threadIdx.x);
    const fv::Sides sides(p);
    // By the cosine alone it would be one register too many.
    const bool at_once = kCriteria && p.direction == fv::kAtOnce;
    // What the block is at lies in shared memory: in registers it would not fit beside the sums.
    const auto here = [&](auto* array, int count) { return array + static_cast<int64_t>(tile.image) * count; };
    // Queries choose, candidates are chosen. Both are counted without special tokens. At once, those of B that choose again are
    // listed where the plan's members will be.
    const auto query_token = [&](int i) {
        return tile.from_a ? sides.token_a(i) : at_once ? here(p.members, p.tokens)[i] : sides.token_b(i);
    };
    if (thread == 0) {
        tile.image = static_cast<int>(image);
        tile.from_a = p.direction != fv::kBack;
        // Whole groups, shared evenly over the tiles: 8 rows, 16 columns.
        const int block_tile = static_cast<int>(blockIdx.x) % p.tiles;
        const int queries = tile.from_a ? sides.a() : sides.b();
        const int query_groups = (queries + 7) / 8;
        tile.first_query = 8 * share(query_groups, p.tiles, block_tile);
        tile.end_query = min(8 * share(query_groups, p.tiles, block_tile + 1), queries);
    }
    __syncthreads();

    const fv::MetricRows<E> metric(p, image);
    if constexpr (kCriteria) {
        fv::find_extremes(p, image, extremes);
    }

    const int lane_a = fv::lane_id() / fv::kTeam + 4 * (fv::warp_id() / 2);  // [0, 8)
    const int lane_b = fv::lane_id() % fv::kTeam + 8 * (fv::warp_id() % 2);  // [0, 16)
    const int column = thread % fv::kTeam * 4;
    auto* keys = reinterpret_cast<uint32_t*>(shared_quads);
#pragma unroll 1
    for (bool first = true;; first = false) {
        const int a_here = (tile.end_query - tile.first_query + 7) / 8;
        const int candidates = tile.from_a ? sides.b() : sides.kept_a;
        const int candidate_groups = (candidates + 15) / 16;
        const int steps = (candidate_groups + kColumns - 1) / kColumns;
        if (thread < kTileA) {
            best[thread] = 0;
        }
        __syncthreads();

        fv::Best seen;
#pragma unroll 1
        for (int step = steps - 1; step >= 0; --step) {
            const int first_candidate = 16 * share(candidate_groups, steps, step);
            const int end_candidate = min(16 * share(candidate_groups, steps, step + 1), candidates);
            const int b_here = (end_candidate - first_candidate + 15) / 16;
            if (thread < kTileRows) {
                const bool asks = thread < kTileA;
                const int index = asks ? tile.first_query + thread : first_candidate + thread - kTileA;
                const bool held = asks ? index < tile.end_query : index < end_candidate;
                // Back: the list of those of A that stay.
                const int token = !held                                  ? -1
                                  : asks                                 ? query_token(index)
                                  : tile.from_a                          ? sides.token_b(index)
                                                                         : 2 * __ldcg(here(p.stays, sides.all_a) + index);
                tile.token[thread] = token;
                tile.scale[thread] = held ? 1.0f : 0.0f;
                if constexpr (kCriteria) {
                    tile.criterion[thread] = held ? fv::criterion_of(p, tile.image, token, extremes) : 1.0f;
                }
            }
            __syncthreads();

            float sums[4][kColumns];
            // Again where a row's squares left the range of f32.
#pragma unroll 1
            for (bool odd = true; odd;) {
                float squares[kLoads];
#pragma unroll
                for (int load = 0; load < kLoads; ++load) {
                    squares[load] = 0.0f;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        sums[i][j] = 0.0f;
                    }
                }
#pragma unroll 1
                for (int start = 0; start < p.width; start += kChunk) {
#pragma unroll
                    for (int load = 0; load < kLoads; ++load) {
                        const int row = load * kRowsAtOnce + thread / fv::kTeam;
                        const int token = tile.token[row];
                        const float scale = tile.scale[row];
                        float v[4] = {};
                        if (token >= 0) {
                            metric.template add<4, 1>(p.wide != 0, token, start + column, v);
                        }
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            v[i] *= scale;
                            squares[load] = __fmaf_rn(v[i], v[i], squares[load]);
                        }
                        *reinterpret_cast<float4*>(chunk + row * kChunkWords + column) = make_float4(v[0], v[1], v[2], v[3]);
                    }
                    __syncthreads();
                    fv::add_products_of<1>(a_here, b_here, chunk + lane_a * kChunkWords, 8 * kChunkWords,
                                           chunk + (kTileA + lane_b) * kChunkWords, 16 * kChunkWords,
                                           (min(kChunk, p.width - start) + 3) / 4, sums);
                    __syncthreads();
                }
#pragma unroll
                for (int load = 0; load < kLoads; ++load) {
                    const float of_row = fv::team_add(squares[load]);
                    if (column == 0) {
                        tile.squares[load * kRowsAtOnce + thread / fv::kTeam] = of_row;
                    }
                }
                __syncthreads();
                odd = __syncthreads_or(thread < kTileRows && tile.scale[thread] == 1.0f &&
                                       fv::needs_scale(tile.squares[thread])) != 0;
                if (odd) {
                    scale_rows(metric, p.wide != 0, tile);
                }
            }
            if (thread < kTileRows) {
                tile.inverse[thread] = fv::inverse_length(tile.squares[thread], tile.scale[thread]);
            }
            __syncthreads();

#pragma unroll
            for (int j = kColumns - 1; j >= 0; --j) {
                const int candidate = first_candidate + lane_b + 16 * j;
                if (candidate < end_candidate) {
                    const int b = kTileA + lane_b + 16 * j;
                    const float inverse = tile.inverse[b];
                    const float criterion = kCriteria ? tile.criterion[b] : 1.0f;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int a = lane_a + 8 * i;
                        // The product of the two inverses first: forth and back give a pair the same bits.
                        float score = __fmul_rn(sums[i][j], __fmul_rn(tile.inverse[a], inverse));
                        if constexpr (kCriteria) {
                            score = fv::criterion_of_cosine(score, p.attraction, p.similarity_exponent) *
                                    __fmul_rn(tile.criterion[a], criterion);
                        }
                        sums[i][j] = score;
                        seen.see(i, score, first_candidate / 16 + j);
                    }
                }
            }
            if (at_once && tile.from_a) {
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    const int candidate = first_candidate + lane_b + 16 * j;
                    uint32_t key = fv::kAbsent;
                    int row = lane_a;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const bool held = lane_a + 8 * i < tile.end_query - tile.first_query;
                        const uint32_t mine = held ? fv::order_key(sums[i][j]) : fv::kAbsent;
                        row = mine > key ? lane_a + 8 * i : row;
                        key = max(key, mine);
                    }
                    unsigned long long of_column = key == fv::kAbsent ? 0 : fv::packed_choice(key, tile.first_query + row);
                    // Lanes that hold the same candidate are a team apart.
#pragma unroll
                    for (int offset = fv::kTeam; offset < fv::kWarp; offset *= 2) {
                        of_column = max(of_column, __shfl_xor_sync(fv::kFullWarp, of_column, offset));
                    }
                    if (fv::lane_id() < fv::kTeam && candidate < end_candidate && of_column != 0) {
                        // A maximum of integers: the order does not show.
                        atomicMax(here(p.chosen, sides.all_b) + candidate, of_column);
                    }
                }
            }
            // The next step's tokens replace these.
            __syncthreads();
        }

#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // A lane without candidates has nothing to offer.
            const unsigned long long of_team = fv::team_best(lane_b < candidates ? seen.packed(i, lane_b, 16) : 0ull);
            if (fv::lane_id() % fv::kTeam == 0) {
                // A maximum of integers: the order does not show.
                atomicMax(best + lane_a + 8 * i, of_team);
            }
        }
        __syncthreads();
        if (tile.first_query + thread < tile.end_query) {
            const int token = query_token(tile.first_query + thread);
            const unsigned long long mine = best[thread] == 0 ? fv::kNobody : best[thread];
            // Until the order is known, the plan's arrays hold everyone's key and partner.
            here(p.weights, p.tokens)[token] = __uint_as_float(fv::key_of_packed(mine));
            here(p.groups, p.tokens)[token] = fv::index_of_packed(mine) + (tile.from_a ? sides.special_b : 0);
        }
        if (first) {
            __threadfence();
            __syncthreads();
            if (thread == 0) {
                is_last = atomicAdd(here(p.arrived, 1), 1u) + 1 == static_cast<uint32_t>(p.tiles);
            }
            __syncthreads();
            if (!is_last) {
                return;
            }
            __threadfence();
            if (thread == 0) {
                *here(p.arrived, 1) = 0;
            }
            int32_t* groups = here(p.groups, p.tokens);
            float* weights = here(p.weights, p.tokens);
            if (tile.from_a) {
                load_keys(sides, weights, true, sides.a(), keys);
                fv::place_a(p, sides, keys, [&](int i) { return __ldcg(groups + sides.token_a(i)); }, groups,
                             here(p.stays, sides.all_a), scratch);
            }
            if (!at_once) {
                break;
            }
            // Whoever of B chose one of A that stays keeps to it: it is the best of fewer, too. The others choose again.
            unsigned long long* chosen = here(p.chosen, sides.all_b);
            int32_t* again = here(p.members, p.tokens);
            if (thread == 0) {
                asking = 0;
            }
            __syncthreads();
            for (int j = thread; j < sides.b(); j += kTileThreads) {
                const unsigned long long packed = __ldcg(chosen + j);
                chosen[j] = 0;
                const int i = packed == 0 ? 0 : fv::index_of_packed(packed);
                const int token = sides.token_b(j);
                if (packed != 0 && (scratch.leaves[i / fv::kWarp] >> (i % fv::kWarp) & 1u) != 0) {
                    // In any order: nobody's choice depends on who else is asked.
                    again[atomicAdd(&asking, 1)] = token;
                } else {
                    weights[token] = __uint_as_float(fv::key_of_packed(packed == 0 ? fv::kNobody : packed));
                    groups[token] = packed == 0 ? 0 : groups[sides.token_a(i)] - p.special;
                }
            }
            __syncthreads();
        }
        const int next = first ? 0 : tile.first_query + kTileA;
        __syncthreads();
        if (next >= asking) {
            break;
        }
        if (thread == 0) {
            tile.from_a = false;
            tile.first_query = next;
            tile.end_query = min(next + kTileA, asking);
        }
        __syncthreads();
    }

    int32_t* groups = here(p.groups, p.tokens);
    if (p.direction == fv::kBack || at_once) {
        const float* weights = here(p.weights, p.tokens);
        load_keys(sides, weights, false, sides.b(), keys);
        fv::place_b(p, sides, keys, groups);
    }
    if (p.direction != fv::kForth) {
        fv::write_plan(p, tile.image, groups, here(p.members, p.tokens), reinterpret_cast<int*>(shared_quads),
                       scratch.totals);
    }
}

}  // namespace

#define FV_MATCH_RESIDENT(NAME, E, WIDEST)                                                                    \
    extern "C" __global__ void __launch_bounds__(kResidentThreads, 1)                                         \
        NAME(const __grid_constant__ MatchParams p) {                                                         \
        match_resident<E, WIDEST>(p);                                                                         \
    }
// 64 registers, which half of a multiprocessor would leave, spill beside the sums of a tile on one architecture or another.
#define FV_MATCH(TYPE, E)                                                                                     \
    FV_MATCH_RESIDENT(fv_match_resident_64_##TYPE, E, 64)                                                     \
    FV_MATCH_RESIDENT(fv_match_resident_96_##TYPE, E, 96)                                                     \
    extern "C" __global__ void __launch_bounds__(kTileThreads, 5)                                             \
        fv_match_tiles_##TYPE(const __grid_constant__ MatchParams p) {                                        \
        match_tiles<E, false>(p);                                                                             \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(kTileThreads, 5)                                             \
        fv_match_criteria_##TYPE(const __grid_constant__ MatchParams p) {                                     \
        match_tiles<E, true>(p);                                                                              \
    }
FV_MATCH(f32, fv::F32)
FV_MATCH(f16, fv::F16)
FV_MATCH(bf16, fv::Bf16)
