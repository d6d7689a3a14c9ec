// A block of GPU threads on the CPU: fibers, what they wait for, their shared memory, and the launcher that runs the
// blocks of a grid one after the other. `emulator.cpp` builds the instructions of device.cuh on it.
//
// Adversarial on purpose. A warp runs until it must wait, one of them far ahead of the others; every second launch runs
// threads and blocks in descending order, every other pair lets copies land at once: what only one order gets right differs
// between runs. Shared memory is NaN before each block.
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
    int thread = 0;
    Index index;
    ucontext_t start;
    jmp_buf here;
    bool started = false, done = false;
    const Wait* wait = nullptr;
};

struct Grid {
    std::vector<Fiber> fibers{MOST_THREADS};
    unsigned char* stacks = nullptr;
    jmp_buf scheduler;
    sigjmp_buf trap;
    int num_threads = 0;
    uint32_t shared_bytes = 0;
    Fiber* current = nullptr;
    void (*kernel)(void**) = nullptr;
    void** arguments = nullptr;
    std::string error;
    unsigned launches = 0;
    bool descending = false, prompt = false;  // how this launch is run
};
static Grid grid;
alignas(1024) static unsigned char shared_memory[SHARED_START + MOST_SHARED + GUARD];

int thread() { return grid.current->thread; }
int warp() { return thread() / LANES; }
int lane() { return thread() % LANES; }

[[noreturn]] void fail(const std::string& line) {
    throw Error{text("block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z, thread()) + line};
}

void leave() {  // back to the scheduler, until it comes here again
    if (_setjmp(grid.current->here) == 0) _longjmp(grid.scheduler, 1);
}

void enter(Fiber& fiber) {
    grid.current = &fiber;
    threadIdx = fiber.index;
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

// Memory for the stacks of a block's threads, a guard page below each: a stack that overflows is told, see `trapped`. The
// system counts the pieces that guards cut it into, so all kernels of a process share it.
unsigned char* made_stacks() {
    void* memory = mmap(nullptr, MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1, 0);
    if (memory == MAP_FAILED) throw Error{"no memory for the threads' stacks"};
    auto* stacks = static_cast<unsigned char*>(memory);
    for (int thread = 0; thread < MOST_THREADS; ++thread) mprotect(stacks + thread * STACK_BYTES, PAGE_BYTES, PROT_NONE);
    return stacks;
}

void prepare(Fiber& fiber, int thread) {
    fiber.thread = thread;
    fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
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

// ---- shared memory ----------------------------------------------------------------------------------------------

// Where a 32-bit shared address points, after the checks that the hardware does not make.
unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
    uint32_t end = SHARED_START + grid.shared_bytes;
    if (address < SHARED_START || address > end || bytes > end - address)
        fail(text("%s: shared bytes %d to %d, but the block has %u", what, int(address - SHARED_START),
                  int(address - SHARED_START + bytes), grid.shared_bytes));
    if (address % alignment != 0)
        fail(text("%s: shared byte %u, not a multiple of %u", what, address - SHARED_START, alignment));
    return shared_memory + address;
}

uint32_t address_of(const void* pointer) {
    auto distance = static_cast<const unsigned char*>(pointer) - shared_memory;
    if (distance < 0 || distance >= static_cast<long>(sizeof(shared_memory)))
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
static Meeting meetings[MOST_THREADS / LANES];

// All lanes of a warp call this; the last one to come runs `work` over what the lanes brought, in the lanes' order.
template <class Item, class Work> void together(const char* what, Item& item, Work work) {
    Meeting& meeting = meetings[warp()];
    if (meeting.arrived > 0 && strcmp(meeting.what, what) != 0)
        fail(text("%s, while other lanes of warp %d are in %s", what, warp(), meeting.what));
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

void begin_block();        // in emulator.cpp: forget the last block's barriers and copies
void check_block_end();    // throws for what must not be under way when a block ends
bool deliver_late_copy();  // when no thread can move; false = nothing that a thread waits for is under way

std::string deadlock() {
    std::string line = text("block (%u, %u, %u) cannot go on: ", blockIdx.x, blockIdx.y, blockIdx.z);
    for (int first = 0, last; first < grid.num_threads && line.size() < 700; first = last + 1) {
        auto state = [](int i) { return grid.fibers[i].done ? std::string("ended") : grid.fibers[i].wait->what(); };
        std::string what = state(first);
        for (last = first; last + 1 < grid.num_threads && state(last + 1) == what;) ++last;
        bool ended = grid.fibers[first].done;
        line += text(first == last ? "thread %d" : "threads %d-%d", first, last);
        line += (ended ? " " : first == last ? " waits for " : " wait for ") + what + "; ";
    }
    return line.substr(0, line.size() - 2);
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
            running -= fiber.done;
            moved = again = true;
        }
    }
    return moved;
}

// The first warp in order that can move goes as far as it can, then the first again: a warp gets as far ahead of the
// others as barriers let it.
void run_threads() {
    const int warps = grid.num_threads / LANES;
    for (int running = grid.num_threads; running > 0;) {
        bool moved = false;
        for (int i = 0; i < warps && !moved; ++i)
            moved = run_warp(LANES * (grid.descending ? warps - 1 - i : i), running);
        if (!moved && running > 0 && !deliver_late_copy()) throw Error{deadlock()};
    }
}

void run_block() {
    memset(shared_memory, POISON, SHARED_START + grid.shared_bytes + GUARD);
    for (Meeting& meeting : meetings) meeting.arrived = 0;
    begin_block();
    for (int i = 0; i < grid.num_threads; ++i) prepare(grid.fibers[i], i);
    run_threads();
    check_block_end();
    if (!is_poison(shared_memory, SHARED_START) ||
        !is_poison(shared_memory + SHARED_START + grid.shared_bytes, GUARD))
        throw Error{text("block (%u, %u, %u) wrote beyond its %u bytes of shared memory", blockIdx.x, blockIdx.y,
                         blockIdx.z, grid.shared_bytes)};
}

void run_grid() {
    grid.error.clear();
    grid.descending = grid.launches % 2 != 0;
    grid.prompt = (grid.launches + 1) / 2 % 2 != 0;  // the second launch differs from the first in both
    ++grid.launches;
    unsigned count = gridDim.x * gridDim.y * gridDim.z;
    for (unsigned i = 0; i < count; ++i) {
        unsigned block = grid.descending ? count - 1 - i : i;
        blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / (gridDim.x * gridDim.y)};
        run_block();
    }
}

static char trap_line[256];

void trapped(int, siginfo_t* info, void*) {
    snprintf(trap_line, sizeof(trap_line), "block (%u, %u, %u), thread %d: touched address %p: not memory of this process,"
             " or not aligned", blockIdx.x, blockIdx.y, blockIdx.z, grid.current->thread, info->si_addr);
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
    grid.num_threads = static_cast<int>(threads);
    grid.shared_bytes = request.shared_bytes;
}

}  // namespace

int launch(void (*kernel)(void**), const int* sizes, int num_arguments, const Launch& request) {
    try {
        check_request(request, sizes, num_arguments);
        if (*request.stacks == nullptr) *request.stacks = made_stacks();
        grid.stacks = static_cast<unsigned char*>(*request.stacks);
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
