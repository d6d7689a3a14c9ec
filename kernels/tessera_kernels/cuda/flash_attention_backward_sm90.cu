// Attention backward with the copy engine and warpgroup products (Shah et al. 2024, arXiv 2407.08608, section 3.3), sm_90a.
//
//     P = 2^((S - top) u log2 e - spread),  delta = sum_h dO O - dlse          S = Q K^T, top and spread from the forward
//     dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dK = scale dS^T Q,  dQ = scale dS K
//
//     a block keeps 128 keys of one key/value head; queries of all heads that share it stream by, 64 at a time
//     warpgroup 0, one thread    copies K and V once, then Q, dO and the rows' numbers into rings of STAGES
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

constexpr int PADDED = 128, KEYS = 128, QUERIES = 64;
constexpr int ROW_FLOATS = 3 * QUERIES;        // top, spread and delta of a tile of queries
constexpr int HALF_FLOATS = QUERIES * PADDED / 2;  // of dQ, one warpgroup's columns

struct Tiles {
    alignas(1024) unsigned char k[KEYS * PADDED * 2];
    alignas(1024) unsigned char v[KEYS * PADDED * 2];
    alignas(1024) unsigned char q[STAGES][QUERIES * PADDED * 2];
    alignas(1024) unsigned char dout[STAGES][QUERIES * PADDED * 2];
    alignas(1024) unsigned char dscores[2][KEYS * QUERIES * 2];
    alignas(128) float dq[2][HALF_FLOATS];
    alignas(128) float rows[STAGES][ROW_FLOATS];
    uint64_t kv_full, q_full[STAGES], q_empty[STAGES], dout_full[STAGES], dout_empty[STAGES];
};

struct Range {  // tiles of queries [low, high) see some of the block's keys; [whole_low, whole_high] see all of them
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

TESSERA_DEVICE void copy_all(
    Tiles& tiles, const Problem& p, const Range& r, const TensorMap* q_map, const TensorMap* k_map,
    const TensorMap* v_map, const TensorMap* dout_map, const float* rows) {
    if (r.low >= r.high) return;
    barrier_expect(&tiles.kv_full, 2 * KEYS * PADDED * 2);
    load_tile(tiles.k, k_map, &tiles.kv_full, KEYS, r.column, r.kv_head, r.sequence);
    load_tile(tiles.v, v_map, &tiles.kv_full, KEYS, r.column, r.kv_head, r.sequence);
    Turn<STAGES> turn;
    for (int member = 0; member < p.group; ++member) {
        const int head = r.kv_head * p.group + member;
        const float* row = rows + (static_cast<int64_t>(r.sequence) * p.heads + head) * p.blocks * ROW_FLOATS;
        for (int query = r.low; query < r.high; query += QUERIES) {
            barrier_wait(&tiles.q_empty[turn.stage], turn.parity ^ 1);
            barrier_expect(&tiles.q_full[turn.stage], QUERIES * PADDED * 2 + ROW_FLOATS * 4);
            load_tile(tiles.q[turn.stage], q_map, &tiles.q_full[turn.stage], QUERIES, query, head, r.sequence);
            load_bulk(tiles.rows[turn.stage], row + query / QUERIES * ROW_FLOATS, &tiles.q_full[turn.stage], ROW_FLOATS * 4);
            barrier_wait(&tiles.dout_empty[turn.stage], turn.parity ^ 1);
            barrier_expect(&tiles.dout_full[turn.stage], QUERIES * PADDED * 2);
            load_tile(tiles.dout[turn.stage], dout_map, &tiles.dout_full[turn.stage], QUERIES, query, head, r.sequence);
            turn.next();
        }
    }
}

// left [64 keys, D] times the transpose of right [64 queries, D], into [key, query].
TESSERA_DEVICE void issue_inner(float (&to)[QUERIES / 2], uint32_t left, uint32_t right) {
    group_fence();
#pragma unroll
    for (int slice = 0; slice < PADDED / 16; ++slice) {
        const uint32_t panel = slice / 4, inside = slice % 4 * 32;
        group_product<TYPE, QUERIES>(
            to, tile_descriptor(left + panel * KEYS * 128 + inside, 0),
            tile_descriptor(right + panel * QUERIES * 128 + inside, 0), slice > 0);
    }
    group_commit();
}

// to [64 keys, D] += left [key, query] right [query, D].
TESSERA_DEVICE void issue_outer(float (&to)[PADDED / 2], const uint32_t (&left)[QUERIES / 16][4], uint32_t right) {
    group_fence();
#pragma unroll
    for (int slice = 0; slice < QUERIES / 16; ++slice)
        group_product<TYPE, PADDED>(to, left[slice], tile_descriptor(right + slice * 2048, QUERIES * 128), 1);
    group_commit();
}

// dQ [64 queries, 64 columns] = dS [query, key] K [key, column], both with the sum across their rows.
TESSERA_DEVICE void issue_queries(float (&to)[32], uint32_t dscores, uint32_t k_panel) {
    group_fence();
#pragma unroll
    for (int slice = 0; slice < KEYS / 16; ++slice)
        group_product_flipped<TYPE, 64>(
            to, tile_descriptor(dscores + slice * 2048, 0), tile_descriptor(k_panel + slice * 2048, 0), slice > 0);
    group_commit();
}

// Scores to probabilities, never above 1: the forward's own sum differs from this one in the last place.
TESSERA_DEVICE void recall(
    float (&scores)[QUERIES / 2], const float* rows, const Problem& p, const Range& r, int key, int query, int lane,
    float unit) {
    const bool edge = query < r.whole_low || query > r.whole_high;
#pragma unroll
    for (int i = 0; i < QUERIES / 2; ++i) {
        const int column = fragment_column(lane, i);
        const float exponent = fmaf(scores[i] - rows[column], unit, -rows[QUERIES + column]);
        scores[i] = exp2_fast(exponent > 0.0f ? 0.0f : exponent);
        if (edge) {
            const int ahead = key + fragment_row(lane, i) - (query + column) - r.past;
            if (ahead > p.after || ahead < -p.before) scores[i] = 0.0f;
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

TESSERA_DEVICE void store_keys(
    const float (&sums)[PADDED / 2], TYPE* head, int64_t stride, int row, int keys, int lane, int width, float factor) {
#pragma unroll
    for (int i = 0; i < PADDED / 2; i += 2) {
        const int key = row + fragment_row(lane, i), column = fragment_column(lane, i);
        if (key < keys && column < width)
            *reinterpret_cast<uint32_t*>(head + key * stride + column) = packed<TYPE>(sums[i] * factor, sums[i + 1] * factor);
    }
}

TESSERA_DEVICE void multiply_all(
    Tiles& tiles, const Problem& p, const Range& r, int width, float unit, float scale, float* dq_sums, TYPE* dk, TYPE* dv) {
    const int group = same_in_warp(static_cast<int>(threadIdx.x) / 128) - 1;
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int row = group * 64 + thread / 32 * 16;  // of this warp's 16 keys in the block
    const bool speaks = lane == 0;
    const uint32_t k = shared_address(tiles.k), v = shared_address(tiles.v);
    float dk_sums[PADDED / 2], dv_sums[PADDED / 2];
#pragma unroll
    for (int i = 0; i < PADDED / 2; ++i) dk_sums[i] = dv_sums[i] = 0.0f;
    if (r.low < r.high) {
        barrier_wait(&tiles.kv_full, 0);
        Turn<STAGES> turn;
        int held = -1, buffer = 0;          // the stage that the product under way still reads
        uint32_t dscores[QUERIES / 16][4];  // which it reads as well, into the next round
        for (int member = 0; member < p.group; ++member) {
            const int64_t first = (static_cast<int64_t>(r.sequence) * p.heads + r.kv_head * p.group + member) * p.blocks;
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
                if (speaks && held >= 0) {
                    barrier_arrive(&tiles.q_empty[held]);
                    barrier_arrive(&tiles.dout_empty[held]);
                }
                recall(scores, rows, p, r, r.column + row, query, lane, unit);
                round_fragments<TYPE>(left, scores);
                issue_outer(dv_sums, left, dout);
                group_wait<OVERLAP == 1>();
                settled(dprobs);
#pragma unroll
                for (int i = 0; i < QUERIES / 2; ++i)
                    dprobs[i] = scores[i] * (dprobs[i] - rows[2 * QUERIES + fragment_column(lane, i)]);
                round_fragments<TYPE>(dscores, dprobs);
                share(tiles.dscores[buffer], dscores, row, lane);
                fence_for_engine();
                sync_some(1, 256);
                issue_queries(dq, shared_address(tiles.dscores[buffer]), k + group * KEYS * 128);
                issue_outer(dk_sums, dscores, q);
                group_wait<OVERLAP == 2>();
                settled(dq);
                settled(dv_sums);
                send_queries(
                    dq_sums + ((first + query / QUERIES) * 2 + group) * HALF_FLOATS, tiles.dq[group], dq, group, thread);
                held = turn.stage;
                buffer ^= 1;
                turn.next();
            }
        }
        group_wait<0>();
        settled(dk_sums);
        if (thread == 0) bulk_wait_read<0>();
    }
    const int64_t stride = static_cast<int64_t>(p.heads / p.group) * width;
    const int64_t head = static_cast<int64_t>(r.sequence) * p.keys * stride + r.kv_head * width;
    store_keys(dk_sums, dk + head, stride, r.column + row, p.keys, lane, width, scale);
    store_keys(dv_sums, dv + head, stride, r.column + row, p.keys, lane, width, 1.0f);
}

// dk and dv contiguous [sequence, key, head, width]; dq_sums zeros, 64 x 128 floats for each head's tile of queries.
TESSERA_KERNEL(384) flash_attention_backward(
    const TESSERA_GRID_CONSTANT TensorMap q_map, const TESSERA_GRID_CONSTANT TensorMap k_map,
    const TESSERA_GRID_CONSTANT TensorMap v_map, const TESSERA_GRID_CONSTANT TensorMap dout_map, const float* rows,
    float* dq_sums, TYPE* dk, TYPE* dv, int sequences, int queries, int keys, int heads, int group, int section, int blocks,
    int before, int after, int width, float unit, float scale) {
    TESSERA_SHARED(memory);
    Tiles& tiles = *reinterpret_cast<Tiles*>(memory);
    const Problem p = {nullptr, nullptr, sequences, queries, keys, heads, group, section, blocks, before, after};
    const Range r = range_of(p, blockIdx.x, (keys + KEYS - 1) / KEYS);
    if (threadIdx.x == 0) {
        barrier_init(&tiles.kv_full, 1);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&tiles.q_full[stage], 1);
            barrier_init(&tiles.dout_full[stage], 1);
            barrier_init(&tiles.q_empty[stage], 8);  // warps that multiply
            barrier_init(&tiles.dout_empty[stage], 8);
        }
        barrier_init_done();
    }
    sync_threads();
    if (threadIdx.x < 128) {
        fewer_registers<24>();
        if (threadIdx.x == 0) copy_all(tiles, p, r, &q_map, &k_map, &v_map, &dout_map, rows);
    } else {
        more_registers<240>();
        multiply_all(tiles, p, r, width, unit, scale, dq_sums, dk, dv);
    }
}
TESSERA_ENTRY(flash_attention_backward)

// What each tile of queries needs of its rows, side by side: top, spread and delta of 64; past the end, probability 0.
TESSERA_KERNEL(256) gather_rows(
    const TYPE* out, const TYPE* dout, const float* dlse, const float* top, const float* spread, float* rows, int queries,
    int heads, int blocks, int64_t stride_b, int64_t stride_t, int64_t stride_n, int width) {
    const int which = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int sequence = which / heads, head = which - sequence * heads;
    for (int inside = warp; inside < QUERIES; inside += 8) {
        const int query = blockIdx.y * QUERIES + inside;
        float delta = 0.0f;
        if (query < queries) {
            const int64_t place = (static_cast<int64_t>(sequence) * queries + query) * heads + head;
            const TYPE* a = out + place * width;
            const TYPE* b = dout + sequence * stride_b + query * stride_t + head * stride_n;
            for (int column = lane; column < width; column += 32) delta = fmaf(to_float(a[column]), to_float(b[column]), delta);
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
        if (lane == 0) {
            const int64_t place = static_cast<int64_t>(which) * queries + query;
            const bool there = query < queries;
            float* to = rows + (static_cast<int64_t>(which) * blocks + blockIdx.y) * ROW_FLOATS + inside;
            to[0] = there ? top[place] : 0.0f;
            to[QUERIES] = there ? spread[place] : infinity();
            to[2 * QUERIES] = there ? delta - (dlse == nullptr ? 0.0f : dlse[place]) : 0.0f;
        }
    }
}
TESSERA_ENTRY(gather_rows)

// dQ from the order in which threads hold it to [sequence, query, head, width], scaled and rounded.
TESSERA_KERNEL(256) finish_queries(const float* dq_sums, TYPE* dq, int queries, int heads, int blocks, int width, float scale) {
    const int which = blockIdx.x, group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
    const int sequence = which / heads, head = which - sequence * heads;
    const float* from = dq_sums + ((static_cast<int64_t>(which) * blocks + blockIdx.y) * 2 + group) * HALF_FLOATS;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const int query = blockIdx.y * QUERIES + thread / 32 * 16 + fragment_row(lane, i);
        const int column = 64 * group + fragment_column(lane, i);
        const float* pair = from + (i / 4 * 128 + thread) * 4 + i % 4;
        if (query < queries && column < width) {
            const int64_t place = ((static_cast<int64_t>(sequence) * queries + query) * heads + head) * width + column;
            *reinterpret_cast<uint32_t*>(dq + place) = packed<TYPE>(pair[0] * scale, pair[1] * scale);
        }
    }
}
TESSERA_ENTRY(finish_queries)
