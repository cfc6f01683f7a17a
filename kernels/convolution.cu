// convolution.cu - 3x3 convolutions of feature maps whose channels are contiguous: each channel by itself, and dense.
//
// Maths:   out[y, x, c] = act(bias[c] + sum over 3x3 of w[ky, kx, c]*before(in[S*y + ky - 1, S*x + kx - 1, c])), 0 outside;
//          dense: the sum also goes over the input channels i, with w[ky, kx, i, c]. Stride S 1 or 2. Sums in f32.
// Shapes:  in (B, H*W, C or I), out (B, H'*W', C or O), last axis contiguous, other strides in elements, H' = ceil(H/S);  w
//          (9, C) or (9*I, O), bias (C) or (O).
// Launch:  a thread has 8 bytes of channels (one where rows are not aligned), of a strip of 2 rows and 8 columns (depthwise) or of one
//          position (dense): grid ceil(items/256), block 256, fewer than 2^31 items.
// Cost:    moves in and out once from memory. Depthwise: a thread goes along its strip and keeps the two output columns that
//          are not finished, so it reads 4*10 values for 16 outputs (stride 2: 5*17), from cache after the first, and weights
//          from cache; 9 multiply-adds an output, and `before` (the activation of the layer in front, which saves that layer a
//          pass of its own) 2.5 times: bound by memory. Dense: 9*I multiply-adds an output.

#include <cstddef>

#include "activation.cuh"
#include "divide.cuh"
#include "element.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kStripRows = 2;
constexpr int kStripColumns = 8;

// 0 nothing, 1 SiLU, 2 ReLU, 3 GELU.
__device__ __forceinline__ float activated(int kind, float x) {
    switch (kind) {
        case 1: return fv::Silu::of(x);
        case 2: return fv::Relu::of(x);
        case 3: return fv::Gelu::of(x);
        default: return x;
    }
}

struct ConvolutionParams {
    const void* x;
    const void* weight;
    const void* bias;
    void* out;
    int64_t x_batch_stride, x_token_stride;
    int64_t out_batch_stride, out_token_stride;
    fv::Divisor units;    // groups of channels of the output
    fv::Divisor columns;  // strips a row, or output columns
    fv::Divisor rows;     // strips a column, or output rows
    int32_t items;
    int32_t height, width;          // of x
    int32_t out_height, out_width;
    int32_t inputs, outputs;  // channels; equal where each is by itself
    int32_t stride;
    int32_t before, after;  // activations
    int32_t reserved;
};
static_assert(sizeof(ConvolutionParams) == 144 && offsetof(ConvolutionParams, x_batch_stride) == 32 &&
                  offsetof(ConvolutionParams, units) == 64 && offsetof(ConvolutionParams, items) == 100,
              "the launcher's layout");

// The channels of one access of 8 bytes, or one. With 16 bytes of f32 the strips' weights and sums do not fit 64 registers.
template <class E, bool kWide>
struct Channels {
    using Storage = typename E::Storage;
    static constexpr int kCount = kWide ? 2 * E::kPerWord : 1;

    static __device__ __forceinline__ void load(const Storage* at, float (&v)[kCount]) {
        if constexpr (kWide) {
            const uint2 raw = __ldg(reinterpret_cast<const uint2*>(at));
            E::widen_word(raw.x, v);
            E::widen_word(raw.y, v + E::kPerWord);
        } else {
            v[0] = E::widen(__ldg(at));
        }
    }
    static __device__ __forceinline__ void store(Storage* at, const float (&v)[kCount]) {
        if constexpr (kWide) {
            *reinterpret_cast<uint2*>(at) = make_uint2(E::narrow_word(v), E::narrow_word(v + E::kPerWord));
        } else {
            *at = E::narrow(v[0]);
        }
    }
};

struct Item {
    int channel, column, row;
    int64_t image;
};

__device__ __forceinline__ Item locate(const ConvolutionParams& p, int item, int channels) {
    const int rest = p.units.quotient(item);
    const int row = p.columns.quotient(rest);
    const int image = p.rows.quotient(row);
    return {p.units.remainder(item, rest) * channels, p.columns.remainder(rest, row), p.rows.remainder(row, image), image};
}

template <class E, bool kWide, int kStride>
__device__ __forceinline__ void depthwise(const ConvolutionParams& p) {
    using V = Channels<E, kWide>;
    using Storage = typename E::Storage;
    constexpr int kCount = V::kCount;
    constexpr int kRows = kStride * (kStripRows - 1) + 3;  // input rows of a strip
    const int item = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (item >= p.items) {
        return;
    }
    const Item at = locate(p, item, kCount);
    const int first_row = at.row * kStripRows;           // [0, H')
    const int first_column = at.column * kStripColumns;  // [0, W')
    const int last_column = min(first_column + kStripColumns, p.out_width);
    const Storage* x = static_cast<const Storage*>(p.x) + at.image * p.x_batch_stride + at.channel;
    Storage* out = static_cast<Storage*>(p.out) + at.image * p.out_batch_stride + at.channel;
    const Storage* weight = static_cast<const Storage*>(p.weight) + at.channel;
    float bias[kCount];
    V::load(static_cast<const Storage*>(p.bias) + at.channel, bias);

    // Output columns of which a tap or two are missing: `ready` lacks what the current input column gives first.
    float ready[kStripRows][kCount], open[kStripRows][kCount];
#pragma unroll
    for (int r = 0; r < kStripRows; ++r) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
            ready[r][c] = bias[c];
            open[r][c] = bias[c];
        }
    }
    // An input column joins the outputs: `tap` is its place in the kernel for `to`.
    const auto join = [&](float (&to)[kStripRows][kCount], const float (&v)[kCount], int row, int tap) {
#pragma unroll
        for (int r = 0; r < kStripRows; ++r) {
            const int kernel_row = row - kStride * r;
            if (kernel_row >= 0 && kernel_row < 3) {
                float w[kCount];
                V::load(weight + (kernel_row * 3 + tap) * p.outputs, w);
#pragma unroll
                for (int c = 0; c < kCount; ++c) {
                    to[r][c] = __fmaf_rn(w[c], v[c], to[r][c]);
                }
            }
        }
    };
    const auto read = [&](int row, int column, float (&v)[kCount]) {
        const int y = kStride * first_row + row - 1;
        if (y < 0 || y >= p.height || column < 0 || column >= p.width) {
            return false;
        }
        V::load(x + (static_cast<int64_t>(y) * p.width + column) * p.x_token_stride, v);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
            v[c] = activated(p.before, v[c]);
        }
        return true;
    };
    const auto write = [&](int column, const float (&from)[kStripRows][kCount]) {
#pragma unroll
        for (int r = 0; r < kStripRows; ++r) {
            if (first_row + r < p.out_height) {
                float v[kCount];
#pragma unroll
                for (int c = 0; c < kCount; ++c) {
                    v[c] = activated(p.after, from[r][c]);
                }
                V::store(out + (static_cast<int64_t>(first_row + r) * p.out_width + column) * p.out_token_stride, v);
            }
        }
    };
    if constexpr (kStride == 1) {
        // Input column k finishes output k - 1, is the middle of k and begins k + 1.
#pragma unroll 1
        for (int column = first_column - 1; column <= last_column; ++column) {
            float next[kStripRows][kCount];
#pragma unroll
            for (int r = 0; r < kStripRows; ++r) {
#pragma unroll
                for (int c = 0; c < kCount; ++c) {
                    next[r][c] = bias[c];
                }
            }
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                float v[kCount];
                if (read(row, column, v)) {
                    join(ready, v, row, 2);
                    join(open, v, row, 1);
                    join(next, v, row, 0);
                }
            }
            if (column > first_column) {
                write(column - 1, ready);
            }
#pragma unroll
            for (int r = 0; r < kStripRows; ++r) {
#pragma unroll
                for (int c = 0; c < kCount; ++c) {
                    ready[r][c] = open[r][c];
                    open[r][c] = next[r][c];
                }
            }
        }
    } else {
        // Input column 2k is the middle of output k, 2k + 1 finishes it and begins the next.
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            float v[kCount];
            if (read(row, 2 * first_column - 1, v)) {
                join(ready, v, row, 0);
            }
        }
#pragma unroll 1
        for (int column = first_column; column < last_column; ++column) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                float v[kCount];
                if (read(row, 2 * column, v)) {
                    join(ready, v, row, 1);
                }
                if (read(row, 2 * column + 1, v)) {
                    join(ready, v, row, 2);
                    join(open, v, row, 0);
                }
            }
            write(column, ready);
#pragma unroll
            for (int r = 0; r < kStripRows; ++r) {
#pragma unroll
                for (int c = 0; c < kCount; ++c) {
                    ready[r][c] = open[r][c];
                    open[r][c] = bias[c];
                }
            }
        }
    }
}

template <class E, bool kWide>
__device__ __forceinline__ void dense(const ConvolutionParams& p) {
    using V = Channels<E, kWide>;
    using Storage = typename E::Storage;
    constexpr int kCount = V::kCount;
    const int item = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (item >= p.items) {
        return;
    }
    const Item at = locate(p, item, kCount);
    const Storage* x = static_cast<const Storage*>(p.x) + at.image * p.x_batch_stride;
    const Storage* weight = static_cast<const Storage*>(p.weight) + at.channel;
    float sum[kCount];
    V::load(static_cast<const Storage*>(p.bias) + at.channel, sum);
    for (int tap = 0; tap < 9; ++tap) {
        const int y = p.stride * at.row + tap / 3 - 1;
        const int column = p.stride * at.column + tap % 3 - 1;
        if (y < 0 || y >= p.height || column < 0 || column >= p.width) {
            continue;
        }
        const Storage* from = x + (static_cast<int64_t>(y) * p.width + column) * p.x_token_stride;
        for (int input = 0; input < p.inputs; ++input) {
            const float v = E::widen(__ldg(from + input));
            float w[kCount];
            V::load(weight + static_cast<int64_t>(tap * p.inputs + input) * p.outputs, w);
#pragma unroll
            for (int c = 0; c < kCount; ++c) {
                sum[c] = __fmaf_rn(w[c], v, sum[c]);
            }
        }
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
        sum[c] = activated(p.after, sum[c]);
    }
    Storage* out = static_cast<Storage*>(p.out) + at.image * p.out_batch_stride + at.channel;
    V::store(out + (static_cast<int64_t>(at.row) * p.out_width + at.column) * p.out_token_stride, sum);
}

}  // namespace

#define FV_CONVOLUTION(NAME, BLOCKS, BODY)                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) NAME(const __grid_constant__ ConvolutionParams p) { \
        BODY(p);                                                                                               \
    }
#define FV_CONVOLUTIONS_OF(TYPE, E, SUFFIX, WIDE)                                  \
    FV_CONVOLUTION(fv_depthwise_##TYPE##SUFFIX, 2, (depthwise<E, WIDE, 1>))           \
    FV_CONVOLUTION(fv_depthwise_halving_##TYPE##SUFFIX, 2, (depthwise<E, WIDE, 2>))   \
    FV_CONVOLUTION(fv_convolution_##TYPE##SUFFIX, 4, (dense<E, WIDE>))
#define FV_CONVOLUTIONS(TYPE, E)                    \
    FV_CONVOLUTIONS_OF(TYPE, E, , true)             \
    FV_CONVOLUTIONS_OF(TYPE, E, _narrow, false)
FV_CONVOLUTIONS(f32, fv::F32)
FV_CONVOLUTIONS(f16, fv::F16)
FV_CONVOLUTIONS(bf16, fv::Bf16)
