// structured.cu - scores of whole neurons and heads of a sparse network, and the updates of their masks (S2ViTE).
//
// Maths:   neurons: score[j] = sum over c of |fc1[j][c]| + |fc2[c][j]|, of weights and of gradients alike. r = ceil(rate*active);
//          a neuron stays whose key (connectivity.cu's; 0 where it is masked) is above the (n - active + r)-th smallest; of the
//          others those are active whose gradients' key is at least the r-th largest, keys of those that stay being 0.
//          heads: importance[h] = mean over b of |sum of O*G|, call[h] = mean over b of sum of |G|, over tokens and values of
//          the head. The ceil(rate*active) active heads of the smallest importance go, then as many missing ones with the
//          largest call come; order.cuh's rule, equal ones by ascending index.
// Shapes:  fc1 (n, C), fc2 (C', n) row-major;  O, G (B, N, H*D), last axis contiguous;  scores f32, masks bytes.
// Launch:  fv_neuron_scores: grid ceil(n/32), block 256.  fv_head_sums: grid B*H, block 256.  fv_neuron_update: one block of
//          1,024, any n.  fv_head_update: one block, a thread a head, H to 1,024.
// Cost:    scores read their tensors once, one or three operations a value: bound by memory, and by latency where there are few
//          neurons: a block has 32 of them, as many as a row of fc2 needs for whole sectors. The updates: 62 rounds over n keys
//          that stay in the first cache; H^2 comparisons. All of this happens once in thousands of iterations.

#include <cstddef>

#include "element.cuh"
#include "order.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / fv::kWarp;
constexpr int kUpdateThreads = 1024;
constexpr int kMostHeads = 1024;

struct NeuronScoreParams {
    const void* fc1;  // (n, C)
    const void* fc2;  // (C', n)
    float* scores;    // (n)
    int64_t fc1_stride, fc2_stride;
    int32_t neurons;  // n
    int32_t width;    // C
    int32_t outputs;  // C'
    int32_t reserved;
};
static_assert(sizeof(NeuronScoreParams) == 56 && offsetof(NeuronScoreParams, fc1_stride) == 24 &&
                  offsetof(NeuronScoreParams, neurons) == 40,
              "the launcher's layout");

struct HeadSumParams {
    const void* output;    // (B, N, H*D)
    const void* gradient;  // (B, N, H*D)
    float* products;       // (B, H)
    float* sizes;          // (B, H)
    int64_t output_batch, output_token, gradient_batch, gradient_token;
    int32_t heads;
    int32_t tokens;
    int32_t head_dim;
    int32_t reserved;
};
static_assert(sizeof(HeadSumParams) == 80 && offsetof(HeadSumParams, output_batch) == 32 &&
                  offsetof(HeadSumParams, heads) == 64,
              "the launcher's layout");

struct UpdateParams {
    const float* scores;  // (n), or (B, H) products
    const float* calls;   // (n), or (B, H) sizes
    uint8_t* mask;        // (n) or (H)
    double rate;
    int32_t count;  // n or H
    int32_t batch;  // B, of heads
};
static_assert(sizeof(UpdateParams) == 40 && offsetof(UpdateParams, rate) == 24 && offsetof(UpdateParams, count) == 32,
              "the launcher's layout");

// A neuron a lane; a row of fc1 a warp at a time.
template <class E>
__device__ __forceinline__ void neuron_scores(const NeuronScoreParams& p) {
    using Storage = typename E::Storage;
    __shared__ float rows[fv::kWarp];
    __shared__ float columns[kWarps][fv::kWarp];
    const int lane = fv::lane_id();
    const int warp = fv::warp_id();
    const int first = static_cast<int>(blockIdx.x) * fv::kWarp;  // [0, n)
    const int here = min(fv::kWarp, p.neurons - first);
    const auto* fc1 = static_cast<const Storage*>(p.fc1);
    const auto* fc2 = static_cast<const Storage*>(p.fc2);
    for (int neuron = warp; neuron < here; neuron += kWarps) {
        const auto* row = fc1 + (first + neuron) * p.fc1_stride;
        float sum = 0.0f;
#pragma unroll 4
        for (int column = lane; column < p.width; column += fv::kWarp) {
            sum += fabsf(E::widen(__ldg(row + column)));
        }
        sum = fv::warp_sum(sum);
        if (lane == 0) {
            rows[neuron] = sum;
        }
    }
    float sum = 0.0f;
    if (lane < here) {
#pragma unroll 4
        for (int output = warp; output < p.outputs; output += kWarps) {
            sum += fabsf(E::widen(__ldg(fc2 + output * p.fc2_stride + first + lane)));
        }
    }
    columns[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && lane < here) {
        float score = rows[lane];
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            score += columns[other][lane];
        }
        p.scores[first + lane] = score;
    }
}

// A head of an image a block.
template <class E>
__device__ __forceinline__ void head_sums(const HeadSumParams& p) {
    using Storage = typename E::Storage;
    __shared__ float partial_products[kWarps], partial_sizes[kWarps];
    const int image = static_cast<int>(blockIdx.x) / p.heads;  // [0, B)
    const int head = static_cast<int>(blockIdx.x) % p.heads;   // [0, H)
    const auto* output = static_cast<const Storage*>(p.output) + image * p.output_batch + head * p.head_dim;
    const auto* gradient = static_cast<const Storage*>(p.gradient) + image * p.gradient_batch + head * p.head_dim;
    float product = 0.0f;
    float size = 0.0f;
#pragma unroll 4
    for (int at = static_cast<int>(threadIdx.x); at < p.tokens * p.head_dim; at += kThreads) {
        const int64_t token = at / p.head_dim;
        const int column = at % p.head_dim;
        const float g = E::widen(__ldg(gradient + token * p.gradient_token + column));
        product = __fmaf_rn(E::widen(__ldg(output + token * p.output_token + column)), g, product);
        size += fabsf(g);
    }
    product = fv::team_sum<kWarps>(product, partial_products);
    size = fv::team_sum<kWarps>(size, partial_sizes);
    if (threadIdx.x == 0) {
        p.products[blockIdx.x] = product;
        p.sizes[blockIdx.x] = size;
    }
}

// Ascends with the magnitude; NaN is as zero.
__device__ __forceinline__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
    return bits > 0x7f800000u ? 0u : bits;
}

__device__ __forceinline__ int removals(double rate, int active) {
    return static_cast<int>(ceil(__dmul_rn(rate, static_cast<double>(active))));
}

// The largest key that at least `rank` of the `count` keys reach, from the highest bit down. By all threads of the block.
template <class KeyOf>
__device__ __forceinline__ uint32_t key_of_rank(int count, int rank, const KeyOf& key) {
    uint32_t found = 0;
    for (int bit = 30; bit >= 0; --bit) {
        const uint32_t wanted = found | 1u << bit;
        int reach = 0;
        for (int base = 0; base < count; base += kUpdateThreads) {
            const int i = base + static_cast<int>(threadIdx.x);
            reach += __syncthreads_count(i < count && key(i) >= wanted);
        }
        found = reach >= rank ? wanted : found;
    }
    return found;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kUpdateThreads) fv_neuron_update(const __grid_constant__ UpdateParams p) {
    int active = 0;
    for (int base = 0; base < p.count; base += kUpdateThreads) {
        const int i = base + static_cast<int>(threadIdx.x);
        active += __syncthreads_count(i < p.count && p.mask[i] != 0);
    }
    const int asked = removals(p.rate, active);
    const auto weight = [&](int i) { return p.mask[i] != 0 ? key_of(__ldg(p.scores + i)) : 0u; };
    // The (n - active + r)-th smallest is the (active - r + 1)-th largest.
    const uint32_t threshold = asked == 0 ? 0 : key_of_rank(p.count, active - asked + 1, weight);
    const auto call = [&](int i) { return weight(i) > threshold ? 0u : key_of(__ldg(p.calls + i)); };
    const uint32_t enough = asked == 0 ? 0 : key_of_rank(p.count, asked, call);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < p.count; i += kUpdateThreads) {
        const bool on = asked == 0 ? p.mask[i] != 0 : weight(i) > threshold || call(i) >= enough;
        p.mask[i] = on ? 1 : 0;
    }
}

extern "C" __global__ void __launch_bounds__(kMostHeads) fv_head_update(const __grid_constant__ UpdateParams p) {
    __shared__ uint32_t worth[kMostHeads], calls[kMostHeads];
    __shared__ bool there[kMostHeads];
    const int head = static_cast<int>(threadIdx.x);
    const bool mine = head < p.count;
    float importance = 0.0f;
    float call = 0.0f;
    if (mine) {
        for (int image = 0; image < p.batch; ++image) {
            importance += fabsf(__ldg(p.scores + static_cast<int64_t>(image) * p.count + head));
            call += __ldg(p.calls + static_cast<int64_t>(image) * p.count + head);
        }
        worth[head] = fv::order_key(importance / static_cast<float>(p.batch));
        calls[head] = fv::order_key(call / static_cast<float>(p.batch));
        there[head] = p.mask[head] != 0;
    }
    const int active = __syncthreads_count(mine && p.mask[head] != 0);
    const int asked = removals(p.rate, active);
    // How many heads of the same kind precede this one.
    const auto place = [&](const uint32_t* keys, bool kind) {
        int before = 0;
        for (int other = 0; other < p.count; ++other) {
            const bool precedes = keys[other] > keys[head] || (keys[other] == keys[head] && other < head);
            before += there[other] == kind && precedes ? 1 : 0;
        }
        return before;
    };
    const bool stays = mine && there[head] && place(worth, true) < active - asked;
    __syncthreads();
    if (mine) {
        there[head] = stays;
    }
    __syncthreads();
    const bool comes = mine && !stays && place(calls, false) < asked;
    if (mine) {
        p.mask[head] = stays || comes ? 1 : 0;
    }
}

#define FV_STRUCTURED(TYPE, E)                                                          \
    extern "C" __global__ void __launch_bounds__(kThreads)                              \
        fv_neuron_scores_##TYPE(const __grid_constant__ NeuronScoreParams p) {          \
        neuron_scores<E>(p);                                                            \
    }                                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads)                              \
        fv_head_sums_##TYPE(const __grid_constant__ HeadSumParams p) {                  \
        head_sums<E>(p);                                                                \
    }
FV_STRUCTURED(f32, fv::F32)
FV_STRUCTURED(f16, fv::F16)
FV_STRUCTURED(bf16, fv::Bf16)
