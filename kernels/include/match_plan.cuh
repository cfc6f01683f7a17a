// match_plan.cuh - the ordered part of a matching: from everyone's best partner to the token plan, by one block an image.
#pragma once

#include "match_params.cuh"
#include "order.cuh"
#include "sort.cuh"

namespace fv {

constexpr int kMatchTokens = 16384;
// Up to this many tokens of a side are ranked by counting.
constexpr int kCounted = 512;

// Shared memory of the ordered part, beside what the launch sizes.
struct OrderScratch {
    uint32_t leaves[kMatchTokens / 2 / kWarp];  // a bit a token of A that is merged away
    uint16_t before[kMatchTokens / 2 / kWarp];  // such bits below each word
    int totals[kWarp];
};

// Calls each(index, place in order of precedence) once for every index of `count`, over all threads. `keys` holds the keys,
// padded with kAbsent to whole warps if counted, to `places`, a power of two, with room for as many 16-bit tokens behind
// them, if not. Ends in a barrier.
template <class Each>
__device__ __forceinline__ void for_each_in_order(uint32_t* keys, int count, Each each) {
    if (count <= kCounted) {
        const int padded = (count + kWarp - 1) / kWarp * kWarp;
        for (int first = warp_id() * kWarp; first < padded; first += static_cast<int>(blockDim.x)) {
            const int index = first + lane_id();
            const int rank = rank_among(keys, padded, first, keys[index]);
            if (index < count) {
                each(index, rank);
            }
        }
        __syncthreads();
        return;
    }
    int places = 2 * kCounted;
    while (places < count) {
        places *= 2;
    }
    auto* tokens = reinterpret_cast<uint16_t*>(keys + places);
    for (int i = threadIdx.x; i < places; i += blockDim.x) {
        if (i >= count) {
            keys[i] = kAbsent;
        }
        tokens[i] = i < count ? static_cast<uint16_t>(i) : kNoToken;
    }
    __syncthreads();
    sort_places(keys, tokens, places);
    for (int place = threadIdx.x; place < count; place += blockDim.x) {
        each(static_cast<int>(tokens[place]), place);
    }
    __syncthreads();
}

// Where A goes, by the keys of its best scores: partner(i) is the B index that token i of A has chosen.
// groups[token] becomes the output token of those that stay and, one way, of all tokens; both ways, -1 - partner for those
// that leave, and stays[] lists who does not, in the order in which they are output. Ends in a barrier.
template <class Partner>
__device__ __forceinline__ void place_a(const MatchParams& p, const Sides& sides, uint32_t* keys, Partner partner,
                                        int* groups, int* stays, OrderScratch& scratch) {
    const int thread = static_cast<int>(threadIdx.x);
    const int threads = static_cast<int>(blockDim.x);
    const int count = sides.a();
    const int words = (count + kWarp - 1) / kWarp;
    for (int word = thread; word < words; word += threads) {
        scratch.leaves[word] = 0;
    }
    __syncthreads();
    const bool one_way = p.direction == kOneWay;
    for_each_in_order(keys, count, [&](int i, int place) {
        const int token = sides.token_a(i);
        if (place < p.forward) {
            const int j = partner(i);
            // One bit each: the order does not show.
            atomicOr(scratch.leaves + i / kWarp, 1u << (i % kWarp));
            groups[token] = one_way ? sides.tail + j - sides.special_b : -1 - j;
        } else if (p.special == 0) {
            // Without special tokens those that stay keep the order of their scores.
            groups[token] = place - p.forward;
            if (!one_way) {
                stays[place - p.forward] = sides.special_a + i;
            }
        }
    });
    if (p.special > 0) {
        for (int word = thread; word < words; word += threads) {
            int before = 0;
            for (int below = 0; below < word; ++below) {
                before += __popc(scratch.leaves[below]);
            }
            scratch.before[word] = static_cast<uint16_t>(before);
        }
        __syncthreads();
        for (int i = thread; i < count; i += threads) {
            const uint32_t leaves = scratch.leaves[i / kWarp];
            const uint32_t bit = 1u << (i % kWarp);
            if ((leaves & bit) == 0) {
                const int place = i - scratch.before[i / kWarp] - __popc(leaves & (bit - 1u));
                groups[sides.token_a(i)] = p.special + place;
                if (!one_way) {
                    stays[place] = sides.special_a + i;
                }
            }
        }
    }
    if (one_way) {
        for (int j = thread; j < sides.b(); j += threads) {
            groups[sides.token_b(j)] = sides.tail + j;
        }
    }
    for (int token = thread; token < p.special; token += threads) {
        groups[token] = token;
    }
    __syncthreads();
}

// Where B goes, by the keys of its best scores; groups[token] is the partner in stays[] at the start. Those of A that had left
// for a token of B follow it. Ends in a barrier.
__device__ __forceinline__ void place_b(const MatchParams& p, const Sides& sides, uint32_t* keys, int* groups) {
    const int back = p.merges - p.forward;
    for_each_in_order(keys, sides.b(), [&](int j, int place) {
        int* group = groups + sides.token_b(j);
        *group = place < back ? p.special + __ldcg(group) : sides.tail + place - back;
    });
    for (int i = threadIdx.x; i < sides.a(); i += blockDim.x) {
        const int left_for = -1 - groups[sides.token_a(i)];
        if (left_for >= 0) {
            groups[sides.token_a(i)] = groups[2 * left_for + 1];
        }
    }
    __syncthreads();
}

// Share of a token in its group before the group's sum divides it.
__device__ __forceinline__ float raw_weight(const MatchParams& p, int64_t image, int token) {
    float weight = 1.0f;
    if (p.received != nullptr) {
        weight = __fdiv_rn(sum_over_heads(p.received + image * p.received_batch_stride, p.received_head_stride,
                                          p.received_heads, token),
                           static_cast<float>(p.received_heads));
    }
    if (p.sizes != nullptr) {
        weight = __fmul_rn(weight, __ldg(p.sizes + image * p.tokens + token));
    }
    return weight;
}

// The plan of an image out of each token's output token. `counters`: M integers of shared memory. `groups` and `members` may
// be shared memory or the plan's own arrays; `members` is written. By all threads.
__device__ __forceinline__ void write_plan(const MatchParams& p, int64_t image, const int* groups, int* members,
                                           int* counters, int (&totals)[kWarp]) {
    const int thread = static_cast<int>(threadIdx.x);
    const int threads = static_cast<int>(blockDim.x);
    const int outputs = p.tokens - p.merges;
    int32_t* offsets = p.offsets + image * (outputs + 1);
    int32_t* plan_members = p.members + image * p.tokens;
    float* weights = p.weights + image * p.tokens;

    for (int group = thread; group < outputs; group += threads) {
        counters[group] = 0;
    }
    __syncthreads();
    for (int token = thread; token < p.tokens; token += threads) {
        // Integers: the order of these additions does not show.
        atomicAdd(counters + groups[token], 1);
    }
    __syncthreads();
    int below = 0;
    for (int base = 0; base < outputs; base += threads) {
        const int group = base + thread;
        const Scan scan = block_exclusive_scan(group < outputs ? counters[group] : 0, totals);
        if (group < outputs) {
            counters[group] = below + scan.before;
            offsets[group] = below + scan.before;
        }
        below += scan.total;
    }
    if (thread == 0) {
        offsets[outputs] = p.tokens;
    }
    __syncthreads();

    // In ascending order of tokens, 32 at a time: a counting sort that is stable without atomics.
    if (warp_id() == 0) {
        for (int base = 0; base < p.tokens; base += kWarp) {
            const int token = base + lane_id();
            const int group = token < p.tokens ? groups[token] : -1;
            const unsigned peers = __match_any_sync(kFullWarp, group);
            const unsigned lower = peers & lanes_below();
            const int start = group < 0 ? 0 : counters[group];
            if (group >= 0) {
                members[start + __popc(lower)] = token;
            }
            __syncwarp();
            if (group >= 0 && lower == 0) {
                counters[group] = start + __popc(peers);
            }
            __syncwarp();
        }
    }
    __syncthreads();

    // counters[group] is now the end of the group.
    const bool weighted = p.received != nullptr || p.sizes != nullptr;
    for (int at = thread; at < p.tokens; at += threads) {
        const int token = members[at];
        if (plan_members != members) {
            plan_members[at] = token;
            p.groups[image * p.tokens + at] = groups[at];
        }
        if (weighted) {
            weights[at] = raw_weight(p, image, token);
        }
    }
    __syncthreads();
    for (int group = thread; group < outputs; group += threads) {
        const int from = group == 0 ? 0 : counters[group - 1];
        const int to = counters[group];
        if (to - from == 1) {
            // A lone token keeps its bits.
            weights[from] = 1.0f;
            continue;
        }
        const float equal = __frcp_rn(static_cast<float>(to - from));
        float total = -0.0f;
        if (weighted) {
            for (int at = from; at < to; ++at) {
                total = __fadd_rn(total, weights[at]);
            }
        }
        const bool usable = weighted && total > 0.0f && total <= kLargest;
        for (int at = from; at < to; ++at) {
            weights[at] = usable ? __fdiv_rn(weights[at], total) : equal;
        }
    }
}

}  // namespace fv
