extern "C" __global__ void twice(float* p){ int i=blockIdx.x*blockDim.x+threadIdx.x; p[i]=2.0f*p[i]; }
