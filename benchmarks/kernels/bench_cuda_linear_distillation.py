"""Linear distillation with its products in CUDA C++ beside our Triton products, Liger and TRL.

    python benchmarks/kernels/run_all.py --only cuda_linear_distillation        the table
    python benchmarks/kernels/sweeping.py cuda_linear_distillation              cuts, to choose defaults by

Shapes, work, musts and peers are those of `bench_linear_distillation`; d head is summed and given back in float32.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bench_linear_distillation as theirs
import torch
from harness import Row, available, best_of, is_dry, measure, turn
from sweeping import Sweep
from torch import Tensor

from tessera_kernels.cuda.linear_distillation import CONFIGS, linear_distillation
from tessera_kernels.triton import linear_distillation as triton

DIVERGENCES = ("generalized_jsd", "forward_kl")


def _gradients(
    op: Callable[..., tuple[Tensor, Tensor]], given: tuple[Tensor, ...], **options: Any
) -> tuple[Tensor, ...]:
    loss, num_tokens = op(*given, **options)
    return torch.autograd.grad(loss / num_tokens, given[:2])


def rows() -> Iterator[Row]:
    """Yield the JSD and forward KL."""
    given, wide = theirs.inputs(), theirs.inputs(torch.float32)
    for divergence in turn(DIVERGENCES):
        call = partial(_gradients, linear_distillation, wide, divergence=divergence)
        functions = {
            "ours": call,
            "our triton": partial(_gradients, triton.linear_distillation, wide, divergence=divergence),
        }
        makers = theirs.peers_of(divergence, given)
        timed = measure(functions | available(makers), graph=False)
        peers = {name: timing for name, timing in timed.items() if name != "ours"}
        peers |= best_of("the better of liger and trl", timed, theirs.PEERS)
        yield Row(
            op="cuda_linear_distillation",
            shape=f"{divergence} fwd+bwd {theirs.ROWS} x ({theirs.WIDTH}, {theirs.TEACHER}) x {theirs.VOCAB} bfloat16",
            ours=timed["ours"],
            peers=peers,
            flops=theirs.FLOPS,
            limit="cublas",
            must={"share": 0.75, "our triton": 1.0, "the better of liger and trl": 1.5},
        )


def sweeps() -> Iterator[Sweep]:
    """Yield row kernels, and how many rows are kept and multiplied at a time."""
    wide = theirs.inputs(torch.float32)
    cuts = [CONFIGS[0]._replace(rows=rows, logit_rows=256) for rows in (768, 1024, 2048)]
    for divergence in DIVERGENCES:
        candidates = {
            config: partial(_gradients, linear_distillation, wide, divergence=divergence, config=config)
            for config in (*CONFIGS, *cuts)
        }
        yield Sweep(
            part=divergence, key=f"vocabulary {theirs.VOCAB}", shape=f"{theirs.ROWS} rows", current=CONFIGS[0],
            candidates=candidates, work=theirs.FLOPS, limit="cublas", graph=False,
        )  # fmt: skip
        if is_dry():
            return
