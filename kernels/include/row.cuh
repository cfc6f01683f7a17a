// row.cuh - one row of a tensor in the registers of a team of warps: loading, storing, LayerNorm.
//
// A lane holds 8 values. A row of C values takes a team of as many warps as that needs, so that one, two, three and four
// warps fit the widths of ViT-T, S, B and L (192, 384, 768, 1,024), and 8 and 16 hold what is wider. Lane t of a team has
// accesses t, t + team, ...: neighbouring lanes touch neighbouring memory. Every value is read once: the LayerNorm's two
// passes (mean, then squared distances) run over registers.
//
// Tried and left: 16, 24 and 32 values a lane, with fewer warps and barriers a row, spill on one architecture or another,
// because 1,024 threads a multiprocessor, half of what it holds, leave 64 registers each.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "reduce.cuh"

namespace fv {

// What a lane holds.
constexpr int kValues = 8;
// Threads of a block: four teams of one warp, or one team of several.
template <int kWarps>
constexpr int kRowThreads = kWarps == 1 ? 4 * kWarp : kWarps * kWarp;
// At least half of what a multiprocessor of compute capability 8.0 or 9.0 holds.
template <int kWarps>
constexpr int kRowBlocks = (1024 + kRowThreads<kWarps> - 1) / kRowThreads<kWarps>;

// LayerNorm's statistics of teams of several warps.
template <int kWarps>
struct NormScratch {
    float sums[kWarps];
    float squares[kWarps];
};

template <class E, int kWarps, bool kWide>
struct Row {
    using Storage = typename E::Storage;
    using A = Access<E, kWide>;
    static constexpr int kStep = A::kElements;
    static constexpr int kAccesses = kValues / kStep;
    static constexpr int kTeam = kWarp * kWarps;
    static constexpr int kTeams = kRowThreads<kWarps> / kTeam;
    static_assert(kValues % kStep == 0, "whole accesses");
    static_assert(kWarps == 1 || kTeams == 1, "a team of several warps meets at block barriers");

    float v[kValues];

    static __device__ __forceinline__ int team() { return static_cast<int>(threadIdx.x) / kTeam; }
    // This lane's first column. Its access i is offset(i) columns further: a constant, which needs no address register.
    static __device__ __forceinline__ int first() { return static_cast<int>(threadIdx.x) % kTeam * kStep; }
    static __device__ __forceinline__ constexpr int offset(int i) { return i * kTeam * kStep; }
    // Whether access i lies within a row of `width` columns.
    static __device__ __forceinline__ bool within(int i, int width) { return offset(i) < width - first(); }

    // Columns past the width hold 0.
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            v[i] = 0.0f;
        }
    }

    __device__ __forceinline__ void load(const Storage* row, int width) {
        clear();
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            if (within(i, width)) {
                A::widen(A::load(row + first() + offset(i)), v + i * kStep);
            }
        }
    }

    // Adds another row, access by access: a second row in registers would not fit beside the first.
    __device__ __forceinline__ void add(const Storage* row, int width) {
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            if (within(i, width)) {
                float other[kStep];
                A::widen(A::load(row + first() + offset(i)), other);
#pragma unroll
                for (int j = 0; j < kStep; ++j) {
                    v[i * kStep + j] += other[j];
                }
            }
        }
    }

    __device__ __forceinline__ void store(Storage* row, int width) const {
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            if (within(i, width)) {
                A::store(row + first() + offset(i), A::narrow(v + i * kStep));
            }
        }
    }

    // Every value becomes what memory would hold of it: what follows sees what another kernel would read.
    __device__ __forceinline__ void round() {
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            A::widen(A::narrow(v + i * kStep), v + i * kStep);
        }
    }

    // Writes (v - mean)/sqrt(variance + eps)*weight + bias, in O. Contractions are written out, so that every kernel that
    // normalises a row gives the same bits. With kOutside epsilon is added to the root instead.
    template <bool kOutside = false, class O = E>
    __device__ __forceinline__ void store_normalised(typename O::Storage* out, const typename O::Storage* weight,
                                                     const typename O::Storage* bias, float eps, int width,
                                                     NormScratch<kWarps>& scratch) const {
        using W = typename Beside<O, E, kWide>::Type;
        static_assert(W::kElements == kStep, "an access each");
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
            sum += v[i];
        }
        const float mean = __fdiv_rn(team_sum<kWarps>(sum, scratch.sums), static_cast<float>(width));
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            if (within(i, width)) {
#pragma unroll
                for (int j = 0; j < kStep; ++j) {
                    const float distance = v[i * kStep + j] - mean;
                    squares = __fmaf_rn(distance, distance, squares);
                }
            }
        }
        const float variance = __fdiv_rn(team_sum<kWarps>(squares, scratch.squares), static_cast<float>(width));
        // Exact root and reciprocal: once a row, they cost nothing and keep f32 within the reference's error.
        const float scale = __frcp_rn(kOutside ? __fsqrt_rn(variance) + eps : __fsqrt_rn(variance + eps));
#pragma unroll
        for (int i = 0; i < kAccesses; ++i) {
            if (within(i, width)) {
                float w[kStep], b[kStep], y[kStep];
                W::widen(W::load_constant(weight + first() + offset(i)), w);
#pragma unroll
                for (int j = 0; j < kStep; ++j) {
                    b[j] = 0.0f;
                }
                if (bias != nullptr) {
                    W::widen(W::load_constant(bias + first() + offset(i)), b);
                }
#pragma unroll
                for (int j = 0; j < kStep; ++j) {
                    y[j] = __fmaf_rn((v[i * kStep + j] - mean) * scale, w[j], b[j]);
                }
                W::store(out + first() + offset(i), W::narrow(y));
            }
        }
    }
};

// The instantiations of a kernel over rows: WITH(name, element, element after the LayerNorm, warps, 16-byte accesses). Narrow
// ones serve rows whose width, stride or address does not fit 16-byte accesses.
#define FV_FOR_EACH_ROW_OF(WITH, PREFIX, TYPE, E, O)     \
    WITH(PREFIX##_##TYPE##_256, E, O, 1, true)           \
    WITH(PREFIX##_##TYPE##_512, E, O, 2, true)           \
    WITH(PREFIX##_##TYPE##_768, E, O, 3, true)           \
    WITH(PREFIX##_##TYPE##_1024, E, O, 4, true)          \
    WITH(PREFIX##_##TYPE##_2048, E, O, 8, true)          \
    WITH(PREFIX##_##TYPE##_4096, E, O, 16, true)         \
    WITH(PREFIX##_##TYPE##_1024_narrow, E, O, 4, false)  \
    WITH(PREFIX##_##TYPE##_4096_narrow, E, O, 16, false)
#define FV_FOR_EACH_ROW(WITH, PREFIX)                       \
    FV_FOR_EACH_ROW_OF(WITH, PREFIX, f32, fv::F32, fv::F32) \
    FV_FOR_EACH_ROW_OF(WITH, PREFIX, f16, fv::F16, fv::F16) \
    FV_FOR_EACH_ROW_OF(WITH, PREFIX, bf16, fv::Bf16, fv::Bf16)
// A residual stream of f32 beside weights and products of halves.
#define FV_FOR_EACH_MIXED_ROW(WITH, PREFIX)                      \
    FV_FOR_EACH_ROW_OF(WITH, PREFIX, f32_f16, fv::F32, fv::F16)  \
    FV_FOR_EACH_ROW_OF(WITH, PREFIX, f32_bf16, fv::F32, fv::Bf16)

}  // namespace fv
