// attention_fold.cu - MCTF's attention over a reduced set of tokens where rows are pooled by maximum (section 3.3).
//
// Maths:   P = softmax(Q Kᵀ scale + log size) over N tokens; for output token f: A[f][g] = max over q in f of (sum over k in g of P[q][k]);
//          out[f] = sum over g of A[f][g] v[g]. Pooling by maximum is not linear, so unlike pooling by weights it cannot be done on rows of
//          P V afterwards.
// Shapes:  q, k (B, N, H, D), v and out (B, M, H, D); f32, f16, bf16; the plan's offsets (B, M+1), members (B, N).
// Launch:  grid (M, H, B), block 128; dynamic shared memory 4 (N + M + D) bytes.
// Cost:    each query of a group reads every key: N² D multiply-adds a head, from cache, by lanes that each hold a key. An option of the
//          method that its authors do not use by default: written to be right, not to be fast.

#include "attention.cuh"

namespace {

struct FoldParams {
    const void* q;
    const void* k;
    const void* v;
    void* out;
    const float* sizes;      // (B, N) or null
    const int32_t* offsets;  // (B, M+1)
    const int32_t* members;  // (B, N)
    int64_t q_batch_stride, q_token_stride;
    int64_t k_batch_stride, k_token_stride;
    int64_t v_batch_stride, v_token_stride;
    int64_t out_batch_stride, out_token_stride;
    int32_t tokens;  // N
    int32_t groups;  // M
    int32_t head_dim;
    float scale;
};
static_assert(sizeof(FoldParams) == 136 && offsetof(FoldParams, q_batch_stride) == 56 && offsetof(FoldParams, tokens) == 120,
              "the launcher's layout");

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / fv::kWarp;

// Over all threads of the block, the same for each.
template <class Join>
__device__ __forceinline__ float join_block(float x, float* scratch, Join join) {
#pragma unroll
    for (int step = fv::kWarp / 2; step > 0; step /= 2) {
        x = join(x, __shfl_xor_sync(fv::kFullWarp, x, step));
    }
    __syncthreads();
    if (fv::lane_id() == 0) {
        scratch[fv::warp_id()] = x;
    }
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) {
        x = join(x, scratch[warp]);
    }
    return x;
}

template <class E>
__device__ __forceinline__ void fold(const FoldParams& p) {
    using Storage = typename E::Storage;
    extern __shared__ float shared[];
    __shared__ float scratch[kWarps];
    const int n = p.tokens;
    const int m = p.groups;
    const int d = p.head_dim;
    float* row = shared;        // (N) probabilities of one query
    float* folded = row + n;    // (M)
    float* query = folded + m;  // (D)
    const int64_t image = blockIdx.z;
    const int64_t head_offset = static_cast<int64_t>(blockIdx.y) * d;
    const auto* keys = static_cast<const Storage*>(p.k) + image * p.k_batch_stride + head_offset;
    const int32_t* offsets = p.offsets + image * (m + 1);
    const int32_t* members = p.members + image * n;
    const float scale = p.scale * fv::kLog2E;
    for (int g = threadIdx.x; g < m; g += kThreads) {
        folded[g] = 0.0f;
    }
    const int begin = offsets[blockIdx.x];
    const int end = offsets[blockIdx.x + 1];
    for (int place = begin; place < end; ++place) {
        const auto* q = static_cast<const Storage*>(p.q) + image * p.q_batch_stride + members[place] * p.q_token_stride + head_offset;
        __syncthreads();
        for (int c = threadIdx.x; c < d; c += kThreads) {
            query[c] = E::widen(q[c]);
        }
        __syncthreads();
        float top = -INFINITY;
        for (int key = threadIdx.x; key < n; key += kThreads) {
            float dot = 0.0f;
            for (int c = 0; c < d; ++c) {
                dot = fmaf(query[c], E::widen(__ldg(keys + key * p.k_token_stride + c)), dot);
            }
            const float bias = p.sizes == nullptr ? 0.0f : fv::log2_approx(p.sizes[image * n + key]);
            row[key] = fmaf(dot, scale, bias);
            top = fmaxf(top, row[key]);
        }
        top = fv::finite_top(join_block(top, scratch, [](float a, float b) { return fmaxf(a, b); }));
        float sum = 0.0f;
        for (int key = threadIdx.x; key < n; key += kThreads) {
            row[key] = fv::exp2_approx(row[key] - top);
            sum += row[key];
        }
        sum = join_block(sum, scratch, [](float a, float b) { return a + b; });
        const float inverse = sum == 0.0f ? 0.0f : __frcp_rn(sum);
        __syncthreads();
        for (int g = threadIdx.x; g < m; g += kThreads) {
            float share = 0.0f;
            for (int i = offsets[g]; i < offsets[g + 1]; ++i) {
                share += row[members[i]] * inverse;
            }
            folded[g] = place == begin ? share : fmaxf(folded[g], share);
        }
    }
    __syncthreads();
    const auto* values = static_cast<const Storage*>(p.v) + image * p.v_batch_stride + head_offset;
    auto* out = static_cast<Storage*>(p.out) + image * p.out_batch_stride + blockIdx.x * p.out_token_stride + head_offset;
    for (int c = threadIdx.x; c < d; c += kThreads) {
        float sum = 0.0f;
        for (int g = 0; g < m; ++g) {
            sum = fmaf(folded[g], E::widen(__ldg(values + g * p.v_token_stride + c)), sum);
        }
        out[c] = E::narrow(sum);
    }
}

}  // namespace

#define FV_FOLD(TYPE, E)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads) fv_attention_fold_##TYPE(const __grid_constant__ FoldParams p) { \
        fold<fv::E>(p);                                                                                                          \
    }
FV_FOLD(f32, F32)
FV_FOLD(f16, F16)
FV_FOLD(bf16, Bf16)
