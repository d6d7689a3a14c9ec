"""Triton's interpreter rounds float32 to bfloat16 toward zero; the hardware rounds to nearest, ties to even. Corrected here."""

from typing import Any

import torch
import triton.language as tl


def round_to_nearest() -> None:
    """Let the interpreter's conversions to bfloat16 round as the GPU's do, for this process. Calling it twice is harmless.

    Without it every bfloat16 result on the CPU is off by up to a unit in the last place that no GPU would show.
    """
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder.cast_impl, "rounds_to_nearest", False):
        return
    plain_cast, plain_convert = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any) -> Any:
        if _is_to_bfloat16(source, target):
            return interpreter.TensorHandle(_nearest(source.data), target.scalar)
        return plain_cast(self, source, target)

    def convert(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if _is_to_bfloat16(source, target) and rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ:
            return interpreter.TensorHandle(_nearest(source.data), target.scalar)
        return plain_convert(self, source, target, rounding_mode)

    cast.rounds_to_nearest = True  # type: ignore[attr-defined]
    builder.cast_impl, builder.create_fp_to_fp = cast, convert


def _is_to_bfloat16(source: Any, target: Any) -> bool:
    return bool(source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16)


def _nearest(numbers: Any) -> Any:
    return torch.from_numpy(numbers.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
