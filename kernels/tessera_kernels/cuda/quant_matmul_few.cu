// Product with a weight kept in 8 or 4 bits, for up to 16 rows of x in bfloat16: y_XF = x_XD dequantize(q)_FD^T, for sm_90a.
//
//     y[r, f] = sum_g s[g, f] sum_{d in g} (q[f, d] - z[g, f]) x[r, d]            (words: `quant_words.cuh`)
//
//     16 warps        one product of 16 outputs each, in one of the DEPTH tiles of inputs that a stage has: W x^T with W from
//                     registers, sums in float32; DEPTH partial sums are added in shared memory, in one order
//     the last warp   copies words, x and steps, DEPTH tiles of 128 inputs a stage, into a ring of STAGES; it starts on the
//                     next outputs while the last ones are added
//
//     HBM        words and steps read once, x once for each BLOCK_F outputs (from L2); y written
//     shared     words [DEPTH, BLOCK_F, 128], x [DEPTH, BLOCK_X, 128] and steps, x STAGES; partial sums [DEPTH, BLOCK_X, BLOCK_F]
//     registers  y^T [16, BLOCK_X] of a warp, one tile's sums beside it
//
// Reading the weight takes all the time, so as much of it as fits is on its way at any time, 64 to 128 KB with 64 outputs.
// Scales of groups multiply float32 sums of one tile, codes less their zero points are exact. One launch, no partial sums in
// global memory; a row's answer does not depend on the others, nor on BLOCK_X.
// Reference: tessera_kernels.reference.quant_matmul.
//
// Defined by the host: BITS and GROUP (`quant_words.cuh`), BLOCK_X (8, 16), BLOCK_F (16, 32, 64), STAGES.
#include "quant_words.cuh"

constexpr int WARPS = 16, THREADS = 32 * (WARPS + 1);
constexpr int PRODUCTS = BLOCK_F / 16, DEPTH = WARPS / PRODUCTS;
constexpr int COLUMNS = BLOCK_X / 8;              // of a product: 8 rows of x each
constexpr int TILE_BYTES = BLOCK_F * ROW_BYTES;   // words of one tile
constexpr int PANEL_BYTES = BLOCK_X * 128;        // 64 inputs of x
constexpr int SPEAKING = 32 * WARPS;

// Everything in shared memory; the host asks for sizeof(Tiles).
struct Tiles {
    alignas(1024) unsigned char codes[STAGES][DEPTH * TILE_BYTES];
    alignas(1024) unsigned char x[STAGES][2 * DEPTH * PANEL_BYTES];
    alignas(16) int steps[STAGES][DEPTH][SETS][BLOCK_F];
    float parts[DEPTH][BLOCK_X][BLOCK_F];
    uint64_t full[STAGES], empty[STAGES];
};

struct Problem {
    const int* steps;  // [groups, outputs]; float32 where a whole row has one
    int rows, outputs, tiles, groups, blocks_x, count;
};

// All lanes: steps are many small copies, whose addresses one thread would make one after the other.
TESSERA_DEVICE void copy_all(Tiles& tiles, const Problem& p, const TensorMap* codes_map, const TensorMap* x_map) {
    const int lane = threadIdx.x % 32;
    Turn<STAGES> turn;
    for (int item = blockIdx.x; item < p.count; item += gridDim.x) {
        const int x = item % p.blocks_x * BLOCK_X, f = item / p.blocks_x * BLOCK_F;
        const int step_bytes = GROUP == 0 ? 0 : 4 * min(BLOCK_F, p.outputs - f);
        for (int tile = 0; tile < p.tiles; tile += DEPTH, turn.next()) {
            uint64_t* full = &tiles.full[turn.stage];
            if (lane == 0) {
                barrier_wait(&tiles.empty[turn.stage], turn.parity ^ 1);
                barrier_expect(full, DEPTH * (TILE_BYTES + 2 * PANEL_BYTES + SETS * step_bytes));
                load_box(tiles.codes[turn.stage], codes_map, full, 0, BITS == 8 ? f : f / 2, tile, 0);
                load_box(tiles.x[turn.stage], x_map, full, 0, x, 2 * tile, 0);
            }
            sync_warp();
            if (GROUP != 0 && lane < DEPTH * SETS) {
                const int64_t group = group_of(tile + lane / SETS, lane % SETS, p.groups);
                load_bulk(tiles.steps[turn.stage][lane / SETS][lane % SETS], p.steps + group * p.outputs + f, full, step_bytes);
            }
        }
    }
}

constexpr int SLICES = ROW_BYTES / 32;  // of 16 words in a tile's row

// Where this lane points ldmatrix at, in a tile's words and in a tile's x: all that depends on the lane, made once.
struct Places {
    uint32_t words[SLICES];
    uint32_t x[4];  // 16 inputs of a panel each; with 8 rows, lanes 16 to 31 point at the inputs of the pair's second fragment

    TESSERA_DEVICE Places(int depth, int output, int lane) {
        const uint32_t first = words_at(output, lane);
#pragma unroll
        for (int i = 0; i < SLICES; ++i) words[i] = depth * TILE_BYTES + (first ^ i * 32);
        const int row = lane % 8 + (COLUMNS == 2 ? lane / 16 * 8 : 0), piece = lane / 8 % 2;
        const bool is_second = COLUMNS == 1 && lane >= 16;
        const uint32_t begin = row * 128 + ((piece ^ row % 8) << 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int slice = BITS == 4 && is_second ? i + 2 : i;  // of 4 bits, a pair lies 32 inputs apart, of 8 bits 64
            x[i] = 2 * depth * PANEL_BYTES + (begin ^ slice % 4 * 32) + (BITS == 8 && is_second ? PANEL_BYTES : 0);
        }
        made_once(words);
        made_once(x);
    }
};

// x of two fragments' inputs as the right factors of products: to[fragment][2 column, 2 column + 1]. The pair's first slice of
// 16 inputs is `slice` of panel `panel`; its second is 64 inputs further with 8 bits, 32 with 4.
TESSERA_DEVICE void load_pair(uint32_t (&to)[2][4], uint32_t x, const Places& at, int panel, int slice) {
    if constexpr (COLUMNS == 2) {
        load_matrices(to[0], x + at.x[slice] + panel * PANEL_BYTES);
        load_matrices(to[1], BITS == 8 ? x + at.x[slice] + PANEL_BYTES : x + at.x[slice + 2] + panel * PANEL_BYTES);
    } else {
        uint32_t both[4];
        load_matrices(both, x + at.x[slice] + panel * PANEL_BYTES);
        to[0][0] = both[0];
        to[0][1] = both[1];
        to[1][0] = both[2];
        to[1][1] = both[3];
    }
}

using Sums = float[COLUMNS][4];

// sums += w x^T of one fragment.
TESSERA_DEVICE void multiply(Sums& sums, const Fragment& weights, const uint32_t (&x)[4]) {
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column)
        warp_product<bf16>(sums[column], weights, x[2 * column], x[2 * column + 1]);
}

// 16 outputs, one tile of 128 inputs; `parts` by half of the inputs where those have scales of their own.
TESSERA_DEVICE void multiply_tile(Sums (&parts)[SETS], uint32_t words, uint32_t x, const Places& at, const uint32_t (&above)[SETS][2]) {
    Fragment raw, weights[2];
    uint32_t right[2][4];
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
        load_matrices(raw, words + at.words[slice]);
        if constexpr (BITS == 8) {
            unpack_bytes(weights[0], weights[1], raw);
            load_pair(right, x, at, 0, slice);
            multiply(parts[0], weights[0], right[0]);
            multiply(parts[SETS - 1], weights[1], right[1]);
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int set = half * (SETS - 1);
                load_pair(right, x, at, half, slice);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    unpack_nibbles(weights[i], raw, above[set], 2 * half + i);
                    multiply(parts[set], weights[i], right[i]);
                }
            }
        }
    }
}

// As above, with the scales: what one tile adds to the sums.
TESSERA_DEVICE void add_tile(Sums& sums, const int (&steps)[SETS][BLOCK_F], uint32_t words, uint32_t x, const Places& at, int output) {
    Sums parts[SETS] = {};
    float scale[SETS][2];
    uint32_t above[SETS][2] = {};
#pragma unroll
    for (int i = 0; i < 2 * SETS; ++i) {
        const uint32_t step = steps[i / 2][output + 8 * (i % 2)];
        scale[i / 2][i % 2] = scale_in(step) * (BITS == 8 ? SHRUNK : 1.0f);
        if constexpr (BITS == 4) above[i / 2][i % 2] = above_in(step);
    }
    multiply_tile(parts, words, x, at, above);
#pragma unroll
    for (int i = 0; i < 4 * COLUMNS * SETS; ++i) {
        const int set = i / 4 / COLUMNS, column = i / 4 % COLUMNS;
        sums[column][i % 4] += parts[set][column][i % 4] * scale[set][i % 4 / 2];
    }
}

// y of BLOCK_F outputs: the warps' partial sums, first tile of a stage to last; two outputs a thread.
TESSERA_DEVICE void write(const Tiles& tiles, const Problem& p, bf16* y, int x, int f) {
    for (int pair = threadIdx.x; pair < BLOCK_X * BLOCK_F / 2; pair += SPEAKING) {
        const int row = pair / (BLOCK_F / 2), output = pair % (BLOCK_F / 2) * 2;
        if (x + row >= p.rows || f + output >= p.outputs) continue;
        float total[2] = {0.0f, 0.0f};
#pragma unroll
        for (int depth = 0; depth < DEPTH; ++depth)
#pragma unroll
            for (int i = 0; i < 2; ++i) total[i] += tiles.parts[depth][row][output + i];
        if constexpr (GROUP == 0) {
            const float* scales = reinterpret_cast<const float*>(p.steps) + f + output;
            total[0] *= scales[0] * SHRUNK;
            total[1] *= scales[1] * SHRUNK;
        }
        *reinterpret_cast<uint32_t*>(y + static_cast<int64_t>(x + row) * p.outputs + f + output) = packed<bf16>(total[0], total[1]);
    }
}

TESSERA_DEVICE void multiply_all(Tiles& tiles, const Problem& p, bf16* y) {
    const int warp = same_in_warp(static_cast<int>(threadIdx.x) / 32), lane = threadIdx.x % 32;
    const int depth = warp / PRODUCTS, output = warp % PRODUCTS * 16;
    const Places at(depth, output, lane);
    Turn<STAGES> turn;
    for (int item = blockIdx.x; item < p.count; item += gridDim.x) {
        Sums sums = {};
        for (int tile = 0; tile < p.tiles; tile += DEPTH, turn.next()) {
            const uint32_t words = shared_address(tiles.codes[turn.stage]), x = shared_address(tiles.x[turn.stage]);
            barrier_wait(&tiles.full[turn.stage], turn.parity);
            if (tile + depth < p.tiles) {
                if constexpr (GROUP == 0) {
                    const uint32_t none[SETS][2] = {};
                    multiply_tile(reinterpret_cast<Sums(&)[SETS]>(sums), words, x, at, none);
                } else {
                    add_tile(sums, tiles.steps[turn.stage][depth], words, x, at, output + lane / 4);
                }
            }
            sync_warp();
            if (lane == 0) barrier_arrive(&tiles.empty[turn.stage]);
        }
#pragma unroll
        for (int i = 0; i < 4 * COLUMNS; ++i)
            tiles.parts[depth][i / 4 * 8 + lane % 4 * 2 + i % 2][output + lane / 4 + i % 4 / 2 * 8] = sums[i / 4][i % 4];
        sync_some(1, SPEAKING);
        write(tiles, p, y, item % p.blocks_x * BLOCK_X, item / p.blocks_x * BLOCK_F);
        sync_some(1, SPEAKING);  // the sums have been read
    }
}

TESSERA_KERNEL(THREADS) quant_matmul_few(
    const TESSERA_GRID_CONSTANT TensorMap codes_map, const TESSERA_GRID_CONSTANT TensorMap x_map, const int* steps, bf16* y,
    int rows, int outputs, int tiles_of_inputs, int groups, int blocks_x, int count) {
    TESSERA_SHARED(memory);
    Tiles& tiles = *reinterpret_cast<Tiles*>(memory);
    const Problem p = {steps, rows, outputs, tiles_of_inputs, groups, blocks_x, count};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&tiles.full[stage], 1);
            barrier_init(&tiles.empty[stage], WARPS);
        }
        barrier_init_done();
        prefetch_map(&codes_map);
        prefetch_map(&x_map);
    }
    sync_threads();
    if (threadIdx.x >= SPEAKING) copy_all(tiles, p, &codes_map, &x_map);
    if (threadIdx.x < SPEAKING) multiply_all(tiles, p, y);
}
TESSERA_ENTRY(quant_matmul_few)
