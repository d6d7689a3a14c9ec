// Attention backward with the copy engine and warpgroup products (Shah et al. 2024, arXiv 2407.08608, section 3.3), sm_90a.
//
//     P = 2^((S - top) u log2 e - spread),  delta = sum_h dO O - dlse          S = Q K^T, top and spread from the forward
//     dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dK = scale dS^T Q,  dQ = scale dS K
//
//     a tile is 128 keys of one key/value head; queries of all heads that share it stream by, 64 at a time. A block stays
//     on its multiprocessor and takes a tile of every wave (`turning`: as in the forward), so that the copies of the next
//     run under the writing of the one before
//     warpgroup 0, one thread    copies K and V of a tile, then Q, dO and the rows' numbers into rings of STAGES
//     warpgroups 1 and 2         64 keys each, everything as [key, query]: P^T and dS^T are left factors in registers;
//                                for dQ both halves of dS^T meet in shared memory, and each makes 64 of its 128 columns
//
//     HBM        inputs read, dK and dV written once; dQ added up in float32, tile by tile, by the copy engine
//     shared     K, V [128, 128]; Q, dO [64, 128] x STAGES; dS^T [128, 64] x 2; dQ [64, 128] float32 on its way out
//     registers  dK, dV [64, 128], S^T, dP^T [64, 64], dQ [64, 64], all float32
//
// dQ lies in HBM as the threads hold it (`finish_queries` puts it in order): its sums run in no fixed order. Dense
// sequences, head widths above 64 and up to 128, no soft cap. Reference: autograd through
// tessera_kernels.reference.flash_attention. Defined by the host: TYPE (bf16, f16), STAGES, and OVERLAP: what runs beside
// products, 1 = dS is made while dV's does, 2 = dQ is sent while dK's does. Both together do not fit into registers.
#include "attention.cuh"

static_assert(STAGES > 1, "a tile's dS is written while the one before is read");
constexpr int PADDED = 128, KEYS = 128, QUERIES = 64;
constexpr int ROW_FLOATS = 3 * QUERIES;        // top, spread and delta of a tile of queries
constexpr int HALF_FLOATS = QUERIES * PADDED / 2;  // of dQ, one warpgroup's columns

struct Tiles {
    alignas(1024) unsigned char k[KEYS * PADDED * 2];
    alignas(1024) unsigned char v[KEYS * PADDED * 2];
    alignas(1024) unsigned char q[STAGES][QUERIES * PADDED * 2];
    alignas(1024) unsigned char dout[STAGES][QUERIES * PADDED * 2];
    alignas(1024) unsigned char dscores[STAGES][KEYS * QUERIES * 2];
    alignas(128) float dq[2][HALF_FLOATS];
    alignas(128) float rows[STAGES][ROW_FLOATS];
    uint64_t kv_full, kv_empty, q_full[STAGES], q_empty[STAGES], dout_full[STAGES], dout_empty[STAGES];
};

struct Range {  // tiles of queries [low, high) see some of the tile's keys; [whole_low, whole_high] see all of them
    int sequence, kv_head, column, past;
    int low, whole_low, whole_high, high;
};

TESSERA_DEVICE Range range_of(const Problem& p, int tile, int blocks) {
    Range r;
    const int kv_heads = p.heads / p.group, lanes = p.sequences * kv_heads;
    const int section = tile / (p.section * blocks);
    const int inside = tile - section * p.section * blocks;
    const int size = smaller(p.section, lanes - section * p.section);
    const int which = section * p.section + inside % size;
    r.sequence = which / kv_heads;
    r.kv_head = which - r.sequence * kv_heads;
    r.column = inside / size * KEYS;  // first keys first: when causal, most queries see them
    r.past = p.keys - p.queries;
    const int last = smaller(r.column + KEYS, p.keys) - 1;
    r.low = larger(r.column - r.past - p.after, 0) / QUERIES * QUERIES;
    r.high = smaller(p.queries, last - r.past + p.before + 1);
    r.whole_low = r.column + KEYS - 1 - r.past - p.after;
    r.whole_high = r.column - r.past + p.before - (QUERIES - 1);
    return r;
}

TESSERA_DEVICE void load_tile(
    unsigned char* to, const TensorMap* map, uint64_t* full, int count, int row, int head, int batch) {
#pragma unroll
    for (int panel = 0; panel < PADDED / 64; ++panel)
        load_box(to + panel * count * 128, map, full, 64 * panel, row, head, batch);
}

TESSERA_DEVICE void copy_tile(
    Tiles& tiles, const Problem& p, const Range& r, Turn<STAGES>& turn, int kv_parity, const TensorMap* q_map,
    const TensorMap* k_map, const TensorMap* v_map, const TensorMap* dout_map, const float* rows) {
    barrier_wait(&tiles.kv_empty, kv_parity ^ 1);
    barrier_expect(&tiles.kv_full, 2 * KEYS * PADDED * 2);
    load_tile(tiles.k, k_map, &tiles.kv_full, KEYS, r.column, r.kv_head, r.sequence);
    load_tile(tiles.v, v_map, &tiles.kv_full, KEYS, r.column, r.kv_head, r.sequence);
    for (int member = 0; member < p.group; ++member) {
        const int head = r.kv_head * p.group + member;
        const int first = (r.sequence * p.heads + head) * p.blocks;
        for (int query = r.low; query < r.high; query += QUERIES) {
            barrier_wait(&tiles.q_empty[turn.stage], turn.parity ^ 1);
            barrier_expect(&tiles.q_full[turn.stage], QUERIES * PADDED * 2 + ROW_FLOATS * 4);
            load_tile(tiles.q[turn.stage], q_map, &tiles.q_full[turn.stage], QUERIES, query, head, r.sequence);
            load_bulk(tiles.rows[turn.stage], rows + static_cast<int64_t>(first + query / QUERIES) * ROW_FLOATS,
                      &tiles.q_full[turn.stage], ROW_FLOATS * 4);
            barrier_wait(&tiles.dout_empty[turn.stage], turn.parity ^ 1);
            barrier_expect(&tiles.dout_full[turn.stage], QUERIES * PADDED * 2);
            load_tile(tiles.dout[turn.stage], dout_map, &tiles.dout_full[turn.stage], QUERIES, query, head, r.sequence);
            turn.next();
        }
    }
}

// left [64 keys, D] times the transpose of right [64 queries, D], into [key, query].
TESSERA_DEVICE void issue_inner(float (&to)[QUERIES / 2], uint32_t left, uint32_t right) {
    const uint64_t left_tile = tile_descriptor(left, 0), right_tile = tile_descriptor(right, 0);
    group_fence();
#pragma unroll
    for (int slice = 0; slice < PADDED / 16; ++slice) {
        const uint32_t panel = slice / 4, inside = slice % 4 * 32;
        group_product<TYPE, QUERIES>(
            to, further(left_tile, panel * KEYS * 128 + inside), further(right_tile, panel * QUERIES * 128 + inside),
            slice > 0);
    }
    group_commit();
}

// to [64 keys, D] += left [key, query] right [query, D].
TESSERA_DEVICE void issue_outer(float (&to)[PADDED / 2], const uint32_t (&left)[QUERIES / 16][4], uint32_t right) {
    const uint64_t tile = tile_descriptor(right, QUERIES * 128);
    group_fence();
#pragma unroll
    for (int slice = 0; slice < QUERIES / 16; ++slice)
        group_product<TYPE, PADDED>(to, left[slice], further(tile, slice * 2048), 1);
    group_commit();
}

// dQ [64 queries, 64 columns] = dS [query, key] K [key, column], both with the sum across their rows.
TESSERA_DEVICE void issue_queries(float (&to)[32], uint32_t dscores, uint32_t k_panel) {
    const uint64_t left_tile = tile_descriptor(dscores, 0), right_tile = tile_descriptor(k_panel, 0);
    group_fence();
#pragma unroll
    for (int slice = 0; slice < KEYS / 16; ++slice)
        group_product_flipped<TYPE, 64>(
            to, further(left_tile, slice * 2048), further(right_tile, slice * 2048), slice > 0);
    group_commit();
}

// Scores to probabilities, never above 1: the forward's own sum differs from this one in the last place.
TESSERA_DEVICE void recall(
    float (&scores)[QUERIES / 2], const float* rows, const Problem& p, const Range& r, int key, int query, int lane,
    float unit) {
    const float* mine = rows + 2 * (lane % 4);  // from this thread's first column on
#pragma unroll
    for (int i = 0; i < QUERIES / 2; ++i) {
        const int place = 8 * (i / 4) + i % 2;
        const float exponent = fmaf(scores[i] - mine[place], unit, -mine[QUERIES + place]);
        scores[i] = exp2_fast(exponent > 0.0f ? 0.0f : exponent);
    }
    if (query < r.whole_low || query > r.whole_high) {
        int least[2], most[2];  // columns that see each of the thread's two keys, counted from its first
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int here = key + lane / 4 + 8 * half - r.past - query - 2 * (lane % 4);  // where the key itself stands
            least[half] = here - p.after;
            most[half] = here + p.before;
        }
#pragma unroll
        for (int i = 0; i < QUERIES / 2; ++i) {
            const int place = 8 * (i / 4) + i % 2;
            if (place < least[i / 2 % 2] || place > most[i / 2 % 2]) scores[i] = 0.0f;
        }
    }
}

// Put dS^T of this warpgroup's keys where products find it: [key, query] in rows of 128 bytes, swizzled.
TESSERA_DEVICE void share(unsigned char* to, const uint32_t (&dscores)[QUERIES / 16][4], int row, int lane) {
#pragma unroll
    for (int i = 0; i < QUERIES / 4; ++i) {
        const int key = row + fragment_row(lane, 2 * i), piece = (2 * i) / 4;
        *reinterpret_cast<uint32_t*>(to + key * 128 + (piece ^ key % 8) * 16 + lane % 4 * 4) = dscores[i / 4][i % 4];
    }
}

// Hand this warpgroup's part of dQ to the copy engine, 16 bytes of a thread after those of the one before it.
TESSERA_DEVICE void send_queries(float* to, float* by, const float (&dq)[32], int group, int thread) {
    if (thread == 0) bulk_wait_read<0>();
    sync_some(2 + group, 128);
#pragma unroll
    for (int chunk = 0; chunk < 8; ++chunk) {
        Numbers four = {{dq[4 * chunk], dq[4 * chunk + 1], dq[4 * chunk + 2], dq[4 * chunk + 3]}};
        *reinterpret_cast<Numbers*>(by + (chunk * 128 + thread) * 4) = four;
    }
    fence_for_engine();
    sync_some(2 + group, 128);
    if (thread == 0) {
        add_bulk(to, by, HALF_FLOATS * 4);
        bulk_commit();
    }
}

TESSERA_DEVICE void multiply_tile(
    Tiles& tiles, const Problem& p, const Range& r, Turn<STAGES>& turn, int kv_parity, int width, float unit, float scale,
    float* dq_sums, TYPE* dk, TYPE* dv) {
    const int group = same_in_warp(static_cast<int>(threadIdx.x) / 128) - 1;
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int row = group * 64 + thread / 32 * 16;  // of this warp's 16 keys in the tile
    const bool speaks = lane == 0;
    const uint32_t k = shared_address(tiles.k), v = shared_address(tiles.v);
    float dk_sums[PADDED / 2], dv_sums[PADDED / 2];
#pragma unroll
    for (int i = 0; i < PADDED / 2; ++i) dk_sums[i] = dv_sums[i] = 0.0f;
    if (r.low < r.high) {
        barrier_wait(&tiles.kv_full, kv_parity);
        bool is_under_way = false;          // a product that still reads the stage before
        uint32_t dscores[QUERIES / 16][4];  // which it reads as well, into the next round
        for (int member = 0; member < p.group; ++member) {
            const int first = (r.sequence * p.heads + r.kv_head * p.group + member) * p.blocks;
            for (int query = r.low; query < r.high; query += QUERIES) {
                float scores[QUERIES / 2], dprobs[QUERIES / 2], dq[32];
                uint32_t left[QUERIES / 16][4];
                const uint32_t q = shared_address(tiles.q[turn.stage]), dout = shared_address(tiles.dout[turn.stage]);
                const float* rows = tiles.rows[turn.stage];
                barrier_wait(&tiles.q_full[turn.stage], turn.parity);
                issue_inner(scores, k + group * 8192, q);
                barrier_wait(&tiles.dout_full[turn.stage], turn.parity);
                issue_inner(dprobs, v + group * 8192, dout);
                group_wait<1>();
                settled(scores);
                settled(dk_sums);
                if (speaks && is_under_way) {
                    barrier_arrive(&tiles.q_empty[turn.before()]);
                    barrier_arrive(&tiles.dout_empty[turn.before()]);
                }
                recall(scores, rows, p, r, r.column + row, query, lane, unit);
                round_fragments<TYPE>(left, scores);
                issue_outer(dv_sums, left, dout);
                group_wait<OVERLAP == 1>();
                settled(dprobs);
#pragma unroll
                for (int i = 0; i < QUERIES / 2; ++i)
                    dprobs[i] = scores[i] * (dprobs[i] - rows[2 * QUERIES + 2 * (lane % 4) + 8 * (i / 4) + i % 2]);
                round_fragments<TYPE>(dscores, dprobs);
                unsigned char* shared_dscores = tiles.dscores[turn.stage];  // the other one may still be read
                share(shared_dscores, dscores, row, lane);
                fence_for_engine();
                sync_some(1, 256);
                issue_queries(dq, shared_address(shared_dscores), k + group * KEYS * 128);
                issue_outer(dk_sums, dscores, q);
                group_wait<OVERLAP == 2>();
                settled(dq);
                settled(dv_sums);
                float* to = dq_sums + static_cast<int64_t>((first + query / QUERIES) * 2 + group) * HALF_FLOATS;
                send_queries(to, tiles.dq[group], dq, group, thread);
                is_under_way = true;
                turn.next();
            }
        }
        group_wait<0>();
        settled(dk_sums);
        if (speaks) {
            barrier_arrive(&tiles.q_empty[turn.before()]);
            barrier_arrive(&tiles.dout_empty[turn.before()]);
            barrier_arrive(&tiles.kv_empty);
        }
    }
    const int64_t stride = static_cast<int64_t>(p.heads / p.group) * width;
    const int64_t head = (static_cast<int64_t>(r.sequence) * p.keys + r.column + row) * stride + r.kv_head * width;
    uint32_t pairs[PADDED / 4];
    pack_rows<TYPE>(pairs, dk_sums, {scale, scale});
    store_rows(pairs, dk + head, stride, p.keys - r.column - row, width, lane);
    pack_rows<TYPE>(pairs, dv_sums, {1.0f, 1.0f});
    store_rows(pairs, dv + head, stride, p.keys - r.column - row, width, lane);
}

// dk and dv contiguous [sequence, key, head, width]; dq_sums zeros (of `gather_rows`), 64 x 128 floats for each head's tile of
// queries. A kernel of `count` tiles; blocks are as many as fit.
TESSERA_KERNEL(384) flash_attention_backward(
    const TESSERA_GRID_CONSTANT TensorMap q_map, const TESSERA_GRID_CONSTANT TensorMap k_map,
    const TESSERA_GRID_CONSTANT TensorMap v_map, const TESSERA_GRID_CONSTANT TensorMap dout_map, const float* rows,
    float* dq_sums, TYPE* dk, TYPE* dv, int sequences, int queries, int keys, int heads, int group, int section, int blocks,
    int before, int after, int count, int turning, int width, float unit, float scale) {
    TESSERA_SHARED(memory);
    Tiles& tiles = *reinterpret_cast<Tiles*>(memory);
    const Problem p = {nullptr, nullptr, sequences, queries, keys, heads, group, section, blocks, before, after};
    const int key_blocks = (keys + KEYS - 1) / KEYS;
    Turn<STAGES> turn;
    int kv_parity = 0;
    if (threadIdx.x == 0) {
        barrier_init(&tiles.kv_full, 1);
        barrier_init(&tiles.kv_empty, 8);  // warps that multiply
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&tiles.q_full[stage], 1);
            barrier_init(&tiles.dout_full[stage], 1);
            barrier_init(&tiles.q_empty[stage], 8);
            barrier_init(&tiles.dout_empty[stage], 8);
        }
        barrier_init_done();
    }
    sync_threads();
    if (threadIdx.x < 128) {
        fewer_registers<24>();
        if (threadIdx.x != 0) return;
        for (int wave = 0, tile; (tile = tile_of(wave, turning)) < count; ++wave) {
            const Range r = range_of(p, tile, key_blocks);
            if (r.low >= r.high) continue;
            copy_tile(tiles, p, r, turn, kv_parity, &q_map, &k_map, &v_map, &dout_map, rows);
            kv_parity ^= 1;
        }
    } else {
        more_registers<240>();
        for (int wave = 0, tile; (tile = tile_of(wave, turning)) < count; ++wave) {
            const Range r = range_of(p, same_in_warp(tile), key_blocks);
            multiply_tile(tiles, p, r, turn, kv_parity, width, unit, scale, dq_sums, dk, dv);
            kv_parity ^= r.low < r.high;
        }
        if (threadIdx.x % 128 == 0) bulk_wait_read<0>();
    }
}
TESSERA_ENTRY(flash_attention_backward)

// Sixteen bytes of one row times those of another.
TESSERA_DEVICE float inner_product(const Words& a, const Words& b) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const TYPE x = {static_cast<uint16_t>(a.word[i / 2] >> 16 * (i % 2))};
        const TYPE y = {static_cast<uint16_t>(b.word[i / 2] >> 16 * (i % 2))};
        sum = fmaf(to_float(x), to_float(y), sum);
    }
    return sum;
}

// What each tile of queries needs of its rows, side by side: top, spread and delta of 64; past the end, probability 0. And
// zeros for the tile's dQ to be added to. A block is a tile, 16 threads are four rows: 8 loads of 16 bytes each at once.
TESSERA_KERNEL_SHARED_SM(256, 4) gather_rows(
    const TYPE* out, const TYPE* dout, const float* dlse, const float* top, const float* spread, float* rows, float* dq_sums,
    int queries, int heads, int blocks, int64_t stride_b, int64_t stride_t, int64_t stride_n, int width) {
    constexpr int FOUR = 4;
    const int which = blockIdx.x, sequence = which / heads, head = which - sequence * heads;
    const int inside = static_cast<int>(threadIdx.x) / 16 * FOUR, lane = threadIdx.x % 16;
    const int first = blockIdx.y * QUERIES + inside;
    const int64_t tile = static_cast<int64_t>(which) * blocks + blockIdx.y;
    const Words zero = {{0, 0, 0, 0}};
    Words a[FOUR], b[FOUR];
#pragma unroll
    for (int i = 0; i < FOUR; ++i) {
        const bool there = first + i < queries && 8 * lane < width;
        const TYPE* row = out + ((static_cast<int64_t>(sequence) * queries + first + i) * heads + head) * width;
        const TYPE* other = dout + sequence * stride_b + (first + i) * stride_t + head * stride_n;
        a[i] = there ? load_once(reinterpret_cast<const Words*>(row) + lane) : zero;
        b[i] = there ? load_once(reinterpret_cast<const Words*>(other) + lane) : zero;
    }
    const bool mine = lane < FOUR && first + lane < queries;  // lanes 0 to 3 finish a row each
    const int64_t place = static_cast<int64_t>(which) * queries + first + lane;
    const float row_top = mine ? top[place] : 0.0f, row_spread = mine ? spread[place] : infinity();
    const float row_dlse = mine && dlse != nullptr ? dlse[place] : 0.0f;
    Words* sums = reinterpret_cast<Words*>(dq_sums + tile * QUERIES * PADDED);
#pragma unroll
    for (int i = 0; i < QUERIES * PADDED / 4 / 256; ++i) store_16(sums + i * 256 + threadIdx.x, zero);
    keep_packed(a[0]);  // all of the above is under way before the first number is needed
    float delta = 0.0f;
#pragma unroll
    for (int i = 0; i < FOUR; ++i) {
        float sum = inner_product(a[i], b[i]);
#pragma unroll
        for (int mask = 8; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane == i) delta = sum;
    }
    if (lane < FOUR) {
        float* to = rows + tile * ROW_FLOATS + inside + lane;
        to[0] = row_top;
        to[QUERIES] = row_spread;
        to[2 * QUERIES] = delta - row_dlse;
    }
}
TESSERA_ENTRY(gather_rows)

// dQ from the order in which threads hold it to [sequence, query, head, width], scaled and rounded. A block is a tile of
// queries, a warp 16 rows and 64 columns of it as the products left them: 8 loads of 16 bytes a thread at once.
TESSERA_KERNEL_SHARED_SM(256, 4) finish_queries(
    const float* dq_sums, TYPE* dq, int queries, int heads, int blocks, int width, float scale) {
    const int which = blockIdx.x, group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const int sequence = which / heads, head = which - sequence * heads;
    const int row = blockIdx.y * QUERIES + thread / 32 * 16;
    const float* from = dq_sums + ((static_cast<int64_t>(which) * blocks + blockIdx.y) * 2 + group) * HALF_FLOATS;
    Words four[8];
    float sums[32];
#pragma unroll
    for (int i = 0; i < 8; ++i) four[i] = load_once(reinterpret_cast<const Words*>(from) + i * 128 + thread);
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i] = reinterpret_cast<const Numbers&>(four[i / 4]).number[i % 4];
    const int64_t stride = static_cast<int64_t>(heads) * width;
    TYPE* to = dq + (static_cast<int64_t>(sequence) * queries + row) * stride + head * width + 64 * group;
    uint32_t pairs[16];
    pack_rows<TYPE>(pairs, sums, {scale, scale});
    store_rows(pairs, to, stride, queries - row, width - 64 * group, thread % 32);
}
TESSERA_ENTRY(finish_queries)
