"""Attention forward and backward beside cuDNN and FlashAttention 2 (SDPA with the backend forced), packed beside dense.

    python benchmarks/kernels/run_all.py --only flash_attention            the table
    python benchmarks/kernels/bench_flash_attention.py                     every configuration: error, milliseconds, TFLOP/s

Work: 4 B N T S H floating-point operations forward, half of it when causal, and 2.5 times that backward. Peers get their
own contiguous [B, N, S, H] tensors. The backward is timed with its launches: milliseconds of work hide them.
"""

import math
from collections.abc import Callable
from itertools import accumulate

import harness
import torch
from harness import Function, Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tessera_kernels.triton.flash_attention import (
    AttentionConfig,
    choose_config,
    flash_attention,
    flash_attention_varlen,
)
from tessera_kernels.triton.flash_attention_configs import FORWARD, KEYS, QUERIES
from tessera_shared.errors import KernelError

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
FULL = (
    (32, 16, 16, 1024, 128), (8, 16, 16, 4096, 128), (2, 16, 16, 16384, 128), (8, 16, 16, 4096, 64), (4, 32, 8, 4096, 128),
    (4, 16, 16, 4096, 256),
)  # fmt: skip
TINY = ((1, 2, 1, 40, 16),)
UNITS = (8192, 4096, 4096, 4096, 2048, 2048, 2048, 2048)
"""Packed lengths that make the same number of operations as 8 sequences of 4,096, when causal."""


def rows() -> list[Row]:
    """Return forward and backward rows of every shape, then packed against dense."""
    found = [row for shape in harness.choose(FULL, TINY) for row in _dense(*shape)]
    return found + _packed()


def _dense(batch: int, heads: int, kv_heads: int, length: int, width: int) -> list[Row]:
    ours = _leaves(batch, length, heads, kv_heads, width)
    theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in ours]
    dout = torch.randn_like(ours[0])
    name = f"B{batch} N{heads}/{kv_heads} S{length} H{width} causal bfloat16"
    flops = 2.0 * batch * heads * length * length * width

    forward: dict[str, Function] = {"ours": lambda: flash_attention(*[x.detach() for x in ours])}
    forward |= harness.available({peer: _peer_forward(theirs, peer) for peer in BACKENDS})
    fast = width == 128 and length >= 4096
    must = {"cudnn": 0.72, "flash2": 1.12, "share": 0.40} if fast else {}
    if width == 64:
        must = {"cudnn": 0.95, "share": 0.38}
    timed = harness.measure(forward)
    made = [_row(f"fwd {name}", timed, flops, must)]

    out, _ = flash_attention(*ours)
    backward: dict[str, Function] = {"ours": lambda: torch.autograd.grad(out, ours, dout, retain_graph=True)}
    backward |= harness.available({peer: _peer_backward(theirs, dout, peer) for peer in BACKENDS})
    fixed, _ = flash_attention(*ours, deterministic=True)
    backward["ours deterministic"] = lambda: torch.autograd.grad(fixed, ours, dout, retain_graph=True)
    timed = harness.measure(backward, graph=False)
    must = {"cudnn": 0.62, "flash2": 1.0, "share": 0.32} if fast else {}
    return [*made, _row(f"bwd {name}", timed, 2.5 * flops, must)]


def _packed() -> list[Row]:
    lengths = harness.choose(UNITS, (20, 7, 0, 13))
    heads, width = harness.choose((16, 128), (2, 16))
    longest, total = max(lengths), sum(lengths)
    ours = [x[0].detach().requires_grad_() for x in _leaves(1, total, heads, heads, width)]
    same = round(math.sqrt(sum(length**2 for length in lengths) / len(lengths)))
    dense = _leaves(len(lengths), same, heads, heads, width)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=harness.device())
    flops = 2.0 * heads * width * sum(length**2 for length in lengths)
    name = f"packed {'+'.join(map(str, lengths))} N{heads} H{width} causal bfloat16"

    def packed(leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        return flash_attention_varlen(*leaves, starts, starts, longest_query=longest, longest_key=longest)

    forward: dict[str, Function] = {
        "ours": lambda: packed([x.detach() for x in ours]),
        "our dense": lambda: flash_attention(*[x.detach() for x in dense]),
    } | harness.available({"torch varlen": _peer_varlen(ours, starts, longest)})
    made = [_row(f"fwd {name}", harness.measure(forward), flops, {"our dense": 0.9})]
    outs = [packed(ours)[0], flash_attention(*dense)[0]]
    douts = [torch.randn_like(x) for x in outs]
    backward: dict[str, Function] = {
        "ours": lambda: torch.autograd.grad(outs[0], ours, douts[0], retain_graph=True),
        "our dense": lambda: torch.autograd.grad(outs[1], dense, douts[1], retain_graph=True),
    }
    timed = harness.measure(backward, graph=False)
    return [*made, _row(f"bwd {name}", timed, 2.5 * flops, {"our dense": 0.9})]


def _row(shape: str, timed: dict[str, harness.Timing], flops: float, must: dict[str, float]) -> Row:
    peers = {name: timing for name, timing in timed.items() if name != "ours"}
    return Row(op="flash_attention", shape=shape, ours=timed["ours"], peers=peers, flops=flops, limit="bf16", must=must)


def _leaves(batch: int, length: int, heads: int, kv_heads: int, width: int) -> list[Tensor]:
    return [
        torch.randn(batch, length, n, width, dtype=torch.bfloat16, device=harness.device()).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def _peer_forward(leaves: list[Tensor], peer: str) -> Callable[[], Function]:
    def make() -> Function:
        q, k, v = (x.detach() for x in leaves)
        grouped = q.shape[1] != k.shape[1]

        def run() -> Tensor:
            with sdpa_kernel(BACKENDS[peer]):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        run()
        return run

    return make


def _peer_backward(leaves: list[Tensor], dout: Tensor, peer: str) -> Callable[[], Function]:
    def make() -> Function:
        q, k, v = leaves
        with sdpa_kernel(BACKENDS[peer]):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        gradient = dout.transpose(1, 2).contiguous()
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    return make


def _peer_varlen(leaves: list[Tensor], starts: Tensor, longest: int) -> Callable[[], Function]:
    def make() -> Function:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x.detach() for x in leaves)
        try:
            varlen_attn(q, k, v, starts, starts, longest, longest, is_causal=True)
        except TypeError:  # a later spelling of causal
            return lambda: varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
        return lambda: varlen_attn(q, k, v, starts, starts, longest, longest, is_causal=True)

    return make


def sweep() -> None:
    """Print every configuration at the main shapes: relative error against the first, milliseconds, TFLOP/s."""
    for batch, heads, kv_heads, length, width in harness.choose(FULL[1:], TINY):
        leaves = _leaves(batch, length, heads, kv_heads, width)
        flops = 2.0 * batch * heads * length * length * width
        print(f"\nB{batch} N{heads}/{kv_heads} S{length} H{width} causal bfloat16", flush=True)
        _sweep_forward(leaves, flops)
        _sweep_backward(leaves, 2.5 * flops)


def _sweep_forward(leaves: list[Tensor], flops: float) -> None:
    chosen = choose_config(leaves[0].shape[-1], torch.bfloat16, deterministic=False)
    wanted = None
    for part in dict.fromkeys((chosen.forward, *FORWARD)):
        config = chosen._replace(forward=part)
        try:
            out = flash_attention(*[x.detach() for x in leaves], config=config)[0]
        except KernelError as error:
            print(f"  {_plain(part)}: {str(error)[:110]}")
            continue
        wanted = out if wanted is None else wanted
        timed = harness.measure(
            {"ours": lambda config=config: flash_attention(*[x.detach() for x in leaves], config=config)}
        )
        _say(_plain(part), [out], [wanted], timed["ours"].median_ms, flops)


def _sweep_backward(leaves: list[Tensor], flops: float) -> None:
    chosen = choose_config(leaves[0].shape[-1], torch.bfloat16, deterministic=True)
    dout = torch.randn_like(leaves[0])
    wanted: list[Tensor] = []
    configs = [
        chosen,
        *(chosen._replace(keys=part) for part in KEYS),
        *(chosen._replace(queries=part) for part in QUERIES),
    ]
    for config in dict.fromkeys(configs):
        label = f"{_plain(config.keys)} {_plain(config.queries) if config.deterministic else ''}"
        try:
            out, _ = flash_attention(*leaves, config=config)
            grads = list(torch.autograd.grad(out, leaves, dout, retain_graph=True))
        except KernelError as error:
            print(f"  {label}: {str(error)[:110]}")
            continue
        wanted = wanted or grads
        run = _backward_of(out, leaves, dout)
        _say(label, grads, wanted, harness.measure({"ours": run}, graph=False)["ours"].median_ms, flops)


def _backward_of(out: Tensor, leaves: list[Tensor], dout: Tensor) -> Function:
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _plain(part: tuple[int, ...] | AttentionConfig) -> str:
    return f"{type(part).__name__}{tuple(part)}"


def _say(label: str, found: list[Tensor], wanted: list[Tensor], milliseconds: float, flops: float) -> None:
    worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, wanted, strict=True))
    print(
        f"  {label:64s} error {worst:.1e}  {milliseconds:8.3f} ms  {flops / milliseconds / 1e9:6.0f} TFLOP/s",
        flush=True,
    )


if __name__ == "__main__":
    sweep()
