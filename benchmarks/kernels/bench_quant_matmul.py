"""Is a product with an 8- or 4-bit weight faster than with the bfloat16 weight it came from, at every number of rows?

    python benchmarks/kernels/run_all.py --only quant_matmul      the table
    python benchmarks/kernels/bench_quant_matmul.py               every configuration at every shape, best first

All samples start with a cold L2 cache: a 4-bit weight of 8192 x 8192 would otherwise stay in it.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import torch
from harness import Row

from tessera_kernels.quant_weight import QuantWeight, quantize_w4, quantize_w8
from tessera_kernels.triton import quant_matmul as kernel
from tessera_shared.errors import KernelError

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


def rows() -> list[Row]:
    """Return one row for each format, shape and number of rows."""
    found = []
    for outputs, width in harness.choose(SHAPES, ((96, 256),)):
        weight_FD = (torch.randn(outputs, width, device=harness.device()) / width**0.5).to(torch.bfloat16)
        for name, quantize in FORMATS.items():
            packed = quantize(weight_FD)
            for count in harness.choose((*FEW, *MANY), (1, 3)):
                if (outputs, width) == SHAPES[0] or count in (1, 16, 128, 1024):
                    found.append(_row(name, weight_FD, packed, count))
            del packed
    return found


def _row(name: str, weight_FD: torch.Tensor, packed: QuantWeight, count: int) -> Row:
    outputs, width = weight_FD.shape
    x = torch.randn(count, width, device=harness.device()).to(torch.bfloat16)
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
        notes=f"cold L2; {kernel.choose_config(count, outputs, width, packed.bits)}",
    )


def _peers(x: torch.Tensor, weight_FD: torch.Tensor, packed: QuantWeight) -> dict[str, Callable[[], Any]]:
    peers: dict[str, Callable[[], Any]] = {
        "cuBLAS bf16": lambda: functools.partial(torch.nn.functional.linear, x, weight_FD)
    }
    if packed.bits == 8 and packed.group is None:
        peers["_weight_int8pack_mm"] = lambda: _int8pack(x, packed)
    if packed.bits == 4:
        peers["_weight_int4pack_mm"] = lambda: _int4pack(x, packed)
    return peers


def _int8pack(x: torch.Tensor, packed: QuantWeight) -> Callable[[], Any]:
    codes_FD = packed.codes.transpose(0, 1).reshape(packed.num_outputs, -1).contiguous()
    return functools.partial(torch._weight_int8pack_mm, x, codes_FD, packed.steps[0].to(torch.bfloat16))


def _int4pack(x: torch.Tensor, packed: QuantWeight) -> Callable[[], Any]:
    """tinygemm's layout; the codes' order does not change its time."""
    pairs = packed.codes.transpose(0, 1).reshape(packed.num_outputs, -1).contiguous()
    tiled = torch._convert_weight_to_int4pack(pairs, 8)
    scales_and_zeros = torch.stack((packed.scales, packed.zeros.float()), -1).to(torch.bfloat16).contiguous()
    return functools.partial(torch._weight_int4pack_mm, x, tiled, 128, scales_and_zeros)


def sweep() -> None:
    """Print the time of every configuration that fits, best first, beside cuBLAS in bfloat16 and the one chosen."""
    outputs, width = harness.choose(SHAPES[0], (96, 256))
    weight_FD = (torch.randn(outputs, width, device=harness.device()) / width**0.5).to(torch.bfloat16)
    for name, quantize in FORMATS.items():
        packed = quantize(weight_FD)
        for count in harness.choose((1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048), (1,)):
            x = torch.randn(count, width, device=harness.device()).to(torch.bfloat16)
            functions: dict[str, Callable[[], Any]] = {
                "cuBLAS bf16": functools.partial(torch.nn.functional.linear, x, weight_FD)
            }
            for config in kernel.CONFIGS:
                if _is_worth_it(config, count):
                    functions[_short(config)] = functools.partial(kernel.quant_matmul, x, packed, config=config)
            timing = {
                key: time
                for key, time in harness.measure(_working(functions), cold=True, samples=15).items()
                if key != "ours"
            }
            chosen = _short(kernel.choose_config(count, outputs, width, packed.bits))
            best = sorted(timing.items(), key=lambda item: item[1].median_ms)[:6]
            line = "  ".join(f"{key} {time.median_ms * 1e3:.1f}" for key, time in best)
            seen = timing[chosen].median_ms * 1e3 if chosen in timing else float("nan")
            print(
                f"{name} rows {count}: cuBLAS {timing['cuBLAS bf16'].median_ms * 1e3:.1f} us, chosen {chosen} {seen:.1f}; {line}",
                flush=True,
            )


def _is_worth_it(config: kernel.Config, count: int) -> bool:
    """Tiles much larger or smaller than the rows only cost time to compile and run."""
    if config.kind == "tile":
        return config.block_x == 16 if count <= 16 else count / 8 <= config.block_x <= 2 * count
    return count <= 4 if config.kind == "vector" else count >= 64


def _working(functions: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    found = {}
    for key, function in functions.items():
        try:
            function()
            found[key] = function
        except (KernelError, *harness.PEER_ERRORS) as error:
            harness.say(f"{key}: {error}")
    return found


def _short(config: kernel.Config) -> str:
    if config.kind == "dequantize":
        return "dequantize"
    side = "wide" if config.wide else "narrow"
    kind = side if config.kind == "tile" else "vector"
    return f"{kind}-{config.block_f}x{config.block_x}-s{config.splits}-w{config.num_warps}-st{config.num_stages}"


if __name__ == "__main__":
    sweep()
