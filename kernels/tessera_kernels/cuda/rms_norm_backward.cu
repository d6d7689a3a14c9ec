// RMSNorm backward, with and without the residual add before the norm.
//
//     dx = r (u - n mean(u n)) [+ dtotal],  dg = sum over rows of dy n,      (Zhang & Sennrich 2019, arXiv 1910.07467)
//     with r = 1 / sqrt(mean(x^2) + eps), n = x r, u = dy g
//
//       columns D ->                    HBM        x, dy, dtotal read once; dx written once; dg partials [blocks, D]
//     +---------------+  blockDim.y     registers  the slot's float32 dg
//     | row of slot 0 |  rows a block,  shared     sums across the warps of a row; the gain, and STAGES rows: a thread
//     +---------------+  blockDim.x                copies and reads its own pieces, so that no barrier guards them, and
//     | row of slot 1 |  threads a row             asks for the next row when it has read one twice
//     +---------------+  Persistent blocks; rms_norm_sum_partials.cu adds up what they leave of dg.
//
// A row of several spans is read twice, the second time from L2, and its dg partial stays in L2. With GAIN_AFTER_CAST the
// products round where the forward's do (tessera_kernels/reference/rms_norm.py).
//
// Compiled with ADD, GAIN_AFTER_CAST and STAGES as numbers, and what norm_rows.cuh takes.
#include "norm_rows.cuh"

constexpr int INPUTS = 2 + ADD;
constexpr int FOURS = PIECE / 4;

struct alignas(16) Four { float x[4]; };

struct Rows {  // what is read of each row
    const NUMBER* of[INPUTS];
    int64_t stride[INPUTS];
};

#if STAGES
// This thread's piece i of an input, in the stage's part of the ring.
TESSERA_DEVICE Words* staged(Words* ring, int stage, int input, int i) {
    return ring + ((stage * INPUTS + input) * HELD + i) * THREADS + threadIdx.y * blockDim.x + threadIdx.x;
}

// Ask for a row that will be needed STAGES rounds later. Every thread commits, so that all count the same groups.
TESSERA_DEVICE void read_ahead(Words* ring, int stage, const Rows& rows, int row, int num_rows, int width) {
    const uint32_t to = shared_address(staged(ring, stage, 0, 0));
    if (row < num_rows) {
#pragma unroll
        for (int input = 0; input < INPUTS; ++input) {
            const Words* from = reinterpret_cast<const Words*>(rows.of[input] + row * rows.stride[input]) + threadIdx.x;
#pragma unroll
            for (int i = 0; i < HELD; ++i)
                if (column_of(0, i) < width)
                    copy_16(to + (input * HELD + i) * THREADS * sizeof(Words), from + i * blockDim.x, 16);
        }
    }
    copy_commit();
}

TESSERA_DEVICE Piece taken(Words* ring, int stage, int input, int i, int width) {
    return {column_of(0, i) < width ? *staged(ring, stage, input, i) : Words{{0, 0, 0, 0}}};
}
#endif

TESSERA_DEVICE float unit_gradient(float upstream, float gain) {
    return GAIN_AFTER_CAST ? lifted(upstream * gain) : upstream * gain;
}

TESSERA_KERNEL(THREADS)
rms_norm_backward(
    const NUMBER* dy, const NUMBER* x, const NUMBER* gain, const float* rstd, const NUMBER* dtotal, NUMBER* dx,
    float* partial, int64_t dy_stride, int64_t x_stride, int64_t dtotal_stride, int num_rows, int width, float share) {
    TESSERA_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    NUMBER* passage = passage_of(shared);
    const int spans = num_spans(width);
    const int step = gridDim.x * blockDim.y, begin = blockIdx.x * blockDim.y;
    Piece factor[HELD];
#if WIDE
    float* own = partial + (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * width;
#else
    float dgain[HELD][PIECE];
#pragma unroll
    for (int i = 0; i < HELD; ++i)
#pragma unroll
        for (int j = 0; j < PIECE; ++j) dgain[i][j] = 0.0f;
#endif
#if STAGES
    Words* kept_gain = reinterpret_cast<Words*>(after_sums(shared)) + threadIdx.x;
    Words* ring = reinterpret_cast<Words*>(after_sums(shared)) + HELD * blockDim.x;
#if ADD
    const Rows rows{{x, dy, dtotal}, {x_stride, dy_stride, dtotal_stride}};
#else
    const Rows rows{{x, dy}, {x_stride, dy_stride}};
#endif
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage)
        read_ahead(ring, stage, rows, begin + stage * step + threadIdx.y, num_rows, width);
    load<false>(factor, gain, 0, width, passage);
    if (threadIdx.y == 0)
#pragma unroll
        for (int i = 0; i < HELD; ++i) kept_gain[i * blockDim.x] = factor[i].words;
    sync_threads();
#endif
    int round = 0;
    float next_scale = begin + static_cast<int>(threadIdx.y) < num_rows ? rstd[begin + threadIdx.y] : 0.0f;
    for (int first = begin; first < num_rows; first += step, ++round) {
        const int row = first + threadIdx.y;
        const int inside = row < num_rows ? width : 0;
        const float scale = next_scale;
        next_scale = row + step < num_rows ? rstd[row + step] : 0.0f;
        Piece unit[HELD], upstream[HELD], passed[HELD];  // x, dy, dtotal as they were read
        float products = 0.0f;
        for (int span = 0; span < spans; ++span) {
#if STAGES
            copy_wait<STAGES - 1>();
#else
            load<true>(unit, x + row * x_stride, span, inside, passage);
            load<true>(upstream, dy + row * dy_stride, span, inside, passage);
            load<false>(factor, gain, span, inside, passage);
#endif
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
#if STAGES  // piece by piece, and once more after the sum: registers are short
                unit[i] = taken(ring, round % STAGES, 0, i, inside);
                upstream[i] = taken(ring, round % STAGES, 1, i, inside);
                factor[i].words = kept_gain[i * blockDim.x];
#endif
#pragma unroll
                for (int j = 0; j < PIECE; ++j)
                    products += unit_gradient(number_of(upstream[i], j), number_of(factor[i], j)) * number_of(unit[i], j);
            }
        }
        // with n = x r: r (u - n mean(u n)) = r u - x (r^3 mean(u x))
        const float pull = row_sum(products, sums, round) * share * scale * (scale * scale);
        NUMBER* dx_row = dx + int64_t(row) * width;
        for (int span = 0; span < spans; ++span) {
#if ADD && !STAGES
            load<true>(passed, dtotal + row * dtotal_stride, span, inside, passage);
#endif
            if (!STAGES) load<false>(factor, gain, span, inside, passage);
            if (spans > 1) {
                load<true>(unit, x + row * x_stride, span, inside, passage);
                load<true>(upstream, dy + row * dy_stride, span, inside, passage);
            }
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
#if STAGES
                unit[i] = taken(ring, round % STAGES, 0, i, inside);
                upstream[i] = taken(ring, round % STAGES, 1, i, inside);
                factor[i].words = kept_gain[i * blockDim.x];
                if (ADD) passed[i] = taken(ring, round % STAGES, 2, i, inside);
#endif
                keep_packed(unit[i].words);
                keep_packed(upstream[i].words);
                keep_packed(factor[i].words);
                float change[PIECE];
#pragma unroll
                for (int j = 0; j < PIECE; ++j) {
                    const float number = number_of(unit[i], j), by = number_of(factor[i], j);
                    // r goes with dy into both gradients, unless x r or dy g is rounded before the other factor
                    const float flow = number_of(upstream[i], j) * (GAIN_AFTER_CAST ? 1.0f : scale);
                    const float normed = GAIN_AFTER_CAST ? lifted(number * scale) : number;
                    change[j] = (GAIN_AFTER_CAST ? lifted(flow * by) * scale : flow * by) - number * pull;
#if WIDE
                    const int own_column = column_of(span, i) + j;
                    if (own_column < inside) own[own_column] = (round > 0 ? own[own_column] : 0.0f) + flow * normed;
#else
                    dgain[i][j] += flow * normed;
#endif
                    if (ADD) change[j] = lifted(change[j]) + number_of(passed[i], j);
                }
                unit[i] = rounded_piece<NUMBER>(change);
                if (ALIGNED) store_piece(dx_row, column_of(span, i), inside, unit[i]);  // at once: registers are short
            }
            if (!ALIGNED) store(dx_row, span, inside, unit, passage);
#if STAGES
            read_ahead(ring, round % STAGES, rows, row + STAGES * step, num_rows, width);
#endif
        }
    }
#if !WIDE
    // The rows of a warp add up their dg; then all threads add up, four columns each, what the warps leave in shared memory.
    const int threads = blockDim.x, slots = max(1, 32 / threads), groups = blockDim.y / slots;
    for (int mask = threads; mask < 32; mask *= 2)
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
            for (int j = 0; j < PIECE; ++j) dgain[i][j] += shuffle_xor(dgain[i][j], mask);
    Four* left = reinterpret_cast<Four*>(shared);
    sync_threads();  // the rows read ahead have been read
    if (threadIdx.y % slots == 0)
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
            for (int q = 0; q < FOURS; ++q)
                left[((threadIdx.y / slots * HELD + i) * FOURS + q) * threads + threadIdx.x] =
                    {{dgain[i][4 * q], dgain[i][4 * q + 1], dgain[i][4 * q + 2], dgain[i][4 * q + 3]}};
    sync_threads();
    Four* own = reinterpret_cast<Four*>(partial + int64_t(blockIdx.x) * width);
    for (int four = threadIdx.y * threads + threadIdx.x; four < width / 4; four += threads * blockDim.y) {
        const int piece = four / FOURS;
        const Four* from = left + (piece / threads * FOURS + four % FOURS) * threads + piece % threads;
        Four sum = *from;
        for (int group = 1; group < groups; ++group)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum.x[j] += from[group * HELD * FOURS * threads].x[j];
        own[four] = sum;
    }
#endif
}
TESSERA_ENTRY(rms_norm_backward)
