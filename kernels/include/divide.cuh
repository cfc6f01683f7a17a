// divide.cuh - division by numbers that the host knows: a multiplication and a shift.
#pragma once

#include <cstdint>

namespace fv {

// q = n/d for n in [0, 2^31): 2n*multiplier/2^(32 + shift), with shift = ceil(log2 d), multiplier = ceil(2^(31 + shift)/d)
// (Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994, theorem 4.2). src/cuda/launch.rs
// makes these.
struct Divisor {
    uint32_t multiplier;
    uint32_t shift;
    int32_t divisor;

    __device__ __forceinline__ int quotient(int n) const {
        return static_cast<int>(__umulhi(2u * static_cast<uint32_t>(n), multiplier) >> shift);
    }
    // n - q*d.
    __device__ __forceinline__ int remainder(int n, int q) const { return n - q * divisor; }
};

}  // namespace fv
