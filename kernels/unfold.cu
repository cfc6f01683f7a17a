// unfold.cu - what a square window sees at each of its places, over images and over feature maps.
//
// Maths:   images: out[b, place, (c*k + ky)*k + kx] = pixel (c, S*row + ky - P, S*column + kx - P), normalised as patch.cu does,
//          f32 pixels taken as they are;  maps: out[b, place, (ky*k + kx)*C + c] = x[b, (S*row + ky - P)*W + S*column + kx - P, c].
//          0 beyond the border. place = row*columns + column.
// Shapes:  pixels (B, channels, H, W), any strides in elements;  x (B, H*W, C), out (B, places, k*k*C or channels*k*k), last axis
//          contiguous, other strides in elements.
// Launch:  a thread has one value of a row for 4 places next to each other (images), or one access of a tap (maps: 16, 4 or 2
//          bytes, whatever the type): grid ceil(items/256), block 256, fewer than 2^31 items.
// Cost:    writes k*k/S^2 times what it reads, which comes from memory once and from cache after that: bound by the writing. images:
//          neighbouring threads have neighbouring values of a row, so stores are whole but for rows' ends; normalising takes
//          about 12 operations a value, and each pixel is normalised again wherever a window sees it, k*k/S^2 times, which costs
//          less than bringing it back normalised would. maps: finding a place takes about 25 operations an access.

#include <cstddef>

#include "divide.cuh"
#include "element.cuh"
#include "pixel.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;
// Places a thread covers, of one row of them.
constexpr int kPlaces = 4;
constexpr int kNormalised = 16;

struct UnfoldParams {
    const void* x;  // (B, H*W, C)
    void* out;      // (B, places, k*k*C)
    int64_t x_batch_stride, x_token_stride;      // in units of the access
    int64_t out_batch_stride, out_token_stride;  // in units of the access
    fv::Divisor units;    // accesses a tap
    fv::Divisor taps;     // k*k
    fv::Divisor kernel;   // k
    fv::Divisor places;
    fv::Divisor columns;  // of places
    int32_t items;
    int32_t height, width;  // of x
    int32_t stride, padding;
};
static_assert(sizeof(UnfoldParams) == 128 && offsetof(UnfoldParams, x_batch_stride) == 16 && offsetof(UnfoldParams, units) == 48 &&
                  offsetof(UnfoldParams, items) == 108,
              "the launcher's layout");

struct UnfoldImagesParams {
    const void* pixels;  // (B, channels, H, W)
    void* out;           // (B, places, channels*k*k)
    int64_t image_stride, channel_stride, line_stride, pixel_stride;
    int64_t out_batch_stride, out_token_stride;
    fv::Divisor row;     // channels*k*k
    fv::Divisor taps;    // k*k
    fv::Divisor kernel;  // k
    fv::Divisor groups;  // of places in a row of them
    fv::Divisor rows;    // of places
    int32_t items;
    int32_t columns;        // places in a row of them
    int32_t height, width;  // of the images
    int32_t stride, padding;
    int32_t reserved;
    float mean[kNormalised];  // by channel
    float std[kNormalised];
};
static_assert(sizeof(UnfoldImagesParams) == 280 && offsetof(UnfoldImagesParams, image_stride) == 16 &&
                  offsetof(UnfoldImagesParams, row) == 64 && offsetof(UnfoldImagesParams, items) == 124 &&
                  offsetof(UnfoldImagesParams, mean) == 152,
              "the launcher's layout");

template <class Unit>
__device__ __forceinline__ void unfold(const UnfoldParams& p) {
    const int item = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (item >= p.items) {
        return;
    }
    const int tap_of_all = p.units.quotient(item);
    const int unit = p.units.remainder(item, tap_of_all);
    const int place_of_all = p.taps.quotient(tap_of_all);
    const int tap = p.taps.remainder(tap_of_all, place_of_all);  // [0, k*k)
    const int64_t image = p.places.quotient(place_of_all);
    const int place = p.places.remainder(place_of_all, static_cast<int>(image));
    const int row = p.columns.quotient(place);
    const int column = p.columns.remainder(place, row);
    const int kernel_row = p.kernel.quotient(tap);
    const int y = row * p.stride + kernel_row - p.padding;
    const int x = column * p.stride + p.kernel.remainder(tap, kernel_row) - p.padding;
    Unit value = {};
    if (y >= 0 && y < p.height && x >= 0 && x < p.width) {
        value = __ldg(static_cast<const Unit*>(p.x) + image * p.x_batch_stride +
                      (static_cast<int64_t>(y) * p.width + x) * p.x_token_stride + unit);
    }
    static_cast<Unit*>(p.out)[image * p.out_batch_stride + place * p.out_token_stride + tap * p.units.divisor + unit] = value;
}

struct U8 {
    using Storage = uint8_t;
    static __device__ __forceinline__ float value(uint8_t pixel, float mean, float std) {
        return fv::normalised_byte(static_cast<float>(pixel), mean, std);
    }
};
struct Normalised {
    using Storage = float;
    static __device__ __forceinline__ float value(float pixel, float, float) { return pixel; }
};

template <class P, class E>
__device__ __forceinline__ void unfold_images(const UnfoldImagesParams& p) {
    using Pixel = typename P::Storage;
    using Storage = typename E::Storage;
    const int item = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (item >= p.items) {
        return;
    }
    const int group_of_all = p.row.quotient(item);
    const int at = p.row.remainder(item, group_of_all);  // [0, channels*k*k)
    const int row_of_all = p.groups.quotient(group_of_all);
    const int first = p.groups.remainder(group_of_all, row_of_all) * kPlaces;  // [0, columns)
    const int64_t image = p.rows.quotient(row_of_all);
    const int row = p.rows.remainder(row_of_all, static_cast<int>(image));
    const int channel = p.taps.quotient(at);
    const int tap = p.taps.remainder(at, channel);
    const int kernel_row = p.kernel.quotient(tap);
    const int y = row * p.stride + kernel_row - p.padding;
    const int x = first * p.stride + p.kernel.remainder(tap, kernel_row) - p.padding;
    const bool line = y >= 0 && y < p.height;
    const Pixel* pixels = static_cast<const Pixel*>(p.pixels) + image * p.image_stride + channel * p.channel_stride +
                          static_cast<int64_t>(y) * p.line_stride;
    const float mean = p.mean[channel % kNormalised];
    const float std = p.std[channel % kNormalised];
    Pixel found[kPlaces];
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
        const int column = x + i * p.stride;
        const bool seen = line && column >= 0 && column < p.width && first + i < p.columns;
        found[i] = seen ? __ldg(pixels + column * p.pixel_stride) : static_cast<Pixel>(0);
    }
    Storage* out = static_cast<Storage*>(p.out) + image * p.out_batch_stride +
                   (static_cast<int64_t>(row) * p.columns + first) * p.out_token_stride + at;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
        if (first + i < p.columns) {
            const int column = x + i * p.stride;
            const bool seen = line && column >= 0 && column < p.width;
            *out = seen ? E::narrow(P::value(found[i], mean, std)) : static_cast<Storage>(0);
        }
        out += p.out_token_stride;
    }
}

}  // namespace

// By the bytes of an access.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) fv_unfold_16(const __grid_constant__ UnfoldParams p) {
    unfold<uint4>(p);
}
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) fv_unfold_4(const __grid_constant__ UnfoldParams p) {
    unfold<uint32_t>(p);
}
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) fv_unfold_2(const __grid_constant__ UnfoldParams p) {
    unfold<uint16_t>(p);
}
#define FV_UNFOLD_IMAGES(PIXEL, P, TYPE, E)                                                                           \
    extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)                                                   \
        fv_unfold_images_##PIXEL##_##TYPE(const __grid_constant__ UnfoldImagesParams p) {                             \
        unfold_images<P, E>(p);                                                                                       \
    }
#define FV_OF(TYPE, E)                         \
    FV_UNFOLD_IMAGES(u8, U8, TYPE, E)          \
    FV_UNFOLD_IMAGES(f32, Normalised, TYPE, E)
FV_OF(f32, fv::F32)
FV_OF(f16, fv::F16)
FV_OF(bf16, fv::Bf16)
