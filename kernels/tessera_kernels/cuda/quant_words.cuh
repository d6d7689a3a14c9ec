// Words of a packed weight (tessera_kernels.quant_weight), from shared memory to a product's left factor in registers.
//
// A word has a bfloat16's width and stands where its first input does, so ldmatrix hands each lane the words of the numbers
// that a fragment of 16 outputs by 16 inputs wants from it: one word of 8 bits gives inputs j and 64 + j, one of 4 bits
// inputs j, 32 + j, 64 + j and 96 + j. Nothing moves between lanes.
//
// Defined by the host: BITS (8, 4), GROUP (inputs that share a scale, a multiple of 64; 0 = a whole row).
#pragma once
#include "device.cuh"

constexpr int INPUTS = 128;                        // a tile of the packed layout
constexpr int HALF = INPUTS / 2;                   // what one group's steps serve at least
constexpr int SETS = GROUP % INPUTS == 0 ? 1 : 2;  // steps of one output in one tile
constexpr int ROW_BYTES = INPUTS * BITS / 8;       // of one output's words: a swizzled row, or half of one
constexpr float SHRUNK = 64.0f;                    // codes of 8 bits come out divided by so much

using Fragment = uint32_t[4];  // lane l: outputs l / 4 and + 8, in [i % 2]; 16 inputs

// Where lane l points ldmatrix at for the first 16 words of 16 outputs, `output` the first: row l % 16, words 8 (l / 16) on.
// A later slice of 16 words lies at that address ^ 32 slice, 16 outputs further at + 16 ROW_BYTES.
TESSERA_DEVICE uint32_t words_at(int output, int lane) {
    const int begin = (output + lane % 16) * ROW_BYTES, row = begin / 128, piece = begin % 128 / 16 + lane / 16;
    return row * 128 + ((piece ^ row % 8) << 4);
}

// The group of a tile's inputs; that of the padding behind a weight's last input is the last.
TESSERA_DEVICE int group_of(int tile, int half, int groups) {
    return min((tile * INPUTS + half * HALF) / (GROUP == 0 ? INPUTS : GROUP), groups - 1);
}

// Codes / `SHRUNK`: sign and magnitude stand in a bfloat16's sign and fraction, q 2^-133, and 2^127 is one factor.
TESSERA_DEVICE void unpack_bytes(Fragment& low, Fragment& high, const Fragment& words) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        low[i] = multiply_pairs(words[i] & 0x807f807fu, 0x7f007f00u);
        high[i] = multiply_pairs(swapped_bytes(words[i]) & 0x807f807fu, 0x7f007f00u);
    }
}

// Codes less their zero points: 128 + q is a bfloat16 with q in its fraction; `above` holds 128 + z twice, by row.
TESSERA_DEVICE void unpack_nibbles(Fragment& to, const Fragment& words, const uint32_t (&above)[2], int quarter) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        to[i] = subtract_pairs(masked_or(words[i] >> 4 * quarter, 0x000f000fu, 0x43004300u), above[i % 2]);
}

// A step's word: a bfloat16 scale above, the zero point below.
TESSERA_DEVICE float scale_in(uint32_t step) { return to_float(bf16{static_cast<uint16_t>(step >> 16)}); }
TESSERA_DEVICE uint32_t above_in(uint32_t step) { return (step & 0xffffu) | step << 16 | 0x43004300u; }
