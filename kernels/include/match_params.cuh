// match_params.cuh - what a matching launch is given, who stands on which side, and the criteria of a pair.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reduce.cuh"

namespace fv {

struct MatchParams {
    const void* metric;             // (B, N, heads*width): the rows that are compared, or the first head's keys
    const float* informativeness;   // (B, H, N), or null: the criterion is off
    const float* factor_sizes;      // (B, N), or null: the criterion is off
    const float* received;          // (B, H, N), or null: not part of the weights
    const float* sizes;             // (B, N), or null: not part of the weights
    int32_t* offsets;               // (B, M+1)
    int32_t* members;               // (B, N)
    float* weights;                 // (B, N)
    int32_t* groups;                // (B, N)
    uint32_t* arrived;              // (B): 0 before and after every launch; unused by the resident kernel
    int32_t* stays;                 // (B, (N+1)/2): both ways, from forth to back
    unsigned long long* chosen;     // (B, N/2): 0 before and after every launch; at once, whom each of B chooses among all of A
    int64_t metric_batch_stride, metric_token_stride;
    int64_t informativeness_batch_stride, informativeness_head_stride;
    int64_t received_batch_stride, received_head_stride;
    int32_t heads;                  // whose rows are added up
    int32_t width;                  // D, values of each
    int32_t tokens;                 // N
    int32_t special;
    int32_t merges;                 // tokens that leave
    int32_t forward;                // of which from A
    int32_t informativeness_heads;
    int32_t received_heads;
    int32_t direction;              // kOneWay, kForth, kBack or kAtOnce
    int32_t attraction;             // kCosine, or how the similarity enters the product of criteria
    int32_t wide;                   // rows take 16-byte accesses
    int32_t padded_width;           // D rounded up to 8: columns of a resident row
    int32_t tiles;                  // tiles kernel: blocks an image
    float similarity_exponent, informativeness_exponent, size_exponent;
};
static_assert(sizeof(MatchParams) == 208 && offsetof(MatchParams, metric_batch_stride) == 96 &&
                  offsetof(MatchParams, heads) == 144 && offsetof(MatchParams, similarity_exponent) == 196,
              "the launcher's layout");

// MatchParams::direction. Both ways are one launch, or two, forth and back.
constexpr int kOneWay = 0;
constexpr int kForth = 1;
constexpr int kBack = 2;
constexpr int kAtOnce = 3;
// MatchParams::attraction.
constexpr int kCosine = 0;
constexpr int kLinear = 1;
constexpr int kPower = 2;
constexpr int kIgnored = 3;

// Set A is the tokens at even positions, token 2i has index i; set B those at odd positions, token 2j+1 has index j. The
// special tokens are the first of each.
struct Sides {
    int special_a, special_b;
    int all_a, all_b;
    int kept_a;  // not special, stay when `forward` of A have left
    int tail;    // the output token of the first of B

    __device__ __forceinline__ explicit Sides(const MatchParams& p)
        : special_a((p.special + 1) / 2),
          special_b(p.special / 2),
          all_a((p.tokens + 1) / 2),
          all_b(p.tokens / 2),
          kept_a(all_a - special_a - p.forward),
          tail(p.special + kept_a) {}
    __device__ __forceinline__ int a() const { return all_a - special_a; }
    __device__ __forceinline__ int b() const { return all_b - special_b; }
    __device__ __forceinline__ int token_a(int i) const { return 2 * (special_a + i); }
    __device__ __forceinline__ int token_b(int j) const { return 2 * (special_b + j) + 1; }
};

// In the order of the heads, as the reference adds.
__device__ __forceinline__ float sum_over_heads(const float* scores, int64_t head_stride, int heads, int token) {
    float sum = -0.0f;
#pragma unroll 1
    for (int head = 0; head < heads; ++head) {
        sum = __fadd_rn(sum, __ldg(scores + head * head_stride + token));
    }
    return sum;
}

// Ascends with 1/value: -0, the negative numbers, infinity, the positive numbers, +0. NaN is with -0, whose inverse is what a
// maximum starts from.
__device__ __forceinline__ uint32_t inverse_key(float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return 0;
    }
    return bits == magnitude ? 0xffffffffu - magnitude : magnitude;
}

__device__ __forceinline__ float value_of_inverse_key(uint32_t key) {
    return __uint_as_float(key > 0x7fffffffu ? 0xffffffffu - key : key | 0x80000000u);
}

// base^exponent for bases from 0 in three instructions: within (2*|ln result| + 2*exponent + 3) last places. exp2f of
// log2f, a dozen times in a tile's epilogue, would not fit its registers.
__device__ __forceinline__ float quick_power(float base, float exponent) {
    float logarithm, result;
    asm("lg2.approx.f32 %0, %1;" : "=f"(logarithm) : "f"(base));
    asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(exponent * logarithm));
    return result;
}

constexpr float kLargest = 3.402823466e38f;

// (1/value / the largest 1/value)^exponent, `extreme` being the value of the largest inverse; 1 where that ratio is infinite
// or undefined. Within 2*|ln result| + 3 last places.
__device__ __forceinline__ float inverse_factor(float value, float extreme, float exponent) {
    // Below the normal numbers the ratio would lose bits, or become 0 where a root of it is not: its terms are brought together by
    // powers of two, at most 2^100 each, that its logarithm gets back. Neither term leaves the normal numbers by that.
    const bool tiny = extreme > 0.0f && value <= kLargest && value * 0x1p-100f > extreme;
    const float upper = tiny ? extreme * 0x1p100f : extreme;
    const bool smaller = tiny && value * 0x1p-100f > upper;
    const float ratio = __fdiv_rn(upper, smaller ? value * 0x1p-100f : value);
    if (!(fabsf(ratio) <= kLargest)) {
        return 1.0f;
    }
    const float shift = smaller ? 200.0f : tiny ? 100.0f : 0.0f;
    return exponent == 1.0f && !tiny ? ratio : exp2f(exponent * (log2f(ratio) - shift));
}

// The sum over heads: ratios do not see that a mean would be divided.
__device__ __forceinline__ float informativeness_of(const MatchParams& p, int64_t image, int token) {
    return sum_over_heads(p.informativeness + image * p.informativeness_batch_stride, p.informativeness_head_stride,
                          p.informativeness_heads, token);
}

// The values of the largest inverses of one image's criteria, as their keys in shared memory. By all threads of the block;
// ends in a barrier.
__device__ __forceinline__ void find_extremes(const MatchParams& p, int64_t image, uint32_t (&extremes)[2]) {
    if (threadIdx.x < 2) {
        extremes[threadIdx.x] = 0;
    }
    __syncthreads();
    uint32_t largest[2] = {0, 0};
    for (int token = threadIdx.x; token < p.tokens; token += blockDim.x) {
        if (p.informativeness != nullptr) {
            largest[0] = max(largest[0], inverse_key(informativeness_of(p, image, token)));
        }
        if (p.factor_sizes != nullptr) {
            largest[1] = max(largest[1], inverse_key(__ldg(p.factor_sizes + image * p.tokens + token)));
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t of_warp = __reduce_max_sync(kFullWarp, largest[i]);
        if (lane_id() == 0) {
            // A maximum of integers: the order does not show.
            atomicMax(extremes + i, of_warp);
        }
    }
    __syncthreads();
}

// What one token contributes to the attraction of its pairs.
__device__ __forceinline__ float criterion_of(const MatchParams& p, int64_t image, int token, const uint32_t (&extremes)[2]) {
    float factor = 1.0f;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        if ((i == 0 ? p.informativeness : p.factor_sizes) != nullptr) {
            const float value =
                i == 0 ? informativeness_of(p, image, token) : __ldg(p.factor_sizes + image * p.tokens + token);
            factor = __fmul_rn(factor, inverse_factor(value, value_of_inverse_key(extremes[i]),
                                                      i == 0 ? p.informativeness_exponent : p.size_exponent));
        }
    }
    return factor;
}

// The similarity's part in a product of criteria. fmaxf makes NaN 0, as the reference does.
__device__ __forceinline__ float criterion_of_cosine(float cosine, int attraction, float exponent) {
    const float similarity = fmaxf(__fmul_rn(__fadd_rn(cosine, 1.0f), 0.5f), 0.0f);
    if (attraction == kLinear) {
        return similarity;
    }
    return attraction == kPower ? quick_power(similarity, exponent) : 1.0f;
}

}  // namespace fv
