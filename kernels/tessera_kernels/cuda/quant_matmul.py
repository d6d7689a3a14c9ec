"""Product with a weight kept in 8 or 4 bits in CUDA C++, bfloat16 on Hopper.

Equations, tile pictures and what lives where: `quant_matmul_few.cu` for up to 16 rows, `quant_matmul.cu` for more, whose
split inputs `quant_matmul_parts.cu` adds; unpacking: `quant_words.cuh`. Same packed weights, function and rounding as
`tessera_kernels.triton.quant_matmul`, whose backward this one takes.

Reference: `tessera_kernels.reference.quant_matmul`.
"""

# mypy: disable-error-code="no-untyped-call"

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera_kernels.checks import expect_between, expect_choice, expect_dtype, expect_same_device, expect_shape
from tessera_kernels.cuda._launch import (
    Kernel,
    expect_cuda_device,
    is_mappable,
    launch,
    num_sms,
    tensor_map,
)
from tessera_kernels.launching import SHARED_BYTES, as_rows, graph_op
from tessera_kernels.quant_weight import HALF, TILE, QuantWeight
from tessera_kernels.triton.quant_matmul import NUM_SMS, Product, empty_product
from tessera_shared.errors import KernelError

FEW = (8, 16)
"""Rows of x of one block in `quant_matmul_few.cu`; above, `quant_matmul.cu` has tiles of 64 or 128 rows."""

MANY = (64, 128)
FEW_BLOCKS_F, MANY_BLOCK_F = (16, 32, 64), 256
FEW_OUTPUTS = 4
"""Few rows take multiples of so many outputs: 16 bytes of steps."""

FEW_THREADS, MANY_THREADS = 544, 384
WARPS = 16
"""Warps that multiply in `quant_matmul_few.cu`: tiles of inputs in a stage, times products of 16 outputs."""

SPLITS = (1, 2, 3, 4)
"""Blocks of a cluster, which divide the inputs of a tile."""

AT_ONCE = {1: NUM_SMS, 2: NUM_SMS, 3: 96, 4: 96}
"""Blocks of clusters of each size that certainly run at the same time: a cluster stays in one of some eight groups of 14 to 18
multiprocessors, and what is left over in each stays idle (32 clusters of four took two rounds on an H200)."""

MOST_STAGES = 6
BARRIERS = 1024
"""Bytes kept for the barriers behind the ring."""


MOST_ROWS = 2048
"""Above, the Triton kernel is faster, which writes the weight out first."""


class QuantConfig(NamedTuple):
    """How a product is cut up. Integers only: it travels through a custom op's schema."""

    block_x: int  # rows of x of one block, of `FEW` or `MANY`
    block_f: int = MANY_BLOCK_F  # outputs of one block, of `FEW_BLOCKS_F` for few rows
    splits: int = 1  # blocks of a cluster, among which the inputs of one output are divided; many rows alone
    stages: int = 0  # stages of the ring; 0 = as many as fit

    @property
    def is_few(self) -> bool:
        """Is it for `quant_matmul_few.cu`?"""
        return self.block_x in FEW

    @property
    def tiles(self) -> int:
        """Tiles of 128 inputs in one stage."""
        return WARPS * 16 // self.block_f if self.is_few else 1

    def stage_bytes(self, bits: int, group: int) -> int:
        """Shared memory of one stage: words, x and, for few rows, steps."""
        steps = 4 * self.block_f * (1 if group % TILE == 0 else 2) if self.is_few else 0
        return self.tiles * (self.block_f * TILE * bits // 8 + self.block_x * TILE * 2 + steps)

    def depth(self, bits: int, group: int) -> int:
        """Stages of the ring."""
        room = SHARED_BYTES - BARRIERS - self.sums_bytes
        return self.stages or min(MOST_STAGES, room // self.stage_bytes(bits, group))

    @property
    def sums_bytes(self) -> int:
        """Shared memory of partial sums."""
        return 4 * self.tiles * self.block_x * self.block_f if self.is_few else 0

    @property
    def sent_bytes(self) -> int:
        """Shared memory of the sums that the other blocks of a cluster send, over the ring."""
        share = -(-self.block_x // (4 * self.splits)) * 4
        return (self.splits - 1) * share * 4 * MANY_BLOCK_F

    def shared_bytes(self, bits: int, group: int) -> int:
        """Shared memory of a block: `struct Tiles` of the source."""
        return self.depth(bits, group) * self.stage_bytes(bits, group) + self.sums_bytes + BARRIERS


CONFIGS: tuple[QuantConfig, ...] = (
    *(QuantConfig(block_x, block_f) for block_x in FEW for block_f in FEW_BLOCKS_F),
    *(QuantConfig(block_x, splits=splits) for block_x in MANY for splits in SPLITS),
    *(QuantConfig(block_x, stages=2) for block_x in MANY),
    QuantConfig(FEW[1], FEW_BLOCKS_F[-1], stages=2),
)
"""Every configuration that `choose_config` can give, and shallow rings beside them."""


def choose_config(rows: int, num_outputs: int, width: int) -> QuantConfig:
    """Return the configuration for a shape.

    Few rows: the outputs of a block that end soonest on so many multiprocessors, wide ones where x has many rows, since each
    block reads all of x. Many rows: where there are few tiles, lower ones, which divide their inputs.
    """
    if rows <= FEW[-1] and num_outputs % FEW_OUTPUTS == 0:
        if rows > FEW[0]:
            return QuantConfig(FEW[1], FEW_BLOCKS_F[2 if num_outputs >= NUM_SMS // 2 * FEW_BLOCKS_F[2] else 1])
        ends = {block: math.ceil(math.ceil(num_outputs / block) / NUM_SMS) * block for block in FEW_BLOCKS_F}
        return QuantConfig(FEW[0], min(reversed(FEW_BLOCKS_F), key=lambda block: ends[block]))
    blocks_f = -(-num_outputs // MANY_BLOCK_F)
    low_tiles = -(-rows // MANY[0]) * blocks_f
    is_low = rows <= MANY[0] or (rows <= MANY[1] and low_tiles * 2 <= AT_ONCE[2] and width >= TILE * 8)
    tiles = low_tiles if is_low else -(-rows // MANY[1]) * blocks_f
    splits = max(one for one in SPLITS if one == 1 or (tiles * one <= AT_ONCE[one] and width >= TILE * 4 * one))
    return QuantConfig(MANY[0] if is_low else MANY[1], splits=splits)


def is_faster(rows: int, num_outputs: int) -> bool:
    """Was this kernel faster than the Triton one on an H200 (docs/kernels.md, section 4)? With outputs it writes at all."""
    if num_outputs % FEW_OUTPUTS:
        return False
    if rows <= FEW[-1]:
        return num_outputs <= FEW_BLOCKS_F[-1] * NUM_SMS  # a block each
    return MANY[0] < rows <= MOST_ROWS


def quant_matmul(x_XD: Tensor, weight: QuantWeight, *, config: QuantConfig | None = None) -> Tensor:
    """Return y_XF = x_XD times the transposed weight, in bfloat16; any leading dimensions, strides and alignment.

    x in bfloat16, an even number of outputs; sums in float32. Differentiable in x (the backward pass writes the weight
    out once). Raises `KernelError` for what does not fit, and `MissingDependency` without a GPU; one older than Hopper
    is refused at the launch.
    """
    expect_cuda_device("quant_matmul", x_XD)
    expect_dtype("x_XD", x_XD, torch.bfloat16)
    expect_shape("x_XD", x_XD, (*x_XD.shape[:-1], weight.width), "the weight has that many inputs")
    expect_same_device({"x_XD": x_XD, "weight.codes": weight.codes, "weight.steps": weight.steps})
    chosen = config or choose_config(x_XD.numel() // weight.width, weight.num_outputs, weight.width)
    _expect_fit(chosen, weight)
    if torch.is_grad_enabled() and x_XD.requires_grad:
        y_XF: Tensor = Product.apply(x_XD, weight, chosen, _product)
        return y_XF
    return _product(x_XD, weight, chosen)


def _expect_fit(config: QuantConfig, weight: QuantWeight) -> None:
    """Raise unless a configuration exists and can take a weight."""
    expect_choice("block_x", config.block_x, FEW + MANY)
    expect_choice("block_f", config.block_f, FEW_BLOCKS_F if config.is_few else (MANY_BLOCK_F,))
    expect_choice("splits", config.splits, (1,) if config.is_few else SPLITS)
    held = config.shared_bytes(weight.bits, weight.group or 0)
    expect_between("bytes of shared memory", held, 0, SHARED_BYTES, "a block has no more; fewer stages take less")
    sent, ring = config.sent_bytes, held - config.sums_bytes - BARRIERS
    expect_between(
        "bytes of sums that blocks send each other", sent, 0, ring, "they lie over the ring; fewer splits send less"
    )
    at_once, what = (FEW_OUTPUTS, "steps are copied four") if config.is_few else (2, "outputs are written two")
    if weight.num_outputs % at_once:
        raise KernelError(
            f"weight.num_outputs = {weight.num_outputs}: expected a multiple of {at_once}, because {what} at a time; "
            "try tessera_kernels.triton.quant_matmul"
        )


def _product(x_XD: Tensor, weight: QuantWeight, config: QuantConfig) -> Tensor:
    return _run(x_XD, weight.codes, weight.steps, weight.bits, weight.group or 0, list(config))


@graph_op("cuda_quant_matmul", fake=empty_product)
def _run(x_XD: Tensor, codes: Tensor, steps: Tensor, bits: int, group: int, settings: Sequence[int]) -> Tensor:
    config, outputs = QuantConfig(*settings), codes.shape[1]
    y_XF = x_XD.new_empty((*x_XD.shape[:-1], outputs))
    if y_XF.numel() == 0:
        return y_XF
    x, words, group_rows = _describable(as_rows(x_XD), config.is_few), _rows_of_words(codes), steps.shape[0]
    rows, tiles = x_XD.numel() // x_XD.shape[-1], codes.shape[0]
    blocks_x, blocks_f = -(-rows // config.block_x), -(-outputs // config.block_f)
    words_map = tensor_map(words, (1, config.tiles, config.block_f * bits // 8, HALF))
    where: dict[str, Any] = {"like": x_XD, "shared_bytes": config.shared_bytes(bits, group)}
    if config.is_few:
        x_map = tensor_map(_panels(x), (1, 2 * config.tiles, config.block_x, HALF))
        count = blocks_x * blocks_f
        launch(
            few_kernel(bits, group, config.block_x, config.block_f, config.depth(bits, group)),
            grid=(min(count, num_sms(x.device)), 1, 1),
            block=FEW_THREADS,
            arguments=[words_map, x_map, _aligned(steps), y_XF, rows, outputs, tiles, group_rows, blocks_x, count],
            **where,
        )
        return y_XF
    splits = config.splits
    x_map = tensor_map(x[None, None], (1, 1, config.block_x, HALF))
    launch(
        product_kernel(bits, group, config.block_x, config.depth(bits, group), splits),
        grid=(splits * min(blocks_x * blocks_f, max(1, num_sms(x.device) // splits)), 1, 1),
        block=MANY_THREADS,
        arguments=[
            words_map, x_map, steps, y_XF, rows, outputs, tiles, group_rows, blocks_x, blocks_f, -(-tiles // splits),
        ],
        **where,
    )  # fmt: skip
    return y_XF


def _describable(x: Tensor, is_few: bool) -> Tensor:
    """Return rows that the copy engine can read: as they lie, or a copy whose rows begin at multiples of 16 bytes.

    Few rows are read in panels of 64 inputs, so a last one that is not whole is filled with zeros.
    """
    rows, width = x.shape
    if is_mappable(x) and not (is_few and width % HALF):
        return x
    if is_few:
        return torch.nn.functional.pad(x, (0, -width % HALF))
    copy: Tensor = x.new_empty((rows, -(-width // 8) * 8))[:, :width]
    return copy.copy_(x)


def _panels(x: Tensor) -> Tensor:
    """Return whole panels of 64 inputs, [1, panels, rows, 64], over the same memory."""
    rows, width = x.shape
    return x.as_strided((1, width // HALF, rows, HALF), (width, HALF, x.stride(0), 1))


def _rows_of_words(codes: Tensor) -> Tensor:
    """Return the words as [1, tiles, rows, 64]: a row of 128 bytes holds one output in 8 bits and two in 4."""
    return _aligned(codes).view(1, codes.shape[0], -1, HALF)


def _aligned(x: Tensor) -> Tensor:
    """Return a contiguous tensor where the copy engine can read it."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


@functools.cache
def product_kernel(bits: int, group: int, block_x: int, stages: int, splits: int) -> Kernel:
    """Return the specialization of `quant_matmul.cu` for a format, a ring and a cluster; `group` 0 = a scale for each output."""
    defines = (("BITS", bits), ("GROUP", group), ("BLOCK_X", block_x), ("STAGES", stages), ("SPLITS", splits))
    return Kernel("quant_matmul.cu", "quant_matmul", defines, needs="sm_90a")


@functools.cache
def few_kernel(bits: int, group: int, block_x: int, block_f: int, stages: int) -> Kernel:
    """Return the specialization of `quant_matmul_few.cu` for a format, a block and a ring."""
    defines = (("BITS", bits), ("GROUP", group), ("BLOCK_X", block_x), ("BLOCK_F", block_f), ("STAGES", stages))
    return Kernel("quant_matmul_few.cu", "quant_matmul_few", defines, needs="sm_90a")


def specializations() -> list[Kernel]:
    """Return what `python -m tessera_kernels.cuda.build` compiles: the usual formats at every number of rows."""
    found = []
    for bits, group in ((8, 0), (8, 64), (8, 128), (4, 64), (4, 128)):
        for config in CONFIGS:
            depth = config.depth(bits, group)
            found.append(
                few_kernel(bits, group, config.block_x, config.block_f, depth)
                if config.is_few
                else product_kernel(bits, group, config.block_x, depth, config.splits)
            )
    return found
