// The end of a product whose inputs were split (`quant_matmul.cu`): y = its partial sums, added from first to last.
//
//     parts [splits, count] float32 -> y [count] bfloat16; two numbers a thread, of which there is an even count
//
// Launched while the products run, so that nothing waits for its launch.
//
// Reference: tessera_kernels.reference.quant_matmul.
#include "device.cuh"

struct alignas(8) Pair { float first, second; };

TESSERA_KERNEL_SHARED_SM(256, 4) add_parts(const float* parts, bf16* y, int64_t count, int splits) {
    const int64_t place = 2 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
    if (place >= count) return;
    wait_for_kernel_before();
    Pair total = {0.0f, 0.0f};
    for (int split = 0; split < splits; ++split) {
        const Pair part = *reinterpret_cast<const Pair*>(parts + split * count + place);
        total.first += part.first;
        total.second += part.second;
    }
    *reinterpret_cast<uint32_t*>(y + place) = packed<bf16>(total.first, total.second);
}
TESSERA_ENTRY(add_parts)
