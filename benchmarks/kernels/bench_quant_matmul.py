"""Is a product with an 8- or 4-bit weight faster than with the bfloat16 weight it came from, at every number of rows?

    python benchmarks/kernels/run_all.py --only quant_matmul      the table
    python benchmarks/kernels/sweeping.py quant_matmul            the candidates for each number of rows

All samples start with a cold L2 cache: a 4-bit weight of 8192 x 8192 would otherwise stay in it. A weight is made and
quantized once for all its rows; the library's int4 and int8 products, written for few rows and very slow for many, stand
beside up to 64. Shapes that carry a must come first.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from harness import Row
from sweeping import Sweep

from tessera_kernels.quant_weight import QuantWeight, quantize_w4, quantize_w8, unpack
from tessera_kernels.triton import quant_matmul as kernel

FEW, MANY = (1, 2, 4, 8, 16), (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = ((8192, 8192), (28672, 8192))
FORMATS: dict[str, Callable[[torch.Tensor], QuantWeight]] = {
    "W8A16 channel": quantize_w8,
    "W8A16 g128": functools.partial(quantize_w8, group=128),
    "W4A16 g128": quantize_w4,
}
MUST = {
    8: ({"cuBLAS bf16": 1.5, "share": 0.6}, {"cuBLAS bf16": 0.85}),
    4: ({"cuBLAS bf16": 2.0, "share": 0.4}, {"cuBLAS bf16": 0.85}),
}


SLOW_PEERS = 64
"""Rows up to which the library's int4 and int8 products are timed."""


def rows() -> Iterator[Row]:
    """Yield one row for each shape, format and number of rows."""
    shapes = harness.choose(SHAPES, ((96, 256),))
    for name, shape in harness.turn((name, shape) for shape in shapes for name in FORMATS):
        weight_FD = random_weight(*shape)
        packed = FORMATS[name](weight_FD)
        for count in harness.choose((*FEW, *MANY) if shape == SHAPES[0] else (1, 16, 128, 1024), (1, 3)):
            yield _row(name, weight_FD, packed, count)
        del packed


def random_weight(outputs: int, width: int) -> torch.Tensor:
    """Return a bfloat16 weight [F, D] of a layer's usual size."""
    return torch.randn(outputs, width, device=harness.device(), dtype=torch.bfloat16) / width**0.5


def random_rows(count: int, width: int) -> torch.Tensor:
    """Return rows of x in bfloat16."""
    return torch.randn(count, width, device=harness.device()).to(torch.bfloat16)


def _row(name: str, weight_FD: torch.Tensor, packed: QuantWeight, count: int) -> Row:
    outputs, width = weight_FD.shape
    x = random_rows(count, width)
    functions = {"ours": functools.partial(kernel.quant_matmul, x, packed)} | harness.available(
        _peers(x, weight_FD, packed)
    )
    timing = harness.measure(functions, cold=True)
    is_few = count <= FEW[-1]
    return Row(
        op="quant_matmul",
        shape=f"{name} rows {count} F{outputs} D{width}",
        ours=timing["ours"],
        peers={peer: time for peer, time in timing.items() if peer != "ours"},
        flops=2.0 * count * outputs * width,
        bytes_moved=packed.num_bytes + 2.0 * count * (width + outputs),
        limit="copy" if count <= MANY[1] else "cublas",
        must=MUST[packed.bits][0 if is_few else 1],
        notes=f"cold L2; {kernel.choose_config(count, outputs, width, packed.bits, is_grouped=packed.group is not None)}",
    )


def _peers(x: torch.Tensor, weight_FD: torch.Tensor, packed: QuantWeight) -> dict[str, Callable[[], Any]]:
    peers: dict[str, Callable[[], Any]] = {
        "cuBLAS bf16": lambda: functools.partial(torch.nn.functional.linear, x, weight_FD)
    }
    if x.shape[0] > SLOW_PEERS:
        return peers
    if packed.bits == 8 and packed.group is None:
        peers["_weight_int8pack_mm"] = lambda: _int8pack(x, packed)
    if packed.bits == 4:
        peers["_weight_int4pack_mm"] = lambda: _int4pack(x, packed)
    return peers


def _int8pack(x: torch.Tensor, packed: QuantWeight) -> Callable[[], Any]:
    codes_FD = unpack(packed).to(torch.int8)
    return functools.partial(torch._weight_int8pack_mm, x, codes_FD, packed.steps[0].to(torch.bfloat16))


def _int4pack(x: torch.Tensor, packed: QuantWeight) -> Callable[[], Any]:
    """tinygemm's layout; the codes' order does not change its time."""
    pairs = packed.codes.transpose(0, 1).reshape(packed.num_outputs, -1).contiguous().view(torch.uint8)
    tiled = torch._convert_weight_to_int4pack(pairs, 8)
    scales_and_zeros = torch.stack((packed.scales, packed.zeros.float()), -1).to(torch.bfloat16).contiguous()
    return functools.partial(torch._weight_int4pack_mm, x, tiled, 128, scales_and_zeros)


_tile = functools.partial(kernel.Config, "tile")
_FEW = (
    _tile(128, 16, True, 8, 4, 4), _tile(128, 16, True, 4, 4, 4), _tile(64, 16, True, 4, 4, 3, 2), _tile(64, 16, True, 4, 4, 5),
    _tile(128, 16, False, 4, 4, 4), _tile(64, 16, False, 4, 4, 5),
)  # fmt: skip
CANDIDATES: dict[int, tuple[kernel.Config, ...]] = {
    1: _FEW,
    16: _FEW,
    32: (_tile(64, 32, True, 2, 4, 3),),
    64: (_tile(128, 64, True, 2, 4, 3),),
    128: (_tile(128, 128, True, 4, 4, 2),),
    256: (_tile(256, 128, True, 2, 8, 3), _tile(128, 128, True, 1, 8, 3)),
    512: (_tile(256, 128, True, 1, 8, 3), _tile(128, 128, True, 1, 4, 2)),
    1024: (kernel.Config("dequantize"), _tile(128, 256, True, 1, 8, 3)),
    2048: (_tile(128, 256, True, 1, 8, 3),),
}
"""Rows -> what is tried beside what is chosen, most promising first."""


def sweeps() -> Iterator[Sweep]:
    """Yield two formats at numbers of rows that want different tiles, cuBLAS in bfloat16 beside them."""
    outputs, width = harness.choose(SHAPES[0], (96, 256))
    weight_FD = random_weight(outputs, width)
    for name in ("W8A16 channel", "W4A16 g128"):
        packed = FORMATS[name](weight_FD)
        for count in harness.choose(tuple(CANDIDATES), (1,)):
            x = random_rows(count, width)
            chosen = kernel.choose_config(count, outputs, width, packed.bits, is_grouped=packed.group is not None)
            yield Sweep(
                part=name,
                key=f"{count} rows",
                shape=f"rows {count} F{outputs} D{width}",
                current=chosen,
                candidates={
                    config: functools.partial(kernel.quant_matmul, x, packed, config=config)
                    for config in dict.fromkeys([chosen, *CANDIDATES[count]])
                },
                beside={"cuBLAS bf16": functools.partial(torch.nn.functional.linear, x, weight_FD)},
                work=packed.num_bytes + 2.0 * count * (width + outputs),
                limit="copy",
                cold=True,
            )
