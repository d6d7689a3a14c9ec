// Rows of a norm, as both directions hold them: pieces of 16 bytes in the threads' registers, and their sums.
//
// blockDim.x threads hold a row, blockDim.y rows are in a block. Piece i of a span belongs to thread i % blockDim.x; a span
// is HELD pieces a thread. Where rows do not begin and end at multiples of 16 bytes (ALIGNED = 0) they pass through shared
// memory, number by number; sums run in the same order. Sums are deterministic; a row's does not depend on the other rows.
//
// Compiled with NUMBER as bf16, f16 or float, and HELD, ALIGNED and WIDE (rows may have several spans; always so without
// ALIGNED) as numbers.
#pragma once
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
