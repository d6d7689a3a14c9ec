// The names of device.cuh on the CPU, with the semantics of the PTX ISA (sections as device.cuh gives them).
//
// A block's threads are fibers (`emulator_block.hpp`); what they do together, and what happens in the background, is in
// `emulator.cpp`, which is compiled once. What the hardware leaves undefined is an error there, told in one line.
#pragma once

#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // C's math.h alone: libstdc++'s is half of what compiling a kernel takes
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <stdint.h>
#include <string.h>

#include <utility>

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct e4m3;
struct alignas(16) Words { uint32_t word[4]; };
struct alignas(64) TensorMap {  // 128 bytes, packed by `tensor_map` of _launch.py; innermost dimension first
    uint64_t mark, base;
    uint64_t strides[3];  // bytes between neighbors of dimensions 1 to 3
    uint32_t sizes[4], box[4];
    uint32_t itemsize;
};

namespace emulated {

struct Launch {
    const unsigned *grid, *block;
    unsigned shared_bytes;
    void** arguments;
    const int* sizes;  // bytes of each argument, as the host packed it
    int num_arguments;
    char* message;  // one line, when the launch fails
    size_t room;
    void** stacks;  // the threads', of all kernels in the process: null before the first launch; one launch at a time
    int cluster;    // blocks along x that run together; 1 = each alone
};
int launch(void (*kernel)(void** arguments), const int* sizes, int num_arguments, const Launch& request);

inline int cluster_of_next = 1;  // what the kernel above the next entry says of itself

template <auto kernel> struct Entry;
template <class... P, void (*kernel)(P...)> struct Entry<kernel> {
    template <size_t... I> static void call(void** arguments, std::index_sequence<I...>) {
        kernel(unpacked<P>(arguments[I])...);
    }
    static void body(void** arguments) { call(arguments, std::index_sequence_for<P...>{}); }
    static int launch(const Launch& request) {
        const int sizes[] = {static_cast<int>(sizeof(P))...};
        return emulated::launch(body, sizes, sizeof...(P), request);
    }
    template <class T> static T unpacked(const void* from) {
        T value;
        memcpy(&value, from, sizeof(T));
        return value;
    }
};

unsigned char* shared();
uint16_t to_bf16(float x);
uint16_t to_f16(float x);
float from_bf16(uint16_t bits);
float from_f16(uint16_t bits);
void sync_block();
void sync_named(int barrier, int threads);
void arrive_named(int barrier, int threads);
void set_registers(int count);
void expect_aligned(const void* pointer, const char* what, unsigned bytes = 16);
void copy_wait(int pending);
void load_matrices(uint32_t (&to)[4], uint32_t row, bool transposed);
using Lift = float (*)(uint16_t);
void warp_product(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Lift lift);
uint32_t transposed(uint32_t pair);
void group_wait(int pending);
void bulk_wait_read(int pending);
void group_product(float* d, const uint32_t* a, uint64_t a_tile, uint64_t b_tile, int columns, bool keep, bool flipped, Lift lift,
                   Lift second = nullptr);

template <class T> Lift lift_of();
template <class T> Lift lift_of_second() { return nullptr; }  // of two numbers of 8 bits in one of 16
float from_low_e4m3(uint16_t bits);
float from_high_e4m3(uint16_t bits);
template <> inline Lift lift_of<e4m3>() { return from_low_e4m3; }
template <> inline Lift lift_of_second<e4m3>() { return from_high_e4m3; }
template <> inline Lift lift_of<bf16>() { return from_bf16; }
template <> inline Lift lift_of<f16>() { return from_f16; }

}  // namespace emulated

#define TESSERA_DEVICE inline
#define TESSERA_KERNEL(threads) void
#define TESSERA_JOINED(a, b) a##b
#define TESSERA_AT_LINE(name, line) TESSERA_JOINED(name, line)
#define TESSERA_CLUSTER_KERNEL(blocks, threads)                                                                        \
    static const int TESSERA_AT_LINE(tessera_cluster_at_, __LINE__) = emulated::cluster_of_next = (blocks);            \
    void
#define TESSERA_KERNEL_SHARED_SM(threads, blocks) void
#define TESSERA_SHARED(name) unsigned char* const name = emulated::shared()
#define TESSERA_GRID_CONSTANT
#define TESSERA_ENTRY(name)                                                                                            \
    static const int tessera_cluster_of_##name = std::exchange(emulated::cluster_of_next, 1);                          \
    extern "C" __attribute__((visibility("default"))) int tessera_launch_##name(                                       \
        const unsigned* grid, const unsigned* block, unsigned shared_bytes, void** arguments, const int* sizes,        \
        int num_arguments, char* message, size_t room, void** stacks) {                                                \
        return emulated::Entry<name>::launch(                                                                          \
            {grid, block, shared_bytes, arguments, sizes, num_arguments, message, room, stacks,                        \
             tessera_cluster_of_##name});                                                                              \
    }

// ---- numbers ----------------------------------------------------------------------------------------------------

inline int min(int a, int b) { return b < a ? b : a; }  // as CUDA has them
inline int max(int a, int b) { return a < b ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return emulated::from_bf16(x.bits); }
inline float to_float(f16 x) { return emulated::from_f16(x.bits); }
template <class T> inline T rounded(float x);
template <> inline float rounded<float>(float x) { return x; }
template <> inline bf16 rounded<bf16>(float x) { return {emulated::to_bf16(x)}; }
template <> inline f16 rounded<f16>(float x) { return {emulated::to_f16(x)}; }
template <class T> inline uint32_t packed(float first, float second) {
    return rounded<T>(first).bits | static_cast<uint32_t>(rounded<T>(second).bits) << 16;
}
uint32_t multiply_pairs(uint32_t a, uint32_t b);
uint32_t subtract_pairs(uint32_t a, uint32_t b);
inline uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
inline uint32_t swapped_bytes(uint32_t x) { return (x & 0x00ff00ffu) << 8 | (x >> 8 & 0x00ff00ffu); }
inline float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_fast(float x) { return log2f(fabsf(x) < 0x1p-126f ? 0.0f : x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float root_reciprocal(float x) { return 1.0f / sqrtf(x); }
inline float infinity() { return HUGE_VALF; }

// ---- threads ----------------------------------------------------------------------------------------------------

inline void sync_threads() { emulated::sync_block(); }
void sync_warp();
inline void sync_some(int barrier, int threads) { emulated::sync_named(barrier, threads); }
inline void arrive_some(int barrier, int threads) { emulated::arrive_named(barrier, threads); }
float shuffle_xor(float x, int mask);
uint32_t shuffle_xor(uint32_t x, int mask);
int same_in_warp(int x);
inline bool any_in_warp(bool x) {
    float any = x;
    for (int mask = 1; mask < 32; mask *= 2) any += shuffle_xor(any, mask);
    return any > 0.0f;
}
template <int count> inline void fewer_registers() {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
    emulated::set_registers(count);
}
template <int count> inline void more_registers() { fewer_registers<count>(); }

// ---- memory -----------------------------------------------------------------------------------------------------

uint32_t shared_address(const void* pointer);
inline Words load_once(const Words* from) {
    emulated::expect_aligned(from, "load_once");
    return *from;
}
inline void store_16(void* to, const Words& x) {
    emulated::expect_aligned(to, "store_16");
    *static_cast<Words*>(to) = x;
}
inline void store_8(bool there, float* to, float first, float second) {
    if (!there) return;
    emulated::expect_aligned(to, "store_8", 8);
    to[0] = first;
    to[1] = second;
}
inline void keep_packed(Words&) {}
void copy_16(uint32_t to, const void* from, int valid);
void copy_commit();
template <int pending> inline void copy_wait() { emulated::copy_wait(pending); }

// ---- products of one warp ---------------------------------------------------------------------------------------

inline void load_matrices(uint32_t (&to)[4], uint32_t row) { emulated::load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) { emulated::load_matrices(to, row, true); }
inline uint32_t transposed(uint32_t pair) { return emulated::transposed(pair); }
template <class T> inline void warp_product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulated::warp_product(d, a, b0, b1, emulated::lift_of<T>());
}

// ---- barriers in shared memory, and the copy engine -------------------------------------------------------------

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_init_done();
void barrier_arrive(uint64_t* barrier);
void barrier_expect(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity);
void load_box(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3);
void load_bulk(void* to, const void* from, uint64_t* barrier, int bytes);
void add_bulk(float* to, const void* from, int bytes);
void bulk_commit();
template <int pending> inline void bulk_wait_read() { emulated::bulk_wait_read(pending); }
void prefetch_map(const TensorMap* map);
void fence_for_engine();

// ---- blocks of a cluster ----------------------------------------------------------------------------------------

int rank_in_cluster();
void sync_cluster();
void barrier_arrive_at(uint64_t* barrier, int rank);
void store_16_at(int rank, void* to, const Words& x);
void load_box_for(int blocks, void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3);

// ---- products of a warpgroup ------------------------------------------------------------------------------------

void group_fence();
void group_commit();
template <int pending> inline void group_wait() { emulated::group_wait(pending); }
template <int count> inline void settled(float (&)[count]) {}
template <int count> inline void made_once(uint32_t (&)[count]) {}
template <int rows, int count> inline void settled(uint32_t (&)[rows][count]) {}

template <class T, int N> inline void group_product(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has these widths");
    emulated::group_product(d, nullptr, a, b, N, keep != 0, false, emulated::lift_of<T>(), emulated::lift_of_second<T>());
}
template <class T, int N> inline void group_product_flipped(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has these widths");
    emulated::group_product(d, nullptr, a, b, N, keep != 0, true, emulated::lift_of<T>());
}
template <class T, int N>
inline void group_product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has these widths");
    emulated::group_product(d, a, 0, b, N, keep != 0, true, emulated::lift_of<T>());
}
template <class T, int N>
inline void group_product_along(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has these widths");
    emulated::group_product(d, a, 0, b, N, keep != 0, false, emulated::lift_of<T>());
}
