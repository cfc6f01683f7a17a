// tile.cuh - products x * w^T by blocks of 128 threads: kRows rows of x against 64 rows of w, sums in registers.
//
// x and w come through shared memory in steps of 128 bytes of each row, two steps in flight. Halves multiply on tensor cores:
// of the four warps two share the rows and two the columns. f32 multiplies as f32: a thread has every eighth row and every
// sixteenth column.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "mma.cuh"
#include "reduce.cuh"

namespace fv {

constexpr int kTileThreads = 128;
constexpr int kTileColumns = 64;
// Bytes of a row in one step, and from row to row in shared memory: 16 more, so that no eight rows meet in a bank.
constexpr int kStepBytes = 128;
constexpr int kStepStride = kStepBytes + 16;
// From row to row where sums are laid down, in floats: pairs of a half warp's lanes lie in different banks.
constexpr int kSumStride = kTileColumns + 8;

template <class E>
constexpr int kStepValues = kStepBytes / static_cast<int>(sizeof(typename E::Storage));

// Two steps of x and of w.
template <int kRows>
struct TileBuffers {
    alignas(16) unsigned char x[2][kRows * kStepStride];
    alignas(16) unsigned char w[2][kTileColumns * kStepStride];
};

template <class E, int kRows>
struct TileSums {
    static constexpr int kFragments = kRows / 32;  // of 16 rows, in each warp's half of the rows
    float c[kFragments][4][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& fragment : c) {
            for (auto& block : fragment) {
                block[0] = block[1] = block[2] = block[3] = 0.0f;
            }
        }
    }

    // One step: x rows of `x_stride` bytes, w rows of kStepStride bytes.
    __device__ __forceinline__ void multiply(const unsigned char* x, int x_stride, const unsigned char* w) {
        const int lane = lane_id();
        const int half = warp_id() / 2 * (kRows / 2);
        const int columns = warp_id() % 2 * (kTileColumns / 2);
        const uint32_t x_at = shared_address(x) + (half + lane % 16) * x_stride + lane / 16 * 16;
        const uint32_t w_at =
            shared_address(w) + (columns + lane / 16 * 8 + lane % 8) * kStepStride + lane / 8 % 2 * 16;
        unroll<4>([&](auto k) {
            uint32_t a[kFragments][4];
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
                load_matrices<32 * k.value>(a[i], x_at + i * 16 * x_stride);
            }
            unroll<2>([&](auto pair) {
                uint32_t b[4];
                load_matrices<32 * k.value + 16 * pair.value * kStepStride>(b, w_at);
#pragma unroll
                for (int i = 0; i < kFragments; ++i) {
                    mma<E>(c[i][2 * pair.value], a[i], b[0], b[1]);
                    mma<E>(c[i][2 * pair.value + 1], a[i], b[2], b[3]);
                }
            });
        });
    }

    // Writes the sums, (kRows, kSumStride).
    __device__ __forceinline__ void lay_down(float* sums) const {
        const int row = warp_id() / 2 * (kRows / 2) + lane_id() / 4;
        const int column = warp_id() % 2 * (kTileColumns / 2) + lane_id() % 4 * 2;
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float* at = sums + (row + 16 * i) * kSumStride + column + 8 * j;
                *reinterpret_cast<float2*>(at) = make_float2(c[i][j][0], c[i][j][1]);
                *reinterpret_cast<float2*>(at + 8 * kSumStride) = make_float2(c[i][j][2], c[i][j][3]);
            }
        }
    }
};

template <int kRows>
struct TileSums<F32, kRows> {
    static constexpr int kMine = kRows / 8;
    float c[kMine][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& row : c) {
            row[0] = row[1] = row[2] = row[3] = 0.0f;
        }
    }

    __device__ __forceinline__ void multiply(const unsigned char* x, int x_stride, const unsigned char* w) {
        const int row = static_cast<int>(threadIdx.x) / 16;
        const int column = static_cast<int>(threadIdx.x) % 16;
#pragma unroll 2
        for (int k = 0; k < kStepBytes; k += 16) {
            float4 b[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                b[j] = *reinterpret_cast<const float4*>(w + (column + 16 * j) * kStepStride + k);
            }
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
                const float4 a = *reinterpret_cast<const float4*>(x + (row + 8 * i) * x_stride + k);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    c[i][j] = __fmaf_rn(a.x, b[j].x, c[i][j]);
                    c[i][j] = __fmaf_rn(a.y, b[j].y, c[i][j]);
                    c[i][j] = __fmaf_rn(a.z, b[j].z, c[i][j]);
                    c[i][j] = __fmaf_rn(a.w, b[j].w, c[i][j]);
                }
            }
        }
    }

    __device__ __forceinline__ void lay_down(float* sums) const {
        const int row = static_cast<int>(threadIdx.x) / 16;
        const int column = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sums[(row + 8 * i) * kSumStride + column + 16 * j] = c[i][j];
            }
        }
    }
};

// Copies one step of kRows rows that lie `stride` values apart: columns from `first` on of `width`, rows below `rows`; what
// lies beyond becomes 0. 16 bytes an access where kWide, in the background: commit_copies and wait_copies order them.
template <class E, bool kWide, int kRows>
__device__ __forceinline__ void load_step(unsigned char* to, const typename E::Storage* from, int64_t stride, int rows, int first,
                                          int width) {
    using Storage = typename E::Storage;
    if constexpr (kWide) {
        constexpr int kEach = kWideBytes / sizeof(Storage);
        constexpr int kAccesses = kStepBytes / kWideBytes;  // of a row
        const int access = static_cast<int>(threadIdx.x) % kAccesses;
        const int column = first + access * kEach;
        unsigned char* at = to + static_cast<int>(threadIdx.x) / kAccesses * kStepStride + access * kWideBytes;
#pragma unroll
        for (int row = 0; row < kRows; row += kTileThreads / kAccesses) {
            const int mine = row + static_cast<int>(threadIdx.x) / kAccesses;
            const bool there = mine < rows && column < width;
            copy_async(shared_address(at + row * kStepStride), there ? from + mine * stride + column : from, there ? kWideBytes : 0);
        }
    } else {
        constexpr int kValuesAStep = kStepValues<E>;
#pragma unroll 4
        for (int i = static_cast<int>(threadIdx.x); i < kRows * kValuesAStep; i += kTileThreads) {
            const int row = i / kValuesAStep;
            const int column = first + i % kValuesAStep;
            const bool there = row < rows && column < width;
            reinterpret_cast<Storage*>(to + row * kStepStride)[i % kValuesAStep] =
                there ? __ldg(from + row * stride + column) : static_cast<Storage>(0);
        }
    }
}

// sums += x * w^T over `width` columns, for w's rows below `rows`. X hands out steps of x:
//   fetch(step, to)  begins to bring a step: copies to `to`, loads to registers;  put(step, to)  ends it;
//   at(step, to)     where the step's rows lie, stride() bytes apart.
// By all threads of a block, begins when `buffers` is nobody's; ends with a barrier: it is nobody's again.
template <class E, bool kWide, int kRows, class X>
__device__ __forceinline__ void multiply_tile(TileSums<E, kRows>& sums, X& x, const typename E::Storage* w, int64_t w_stride, int rows,
                                              int width, TileBuffers<kRows>& buffers) {
    constexpr int kValuesAStep = kStepValues<E>;
    const int steps = (width + kValuesAStep - 1) / kValuesAStep;
    load_step<E, kWide, kTileColumns>(buffers.w[0], w, w_stride, rows, 0, width);
    x.fetch(0, buffers.x[0]);
    commit_copies();
    x.put(0, buffers.x[0]);
    for (int step = 0; step < steps; ++step) {
        const int now = step % 2;
        wait_copies<0>();
        __syncthreads();
        if (step + 1 < steps) {
            load_step<E, kWide, kTileColumns>(buffers.w[1 - now], w, w_stride, rows, (step + 1) * kValuesAStep, width);
            x.fetch(step + 1, buffers.x[1 - now]);
            commit_copies();
        }
        sums.multiply(x.at(step, buffers.x[now]), x.stride(), buffers.w[now]);
        if (step + 1 < steps) {
            x.put(step + 1, buffers.x[1 - now]);
        }
    }
    __syncthreads();
}

}  // namespace fv
