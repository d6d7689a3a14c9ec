// wgmma.mma_async of device.cuh: m64, N columns, k16, float32 sums. Each N needs its own list of N / 2 registers.
#pragma once

// clang-format off
#define TESSERA_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TESSERA_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define TESSERA_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define TESSERA_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define TESSERA_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define TESSERA_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define TESSERA_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define TESSERA_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define TESSERA_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define TESSERA_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define TESSERA_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define TESSERA_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define TESSERA_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define TESSERA_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define TESSERA_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define TESSERA_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define TESSERA_LIST32 TESSERA_R0 ", " TESSERA_R1 ", " TESSERA_R2 ", " TESSERA_R3
#define TESSERA_LIST40 TESSERA_LIST32 ", " TESSERA_R4
#define TESSERA_LIST64 TESSERA_LIST40 ", " TESSERA_R5 ", " TESSERA_R6 ", " TESSERA_R7
#define TESSERA_LIST96 TESSERA_LIST64 ", " TESSERA_R8 ", " TESSERA_R9 ", " TESSERA_R10 ", " TESSERA_R11
#define TESSERA_LIST128 TESSERA_LIST96 ", " TESSERA_R12 ", " TESSERA_R13 ", " TESSERA_R14 ", " TESSERA_R15
#define TESSERA_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define TESSERA_D32(i) TESSERA_D8(i), TESSERA_D8(i + 8), TESSERA_D8(i + 16), TESSERA_D8(i + 24)
#define TESSERA_OUT32 TESSERA_D32(0)
#define TESSERA_OUT40 TESSERA_D32(0), TESSERA_D8(32)
#define TESSERA_OUT64 TESSERA_D32(0), TESSERA_D32(32)
#define TESSERA_OUT96 TESSERA_OUT64, TESSERA_D32(64)
#define TESSERA_OUT128 TESSERA_OUT96, TESSERA_D32(96)

// d (+)= a b: both from shared memory, both K-major; `keep` 0 overwrites d.
template <class T, int N> struct Product;
template <class T, int N> TESSERA_DEVICE void group_product(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {
    Product<T, N>::both_shared(d, a, b, keep);
}
// d (+)= a b: a from registers, b from shared memory and MN-major.
template <class T, int N>
TESSERA_DEVICE void group_product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) {
    Product<T, N>::from_registers(d, a, b, keep);
}

// d (+)= a b: a from registers, b from shared memory and K-major.
template <class T, int N>
TESSERA_DEVICE void group_product_along(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) {
    Product<T, N>::from_registers_along(d, a, b, keep);
}

// d (+)= a b: both from shared memory, both MN-major.
template <class T, int N> TESSERA_DEVICE void group_product_flipped(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {
    Product<T, N>::both_flipped(d, a, b, keep);
}

#define TESSERA_PRODUCT(T, name, N, count, A, B, C, D, E, F)                                                             \
    template <> struct Product<T, N> {                                                                                   \
        static TESSERA_DEVICE void both_shared(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {                    \
            asm volatile(                                                                                                \
                "{\n\t.reg .pred keep;\n\tsetp.ne.b32 keep, " C ", 0;\n\t"                                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" TESSERA_LIST##count "}, " A ", " B  \
                ", keep, 1, 1, 0, 0;\n\t}"                                                                               \
                : TESSERA_OUT##count : "l"(a), "l"(b), "r"(keep));                                                       \
        }                                                                                                                \
        static TESSERA_DEVICE void both_flipped(float (&d)[N / 2], uint64_t a, uint64_t b, int keep) {                   \
            asm volatile(                                                                                                \
                "{\n\t.reg .pred keep;\n\tsetp.ne.b32 keep, " C ", 0;\n\t"                                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" TESSERA_LIST##count "}, " A ", " B  \
                ", keep, 1, 1, 1, 1;\n\t}"                                                                               \
                : TESSERA_OUT##count : "l"(a), "l"(b), "r"(keep));                                                       \
        }                                                                                                                \
        static TESSERA_DEVICE void from_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) {     \
            asm volatile(                                                                                                \
                "{\n\t.reg .pred keep;\n\tsetp.ne.b32 keep, " F ", 0;\n\t"                                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" TESSERA_LIST##count "}, {" A ", " B \
                ", " C ", " D "}, " E ", keep, 1, 1, 1;\n\t}"                                                            \
                : TESSERA_OUT##count : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));                   \
        }                                                                                                                \
        static TESSERA_DEVICE void from_registers_along(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int keep) {\
            asm volatile(                                                                                                \
                "{\n\t.reg .pred keep;\n\tsetp.ne.b32 keep, " F ", 0;\n\t"                                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." name "." name " {" TESSERA_LIST##count "}, {" A ", " B \
                ", " C ", " D "}, " E ", keep, 1, 1, 0;\n\t}"                                                            \
                : TESSERA_OUT##count : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));                   \
        }                                                                                                                \
    };
// Of 8 bits, 32 terms in the bytes of 16; K-major alone.
template <> struct Product<e4m3, 256> {
    static TESSERA_DEVICE void both_shared(float (&d)[128], uint64_t a, uint64_t b, int keep) {
        asm volatile(
            "{\n\t.reg .pred keep;\n\tsetp.ne.b32 keep, %130, 0;\n\t"
            "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {" TESSERA_LIST128 "}, %128, %129, keep, 1, 1;\n\t}"
            : TESSERA_OUT128 : "l"(a), "l"(b), "r"(keep));
    }
};
TESSERA_PRODUCT(bf16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
TESSERA_PRODUCT(bf16, "bf16", 80, 40, "%40", "%41", "%42", "%43", "%44", "%45")
TESSERA_PRODUCT(bf16, "bf16", 192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
TESSERA_PRODUCT(bf16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
TESSERA_PRODUCT(bf16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
TESSERA_PRODUCT(f16, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
TESSERA_PRODUCT(f16, "f16", 80, 40, "%40", "%41", "%42", "%43", "%44", "%45")
TESSERA_PRODUCT(f16, "f16", 192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
TESSERA_PRODUCT(f16, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
TESSERA_PRODUCT(f16, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
// clang-format on
