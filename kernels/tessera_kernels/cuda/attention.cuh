// What both attention kernels share: which tile a block works on, which keys a query sees, the online softmax.
//
// Query t of a sequence with T queries and S keys stands at key position t + S - T. It sees the keys from `before`
// positions behind to `after` positions ahead of there: causal is after = 0, a window of w is before = w - 1.
#pragma once
#include "store_rows.cuh"

struct alignas(16) Numbers { float number[4]; };

constexpr float LN2 = 0.6931471805599453f;
constexpr float FUSED_BASE = 4096.0f;  // largest scaled score that a fused multiply-add may be taken relative to
constexpr float SLACK = 8.0f;  // a row's weights may grow to 2^8 before they are taken relative to a newer maximum

struct Problem {
    const int* query_starts;  // packed sequences: null when dense
    const int* key_starts;
    int sequences, queries, keys;  // rows of all sequences when packed, of each when dense
    int heads, group;              // query heads, and how many of them share a key/value head
    int section;                   // heads that run at one time and share the L2 cache
    int blocks;                    // tiles of queries of the longest sequence
    int before, after;
};

// One tile of queries of one head, and the tiles of keys that it sees: [low, high), of them [whole_low, whole_high)
// without any mask, all four multiples of the tile's keys but `high`.
struct Work {
    int sequence, head, batch;  // batch is 0 when packed
    int row, q_first, q_length;
    int k_first, k_length, past;
    int low, whole_low, whole_high, high;
};

TESSERA_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
TESSERA_DEVICE int larger(int a, int b) { return a > b ? a : b; }

// First row and length of a sequence; packed starts are held inside the tensor, so that bad ones cannot fault.
TESSERA_DEVICE void span(const int* starts, int sequence, int rows, int& first, int& length) {
    first = 0;
    length = rows;
    if (starts != nullptr) {
        first = smaller(larger(starts[sequence], 0), rows);
        length = smaller(larger(starts[sequence + 1], first), rows) - first;
    }
}

// The tile with this number; later queries come first, because when causal they see more keys.
template <int ROWS, int SPAN> TESSERA_DEVICE Work work_of(const Problem& p, int tile) {
    Work w;
    const int lanes = p.sequences * p.heads;
    const int section = tile / (p.section * p.blocks);
    const int inside = tile - section * p.section * p.blocks;
    const int size = smaller(p.section, lanes - section * p.section);
    const int which = section * p.section + inside % size;
    w.sequence = which / p.heads;
    w.head = which - w.sequence * p.heads;
    w.batch = p.query_starts == nullptr ? w.sequence : 0;
    w.row = (p.blocks - 1 - inside / size) * ROWS;
    span(p.query_starts, w.sequence, p.queries, w.q_first, w.q_length);
    span(p.key_starts, w.sequence, p.keys, w.k_first, w.k_length);
    w.past = w.k_length - w.q_length;
    const int last = smaller(w.row + ROWS, w.q_length) - 1 + w.past;  // key positions of the last and first query
    const int first = w.row + w.past;
    w.high = larger(smaller(w.k_length, last + p.after + 1), 0);
    w.low = larger(first - p.before, 0) / SPAN * SPAN;
    w.whole_high = larger(smaller(w.k_length, first + p.after + 1), 0) / SPAN * SPAN;
    w.whole_low = (larger(last - p.before, 0) + SPAN - 1) / SPAN * SPAN;
    return w;
}

template <int SPAN> TESSERA_DEVICE int tiles_of(const Work& w) {
    return w.row < w.q_length && w.low < w.high ? (w.high - w.low + SPAN - 1) / SPAN : 0;
}

// The tile that this block takes in a wave of gridDim.x; with `turning` every other wave runs backwards.
TESSERA_DEVICE int tile_of(int wave, int turning) {
    const int across = gridDim.x, place = blockIdx.x;
    return wave * across + (turning != 0 && wave % 2 != 0 ? across - 1 - place : place);
}

// Sums of one product as the left factor of the next: what a thread holds of one is what it must hold of the other.
template <class T, int COUNT>
TESSERA_DEVICE void round_fragments(uint32_t (&to)[COUNT / 8][4], const float (&from)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) to[i / 4][i % 4] = packed<T>(from[2 * i], from[2 * i + 1]);
}

// Rows and columns of the 16-row fragments that a thread of a warp holds: number i stands in row `fragment_row(i)`.
TESSERA_DEVICE int fragment_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
TESSERA_DEVICE int fragment_column(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

// The running state of the two rows that a thread has a share of.
struct Softmax {
    float top[2];    // what weights are relative to: a score, at most SLACK below the largest so far once scaled
    float total[2];  // sum of the weights of this thread's columns; `finish` adds up the row's

    TESSERA_DEVICE void clear() {
        top[0] = top[1] = -infinity();
        total[0] = total[1] = 0.0f;
    }

    // What a score is taken relative to, before scaling.
    TESSERA_DEVICE float raw(int half) const { return top[half] == -infinity() ? 0.0f : top[half]; }

    // Turn scores into weights in place, and give what older terms of each row shrink by; false when that is 1 for all rows
    // of the warp. Only a maximum more than SLACK above is worth those products, which is rare after a row's first scores.
    // Each row decides for itself, so that its bits do not depend on the rows beside it.
    template <int COUNT> TESSERA_DEVICE bool weigh(float (&scores)[COUNT], float unit, float (&fade)[2]) {
        float most[4] = {scores[0], scores[1], scores[2], scores[3]};  // two chains a row
#pragma unroll
        for (int i = 4; i < COUNT; ++i) most[i % 4] = fmaxf(most[i % 4], scores[i]);
        float base[2];
        bool moves[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float row = fmaxf(most[2 * half], most[2 * half + 1]);
            row = fmaxf(row, shuffle_xor(row, 1));
            row = fmaxf(row, shuffle_xor(row, 2));
            const float before = top[half];
            moves[half] = (row - before) * unit > SLACK;  // true where there was no score before
            if (moves[half]) top[half] = row;
            fade[half] = moves[half] ? exp2_fast((before - row) * unit) : 1.0f;
            total[half] *= fade[half];
            base[half] = raw(half) * unit;
        }
        // One multiply-add a score where the rounding of the base, common to a row and at most 2^-13, does no harm; the
        // difference first where that rounding would be the exponent.
        if (any_in_warp(!(fabsf(base[0]) <= FUSED_BASE) || !(fabsf(base[1]) <= FUSED_BASE)))
            raise<false>(scores, unit, base);
        else
            raise<true>(scores, unit, base);
        return any_in_warp(moves[0] || moves[1]);
    }

    // Weights and their sums together, so that additions run beside the unit that takes powers.
    template <bool FUSED, int COUNT> TESSERA_DEVICE void raise(float (&scores)[COUNT], float unit, const float (&base)[2]) {
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int half = i / 2 % 2;
            scores[i] = exp2_fast(FUSED ? fmaf(scores[i], unit, -base[half]) : (scores[i] - raw(half)) * unit);
            sums[i % 4] += scores[i];
        }
        total[0] += sums[0] + sums[1];
        total[1] += sums[2] + sums[3];
    }

    // Complete the sums, and give what out is multiplied by; a row that saw no key becomes 0.
    TESSERA_DEVICE void finish(float (&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            total[half] += shuffle_xor(total[half], 1);
            total[half] += shuffle_xor(total[half], 2);
            factor[half] = total[half] == 0.0f ? 0.0f : reciprocal_fast(total[half]);
        }
    }
};

template <int COUNT> TESSERA_DEVICE void cap(float (&scores)[COUNT], float inner) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) scores[i] = tanhf(scores[i] * inner);
}

// -inf where a query does not see the key. `row` and `column` are the fragment's own corner.
template <int COUNT>
TESSERA_DEVICE void hide(float (&scores)[COUNT], const Work& w, const Problem& p, int row, int column, int lane) {
    int least[2], most[2];  // columns that each of the thread's two rows sees, counted from the thread's first
    const int first = column + 2 * (lane % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int here = row + lane / 4 + 8 * half + w.past - first;  // where the query itself stands
        least[half] = here - p.before;
        most[half] = smaller(here + p.after, w.k_length - 1 - first);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int place = 8 * (i / 4) + i % 2;
        if (place < least[i / 2 % 2] || place > most[i / 2 % 2]) scores[i] = -infinity();
    }
}

// Write each row's lse, and what the backward needs: its largest score, and the log2 of its sum relative to that. Rows
// lie as (sequence, head, query), or (head, query) when packed.
TESSERA_DEVICE void store_statistics(
    const Softmax& s, const Work& w, const Problem& p, int row, int lane, float unit, float* lse, float* top,
    float* spread) {
    if (lane % 4 != 0) return;
    const int64_t first = p.query_starts == nullptr
                              ? (static_cast<int64_t>(w.sequence) * p.heads + w.head) * p.queries
                              : static_cast<int64_t>(w.head) * p.queries + w.q_first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int inside = row + lane / 4 + 8 * half;
        if (inside >= w.q_length) continue;
        const bool blind = s.total[half] == 0.0f;  // saw no key
        const float raw = s.raw(half), base = raw * unit, sum = log2_fast(s.total[half]);
        const float rounding = fabsf(base) <= FUSED_BASE ? fmaf(-raw, unit, base) : 0.0f;
        lse[first + inside] = blind ? -infinity() : (base + sum) * LN2;
        top[first + inside] = raw;
        spread[first + inside] = blind ? infinity() : sum + rounding;
    }
}

// Four numbers of a longer array, as one product's sums.
template <int COUNT> TESSERA_DEVICE float (&fragment(float (&numbers)[COUNT], int index))[4] {
    return *reinterpret_cast<float(*)[4]>(&numbers[4 * index]);
}
