// The gain's gradient of RMSNorm from what the blocks of rms_norm_backward.cu leave of it, added up in a fixed order.
//
//     dg = sum of partial [num_partials, D] over its rows
//
//     32 columns ->                     HBM        partials, float32, read once; dg written once
//     +---------------+  blockDim.y     registers  AT_ONCE numbers of a column on their way
//     | run of rows 0 |  runs a block,  shared     the runs' sums
//     | run of rows 1 |  interleaved
//     +---------------+
//
// Compiled with NUMBER as bf16, f16 or float. Reference: the gradients of tessera_kernels/reference/rms_norm.py.
#include "device.cuh"

constexpr int THREADS = 512;  // of a block, at most
constexpr int AT_ONCE = 12;   // rows that a thread waits for together: with 16 runs a block of each multiprocessor's

TESSERA_KERNEL(THREADS) rms_norm_sum_partials(const float* partial, NUMBER* dgain, int num_partials, int width) {
    TESSERA_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    const int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    for (int first = threadIdx.y; first < num_partials; first += AT_ONCE * blockDim.y) {
        float term[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int row = first + k * blockDim.y;
            term[k] = row < num_partials && column < width ? partial[int64_t(row) * width + column] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) sum += term[k];
    }
    sums[threadIdx.y * 32 + threadIdx.x] = sum;
    sync_threads();
    if (threadIdx.y > 0 || column >= width) return;
    for (int run = 1; run < static_cast<int>(blockDim.y); ++run) sum += sums[run * 32 + threadIdx.x];
    dgain[column] = rounded<NUMBER>(sum);
}
TESSERA_ENTRY(rms_norm_sum_partials)
