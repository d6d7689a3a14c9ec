// Attention forward with the products of one warp (Dao 2023, arXiv 2307.08691), for sm_80 and everything since.
//
//     out = softmax(u c(Q K^T)) V,   c(x) = x and u = scale, or with a soft cap c(x) = tanh(x scale / cap) and u = cap
//
//     a block of WARPS warps has 16 WARPS queries of one head, 16 a warp; all of it walks over the keys, last keys first;
//     while one tile of K or V is multiplied, the next is copied
//
//     HBM        q, k, v read; out, lse, top and spread written
//     shared     Q [16 WARPS, D]; K and V [BLOCK_N, D] x 2 each; 16-byte chunks of a row are permuted by the row's number
//     registers  S and P of [16, BLOCK_N], out [16, D] in float32, top and sum of two rows a thread
//
// Reference: tessera_kernels.reference.flash_attention.
//
// Defined by the host: TYPE (bf16, f16), PADDED (64, 128, 256), WARPS, BLOCK_N.
#include "attention.cuh"

constexpr int BLOCK_M = 16 * WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int CHUNKS = PADDED / 8;  // of 16 bytes in a row

struct Tiles {
    alignas(128) unsigned char q[BLOCK_M * PADDED * 2];
    alignas(128) unsigned char k[2][BLOCK_N * PADDED * 2];
    alignas(128) unsigned char v[2][BLOCK_N * PADDED * 2];
};

// Rows of one head in global memory.
struct Rows {
    const TYPE* first;
    int64_t stride;
    int length, width;
};

// Where a chunk lies: no two of the 8 rows that one instruction reads share a bank.
TESSERA_DEVICE uint32_t place_of(int row, int chunk) {
    return row * PADDED * 2 + ((chunk & ~7) | ((chunk ^ row) & 7)) * 16;
}

// Begin to copy rows [row, row + COUNT); zeros past the sequence's end and past the width.
template <int COUNT> TESSERA_DEVICE void copy_rows(uint32_t to, const Rows& from, int row) {
    for (int index = threadIdx.x; index < COUNT * CHUNKS; index += THREADS) {
        const int inside = index / CHUNKS, chunk = index % CHUNKS;
        const bool there = row + inside < from.length && chunk * 8 < from.width;  // a width is a multiple of 16
        const TYPE* source = there ? from.first + (row + inside) * from.stride + chunk * 8 : from.first;
        copy_16(to + place_of(inside, chunk), source, there ? 16 : 0);
    }
}

TESSERA_DEVICE void multiply_scores(float (&scores)[BLOCK_N / 2], uint32_t q, uint32_t k, int lane) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) scores[i] = 0.0f;
#pragma unroll
    for (int slice = 0; slice < PADDED / 16; ++slice) {
        uint32_t left[4], right[4];
        load_matrices(left, q + place_of(lane % 16, 2 * slice + lane / 16));
#pragma unroll
        for (int keys = 0; keys < BLOCK_N / 16; ++keys) {
            load_matrices(right, k + place_of(16 * keys + lane / 16 * 8 + lane % 8, 2 * slice + lane / 8 % 2));
            warp_product<TYPE>(fragment(scores, 2 * keys), left, right[0], right[1]);
            warp_product<TYPE>(fragment(scores, 2 * keys + 1), left, right[2], right[3]);
        }
    }
}

TESSERA_DEVICE void multiply_values(float (&out)[PADDED / 2], const float (&weights)[BLOCK_N / 2], uint32_t v, int lane) {
#pragma unroll
    for (int keys = 0; keys < BLOCK_N / 16; ++keys) {
        uint32_t left[4], right[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = packed<TYPE>(weights[8 * keys + 2 * i], weights[8 * keys + 2 * i + 1]);
#pragma unroll
        for (int slice = 0; slice < PADDED / 16; ++slice) {
            load_matrices_transposed(right, v + place_of(16 * keys + lane % 16, 2 * slice + lane / 16));
            warp_product<TYPE>(fragment(out, 2 * slice), left, right[0], right[1]);
            warp_product<TYPE>(fragment(out, 2 * slice + 1), left, right[2], right[3]);
        }
    }
}

TESSERA_KERNEL(THREADS) flash_attention_forward(
    const TYPE* q, const TYPE* k, const TYPE* v, TYPE* out, float* lse, float* top, float* spread,
    const int* query_starts, const int* key_starts, int64_t stride_qb, int64_t stride_qt, int64_t stride_qn,
    int64_t stride_kb, int64_t stride_kt, int64_t stride_kn, int64_t stride_vb, int64_t stride_vt, int64_t stride_vn,
    int64_t stride_ob, int64_t stride_ot, int64_t stride_on, int sequences, int queries, int keys, int heads, int group,
    int section, int blocks, int before, int after, int width, float unit, float inner) {
    TESSERA_SHARED(memory);
    Tiles& tiles = *reinterpret_cast<Tiles*>(memory);
    const Problem p = {query_starts, key_starts, sequences, queries, keys, heads, group, section, blocks, before, after};
    const Work w = work_of<BLOCK_M, BLOCK_N>(p, blockIdx.x);
    if (w.row >= w.q_length) return;
    const int steps = tiles_of<BLOCK_N>(w);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = w.row + 16 * warp;
    const int kv_head = w.head / p.group;
    const Rows q_rows = {q + w.batch * stride_qb + w.head * stride_qn + w.q_first * stride_qt, stride_qt, w.q_length, width};
    const Rows k_rows = {k + w.batch * stride_kb + kv_head * stride_kn + w.k_first * stride_kt, stride_kt, w.k_length, width};
    const Rows v_rows = {v + w.batch * stride_vb + kv_head * stride_vn + w.k_first * stride_vt, stride_vt, w.k_length, width};
    const uint32_t q_tile = shared_address(tiles.q) + warp * 16 * PADDED * 2;

    Softmax softmax;
    softmax.clear();
    float result[PADDED / 2], scores[BLOCK_N / 2], fade[2];
#pragma unroll
    for (int i = 0; i < PADDED / 2; ++i) result[i] = 0.0f;
    int column = w.low + (steps - 1) * BLOCK_N;
    if (steps > 0) {
        copy_rows<BLOCK_M>(shared_address(tiles.q), q_rows, w.row);
        copy_rows<BLOCK_N>(shared_address(tiles.k[0]), k_rows, column);
        copy_commit();
        copy_rows<BLOCK_N>(shared_address(tiles.v[0]), v_rows, column);
        copy_commit();
    }
    for (int step = 0; step < steps; ++step, column -= BLOCK_N) {
        const int now = step % 2, next = 1 - now;
        copy_wait<1>();  // K is there, V may be on its way
        sync_threads();
        if (step + 1 < steps) copy_rows<BLOCK_N>(shared_address(tiles.k[next]), k_rows, column - BLOCK_N);
        copy_commit();
        multiply_scores(scores, q_tile, shared_address(tiles.k[now]), lane);
        if (inner != 0.0f) cap(scores, inner);
        if (column < w.whole_low || column >= w.whole_high) hide(scores, w, p, row, column, lane);
        softmax.weigh(scores, unit, fade);
#pragma unroll
        for (int i = 0; i < PADDED / 2; ++i) result[i] *= fade[i / 2 % 2];
        copy_wait<1>();  // V is there, the next K may be on its way
        sync_threads();
        if (step + 1 < steps) copy_rows<BLOCK_N>(shared_address(tiles.v[next]), v_rows, column - BLOCK_N);
        copy_commit();
        multiply_values(result, scores, shared_address(tiles.v[now]), lane);
    }
    float factor[2];
    uint32_t pairs[PADDED / 4];
    softmax.finish(factor);
    pack_rows<TYPE>(pairs, result, factor);
    TYPE* to = out + w.batch * stride_ob + w.head * stride_on + (w.q_first + row) * stride_ot;
    store_rows(pairs, to, stride_ot, w.q_length - row, width, lane);
    store_statistics(softmax, w, p, row, lane, unit, lse, top, spread);
}
TESSERA_ENTRY(flash_attention_forward)
