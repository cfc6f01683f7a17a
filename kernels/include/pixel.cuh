// pixel.cuh - 8-bit pixels as models take them.
#pragma once

#include <cstdint>

namespace fv {

// (byte/255 - mean)/std, every step rounded as IEEE 754 says.
__device__ __forceinline__ float normalised_byte(float byte, float mean, float std) {
    // 1/255 in two parts: the division's result for each of the 256 bytes.
    const float scaled = __fmaf_rn(byte, 0x1.010102p-8f, __fmul_rn(byte, -0x1.fdfdfep-33f));
    return __fdiv_rn(__fsub_rn(scaled, mean), std);
}

}  // namespace fv
