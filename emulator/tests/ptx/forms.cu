// Made into forms.ptx by nvcc 13 with -std=c++17 -arch=compute_80 -lineinfo -ptx: calls, tables, inline assembly.
#include <cstdio>
#include <cassert>
#include <cstdint>
#include <cuda_fp16.h>
struct Big { int a[117]; };
struct alignas(16) V { float x; char c; };
__device__ int table[5] = {1, 2, -3};
__device__ double dtab[2] = {1.5, -0.1};
__device__ float ftab[2][2] = {{1.f,2.f},{3.f}};
__device__ const char* names[] = {"one", "two\n\"x"};
__constant__ uint8_t lut[4] = {1,2,3,255};
__constant__ uint64_t wide = 0xffffffffffffffffull;
__device__ V vv = {1.0f, 'c'};
__device__ __half hh = {};
__managed__ int man = 7;
__device__ int* ptr = &table[2];
struct P { char c; int* p; }; 
__device__ P pk = {'a', &table[1]};
__noinline__ __device__ int f1(int x) { return x * 3 + 1; }
__noinline__ __device__ float2 f2(float2 x, Big b) { return {x.x + b.a[3], x.y}; }
typedef int (*fn)(int);
__device__ int g1(int x){return x-1;} __device__ int g2(int x){return x*x;}
__device__ fn fns[2] = {g1, g2};
__device__ int rec(int n){ return n < 2 ? n : rec(n-1)+rec(n-2); }
struct Base { __device__ virtual int v(int) = 0; }; struct D1: Base { int k; __device__ D1(int k):k(k){} __device__ int v(int x) override { return x+k; } };
extern "C" __global__ void __launch_bounds__(128, 2) many(int* out, const Big b, const float* __restrict__ in, int n) {
  __shared__ float st[33][32]; extern __shared__ __align__(16) unsigned char dyn[];
  int i = threadIdx.x; int loc[10]; for (int k=0;k<10;k++) loc[(k*n)%10]=k+i;
  assert(n > 0);
  printf("hello %d %f\n", i, in[i]);
  st[i%33][i%32] = in[i]; __syncthreads();
  float2 q = f2(make_float2(1.f, st[(i+1)%33][0]), b);
  switch (n) { case 0: i += 3; break; case 1: i *= 7; break; case 2: i = f1(i); break; case 3: i ^= n; break; case 4: i = i<<2; break; case 5: i= __popc(i); break; case 6: i = __clz(i);break; default: i = rec(n); }
  i += fns[n & 1](i) + (int)q.x + loc[n%10] + lut[n&3] + table[n&3] + (int)dtab[1] + names[n&1][0] + *ptr + *pk.p + man + (int)ftab[1][0] + (int)wide;
  D1 d(n); Base* p = &d; i += p->v(i);
  dyn[i&7] = 1; asm volatile("{ .reg .b32 t1; .reg.b16 lo, hi; mov.b32 {lo, hi}, %1; mov.b32 t1, {hi, _}; add.u32 %0, t1, 0x10U; }" : "+r"(i) : "r"(n));
  asm volatile("{.reg .pred p,q; setp.lt.and.s32 p|q, %0, 0b101, !p; @!q trap; L1: bra.uni L2; L2: }" :: "r"(i));
  out[blockIdx.x * blockDim.x + threadIdx.x] = i;
  if (i == 12345) { __nanosleep(10); __trap(); }
}
template <typename T> __global__ void tk(T* p) { p[0] = T(1); }
template __global__ void tk<double>(double*);
template __global__ void tk<__half>(__half*);
