// Product of two E4M3 matrices with scales by tensor or by row, summed by the tensor cores alone, for sm_90a.
//
//     c[r, f] = scale_a[r] scale_b[f] sum_d a[r, d] b[f, d]
//
//     f ->                         HBM        a, b by the copy engine, two codes a number of 16 bits; c from registers
//   +-------+-------+              shared     STAGES x 128 inputs of both (`product_ring.cuh`)
// r | tile  | tile  | 128 x 256    registers  [64, 256] float32 a warpgroup: scaled, rounded and written while the other
//   +-------+-------+                         multiplies
//
// A group of row blocks shares b's tiles in L2 before the next outputs come.
// Reference: tessera_kernels.reference.fp8_matmul with accumulation="fast".
//
// Defined by the host: TYPE (bf16, f16: of c), BY_ROW (0: one scale for each matrix), STAGES and PAIR (`product_ring.cuh`).
#include "product_ring.cuh"
#include "store_rows.cuh"

constexpr int GROUP_X = 16 / PAIR;  // clusters' rows

struct Problem {
    const float *scale_a, *scale_b;
    TYPE* c;
    int rows, outputs, steps, blocks_x, blocks_f;  // blocks_x: of a cluster's rows
};

struct Work {
    int row, output;

    TESSERA_DEVICE Work(const Problem& p, int item) {
        const int whole = GROUP_X * p.blocks_f, first = item / whole * GROUP_X, inside = item % whole;
        const int height = min(GROUP_X, p.blocks_x - first);
        row = ((first + inside % height) * PAIR + own_rank()) * ROWS;
        output = inside / height * COLUMNS;
    }
};

TESSERA_DEVICE void copy_all(Ring& ring, const Problem& p, const TensorMap* a, const TensorMap* b) {
    Turn<STAGES> turn;
    for (int item = first_item(); item < p.blocks_x * p.blocks_f; item = item_after(item)) {
        const Work w(p, item);
        for (int step = 0; step < p.steps; ++step, turn.next())
            load_factors(ring, turn, a, w.row, b, w.output, step * TERMS);
    }
}

struct alignas(8) Pair { float first, second; };

// Outputs `output` + 8 i and the next of both rows; their number is even.
TESSERA_DEVICE void scale_columns(Sums& sums, const Problem& p, int output) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; ++i) {
        const Pair scale = *reinterpret_cast<const Pair*>(p.scale_b + min(output + 8 * i, p.outputs - 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sums[4 * i + 2 * half] *= scale.first;
            sums[4 * i + 2 * half + 1] *= scale.second;
        }
    }
}

TESSERA_DEVICE void multiply_all(Ring& ring, const Problem& p) {
    const int group = same_in_warp(static_cast<int>(threadIdx.x) / 128) - 1;
    const int thread = threadIdx.x % 128, lane = thread % 32, inside = group * 64 + thread / 32 * 16;
    Turn<STAGES> turn;
    fall_behind(ring, group, p.steps);
    for (int item = first_item(); item < p.blocks_x * p.blocks_f; item = item_after(item)) {
        const Work w(p, item);
        const int row = w.row + inside;
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            factor[half] = BY_ROW ? p.scale_a[min(row + lane / 4 + 8 * half, p.rows - 1)] : p.scale_a[0] * p.scale_b[0];
        Sums sums;
        multiply<e4m3>(sums, ring, turn, p.steps, group);
        if constexpr (BY_ROW) scale_columns(sums, p, w.output + lane % 4 * 2);
        TYPE* c = p.c + static_cast<int64_t>(row) * p.outputs + w.output;
#pragma unroll
        for (int part = 0; part < COLUMNS / 64; ++part) {
            uint32_t pairs[16];
            pack_rows<TYPE>(pairs, reinterpret_cast<const float(&)[32]>(sums[32 * part]), factor);
            store_rows(pairs, c + 64 * part, p.outputs, p.rows - row, p.outputs - w.output - 64 * part, lane);
        }
    }
}

TESSERA_CLUSTER_KERNEL(PAIR, THREADS) fp8_matmul(
    const TESSERA_GRID_CONSTANT TensorMap a, const TESSERA_GRID_CONSTANT TensorMap b, const float* scale_a, const float* scale_b,
    TYPE* c, int rows, int outputs, int steps, int blocks_x, int blocks_f) {
    TESSERA_SHARED(memory);
    Ring& ring = *reinterpret_cast<Ring*>(memory);
    const Problem p = {scale_a, scale_b, c, rows, outputs, steps, blocks_x, blocks_f};
    if (threadIdx.x == 0) {
        ring.begin();
        prefetch_map(&a);
        prefetch_map(&b);
    }
    all_begin();
    if (threadIdx.x < 128) {
        fewer_registers<SPARED>();
        if (threadIdx.x == 0) copy_all(ring, p, &a, &b);
    } else {
        more_registers<REGISTERS>();
        multiply_all(ring, p);
    }
    all_end();
}
TESSERA_ENTRY(fp8_matmul)
