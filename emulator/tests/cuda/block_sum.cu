// block_sum.cu - the sum of each block's part of an array, in a fixed order: shuffles in a warp, shared memory between.
// Shapes: values (count) f32, sums (gridDim.x) f32.
// Launch: block a multiple of 32, at most 1024; block b sums values[b * per_block .. (b + 1) * per_block].
extern "C" __global__ void block_sum(const float* __restrict__ values, float* __restrict__ sums, int count,
                                     int per_block) {
    __shared__ float partial[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int first = blockIdx.x * per_block, end = min(first + per_block, count);
    float sum = 0.0f;
    for (int i = first + threadIdx.x; i < end; i += blockDim.x) sum += values[i];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        sum = lane < blockDim.x / 32 ? partial[lane] : 0.0f;
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (lane == 0) sums[blockIdx.x] = sum;
    }
}
