// column.cuh - weighted sums down the columns of rows in memory, in an order that depends on nothing but their number.
//
// A block of 256 threads has the columns of 128 bytes (32 where accesses are narrow). Its threads are lanes over neighbouring
// columns times 32 (8) rows; each sums every 32nd (8th) row, then the lanes of a warp and the warps are added in order. Small
// segments of columns make enough blocks for one image.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "reduce.cuh"

namespace fv {

constexpr int kColumnThreads = 256;
constexpr int kColumnWarps = kColumnThreads / kWarp;

template <class E, bool kWide>
struct Columns {
    using Storage = typename E::Storage;
    using A = Access<E, kWide>;
    static constexpr int kStep = A::kElements;
    static constexpr int kLanes = kWide ? 8 : kWarp;
    static constexpr int kRows = kColumnThreads / kLanes;
    static constexpr int kColumns = kLanes * kStep;

    // One place in 33 stays empty: lanes four apart would meet in a bank.
    static constexpr int kPlaces = kColumns + kColumns / kWarp;
    static __device__ __forceinline__ int place(int column) { return column + column / kWarp; }
    struct Scratch {
        float sums[kColumnWarps][kPlaces];
        float totals[kColumnWarps];
    };

    struct Sum {
        float values;   // weight*x over the rows, of column threadIdx.x; of the first kColumns threads
        float weights;  // the weights, or how many rows there are
    };

    // `x`: the first row at the block's first column, of which `width` remain. By all threads.
    static __device__ __forceinline__ Sum sum(const Storage* x, int64_t stride, int rows, int width, const float* weights,
                                              Scratch& scratch) {
        const int lane = static_cast<int>(threadIdx.x) % kLanes;
        const int first = static_cast<int>(threadIdx.x) / kLanes;  // [0, kRows)
        float sums[kStep];
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
            sums[j] = 0.0f;
        }
        float total = 0.0f;
        if (lane * kStep < width) {
            const Storage* at = x + lane * kStep;
#pragma unroll 4
            for (int row = first; row < rows; row += kRows) {
                float v[kStep];
                A::widen(A::load_constant(at + row * stride), v);
                const float weight = weights == nullptr ? 1.0f : __ldg(weights + row);
#pragma unroll
                for (int j = 0; j < kStep; ++j) {
                    sums[j] = __fmaf_rn(weight, v[j], sums[j]);
                }
                total += weight;
            }
        }
#pragma unroll
        for (int offset = kLanes; offset < kWarp; offset *= 2) {
#pragma unroll
            for (int j = 0; j < kStep; ++j) {
                sums[j] += __shfl_xor_sync(kFullWarp, sums[j], offset);
            }
            total += __shfl_xor_sync(kFullWarp, total, offset);
        }
        if (lane_id() < kLanes) {
#pragma unroll
            for (int j = 0; j < kStep; ++j) {
                scratch.sums[warp_id()][place(lane * kStep + j)] = sums[j];
            }
        }
        // Lane 0 has a column whatever the width.
        if (lane_id() == 0) {
            scratch.totals[warp_id()] = total;
        }
        __syncthreads();
        Sum sum = {0.0f, 0.0f};
        if (static_cast<int>(threadIdx.x) < kColumns) {
#pragma unroll
            for (int warp = 0; warp < kColumnWarps; ++warp) {
                sum.values += scratch.sums[warp][place(static_cast<int>(threadIdx.x))];
                sum.weights += scratch.totals[warp];
            }
        }
        return sum;
    }
};

}  // namespace fv
