"""Memory around a kernel: tensors moved with their surroundings, fresh memory poisoned and fenced.

`fenced_memory` replaces torch's allocating functions while a kernel runs: what they hand out is full of NaN (or the
dtype's least integer), so an output that the kernel forgets to write shows, and lies between two fences of the same,
whose bits are looked at afterwards.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tessera_parity.kernel_cases.case import Tensors, poison_of

FENCE_BYTES = 4096
"""Before and after each allocation: a multiple of what CUDA aligns to, longer than one row of most tiles."""


def whole_storage(tensor: Tensor) -> Tensor:
    """Return all that the tensor's storage holds, as one flat tensor over the same memory."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0)


def moved(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Return a copy on `device` with the same strides, offset and surroundings."""
    storage = whole_storage(tensor).to(device, copy=True)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def moved_all(tensors: Mapping[str, Tensor], device: str | torch.device) -> Tensors:
    """Return copies of all tensors: see `moved`."""
    return {name: moved(tensor, device) for name, tensor in tensors.items()}


def lifted(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors with floating point numbers in float64."""
    return {name: t.to(torch.float64) if t.is_floating_point() else t.clone() for name, t in tensors.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Are shapes, dtypes and all bits equal? A NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(torch.equal(_bits(one), _bits(other)))


def disturbed(before: Tensor, after: Tensor, *, may_write: bool) -> bool:
    """Was memory around `after` written to, or the tensor itself where the kernel may not write?"""
    old, new = _bits(whole_storage(before)), _bits(whole_storage(after))
    changed = old != new
    if may_write:
        changed.as_strided(after.shape, after.stride(), after.storage_offset()).zero_()
    return bool(changed.any())


@dataclass
class Fences:
    """The allocations made while a kernel ran."""

    allocations: list[tuple[Tensor, int, int]] = field(default_factory=list)  # storage, first inner element, one past

    def broken(self) -> int:
        """Return how many allocations were written outside their bounds."""
        return sum(self._is_broken(*allocation) for allocation in self.allocations)

    def allocate(self, size: Any, strides: Any, dtype: torch.dtype, device: Any) -> Tensor:
        """Return poisoned memory between two fences."""
        extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
        fence = FENCE_BYTES // dtype.itemsize
        storage = torch.full((extent + 2 * fence,), poison_of(dtype), dtype=dtype, device=device)
        self.allocations.append((storage, fence, fence + extent))
        return storage.as_strided(size, strides, fence)

    @staticmethod
    def _is_broken(storage: Tensor, first: int, end: int) -> bool:
        expected = torch.full_like(storage[:first], poison_of(storage.dtype))
        after = torch.full_like(storage[end:], poison_of(storage.dtype))
        return not (same_bits(storage[:first], expected) and same_bits(storage[end:], after))


@contextmanager
def fenced_memory() -> Iterator[Fences]:
    """Let `torch.empty`, `empty_like`, `empty_strided` and `Tensor.new_empty` hand out poisoned memory with fences."""
    fences = Fences()
    empty, empty_like = _empty(fences), _empty_like(fences)
    with (
        patch.object(torch, "empty", empty),
        patch.object(torch, "empty_like", empty_like),
        patch.object(torch, "empty_strided", _empty_strided(fences)),
        patch.object(torch.Tensor, "new_empty", _new_empty(empty)),
    ):
        yield fences


def _empty(fences: Fences) -> Callable[..., Tensor]:
    real = torch.empty

    def empty(*size: Any, dtype: Any = None, device: Any = None, requires_grad: bool = False, **rest: Any) -> Tensor:
        plain = real(*size, dtype=dtype, device="meta", **{k: v for k, v in rest.items() if k != "pin_memory"})
        if str(device) == "meta":
            return plain
        return fences.allocate(plain.shape, plain.stride(), plain.dtype, device).requires_grad_(requires_grad)

    return empty


def _empty_like(fences: Fences) -> Callable[..., Tensor]:
    real = torch.empty_like

    def empty_like(tensor: Tensor, *, dtype: Any = None, device: Any = None, **rest: Any) -> Tensor:
        plain = real(tensor, dtype=dtype, device="meta", **rest)
        if (device or tensor.device.type) == "meta":
            return plain
        return fences.allocate(plain.shape, plain.stride(), plain.dtype, device or tensor.device)

    return empty_like


def _empty_strided(fences: Fences) -> Callable[..., Tensor]:
    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        return fences.allocate(tuple(size), tuple(stride), dtype or torch.get_default_dtype(), device)

    return empty_strided


def _new_empty(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def new_empty(self: Tensor, *size: Any, dtype: Any = None, device: Any = None, **rest: Any) -> Tensor:
        return empty(*size, dtype=dtype or self.dtype, device=device or self.device, **rest)

    return new_empty


def _bits(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(width) if tensor.numel() else tensor.detach().to(width)
