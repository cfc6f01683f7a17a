// reduce.cuh - sums and scans over warps and blocks, in an order that depends on the launch shape alone.
#pragma once

#include <cstdint>

namespace fv {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1u; }

// The sum over groups of kLanes neighbouring lanes, a power of two; the same bits in every lane: each step adds the same two
// numbers on both sides. By the whole warp.
template <int kLanes>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(kFullWarp, x, offset);
    }
    return x;
}

__device__ __forceinline__ float warp_sum(float x) { return group_sum<kWarp>(x); }

// The maximum over a warp; NaN where all lanes have NaN.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
    }
    return x;
}

// The sum over a team of kWarps warps that share `partial`, which nobody else writes before the next block barrier.
// A team of several warps is the whole block: its members meet at a block barrier.
template <int kWarps>
__device__ __forceinline__ float team_sum(float x, float (&partial)[kWarps]) {
    x = warp_sum(x);
    if constexpr (kWarps > 1) {
        if (lane_id() == 0) {
            partial[warp_id()] = x;
        }
        __syncthreads();
        x = partial[0];
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) {
            x += partial[warp];
        }
    }
    return x;
}

// The maximum over a team, as team_sum.
template <int kWarps>
__device__ __forceinline__ float team_max(float x, float (&partial)[kWarps]) {
    x = warp_max(x);
    if constexpr (kWarps > 1) {
        if (lane_id() == 0) {
            partial[warp_id()] = x;
        }
        __syncthreads();
        x = partial[0];
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) {
            x = fmaxf(x, partial[warp]);
        }
    }
    return x;
}

__device__ __forceinline__ int warp_inclusive_scan(int x) {
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const int below = __shfl_up_sync(kFullWarp, x, offset);
        x += lane_id() >= offset ? below : 0;
    }
    return x;
}

struct Scan {
    int before;  // the sum over the threads below this one
    int total;   // the sum over the block
};

// The exclusive scan over a block of whole warps, at most 1,024 threads. Ends in a barrier: `totals` may be used again.
__device__ __forceinline__ Scan block_exclusive_scan(int x, int (&totals)[kWarp]) {
    const int inclusive = warp_inclusive_scan(x);
    if (lane_id() == kWarp - 1) {
        totals[warp_id()] = inclusive;
    }
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const int mine = lane_id() < warps ? totals[lane_id()] : 0;
    const int sums = warp_inclusive_scan(mine);
    const int before_warp = __shfl_sync(kFullWarp, sums - mine, warp_id());
    const int total = __shfl_sync(kFullWarp, sums, kWarp - 1);
    __syncthreads();
    return {before_warp + inclusive - x, total};
}

}  // namespace fv
