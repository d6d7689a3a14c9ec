// RMSNorm, forward and backward, with and without the residual add before it.
//
//     y = x r g,  r = 1 / sqrt(mean(x^2) + eps)                              (Zhang & Sennrich 2019, arXiv 1910.07467)
//     dx = r (u - n mean(u n)) [+ dtotal],  dg = sum over rows of dy n,  with n = x r, u = dy g
//
//       columns D ->                    HBM        x, residual, dy read once; y, sum, dx written once; r [X] float32 saved
//     +---------------+  blockDim.y     registers  (forward) a row and the gain, as they were read: HELD pieces of 16 bytes
//     | row of slot 0 |  rows a block,             a thread, both asked for at once; (backward) the slot's float32 dg
//     +---------------+  blockDim.x     shared     sums across the warps of a row; (backward) the gain, and STAGES rows:
//     | row of slot 1 |  threads a row             a thread copies and reads its own pieces, so that no barrier guards
//     +---------------+                            them, and asks for the next row when it has read one twice
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

union Bits {
    uint32_t bits;
    float x;
};

template <class T> constexpr bool is_bf16(T) { return false; }
constexpr bool is_bf16(bf16) { return true; }

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

TESSERA_DEVICE void store_piece(NUMBER* row, int column, int width, const Piece& piece) {
    if (column < width) *reinterpret_cast<Words*>(row + column) = piece.words;
}

TESSERA_DEVICE void store(NUMBER* row, int span, int width, const Piece (&held)[HELD], NUMBER* passage) {
#if ALIGNED
#pragma unroll
    for (int i = 0; i < HELD; ++i) store_piece(row, column_of(span, i), width, held[i]);
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

// Number j of a piece. A bfloat16 is the upper half of a float32: one instruction, taken from the pair's word.
TESSERA_DEVICE float number_of(const Piece& piece, int j) {
    if constexpr (is_bf16(NUMBER{})) {
        const uint32_t pair = piece.words.word[j / 2];
        return Bits{j % 2 == 0 ? pair << 16 : pair & 0xffff0000u}.x;
    } else {
        return to_float(piece.number[j]);
    }
}

TESSERA_DEVICE float lifted(float x) { return to_float(rounded<NUMBER>(x)); }  // float32 again, after a rounding

TESSERA_DEVICE float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

// The sum of x over the threads of this row, in all of them. `round` counts the calls: sums of one call are still read
// while the next call writes its own.
TESSERA_DEVICE float row_sum(float x, float* sums, int round) {
    const int threads = blockDim.x, lane = threadIdx.x % 32;
    if (threads < 32) {
        for (int mask = threads / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
        return x;
    }
    x = warp_sum(x);
    if (threads == 32) return x;
    float* mine = sums + 32 * ((round % 2) * blockDim.y + threadIdx.y);
    if (lane == 0) mine[threadIdx.x / 32] = x;
    sync_some(1 + threadIdx.y, threads);
    return warp_sum(lane < threads / 32 ? mine[lane] : 0.0f);
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

#endif

#ifdef BACKWARD

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

#endif

#ifdef SUM_PARTIALS

constexpr int AT_ONCE = 12;  // rows that a thread waits for together: with 16 runs a block of each multiprocessor's

// dg = sum of partial [num_partials, D] over its rows: blockDim.x = 32 columns, blockDim.y interleaved runs of rows.
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

#endif
