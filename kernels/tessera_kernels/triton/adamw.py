"""AdamW over a flat shard in one launch: float32 state in place, step and rate read from the device, copy-out beside.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2,  t = step + 1          (Loshchilov & Hutter, arXiv 1711.05101, alg. 2)
    p = p - lr ((m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps) + wd p)

       elements ->                       HBM        p, m, v read and written, g read: 28 bytes an element with float32
    +-------+-------+-------+                       gradients; the copy, if any, written in the same pass
    | BLOCK | BLOCK | BLOCK | ...        registers  one block of each; both bias corrections, made once a program
    +-------+-------+-------+            shared     nothing

Every product and sum rounds to float32 in the order of `tessera_kernels.reference.adamw` (contraction is off, roots and
quotients are IEEE). Division by a bias correction is multiplication by its float32 reciprocal, as torch does it on a GPU.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: ARG001 - a fake takes what its op takes

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera_kernels.checks import (
    expect_between,
    expect_contiguous,
    expect_dtype,
    expect_same_device,
    expect_shape,
    expect_triton_device,
)
from tessera_kernels.triton._launch import FLOATS, graph_op, num_programs, on_device, read, write


class AdamWConfig(NamedTuple):
    """How the shard is cut up. Integers only: it travels through a custom op's schema."""

    block: int  # elements a program takes at a time
    num_warps: int
    programs_per_sm: int  # 0 = a program for each block


CONFIGS: tuple[AdamWConfig, ...] = (
    AdamWConfig(1024, 4, 0),
    AdamWConfig(512, 4, 0),
    AdamWConfig(2048, 8, 0),
    AdamWConfig(2048, 4, 0),
    AdamWConfig(1024, 4, 8),
    AdamWConfig(1024, 4, 16),
    AdamWConfig(2048, 8, 4),
)
"""Every configuration that the GPU lane runs and the sweep times; `choose_config` picks."""


def choose_config(numel: int) -> AdamWConfig:
    """Return the configuration for a shard of `numel` elements."""
    return AdamWConfig(1024, 4, 0) if numel >= 2**20 else AdamWConfig(512, 4, 0)


@triton.jit
def _correction(step, log_beta: tl.constexpr):
    # 1 - b^t cancels for b near 1: float64, where it costs one exponential a program.
    power = tl.exp(step.to(tl.float64) * tl.full((), log_beta, tl.float64))
    return tl.div_rn(1.0, (1.0 - power).to(tl.float32))


@triton.jit
def _adamw_kernel(
    param, grad, first, second, copy, step, lr, grad_scale, numel, beta1, rest1, beta2, rest2, eps, weight_decay,
    log_beta1: tl.constexpr, log_beta2: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, SCALED: tl.constexpr,
    DECAYED: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    now = tl.load(step) + 1
    rate = tl.load(lr)
    correction1, correction2 = _correction(now, log_beta1), _correction(now, log_beta2)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    for _ in tl.range(tl.program_id(0), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
        inside = offsets < numel - start
        g = read(grad + start + offsets, inside, not EVEN)
        p = read(param + start + offsets, inside, not EVEN)
        m = read(first + start + offsets, inside, not EVEN)
        v = read(second + start + offsets, inside, not EVEN)
        if SCALED:
            g = (g.to(tl.float32) * tl.load(grad_scale)).to(g.dtype)
        g = g.to(tl.float32)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * (g * g)
        change = tl.div_rn(m * correction1, tl.sqrt_rn(v * correction2) + eps)
        if DECAYED:
            change += weight_decay * p
        p -= rate * change
        write(param + start + offsets, p, inside, not EVEN)
        write(first + start + offsets, m, inside, not EVEN)
        write(second + start + offsets, v, inside, not EVEN)
        if COPIED:
            write(copy + start + offsets, p, inside, not EVEN)
        start += tl.num_programs(0) * BLOCK


def adamw_flat_(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    copy: Tensor | None = None,
    grad_scale: Tensor | None = None,
    config: AdamWConfig | None = None,
) -> None:
    """Make one update of `param` and both moments in place; all flat and contiguous, [elements].

    `step` (int64, one element, on the device) counts the updates made before this one, so t = step + 1; the caller adds
    1 afterwards. `lr` is float32, one element, on the device. State is float32, `grad` float32, bfloat16 or float16;
    `grad_scale` (float32, one element: the factor of clipping) multiplies it and rounds to its dtype. `copy` receives the
    new parameter, rounded to its own dtype. Shards of 2^31 elements and more work. `KernelError` says what does not fit.
    """
    scalars = {"step": step, "lr": lr} | ({} if grad_scale is None else {"grad_scale": grad_scale})
    flats = {"param": param, "grad": grad, "first": first, "second": second} | ({} if copy is None else {"copy": copy})
    _check(flats, scalars)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        expect_between(name, beta, 0.0, math.nextafter(1.0, 0.0), "1 - beta^t divides the moment")
    if param.numel():
        _update(
            param, grad, first, second, copy, step, lr, grad_scale, beta1, beta2, eps, weight_decay, list(config or ())
        )


def _check(flats: Mapping[str, Tensor], scalars: Mapping[str, Tensor]) -> None:
    param = flats["param"]
    expect_triton_device("param", param)
    expect_same_device({**flats, **scalars})
    for name, flat in flats.items():
        expect_shape(name, flat, (param.numel(),), "the shard is flat and each element has its own state")
        expect_contiguous(name, flat)
        expect_dtype(name, flat, *((torch.float32,) if name in ("param", "first", "second") else FLOATS))
    for name, scalar in scalars.items():
        expect_dtype(name, scalar, torch.int64 if name == "step" else torch.float32)
        expect_shape(name, scalar.reshape(-1), (1,), "it is one number for the whole shard")


def _fake_update(
    param: Tensor, grad: Tensor, first: Tensor, second: Tensor, copy: Tensor | None, step: Tensor, lr: Tensor,
    grad_scale: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float, config: list[int],
) -> None:  # fmt: skip
    return None


@graph_op("adamw_flat_", fake=_fake_update, mutates=("param", "first", "second", "copy"))
def _update(
    param: Tensor, grad: Tensor, first: Tensor, second: Tensor, copy: Tensor | None, step: Tensor, lr: Tensor,
    grad_scale: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float, config: list[int],
) -> None:  # fmt: skip
    cut = AdamWConfig(*config) if config else choose_config(param.numel())
    grid = (num_programs(triton.cdiv(param.numel(), cut.block), cut.programs_per_sm, param.device),)
    with on_device(param):
        _adamw_kernel[grid](
            param, grad, first, second, param if copy is None else copy, step, lr, lr if grad_scale is None else grad_scale,
            param.numel(), beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, weight_decay,
            log_beta1=_log(beta1), log_beta2=_log(beta2), BLOCK=cut.block, EVEN=param.numel() % cut.block == 0,
            SCALED=grad_scale is not None, DECAYED=weight_decay != 0.0, COPIED=copy is not None,
            num_warps=cut.num_warps, enable_fp_fusion=False,
        )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -1e30  # exp(-1e30 t) = 0 = 0^t
