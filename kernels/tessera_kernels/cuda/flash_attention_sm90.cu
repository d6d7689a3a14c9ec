// Attention forward with the copy engine and warpgroup products (Shah et al. 2024, arXiv 2407.08608), for sm_90a.
//
//     out = softmax(u c(Q K^T)) V,   c(x) = x and u = scale, or with a soft cap c(x) = tanh(x scale / cap) and u = cap
//
//     warpgroup 0, one thread     copies Q, then K and V tile by tile, last keys first, into rings of STAGES
//     warpgroups 1 .. CONSUMERS   64 queries each: while P V of one tile runs, the softmax of the next runs beside it,
//                                 and named barriers let one warpgroup's softmax run beside another's products; rows of
//                                 one tile of queries are written while the next one's first scores are made
//
//     HBM        q, k, v read; out, lse, top and spread written
//     shared     Q [64 CONSUMERS, D] x QUERY_STAGES; K and V [BLOCK_N, D] x STAGES each, in panels of 64 columns, 128-byte
//                swizzle
//     registers  S and P of [64, BLOCK_N], out [64, D] in float32, top and sum of two rows a thread
//
// A block stays on its multiprocessor and takes a tile of every wave of gridDim.x, so that the copies of the next (with two
// stages of Q, all of its Q) run under the products of the one before. When causal, a wave's first tiles are its heaviest:
// with `turning` every other wave runs backwards, where the host found that to be the better balance.
// Reference: tessera_kernels.reference.flash_attention.
//
// Defined by the host: TYPE (bf16, f16), PADDED (64, 128, 256), CONSUMERS, BLOCK_N, STAGES, QUERY_STAGES (1, 2), SOFTCAP
// (0, 1).
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
    alignas(1024) unsigned char q[QUERY_STAGES][Q_BYTES];
    alignas(1024) unsigned char k[STAGES][TILE_BYTES];
    alignas(1024) unsigned char v[STAGES][TILE_BYTES];
    uint64_t q_full[QUERY_STAGES], q_empty[QUERY_STAGES];
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
    Tiles& tiles, const Problem& p, int count, int turning, const TensorMap* q_map, const TensorMap* k_map,
    const TensorMap* v_map) {
    Turn<QUERY_STAGES> q_turn;
    Turn<STAGES> k_turn, v_turn;
    for (int wave = 0, tile; (tile = tile_of(wave, turning)) < count; ++wave) {
        const Work w = work_of<BLOCK_M, BLOCK_N>(p, tile);
        const int steps = tiles_of<BLOCK_N>(w);
        if (steps == 0) continue;
        const int kv_head = w.head / p.group;
        barrier_wait(&tiles.q_empty[q_turn.stage], q_turn.parity ^ 1);
        load_rows(tiles.q[q_turn.stage], q_map, &tiles.q_full[q_turn.stage], BLOCK_M, w.q_first + w.row, w.head, w.batch);
        q_turn.next();
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
    const uint64_t q_tile = tile_descriptor(q, 0), k_tile = tile_descriptor(k, 0);
    group_fence();
#pragma unroll
    for (int slice = 0; slice < PADDED / 16; ++slice) {
        const uint32_t panel = slice / 4, inside = slice % 4 * 32;
        group_product<TYPE, BLOCK_N>(
            scores, further(q_tile, panel * BLOCK_M * 128 + inside), further(k_tile, panel * BLOCK_N * 128 + inside),
            slice > 0);
    }
    group_commit();
}

// out += P V.
TESSERA_DEVICE void issue_mix(float (&out)[PADDED / 2], const uint32_t (&weights)[BLOCK_N / 16][4], uint32_t v) {
    const uint64_t tile = tile_descriptor(v, BLOCK_N * 128);
    group_fence();
#pragma unroll
    for (int slice = 0; slice < BLOCK_N / 16; ++slice)
        group_product<TYPE, PADDED>(out, weights[slice], further(tile, slice * 2048), 1);
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

struct Outputs {
    TYPE* out;
    float *lse, *top, *spread;
    int64_t stride_b, stride_t, stride_n;
    int width;
    float unit;
};

// What a warp has finished and not written: its 16 rows, those of `row` and after in their sequence.
struct Finished {
    uint32_t pairs[PADDED / 4];
    Softmax softmax;
    Work work;
    int row;

    TESSERA_DEVICE void clear(const Work& w, int first) {
        softmax.clear();
        work = w;
        row = first;
#pragma unroll
        for (int i = 0; i < PADDED / 4; ++i) pairs[i] = 0;
    }

    TESSERA_DEVICE void take(const float (&out)[PADDED / 2], const Softmax& s, const Work& w, int first) {
        float factor[2];
        softmax = s;
        work = w;
        row = first;
        softmax.finish(factor);
        pack_rows<TYPE>(pairs, out, factor);
    }

    TESSERA_DEVICE void write(const Problem& p, const Outputs& to, int lane) const {
        TYPE* head = to.out + work.batch * to.stride_b + work.head * to.stride_n + work.q_first * to.stride_t;
        store_rows(pairs, head + row * to.stride_t, to.stride_t, work.q_length - row, to.width, lane);
        store_statistics(softmax, work, p, row, lane, to.unit, to.lse, to.top, to.spread);
    }
};

// Go on to the next tile that sees any key; rows that see none are written on the way.
TESSERA_DEVICE bool find(
    Work& w, int& wave, const Problem& p, int count, int turning, const Outputs& to, int inside, int lane) {
    for (int tile; (tile = tile_of(++wave, turning)) < count;) {
        w = work_of<BLOCK_M, BLOCK_N>(p, tile);
        if (tiles_of<BLOCK_N>(w) > 0) return true;
        if (w.row >= w.q_length) continue;
        Finished blind;
        blind.clear(w, w.row + inside);
        blind.write(p, to, lane);
    }
    return false;
}

TESSERA_DEVICE void attend_all(Tiles& tiles, const Problem& p, int count, int turning, float inner, const Outputs& to) {
    const int group = same_in_warp(static_cast<int>(threadIdx.x) / 128) - 1;
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int inside = group * 64 + thread / 32 * 16;  // where this warp's 16 queries begin in a tile
    const bool speaks = lane == 0;                     // for its warp, at barriers that the copying thread waits on
    Turn<QUERY_STAGES> q_turn;
    Turn<STAGES> k_turn, v_turn;
    float scores[BLOCK_N / 2];
    uint32_t q;
    Work w;
    Finished done;
    done.clear({}, 0);  // no rows
    int wave = -1;
    const auto score = [&]() {
        barrier_wait(&tiles.k_full[k_turn.stage], k_turn.parity);
        take_turn(group);
        issue_scores(scores, q, shared_address(tiles.k[k_turn.stage]));
    };
    const auto begin = [&]() {  // the first scores of a tile
        q = shared_address(tiles.q[q_turn.stage]) + group * 64 * 128;
        barrier_wait(&tiles.q_full[q_turn.stage], q_turn.parity);
        score();
        pass_turn(group);
    };
    const auto scored = [&]() {
        settled(scores);
        if (speaks) barrier_arrive(&tiles.k_empty[k_turn.stage]);
        k_turn.next();
    };
    let_go(group, 0, group);  // as if it had had a turn before all those in front of it
    while (find(w, wave, p, count, turning, to, inside, lane)) {
        if (QUERY_STAGES == 2) begin();  // beside which the tile before is written
        done.write(p, to, lane);
        if (QUERY_STAGES == 1) begin();
        const int steps = tiles_of<BLOCK_N>(w), row = w.row + inside;
        Softmax softmax;
        softmax.clear();
        float out[PADDED / 2], fade[2];
        uint32_t weights[BLOCK_N / 16][4];
#pragma unroll
        for (int i = 0; i < PADDED / 2; ++i) out[i] = 0.0f;
        int column = w.low + (steps - 1) * BLOCK_N;
        group_wait<0>();
        scored();
        if constexpr (SOFTCAP) cap(scores, inner);
        if (column < w.whole_low || column >= w.whole_high) hide(scores, w, p, row, column, lane);
        softmax.weigh(scores, to.unit, fade);
        round_fragments<TYPE>(weights, scores);
        for (int step = 1; step < steps; ++step) {
            const int ahead = column - BLOCK_N;
            score();
            barrier_wait(&tiles.v_full[v_turn.stage], v_turn.parity);
            if (step == 1) clear_past_end(tiles.v[v_turn.stage], w.k_length - column, group, thread);
            issue_mix(out, weights, shared_address(tiles.v[v_turn.stage]));
            pass_turn(group);
            group_wait<1>();
            scored();
            if constexpr (SOFTCAP) cap(scores, inner);
            if (ahead < w.whole_low || ahead >= w.whole_high) hide(scores, w, p, row, ahead, lane);
            const bool shrinks = softmax.weigh(scores, to.unit, fade);
            group_wait<0>();
            settled(out);
            if (speaks) barrier_arrive(&tiles.v_empty[v_turn.stage]);
            v_turn.next();
            round_fragments<TYPE>(weights, scores);
            if (shrinks) {
#pragma unroll
                for (int i = 0; i < PADDED / 2; ++i) out[i] *= fade[i / 2 % 2];
            }
            column = ahead;
        }
        if (speaks) barrier_arrive(&tiles.q_empty[q_turn.stage]);
        q_turn.next();
        barrier_wait(&tiles.v_full[v_turn.stage], v_turn.parity);
        if (steps == 1) clear_past_end(tiles.v[v_turn.stage], w.k_length - column, group, thread);
        issue_mix(out, weights, shared_address(tiles.v[v_turn.stage]));
        group_wait<0>();
        settled(out);
        if (speaks) barrier_arrive(&tiles.v_empty[v_turn.stage]);
        v_turn.next();
        done.take(out, softmax, w, row);
    }
    done.write(p, to, lane);
    take_turn(group);  // no barrier may be left half full
    let_go(group, group + 1, CONSUMERS);
}

TESSERA_KERNEL(THREADS) flash_attention_forward(
    const TESSERA_GRID_CONSTANT TensorMap q_map, const TESSERA_GRID_CONSTANT TensorMap k_map,
    const TESSERA_GRID_CONSTANT TensorMap v_map, TYPE* out, float* lse, float* top, float* spread,
    const int* query_starts, const int* key_starts, int64_t stride_b, int64_t stride_t, int64_t stride_n, int sequences,
    int queries, int keys, int heads, int group, int section, int blocks, int before, int after, int count,
    int turning, int width, float unit, float inner) {
    TESSERA_SHARED(memory);
    Tiles& tiles = *reinterpret_cast<Tiles*>(memory);
    const Problem p = {query_starts, key_starts, sequences, queries, keys, heads, group, section, blocks, before, after};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < QUERY_STAGES; ++stage) {
            barrier_init(&tiles.q_full[stage], 1);
            barrier_init(&tiles.q_empty[stage], 4 * CONSUMERS);
        }
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
        if (threadIdx.x == 0) copy_all(tiles, p, count, turning, &q_map, &k_map, &v_map);
    } else {
        more_registers<REGISTERS>();
        const Outputs to = {out, lse, top, spread, stride_b, stride_t, stride_n, width, unit};
        attend_all(tiles, p, count, turning, inner, to);
    }
}
TESSERA_ENTRY(flash_attention_forward)
