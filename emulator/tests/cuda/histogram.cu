// histogram.cu - how often each byte value occurs: counted in shared memory, added to the result once a block.
// Shapes: values (count) u8, bins (256) u32, to be zeroed before.
// Launch: any grid, any block.
extern "C" __global__ void histogram(const unsigned char* __restrict__ values, unsigned* __restrict__ bins, int count) {
    __shared__ unsigned local[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
        atomicAdd(&local[values[i]], 1u);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x)
        if (local[i] != 0) atomicAdd(&bins[i], local[i]);
}
