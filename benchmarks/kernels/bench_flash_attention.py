"""Attention forward and backward beside cuDNN and FlashAttention 2 (SDPA with the backend forced), packed beside dense.

    python benchmarks/kernels/run_all.py --only flash_attention        the table
    python benchmarks/kernels/sweeping.py flash_attention              every configuration

Work: 4 B N T S H floating-point operations forward, half of it when causal, and 2.5 times that backward. Peers get their
own contiguous [B, N, S, H] tensors. The backward is timed with its launches: milliseconds of work hide them.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

import harness
import torch
from harness import Function, Row
from sweeping import Sweep
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tessera_kernels.triton.flash_attention import (
    choose_config,
    flash_attention,
    flash_attention_varlen,
)
from tessera_kernels.triton.flash_attention_configs import FORWARD, KEYS, QUERIES

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
FULL = (
    (32, 16, 16, 1024, 128), (8, 16, 16, 4096, 128), (2, 16, 16, 16384, 128), (8, 16, 16, 4096, 64), (4, 32, 8, 4096, 128),
    (4, 16, 16, 4096, 256),
)  # fmt: skip
TINY = ((1, 2, 1, 40, 16),)
UNITS = (8192, 4096, 4096, 4096, 2048, 2048, 2048, 2048)
"""Packed lengths that make the same number of operations as 8 sequences of 4,096, when causal."""


def rows() -> Iterator[Row]:
    """Yield forward and backward rows of every shape, packed against dense in between: a shape without a must comes last."""
    first, *others = harness.choose(FULL, TINY)
    for shape in harness.turn([*others, "packed", first]):
        yield from _packed() if isinstance(shape, str) else _dense(*shape)


def _dense(batch: int, heads: int, kv_heads: int, length: int, width: int) -> Iterator[Row]:
    ours = leaves_of(batch, length, heads, kv_heads, width)
    theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in ours]
    dout = torch.randn_like(ours[0])
    name = f"B{batch} N{heads}/{kv_heads} S{length} H{width} causal bfloat16"
    flops = 2.0 * batch * heads * length * length * width

    forward: dict[str, Function] = {"ours": lambda: flash_attention(*[x.detach() for x in ours])}
    forward |= harness.available({peer: peer_forward(theirs, peer) for peer in BACKENDS})
    fast = width == 128 and length >= 4096
    must = {"cudnn": 0.72, "flash2": 1.12, "share": 0.40} if fast else {}
    if width == 64:
        must = {"cudnn": 0.95, "share": 0.38}
    yield _row(f"fwd {name}", harness.measure(forward), flops, must)

    out, _ = flash_attention(*ours)
    backward: dict[str, Function] = {"ours": lambda: torch.autograd.grad(out, ours, dout, retain_graph=True)}
    backward |= harness.available({peer: peer_backward(theirs, dout, peer) for peer in BACKENDS})
    if width <= 128:  # wider heads leave no registers for it
        adding = choose_config(width, torch.bfloat16)._replace(keys=KEYS[0])
        added, _ = flash_attention(*ours, config=adding)
        backward["ours, dQ added"] = lambda: torch.autograd.grad(added, ours, dout, retain_graph=True)
    must = {"cudnn": 0.62, "flash2": 1.0, "share": 0.32} if fast else {}
    yield _row(f"bwd {name}", harness.measure(backward, graph=False), 2.5 * flops, must)


def _packed() -> Iterator[Row]:
    lengths = harness.choose(UNITS, (20, 7, 0, 13))
    heads, width = harness.choose((16, 128), (2, 16))
    longest, total = max(lengths), sum(lengths)
    ours = [x[0].detach().requires_grad_() for x in leaves_of(1, total, heads, heads, width)]
    same = round(math.sqrt(sum(length**2 for length in lengths) / len(lengths)))
    dense = leaves_of(len(lengths), same, heads, heads, width)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=harness.device())
    flops = 2.0 * heads * width * sum(length**2 for length in lengths)
    name = f"packed {'+'.join(map(str, lengths))} N{heads} H{width} causal bfloat16"

    def packed(leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        return flash_attention_varlen(*leaves, starts, starts, longest_query=longest, longest_key=longest)

    forward: dict[str, Function] = {
        "ours": lambda: packed([x.detach() for x in ours]),
        "our dense": lambda: flash_attention(*[x.detach() for x in dense]),
    } | harness.available({"torch varlen": _peer_varlen(ours, starts, longest)})
    yield _row(f"fwd {name}", harness.measure(forward), flops, {"our dense": 0.9})
    outs = [packed(ours)[0], flash_attention(*dense)[0]]
    douts = [torch.randn_like(x) for x in outs]
    backward: dict[str, Function] = {
        "ours": lambda: torch.autograd.grad(outs[0], ours, douts[0], retain_graph=True),
        "our dense": lambda: torch.autograd.grad(outs[1], dense, douts[1], retain_graph=True),
    }
    yield _row(f"bwd {name}", harness.measure(backward, graph=False), 2.5 * flops, {"our dense": 0.9})


def _row(shape: str, timed: dict[str, harness.Timing], flops: float, must: dict[str, float]) -> Row:
    peers = {name: timing for name, timing in timed.items() if name != "ours"}
    return Row(op="flash_attention", shape=shape, ours=timed["ours"], peers=peers, flops=flops, limit="bf16", must=must)


def leaves_of(batch: int, length: int, heads: int, kv_heads: int, width: int) -> list[Tensor]:
    """Return random bfloat16 queries, keys and values, [B, S, N, H], that want gradients."""
    return [
        torch.randn(batch, length, n, width, dtype=torch.bfloat16, device=harness.device()).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def peer_forward(leaves: list[Tensor], peer: str) -> Callable[[], Function]:
    """Return a maker of SDPA with this backend over [B, N, S, H] tensors."""

    def make() -> Function:
        q, k, v = (x.detach() for x in leaves)
        grouped = q.shape[1] != k.shape[1]

        def run() -> Tensor:
            with sdpa_kernel(BACKENDS[peer]):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        run()
        return run

    return make


def peer_backward(leaves: list[Tensor], dout: Tensor, peer: str) -> Callable[[], Function]:
    """Return the maker of a peer's backward over [B, N, S, H] leaves; `dout` is ours, [B, S, N, H]."""

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


def sweeps() -> Iterator[Sweep]:
    """Yield the forward and the backward of each head width, peers beside them."""
    widths = {width: shape for *shape, width in harness.choose(FULL[1:], TINY)[::-1]}
    for width, (batch, heads, kv_heads, length) in sorted(widths.items()):
        leaves = leaves_of(batch, length, heads, kv_heads, width)
        theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
        dout = torch.randn_like(leaves[0])
        shape = f"B{batch} N{heads}/{kv_heads} S{length} H{width}"
        flops = 2.0 * batch * heads * length * length * width
        chosen = choose_config(width, torch.bfloat16)
        keys = {part: chosen._replace(keys=part) for part in KEYS}
        peer = {"cudnn": peer_backward(theirs, dout, "cudnn")}
        for part, current, configs, work, beside in (
            ("forward", chosen.forward, {part: chosen._replace(forward=part) for part in FORWARD}, flops,
             {"cudnn": peer_forward(theirs, "cudnn")}),
            ("backward, keys", chosen.keys, keys, 2.5 * flops, peer),  # of two kernels, whose times add,
            ("backward, queries", chosen.queries,  # the best of each is the best of both
             {part: chosen._replace(queries=part) for part in QUERIES}, 2.5 * flops, peer),
        ):  # fmt: skip
            make = _forward_of if part == "forward" else backward_of
            yield Sweep(
                part=part, key=f"width {width}", shape=shape, current=current,
                candidates={
                    part: make(leaves, dout, partial(flash_attention, config=config)) for part, config in configs.items()
                },
                beside=harness.available(beside), work=work, limit="bf16", graph=part == "forward",
            )  # fmt: skip


def _forward_of(leaves: list[Tensor], dout: Tensor, attention: Callable[..., tuple[Tensor, Tensor]]) -> Function:
    del dout
    return lambda: attention(*[x.detach() for x in leaves])[0]


def backward_of(leaves: list[Tensor], dout: Tensor, attention: Callable[..., tuple[Tensor, Tensor]]) -> Function:
    """Return the backward of one attention; its forward runs once, at the first call."""
    outs: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        if not outs:
            outs.append(attention(*leaves)[0])
        return torch.autograd.grad(outs[0], leaves, dout, retain_graph=True)

    return run
