// A large product of two matrices in shared memory: one thread copies, two warpgroups multiply [64, COLUMNS] each.
//
// A stage holds 64 terms of the sums: the left factor's 128 rows, of which each warpgroup has its 64, and the right factor's
// COLUMNS. The warpgroups share stages and nothing else, so one may be up to STAGES - 1 ahead: the second starts LAG stages
// behind the first, and what one does with its finished sums runs beside the other's products.
//
// The blocks of a cluster have the same columns and rows below one another: each copies its part of the right factor for all,
// which takes a third less from L2. A stage is free when all blocks have left it.
//
// Numbers have 2 bytes; those of 8 bits come in pairs, whose products are two terms. Both factors lie with their terms in a row.
//
// Defined by the host: STAGES, PAIR (blocks of a cluster: 1, 2).
#pragma once
#include "device.cuh"

constexpr int CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1);
constexpr int TERMS = 64;  // of a stage
constexpr int ROWS = 64 * CONSUMERS, COLUMNS = 256;
constexpr int LEFT_BYTES = ROWS * TERMS * 2, RIGHT_BYTES = COLUMNS * TERMS * 2;
constexpr int REGISTERS = 232, SPARED = 40;
constexpr int LAG = 2;

// Everything in shared memory; the host asks for sizeof(Ring).
struct Ring {
    alignas(1024) unsigned char left[STAGES][LEFT_BYTES];
    alignas(1024) unsigned char right[STAGES][RIGHT_BYTES];
    uint64_t full[STAGES], empty[STAGES];

    TESSERA_DEVICE void begin() {  // one thread; all wait behind it
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&full[stage], 1);
            barrier_init(&empty[stage], 4 * CONSUMERS * PAIR);
        }
        barrier_init_done();
    }
};

using Sums = float[COLUMNS / 2];

// ---- blocks of a cluster ----------------------------------------------------------------------------------------

TESSERA_DEVICE int own_rank() { return PAIR == 1 ? 0 : rank_in_cluster(); }
// Tiles of 128 x PAIR rows are dealt out to clusters.
TESSERA_DEVICE int first_item() { return blockIdx.x / PAIR; }
TESSERA_DEVICE int item_after(int item) { return item + gridDim.x / PAIR; }

TESSERA_DEVICE void all_begin() {  // barriers are there, in all blocks
    if constexpr (PAIR == 1)
        sync_threads();
    else
        sync_cluster();
}
TESSERA_DEVICE void all_end() {  // nobody ends while another still writes into its ring
    if constexpr (PAIR > 1) sync_cluster();
}

// ---- the copying thread -----------------------------------------------------------------------------------------

// The next stage, when all warpgroups have left it; its barrier counts the bytes of both factors.
TESSERA_DEVICE uint64_t* open_stage(Ring& ring, const Turn<STAGES>& turn) {
    barrier_wait(&ring.empty[turn.stage], turn.parity ^ 1);
    barrier_expect(&ring.full[turn.stage], LEFT_BYTES + RIGHT_BYTES);
    return &ring.full[turn.stage];
}

TESSERA_DEVICE void load_factors(
    Ring& ring, const Turn<STAGES>& turn, const TensorMap* left, int row, const TensorMap* right, int column, int term) {
    uint64_t* full = open_stage(ring, turn);
    load_box(ring.left[turn.stage], left, full, term, row, 0, 0);
    if constexpr (PAIR == 1) {
        load_box(ring.right[turn.stage], right, full, term, column, 0, 0);
    } else {
        const int part = own_rank() * (COLUMNS / PAIR);
        load_box_for((1 << PAIR) - 1, ring.right[turn.stage] + part * TERMS * 2, right, full, term, column + part, 0, 0);
    }
}

// ---- the warpgroups ---------------------------------------------------------------------------------------------

// The second warpgroup's late start; `steps`: stages of the block's first product.
TESSERA_DEVICE void fall_behind(Ring& ring, int group, int steps) {
    if (group == 1 && steps > LAG) barrier_wait(&ring.full[LAG], 0);
}

// A warp has left a stage, into which all blocks of the cluster write.
TESSERA_DEVICE void leave_stage(Ring& ring, int stage) {
    const int lane = threadIdx.x % 32;
    if constexpr (PAIR == 1) {
        if (lane == 0) barrier_arrive(&ring.empty[stage]);
    } else {
        if (lane < PAIR) barrier_arrive_at(&ring.empty[stage], lane);
    }
}

// sums = left right over `steps` stages, for warpgroup `group`; afterwards its stages are free and its sums are there.
template <class T> TESSERA_DEVICE void multiply(Sums& sums, Ring& ring, Turn<STAGES>& turn, int steps, int group) {
    for (int step = 0; step < steps; ++step, turn.next()) {
        const uint64_t left = tile_descriptor(shared_address(ring.left[turn.stage]) + group * LEFT_BYTES / CONSUMERS, 0);
        const uint64_t right = tile_descriptor(shared_address(ring.right[turn.stage]), 0);
        barrier_wait(&ring.full[turn.stage], turn.parity);
        group_fence();
#pragma unroll
        for (int slice = 0; slice < TERMS / 16; ++slice)
            group_product<T, COLUMNS>(sums, further(left, slice * 32), further(right, slice * 32), step + slice > 0);
        group_commit();
        group_wait<1>();
        if (step > 0) leave_stage(ring, turn.before());
    }
    group_wait<0>();
    settled(sums);
    leave_stage(ring, turn.before());
}
