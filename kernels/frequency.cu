// frequency.cu - the adaptive frequency filter of AFFNet: Fourier transform, a mask out of the spectrum, product, inverse.
//
// Maths:   X = orthonormal real 2-D transform of each channel of x;  in each group of S channels, at every frequency:
//          M = shrink(act(X*W1 + b1)*W2 + b2), complex, act and shrink on real and imaginary parts by themselves;
//          out = inverse(M*X) + x + residual. M*X is not Hermitian in the columns k = 0 and k = W/2: these are replaced by
//          their Hermitian part, which is what a complex inverse along H and a real one along W make of them.
// Shapes:  x, residual, out (B, N, C) or (B, C, N), N = H*W, C = G*S, strides in elements;  w1, w2 (2, G, S, S) part, group,
//          input, output;  b1, b2 (2, G, S).
// Launch:  resident: grid B*G, 128 to 512 threads, a group's planes in shared memory: S/2*H*W complex values, weights, scratch.
//          staged, where these do not fit: transform grid B*G*ceil(S/2), bins grid B*G*chunks of bins, inverse as transform,
//          with the spectrum in a workspace. H, W up to 128.
// Cost:    moves x and out once, residual once, weights once an image (resident). Two real channels are one complex plane
//          a + ib, so the transforms cost 5*N*log2(N) flop a pair and direction; bins cost 16*S*S flop a group for each of
//          H*(W/2 + 1): 3.3 and 4.6 Mflop at C = 64, 32x32, 6.6 and 18 at C = 128; 0.3 and 1.7 at C = 144, 8x8. Bound by f32
//          arithmetic from S = 12 on. The skip costs nothing: M*X + X is (M + 1)*X.
//          f16 and bf16 of up to 40 channels a group are for kernels/frequency_mma.cu. In f32 products on tensor cores need parts
//          of three bf16 and six products, or three of TF32, half as fast: with 8*N*(H + W) flop a pair the transforms take 3.8
//          times the clocks at 32x32 and 1.6 times at 8x8; the network takes 2.7 times fewer at S = 32, where its weights would fill
//          48 KiB: not done.

#include "activation.cuh"
#include "element.cuh"
#include "fourier.cuh"
#include "frequency.cuh"
#include "reduce.cuh"

namespace {

using fv::Bin;
using fv::Bins;
using fv::FrequencyParams;
using fv::fill_places;
using fv::fill_turns;
using fv::load_planes;
using fv::shrink;
using fv::split;
using fv::store_planes;

// Shared memory, in this order; the launcher adds it up in the same way.
struct Shared : fv::Tables {
    float2* w1;       // (2*pairs, tiles*kTile), zero beyond S
    float2* w2;
    float2* b1;       // (tiles*kTile)
    float2* b2;
    float2* scratch;  // (S, chunk)
    float2* planes;   // (pairs, H, row), behind the turns
};

extern __shared__ float4 shared_memory[];

// Where everything lies. Asked again after a call rather than kept over it: addresses are cheap to make, and the registers of
// a call's caller are few.
__device__ __forceinline__ Shared carve(const FrequencyParams& p, int weights, int outputs, int planes) {
    Shared s;
    int nothing;
    asm volatile("mov.u32 %0, 0;" : "=r"(nothing));
    s.w1 = reinterpret_cast<float2*>(shared_memory + nothing);
    s.w2 = s.w1 + weights;
    s.b1 = s.w2 + weights;
    s.b2 = s.b1 + outputs;
    s.scratch = s.b2 + outputs;
    s.row_turns = s.scratch + p.scratch;
    s.column_turns = s.row_turns + p.rows.length;
    s.planes = s.column_turns + p.height;
    fv::carve_places(p, s, s.planes + planes * p.height * p.row);
    return s;
}

// One layer's weights and bias of a group, padded with zeros to whole tiles.
template <class E>
__device__ __forceinline__ void fill_layer(const FrequencyParams& p, int group, int outputs, const void* weight, const void* bias,
                                           float2* to, float2* bias_to) {
    using Storage = typename E::Storage;
    const int channels = p.channels;
    const auto* w = static_cast<const Storage*>(weight) + static_cast<int64_t>(group) * channels * channels;
    const auto* b = static_cast<const Storage*>(bias) + group * channels;
    const int inputs = (channels + 1) / 2 * 2;
    const int part = p.groups * channels * channels;
    for (int i = static_cast<int>(threadIdx.x); i < inputs * outputs; i += static_cast<int>(blockDim.x)) {
        const int input = i / outputs, output = i % outputs;
        const bool real = input < channels && output < channels;
        const Storage* at = w + input * channels + output;
        to[i] = real ? make_float2(E::widen(__ldg(at)), E::widen(__ldg(at + part))) : make_float2(0.0f, 0.0f);
        if (i < outputs) {
            bias_to[i] = i < channels ? make_float2(E::widen(__ldg(b + i)), E::widen(__ldg(b + p.groups * channels + i)))
                                      : make_float2(0.0f, 0.0f);
        }
    }
}

template <int kTile>
__device__ __forceinline__ void accumulate(float2 (&sum)[kTile], float2 x, const float2* weights) {
#pragma unroll
    for (int o = 0; o < kTile; o += 2) {
        // Two weights in one access: rows and tiles are multiples of 16 bytes.
        const float4 w = *reinterpret_cast<const float4*>(weights + o);
        sum[o].x = __fmaf_rn(x.x, w.x, __fmaf_rn(-x.y, w.y, sum[o].x));
        sum[o].y = __fmaf_rn(x.y, w.x, __fmaf_rn(x.x, w.y, sum[o].y));
        sum[o + 1].x = __fmaf_rn(x.x, w.z, __fmaf_rn(-x.y, w.w, sum[o + 1].x));
        sum[o + 1].y = __fmaf_rn(x.y, w.z, __fmaf_rn(x.x, w.w, sum[o + 1].y));
    }
}

// The masks of bins [first, last) times the spectrum, in place. A thread has kTile outputs of one bin. Ends in a barrier.
template <int kTile>
__device__ __forceinline__ void filter_bins(const FrequencyParams& p, const Shared& s, float2* planes, int first, int last) {
    const Bins bins(p);
    const int plane = p.height * p.row;
    const int outputs = p.tiles * kTile;
    const int pairs = (p.channels + 1) / 2;
    const int tile = static_cast<int>(threadIdx.x) / p.chunk;
    const int slot = static_cast<int>(threadIdx.x) % p.chunk;
    const bool working = tile < p.tiles;
    for (int begin = first; begin < last; begin += p.chunk) {
        const int index = begin + slot;
        const bool mine = working && index < last;
        const Bin bin = bins.at(p, s, mine ? index : begin);
        float2 sum[kTile];
        if (mine) {
#pragma unroll
            for (int o = 0; o < kTile; ++o) {
                sum[o] = make_float2(0.0f, 0.0f);
            }
            const float2* weights = s.w1 + tile * kTile;
#pragma unroll 1
            for (int pair = 0; pair < pairs; ++pair) {
                float2 a, b;
                split(planes, pair * plane, bin, a, b);
                accumulate<kTile>(sum, a, weights);
                accumulate<kTile>(sum, b, weights + outputs);
                weights += 2 * outputs;
            }
#pragma unroll
            for (int o = 0; o < kTile; ++o) {
                const int output = tile * kTile + o;
                const float2 bias = s.b1[output];
                const float re = __fmaf_rn(sum[o].x, p.scale, bias.x), im = __fmaf_rn(sum[o].y, p.scale, bias.y);
                if (output < p.channels) {
                    s.scratch[output * p.chunk + slot] = p.relu != 0 ? make_float2(fv::Relu::of(re), fv::Relu::of(im))
                                                                     : make_float2(fv::Silu::of(re), fv::Silu::of(im));
                }
            }
        }
        __syncthreads();
#pragma unroll
        for (int o = 0; o < kTile; ++o) {
            sum[o] = make_float2(0.0f, 0.0f);
        }
        if (mine) {
            const float2* weights = s.w2 + tile * kTile;
#pragma unroll 2
            for (int input = 0; input < p.channels; ++input) {
                accumulate<kTile>(sum, s.scratch[input * p.chunk + slot], weights);
                weights += outputs;
            }
#pragma unroll
            for (int o = 0; o < kTile; o += 2) {
                const int output = tile * kTile + o;
                if (output < p.channels) {
                    float2 a, b;
                    split(planes, output / 2 * plane, bin, a, b);
                    const float2 bias_a = s.b2[output], bias_b = s.b2[output + 1];
                    // The skip is the 1.
                    const float2 mask_a = make_float2(shrink(sum[o].x + bias_a.x, p.threshold) + 1.0f,
                                                      shrink(sum[o].y + bias_a.y, p.threshold));
                    const float2 mask_b = make_float2(shrink(sum[o + 1].x + bias_b.x, p.threshold) + 1.0f,
                                                      shrink(sum[o + 1].y + bias_b.y, p.threshold));
                    sum[o] = fv::times(mask_a, a);
                    sum[o + 1] = fv::times(mask_b, b);
                }
            }
        }
        if (begin < bins.paired) {
            // The Hermitian part of the special columns: half of this and half of the opposite's conjugate, which the
            // neighbouring lane has.
#pragma unroll
            for (int o = 0; o < kTile; ++o) {
                const float re = __shfl_xor_sync(fv::kFullWarp, sum[o].x, 1);
                const float im = __shfl_xor_sync(fv::kFullWarp, sum[o].y, 1);
                if (bin.paired) {
                    sum[o] = make_float2(0.5f * (sum[o].x + re), 0.5f * (sum[o].y - im));
                }
            }
        }
        __syncwarp();
        if (mine) {
#pragma unroll
            for (int o = 0; o < kTile; o += 2) {
                const int output = tile * kTile + o;
                if (output < p.channels) {
                    float2 a = sum[o], b = sum[o + 1];
                    if (bin.own) {
                        a.y = 0.0f;
                        b.y = 0.0f;
                    }
                    float2* at = planes + output / 2 * plane;
                    at[bin.place] = make_float2(a.x - b.y, a.y + b.x);
                    if (!bin.paired && !bin.own) {
                        at[bin.opposite] = make_float2(a.x + b.y, b.x - a.y);
                    }
                }
            }
        }
        __syncthreads();
    }
}

template <class E, int kTile>
__device__ __forceinline__ void fill_weights(const FrequencyParams& p, const Shared& s, int group) {
    const int outputs = p.tiles * kTile;
    fill_layer<E>(p, group, outputs, p.w1, p.b1, s.w1, s.b1);
    fill_layer<E>(p, group, outputs, p.w2, p.b2, s.w2, s.b2);
}

template <class E, int kTile>
__device__ __forceinline__ void resident(const FrequencyParams& p) {
    const int64_t image = static_cast<int>(blockIdx.x) / p.groups;
    const int group = static_cast<int>(blockIdx.x) % p.groups;
    const int pairs = (p.channels + 1) / 2;
    const int outputs = p.tiles * kTile;
    const auto where = [&] { return carve(p, 2 * pairs * outputs, outputs, pairs); };
    {
        const Shared s = where();
        load_planes<E>(p, s.planes, image, group * p.channels, p.channels);
        fill_weights<E, kTile>(p, s, group);
        fill_turns(p, s);
        fill_places(p, s);
    }
    {
        const Shared s = where();
        fv::transform_axis<false>(s.planes, p.rows, s.row_turns, s.scratch, p.scratch);
    }
    {
        const Shared s = where();
        fv::transform_axis<false>(s.planes, p.columns, s.column_turns, s.scratch, p.scratch);
    }
    {
        const Shared s = where();
        filter_bins<kTile>(p, s, s.planes, 0, Bins(p).all);
    }
    {
        const Shared s = where();
        fv::transform_axis<true>(s.planes, p.columns, s.column_turns, s.scratch, p.scratch);
    }
    {
        const Shared s = where();
        fv::transform_axis<true>(s.planes, p.rows, s.row_turns, s.scratch, p.scratch);
    }
    store_planes<E>(p, where().planes, image, group * p.channels, p.channels);
}

// Staged: one block, one pair of channels.
template <class E, bool kInverse>
__device__ __forceinline__ void staged_transform(const FrequencyParams& p) {
    const int pairs = (p.channels + 1) / 2;
    const int64_t item = blockIdx.x;
    const int pair = static_cast<int>(item % pairs);
    const int64_t of_image = item / pairs;
    const int group = static_cast<int>(of_image % p.groups);
    const int64_t image = of_image / p.groups;
    const Shared s = carve(p, 0, 0, 1);
    const int first = group * p.channels + 2 * pair, channels = min(2, p.channels - 2 * pair);
    const int plane = p.height * p.row;
    float2* spectrum = p.spectrum + item * plane;
    fill_turns(p, s);
    if constexpr (kInverse) {
        for (int i = static_cast<int>(threadIdx.x); i < plane; i += static_cast<int>(blockDim.x)) {
            s.planes[i] = spectrum[i];
        }
        __syncthreads();
        fv::transform_axis<true>(s.planes, p.columns, s.column_turns, s.scratch, p.scratch);
        fv::transform_axis<true>(s.planes, p.rows, s.row_turns, s.scratch, p.scratch);
        store_planes<E>(p, s.planes, image, first, channels);
    } else {
        load_planes<E>(p, s.planes, image, first, channels);
        // The columns that make rows odd hold nothing.
        if (p.row > p.rows.length) {
            for (int h = static_cast<int>(threadIdx.x); h < p.height; h += static_cast<int>(blockDim.x)) {
                s.planes[h * p.row + p.rows.length] = make_float2(0.0f, 0.0f);
            }
        }
        __syncthreads();
        fv::transform_axis<false>(s.planes, p.rows, s.row_turns, s.scratch, p.scratch);
        fv::transform_axis<false>(s.planes, p.columns, s.column_turns, s.scratch, p.scratch);
        for (int i = static_cast<int>(threadIdx.x); i < plane; i += static_cast<int>(blockDim.x)) {
            spectrum[i] = s.planes[i];
        }
    }
}

// Staged: one block, one chunk of bins of a group. Bins of different blocks share no place.
template <class E, int kTile>
__device__ __forceinline__ void staged_bins(const FrequencyParams& p) {
    const int all = Bins(p).all;
    const int chunks = (all + p.chunk - 1) / p.chunk;
    const int chunk = static_cast<int>(blockIdx.x) % chunks, item = static_cast<int>(blockIdx.x) / chunks;  // [0, B*G)
    const int group = item % p.groups;
    const int pairs = (p.channels + 1) / 2;
    const int outputs = p.tiles * kTile;
    const Shared s = carve(p, 2 * pairs * outputs, outputs, 0);
    fill_weights<E, kTile>(p, s, group);
    fill_places(p, s);
    float2* planes = p.spectrum + static_cast<int64_t>(item) * pairs * p.height * p.row;
    filter_bins<kTile>(p, s, planes, chunk * p.chunk, min((chunk + 1) * p.chunk, all));
}

constexpr int kMostThreads = 512;

}  // namespace

#define FV_FREQUENCY_TILE(TYPE, E, TILE)                                                                   \
    extern "C" __global__ void __launch_bounds__(kMostThreads, 2)                                          \
        fv_frequency_##TYPE##_##TILE(const __grid_constant__ FrequencyParams p) {                          \
        resident<E, TILE>(p);                                                                              \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(kMostThreads, 2)                                          \
        fv_frequency_bins_##TYPE##_##TILE(const __grid_constant__ FrequencyParams p) {                     \
        staged_bins<E, TILE>(p);                                                                           \
    }
#define FV_FREQUENCY(TYPE, E)                                                                              \
    FV_FREQUENCY_TILE(TYPE, E, 6)                                                                          \
    FV_FREQUENCY_TILE(TYPE, E, 8)                                                                          \
    extern "C" __global__ void __launch_bounds__(kMostThreads, 2)                                          \
        fv_frequency_forward_##TYPE(const __grid_constant__ FrequencyParams p) {                           \
        staged_transform<E, false>(p);                                                                     \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(kMostThreads, 2)                                          \
        fv_frequency_inverse_##TYPE(const __grid_constant__ FrequencyParams p) {                           \
        staged_transform<E, true>(p);                                                                      \
    }
FV_FREQUENCY(f32, fv::F32)
FV_FREQUENCY(f16, fv::F16)
FV_FREQUENCY(bf16, fv::Bf16)
