// frequency_wide.cuh - a group's channels of 16 bits between memory and planes, several values in an access.
#pragma once

#include <cstdint>

#include "element.cuh"
#include "frequency.cuh"

namespace fv {

// kValues 16-bit values in one access.
template <int kValues>
struct Words {
    uint32_t word[kValues / 2];

    static __device__ __forceinline__ Words load(const uint16_t* at) {
        Words w;
        if constexpr (kValues == 8) {
            const uint4 raw = __ldg(reinterpret_cast<const uint4*>(at));
            w = {{raw.x, raw.y, raw.z, raw.w}};
        } else if constexpr (kValues == 4) {
            const uint2 raw = __ldg(reinterpret_cast<const uint2*>(at));
            w = {{raw.x, raw.y}};
        } else {
            w = {{__ldg(reinterpret_cast<const uint32_t*>(at))}};
        }
        return w;
    }
    __device__ __forceinline__ void store(uint16_t* at) const {
        if constexpr (kValues == 8) {
            *reinterpret_cast<uint4*>(at) = make_uint4(word[0], word[1], word[2], word[3]);
        } else if constexpr (kValues == 4) {
            *reinterpret_cast<uint2*>(at) = make_uint2(word[0], word[1]);
        } else {
            *reinterpret_cast<uint32_t*>(at) = word[0];
        }
    }
};

// kValues channels of a position, or two positions of two channels, between memory and planes: `body(position, channel, place)`
// for the first of them, channel of the group and place in the first plane.
template <int kValues, bool kPlanar, class Body>
__device__ __forceinline__ void for_each_access(const FrequencyParams& p, Body&& body) {
    const int items = kPlanar ? (p.channels + 1) / 2 * p.pairs.divisor : p.positions.divisor * p.pairs.divisor;
    for (int item = static_cast<int>(threadIdx.x); item < items; item += static_cast<int>(blockDim.x)) {
        const int quotient = p.pairs.quotient(item), rest = p.pairs.remainder(item, quotient);
        const int position = kPlanar ? 2 * rest : quotient, channel = kPlanar ? 2 * quotient : kValues * rest;
        const int h = p.width.quotient(position);
        body(position, channel, channel / 2 * p.rows.outer_step + h * p.row + p.width.remainder(position, h));
    }
}

template <class E, int kValues>
__device__ __forceinline__ void load_channels(const FrequencyParams& p, float2* planes, const uint16_t* x) {
    for_each_access<kValues, false>(p, [&](int position, int channel, int place) {
        const auto words = Words<kValues>::load(x + position * p.x_at.position + channel);
#pragma unroll
        for (int i = 0; i < kValues / 2; ++i) {
            float v[2];
            E::widen_word(words.word[i], v);
            planes[place + i * p.rows.outer_step] = make_float2(v[0], v[1]);
        }
    });
}

template <class E>
__device__ __forceinline__ void load_positions(const FrequencyParams& p, float2* planes, const uint16_t* x) {
    for_each_access<2, true>(p, [&](int position, int channel, int place) {
        const uint16_t* at = x + channel * p.x_at.channel + position;
        float a[2], b[2] = {};
        E::widen_word(Words<2>::load(at).word[0], a);
        if (channel + 1 < p.channels) {
            E::widen_word(Words<2>::load(at + p.x_at.channel).word[0], b);
        }
        planes[place] = make_float2(a[0], b[0]);
        planes[place + 1] = make_float2(a[1], b[1]);
    });
}

template <class E, int kValues>
__device__ __forceinline__ void store_channels(const FrequencyParams& p, const float2* planes, const uint16_t* residual,
                                               uint16_t* out) {
    const float factor = 2.0f * p.scale * p.scale;
    for_each_access<kValues, false>(p, [&](int position, int channel, int place) {
        Words<kValues> words = {};
        if (p.residual != nullptr) {
            words = Words<kValues>::load(residual + position * p.residual_at.position + channel);
        }
#pragma unroll
        for (int i = 0; i < kValues / 2; ++i) {
            const float2 sum = planes[place + i * p.rows.outer_step];
            float v[2];
            E::widen_word(words.word[i], v);
            v[0] = __fmaf_rn(sum.x, factor, v[0]);
            v[1] = __fmaf_rn(sum.y, factor, v[1]);
            words.word[i] = E::narrow_word(v);
        }
        words.store(out + position * p.out_at.position + channel);
    });
}

template <class E>
__device__ __forceinline__ void store_positions(const FrequencyParams& p, const float2* planes, const uint16_t* residual,
                                                uint16_t* out) {
    const float factor = 2.0f * p.scale * p.scale;
    for_each_access<2, true>(p, [&](int position, int channel, int place) {
        const float2 first = planes[place], second = planes[place + 1];
        const float sums[2][2] = {{first.x, second.x}, {first.y, second.y}};
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            if (channel + c < p.channels) {
                Words<2> words = {};
                if (p.residual != nullptr) {
                    words = Words<2>::load(residual + (channel + c) * p.residual_at.channel + position);
                }
                float v[2];
                E::widen_word(words.word[0], v);
                v[0] = __fmaf_rn(sums[c][0], factor, v[0]);
                v[1] = __fmaf_rn(sums[c][1], factor, v[1]);
                words.word[0] = E::narrow_word(v);
                words.store(out + (channel + c) * p.out_at.channel + position);
            }
        }
    });
}

template <class E>
__device__ __forceinline__ void load_group(const FrequencyParams& p, float2* planes, int64_t image, int group) {
    const int first = group * p.channels;
    const auto* x = static_cast<const uint16_t*>(p.x) + image * p.x_at.batch + first * p.x_at.channel;
    if (p.together == 0) {
        load_planes<E>(p, planes, image, first, p.channels);
    } else if (p.planar != 0) {
        load_positions<E>(p, planes, x);
    } else if (p.together == 8) {
        load_channels<E, 8>(p, planes, x);
    } else if (p.together == 4) {
        load_channels<E, 4>(p, planes, x);
    } else {
        load_channels<E, 2>(p, planes, x);
    }
}

template <class E>
__device__ __forceinline__ void store_group(const FrequencyParams& p, const float2* planes, int64_t image, int group) {
    const int first = group * p.channels;
    auto* out = static_cast<uint16_t*>(p.out) + image * p.out_at.batch + first * p.out_at.channel;
    const auto* residual =
        static_cast<const uint16_t*>(p.residual) + image * p.residual_at.batch + first * p.residual_at.channel;
    if (p.together == 0) {
        store_planes<E>(p, planes, image, first, p.channels);
    } else if (p.planar != 0) {
        store_positions<E>(p, planes, residual, out);
    } else if (p.together == 8) {
        store_channels<E, 8>(p, planes, residual, out);
    } else if (p.together == 4) {
        store_channels<E, 4>(p, planes, residual, out);
    } else {
        store_channels<E, 2>(p, planes, residual, out);
    }
}

}  // namespace fv
