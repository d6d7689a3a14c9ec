"""What the row-wise and elementwise kernels share on the host and inside: launch counts, one-line guards, loads."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import torch
import triton
import triton.language as tl

from tessera_kernels.launching import FLOATS as FLOATS
from tessera_kernels.launching import SHARED_BYTES as SHARED_BYTES
from tessera_kernels.launching import as_rows as as_rows
from tessera_kernels.launching import graph_op as graph_op
from tessera_kernels.launching import num_sms as num_sms
from tessera_kernels.launching import on_device as on_device
from tessera_shared.errors import KernelError

WIDEST_TILE = 2**16
"""Elements of the largest tile of one operand: 64 a thread at 32 warps, and no more at fewer."""


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


def num_programs(blocks: int, programs_per_sm: int, device: torch.device) -> int:
    """Return the grid for `blocks` pieces of work: one program each when `programs_per_sm` is 0, else persistent."""
    return blocks if programs_per_sm == 0 else min(blocks, programs_per_sm * num_sms(device))


def is_far(*tensors: torch.Tensor, dim: int) -> bool:
    """Do the last numbers along `dim` lie further on than 32 bits count? Strides come to a kernel in 32 where they fit."""
    return any((tensor.shape[dim] - 1) * tensor.stride(dim) >= 2**31 for tensor in tensors)


def expect_tile(what: str, elements: int, num_warps: int) -> None:
    """Raise unless a tile of `elements` fits the registers of `num_warps` warps."""
    limit = min(WIDEST_TILE, num_warps * 32 * 64)
    if elements > limit:
        raise KernelError(
            f"{what} = {elements} elements: expected at most {limit}, because {num_warps} warps hold a tile in registers; "
            "try fewer rows, a smaller block, or config=None"
        )
