// d head [V, D] += slopes [rows, V]^T hidden [rows, D], summed in float32 over some rows, for sm_90a.
//
//     D ->                         HBM        slopes once, hidden states from L2; d head: one addition to each number
//   +-------+-------+              shared     STAGES x 64 rows of both factors, terms in columns (`product_ring.cuh`)
// V | tile  | tile  | 128 x 256    registers  [64, 256] float32 a warpgroup, which go to memory while the other multiplies
//   +-------+-------+
//
// Additions are left to L2 (red): no thread reads d head and none waits. Each number takes one in a launch, and launches come
// in order: the same call gives the same bits. The first rows are stored instead.
// Reference: tessera_kernels.reference.linear_distillation (the gradient of the student's head).
//
// Defined by the host: TYPE (bf16, f16), STAGES.
#include "product_ring.cuh"

struct Problem {
    float* sums;  // d head
    int rows, vocab, width, blocks_d, count, adds;
};

TESSERA_DEVICE void copy_all(Ring& ring, const Problem& p, const TensorMap* slopes, const TensorMap* hidden) {
    Turn<STAGES> turn;
    for (int item = blockIdx.x; item < p.count; item += gridDim.x) {
        const int id = item / p.blocks_d * ROWS, column = item % p.blocks_d * COLUMNS;
        for (int row = 0; row < p.rows; row += TERMS, turn.next()) {
            uint64_t* full = open_stage(ring, turn);
            for (int panel = 0; panel < ROWS / 64; ++panel)
                load_box(ring.left[turn.stage] + panel * PANEL_BYTES, slopes, full, id + 64 * panel, row, 0, 0);
            for (int panel = 0; panel < COLUMNS / 64; ++panel)
                load_box(ring.right[turn.stage] + panel * PANEL_BYTES, hidden, full, column + 64 * panel, row, 0, 0);
        }
    }
}

// A thread's two rows, ids `id` and 8 further; numbers at `column` + 8 i and the next. WHOLE: the tile has no end in it, and
// nothing is asked of each number (a predicate on an addition becomes a branch).
template <bool WHOLE> TESSERA_DEVICE void write(const Sums& sums, const Problem& p, int id, int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float* to = p.sums + static_cast<int64_t>(id + 8 * half) * p.width + column;
        const bool is_id = WHOLE || id + 8 * half < p.vocab;
        if (p.adds) {
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; ++i)
                add_8(WHOLE || (is_id && column + 8 * i < p.width), to + 8 * i, sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; ++i)
                store_8(WHOLE || (is_id && column + 8 * i < p.width), to + 8 * i, sums[4 * i + 2 * half], sums[4 * i + 2 * half + 1]);
        }
    }
}

TESSERA_DEVICE void multiply_all(Ring& ring, const Problem& p) {
    const int group = same_in_warp(static_cast<int>(threadIdx.x) / 128) - 1;
    const int thread = threadIdx.x % 128, lane = thread % 32, inside = group * 64 + thread / 32 * 16 + lane / 4;
    const int steps = (p.rows + TERMS - 1) / TERMS;
    Turn<STAGES> turn;
    if (static_cast<int>(blockIdx.x) < p.count) fall_behind(ring, group, steps);
    for (int item = blockIdx.x; item < p.count; item += gridDim.x) {
        Sums sums;
        multiply<TYPE, true>(sums, ring, turn, steps, group);
        const int id = item / p.blocks_d * ROWS, column = item % p.blocks_d * COLUMNS;
        if (id + ROWS <= p.vocab && column + COLUMNS <= p.width)
            write<true>(sums, p, id + inside, column + lane % 4 * 2);
        else
            write<false>(sums, p, id + inside, column + lane % 4 * 2);
    }
}

TESSERA_KERNEL(THREADS) linear_head_gradient(
    const TESSERA_GRID_CONSTANT TensorMap slopes, const TESSERA_GRID_CONSTANT TensorMap hidden, float* sums, int rows, int vocab,
    int width, int blocks_d, int count, int adds) {
    TESSERA_SHARED(memory);
    Ring& ring = *reinterpret_cast<Ring*>(memory);
    const Problem p = {sums, rows, vocab, width, blocks_d, count, adds};
    if (threadIdx.x == 0) {
        ring.begin();
        prefetch_map(&slopes);
        prefetch_map(&hidden);
    }
    sync_threads();
    if (threadIdx.x < 128) {
        fewer_registers<SPARED>();
        if (threadIdx.x == 0) copy_all(ring, p, &slopes, &hidden);
    } else {
        more_registers<REGISTERS>();
        multiply_all(ring, p);
    }
}
TESSERA_ENTRY(linear_head_gradient)
