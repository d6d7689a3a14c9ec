"""SwiGLU elementwise beside Liger and torch.compile; the fused gate-up GEMM beside the plain GEMM of the same size."""

from collections.abc import Callable, Iterator

import torch
from harness import Function, Row, available, choose, device, measure, turn
from torch import Tensor
from torch.nn import functional

from tessera_kernels.triton import swiglu as ours
from tessera_kernels.triton._gate_up import gate_up_forward

ELEMENTWISE = ((8192, 14336), (16384, 8192), (32768, 2816))
GEMMS = ((8192, 4096, 14336), (16384, 2048, 8192), (4096, 4096, 11008))


def rows() -> Iterator[Row]:
    for shape in turn(choose((*GEMMS, *ELEMENTWISE), ((5, 16, 24), (3, 40)))):
        yield from _gemm(*shape) if len(shape) == 3 else _elementwise(*shape)


def _elementwise(x_rows: int, width: int) -> Iterator[Row]:
    gate, up, dact = (torch.randn(x_rows, width, device=device(), dtype=torch.bfloat16) for _ in range(3))

    def plain() -> Tensor:
        return (functional.silu(gate.float()) * up.float()).bfloat16()

    def liger() -> Function:
        from liger_kernel.ops.swiglu import swiglu_forward

        return lambda: swiglu_forward(gate, up)

    def liger_backward() -> Function:
        from liger_kernel.ops.swiglu import swiglu_backward

        own = gate.clone(), up.clone()  # it writes both gradients over its operands, as it does by default
        return lambda: swiglu_backward(*own, dact)

    forward = measure(
        {"ours": lambda: ours._run_forward(gate, up, [])}
        | available({"liger": liger, "compiled": lambda: torch.compile(plain)})
    )
    backward = measure(
        {"ours": lambda: ours._run_backward(dact, gate, up, [])} | available({"liger in place": liger_backward})
    )
    shape = f"{x_rows}x{width} bfloat16"
    yield Row(
        op="swiglu", shape=f"forward {shape}", ours=forward.pop("ours"), peers=forward,
        bytes_moved=6.0 * gate.numel(), must={"liger": 0.98, "share": 0.93},
    )  # fmt: skip
    yield Row(
        op="swiglu", shape=f"backward {shape}", ours=backward.pop("ours"), peers=backward,
        bytes_moved=10.0 * gate.numel(), must={"liger in place": 1.0, "share": 0.9},
    )  # fmt: skip


def _gemm(x_rows: int, depth: int, width: int) -> Iterator[Row]:
    x = torch.randn(x_rows, depth, device=device(), dtype=torch.bfloat16)
    both = torch.randn(2 * width, depth, device=device(), dtype=torch.bfloat16) * depth**-0.5
    gate, up = both[:width], both[width:]

    def pair() -> Tensor:
        product = functional.linear(x, both)
        return ours.swiglu(product[:, :width], product[:, width:])

    peers: dict[str, Callable[[], Function]] = {
        "plain GEMM": lambda: lambda: functional.linear(x, both),
        "GEMM and our elementwise": lambda: pair,
    }
    for name, keep in (("inference", False), ("training, products kept", True)):
        function = _fused(x, gate, up, keep)
        times = measure({"ours": function} | available(peers))
        yield Row(
            op="swiglu", shape=f"gate-up GEMM {name} {x_rows}x{depth}x2*{width} bfloat16", ours=times.pop("ours"),
            peers=times, flops=4.0 * x_rows * depth * width, limit="cublas", must={"plain GEMM": 1 / 1.08},
        )  # fmt: skip


def _fused(x: Tensor, gate: Tensor, up: Tensor, keep: bool) -> Function:
    return lambda: gate_up_forward(x, gate, up, keep, [])
