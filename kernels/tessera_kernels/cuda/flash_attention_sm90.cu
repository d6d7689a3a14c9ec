// Attention forward with the copy engine and warpgroup products (Shah et al. 2024, arXiv 2407.08608), for sm_90a.
//
//     out = softmax(u c(Q K^T)) V,   c(x) = x and u = scale, or with a soft cap c(x) = tanh(x scale / cap) and u = cap
//
//     warpgroup 0, one thread     copies Q, then K and V tile by tile, last keys first, into rings of STAGES
//     warpgroups 1 .. CONSUMERS   64 queries each: while P V of one tile runs, the softmax of the next runs beside it,
//                                 and named barriers let one warpgroup's softmax run beside another's products
//
//     HBM        q, k, v read; out, lse, top and spread written
//     shared     Q [64 CONSUMERS, D]; K and V [BLOCK_N, D] x STAGES each, in panels of 64 columns, 128-byte swizzle
//     registers  S and P of [64, BLOCK_N], out [64, D] in float32, top and sum of two rows a thread
//
// A block stays on its multiprocessor and takes every gridDim.x-th tile, so that the copies of the next begin under the
// last products of the one before. Reference: tessera_kernels.reference.flash_attention.
//
// Defined by the host: TYPE (bf16, f16), PADDED (64, 128, 256), CONSUMERS, BLOCK_N, STAGES.
#include "attention.cuh"

constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int PANELS = PADDED / 64;
constexpr int Q_BYTES = BLOCK_M * PADDED * 2;
constexpr int TILE_BYTES = BLOCK_N * PADDED * 2;
constexpr int REGISTERS = CONSUMERS == 2 ? 240 : 160;  // of a consumer; the copying warpgroup gives its own away
constexpr int SPARED = CONSUMERS == 2 ? 24 : 32;

// Everything in shared memory; the host asks for sizeof(Tiles) and 1,024 bytes to align it.
struct Tiles {
    alignas(1024) unsigned char q[Q_BYTES];
    alignas(1024) unsigned char k[STAGES][TILE_BYTES];
    alignas(1024) unsigned char v[STAGES][TILE_BYTES];
    uint64_t q_full, q_empty;
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

TESSERA_DEVICE void load_rows(
    unsigned char* to, const TensorMap* map, uint64_t* full, int rows, int row, int head, int batch) {
    barrier_expect(full, rows * PADDED * 2);
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
        load_box(to + panel * rows * 128, map, full, 64 * panel, row, head, batch);
}

TESSERA_DEVICE void copy_all(
    Tiles& tiles, const Problem& p, int count, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map) {
    Turn<STAGES> k_turn, v_turn;
    int q_parity = 0;
    for (int tile = blockIdx.x; tile < count; tile += gridDim.x) {
        const Work w = work_of<BLOCK_M, BLOCK_N>(p, tile);
        const int steps = tiles_of<BLOCK_N>(w);
        if (steps == 0) continue;
        const int kv_head = w.head / p.group;
        barrier_wait(&tiles.q_empty, q_parity ^ 1);
        q_parity ^= 1;
        load_rows(tiles.q, q_map, &tiles.q_full, BLOCK_M, w.q_first + w.row, w.head, w.batch);
        for (int step = 0; step <= steps; ++step) {  // keys run one tile ahead of values
            if (step < steps) {
                barrier_wait(&tiles.k_empty[k_turn.stage], k_turn.parity ^ 1);
                const int column = w.low + (steps - 1 - step) * BLOCK_N;
                load_rows(tiles.k[k_turn.stage], k_map, &tiles.k_full[k_turn.stage], BLOCK_N, w.k_first + column,
                          kv_head, w.batch);
                k_turn.next();
            }
            if (step > 0) {
                barrier_wait(&tiles.v_empty[v_turn.stage], v_turn.parity ^ 1);
                const int column = w.low + (steps - step) * BLOCK_N;
                load_rows(tiles.v[v_turn.stage], v_map, &tiles.v_full[v_turn.stage], BLOCK_N, w.k_first + column,
                          kv_head, w.batch);
                v_turn.next();
            }
        }
    }
}

// Warpgroups take turns at issuing products, in their order: one's softmax then runs beside the others' products. A turn
// begins when all others have had theirs; they say so between first and last (exclusive).
TESSERA_DEVICE void take_turn(int group) { sync_some(1 + group, 128 * CONSUMERS); }
TESSERA_DEVICE void let_go(int group, int first, int last) {
    for (int other = first; other < last; ++other)
        if (other != group) arrive_some(1 + other, 128 * CONSUMERS);
}
TESSERA_DEVICE void pass_turn(int group) { let_go(group, 0, CONSUMERS); }

// S = Q K^T of this warpgroup's 64 queries.
TESSERA_DEVICE void issue_scores(float (&scores)[BLOCK_N / 2], uint32_t q, uint32_t k) {
    group_fence();
#pragma unroll
    for (int slice = 0; slice < PADDED / 16; ++slice) {
        const uint32_t panel = slice / 4, inside = slice % 4 * 32;
        group_product<TYPE, BLOCK_N>(
            scores, tile_descriptor(q + panel * BLOCK_M * 128 + inside, 0),
            tile_descriptor(k + panel * BLOCK_N * 128 + inside, 0), slice > 0);
    }
    group_commit();
}

// out += P V.
TESSERA_DEVICE void issue_mix(float (&out)[PADDED / 2], const uint32_t (&weights)[BLOCK_N / 16][4], uint32_t v) {
    group_fence();
#pragma unroll
    for (int slice = 0; slice < BLOCK_N / 16; ++slice)
        group_product<TYPE, PADDED>(out, weights[slice], tile_descriptor(v + slice * 2048, BLOCK_N * 128), 1);
    group_commit();
}

// Values of keys past the sequence's end belong to another sequence, or to nobody: NaN there times weight 0 is NaN.
TESSERA_DEVICE void clear_past_end(unsigned char* v, int keys, int group, int thread) {
    if (keys >= BLOCK_N) return;
    const Words zero = {{0, 0, 0, 0}};
    for (int chunk = keys * 8 + thread; chunk < BLOCK_N * 8; chunk += 128)
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel)
            *reinterpret_cast<Words*>(v + panel * BLOCK_N * 128 + chunk * 16) = zero;
    fence_for_engine();
    sync_some(8 + group, 128);
}

TESSERA_DEVICE void attend_all(
    Tiles& tiles, const Problem& p, int count, int width, float unit, float inner, TYPE* out_ptr, float* lse, float* top,
    float* spread, int64_t stride_b, int64_t stride_t, int64_t stride_n) {
    const int group = same_in_warp(static_cast<int>(threadIdx.x) / 128) - 1;
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const bool speaks = lane == 0;  // for its warp, at barriers that the copying thread waits on
    const uint32_t q = shared_address(tiles.q) + group * 64 * 128;
    Turn<STAGES> k_turn, v_turn;
    int q_parity = 0;
    let_go(group, 0, group);  // as if it had had a turn before all those in front of it
    for (int tile = blockIdx.x; tile < count; tile += gridDim.x) {
        const Work w = work_of<BLOCK_M, BLOCK_N>(p, tile);
        if (w.row >= w.q_length) continue;
        const int steps = tiles_of<BLOCK_N>(w);
        const int row = w.row + group * 64 + thread / 32 * 16;  // of this warp's 16 queries
        Softmax softmax;
        softmax.clear();
        float out[PADDED / 2];
#pragma unroll
        for (int i = 0; i < PADDED / 2; ++i) out[i] = 0.0f;
        if (steps > 0) {
            float scores[BLOCK_N / 2], fade[2];
            uint32_t weights[BLOCK_N / 16][4];
            int column = w.low + (steps - 1) * BLOCK_N;
            barrier_wait(&tiles.q_full, q_parity);
            q_parity ^= 1;
            barrier_wait(&tiles.k_full[k_turn.stage], k_turn.parity);
            take_turn(group);
            issue_scores(scores, q, shared_address(tiles.k[k_turn.stage]));
            pass_turn(group);
            group_wait<0>();
            settled(scores);
            if (speaks) barrier_arrive(&tiles.k_empty[k_turn.stage]);
            k_turn.next();
            hide(scores, w, p, row, column, lane, inner, column < w.whole_low || column >= w.whole_high);
            softmax.weigh(scores, unit, fade);
            round_fragments<TYPE>(weights, scores);
            for (int step = 1; step < steps; ++step) {
                const int ahead = column - BLOCK_N;
                barrier_wait(&tiles.k_full[k_turn.stage], k_turn.parity);
                take_turn(group);
                issue_scores(scores, q, shared_address(tiles.k[k_turn.stage]));
                barrier_wait(&tiles.v_full[v_turn.stage], v_turn.parity);
                if (step == 1) clear_past_end(tiles.v[v_turn.stage], w.k_length - column, group, thread);
                issue_mix(out, weights, shared_address(tiles.v[v_turn.stage]));
                pass_turn(group);
                group_wait<1>();
                settled(scores);
                if (speaks) barrier_arrive(&tiles.k_empty[k_turn.stage]);
                k_turn.next();
                hide(scores, w, p, row, ahead, lane, inner, ahead < w.whole_low || ahead >= w.whole_high);
                softmax.weigh(scores, unit, fade);
                group_wait<0>();
                settled(out);
                if (speaks) barrier_arrive(&tiles.v_empty[v_turn.stage]);
                v_turn.next();
                round_fragments<TYPE>(weights, scores);
#pragma unroll
                for (int i = 0; i < PADDED / 2; ++i) out[i] *= fade[i / 2 % 2];
                column = ahead;
            }
            if (speaks) barrier_arrive(&tiles.q_empty);
            barrier_wait(&tiles.v_full[v_turn.stage], v_turn.parity);
            if (steps == 1) clear_past_end(tiles.v[v_turn.stage], w.k_length - column, group, thread);
            issue_mix(out, weights, shared_address(tiles.v[v_turn.stage]));
            group_wait<0>();
            settled(out);
            if (speaks) barrier_arrive(&tiles.v_empty[v_turn.stage]);
            v_turn.next();
        }
        softmax.finish();
        TYPE* head = out_ptr + w.batch * stride_b + w.head * stride_n + w.q_first * stride_t;
        store_rows<TYPE>(out, softmax, w, row, lane, width, head, stride_t);
        store_statistics(softmax, w, p, row, lane, unit, lse, top, spread);
    }
    take_turn(group);  // no barrier may be left half full
    let_go(group, group + 1, CONSUMERS);
}

TESSERA_KERNEL(THREADS) flash_attention_forward(
    const TESSERA_GRID_CONSTANT TensorMap q_map, const TESSERA_GRID_CONSTANT TensorMap k_map,
    const TESSERA_GRID_CONSTANT TensorMap v_map, TYPE* out, float* lse, float* top, float* spread,
    const int* query_starts, const int* key_starts, int64_t stride_b, int64_t stride_t, int64_t stride_n, int sequences,
    int queries, int keys, int heads, int group, int section, int blocks, int before, int after, int count, int width,
    float unit, float inner) {
    TESSERA_SHARED(memory);
    Tiles& tiles = *reinterpret_cast<Tiles*>(memory);
    const Problem p = {query_starts, key_starts, sequences, queries, keys, heads, group, section, blocks, before, after};
    if (threadIdx.x == 0) {
        barrier_init(&tiles.q_full, 1);
        barrier_init(&tiles.q_empty, 4 * CONSUMERS);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&tiles.k_full[stage], 1);
            barrier_init(&tiles.v_full[stage], 1);
            barrier_init(&tiles.k_empty[stage], 4 * CONSUMERS);
            barrier_init(&tiles.v_empty[stage], 4 * CONSUMERS);
        }
        barrier_init_done();
        prefetch_map(&q_map);
        prefetch_map(&k_map);
        prefetch_map(&v_map);
    }
    sync_threads();
    if (threadIdx.x < 128) {
        fewer_registers<SPARED>();
        if (threadIdx.x == 0) copy_all(tiles, p, count, &q_map, &k_map, &v_map);
    } else {
        more_registers<REGISTERS>();
        attend_all(tiles, p, count, width, unit, inner, out, lse, top, spread, stride_b, stride_t, stride_n);
    }
}
TESSERA_ENTRY(flash_attention_forward)
