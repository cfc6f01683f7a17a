// fourier.cuh - complex transforms of any length up to 128 along the axes of planes in shared memory, in place.
//
// A length is a product of radices. The forward transform takes them in order (decimation in frequency) and leaves frequency
// k at place digits(k); the inverse takes them backwards and finds its input there, so that nothing is ever put in order. A
// thread holds one butterfly of radix 2, 3, 4, 5, 7 or 8; other primes are summed by definition, through scratch memory.
//
// Neighbouring lanes take neighbouring lines, which lie an odd number of values apart along the rows and side by side along
// the columns: no bank conflicts, whatever the radix.
#pragma once

#include <cstdint>

#include "divide.cuh"

namespace fv {

constexpr int kLongestAxis = 128;
constexpr int kMostRadices = 8;

// cos and sin of 2*pi*j/R.
template <int R>
__device__ __forceinline__ constexpr float unit_cos(int j) {
    constexpr float table[3][7] = {{1.0f, -0.5f, -0.5f},
                                   {1.0f, 0.309016994f, -0.809016994f, -0.809016994f, 0.309016994f},
                                   {1.0f, 0.623489802f, -0.222520934f, -0.900968868f, -0.900968868f, -0.222520934f,
                                    0.623489802f}};
    return table[(R - 3) / 2][j % R];
}

template <int R>
__device__ __forceinline__ constexpr float unit_sin(int j) {
    constexpr float table[3][7] = {{0.0f, 0.866025404f, -0.866025404f},
                                   {0.0f, 0.951056516f, 0.587785252f, -0.587785252f, -0.951056516f},
                                   {0.0f, 0.781831482f, 0.974927912f, 0.433883739f, -0.433883739f, -0.974927912f,
                                    -0.781831482f}};
    return table[(R - 3) / 2][j % R];
}

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 times(float2 a, float2 b) {
    return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}
// a * -i.
__device__ __forceinline__ float2 turned_back(float2 a) { return make_float2(a.y, -a.x); }
__device__ __forceinline__ float2 swapped(float2 a) { return make_float2(a.y, a.x); }

// v[k] becomes the sum of v[r]*exp(-2*pi*i*r*k/R).
template <int R>
__device__ __forceinline__ void butterfly(float2 (&v)[R]) {
    if constexpr (R == 2) {
        const float2 a = v[0];
        v[0] = a + v[1];
        v[1] = a - v[1];
    } else if constexpr (R == 4) {
        const float2 a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3], d = turned_back(v[1] - v[3]);
        v[0] = a + c;
        v[1] = b + d;
        v[2] = a - c;
        v[3] = b - d;
    } else if constexpr (R == 8) {
        constexpr float kHalfRoot = 0.707106781f;
        float2 even[4] = {v[0], v[2], v[4], v[6]}, odd[4] = {v[1], v[3], v[5], v[7]};
        butterfly<4>(even);
        butterfly<4>(odd);
        odd[1] = make_float2(kHalfRoot * (odd[1].x + odd[1].y), kHalfRoot * (odd[1].y - odd[1].x));
        odd[2] = turned_back(odd[2]);
        odd[3] = make_float2(kHalfRoot * (odd[3].y - odd[3].x), -kHalfRoot * (odd[3].x + odd[3].y));
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            v[k] = even[k] + odd[k];
            v[k + 4] = even[k] - odd[k];
        }
    } else {
        // Odd: the inputs r and R - r meet the same cosine and opposite sines.
        constexpr int kHalf = R / 2;
        float2 sum[kHalf], difference[kHalf];
        float2 all = v[0];
#pragma unroll
        for (int r = 0; r < kHalf; ++r) {
            sum[r] = v[r + 1] + v[R - 1 - r];
            difference[r] = turned_back(v[r + 1] - v[R - 1 - r]);
            all = all + sum[r];
        }
        const float2 first = v[0];
        v[0] = all;
#pragma unroll
        for (int k = 1; k <= kHalf; ++k) {
            float2 same = first, opposite = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int r = 0; r < kHalf; ++r) {
                const float cos = unit_cos<R>(k * (r + 1)), sin = unit_sin<R>(k * (r + 1));
                same.x = __fmaf_rn(cos, sum[r].x, same.x);
                same.y = __fmaf_rn(cos, sum[r].y, same.y);
                opposite.x = __fmaf_rn(sin, difference[r].x, opposite.x);
                opposite.y = __fmaf_rn(sin, difference[r].y, opposite.y);
            }
            v[k] = same + opposite;
            v[R - k] = same - opposite;
        }
    }
}

// An axis of the planes: where its lines begin, how far its values are apart, and how its length is taken apart.
struct Axis {
    int length;      // n
    int lines;       // of all planes
    Divisor count;   // divides by `lines`
    Divisor inner;   // divides by the lines of a plane
    int outer_step;  // from a plane's lines to the next plane's
    int inner_step;  // from line to line
    int step;        // from value to value
    int base;        // fourier_mma.cuh: the length its matrix is for, 0 for butterflies
    uint64_t radices;  // a byte each, 0 past the last one

    __device__ __forceinline__ int radix(int at) const { return static_cast<int>(radices >> (8 * at)) & 0xff; }
    __device__ __forceinline__ int start(int line) const {
        const int plane = inner.quotient(line);
        return plane * outer_step + inner.remainder(line, plane) * inner_step;
    }
    // The place of frequency k after the forward transform.
    __device__ __forceinline__ int place(int k) const {
        int block = length, at = 0;
        for (int i = 0; i < kMostRadices && radix(i) != 0; ++i) {
            block /= radix(i);
            at += k % radix(i) * block;
            k /= radix(i);
        }
        return at;
    }
};

// One pass over an axis: butterflies over blocks of `block` values, `span` = block/R apart. `turns` holds exp(-2*pi*i*j/n).
// The inverse is the forward transform of values whose parts are swapped, step by step the other way round.
template <int R, bool kInverse>
__device__ __forceinline__ void fourier_pass(float2* planes, const Axis& axis, int block, const float2* turns) {
    const int span = block / R;
    // j/span for j below 128: the product with the reciprocal's ceiling is off by less than 128*127.
    const int reciprocal = (65536 + span - 1) / span;
    const int turn = axis.length / block;
    const int items = axis.lines * (axis.length / R);
    for (int item = static_cast<int>(threadIdx.x); item < items; item += static_cast<int>(blockDim.x)) {
        const int index = axis.count.quotient(item);                  // [0, n/R)
        const int line = axis.count.remainder(item, index);           // [0, lines)
        const int quotient = (index * reciprocal) >> 16;              // which block
        const int j = index - quotient * span;                        // [0, span)
        float2* at = planes + axis.start(line) + (quotient * block + j) * axis.step;
        const int step = span * axis.step;
        float2 v[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            v[r] = at[r * step];
            if constexpr (kInverse) {
                v[r] = swapped(v[r]);
                v[r] = r == 0 || span == 1 ? v[r] : times(v[r], turns[j * r * turn]);
            }
        }
        butterfly<R>(v);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if constexpr (kInverse) {
                at[r * step] = swapped(v[r]);
            } else {
                at[r * step] = r == 0 || span == 1 ? v[r] : times(v[r], turns[j * r * turn]);
            }
        }
    }
}

// The same for any radix, by definition: inputs are copied to `scratch` (room for `capacity` values, at least R).
template <bool kInverse>
__device__ __noinline__ void fourier_pass_by_definition(float2* planes, const Axis& axis, int radix, int block,
                                                        const float2* turns, float2* scratch, int capacity) {
    const int span = block / radix;
    const int turn = axis.length / block;
    const int step = span * axis.step;
    const int butterflies = axis.lines * (axis.length / radix);
    const int together = capacity / radix;
    const int threads = static_cast<int>(blockDim.x);
    const auto locate = [&](int which, int& j) {
        const int index = axis.count.quotient(which);
        j = index % span;
        return axis.start(axis.count.remainder(which, index)) + (index / span * block + j) * axis.step;
    };
    for (int first = 0; first < butterflies; first += together) {
        const int items = min(together, butterflies - first) * radix;
        for (int item = static_cast<int>(threadIdx.x); item < items; item += threads) {
            int j;
            const int at = locate(first + item / radix, j);
            const int r = item % radix;
            float2 v = planes[at + r * step];
            if constexpr (kInverse) {
                v = times(swapped(v), turns[j * r * turn]);
            }
            scratch[item] = v;
        }
        __syncthreads();
        for (int item = static_cast<int>(threadIdx.x); item < items; item += threads) {
            int j;
            const int at = locate(first + item / radix, j);
            const int k = item % radix;
            const float2* inputs = scratch + item - k;
            float2 sum = make_float2(0.0f, 0.0f);
            for (int r = 0; r < radix; ++r) {
                sum = sum + times(inputs[r], turns[r * k % radix * (axis.length / radix)]);
            }
            planes[at + k * step] = kInverse ? swapped(sum) : times(sum, turns[j * k * turn]);
        }
        __syncthreads();
    }
}

template <bool kInverse>
__device__ __forceinline__ void fourier_pass_of(int radix, float2* planes, const Axis& axis, int block, const float2* turns,
                                                float2* scratch, int capacity) {
    switch (radix) {
        case 2: fourier_pass<2, kInverse>(planes, axis, block, turns); break;
        case 3: fourier_pass<3, kInverse>(planes, axis, block, turns); break;
        case 4: fourier_pass<4, kInverse>(planes, axis, block, turns); break;
        case 5: fourier_pass<5, kInverse>(planes, axis, block, turns); break;
        case 7: fourier_pass<7, kInverse>(planes, axis, block, turns); break;
        case 8: fourier_pass<8, kInverse>(planes, axis, block, turns); break;
        default:
            fourier_pass_by_definition<kInverse>(planes, axis, radix, block, turns, scratch, capacity);
            return;
    }
    __syncthreads();
}

// Along one axis, without a factor. Ends in a barrier; the caller has one before it.
template <bool kInverse>
__device__ __noinline__ void transform_axis(float2* planes, const Axis& axis, const float2* turns, float2* scratch,
                                            int capacity) {
    if constexpr (kInverse) {
        int block = 1;
        int last = 0;
        while (last < kMostRadices && axis.radix(last) != 0) {
            ++last;
        }
        for (int i = last - 1; i >= 0; --i) {
            block *= axis.radix(i);
            fourier_pass_of<true>(axis.radix(i), planes, axis, block, turns, scratch, capacity);
        }
    } else {
        int block = axis.length;
        for (int i = 0; i < kMostRadices && axis.radix(i) != 0; ++i) {
            fourier_pass_of<false>(axis.radix(i), planes, axis, block, turns, scratch, capacity);
            block /= axis.radix(i);
        }
    }
}

}  // namespace fv
