// windows.cu - means over windows of the grid of patches, and their way back (MSTM's fusion of scales).
//
// Maths:   pool: out[cell] = mean of x over the patches of a window of s x s; windows at the border have fewer.
//          add: x[patch] += pooled[its cell]; special tokens stay.
// Shapes:  x (B, special + rows*columns, C), pooled (B, ceil(rows/s)*ceil(columns/s), C), all without gaps.
// Launch:  grid ceil(items/256), block 256: a thread an access of 16 bytes (or one value) of the output.
// Cost:    pool reads the patches once and writes 1/s^2 of them; add reads and writes them once. Bound by memory.

#include <cstddef>

#include "divide.cuh"
#include "element.cuh"

namespace {

constexpr int kThreads = 256;

struct WindowParams {
    void* x;             // (B, special + rows*columns, C)
    void* pooled;        // (B, cells, C)
    fv::Divisor units;   // accesses of a row
    fv::Divisor places;  // rows of an image: cells for pool, patches for add
    fv::Divisor across;  // columns of cells for pool, of patches for add
    fv::Divisor scale;
    int32_t special;
    int32_t rows;
    int32_t columns;
    int32_t cell_columns;
    int32_t cells;
    int32_t items;
};
static_assert(sizeof(WindowParams) == 88 && offsetof(WindowParams, units) == 16 && offsetof(WindowParams, special) == 64,
              "the launcher's layout");

struct Item {
    int64_t image;
    int unit;
    int row;
    int column;
};

__device__ __forceinline__ Item item_of(const WindowParams& p, int item) {
    const int place_of_all = p.units.quotient(item);
    const int image = p.places.quotient(place_of_all);
    const int place = p.places.remainder(place_of_all, image);
    const int row = p.across.quotient(place);
    return {image, p.units.remainder(item, place_of_all), row, p.across.remainder(place, row)};
}

template <class E, bool kWide>
__device__ __forceinline__ void pool(const WindowParams& p) {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    const int at = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (at >= p.items) {
        return;
    }
    const Item item = item_of(p, at);
    const int64_t width = static_cast<int64_t>(p.units.divisor) * A::kElements;
    const int s = p.scale.divisor;
    const int last_row = min((item.row + 1) * s, p.rows);
    const int last_column = min((item.column + 1) * s, p.columns);
    const auto* x = static_cast<const Storage*>(p.x) +
                    (item.image * (p.special + static_cast<int64_t>(p.rows) * p.columns) + p.special) * width +
                    item.unit * A::kElements;
    float sums[A::kElements];
#pragma unroll
    for (int j = 0; j < A::kElements; ++j) {
        sums[j] = 0.0f;
    }
    for (int row = item.row * s; row < last_row; ++row) {
        for (int column = item.column * s; column < last_column; ++column) {
            float v[A::kElements];
            A::widen(A::load(x + (static_cast<int64_t>(row) * p.columns + column) * width), v);
#pragma unroll
            for (int j = 0; j < A::kElements; ++j) {
                sums[j] += v[j];
            }
        }
    }
    const float count = static_cast<float>((last_row - item.row * s) * (last_column - item.column * s));
#pragma unroll
    for (int j = 0; j < A::kElements; ++j) {
        sums[j] = __fdiv_rn(sums[j], count);
    }
    auto* out = static_cast<Storage*>(p.pooled) +
                (item.image * p.cells + static_cast<int64_t>(item.row) * p.cell_columns + item.column) * width +
                item.unit * A::kElements;
    A::store(out, A::narrow(sums));
}

template <class E, bool kWide>
__device__ __forceinline__ void add(const WindowParams& p) {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    const int at = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (at >= p.items) {
        return;
    }
    const Item item = item_of(p, at);
    const int64_t width = static_cast<int64_t>(p.units.divisor) * A::kElements;
    auto* x = static_cast<Storage*>(p.x) +
              (item.image * (p.special + static_cast<int64_t>(p.rows) * p.columns) + p.special +
               static_cast<int64_t>(item.row) * p.columns + item.column) *
                  width +
              item.unit * A::kElements;
    const int cell = p.scale.quotient(item.row) * p.cell_columns + p.scale.quotient(item.column);
    const auto* pooled = static_cast<const Storage*>(p.pooled) + (item.image * p.cells + cell) * width + item.unit * A::kElements;
    float v[A::kElements], coarse[A::kElements];
    A::widen(A::load(x), v);
    A::widen(A::load(pooled), coarse);
#pragma unroll
    for (int j = 0; j < A::kElements; ++j) {
        v[j] += coarse[j];
    }
    A::store(x, A::narrow(v));
}

}  // namespace

#define FV_WINDOWS(SUFFIX, E, WIDE)                                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads, 3) fv_windows_pool_##SUFFIX(const __grid_constant__ WindowParams p) { \
        pool<E, WIDE>(p);                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 4) fv_windows_add_##SUFFIX(const __grid_constant__ WindowParams p) {  \
        add<E, WIDE>(p);                                                                                               \
    }
FV_WINDOWS(f32, fv::F32, true)
FV_WINDOWS(f16, fv::F16, true)
FV_WINDOWS(bf16, fv::Bf16, true)
FV_WINDOWS(f32_narrow, fv::F32, false)
FV_WINDOWS(f16_narrow, fv::F16, false)
FV_WINDOWS(bf16_narrow, fv::Bf16, false)
