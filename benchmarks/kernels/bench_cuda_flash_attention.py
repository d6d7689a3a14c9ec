"""Attention in CUDA C++ beside our Triton kernel, cuDNN and FlashAttention 2.

    python benchmarks/kernels/run_all.py --only cuda_flash_attention        the table
    python benchmarks/kernels/sweeping.py cuda_flash_attention              every configuration

Shapes, work and peers are those of `bench_flash_attention`; a backward is timed where it is CUDA C++ too.
"""

from collections.abc import Iterator
from functools import partial

import bench_flash_attention as dense
import harness
import torch
from harness import Function, Row
from sweeping import Sweep
from torch import Tensor

from tessera_kernels.cuda._attention_configs import CONFIGS, CudaConfig, capability, choose_config, padded_width
from tessera_kernels.cuda.flash_attention import flash_attention, has_backward
from tessera_kernels.triton import flash_attention as triton


def rows() -> Iterator[Row]:
    """Yield forward rows, and backward rows where there is a backward; a shape without a must comes last."""
    first, *others = harness.choose(dense.FULL, dense.TINY)
    for batch, heads, kv_heads, length, width in harness.turn([*others, first]):
        ours = dense.leaves_of(batch, length, heads, kv_heads, width)
        theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in ours]
        shape = f"B{batch} N{heads}/{kv_heads} S{length} H{width} causal bfloat16"
        flops = 2.0 * batch * heads * length * length * width
        config = choose_config(width, capability(ours[0].device))
        is_long = width == 128 and length >= 4096
        yield _row(f"fwd {shape}", _forward(ours, theirs), flops, {"share": 0.5} if is_long else {}, config)
        if has_backward(width, None, False, config):
            yield _row(f"bwd {shape}", _backward(ours, theirs), 2.5 * flops, {"cudnn": 0.62} if is_long else {}, config)


def _forward(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, harness.Timing]:
    plain = [x.detach() for x in ours]
    functions: dict[str, Function] = {
        "ours": partial(flash_attention, *plain),
        "our triton": partial(triton.flash_attention, *plain),
    }
    return harness.measure(
        functions | harness.available({peer: dense.peer_forward(theirs, peer) for peer in dense.BACKENDS})
    )


def _backward(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, harness.Timing]:
    dout = torch.randn_like(ours[0])
    functions = {
        "ours": _gradient(flash_attention(*ours)[0], ours, dout),
        "our triton": _gradient(triton.flash_attention(*ours)[0], ours, dout),
    }
    peers = harness.available({peer: dense.peer_backward(theirs, dout, peer) for peer in dense.BACKENDS})
    return harness.measure(functions | peers, graph=False)


def _gradient(out: Tensor, leaves: list[Tensor], dout: Tensor) -> Function:
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _row(shape: str, timed: dict[str, harness.Timing], flops: float, must: dict[str, float], config: CudaConfig) -> Row:
    peers = {name: timing for name, timing in timed.items() if name != "ours"}
    return Row(
        op="cuda_flash_attention", shape=shape, ours=timed["ours"], peers=peers, flops=flops, limit="bf16",
        must={"our triton": 1.0} | must, notes=str(tuple(config)),
    )  # fmt: skip


def sweeps() -> Iterator[Sweep]:
    """Yield the forward, and both overlaps of the backward, cuDNN beside them; the short sequences come last."""
    for batch, heads, kv_heads, length, width in harness.choose((*dense.FULL[1:], dense.FULL[0]), dense.TINY):
        leaves = dense.leaves_of(batch, length, heads, kv_heads, width)
        theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
        dout = torch.randn_like(leaves[0])
        current = choose_config(width, capability(leaves[0].device))
        suited = [config for config in CONFIGS if config.width in (0, padded_width(width))]
        fitting = [config for config in suited if config.overlap == current.overlap]
        flops = 2.0 * batch * heads * length * length * width
        same = {
            "key": f"width {width}",
            "shape": f"B{batch} N{heads}/{kv_heads} S{length} H{width}",
            "current": current,
        }
        yield Sweep(
            part="forward", candidates={config: _forward_of(leaves, config) for config in fitting}, work=flops, limit="bf16",
            beside=harness.available({"cudnn": dense.peer_forward(theirs, "cudnn")}), **same,
        )  # fmt: skip
        if has_backward(width, None, False, current):
            overlaps = [current._replace(overlap=overlap) for overlap in (1, 2)]
            attentions = {config: partial(flash_attention, config=config) for config in overlaps}
            yield Sweep(
                part="backward", work=2.5 * flops, limit="bf16", graph=False,
                candidates={config: dense.backward_of(leaves, dout, run) for config, run in attentions.items()},
                beside=harness.available({"cudnn": dense.peer_backward(theirs, dout, "cudnn")}), **same,
            )  # fmt: skip


def _forward_of(leaves: list[Tensor], config: CudaConfig) -> Function:
    return lambda: flash_attention(*[x.detach() for x in leaves], config=config)[0]
