// A large product of two matrices in shared memory: one thread copies, two warpgroups multiply [64, COLUMNS] each.
//
// A stage holds 64 terms of the sums: the left factor's 128 rows, of which each warpgroup has its 64, and the right factor's
// COLUMNS. The warpgroups share stages and nothing else, so one may be up to STAGES - 1 ahead: the second starts LAG stages
// behind the first, and what one does with its finished sums runs beside the other's products.
//
// Numbers have 2 bytes; those of 8 bits come in pairs, whose products are two terms.
// Factors "along" lie with their terms in a row (K-major), factors "across" with their terms in a column (MN-major).
#pragma once
#include "device.cuh"

constexpr int CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1);
constexpr int TERMS = 64;  // of a stage
constexpr int ROWS = 64 * CONSUMERS, COLUMNS = 256;
constexpr int LEFT_BYTES = ROWS * TERMS * 2, RIGHT_BYTES = COLUMNS * TERMS * 2;
constexpr int PANEL_BYTES = 64 * 128;  // 64 terms of 64 rows, either way
constexpr int REGISTERS = 240, SPARED = 24;
constexpr int LAG = 2;

// Everything in shared memory; the host asks for sizeof(Ring).
struct Ring {
    alignas(1024) unsigned char left[STAGES][LEFT_BYTES];
    alignas(1024) unsigned char right[STAGES][RIGHT_BYTES];
    uint64_t full[STAGES], empty[STAGES];

    TESSERA_DEVICE void begin() {  // one thread; all wait behind it
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&full[stage], 1);
            barrier_init(&empty[stage], 4 * CONSUMERS);
        }
        barrier_init_done();
    }
};

using Sums = float[COLUMNS / 2];

// The next stage, when both warpgroups have left it; its barrier counts the bytes of both factors.
TESSERA_DEVICE uint64_t* open_stage(Ring& ring, const Turn<STAGES>& turn) {
    barrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);
    barrier_expect(&ring.full[turn.stage], LEFT_BYTES + RIGHT_BYTES);
    return &ring.full[turn.stage];
}

// The second warpgroup's late start; `steps`: stages of the block's first product.
TESSERA_DEVICE void fall_behind(Ring& ring, int group, int steps) {
    if (group == 1 && steps > LAG) barrier_wait(&ring.full[LAG], 0);
}

// sums = left right over `steps` stages, for warpgroup `group`; afterwards its stages are free and its sums are there.
template <class T, bool ACROSS>
TESSERA_DEVICE void multiply(Sums& sums, Ring& ring, Turn<STAGES>& turn, int steps, int group) {
    const bool speaks = threadIdx.x % 32 == 0;
    for (int step = 0; step < steps; ++step, turn.next()) {
        const uint64_t left = tile_descriptor(shared_address(ring.left[turn.stage]) + group * PANEL_BYTES, PANEL_BYTES);
        const uint64_t right = tile_descriptor(shared_address(ring.right[turn.stage]), PANEL_BYTES);
        barrier_wait(&ring.full[turn.stage], turn.parity);
        group_fence();
#pragma unroll
        for (int slice = 0; slice < TERMS / 16; ++slice) {
            const uint32_t further_on = slice * (ACROSS ? 16 * 128 : 32);
            if constexpr (ACROSS)
                group_product_flipped<T, COLUMNS>(sums, further(left, further_on), further(right, further_on), step + slice > 0);
            else
                group_product<T, COLUMNS>(sums, further(left, further_on), further(right, further_on), step + slice > 0);
        }
        group_commit();
        group_wait<1>();
        if (step > 0 && speaks) barrier_arrive(&ring.empty[turn.before()]);
    }
    group_wait<0>();
    settled(sums);
    if (speaks) barrier_arrive(&ring.empty[turn.before()]);
}
