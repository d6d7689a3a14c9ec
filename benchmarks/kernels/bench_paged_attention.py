"""Does attention over pages draw the memory's bandwidth, and as much of it as FlashInfer at its best?

    python benchmarks/kernels/run_all.py --only paged_attention        the table
    python benchmarks/kernels/bench_paged_attention.py                 every configuration and several splits, best first

Decode: a query a sequence, pages shuffled, lengths full; the work is the keys and values read once. FlashInfer runs with and
without tensor cores, on its FA2 and FA3 paths, in both page layouts, planned beforehand; "flashinfer best" is the fastest of
them at the same page size, which is what the must compares. Prefill: a chunk of each prompt against all before it, beside
our own packed attention over keys that lie side by side.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Function, Row, Timing
from torch import Tensor

from tessera_kernels.triton import paged_attention as kernel
from tessera_kernels.triton.flash_attention import flash_attention_varlen
from tessera_shared.errors import KernelError

WORKSPACE = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """B sequences of S keys, N query heads on K key/value heads of width H, pages of Z; T queries each, 1 = decode."""

    B: int
    S: int
    N: int = 32
    K: int = 8
    H: int = 128
    Z: int = 16
    T: int = 1

    def __str__(self) -> str:
        kind = "decode" if self.T == 1 else f"prefill T{self.T}"
        return f"{kind} B{self.B} S{self.S} N{self.N}/{self.K} H{self.H} Z{self.Z} bfloat16"

    @property
    def bytes_moved(self) -> float:
        return 2.0 * (2 * self.B * self.S * self.K * self.H + 2 * self.B * self.T * self.N * self.H)

    @property
    def flops(self) -> float:
        return 4.0 * self.B * self.N * self.H * self.T * (self.S - (self.T - 1) / 2)


DECODE = (
    Shape(B=32, S=4096, Z=16), Shape(B=32, S=4096, Z=64), Shape(B=32, S=4096, Z=8), Shape(B=32, S=4096, Z=128),
    Shape(B=128, S=4096, Z=16), Shape(B=16, S=8192, Z=16), Shape(B=16, S=16384, N=64, K=8, Z=16),
    Shape(B=64, S=4096, N=16, K=8, H=64, Z=16), Shape(B=8, S=4096, N=32, K=32, Z=16),
    Shape(B=1, S=32768, Z=16), Shape(B=8, S=4096, Z=16),
)  # fmt: skip
PREFILL = (Shape(B=8, S=4096, T=512, Z=16), Shape(B=2, S=16384, T=2048, Z=64))
TINY = (Shape(B=2, S=50, N=4, K=2, H=16, Z=8),)
TINY_PREFILL = (Shape(B=2, S=50, N=4, K=2, H=16, Z=8, T=9),)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    q: Tensor  # [B T, N, H]
    pages: Tensor  # [P, 2, Z, K, H]
    table: Tensor  # [B, M]
    lengths: Tensor


def rows() -> list[Row]:
    """Return decode rows, then prefill rows."""
    return [
        *(_decode(shape) for shape in harness.choose(DECODE, TINY)),
        *(_prefill(shape) for shape in harness.choose(PREFILL, TINY_PREFILL)),
    ]


def _inputs(shape: Shape) -> Inputs:
    width_M = -(-shape.S // shape.Z)
    device = harness.device()
    pages = torch.randn(shape.B * width_M, 2, shape.Z, shape.K, shape.H, dtype=torch.bfloat16, device=device)
    order = torch.randperm(shape.B * width_M, device=device).to(torch.int32).view(shape.B, width_M)
    lengths = torch.full((shape.B,), shape.S, dtype=torch.int32, device=device)
    q = torch.randn(shape.B * shape.T, shape.N, shape.H, dtype=torch.bfloat16, device=device)
    return Inputs(q=q, pages=pages, table=order, lengths=lengths)


def _ours(inputs: Inputs, shape: Shape, **options: Any) -> Function:
    given = (inputs.q, inputs.pages[:, 0], inputs.pages[:, 1], inputs.table, inputs.lengths)
    if shape.T == 1:
        return functools.partial(kernel.paged_attention, *given, **options)
    return functools.partial(kernel.paged_prefill, *given, _starts(shape.B, shape.T), longest_query=shape.T, **options)


def _starts(count: int, step: int) -> Tensor:
    return torch.arange(0, (count + 1) * step, step, dtype=torch.int32, device=harness.device())


def _decode(shape: Shape) -> Row:
    inputs = _inputs(shape)
    functions: dict[str, Function] = {"ours": _ours(inputs, shape)}
    functions["ours, split size 1024"] = _ours(inputs, shape, split_size=harness.choose(1024, 64))
    functions |= harness.available(_flashinfer(inputs, shape))
    is_goal = shape.S >= 4096 and shape.B * shape.K >= 128
    return _row(shape, harness.measure(functions), {"flashinfer best": 0.95, "share": 0.75} if is_goal else {}, "copy")


def _prefill(shape: Shape) -> Row:
    inputs = _inputs(shape)
    dense = [
        torch.randn(shape.B * shape.S, shape.K, shape.H, dtype=torch.bfloat16, device=harness.device()) for _ in "kv"
    ]
    functions: dict[str, Function] = {"ours": _ours(inputs, shape)}
    functions["our packed attention"] = functools.partial(
        flash_attention_varlen, inputs.q, *dense, _starts(shape.B, shape.T), _starts(shape.B, shape.S),
        longest_query=shape.T, longest_key=shape.S,
    )  # fmt: skip
    functions |= harness.available(_flashinfer(inputs, shape))
    return _row(shape, harness.measure(functions), {}, "bf16")


def _row(shape: Shape, timed: Mapping[str, Timing], must: dict[str, float], limit: str) -> Row:
    peers = {name: timing for name, timing in timed.items() if name != "ours"}
    theirs = [timing for name, timing in peers.items() if name.startswith("flashinfer")]
    if theirs:
        peers["flashinfer best"] = min(theirs, key=lambda timing: timing.median_ms)
    return Row(
        op="paged_attention", shape=str(shape), ours=timed["ours"], peers=peers, flops=shape.flops,
        bytes_moved=shape.bytes_moved, limit=limit, must=must,
    )  # fmt: skip


def _flashinfer(inputs: Inputs, shape: Shape) -> dict[str, Callable[[], Function]]:
    if harness.is_dry():
        return {}
    if shape.T > 1:
        return {f"flashinfer prefill {path}": _peer_prefill(inputs, shape, path) for path in ("fa2", "fa3")}
    return {
        "flashinfer plain": _peer_decode(inputs, shape, "NHD", False, "auto"),
        "flashinfer tensor fa2": _peer_decode(inputs, shape, "NHD", True, "fa2"),
        "flashinfer tensor fa3": _peer_decode(inputs, shape, "NHD", True, "fa3"),
        "flashinfer tensor fa2 HND": _peer_decode(inputs, shape, "HND", True, "fa2"),
        "flashinfer prefill fa3": _peer_prefill(inputs, shape, "fa3"),
    }


def _edges(shape: Shape, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return FlashInfer's (edges of each sequence's pages, pages, keys in each last page)."""
    last = torch.full_like(inputs.lengths, (shape.S - 1) % shape.Z + 1)
    return _starts(shape.B, inputs.table.shape[1]), inputs.table.flatten(), last


def _peer_decode(inputs: Inputs, shape: Shape, layout: str, tensor: bool, path: str) -> Callable[[], Function]:
    def make() -> Function:
        import flashinfer

        room = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, layout, use_tensor_cores=tensor, backend=path)
        wrapper.plan(
            *_edges(shape, inputs), shape.N, shape.K, shape.H, shape.Z,
            q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        pages = inputs.pages if layout == "NHD" else inputs.pages.transpose(2, 3).contiguous()
        return _checked(functools.partial(wrapper.run, inputs.q, pages), inputs, shape)

    return make


def _peer_prefill(inputs: Inputs, shape: Shape, path: str) -> Callable[[], Function]:
    def make() -> Function:
        import flashinfer

        room = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(room, "NHD", backend=path)
        wrapper.plan(
            _starts(shape.B, shape.T), *_edges(shape, inputs), shape.N, shape.K, shape.H, shape.Z, causal=True,
            q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        return _checked(functools.partial(wrapper.run, inputs.q, inputs.pages), inputs, shape)

    return make


def _checked(function: Function, inputs: Inputs, shape: Shape) -> Function:
    """Return the peer if its answer is ours: one that was planned wrongly would be fast."""
    found, ours = function(), _ours(inputs, shape)()
    assert isinstance(found, Tensor)
    assert isinstance(ours, Tensor)
    apart = float((found.float() - ours.float()).norm() / ours.float().norm())
    if not apart < 0.02:
        raise ValueError(f"its answer is {apart:.2g} away from ours")
    return function


def sweep() -> None:
    """Print microseconds of every configuration with several numbers of splits, best first."""
    for shape in harness.choose((*DECODE[:2], DECODE[4], DECODE[-2], PREFILL[0]), TINY + TINY_PREFILL):
        inputs = _inputs(shape)
        functions: dict[str, Function] = {"ours": _ours(inputs, shape)}
        rows_each = shape.T * shape.N // shape.K
        chosen = kernel.choose_config(rows_each, shape.H, torch.bfloat16)
        for config in kernel.CONFIGS:
            if (config.block_m == 16) != (rows_each <= 16):
                continue
            for splits in (None, 1, 2, 3, 4, 8) if config == chosen else (None, 2):
                name = f"{tuple(config)} splits {splits or 'chosen'}"
                functions |= _working(name, _ours(inputs, shape, config=config, splits=splits))
        timed = harness.measure(functions, samples=12)
        best = sorted(timed.items(), key=lambda item: item[1].median_ms)
        print(f"\n{shape}: chosen {tuple(chosen)}, {timed['ours'].median_ms * 1e3:.1f} us", flush=True)
        for name, timing in best[:14]:
            rate = shape.bytes_moved / timing.median_ms / 1e6
            print(
                f"  {name:40s} {timing.median_ms * 1e3:8.1f} us {rate:7.0f} GB/s "
                f"{shape.flops / timing.median_ms / 1e9:6.0f} TFLOP/s",
                flush=True,
            )
        del inputs, functions


def _working(name: str, function: Function) -> dict[str, Function]:
    try:
        function()
    except (KernelError, *harness.PEER_ERRORS) as error:
        harness.say(f"{name}: {str(error)[:120]}")
        return {}
    return {name: function}


if __name__ == "__main__":
    sweep()
