// gemm_tile.cu - matrix product on tensor cores: cp.async into swizzled shared memory, ldmatrix, mma m16n8k16.
// Maths:  out[m][n] = sum over k of a[m][k] * b[n][k], sums in f32.
// Shapes: a (rows, depth) f16, b (columns, depth) f16, out (rows, columns) f32, all row-major; depth a multiple of 8.
// Launch: grid (ceil(columns/64), ceil(rows/64)), block 128, no dynamic shared memory.
#include <cuda_fp16.h>

constexpr int TILE = 64;    // rows and columns of a block's part of out
constexpr int DEPTH = 32;   // values of k in one stage
constexpr int STAGES = 2;
constexpr int CHUNKS = DEPTH / 8;  // a row of a stage in pieces of 16 bytes

// Eight rows of one piece column lie in eight different bank groups, so that ldmatrix has no conflicts.
__device__ int place(int row, int chunk) {
    return row * DEPTH + ((chunk ^ ((row >> 1) & (CHUNKS - 1))) * 8);
}

__device__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// One stage of one operand; what lies beyond the matrix arrives as zeros.
__device__ void fetch(__half* tile, const __half* matrix, int first_row, int rows, int first_k, int depth) {
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += blockDim.x) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        int k = first_k + chunk * 8;
        bool inside = first_row + row < rows && k < depth;
        const __half* source = inside ? matrix + static_cast<long long>(first_row + row) * depth + k : matrix;
        int bytes = inside ? 16 : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(tile + place(row, chunk))),
                     "l"(source), "r"(bytes));
    }
}

__device__ void load_fragments(unsigned (&fragment)[4], const __half* tile, int row, int chunk) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(tile + place(row, chunk))));
}

extern "C" __global__ void __launch_bounds__(128) gemm_tile(const __half* __restrict__ a, const __half* __restrict__ b,
                                                            float* __restrict__ out, int rows, int columns, int depth) {
    __shared__ __align__(128) __half tile_a[STAGES][TILE * DEPTH];
    __shared__ __align__(128) __half tile_b[STAGES][TILE * DEPTH];
    int first_row = blockIdx.y * TILE, first_column = blockIdx.x * TILE;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;  // a warp owns 16 rows and all 64 columns
    float sums[TILE / 8][4] = {};

    int steps = (depth + DEPTH - 1) / DEPTH;
    fetch(tile_a[0], a, first_row, rows, 0, depth);
    fetch(tile_b[0], b, first_column, columns, 0, depth);
    asm volatile("cp.async.commit_group;");
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            fetch(tile_a[(step + 1) % STAGES], a, first_row, rows, (step + 1) * DEPTH, depth);
            fetch(tile_b[(step + 1) % STAGES], b, first_column, columns, (step + 1) * DEPTH, depth);
        }
        asm volatile("cp.async.commit_group;");
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k) {
            unsigned fragment_a[4];
            load_fragments(fragment_a, tile_a[step % STAGES], warp * 16 + lane % 16, k * 2 + lane / 16);
#pragma unroll
            for (int pair = 0; pair < TILE / 16; ++pair) {
                unsigned fragment_b[4];  // two neighbouring blocks of eight columns
                int column = pair * 16 + lane % 8 + lane / 16 * 8;
                load_fragments(fragment_b, tile_b[step % STAGES], column, k * 2 + lane / 8 % 2);
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    float(&sum)[4] = sums[pair * 2 + side];
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                        "{%0, %1, %2, %3};"
                        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                        : "r"(fragment_a[0]), "r"(fragment_a[1]), "r"(fragment_a[2]), "r"(fragment_a[3]),
                          "r"(fragment_b[side * 2]), "r"(fragment_b[side * 2 + 1]));
                }
            }
        }
        __syncthreads();  // the stage is overwritten in the next round
    }
#pragma unroll
    for (int i = 0; i < TILE / 8 * 4; ++i) {
        int row = first_row + warp * 16 + lane / 4 + i % 4 / 2 * 8;
        int column = first_column + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (row < rows && column < columns) out[static_cast<long long>(row) * columns + column] = sums[i / 4][i % 4];
    }
}
