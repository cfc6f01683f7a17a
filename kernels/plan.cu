// plan.cu - composes two token plans: what `first` and then `next` do, as one plan.
//
// Maths:   groups[n] = next.groups[first.groups[n]], -1 where either is;  the members of a group ascend;  the weight of n
//          is the product of its weights in both plans.
// Shapes:  as src/plan.rs: first offsets (B, M+1), members, weights, groups (B, N);  next (B, K+1), (B, M);  out (B, K+1),
//          (B, N).
// Launch:  one block of 256 an image, dynamic shared 4*K bytes. N, M and K to 16,384.
// Cost:    reads both plans and writes one, 4*B*(3N + M + 3M + K + 3N + K) bytes. One warp places the members in order,
//          N/32 steps, which bounds the time: a counting sort that needs no atomics to be stable.

#include <cstddef>

#include "reduce.cuh"

namespace {

struct ComposeParams {
    const int32_t* first_offsets;  // (B, M+1)
    const int32_t* first_members;  // (B, N)
    const float* first_weights;    // (B, N)
    const int32_t* first_groups;   // (B, N)
    const int32_t* next_offsets;   // (B, K+1)
    const int32_t* next_members;   // (B, M)
    const float* next_weights;     // (B, M)
    const int32_t* next_groups;    // (B, M)
    int32_t* offsets;              // (B, K+1)
    int32_t* members;              // (B, N)
    float* weights;                // (B, N)
    int32_t* groups;               // (B, N)
    int32_t tokens;   // N
    int32_t middles;  // M
    int32_t outputs;  // K
    int32_t reserved;
};
static_assert(sizeof(ComposeParams) == 112 && offsetof(ComposeParams, tokens) == 96, "the launcher's layout");

constexpr int kThreads = 256;

// The weight of `member` in group `group` of a plan. Members ascend within a group.
__device__ __forceinline__ float weight_of(const int32_t* offsets, const int32_t* members, const float* weights, int group,
                                           int member) {
    int low = __ldg(offsets + group);
    int high = __ldg(offsets + group + 1) - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (__ldg(members + middle) < member) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return __ldg(weights + low);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) fv_plan_compose(const __grid_constant__ ComposeParams p) {
    extern __shared__ int counters[];  // [K]: members of a group, then where its next member goes
    __shared__ int totals[fv::kWarp];

    const int64_t image = blockIdx.x;
    const int32_t* first_offsets = p.first_offsets + image * (p.middles + 1);
    const int32_t* first_members = p.first_members + image * p.tokens;
    const float* first_weights = p.first_weights + image * p.tokens;
    const int32_t* first_groups = p.first_groups + image * p.tokens;
    const int32_t* next_offsets = p.next_offsets + image * (p.outputs + 1);
    const int32_t* next_members = p.next_members + image * p.middles;
    const float* next_weights = p.next_weights + image * p.middles;
    const int32_t* next_groups = p.next_groups + image * p.middles;
    int32_t* offsets = p.offsets + image * (p.outputs + 1);
    int32_t* members = p.members + image * p.tokens;
    float* weights = p.weights + image * p.tokens;
    int32_t* groups = p.groups + image * p.tokens;
    const int thread = threadIdx.x;

    for (int k = thread; k < p.outputs; k += kThreads) {
        counters[k] = 0;
    }
    __syncthreads();

    // Where every token ends, and how many end there. Whole warps stay together for the match.
    for (int base = 0; base < p.tokens; base += kThreads) {
        const int token = base + thread;
        int group = -1;
        if (token < p.tokens) {
            const int middle = __ldg(first_groups + token);
            group = middle < 0 ? -1 : __ldg(next_groups + middle);
            groups[token] = group;
        }
        const unsigned peers = __match_any_sync(fv::kFullWarp, group);
        if (group >= 0 && (peers & fv::lanes_below()) == 0) {
            // Integers: the order of these additions does not show.
            atomicAdd(counters + group, __popc(peers));
        }
    }
    __syncthreads();

    int members_before = 0;
    for (int base = 0; base < p.outputs; base += kThreads) {
        const int k = base + thread;
        const fv::Scan scan = fv::block_exclusive_scan(k < p.outputs ? counters[k] : 0, totals);
        if (k < p.outputs) {
            counters[k] = members_before + scan.before;
            offsets[k] = members_before + scan.before;
        }
        members_before += scan.total;
    }
    if (thread == 0) {
        offsets[p.outputs] = members_before;
    }
    __syncthreads();

    // In ascending order of tokens, 32 at a time.
    if (fv::warp_id() == 0) {
        for (int base = 0; base < p.tokens; base += fv::kWarp) {
            const int token = base + fv::lane_id();
            const int group = token < p.tokens ? groups[token] : -1;
            const unsigned peers = __match_any_sync(fv::kFullWarp, group);
            const unsigned below = peers & fv::lanes_below();
            const int start = group < 0 ? 0 : counters[group];
            if (group >= 0) {
                members[start + __popc(below)] = token;
            }
            __syncwarp();
            if (group >= 0 && below == 0) {
                counters[group] = start + __popc(peers);
            }
            __syncwarp();
        }
    }
    __syncthreads();

    for (int at = thread; at < p.tokens; at += kThreads) {
        if (at < members_before) {
            const int token = members[at];
            const int middle = __ldg(first_groups + token);
            const float inner = weight_of(first_offsets, first_members, first_weights, middle, token);
            const float outer = weight_of(next_offsets, next_members, next_weights, groups[token], middle);
            weights[at] = __fmul_rn(outer, inner);
        } else {
            members[at] = -1;
            weights[at] = 0.0f;
        }
    }
}
