// Product with a weight kept in 8 or 4 bits, for many rows of x in bfloat16: y_XF = x_XD dequantize(q)_FD^T, for sm_90a.
//
//     y[r, f] = sum_d s[g(d), f] (q[f, d] - z[g(d), f]) x[r, d]      (layout of the words: tessera_kernels.quant_weight)
//
//     warpgroup 0, one thread   copies words of the weight and rows of x, 128 inputs a stage, into a ring of STAGES
//     warpgroups 1 and 2        128 outputs each, as two products of 64: W x^T with W from registers. While the products of
//                               32 inputs run, the words of the next 32 are unpacked into the other set of fragments
//
//     HBM        words, steps and x read; y written
//     shared     words of [BLOCK_F, 128] and x [BLOCK_X, 128], x STAGES, 128-byte swizzle
//     registers  y^T [128, BLOCK_X] of a warpgroup in float32, two sets of fragments [128, 32], steps of one tile
//
// Scales of groups multiply the weights, rounded once as a dequantized weight is; scales of whole rows multiply the sums.
// The blocks of a cluster divide the inputs of a tile; at its end each sends the others their shares of its sums, over the
// ring, adds what came in the order of the inputs, and writes its own.
// A cluster takes every so many-th tile; rows of x go fastest, so that a weight is read from HBM once.
// Reference: tessera_kernels.reference.quant_matmul.
//
// Defined by the host: BITS and GROUP (`quant_words.cuh`), BLOCK_X (64, 128), STAGES, SPLITS (blocks of a cluster).
#include "quant_words.cuh"

constexpr int CONSUMERS = 2, THREADS = 128 * (CONSUMERS + 1);
constexpr int BLOCK_F = 128 * CONSUMERS;
constexpr int CODES_BYTES = BLOCK_F * ROW_BYTES;
constexpr int PANEL_BYTES = BLOCK_X * 128;  // 64 inputs of x
constexpr int REGISTERS = 240, SPARED = 24;
constexpr int SHARE = (BLOCK_X / 4 + SPLITS - 1) / SPLITS * 4;  // sums of a thread that a block of the cluster writes
constexpr int share_of(int rank) { return BLOCK_X - rank * SHARE < SHARE ? BLOCK_X - rank * SHARE : SHARE; }  // the last: the rest

struct alignas(16) Four { float sum[4]; };

// Everything in shared memory; the host asks for sizeof(Tiles).
struct Tiles {
    alignas(1024) unsigned char codes[STAGES][CODES_BYTES];
    alignas(1024) unsigned char x[STAGES][2 * PANEL_BYTES];
    uint64_t full[STAGES], empty[STAGES];

    // Sums k to k + 3 that block `from` sends to block `to`, of one thread.
    TESSERA_DEVICE Four* sent(int from, int to, int k) {
        const int slot = from < to ? from : from - 1;
        return reinterpret_cast<Four*>(codes[0]) + (slot * SHARE / 4 + k / 4) * 128 * CONSUMERS + threadIdx.x - 128;
    }
};
static_assert(SPLITS == 1 || STAGES * (CODES_BYTES + 2 * PANEL_BYTES) >= (SPLITS - 1) * SHARE * 4 * 128 * CONSUMERS,
              "what the others send fits into the ring");

struct Problem {
    const int* steps;  // [groups, outputs]; float32 where a whole row has one
    int rows, outputs, tiles, groups;
    int blocks_x, blocks_f, tiles_per_split;
};

struct Work {
    int x, f, first, last;  // first row and output; tiles [first, last) of the inputs, none behind the last split
};

TESSERA_DEVICE int count_of(const Problem& p) { return p.blocks_x * p.blocks_f; }
TESSERA_DEVICE int first_item() { return blockIdx.x / SPLITS; }
TESSERA_DEVICE int item_after(int item) { return item + gridDim.x / SPLITS; }
TESSERA_DEVICE int own_split() { return SPLITS == 1 ? 0 : rank_in_cluster(); }

TESSERA_DEVICE Work work_of(const Problem& p, int item) {
    Work w;
    w.x = item % p.blocks_x * BLOCK_X;
    w.f = item / p.blocks_x * BLOCK_F;
    w.first = own_split() * p.tiles_per_split;
    w.last = min(w.first + p.tiles_per_split, p.tiles);
    return w;
}

// The ring belongs to the copy engine again; nothing to do after the last tile.
TESSERA_DEVICE void give_back_ring(const Problem& p, int item) {
    if (SPLITS == 1 || item_after(item) >= count_of(p)) return;
    fence_for_engine();
    sync_cluster();
}

TESSERA_DEVICE void copy_all(Tiles& tiles, const Problem& p, const TensorMap* codes_map, const TensorMap* x_map) {
    Turn<STAGES> turn;
    for (int item = first_item(); item < count_of(p); item = item_after(item)) {
        const Work w = work_of(p, item);
        for (int tile = w.first; tile < w.last && threadIdx.x == 0; ++tile, turn.next()) {
            uint64_t* full = &tiles.full[turn.stage];
            barrier_wait(&tiles.empty[turn.stage], turn.parity ^ 1);
            barrier_expect(full, CODES_BYTES + 2 * PANEL_BYTES);
            load_box(tiles.codes[turn.stage], codes_map, full, 0, BITS == 8 ? w.f : w.f / 2, tile, 0);
            for (int panel = 0; panel < 2; ++panel)
                load_box(tiles.x[turn.stage] + panel * PANEL_BYTES, x_map, full, tile * INPUTS + panel * HALF, w.x, 0, 0);
        }
        if constexpr (SPLITS > 1) {  // the exchange of sums
            sync_cluster();
            sync_cluster();
        }
        give_back_ring(p, item);
    }
}

// What a thread multiplies and subtracts in one tile, of its two rows of both products: a number twice in one register.
struct Steps {
    uint32_t scale[2][SETS][2], above[2][SETS][2];  // product, half of the inputs, row or row + 8

    TESSERA_DEVICE void take(const int (&words)[2][SETS][2]) {
#pragma unroll
        for (int i = 0; i < 4 * SETS; ++i) {
            const int product = i / 2 / SETS, half = i / 2 % SETS;
            const uint32_t word = words[product][half][i % 2];
            const float one = scale_in(word) * (BITS == 8 ? SHRUNK : 1.0f);
            scale[product][half][i % 2] = packed<bf16>(one, one);
            if constexpr (BITS == 4) above[product][half][i % 2] = above_in(word);
        }
    }

    TESSERA_DEVICE void multiply(Fragment& weights, int product, int half) const {
        if constexpr (GROUP != 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) weights[i] = multiply_pairs(weights[i], scale[product][half * (SETS - 1)][i % 2]);
        }
    }
};

// The steps of a tile, on their way from global memory while the tile before is multiplied.
TESSERA_DEVICE void fetch(int (&words)[2][SETS][2], const Problem& p, int tile, int f) {
#pragma unroll
    for (int i = 0; i < 4 * SETS; ++i) {
        const int product = i / 2 / SETS, half = i / 2 % SETS, row = min(f + 64 * product + 8 * (i % 2), p.outputs - 1);
        words[product][half][i % 2] = p.steps[static_cast<int64_t>(group_of(tile, half, p.groups)) * p.outputs + row];
    }
}

// Where the first of a fragment's 16 inputs stands in a stage of x.
TESSERA_DEVICE uint32_t place_of(int inputs) { return inputs / HALF * PANEL_BYTES + inputs % HALF * 2; }

// A quarter of a tile: two fragments of both products, unpacked and sent.
struct Quarter {
    uint32_t words;  // address of this lane's row of words for ldmatrix, in the stage's swizzled order

    // `raw` holds words of 4 bits from an even quarter to the next.
    TESSERA_DEVICE void unpack(Fragment (&to)[4], Fragment (&raw)[2], const Steps& steps, int quarter) const {
#pragma unroll
        for (int product = 0; product < 2; ++product) {
            if constexpr (BITS == 8) {
                load_matrices(raw[product], (words ^ quarter * 32) + product * 64 * ROW_BYTES);
                unpack_bytes(to[2 * product], to[2 * product + 1], raw[product]);
                steps.multiply(to[2 * product], product, 0);
                steps.multiply(to[2 * product + 1], product, 1);
            } else {
                if (quarter % 2 == 0)
                    load_matrices(raw[product], (words ^ quarter / 2 * 32) + product * 64 * ROW_BYTES);
                const int half = quarter % 2;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    unpack_nibbles(to[2 * product + i], raw[product], steps.above[product][half * (SETS - 1)], half * 2 + i);
                    steps.multiply(to[2 * product + i], product, half);
                }
            }
        }
    }

    // First input of each of the two fragments.
    static TESSERA_DEVICE int inputs_of(int quarter, int fragment) {
        return BITS == 8 ? quarter * 16 + fragment * HALF : (quarter % 2 * 2 + fragment) * 32 + quarter / 2 * 16;
    }

    static TESSERA_DEVICE void send(float (&sums)[2][BLOCK_X / 2], const Fragment (&from)[4], uint64_t x_tile, int quarter) {
        group_fence();
#pragma unroll
        for (int fragment = 0; fragment < 2; ++fragment)
#pragma unroll
            for (int product = 0; product < 2; ++product)
                group_product_along<bf16, BLOCK_X>(
                    sums[product], from[2 * product + fragment], further(x_tile, place_of(inputs_of(quarter, fragment))), 1);
        group_commit();
    }
};

using Sums = float[2][BLOCK_X / 2];

// The share of sums that begins at `first`, of a warp's 16 outputs of each product; f: the first product's.
template <int COUNT>
TESSERA_DEVICE void write(const float (&sums)[COUNT], int first, bf16* y, const Problem& p, const Work& w, int f, int lane) {
#pragma unroll
    for (int pair = 0; pair < COUNT / 2; ++pair) {
        const int product = (first / 2 + pair) / (BLOCK_X / 4), i = (first / 2 + pair) % (BLOCK_X / 4);
        const int from = f + 64 * product;
        float scale = 1.0f;
        if constexpr (GROUP == 0)
            scale = reinterpret_cast<const float*>(p.steps)[min(from + lane / 4 + i % 2 * 8, p.outputs - 1)] * SHRUNK;
        // outputs side by side in memory: a block of 8 x 8 is turned
        const uint32_t turned = transposed(packed<bf16>(sums[2 * pair] * scale, sums[2 * pair + 1] * scale));
        const int row = w.x + i / 2 * 8 + lane / 4, output = from + i % 2 * 8 + lane % 4 * 2;
        if (row < p.rows && output < p.outputs)
            *reinterpret_cast<uint32_t*>(y + static_cast<int64_t>(row) * p.outputs + output) = turned;
    }
}

// The shares of the other blocks leave.
TESSERA_DEVICE void send(Tiles& tiles, const Sums& sums) {
#pragma unroll
    for (int to = 0; to < SPLITS; ++to) {
        if (to == own_split()) continue;
#pragma unroll
        for (int k = 0; k < share_of(to); k += 4) {
            const float* from = &sums[(to * SHARE + k) / (BLOCK_X / 2)][(to * SHARE + k) % (BLOCK_X / 2)];
            const Four four = {{from[0], from[1], from[2], from[3]}};
            store_16_at(to, tiles.sent(own_split(), to, k), reinterpret_cast<const Words&>(four));
        }
    }
}

// The share of block OWN from all blocks, in the order of the inputs.
template <int OWN> TESSERA_DEVICE void receive(float (&total)[share_of(OWN)], Tiles& tiles, const Sums& sums) {
#pragma unroll
    for (int k = 0; k < share_of(OWN); k += 4)
#pragma unroll
        for (int from = 0; from < SPLITS; ++from) {
            Four four;
            if (from != OWN) four = *tiles.sent(from, OWN, k);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int place = OWN * SHARE + k + i;
                const float one = from == OWN ? sums[place / (BLOCK_X / 2)][place % (BLOCK_X / 2)] : four.sum[i];
                total[k + i] = from == 0 ? one : total[k + i] + one;
            }
        }
}

template <int OWN>
TESSERA_DEVICE void finish(Tiles& tiles, const Sums& sums, bf16* y, const Problem& p, const Work& w, int f, int lane) {
    if (OWN == own_split()) {
        float total[share_of(OWN)];
        receive<OWN>(total, tiles, sums);
        write(total, OWN * SHARE, y, p, w, f, lane);
    }
    if constexpr (OWN + 1 < SPLITS) finish<OWN + 1>(tiles, sums, y, p, w, f, lane);
}

TESSERA_DEVICE void multiply_all(Tiles& tiles, const Problem& p, bf16* y) {
    const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32) - 4, lane = threadIdx.x % 32;
    const int inside = warp / 4 * 128 + warp % 4 * 16;  // first output of this warp in a tile; the second product's: + 64
    const bool speaks = lane == 0;
    const uint32_t own_words = words_at(inside, lane);
    Turn<STAGES> turn;
    for (int item = first_item(); item < count_of(p); item = item_after(item)) {
        const Work w = work_of(p, item);
        Sums sums;
        Fragment fragments[2][4], raw[2];
        Steps steps;
        int next[2][SETS][2];
#pragma unroll
        for (int i = 0; i < BLOCK_X; ++i) sums[i / (BLOCK_X / 2)][i % (BLOCK_X / 2)] = 0.0f;
        if constexpr (GROUP != 0) fetch(next, p, w.first, w.f + inside + lane / 4);
        for (int tile = w.first; tile < w.last; ++tile) {
            const Quarter quarters = {shared_address(tiles.codes[turn.stage]) + own_words};
            const uint64_t x_tile = tile_descriptor(shared_address(tiles.x[turn.stage]), 0);
            if constexpr (GROUP != 0) {
                steps.take(next);
                fetch(next, p, tile + 1, w.f + inside + lane / 4);
            }
            barrier_wait(&tiles.full[turn.stage], turn.parity);
#pragma unroll
            for (int quarter = 0; quarter < 4; ++quarter) {
                quarters.unpack(fragments[quarter % 2], raw, steps, quarter);
                Quarter::send(sums, fragments[quarter % 2], x_tile, quarter);
                group_wait<1>();
                settled(fragments[(quarter + 1) % 2]);
                if (quarter == 0 && tile > w.first && speaks) barrier_arrive(&tiles.empty[turn.before()]);
            }
            turn.next();
        }
        group_wait<0>();
        settled(fragments[1]);
        settled(sums[0]);
        settled(sums[1]);
        if (w.first < w.last && speaks) barrier_arrive(&tiles.empty[turn.before()]);
        if constexpr (SPLITS > 1) {
            sync_cluster();  // no copy and no product uses a ring
            send(tiles, sums);
            sync_cluster();
        }
        finish<0>(tiles, sums, y, p, w, w.f + inside, lane);
        give_back_ring(p, item);
    }
}

TESSERA_CLUSTER_KERNEL(SPLITS, THREADS) quant_matmul(
    const TESSERA_GRID_CONSTANT TensorMap codes_map, const TESSERA_GRID_CONSTANT TensorMap x_map, const int* steps, bf16* y,
    int rows, int outputs, int tiles_of_inputs, int groups, int blocks_x, int blocks_f, int tiles_per_split) {
    TESSERA_SHARED(memory);
    Tiles& tiles = *reinterpret_cast<Tiles*>(memory);
    const Problem p = {steps, rows, outputs, tiles_of_inputs, groups, blocks_x, blocks_f, tiles_per_split};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&tiles.full[stage], 1);
            barrier_init(&tiles.empty[stage], 4 * CONSUMERS);
        }
        barrier_init_done();
        prefetch_map(&codes_map);
        prefetch_map(&x_map);
    }
    sync_threads();
    if (threadIdx.x < 128) {
        fewer_registers<SPARED>();
        copy_all(tiles, p, &codes_map, &x_map);
    } else {
        more_registers<REGISTERS>();
        multiply_all(tiles, p, y);
    }
}
TESSERA_ENTRY(quant_matmul)
