// What the threads of a cluster do together, and what happens in the background, on the CPU: see emulator.hpp.
//
// Adversarial: what happens in the background happens as late as it may, `copy_16` at the wait, `load_box` when nothing
// else can move (or, in every other pair of launches, at once), a store to another block at the cluster's barrier, a
// warpgroup's product at the wait that retires it; each destination is NaN in between, so that a buffer which is overwritten
// too early shows as well. Who arrives at another block's barrier goes on when nothing else can move: what was handed back too
// early is overwritten by then. The copy engine and the products have a view of shared memory of
// their own, which a thread's ordinary writes reach at a fence.
#include "emulator_block.hpp"

#include <map>

using namespace emulated;

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

// The oldest groups up to all but `pending`, in order.
template <class Group, class Finish> void retire(std::vector<Group>& groups, int pending, Finish finish) {
    if (static_cast<int>(groups.size()) <= pending) return;
    auto end = groups.end() - pending;
    for (auto group = groups.begin(); group != end; ++group)
        for (auto& one : *group) finish(one);
    groups.erase(groups.begin(), end);
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

// ---- barriers in shared memory, and the copy engine -------------------------------------------------------------

namespace {

constexpr uint64_t MAP_MARK = 0x7e55e7a0b0c5ull, BARRIER_MARK = 0x7e55e7a0ba77ull;

// What the copy engine and warpgroup products see of shared memory: their own writes at once, the threads' ordinary ones
// only after a fence.
alignas(1024) BlockMemory engine_memory[MOST_BLOCKS];
bool fenced_since[MOST_BLOCKS];

unsigned char* engine_at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
    shared_at(address, bytes, alignment, what);
    const int block = rank();
    if (fenced_since[block]) memcpy(engine_memory[block], shared_memory[block], SHARED_START + grid.shared_bytes);
    fenced_since[block] = false;
    return engine_memory[block] + address;
}

void engine_write(int block, uint32_t address, const void* from, size_t bytes) {  // nullptr: NaN, until the data arrives
    for (unsigned char* memory : {shared_memory[block], engine_memory[block]})
        if (from == nullptr) memset(memory + address, POISON, bytes);
        else memcpy(memory + address, from, bytes);
}

struct Phased {
    int count, pending;
    long bytes;
    unsigned phase;
    int maker;
    bool announced;
};
std::map<uint32_t, Phased> phased[MOST_BLOCKS];  // by shared address

struct Box {
    TensorMap map;
    uint32_t to, barrier;
    int corner[4];
    const void* row = nullptr;  // of load_bulk, which has no map
    uint32_t bytes = 0;
    int block = 0;  // whose memory and barrier these are: its rank in the cluster
};
std::vector<Box> boxes;                  // under way
uint32_t awaited[MOST_CLUSTER_THREADS];  // the barrier of its block each thread waits for; 0 = none

uint32_t box_bytes(const TensorMap& map) { return map.itemsize * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }

struct BulkAdd {
    float* to;
    uint32_t from;
    int bytes;
};
struct Adds {
    std::vector<BulkAdd> open;
    std::vector<std::vector<BulkAdd>> groups;
};
std::vector<Adds> adds;  // of each thread

void add(const BulkAdd& one) {
    const auto* from = reinterpret_cast<const float*>(engine_at(one.from, static_cast<uint32_t>(one.bytes), 16, "add_bulk"));
    for (int i = 0; i < one.bytes / 4; ++i) one.to[i] += from[i];
}

// The barrier that lies at `address` in one block of the cluster.
Phased& barrier_at(int block, uint32_t address, const char* what) {
    auto found = phased[block].find(address);
    if (found == phased[block].end())
        fail(text("%s: no barrier at shared byte %u%s: not initialized", what, address - SHARED_START,
                  block == rank() ? "" : text(" of block %d of the cluster", block).c_str()));
    shared_at(address, 8, 8, what);
    uint64_t word;
    memcpy(&word, shared_memory[block] + address, 8);
    if (word != BARRIER_MARK) fail(text("%s: the barrier at shared byte %u was overwritten", what, address - SHARED_START));
    return found->second;
}

void settle(Phased& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.count;
    ++barrier.phase;
}

void expect_announced(const Phased& barrier, const char* what) {
    if (!barrier.announced) fail(text("%s: its barrier was initialized, but no barrier_init_done followed", what));
}

void arrive(int block, uint32_t address, int bytes, const char* what) {
    Phased& barrier = barrier_at(block, address, what);
    if (barrier.pending == 0)
        fail(text("%s: more than %d arrivals in one phase of the barrier at shared byte %u", what, barrier.count,
                  address - SHARED_START));
    barrier.bytes += bytes;
    --barrier.pending;
    settle(barrier);
}

// 16-byte piece i of a row of 128 bytes lies at piece i ^ (row % 8), by the bits of the address itself.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void fill_box(const Box& box, bool with_data) {
    if (box.row != nullptr) {
        engine_write(box.block, box.to, with_data ? box.row : nullptr, box.bytes);
        return;
    }
    const TensorMap& map = box.map;
    uint32_t row = 0;
    for (uint32_t i3 = 0; i3 < map.box[3]; ++i3)
        for (uint32_t i2 = 0; i2 < map.box[2]; ++i2)
            for (uint32_t i1 = 0; i1 < map.box[1]; ++i1, ++row)
                for (uint32_t i0 = 0; i0 < map.box[0]; ++i0) {
                    static const uint64_t zero = 0;
                    uint32_t steps[4] = {i0, i1, i2, i3};
                    uint64_t from = map.base;
                    bool inside = true;
                    for (int d = 0; d < 4; ++d) {
                        uint32_t at = static_cast<uint32_t>(box.corner[d]) + steps[d];  // a negative one is huge here
                        inside = inside && at < map.sizes[d];
                        from += (d == 0 ? map.itemsize : map.strides[d - 1]) * at;
                    }
                    const void* number = inside ? reinterpret_cast<const void*>(from) : &zero;
                    uint32_t to = swizzled(box.to + 128 * row + map.itemsize * i0);
                    engine_write(box.block, to, with_data ? number : nullptr, map.itemsize);
                }
}

void land(const Box& box) {
    fill_box(box, true);
    Phased& barrier = phased[box.block].at(box.barrier);
    barrier.bytes -= box.bytes;
    settle(barrier);
}

// A copy lands at once in every other pair of launches; else when nothing else can move.
void begin(const Box& box) {
    fill_box(box, false);
    if (grid.prompt)
        land(box);
    else
        boxes.push_back(box);
}

bool deliver_late_copy() {
    for (size_t i = boxes.size(); i-- > 0;)
        for (int thread = 0; thread < grid.num_threads; ++thread)
            if (awaited[boxes[i].block * grid.num_threads + thread] == boxes[i].barrier) {
                Box box = boxes[i];
                boxes.erase(boxes.begin() + static_cast<long>(i));
                land(box);
                return true;
            }
    return false;
}

void expect_map(const TensorMap* map) {
    if (map->mark != MAP_MARK) fail("a tensor map that tensor_map of _launch.py did not make");
}

}  // namespace
}  // namespace emulated

void barrier_init(uint64_t* barrier, int arrivals) {
    uint32_t address = address_of(barrier);
    auto& own = phased[rank()];
    if (own.count(address)) fail("barrier_init: initialized a second time");
    if (arrivals < 1) fail("barrier_init: fewer than 1 arrival");
    memcpy(shared_at(address, 8, 8, "barrier_init"), &BARRIER_MARK, 8);
    own[address] = {arrivals, arrivals, 0, 0, thread(), false};
}

void barrier_init_done() {
    for (auto& one : phased[rank()])
        if (one.second.maker == thread()) one.second.announced = true;
}

void barrier_arrive(uint64_t* barrier) { arrive(rank(), address_of(barrier), 0, "barrier_arrive"); }

void barrier_expect(uint64_t* barrier, int bytes) {
    if (bytes < 0 || bytes >= 1 << 20) fail(text("barrier_expect: %d bytes", bytes));
    arrive(rank(), address_of(barrier), bytes, "barrier_expect");
}

void barrier_wait(uint64_t* pointer, int parity) {
    uint32_t address = address_of(pointer);
    Phased& barrier = barrier_at(rank(), address, "barrier_wait");
    awaited[thread()] = address;
    wait_until([&barrier, parity] { return (barrier.phase & 1) != (static_cast<unsigned>(parity) & 1); }, [&] {
        return text("parity %d of the barrier at shared byte %u (in phase %u, %d of %d arrivals and %ld bytes missing)",
                    parity & 1, address - SHARED_START, barrier.phase, barrier.pending, barrier.count, barrier.bytes);
    });
    awaited[thread()] = 0;
}

void load_box(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    expect_map(map);
    Box box{*map, address_of(to), address_of(barrier), {c0, c1, c2, c3}, nullptr, box_bytes(*map), rank()};
    expect_announced(barrier_at(box.block, box.barrier, "load_box"), "load_box");
    shared_at(box.to, box.bytes, 128, "load_box");
    begin(box);
}

void load_bulk(void* to, const void* from, uint64_t* barrier, int bytes) {
    expect_aligned(from, "load_bulk");
    if (bytes <= 0 || bytes % 16 != 0) fail(text("load_bulk: %d bytes, not a multiple of 16", bytes));
    Box box{{}, address_of(to), address_of(barrier), {}, from, static_cast<uint32_t>(bytes), rank()};
    expect_announced(barrier_at(box.block, box.barrier, "load_bulk"), "load_bulk");
    shared_at(box.to, box.bytes, 16, "load_bulk");
    begin(box);
}

void add_bulk(float* to, const void* from, int bytes) {
    expect_aligned(to, "add_bulk");
    if (bytes <= 0 || bytes % 16 != 0) fail(text("add_bulk: %d bytes, not a multiple of 16", bytes));
    adds[static_cast<size_t>(thread())].open.push_back({to, address_of(from), bytes});
}

void bulk_commit() {
    Adds& mine = adds[static_cast<size_t>(thread())];
    mine.groups.emplace_back(std::move(mine.open));
    mine.open.clear();
}

namespace emulated {
void bulk_wait_read(int pending) { retire(adds[static_cast<size_t>(thread())].groups, pending, add); }
}  // namespace emulated

void fence_for_engine() { fenced_since[rank()] = true; }

void prefetch_map(const TensorMap* map) { expect_map(map); }

// ---- blocks of a cluster ----------------------------------------------------------------------------------------

namespace emulated {
namespace {

struct Together {
    int arrived = 0;
    unsigned round = 0;
};
Together whole;  // the cluster's barrier

struct FarStore {
    int block;
    uint32_t to;
    Words x;
};
std::vector<std::vector<FarStore>> far_stores;  // of each thread, under way

// A block of the cluster that has threads: the memory of one that ended is another cluster's by now.
int living_block(int block, const char* what) {
    if (block < 0 || block >= grid.num_blocks) fail(text("%s: block %d of a cluster of %d", what, block, grid.num_blocks));
    if (grid.blocks[block].running == 0)
        fail(text("%s: all threads of block %d of the cluster have ended, and its shared memory with them", what, block));
    return block;
}

std::vector<bool*> paused;  // threads that go on when no other can; true = it does

void let_others_go_on() {
    bool over = false;
    paused.push_back(&over);
    wait_until([&over] { return over; }, [] { return std::string("its turn"); });
}

bool go_on_in_background() {
    if (paused.empty()) return deliver_late_copy();
    *paused.front() = true;
    paused.erase(paused.begin());
    return true;
}

void land(const FarStore& store) { memcpy(shared_memory[store.block] + store.to, &store.x, sizeof(Words)); }

}  // namespace
}  // namespace emulated

int rank_in_cluster() { return rank(); }

void sync_cluster() {
    auto& mine = far_stores[static_cast<size_t>(thread())];
    for (const FarStore& store : mine) land(store);
    mine.clear();
    const unsigned round = whole.round;
    if (++whole.arrived == threads_in_cluster()) {
        whole.arrived = 0;
        ++whole.round;
    }
    wait_until([round] { return whole.round != round; },
               [] { return text("sync_cluster (%d of %d threads are there)", whole.arrived, threads_in_cluster()); });
}

void barrier_arrive_at(uint64_t* barrier, int rank) {
    const int block = living_block(rank, "barrier_arrive_at");
    expect_announced(barrier_at(block, address_of(barrier), "barrier_arrive_at"), "barrier_arrive_at");
    arrive(block, address_of(barrier), 0, "barrier_arrive_at");
    if (!grid.prompt) let_others_go_on();
}

void store_16_at(int rank, void* to, const Words& x) {
    const FarStore store{living_block(rank, "store_16_at"), address_of(to), x};
    shared_at(store.to, sizeof(Words), 16, "store_16_at");
    if (grid.prompt || rank == emulated::rank()) return land(store);
    memset(shared_memory[store.block] + store.to, POISON, sizeof(Words));
    far_stores[static_cast<size_t>(thread())].push_back(store);
}

void load_box_for(int blocks, void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    expect_map(map);
    if (blocks <= 0 || blocks >> grid.num_blocks != 0)
        fail(text("load_box_for: blocks of the bits 0x%x of a cluster of %d", unsigned(blocks), grid.num_blocks));
    Box box{*map, address_of(to), address_of(barrier), {c0, c1, c2, c3}, nullptr, box_bytes(*map)};
    shared_at(box.to, box.bytes, 128, "load_box_for");
    for (; box.block < grid.num_blocks; ++box.block) {
        if ((blocks >> box.block & 1) == 0) continue;
        living_block(box.block, "load_box_for");
        expect_announced(barrier_at(box.block, box.barrier, "load_box_for"), "load_box_for");
        begin(box);
    }
}

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
