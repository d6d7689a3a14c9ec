// RMSNorm forward, with and without the residual add before it.
//
//     y = x r g,  r = 1 / sqrt(mean(x^2) + eps)                              (Zhang & Sennrich 2019, arXiv 1910.07467)
//
//       columns D ->                    HBM        x, residual read once; y, sum written once; r [X] float32 saved
//     +---------------+  blockDim.y     registers  a row and the gain, as they were read: HELD pieces of 16 bytes a
//     | row of slot 0 |  rows a block,             thread, both asked for at once
//     +---------------+  blockDim.x     shared     sums across the warps of a row
//     | row of slot 1 |  threads a row
//     +---------------+  A block for each blockDim.y rows, or persistent blocks.
//
// A row of several spans is read twice, the second time from L2. Rounding is that of the reference,
// tessera_kernels/reference/rms_norm.py: the sum x + residual rounds before it is normed, and with GAIN_AFTER_CAST the
// unit row rounds before the gain.
//
// Compiled with ADD and GAIN_AFTER_CAST as numbers, and what norm_rows.cuh takes.
#include "norm_rows.cuh"

// The pieces of x, or of x + residual rounded; and the gain's, all asked for before the first of them is needed, unless
// the row has several spans.
TESSERA_DEVICE void load_total(
    Piece (&held)[HELD], Piece (&factor)[HELD], const NUMBER* x, const NUMBER* residual, const NUMBER* gain, int span,
    int width, NUMBER* passage) {
    load<true>(held, x, span, width, passage);
#if ADD
    Piece other[HELD];
    load<true>(other, residual, span, width, passage);
#endif
#if !WIDE
    load<false>(factor, gain, span, width, passage);
#endif
#if ADD
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        float sum[PIECE];
#pragma unroll
        for (int j = 0; j < PIECE; ++j) sum[j] = number_of(held[i], j) + number_of(other[i], j);
        held[i] = rounded_piece<NUMBER>(sum);
    }
#endif
}

// At most four pieces a thread leave registers for two blocks of the most threads.
TESSERA_KERNEL_SHARED_SM(THREADS, HELD <= 4 && ALIGNED ? 2 : 1)
rms_norm_forward(
    const NUMBER* x, const NUMBER* residual, const NUMBER* gain, NUMBER* y, NUMBER* total, float* rstd,
    int64_t x_stride, int64_t residual_stride, int num_rows, int width, float share, float eps) {
    TESSERA_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    NUMBER* passage = passage_of(shared);
    const int spans = num_spans(width);
    int round = 0;
    for (int first = blockIdx.x * blockDim.y; first < num_rows; first += gridDim.x * blockDim.y) {
        const int row = first + threadIdx.y;
        const int inside = row < num_rows ? width : 0;  // of a row beyond the last nothing is read or written
        const NUMBER* x_row = x + row * x_stride;
        const NUMBER* residual_row = residual + row * residual_stride;
        NUMBER* y_row = y + int64_t(row) * width;
        Piece held[HELD], factor[HELD];
        float squares = 0.0f;
        for (int span = 0; span < spans; ++span) {
            load_total(held, factor, x_row, residual_row, gain, span, inside, passage);
#if ADD
            store(total + int64_t(row) * width, span, inside, held, passage);
#endif
#pragma unroll
            for (int i = 0; i < HELD; ++i)
#pragma unroll
                for (int j = 0; j < PIECE; ++j) squares += number_of(held[i], j) * number_of(held[i], j);
        }
        const float scale = root_reciprocal(row_sum(squares, sums, round++) * share + eps);
        if (threadIdx.x == 0 && row < num_rows) rstd[row] = scale;
        keep_packed(held);
        for (int span = 0; span < spans; ++span) {
            if (spans > 1) load_total(held, factor, x_row, residual_row, gain, span, inside, passage);
#if WIDE
            load<false>(factor, gain, span, inside, passage);
#endif
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                float unit[PIECE];
#pragma unroll
                for (int j = 0; j < PIECE; ++j) {
                    unit[j] = number_of(held[i], j) * scale;
                    unit[j] = (GAIN_AFTER_CAST ? lifted(unit[j]) : unit[j]) * number_of(factor[i], j);
                }
                held[i] = rounded_piece<NUMBER>(unit);
                if (ALIGNED) store_piece(y_row, column_of(span, i), inside, held[i]);
            }
            if (!ALIGNED) store(y_row, span, inside, held, passage);
        }
    }
}
TESSERA_ENTRY(rms_norm_forward)
