// A product's sums, as its threads hold them, to rows of a half-precision matrix in pieces of 16 bytes.
#pragma once
#include "device.cuh"

// Four lanes that share rows, l % 4 = 0 .. 3: each gives its word i to lane i, and has then word l % 4 of all four.
TESSERA_DEVICE Words trade(const uint32_t (&word)[4], int lane) {
    const bool odd = lane % 2 != 0, upper = lane / 2 % 2 != 0;
    uint32_t even_lanes[2], odd_lanes[2];  // words odd and 2 + odd of both lanes of this pair
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t theirs = shuffle_xor(odd ? word[2 * i] : word[2 * i + 1], 1);
        even_lanes[i] = odd ? theirs : word[2 * i];
        odd_lanes[i] = odd ? word[2 * i + 1] : theirs;
    }
    const uint32_t even = shuffle_xor(upper ? even_lanes[0] : even_lanes[1], 2);
    const uint32_t uneven = shuffle_xor(upper ? odd_lanes[0] : odd_lanes[1], 2);
    return {{upper ? even : even_lanes[0], upper ? uneven : odd_lanes[0], upper ? even_lanes[1] : even,
             upper ? odd_lanes[1] : uneven}};
}

// Sums of a warp's 16 rows, each row times its factor, two neighbours a word.
template <class T, int COUNT>
TESSERA_DEVICE void pack_rows(uint32_t (&pairs)[COUNT / 2], const float (&sums)[COUNT], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2)
        pairs[i / 2] = packed<T>(sums[i] * factor[i / 2 % 2], sums[i + 1] * factor[i / 2 % 2]);
}

// Write the first `rows` of a warp's 16 in pieces of 16 bytes; a width is a multiple of 16. `to` stands at the fragment's
// own corner. All lanes come.
template <class T, int COUNT>
TESSERA_DEVICE void store_rows(const uint32_t (&pairs)[COUNT], T* to, int64_t stride, int rows, int width, int lane) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 8) {
        const int column = 4 * i + 8 * (lane % 4);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            const uint32_t four[4] = {pairs[i + half], pairs[i + half + 2], pairs[i + half + 4], pairs[i + half + 6]};
            const Words piece = trade(four, lane);
            if (row < rows && column < width) store_16(to + row * stride + column, piece);
        }
    }
}
