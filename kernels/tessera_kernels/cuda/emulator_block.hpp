// A cluster of blocks of GPU threads on the CPU: fibers, what they wait for, their shared memory, and the launcher that runs
// the clusters of a grid one after the other; most have one block. `emulator.cpp` builds the instructions of device.cuh on it.
//
// Adversarial on purpose. A warp runs until it must wait, one of them far ahead of the others, and so the blocks of a
// cluster; every second launch runs threads and blocks in descending order, every other pair lets copies land at once: what
// only one order gets right differs between runs. Shared memory is NaN before each block.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <string>
#include <vector>

#include "emulator.hpp"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {  // of one library alone: several emulated kernels, of several versions, live in one process

constexpr int MOST_THREADS = 1024, LANES = 32;
constexpr int MOST_BLOCKS = 8, MOST_CLUSTER_THREADS = 2048;  // of a cluster
constexpr uint32_t SHARED_START = 1024, MOST_SHARED = 227 * 1024, GUARD = 4096;
constexpr unsigned char POISON = 0xff;  // NaN in every float format, -1 as an integer
constexpr size_t STACK_BYTES = 128 * 1024, PAGE_BYTES = 4096;

struct Error {  // thrown in a fiber and caught at its start; one line
    std::string line;
};

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
    char line[512];
    va_list list;
    va_start(list, format);
    vsnprintf(line, sizeof(line), format, list);
    va_end(list);
    return line;
}

// ---- fibers -----------------------------------------------------------------------------------------------------

struct Wait {  // lies on the stack of the thread that waits
    virtual bool is_over() const = 0;
    virtual std::string what() const = 0;
};

struct Fiber {
    int thread = 0;  // within the cluster
    int rank = 0;    // of its block
    Index index;
    ucontext_t start;
    jmp_buf here;
    bool started = false, done = false;
    const Wait* wait = nullptr;
};

struct Block {
    Index index;
    int running = 0;  // threads
};

struct Grid {
    std::vector<Fiber> fibers;  // as many as the largest launch so far has in a cluster
    Block blocks[MOST_BLOCKS];  // of the cluster that runs
    unsigned char* stacks = nullptr;
    jmp_buf scheduler;
    sigjmp_buf trap;
    int num_threads = 0, num_blocks = 1;  // of a block, of a cluster
    uint32_t shared_bytes = 0;
    Fiber* current = nullptr;
    void (*kernel)(void**) = nullptr;
    void** arguments = nullptr;
    std::string error;
    unsigned launches = 0;
    bool descending = false, prompt = false;  // how this launch is run
};
static Grid grid;

using BlockMemory = unsigned char[SHARED_START + MOST_SHARED + GUARD];
static_assert(sizeof(BlockMemory) % 1024 == 0);
alignas(1024) static BlockMemory shared_memory[MOST_BLOCKS];

int thread() { return grid.current->thread; }  // state of threads and warps is kept by their numbers in the cluster
int warp() { return thread() / LANES; }
int lane() { return thread() % LANES; }
int rank() { return grid.current->rank; }
int thread_in_block() { return thread() - rank() * grid.num_threads; }
int warp_in_block() { return thread_in_block() / LANES; }
int threads_in_cluster() { return grid.num_blocks * grid.num_threads; }

std::string title(const Index& block) { return text("block (%u, %u, %u)", block.x, block.y, block.z); }

[[noreturn]] void fail(const std::string& line) {
    throw Error{title(blockIdx) + text(", thread %d: ", thread_in_block()) + line};
}

void leave() {  // back to the scheduler, until it comes here again
    if (_setjmp(grid.current->here) == 0) _longjmp(grid.scheduler, 1);
}

void enter(Fiber& fiber) {
    grid.current = &fiber;
    threadIdx = fiber.index;
    blockIdx = grid.blocks[fiber.rank].index;
    if (_setjmp(grid.scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

void fiber_body() {  // a fiber serves one thread after the other, block by block
    for (;;) {
        try {
            grid.kernel(grid.arguments);
        } catch (const Error& error) {
            if (grid.error.empty()) grid.error = error.line;
        }
        grid.current->done = true;
        leave();
    }
}

template <class Over, class What> void wait_until(Over over, What what) {
    if (over()) return;
    struct Both final : Wait {
        Over& over;
        What& name;
        Both(Over& o, What& n) : over(o), name(n) {}
        bool is_over() const override { return over(); }
        std::string what() const override { return name(); }
    } wait(over, what);
    grid.current->wait = &wait;
    leave();
    grid.current->wait = nullptr;
}

// Memory for the stacks of a cluster's threads, a guard page below each: a stack that overflows is told, see `trapped`. The
// system counts the pieces that guards cut it into, so all kernels of a process share it.
unsigned char* made_stacks() {
    void* memory = mmap(nullptr, MOST_CLUSTER_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error{"no memory for the threads' stacks"};
    auto* stacks = static_cast<unsigned char*>(memory);
    for (int thread = 0; thread < MOST_CLUSTER_THREADS; ++thread)
        mprotect(stacks + thread * STACK_BYTES, PAGE_BYTES, PROT_NONE);
    return stacks;
}

void prepare(Fiber& fiber, int thread) {
    const unsigned inside = static_cast<unsigned>(thread % grid.num_threads);
    fiber.thread = thread;
    fiber.rank = thread / grid.num_threads;
    fiber.index = {inside % blockDim.x, inside / blockDim.x % blockDim.y, inside / (blockDim.x * blockDim.y)};
    fiber.done = false;
    fiber.wait = nullptr;
    if (fiber.started) return;
    unsigned char* stack = grid.stacks + thread * STACK_BYTES;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack + PAGE_BYTES;
    fiber.start.uc_stack.ss_size = STACK_BYTES - PAGE_BYTES;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_body, 0);
}

// The oldest groups up to all but `pending`, in order.
template <class Group, class Finish> void retire(std::vector<Group>& groups, int pending, Finish finish) {
    if (static_cast<int>(groups.size()) <= pending) return;
    auto end = groups.end() - pending;
    for (auto group = groups.begin(); group != end; ++group)
        for (auto& one : *group) finish(one);
    groups.erase(groups.begin(), end);
}

// ---- shared memory ----------------------------------------------------------------------------------------------

// Where a 32-bit shared address points in this thread's block, after the checks that the hardware does not make.
unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
    uint32_t end = SHARED_START + grid.shared_bytes;
    if (address < SHARED_START || address > end || bytes > end - address)
        fail(text("%s: shared bytes %d to %d, but the block has %u", what, int(address - SHARED_START),
                  int(address - SHARED_START + bytes), grid.shared_bytes));
    if (address % alignment != 0)
        fail(text("%s: shared byte %u, not a multiple of %u", what, address - SHARED_START, alignment));
    return shared_memory[rank()] + address;
}

uint32_t address_of(const void* pointer) {
    auto distance = static_cast<const unsigned char*>(pointer) - shared_memory[rank()];
    if (distance < 0 || distance >= static_cast<long>(sizeof(BlockMemory)))
        fail("shared_address of memory that is not the block's shared memory");
    return static_cast<uint32_t>(distance);
}

bool is_poison(const unsigned char* from, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
        if (from[i] != POISON) return false;
    return true;
}

// ---- meetings of a warp -----------------------------------------------------------------------------------------

struct Meeting {
    const char* what = "";
    int arrived = 0;
    unsigned round = 0;
    void* items[LANES];
};
static Meeting meetings[MOST_CLUSTER_THREADS / LANES];

// All lanes of a warp call this; the last one to come runs `work` over what the lanes brought, in the lanes' order.
template <class Item, class Work> void together(const char* what, Item& item, Work work) {
    Meeting& meeting = meetings[warp()];
    if (meeting.arrived > 0 && strcmp(meeting.what, what) != 0)
        fail(text("%s, while other lanes of warp %d are in %s", what, warp_in_block(), meeting.what));
    meeting.what = what;
    meeting.items[lane()] = &item;
    if (++meeting.arrived == LANES) {
        Item* items[LANES];
        for (int i = 0; i < LANES; ++i) items[i] = static_cast<Item*>(meeting.items[i]);
        work(items);
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    wait_until([&meeting, round = meeting.round] { return meeting.round != round; },
               [&meeting, what] { return text("%s (%d of 32 lanes are there)", what, meeting.arrived); });
}

void together(const char* what) {
    int nothing = 0;
    together(what, nothing, [](int**) {});
}

// ---- a block, a grid --------------------------------------------------------------------------------------------

void begin_cluster();            // in emulator.cpp: forget the last cluster's barriers and copies
void check_block_end(int rank);  // throws for what must not be under way when a block ends
bool go_on_in_background();      // when no thread can move; false = nothing that a thread waits for is under way

// What the threads of one block do, those that do the same in one piece.
std::string states(const Fiber* fibers, size_t most) {
    std::string line;
    for (int first = 0, last; first < grid.num_threads && line.size() < most; first = last + 1) {
        auto state = [fibers](int i) { return fibers[i].done ? std::string("ended") : fibers[i].wait->what(); };
        std::string what = state(first);
        for (last = first; last + 1 < grid.num_threads && state(last + 1) == what;) ++last;
        line += text(first == last ? "thread %d" : "threads %d-%d", first, last);
        line += (fibers[first].done ? " " : first == last ? " waits for " : " wait for ") + what + "; ";
    }
    return line.substr(0, line.size() - 2);
}

std::string deadlock() {
    std::string line;
    for (int rank = 0; rank < grid.num_blocks; ++rank)
        line += (rank == 0 ? "" : "; ") + title(grid.blocks[rank].index) + (rank == 0 ? " cannot go on: " : ": ") +
                states(&grid.fibers[rank * grid.num_threads], 700 / static_cast<size_t>(grid.num_blocks));
    return line;
}

// Run the threads of one warp as far as they can go; false = none can move.
bool run_warp(int first, int& running) {
    bool moved = false;
    for (bool again = true; again;) {
        again = false;
        for (int i = 0; i < LANES; ++i) {
            Fiber& fiber = grid.fibers[first + (grid.descending ? LANES - 1 - i : i)];
            if (fiber.done || (fiber.wait != nullptr && !fiber.wait->is_over())) continue;
            enter(fiber);
            if (!grid.error.empty()) throw Error{grid.error};
            if (fiber.done) {
                --running;
                if (--grid.blocks[fiber.rank].running == 0) check_block_end(fiber.rank);
            }
            moved = again = true;
        }
    }
    return moved;
}

// The first warp in order that can move goes as far as it can, then the first again: a warp gets as far ahead of the
// others as barriers let it.
void run_threads() {
    const int warps = threads_in_cluster() / LANES;
    for (int running = threads_in_cluster(); running > 0;) {
        bool moved = false;
        for (int i = 0; i < warps && !moved; ++i)
            moved = run_warp(LANES * (grid.descending ? warps - 1 - i : i), running);
        if (!moved && running > 0 && !go_on_in_background()) throw Error{deadlock()};
    }
}

void check_edges(int rank) {
    const unsigned char* memory = shared_memory[rank];
    if (!is_poison(memory, SHARED_START) || !is_poison(memory + SHARED_START + grid.shared_bytes, GUARD))
        throw Error{title(grid.blocks[rank].index) + text(" wrote beyond its %u bytes of shared memory", grid.shared_bytes)};
}

void run_cluster(unsigned first) {
    for (int rank = 0; rank < grid.num_blocks; ++rank) {
        const unsigned block = first + static_cast<unsigned>(rank);
        grid.blocks[rank].index = {block % gridDim.x, block / gridDim.x % gridDim.y, block / (gridDim.x * gridDim.y)};
        grid.blocks[rank].running = grid.num_threads;
        memset(shared_memory[rank], POISON, SHARED_START + grid.shared_bytes + GUARD);
    }
    for (Meeting& meeting : meetings) meeting.arrived = 0;
    begin_cluster();
    for (int i = 0; i < threads_in_cluster(); ++i) prepare(grid.fibers[static_cast<size_t>(i)], i);
    run_threads();
    for (int rank = 0; rank < grid.num_blocks; ++rank) check_edges(rank);
}

void run_grid() {
    grid.error.clear();
    grid.descending = grid.launches % 2 != 0;
    grid.prompt = (grid.launches + 1) / 2 % 2 != 0;  // the second launch differs from the first in both
    ++grid.launches;
    const unsigned blocks = static_cast<unsigned>(grid.num_blocks), count = gridDim.x * gridDim.y * gridDim.z / blocks;
    for (unsigned i = 0; i < count; ++i) run_cluster(blocks * (grid.descending ? count - 1 - i : i));
}

static char trap_line[256];

void trapped(int, siginfo_t* info, void*) {
    snprintf(trap_line, sizeof(trap_line), "block (%u, %u, %u), thread %d: touched address %p: not memory of this process,"
             " or not aligned", blockIdx.x, blockIdx.y, blockIdx.z, thread_in_block(), info->si_addr);
    siglongjmp(grid.trap, 1);
}

// A wild pointer ends the run with a message, not the process.
void run_grid_in_trap() {
    static unsigned char stack[65536];
    stack_t own{}, before{};
    own.ss_sp = stack;
    own.ss_size = sizeof(stack);
    sigaltstack(&own, &before);
    struct sigaction action {}, segv, bus;
    action.sa_sigaction = trapped;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
    Error failure;
    if (sigsetjmp(grid.trap, 1) == 0) {
        try {
            run_grid();
        } catch (const Error& error) {
            failure = error;
        }
    } else {
        failure.line = trap_line;
    }
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    sigaltstack(&before, nullptr);
    if (!failure.line.empty()) throw failure;
}

void check_cluster(unsigned blocks, unsigned long long threads) {
    if (blocks < 1 || blocks > MOST_BLOCKS || blocks * threads > MOST_CLUSTER_THREADS)
        throw Error{text("a cluster of %u blocks of %llu threads: at most %d blocks and, here, %d threads", blocks, threads,
                         MOST_BLOCKS, MOST_CLUSTER_THREADS)};
    if (gridDim.x % blocks != 0)
        throw Error{text("a grid of (%u, %u, %u) blocks in clusters of %u: x is a multiple of that", gridDim.x, gridDim.y,
                         gridDim.z, blocks)};
}

void check_request(const Launch& request, const int* sizes, int num_arguments) {
    if (request.num_arguments != num_arguments)
        throw Error{text("the kernel takes %d arguments, %d were given", num_arguments, request.num_arguments)};
    for (int i = 0; i < num_arguments; ++i)
        if (request.sizes[i] != sizes[i])
            throw Error{text("argument %d has %d bytes in the kernel, %d were given", i, sizes[i], request.sizes[i])};
    gridDim = {request.grid[0], request.grid[1], request.grid[2]};
    blockDim = {request.block[0], request.block[1], request.block[2]};
    unsigned long long threads = 1ull * blockDim.x * blockDim.y * blockDim.z;
    if (threads == 0 || threads > MOST_THREADS || threads % LANES != 0)
        throw Error{text("a block of %llu threads: whole warps are emulated, at most %d threads", threads, MOST_THREADS)};
    if (request.shared_bytes > MOST_SHARED)
        throw Error{text("%u bytes of shared memory: a block has at most %u", request.shared_bytes, MOST_SHARED)};
    if (gridDim.x == 0 || gridDim.y - 1 >= 65535 || gridDim.z - 1 >= 65535)
        throw Error{text("a grid of (%u, %u, %u) blocks: at least 1, at most 65535 in y and z", gridDim.x, gridDim.y, gridDim.z)};
    check_cluster(static_cast<unsigned>(request.cluster), threads);
    grid.num_threads = static_cast<int>(threads);
    grid.num_blocks = request.cluster;
    grid.shared_bytes = request.shared_bytes;
}

}  // namespace

int launch(void (*kernel)(void**), const int* sizes, int num_arguments, const Launch& request) {
    try {
        check_request(request, sizes, num_arguments);
        if (*request.stacks == nullptr) *request.stacks = made_stacks();
        grid.stacks = static_cast<unsigned char*>(*request.stacks);
        if (grid.fibers.size() < static_cast<size_t>(threads_in_cluster()))
            grid.fibers.resize(static_cast<size_t>(threads_in_cluster()));
        for (Fiber& fiber : grid.fibers) fiber.started = false;  // another kernel's threads were on them
        grid.kernel = kernel;
        grid.arguments = request.arguments;
        run_grid_in_trap();
        return 0;
    } catch (const Error& error) {
        snprintf(request.message, request.room, "%s", error.line.c_str());
        return 1;
    }
}

}  // namespace emulated
