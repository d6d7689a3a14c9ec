"""What the host side of every kernel shares, whatever language the kernel is written in."""

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that the row-wise and elementwise kernels are compiled for; all of them compute in float32."""

SHARED_BYTES = 227 * 1024
"""Shared memory that a program, or a block, may have on Hopper."""


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return how many multiprocessors `device` has; 3 on a CPU, so that persistent loops turn around in tests."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def as_rows(x: Tensor) -> Tensor:
    """Return x as [rows, width] with unit stride in a row: a view where the strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


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
    """Return the context in which to launch: kernels go to the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
