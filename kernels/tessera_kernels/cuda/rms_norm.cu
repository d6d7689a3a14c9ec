// RMSNorm, forward and backward, with and without the residual add before it.
//
//     y = x r g,  r = 1 / sqrt(mean(x^2) + eps)                              (Zhang & Sennrich 2019, arXiv 1910.07467)
//     dx = r (u - n mean(u n)) [+ dtotal],  dg = sum over rows of dy n,  with n = x r, u = dy g
//
//       columns D ->                    HBM        x, residual, dy read once; y, sum, dx written once; r [X] float32 saved
//     +---------------+  blockDim.y     registers  a row, as it was read: HELD pieces of 16 bytes a thread; and (backward)
//     | row of slot 0 |  rows a block,             the block's float32 dg of these columns
//     +---------------+  blockDim.x     shared     sums across the warps of a row; (backward) the gain, and STAGES rows
//     | row of slot 1 |  threads a row             read ahead: a thread copies and reads its own pieces, so that no
//     +---------------+                            barrier guards them
//       Forward: a block for each blockDim.y rows, or persistent blocks. Backward: persistent, dg partials
//       [blocks, D] in HBM, and `rms_norm_sum_partials` adds them up in a fixed order.
//
// Piece i of a span belongs to thread i % blockDim.x. A row of several spans is read twice, the second time from L2, and
// its dg partial stays in L2. Where rows do not begin and end at multiples of 16 bytes (ALIGNED = 0) they pass through
// shared memory, number by number; sums run in the same order. Rounding is that of the reference,
// tessera_kernels/reference/rms_norm.py: the sum x + residual rounds before it is normed, and with GAIN_AFTER_CAST the
// unit row rounds before the gain. Sums are deterministic; a row's result does not depend on the other rows.
//
// Compiled with one of FORWARD, BACKWARD, SUM_PARTIALS defined, NUMBER as bf16, f16 or float, and HELD, ADD,
// GAIN_AFTER_CAST, ALIGNED, WIDE (rows may have several spans; always so without ALIGNED) and STAGES as numbers.
#include "device.cuh"

constexpr int PIECE = 16 / sizeof(NUMBER);
constexpr int THREADS = 512;       // of a block, at most
constexpr int WARP_SUMS = 2 * 32;  // floats of a slot whose row has several warps: their sums, twice

union Piece {
    Words words;
    NUMBER number[PIECE];
};

#ifndef SUM_PARTIALS

// The first column of piece i of a span.
TESSERA_DEVICE int column_of(int span, int i) {
    return ((span * HELD + i) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * PIECE;
}

TESSERA_DEVICE void sync_row() {
    if (blockDim.x > 32)
        sync_some(1 + threadIdx.y, blockDim.x);
    else
        sync_warp();
}

// This thread's pieces of a span of a row of `width` numbers, zeros beyond its end. `once`: they need not stay in L1.
template <bool once>
TESSERA_DEVICE void load(Piece (&held)[HELD], const NUMBER* row, int span, int width, NUMBER* passage) {
#if ALIGNED
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int column = column_of(span, i);
        const Words* from = reinterpret_cast<const Words*>(row + column);
        held[i].words = column >= width ? Words{{0, 0, 0, 0}} : once ? load_once(from) : *from;
    }
#else
    const int first = span * HELD * PIECE * blockDim.x;
    sync_row();  // what the passage held has been read
    for (int k = threadIdx.x; k < HELD * PIECE * static_cast<int>(blockDim.x); k += blockDim.x)
        passage[k] = first + k < width ? row[first + k] : rounded<NUMBER>(0.0f);
    sync_row();
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i].words = reinterpret_cast<const Words*>(passage + column_of(0, i))[0];
#endif
}

TESSERA_DEVICE void store(NUMBER* row, int span, int width, const Piece (&held)[HELD], NUMBER* passage) {
#if ALIGNED
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int column = column_of(span, i);
        if (column < width) *reinterpret_cast<Words*>(row + column) = held[i].words;
    }
#else
    const int first = span * HELD * PIECE * blockDim.x;
    sync_row();
#pragma unroll
    for (int i = 0; i < HELD; ++i) reinterpret_cast<Words*>(passage + column_of(0, i))[0] = held[i].words;
    sync_row();
    for (int k = threadIdx.x; k < HELD * PIECE * static_cast<int>(blockDim.x); k += blockDim.x)
        if (first + k < width) row[first + k] = passage[k];
#endif
}

template <class T> TESSERA_DEVICE Piece rounded_piece(const float (&x)[PIECE]) {
    Piece piece;
#pragma unroll
    for (int j = 0; j < PIECE; ++j) {
        if constexpr (sizeof(T) == 2) {
            if (j % 2 == 0) piece.words.word[j / 2] = packed<T>(x[j], x[j + 1]);
        } else {
            piece.number[j] = rounded<T>(x[j]);
        }
    }
    return piece;
}

TESSERA_DEVICE float lifted(float x) { return to_float(rounded<NUMBER>(x)); }  // float32 again, after a rounding

// The sum of x over the threads of this row, in all of them. `round` counts the calls: sums of one call are still read
// while the next call writes its own.
TESSERA_DEVICE float row_sum(float x, float* sums, int round) {
    const int threads = blockDim.x;
    for (int mask = min(threads, 32) / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    if (threads <= 32) return x;
    float* mine = sums + 32 * ((round % 2) * blockDim.y + threadIdx.y);
    if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = x;
    sync_some(1 + threadIdx.y, threads);
    float total = 0.0f;
    for (int warp = 0; warp < threads / 32; ++warp) total += mine[warp];
    return total;
}

TESSERA_DEVICE unsigned char* after_sums(unsigned char* shared) {
    return shared + (blockDim.x > 32 ? WARP_SUMS * sizeof(float) * blockDim.y : 0);
}

// This row's part of shared memory, where it is not read in whole pieces.
TESSERA_DEVICE NUMBER* passage_of(unsigned char* shared) {
    return reinterpret_cast<NUMBER*>(after_sums(shared)) + HELD * PIECE * blockDim.x * threadIdx.y;
}

TESSERA_DEVICE void keep_packed(Piece (&held)[HELD]) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) keep_packed(held[i].words);
}

TESSERA_DEVICE int num_spans(int width) {
    const int span = HELD * PIECE * blockDim.x;
    return WIDE ? (width + span - 1) / span : 1;
}

#endif

#ifdef FORWARD

// The pieces of x, or of x + residual rounded.
TESSERA_DEVICE void load_total(
    Piece (&held)[HELD], const NUMBER* x, const NUMBER* residual, int span, int width, NUMBER* passage) {
    load<true>(held, x, span, width, passage);
#if ADD
    Piece other[HELD];
    load<true>(other, residual, span, width, passage);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        float sum[PIECE];
#pragma unroll
        for (int j = 0; j < PIECE; ++j) sum[j] = to_float(held[i].number[j]) + to_float(other[i].number[j]);
        held[i] = rounded_piece<NUMBER>(sum);
    }
#endif
}

TESSERA_KERNEL(THREADS)
rms_norm_forward(
    const NUMBER* x, const NUMBER* residual, const NUMBER* gain, NUMBER* y, NUMBER* total, float* rstd,
    int64_t x_stride, int64_t residual_stride, int num_rows, int width, float eps) {
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
        Piece held[HELD];
        float squares = 0.0f;
        for (int span = 0; span < spans; ++span) {
            load_total(held, x_row, residual_row, span, inside, passage);
#pragma unroll
            for (int i = 0; i < HELD; ++i)
#pragma unroll
                for (int j = 0; j < PIECE; ++j) squares += to_float(held[i].number[j]) * to_float(held[i].number[j]);
        }
        const float scale = root_reciprocal(row_sum(squares, sums, round++) / width + eps);
        if (threadIdx.x == 0 && row < num_rows) rstd[row] = scale;
        keep_packed(held);
        for (int span = 0; span < spans; ++span) {
            if (spans > 1) load_total(held, x_row, residual_row, span, inside, passage);
#if ADD
            store(total + int64_t(row) * width, span, inside, held, passage);
#endif
            Piece factor[HELD];
            load<false>(factor, gain, span, inside, passage);
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                float unit[PIECE];
#pragma unroll
                for (int j = 0; j < PIECE; ++j) {
                    unit[j] = to_float(held[i].number[j]) * scale;
                    unit[j] = (GAIN_AFTER_CAST ? lifted(unit[j]) : unit[j]) * to_float(factor[i].number[j]);
                }
                held[i] = rounded_piece<NUMBER>(unit);
            }
            store(y + int64_t(row) * width, span, inside, held, passage);
        }
    }
}
TESSERA_ENTRY(rms_norm_forward)

#endif

#ifdef BACKWARD

constexpr int INPUTS = 2 + ADD;

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
    if (row < num_rows) {
#pragma unroll
        for (int input = 0; input < INPUTS; ++input)
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
                const int column = column_of(0, i);
                const NUMBER* from = rows.of[input] + row * rows.stride[input] + column;
                if (column < width) copy_16(shared_address(staged(ring, stage, input, i)), from, 16);
            }
    }
    copy_commit();
}

TESSERA_DEVICE void take(Piece (&held)[HELD], Words* ring, int stage, int input, int width) {
#pragma unroll
    for (int i = 0; i < HELD; ++i)
        held[i].words = column_of(0, i) < width ? *staged(ring, stage, input, i) : Words{{0, 0, 0, 0}};
}
#endif

TESSERA_DEVICE float unit_gradient(const Piece& upstream, const Piece& gain, int j) {
    const float x = to_float(upstream.number[j]) * to_float(gain.number[j]);
    return GAIN_AFTER_CAST ? lifted(x) : x;
}

TESSERA_KERNEL(THREADS)
rms_norm_backward(
    const NUMBER* dy, const NUMBER* x, const NUMBER* gain, const float* rstd, const NUMBER* dtotal, NUMBER* dx,
    float* partial, int64_t dy_stride, int64_t x_stride, int64_t dtotal_stride, int num_rows, int width) {
    TESSERA_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
#if ADD
    const Rows rows{{x, dy, dtotal}, {x_stride, dy_stride, dtotal_stride}};
#else
    const Rows rows{{x, dy}, {x_stride, dy_stride}};
#endif
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
    load<false>(factor, gain, 0, width, passage);
    if (threadIdx.y == 0)
#pragma unroll
        for (int i = 0; i < HELD; ++i) kept_gain[i * blockDim.x] = factor[i].words;
    sync_threads();
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage)
        read_ahead(ring, stage, rows, begin + stage * step + threadIdx.y, num_rows, width);
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
            take(unit, ring, round % STAGES, 0, inside);
            take(upstream, ring, round % STAGES, 1, inside);
            if (!ADD) read_ahead(ring, round % STAGES, rows, row + STAGES * step, num_rows, width);
#else
            load<true>(unit, x + row * x_stride, span, inside, passage);
            load<true>(upstream, dy + row * dy_stride, span, inside, passage);
            load<false>(factor, gain, span, inside, passage);
#endif
#pragma unroll
            for (int i = 0; i < HELD; ++i) {
#if STAGES
                factor[i].words = kept_gain[i * blockDim.x];
#endif
#pragma unroll
                for (int j = 0; j < PIECE; ++j)
                    products += unit_gradient(upstream[i], factor[i], j) * (to_float(unit[i].number[j]) * scale);
            }
        }
        const float mean = row_sum(products, sums, round) / width;
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
                keep_packed(unit[i].words);
                keep_packed(upstream[i].words);
#if STAGES  // piece by piece: registers are short
                factor[i].words = kept_gain[i * blockDim.x];
                if (ADD && column_of(0, i) < inside) passed[i].words = *staged(ring, round % STAGES, 2, i);
#endif
                keep_packed(factor[i].words);
                float change[PIECE];
#pragma unroll
                for (int j = 0; j < PIECE; ++j) {
                    const float normed = to_float(unit[i].number[j]) * scale;
                    change[j] = (unit_gradient(upstream[i], factor[i], j) - normed * mean) * scale;
                    const float term = to_float(upstream[i].number[j]) * (GAIN_AFTER_CAST ? lifted(normed) : normed);
#if WIDE
                    const int column = column_of(span, i) + j;
                    if (column < inside) own[column] = round > 0 ? own[column] + term : term;
#else
                    dgain[i][j] += term;
#endif
                    if (ADD) change[j] = lifted(change[j]) + to_float(passed[i].number[j]);
                }
                unit[i] = rounded_piece<NUMBER>(change);
            }
            store(dx + int64_t(row) * width, span, inside, unit, passage);
#if STAGES && ADD
            read_ahead(ring, round % STAGES, rows, row + STAGES * step, num_rows, width);
#endif
        }
    }
#if !WIDE
    // The rows of a warp add up their dg, then warp after warp adds its own to that of the warps before; the last one
    // writes the block's.
    const int threads = blockDim.x, slots = max(1, 32 / threads), slot = threadIdx.y / slots, last = blockDim.y / slots - 1;
    float* own = partial + int64_t(blockIdx.x) * width;
    for (int mask = threads; mask < 32; mask *= 2)
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
            for (int j = 0; j < PIECE; ++j) dgain[i][j] += shuffle_xor(dgain[i][j], mask);
    sync_threads();
    for (int turn = 0; turn <= last; ++turn) {
        if (slot == turn && static_cast<int>(threadIdx.y) % slots == 0) {
#pragma unroll
            for (int i = 0; i < HELD; ++i)
#pragma unroll
                for (int j = 0; j < PIECE; ++j) {
                    const int place = (i * PIECE + j) * threads + threadIdx.x, column = column_of(0, i) + j;
                    if (turn > 0) dgain[i][j] += sums[place];
                    if (turn < last)
                        sums[place] = dgain[i][j];
                    else if (column < width)
                        own[column] = dgain[i][j];
                }
        }
        sync_threads();
    }
#endif
}
TESSERA_ENTRY(rms_norm_backward)

#endif

#ifdef SUM_PARTIALS

// dg = sum of partial [num_partials, D] over its rows: blockDim.x = 32 columns, blockDim.y interleaved runs of rows.
TESSERA_KERNEL(THREADS) rms_norm_sum_partials(const float* partial, NUMBER* dgain, int num_partials, int width) {
    TESSERA_SHARED(shared);
    float* sums = reinterpret_cast<float*>(shared);
    const int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < width)
        for (int row = threadIdx.y; row < num_partials; row += blockDim.y) sum += partial[int64_t(row) * width + column];
    sums[threadIdx.y * 32 + threadIdx.x] = sum;
    sync_threads();
    if (threadIdx.y > 0 || column >= width) return;
    for (int run = 1; run < static_cast<int>(blockDim.y); ++run) sum += sums[run * 32 + threadIdx.x];
    dgain[column] = rounded<NUMBER>(sum);
}
TESSERA_ENTRY(rms_norm_sum_partials)

#endif
