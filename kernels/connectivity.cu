// connectivity.cu - drops the smallest weights of a sparse layer and grows as many where the gradient is largest (SViTE).
//
// Maths:   key(x) = the bits of |x|, 0 of NaN; key of a weight outside the mask = 0. active = ones of the mask, r =
//          ceil(rate*active). threshold = the (n - active + r)-th smallest key; survivors = keys above it; dropped = active -
//          survivors. Of the others those with the `dropped` largest gradient keys come (back), equal ones by ascending index.
//          A weight stays where it was and is in the mask, and becomes 0 elsewhere. Layers without holes stay as they are.
// Shapes:  weight, gradient (n) in order, n to 2^30;  mask, survivors (n) bytes;  workspace: State, 2^14 and 2^17 bins, a
//          word a tile of fv_grow_write, all zero at the start.
// Launch:  in this order: fv_drop_high, fv_connectivity_locate, fv_drop_low, locate, fv_grow_high, locate, fv_grow_low,
//          locate, fv_grow_write. high and low: block 768, two a multiprocessor at most; high with 64 KiB of dynamic shared memory.
//          locate: one block of 1,024. write: grid ceil(n/(256*values of an access)), block 256.
// Cost:    a selection takes three passes over its values: a histogram of the upper 14 bits of their keys, one of the lower
//          17 among those with the right upper bits, and the write. The drop's write is the gradients' first pass. In bytes a
//          weight of s bytes: (s+1) + (s+1) + (2s+2) + (s+1) + (3s+3) = 8s+8; an update must move 3s+2 (14 of 40 in f32).
//          About 5 operations a value and pass: bound by memory. Histograms are of integers: their atomics show no order.
//          Zeros, which most weights of a sparse layer are, are counted in registers. Many equal values that are not zero
//          meet in one bin: slower, up to an atomic a warp.

#include <cstddef>

#include "element.cuh"
#include "reduce.cuh"

namespace {

// Two blocks are resident where a multiprocessor has 1,536 threads, too.
constexpr int kThreads = 768;
constexpr int kLocateThreads = 1024;
constexpr int kWriteThreads = 256;
constexpr int kLowBits = 17;
constexpr int kHighBins = 1 << 14;
constexpr int kLowBins = 1 << kLowBits;
constexpr uint32_t kLowMask = kLowBins - 1;

// What one launch finds out for the next.
struct State {
    int32_t active;      // ones of the mask before
    int32_t asked;       // r; 0 leaves the layer alone
    int32_t dropped;     // and grown
    uint32_t digit;      // upper bits of the key looked for
    int32_t below;       // keys with lower upper bits
    int32_t rank;        // of the key looked for, among all, from 0
    uint32_t threshold;  // the largest key that is dropped
    uint32_t enough;     // the smallest key that grows
    int32_t take;        // how many keys equal to it grow
    int32_t split;       // whether others do not
    int32_t ticket;      // the next tile of the write, where they are split
    int32_t reserved[5];
};
static_assert(sizeof(State) == 64, "the launcher's layout");

struct ConnectivityParams {
    void* weight;           // (n)
    const void* gradient;   // (n)
    uint8_t* mask;          // (n)
    uint8_t* survivors;     // (n)
    State* state;           // then the bins
    double rate;
    int32_t count;          // n
    int32_t step;           // of locate: 0 and 1 of the drop, 2 and 3 of the growth
};
static_assert(sizeof(ConnectivityParams) == 56 && offsetof(ConnectivityParams, rate) == 40 &&
                  offsetof(ConnectivityParams, count) == 48,
              "the launcher's layout");

__device__ __forceinline__ uint32_t* high_bins(const ConnectivityParams& p) { return reinterpret_cast<uint32_t*>(p.state + 1); }
__device__ __forceinline__ uint32_t* low_bins(const ConnectivityParams& p) { return high_bins(p) + kHighBins; }
__device__ __forceinline__ uint32_t* tile_words(const ConnectivityParams& p) { return low_bins(p) + kLowBins; }

// Ascends with the magnitude, infinity last; NaN is as zero.
__device__ __forceinline__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
    return bits > 0x7f800000u ? 0u : bits;
}

// As many values as one access holds, from `at` on; `valid` of them are there.
template <class E, bool kWide>
struct Group {
    using A = fv::Access<E, kWide>;
    using Storage = typename E::Storage;
    static constexpr int kElements = A::kElements;

    static __device__ __forceinline__ void load(const void* memory, int at, int valid, float* v) {
        const auto* x = static_cast<const Storage*>(memory) + at;
        if (valid == kElements) {
            A::widen(A::load(x), v);
            return;
        }
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            v[j] = j < valid ? E::widen(x[j]) : 0.0f;
        }
    }
    // A bit a byte that is not zero.
    static __device__ __forceinline__ uint32_t load_bits(const uint8_t* memory, int at, int valid) {
        uint32_t bits = 0;
        if constexpr (kElements > 1) {
            if (valid == kElements) {
#pragma unroll
                for (int word = 0; word < kElements / 4; ++word) {
                    const uint32_t four = *reinterpret_cast<const uint32_t*>(memory + at + 4 * word);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        bits |= (four >> (8 * j) & 0xffu) != 0 ? 1u << (4 * word + j) : 0u;
                    }
                }
                return bits;
            }
        }
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            bits |= j < valid && memory[at + j] != 0 ? 1u << j : 0u;
        }
        return bits;
    }
    static __device__ __forceinline__ void store_bits(uint8_t* memory, int at, int valid, uint32_t bits) {
        if constexpr (kElements > 1) {
            if (valid == kElements) {
#pragma unroll
                for (int word = 0; word < kElements / 4; ++word) {
                    uint32_t four = 0;
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        four |= (bits >> (4 * word + j) & 1u) << (8 * j);
                    }
                    *reinterpret_cast<uint32_t*>(memory + at + 4 * word) = four;
                }
                return;
            }
        }
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
            if (j < valid) {
                memory[at + j] = static_cast<uint8_t>(bits >> j & 1u);
            }
        }
    }
};

// The sum over a block, added to `total` once.
__device__ __forceinline__ void add_to(int count, int* shared, int32_t* total) {
    const int sum = static_cast<int>(__reduce_add_sync(fv::kFullWarp, static_cast<unsigned>(count)));
    if (fv::lane_id() == 0 && sum != 0) {
        atomicAdd(shared, sum);
    }
    __syncthreads();
    if (threadIdx.x == 0 && *shared != 0) {
        atomicAdd(total, *shared);
    }
}

// Upper bits of the keys: of all weights (kGrow false), of the gradients of those that do not survive.
template <class E, bool kWide, bool kGrow>
__device__ __forceinline__ void count_high(const ConnectivityParams& p) {
    using G = Group<E, kWide>;
    extern __shared__ uint32_t bins[];  // [kHighBins]
    __shared__ int zeros_of_block, active_of_block;
    const int thread = static_cast<int>(threadIdx.x);
    // The same for all blocks: without a drop nothing grows, and what the mask has survives.
    const bool idle = kGrow && p.state->asked == 0;
    const uint32_t threshold = kGrow ? p.state->threshold : 0;
    for (int i = thread; i < kHighBins; i += kThreads) {
        bins[i] = 0;
    }
    if (thread == 0) {
        zeros_of_block = 0;
        active_of_block = 0;
    }
    __syncthreads();
    int zeros = 0;
    int active = 0;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * G::kElements;
    for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + thread) * G::kElements; first < p.count; first += stride) {
        const int at = static_cast<int>(first);  // [0, n)
        const int valid = min(G::kElements, p.count - at);
        const uint32_t mask = G::load_bits(p.mask, at, valid);
        float v[G::kElements];
        G::load(p.weight, at, valid, v);
        uint32_t counted = (1u << valid) - 1u;
        if (kGrow) {
            uint32_t survive = 0;
#pragma unroll
            for (int j = 0; j < G::kElements; ++j) {
                survive |= idle || key_of(v[j]) > threshold ? mask & 1u << j : 0u;
            }
            G::store_bits(p.survivors, at, valid, survive);
            if (idle) {
                continue;
            }
            counted &= ~survive;
            G::load(p.gradient, at, valid, v);
        } else {
            active += __popc(mask);
        }
#pragma unroll
        for (int j = 0; j < G::kElements; ++j) {
            const uint32_t key = kGrow || (mask >> j & 1u) != 0 ? key_of(v[j]) : 0u;
            if ((counted >> j & 1u) != 0) {
                if (key == 0) {
                    ++zeros;
                } else {
                    atomicAdd(bins + (key >> kLowBits), 1u);
                }
            }
        }
    }
    add_to(zeros, &zeros_of_block, reinterpret_cast<int32_t*>(high_bins(p)));
    if (!kGrow) {
        add_to(active, &active_of_block, &p.state->active);
    }
    for (int i = thread; i < kHighBins; i += kThreads) {
        if (bins[i] != 0) {
            atomicAdd(high_bins(p) + i, bins[i]);
        }
    }
}

// Lower bits of the keys that have the upper bits looked for.
template <class E, bool kWide, bool kGrow>
__device__ __forceinline__ void count_low(const ConnectivityParams& p) {
    using G = Group<E, kWide>;
    __shared__ int zeros_of_block;
    if (p.state->asked == 0) {
        return;
    }
    if (threadIdx.x == 0) {
        zeros_of_block = 0;
    }
    __syncthreads();
    const uint32_t digit = p.state->digit;
    int zeros = 0;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * G::kElements;
    // Warps stay whole: their lanes ask each other below.
    const int64_t warp_first = (static_cast<int64_t>(blockIdx.x) * kThreads + fv::warp_id() * fv::kWarp) * G::kElements;
    for (int64_t first = warp_first; first < p.count; first += stride) {
        const int64_t mine = first + fv::lane_id() * G::kElements;
        const int at = static_cast<int>(min(mine, static_cast<int64_t>(p.count)));
        const int valid = min(G::kElements, p.count - at);
        const uint32_t bits = G::load_bits(kGrow ? p.survivors : p.mask, at, valid);
        const uint32_t counted = ((1u << valid) - 1u) & (kGrow ? ~bits : ~0u);
        float v[G::kElements];
        G::load(kGrow ? p.gradient : p.weight, at, valid, v);
#pragma unroll
        for (int j = 0; j < G::kElements; ++j) {
            const uint32_t key = kGrow || (bits >> j & 1u) != 0 ? key_of(v[j]) : 0u;
            const bool there = (counted >> j & 1u) != 0;
            zeros += there && key == 0 ? 1 : 0;
            const bool hit = there && key != 0 && key >> kLowBits == digit;
            if (__any_sync(fv::kFullWarp, hit)) {
                const uint32_t bin = hit ? key & kLowMask : kLowBins;
                const unsigned peers = __match_any_sync(fv::kFullWarp, bin);
                if (hit && (peers & fv::lanes_below()) == 0) {
                    atomicAdd(low_bins(p) + bin, static_cast<uint32_t>(__popc(peers)));
                }
            }
        }
    }
    if (digit == 0) {
        add_to(zeros, &zeros_of_block, reinterpret_cast<int32_t*>(low_bins(p)));
    }
}

// The bin in which the value of rank `rank` is, how many are in lower ones and how many in it. By all threads; the bins become
// zero.
struct Place {
    int bin, before, count;
};

template <int kBins>
__device__ __forceinline__ void locate(uint32_t* bins, int rank, Place& found) {
    constexpr int kEach = kBins / kLocateThreads;
    __shared__ int totals[fv::kWarp];
    auto* mine = reinterpret_cast<uint4*>(bins + static_cast<int>(threadIdx.x) * kEach);
    int sum = 0;
#pragma unroll 4
    for (int i = 0; i < kEach / 4; ++i) {
        const uint4 four = mine[i];
        sum += static_cast<int>(four.x + four.y + four.z + four.w);
    }
    int before = fv::block_exclusive_scan(sum, totals).before;
    if (rank >= before && rank < before + sum) {
        int bin = static_cast<int>(threadIdx.x) * kEach;
        int count = static_cast<int>(bins[bin]);
        while (rank >= before + count) {
            before += count;
            ++bin;
            count = static_cast<int>(bins[bin]);
        }
        found = {bin, before, count};
    }
    __syncthreads();
    for (int i = 0; i < kEach / 4; ++i) {
        mine[i] = make_uint4(0, 0, 0, 0);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kLocateThreads)
    fv_connectivity_locate(const __grid_constant__ ConnectivityParams p) {
    __shared__ Place found;
    State& state = *p.state;
    const bool first = threadIdx.x == 0;
    if (p.step == 0) {
        const int active = state.active;
        const int asked = static_cast<int>(ceil(__dmul_rn(p.rate, static_cast<double>(active))));
        // A layer without holes is left alone; the zeros that were counted go with the workspace.
        if (active == p.count || asked == 0) {
            return;
        }
        const int rank = p.count - active + asked - 1;
        locate<kHighBins>(high_bins(p), rank, found);
        if (first) {
            state.asked = asked;
            state.digit = static_cast<uint32_t>(found.bin);
            state.below = found.before;
            state.rank = rank;
        }
        return;
    }
    // All threads have read it before the first one writes again: locate has barriers.
    if (state.asked == 0) {
        return;
    }
    if (p.step == 1) {
        locate<kLowBins>(low_bins(p), state.rank - state.below, found);
        if (first) {
            state.threshold = state.digit << kLowBits | static_cast<uint32_t>(found.bin);
            const int survive = p.count - (state.below + found.before + found.count);
            state.dropped = state.active - survive;
            // From the smallest: `dropped` of the candidates stand from this rank on.
            state.rank = p.count - survive - state.dropped;
        }
    } else if (p.step == 2) {
        locate<kHighBins>(high_bins(p), state.rank, found);
        if (first) {
            state.digit = static_cast<uint32_t>(found.bin);
            state.below = found.before;
        }
    } else {
        locate<kLowBins>(low_bins(p), state.rank - state.below, found);
        if (first) {
            state.enough = state.digit << kLowBits | static_cast<uint32_t>(found.bin);
            const int skipped = state.rank - state.below - found.before;
            state.take = found.count - skipped;
            state.split = skipped > 0 ? 1 : 0;
        }
    }
}

namespace {

// A tile's word: how many ties it has, or how many there are up to its end.
constexpr uint32_t kOwn = 1u << 30;
constexpr uint32_t kUpTo = 2u << 30;

// How many ties there are in the tiles before `tile`, which has `own`. By one warp. Tiles are handed out in order, so those
// before are under way and do not wait for this one.
__device__ __forceinline__ int ties_before(uint32_t* words, int tile, int own) {
    const int lane = fv::lane_id();
    if (lane == 0 && tile > 0) {
        atomicExch(words + tile, kOwn | static_cast<uint32_t>(own));
    }
    int before = 0;
    for (int last = tile - 1; last >= 0; last -= fv::kWarp) {
        const int at = last - lane;
        uint32_t word = kUpTo;
        do {
            if (at >= 0) {
                word = atomicAdd(words + at, 0u);
            }
        } while (__any_sync(fv::kFullWarp, word >> 30 == 0));
        const unsigned complete = __ballot_sync(fv::kFullWarp, word >> 30 == 2);
        // The nearest tile that knows all before it, and those behind it.
        const int nearest = complete == 0 ? fv::kWarp : __ffs(static_cast<int>(complete)) - 1;
        before += static_cast<int>(__reduce_add_sync(fv::kFullWarp, lane <= nearest ? word & (kOwn - 1) : 0u));
        if (complete != 0) {
            break;
        }
    }
    if (lane == 0) {
        atomicExch(words + tile, kUpTo | static_cast<uint32_t>(before + own));
    }
    return before;
}

template <class E, bool kWide>
__device__ __forceinline__ void write_masks(const ConnectivityParams& p) {
    using G = Group<E, kWide>;
    using Storage = typename E::Storage;
    __shared__ int totals[fv::kWarp];
    __shared__ int shared_tile, shared_before;
    const int thread = static_cast<int>(threadIdx.x);
    const bool idle = p.state->asked == 0;
    // The same for all blocks. Where all ties grow no tile needs to know of another.
    const bool split = !idle && p.state->split != 0;
    const uint32_t enough = p.state->enough;
    int tile = static_cast<int>(blockIdx.x);
    if (split) {
        if (thread == 0) {
            shared_tile = atomicAdd(&p.state->ticket, 1);
        }
        __syncthreads();
        tile = shared_tile;
    }
    const int64_t first = (static_cast<int64_t>(tile) * kWriteThreads + thread) * G::kElements;
    const int at = static_cast<int>(min(first, static_cast<int64_t>(p.count)));
    const int valid = min(G::kElements, p.count - at);
    uint32_t now = G::load_bits(p.survivors, at, valid);
    uint32_t ties = 0;
    if (!idle) {
        float v[G::kElements];
        G::load(p.gradient, at, valid, v);
        const uint32_t candidates = ((1u << valid) - 1u) & ~now;
#pragma unroll
        for (int j = 0; j < G::kElements; ++j) {
            const uint32_t key = key_of(v[j]);
            now |= key > enough ? candidates & 1u << j : 0u;
            ties |= key == enough ? candidates & 1u << j : 0u;
        }
    }
    if (split) {
        const fv::Scan scan = fv::block_exclusive_scan(__popc(ties), totals);
        if (fv::warp_id() == 0) {
            const int before = ties_before(tile_words(p), tile, scan.total);
            if (thread == 0) {
                shared_before = before;
            }
        }
        __syncthreads();
        int left = p.state->take - shared_before - scan.before;
#pragma unroll
        for (int j = 0; j < G::kElements; ++j) {
            if ((ties >> j & 1u) != 0 && left > 0) {
                now |= 1u << j;
                --left;
            }
        }
    } else {
        now |= ties;
    }
    if (valid == 0) {
        return;
    }
    const uint32_t stays = now & G::load_bits(p.mask, at, valid);
    G::store_bits(p.mask, at, valid, now);
    float v[G::kElements];
    G::load(p.weight, at, valid, v);
    auto* weight = static_cast<Storage*>(p.weight) + at;
    bool changes = false;
#pragma unroll
    for (int j = 0; j < G::kElements; ++j) {
        const bool goes = (stays >> j & 1u) == 0;
        changes = changes || (goes && __float_as_uint(v[j]) != 0);
        v[j] = goes ? 0.0f : v[j];
    }
    if (changes) {
        if (valid == G::kElements) {
            G::A::store(weight, G::A::narrow(v));
        } else {
#pragma unroll
            for (int j = 0; j < G::kElements; ++j) {
                if (j < valid) {
                    weight[j] = E::narrow(v[j]);
                }
            }
        }
    }
}

}  // namespace

#define FV_KERNEL(NAME, THREADS, BLOCKS, BODY)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ ConnectivityParams p) { BODY(p); }
#define FV_CONNECTIVITY(SUFFIX, E, WIDE)                                                           \
    FV_KERNEL(fv_drop_high_##SUFFIX, kThreads, 2, (count_high<E, WIDE, false>))  \
    FV_KERNEL(fv_drop_low_##SUFFIX, kThreads, 2, (count_low<E, WIDE, false>))  \
    FV_KERNEL(fv_grow_high_##SUFFIX, kThreads, 2, (count_high<E, WIDE, true>))  \
    FV_KERNEL(fv_grow_low_##SUFFIX, kThreads, 2, (count_low<E, WIDE, true>))  \
    FV_KERNEL(fv_grow_write_##SUFFIX, kWriteThreads, 4, (write_masks<E, WIDE>))
FV_CONNECTIVITY(f32, fv::F32, true)
FV_CONNECTIVITY(f16, fv::F16, true)
FV_CONNECTIVITY(bf16, fv::Bf16, true)
FV_CONNECTIVITY(f32_narrow, fv::F32, false)
FV_CONNECTIVITY(f16_narrow, fv::F16, false)
FV_CONNECTIVITY(bf16_narrow, fv::Bf16, false)
