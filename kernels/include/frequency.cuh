// frequency.cuh - what the kernels of the frequency filter have in common: parameters, planes to and from memory, bins.
//
// A plane holds two real channels of a group as the parts of complex values, (H, row) float2, in shared memory. From plane to
// plane it is rows.outer_step, as along the columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.cuh"
#include "fourier.cuh"

namespace fv {

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
    Axis rows, columns;  // lines along W, lines along H
    Divisor width;       // W
    Divisor pairs;       // S/2, or S where channels travel one by one; on tensor cores: S, or N where planar, by `together`
    Divisor positions;   // N
    Divisor interior;    // columns between 0 and W/2, at least 1
    int32_t height;
    int32_t channels;    // S
    int32_t groups;      // G
    int32_t row;         // from row to row of a plane: W, made odd
    int32_t chunk;       // bins at a time
    int32_t tiles;       // of outputs
    int32_t scratch;     // complex values
    int32_t relu;        // otherwise SiLU
    int32_t planar;      // positions are contiguous, not channels
    int32_t together;    // two channels travel in one access; on tensor cores: how many do, or positions where planar
    int32_t weights_together;  // two outputs' weights travel in one access, on tensor cores
    float threshold;
    float scale;  // 1/(2*sqrt(N)): of what the planes hold to the spectrum
    int32_t unused;
};
// src/cuda/frequency/mod.rs asserts the same numbers.
static_assert(sizeof(FrequencyParams) == 352 && offsetof(FrequencyParams, x_at) == 64 && offsetof(FrequencyParams, rows) == 136 &&
                  offsetof(FrequencyParams, columns) == 192 && offsetof(FrequencyParams, width) == 248 &&
                  offsetof(FrequencyParams, height) == 296 && offsetof(FrequencyParams, scale) == 344,
              "the launcher's layout");

// Tables in shared memory.
struct Tables {
    float2* row_turns;     // (W): exp(-2*pi*i*j/W)
    float2* column_turns;  // (H), right behind
    uint8_t* row_place;    // of frequency k
    uint8_t* column_place;
    uint8_t* row_opposite;  // of place i: the place of the negative frequency
    uint8_t* column_opposite;
    uint8_t* interior;  // the places of 0 < k < W/2, ascending
};

// The tables of places lie behind each other.
__device__ __forceinline__ void carve_places(const FrequencyParams& p, Tables& s, void* at) {
    s.row_place = static_cast<uint8_t*>(at);
    s.column_place = s.row_place + p.rows.length;
    s.row_opposite = s.column_place + p.height;
    s.column_opposite = s.row_opposite + p.rows.length;
    s.interior = s.column_opposite + p.height;
}

__device__ __forceinline__ void fill_turns(const FrequencyParams& p, const Tables& s) {
    const int width = p.rows.length;
    for (int i = static_cast<int>(threadIdx.x); i < width + p.height; i += static_cast<int>(blockDim.x)) {
        const int n = i < width ? width : p.height;
        float sin, cos;
        sincospif(-2.0f * static_cast<float>(i < width ? i : i - width) / static_cast<float>(n), &sin, &cos);
        s.row_turns[i] = make_float2(cos, sin);
    }
}

// The tables of places. Ends in a barrier.
__device__ __forceinline__ void fill_places(const FrequencyParams& p, const Tables& s) {
    const int width = p.rows.length;
    const int threads = static_cast<int>(blockDim.x);
    for (int i = static_cast<int>(threadIdx.x); i < width + p.height; i += threads) {
        const bool row = i < width;
        const Axis& axis = row ? p.rows : p.columns;
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
    const int plane = p.rows.outer_step;
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
    const int plane = p.rows.outer_step;
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

    __device__ __forceinline__ Bin at(const FrequencyParams& p, const Tables& s, int index) const {
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
            const int row = p.interior.quotient(rest);
            const int k = s.interior[p.interior.remainder(rest, row)];
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

}  // namespace fv
