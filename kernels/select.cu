// select.cu - keeps the k tokens with the highest class score, in descending order, and fuses the others into one.
//
// Maths:   score[n] = (sum over h of scores[h][n]) / H, the sum in the order of h. The first `special` tokens are kept as
//          they stand; then come the `keep` best others, order.cuh's rule; then, if asked for, one token of all the
//          rest: members ascending, weighted by their scores.
//          In place (SViTE): the `keep` best of all tokens and the first `special` stay, in order of index; M = min(special +
//          keep, N) and where fewer stay than M, because special ones are among the best, the last groups are empty.
//          Masked: all tokens stay, but those that would go have weight 0.
// Shapes:  scores (B, H, N), last axis contiguous;  the plan as src/plan.rs: offsets (B, M+1), members, weights, groups
//          (B, N), M = special + keep + (1 if fused).
// Launch:  one block an image. To N = 512 fv_select_rank_*: block N rounded up to whole warps, static shared memory only;
//          to N = 16,384 fv_select_sort_*: block 128 to 1,024, dynamic shared 6 bytes a place, places = N - special
//          rounded up to a power of two.
// Cost:    reads the scores once, 4*B*H*N bytes in f32, and writes the plan, 4*B*(3N + M+1). rank: N*N/32 comparisons of
//          32 keys a warp, two instructions each, one barrier wait. sort: N log2(N) (log2(N)+1)/4 exchanges. Up to 512
//          tokens counting costs fewer instructions than a network's exchanges and barriers. One block an image:
//          with few images this kernel is bound by latency, not by either sum.

#include <cstddef>

#include "element.cuh"
#include "order.cuh"
#include "reduce.cuh"
#include "sort.cuh"

namespace {

struct SelectParams {
    const void* scores;  // (B, H, N)
    int32_t* offsets;    // (B, M+1)
    int32_t* members;    // (B, N)
    float* weights;      // (B, N)
    int32_t* groups;     // (B, N)
    int64_t batch_stride, head_stride;  // of the scores
    int32_t heads;
    int32_t tokens;  // N
    int32_t special;
    int32_t keep;
    int32_t fused;   // 0 or 1
    int32_t places;  // of the sort: the candidates rounded up to a power of two
    int32_t order;   // Order
    int32_t reserved;
};
static_assert(sizeof(SelectParams) == 88 && offsetof(SelectParams, batch_stride) == 40 && offsetof(SelectParams, heads) == 56,
              "the launcher's layout");

// Where tokens that stay go.
enum Order : int32_t { kByScore = 0, kInPlace = 1, kMasked = 2 };

constexpr int kRankTokens = 512;
constexpr int kSortTokens = 16384;
constexpr int kSortThreads = 1024;
// Words of 32 tokens, in pairs: a count for each word would not fit beside 16,384 places where a block has 99 KiB.
constexpr int kPairs = kSortTokens / (2 * fv::kWarp);

template <class E>
__device__ __forceinline__ float mean_score(const SelectParams& p, int token) {
    const auto* scores =
        static_cast<const typename E::Storage*>(p.scores) + static_cast<int64_t>(blockIdx.x) * p.batch_stride + token;
    float sum = 0.0f;
#pragma unroll 4
    for (int head = 0; head < p.heads; ++head) {
        sum = __fadd_rn(sum, E::widen(__ldg(scores + head * p.head_stride)));
    }
    return __fdiv_rn(sum, static_cast<float>(p.heads));
}

// Tokens before this one keep out of the competition: all special ones, or, where tokens stay in place, none.
__device__ __forceinline__ int first_candidate(const SelectParams& p) { return p.order == kByScore ? p.special : 0; }

// The plan of this block's image.
struct Plan {
    int32_t* offsets;
    int32_t* members;
    float* weights;
    int32_t* groups;
    int kept;   // special + keep
    int fused;  // 0 or 1
    int tokens;
    int out;    // M

    __device__ __forceinline__ explicit Plan(const SelectParams& p)
        : kept(p.special + p.keep), fused(p.fused), tokens(p.tokens), out(min(kept + fused, tokens)) {
        const int64_t image = blockIdx.x;
        out = p.order == kMasked ? tokens : p.order == kByScore ? kept + fused : out;
        offsets = p.offsets + image * (out + 1);
        members = p.members + image * tokens;
        weights = p.weights + image * tokens;
        groups = p.groups + image * tokens;
    }
    // By all threads: every kept token is a group of its own.
    __device__ __forceinline__ void write_offsets() const {
        for (int i = threadIdx.x; i <= kept + fused; i += blockDim.x) {
            offsets[i] = i <= kept ? i : tokens;
        }
    }
    // The same where `stay` tokens stay in place: empty groups behind them.
    __device__ __forceinline__ void write_offsets(int stay) const {
        for (int i = threadIdx.x; i <= out; i += blockDim.x) {
            offsets[i] = min(i, stay);
        }
    }
    // A token that stays in place, or goes: `before` tokens with a lower index go, `stay` stay in all.
    __device__ __forceinline__ void in_place(const SelectParams& p, int token, bool goes, int before, int stay) const {
        if (p.order == kMasked) {
            members[token] = token;
            weights[token] = goes ? 0.0f : 1.0f;
            groups[token] = token;
        } else {
            const int place = goes ? stay + before : token - before;
            members[place] = goes ? -1 : token;
            weights[place] = goes ? 0.0f : 1.0f;
            groups[token] = goes ? -1 : place;
        }
    }
    __device__ __forceinline__ void keep_at(int place, int token) const {
        members[place] = token;
        weights[place] = 1.0f;
        groups[token] = place;
    }
    // `before`: how many tokens of the rest have a lower index.
    __device__ __forceinline__ void rest_at(int before, int token, float score) const {
        members[kept + before] = fused ? token : -1;
        weights[kept + before] = fused ? score : 0.0f;
        groups[token] = fused ? kept : -1;
    }
};

// A thread a token: its rank is the number of tokens that precede it.
template <class E>
__device__ __forceinline__ void select_by_rank(const SelectParams& p) {
    __shared__ alignas(16) uint32_t keys[kRankTokens];
    __shared__ uint32_t rest_words[kRankTokens / fv::kWarp];

    const Plan plan(p);
    const int token = threadIdx.x;  // [0, N rounded up)
    const bool candidate = token >= first_candidate(p) && token < p.tokens;
    const float score = candidate ? mean_score<E>(p, token) : 0.0f;
    const uint32_t key = candidate ? fv::order_key(score) : fv::kAbsent;
    keys[token] = key;
    if (p.order == kByScore) {
        plan.write_offsets();
    }
    __syncthreads();

    const int rank = fv::rank_among(keys, blockDim.x, token - fv::lane_id(), key);

    const bool rest = candidate && token >= p.special && rank >= p.keep;
    const uint32_t word = __ballot_sync(fv::kFullWarp, rest);
    if (fv::lane_id() == 0) {
        rest_words[fv::warp_id()] = word;
    }
    __syncthreads();
    if (p.order != kByScore) {
        int before = __popc(word & fv::lanes_below());
        int goes = 0;
        for (int warp = 0; warp < static_cast<int>(blockDim.x) / fv::kWarp; ++warp) {
            const int bits = __popc(rest_words[warp]);
            before += warp < fv::warp_id() ? bits : 0;
            goes += bits;
        }
        const int stay = p.order == kMasked ? p.tokens : p.tokens - goes;
        plan.write_offsets(stay);
        if (token < p.tokens) {
            plan.in_place(p, token, rest, before, stay);
        }
    } else if (rest) {
        int before = __popc(word & fv::lanes_below());
        for (int warp = 0; warp < fv::warp_id(); ++warp) {
            before += __popc(rest_words[warp]);
        }
        plan.rest_at(before, token, score);
    } else if (candidate) {
        plan.keep_at(p.special + rank, token);
    } else if (token < p.special) {
        plan.keep_at(token, token);
    }
}

// By the network of sort.cuh, in shared memory.
template <class E>
__device__ __forceinline__ void select_by_sort(const SelectParams& p) {
    extern __shared__ uint32_t sort_keys[];  // [places], then the tokens, [places]
    auto* sort_tokens = reinterpret_cast<uint16_t*>(sort_keys + p.places);
    __shared__ uint32_t rest_words[kSortTokens / fv::kWarp];
    __shared__ uint16_t rest_before[kPairs];
    __shared__ int totals[fv::kWarp];

    const Plan plan(p);
    const int thread = threadIdx.x;
    const int threads = blockDim.x;
    const int first = first_candidate(p);
    const int candidates = p.tokens - first;
    for (int i = thread; i < p.places; i += threads) {
        const int token = first + i;
        sort_keys[i] = i < candidates ? fv::order_key(mean_score<E>(p, token)) : fv::kAbsent;
        sort_tokens[i] = i < candidates ? static_cast<uint16_t>(token) : fv::kNoToken;
    }
    for (int i = thread; i < kSortTokens / fv::kWarp; i += threads) {
        rest_words[i] = 0;
    }
    if (p.order == kByScore) {
        for (int token = thread; token < p.special; token += threads) {
            plan.keep_at(token, token);
        }
        plan.write_offsets();
    }
    __syncthreads();

    fv::sort_places(sort_keys, sort_tokens, p.places);

    // The rest by index: a bit a token, then how many bits stand below each word.
    for (int place = p.keep + thread; place < candidates; place += threads) {
        const int token = sort_tokens[place];
        // Bits of integers: the order of these additions does not show. In place, special tokens stay whatever their score.
        if (token >= p.special) {
            atomicOr(rest_words + token / fv::kWarp, 1u << (token % fv::kWarp));
        }
    }
    __syncthreads();
    int below = 0;
    for (int base = 0; base < kPairs; base += threads) {
        const int i = base + thread;
        const int bits = i < kPairs ? __popc(rest_words[2 * i]) + __popc(rest_words[2 * i + 1]) : 0;
        const fv::Scan scan = fv::block_exclusive_scan(bits, totals);
        if (i < kPairs) {
            rest_before[i] = static_cast<uint16_t>(below + scan.before);
        }
        below += scan.total;
    }
    __syncthreads();
    const auto rest_below = [&](int token) {
        const int word = token / fv::kWarp;
        const int before = rest_before[word / 2] + __popc(rest_words[word] & ((1u << (token % fv::kWarp)) - 1u));
        return before + (word % 2 == 1 ? __popc(rest_words[word - 1]) : 0);
    };
    if (p.order != kByScore) {
        const int stay = p.order == kMasked ? p.tokens : p.tokens - below;
        plan.write_offsets(stay);
        for (int token = thread; token < p.tokens; token += threads) {
            const bool goes = (rest_words[token / fv::kWarp] >> (token % fv::kWarp) & 1u) != 0;
            plan.in_place(p, token, goes, rest_below(token), stay);
        }
        return;
    }
    for (int place = thread; place < candidates; place += threads) {
        const int token = sort_tokens[place];
        if (place < p.keep) {
            plan.keep_at(p.special + place, token);
        } else {
            plan.rest_at(rest_below(token), token, fv::score_of_key(sort_keys[place]));
        }
    }
}

}  // namespace

#define FV_SELECT(TYPE, E)                                                                                    \
    extern "C" __global__ void __launch_bounds__(kRankTokens)                                                 \
        fv_select_rank_##TYPE(const __grid_constant__ SelectParams p) {                                       \
        select_by_rank<E>(p);                                                                                 \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(kSortThreads)                                                \
        fv_select_sort_##TYPE(const __grid_constant__ SelectParams p) {                                       \
        select_by_sort<E>(p);                                                                                 \
    }
FV_SELECT(f32, fv::F32)
FV_SELECT(f16, fv::F16)
FV_SELECT(bf16, fv::Bf16)
