// fourier_mma.cuh - transforms of up to 16 values, and of twice as many, as products with their matrix on tensor cores.
//
// A line of n complex values is a row of 2n real ones, its transform the product with the real (2n, 2n) matrix of turns; sixteen
// lines are one m16n8k16 tile high. A length of 2n takes a butterfly of radix 2 in registers before (inverse: behind) two
// products. Every f32 is the sum of two bf16, high and low, which keep 16 of its bits and its range: nothing overflows that does not
// in f32. All four products of these halves are taken: low*low is the largest of the errors left otherwise.
//
// Products do not care how k and columns are numbered. Lane 4g + t of a fragment has line g and values 4t to 4t + 3, so that neither
// along the rows, where lines lie an odd number of values apart, nor along the columns two lanes meet in a bank.
#pragma once

#include <cstdint>

#include "fourier.cuh"
#include "mma.cuh"

namespace fv {

// The sum of two bf16, next to each other with those of another value.
struct Split {
    uint32_t high, low;
};

__device__ __forceinline__ Split split_bf16(float2 v) {
    Split s;
    const float whole[2] = {v.x, v.y};
    float high[2];
    s.high = Bf16::narrow_word(whole);
    Bf16::widen_word(s.high, high);
    const float rest[2] = {v.x - high[0], v.y - high[1]};
    s.low = Bf16::narrow_word(rest);
    return s;
}

// Units of a matrix: two of sixteen k by four of eight columns, a lane's (b0, b1) of high and of low parts together.
constexpr int kMatrixUnits = 8;
constexpr int kMatrixWords = kMatrixUnits * 32;  // uint4

// The matrix for n = axis.base out of the turns of the whole length.
__device__ __forceinline__ void fill_matrix(uint4* matrix, const Axis& axis, const float2* turns) {
    const int n = axis.base;
    const int stride = axis.length == n ? 1 : 2;
    const int reciprocal = (65536 + n - 1) / n;
    for (int i = static_cast<int>(threadIdx.x); i < kMatrixWords; i += static_cast<int>(blockDim.x)) {
        const int lane = i % 32, unit = i / 32;
        const int first = lane % 4 * 4 + unit / 4 * 2, frequency = lane / 8 * 4 + unit % 4;
        Split b[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int value = first + r, turn = value * frequency;
            float2 w = make_float2(0.0f, 0.0f);
            if (value < n && frequency < n) {
                w = turns[(turn - (turn * reciprocal >> 16) * n) * stride];
            }
            // What the parts of a value add to the real part of the sum, to its imaginary part.
            b[r] = split_bf16(lane / 4 % 2 == 0 ? make_float2(w.x, -w.y) : make_float2(w.y, w.x));
        }
        matrix[i] = make_uint4(b[0].high, b[1].high, b[0].low, b[1].low);
    }
}

// kHalves = 1: lines of n values; 2: of 2n, frequency k at place k%2*n + k/2, as radices 2 and n leave it. In place, without a
// factor; a warp has sixteen lines at a time. The caller has a barrier before and behind.
template <int kHalves, bool kInverse>
__device__ __noinline__ void transform_lines(float2* planes, const Axis& axis, const uint4* matrix, const float2* turns) {
    const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
    const int n = axis.base, step = axis.step, first = 4 * t * step, half_step = n * step;
    const int tiles = (axis.lines + 15) / 16, warps = static_cast<int>(blockDim.x) / 32;
    for (int tile = static_cast<int>(threadIdx.x) / 32; tile < tiles; tile += warps) {
        const int line = tile * 16 + lane / 4;
        // Lines beyond the last are read as the last and not written.
        float2* at[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            at[r] = planes + axis.start(min(line + 8 * r, axis.lines - 1)) + first;
        }
        uint32_t high[kHalves][2][4], low[kHalves][2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int value = 4 * t + i;
            const bool real = value < n;
            const float2 turn = kHalves == 2 && !kInverse && real ? turns[value] : make_float2(0.0f, 0.0f);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float2 v[kHalves];
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    v[half] = real ? at[r][i * step + half * half_step] : make_float2(0.0f, 0.0f);
                    v[half] = kInverse ? swapped(v[half]) : v[half];
                }
                if constexpr (kHalves == 2 && !kInverse) {
                    const float2 sum = v[0] + v[1];
                    v[1] = times(v[0] - v[1], turn);
                    v[0] = sum;
                }
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    const Split s = split_bf16(v[half]);
                    high[half][i / 2][i % 2 * 2 + r] = s.high;
                    low[half][i / 2][i % 2 * 2 + r] = s.low;
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum[kHalves][4];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const uint4 b = matrix[(k * 4 + i) * 32 + lane];
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    if (k == 0) {
                        mma_first<Bf16>(sum[half], high[half][k], b.x, b.y);
                    } else {
                        mma<Bf16>(sum[half], high[half][k], b.x, b.y);
                    }
                    mma<Bf16>(sum[half], low[half][k], b.x, b.y);
                    mma<Bf16>(sum[half], high[half][k], b.z, b.w);
                    mma<Bf16>(sum[half], low[half][k], b.z, b.w);
                }
            }
            const int value = 4 * t + i;
            const float2 turn = kHalves == 2 && kInverse && value < n ? turns[value] : make_float2(0.0f, 0.0f);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float2 v[kHalves];
#pragma unroll
                for (int half = 0; half < kHalves; ++half) {
                    v[half] = make_float2(sum[half][2 * r], sum[half][2 * r + 1]);
                }
                if constexpr (kHalves == 2 && kInverse) {
                    const float2 turned = times(v[1], turn);
                    v[1] = v[0] - turned;
                    v[0] = v[0] + turned;
                }
                if (value < n && line + 8 * r < axis.lines) {
#pragma unroll
                    for (int half = 0; half < kHalves; ++half) {
                        at[r][i * step + half * half_step] = kInverse ? swapped(v[half]) : v[half];
                    }
                }
            }
        }
    }
}

// Along one axis, by products where the axis has a base, else by butterflies. Ends in a barrier; the caller has one before it.
template <bool kInverse>
__device__ __forceinline__ void transform_axis_mma(float2* planes, const Axis& axis, const uint4* matrix, const float2* turns,
                                                   float2* scratch, int capacity) {
    if (axis.base == 0) {
        transform_axis<kInverse>(planes, axis, turns, scratch, capacity);
        return;
    }
    if (axis.length == axis.base) {
        transform_lines<1, kInverse>(planes, axis, matrix, turns);
    } else {
        transform_lines<2, kInverse>(planes, axis, matrix, turns);
    }
    __syncthreads();
}

}  // namespace fv
