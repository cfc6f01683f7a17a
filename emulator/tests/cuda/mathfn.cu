// mathfn.cu - the precise functions of the CUDA maths library, one kernel each: out[i] = f(x[i]) or f(x[i], y[i]).
// Shapes: x, y, out (count) of the function's type.
// Launch: grid ceil(count/block), any block.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define UNARY(NAME, TYPE, EXPRESSION)                                                                     \
    extern "C" __global__ void NAME(const TYPE* __restrict__ xs, TYPE* __restrict__ out, int count) {     \
        int i = blockIdx.x * blockDim.x + threadIdx.x;                                                    \
        if (i < count) {                                                                                  \
            TYPE x = xs[i];                                                                               \
            out[i] = EXPRESSION;                                                                          \
        }                                                                                                 \
    }
#define BINARY(NAME, TYPE, EXPRESSION)                                                                    \
    extern "C" __global__ void NAME(const TYPE* __restrict__ xs, const TYPE* __restrict__ ys,             \
                                    TYPE* __restrict__ out, int count) {                                  \
        int i = blockIdx.x * blockDim.x + threadIdx.x;                                                    \
        if (i < count) {                                                                                  \
            TYPE x = xs[i], y = ys[i];                                                                    \
            out[i] = EXPRESSION;                                                                          \
        }                                                                                                 \
    }

UNARY(f32_exp, float, expf(x))
UNARY(f32_exp2, float, exp2f(x))
UNARY(f32_expm1, float, expm1f(x))
UNARY(f32_log, float, logf(x))
UNARY(f32_log2, float, log2f(x))
UNARY(f32_log1p, float, log1pf(x))
UNARY(f32_erf, float, erff(x))
UNARY(f32_tanh, float, tanhf(x))
UNARY(f32_sin, float, sinf(x))
UNARY(f32_cos, float, cosf(x))
UNARY(f32_sqrt, float, sqrtf(x))
UNARY(f32_rsqrt, float, rsqrtf(x))
UNARY(f32_reciprocal, float, __frcp_rn(x))
BINARY(f32_pow, float, powf(x, y))
BINARY(f32_divide, float, x / y)
BINARY(f32_fdividef, float, fdividef(x, y))
BINARY(f32_approximate_divide, float, __fdividef(x, y))
BINARY(f32_remainder, float, fmodf(x, y))

#define HALVES(PREFIX, TYPE)                      \
    UNARY(PREFIX##_exp, TYPE, hexp(x))            \
    UNARY(PREFIX##_exp2, TYPE, hexp2(x))          \
    UNARY(PREFIX##_log, TYPE, hlog(x))            \
    UNARY(PREFIX##_log2, TYPE, hlog2(x))          \
    UNARY(PREFIX##_tanh, TYPE, htanh(x))          \
    UNARY(PREFIX##_sin, TYPE, hsin(x))            \
    UNARY(PREFIX##_cos, TYPE, hcos(x))            \
    UNARY(PREFIX##_sqrt, TYPE, hsqrt(x))          \
    UNARY(PREFIX##_rsqrt, TYPE, hrsqrt(x))        \
    UNARY(PREFIX##_reciprocal, TYPE, hrcp(x))     \
    BINARY(PREFIX##_add, TYPE, __hadd(x, y))      \
    BINARY(PREFIX##_multiply, TYPE, __hmul(x, y)) \
    BINARY(PREFIX##_divide, TYPE, __hdiv(x, y))   \
    BINARY(PREFIX##_maximum, TYPE, __hmax(x, y))

HALVES(f16, __half)
HALVES(bf16, __nv_bfloat16)
