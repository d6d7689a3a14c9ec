"""RMSNorm forward and backward, alone and after a residual add, beside Liger, torch and torch.compile.

Backwards are timed through each side's backward function, not autograd: autograd runs on the forward's stream and cannot
be captured apart from it. Liger's backward writes dx over dy by default and else into a tensor that it zeroes first; both
are timed and the must is against the faster one. What lies in the overwritten dy wanders off within a few samples, which
memory-bound work does not feel.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from harness import Function, Row, available, best_of, choose, device, measure, turn
from torch import Tensor
from torch.nn import functional

from tessera_kernels.triton import rms_norm as ours

EPS = 1e-6
SHAPES = ((16384, 4096), (32768, 2048), (4096, 16384))
Makers = Mapping[str, Callable[[], Function]]


def rows() -> Iterator[Row]:
    for x_rows, width in turn(choose(SHAPES, ((5, 64),))):
        x, residual, dy, dtotal = (torch.randn(x_rows, width, device=device(), dtype=torch.bfloat16) for _ in range(4))
        gain = torch.randn(width, device=device(), dtype=torch.bfloat16)
        for name, bytes_each, must, function, makers in (
            _forward(x, gain),
            _backward(x, gain, dy),
            _add_forward(x, residual, gain),
            _add_backward(x, gain, dy, dtotal),
        ):
            times = measure({"ours": function, **available(makers)})
            peers = {peer: timing for peer, timing in times.items() if peer != "ours"}
            peers |= best_of("liger best", times, [name for name in makers if name in LIGER_BACKWARDS])
            yield Row(
                op="rms_norm", shape=f"{name} {x_rows}x{width} bfloat16", ours=times["ours"], peers=peers,
                bytes_moved=float(bytes_each * x.numel()), must=must,
            )  # fmt: skip


LIGER_BACKWARDS = ("liger in place", "liger apart")


Part = tuple[str, int, dict[str, float], Function, Makers]


def _forward(x: Tensor, gain: Tensor) -> Part:
    def liger() -> Function:
        from liger_kernel.ops.rms_norm import rms_norm_forward

        return lambda: rms_norm_forward(x, gain, EPS, 0.0, "llama", None)

    def plain() -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), gain, EPS)

    makers = {"liger": liger, "torch": lambda: plain, "compiled": lambda: torch.compile(plain)}
    return (
        "forward",
        4,
        {"liger": 0.98, "share": 0.93},
        lambda: ours.run_forward(x, None, gain, EPS, False, []),
        makers,
    )


def _backward(x: Tensor, gain: Tensor, dy: Tensor) -> Part:
    rstd = ours.run_forward(x, None, gain, EPS, False, [])[2]

    def liger(in_place: bool) -> Function:
        from liger_kernel.ops.rms_norm import rms_norm_backward, rms_norm_forward

        _, saved, scale, block, warps, mode = rms_norm_forward(x, gain, EPS, 0.0, "llama", None)
        own = dy.clone() if in_place else dy
        return lambda: rms_norm_backward(own, saved, gain, scale, 0.0, mode, block, warps, in_place, None)

    def plain() -> Function:
        _, scale = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], gain, EPS)
        return lambda: torch.ops.aten._fused_rms_norm_backward(dy, x, [x.shape[-1]], scale, gain, [True, True])

    def function() -> object:
        return ours.run_backward(dy, x, gain, rstd, None, False, [])

    makers = {"liger in place": lambda: liger(True), "liger apart": lambda: liger(False), "torch": plain}
    return "backward", 6, {"liger best": 1.8, "torch": 1.5, "share": 0.8}, function, makers


def _add_forward(x: Tensor, residual: Tensor, gain: Tensor) -> Part:
    def liger() -> Function:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

        return lambda: fused_add_rms_norm_forward(x, residual, gain, EPS, 0.0, "llama")

    def plain() -> tuple[Tensor, Tensor]:
        total = x + residual
        return functional.rms_norm(total, (x.shape[-1],), gain, EPS), total

    makers = {"liger": liger, "compiled": lambda: torch.compile(plain)}
    must = {"liger": 0.98, "share": 0.93}
    return "add forward", 8, must, lambda: ours.run_forward(x, residual, gain, EPS, False, []), makers


def _add_backward(x: Tensor, gain: Tensor, dy: Tensor, dtotal: Tensor) -> Part:
    rstd = ours.run_forward(x, None, gain, EPS, False, [])[2]

    def liger() -> Function:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_backward, fused_add_rms_norm_forward

        _, total, scale, block, warps, stages, mode = fused_add_rms_norm_forward(
            x, torch.zeros_like(x), gain, EPS, 0.0, "llama"
        )
        return lambda: fused_add_rms_norm_backward(
            dy, dtotal, total, gain, scale, 0.0, mode, block, warps, stages, False
        )

    def function() -> object:
        return ours.run_backward(dy, x, gain, rstd, dtotal, False, [])

    return "add backward", 8, {"share": 0.8}, function, {"liger": liger}
