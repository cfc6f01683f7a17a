// head_norm.cu - LayerNorm over every head of the queries or of the keys, in place.
//
// Maths:   x = (x - mean(x))/sqrt(var(x) + eps)*weight + bias over the D values of each head. Sums in f32; mean first, then
//          squared distances from it, as norm.cu.
// Shapes:  x (B, N, H*D), one part of packed rows: last axis contiguous, other strides in elements;  weight, bias (D).
// Launch:  grid ceil(B*N*H*lanes/256), block 256; lanes a head: the power of two that holds D in one access each, so that a
//          warp has neighbouring heads; a warp a head where rows are not aligned to 16 bytes. D from 1 to 128.
// Cost:    reads and writes each value of the part once, 2*B*N*H*D elements, and weight and bias once: about 8 f32 operations
//          an element, bound by memory. Heads of 40, 48, 72, 80 or 96 values leave a quarter or more of the lanes idle, which
//          costs issue slots, not bytes.

#include <cstddef>

#include "divide.cuh"
#include "element.cuh"
#include "reduce.cuh"

namespace {

constexpr int kThreads = 256;

struct HeadNormParams {
    void* x;             // (B, N, H*D)
    const void* weight;  // (D)
    const void* bias;    // (D) or null
    int64_t batch_stride, token_stride;
    fv::Divisor heads;   // H
    fv::Divisor tokens;  // N
    int32_t rows;        // B*N*H
    int32_t width;       // D
    float eps;
    int32_t reserved;
};
static_assert(sizeof(HeadNormParams) == 80 && offsetof(HeadNormParams, batch_stride) == 24 &&
                  offsetof(HeadNormParams, heads) == 40 && offsetof(HeadNormParams, rows) == 64,
              "the launcher's layout");

template <class E, int kWidest, bool kWide>
__device__ __forceinline__ void normalise_heads(const HeadNormParams& p) {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    constexpr int kStep = A::kElements;
    constexpr int kLanes = kWide ? kWidest / kStep : fv::kWarp;
    constexpr int kAccesses = kWidest / (kLanes * kStep);
    constexpr int kValues = kAccesses * kStep;
    static_assert(kLanes <= fv::kWarp && kLanes * kValues == kWidest, "one warp or less a head");

    const int row = static_cast<int>(blockIdx.x) * (kThreads / kLanes) + static_cast<int>(threadIdx.x) / kLanes;
    const int first = static_cast<int>(threadIdx.x) % kLanes * kStep;
    // Lanes past the last head stay for the shuffles.
    const int width = row < p.rows ? p.width : 0;
    const int token_row = p.heads.quotient(row);
    const int head = p.heads.remainder(row, token_row);
    const int64_t image = p.tokens.quotient(token_row);
    const int64_t token = p.tokens.remainder(token_row, static_cast<int>(image));
    Storage* x = static_cast<Storage*>(p.x) + image * p.batch_stride + token * p.token_stride +
                 static_cast<int64_t>(head) * p.width + first;
    const auto within = [&](int i) { return first + i * kLanes * kStep < width; };

    float v[kValues];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
            v[i * kStep + j] = 0.0f;
        }
        if (within(i)) {
            A::widen(A::load(x + i * kLanes * kStep), v + i * kStep);
        }
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
            sum += v[i * kStep + j];
        }
    }
    const float count = static_cast<float>(p.width);
    const float mean = __fdiv_rn(fv::group_sum<kLanes>(sum), count);
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
        if (within(i)) {
#pragma unroll
            for (int j = 0; j < kStep; ++j) {
                const float distance = v[i * kStep + j] - mean;
                squares = __fmaf_rn(distance, distance, squares);
            }
        }
    }
    const float variance = __fdiv_rn(fv::group_sum<kLanes>(squares), count);
    const float scale = __frcp_rn(__fsqrt_rn(variance + p.eps));
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
        if (within(i)) {
            const int column = first + i * kLanes * kStep;
            float w[kStep], b[kStep], y[kStep];
            A::widen(A::load_constant(static_cast<const Storage*>(p.weight) + column), w);
#pragma unroll
            for (int j = 0; j < kStep; ++j) {
                b[j] = 0.0f;
            }
            if (p.bias != nullptr) {
                A::widen(A::load_constant(static_cast<const Storage*>(p.bias) + column), b);
            }
#pragma unroll
            for (int j = 0; j < kStep; ++j) {
                y[j] = __fmaf_rn((v[i * kStep + j] - mean) * scale, w[j], b[j]);
            }
            A::store(x + i * kLanes * kStep, A::narrow(y));
        }
    }
}

}  // namespace

#define FV_HEAD_NORM(NAME, E, WIDEST, WIDE)                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads, 4) NAME(const __grid_constant__ HeadNormParams p) { \
        normalise_heads<E, WIDEST, WIDE>(p);                                                             \
    }
#define FV_HEAD_NORM_OF(TYPE, E)                             \
    FV_HEAD_NORM(fv_head_norm_##TYPE##_32, E, 32, true)      \
    FV_HEAD_NORM(fv_head_norm_##TYPE##_64, E, 64, true)      \
    FV_HEAD_NORM(fv_head_norm_##TYPE##_128, E, 128, true)    \
    FV_HEAD_NORM(fv_head_norm_##TYPE##_narrow, E, 128, false)
FV_HEAD_NORM_OF(f32, fv::F32)
FV_HEAD_NORM_OF(f16, fv::F16)
FV_HEAD_NORM_OF(bf16, fv::Bf16)
