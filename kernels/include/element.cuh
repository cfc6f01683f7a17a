// element.cuh - storage types and how they travel: 16-byte accesses, values in f32.
//
// The conversions are one PTX instruction each and written as such: the toolkit's cuda_fp16.h and cuda_bf16.h hold the
// same instructions behind several seconds of compilation a file.
#pragma once

#include <cstdint>

namespace fv {

// Bytes of the widest access.
constexpr int kWideBytes = 16;

struct F32 {
    using Storage = float;
    static __device__ __forceinline__ float widen(float x) { return x; }
    static __device__ __forceinline__ float narrow(float x) { return x; }
    // One 32-bit word of storage: its values from the lower address on.
    static constexpr int kPerWord = 1;
    static __device__ __forceinline__ void widen_word(uint32_t word, float* v) { v[0] = __uint_as_float(word); }
    static __device__ __forceinline__ uint32_t narrow_word(const float* v) { return __float_as_uint(v[0]); }
};

struct F16 {
    using Storage = uint16_t;
    static __device__ __forceinline__ float widen(uint16_t x) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
    }
    static __device__ __forceinline__ uint16_t narrow(float x) {
        uint16_t y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
    static constexpr int kPerWord = 2;
    static __device__ __forceinline__ void widen_word(uint32_t word, float* v) {
        v[0] = widen(static_cast<uint16_t>(word));
        v[1] = widen(static_cast<uint16_t>(word >> 16));
    }
    static __device__ __forceinline__ uint32_t narrow_word(const float* v) {
        uint32_t word;
        // The first source becomes the upper half.
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v[1]), "f"(v[0]));
        return word;
    }
};

struct Bf16 {
    using Storage = uint16_t;
    static __device__ __forceinline__ float widen(uint16_t x) {
        return __uint_as_float(static_cast<uint32_t>(x) << 16);
    }
    static __device__ __forceinline__ uint16_t narrow(float x) {
        uint16_t y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
    static constexpr int kPerWord = 2;
    static __device__ __forceinline__ void widen_word(uint32_t word, float* v) {
        v[0] = __uint_as_float(word << 16);
        v[1] = __uint_as_float(word & 0xffff0000u);
    }
    static __device__ __forceinline__ uint32_t narrow_word(const float* v) {
        uint32_t word;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v[1]), "f"(v[0]));
        return word;
    }
};

// One 16-byte store to global memory. As an assignment nvcc takes it apart where the values come out of several branches.
__device__ __forceinline__ void store_wide(void* at, uint4 raw) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(raw.x), "r"(raw.y),
                 "r"(raw.z), "r"(raw.w)
                 : "memory");
}

// What one lane moves in one access: 16 bytes, or one element where width, stride or pointer do not allow that.
template <class E, bool kWide>
struct Access;

template <class E>
struct Access<E, true> {
    using Raw = uint4;
    static constexpr int kElements = kWideBytes / sizeof(typename E::Storage);
    static constexpr int kRegisters = 4;

    // Through the read-only path: for memory that nobody writes during the launch.
    static __device__ __forceinline__ Raw load_constant(const typename E::Storage* at) {
        return __ldg(reinterpret_cast<const uint4*>(at));
    }
    static __device__ __forceinline__ Raw load(const typename E::Storage* at) {
        return *reinterpret_cast<const uint4*>(at);
    }
    static __device__ __forceinline__ void store(typename E::Storage* at, Raw raw) {
        *reinterpret_cast<uint4*>(at) = raw;
    }
    static __device__ __forceinline__ void widen(Raw raw, float* v) {
        E::widen_word(raw.x, v);
        E::widen_word(raw.y, v + E::kPerWord);
        E::widen_word(raw.z, v + 2 * E::kPerWord);
        E::widen_word(raw.w, v + 3 * E::kPerWord);
    }
    static __device__ __forceinline__ Raw narrow(const float* v) {
        return make_uint4(E::narrow_word(v), E::narrow_word(v + E::kPerWord), E::narrow_word(v + 2 * E::kPerWord),
                          E::narrow_word(v + 3 * E::kPerWord));
    }
};

template <class E>
struct Access<E, false> {
    using Raw = typename E::Storage;
    static constexpr int kElements = 1;
    static constexpr int kRegisters = 1;

    static __device__ __forceinline__ Raw load_constant(const Raw* at) { return __ldg(at); }
    static __device__ __forceinline__ Raw load(const Raw* at) { return *at; }
    static __device__ __forceinline__ void store(Raw* at, Raw raw) { *at = raw; }
    static __device__ __forceinline__ void widen(Raw raw, float* v) { v[0] = E::widen(raw); }
    static __device__ __forceinline__ Raw narrow(const float* v) { return E::narrow(v[0]); }
};

// Four 16-bit values, as many as an access of f32 holds: for rows of f32 that leave as halves.
template <class E>
struct Quarter {
    using Raw = uint2;
    static constexpr int kElements = 4;
    static_assert(E::kPerWord == 2, "two values a word");

    static __device__ __forceinline__ Raw load_constant(const typename E::Storage* at) {
        return __ldg(reinterpret_cast<const uint2*>(at));
    }
    static __device__ __forceinline__ void store(typename E::Storage* at, Raw raw) { *reinterpret_cast<uint2*>(at) = raw; }
    static __device__ __forceinline__ void widen(Raw raw, float* v) {
        E::widen_word(raw.x, v);
        E::widen_word(raw.y, v + 2);
    }
    static __device__ __forceinline__ Raw narrow(const float* v) { return make_uint2(E::narrow_word(v), E::narrow_word(v + 2)); }
};

// The access of E that has as many elements as one of F.
template <class E, class F, bool kWide>
struct Beside {
    using Type = Access<E, kWide>;
};
template <>
struct Beside<F16, F32, true> {
    using Type = Quarter<F16>;
};
template <>
struct Beside<Bf16, F32, true> {
    using Type = Quarter<Bf16>;
};

}  // namespace fv
