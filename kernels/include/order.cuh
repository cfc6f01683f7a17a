// order.cuh - the one rule of precedence: higher score first, NaN after every number, equal scores by ascending index.
#pragma once

#include <cstdint>

namespace fv {

// Below the key of every score: places that hold no token.
constexpr uint32_t kAbsent = 0;
constexpr uint32_t kNanKey = 1;

// Ascends with the score; -0 and +0 are one key, -inf has 0x007fffff and +inf 0xff800000, so adding 1 cannot overflow.
__device__ __forceinline__ uint32_t order_key(float score) {
    if (score != score) {
        return kNanKey;
    }
    // -0 + 0 = +0.
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The score that has this key.
__device__ __forceinline__ float score_of_key(uint32_t key) {
    if (key == kNanKey) {
        return __uint_as_float(0x7fffffffu);
    }
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

}  // namespace fv
