// merge.cu - applies a token plan to tokens and sizes, with the LayerNorm that follows; and spreads tokens back.
//
// Maths:   merge: group g = members[offsets[m] .. offsets[m+1]);  tokens_out[m] = sum of weight*x[member] over g, in
//          ascending order and without fused multiply-add (f32 results are the reference's, bit for bit), or the
//          elementwise maximum (NaN only where all members have NaN); a lone member of weight 1 is copied; a group of
//          nobody is 0.  sizes_out[m] = sum of sizes[member], 1 each without sizes.  normed = LayerNorm(tokens_out as
//          stored).
//          unmerge: out[n] = x[groups[n]], 0 where groups[n] is -1.
// Shapes:  x (B, N, C), tokens_out, normed (B, M, C), last axis contiguous, other strides in elements;  sizes (B, N) f32;
//          sizes_out (B, M) f32;  x and tokens_out of one type, normed and the LayerNorm's weight and bias of one type: the
//          same, or 16 bits beside f32;  the plan as src/plan.rs: offsets (B, M+1), members, weights, groups (B, N).
// Launch:  merge: grid ceil(B*M / rows a block), block as row.cuh says;  unmerge: grid ceil(B*N/4), block 128.
//          C from 1 to 4,096 (merge), any (unmerge).
// Cost:    merge reads each member row once, (members)*C elements, writes tokens_out and normed, 2*B*M*C, and moves 12
//          bytes of plan and 4 of size a member: memory bound, 2 operations an element and 8 for the norm.
//          unmerge moves (distinct groups + N)*C elements a image. Gathers only: no row is written twice.

#include <cstddef>

#include "row.cuh"

namespace {

struct MergeParams {
    const void* x;           // (B, N, C)
    const float* sizes;      // (B, N) or null
    const int32_t* offsets;  // (B, M+1)
    const int32_t* members;  // (B, N)
    const float* weights;    // (B, N)
    const void* norm_weight;  // (C), or null for no LayerNorm
    const void* norm_bias;    // (C) or null
    void* tokens_out;         // (B, M, C)
    float* sizes_out;         // (B, M)
    void* normed;             // (B, M, C) or null
    int64_t x_batch_stride, x_token_stride;
    int64_t tokens_out_batch_stride, tokens_out_token_stride;
    int64_t normed_batch_stride, normed_token_stride;
    int32_t rows;        // B*M
    int32_t tokens_in;   // N
    int32_t groups;      // M
    int32_t width;       // C
    int32_t maximum;     // 0: weighted sum, 1: elementwise maximum
    float eps;
};
static_assert(sizeof(MergeParams) == 152 && offsetof(MergeParams, x_batch_stride) == 80 && offsetof(MergeParams, rows) == 128,
              "the launcher's layout");

template <class E, class O, int kWarps, bool kWide>
__device__ __forceinline__ void merge_rows(const MergeParams& p) {
    using R = fv::Row<E, kWarps, kWide>;
    using A = typename R::A;
    using Storage = typename E::Storage;
    // Rows whose loads are in flight together in a large group: 8 registers of them. More spill on compute capability 9.0
    // and 12.0.
    constexpr int kTogether = R::kAccesses * A::kRegisters <= 4 ? 2 : 1;
    __shared__ fv::NormScratch<kWarps> scratch;

    const int row = static_cast<int>(blockIdx.x) * R::kTeams + R::team();  // [0, B*M)
    if (row >= p.rows) {
        return;
    }
    const int64_t image = row / p.groups;
    // From the back: merged and fused tokens stand there, and the longest groups should start first.
    const int group = p.groups - 1 - row % p.groups;  // [0, M)
    const int32_t* offsets = p.offsets + image * (p.groups + 1) + group;
    const int32_t* members = p.members + image * p.tokens_in;
    const float* weights = p.weights + image * p.tokens_in;
    const float* sizes = p.sizes == nullptr ? nullptr : p.sizes + image * p.tokens_in;
    const auto* x = static_cast<const Storage*>(p.x) + image * p.x_batch_stride + R::first();
    const int from = __ldg(offsets);
    const int to = __ldg(offsets + 1);

    R r;
    float size = 0.0f;
    // The maximum of NaN and a number is the number: NaN is what a maximum starts from.
    const float start = p.maximum != 0 && to > from ? __uint_as_float(0x7fffffffu) : 0.0f;
#pragma unroll
    for (int i = 0; i < R::kAccesses; ++i) {
#pragma unroll
        for (int j = 0; j < R::kStep; ++j) {
            r.v[i * R::kStep + j] = R::within(i, p.width) ? start : 0.0f;
        }
    }
#pragma unroll 1
    for (int base = from; base < to; base += fv::kWarp) {
        // Each lane fetches one member; the warp then goes through them in order.
        const int count = min(fv::kWarp, to - base);
        int my_member = 0;
        float my_weight = 0.0f;
        float my_size = 0.0f;
        if (fv::lane_id() < count) {
            my_member = __ldg(members + base + fv::lane_id());
            my_weight = __ldg(weights + base + fv::lane_id());
            my_size = sizes == nullptr ? 1.0f : __ldg(sizes + my_member);
        }
#pragma unroll 1
        for (int at = 0; at < count; at += kTogether) {
            typename A::Raw raw[kTogether][R::kAccesses];
#pragma unroll
            for (int k = 0; k < kTogether; ++k) {
                // Lanes beyond `count` hold member 0; its row is not loaded.
                const int member = __shfl_sync(fv::kFullWarp, my_member, (at + k) % fv::kWarp);  // [0, N)
                const Storage* source = x + member * p.x_token_stride;
#pragma unroll
                for (int i = 0; i < R::kAccesses; ++i) {
                    if (at + k < count && R::within(i, p.width)) {
                        raw[k][i] = A::load_constant(source + R::offset(i));
                    }
                }
            }
#pragma unroll
            for (int k = 0; k < kTogether; ++k) {
                const float weight = __shfl_sync(fv::kFullWarp, my_weight, (at + k) % fv::kWarp);
                const float member_size = __shfl_sync(fv::kFullWarp, my_size, (at + k) % fv::kWarp);
                if (at + k < count) {
                    size += member_size;
                    // 0 + 1*x would lose the sign of a zero.
                    const bool copy = to - from == 1 && weight == 1.0f;
#pragma unroll
                    for (int i = 0; i < R::kAccesses; ++i) {
                        if (R::within(i, p.width)) {
                            float value[R::kStep];
                            A::widen(raw[k][i], value);
#pragma unroll
                            for (int j = 0; j < R::kStep; ++j) {
                                float& sum = r.v[i * R::kStep + j];
                                const float weighted = copy ? value[j] : __fadd_rn(sum, __fmul_rn(weight, value[j]));
                                sum = p.maximum != 0 ? fmaxf(sum, value[j]) : weighted;
                            }
                        }
                    }
                }
            }
        }
    }

    r.store(static_cast<Storage*>(p.tokens_out) + image * p.tokens_out_batch_stride + group * p.tokens_out_token_stride,
            p.width);
    if (static_cast<int>(threadIdx.x) % R::kTeam == 0) {
        p.sizes_out[image * p.groups + group] = size;
    }
    if (p.norm_weight != nullptr) {
        r.round();
        using Normed = typename O::Storage;
        r.template store_normalised<false, O>(
            static_cast<Normed*>(p.normed) + image * p.normed_batch_stride + group * p.normed_token_stride,
            static_cast<const Normed*>(p.norm_weight), static_cast<const Normed*>(p.norm_bias), p.eps, p.width, scratch);
    }
}

// One type for rows of any element: a copy moves bytes.
struct UnmergeParams {
    const void* x;          // (B, M, C)
    const int32_t* groups;  // (B, N)
    void* out;              // (B, N, C)
    int64_t x_batch_stride, x_token_stride;      // in units of the access
    int64_t out_batch_stride, out_token_stride;  // in units of the access
    int32_t rows;    // B*N
    int32_t tokens;  // N
    int32_t units;   // accesses a row
    int32_t reserved;
};
static_assert(sizeof(UnmergeParams) == 72 && offsetof(UnmergeParams, x_batch_stride) == 24 &&
                  offsetof(UnmergeParams, rows) == 56,
              "the launcher's layout");

constexpr int kUnmergeThreads = 128;

template <class Unit>
__device__ __forceinline__ void unmerge_rows(const UnmergeParams& p) {
    const int row = static_cast<int>(blockIdx.x) * (kUnmergeThreads / fv::kWarp) + fv::warp_id();  // [0, B*N)
    if (row >= p.rows) {
        return;
    }
    const int64_t image = row / p.tokens;
    const int64_t token = row % p.tokens;
    const int group = __ldg(p.groups + row);  // [-1, M)
    Unit* out = static_cast<Unit*>(p.out) + image * p.out_batch_stride + token * p.out_token_stride;
    const Unit* x = static_cast<const Unit*>(p.x) + image * p.x_batch_stride + group * p.x_token_stride;
#pragma unroll 4
    for (int unit = fv::lane_id(); unit < p.units; unit += fv::kWarp) {
        out[unit] = group < 0 ? Unit{} : __ldg(x + unit);
    }
}

}  // namespace

#define FV_MERGE(NAME, E, O, WARPS, WIDE)                                                       \
    extern "C" __global__ void __launch_bounds__(fv::kRowThreads<WARPS>, fv::kRowBlocks<WARPS>)      \
        NAME(const __grid_constant__ MergeParams p) {                                                \
        merge_rows<E, O, WARPS, WIDE>(p);                                                       \
    }
FV_FOR_EACH_ROW(FV_MERGE, fv_merge)
FV_FOR_EACH_MIXED_ROW(FV_MERGE, fv_merge)

// By the bytes of an access.
extern "C" __global__ void __launch_bounds__(kUnmergeThreads) fv_unmerge_16(const __grid_constant__ UnmergeParams p) {
    unmerge_rows<uint4>(p);
}
extern "C" __global__ void __launch_bounds__(kUnmergeThreads) fv_unmerge_4(const __grid_constant__ UnmergeParams p) {
    unmerge_rows<uint32_t>(p);
}
extern "C" __global__ void __launch_bounds__(kUnmergeThreads) fv_unmerge_2(const __grid_constant__ UnmergeParams p) {
    unmerge_rows<uint16_t>(p);
}
