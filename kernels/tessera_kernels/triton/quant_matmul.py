"""Product with a weight kept in 8 or 4 bits: y_XF = x_XD dequantize(q)_FD^T, accumulated in float32.

    y[r, f] = sum_g s[g, f] sum_{d in g} (q[f, d] - z[g, f]) x[r, d]                (see `tessera_kernels.quant_weight`)

The weight is the wide operand: a tile of it is BLOCK_F outputs x 128 inputs, rows of x stand beside it.

              BLOCK_X rows of x                 HBM        codes, contiguous 64 or 128 bytes an output and tile; x; y
             +--+                               shared     STAGES turns of codes and of x in flight
             |  | 128 inputs a step             registers  codes -> numbers (`_unpack`), accumulator
             +--+
    +-------++--+  y^T tile: BLOCK_F x BLOCK_X. "tile" configurations: W x^T through the tensor cores, W from registers
 BF | codes ||  |  (`wide`), or x W^T (16 rows of x on the short side of mma). "vector": one row, no tensor cores.
    +-------++--+  "dequantize": the weight written out once, then the library's product; for many rows.
      inputs ->

Scales of whole rows multiply the result. Scales of groups multiply either float32 partial sums (`late`: few rows, integer
weights stay exact) or the weights, rounded to x's dtype once as a dequantized weight is (many rows). With few outputs the
inputs are split among programs; partial sums are added in one fixed order by a second kernel, which is launched while the
first still runs (programmatic dependent launch). No atomics: same inputs and configuration, same bits; and a row's answer
does not depend on its neighbors.

Reference: `tessera_kernels.reference.quant_matmul`.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera_kernels.checks import (
    expect_between,
    expect_choice,
    expect_dtype,
    expect_same_device,
    expect_shape,
    expect_triton_device,
    is_interpreting,
)
from tessera_kernels.quant_weight import HALF, TILE, QuantWeight, quantize_w4, quantize_w8
from tessera_kernels.triton._launch import FLOATS, SHARED_BYTES, as_rows, graph_op, on_device
from tessera_kernels.triton._quant_kernels import (
    CHANNEL,
    EARLY,
    LATE,
    add_splits_kernel,
    dequantize_kernel,
    tile_kernel,
    vector_kernel,
)

__all__ = [
    "CONFIGS",
    "Config",
    "QuantWeight",
    "choose_config",
    "dequantize",
    "quant_matmul",
    "quantize_w4",
    "quantize_w8",
]

GROUP_X = 8
"""Row blocks that share their weight tiles in the L2 cache before the next outputs come."""


@dataclass(frozen=True)
class Config:
    """How a product is run. Fields that a kind does not use are ignored by it."""

    kind: str = "tile"  # "tile" | "vector" | "dequantize": see the picture above
    block_f: int = 64  # outputs of one program
    block_x: int = 16  # rows of x of one program
    wide: bool = True  # W x^T with W from registers; False: x W^T
    splits: int = 1  # programs among which the inputs of one output are divided
    num_warps: int = 4
    num_stages: int = 4  # turns in flight
    per_turn: int = 1  # tiles of one turn of the loop, which has one pair of barriers

    def __post_init__(self) -> None:
        expect_choice("kind", self.kind, KINDS)

    @property
    def late(self) -> bool:
        """Do scales of groups multiply partial sums rather than weights? For few rows there is less to multiply."""
        return self.kind == "vector" or not self.wide or self.block_x <= 32


KINDS = ("tile", "vector", "dequantize")

_FEW = {8: Config("tile", 64, 16, True, 1, 4, 5), 4: Config("tile", 64, 16, True, 1, 4, 3, 2)}
"""Up to 16 rows and many outputs, by bits. Four programs a multiprocessor; 4 bits want fewer instructions: two tiles a turn."""

_FEW_OF_FEW = Config("tile", 128, 16, True, 1, 4, 4)
"""Up to 16 rows and so few outputs that all programs run at once with their inputs divided."""

_SOME = (
    Config("tile", 64, 32, True, 1, 4, 3),
    Config("tile", 128, 64, True, 1, 4, 3),
    Config("tile", 128, 128, True, 1, 8, 3),
)
_MANY = Config("tile", 128, 256, True, 1, 8, 3)
"""As many columns as a wgmma has: the fewest unpacked weights for each product. Weights that are unpacked for the next turn
of the same program would pass through shared memory (they lose the layout of an operand of wgmma)."""

_FLOAT32 = Config("vector", 32, 1, True, 1, 4, 6)
SPLITS = (1, 2, 4, 8)

CONFIGS: tuple[Config, ...] = (
    *(replace(config, splits=splits) for config in (*_FEW.values(), _FEW_OF_FEW, *_SOME, _MANY) for splits in SPLITS),
    *(Config("tile", 64, 16, False, splits, 4, 5) for splits in (1, 4)),
    *(Config("tile", 128, 16, False, splits, 4, 4) for splits in (1, 4)),
    *(Config("tile", 128, 128, True, splits, 4, 2) for splits in (1, 2)),
    *(Config("tile", 256, 128, True, splits, 8, 3) for splits in (1, 2)),
    replace(_FLOAT32, splits=2),
    _FLOAT32,
    Config("dequantize"),
)
"""Every configuration that `choose_config` can give, and those it was chosen from."""


def choose_config(
    rows: int, num_outputs: int, width: int, bits: int, *, is_grouped: bool, is_float32: bool = False
) -> Config:
    """Return the configuration for a shape: a pure function, so that graphs and repeats see the same kernel.

    By the sweeps on an H200 of 2026-11-21 at 8192 x 8192.
    """
    if rows >= (FLOAT32_ROWS if is_float32 else DEQUANTIZE_ROWS[is_grouped]):
        return Config("dequantize")
    if is_float32:
        return _FLOAT32
    if rows <= _FEW_OF_FEW.block_x:
        if 4 * triton.cdiv(num_outputs, _FEW_OF_FEW.block_f) > 2 * NUM_SMS:
            return _split(_FEW[bits], num_outputs, width, rows, 4)
        return _split(_FEW_OF_FEW, num_outputs, width, rows, 4 if bits == 4 and rows <= 4 else 2)
    for config, programs_per_sm in zip(_SOME, (4, 2, 1), strict=True):
        if rows <= config.block_x:
            return _split(config, num_outputs, width, rows, programs_per_sm)
    return _split(_MANY, num_outputs, width, rows, 1)


DEQUANTIZE_ROWS = {False: 2048, True: 1024}
"""From so many rows on, the product is long enough to hide writing the whole weight out once; earlier with scales of groups."""

FLOAT32_ROWS = 5
"""The same for float32 x, whose products run on the ordinary lanes: right, not fast."""

FLOAT32_TILE = 64 * 32
"""Largest tile of y for float32: each thread keeps whole rows of operands."""


NUM_SMS = 132
"""Multiprocessors of the GPU that the choices were made for."""


def _expect_fit(config: Config, x_XD: Tensor, bits: int) -> None:
    if config.kind == "vector":
        expect_between("rows", x_XD.numel() // x_XD.shape[-1], 0, 65535, "each row of a vector product is a program")
    if config.kind != "tile":
        return
    if x_XD.dtype == torch.float32:
        expect_between(
            "block_f * block_x", config.block_f * config.block_x, 1, FLOAT32_TILE, "float32 has no tensor cores"
        )
    held = config.block_x * TILE * x_XD.element_size() * config.num_stages
    held += config.block_f * (TILE * bits // 8 + 8) * (config.num_stages - 1)
    held *= config.per_turn
    expect_between("bytes of tiles in flight", held, 0, SHARED_BYTES, "that is the shared memory of one program")


def _split(config: Config, num_outputs: int, width: int, rows: int, programs_per_sm: int) -> Config:
    """Divide the inputs among programs as long as all run at once, each left with at least 8 tiles; powers of two up to 8."""
    programs, splits = triton.cdiv(num_outputs, config.block_f) * triton.cdiv(rows, config.block_x), 1
    while splits < 8 and programs * splits * 2 <= NUM_SMS * programs_per_sm and width >= TILE * 8 * splits * 2:
        splits *= 2
    return replace(config, splits=splits)


def quant_matmul(x_XD: Tensor, weight: QuantWeight, *, config: Config | None = None) -> Tensor:
    """Return y_XF = x_XD times the transposed weight, in x's dtype; any leading dimensions, strides and alignment.

    bfloat16, float16 or float32 x; sums in float32. Differentiable in x (the backward pass writes the weight out once). Rows of zero length
    give an empty y. Raises `KernelError` for shapes, dtypes or devices that do not go together.
    """
    expect_dtype("x_XD", x_XD, *FLOATS)
    expect_shape("x_XD", x_XD, (*x_XD.shape[:-1], weight.width), "the weight has that many inputs")
    expect_same_device({"x_XD": x_XD, "weight.codes": weight.codes, "weight.steps": weight.steps})
    expect_triton_device("quant_matmul", x_XD)
    chosen = config or choose_config(
        x_XD.numel() // weight.width,
        weight.num_outputs,
        weight.width,
        weight.bits,
        is_grouped=weight.group is not None,
        is_float32=x_XD.dtype == torch.float32,
    )
    _expect_fit(chosen, x_XD, weight.bits)
    if torch.is_grad_enabled() and x_XD.requires_grad:
        y_XF: Tensor = Product.apply(x_XD, weight, chosen, _product)
        return y_XF
    return _product(x_XD, weight, chosen)


def dequantize(weight: QuantWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the weight [F, D] written out: code times scale in float32, rounded once."""
    expect_triton_device("dequantize", weight.codes)
    return _dequantized(weight.codes, weight.steps, weight.bits, weight.group or 0, weight.width, dtype)


class Product(torch.autograd.Function):
    """Autograd's view of `run(x, weight, config)`, in whichever language: the backward writes the weight out once."""

    @staticmethod
    def forward(
        ctx: Any, x_XD: Tensor, weight: QuantWeight, config: Any, run: Callable[[Tensor, QuantWeight, Any], Tensor]
    ) -> Tensor:
        """Multiply."""
        ctx.weight = weight
        return run(x_XD, weight, config)

    @staticmethod
    def backward(ctx: Any, grad_XF: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of x."""
        return grad_XF @ dequantize(ctx.weight, grad_XF.dtype), None, None, None


def _product(x_XD: Tensor, weight: QuantWeight, config: Config) -> Tensor:
    _, *sizes = astuple(config)
    return _launch(
        x_XD, weight.codes, weight.steps, weight.bits, weight.group or 0, [KINDS.index(config.kind), *sizes]
    )  # fmt: skip


def empty_product(x_XD: Tensor, codes: Tensor, steps: Tensor, bits: int, group: int,
                   settings: Sequence[int]) -> Tensor:  # fmt: skip
    """Return an empty y, for compilers."""
    del steps, bits, group, settings
    return x_XD.new_empty((*x_XD.shape[:-1], codes.shape[1]))


@graph_op("quant_matmul", fake=empty_product)
def _launch(x_XD: Tensor, codes: Tensor, steps: Tensor, bits: int, group: int,
            settings: Sequence[int]) -> Tensor:  # fmt: skip
    kind, block_f, block_x, wide, splits, num_warps, num_stages, per_turn = settings
    config = Config(KINDS[kind], block_f, block_x, bool(wide), splits, num_warps, num_stages, per_turn)
    out_XF = x_XD.new_empty((*x_XD.shape[:-1], codes.shape[1]))
    if out_XF.numel() == 0:
        return out_XF
    if config.kind == "dequantize":
        weight_FD = _dequantized(codes, steps, bits, group, x_XD.shape[-1], x_XD.dtype)
        torch.mm(as_rows(x_XD), weight_FD.t(), out=out_XF.view(-1, codes.shape[1]))
        return out_XF
    x = as_rows(x_XD)
    rows, width = x.shape
    tiles, outputs = codes.shape[:2]
    parts = out_XF if splits == 1 else x.new_empty((splits, rows, outputs), dtype=torch.float32)
    shared = (x, codes, steps, parts, rows, width, outputs, steps.shape[0] - 1, tiles, triton.cdiv(tiles, splits))
    early_add = splits > 1 and _has_trick(x)
    options: dict[str, Any] = {
        "BITS": bits, "GROUP": group, "BLOCK_F": block_f, "TRICK": _has_trick(x), "STAGES": num_stages,
        "SCALE": CHANNEL if group == 0 else LATE if config.late else EARLY, "EARLY_ADD": early_add,
        "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip
    blocks_f = triton.cdiv(outputs, block_f)
    with on_device(x):
        if config.kind == "vector":
            vector_kernel[blocks_f, splits, rows](*shared, x.stride(0), **options)
        else:
            options |= {"BLOCK_X": block_x, "WIDE": bool(wide), "EVEN": width % TILE == 0}
            whole = bool(wide) and config.late and group % TILE == 0 and block_f <= 16 * num_warps  # registers allow it
            tma = bool(wide) and block_x >= 64 and _fits_descriptor(x)  # for few rows it costs more than it saves
            options |= {"LIFT": is_interpreting(), "GROUP_X": GROUP_X, "PER_TURN": per_turn}
            options |= {"WHOLE": whole, "X_TMA": tma}
            x_tiles = TensorDescriptor.from_tensor(x, [block_x, TILE if whole else HALF]) if tma else x
            tile_kernel[blocks_f * triton.cdiv(rows, block_x), splits](*shared, x.stride(0), x_tiles, **options)
        if splits > 1:
            add_splits_kernel[(triton.cdiv(rows * outputs, 512),)](
                parts, out_XF, rows * outputs, SPLITS=splits, BLOCK=512, EARLY_ADD=early_add,
                **({"launch_pdl": True} if early_add else {}),
            )  # fmt: skip
    return out_XF


def _fits_descriptor(x: Tensor) -> bool:
    """Can the copy engine read x? Rows without overlap, addresses and strides in multiples of 16 bytes."""
    packed = x.element_size() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return packed and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def _empty_weight(codes: Tensor, steps: Tensor, bits: int, group: int, width: int,
                  dtype: torch.dtype) -> Tensor:  # fmt: skip
    del steps, bits, group
    return codes.new_empty((codes.shape[1], width), dtype=dtype)


@graph_op("dequantize", fake=_empty_weight)
def _dequantized(codes: Tensor, steps: Tensor, bits: int, group: int, width: int,
                 dtype: torch.dtype) -> Tensor:  # fmt: skip
    weight_FD = codes.new_empty((codes.shape[1], width), dtype=dtype)
    tiles, outputs = codes.shape[:2]
    if weight_FD.numel():
        with on_device(codes):
            dequantize_kernel[tiles, triton.cdiv(outputs, 64)](
                codes, steps, weight_FD, width, outputs, steps.shape[0] - 1, BITS=bits, GROUP=group, BLOCK_F=64,
                TRICK=_has_trick(weight_FD),
            )  # fmt: skip
    return weight_FD


def _has_trick(x: Tensor) -> bool:
    """Do the two-at-a-time bfloat16 instructions exist here? From compute capability 9.0 on."""
    return x.dtype == torch.bfloat16 and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
