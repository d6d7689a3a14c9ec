"""RMSNorm, forward and backward, with and without the residual add before it.

    y = x r g,  r = 1 / sqrt(mean(x^2) + eps)                              (Zhang & Sennrich 2019, arXiv 1910.07467)
    dx = r (u - n mean(u n)) [+ dtotal],  dg = sum over rows of dy n,  with n = x r, u = dy g

       columns D ->                     HBM        x, residual, dy read once; y, sum, dx written once; r [X] float32 saved
    +----------------+  ROWS rows       registers  the tile in float32, and (backward) the program's dg
    | block of rows  |  a program       shared     (backward) STAGES - 1 blocks read ahead; sums across warps
    +----------------+                  L1         the gain, read again for each block
    | next program   |  forward: one block a program
    +----------------+  backward: persistent programs that stride over the blocks; dg partials [programs, D] in HBM and
                        one small kernel that adds them up

Rows wider than the largest tile are walked in pieces, twice; the second time they come from L2. Rounding is that of
`tessera_kernels.reference.rms_norm`: the sum x + residual rounds before it is normed, and with `gain_after_cast` the
unit row rounds before the gain. Sums are deterministic; a row's result does not depend on the other rows.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tessera_kernels.checks import expect_triton_device
from tessera_kernels.norm_rule import Launches, add_norm, fake_backward, fake_forward, norm
from tessera_kernels.triton import _rms_norm_kernels as kernels
from tessera_kernels.triton._launch import (
    SHARED_BYTES,
    as_rows,
    expect_tile,
    graph_op,
    num_programs,
    num_sms,
    on_device,
)
from tessera_shared.errors import KernelError


class ForwardConfig(NamedTuple):
    """How the forward is cut up. Integers only: it travels through a custom op's schema."""

    block: int  # most columns of a tile; wider rows are looped
    rows: int  # rows of a tile
    num_warps: int


class BackwardConfig(NamedTuple):
    """How the backward is cut up."""

    block: int
    rows: int
    num_warps: int
    programs_per_sm: int  # at least 1; more than fit at once make a second, emptier wave
    stages: int  # a block is asked for stages - 2 turns before it is needed; 1 = when it is needed


class NormConfig(NamedTuple):
    """One configuration of both directions."""

    forward: ForwardConfig
    backward: BackwardConfig


CONFIGS: tuple[NormConfig, ...] = (
    NormConfig(ForwardConfig(32768, 1, 4), BackwardConfig(16384, 1, 4, 4, 3)),
    NormConfig(ForwardConfig(32768, 1, 8), BackwardConfig(16384, 1, 8, 3, 3)),
    NormConfig(ForwardConfig(32768, 1, 8), BackwardConfig(16384, 1, 8, 2, 4)),
    NormConfig(ForwardConfig(32768, 1, 16), BackwardConfig(16384, 1, 16, 1, 2)),
    NormConfig(ForwardConfig(32768, 1, 16), BackwardConfig(16384, 1, 16, 1, 3)),
    NormConfig(ForwardConfig(32768, 1, 32), BackwardConfig(16384, 1, 32, 1, 3)),
    NormConfig(ForwardConfig(8192, 2, 4), BackwardConfig(8192, 2, 8, 2, 2)),
    NormConfig(ForwardConfig(1024, 8, 4), BackwardConfig(1024, 4, 4, 6, 3)),
    NormConfig(ForwardConfig(256, 16, 4), BackwardConfig(256, 16, 4, 4, 1)),
)
"""Every configuration that the GPU lane runs; `choose_config` picks for a width."""


def choose_config(width: int, itemsize: int) -> NormConfig:
    """Return the configuration for rows of `width` elements of `itemsize` bytes. The number of rows plays no part, so
    that a row alone equals the row in a batch."""
    row_bytes = triton.next_power_of_2(width) * itemsize
    if row_bytes <= 1024:
        rows = max(1, 4096 // max(row_bytes, 128))
        return NormConfig(ForwardConfig(1024, rows, 4), BackwardConfig(1024, rows, 4, 4, 3))
    warps = min(16, max(4, row_bytes // 1024))
    forward = ForwardConfig(32768, 1, warps if row_bytes < 65536 else 32)
    if row_bytes == 16384:
        warps = 8  # two programs, one of which computes while the other is at a barrier
    resident = 24 if row_bytes <= 2048 else 16  # warps of a multiprocessor, by the sweeps on an H200 of 2026-11-21
    stages = 3 if row_bytes <= 32768 else 2
    return NormConfig(forward, BackwardConfig(16384, 1, warps, max(1, resident // warps), stages))


def rms_norm(
    x_XD: Tensor, gain_D: Tensor, *, eps: float, gain_after_cast: bool = False, config: NormConfig | None = None
) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * gain over the last axis, in x's dtype; any leading dimensions.

    float16, bfloat16 or float32, gain of the same dtype. Rows may be strided; a stride within a row is copied away.
    `KernelError` says what does not fit.
    """
    expect_triton_device("x_XD", x_XD)
    return norm(LAUNCHES, x_XD, gain_D, eps=eps, gain_after_cast=gain_after_cast, config=config)


def add_rms_norm(
    x_XD: Tensor,
    residual_XD: Tensor,
    gain_D: Tensor,
    *,
    eps: float,
    gain_after_cast: bool = False,
    config: NormConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual) in one pass. Both inputs have one shape and dtype."""
    expect_triton_device("x_XD", x_XD)
    return add_norm(LAUNCHES, x_XD, residual_XD, gain_D, eps=eps, gain_after_cast=gain_after_cast, config=config)


@graph_op("rms_norm_forward", fake=fake_forward)
def run_forward(
    x: Tensor, residual: Tensor | None, gain: Tensor, eps: float, gain_after_cast: bool, config: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, x + residual (empty without one) and 1 / root of the mean square, for each row."""
    num_rows, width = x.shape
    cut = ForwardConfig(*config) if config else choose_config(width, x.element_size()).forward
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else x.new_empty(0)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    other = x if residual is None else residual
    pointers = (x, other, gain.contiguous(), y, total, rstd, x.stride(0), other.stride(0))
    flags = {"ADD": residual is not None, "GAIN_AFTER_CAST": gain_after_cast, "num_warps": cut.num_warps}
    block = min(cut.block, triton.next_power_of_2(width))
    with on_device(x):
        if width > block:
            kernels.forward_wide[(num_rows,)](*pointers, eps, D=width, BLOCK_D=block, **flags)
            return y, total, rstd
        expect_tile("rows x block", cut.rows * block, cut.num_warps)
        kernels.forward[(triton.cdiv(num_rows, cut.rows),)](
            *pointers, num_rows, eps, D=width, BLOCK_D=block, ROWS=cut.rows,
            EVEN_ROWS=num_rows % cut.rows == 0, **flags,
        )  # fmt: skip
    return y, total, rstd


@graph_op("rms_norm_backward", fake=fake_backward)
def run_backward(
    dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor, dtotal: Tensor | None, gain_after_cast: bool, config: list[int]
) -> tuple[Tensor, Tensor]:
    """Return dx (with dtotal added, when there is one) and dgain."""
    num_rows, width = x.shape
    cut = BackwardConfig(*config) if config else choose_config(width, x.element_size()).backward
    dy = as_rows(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    passed = dy if dtotal is None else as_rows(dtotal)
    gain, strides = gain.contiguous(), (dy.stride(0), x.stride(0), passed.stride(0))
    flags = {"ADD": dtotal is not None, "GAIN_AFTER_CAST": gain_after_cast, "num_warps": cut.num_warps}
    block = min(cut.block, triton.next_power_of_2(width))
    with on_device(x):
        if width > block:
            kernels.backward_wide[(num_rows,)](dy, x, gain, rstd, passed, dx, *strides, D=width, BLOCK_D=block, **flags)
            return dx, _sum_over_rows(_wide_partials(dy, x, rstd, gain_after_cast), gain)
        expect_tile("rows x block", cut.rows * block, cut.num_warps)
        expect_read_ahead(cut.rows * block * x.element_size() * (2 + (dtotal is not None)), cut.stages)
        programs = num_programs(triton.cdiv(num_rows, cut.rows), max(1, cut.programs_per_sm), x.device)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        kernels.backward[(programs,)](
            dy, x, gain, rstd, passed, dx, partial, *strides, num_rows, D=width, BLOCK_D=block, ROWS=cut.rows,
            EVEN_ROWS=num_rows % cut.rows == 0, STAGES=cut.stages, **flags,
        )  # fmt: skip
        return dx, _sum_over_rows(partial, gain)


LAUNCHES = Launches(run_forward, run_backward)
"""How this room runs both directions."""


def _wide_partials(dy: Tensor, x: Tensor, rstd: Tensor, gain_after_cast: bool) -> Tensor:
    num_rows, width = x.shape
    block = 1024
    columns = triton.cdiv(width, block)
    runs = min(num_rows, max(1, 4 * num_sms(x.device) // columns))
    rows_per_program = triton.cdiv(num_rows, runs)
    partial = torch.empty(triton.cdiv(num_rows, rows_per_program), width, dtype=torch.float32, device=x.device)
    kernels.gain_partials_wide[(columns, partial.shape[0])](
        dy, x, rstd, partial, dy.stride(0), x.stride(0), num_rows, rows_per_program,
        D=width, BLOCK_D=block, GAIN_AFTER_CAST=gain_after_cast, num_warps=4,
    )  # fmt: skip
    return partial


def _sum_over_rows(partial: Tensor, gain: Tensor) -> Tensor:
    dgain = torch.empty(gain.shape, dtype=gain.dtype, device=gain.device)
    columns = 16 if gain.numel() <= 8192 else 32
    rows = min(512, max(32, triton.next_power_of_2(partial.shape[0])))  # mostly all at once
    kernels.sum_partials[(triton.cdiv(dgain.numel(), columns),)](
        partial, dgain, partial.shape[0], D=dgain.numel(), BLOCK_P=rows, BLOCK_D=columns, num_warps=8
    )
    return dgain


def expect_read_ahead(block_bytes: int, stages: int) -> None:
    """Raise unless what the backward reads ahead, stages - 1 blocks of `block_bytes`, fits the shared memory beside the
    sums across warps."""
    limit = SHARED_BYTES - 16384
    if (stages - 1) * block_bytes > limit:
        raise KernelError(
            f"stages = {stages} with {block_bytes} bytes a block of rows: expected at most {1 + limit // block_bytes}, because "
            "what is read ahead lies in shared memory; try fewer stages or config=None"
        )
