// frequency_mma.cu - the adaptive frequency filter of kernels/frequency.cu for 16-bit types, on tensor cores.
//
// Maths, shapes: as there. One launch, a group's spectrum in shared memory; S from 4 to 40. src/cuda/frequency/matrix.rs decides.
// Launch:  grid B*G, 128 or 256 threads.
// Numbers: weights are exact in one bf16 (bf16) or in two (f16). The spectrum, the hidden layer, the planes and the matrices of the
//          transforms are split into two bf16, which keep f32's range, so the mean of a map overflows no sooner than in f32. The
//          network takes 2 products a fragment (bf16) or 3 (f16), the transforms all 4. Beside the multiply-adds of f32 on the
//          same values that costs 1.1e-5 of the largest result at most (400 random shapes; half of them below 4.3e-6; 5e-7
//          where only the network takes products): a fortieth of the rounding to f16. One bf16 alone would leave 2^-9 of every value.
//          Two f16 keep six bits more, but a map's mean times sqrt(N) would have to be scaled into their range.
// Count:   a multiply-add instruction is 32 products, m16n8k16 is 2048; in the clocks of an A100's multiprocessor, 1/2 and 2
//          (H100: 1/4 and 1), tensor cores are 16 times as fast a product.
//          Network: bins*S*S/4 multiply-add instructions a group; for P = ceil(S/8), ceil(bins/16)*8*P*P m16n8k16 in bf16, 12 in
//          f16: 8,704 and 408 at S = 8, 32x32; 36,864 and 1,728 at S = 32, 16x16; 3,240 and 324 at S = 18, 8x8, where 18 is padded to
//          24 and 40 bins to 48. With the padding 5.3, 5.3 and 2.5 times fewer clocks of their pipe, half as many again in bf16.
//          Transforms of n = 9 to 16 values, or of twice as many: 32 or 64 m16n8k16 for 16 lines, and 2 f32 instructions for each
//          complex value of a lane (6 for twice as many) instead of 11 (15) in butterflies, and one pass of index arithmetic instead of
//          two. Wavefronts of shared memory are as many at 16, where the matrix is read as often as values, 30 % fewer at 32.
//          Without these, with network alone, with both, a group of AFFNet in f16 (warp instructions; wavefronts; f32):
//            S = 8,  32x32   74.7 k  45.5 k  37.0 k    14.9 k   9.4 k   6.5 k    21.4 k  12.4 k   7.9 k
//            S = 16, 32x32  162.1 k  88.1 k  71.9 k    44.5 k  20.8 k  14.9 k    61.1 k  24.7 k  15.6 k
//            S = 13, 16x16   53.5 k  35.3 k  30.2 k     9.3 k   4.8 k   4.2 k    13.2 k   5.2 k   3.0 k
//            S = 32, 16x16  128.8 k  52.8 k  42.7 k    37.1 k   9.9 k  10.0 k    54.4 k  11.0 k   6.1 k
//            S = 18, 8x8     18.4 k  11.8 k       -     3.2 k   1.8 k       -     5.4 k   2.0 k       -
//            S = 40, 8x8     54.7 k  19.2 k       -    12.4 k   4.0 k       -    22.4 k   3.6 k       -
//          Transforms of 8 values stay butterflies: a radix of 8 is one pass; padded to 16 they took 28 % more instructions and
//          41 % more wavefronts (the whole kernel, S = 18); 7 pads more. 56 and 64 are two passes of radices 7 and 8 as they are, and
//          would be a pass of radix 4 and one of products: as many, not tried.
//          Tensor cores are busy three quarters as long as shared memory on an A100, three eighths on an H100.
//          What else is in these numbers: planes begin in different banks, and 4 to 16 bytes travel in an access.

#include "activation.cuh"
#include "element.cuh"
#include "fourier_mma.cuh"
#include "frequency.cuh"
#include "frequency_wide.cuh"
#include "reduce.cuh"

namespace {

using fv::Bf16;
using fv::Bin;
using fv::Bins;
using fv::FrequencyParams;

constexpr int kMostThreads = 256;
constexpr int kUnit = 32;  // uint4

// A layer's weights are exact in one bf16 where they are stored so, and in two where they are f16.
template <class E>
constexpr int kParts = 2;
template <>
constexpr int kParts<Bf16> = 1;

// Shared memory, in this order; the launcher adds it up in the same way.
struct Shared : fv::Tables {
    uint4* w1;  // (parts, kSteps, kSteps, kUnit)
    uint4* w2;
    uint4* row_matrix;     // where the axis has one
    uint4* column_matrix;  // the same where both are for one length
    float2* b1;            // (8*kSteps)
    float2* b2;
    float2* scratch;
    float2* planes;  // behind the turns
};

extern __shared__ uint4 shared_memory[];

// Where everything lies. Asked again after a call rather than kept over it, as in kernels/frequency.cu.
template <int kPartsOf, int kSteps>
__device__ __forceinline__ Shared carve(const FrequencyParams& p) {
    constexpr int kLayer = kPartsOf * kSteps * kSteps * kUnit;
    Shared s;
    int nothing;
    asm volatile("mov.u32 %0, 0;" : "=r"(nothing));
    s.w1 = shared_memory + nothing;
    s.w2 = s.w1 + kLayer;
    s.row_matrix = s.w2 + kLayer;
    s.column_matrix = s.row_matrix + (p.rows.base != 0 && p.rows.base != p.columns.base ? fv::kMatrixWords : 0);
    s.b1 = reinterpret_cast<float2*>(s.column_matrix + (p.columns.base != 0 ? fv::kMatrixWords : 0));
    s.b2 = s.b1 + 8 * kSteps;
    s.scratch = s.b2 + 8 * kSteps;
    s.row_turns = s.scratch + p.scratch;
    s.column_turns = s.row_turns + p.rows.length;
    s.planes = s.column_turns + p.height;
    fv::carve_places(p, s, s.planes + (p.channels + 1) / 2 * p.rows.outer_step);
    return s;
}

// One layer's weights and bias of a group, padded with zeros. Unit (k, m) has the fragments from channels 8k to 8k + 7 to channels
// 8m to 8m + 7: lane 4g + t multiplies the parts of channels 8k + 2t (b0) and 8k + 2t + 1 (b1) for the real (g even) or imaginary
// part of channel 8m + g/2*2 (x, y), of the channel behind it (z, w). Lane 4g + t reads slot 8t + (g ^ 2t): no two of a quarter of a
// warp share a bank, here nor there.
template <class E, int kSteps>
__device__ __forceinline__ void fill_layer(const FrequencyParams& p, int group, const void* weight, const void* bias, uint4* to,
                                           float2* bias_to) {
    using Storage = typename E::Storage;
    constexpr int kPairs = 4 * kSteps, kPart = kSteps * kSteps * kUnit;
    const int channels = p.channels, part = p.groups * channels * channels;
    const auto* w = static_cast<const Storage*>(weight) + static_cast<int64_t>(group) * channels * channels;
    const auto* b = static_cast<const Storage*>(bias) + group * channels;
    for (int i = static_cast<int>(threadIdx.x); i < kPairs * kPairs; i += static_cast<int>(blockDim.x)) {
        const int input = i / kPairs * 2, output = i % kPairs * 2;
        float parts[2][2][2] = {};  // of input, of output
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                const Storage* at = w + (input + n) * channels + output + q * part;
                if (p.weights_together != 0) {
                    if (input + n < channels && output < channels) {
                        float both[2];
                        E::widen_word(__ldg(reinterpret_cast<const uint32_t*>(at)), both);
                        parts[n][0][q] = both[0];
                        parts[n][1][q] = both[1];
                    }
                } else {
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        if (input + n < channels && output + m < channels) {
                            parts[n][m][q] = E::widen(__ldg(at + m));
                        }
                    }
                }
            }
        }
        const int t = input % 8 / 2;
        uint4* unit = to + (input / 8 * kSteps + output / 8) * kUnit + t * 8;
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            // Four neighbours write slots of one parity, the next four those of the other.
            const bool imaginary = (i / 4 + step) % 2 != 0;
            fv::Split s[2][2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const float re = parts[n][m][0], im = parts[n][m][1];
                    s[m][n] = fv::split_bf16(imaginary ? make_float2(im, re) : make_float2(re, -im));
                }
            }
            uint4* slot = unit + ((output % 8 + (imaginary ? 1 : 0)) ^ 2 * t);
            *slot = make_uint4(s[0][0].high, s[0][1].high, s[1][0].high, s[1][1].high);
            if constexpr (kParts<E> == 2) {
                slot[kPart] = make_uint4(s[0][0].low, s[0][1].low, s[1][0].low, s[1][1].low);
            }
        }
    }
    for (int i = static_cast<int>(threadIdx.x); i < 8 * kSteps; i += static_cast<int>(blockDim.x)) {
        bias_to[i] = i < channels ? make_float2(E::widen(__ldg(b + i)), E::widen(__ldg(b + p.groups * channels + i)))
                                  : make_float2(0.0f, 0.0f);
    }
}

// Sixteen bins by the eight channels of unit `at`: the even ones' sums and the odd ones'.
template <int kPartsOf, int kPart>
__device__ __forceinline__ void multiply(float (&even)[4], float (&odd)[4], const uint32_t (&high)[4], const uint32_t (&low)[4],
                                         const uint4* at) {
    const uint4 w = *at;
    fv::mma<Bf16>(even, high, w.x, w.y);
    fv::mma<Bf16>(odd, high, w.z, w.w);
    fv::mma<Bf16>(even, low, w.x, w.y);
    fv::mma<Bf16>(odd, low, w.z, w.w);
    if constexpr (kPartsOf == 2) {
        const uint4 rest = at[kPart];
        fv::mma<Bf16>(even, high, rest.x, rest.y);
        fv::mma<Bf16>(odd, high, rest.z, rest.w);
    }
}

template <bool kRelu>
__device__ __forceinline__ float act(float v) {
    return kRelu ? fv::Relu::of(v) : fv::Silu::of(v);
}

// The masks of all bins times the spectrum, in place. A warp has sixteen bins at a time and all channels of them. Its lane 4g + t
// has bins 2g and 2g + 1, where the special columns' pairs are neighbours, and channels 8k + 2t, 8k + 2t + 1 for all k: it reads
// from the planes what it alone writes. The accumulators of the first layer, rounded, are the fragments of the second.
template <int kPartsOf, int kSteps>
__device__ __forceinline__ void filter_bins(const FrequencyParams& p, const Shared& s) {
    constexpr int kPart = kSteps * kSteps * kUnit;
    const Bins bins(p);
    const int plane = p.rows.outer_step, pairs = (p.channels + 1) / 2;
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const int slot = t * 8 + (g ^ 2 * t);
#pragma unroll 1
    for (int begin = static_cast<int>(threadIdx.x) / 2 & ~15; begin < bins.all; begin += static_cast<int>(blockDim.x) / 2) {
        Bin bin[2];
        {
            // Each of the sixteen is looked up once, by two lanes.
            const Bin mine = bins.at(p, s, min(begin + lane % 16, bins.all - 1));
            const int places = mine.place << 16 | mine.opposite;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int both = __shfl_sync(fv::kFullWarp, places, 2 * g + r);
                const int index = begin + 2 * g + r;
                bin[r] = {both >> 16, both & 0xffff, index < bins.paired, index >= bins.paired && index < bins.special};
            }
        }
        uint32_t high[kSteps][4], low[kSteps][4];
        {
            float sum[kSteps][2][4] = {};
#pragma unroll 1
            for (int k = 0; k < kSteps; ++k) {
                const int pair = 4 * k + t;
                uint32_t x_high[4], x_low[4];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float2 a = make_float2(0.0f, 0.0f), b = a;
                    if (pair < pairs && begin + 2 * g + r < bins.all) {
                        fv::split(s.planes, pair * plane, bin[r], a, b);
                    }
                    const fv::Split of_a = fv::split_bf16(a), of_b = fv::split_bf16(b);
                    x_high[r] = of_a.high;
                    x_low[r] = of_a.low;
                    x_high[2 + r] = of_b.high;
                    x_low[2 + r] = of_b.low;
                }
#pragma unroll
                for (int m = 0; m < kSteps; ++m) {
                    multiply<kPartsOf, kPart>(sum[m][0], sum[m][1], x_high, x_low, s.w1 + (k * kSteps + m) * kUnit + slot);
                }
            }
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                const float4 bias = *reinterpret_cast<const float4*>(s.b1 + 8 * k + 2 * t);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // a of the first bin and of the second, then b.
                    const float* v = sum[k][i / 2] + i % 2 * 2;
                    float re = __fmaf_rn(v[0], p.scale, i < 2 ? bias.x : bias.z);
                    float im = __fmaf_rn(v[1], p.scale, i < 2 ? bias.y : bias.w);
                    if (p.relu != 0) {
                        re = act<true>(re);
                        im = act<true>(im);
                    } else {
                        re = act<false>(re);
                        im = act<false>(im);
                    }
                    const fv::Split z = fv::split_bf16(make_float2(re, im));
                    high[k][i] = z.high;
                    low[k][i] = z.low;
                }
            }
        }
#pragma unroll 1
        for (int m = 0; m < kSteps; ++m) {
            const float4 bias = *reinterpret_cast<const float4*>(s.b2 + 8 * m + 2 * t);
            float sum[2][4] = {{bias.x, bias.y, bias.x, bias.y}, {bias.z, bias.w, bias.z, bias.w}};
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                multiply<kPartsOf, kPart>(sum[0], sum[1], high[k], low[k], s.w2 + (k * kSteps + m) * kUnit + slot);
            }
            const int pair = 4 * m + t;
            if (pair >= pairs) {
                continue;
            }
            float2 product[2][2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float2 x[2] = {};
                if (begin + 2 * g + r < bins.all) {
                    fv::split(s.planes, pair * plane, bin[r], x[0], x[1]);
                }
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    // The skip is the 1.
                    product[r][c] = fv::times(make_float2(fv::shrink(sum[c][2 * r], p.threshold) + 1.0f,
                                                          fv::shrink(sum[c][2 * r + 1], p.threshold)),
                                              x[c]);
                }
            }
            if (bin[0].paired) {
                // The Hermitian part of the special columns: half of this and half of the opposite's conjugate.
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float re = 0.5f * (product[0][c].x + product[1][c].x);
                    const float im = 0.5f * (product[0][c].y - product[1][c].y);
                    product[0][c] = make_float2(re, im);
                    product[1][c] = make_float2(re, -im);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (begin + 2 * g + r < bins.all) {
                    const float2 a = product[r][0], b = product[r][1];
                    const float2 im = bin[r].own ? make_float2(0.0f, 0.0f) : make_float2(a.y, b.y);
                    float2* at = s.planes + pair * plane;
                    at[bin[r].place] = make_float2(a.x - im.y, im.x + b.x);
                    if (!bin[r].paired && !bin[r].own) {
                        at[bin[r].opposite] = make_float2(a.x + b.y, b.x - a.y);
                    }
                }
            }
        }
    }
    __syncthreads();
}

template <class E, int kSteps>
__device__ __forceinline__ void resident(const FrequencyParams& p) {
    const int64_t image = static_cast<int>(blockIdx.x) / p.groups;
    const int group = static_cast<int>(blockIdx.x) % p.groups;
    const auto where = [&] { return carve<kParts<E>, kSteps>(p); };
    {
        const Shared s = where();
        fv::fill_turns(p, s);
        fv::load_group<E>(p, s.planes, image, group);
        fill_layer<E, kSteps>(p, group, p.w1, p.b1, s.w1, s.b1);
        fill_layer<E, kSteps>(p, group, p.w2, p.b2, s.w2, s.b2);
        // Its barriers are between the turns and the matrices.
        fv::fill_places(p, s);
        if (p.rows.base != 0 && p.rows.base != p.columns.base) {
            fv::fill_matrix(s.row_matrix, p.rows, s.row_turns);
        }
        if (p.columns.base != 0) {
            fv::fill_matrix(s.column_matrix, p.columns, s.column_turns);
        }
        __syncthreads();
    }
    {
        const Shared s = where();
        fv::transform_axis_mma<false>(s.planes, p.rows, s.row_matrix, s.row_turns, s.scratch, p.scratch);
    }
    {
        const Shared s = where();
        fv::transform_axis_mma<false>(s.planes, p.columns, s.column_matrix, s.column_turns, s.scratch, p.scratch);
    }
    filter_bins<kParts<E>, kSteps>(p, where());
    {
        const Shared s = where();
        fv::transform_axis_mma<true>(s.planes, p.columns, s.column_matrix, s.column_turns, s.scratch, p.scratch);
    }
    {
        const Shared s = where();
        fv::transform_axis_mma<true>(s.planes, p.rows, s.row_matrix, s.row_turns, s.scratch, p.scratch);
    }
    fv::store_group<E>(p, where().planes, image, group);
}

}  // namespace

#define FV_FREQUENCY_STEPS(TYPE, E, STEPS)                                  \
    extern "C" __global__ void __launch_bounds__(kMostThreads, 2)                 \
        fv_frequency_mma_##TYPE##_##STEPS(const __grid_constant__ FrequencyParams p) { \
        resident<E, STEPS>(p);                                              \
    }
#define FV_FREQUENCY(TYPE, E)      \
    FV_FREQUENCY_STEPS(TYPE, E, 1) \
    FV_FREQUENCY_STEPS(TYPE, E, 2) \
    FV_FREQUENCY_STEPS(TYPE, E, 3) \
    FV_FREQUENCY_STEPS(TYPE, E, 4) \
    FV_FREQUENCY_STEPS(TYPE, E, 5)
FV_FREQUENCY(f16, fv::F16)
FV_FREQUENCY(bf16, fv::Bf16)
