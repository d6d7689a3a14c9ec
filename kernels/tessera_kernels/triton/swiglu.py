"""SwiGLU: the activation between two projections, elementwise, and fused into the GEMM that makes its operands.

    act = g sigma(g) u;   dg = dact u sigma(g) (1 + g (1 - sigma(g)));   du = dact g sigma(g)   (Shazeer, arXiv 2002.05202)

       columns F ->                  HBM        gate and up read once, act written once (backward: 3 read, 2 written)
    +-------+-------+-------+        registers  one block of each operand, in float32
    | BLOCK | BLOCK | BLOCK | ...    shared     nothing
    +-------+-------+-------+        dense operands are one long row; strided rows (halves of one buffer) are walked apart

float32 throughout, rounded once, as in `tessera_kernels.reference.swiglu`. `gate_up_swiglu` is in `_gate_up.py`.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: ARG001 - a fake takes what its op takes

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera_kernels.checks import (
    expect_dtype,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
    expect_triton_device,
)
from tessera_kernels.triton._gate_up import GateUpConfig, gate_up_forward
from tessera_kernels.triton._launch import FLOATS, as_rows, graph_op, on_device, read, write
from tessera_kernels.triton._row_math import LOG2_E


class SwigluConfig(NamedTuple):
    """How the elementwise kernels are cut up. Integers only: it travels through a custom op's schema."""

    block: int  # elements of a program
    num_warps: int


CONFIGS: tuple[SwigluConfig, ...] = (
    SwigluConfig(1024, 4),
    SwigluConfig(2048, 4),
    SwigluConfig(2048, 8),
    SwigluConfig(4096, 8),
    SwigluConfig(4096, 4),
    SwigluConfig(8192, 16),
)
"""Every configuration that the GPU lane runs and the sweep times; `choose_config` picks."""


def choose_config(numel: int, itemsize: int) -> SwigluConfig:
    """Return the configuration for `numel` elements: two 16-byte loads of each operand a thread in two-byte dtypes."""
    return SwigluConfig(2048, 4) if itemsize == 2 and numel >= 2**18 else SwigluConfig(1024, 4)


@triton.jit
def _exp(x, WIDE: tl.constexpr):
    """e^x; WIDE: to a few units of 6e-8 of itself however far x is from 0, where tl.exp loses |x| of them.

    2^n e^(x - n ln 2) with ln 2 in two parts, n times the first of which is exact (Cody and Waite 1980). 88.7228 is the last x
    whose power float32 holds.
    """
    if WIDE:
        inside = tl.where(x > 88.7228, 88.7228, tl.where(x < -104.0, -104.0, x))
        n = tl.floor(inside * LOG2_E)
        rest = (inside - n * 0.693359375) + n * 2.1219444005469058e-4
        power = tl.where(x > 88.7228, float("inf"), tl.exp2(rest * LOG2_E) * tl.exp2(n))
    else:
        power = tl.exp(x)
    return power


@triton.jit
def _forward_kernel(gate, up, act, F, blocks, gate_stride, up_stride, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    columns = tl.arange(0, BLOCK)
    inside = columns < F - start
    g = read(gate + (row * gate_stride + start) + columns, inside, not EVEN).to(tl.float32)
    u = read(up + (row * up_stride + start) + columns, inside, not EVEN).to(tl.float32)
    write(
        act + (row * F + start) + columns,
        g / (1.0 + _exp(-g, gate.dtype.element_ty == tl.float32)) * u,
        inside,
        not EVEN,
    )


@triton.jit
def _backward_kernel(
    dact, gate, up, dgate, dup, F, blocks, dact_stride, gate_stride, up_stride, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    columns = tl.arange(0, BLOCK)
    inside = columns < F - start
    g = read(gate + (row * gate_stride + start) + columns, inside, not EVEN).to(tl.float32)
    u = read(up + (row * up_stride + start) + columns, inside, not EVEN).to(tl.float32)
    upstream = read(dact + (row * dact_stride + start) + columns, inside, not EVEN).to(tl.float32)
    sigmoid = 1.0 / (1.0 + _exp(-g, gate.dtype.element_ty == tl.float32))
    write(dgate + (row * F + start) + columns, upstream * u * (sigmoid * (1.0 + g * (1.0 - sigmoid))), inside, not EVEN)
    write(dup + (row * F + start) + columns, upstream * (g * sigmoid), inside, not EVEN)


def swiglu(gate_XF: Tensor, up_XF: Tensor, *, config: SwigluConfig | None = None) -> Tensor:
    """Return silu(gate) * up in their dtype; any leading dimensions, rows may be strided."""
    expect_triton_device("gate_XF", gate_XF)
    expect_dtype("gate_XF", gate_XF, *FLOATS)
    expect_same_device({"gate_XF": gate_XF, "up_XF": up_XF})
    expect_same_dtype({"gate_XF": gate_XF, "up_XF": up_XF})
    expect_shape("up_XF", up_XF, gate_XF.shape, "it is multiplied by gate_XF")
    if gate_XF.numel() == 0:
        return gate_XF * up_XF
    act = _Swiglu.apply(as_rows(gate_XF), as_rows(up_XF), list(config or ()))
    return act.view(gate_XF.shape)  # type: ignore[no-any-return]


def gate_up_swiglu(x_XD: Tensor, gate_FD: Tensor, up_FD: Tensor, *, config: GateUpConfig | None = None) -> Tensor:
    """Return silu(x gate^T) * (x up^T) by one GEMM with the activation in its epilogue; any leading dimensions of x.

    Both products round to x's dtype before the activation, as the plain projections do. The backward keeps both products
    (written by the same kernel, only when a gradient is wanted), makes their gradients in one elementwise pass and
    leaves the four products to cuBLAS.
    """
    tensors = {"x_XD": x_XD, "gate_FD": gate_FD, "up_FD": up_FD}
    expect_triton_device("x_XD", x_XD)
    expect_dtype("x_XD", x_XD, *FLOATS)
    expect_same_device(tensors)
    expect_same_dtype(tensors)
    expect_shape("gate_FD", gate_FD, (None, x_XD.shape[-1]), "its rows are multiplied by rows of x_XD")
    expect_shape("up_FD", up_FD, gate_FD.shape, "gate and up have one shape")
    shape = (*x_XD.shape[:-1], gate_FD.shape[0])
    if x_XD.numel() * gate_FD.numel() == 0:
        return torch.nn.functional.linear(x_XD, gate_FD + up_FD)
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
    act = _GateUp.apply(as_rows(x_XD), as_rows(gate_FD), as_rows(up_FD), wants_gradient, list(config or ()))
    return act.view(shape)  # type: ignore[no-any-return]


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, config: list[int]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.config = config
        return _run_forward(gate, up, config)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dact: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *_run_backward(dact, gate, up, ctx.config), None


class _GateUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, wants_gradient: bool, config: list[int]
    ) -> Tensor:
        act, gate, up = gate_up_forward(x, gate_weight, up_weight, wants_gradient, config)
        ctx.save_for_backward(x, gate_weight, up_weight, gate, up)
        return act

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dact: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_weight, up_weight, gate, up = ctx.saved_tensors
        dgate, dup = _run_backward(dact, gate, up, [])
        needs_x, needs_gate, needs_up = ctx.needs_input_grad[:3]
        dx = torch.addmm(dgate @ gate_weight, dup, up_weight) if needs_x else None
        return dx, dgate.T @ x if needs_gate else None, dup.T @ x if needs_up else None, None, None


def _fake_forward(gate: Tensor, up: Tensor, config: list[int]) -> Tensor:
    return gate.new_empty(gate.shape)


@graph_op("swiglu_forward", fake=_fake_forward)
def _run_forward(gate: Tensor, up: Tensor, config: list[int]) -> Tensor:
    act = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, width, cut, blocks = _cut(config, gate, up)
    with on_device(gate):
        _forward_kernel[(rows * blocks,)](
            gate, up, act, width, blocks, gate.stride(0), up.stride(0), BLOCK=cut.block, EVEN=width % cut.block == 0,
            num_warps=cut.num_warps,
        )  # fmt: skip
    return act


def _fake_backward(dact: Tensor, gate: Tensor, up: Tensor, config: list[int]) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@graph_op("swiglu_backward", fake=_fake_backward)
def _run_backward(dact: Tensor, gate: Tensor, up: Tensor, config: list[int]) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup, dact = torch.empty_like(dgate), as_rows(dact)
    rows, width, cut, blocks = _cut(config, dact, gate, up)
    with on_device(gate):
        _backward_kernel[(rows * blocks,)](
            dact, gate, up, dgate, dup, width, blocks, dact.stride(0), gate.stride(0), up.stride(0),
            BLOCK=cut.block, EVEN=width % cut.block == 0, num_warps=cut.num_warps,
        )  # fmt: skip
    return dgate, dup


def _cut(config: list[int], *operands: Tensor) -> tuple[int, int, SwigluConfig, int]:
    """Return rows, width, configuration and blocks a row; dense operands are a single row."""
    rows, width = operands[0].shape
    if all(operand.is_contiguous() for operand in operands):
        rows, width = 1, rows * width
    cut = SwigluConfig(*config) if config else choose_config(rows * width, operands[0].element_size())
    return rows, width, cut, triton.cdiv(width, cut.block)
