// What arrives at barriers in shared memory, the copy engine that fills it in the background, and what blocks of a cluster do to
// one another's, on the CPU: see emulator.hpp. Included by `emulator.cpp` alone.
#pragma once

#include <map>

#include "emulator_block.hpp"

using namespace emulated;

namespace emulated {

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
