// Float32 logits of two models for some rows, and what each row's softmax needs of each 256 ids, in one launch, for sm_90a.
//
//     z = hidden head^T        top = max z,  mass = sum e^((z - top) / tau)        per row and tile of ids
//     and of one model, without the label's id:  rest = sum e^(z - top),  moment = sum z e^(z - top)
//
//     ids ->                       HBM        hidden states and heads by the copy engine; logits [rows, padded] and sums
//   +-------+-------+                         [2 or 4, tiles of ids, rows] written from registers
// X | tile  | tile  | 128 x 256    shared     STAGES x 64 terms of both factors (`product_ring.cuh`)
//   +-------+-------+              registers  [64, 256] float32 a warpgroup: its sums are taken and written while the other
//   rows go fastest: a head                   multiplies; two blocks of a cluster have the same ids
//   is read once
//
// The model of more terms comes first, so that the short tiles of the other fill the end.
// Reference: tessera_kernels.reference.linear_distillation; the same numbers in Triton: `_logit_tiles.summed_logit_tiles`.
//
// Defined by the host: TYPE (bf16, f16), LABEL (int, int64_t), STAGES and PAIR (`product_ring.cuh`).
#include "product_ring.cuh"

constexpr float LOWEST = -1e30f;  // of ids behind the vocabulary; finite, as differences of two must be numbers
constexpr float LOG2_E = 1.4426950408889634f;

struct Model {
    float *logits, *sums;
    int width, counts;  // counts: rest and moment too
};

struct Problem {
    Model first, second;
    const LABEL* labels;
    int rows, vocab, padded, blocks_x, blocks_v, cold;  // blocks_x: of a cluster's rows; cold: the temperature is not 1
    float unit;                                         // log2 e / tau

    TESSERA_DEVICE int count() const { return 2 * blocks_x * blocks_v; }
};

struct Work {
    bool is_first;
    int row, block;

    TESSERA_DEVICE Work(const Problem& p, int item) {
        const int half = p.blocks_x * p.blocks_v, inside = item % half;
        is_first = item < half;
        row = (inside % p.blocks_x * PAIR + own_rank()) * ROWS;
        block = inside / p.blocks_x;
    }
    TESSERA_DEVICE Model of(const Problem& p) const { return is_first ? p.first : p.second; }
};

TESSERA_DEVICE int steps_of(const Model& model) { return (model.width + TERMS - 1) / TERMS; }

TESSERA_DEVICE void copy_all(
    Ring& ring, const Problem& p, const TensorMap* first_hidden, const TensorMap* first_head, const TensorMap* second_hidden,
    const TensorMap* second_head) {
    Turn<STAGES> turn;
    for (int item = first_item(); item < p.count(); item = item_after(item)) {
        const Work w(p, item);
        const TensorMap *hidden = w.is_first ? first_hidden : second_hidden, *head = w.is_first ? first_head : second_head;
        const int steps = steps_of(w.of(p));
        for (int step = 0; step < steps; ++step, turn.next())
            load_factors(ring, turn, hidden, w.row, head, w.block * COLUMNS, step * TERMS);
    }
}

// Over the four lanes that share a row.
TESSERA_DEVICE float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
TESSERA_DEVICE float row_top(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

// One of a thread's two rows: numbers 4 i + 2 HALF and the next, ids 8 i + {0, 1} from `id` on.
template <int HALF, bool COUNTS, bool COLD>
TESSERA_DEVICE void finish_row(const Sums& z, const Problem& p, const Model& model, int block, int row, int id) {
    const bool is_row = row < p.rows;
    float top = LOWEST, mass[2] = {0.0f, 0.0f}, rest[2] = {0.0f, 0.0f}, moment[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; ++i) top = fmaxf(top, z[i / 2 * 4 + 2 * HALF + i % 2]);
    top = row_top(top);
    int own = -1;  // the label's place behind `id`
    if constexpr (COUNTS) {
        const int64_t label = is_row ? static_cast<int64_t>(p.labels[row]) - id : -1;
        own = label >= 0 && label < COLUMNS ? static_cast<int>(label) : -1;
    }
    float* logits = model.logits + static_cast<int64_t>(row) * p.padded + id;
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; ++i) {
        const float pair[2] = {z[4 * i + 2 * HALF], z[4 * i + 2 * HALF + 1]};
        store_8(is_row && id + 8 * i < p.padded, logits + 8 * i, pair[0], pair[1]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float e = exp2_fast((pair[j] - top) * p.unit);
            mass[j] += e;
            if constexpr (COUNTS) {
                float cold = COLD ? exp2_fast((pair[j] - top) * LOG2_E) : e;
                if (own == 8 * i + j) cold = 0.0f;
                rest[j] += cold;
                moment[j] += cold * pair[j];
            }
        }
    }
    const int64_t step = static_cast<int64_t>(p.blocks_v) * p.rows;
    float* sums = model.sums + static_cast<int64_t>(block) * p.rows + row;
    const float all = row_sum(mass[0] + mass[1]);
    const bool writes = is_row && threadIdx.x % 4 == 0;
    if (writes) {
        sums[0] = top;
        sums[step] = all;
    }
    if constexpr (COUNTS) {
        const float others = row_sum(rest[0] + rest[1]), moments = row_sum(moment[0] + moment[1]);
        if (writes) {
            sums[2 * step] = others;
            sums[3 * step] = moments;
        }
    }
}

template <bool COUNTS, bool COLD>
TESSERA_DEVICE void finish(const Sums& z, const Problem& p, const Model& model, int block, int row, int id) {
    finish_row<0, COUNTS, COLD>(z, p, model, block, row, id);
    finish_row<1, COUNTS, COLD>(z, p, model, block, row + 8, id);
}

TESSERA_DEVICE void multiply_all(Ring& ring, const Problem& p) {
    const int group = same_in_warp(static_cast<int>(threadIdx.x) / 128) - 1;
    const int thread = threadIdx.x % 128, lane = thread % 32, inside = group * 64 + thread / 32 * 16 + lane / 4;
    Turn<STAGES> turn;
    if (first_item() < p.count()) fall_behind(ring, group, steps_of(Work(p, first_item()).of(p)));
    for (int item = first_item(); item < p.count(); item = item_after(item)) {
        const Work w(p, item);
        const Model model = w.of(p);
        Sums z;
        multiply<TYPE>(z, ring, turn, steps_of(model), group);
        const int id = w.block * COLUMNS + lane % 4 * 2;
        if ((w.block + 1) * COLUMNS > p.vocab) {
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i)
                if (id + 8 * (i / 4) + i % 2 >= p.vocab) z[i] = LOWEST;
        }
        if (model.counts == 0)
            finish<false, false>(z, p, model, w.block, w.row + inside, id);
        else if (p.cold == 0)
            finish<true, false>(z, p, model, w.block, w.row + inside, id);
        else
            finish<true, true>(z, p, model, w.block, w.row + inside, id);
    }
}

TESSERA_CLUSTER_KERNEL(PAIR, THREADS) linear_logits(
    const TESSERA_GRID_CONSTANT TensorMap first_hidden, const TESSERA_GRID_CONSTANT TensorMap first_head,
    const TESSERA_GRID_CONSTANT TensorMap second_hidden, const TESSERA_GRID_CONSTANT TensorMap second_head, float* first_logits,
    float* second_logits, float* first_sums, float* second_sums, const LABEL* labels, int first_width, int second_width,
    int first_counts, int second_counts, int rows, int vocab, int padded, int blocks_x, int blocks_v, int cold, float unit) {
    TESSERA_SHARED(memory);
    Ring& ring = *reinterpret_cast<Ring*>(memory);
    const Problem p = {{first_logits, first_sums, first_width, first_counts}, {second_logits, second_sums, second_width, second_counts},
                       labels, rows, vocab, padded, blocks_x, blocks_v, cold, unit};
    if (threadIdx.x == 0) {
        ring.begin();
        prefetch_map(&first_hidden);
        prefetch_map(&first_head);
        prefetch_map(&second_hidden);
        prefetch_map(&second_head);
    }
    all_begin();
    if (threadIdx.x < 128) {
        fewer_registers<SPARED>();
        if (threadIdx.x == 0) copy_all(ring, p, &first_hidden, &first_head, &second_hidden, &second_head);
    } else {
        more_registers<REGISTERS>();
        multiply_all(ring, p);
    }
    all_end();
}
TESSERA_ENTRY(linear_logits)
