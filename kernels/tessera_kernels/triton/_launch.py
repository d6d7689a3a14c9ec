"""What the row-wise and elementwise kernels share on the host and inside: launch counts, one-line guards, loads."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera_shared.errors import KernelError

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that these kernels are compiled for; all of them compute in float32."""

WIDEST_TILE = 2**16
"""Elements of the largest tile of one operand: 64 a thread at 32 warps, and no more at fewer."""

SHARED_BYTES = 227 * 1024
"""Shared memory a program may have on Hopper."""


@triton.jit
def read(pointers, mask, MASKED: tl.constexpr):
    """Load, with zeros where the mask says no; MASKED = False leaves the mask out of the compiled code."""
    if MASKED:  # noqa: SIM108 - decides which code is compiled
        value = tl.load(pointers, mask=mask, other=0.0)
    else:
        value = tl.load(pointers)
    return value


@triton.jit
def write(pointers, value, mask, MASKED: tl.constexpr):
    """Store, rounded to what the pointers point to."""
    if MASKED:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty))


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return how many multiprocessors `device` has; 3 in the interpreter, so that persistent loops turn around."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def num_programs(blocks: int, programs_per_sm: int, device: torch.device) -> int:
    """Return the grid for `blocks` pieces of work: one program each when `programs_per_sm` is 0, else persistent."""
    return blocks if programs_per_sm == 0 else min(blocks, programs_per_sm * num_sms(device))


def as_rows(x: Tensor) -> Tensor:
    """Return x as [rows, width] with unit stride in a row: a view where the strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def expect_tile(what: str, elements: int, num_warps: int) -> None:
    """Raise unless a tile of `elements` fits the registers of `num_warps` warps."""
    limit = min(WIDEST_TILE, num_warps * 32 * 64)
    if elements > limit:
        raise KernelError(
            f"{what} = {elements} elements: expected at most {limit}, because {num_warps} warps hold a tile in registers; "
            "try fewer rows, a smaller block, or config=None"
        )


def expect_prefetch(tile_bytes: int, stages: int) -> None:
    """Raise unless `stages` tiles of `tile_bytes` fit the shared memory, beside what sums across warps need.

    One stage reads nothing ahead. Triton 3.6 gives two stages two buffers of every tile (seen on an H200).
    """
    limit = SHARED_BYTES - 4096
    if stages > 1 and tile_bytes * stages > limit:
        raise KernelError(
            f"stages = {stages} with {tile_bytes} bytes a tile: expected at most {max(1, limit // tile_bytes)}, because the "
            "tiles read ahead lie in shared memory; try fewer stages or config=None"
        )


def graph_op(
    name: str, *, fake: Callable[..., Any], mutates: Iterable[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a launcher callable from both worlds: directly in eager mode, as the opaque `tessera::<name>` when compiled.

    The detour of a custom op costs more host time than a short kernel runs, and only a compiler needs it. `fake` returns
    empty tensors of the result's shapes; `mutates` names the arguments written in place.
    """

    def decorate(launch: Callable[P, R]) -> Callable[P, R]:
        opaque = torch.library.custom_op(f"tessera::{name}", launch, mutates_args=tuple(mutates))
        opaque.register_fake(fake)

        @functools.wraps(launch)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return opaque(*args, **kwargs)  # type: ignore[no-any-return]
            return launch(*args, **kwargs)

        return call

    return decorate


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return the context in which to launch: Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
