// patch.cu - images to rows of normalised pixels, and patch tokens to the sequence that enters the first block.
//
// Maths:   patches: out[image, row*columns + column, (c*ph + y)*pw + x] = (p/255 - mean[c])/std[c] of the 8-bit pixel p at
//          (c, row*ph + y, column*pw + x), every step rounded as IEEE 754 says; f32 pixels are taken as they are.
//          embed: out[image] = prefix, then patches[image] + position, in f32.
// Shapes:  pixels of (B, channels, height, width), any strides in elements: planes (NCHW), interleaved (NHWC) or a crop of
//          either;  patches, out (B, N, C), last axis contiguous, other strides in elements;  prefix (special, C),
//          position (N - special, C), contiguous.
// Launch:  grid ceil(items/256), block 256. patches: an item is one store's worth of pixels of a line of a patch (all
//          three channels of it where they are interleaved), for 4 neighbouring patches, 8 where a store is narrow; embed: one
//          access of a token, for 4 images. Fewer than 2^31 items.
// Cost:    patches reads every pixel and writes every value once: 1 or 4 bytes and 2 or 4 bytes a value, about 17
//          operations for an 8-bit one (the division by std has 11 of them), which memory covers on every card. Items are in
//          the order of the output, so stores are whole sectors; the part of a sector that belongs to the next patch is
//          found in L1. embed moves (patches + tokens)*C elements an image, and position once for 4 images.
//          Tried and left: exact quotients out of a table in shared memory, which photographs' pixels read with conflicts.

#include <cstddef>

#include "divide.cuh"
#include "element.cuh"
#include "pixel.cuh"

namespace {

constexpr int kThreads = 256;
// Half of what a multiprocessor of compute capability 8.0 or 9.0 holds.
constexpr int kBlocks = 4;
// Images an item of embed covers.
constexpr int kTogether = 4;
// Patches an item covers: where a store is narrow, finding the item's place costs more than its pixels.
template <int kCount>
constexpr int kPatches = kCount <= 2 ? 8 : 4;
constexpr int kNormalised = 16;

struct PatchParams {
    const void* pixels;  // (B, channels, height, width)
    void* out;           // (B, rows*columns, channels*ph*pw)
    int64_t image_stride, channel_stride, line_stride, pixel_stride;
    int64_t out_batch_stride, out_token_stride;
    fv::Divisor chunks;   // items of a group of patches
    fv::Divisor a_line;   // chunks of a line of a patch
    fv::Divisor lines;    // ph
    fv::Divisor groups;   // of neighbouring patches in a row of them
    fv::Divisor rows;     // of patches in an image
    int32_t items;
    int32_t columns;      // patches in a row of them
    int32_t patch_width;  // pw
    int32_t plane;        // ph*pw
    int32_t reserved;
    float mean[kNormalised];  // by channel
    float std[kNormalised];
};
static_assert(sizeof(PatchParams) == 272 && offsetof(PatchParams, image_stride) == 16 && offsetof(PatchParams, chunks) == 64 &&
                  offsetof(PatchParams, items) == 124 && offsetof(PatchParams, mean) == 144,
              "the launcher's layout");

struct EmbedParams {
    const void* patches;   // (B, N - special, C); may lie in `out` where it belongs
    const void* prefix;    // (special, C), or null for none
    const void* position;  // (N - special, C) or null
    void* out;             // (B, N, C)
    int64_t patches_batch_stride, patches_token_stride;
    int64_t out_batch_stride, out_token_stride;
    fv::Divisor units;   // accesses a token
    fv::Divisor tokens;  // N
    int32_t items;
    int32_t images;   // B
    int32_t special;
    int32_t width;    // C
};
static_assert(sizeof(EmbedParams) == 104 && offsetof(EmbedParams, patches_batch_stride) == 32 &&
                  offsetof(EmbedParams, units) == 64 && offsetof(EmbedParams, items) == 88,
              "the launcher's layout");

// Bytes of one load, in registers.
template <int kBytes>
struct Packet {
    uint32_t words[(kBytes + 3) / 4];

    __device__ __forceinline__ void load(const void* at) {
        if constexpr (kBytes >= 16) {
#pragma unroll
            for (int i = 0; i < kBytes / 16; ++i) {
                const uint4 four = __ldg(static_cast<const uint4*>(at) + i);
                words[4 * i] = four.x;
                words[4 * i + 1] = four.y;
                words[4 * i + 2] = four.z;
                words[4 * i + 3] = four.w;
            }
        } else if constexpr (kBytes == 8) {
            const uint2 two = __ldg(static_cast<const uint2*>(at));
            words[0] = two.x;
            words[1] = two.y;
        } else if constexpr (kBytes == 4) {
            words[0] = __ldg(static_cast<const uint32_t*>(at));
        } else if constexpr (kBytes == 2) {
            words[0] = __ldg(static_cast<const uint16_t*>(at));
        } else {
            words[0] = __ldg(static_cast<const uint8_t*>(at));
        }
    }
};

struct Normaliser {
    float mean;
    float std;
};

struct U8 {
    using Storage = uint8_t;
    static __device__ __forceinline__ Normaliser normaliser(const PatchParams& p, int c) { return {p.mean[c], p.std[c]}; }
    template <class Packet>
    static __device__ __forceinline__ float value(const Packet& packet, int i, Normaliser n) {
        // 2^23 + byte, less 2^23: exact, and at the full rate that a conversion does not have.
        const uint32_t bits = __byte_perm(packet.words[i / 4], 0x4b000000u, 0x7440u + i % 4);
        const float byte = __fsub_rn(__uint_as_float(bits), 8388608.0f);
        return fv::normalised_byte(byte, n.mean, n.std);
    }
};

struct Normalised {
    using Storage = float;
    static __device__ __forceinline__ Normaliser normaliser(const PatchParams&, int) { return {}; }
    template <class Packet>
    static __device__ __forceinline__ float value(const Packet& packet, int i, Normaliser) {
        return __uint_as_float(packet.words[i]);
    }
};

// Stores kCount values: 16 bytes, two elements, or one.
template <class E, int kCount>
__device__ __forceinline__ void store_values(typename E::Storage* at, const float* v) {
    if constexpr (kCount == 1) {
        *at = E::narrow(v[0]);
    } else if constexpr (kCount == fv::Access<E, true>::kElements) {
        fv::store_wide(at, fv::Access<E, true>::narrow(v));
    } else if constexpr (E::kPerWord == kCount) {
        *reinterpret_cast<uint32_t*>(at) = E::narrow_word(v);
    } else {
        static_assert(kCount == 2 && E::kPerWord == 1, "two words");
        *reinterpret_cast<uint2*>(at) = make_uint2(E::narrow_word(v), E::narrow_word(v + 1));
    }
}

// kCount pixels of a line in each of kChannels interleaved channels.
template <class P, class E, int kCount, int kChannels>
__device__ __forceinline__ void patch_items(const PatchParams& p) {
    using Pixel = typename P::Storage;
    using Storage = typename E::Storage;
    constexpr int kBytes = kCount * static_cast<int>(sizeof(Pixel));
    // Loads in flight together: 32 bytes of registers at least, 96 at most.
    constexpr int kLoads = kBytes * kChannels <= 16 ? 4 : kBytes * kChannels <= 48 ? 2 : 1;

    // Fewer than 2^31 items, in blocks of 256: the product fits.
    const int item = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (item >= p.items) {
        return;
    }
    const int strip = p.chunks.quotient(item);
    const int chunk = p.chunks.remainder(item, strip);  // [0, channels/kChannels * ph * pw/kCount)
    const int channel_line = p.a_line.quotient(chunk);
    const int x = p.a_line.remainder(chunk, channel_line) * kCount;  // [0, pw)
    const int c = p.lines.quotient(channel_line);                    // [0, channels/kChannels)
    const int y = p.lines.remainder(channel_line, c);                // [0, ph)
    const int image_row = p.groups.quotient(strip);
    const int group = p.groups.remainder(strip, image_row);
    const int image = p.rows.quotient(image_row);
    const int row = p.rows.remainder(image_row, image);
    const int first = group * kPatches<kCount>;  // [0, columns)

    const int64_t step = p.patch_width * p.pixel_stride;
    const Pixel* pixels = static_cast<const Pixel*>(p.pixels) + image * p.image_stride + c * p.channel_stride +
                          static_cast<int64_t>(row * p.lines.divisor + y) * p.line_stride + first * step + x * p.pixel_stride;
    Storage* out = static_cast<Storage*>(p.out) + image * p.out_batch_stride +
                   (static_cast<int64_t>(row) * p.columns + first) * p.out_token_stride + channel_line * p.patch_width + x;
    const int count = min(kPatches<kCount>, p.columns - first);
    Normaliser normalisers[kChannels];
#pragma unroll
    for (int channel = 0; channel < kChannels; ++channel) {
        normalisers[channel] = P::normaliser(p, c + channel);
    }
#pragma unroll
    for (int base = 0; base < kPatches<kCount>; base += kLoads) {
        Packet<kBytes> packets[kLoads][kChannels];
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            if (base + k < count) {
#pragma unroll
                for (int part = 0; part < kChannels; ++part) {
                    packets[k][part].load(pixels + part * kCount);
                }
                pixels += step;
            }
        }
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            if (base + k < count) {
#pragma unroll
                for (int channel = 0; channel < kChannels; ++channel) {
                    float v[kCount];
#pragma unroll
                    for (int i = 0; i < kCount; ++i) {
                        const int at = i * kChannels + channel;
                        v[i] = P::value(packets[k][at / kCount], at % kCount, normalisers[channel]);
                    }
                    store_values<E, kCount>(out + channel * p.plane, v);
                }
                out += p.out_token_stride;
            }
        }
    }
}

template <class Storage, class Raw>
__device__ __forceinline__ void store_raw(Storage* at, Raw raw) {
    if constexpr (sizeof(Raw) == fv::kWideBytes) {
        fv::store_wide(at, raw);
    } else {
        *at = raw;
    }
}

template <class E, bool kWide>
__device__ __forceinline__ void embed_items(const EmbedParams& p) {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    const int item = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (item >= p.items) {
        return;
    }
    const int row = p.units.quotient(item);
    const int column = p.units.remainder(item, row) * A::kElements;  // [0, C)
    const int group = p.tokens.quotient(row);
    const int token = p.tokens.remainder(row, group);  // [0, N)
    const int first = group * kTogether;               // [0, B)
    const int count = min(kTogether, p.images - first);
    Storage* out = static_cast<Storage*>(p.out) + first * p.out_batch_stride + token * p.out_token_stride + column;
    if (token < p.special) {
        const auto raw =
            A::load_constant(static_cast<const Storage*>(p.prefix) + static_cast<int64_t>(token) * p.width + column);
        for (int k = 0; k < count; ++k) {
            store_raw(out + k * p.out_batch_stride, raw);
        }
        return;
    }
    const int64_t patch = token - p.special;
    const Storage* patches =
        static_cast<const Storage*>(p.patches) + first * p.patches_batch_stride + patch * p.patches_token_stride + column;
    typename A::Raw raw[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
        if (k < count) {
            raw[k] = A::load(patches + k * p.patches_batch_stride);
        }
    }
    if (p.position != nullptr) {
        float position[A::kElements];
        A::widen(A::load_constant(static_cast<const Storage*>(p.position) + patch * p.width + column), position);
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
            if (k < count) {
                float v[A::kElements];
                A::widen(raw[k], v);
#pragma unroll
                for (int i = 0; i < A::kElements; ++i) {
                    v[i] = __fadd_rn(v[i], position[i]);
                }
                raw[k] = A::narrow(v);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
        if (k < count) {
            store_raw(out + k * p.out_batch_stride, raw[k]);
        }
    }
}

}  // namespace

#define FV_PATCHES(NAME, P, E, COUNT, CHANNELS)                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) NAME(const __grid_constant__ PatchParams p) {       \
        patch_items<P, E, COUNT, CHANNELS>(p);                                                                          \
    }
#define FV_EMBED(NAME, E, WIDE)                                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) NAME(const __grid_constant__ EmbedParams p) {       \
        embed_items<E, WIDE>(p);                                                                                        \
    }
// 16 bytes a store, two elements where patches or rows do not fit that, one for any strides.
#define FV_PATCHES_OF(PIXEL, P, TYPE, E)                                             \
    FV_PATCHES(fv_patches_##PIXEL##_##TYPE##_planes, P, E, 16 / sizeof(E::Storage), 1) \
    FV_PATCHES(fv_patches_##PIXEL##_##TYPE##_planes_pair, P, E, 2, 1)                \
    FV_PATCHES(fv_patches_##PIXEL##_##TYPE##_rgb, P, E, 16 / sizeof(E::Storage), 3)  \
    FV_PATCHES(fv_patches_##PIXEL##_##TYPE##_rgb_pair, P, E, 2, 3)                   \
    FV_PATCHES(fv_patches_##PIXEL##_##TYPE##_single, P, E, 1, 1)
#define FV_OF(TYPE, E)                              \
    FV_PATCHES_OF(u8, U8, TYPE, E)                  \
    FV_PATCHES_OF(f32, Normalised, TYPE, E)         \
    FV_EMBED(fv_embed_##TYPE, E, true)              \
    FV_EMBED(fv_embed_##TYPE##_narrow, E, false)
FV_OF(f32, fv::F32)
FV_OF(f16, fv::F16)
FV_OF(bf16, fv::Bf16)
