"""What a CUDA kernel's Python file uses: launch a `Kernel` on a tensor's device, on torch's current stream.

On a CPU tensor the emulator runs it, where `TESSERA_CUDA_EMULATE=1` or Triton's switch `TRITON_INTERPRET=1` asks for
that: slow, exact about synchronization, for tests. `TESSERA_NVTX=1` puts an nvtx range named after the kernel around
each launch, for Nsight Systems and Nsight Compute.
"""

import ctypes
import functools
import itertools
import operator
import os
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera_kernels.checks import is_interpreting
from tessera_kernels.cuda._compile import Kernel, build, build_emulated
from tessera_kernels.launching import SHARED_BYTES, num_sms, on_device
from tessera_shared.errors import KernelError, MissingDependency
from tessera_shared.once import once

__all__ = ["Int64", "Kernel", "TensorMap", "expect_cuda_device", "launch", "num_sms", "shared_bytes_of", "tensor_map"]

SHARED_BYTES_UNASKED = 48 * 1024
"""Shared memory that a block gets without asking the driver for more."""

MAP_MARK = 0x7E55E7A0B0C5
"""First word of an emulated tensor map (`emulator.hpp`)."""


class Int64(NamedTuple):
    """An argument that the kernel declares as int64_t; a plain int is an int (32 bits)."""

    value: int


@dataclass(frozen=True)
class TensorMap:
    """A `const TESSERA_GRID_CONSTANT TensorMap` argument: 128 bytes made by `tensor_map`. The tensor must outlive it."""

    packed: bytes


Size = tuple[int, int, int]
Argument = Tensor | int | float | Int64 | TensorMap | None


def is_emulating() -> bool:
    """Do CUDA kernels run on CPU tensors?"""
    return is_interpreting() or os.environ.get("TESSERA_CUDA_EMULATE", "0") == "1"


def expect_cuda_device(what: str, tensor: Tensor) -> None:
    """Raise `MissingDependency` unless a CUDA kernel can run where `tensor` lies (a GPU's age is seen at the launch)."""
    if not tensor.is_cuda and not is_emulating():
        raise MissingDependency(
            f"{what} on device {tensor.device}: expected cuda, because these kernels are compiled for a GPU; "
            "try kernels='reference', or TESSERA_CUDA_EMULATE=1 to run the kernel in an emulator on the CPU"
        )


@functools.cache
def shared_bytes_of(device: torch.device) -> int:
    """Return how much shared memory a block may have on `device`; that of Hopper in the emulator."""
    if device.type != "cuda":
        return SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def launch(
    kernel: Kernel,
    *,
    grid: Size,
    block: int | Size,
    arguments: Sequence[Argument],
    like: Tensor,
    shared_bytes: int = 0,
) -> None:
    """Run `kernel` over `grid` blocks of `block` threads (a number lies along x) where `like` lies, and do not wait for it.

    `arguments` in the kernel's order: a Tensor or None is a pointer, an int 32 bits, a float 32 bits. Raises `KernelError`, in
    one line, for what the driver or the emulator refuses.
    """
    memory, layout = _packed(arguments)
    shape = (block, 1, 1) if isinstance(block, int) else block
    if like.is_cuda:
        with on_device(like), _range(kernel):
            addresses = ctypes.addressof(memory) + layout.addresses_at
            _launch_on_gpu(kernel, grid, shape, shared_bytes, addresses, like.device)
    else:
        _emulate(kernel, grid, shape, shared_bytes, ctypes.addressof(memory) + layout.addresses_at, layout.sizes)


@dataclass(frozen=True)
class Layout:
    """How arguments of given types lie in memory, and the addresses that the driver reads after them."""

    form: struct.Struct  # every argument, then every address
    memory: type[ctypes.Array[ctypes.c_char]]
    values: tuple[Callable[[Any], Any], ...]  # from an argument to what is packed
    sizes: tuple[int, ...]  # bytes of each argument
    offsets: tuple[int, ...]
    addresses_at: int


def _packed(arguments: Sequence[Argument]) -> tuple[ctypes.Array[ctypes.c_char], Layout]:
    """Return memory that holds the arguments and an array of their addresses."""
    layout = _layout(tuple(map(type, arguments)))
    memory = layout.memory()
    base = ctypes.addressof(memory)
    values = [value(argument) for value, argument in zip(layout.values, arguments, strict=True)]
    try:
        layout.form.pack_into(memory, 0, *values, *[base + offset for offset in layout.offsets])
    except (struct.error, OverflowError) as error:
        raise KernelError(
            f"arguments = {values}: expected 32-bit integers and floats, because the kernel declares int and float ({error}); try Int64"
        ) from error
    return memory, layout


@functools.cache
def _layout(kinds: tuple[type, ...]) -> Layout:
    parts = [_one(kind) for kind in kinds]
    starts = list(itertools.accumulate((max(size, 8) for *_, size in parts), initial=0))
    codes = [code if size >= 8 else code + "4x" for code, _, size in parts]
    form = struct.Struct("=" + "".join(codes) + "Q" * len(parts))
    values, sizes = tuple(value for _, value, _ in parts), tuple(size for *_, size in parts)
    return Layout(form, ctypes.c_char * form.size, values, sizes, tuple(starts[:-1]), starts[-1])


def _one(kind: type) -> tuple[str, Callable[[Any], Any], int]:
    """Return the code of a type of argument for `struct`, what is packed of one, and its bytes in the kernel."""
    if issubclass(kind, Tensor):
        return "Q", Tensor.data_ptr, 8
    if kind is Int64:
        return "q", operator.itemgetter(0), 8
    if kind is TensorMap:
        return "128s", operator.attrgetter("packed"), 128
    if kind is type(None):
        return "Q", lambda nothing: 0, 8
    return ("f", float, 4) if issubclass(kind, float) else ("i", int, 4)


# ---- on a GPU ----------------------------------------------------------------------------------------------------


def _launch_on_gpu(
    kernel: Kernel, grid: Size, block: Size, shared_bytes: int, addresses: int, device: torch.device
) -> None:
    _enter_context(device)
    driver, function = _function(kernel, device, shared_bytes > SHARED_BYTES_UNASKED)
    stream = torch.cuda.current_stream(device).cuda_stream
    (status,) = driver.cuLaunchKernel(function, *grid, *block, shared_bytes, stream, addresses, 0)
    if status:
        raise _driver_error(
            driver, status, f"launch of {kernel.title} ({grid} blocks of {block}, {shared_bytes} bytes)"
        )


def _enter_context(device: torch.device) -> None:
    """Make the context of `device` current where this thread has none.

    Torch leaves that to the runtime's first call in a thread. In a thread of autograd a backward's launch may come before
    that call, and the driver refuses it as CUDA_ERROR_INVALID_CONTEXT (pytorch/pytorch#124565).
    """
    driver = import_module("cuda.bindings.driver")
    status, current = driver.cuCtxGetCurrent()
    if not status and not int(current):
        (status,) = driver.cuCtxSetCurrent(_primary_context(device.index))
    if status:
        raise _driver_error(driver, status, f"context of {device}")


@functools.cache
def _primary_context(device: int) -> Any:
    """Return the context that torch and the runtime use on one GPU; it stays retained."""
    driver = import_module("cuda.bindings.driver")
    status, context = driver.cuDevicePrimaryCtxRetain(device)
    if status:
        raise _driver_error(driver, status, f"context of cuda:{device}")
    return context


@functools.cache
def _function(kernel: Kernel, device: torch.device, is_large: bool) -> tuple[Any, Any]:
    """Return the driver and the function's handle on one GPU; `is_large`: more shared memory than comes unasked."""
    driver = import_module("cuda.bindings.driver")
    function = _loaded(kernel, device.index)
    if is_large:
        most = shared_bytes_of(device)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuFuncSetAttribute(function, attribute, most)
        if status:
            raise _driver_error(driver, status, f"{most} bytes of shared memory for {kernel.title}")
    return driver, function


@functools.cache
def _loaded(kernel: Kernel, device: int) -> Any:
    """Return the function's handle on one GPU; its module stays loaded."""
    arch = _arch(device)
    if kernel.needs == "sm_90a" and arch != "sm_90a":
        raise KernelError(
            f"compute capability = {arch}: expected sm_90a, because {kernel.entry} uses instructions of Hopper alone; "
            "try kernels='triton'"
        )
    driver = import_module("cuda.bindings.driver")
    status, module = driver.cuModuleLoadData(build(kernel, arch).path.read_bytes())
    if not status:
        status, function = driver.cuModuleGetFunction(module, kernel.entry.encode())
    if status:
        raise _driver_error(driver, status, f"loading {kernel.title} for {arch}")
    return function


@functools.cache
def _arch(device: int) -> str:
    """Return what kernels are compiled for on a GPU: `sm_90a`, `sm_80` for all of 8.x, else the GPU's own."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise MissingDependency(
            f"compute capability = {major}.{minor}: expected 8.0 or higher, because the kernels use its instructions; "
            "try kernels='reference'"
        )
    return {8: "sm_80", 9: "sm_90a"}.get(major, f"sm_{major}{minor}")


def _driver_error(driver: Any, status: Any, what: str) -> KernelError:
    _, text = driver.cuGetErrorString(status)
    said = text.decode() if isinstance(text, bytes) else str(text)
    return KernelError(
        f"{what} = {status.name} ({said}): expected CUDA_SUCCESS, because nothing can be computed otherwise; "
        "try another configuration, or CUDA_LAUNCH_BLOCKING=1 when an earlier kernel may have failed"
    )


def _range(kernel: Kernel) -> AbstractContextManager[object]:
    if not _marks_ranges():
        return nullcontext()
    marked: AbstractContextManager[object] = torch.cuda.nvtx.range(kernel.title)
    return marked


@functools.cache
def _marks_ranges() -> bool:
    return os.environ.get("TESSERA_NVTX", "0") == "1"


# ---- on the CPU --------------------------------------------------------------------------------------------------


def _emulate(
    kernel: Kernel, grid: Size, block: Size, shared_bytes: int, addresses: int, sizes: tuple[int, ...]
) -> None:
    if not is_emulating():
        raise MissingDependency(
            f"{kernel.entry} on the CPU: expected TESSERA_CUDA_EMULATE=1, because only an emulator runs it there; "
            "try kernels='reference'"
        )
    message = ctypes.create_string_buffer(1024)
    entry = _emulated(kernel)
    with _ONE_AT_A_TIME:
        failed = entry(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), ctypes.c_uint(shared_bytes), ctypes.c_void_p(addresses),
            (ctypes.c_int * len(sizes))(*sizes), len(sizes), message, ctypes.c_ulong(len(message)), ctypes.byref(_STACKS),
        )  # fmt: skip
    if failed:
        said = " ".join(message.value.decode(errors="replace").split())
        raise KernelError(
            f"{kernel.entry} in the emulator = {said}: expected a run without that, because a GPU hangs, faults or answers "
            "anything there; try the line of the kernel that does it"
        )


_STACKS = once("stacks of emulated threads", ctypes.c_void_p)
"""Memory of the emulator's threads, which the first launch makes; one launch at a time has it."""

_ONE_AT_A_TIME = once("emulated launches", threading.Lock)


@functools.cache
def _emulated(kernel: Kernel) -> Any:
    return getattr(ctypes.CDLL(str(build_emulated(kernel))), f"tessera_launch_{kernel.entry}")


# ---- tensor maps -------------------------------------------------------------------------------------------------


def tensor_map(tensor: Tensor, box: tuple[int, int, int, int], *, l2_bytes: int = 256) -> TensorMap:
    """Return the map by which `load_box` brings boxes of a 4-dimensional tensor into shared memory, 128-byte swizzle.

    `box`: sizes in the tensor's order of dimensions, the last 64 numbers of 2 bytes. In shared memory a box is rows of
    128 bytes, the tensor's third dimension running fastest, then the second, then the first; `load_box` takes its corner
    in the opposite order (c0 along the last dimension). Places outside the tensor read as zero. `l2_bytes`: 128 or 256,
    what a miss brings into L2. Raises `KernelError` for what the copy engine cannot do.
    """
    sizes, strides = _expect_mappable(tensor, box)
    if not tensor.is_cuda:
        return _emulated_map(tensor, sizes, strides, box)
    _enter_context(tensor.device)
    driver = import_module("cuda.bindings.driver")
    promotion = driver.CUtensorMapL2promotion
    near, far = promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B, promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B
    memory = ctypes.create_string_buffer(256)
    made = -(-ctypes.addressof(memory) // 128) * 128
    status = _encode_tiled()(
        made,
        int(driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),  # zeros are zeros in float16 as well
        4,
        tensor.data_ptr(),
        (ctypes.c_uint64 * 4)(*sizes),
        (ctypes.c_uint64 * 3)(*strides),
        (ctypes.c_uint32 * 4)(*reversed(box)),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
        int(driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
        int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B),
        int(far if l2_bytes == 256 else near),
        int(driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
    )
    if status:
        raise _driver_error(driver, driver.CUresult(status), f"tensor map of {list(tensor.shape)}, box {list(box)}")
    return TensorMap(ctypes.string_at(made, 128))


def is_mappable(rows: Tensor) -> bool:
    """Can the copy engine read a matrix as it lies? Rows without overlap that begin at multiples of 16 bytes."""
    count, width = rows.shape
    stride = rows.stride(0)
    apart = count == 1 or (stride * rows.element_size() % 16 == 0 and stride >= width)
    return rows.stride(1) == 1 and rows.data_ptr() % 16 == 0 and apart


@functools.cache
def _encode_tiled() -> Any:
    """Return the driver's cuTensorMapEncodeTiled.

    It wants a map's address at a multiple of 64, and that of cuda-bindings lies at any multiple of 16.
    """
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    encode.argtypes = (pointer, number, number, *(pointer,) * 5, *(number,) * 4)
    encode.restype = ctypes.c_int
    return encode


def _expect_mappable(tensor: Tensor, box: tuple[int, int, int, int]) -> tuple[list[int], list[int]]:
    """Return sizes, and the bytes between neighbours of all dimensions but the last; innermost first."""
    if tensor.ndim != 4 or 0 in tensor.shape:
        raise _unmappable("shape", list(tensor.shape), "4 dimensions, none empty", "a map describes those")
    if tensor.element_size() != 2 or tensor.stride(3) != 1:
        wanted = "2-byte numbers with stride 1 in the last dimension"
        raise _unmappable("dtype and strides", (tensor.dtype, list(tensor.stride())), wanted, "rows are copied whole")
    if box[3] != 64 or not all(1 <= size <= 256 for size in box):
        raise _unmappable("box", list(box), "[.., .., .., 64], none above 256", "a swizzled row has 128 bytes")
    sizes = [int(size) for size in reversed(tensor.shape)]
    strides, dense = [], 2 * sizes[0]
    for size, stride in zip(sizes[1:], reversed(tensor.stride()[:3]), strict=True):
        dense = -(-dense // 16) * 16 if size == 1 else 2 * stride  # of a dimension of size 1 the stride means nothing
        strides.append(dense)
        dense *= size
    if tensor.data_ptr() % 16 or any(stride % 16 or not 0 < stride < 2**40 for stride in strides):
        found = (tensor.data_ptr() % 16, strides)
        raise _unmappable(
            "address modulo 16, strides in bytes", found, "multiples of 16", "the copy engine takes those"
        )
    return sizes, strides


def _unmappable(what: str, found: object, wanted: str, because: str) -> KernelError:
    return KernelError(f"tensor map, {what} = {found}: expected {wanted}, because {because}; try .contiguous()")


def _emulated_map(tensor: Tensor, sizes: list[int], strides: list[int], box: tuple[int, ...]) -> TensorMap:
    words = (MAP_MARK, tensor.data_ptr(), *strides, *sizes, *reversed(box), tensor.element_size())
    return TensorMap(struct.pack("=2Q3Q4I4II", *words).ljust(128, b"\0"))
