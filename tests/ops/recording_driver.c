/* A libcuda.so.1 that computes nothing, says each call in a line, and refuses a thread without a context as the real one does. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
typedef int Status;
typedef void *Handle;

static __thread Handle current;

Status cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
Status cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Status cuGetErrorString(int status, const char **text) { *text = status == INVALID_CONTEXT ? "no context" : "refused"; return SUCCESS; }
Status cuCtxGetCurrent(Handle *context) { *context = current; return SUCCESS; }
Status cuCtxSetCurrent(Handle context) { current = context; return SUCCESS; }

Status cuDevicePrimaryCtxRetain(Handle *context, int device) {
    printf("retain %d\n", device);
    *context = (Handle)(uintptr_t)(0x1000 + device);
    return SUCCESS;
}

Status cuModuleLoadData(Handle *module, const void *image) {
    printf("load %.3s\n", (const char *)image + 1);
    *module = (Handle)0x20;
    return current ? SUCCESS : INVALID_CONTEXT;
}

Status cuModuleGetFunction(Handle *function, Handle module, const char *name) {
    printf("function %s\n", name);
    *function = (Handle)0x30;
    return module == (Handle)0x20 ? SUCCESS : INVALID_VALUE;
}

Status cuFuncSetAttribute(Handle function, int attribute, int value) {
    printf("attribute %d %d\n", attribute, value);
    return function == (Handle)0x30 ? SUCCESS : INVALID_VALUE;
}

/* The arguments are a map, an int64, an int, a float and a pointer, as the test passes them. */
Status cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                      Handle stream, void **arguments, void **extra) {
    if (!current) return INVALID_CONTEXT;
    const unsigned char *map = arguments[0];
    printf("launch %u %u %u, %u %u %u, %u, stream %p, extra %d, function %p: %d %d, %llx, %d, %g, %p\n", gx, gy, gz, bx, by, bz, shared,
           stream, extra != 0, function, map[1], map[127], *(unsigned long long *)arguments[1], *(int *)arguments[2],
           *(float *)arguments[3], *(void **)arguments[4]);
    return SUCCESS;
}

Status cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const uint64_t *sizes, const uint64_t *strides,
                              const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
    if (!current) return INVALID_CONTEXT;
    if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || sizes[0] == 666) return INVALID_VALUE;
    printf("map %d %u, %llu %llu %llu %llu, %llu %llu %llu, %u %u %u %u, %u %u %u %u, %d %d %d %d\n", type, rank,
           (unsigned long long)sizes[0], (unsigned long long)sizes[1], (unsigned long long)sizes[2], (unsigned long long)sizes[3],
           (unsigned long long)strides[0], (unsigned long long)strides[1], (unsigned long long)strides[2], box[0], box[1], box[2], box[3],
           steps[0], steps[1], steps[2], steps[3], interleave, swizzle, promotion, fill);
    for (int i = 0; i < 128; ++i) ((unsigned char *)map)[i] = (unsigned char)i;
    return SUCCESS;
}

/* cuda-bindings asks for every function by this one. */
Status cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
    (void)version, (void)flags;
    *found = strcmp(name, "cuGetProcAddress") ? dlsym(dlopen("libcuda.so.1", RTLD_NOW), name) : (void *)cuGetProcAddress_v2;
    if (status) *status = *found ? 0 : 1;
    return *found ? SUCCESS : NOT_FOUND;
}

Status cuGetProcAddress(const char *name, void **found, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
