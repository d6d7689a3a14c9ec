"""Does attention over pages draw the memory's bandwidth, and as much of it as FlashInfer at its best?

    python benchmarks/kernels/run_all.py --only paged_attention        the table
    python benchmarks/kernels/sweeping.py paged_attention              every configuration and several splits

Decode: a query a sequence, pages shuffled, lengths full; the work is the keys and values read once. FlashInfer runs through
each of its wrappers that take such pages on Hopper, planned beforehand: decode without and with tensor cores (FA2 and FA3
paths), prefill FA3, its persistent scheduler, XQA, keys and values in one tensor as ours, and in its other layout. "flashinfer best"
is the fastest of them at the same page size; a last decode row compares both sides' best page sizes. A setting whose answer
is not ours, or that does not run, is left out with a line. Prefill: a chunk of each prompt against all before it, beside our own
packed attention over keys that lie side by side.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Function, Row, Timing
from sweeping import Sweep
from torch import Tensor

from tessera_kernels.triton import paged_attention as kernel
from tessera_kernels.triton.flash_attention import flash_attention_varlen

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


def rows() -> Iterator[Row]:
    """Yield decode rows, one over page sizes, then prefill rows."""
    pages: list[Row] = []
    for shape in harness.turn((*harness.choose(DECODE, TINY), "pages", *harness.choose(PREFILL, TINY_PREFILL))):
        if isinstance(shape, str):
            yield from _over_page_sizes(pages)
        elif shape.T > 1:
            yield _prefill(shape)
        else:
            row = _decode(shape)
            pages += [row] if (shape.B, shape.S, shape.N, shape.K) == (32, 4096, 32, 8) else []
            yield row


def _over_page_sizes(found: list[Row]) -> Iterator[Row]:
    """Compare the best page size of each side: who may choose the page does."""
    theirs = [row.peers["flashinfer best"] for row in found if "flashinfer best" in row.peers]
    if found:
        ours = min(found, key=lambda row: row.ours.median_ms)
        yield Row(
            op="paged_attention", shape="decode B32 S4096 N32/8 H128, each side's best page size", ours=ours.ours,
            peers={"flashinfer best": min(theirs, key=lambda timing: timing.median_ms)} if theirs else {},
            bytes_moved=ours.bytes_moved, must={"flashinfer best": 0.95, "share": 0.75}, notes=f"ours: {ours.shape}",
        )  # fmt: skip


def inputs_of(shape: Shape) -> Inputs:
    """Return random pages in a random order, and queries."""
    width_M = -(-shape.S // shape.Z)
    device = harness.device()
    pages = torch.randn(shape.B * width_M, 2, shape.Z, shape.K, shape.H, dtype=torch.bfloat16, device=device)
    order = torch.randperm(shape.B * width_M, device=device).to(torch.int32).view(shape.B, width_M)
    lengths = torch.full((shape.B,), shape.S, dtype=torch.int32, device=device)
    q = torch.randn(shape.B * shape.T, shape.N, shape.H, dtype=torch.bfloat16, device=device)
    return Inputs(q=q, pages=pages, table=order, lengths=lengths)


def call_of(inputs: Inputs, shape: Shape, **options: Any) -> Function:
    """Return our call: decode, or prefill where a sequence has several queries."""
    given = (inputs.q, inputs.pages[:, 0], inputs.pages[:, 1], inputs.table, inputs.lengths)
    if shape.T == 1:
        return functools.partial(kernel.paged_attention, *given, **options)
    return functools.partial(kernel.paged_prefill, *given, _starts(shape.B, shape.T), longest_query=shape.T, **options)


def _starts(count: int, step: int) -> Tensor:
    return torch.arange(0, (count + 1) * step, step, dtype=torch.int32, device=harness.device())


def _decode(shape: Shape) -> Row:
    inputs = inputs_of(shape)
    functions: dict[str, Function] = {"ours": call_of(inputs, shape)}
    functions["ours, split size 1024"] = call_of(inputs, shape, split_size=harness.choose(1024, 64))
    functions |= harness.available(_flashinfer(inputs, shape))
    is_goal = shape.S >= 4096 and shape.B * shape.K >= 128
    return _row(shape, harness.measure(functions), {"flashinfer best": 0.95, "share": 0.75} if is_goal else {}, "copy")


def _prefill(shape: Shape) -> Row:
    inputs = inputs_of(shape)
    dense = [
        torch.randn(shape.B * shape.S, shape.K, shape.H, dtype=torch.bfloat16, device=harness.device()) for _ in "kv"
    ]
    functions: dict[str, Function] = {"ours": call_of(inputs, shape)}
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
    makers = {
        "flashinfer plain": _peer_decode(inputs, shape, "NHD", False, "auto"),
        "flashinfer tensor fa2": _peer_decode(inputs, shape, "NHD", True, "fa2"),
        "flashinfer tensor fa3": _peer_decode(inputs, shape, "NHD", True, "fa3"),
        "flashinfer tensor fa2 HND": _peer_decode(inputs, shape, "HND", True, "fa2"),
        "flashinfer prefill fa3": _peer_prefill(inputs, shape, "fa3"),
        "flashinfer persistent": _peer_persistent(inputs, shape),
    }
    return makers | ({"flashinfer xqa": _peer_xqa(inputs, shape)} if shape.Z >= 16 else {})  # it has no pages of 8


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


def _peer_persistent(inputs: Inputs, shape: Shape) -> Callable[[], Function]:
    def make() -> Function:
        import flashinfer

        wrapper = flashinfer.BatchAttention("NHD", "cuda")
        indptr, indices, _ = _edges(shape, inputs)
        wrapper.plan(
            _starts(shape.B, 1), indptr, indices, inputs.lengths, shape.N, shape.K, shape.H, shape.H, shape.Z,
            causal=False, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        return _checked(lambda: wrapper.run(inputs.q, inputs.pages)[0], inputs, shape)

    return make


def _peer_xqa(inputs: Inputs, shape: Shape) -> Callable[[], Function]:
    def make() -> Function:
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        room = torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")  # its semaphores begin at zero
        run = functools.partial(
            xqa_batch_decode_with_kv_cache, inputs.q, inputs.pages, room, inputs.table,
            inputs.lengths.view(torch.uint32), shape.S, bmm1_scale=shape.H**-0.5, bmm2_scale=1.0, kv_layout="NHD",
        )  # fmt: skip
        return _checked(run, inputs, shape)

    return make


def _checked(function: Function, inputs: Inputs, shape: Shape) -> Function:
    """Return the peer if its answer is ours: one that was planned wrongly would be fast."""
    found, ours = function(), call_of(inputs, shape)()
    assert isinstance(found, Tensor)
    assert isinstance(ours, Tensor)
    apart = float((found.float() - ours.float()).norm() / ours.float().norm())
    if not apart < 0.02:
        raise ValueError(f"its answer is {apart:.2g} away from ours")
    return function


def sweeps() -> Iterator[Sweep]:
    """Yield configurations with the splits that are chosen for them, then splits of the chosen configuration."""
    shapes = harness.choose((*DECODE[:2], DECODE[4], DECODE[6], DECODE[-2], PREFILL[0]), TINY + TINY_PREFILL)
    for shape in shapes:
        inputs = inputs_of(shape)
        rows_each = shape.T * shape.N // shape.K
        chosen = kernel.choose_config(rows_each, shape.H, torch.bfloat16)
        configs = [config for config in kernel.CONFIGS if (config.block_m == 16) == (rows_each <= 16)]
        parts = {
            "configuration": {c: call_of(inputs, shape, config=c) for c in dict.fromkeys([chosen, *configs])},
            "splits": {s: call_of(inputs, shape, config=chosen, splits=s) for s in (None, 1, 2, 3, 4, 6, 8, 12, 16)},
        }
        for part, candidates in parts.items():
            is_config = part == "configuration"
            yield Sweep(
                part=part, key=f"{'up to 16' if rows_each <= 16 else 'more'} rows, width {shape.H}" if is_config else str(shape),
                shape=str(shape), current=chosen if is_config else None, candidates=candidates,
                work=shape.bytes_moved if shape.T == 1 else shape.flops, limit="copy" if shape.T == 1 else "bf16",
            )  # fmt: skip
