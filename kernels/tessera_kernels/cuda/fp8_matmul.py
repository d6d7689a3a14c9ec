"""Product of two E4M3 matrices in CUDA C++ on Hopper: scales by tensor or row, fast accumulation.

Equation, tile picture and what lives where: `fp8_matmul.cu`; the loop: `product_ring.cuh`. Block scales, the accurate
accumulation and results in float32 are the Triton kernel's alone.

Reference: `tessera_kernels.reference.fp8_matmul`.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tessera_kernels.checks import (
    expect_choice,
    expect_dtype,
    expect_multiple,
    expect_rank,
    expect_same_device,
    expect_shape,
)
from tessera_kernels.cuda._launch import Kernel, TensorMap, expect_cuda_device, is_mappable, launch, num_sms, tensor_map
from tessera_kernels.launching import as_rows, graph_op

BLOCK, COLUMNS, INPUTS = 128, 256, 128
THREADS = 384
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
SCALINGS = ("tensor", "row")
OUTPUTS = 8
"""Outputs come in multiples of so many: they are written 16 bytes at a time."""


class Fp8Config(NamedTuple):
    """How deep the ring is. Integers only: it travels through a custom op's schema."""

    stages: int = 4  # of 128 inputs

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: `struct Ring` of the source."""
        return self.stages * (BLOCK + COLUMNS) * INPUTS + 1024


CONFIGS = (Fp8Config(), Fp8Config(3))
"""Every configuration that the GPU lane runs."""


def fp8_matmul(
    a_XD: Tensor,
    b_FD: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    scaling: str = "tensor",
    accumulation: str = "fast",
    out_dtype: torch.dtype = torch.bfloat16,
    config: Fp8Config | None = None,
) -> Tensor:
    """Return c_XF = (scale_a a)(scale_b b)^T in `out_dtype`; a and b are float8_e4m3fn, scales as `quantize_fp8` gives them.

    Rows that the copy engine cannot read are copied; empty operands give zeros or an empty c. No gradient: codes have none.
    Raises `KernelError` for what does not go together or is the Triton kernel's alone, `MissingDependency` without a GPU.
    """
    expect_cuda_device("fp8_matmul", a_XD)
    expect_choice("scaling", scaling, SCALINGS)
    expect_choice("accumulation", accumulation, ("fast",))
    expect_choice("out_dtype", out_dtype, tuple(NAMES))
    for what, tensor in (("a_XD", a_XD), ("b_FD", b_FD)):
        expect_rank(what, tensor, 2)
        expect_dtype(what, tensor, torch.float8_e4m3fn)
    expect_shape("b_FD", b_FD, (None, a_XD.shape[1]), "a_XD has that many inputs")
    for what, scales, matrix in (("scale_a", scale_a, a_XD), ("scale_b", scale_b, b_FD)):
        expect_dtype(what, scales, torch.float32)
        expect_shape(what, scales, () if scaling == "tensor" else matrix.shape[:1], f"scaling={scaling!r} needs it")
    expect_same_device({"a_XD": a_XD, "b_FD": b_FD, "scale_a": scale_a, "scale_b": scale_b})
    if b_FD.shape[0]:
        expect_multiple("b_FD.shape[0]", b_FD.shape[0], OUTPUTS, "outputs are written 16 bytes at a time")
    return _run(
        a_XD, b_FD, scale_a.contiguous(), scale_b.contiguous(), scaling == "row", out_dtype, list(config or CONFIGS[0])
    )


def _empty_result(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, by_row: bool, out_dtype: torch.dtype, settings: list[int]
) -> Tensor:
    del scale_a, scale_b, by_row, settings
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@graph_op("cuda_fp8_matmul", fake=_empty_result)
def _run(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, by_row: bool, out_dtype: torch.dtype, settings: list[int]
) -> Tensor:
    config, (rows, width), outputs = Fp8Config(*settings), a.shape, b.shape[0]
    if rows == 0 or outputs == 0 or width == 0:
        return torch.zeros((rows, outputs), dtype=out_dtype, device=a.device)
    c_XF = a.new_empty((rows, outputs), dtype=out_dtype)
    pairs_a, pairs_b = _pairs(a), _pairs(b)
    pair = 2 if rows > BLOCK else 1
    blocks_x, blocks_f = -(-rows // (BLOCK * pair)), -(-outputs // COLUMNS)
    launch(
        product_kernel(out_dtype, by_row, config.stages, pair),
        grid=(pair * min(blocks_x * blocks_f, num_sms(a.device) // pair), 1, 1),
        block=THREADS,
        arguments=[
            _map(pairs_a, BLOCK), _map(pairs_b, COLUMNS // pair), scale_a, _in_pairs(scale_b), c_XF, rows, outputs,
            math.ceil(width / INPUTS), blocks_x, blocks_f,
        ],
        like=a,
        shared_bytes=config.shared_bytes,
    )  # fmt: skip
    return c_XF


def _pairs(codes: Tensor) -> Tensor:
    """Return codes as numbers of 16 bits, two of one row each, where the copy engine can read them; a copy ends in zeros."""
    bytes_XD = as_rows(codes).view(torch.uint8)
    width = bytes_XD.shape[1]
    if width % 2 == 0 and is_mappable(bytes_XD):
        return bytes_XD.view(torch.int16)
    return torch.nn.functional.pad(bytes_XD, (0, -width % 16)).view(torch.int16)


def _in_pairs(scales: Tensor) -> Tensor:
    """Return scales that are read two at a time."""
    return scales if scales.data_ptr() % 8 == 0 else scales.clone()


def _map(pairs: Tensor, rows_of_box: int) -> TensorMap:
    return tensor_map(pairs[None, None], (1, 1, rows_of_box, INPUTS // 2))


@functools.cache
def product_kernel(dtype: torch.dtype, by_row: bool, stages: int, pair: int) -> Kernel:
    """Return the specialization of `fp8_matmul.cu` for the result's dtype, a kind of scales, a ring, and 1 or 2 blocks a cluster."""
    defines = (("TYPE", NAMES[dtype]), ("BY_ROW", int(by_row)), ("STAGES", stages), ("PAIR", pair))
    return Kernel("fp8_matmul.cu", "fp8_matmul", defines, needs="sm_90a")


def specializations() -> list[Kernel]:
    """Return what `python -m tessera_kernels.cuda.build` compiles."""
    return [
        product_kernel(dtype, by_row, CONFIGS[0].stages, pair)
        for dtype in NAMES
        for by_row in (False, True)
        for pair in (1, 2)
    ]
