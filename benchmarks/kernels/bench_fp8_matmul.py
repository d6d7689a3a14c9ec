"""Does the E4M3 product reach torch._scaled_mm, by tensor, by row and by block, with either accumulation?

    python benchmarks/kernels/run_all.py --only fp8_matmul        the table
    python benchmarks/kernels/sweeping.py fp8_matmul              every configuration

Fast accumulation is held against the library's fast one, accurate against its accurate one.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from harness import Row
from sweeping import Sweep

from tessera_kernels.fp8_scaling import BLOCK, SCALINGS, quantize_fp8
from tessera_kernels.triton import fp8_matmul as kernel

SHAPES = ((8192, 8192, 8192), (8192, 8192, 4096), (4096, 7168, 16384), (64, 8192, 8192))
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def rows() -> Iterator[Row]:
    """Yield one row for each shape, scaling and accumulation."""
    shapes = harness.choose(SHAPES, ((70, 96, 256),))
    for shape, scaling in harness.turn((shape, scaling) for shape in shapes for scaling in SCALINGS):
        given = operands(*shape, scaling)
        for accumulation in kernel.ACCUMULATIONS:
            if scaling != "block" or accumulation == "accurate":
                yield _row(given, scaling, accumulation)


def operands(count: int, outputs: int, width: int, scaling: str) -> Operands:
    """Return codes of random numbers and their scales."""
    a = torch.randn(count, width, device=harness.device())
    b = torch.randn(outputs, width, device=harness.device()) / width**0.5
    codes_a, scale_a = quantize_fp8(a, scaling=scaling)
    codes_b, scale_b = quantize_fp8(b, scaling=scaling, block_rows=BLOCK)
    return codes_a, codes_b, scale_a, scale_b


def _row(given: Operands, scaling: str, accumulation: str) -> Row:
    a, b = given[:2]
    ours = functools.partial(kernel.fp8_matmul, *given, scaling=scaling, accumulation=accumulation)
    timing = harness.measure({"ours": ours} | harness.available(peers(given, scaling, accumulation)))
    is_goal = accumulation == "fast" and a.shape[0] >= 4096
    return Row(
        op="fp8_matmul",
        shape=f"{scaling} {accumulation} X{a.shape[0]} F{b.shape[0]} D{a.shape[1]}",
        ours=timing["ours"],
        peers={peer: time for peer, time in timing.items() if peer != "ours"},
        flops=2.0 * a.shape[0] * b.shape[0] * a.shape[1],
        bytes_moved=float(a.numel() + b.numel() + 2 * a.shape[0] * b.shape[0]),
        limit="fp8" if a.shape[0] > 64 else "copy",
        must={"_scaled_mm": 0.95, "share": 0.62} if is_goal else {},
        notes=f"{kernel.choose_config(a.shape[0], b.shape[0], a.shape[1], scaling, accumulation)}",
    )


def peers(given: Operands, scaling: str, accumulation: str) -> dict[str, Callable[[], Any]]:
    """Return the makers of the library's products, in E4M3 and in bfloat16."""
    a, b, scale_a, scale_b = given
    scales = {
        "tensor": lambda: (scale_a, scale_b),
        "row": lambda: (scale_a[:, None], scale_b[None, :]),
        "block": lambda: (scale_a.t().contiguous().t(), scale_b.t()),  # it wants the scales of a row apart
    }[scaling]()
    library = functools.partial(
        torch._scaled_mm, a, b.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16,
        use_fast_accum=accumulation == "fast",
    )  # fmt: skip
    wide_a, wide_b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    return {
        "_scaled_mm": lambda: library,
        "cuBLAS bf16": lambda: functools.partial(torch.nn.functional.linear, wide_a, wide_b),
    }


def sweeps() -> Iterator[Sweep]:
    """Yield every scaling and accumulation at large, long and few-row shapes, the library beside them."""
    shapes = harness.choose((SHAPES[0], SHAPES[2], SHAPES[3]), ((70, 96, 256),))
    for count, outputs, width in shapes:
        for scaling in SCALINGS:
            given = operands(count, outputs, width, scaling)
            for accumulation in kernel.ACCUMULATIONS[: 1 if scaling == "block" else 2]:
                run = functools.partial(kernel.fp8_matmul, *given, scaling=scaling, accumulation=accumulation)
                yield Sweep(
                    part=f"{scaling} {accumulation}",
                    key="up to 64 rows" if count <= 64 else "more rows",
                    shape=f"X{count} F{outputs} D{width}",
                    current=kernel.choose_config(count, outputs, width, scaling, accumulation),
                    candidates={config: functools.partial(run, config=config) for config in kernel.CONFIGS},
                    beside=harness.available({"_scaled_mm": peers(given, scaling, accumulation)["_scaled_mm"]}),
                    work=2.0 * count * outputs * width,
                    limit="fp8",
                )
