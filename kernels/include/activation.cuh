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
