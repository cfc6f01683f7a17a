// sort.cuh - places of tokens by precedence (order.cuh): counted for few, sorted for many.
#pragma once

#include <cstdint>

#include "order.cuh"
#include "reduce.cuh"

namespace fv {

// A place of the sort that holds no token; larger than every token.
constexpr uint16_t kNoToken = 0xffff;

// How many of `keys` precede `key` of `index`, for all lanes of a warp together: lane l asks for index first + l, `first` a
// multiple of 32. `keys`: 16-byte aligned, `padded` of them, a multiple of 32, kAbsent where there is no token.
// Equal keys precede where their index is lower: in the indices below this warp's by >=, above by >. Four keys a load, the
// same for all lanes.
__device__ __forceinline__ int rank_among(const uint32_t* keys, int padded, int first, uint32_t key) {
    const int index = first + lane_id();
    int rank = 0;
    for (int j = 0; j < first; j += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(keys + j);
        rank += (four.x >= key) + (four.y >= key) + (four.z >= key) + (four.w >= key);
    }
    for (int j = first; j < first + kWarp; j += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(keys + j);
        rank += (four.x + (j < index) > key) + (four.y + (j + 1 < index) > key) + (four.z + (j + 2 < index) > key) +
                (four.w + (j + 3 < index) > key);
    }
    for (int j = first + kWarp; j < padded; j += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(keys + j);
        rank += (four.x > key) + (four.y > key) + (four.z > key) + (four.w > key);
    }
    return rank;
}

// A bitonic network over (key, token) in shared memory: `places`, a power of two, in order of precedence afterwards; places
// without a token hold (kAbsent, kNoToken). By all threads of a block; ends in a barrier.
__device__ __forceinline__ void sort_places(uint32_t* keys, uint16_t* tokens, int places) {
    const int threads = static_cast<int>(blockDim.x);
    for (int run = 2; run <= places; run *= 2) {
        for (int stride = run / 2; stride > 0; stride /= 2) {
            for (int pair = static_cast<int>(threadIdx.x); pair < places / 2; pair += threads) {
                const int low = 2 * pair - (pair & (stride - 1));
                const int high = low + stride;
                const uint32_t low_key = keys[low];
                const uint32_t high_key = keys[high];
                const uint16_t low_token = tokens[low];
                const uint16_t high_token = tokens[high];
                const bool wrong = high_key > low_key || (high_key == low_key && high_token < low_token);
                // Runs alternate in direction until the last one; equal places hold no token and may change sides.
                if (wrong == ((low & run) == 0)) {
                    keys[low] = high_key;
                    keys[high] = low_key;
                    tokens[low] = high_token;
                    tokens[high] = low_token;
                }
            }
            // Up to stride 32 a warp's 32 pairs stay within the same 64 places from step to step.
            const int next = stride > 1 ? stride / 2 : run;
            if (stride <= kWarp && next <= kWarp) {
                __syncwarp();
            } else {
                __syncthreads();
            }
        }
    }
    __syncthreads();
}

}  // namespace fv
