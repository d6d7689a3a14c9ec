"""RMSNorm in CUDA C++, forward and backward, with and without the residual add before it.

Equation, tile picture and what lives where stand at the top of `rms_norm.cu` and `rms_norm_backward.cu`. Reference:
`tessera_kernels.reference.rms_norm`; same functions, rounding and gradients as `tessera_kernels.triton.rms_norm`.
"""

# mypy: disable-error-code="no-untyped-call,untyped-decorator"

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tessera_kernels.checks import expect_between, expect_multiple
from tessera_kernels.cuda._launch import Int64, Kernel, expect_cuda_device, launch, shared_bytes_of
from tessera_kernels.launching import FLOATS, SHARED_BYTES, as_rows, graph_op, num_sms
from tessera_kernels.norm_rule import Launches, add_norm, fake_backward, fake_forward, norm
from tessera_shared.errors import KernelError

BLOCK_THREADS, WARP = 512, 32
MOST_ROWS = 2**29
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "float"}


class RowConfig(NamedTuple):
    """How one direction is cut up. Integers only: it travels through a custom op's schema."""

    held: int  # pieces of 16 bytes of a row that one thread holds
    row_threads: int  # most threads of one row; a row that they cannot hold is read twice
    threads: int  # of a block, at least: short rows share one
    blocks_per_sm: int  # 0 = a block for each group of rows; the backward needs at least 1
    stages: int  # rows read ahead (backward); 0 = none. Where nobody chose, as many of them as fit shared memory


class NormConfig(NamedTuple):
    """One configuration of both directions."""

    forward: RowConfig
    backward: RowConfig


CONFIGS: tuple[NormConfig, ...] = (
    NormConfig(RowConfig(4, 512, 128, 0, 0), RowConfig(4, 512, 512, 1, 3)),
    NormConfig(RowConfig(2, 512, 128, 0, 0), RowConfig(2, 512, 512, 1, 4)),
    NormConfig(RowConfig(4, 512, 64, 0, 0), RowConfig(2, 512, 512, 1, 3)),
    NormConfig(RowConfig(8, 512, 128, 0, 0), RowConfig(4, 512, 512, 1, 2)),
    NormConfig(RowConfig(4, 512, 128, 8, 0), RowConfig(4, 512, 512, 1, 0)),
    NormConfig(RowConfig(4, 512, 512, 0, 0), RowConfig(2, 512, 512, 1, 2)),
)
"""Every configuration that the GPU lane runs and the sweep times; `choose_config` picks for a width."""


def choose_config(width: int, itemsize: int) -> NormConfig:
    """Return the configuration for rows of `width` elements of `itemsize` bytes. The number of rows plays no part, so
    that a row alone equals the row in a batch."""
    del width, itemsize  # one way of cutting serves all: threads of a row, and rows of a block, follow from the width
    return CONFIGS[0]


class Cut(NamedTuple):
    """What a width and a configuration make of a block."""

    row_threads: int
    rows: int  # of a block
    is_wide: bool  # a row is longer than its threads hold


@functools.cache
def cut_of(width: int, itemsize: int, config: RowConfig) -> Cut:
    """Return the block: enough threads for a row, in whole warps or a power of two below one, and rows to fill it."""
    expect_multiple("row_threads", config.row_threads, WARP, "several warps of a row meet at one barrier")
    expect_between(
        "threads", max(config.threads, config.row_threads), WARP, BLOCK_THREADS, "the kernel has registers for those"
    )
    pieces = -(-width * itemsize // 16)
    wanted = -(-pieces // config.held)
    row_threads = max(4, 1 << (wanted - 1).bit_length()) if wanted <= WARP else -(-wanted // WARP) * WARP
    row_threads = min(row_threads, config.row_threads)
    rows = max(1, max(config.threads, WARP) // row_threads)
    return Cut(row_threads, rows, pieces > row_threads * config.held)


def rms_norm(
    x_XD: Tensor, gain_D: Tensor, *, eps: float, gain_after_cast: bool = False, config: NormConfig | None = None
) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * gain over the last axis, in x's dtype; any leading dimensions.

    float16, bfloat16 or float32, gain of the same dtype. Rows may be strided; a stride within a row is copied away.
    `KernelError` says what does not fit.
    """
    expect_cuda_device("x_XD", x_XD)
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
    expect_cuda_device("x_XD", x_XD)
    return add_norm(LAUNCHES, x_XD, residual_XD, gain_D, eps=eps, gain_after_cast=gain_after_cast, config=config)


def specializations() -> Sequence[Kernel]:
    """Return the kernels that `choose_config` leads to: every dtype, with and without the add, the gain before or after
    the cast, rows that fit, wide rows and rows of no alignment."""
    found = [_sum_kernel(dtype) for dtype in FLOATS]
    kinds = ((True, False), (True, True), (False, True))
    for dtype in FLOATS:
        for config in CONFIGS[:1]:
            for add in (False, True):
                for after_cast in (False, True):
                    for is_aligned, is_wide in kinds:
                        flags = (dtype, add, after_cast, is_aligned, is_wide)
                        found.append(_kernel("forward", config.forward.held, 0, *flags))
                        stages = 0 if is_wide else _most_stages(config.backward, 2 + add, dtype)
                        found.append(_kernel("backward", config.backward.held, stages, *flags))
    return found


@graph_op("cuda_rms_norm_forward", fake=fake_forward)
def run_forward(
    x: Tensor, residual: Tensor | None, gain: Tensor, eps: float, gain_after_cast: bool, config: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, x + residual (empty without one) and 1 / root of the mean square, for each row."""
    num_rows, width = _expect_rows(x)
    chosen = RowConfig(*config) if config else choose_config(width, x.element_size()).forward
    cut = cut_of(width, x.element_size(), chosen)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else x.new_empty(0)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    other, gain = x if residual is None else residual, gain.contiguous()
    is_aligned = _are_aligned(x, other, gain, y, total)
    flags = (x.dtype, residual is not None, gain_after_cast, is_aligned, cut.is_wide or not is_aligned)
    groups = -(-num_rows // cut.rows)
    launch(
        _kernel("forward", chosen.held, 0, *flags),
        grid=(min(groups, chosen.blocks_per_sm * num_sms(x.device)) if chosen.blocks_per_sm else groups, 1, 1),
        block=(cut.row_threads, cut.rows, 1),
        shared_bytes=_sum_bytes(cut) + _passage_bytes(cut, chosen, is_aligned),
        arguments=(
            x, other, gain, y, total, rstd, Int64(x.stride(0)), Int64(other.stride(0)), num_rows, width, 1.0 / width,
            float(eps),
        ),
        like=x,
    )  # fmt: skip
    return y, total, rstd


@graph_op("cuda_rms_norm_backward", fake=fake_backward)
def run_backward(
    dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor, dtotal: Tensor | None, gain_after_cast: bool, config: list[int]
) -> tuple[Tensor, Tensor]:
    """Return dx (with dtotal added, when there is one) and dgain."""
    num_rows, width = _expect_rows(x)
    chosen = RowConfig(*config) if config else choose_config(width, x.element_size()).backward
    cut = cut_of(width, x.element_size(), chosen)
    dy, gain = as_rows(dy), gain.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    passed = dy if dtotal is None else as_rows(dtotal)
    is_aligned = _are_aligned(dy, x, passed, gain, dx)
    is_wide = cut.is_wide or not is_aligned
    asked = chosen._replace(stages=0) if is_wide else chosen
    most = shared_bytes_of(x.device)
    stages, shared_bytes = _staging(
        cut, asked, 2 + (dtotal is not None), is_aligned, x.element_size(), most, not config
    )
    blocks = min(-(-num_rows // cut.rows), max(1, chosen.blocks_per_sm) * num_sms(x.device))
    partial = torch.empty(
        min(num_rows, blocks * cut.rows) if is_wide else blocks, width, dtype=torch.float32, device=x.device
    )
    launch(
        _kernel("backward", chosen.held, stages, x.dtype, dtotal is not None, gain_after_cast, is_aligned, is_wide),
        grid=(blocks, 1, 1),
        block=(cut.row_threads, cut.rows, 1),
        shared_bytes=shared_bytes,
        arguments=(
            dy, x, gain, rstd, passed, dx, partial, Int64(dy.stride(0)), Int64(x.stride(0)), Int64(passed.stride(0)),
            num_rows, width, 1.0 / width,
        ),
        like=x,
    )  # fmt: skip
    dgain = torch.empty(gain.shape, dtype=gain.dtype, device=gain.device)
    launch(
        _sum_kernel(gain.dtype),
        grid=(-(-width // WARP), 1, 1),
        block=(WARP, 16, 1),
        shared_bytes=BLOCK_THREADS * 4,
        arguments=(partial, dgain, partial.shape[0], width),
        like=x,
    )
    return dx, dgain


LAUNCHES = Launches(run_forward, run_backward)
"""How this room runs both directions."""


def _expect_rows(x: Tensor) -> tuple[int, int]:
    num_rows, width = x.shape
    if num_rows > MOST_ROWS or width > MOST_ROWS:
        raise KernelError(
            f"x_XD.shape = {[num_rows, width]}: expected at most {MOST_ROWS} rows and columns, because the kernel counts them "
            "in 32 bits; try x.split"
        )
    return num_rows, width


def _are_aligned(*tensors: Tensor) -> bool:
    """Do all rows begin and end at multiples of 16 bytes? An empty tensor stands for one that there is not."""
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.shape[-1] * tensor.element_size() % 16 == 0
        and (tensor.ndim < 2 or tensor.stride(0) * tensor.element_size() % 16 == 0)
        for tensor in tensors
        if tensor.numel()
    )


def _sum_bytes(cut: Cut) -> int:
    return 2 * WARP * 4 * cut.rows if cut.row_threads > WARP else 0


def _passage_bytes(cut: Cut, config: RowConfig, is_aligned: bool) -> int:
    return 0 if is_aligned else 16 * config.held * cut.row_threads * cut.rows


@functools.cache
def _staging(
    cut: Cut, config: RowConfig, inputs: int, is_aligned: bool, itemsize: int, most: int, may_be_fewer: bool
) -> tuple[int, int]:
    """Return how many rows a backward block reads ahead, and its shared memory: sums, the gain, those rows; in the end
    all of it holds dgain. Fewer rows than asked for where a GPU has less memory and nobody chose."""
    for stages in range(config.stages, -1 if may_be_fewer else config.stages - 1, -1):
        ring = stages * inputs * config.held * 16 * BLOCK_THREADS
        kept_gain = config.held * 16 * cut.row_threads if stages else 0
        used = _sum_bytes(cut) + kept_gain + ring + _passage_bytes(cut, config, is_aligned)
        used = max(used, 16 // itemsize * 4 * config.held * cut.row_threads * cut.rows)
        if used <= most:
            return stages, used
    raise KernelError(
        f"stages = {config.stages}: expected fewer, because {inputs} rows of {config.held} pieces a thread lie in shared "
        f"memory for each, {used} bytes of at most {most}; try config=None"
    )


def _most_stages(config: RowConfig, inputs: int, dtype: torch.dtype) -> int:
    """Return how many rows are read ahead on Hopper where one row takes the whole block."""
    return _staging(Cut(BLOCK_THREADS, 1, False), config, inputs, True, dtype.itemsize, SHARED_BYTES, True)[0]


@functools.cache
def _kernel(
    direction: str, held: int, stages: int, dtype: torch.dtype, add: bool, after_cast: bool, is_aligned: bool,
    is_wide: bool,
) -> Kernel:  # fmt: skip
    flags: dict[str, str | int] = {
        "NUMBER": NAMES[dtype], "HELD": held, "ADD": int(add), "GAIN_AFTER_CAST": int(after_cast),
        "ALIGNED": int(is_aligned), "WIDE": int(is_wide), "STAGES": stages,
    }  # fmt: skip
    file = "rms_norm.cu" if direction == "forward" else "rms_norm_backward.cu"
    return Kernel(file, f"rms_norm_{direction}", tuple(flags.items()))


@functools.cache
def _sum_kernel(dtype: torch.dtype) -> Kernel:
    return Kernel("rms_norm_sum_partials.cu", "rms_norm_sum_partials", (("NUMBER", NAMES[dtype]),))
