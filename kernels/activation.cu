// activation.cu - the nonlinearities between the two layers of an MLP, where no product's epilogue computes them.
//
// Maths:   out = f(x), f as activation.cuh has it;  swiglu: out = silu(first half of x)*second half. f32 arithmetic.
// Shapes:  x, out (B, N, C), last axis contiguous, other strides in elements;  swiglu: x (B, N, 2C). `out` may be `x` (its
//          first half) with the same strides: a lane writes only what it alone reads, and reads before it writes.
// Launch:  grid ceil(B*N*accesses a row/256), block 256, fewer than 2^31 accesses.
// Cost:    reads each value of x once and writes each of out once, 16 bytes a lane where rows allow: 2*B*N*C elements (swiglu
//          3). About 4 operations an element (relu), 8 (silu, quick_gelu), 12 (gelu_tanh), 30 (gelu in f32), 14 (gelu of
//          halves), beside 9 for the access: compute capability 8.0 has 50 for an f32 value that memory moves, 25 for a half.

#include <cstddef>

#include "activation.cuh"
#include "divide.cuh"
#include "element.cuh"

namespace {

constexpr int kThreads = 256;

struct ActivationParams {
    const void* x;  // (B, N, C) or (B, N, 2C)
    void* out;      // (B, N, C)
    int64_t x_batch_stride, x_token_stride;
    int64_t out_batch_stride, out_token_stride;
    fv::Divisor units;   // accesses a row of `out`
    fv::Divisor tokens;  // N
    int32_t items;
    int32_t width;  // C
};
static_assert(sizeof(ActivationParams) == 80 && offsetof(ActivationParams, x_batch_stride) == 16 &&
                  offsetof(ActivationParams, units) == 48 && offsetof(ActivationParams, items) == 72,
              "the launcher's layout");

template <class F, class E, bool kWide, bool kGate>
__device__ __forceinline__ void activate(const ActivationParams& p) {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    const int item = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (item >= p.items) {
        return;
    }
    const int row = p.units.quotient(item);
    const int column = p.units.remainder(item, row) * A::kElements;  // [0, C)
    const int image = p.tokens.quotient(row);
    const int token = p.tokens.remainder(row, image);
    const Storage* x = static_cast<const Storage*>(p.x) + image * p.x_batch_stride + token * p.x_token_stride + column;
    Storage* out = static_cast<Storage*>(p.out) + image * p.out_batch_stride + token * p.out_token_stride + column;
    float v[A::kElements];
    A::widen(A::load(x), v);
    float gate[A::kElements];
    if constexpr (kGate) {
        A::widen(A::load(x + p.width), gate);
    }
#pragma unroll
    for (int i = 0; i < A::kElements; ++i) {
        v[i] = F::of(v[i]);
        if constexpr (kGate) {
            v[i] *= gate[i];
        }
    }
    A::store(out, A::narrow(v));
}

}  // namespace

#define FV_ACTIVATION(NAME, F, E, WIDE, GATE)                                                                \
    extern "C" __global__ void __launch_bounds__(kThreads, 4) NAME(const __grid_constant__ ActivationParams p) { \
        activate<F, E, WIDE, GATE>(p);                                                                       \
    }
#define FV_ACTIVATION_OF(OP, F, GATE, TYPE, E)                           \
    FV_ACTIVATION(fv_##OP##_##TYPE, F, E, true, GATE)                    \
    FV_ACTIVATION(fv_##OP##_##TYPE##_narrow, F, E, false, GATE)
#define FV_ACTIVATIONS(TYPE, E, GELU)                            \
    FV_ACTIVATION_OF(gelu, GELU, false, TYPE, E)                 \
    FV_ACTIVATION_OF(gelu_tanh, fv::GeluTanh, false, TYPE, E)    \
    FV_ACTIVATION_OF(quick_gelu, fv::QuickGelu, false, TYPE, E)  \
    FV_ACTIVATION_OF(silu, fv::Silu, false, TYPE, E)             \
    FV_ACTIVATION_OF(relu, fv::Relu, false, TYPE, E)             \
    FV_ACTIVATION_OF(swiglu, fv::Silu, true, TYPE, E)
FV_ACTIVATIONS(f32, fv::F32, fv::Gelu)
FV_ACTIVATIONS(f16, fv::F16, fv::GeluOfHalves)
FV_ACTIVATIONS(bf16, fv::Bf16, fv::GeluOfHalves)
