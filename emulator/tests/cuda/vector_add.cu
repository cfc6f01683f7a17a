// vector_add.cu - out[i] = a[i] + b[i].
// Shapes: a, b, out (count) f32.
// Launch: grid ceil(count/block), any block.
extern "C" __global__ void vector_add(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ out,
                                      int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = a[i] + b[i];
}
