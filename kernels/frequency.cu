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
//          As products with the matrix of the transform on tensor cores the transforms take 8*N*(H + W) flop a pair: 10 times
//          as many at 32x32, 4.3 times at 8x8, and three TF32 products each for f32's accuracy, where tensor cores are 8 times
//          as fast: not taken.

#include <cstddef>

#include "activation.cuh"
#include "element.cuh"
#include "fourier.cuh"
#include "reduce.cuh"

namespace {

struct Place {
    int64_t batch, position, channel;  // strides in elements
};

struct FrequencyParams {
    const void* x;
    const void* residual;  // null without
    const void* w1;        // (2, G, S, S)
    const void* b1;        // (2, G, S)
    const void* w2;
    const void* b2;
    void* out;
    float2* spectrum;  // staged: (B, G, ceil(S/2), H, row)
    Place x_at, residual_at, out_at;
    fv::Axis rows, columns;  // lines along W, lines along H
    fv::Divisor width;       // W
    fv::Divisor pairs;       // ceil(S/2), or S where channels travel one by one
    fv::Divisor positions;   // N
    int32_t height;
    int32_t channels;    // S
    int32_t groups;      // G
    int32_t row;         // from row to row of a plane: W, made odd
    int32_t chunk;       // bins at a time
    int32_t tiles;       // of outputs
    int32_t scratch;     // complex values
    int32_t relu;        // otherwise SiLU
    int32_t planar;      // positions are contiguous, not channels
    int32_t together;    // two channels travel in one access
    float threshold;
    float scale;  // 1/(2*sqrt(N)): of what the planes hold to the spectrum
};
// src/cuda/frequency.rs asserts the same numbers.
static_assert(sizeof(FrequencyParams) == 336 && offsetof(FrequencyParams, x_at) == 64 && offsetof(FrequencyParams, rows) == 136 &&
                  offsetof(FrequencyParams, columns) == 192 && offsetof(FrequencyParams, width) == 248 &&
                  offsetof(FrequencyParams, height) == 284 && offsetof(FrequencyParams, scale) == 328,
              "the launcher's layout");

// Shared memory, in this order; the launcher adds it up in the same way.
struct Shared {
    float2* w1;       // (2*pairs, tiles*kTile), zero beyond S
    float2* w2;
    float2* b1;       // (tiles*kTile)
    float2* b2;
    float2* scratch;  // (S, chunk)
    float2* row_turns;     // (W)
    float2* column_turns;  // (H)
    float2* planes;        // (pairs, H, row)
    uint8_t* row_place;     // of frequency k
    uint8_t* column_place;
    uint8_t* row_opposite;  // of place i: the place of the negative frequency
    uint8_t* column_opposite;
    uint8_t* interior;  // the places of 0 < k < W/2, ascending
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
    s.row_place = reinterpret_cast<uint8_t*>(s.planes + planes * p.height * p.row);
    s.column_place = s.row_place + p.rows.length;
    s.row_opposite = s.column_place + p.height;
    s.column_opposite = s.row_opposite + p.rows.length;
    s.interior = s.column_opposite + p.height;
    return s;
}

__device__ __forceinline__ void fill_turns(const FrequencyParams& p, const Shared& s) {
    const int width = p.rows.length;
    for (int i = static_cast<int>(threadIdx.x); i < width + p.height; i += static_cast<int>(blockDim.x)) {
        const int n = i < width ? width : p.height;
        float sin, cos;
        sincospif(-2.0f * static_cast<float>(i < width ? i : i - width) / static_cast<float>(n), &sin, &cos);
        s.row_turns[i] = make_float2(cos, sin);
    }
}

// The tables of places. Ends in a barrier.
__device__ __forceinline__ void fill_places(const FrequencyParams& p, const Shared& s) {
    const int width = p.rows.length;
    const int threads = static_cast<int>(blockDim.x);
    for (int i = static_cast<int>(threadIdx.x); i < width + p.height; i += threads) {
        const bool row = i < width;
        const fv::Axis& axis = row ? p.rows : p.columns;
        const int k = row ? i : i - width;
        const int place = axis.place(k);
        (row ? s.row_place : s.column_place)[k] = static_cast<uint8_t>(place);
        (row ? s.row_opposite : s.column_opposite)[place] =
            static_cast<uint8_t>(axis.place(k == 0 ? 0 : axis.length - k));
    }
    __syncthreads();
    // A place's rank among those of the same kind: at most 64 places.
    const int interior = (width - 1) / 2;
    for (int k = 1 + static_cast<int>(threadIdx.x); k <= interior; k += threads) {
        int rank = 0;
        for (int other = 1; other <= interior; ++other) {
            rank += s.row_place[other] < s.row_place[k] ? 1 : 0;
        }
        s.interior[rank] = s.row_place[k];
    }
    __syncthreads();
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

// What moves between memory and planes: (first channel of the tensor, position) and the place in the planes, one or two
// channels at a time. `body(channel, position, plane, part, place, both)`.
template <class Body>
__device__ __forceinline__ void for_each_value(const FrequencyParams& p, int channels, Body&& body) {
    const int n = p.positions.divisor;
    const int units = p.pairs.divisor;
    const int items = n * (p.planar != 0 ? channels : units);
    for (int item = static_cast<int>(threadIdx.x); item < items; item += static_cast<int>(blockDim.x)) {
        int unit, position;
        if (p.planar != 0) {
            unit = p.positions.quotient(item);
            position = p.positions.remainder(item, unit);
        } else {
            position = p.pairs.quotient(item);
            unit = p.pairs.remainder(item, position);
        }
        const int channel = p.together != 0 ? 2 * unit : unit;
        // The last block of an odd group has one channel of two.
        if (channel >= channels) {
            continue;
        }
        const int h = p.width.quotient(position);
        body(channel, position, h * p.row + p.width.remainder(position, h));
    }
}

template <class E>
__device__ __forceinline__ void load_planes(const FrequencyParams& p, float2* planes, int64_t image, int first, int channels) {
    using Storage = typename E::Storage;
    const auto* x = static_cast<const Storage*>(p.x) + image * p.x_at.batch + first * p.x_at.channel;
    const int plane = p.height * p.row;
    for_each_value(p, channels, [&](int channel, int position, int place) {
        const Storage* at = x + position * p.x_at.position + channel * p.x_at.channel;
        if (p.together != 0) {
            float v[2];
            if constexpr (sizeof(Storage) == 4) {
                const float2 both = __ldg(reinterpret_cast<const float2*>(at));
                v[0] = both.x;
                v[1] = both.y;
            } else {
                E::widen_word(__ldg(reinterpret_cast<const uint32_t*>(at)), v);
            }
            planes[channel / 2 * plane + place] = make_float2(v[0], v[1]);
        } else {
            reinterpret_cast<float*>(planes + channel / 2 * plane + place)[channel % 2] = E::widen(__ldg(at));
            if (channel == channels - 1 && channel % 2 == 0) {
                planes[channel / 2 * plane + place].y = 0.0f;
            }
        }
    });
}

template <class E>
__device__ __forceinline__ void store_planes(const FrequencyParams& p, const float2* planes, int64_t image, int first,
                                             int channels) {
    using Storage = typename E::Storage;
    auto* out = static_cast<Storage*>(p.out) + image * p.out_at.batch + first * p.out_at.channel;
    const auto* residual = static_cast<const Storage*>(p.residual) + image * p.residual_at.batch + first * p.residual_at.channel;
    const int plane = p.height * p.row;
    // The planes hold 2*sqrt(N) times the spectrum's inverse without its 1/sqrt(N).
    const float factor = 2.0f * p.scale * p.scale;
    for_each_value(p, channels, [&](int channel, int position, int place) {
        Storage* to = out + position * p.out_at.position + channel * p.out_at.channel;
        const int64_t other = position * p.residual_at.position + channel * p.residual_at.channel;
        if (p.together != 0) {
            float v[2] = {planes[channel / 2 * plane + place].x * factor, planes[channel / 2 * plane + place].y * factor};
            if (p.residual != nullptr) {
                float r[2];
                if constexpr (sizeof(Storage) == 4) {
                    const float2 both = __ldg(reinterpret_cast<const float2*>(residual + other));
                    r[0] = both.x;
                    r[1] = both.y;
                } else {
                    E::widen_word(__ldg(reinterpret_cast<const uint32_t*>(residual + other)), r);
                }
                v[0] += r[0];
                v[1] += r[1];
            }
            if constexpr (sizeof(Storage) == 4) {
                *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
            } else {
                *reinterpret_cast<uint32_t*>(to) = E::narrow_word(v);
            }
        } else {
            float v = reinterpret_cast<const float*>(planes + channel / 2 * plane + place)[channel % 2] * factor;
            if (p.residual != nullptr) {
                v += E::widen(__ldg(residual + other));
            }
            *to = E::narrow(v);
        }
    });
}

// A frequency of the half spectrum: its place and the opposite one's. First come the pairs l, H - l of the columns 0 and W/2,
// side by side, so that they are neighbouring lanes; then the frequencies that are their own opposites; then all others.
struct Bin {
    int place, opposite;
    bool paired, own;
};

struct Bins {
    int paired, special, all;
    int column_pairs, inner;

    __device__ __forceinline__ explicit Bins(const FrequencyParams& p) {
        const int width = p.rows.length, height = p.height;
        const int columns = width > 1 && width % 2 == 0 ? 2 : 1;
        column_pairs = (height - 1) / 2;
        paired = 2 * column_pairs * columns;
        special = height * columns;
        inner = (width - 1) / 2;
        all = special + height * inner;
    }

    __device__ __forceinline__ Bin at(const FrequencyParams& p, const Shared& s, int index) const {
        Bin bin;
        bin.paired = index < paired;
        bin.own = index >= paired && index < special;
        if (index < special) {
            int column, l;
            if (bin.paired) {
                const int pair = index / 2;
                column = pair >= column_pairs ? 1 : 0;
                l = 1 + pair - column * column_pairs;
                l = index % 2 == 0 ? l : p.height - l;
            } else {
                const int rest = index - paired;
                const bool even = p.height % 2 == 0;
                column = even ? rest / 2 : rest;
                l = even && rest % 2 == 1 ? p.height / 2 : 0;
            }
            const int k = s.row_place[column == 0 ? 0 : p.rows.length / 2];
            const int row = s.column_place[l];
            bin.place = row * p.row + k;
            bin.opposite = s.column_opposite[row] * p.row + k;
        } else {
            const int rest = index - special;
            const int row = rest / inner;
            const int k = s.interior[rest - row * inner];
            bin.place = row * p.row + k;
            bin.opposite = s.column_opposite[row] * p.row + s.row_opposite[k];
        }
        return bin;
    }
};

// What the planes hold of channels 2j and 2j + 1 at a frequency: 2*sqrt(N) times the spectrum.
__device__ __forceinline__ void split(const float2* planes, int plane, const Bin& bin, float2& a, float2& b) {
    const float2 z = planes[plane + bin.place], opposite = planes[plane + bin.opposite];
    a = make_float2(z.x + opposite.x, z.y - opposite.y);
    b = make_float2(z.y + opposite.y, opposite.x - z.x);
}

__device__ __forceinline__ float shrink(float v, float threshold) {
    return v > threshold ? v - threshold : v < -threshold ? v + threshold : 0.0f;
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
