// What the kernels of this folder ask of a GPU beyond plain C++, each instruction wrapped once.
//
// A kernel includes this file and nothing else. NVRTC compiles it for sm_90a or sm_80; with TESSERA_EMULATED the same
// names come from `emulator.hpp`, where a block's threads are fibers on the CPU: that is how tests run without a GPU.
// Instructions and descriptors: PTX ISA 9.0, sections 9.7.9 (copies), 9.7.13 (mbarrier), 9.7.15 (wgmma), 9.7.14 (mma).
#pragma once

#ifdef TESSERA_EMULATED
#include "emulator.hpp"
#else

using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

#define TESSERA_DEVICE __device__ __forceinline__
#define TESSERA_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
// Clusters of `blocks`; one is none.
#define TESSERA_CLUSTER_KERNEL(blocks, threads) extern "C" __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(threads, 1)
#define TESSERA_KERNEL_SHARED_SM(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define TESSERA_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define TESSERA_ENTRY(name)  // the emulator makes a launcher of it
#define TESSERA_GRID_CONSTANT __grid_constant__

// ---- numbers ----------------------------------------------------------------------------------------------------

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct e4m3;  // 8 bits, two of them where a product has one number of 16

TESSERA_DEVICE float to_float(float x) { return x; }
TESSERA_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
TESSERA_DEVICE float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <class T> TESSERA_DEVICE T rounded(float x);  // to nearest, ties to even
template <> TESSERA_DEVICE float rounded<float>(float x) { return x; }
template <> TESSERA_DEVICE bf16 rounded<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> TESSERA_DEVICE f16 rounded<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two neighbours in one register, the first in the low half.
template <class T> TESSERA_DEVICE uint32_t packed(float first, float second);
template <> TESSERA_DEVICE uint32_t packed<bf16>(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
template <> TESSERA_DEVICE uint32_t packed<f16>(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// Two bfloat16 numbers at a time, each result rounded once; subnormal numbers count. sm_90.
TESSERA_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
TESSERA_DEVICE uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
TESSERA_DEVICE uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t bits) {  // (x & mask) | bits in one instruction
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}
// The two bytes of each half word in the other order.
TESSERA_DEVICE uint32_t swapped_bytes(uint32_t x) { return __byte_perm(x, 0, 0x2301); }

TESSERA_DEVICE float exp2_fast(float x) {  // 2 ulp, subnormal results become 0; -inf gives 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
TESSERA_DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
TESSERA_DEVICE float reciprocal_fast(float x) {  // 1 ulp; the exact one is a call, which no product may run beside
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
TESSERA_DEVICE float root_reciprocal(float x) { return 1.0f / sqrtf(x); }  // rounded twice; rsqrt.approx is off by 2 ulp
TESSERA_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// ---- threads ----------------------------------------------------------------------------------------------------

TESSERA_DEVICE void sync_threads() { __syncthreads(); }
TESSERA_DEVICE void sync_warp() { __syncwarp(); }
// Barriers 1 to 15 of a block, among `threads` of its threads.
TESSERA_DEVICE void sync_some(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
TESSERA_DEVICE void arrive_some(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
TESSERA_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
TESSERA_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
TESSERA_DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }
TESSERA_DEVICE int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }  // lets the compiler keep x scalar
// Registers a thread of this warpgroup may use from here on; all four warps call it.
template <int count> TESSERA_DEVICE void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count> TESSERA_DEVICE void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- memory -----------------------------------------------------------------------------------------------------

struct alignas(16) Words { uint32_t word[4]; };  // a 16-byte access

TESSERA_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
TESSERA_DEVICE Words load_once(const Words* from) {  // read-only data that no one reads again soon
    Words x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3]) : "l"(from));
    return x;
}
TESSERA_DEVICE void store_16(void* to, const Words& x) {  // in one access, whatever the words are made of
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"l"(to), "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3]) : "memory");
}
// Two neighbours in one access, where `there`, and no branch around it.
TESSERA_DEVICE void store_8(bool there, float* to, float first, float second) {
    asm volatile("{\n\t.reg .pred there;\n\tsetp.ne.b32 there, %3, 0;\n\t@there st.global.v2.f32 [%0], {%1, %2};\n\t}"
                 ::"l"(to), "f"(first), "f"(second), "r"(static_cast<int>(there)) : "memory");
}

// Bits that the compiler must take as new: it keeps nothing that it unpacked from them before, and reads nothing of what
// follows before this.
TESSERA_DEVICE void keep_packed(Words& x) {
    asm volatile("" : "+r"(x.word[0]), "+r"(x.word[1]), "+r"(x.word[2]), "+r"(x.word[3])::"memory");
}

// Sixteen bytes from global to shared memory in the background; bytes beyond `valid` become zero.
TESSERA_DEVICE void copy_16(uint32_t to, const void* from, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
TESSERA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> TESSERA_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- products of one warp, sm_80 --------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
TESSERA_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}
TESSERA_DEVICE void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}
// An 8 x 8 matrix of 16-bit numbers, lane l holding row l / 4, columns 2 (l % 4) and the next: the same of its transpose.
TESSERA_DEVICE uint32_t transposed(uint32_t pair) {
    uint32_t other;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(pair));
    return other;
}
// d [16, 8] += a [16, 16] b [16, 8]. Lane l holds d[l / 4 + 8 (i / 2)][2 (l % 4) + i % 2] in d[i].
template <class T> TESSERA_DEVICE void warp_product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> TESSERA_DEVICE void warp_product<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> TESSERA_DEVICE void warp_product<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- barriers in shared memory, and the copy engine that arrives at them, sm_90 -----------------------------------

struct alignas(64) TensorMap { uint64_t opaque[16]; };  // CUtensorMap, made by the host

TESSERA_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
TESSERA_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
TESSERA_DEVICE void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrive once, and let the phase also wait for `bytes` of copies.
TESSERA_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Wait until the phase of this parity (0 for the first) is over.
TESSERA_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@done bra.uni over;\n\tbra.uni again;\n\tover:\n\t}"
        ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
// A box of the tensor that `map` describes, from these coordinates (innermost first); what lies outside becomes zero.
TESSERA_DEVICE void load_box(void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// What this thread wrote into shared memory is there for the copy engine and for warpgroup products.
TESSERA_DEVICE void fence_for_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// `bytes` in a row, a multiple of 16 on both sides.
TESSERA_DEVICE void load_bulk(void* to, const void* from, uint64_t* barrier, int bytes) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// Add float32 numbers of shared memory to global ones, in the background, in no fixed order among blocks.
TESSERA_DEVICE void add_bulk(float* to, const void* from, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                 ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
}
TESSERA_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the last `pending` groups of this thread have read their shared memory.
template <int pending> TESSERA_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
TESSERA_DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- blocks of a cluster, sm_90 -----------------------------------------------------------------------------------

TESSERA_DEVICE int rank_in_cluster() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}
// All threads of all blocks of the cluster; what they wrote before is seen behind it.
TESSERA_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
// Arrive at the same barrier of block `rank`. Orders nothing that threads wrote: for stages that products have read.
TESSERA_DEVICE void barrier_arrive_at(uint64_t* barrier, int rank) {
    asm volatile(
        "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}"
        ::"r"(shared_address(barrier)), "r"(rank) : "memory");
}
// Into the same place of the shared memory of block `rank`; seen there behind `sync_cluster`.
TESSERA_DEVICE void store_16_at(int rank, void* to, const Words& x) {
    asm volatile(
        "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
        "st.shared::cluster.v4.u32 [there], {%2, %3, %4, %5};\n\t}"
        ::"r"(shared_address(to)), "r"(rank), "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3]) : "memory");
}
// `load_box` to the same place of every block in `blocks` (a bit each), whose own barriers count the bytes.
TESSERA_DEVICE void load_box_for(int blocks, void* to, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
        ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
          "h"(static_cast<uint16_t>(blocks))
        : "memory");
}

// ---- products of a warpgroup, sm_90a ------------------------------------------------------------------------------

// d [64, N] (+)= a [64, 16] b [16, N]; a from shared memory or registers, b from shared memory, in the background.
// Lane l of warp w holds d[16 w + l / 4 + 8 (i / 2 % 2)][8 (i / 4) + 2 (l % 4) + i % 2] in d[i]. The register form of a
// has the same rows: a[j] holds columns 2 (l % 4) and the next, + 8 (j / 2), of row + 8 (j % 2).
TESSERA_DEVICE void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TESSERA_DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> TESSERA_DEVICE void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving reads of accumulators across a wait.
template <int count> TESSERA_DEVICE void settled(float (&d)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Numbers that the compiler must keep and not make again wherever they are used.
template <int count> TESSERA_DEVICE void made_once(uint32_t (&a)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+r"(a[i]));
}
// Keeps registers that a product under way reads from being given to anything else before the wait.
template <int rows, int count> TESSERA_DEVICE void settled(uint32_t (&a)[rows][count]) {
#pragma unroll
    for (int i = 0; i < rows * count; ++i) asm volatile("" : "+r"(a[i / count][i % count])::"memory");
}

#include "wgmma.cuh"

#endif

// A tile in shared memory whose rows of 128 bytes are swizzled over 1,024 bytes, as `load_box` leaves it.
//   K-major (a row is along the summed dimension): 8 rows make a group; groups lie 1,024 bytes apart.
//   MN-major (a row is along M or N): as above, and `panel` bytes between panels of 64 numbers.
TESSERA_DEVICE uint64_t tile_descriptor(uint32_t address, uint32_t panel) {
    uint64_t word = (address & 0x3ffff) >> 4;
    word |= static_cast<uint64_t>((panel & 0x3ffff) >> 4) << 16;  // leading byte offset; K-major ignores it
    word |= static_cast<uint64_t>(1024 >> 4) << 32;               // stride byte offset
    word |= 1ull << 62;                                           // 128-byte swizzle
    return word;
}
// The descriptor of what begins `bytes` after a tile's own; addresses stay below the field's end, so that nothing carries.
TESSERA_DEVICE uint64_t further(uint64_t descriptor, uint32_t bytes) {
    const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
    return (descriptor >> 32 << 32) | low;
}

// A place in a ring of COUNT and how often it went around.
template <int COUNT> struct Turn {
    int stage = 0, parity = 0;
    TESSERA_DEVICE int before() const { return stage == 0 ? COUNT - 1 : stage - 1; }
    TESSERA_DEVICE void next() {
        if (++stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};
