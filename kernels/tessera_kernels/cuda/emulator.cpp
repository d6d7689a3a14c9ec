// What the threads of a cluster do together, and what happens in the background, on the CPU: see emulator.hpp.
//
// Adversarial: what happens in the background happens as late as it may, `copy_16` at the wait, `load_box` when nothing
// else can move (or, in every other pair of launches, at once), a store to another block at the cluster's barrier, a
// warpgroup's product at the wait that retires it; each destination is NaN in between, so that a buffer which is overwritten
// too early shows as well. Who arrives at another block's barrier goes on when nothing else can move: what was handed back too
// early is overwritten by then. The copy engine and the products have a view of shared memory of
// their own, which a thread's ordinary writes reach at a fence.
#include "emulator_engine.hpp"

// ---- numbers ----------------------------------------------------------------------------------------------------

namespace emulated {
namespace {

float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

}  // namespace

uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x);
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_f16(float x) {
    uint32_t bits = bits_of(x) & 0x7fffffff, sign = bits_of(x) >> 16 & 0x8000;
    if (x != x) return 0x7fff;
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65,520 is halfway to 2^16
    if (bits < 0x38800000)  // below 2^-14; adding 0.5 leaves the subnormal's bits, rounded, at the low end
        return static_cast<uint16_t>(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)));
    return static_cast<uint16_t>(sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13));
}

float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

float from_f16(uint16_t bits) {
    uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    float size = rest < 0x400 ? static_cast<float>(rest) * 0x1p-24f : float_of((rest << 13) + (112u << 23));
    return sign ? -size : size;
}

float from_low_e4m3(uint16_t bits) {
    int sign = bits >> 7 & 1, power = bits >> 3 & 15, rest = bits & 7;
    if (power == 15 && rest == 7) return NAN;
    float size = power == 0 ? ldexpf(static_cast<float>(rest), -9) : ldexpf(static_cast<float>(8 + rest), power - 10);
    return sign ? -size : size;
}
float from_high_e4m3(uint16_t bits) { return from_low_e4m3(static_cast<uint16_t>(bits >> 8)); }

namespace {

template <class Operation> uint32_t of_pairs(uint32_t a, uint32_t b, Operation operation) {
    uint32_t pair = 0;
    for (int half = 0; half < 32; half += 16) {
        float x = from_bf16(static_cast<uint16_t>(a >> half)), y = from_bf16(static_cast<uint16_t>(b >> half));
        pair |= static_cast<uint32_t>(to_bf16(operation(x, y))) << half;
    }
    return pair;
}

}  // namespace
}  // namespace emulated

uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    return of_pairs(a, b, [](float x, float y) { return x * y; });
}
uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    return of_pairs(a, b, [](float x, float y) { return x - y; });
}

namespace emulated {

// ---- threads ----------------------------------------------------------------------------------------------------

namespace {

struct NamedBarrier {
    int expected = 0, arrived = 0;
    unsigned round = 0;
    uint32_t lanes[MOST_THREADS / LANES] = {};  // of each warp, those that arrived
};
NamedBarrier named[MOST_BLOCKS][16];
int registers[MOST_CLUSTER_THREADS / LANES];  // what each warp asked for; 0 = never

void arrive_at(int id, int threads) {
    NamedBarrier& barrier = named[rank()][id];
    if (threads <= 0 || threads % LANES != 0 || threads > grid.num_threads)
        fail(text("barrier %d among %d threads: whole warps of this block are counted", id, threads));
    if (barrier.arrived > 0 && barrier.expected != threads)
        fail(text("barrier %d among %d threads, while others count %d", id, threads, barrier.expected));
    uint32_t& own = barrier.lanes[warp_in_block()];
    if (own >> lane() & 1) fail(text("barrier %d: this thread arrives twice in one round", id));
    barrier.expected = threads;
    own |= 1u << lane();
    if (++barrier.arrived < threads) return;
    for (uint32_t& lanes : barrier.lanes) {
        if (lanes != 0 && ~lanes != 0) fail(text("barrier %d: only some lanes of a warp arrived", id));
        lanes = 0;
    }
    barrier.arrived = 0;
    ++barrier.round;
}

void sync_at(int id, int threads) {
    NamedBarrier& barrier = named[rank()][id];
    unsigned round = barrier.round;
    arrive_at(id, threads);
    wait_until([&barrier, round] { return barrier.round != round; }, [&barrier, id] {
        return text("barrier %d (%d of %d threads are there)", id, barrier.arrived, barrier.expected);
    });
}

int named_by_kernel(int id) {
    if (id < 1 || id > 15) fail(text("barrier %d: a kernel names 1 to 15, 0 is sync_threads", id));
    return id;
}

}  // namespace

unsigned char* shared() { return shared_memory[rank()] + SHARED_START; }
void sync_block() { sync_at(0, grid.num_threads); }
void sync_named(int id, int threads) { sync_at(named_by_kernel(id), threads); }
void arrive_named(int id, int threads) { arrive_at(named_by_kernel(id), threads); }
void set_registers(int count) {
    together("setmaxnreg");
    registers[warp()] = count;
}

}  // namespace emulated

void sync_warp() { together("sync_warp"); }

template <class T> T exchanged(T x, int mask) {
    struct Item { T given, found; } item{x, T{}};
    together("shuffle_xor", item, [mask](Item** items) {
        for (int i = 0; i < LANES; ++i) items[i]->found = items[i ^ (mask & 31)]->given;
    });
    return item.found;
}

float shuffle_xor(float x, int mask) { return exchanged(x, mask); }
uint32_t shuffle_xor(uint32_t x, int mask) { return exchanged(x, mask); }

int same_in_warp(int x) {
    together("same_in_warp", x, [](int** items) {
        for (int i = 1; i < LANES; ++i) *items[i] = *items[0];
    });
    return x;
}

// ---- memory -----------------------------------------------------------------------------------------------------

namespace emulated {
namespace {

struct Copy16 {
    uint32_t to;
    const void* from;
    int valid;
};
struct Copies {
    std::vector<Copy16> open;
    std::vector<std::vector<Copy16>> groups;
};
std::vector<Copies> copies;  // of each thread

void finish(const Copy16& copy) {
    unsigned char* to = shared_at(copy.to, 16, 16, "copy_16");
    memset(to, 0, 16);
    memcpy(to, copy.from, static_cast<size_t>(copy.valid));
}

}  // namespace

void expect_aligned(const void* pointer, const char* what, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
        fail(text("%s: address %p, not a multiple of %u", what, pointer, bytes));
}

void copy_wait(int pending) { retire(copies[static_cast<size_t>(thread())].groups, pending, finish); }

}  // namespace emulated

uint32_t shared_address(const void* pointer) { return address_of(pointer); }

void copy_16(uint32_t to, const void* from, int valid) {
    if (valid < 0 || valid > 16) fail(text("copy_16: %d valid bytes of 16", valid));
    expect_aligned(from, "copy_16");
    memset(shared_at(to, 16, 16, "copy_16"), POISON, 16);
    copies[static_cast<size_t>(thread())].open.push_back({to, from, valid});
}

void copy_commit() {
    Copies& mine = copies[static_cast<size_t>(thread())];
    mine.groups.emplace_back(std::move(mine.open));
    mine.open.clear();
}

// ---- products of one warp ---------------------------------------------------------------------------------------

namespace emulated {
namespace {

constexpr int MOST_COLUMNS = 256;
using Left = float[16][16];
using Right = float[16][MOST_COLUMNS];

void unpack_left(Left& a, const uint32_t* const (&fragments)[LANES], Lift lift) {
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < 4; ++j)
            for (int half = 0; half < 2; ++half)
                a[i / 4 + 8 * (j % 2)][2 * (i % 4) + 8 * (j / 2) + half] =
                    lift(static_cast<uint16_t>(fragments[i][j] >> 16 * half));
}

// d [16, columns] (+)= a b, d spread over the lanes as device.cuh says.
void multiply(float* const (&d)[LANES], const Left& a, const Right& b, int columns, bool keep) {
    static float sum[16][MOST_COLUMNS];
    auto at = [](int i, int j) -> float& { return sum[i / 4 + 8 * (j / 2 % 2)][8 * (j / 4) + 2 * (i % 4) + j % 2]; };
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < columns / 2; ++j) at(i, j) = keep ? d[i][j] : 0.0f;
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < columns; ++n) sum[row][n] += a[row][k] * b[k][n];
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < columns / 2; ++j) d[i][j] = at(i, j);
}

}  // namespace

void load_matrices(uint32_t (&to)[4], uint32_t row, bool transposed) {
    struct Item { uint32_t row; uint32_t* to; } item{row, to};
    together(transposed ? "ldmatrix.trans" : "ldmatrix", item, [transposed](Item** items) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t number[8][8];
            for (int i = 0; i < 8; ++i) memcpy(number[i], shared_at(items[8 * matrix + i]->row, 16, 16, "ldmatrix"), 16);
            for (int i = 0; i < LANES; ++i) {
                int one = i / 4, two = 2 * (i % 4);
                uint32_t low = transposed ? number[two][one] : number[one][two];
                uint32_t high = transposed ? number[two + 1][one] : number[one][two + 1];
                items[i]->to[matrix] = low | high << 16;
            }
        }
    });
}

void warp_product(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Lift lift) {
    struct Item { float* d; const uint32_t* a; uint32_t b[2]; } item{d, a, {b0, b1}};
    together("mma", item, [lift](Item** items) {
        Left left;
        Right right;
        float* sums[LANES];
        const uint32_t* fragments[LANES];
        for (int i = 0; i < LANES; ++i) {
            sums[i] = items[i]->d;
            fragments[i] = items[i]->a;
            for (int j = 0; j < 4; ++j)
                right[8 * (j / 2) + 2 * (i % 4) + j % 2][i / 4] =
                    lift(static_cast<uint16_t>(items[i]->b[j / 2] >> 16 * (j % 2)));
        }
        unpack_left(left, fragments, lift);
        multiply(sums, left, right, 8, true);
    });
}

uint32_t transposed(uint32_t pair) {
    struct Item { uint32_t given, found; } item{pair, 0};
    together("movmatrix", item, [](Item** items) {
        uint16_t number[8][8];
        for (int i = 0; i < LANES; ++i)
            for (int j = 0; j < 2; ++j) number[i / 4][2 * (i % 4) + j] = static_cast<uint16_t>(items[i]->given >> 16 * j);
        for (int i = 0; i < LANES; ++i)
            items[i]->found = number[2 * (i % 4)][i / 4] | static_cast<uint32_t>(number[2 * (i % 4) + 1][i / 4]) << 16;
    });
    return item.found;
}

}  // namespace emulated

// ---- products of a warpgroup ------------------------------------------------------------------------------------
// Each warp has its 16 rows, its own groups and its own wait: it learns nothing about the other three.

namespace emulated {
namespace {

struct GroupProduct {
    uint64_t a, b;
    int columns;
    bool keep, flipped;  // flipped: what comes from shared memory is MN-major
    Lift lift, second;
    const uint32_t* left[LANES];  // where a comes from registers
    float* d[LANES];
};
struct GroupWarp {
    std::vector<GroupProduct> open;
    std::vector<std::vector<GroupProduct>> groups;
    bool fenced = false;
    std::string issued;  // descriptors so far, to hold beside the other warps'
};
std::vector<GroupWarp> group_warps;  // by the warp's number in the cluster

struct Tile {
    uint32_t start, leading, stride;
    explicit Tile(uint64_t descriptor)
        : start((descriptor & 0x3fff) << 4), leading((descriptor >> 16 & 0x3fff) << 4),
          stride((descriptor >> 32 & 0x3fff) << 4) {
        if (descriptor >> 62 != 1) fail("wgmma: a descriptor without the 128-byte swizzle");
        if (start % 1024 >= 128 || (descriptor >> 49 & 7) != 0)
            fail(text("wgmma: a tile at shared byte %d, inside a group of 1,024 bytes", int(start - SHARED_START)));
    }
    // Numbers 8 i to 8 i + 7 of row `row`; panels of 64 numbers, groups of 8 rows.
    const uint16_t* piece(int row, int i) const {
        uint32_t address = start + unsigned(row / 8) * stride + unsigned(row % 8 * 128 + i % 8 * 16) + unsigned(i / 8) * leading;
        return reinterpret_cast<const uint16_t*>(engine_at(swizzled(address), 16, 16, "wgmma"));
    }
};

constexpr const char* ACROSS = "wgmma: 16 numbers across the end of a row of 128 bytes";

void execute(const GroupProduct& product) {
    static Left left;
    static Right right;
    Tile b(product.b);
    if (product.flipped) {
        if (b.start % 128 != 0) fail("wgmma: an MN-major tile that does not begin with its row");
        if (product.left[0] != nullptr) {
            unpack_left(left, product.left, product.lift);
        } else {
            Tile a(product.a);
            if (a.start % 128 != 0) fail("wgmma: an MN-major tile that does not begin with its row");
            for (int k = 0; k < 16; ++k)
                for (int m = 0; m < 16; ++m) {
                    int row = 16 * (warp_in_block() % 4) + m;
                    left[m][k] = product.lift(a.piece(k, row / 8)[row % 8]);
                }
        }
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < product.columns; ++n) right[k][n] = product.lift(b.piece(k, n / 8)[n % 8]);
    } else {
        if (b.start % 128 > 96) fail(ACROSS);
        if (product.left[0] != nullptr) {
            unpack_left(left, product.left, product.lift);
        } else {
            Tile a(product.a);
            if (a.start % 128 > 96) fail(ACROSS);
            for (int k = 0; k < 16; ++k)
                for (int m = 0; m < 16; ++m) left[m][k] = product.lift(a.piece(16 * (warp_in_block() % 4) + m, k / 8)[k % 8]);
        }
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < product.columns; ++n) right[k][n] = product.lift(b.piece(n, k / 8)[k % 8]);
    }
    multiply(product.d, left, right, product.columns, product.keep);
    if (product.second != nullptr) {  // the other half of the terms
        GroupProduct rest = product;
        rest.lift = product.second;
        rest.second = nullptr;
        rest.keep = true;
        execute(rest);
    }
}

void begin_cluster() {
    const auto threads = static_cast<size_t>(threads_in_cluster());
    copies.assign(threads, Copies{});
    adds.assign(threads, Adds{});
    far_stores.assign(threads, {});
    group_warps.assign(threads / LANES, GroupWarp{});
    memset(registers, 0, sizeof(registers));
    memset(awaited, 0, sizeof(awaited));
    whole.arrived = 0;
    boxes.clear();
    paused.clear();
    for (int block = 0; block < grid.num_blocks; ++block) {
        for (NamedBarrier& barrier : named[block]) barrier = NamedBarrier{};
        memset(engine_memory[block], POISON, SHARED_START + grid.shared_bytes);
        fenced_since[block] = false;
        phased[block].clear();
    }
}

void check_warps_end(int block, const std::string& where) {
    const int warps = grid.num_threads / LANES, first = block * warps;
    int sum = 0, asked = 0;
    for (int i = 0; i < warps; ++i) {
        const GroupWarp& mine = group_warps[static_cast<size_t>(first + i)];
        if (!mine.open.empty() || !mine.groups.empty()) throw Error{where + text("products of warp %d under way", i)};
        if (i % 4 != 0 && mine.issued != group_warps[static_cast<size_t>(first + i - 1)].issued)
            throw Error{where + text("warps %d and %d of one warpgroup having asked for different products", i - 1, i)};
        sum += LANES * registers[first + i];
        asked += registers[first + i] != 0;
    }
    if (warps % 4 != 0 && !group_warps[static_cast<size_t>(first + warps - 1)].issued.empty())
        throw Error{where + "an incomplete warpgroup"};
    if (asked == warps && sum > 65536) throw Error{where + text("%d registers asked for, of 65536", sum)};
}

void check_block_end(int block) {
    const std::string where = title(grid.blocks[block].index) + " ended with ";
    const int first = block * grid.num_threads;
    for (int i = first; i < first + grid.num_threads; ++i) {
        const Adds& mine = adds[static_cast<size_t>(i)];
        if (!mine.open.empty() || !mine.groups.empty()) throw Error{where + "bulk additions under way"};
    }
    int to_it = 0;
    for (const Box& box : boxes) to_it += box.block == block;
    if (to_it > 0) throw Error{where + text("%d boxes under way to it", to_it)};
    for (const auto& stores : far_stores)
        for (const FarStore& store : stores)
            if (store.block == block) throw Error{where + "a store_16_at under way to it"};
    check_warps_end(block, where);
}

}  // namespace

void group_product(
    float* d, const uint32_t* a, uint64_t a_tile, uint64_t b_tile, int columns, bool keep, bool flipped, Lift lift, Lift second) {
    struct Item { GroupProduct product; const uint32_t* a; float* d; };
    Item item{{a_tile, b_tile, columns, keep, flipped, lift, second, {}, {}}, a, d};
    together("wgmma", item, [](Item** items) {
        GroupWarp& mine = group_warps[warp()];
        GroupProduct whole = items[0]->product;
        if (!mine.fenced) fail("wgmma without a group_fence since the last group_commit");
        for (int i = 0; i < LANES; ++i) {
            const GroupProduct& other = items[i]->product;
            if (other.a != whole.a || other.b != whole.b || other.keep != whole.keep || other.columns != whole.columns)
                fail("wgmma: the lanes of a warp differ in descriptor, width or keep");
            whole.left[i] = items[i]->a;
            whole.d[i] = items[i]->d;
        }
        mine.issued += text("%llx %llx %d %d;", (unsigned long long)whole.a, (unsigned long long)whole.b, whole.keep,
                            whole.columns);
        mine.open.push_back(whole);
    });
}

void group_wait(int pending) {
    int nothing = 0;
    together("wgmma.wait_group", nothing, [pending](int**) { retire(group_warps[warp()].groups, pending, execute); });
}

}  // namespace emulated

void group_fence() {
    int nothing = 0;
    together("wgmma.fence", nothing, [](int**) { group_warps[warp()].fenced = true; });
}

void group_commit() {
    int nothing = 0;
    together("wgmma.commit_group", nothing, [](int**) {
        GroupWarp& mine = group_warps[warp()];
        mine.groups.emplace_back(std::move(mine.open));
        mine.open.clear();
        mine.fenced = false;
    });
}
