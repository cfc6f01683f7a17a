// convert.cu - values from one storage type to another, where a residual stream of f32 meets what takes halves.
//
// Maths:   out = x, rounded to nearest even where out is the narrower one.
// Shapes:  x, out: n values each, without gaps; they do not overlap.
// Launch:  grid ceil(n/8/256), block 256, 8 values a lane; n below 2^34. Pointers aligned to 16 bytes.
// Cost:    6 bytes a value, 4 conversions' worth of instructions an access: memory bound.

#include <cstddef>

#include "element.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kValues = 8;

struct ConvertParams {
    const void* x;
    void* out;
    int64_t values;
};
static_assert(sizeof(ConvertParams) == 24 && offsetof(ConvertParams, values) == 16, "the launcher's layout");

template <class From, class To>
__device__ __forceinline__ void convert(const ConvertParams& p) {
    using X = fv::Access<From, true>;
    using Y = fv::Access<To, true>;
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) * kValues;
    const auto* x = static_cast<const typename From::Storage*>(p.x) + at;
    auto* out = static_cast<typename To::Storage*>(p.out) + at;
    if (at + kValues <= p.values) {
        float v[kValues];
#pragma unroll
        for (int i = 0; i < kValues; i += X::kElements) {
            X::widen(X::load_constant(x + i), v + i);
        }
#pragma unroll
        for (int i = 0; i < kValues; i += Y::kElements) {
            Y::store(out + i, Y::narrow(v + i));
        }
        return;
    }
    for (int i = 0; i < p.values - at; ++i) {
        out[i] = To::narrow(From::widen(x[i]));
    }
}

}  // namespace

#define FV_CONVERT(FROM, F, TO, T)                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, 4)                              \
        fv_convert_##FROM##_##TO(const __grid_constant__ ConvertParams p) {                \
        convert<F, T>(p);                                                                  \
    }
FV_CONVERT(f32, fv::F32, f16, fv::F16)
FV_CONVERT(f32, fv::F32, bf16, fv::Bf16)
FV_CONVERT(f16, fv::F16, f32, fv::F32)
FV_CONVERT(bf16, fv::Bf16, f32, fv::F32)
