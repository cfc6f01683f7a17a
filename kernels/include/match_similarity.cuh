// match_similarity.cuh - rows to compare, their lengths, and products of small tiles of them, in f32 throughout.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "match_params.cuh"
#include "order.cuh"
#include "reduce.cuh"

namespace fv {

// Eight lanes share a row when it is loaded.
constexpr int kTeam = 8;

template <class E>
struct MetricRows {
    using Storage = typename E::Storage;
    const Storage* base;
    int64_t token_stride;
    int heads;
    int width;

    __device__ __forceinline__ MetricRows(const MatchParams& p, int64_t image)
        : base(static_cast<const Storage*>(p.metric) + image * p.metric_batch_stride),
          token_stride(p.metric_token_stride),
          heads(p.heads),
          width(p.width) {}

    // Adds kCount columns of `token` to v, over the heads in their order. A mean would divide by their number, which a cosine
    // does not see. Columns from the width on add nothing. kTogether: heads whose loads are in flight together.
    template <int kCount, int kTogether>
    __device__ __forceinline__ void add(bool wide, int token, int column, float* v) const {
        static_assert(kCount * sizeof(Storage) == 8 || kCount * sizeof(Storage) == 16, "one access");
        const Storage* from = base + token * token_stride + column;
        if (wide) {
            if (column < width) {
#pragma unroll kTogether
                for (int head = 0; head < heads; ++head) {
                    uint32_t words[kCount * sizeof(Storage) / 4];
                    if constexpr (kCount * sizeof(Storage) == 16) {
                        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from + head * width));
                        words[0] = raw.x;
                        words[1] = raw.y;
                        words[2] = raw.z;
                        words[3] = raw.w;
                    } else {
                        const uint2 raw = __ldg(reinterpret_cast<const uint2*>(from + head * width));
                        words[0] = raw.x;
                        words[1] = raw.y;
                    }
#pragma unroll
                    for (int word = 0; word < kCount / E::kPerWord; ++word) {
                        float x[E::kPerWord];
                        E::widen_word(words[word], x);
#pragma unroll
                        for (int i = 0; i < E::kPerWord; ++i) {
                            v[word * E::kPerWord + i] += x[i];
                        }
                    }
                }
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (column + i < width) {
#pragma unroll 1
                for (int head = 0; head < heads; ++head) {
                    v[i] += E::widen(__ldg(from + i + head * width));
                }
            }
        }
    }
};

// Sums and maxima over a team, the same bits in every lane.
__device__ __forceinline__ float team_add(float x) {
#pragma unroll
    for (int offset = kTeam / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(kFullWarp, x, offset);
    }
    return x;
}

__device__ __forceinline__ float team_max(float x) {
#pragma unroll
    for (int offset = kTeam / 2; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
    }
    return x;
}

// Whether squares of this sum have lost something to the ends of f32's range, so that the row must be scaled first: a row of
// zeros or with infinities looks like that too. Between 2^-60 and 2^120 neither squares nor products with other such rows do.
__device__ __forceinline__ bool needs_scale(float squares) { return squares < 0x1p-60f || squares > 0x1p120f; }

// A power of two that brings the largest magnitude of a row near 1; 0 for a row of zeros, NaN for one with infinities, which
// then turns all its products into NaN.
__device__ __forceinline__ float scale_of(float largest) {
    if (largest == 0.0f) {
        return 0.0f;
    }
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;  // [-127, 128]
    if (exponent == 128) {
        return __uint_as_float(0x7fffffffu);
    }
    // 2^-127 is below the normal numbers; 2^126 suffices for what is.
    return exponent == 127 ? __uint_as_float(0x00400000u) : __uint_as_float(static_cast<uint32_t>(127 - max(exponent, -126)) << 23);
}

// What a scaled row is multiplied by to have length 1, from the sum of its squares after scaling; within 2 last places. The
// length passes through f32 unscaled, as the reference's does: one too large for f32 makes the row 0. A row of zeros stays
// one. No exact root or division: those are calls, around which registers would have to be saved.
__device__ __forceinline__ float inverse_length(float squares, float scale) {
    if (scale == 0.0f || squares == 0.0f) {
        return 0.0f;
    }
    float root = rsqrtf(squares);
    root = __fmaf_rn(0.5f * root, __fmaf_rn(-squares * root, root, 1.0f), root);
    if (scale == 1.0f) {
        return root;
    }
    // The scale is a power of two, or NaN, which every further step keeps.
    const float length = squares * root * __uint_as_float((254u - (__float_as_uint(scale) >> 23)) << 23);
    const float scaled = length * scale;
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scaled));
    return length > kLargest ? 0.0f : __fmaf_rn(inverse, __fmaf_rn(-scaled, inverse, 1.0f), inverse);
}

// sums[i][j] += the product of row a + i*a_step with row b + j*b_step, columns ascending: every pair's sum has one order
// wherever it is formed. Steps in words; rows start at multiples of 16 bytes.
template <int kA, int kB, int kUnroll, int kWidest>
__device__ __forceinline__ void add_products(const float* a, int a_step, const float* b, int b_step, int quads,
                                             float (&sums)[4][kWidest]) {
    static_assert(kB <= kWidest, "columns of the tile");
#pragma unroll kUnroll
    for (int quad = 0; quad < quads; ++quad) {
        float4 columns[kB];
#pragma unroll
        for (int j = 0; j < kB; ++j) {
            columns[j] = *reinterpret_cast<const float4*>(b + j * b_step + 4 * quad);
        }
#pragma unroll
        for (int i = 0; i < kA; ++i) {
            const float4 row = *reinterpret_cast<const float4*>(a + i * a_step + 4 * quad);
#pragma unroll
            for (int j = 0; j < kB; ++j) {
                sums[i][j] = __fmaf_rn(row.x, columns[j].x, sums[i][j]);
            }
#pragma unroll
            for (int j = 0; j < kB; ++j) {
                sums[i][j] = __fmaf_rn(row.y, columns[j].y, sums[i][j]);
            }
#pragma unroll
            for (int j = 0; j < kB; ++j) {
                sums[i][j] = __fmaf_rn(row.z, columns[j].z, sums[i][j]);
            }
#pragma unroll
            for (int j = 0; j < kB; ++j) {
                sums[i][j] = __fmaf_rn(row.w, columns[j].w, sums[i][j]);
            }
        }
    }
}

// The same for a_count x b_count rows, 1 to 4 and 1 to kWidest, the same for the whole warp.
template <int kUnroll, int kA, int kWidest>
__device__ __forceinline__ void add_products_of(int b_count, const float* a, int a_step, const float* b, int b_step,
                                                int quads, float (&sums)[4][kWidest]) {
    if constexpr (kWidest > 3) {
        if (b_count > 3) {
            return add_products<kA, 4, kUnroll>(a, a_step, b, b_step, quads, sums);
        }
    }
    switch (b_count) {
        case 1: return add_products<kA, 1, kUnroll>(a, a_step, b, b_step, quads, sums);
        case 2: return add_products<kA, 2, kUnroll>(a, a_step, b, b_step, quads, sums);
        default: return add_products<kA, 3, kUnroll>(a, a_step, b, b_step, quads, sums);
    }
}

template <int kUnroll, int kWidest>
__device__ __forceinline__ void add_products_of(int a_count, int b_count, const float* a, int a_step, const float* b,
                                                int b_step, int quads, float (&sums)[4][kWidest]) {
    switch (a_count) {
        case 1: return add_products_of<kUnroll, 1>(b_count, a, a_step, b, b_step, quads, sums);
        case 2: return add_products_of<kUnroll, 2>(b_count, a, a_step, b, b_step, quads, sums);
        case 3: return add_products_of<kUnroll, 3>(b_count, a, a_step, b, b_step, quads, sums);
        default: return add_products_of<kUnroll, 4>(b_count, a, a_step, b, b_step, quads, sums);
    }
}

// A key and the index of who has it as one number that ascends with precedence.
__device__ __forceinline__ unsigned long long packed_choice(uint32_t key, int index) {
    return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

// The best of the candidates that one lane has seen for each of its four rows, in descending order of their index, so that >=
// leaves the lowest of equals. NaN is never chosen: a row that has chosen nobody has seen nothing but NaN, or nothing.
// A candidate is remembered by its number in the order of this lane, 16 bits, two rows a register: 12 registers for these
// would not fit beside a tile's sums.
struct Best {
    static constexpr uint32_t kNone = 0xffffu;
    float scores[4];
    uint32_t chosen[2];

    __device__ __forceinline__ Best() {
#pragma unroll
        for (int row = 0; row < 4; ++row) {
            scores[row] = __uint_as_float(0xff800000u);
            chosen[row / 2] = 0xffffffffu;
        }
    }
    __device__ __forceinline__ void see(int row, float score, int number) {
        if (score >= scores[row]) {
            scores[row] = score;
            // Bytes 0 and 1 of the number into the row's half.
            chosen[row / 2] = __byte_perm(chosen[row / 2], static_cast<uint32_t>(number), row % 2 == 0 ? 0x3254 : 0x5410);
        }
    }
    __device__ __forceinline__ uint32_t number(int row) const { return chosen[row / 2] >> (16 * (row % 2)) & 0xffffu; }
    // As one number that ascends with precedence: the key above the complement of the index of the candidate; number n has
    // index first + n*step.
    __device__ __forceinline__ unsigned long long packed(int row, int first, int step) const {
        const bool none = number(row) == kNone;
        const uint32_t key = none ? kNanKey : order_key(scores[row]);
        const int index = none ? first : first + static_cast<int>(number(row)) * step;
        return packed_choice(key, index);
    }
};

__device__ __forceinline__ uint32_t key_of_packed(unsigned long long packed) { return static_cast<uint32_t>(packed >> 32); }
__device__ __forceinline__ int index_of_packed(unsigned long long packed) {
    return static_cast<int>(0xffffffffu - static_cast<uint32_t>(packed));
}

// The best of a side that has no candidates: the reference's.
constexpr unsigned long long kNobody = 0x007fffffffffffffull;

__device__ __forceinline__ unsigned long long team_best(unsigned long long packed) {
#pragma unroll
    for (int offset = kTeam / 2; offset > 0; offset /= 2) {
        packed = max(packed, __shfl_xor_sync(kFullWarp, packed, offset));
    }
    return packed;
}

}  // namespace fv
