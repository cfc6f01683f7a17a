// activation.cuh - the nonlinearities of src/model's Activation, in f32.
#pragma once

namespace fv {

// x*sigmoid(a*x) without overflow: where e^(-a*x) is infinite, x/infinity is 0. __expf is within 2 + |x| and __fdividef within
// 2 units in the last place, and beyond 2^126 its quotient is 0, as it should be.
__device__ __forceinline__ float times_sigmoid(float x, float argument) { return __fdividef(x, 1.0f + __expf(-argument)); }

// Exact GELU: x/2*(1 + erf(x/sqrt(2))).
struct Gelu {
    static __device__ __forceinline__ float of(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
};

// The same for what is stored in 16 bits, in half the instructions: the upper tail Q(|x|) of the normal distribution as 2 to
// the power of a polynomial, without branches. Degree 8 fitted to log2 Q on [0, 5.5] for the least error of Q (minimax, 8e-9);
// beyond, it falls to -infinity. With ex2.approx the result is within 1.6e-7*|x|, where erff's is within 1.3e-7*|x|: both are
// far below the rounding to 16 bits, but f32 keeps erff.
struct GeluOfHalves {
    static __device__ __forceinline__ float of(float x) {
        const float t = fabsf(x);
        float power = -2.772047230e-6f;
        power = __fmaf_rn(power, t, 3.862072481e-5f);
        power = __fmaf_rn(power, t, -1.825475192e-4f);
        power = __fmaf_rn(power, t, -1.458703191e-4f);
        power = __fmaf_rn(power, t, 7.075471804e-3f);
        power = __fmaf_rn(power, t, -5.250502750e-2f);
        power = __fmaf_rn(power, t, -4.592049122e-1f);
        power = __fmaf_rn(power, t, -1.151105762f);
        power = __fmaf_rn(power, t, -1.0f);
        float tail;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(power));
        return x * (x > 0.0f ? 1.0f - tail : tail);
    }
};

// GELU's tanh approximation: (1 + tanh(u))/2 = sigmoid(2u).
struct GeluTanh {
    static __device__ __forceinline__ float of(float x) {
        const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
        return times_sigmoid(x, 2.0f * u);
    }
};

struct QuickGelu {
    static __device__ __forceinline__ float of(float x) { return times_sigmoid(x, 1.702f * x); }
};

struct Silu {
    static __device__ __forceinline__ float of(float x) { return times_sigmoid(x, x); }
};

// NaN and -0 stay as they are.
struct Relu {
    static __device__ __forceinline__ float of(float x) { return x < 0.0f ? 0.0f : x; }
};

}  // namespace fv
